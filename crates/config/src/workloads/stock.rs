//! The certificates that there are, and those that are wanted. Time and chance are arguments.

use super::WorkloadStanding;
use crate::certificates::Renewal;
use crate::due::Due;
use leeward_identity::Svid;
use leeward_policy::Name;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Certificates of workloads, and who has a use for them.
#[derive(Debug, Default)]
pub(super) struct Stock {
    // Poison is harmless: an entry is changed as a whole.
    entries: Mutex<BTreeMap<Name, Entry>>,
    /// Wakes who asks for them.
    pub(super) wanted: Notify,
    /// Tells of each that came, went, or can't be had.
    changes: watch::Sender<u64>,
}

/// One workload that a process has asked for.
#[derive(Debug)]
struct Entry {
    svid: Option<Arc<Svid>>,
    due: Due,
    /// Processes that are told of changes.
    holders: usize,
    /// A process has asked for it since it was last issued. One that asks now and then has a use for it, too.
    is_wanted: bool,
    /// Policy has it, for this proxy.
    is_known: bool,
    failed: Option<Failed>,
    /// In a row.
    failures: u32,
    pause_until: Option<Instant>,
}

/// Why one is not there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Failed {
    pub(super) renewal: Renewal,
    pub(super) reason: String,
}

/// What some workloads have.
#[derive(Debug, Default)]
pub(super) struct Had {
    /// In order of the names.
    pub(super) svids: Vec<(Name, Arc<Svid>)>,
    /// Those that may come yet, with why they aren't there if it is known.
    pub(super) pending: Vec<(Name, Option<Failed>)>,
    /// Those that the control plane doesn't give, or gives so that they can't be used.
    pub(super) refused: Vec<(Name, Failed)>,
}

/// Some workloads that a process wants, until it is dropped.
#[derive(Debug)]
pub(super) struct Hold {
    stock: Arc<Stock>,
    names: Vec<Name>,
}

/// As many workloads are held as may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("this proxy has certificates for {MOST} workloads, which are as many as it may")]
pub(super) struct TooMany;

/// Workloads that are held at once.
const MOST: usize = 256;
/// Pauses between tries for one that is refused, which double, with jitter.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

impl Stock {
    /// Keeps some for as long as the result lives, and has those asked for that aren't there.
    pub(super) fn hold(
        self: &Arc<Self>,
        names: &[Name],
        mut draw: impl FnMut() -> f64,
    ) -> Result<Hold, TooMany> {
        let mut entries = self.locked();
        let new = names.iter().filter(|name| !entries.contains_key(*name)).count();
        if entries.len() + new > MOST {
            // What nobody holds can be had again.
            entries.retain(|name, entry| entry.holders > 0 || names.contains(name));
        }
        let new = names.iter().filter(|name| !entries.contains_key(*name)).count();
        if entries.len() + new > MOST {
            return Err(TooMany);
        }
        for name in names {
            let entry = entries.entry(name.clone()).or_insert_with(|| Entry::new(draw()));
            entry.holders += 1;
            entry.is_wanted = true;
            // Whoever holds it has seen policy.
            entry.is_known = true;
        }
        drop(entries);
        self.wanted.notify_one();
        Ok(Hold {
            stock: Arc::clone(self),
            names: names.to_vec(),
        })
    }

    /// What some have at a time.
    pub(super) fn have(&self, names: &[Name], now: SystemTime) -> Had {
        let entries = self.locked();
        let mut had = Had::default();
        for name in names {
            let entry = entries.get(name);
            let failed = entry.and_then(|entry| entry.failed.clone());
            match (entry.and_then(|entry| entry.good(now)), failed) {
                (Some(svid), _) => had.svids.push((name.clone(), svid)),
                (None, Some(failed)) if failed.is_final() => had.refused.push((name.clone(), failed)),
                (None, failed) => had.pending.push((name.clone(), failed)),
            }
        }
        had
    }

    /// How many are good at a time.
    pub(super) fn good(&self, now: SystemTime) -> usize {
        let entries = self.locked();
        entries.values().filter(|entry| entry.good(now).is_some()).count()
    }

