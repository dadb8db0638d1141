//! Revocations: in force as soon as a control plane says them, kept on disk, and in force again at the next start. Nobody but a
//! control plane adds one or takes one back: while none answers, they stay as they are.

use crate::state::{Blob, StateDir};
use leeward_identity::{Identity, Revoked, SpiffeId};
use leeward_proto::v1;
use prost::Message;
use std::path::Path;
use std::time::SystemTime;

/// Puts a control plane's list in force, cuts the open connections of those who are refused by it, and keeps it. A list that
/// can't be used changes nothing.
pub(crate) fn take(identity: &Identity, list: &v1::RevocationList, dir: Option<&StateDir>) {
    let revoked = match parse(list) {
        Ok(revoked) => revoked,
        Err(reason) => {
            tracing::error!(
                reason,
                "the control plane's list of revocations can't be used; the old one stays in force"
            );
            return;
        }
    };
    let revocations = revoked.len();
    if !identity.revoke(revoked) {
        return;
    }
    let connections = identity.cut_revoked();
    tracing::info!(
        revocations,
        connections,
        "revocations replaced, and connections closed for them"
    );
    if let Some(dir) = dir {
        dir.keep(Blob::Revoked, list.encode_to_vec());
    }
}

/// Puts the list in force that was last kept.
pub(crate) fn restore(identity: &Identity, dir: &StateDir) {
    if let Some(bytes) = dir.blob(Blob::Revoked) {
        put_in_force(identity, &bytes);
    }
}

/// The same from a directory that may be another process's still: before a certificate is used for the first time. Reads a
/// file.
pub fn recall_revoked(identity: &Identity, dir: &Path) {
    if let Some(bytes) = StateDir::peek(dir, Blob::Revoked) {
        put_in_force(identity, &bytes);
    }
}

fn put_in_force(identity: &Identity, bytes: &[u8]) {
    let parsed = v1::RevocationList::decode(bytes).map_err(|error| error.to_string());
    match parsed.and_then(|list| parse(&list)) {
        Ok(revoked) => {
            let revocations = revoked.len();
            if identity.revoke(revoked) {
                tracing::info!(revocations, "revocations from before the start are in force");
            }
        }
        Err(reason) => tracing::error!(
            reason,
            "the list of revocations on disk can't be used; nothing is refused for one until a control plane says what is revoked"
        ),
    }
}

fn parse(list: &v1::RevocationList) -> Result<Revoked, String> {
    let mut all = Vec::with_capacity(list.ids.len());
    for (at, revoked) in list.ids.iter().enumerate() {
        let id =
            SpiffeId::parse(&revoked.spiffe_id).map_err(|error| format!("ids[{at}].spiffe_id: {error}"))?;
        let since = revoked.at.and_then(|since| SystemTime::try_from(since).ok());
        let since = since.ok_or_else(|| format!("ids[{at}].at: is no time; want one after 1970"))?;
        all.push((id, since));
    }
    Revoked::new(all).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_identity::NotReady;
    use leeward_identity::authority::Authority;
    use leeward_policy::{Name, Viewer};
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::{Duration, UNIX_EPOCH};

    /// A directory, which goes when this is dropped.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("leeward-revoked-{name}-{}", std::process::id())))
        }

        fn identity(&self) -> Arc<Identity> {
            let dir = self.0.join("id");
            if !dir.exists() {
                let authority = Authority::create(&self.0.join("ca"), "td").unwrap();
                let id = SpiffeId::proxy("td", "a", "a1").unwrap();
                authority.issue(&id, Duration::from_secs(3600), &dir).unwrap();
            }
            Identity::load(dir).unwrap()
        }

        fn state(&self) -> StateDir {
            let name = |text: &str| Name::parse(text).unwrap();
            let viewer = Viewer {
                zone: name("a"),
                proxy: name("a1"),
            };
            StateDir::open(self.0.join("state"), &viewer).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn list(all: &[(&str, i64)]) -> v1::RevocationList {
        let ids = all.iter().map(|(id, seconds)| v1::RevokedId {
            spiffe_id: (*id).to_owned(),
            at: Some(prost_types::Timestamp {
                seconds: *seconds,
                nanos: 0,
            }),
        });
        v1::RevocationList { ids: ids.collect() }
    }

    const OTHER: &str = "spiffe://td/zone/a/proxy/a2";

    fn refuses(identity: &Identity, id: &str, seconds: u64) -> bool {
        let begins = UNIX_EPOCH + Duration::from_secs(seconds);
        identity.refuses(&SpiffeId::parse(id).unwrap(), begins).is_some()
    }

    #[test]
    fn what_a_control_plane_has_said_holds_after_a_restart_without_one() {
        let scratch = Scratch::new("restart");
        let identity = scratch.identity();
        {
            let state = scratch.state();
            take(&identity, &list(&[(OTHER, 100)]), Some(&state));
            assert!(refuses(&identity, OTHER, 99) && !refuses(&identity, OTHER, 100));
            state.write().unwrap();
        }
        let again = scratch.identity();
        assert_eq!(again.revoked(), None);
        recall_revoked(&again, &scratch.0.join("state"));
        assert_eq!(again.revoked(), identity.revoked());
        let once_more = scratch.identity();
        restore(&once_more, &scratch.state());
        assert!(refuses(&once_more, OTHER, 99));
        // Where nothing is kept nothing is known.
        let empty = scratch.identity();
        recall_revoked(&empty, &scratch.0.join("nowhere"));
        assert_eq!(empty.revoked(), None);
    }

    #[test]
    fn a_list_that_makes_no_sense_changes_nothing() {
        let scratch = Scratch::new("nonsense");
        let identity = scratch.identity();
        take(&identity, &list(&[(OTHER, 100)]), None);
        let before = identity.revoked();
        let mut timeless = list(&[(OTHER, 100)]);
        timeless.ids[0].at = None;
        for bad in [list(&[(OTHER, 200), ("no id", 1)]), timeless] {
            take(&identity, &bad, None);
            assert_eq!(identity.revoked(), before);
        }
        let error = parse(&list(&[(OTHER, 200), ("no id", 1)])).unwrap_err();
        assert!(error.starts_with("ids[1].spiffe_id: \"no id\""), "{error}");
        // An empty one takes all back.
        take(&identity, &list(&[]), None);
        assert!(identity.revoked().unwrap().is_empty());
    }

    #[test]
    fn whoever_is_in_the_list_itself_is_not_ready() {
        let scratch = Scratch::new("own");
        let identity = scratch.identity();
        let far = 4_000_000_000;
        take(&identity, &list(&[(identity.id().as_str(), far)]), None);
        assert!(matches!(identity.ready_now(), Err(NotReady::Revoked(_))));
    }
}
