//! Tests that cross crates; see `tests/`. Each file starts the real programs.
