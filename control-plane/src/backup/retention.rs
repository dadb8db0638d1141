//! Which backups go, and which segments of the log with them. Pure.

use std::collections::BTreeSet;
use std::time::Duration;

/// What a backup is to retention.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Held {
    /// Its manifest's name.
    pub(crate) name: String,
    /// When it was begun, in milliseconds since 1970.
    pub(crate) begun_ms: i64,
    /// What the last verification found, if there was one.
    pub(crate) verified: Option<bool>,
}

/// What is kept. What any of the first three names is kept, unless it is older than `max_age`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Retention {
    /// The newest.
    pub(crate) last: u32,
    /// The newest of each of so many days that have one.
    pub(crate) daily: u32,
    /// The newest of each of so many weeks that have one.
    pub(crate) weekly: u32,
    /// Older ones go in any case; not if not given.
    pub(crate) max_age: Option<Duration>,
}

const DAY_MS: i64 = 24 * 3600 * 1000;
const WEEK_MS: i64 = 7 * DAY_MS;

/// The names of the backups that go. The newest that was verified and is good always stays, and the newest of all.
pub(crate) fn doomed(held: &[Held], keep: &Retention, now_ms: i64) -> Vec<String> {
    let mut newest: Vec<&Held> = held.iter().collect();
    newest.sort_by(|a, b| (b.begun_ms, &b.name).cmp(&(a.begun_ms, &a.name)));
    let mut kept: BTreeSet<&str> = BTreeSet::new();
    // One that is known to be bad counts for none of these: it would stand in the way of a good one.
    let good: Vec<&Held> = newest
        .iter()
        .copied()
        .filter(|held| held.verified != Some(false))
        .collect();
    let of = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
    kept.extend(good.iter().take(of(keep.last)).map(|h| h.name.as_str()));
    for (count, span) in [(keep.daily, DAY_MS), (keep.weekly, WEEK_MS)] {
        let mut spans = BTreeSet::new();
        for held in &good {
            if spans.len() < of(count) && spans.insert(held.begun_ms.div_euclid(span)) {
                kept.insert(&held.name);
            }
        }
    }
    if let Some(max_age) = keep.max_age {
        let max_age = i64::try_from(max_age.as_millis()).unwrap_or(i64::MAX);
        let oldest = now_ms.saturating_sub(max_age);
        kept.retain(|name| {
            held.iter()
                .any(|held| held.name == *name && held.begun_ms >= oldest)
        });
    }
    let verified = newest.iter().find(|held| held.verified == Some(true));
    kept.extend(verified.map(|held| held.name.as_str()));
    kept.extend(newest.first().map(|held| held.name.as_str()));
    newest
        .iter()
        .filter(|held| !kept.contains(held.name.as_str()))
        .map(|held| held.name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn held(hours: i64, verified: Option<bool>) -> Held {
        Held {
            name: format!("b{hours:06}"),
            begun_ms: hours * 3_600_000,
            verified,
        }
    }

    fn keep(last: u32, daily: u32, weekly: u32, hours: Option<u64>) -> Retention {
        Retention {
            last,
            daily,
            weekly,
            max_age: hours.map(|h| Duration::from_secs(h * 3600)),
        }
    }

    #[test]
    fn the_newest_of_each_day_and_week_stay() {
        let all: Vec<_> = (0..24 * 30).step_by(6).map(|h| held(h, None)).collect();
        let gone = doomed(&all, &keep(3, 5, 3, None), 24 * 30 * 3_600_000);
        let stay: Vec<i64> = all
            .iter()
            .filter(|h| !gone.contains(&h.name))
            .map(|h| h.begun_ms / 3_600_000)
            .collect();
        // Weeks begin on Thursdays, as 1970 did.
        assert_eq!(stay, [498, 618, 642, 666, 690, 702, 708, 714].map(i64::from));
    }

    #[test]
    fn one_that_is_bad_is_no_substitute_for_one_that_is_good() {
        let all = [held(1, Some(true)), held(2, None), held(3, Some(false))];
        // The newest stays, however bad, since nothing says why; it is not counted.
        assert_eq!(doomed(&all, &keep(1, 0, 0, None), 0), Vec::<String>::new());
        let all = [held(1, None), held(2, None), held(3, Some(false)), held(4, None)];
        assert_eq!(doomed(&all, &keep(2, 0, 0, None), 0), ["b000003", "b000001"]);
    }

    proptest! {
        #[test]
        fn what_must_stay_stays(
            hours in prop::collection::btree_map(0i64..2000, prop::option::of(any::<bool>()), 0..60),
            (last, daily, weekly) in (0u32..6, 0u32..6, 0u32..6),
            max_age in prop::option::of(0u64..3000),
        ) {
            let all: Vec<_> = hours.iter().map(|(h, v)| held(*h, *v)).collect();
            let keep = keep(last, daily, weekly, max_age);
            let now_ms = 2000 * 3_600_000;
            let gone = doomed(&all, &keep, now_ms);
            let stays = |h: &Held| !gone.contains(&h.name);
            let newest = |f: &dyn Fn(&Held) -> bool| all.iter().rev().find(|h| f(h)).cloned();
            for must in [newest(&|_| true), newest(&|h| h.verified == Some(true))].into_iter().flatten() {
                prop_assert!(stays(&must), "{must:?} must stay");
            }
            let young = |h: &Held| max_age.is_none_or(|age| h.begun_ms >= now_ms - (age * 3_600_000) as i64);
            for must in all.iter().rev().filter(|h| h.verified != Some(false)).take(last as usize).filter(|h| young(h)) {
                prop_assert!(stays(must), "{must:?} is among the last");
            }
            let most = last + daily + weekly + 2;
            prop_assert!(all.iter().filter(|h| stays(h)).count() <= most as usize);
            // What stays stays if it is asked again: nothing is lost step by step.
            let left: Vec<_> = all.iter().filter(|h| stays(h)).cloned().collect();
            prop_assert_eq!(doomed(&left, &keep, now_ms), Vec::<String>::new());
        }
    }
}
