//! What memory a module asks for.

use crate::inspect::ModuleError;
use wasmparser::{MemoryType, Parser, Payload, TypeRef};

/// A linear memory that a module, or a part of a component, defines or wants given. In bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Memory {
    /// What it begins with.
    pub min: u64,
    /// The most that it can have; `None` if it says none.
    pub max: Option<u64>,
}

/// The size of a page, as a power of two, where a module doesn't say otherwise.
const PAGE: u32 = 16;

/// The memories of a module. A component's parts may share one, which counts once.
///
/// # Errors
///
/// [`ModuleError::Malformed`].
pub fn memories(bytes: &[u8]) -> Result<Vec<Memory>, ModuleError> {
    let (mut defined, mut given) = (Vec::new(), Vec::new());
    for payload in Parser::new(0).parse_all(bytes) {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "thirty sections of which two have memories"
        )]
        match payload.map_err(ModuleError::Malformed)? {
            Payload::MemorySection(section) => {
                for memory in section {
                    defined.push(of(&memory.map_err(ModuleError::Malformed)?));
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    if let TypeRef::Memory(memory) = import.map_err(ModuleError::Malformed)?.ty {
                        given.push(of(&memory));
                    }
                }
            }
            _ => {}
        }
    }
    // Where a part defines it, the others are given that.
    Ok(if defined.is_empty() { given } else { defined })
}

fn of(memory: &MemoryType) -> Memory {
    let page = memory.page_size_log2.unwrap_or(PAGE).min(PAGE);
    let bytes = |pages: u64| pages.saturating_mul(1 << page);
    Memory {
        min: bytes(memory.initial),
        max: memory.maximum.map(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: &[(u64, Option<u64>)]) {
        let found = memories(&wat::parse_str(text).unwrap()).unwrap();
        let found: Vec<_> = found.iter().map(|memory| (memory.min, memory.max)).collect();
        assert_eq!(found, want, "{text}");
    }

    #[test]
    fn memories_are_found_in_modules_and_in_parts_of_components() {
        check("(module)", &[]);
        check("(module (memory 2 3))", &[(131_072, Some(196_608))]);
        check(
            "(module (import \"env\" \"memory\" (memory 1)))",
            &[(65_536, None)],
        );
        check(
            "(component (core module (memory 1)) (core module (import \"m\" \"m\" (memory 0))))",
            &[(65_536, None)],
        );
        check("(module (memory 65536))", &[(4 << 30, None)]);
    }

    #[test]
    fn what_is_no_module_is_refused() {
        assert!(memories(b"no").is_err());
    }
}
