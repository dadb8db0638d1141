//! Reading policy files.

use crate::output::Failure;
use leeward_proto::manifest::{Located, ManifestError};
use leeward_proto::{manifest, v1};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Reads resources from files, directories and standard input.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<v1::Resource>, Failure> {
    let (located, errors) = locate(paths)?;
    if !errors.is_empty() {
        let errors = errors.iter().map(ToString::to_string);
        return Err(Failure::BadInput(errors.collect::<Vec<_>>().join("\n")));
    }
    Ok(located.into_iter().map(|(_, located)| located.resource).collect())
}

/// Resources with the files that they stand in, and all that is wrong in these.
pub(crate) type Found = (Vec<(String, Located)>, Vec<ManifestError>);

/// Reads them.
pub(crate) fn locate(paths: &[PathBuf]) -> Result<Found, Failure> {
    let (mut resources, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        for (name, text) in texts(path)? {
            match manifest::locate(&name, &text) {
                Ok(read) => resources.extend(read.into_iter().map(|located| (name.clone(), located))),
                Err(bad) => errors.extend(bad),
            }
        }
    }
    if resources.is_empty() && errors.is_empty() {
        return Err(Failure::BadInput(
            "leeward: there are no resources in what was given".to_owned(),
        ));
    }
    Ok((resources, errors))
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
