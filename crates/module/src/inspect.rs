//! A module's sections, read.

use sha2::{Digest, Sha256};
use wasmparser::{
    BinaryReaderError, ComponentExternalKind, ComponentTypeRef, Encoding, ExternalKind, Parser, Payload,
    TypeBounds,
};

/// The largest module, in bytes.
pub const MAX_BYTES: usize = 64 << 20;
/// Imports and exports that a module may have, each.
const MAX_NAMES: usize = 4096;
/// The longest name of an import or an export, in bytes.
const MAX_NAME: usize = 512;
/// Modules and components within each other.
const MAX_DEPTH: usize = 32;

/// What a module is for, by its exports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A component with the world `fallback` of `leeward:plugin`.
    Fallback,
    /// The same with the world `filter`.
    Filter,
    /// The same with the world `router`.
    Router,
    /// A component that exports `wasi:http/incoming-handler`.
    WasiHttp,
    /// A module with the proxy-wasm ABI.
    ProxyWasm,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::Fallback,
        Self::Filter,
        Self::Router,
        Self::WasiHttp,
        Self::ProxyWasm,
    ];

    /// The word of policy: the same as `leeward_policy::model::PluginKind` has.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fallback => "Fallback",
            Self::Filter => "Filter",
            Self::Router => "Router",
            Self::WasiHttp => "WasiHttp",
            Self::ProxyWasm => "ProxyWasm",
        }
    }
}

/// What a module says of itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Module {
    /// What it is for.
    pub kind: Kind,
    /// The version of its contract: of the WIT package `leeward:plugin`, of `wasi:http`, or of the proxy-wasm ABI.
    pub version: Box<str>,
    /// `NAMESPACE:PACKAGE/INTERFACE@VERSION`, or `MODULE.FUNCTION` of a module that is no component.
    pub imports: Vec<Box<str>>,
    /// What it exports, by name.
    pub exports: Vec<Box<str>>,
    /// Its size in bytes.
    pub size: usize,
    /// Its SHA-256.
    pub sha256: [u8; 32],
}

/// Why bytes are no plugin's module.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Too large.
    #[error("the module has {0} bytes; want at most {MAX_BYTES} (64 MiB)")]
    TooLarge(usize),
    /// Not WebAssembly.
    #[error("not a WebAssembly module or component")]
    Malformed(#[source] BinaryReaderError),
    /// More imports or exports than any plugin has.
    #[error("the module has more than {MAX_NAMES} {0}")]
    TooMany(&'static str),
    /// A name that nobody could read.
    #[error("the name of {what} number {number} is longer than {MAX_NAME} bytes, or has control characters")]
    Name {
        /// Imports or exports.
        what: &'static str,
        /// Its place, from 1.
        number: usize,
    },
    /// Nested without end.
    #[error("components are nested more than {MAX_DEPTH} deep")]
    Deep,
    /// It exports nothing that a proxy would call.
    #[error(
        "the {form} exports nothing that a proxy calls; want a component with a world of leeward:plugin (on-failure, on-request or choose) or wasi:http/incoming-handler, or a module with proxy_abi_version_0_2_1, _0_2_0 or _0_1_0"
    )]
    NoPlugin {
        /// Component or module.
        form: &'static str,
    },
    /// It exports two things of which each would be a plugin.
    #[error("the component is a {} and a {} at once; want one", .0.as_str(), .1.as_str())]
    Both(Kind, Kind),
    /// It exports what a world has, and doesn't say whose world.
    #[error(
        "the component exports {0}, but imports nothing of leeward:plugin, so that its version isn't known"
    )]
    NoVersion(Box<str>),
    /// It was made of parts of different versions.
    #[error("the component imports leeward:plugin {0} and {1}; want one version")]
    Versions(Box<str>, Box<str>),
    /// A version that no proxy of this build has.
    #[error("the module is made for {contract} {found}; this build has {known}")]
    Version {
        /// Which contract.
        contract: &'static str,
        /// The version.
        found: Box<str>,
        /// What there is.
        known: &'static str,
    },
}

/// Reads what a module is.
///
/// # Errors
///
/// [`ModuleError`]: it is too large, broken, or no plugin.
pub fn inspect(bytes: &[u8]) -> Result<Module, ModuleError> {
    if bytes.len() > MAX_BYTES {
        return Err(ModuleError::TooLarge(bytes.len()));
    }
    let names = Names::read(bytes)?;
    let (kind, version) = if names.is_component {
        component(&names)?
    } else {
        proxy_wasm(&names)?
    };
    Ok(Module {
        kind,
        version,
        imports: names.imports,
        exports: names.exports,
        size: bytes.len(),
        sha256: Sha256::digest(bytes).into(),
    })
}

/// A digest as it is written: 64 hex digits.
pub fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digest that is written so; upper case is read, too.
pub fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(digits.chunks(2)) {
        let digit = |at: usize| char::from(*pair.get(at)?).to_digit(16);
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(digest)
}

/// The name without what comes after `@`, and that.
pub(crate) fn versioned(name: &str) -> (&str, Option<&str>) {
    match name.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (name, None),
    }
}

/// The outermost module's names.
#[derive(Default)]
struct Names {
    is_component: bool,
    imports: Vec<Box<str>>,
    exports: Vec<Box<str>>,
}

