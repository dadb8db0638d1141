//! `leeward plugin new`: a project that builds and whose cases pass.

use super::wit::CONTRACT;
use crate::output::{Failure, say};
use clap::{Args, ValueEnum};
use leeward_policy::Name;
use std::path::{Path, PathBuf};

/// What to make.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The plugin's name: lower-case letters, digits and dashes.
    name: String,
    /// What it is written in.
    #[arg(long)]
    lang: Lang,
    /// What it is for.
    #[arg(long, default_value = "fallback")]
    kind: World,
    /// The directory in which the project's is made.
    #[arg(long, default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// Where the SDK for Rust is; without it, it is put into the project.
    #[arg(long, value_name = "DIR")]
    sdk: Option<PathBuf>,
}

/// The languages that there are templates for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Lang {
    /// Rust, with the SDK.
    Rust,
    /// JavaScript, with componentize-js.
    Js,
    /// Python, with componentize-py.
    Python,
    /// C, with clang or zig.
    C,
}

/// The worlds of the contract.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum World {
    /// Answers when a call failed.
    Fallback,
    /// Sees requests and answers on their way.
    Filter,
    /// Chooses among backends.
    Router,
}

/// A file of a project, and its text.
type File = (&'static str, &'static str);

/// A template's text.
macro_rules! template {
    ($name:literal) => {
        include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../plugins/templates/",
            $name
        ))
    };
}

/// A file of the SDK, as it stands in a project.
macro_rules! sdk {
    ($name:literal) => {
        (
            concat!("sdk/leeward-plugin/", $name),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/sdk/", $name)),
        )
    };
}

/// The SDK for Rust. It finds the contract beside itself, as in this repository.
const SDK: [File; 12] = [
    sdk!("Cargo.toml"),
    sdk!("build.rs"),
    sdk!("src/bindings.rs"),
    sdk!("src/fallback.rs"),
    sdk!("src/filter.rs"),
    sdk!("src/host.rs"),
    sdk!("src/lib.rs"),
    sdk!("src/memo.rs"),
    sdk!("src/mesh.rs"),
    sdk!("src/response.rs"),
    sdk!("src/router.rs"),
    sdk!("src/store.rs"),
];
/// The versions of crates that the SDK is tested with.
const LOCK: &str = include_str!("../../../../plugins/Cargo.lock");
/// The versions of tools that the templates are tested with.
const JS: &str = "0.23.0";
const PY: &str = "0.25.1";

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let name = &options.name;
    if let Err(error) = Name::parse(name) {
        return Err(Failure::BadInput(format!("NAME: {error}")));
    }
    // It is a package's name, too.
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || name.contains('.') {
        return Err(Failure::BadInput(format!(
            "NAME: {name:?} can't be a package's name; want one that begins with a letter, without dots"
        )));
    }
    if options.sdk.is_some() && options.lang != Lang::Rust {
        return Err(Failure::BadInput("--sdk: is for --lang rust".to_owned()));
    }
    let project = options.dir.join(name);
    let sdk = options.sdk.as_deref().map(sdk_at).transpose()?;
    let files = files(options.lang, options.kind, sdk.is_some());
    let failed = |path: &Path, error: &std::io::Error| {
        let why = if error.kind() == std::io::ErrorKind::AlreadyExists {
            "is there already; want a name that nothing has".to_owned()
        } else {
            error.to_string()
        };
        Failure::BadInput(format!("{}: {why}", path.display()))
    };
    // Nothing that is there is changed.
    std::fs::create_dir(&project).map_err(|error| failed(&project, &error))?;
    for (path, text) in files {
        let path = project.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| failed(parent, &error))?;
        }
        let text = fill(text, options, sdk.as_deref().unwrap_or("sdk/leeward-plugin"));
        std::fs::write(&path, text).map_err(|error| failed(&path, &error))?;
    }
    say(&format!(
        "{}: a {} in {}; next: cd {0} && leeward plugin build && leeward plugin test",
        project.display(),
        options.kind.word(),
        options.lang.word()
    ));
    Ok(())
}

/// The SDK's directory as a path from anywhere.
fn sdk_at(dir: &Path) -> Result<String, Failure> {
    let bad = |why: &str| Failure::BadInput(format!("--sdk: {}: {why}", dir.display()));
    if !dir.join("Cargo.toml").is_file() {
        return Err(bad(
            "no package; want the directory of the SDK, plugins/sdk of Leeward's repository",
        ));
    }
    let dir = dir.canonicalize().map_err(|error| bad(&error.to_string()))?;
    Ok(dir.display().to_string())
}

