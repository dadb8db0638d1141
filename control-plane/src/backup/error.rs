//! What can go wrong with a backup, by the object's name where there is one.

use super::format::FormatError;
use super::manifest::ManifestError;
use super::place::PlaceError;
use super::seal::SealError;
use crate::kv::KvError;
use crate::store::StoreError;

/// Why a backup was not made, or is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackupError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("the store can't be read")]
    Kv(#[from] KvError),
    #[error("the store can't be used")]
    Store(#[from] StoreError),
    #[error("{object}")]
    Manifest { object: String, source: ManifestError },
    #[error("{object}")]
    Seal { object: String, source: SealError },
    #[error("{object}")]
    Format { object: String, source: FormatError },
    #[error("can't encrypt the backup")]
    Sealer(#[from] SealError),
    /// An object is not the one that the manifest names.
    #[error("{object} has {found}, and the manifest says {wanted}")]
    Piece {
        object: String,
        found: String,
        wanted: String,
    },
    /// The content is not what the manifest says.
    #[error("{object}: {what}")]
    Content { object: String, what: String },
    /// There is nothing to restore from, or not what was asked for.
    #[error("{0}")]
    Nothing(String),
    /// The store that is to be restored into has something.
    #[error("{0}")]
    NotEmpty(String),
    /// Another control plane leads the job now.
    #[error("another control plane makes backups now")]
    Lost,
    /// Changes went by that were not seen.
    #[error("changes up to position {0} went by unseen: a new backup is needed")]
    Gap(u64),
    /// A file of this machine can't be used.
    #[error("can't {act} {path}")]
    File {
        act: &'static str,
        path: std::path::PathBuf,
        source: std::io::Error,
    },
    /// A task broke down.
    #[error("a task of the backup broke down")]
    Broken,
}

impl BackupError {
    pub(crate) fn file(
        act: &'static str,
        path: impl Into<std::path::PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { act, path, source }
    }

    /// It, and what is behind it.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}
