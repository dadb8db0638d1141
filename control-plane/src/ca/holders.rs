//! Who has which certificate and runs which bundle: what proxies say, beside what was issued.

use crate::policy::{ms, timestamp};
use crate::store::IssuedRow;
use leeward_identity::{Role, SpiffeId};
use leeward_proto::v1;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// What the proxies that are or were connected have said.
#[derive(Debug, Default)]
pub(super) struct Holders {
    // Poison is harmless: entries are replaced whole.
    known: Mutex<BTreeMap<String, Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    /// The stream it is on; what an older one says late counts no more.
    stream: u64,
    is_connected: bool,
    /// When the certificate that it came with, or that it told of, ends.
    not_after_ms: i64,
    said: Option<Said>,
}

#[derive(Clone, Debug)]
struct Said {
    bundle: String,
    root: String,
    /// The list of revocations.
    revoked: String,
}

/// Those that are remembered; past that, the ones that are not connected are forgotten.
const MAX_KNOWN: usize = 100_000;
/// Digits of a hash that is told.
const SHORT: usize = 12;

impl Holders {
    /// A proxy has opened a stream; what it said on another is not what it runs now.
    pub(super) fn connected(&self, id: &SpiffeId, stream: u64, not_after: SystemTime) {
        let mut known = self.locked();
        if known.len() >= MAX_KNOWN {
            known.retain(|_, known| known.is_connected);
        }
        known.insert(
            id.to_string(),
            Known {
                stream,
                is_connected: true,
                not_after_ms: ms(not_after),
                said: None,
            },
        );
    }

    /// A proxy has said what it runs.
    pub(super) fn heard(&self, id: &SpiffeId, stream: u64, report: &v1::IdentityReport) {
        let mut known = self.locked();
        let Some(known) = known.get_mut(id.as_str()).filter(|known| known.stream == stream) else {
            return;
        };
        if let Some(at) = &report.not_after {
            known.not_after_ms = at.seconds.saturating_mul(1000);
        }
        let cut = |text: &str| text.chars().take(64).collect();
        known.said = Some(Said {
            bundle: cut(&report.bundle),
            root: cut(&report.root),
            revoked: cut(&report.revoked),
        });
    }

    /// A stream has ended. What the proxy said is remembered for as long as its certificate is good: it goes on without
    /// the control plane.
    pub(super) fn gone(&self, id: &SpiffeId, stream: u64, now: SystemTime) {
        let mut known = self.locked();
        if let Some(known) = known.get_mut(id.as_str()).filter(|known| known.stream == stream) {
            known.is_connected = false;
        }
        known.retain(|_, known| known.is_connected || known.not_after_ms >= ms(now));
    }

    /// The stream of one that was revoked has ended.
    pub(super) fn forget(&self, id: &SpiffeId, stream: u64) {
        let mut known = self.locked();
        if known.get(id.as_str()).is_some_and(|known| known.stream == stream) {
            known.remove(id.as_str());
        }
    }

    /// Connected ones that run another bundle.
    pub(super) fn connected_behind(&self, bundle: &str) -> usize {
        let behind = |known: &&Known| {
            known.is_connected && known.said.as_ref().is_none_or(|said| said.bundle != bundle)
        };
        self.locked().values().filter(behind).count()
    }

    /// Connected ones that don't refuse by a list of revocations, or haven't said so; and how many are connected.
    pub(super) fn unaware(&self, list: &str) -> (Vec<v1::Holder>, usize) {
        let known = self.locked();
        let connected = || known.iter().filter(|(_, known)| known.is_connected);
        let unaware = connected().filter_map(|(id, known)| {
            let why = match &known.said {
                Some(said) if said.revoked == list => return None,
                Some(said) if said.revoked.is_empty() => {
                    "has said of no list of revocations, as older builds"
                }
                Some(_) => "refuses by another list of revocations",
                None => "has said nothing yet",
            };
            Some(holder(id, Some(known), why.to_owned(), known.not_after_ms))
        });
        (unaware.collect(), connected().count())
    }

