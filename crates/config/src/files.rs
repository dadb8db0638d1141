//! Policy from a directory, for a proxy without a control plane.

use crate::apply::{Batch, State, Warm, key_of};
use crate::live::{Live, PolicySource};
use leeward_policy::Viewer;
use leeward_proto::manifest::{self, ManifestError};
use leeward_proto::v1;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why the files of a directory are not a policy.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// Something can't be read.
    #[error("can't read {path}: {source}")]
    Read {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Fields are bad; each is named.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Bad(Vec<ManifestError>),
    /// Resources are bad in a way that no single field shows.
    #[error("{}", .0.join("\n"))]
    Refused(Vec<String>),
}

/// Reads every `.yaml` and `.yml` file of a directory, in order of their names, and publishes what they say
/// as generation 1. Plugins that take longer than a moment are made ready afterwards, by a task of its own.
///
/// # Errors
///
/// Everything that is wrong. Nothing is published then.
pub async fn load_dir<W: Warm>(
    dir: &Path,
    viewer: Viewer,
    warm: Arc<W>,
    live: &Live,
) -> Result<(), FilesError> {
    let upserts = read_dir(dir)?;
    let draft = Live::new(viewer.clone());
    let mut state = State::new(viewer, warm, draft.clone());
    let whole = v1::Update {
        upserts,
        generation: 1,
        complete: true,
        ..v1::Update::default()
    };
    let too_many = |n| FilesError::Refused(vec![format!("{n} resources are too many")]);
    if let Some(batch) = Batch::default().add(whole).map_err(too_many)? {
        state.apply(batch, tokio::time::Instant::now().into_std()).await;
    }
    let mut status = draft.status();
    status.source = PolicySource::Files;
    if !status.quarantined.is_empty() {
        let lines = status
            .quarantined
            .iter()
            .map(|(key, q)| format!("{key}: {}", q.reason));
        return Err(FilesError::Refused(lines.collect()));
    }
    live.snapshot().store(draft.snapshot().load_full());
    live.say(|said| *said = status);
    if state.is_warming() {
        let mut state = state.publishing_to(live.clone());
        tokio::spawn(async move {
            while state.is_warming() {
                state.settle().await;
            }
        });
    }
    Ok(())
}

fn read_dir(dir: &Path) -> Result<Vec<v1::Resource>, FilesError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| FilesError::Read { path, source }
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed(dir))? {
        let path = entry.map_err(failed(dir))?.path();
        if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            paths.push(path);
        }
    }
    paths.sort();
    let (mut resources, mut bad, mut twice) = (Vec::new(), Vec::new(), Vec::new());
    let mut seen = BTreeMap::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(failed(&path))?;
        let file = path.display().to_string();
        match manifest::parse(&file, &text) {
            Ok(read) => {
                for key in read.iter().filter_map(key_of) {
                    match seen.entry(key) {
                        Entry::Vacant(place) => drop(place.insert(file.clone())),
                        Entry::Occupied(first) => twice.push(format!(
                            "{file}: {} stands in {} already; each must stand once",
                            first.key(),
                            first.get()
                        )),
                    }
                }
                resources.extend(read);
            }
            Err(errors) => bad.extend(errors),
        }
    }
    if !bad.is_empty() {
        return Err(FilesError::Bad(bad));
    }
    if !twice.is_empty() {
        return Err(FilesError::Refused(twice));
    }
    Ok(resources)
}