impl Names {
    fn read(bytes: &[u8]) -> Result<Self, ModuleError> {
        let mut names = Self::default();
        let mut depth = 0usize;
        for payload in Parser::new(0).parse_all(bytes) {
            #[expect(
                clippy::wildcard_enum_match_arm,
                reason = "thirty sections of which five say what this is about"
            )]
            match payload.map_err(ModuleError::Malformed)? {
                Payload::Version { encoding, .. } if depth == 0 => {
                    names.is_component = encoding == Encoding::Component;
                }
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => {
                    depth += 1;
                    if depth > MAX_DEPTH {
                        return Err(ModuleError::Deep);
                    }
                }
                Payload::End(_) => depth = depth.saturating_sub(1),
                Payload::ImportSection(section) if depth == 0 => {
                    for import in section.into_imports() {
                        let import = import.map_err(ModuleError::Malformed)?;
                        names.import(&format!("{}.{}", import.module, import.name))?;
                    }
                }
                Payload::ComponentImportSection(section) if depth == 0 => {
                    for import in section {
                        let import = import.map_err(ModuleError::Malformed)?;
                        // Another name for a type gives nothing to whoever imports it; compilers write them for the types
                        // of a world's functions.
                        if !matches!(import.ty, ComponentTypeRef::Type(TypeBounds::Eq(_))) {
                            names.import(import.name.name)?;
                        }
                    }
                }
                Payload::ExportSection(section) if depth == 0 => {
                    for export in section {
                        let export = export.map_err(ModuleError::Malformed)?;
                        if export.kind == ExternalKind::Func {
                            names.export(export.name)?;
                        }
                    }
                }
                Payload::ComponentExportSection(section) if depth == 0 => {
                    for export in section {
                        let export = export.map_err(ModuleError::Malformed)?;
                        if export.kind != ComponentExternalKind::Type {
                            names.export(export.name.name)?;
                        }
                    }
                }
                // What is inside, and what says nothing of the outside.
                _ => {}
            }
        }
        Ok(names)
    }

    fn import(&mut self, name: &str) -> Result<(), ModuleError> {
        add(&mut self.imports, "imports", name)
    }

    fn export(&mut self, name: &str) -> Result<(), ModuleError> {
        add(&mut self.exports, "exports", name)
    }

    fn exports(&self, name: &str) -> bool {
        self.exports.iter().any(|export| &**export == name)
    }
}

fn add(names: &mut Vec<Box<str>>, what: &'static str, name: &str) -> Result<(), ModuleError> {
    if names.len() >= MAX_NAMES {
        return Err(ModuleError::TooMany(what));
    }
    // Names are shown to people, and stored a line each.
    if name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let number = names.len() + 1;
        return Err(ModuleError::Name { what, number });
    }
    names.push(name.into());
    Ok(())
}

/// The function by which a world is known; the engine looks for the others.
const WORLDS: [(Kind, &str); 3] = [
    (Kind::Fallback, "on-failure"),
    (Kind::Filter, "on-request"),
    (Kind::Router, "choose"),
];

fn component(names: &Names) -> Result<(Kind, Box<str>), ModuleError> {
    let handler = names.exports.iter().find_map(|export| {
        let (name, version) = versioned(export);
        (name == "wasi:http/incoming-handler").then_some(version.unwrap_or_default())
    });
    let worlds = WORLDS.into_iter().filter(|(_, export)| names.exports(export));
    let mut found: Vec<(Kind, &str)> = worlds.collect();
    found.extend(handler.map(|version| (Kind::WasiHttp, version)));
    match found.as_slice() {
        [] => Err(ModuleError::NoPlugin { form: "component" }),
        [(first, _), (second, _), ..] => Err(ModuleError::Both(*first, *second)),
        [(Kind::WasiHttp, version)] => {
            known("wasi:http", version, &["0.2."], "0.2")?;
            Ok((Kind::WasiHttp, (*version).into()))
        }
        [(kind, export)] => Ok((*kind, plugin_version(names, export)?)),
    }
}

/// The version of a world stands only with the interfaces that it imports; every world imports one, for its types.
fn plugin_version(names: &Names, export: &str) -> Result<Box<str>, ModuleError> {
    let mut version: Option<&str> = None;
    for import in &names.imports {
        let (name, this) = versioned(import);
        let Some(this) = this.filter(|_| name.starts_with("leeward:plugin/")) else {
            continue;
        };
        match version {
            Some(other) if other != this => return Err(ModuleError::Versions(other.into(), this.into())),
            Some(_) | None => version = Some(this),
        }
    }
    let version = version.ok_or_else(|| ModuleError::NoVersion(export.into()))?;
    known("leeward:plugin", version, &["0.1.", "0.2."], "0.1 and 0.2")?;
    Ok(version.into())
}

fn known(
    contract: &'static str,
    found: &str,
    beginnings: &[&str],
    known: &'static str,
) -> Result<(), ModuleError> {
    if beginnings.iter().any(|beginning| found.starts_with(beginning)) {
        return Ok(());
    }
    let found = found.into();
    Err(ModuleError::Version {
        contract,
        found,
        known,
    })
}

/// Newest first: a module that has several is served by the newest.
const ABIS: [(&str, &str); 3] = [
    ("proxy_abi_version_0_2_1", "0.2.1"),
    ("proxy_abi_version_0_2_0", "0.2.0"),
    ("proxy_abi_version_0_1_0", "0.1.0"),
];

fn proxy_wasm(names: &Names) -> Result<(Kind, Box<str>), ModuleError> {
    if let Some((_, version)) = ABIS.into_iter().find(|(export, _)| names.exports(export)) {
        return Ok((Kind::ProxyWasm, version.into()));
    }
    let other = names
        .exports
        .iter()
        .find_map(|export| export.strip_prefix("proxy_abi_version_"));
    match other {
        Some(other) => Err(ModuleError::Version {
            contract: "the proxy-wasm ABI",
            found: other.replace('_', ".").into(),
            known: "0.1.0, 0.2.0 and 0.2.1",
        }),
        None => Err(ModuleError::NoPlugin { form: "module" }),
    }
}

#[cfg(test)]
mod tests;