    /// Proxies with a certificate that is good, that run another bundle or haven't said which. The connected first.
    pub(super) fn behind(&self, rows: &[IssuedRow], bundle: &str, now: SystemTime) -> Vec<v1::Holder> {
        let known = self.locked();
        let mut ends: BTreeMap<&str, i64> = BTreeMap::new();
        let told = known
            .iter()
            .filter(|(_, known)| known.is_connected || known.not_after_ms >= ms(now))
            .map(|(id, known)| (id.as_str(), known.not_after_ms));
        for (id, end) in rows
            .iter()
            .map(|row| (row.id.as_str(), row.not_after_ms))
            .chain(told)
        {
            if is_proxy(id) {
                let latest = ends.entry(id).or_insert(end);
                *latest = end.max(*latest);
            }
        }
        let mut behind: Vec<v1::Holder> = ends
            .into_iter()
            .filter_map(|(id, end)| {
                let known = known.get(id);
                let why = match known.and_then(|known| known.said.as_ref()) {
                    Some(said) if said.bundle == bundle => return None,
                    Some(said) => format!("runs bundle {}", short(&said.bundle)),
                    None if known.is_some() => "has not said which bundle it runs".to_owned(),
                    None => "has not been heard of since the control plane started".to_owned(),
                };
                Some(holder(id, known, why, end))
            })
            .collect();
        behind.sort_by_key(|holder| !holder.connected);
        behind
    }