    /// What is known of each.
    pub(super) fn standing(&self, now: SystemTime) -> Vec<WorkloadStanding> {
        let entries = self.locked();
        let standing = entries.iter().map(|(name, entry)| WorkloadStanding {
            name: name.clone(),
            not_after: entry.good(now).map(|svid| svid.validity().not_after),
            processes: entry.holders,
            failed: entry
                .failed
                .as_ref()
                .map(|failed| format!("{}: {}", failed.renewal.as_str(), failed.reason)),
        });
        standing.collect()
    }

    /// Tells of changes.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Lets go of what has ended, of what policy has no more, of what leads to a root that is trusted no more, and of what nobody
    /// has asked for by the time that it is to be renewed.
    pub(super) fn tidy(
        &self,
        is_known: impl Fn(&Name) -> bool,
        is_trusted: impl Fn(&str) -> bool,
        now: SystemTime,
    ) {
        let mut entries = self.locked();
        let mut went = false;
        entries.retain(|name, entry| {
            entry.is_known = is_known(name);
            let is_good =
                |svid: &Arc<Svid>| svid.validity().holds(now) && svid.root().is_some_and(&is_trusted);
            if !entry.is_known || !entry.svid.as_ref().is_some_and(is_good) {
                went |= entry.svid.take().is_some();
            }
            // A root that is to go is no reason to renew what nobody uses: it stays until its own time.
            let is_fresh = entry.svid.is_some() && entry.due_at("", now, 0.0) > now;
            entry.holders > 0 || entry.is_known && (entry.is_wanted || is_fresh)
        });
        drop(entries);
        if went {
            self.tell();
        }
    }

    /// Those that are to be asked for at a time, and otherwise how long that isn't so; `None` while there is nothing to ask for.
    /// `wanted_root` is the root that certificates are to lead to; empty for any.
    pub(super) fn due(
        &self,
        wanted_root: &str,
        now: SystemTime,
        clock: Instant,
        mut draw: impl FnMut() -> f64,
    ) -> (Vec<Name>, Option<Duration>) {
        let (mut due, mut wait) = (Vec::new(), None);
        for (name, entry) in self.locked().iter_mut() {
            if !entry.is_known || entry.holders == 0 && !entry.is_wanted {
                continue;
            }
            let at = match entry.good(now) {
                Some(_) => entry.due_at(wanted_root, now, draw()),
                None => now,
            };
            let paused = entry
                .pause_until
                .map(|until| until.saturating_duration_since(clock));
            let left = at
                .duration_since(now)
                .unwrap_or_default()
                .max(paused.unwrap_or_default());
            if left.is_zero() {
                due.push(name.clone());
            } else {
                wait = Some(wait.map_or(left, |known: Duration| known.min(left)));
            }
        }
        (due, wait)
    }

    /// One has come, which was asked for at a time.
    pub(super) fn issued(&self, name: &Name, svid: Svid, asked: SystemTime, draw: f64) {
        if let Some(entry) = self.locked().get_mut(name) {
            entry.due.renewed(asked, draw);
            entry.svid = Some(Arc::new(svid));
            entry.is_wanted = false;
            entry.failed = None;
            entry.failures = 0;
            entry.pause_until = None;
        }
        self.tell();
    }

    /// One can't be had now. What is refused is asked for again after a while.
    pub(super) fn failed(&self, name: &Name, failed: Failed, clock: Instant, draw: f64) {
        if let Some(entry) = self.locked().get_mut(name) {
            if failed.is_final() {
                let doubled = PAUSES.0.saturating_mul(1 << entry.failures.min(16));
                let pause = doubled.min(PAUSES.1).mul_f64(0.5 + 0.5 * draw.clamp(0.0, 1.0));
                entry.failures = entry.failures.saturating_add(1);
                entry.pause_until = Some(clock + pause);
            }
            entry.failed = Some(failed);
        }
        self.tell();
    }

