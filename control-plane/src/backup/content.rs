//! What of the store is in a backup, and what its keys say that a backup has to know. Pure.

use super::error::BackupError;
use serde_json::Value;

/// Says which store it is, and in which version it is written.
pub(crate) const META: &str = "meta";
/// Says which revision of policy is the last.
pub(crate) const HEAD: &str = "head";
/// What backups of this store are named by, so that nobody can guess from names what is in them.
pub(crate) const SALT: &str = "backup/salt";
/// Written to see how far the log is.
pub(crate) const MARK: &str = "backup/mark";
/// Says up to where of which store's log a store was restored, and goes on with whoever follows.
pub(crate) const CURSOR: &str = "backup/cursor";
/// There while a store is restored: it is none yet.
pub(crate) const RESTORING: &str = "restoring";

/// Keys that go with whoever wrote them: restored, they would never go.
const PASSING: [&str; 3] = ["lead/", "members/", "uploads/"];

/// Whether a key is in backups.
pub(crate) fn is_kept(key: &str) -> bool {
    ![MARK, CURSOR, RESTORING].contains(&key) && !PASSING.iter().any(|prefix| key.starts_with(prefix))
}

/// The store's id and the version of its layout.
pub(crate) fn meta(value: &[u8]) -> Option<(String, u64)> {
    let value: Value = serde_json::from_slice(value).ok()?;
    let id = value.get("id")?.as_str()?.to_owned();
    Some((id, value.get("schema")?.as_u64()?))
}

/// The same under another id; what else it says stays.
pub(crate) fn meta_with_id(value: &[u8], id: &str) -> Option<String> {
    let mut value: Value = serde_json::from_slice(value).ok()?;
    *value.get_mut("id")? = id.into();
    Some(value.to_string())
}

/// A place in a store's log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Cursor {
    pub(crate) store_id: String,
    pub(crate) position: u64,
}

impl Cursor {
    /// As it stands under [`CURSOR`].
    pub(crate) fn render(&self) -> String {
        serde_json::json!({"store": self.store_id, "position": self.position}).to_string()
    }
}

/// What the key [`CURSOR`] says.
pub(crate) fn cursor(value: Option<&[u8]>) -> Result<Cursor, BackupError> {
    let read = || {
        let value: Value = serde_json::from_slice(value?).ok()?;
        Some(Cursor {
            store_id: value.get("store")?.as_str()?.to_owned(),
            position: value.get("position")?.as_u64()?,
        })
    };
    read().ok_or_else(|| BackupError::Content {
        object: format!("the key {CURSOR}"),
        what: "can't be read".to_owned(),
    })
}

/// Where policy is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Head {
    /// The last revision.
    pub(crate) revision: u64,
    /// When it was written, in milliseconds since 1970.
    pub(crate) time_ms: i64,
}

/// What the key [`HEAD`] says.
pub(crate) fn head(value: &[u8]) -> Option<Head> {
    let value: Value = serde_json::from_slice(value).ok()?;
    Some(Head {
        revision: value.get("revision")?.as_u64()?,
        time_ms: value.get("timeMs")?.as_i64()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_go_with_their_writers_are_not_kept() {
        for key in ["lead/backup", "members/x", MARK, CURSOR, RESTORING] {
            assert!(!is_kept(key), "{key}");
        }
        for key in ["head", "meta", "rev/1", "leader", SALT, "modules/a"] {
            assert!(is_kept(key), "{key}");
        }
    }

    #[test]
    fn an_id_is_replaced_and_nothing_else() {
        let value = br#"{"id":"old","later":[1],"schema":3}"#;
        let new = meta_with_id(value, "new").unwrap();
        assert_eq!(new, r#"{"id":"new","later":[1],"schema":3}"#);
        assert_eq!(meta(new.as_bytes()), Some(("new".to_owned(), 3)));
        assert_eq!(meta(b"{}"), None);
    }
}