    /// Holders of a certificate that is good and leads to another root than `root`.
    pub(super) fn on_other_roots(&self, rows: &[IssuedRow], root: &str, now: SystemTime) -> Vec<v1::Holder> {
        let known = self.locked();
        let mut others: BTreeMap<String, v1::Holder> = BTreeMap::new();
        for (id, known) in known.iter() {
            let why = match &known.said {
                Some(said) if said.root == root => continue,
                Some(said) => format!("runs a certificate of root {}", short(&said.root)),
                // It will, in a moment.
                None if known.is_connected => "has not said yet which certificate it runs".to_owned(),
                None => continue,
            };
            if known.not_after_ms >= ms(now) {
                others.insert(id.clone(), holder(id, Some(known), why, known.not_after_ms));
            }
        }
        for (place, row) in rows.iter().enumerate() {
            let known = known.get(&row.id);
            // What it runs is better known from itself.
            let has_said = known.is_some_and(|known| known.said.is_some());
            // Rows are by id and who has asked, the newest last. People use what they were given last, and so does a process
            // of a workload, which its proxy tells; a proxy may have ended before it kept that.
            let is_same = |next: &IssuedRow| next.id == row.id && next.by == row.by;
            let is_last = !rows.get(place + 1).is_some_and(is_same);
            let counts = is_proxy(&row.id) || is_last;
            if row.root != root && !has_said && counts && !is_control(&row.id) {
                let mut why = format!("was issued a certificate of root {}", short(&row.root));
                let mut place = row.id.clone();
                if let Some(by) = &row.by {
                    why.push_str(&format!(" at {by}"));
                    place.push_str(&format!("@{by}"));
                }
                others.insert(place, holder(&row.id, known, why, row.not_after_ms));
            }
        }
        others.into_values().collect()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn holder(id: &str, known: Option<&Known>, why: String, end: i64) -> v1::Holder {
    v1::Holder {
        spiffe_id: id.to_owned(),
        connected: known.is_some_and(|known| known.is_connected),
        why,
        not_after: Some(timestamp(end)),
    }
}

fn role(id: &str) -> Role {
    SpiffeId::parse(id).map_or(Role::Other, |id| id.role())
}

fn is_proxy(id: &str) -> bool {
    matches!(role(id), Role::Proxy { .. })
}

/// The control plane sees to its own.
fn is_control(id: &str) -> bool {
    role(id) == Role::Control
}

fn short(hash: &str) -> &str {
    if hash.is_empty() {
        return "unknown";
    }
    hash.get(..SHORT).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn id(path: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap()
    }

    fn row(path: &str, root: &str, end: i64) -> IssuedRow {
        IssuedRow {
            id: id(path).to_string(),
            by: None,
            fingerprint: String::new(),
            root: root.into(),
            not_after_ms: end * 1000,
        }
    }

    fn says(bundle: &str, root: &str) -> v1::IdentityReport {
        v1::IdentityReport {
            bundle: bundle.into(),
            root: root.into(),
            not_after: Some(timestamp(100_000)),
            ..v1::IdentityReport::default()
        }
    }

    fn names(holders: &[v1::Holder]) -> Vec<&str> {
        holders
            .iter()
            .map(|holder| holder.spiffe_id.rsplit('/').next().unwrap())
            .collect()
    }

    #[test]
    fn those_behind_are_named_whether_connected_or_not() {
        let holders = Holders::default();
        let rows: Vec<_> = ["zone/a/proxy/cut-off", "zone/a/proxy/new", "user/ann"]
            .iter()
            .map(|path| row(path, "r", 100))
            .collect();
        for (name, bundle) in [("new", "now"), ("old", "before")] {
            let id = id(&format!("zone/a/proxy/{name}"));
            holders.connected(&id, 1, at(100));
            holders.heard(&id, 1, &says(bundle, "r"));
        }
        holders.connected(&id("zone/a/proxy/silent"), 1, at(100));
        let behind = holders.behind(&rows, "now", at(50));
        assert_eq!(names(&behind), ["old", "silent", "cut-off"]);
        assert_eq!(holders.connected_behind("now"), 2);
        // A certificate that has ended holds up nobody; a proxy that is there with one does.
        assert_eq!(
            names(&holders.behind(&rows[..0], "now", at(150))),
            ["old", "silent"]
        );
        holders.gone(&id("zone/a/proxy/silent"), 1, at(150));
        assert_eq!(names(&holders.behind(&rows[..0], "now", at(150))), ["old"]);
    }

    #[test]
    fn what_a_stream_says_late_counts_no_more() {
        let holders = Holders::default();
        let id = id("zone/a/proxy/p");
        holders.connected(&id, 1, at(100));
        holders.heard(&id, 1, &says("now", "r"));
        holders.connected(&id, 2, at(100));
        holders.heard(&id, 1, &says("now", "r"));
        holders.gone(&id, 1, at(50));
        let behind = holders.behind(&[], "now", at(50));
        assert_eq!((names(&behind), behind[0].connected), (vec!["p"], true));
    }

    #[test]
    fn a_root_is_in_use_until_nobody_can_have_a_certificate_of_it() {
        let holders = Holders::default();
        let rows = [
            row("control", "old", 100),
            row("user/ann", "old", 100),
            row("user/ann", "new", 100),
            row("user/bob", "old", 100),
            row("zone/a/proxy/away", "old", 100),
            row("zone/a/proxy/away", "new", 100),
            row("zone/a/proxy/here", "old", 100),
            row("zone/a/proxy/here", "new", 100),
        ];
        for (name, root) in [("here", "new"), ("by-hand", "old")] {
            let id = id(&format!("zone/a/proxy/{name}"));
            holders.connected(&id, 1, at(100));
            holders.heard(&id, 1, &says("b", root));
        }
        let others = holders.on_other_roots(&rows, "new", at(50));
        assert_eq!(names(&others), ["bob", "away", "by-hand"]);
        // One that has just come may have any.
        let silent = id("zone/a/proxy/silent");
        holders.connected(&silent, 1, at(100));
        let others = holders.on_other_roots(&rows, "new", at(50));
        assert_eq!(names(&others), ["bob", "away", "by-hand", "silent"]);
        holders.gone(&silent, 1, at(50));
        assert_eq!(holders.on_other_roots(&rows, "new", at(50)).len(), 3);
        assert!(holders.on_other_roots(&[], "new", at(101)).is_empty());
    }

    #[test]
    fn a_workload_holds_up_a_root_on_each_node_until_its_proxy_has_the_next() {
        let holders = Holders::default();
        let of = |by: &str, root: &str| IssuedRow {
            by: Some(by.into()),
            ..row("zone/a/workload/pay", root, 100)
        };
        let rows = [of("a1", "old"), of("a1", "new"), of("a2", "old"), of("a3", "old")];
        let others = holders.on_other_roots(&rows, "new", at(50));
        assert_eq!(names(&others), ["pay", "pay"]);
        assert!(
            others[0].why.ends_with("at a2") && others[1].why.ends_with("at a3"),
            "{others:?}"
        );
        // Which roots it trusts is its proxy's to say.
        assert!(holders.behind(&rows, "now", at(50)).is_empty());
    }

    #[test]
    fn who_does_not_refuse_what_is_revoked_is_named() {
        let holders = Holders::default();
        for (name, revoked) in [("new", "now"), ("old", "before"), ("older", "")] {
            let id = id(&format!("zone/a/proxy/{name}"));
            holders.connected(&id, 1, at(100));
            let report = v1::IdentityReport {
                revoked: revoked.into(),
                ..says("b", "r")
            };
            holders.heard(&id, 1, &report);
        }
        let silent = id("zone/a/proxy/silent");
        holders.connected(&silent, 1, at(100));
        let (unaware, connected) = holders.unaware("now");
        assert_eq!((names(&unaware), connected), (vec!["old", "older", "silent"], 4));
        // One that is gone hears of it when it comes back; one that was revoked holds up nothing.
        holders.gone(&silent, 1, at(50));
        holders.forget(&id("zone/a/proxy/old"), 1);
        holders.forget(&id("zone/a/proxy/older"), 2);
        let (unaware, connected) = holders.unaware("now");
        assert_eq!((names(&unaware), connected), (vec!["older"], 2));
        let behind = holders.behind(&[], "another", at(50));
        assert_eq!(names(&behind), ["new", "older", "silent"]);
    }
}