    fn tell(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<Name, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn new(draw: f64) -> Self {
        Self {
            svid: None,
            due: Due::new(draw),
            holders: 0,
            is_wanted: false,
            is_known: true,
            failed: None,
            failures: 0,
            pause_until: None,
        }
    }

    /// When the next is to be asked for; see [`Due::at`].
    fn due_at(&mut self, wanted_root: &str, now: SystemTime, draw: f64) -> SystemTime {
        match &self.svid {
            Some(svid) => self.due.at(svid.validity(), svid.root(), wanted_root, now, draw),
            None => now,
        }
    }

    fn good(&self, now: SystemTime) -> Option<Arc<Svid>> {
        self.svid.clone().filter(|svid| svid.validity().holds(now))
    }
}

impl Failed {
    /// Whether it isn't for want of a control plane.
    fn is_final(&self) -> bool {
        match self.renewal {
            Renewal::Refused | Renewal::Unusable => true,
            Renewal::Renewed | Renewal::Unreachable | Renewal::Unsupported => false,
        }
    }
}

impl Hold {
    /// Whether it is of these.
    pub(super) fn is_of(&self, names: &[Name]) -> bool {
        self.names == names
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut entries = self.stock.locked();
        for name in &self.names {
            if let Some(entry) = entries.get_mut(name) {
                entry.holders = entry.holders.saturating_sub(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_identity::authority::Authority;
    use leeward_identity::{CheckedRequest, Issued, NewKey, SpiffeId};

    const HOUR: Duration = Duration::from_secs(3600);

    /// An authority in a directory, which goes when this is dropped.
    struct Bench(std::path::PathBuf, Authority);

    impl Bench {
        fn new(test: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("leeward-stock-{test}-{}", std::process::id()));
            let authority = Authority::create(&dir, "td").unwrap();
            Self(dir, authority)
        }

        fn svid(&self, name: &str) -> Svid {
            let id = SpiffeId::workload("td", "a", name).unwrap();
            let key = NewKey::generate(&id).unwrap();
            let request = CheckedRequest::parse(key.request(), &id).unwrap();
            let issued = Issued {
                chain: self.1.sign(&request, &id, HOUR).unwrap().chain,
                bundle: self.1.roots().clone(),
            };
            Svid::new(&id, &key, &issued, self.1.roots()).unwrap()
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn failed(renewal: Renewal) -> Failed {
        Failed {
            renewal,
            reason: "so".to_owned(),
        }
    }

    /// Those that are to be asked for, in the middle of every draw.
    fn due(stock: &Stock, root: &str, now: SystemTime) -> Vec<Name> {
        stock.due(root, now, Instant::now(), || 0.5).0
    }

    #[tokio::test]
    async fn what_is_held_is_asked_for_and_renewed_at_half_life() {
        let (bench, stock) = (Bench::new("held"), Arc::<Stock>::default());
        let pay = [name("pay")];
        let now = crate::certificates::wall();
        assert!(due(&stock, "", now).is_empty());
        let hold = stock.hold(&pay, || 0.5).unwrap();
        assert_eq!(due(&stock, "", now), pay);
        let mut changes = stock.changes();
        stock.issued(&pay[0], bench.svid("pay"), now, 0.5);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert!(due(&stock, "", now).is_empty());
        let had = stock.have(&pay, now);
        let validity = had.svids[0].1.validity();
        let half = validity.renew_at(0.5);
        assert_eq!(due(&stock, "", half), pay);
        // Another root: within a tenth of its life, or a minute.
        let soon = now + Duration::from_secs(60);
        assert!(due(&stock, "another", now).is_empty());
        assert_eq!(due(&stock, "another", soon), pay);
        let root = bench.1.fingerprint().to_owned();
        assert!(due(&stock, &root, soon).is_empty());
        // It goes on being given until it ends.
        let late = validity.not_after;
        assert_eq!(stock.have(&pay, late).svids.len(), 1);
        let over = late + Duration::from_secs(1);
        assert_eq!(stock.have(&pay, over).pending.len(), 1);
        stock.tidy(|_| true, |_| true, over);
        assert!(changes.has_changed().unwrap(), "that it has ended is told");
        assert_eq!(due(&stock, "", over), pay, "it is still wanted");
        drop(hold);
    }

    #[tokio::test]
    async fn what_nobody_uses_goes_when_it_would_be_renewed() {
        let (bench, stock) = (Bench::new("unused"), Arc::<Stock>::default());
        let pay = [name("pay")];
        let now = crate::certificates::wall();
        drop(stock.hold(&pay, || 0.5).unwrap());
        stock.issued(&pay[0], bench.svid("pay"), now, 0.5);
        let half = stock.have(&pay, now).svids[0].1.validity().renew_at(0.5);
        let early = half - Duration::from_secs(60);
        stock.tidy(|_| true, |_| true, early);
        assert_eq!(stock.good(early), 1);
        assert!(due(&stock, "another", early).is_empty(), "nobody uses it");
        // One that asks now and then has a use for it.
        drop(stock.hold(&pay, || 0.5).unwrap());
        stock.tidy(|_| true, |_| true, half);
        assert_eq!(due(&stock, "", half), pay);
        stock.issued(&pay[0], bench.svid("pay"), half, 0.5);
        let half = stock.have(&pay, half).svids[0].1.validity().renew_at(0.5);
        stock.tidy(|_| true, |_| true, half);
        assert_eq!(stock.good(half), 0);
        assert!(stock.standing(half).is_empty() && due(&stock, "", half).is_empty());
    }

    #[tokio::test]
    async fn what_policy_or_trust_has_no_more_is_not_given() {
        let (bench, stock) = (Bench::new("taken"), Arc::<Stock>::default());
        let both = [name("pay"), name("shop")];
        let now = crate::certificates::wall();
        let hold = stock.hold(&both, || 0.5).unwrap();
        for name in &both {
            stock.issued(name, bench.svid(name.as_str()), now, 0.5);
        }
        stock.tidy(|name| name.as_str() == "pay", |_| true, now);
        let had = stock.have(&both, now);
        assert_eq!((had.svids.len(), had.pending.len()), (1, 1));
        assert!(
            due(&stock, "", now).is_empty(),
            "what isn't policy is not asked for"
        );
        stock.tidy(|_| true, |_| false, now);
        assert_eq!(stock.good(now), 0);
        assert_eq!(due(&stock, "", now), both, "of another root");
        stock.tidy(|_| false, |_| true, now);
        assert_eq!(stock.standing(now).len(), 2, "who holds them lets go by itself");
        drop(hold);
        stock.tidy(|_| false, |_| true, now);
        assert!(stock.standing(now).is_empty());
    }

    #[tokio::test]
    async fn what_is_refused_is_tried_again_with_pauses_and_others_go_on() {
        let stock = Arc::<Stock>::default();
        let both = [name("pay"), name("shop")];
        let _hold = stock.hold(&both, || 0.5).unwrap();
        let (now, clock) = (crate::certificates::wall(), Instant::now());
        stock.failed(&both[0], failed(Renewal::Refused), clock, 1.0);
        stock.failed(&both[1], failed(Renewal::Unreachable), clock, 1.0);
        let had = stock.have(&both, now);
        assert_eq!((had.refused.len(), had.pending.len()), (1, 1));
        let (asked, wait) = stock.due("", now, clock, || 0.5);
        assert_eq!((asked, wait), (vec![both[1].clone()], Some(PAUSES.0)));
        for _ in 0..20 {
            stock.failed(&both[0], failed(Renewal::Refused), clock, 1.0);
        }
        assert_eq!(stock.due("", now, clock, || 0.5).1, Some(PAUSES.1));
        assert_eq!(stock.due("", now, clock + PAUSES.1, || 0.5).0, both);
    }

    #[tokio::test]
    async fn no_more_are_held_than_there_is_room_for() {
        let stock = Arc::<Stock>::default();
        let all: Vec<Name> = (0..MOST).map(|n| name(&format!("w{n}"))).collect();
        let most = stock.hold(&all, || 0.5).unwrap();
        let one_more = [name("more")];
        assert_eq!(stock.hold(&one_more, || 0.5).unwrap_err(), TooMany);
        assert!(stock.hold(&all[..3], || 0.5).is_ok(), "they are there");
        drop(most);
        let _more = stock.hold(&one_more, || 0.5).unwrap();
        assert_eq!(
            stock.standing(crate::certificates::wall()).len(),
            1,
            "what nobody holds makes room"
        );
    }
}
