//! How many proxies run a revision, over all control planes.

use super::{Rollouts, now};
use crate::proxies::MAX_LAGGARDS;
use leeward_proto::v1;
use std::collections::{BTreeMap, BTreeSet};

/// A proxy's zone and name.
type Id = (String, String);

impl Rollouts {
    /// How many proxies run everything up to a revision, and some of the others.
    pub(super) async fn progress(&self, revision: u64) -> v1::Progress {
        let request = v1::GetStandingRequest {
            laggards_of: revision,
            ..v1::GetStandingRequest::default()
        };
        let others = self.peers.standing(&request).await;
        let mut missing = others.missing;
        let mut all = others.answers;
        all.push(self.proxies.tell(revision, &[], now()));
        let held = self.course.borrow().held.as_ref().map(|held| held.revision);
        // Whoever has left one control plane may have come to another.
        let mut gone = gone(&all);
        if all.len() > 1 && !gone.is_empty() {
            let seek: Vec<String> = gone
                .keys()
                .map(|(zone, proxy)| format!("{zone}/{proxy}"))
                .collect();
            let mut found: BTreeSet<String> = self.proxies.tell(0, &seek, now()).found.into_iter().collect();
            let request = v1::GetStandingRequest {
                seek,
                ..v1::GetStandingRequest::default()
            };
            let others = self.peers.standing(&request).await;
            missing.extend(others.missing);
            found.extend(others.answers.into_iter().flat_map(|said| said.found));
            gone.retain(|(zone, proxy), _| !found.contains(&format!("{zone}/{proxy}")));
        }
        missing.sort();
        missing.dedup();
        let mut progress = sum(revision, held, &all, &gone);
        progress.missing = missing;
        progress
    }
}

/// Those that are gone, each once.
fn gone(all: &[v1::Standing]) -> BTreeMap<Id, v1::Laggard> {
    let mut gone: BTreeMap<Id, v1::Laggard> = BTreeMap::new();
    for laggard in all.iter().flat_map(|standing| &standing.gone) {
        let id = (laggard.zone.clone(), laggard.proxy.clone());
        let further = gone
            .get(&id)
            .is_some_and(|known| known.running >= laggard.running);
        if !further {
            gone.insert(id, laggard.clone());
        }
    }
    gone
}

/// Adds up what all control planes said.
fn sum(
    revision: u64,
    held: Option<u64>,
    all: &[v1::Standing],
    gone: &BTreeMap<Id, v1::Laggard>,
) -> v1::Progress {
    let mut progress = v1::Progress {
        revision,
        ..v1::Progress::default()
    };
    let passes = held.is_some_and(|held| revision > held);
    for count in all.iter().flat_map(|standing| &standing.counts) {
        progress.proxies += count.proxies;
        if count.running >= revision || passes && count.through >= revision {
            progress.running += count.proxies;
        }
    }
    let behind = gone.values().filter(|laggard| laggard.running < revision);
    let beyond: u64 = all.iter().map(|standing| standing.more_gone).sum();
    progress.proxies += gone.len() as u64 + beyond;
    progress.running += gone
        .values()
        .filter(|laggard| laggard.running >= revision)
        .count() as u64;
    let connected = all.iter().flat_map(|standing| &standing.laggards);
    progress.laggards = connected.chain(behind).cloned().collect();
    progress
        .laggards
        .sort_by(|a, b| (a.running, &a.zone, &a.proxy).cmp(&(b.running, &b.zone, &b.proxy)));
    progress.laggards.truncate(MAX_LAGGARDS);
    progress
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(running: u64, through: u64, proxies: u64) -> v1::RunningCount {
        v1::RunningCount {
            running,
            through,
            proxies,
        }
    }

    fn laggard(proxy: &str, running: u64, connected: bool) -> v1::Laggard {
        v1::Laggard {
            zone: "a".into(),
            proxy: proxy.into(),
            running,
            connected,
            ..v1::Laggard::default()
        }
    }

    #[test]
    fn what_several_say_is_added_up() {
        let all = [
            v1::Standing {
                counts: vec![count(9, 9, 10), count(5, 9, 2)],
                laggards: vec![laggard("p1", 5, true), laggard("p2", 5, true)],
                gone: vec![laggard("p3", 4, false), laggard("p4", 9, false)],
                ..v1::Standing::default()
            },
            v1::Standing {
                counts: vec![count(9, 9, 5)],
                gone: vec![laggard("p4", 3, false)],
                more_gone: 1,
                ..v1::Standing::default()
            },
        ];
        let gone = gone(&all);
        assert_eq!(gone.len(), 2);
        let progress = sum(9, None, &all, &gone);
        assert_eq!((progress.proxies, progress.running), (20, 16));
        let named: Vec<_> = progress.laggards.iter().map(|l| l.proxy.as_str()).collect();
        assert_eq!(named, ["p3", "p1", "p2"]);
        // What comes after what is held back runs where that doesn't.
        assert_eq!(sum(9, Some(6), &all, &gone).running, 18);
        assert_eq!(sum(9, Some(9), &all, &gone).running, 16);
    }
}
