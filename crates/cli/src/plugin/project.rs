//! Where things are: a plugin's project, its module and its cases.

use super::cases;
use crate::output::Failure;
use leeward_module::{MAX_BYTES, Module, inspect};
use std::path::{Path, PathBuf};

/// A module and its cases.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) module: PathBuf,
    pub(crate) cases: PathBuf,
}

/// What a project is written in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Language {
    Rust,
    Js,
    Python,
    C,
}

/// A directory with a plugin's sources.
#[derive(Clone, Debug)]
pub(crate) struct Project {
    pub(crate) dir: PathBuf,
    pub(crate) language: Language,
    /// The directory's name, which is the plugin's.
    pub(crate) name: String,
}

/// By which file a language is known.
const MARKS: [(&str, Language); 5] = [
    ("Cargo.toml", Language::Rust),
    ("package.json", Language::Js),
    ("pyproject.toml", Language::Python),
    ("app.py", Language::Python),
    ("Makefile", Language::C),
];

impl Project {
    /// The project in a directory.
    pub(crate) fn open(dir: &Path) -> Result<Self, Failure> {
        let found = MARKS.into_iter().find(|(mark, _)| dir.join(mark).is_file());
        let Some((_, language)) = found else {
            return Err(Failure::BadInput(format!(
                "{}: no plugin's project; want Cargo.toml (Rust), package.json (JavaScript), pyproject.toml or app.py (Python), or Makefile (C); `leeward plugin new` makes one",
                dir.display()
            )));
        };
        let dir = dir
            .canonicalize()
            .map_err(|error| Failure::BadInput(format!("{}: {error}", dir.display())))?;
        let name = dir.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(Self {
            name: name.unwrap_or_else(|| "plugin".to_owned()),
            dir,
            language,
        })
    }

    /// Where its module is, once it is built.
    pub(crate) fn module(&self) -> PathBuf {
        self.dir.join("build").join(format!("{}.wasm", self.name))
    }
}

/// The module and the cases that a command is about, from what it is given: a module, or a project.
pub(crate) fn target(given: &Path, cases: Option<&Path>) -> Result<Target, Failure> {
    let beside = if given.is_dir() {
        given
    } else {
        given.parent().unwrap_or_else(|| Path::new(""))
    };
    let cases = match cases {
        Some(cases) => cases.to_owned(),
        None => beside.join(cases::FILE),
    };
    if !cases.is_file() {
        return Err(Failure::BadInput(format!(
            "{}: no such file; want the cases to run, here or by --cases FILE",
            cases.display()
        )));
    }
    let module = if given.is_dir() {
        match cases::module_of(&cases)? {
            Some(module) => module,
            None => Project::open(given)?.module(),
        }
    } else {
        given.to_owned()
    };
    Ok(Target { module, cases })
}

/// Reads what a module is.
pub(crate) fn module(file: &Path) -> Result<Module, Failure> {
    inspect(&read(file)?).map_err(|error| Failure::BadInput(format!("{}: {error}", file.display())))
}

/// Reads a module.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    let bad = |why: String| Failure::BadInput(format!("{}: {why}", file.display()));
    let unreadable = |error: std::io::Error| {
        bad(if error.kind() == std::io::ErrorKind::NotFound {
            "no such file; want a module, which `leeward plugin build` makes of a project".to_owned()
        } else {
            error.to_string()
        })
    };
    let len = std::fs::metadata(file).map_err(unreadable)?.len();
    if len > MAX_BYTES as u64 {
        return Err(bad(format!("has {len} bytes; want at most {MAX_BYTES}")));
    }
    std::fs::read(file).map_err(unreadable)
}
