//! What a WebAssembly module is, what it imports and exports, and who signed it.
//!
//! In the path of a plugin: the command looks at a module before it pushes it, the control plane before it keeps
//! it and whenever policy names it, a proxy before it compiles it. All three ask here, so that what one takes the
//! others take.
//!
//! This crate knows no I/O, no policy, and no engine: it reads a module's sections and runs nothing. Whether the code
//! in it is valid is the engine's to say.
//!
//! Read first: [`inspect`], then [`audit`], then [`verify`].
//!
//! Invariants:
//! - No input makes anything here panic, or take more memory than a small part of the input's size.
//! - What is not known to be harmless is refused: an import must be on a list.

mod audit;
mod inspect;
mod memory;
mod signature;

pub use audit::{PROXY_WASM_FUNCTIONS, Refused, audit};
pub use inspect::{Kind, MAX_BYTES, Module, ModuleError, hex, inspect, parse_hex};
pub use memory::{Memory, memories};
pub use signature::{MAX_SIGNATURE, SignatureError, check_signature, signature_path, verify, verify_any};
