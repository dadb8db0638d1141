//! The rules of the house that a compiler doesn't know.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use leeward_testkit::binaries::workspace;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Row: a package, and the packages of this workspace that it may depend on. The order is bottom-up; what
/// isn't in a row is an edge that somebody decided against. Dev-dependencies are free.
const LAYERS: &[(&str, &[&str])] = &[
    ("leeward-flags", &[]),
    ("leeward-policy", &["leeward-flags"]),
    ("leeward-telemetry", &[]),
    ("leeward-resilience", &["leeward-policy"]),
    ("leeward-cache", &["leeward-policy"]),
    ("leeward-proto", &["leeward-flags", "leeward-policy"]),
    ("leeward-identity", &[]),
    ("leeward-module", &[]),
    (
        "leeward-config",
        &[
            "leeward-flags",
            "leeward-policy",
            "leeward-proto",
            "leeward-identity",
            "leeward-telemetry",
        ],
    ),
    (
        "leeward-wasm",
        &["leeward-module", "leeward-policy", "leeward-telemetry"],
    ),
    ("leeward-zone", &["leeward-identity"]),
    ("leeward-h3", &[]),
    (
        "leeward-upstream",
        &[
            "leeward-policy",
            "leeward-resilience",
            "leeward-identity",
            "leeward-telemetry",
            "leeward-zone",
            "leeward-h3",
        ],
    ),
    ("leeward-queue", &["leeward-policy", "leeward-resilience"]),
    (
        "leeward-http",
        &[
            "leeward-flags",
            "leeward-policy",
            "leeward-resilience",
            "leeward-identity",
            "leeward-wasm",
            "leeward-upstream",
            "leeward-zone",
            "leeward-h3",
            "leeward-telemetry",
            "leeward-cache",
            "leeward-queue",
        ],
    ),
    (
        "leeward-proxy",
        &[
            "leeward-flags",
            "leeward-policy",
            "leeward-resilience",
            "leeward-identity",
            "leeward-module",
            "leeward-wasm",
            "leeward-upstream",
            "leeward-zone",
            "leeward-telemetry",
            "leeward-proto",
            "leeward-config",
            "leeward-cache",
            "leeward-queue",
            "leeward-http",
        ],
    ),
    (
        "leeward-control",
        &[
            "leeward-module",
            "leeward-policy",
            "leeward-resilience",
            "leeward-proto",
            "leeward-telemetry",
            "leeward-identity",
        ],
    ),
    (
        "leeward-cli",
        &[
            "leeward-module",
            "leeward-wasm",
            "leeward-policy",
            "leeward-proto",
            "leeward-identity",
        ],
    ),
    (
        "leeward-testkit",
        &[
            "leeward-policy",
            "leeward-proto",
            "leeward-identity",
            "leeward-telemetry",
        ],
    ),
    ("leeward-shop", &[]),
    // Measures the proxy from outside, in a mesh too, and simulates with its machines.
    (
        "leeward-bench",
        &[
            "leeward-flags",
            "leeward-identity",
            "leeward-policy",
            "leeward-proto",
            "leeward-resilience",
            "leeward-testkit",
            "leeward-zone",
        ],
    ),
    ("leeward-tests", &[]),
];

/// What a crate must not name in its normal dependencies, since it would not be pure, or not replaceable.
const ABSENT: &[(&str, &[&str])] = &[
    (
        "leeward-flags",
        &["tokio", "prost", "serde", "tonic", "hyper", "fastrand", "tracing"],
    ),
    (
        "leeward-policy",
        &["tokio", "prost", "serde", "tonic", "hyper", "fastrand", "tracing"],
    ),
    (
        "leeward-resilience",
        &["tokio", "prost", "serde", "tonic", "hyper", "fastrand", "tracing"],
    ),
    (
        "leeward-cache",
        &["hyper", "fastrand", "prost", "serde", "tonic", "tracing"],
    ),
    ("leeward-proto", &["tokio", "hyper"]),
    ("leeward-telemetry", &["wasmtime"]),
    ("leeward-wasm", &["hyper", "hyper-util", "tonic", "prost"]),
    ("leeward-zone", &["hyper", "wasmtime", "tonic", "prost"]),
    ("leeward-h3", &["hyper", "wasmtime", "tonic", "prost"]),
    ("leeward-upstream", &["wasmtime", "tonic", "prost", "quinn", "h3"]),
    ("leeward-queue", &["hyper", "http", "tonic", "wasmtime"]),
    (
        "leeward-http",
        &[
            "wasmtime",
            "tonic",
            "prost",
            "quinn",
            "h3",
            "rusqlite",
            "async-nats",
        ],
    ),
    ("leeward-control", &["wasmtime"]),
];

/// Lines that a file may have.
const MAX_LINES: usize = 800;