/// What a project is made of.
fn files(lang: Lang, kind: World, own_sdk: bool) -> Vec<File> {
    let mut files = vec![
        ("README.md", template!("README.md.in")),
        ("plugin.yaml", template!("plugin.yaml.in")),
        (
            "cases.yaml",
            match kind {
                World::Fallback => template!("cases/fallback.yaml"),
                World::Filter => template!("cases/filter.yaml"),
                World::Router => template!("cases/router.yaml"),
            },
        ),
    ];
    match lang {
        // There it would be taken for more of the world that the SDK has bindings made of.
        Lang::Rust => {}
        Lang::Js | Lang::Python | Lang::C => files.push(("wit/leeward-plugin.wit", CONTRACT)),
    }
    match lang {
        Lang::Rust => {
            files.push(("Cargo.toml", template!("rust/Cargo.toml.in")));
            files.push(("Cargo.lock", LOCK));
            files.push((".gitignore", template!("rust/gitignore")));
            files.push((
                "src/lib.rs",
                match kind {
                    World::Fallback => template!("rust/fallback.rs"),
                    World::Filter => template!("rust/filter.rs"),
                    World::Router => template!("rust/router.rs"),
                },
            ));
            if !own_sdk {
                files.push(("sdk/wit/leeward-plugin.wit", CONTRACT));
                files.extend(SDK);
            }
        }
        Lang::Js => {
            files.push(("package.json", template!("js/package.json.in")));
            files.push((".gitignore", template!("js/gitignore")));
            files.push((
                "src/plugin.js",
                match kind {
                    World::Fallback => template!("js/fallback.js"),
                    World::Filter => template!("js/filter.js"),
                    World::Router => template!("js/router.js"),
                },
            ));
        }
        Lang::Python => {
            files.push(("pyproject.toml", template!("python/pyproject.toml.in")));
            files.push((".gitignore", template!("python/gitignore")));
            files.push((
                "app.py",
                match kind {
                    World::Fallback => template!("python/fallback.py"),
                    World::Filter => template!("python/filter.py"),
                    World::Router => template!("python/router.py"),
                },
            ));
        }
        Lang::C => c(&mut files, kind),
    }
    files
}

fn c(files: &mut Vec<File>, kind: World) {
    files.push(("Makefile", template!("c/Makefile.in")));
    files.push((".gitignore", template!("c/gitignore")));
    let [source, header, bindings] = match kind {
        World::Fallback => [
            template!("c/fallback.c"),
            template!("c/bindings/fallback.h"),
            template!("c/bindings/fallback.c"),
        ],
        World::Filter => [
            template!("c/filter.c"),
            template!("c/bindings/filter.h"),
            template!("c/bindings/filter.c"),
        ],
        World::Router => [
            template!("c/router.c"),
            template!("c/bindings/router.h"),
            template!("c/bindings/router.c"),
        ],
    };
    files.push(("src/plugin.c", source));
    match kind {
        World::Fallback => files.extend([("bindings/fallback.h", header), ("bindings/fallback.c", bindings)]),
        World::Filter => files.extend([("bindings/filter.h", header), ("bindings/filter.c", bindings)]),
        World::Router => files.extend([("bindings/router.h", header), ("bindings/router.c", bindings)]),
    }
}

fn fill(text: &str, options: &Options, sdk: &str) -> String {
    text.replace("{{name}}", &options.name)
        .replace("{{kind}}", options.kind.word())
        .replace("{{Kind}}", options.kind.of_policy())
        .replace("{{onFault}}", options.kind.on_fault())
        .replace("{{sdk}}", sdk)
        .replace("{{js}}", JS)
        .replace("{{py}}", PY)
}

impl Lang {
    const fn word(self) -> &'static str {
        match self {
            Self::Rust => "Rust",
            Self::Js => "JavaScript",
            Self::Python => "Python",
            Self::C => "C",
        }
    }
}

impl World {
    const fn word(self) -> &'static str {
        match self {
            Self::Fallback => "fallback",
            Self::Filter => "filter",
            Self::Router => "router",
        }
    }

    const fn of_policy(self) -> &'static str {
        match self {
            Self::Fallback => "Fallback",
            Self::Filter => "Filter",
            Self::Router => "Router",
        }
    }

    const fn on_fault(self) -> &'static str {
        match self {
            Self::Fallback => "NextRung",
            Self::Filter | Self::Router => "FailOpen",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_the_sdk_is_put_into_a_project() {
        let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/sdk");
        let known = |file: &Path| {
            let name = Path::new("sdk/leeward-plugin").join(file.strip_prefix(&sdk).unwrap());
            SDK.iter().any(|(known, _)| Path::new(known) == name)
        };
        for dir in [sdk.clone(), sdk.join("src")] {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                assert!(
                    path.is_dir() || known(&path),
                    "{} is not in new.rs's SDK",
                    path.display()
                );
            }
        }
    }

    #[test]
    fn nothing_is_left_to_fill_in() {
        for lang in Lang::value_variants() {
            for kind in World::value_variants() {
                let options = Options {
                    name: "a-b".to_owned(),
                    lang: *lang,
                    kind: *kind,
                    dir: PathBuf::new(),
                    sdk: None,
                };
                for (path, text) in files(*lang, *kind, false) {
                    let text = fill(text, &options, "sdk/leeward-plugin");
                    for blank in ["name", "kind", "Kind", "onFault", "sdk", "js", "py"] {
                        assert!(!text.contains(&format!("{{{{{blank}}}}}")), "{path}: {blank}");
                    }
                }
            }
        }
    }
}
