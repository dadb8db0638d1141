//! Reading policy files, and checking them without a control plane.

use crate::output::{Failure, say};
use leeward_policy::{Key, Name, Spec};
use leeward_proto::{manifest, parse, v1};
use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Reads resources from files, directories and standard input.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<v1::Resource>, Failure> {
    let (mut resources, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        for (name, text) in texts(path)? {
            match manifest::parse(&name, &text) {
                Ok(read) => resources.extend(read),
                Err(bad) => errors.extend(bad.iter().map(ToString::to_string)),
            }
        }
    }
    if !errors.is_empty() {
        return Err(Failure::BadInput(errors.join("\n")));
    }
    if resources.is_empty() {
        return Err(Failure::BadInput(
            "leeward: there are no resources in what was given".to_owned(),
        ));
    }
    Ok(resources)
}

fn texts(path: &Path) -> Result<Vec<(String, String)>, Failure> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        return Ok(vec![("stdin".to_owned(), text)]);
    }
    let bad = |path: &Path, e: std::io::Error| {
        Failure::BadInput(format!("leeward: can't read {}: {e}", path.display()))
    };
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        files.clear();
        for entry in std::fs::read_dir(path).map_err(|e| bad(path, e))? {
            let file = entry.map_err(|e| bad(path, e))?.path();
            if file.extension().is_some_and(|e| e == "yaml" || e == "yml") {
                files.push(file);
            }
        }
        files.sort();
    }
    files
        .iter()
        .map(|file| {
            let text = std::fs::read_to_string(file).map_err(|e| bad(file, e))?;
            Ok((file.display().to_string(), text))
        })
        .collect()
}

/// Checks files: every field, and that every reference names something in them.
pub(crate) fn check(paths: &[PathBuf]) -> Result<(), Failure> {
    let resources = read(paths)?;
    let parsed: Vec<_> = resources.iter().filter_map(|r| parse(r).ok()).collect();
    let known: BTreeSet<Key> = parsed.iter().map(leeward_policy::Resource::key).collect();
    let protocol_of = |name: &Name| {
        parsed.iter().find_map(|resource| {
            let Spec::Service(service) = &resource.spec else {
                return None;
            };
            (resource.name == *name).then_some(service.protocol)
        })
    };
    let mut errors = Vec::new();
    let mut seen = BTreeSet::new();
    for resource in &parsed {
        let key = resource.key();
        if !seen.insert(key.clone()) {
            errors.push(format!("{key}: stands twice; each resource must stand once"));
        }
        for (path, to) in resource.spec.references() {
            if !known.contains(&to) {
                errors.push(format!("{key}: {path}: there is no {to} in these files"));
            }
        }
        for (path, to, why) in resource.spec.tcp_misfits(protocol_of) {
            errors.push(format!("{key}: {path}: {to} {why}"));
        }
    }
    if !errors.is_empty() {
        return Err(Failure::BadInput(errors.join("\n")));
    }
    say(&format!("{} resources, nothing wrong", parsed.len()));
    Ok(())
}