#[test]
fn no_edge_outside_the_table_of_layers() {
    let packages = packages();
    let names: BTreeSet<&str> = packages.iter().map(|p| text(&p["name"])).collect();
    let rows: BTreeSet<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, rows, "every package has a row, and every row a package");
    for package in &packages {
        let name = text(&package["name"]);
        let allowed = LAYERS
            .iter()
            .find(|(n, _)| *n == name)
            .map_or(&[][..], |(_, allowed)| allowed);
        let absent = ABSENT
            .iter()
            .find(|(n, _)| *n == name)
            .map_or(&[][..], |(_, absent)| absent);
        for dependency in normal_dependencies(package) {
            let ours = names.contains(dependency);
            assert!(
                !ours || allowed.contains(&dependency),
                "{name} -> {dependency} breaks the layers; see ARCHITECTURE.md"
            );
            assert!(
                !absent.contains(&dependency),
                "{name} must not know {dependency}; see ARCHITECTURE.md"
            );
        }
    }
}

#[test]
fn every_package_inherits_lints_and_versions() {
    for package in packages() {
        let path = PathBuf::from(text(&package["manifest_path"]));
        let manifest = read(&path);
        let shown = path.display();
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{shown}: [lints] workspace = true"
        );
        for field in ["version", "edition", "rust-version", "license"] {
            assert!(
                manifest.contains(&format!("{field}.workspace = true")),
                "{shown}: {field}.workspace = true"
            );
        }
        let mut in_dependencies = false;
        for line in manifest.lines() {
            if line.starts_with('[') {
                in_dependencies = line.contains("dependencies");
            } else if in_dependencies && !line.trim().is_empty() && !line.trim_start().starts_with('#') {
                assert!(
                    line.contains("workspace = true"),
                    "{shown}: {line:?}: versions stand in the workspace's table"
                );
            }
        }
    }
}

#[test]
fn a_package_is_named_for_its_directory() {
    for package in packages() {
        let path = PathBuf::from(text(&package["manifest_path"]));
        let dir = path
            .parent()
            .and_then(Path::file_name)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        // The control plane's directory says what it is, its package what it runs as.
        let want = if dir == "control-plane" {
            "leeward-control".to_owned()
        } else {
            format!("leeward-{dir}")
        };
        assert_eq!(text(&package["name"]), want);
    }
}

#[test]
fn files_are_of_a_size_and_finished() {
    let mut seen = 0;
    for path in sources() {
        let source = read(&path);
        let shown = path.strip_prefix(workspace()).unwrap().display().to_string();
        seen += 1;
        assert!(
            source.lines().count() <= MAX_LINES,
            "{shown} has more than {MAX_LINES} lines"
        );
        let named = !shown.ends_with("/mod.rs") || shown.contains("/tests/");
        assert!(named, "{shown}: name the file for the module");
        // Built from pieces, so that this file is not its own exception.
        let todo = ["TO", "DO"].concat();
        for (number, line) in source.lines().enumerate() {
            let at = format!("{shown}:{}", number + 1);
            if let Some((_, after)) = line.split_once(&todo) {
                assert!(
                    after.starts_with("(#"),
                    "{at}: {todo} without an issue's number, as {todo}(#7)"
                );
            }
            let is_comment = line.trim_start().starts_with("//");
            for unfinished in ["todo", "unimplemented", "dbg"] {
                let call = format!("{unfinished}!(");
                assert!(is_comment || !line.contains(&call), "{at}: {call}");
            }
            assert!(
                !line.contains(&["#[ig", "nore"].concat()),
                "{at}: a test that doesn't run"
            );
            assert!(
                !line.contains(&["FIX", "ME"].concat()),
                "{at}: finish it, or file an issue"
            );
        }
    }
    assert!(seen > 50, "only {seen} source files were found");
}

/// The places where it is allowed say why. Guests are another matter: nothing that they do is safe or unsafe to us.
#[test]
fn unsafe_code_is_in_two_places() {
    let allowed: BTreeSet<String> = sources()
        .into_iter()
        .filter(|path| {
            let guests = ["plugins", "crates/wasm/tests/guests"];
            let is_guest = guests.iter().any(|dir| path.starts_with(workspace().join(dir)));
            !path.ends_with("tests/tests/tidy.rs") && !is_guest
        })
        .filter(|path| {
            let source = read(path);
            let mut words = source.lines().filter(|line| !line.trim_start().starts_with("//"));
            words.any(|line| line.contains("unsafe_code") || line.contains("unsafe {"))
        })
        .map(|path| path.strip_prefix(workspace()).unwrap().display().to_string())
        .collect();
    let places = ["crates/proxy/src/allocator.rs", "crates/wasm/src/precompiled.rs"];
    assert_eq!(allowed, places.map(ToOwned::to_owned).into());
    let manifest = read(&workspace().join("Cargo.toml"));
    assert!(manifest.contains("unsafe_code = \"deny\""));
}

