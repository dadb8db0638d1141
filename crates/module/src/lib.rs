//! What a WebAssembly module is, what it imports and exports, and who signed it.
