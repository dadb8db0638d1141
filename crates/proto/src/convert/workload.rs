//! Which processes of a node get a certificate of their own.

use crate::field::Fields;
use crate::v1;
use leeward_policy::model::{CgroupPattern, Workload};

/// Proxies that one may name.
const MOST_PROXIES: usize = 256;
/// Users.
const MOST_UIDS: usize = 256;
/// Control groups.
const MOST_CGROUPS: usize = 64;
/// The longest text of a control group that an error shows, in characters.
const SHOWN: usize = 200;

pub(super) fn workload(f: &mut Fields, wire: &v1::Workload) -> Option<Workload> {
    let mut s = f.section("spec");
    let zone = s.name("zone", &wire.zone);
    let proxies = s.names("proxies", &wire.proxies, MOST_PROXIES);
    if wire.uids.is_empty() && wire.cgroups.is_empty() {
        return s.reject_here("says nothing of processes; want uids, cgroups or both");
    }
    f.count("spec.uids", wire.uids.len(), 0..=MOST_UIDS);
    f.unique("spec.uids", "", &wire.uids);
    if let Some(i) = wire.uids.iter().position(|uid| *uid == u32::MAX) {
        // What system calls have for "leave it as it is".
        let why = format!("{} is no user; want 0 to {}", u32::MAX, u32::MAX - 1);
        f.reject::<()>(format!("spec.uids[{i}]"), why);
    }
    f.count("spec.cgroups", wire.cgroups.len(), 0..=MOST_CGROUPS);
    f.unique("spec.cgroups", "", &wire.cgroups);
    let mut cgroups = Vec::new();
    for (i, text) in wire.cgroups.iter().enumerate().take(MOST_CGROUPS) {
        match CgroupPattern::parse(text) {
            Ok(pattern) => cgroups.push(pattern),
            Err(why) => {
                let shown: String = text.chars().take(SHOWN).collect();
                f.reject::<()>(format!("spec.cgroups[{i}]"), format!("{shown:?} {why}"));
            }
        }
    }
    Some(Workload {
        zone: zone?,
        proxies,
        uids: wire.uids.clone(),
        cgroups,
    })
}