#[test]
fn libraries_say_what_they_are_for_and_what_they_do_not_know() {
    for package in packages() {
        let root = PathBuf::from(text(&package["manifest_path"]))
            .with_file_name("src")
            .join("lib.rs");
        let name = text(&package["name"]);
        if !root.exists() || matches!(name, "leeward-tests" | "leeward-shop" | "leeward-bench") {
            continue;
        }
        let source = read(&root);
        assert!(source.starts_with("//! "), "{name}: lib.rs begins with //!");
        let doc: String = source
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .collect();
        assert!(
            doc.len() > 200,
            "{name}: lib.rs says too little of what the crate is for"
        );
    }
}

#[test]
fn the_papers_name_every_package() {
    let (readme, architecture) = (
        read(&workspace().join("README.md")),
        read(&workspace().join("ARCHITECTURE.md")),
    );
    for package in packages() {
        let path = PathBuf::from(text(&package["manifest_path"]));
        let dir = path
            .parent()
            .unwrap()
            .strip_prefix(workspace())
            .unwrap()
            .display()
            .to_string();
        let name = text(&package["name"]);
        let short = dir.rsplit('/').next().unwrap();
        let named = [dir.as_str(), name, &format!("`{short}`")]
            .iter()
            .any(|n| architecture.contains(n));
        assert!(named, "ARCHITECTURE.md doesn't name {dir}");
    }
    for what in ["leeward demo", "cargo test"] {
        assert!(readme.contains(what), "README.md doesn't tell of `{what}`");
    }
    assert!(read(&workspace().join("LICENSE")).contains("Apache License"));
}

#[test]
fn relative_links_of_the_papers_lead_somewhere() {
    for paper in papers() {
        let text = read(&paper);
        for (_, rest) in text.match_indices("](").map(|(at, _)| text.split_at(at + 2)) {
            let link = rest.split([')', '#']).next().unwrap();
            if !link.is_empty() && !link.contains("://") {
                let to = paper.with_file_name(link);
                assert!(to.exists(), "{}: {link} leads nowhere", paper.display());
            }
        }
    }
}

/// References are not followed, since a paper mostly shows a part.
#[test]
fn policy_in_the_papers_and_examples_is_valid() {
    let mut found: Vec<(PathBuf, String)> = Vec::new();
    for paper in papers() {
        let text = read(&paper);
        let blocks = text.split("```yaml\n").skip(1);
        found.extend(blocks.map(|block| (paper.clone(), block.split("```").next().unwrap().to_owned())));
    }
    found.extend(
        files_of("yaml", &["examples"])
            .into_iter()
            .map(|file| (file.clone(), read(&file))),
    );
    found.retain(|(_, text)| text.contains("apiVersion: leeward.dev/v1"));
    for (file, text) in &found {
        let parsed = leeward_proto::manifest::parse(&file.display().to_string(), &filled_in(text));
        let resources = parsed.unwrap_or_else(|errors| panic!("{}", errors[0]));
        assert!(!resources.is_empty(), "{}: no resources", file.display());
    }
    assert!(found.len() >= 4, "only {} were found", found.len());
}

/// What `leeward demo` does with `${NAMES}`: most are addresses.
fn filled_in(text: &str) -> String {
    let text = text
        .replace("${PLUGIN}", "/plugin.wasm")
        .replace("${PLUGIN_SHA256}", &"0".repeat(64));
    let mut parts = text.split("${");
    let mut filled = parts.next().unwrap().to_owned();
    for (part, port) in parts.zip(1u16..) {
        let (_, rest) = part.split_once('}').unwrap();
        filled.extend(["127.0.0.1:", &port.to_string(), rest]);
    }
    filled
}

/// The documents that people read.
fn papers() -> Vec<PathBuf> {
    let mut papers = files_of("md", &["docs"]);
    papers.extend(["README.md", "ARCHITECTURE.md"].map(|paper| workspace().join(paper)));
    papers
}

fn packages() -> Vec<Value> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn normal_dependencies(package: &Value) -> Vec<&str> {
    let all = package["dependencies"].as_array().unwrap().iter();
    all.filter(|dependency| dependency["kind"].is_null())
        .map(|dependency| text(&dependency["name"]))
        .collect()
}

/// Every Rust file that somebody wrote.
fn sources() -> Vec<PathBuf> {
    files_of(
        "rs",
        &["crates", "control-plane", "examples", "plugins", "tests", "bench"],
    )
}

/// Every file with this extension below these directories.
fn files_of(wanted: &str, tops: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo: Vec<PathBuf> = tops.iter().map(|top| workspace().join(top)).collect();
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                if entry.file_name() != "target" {
                    todo.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == wanted) {
                found.push(path);
            }
        }
    }
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}
