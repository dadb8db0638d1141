//! Taking a zone out of use for a while.

use std::time::{Duration, SystemTime};

/// A zone gives up its share of requests step by step, and gets it back the same way once the drain has ended.
///
/// What it keeps is a function of the wall clock alone: every proxy comes to the same by itself, also one that has just
/// started or that no control plane can reach. Clocks that differ by seconds make steps that are seconds apart.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ZoneDrain {
    /// When the first step is taken.
    pub start_time: SystemTime,
    /// What a step is, in percent of the share that the zone would have; 1 to 100.
    pub step: u32,
    /// Pause between steps, longer than zero.
    pub interval: Duration,
    /// When it ends, and the first step back is taken.
    pub expire_time: SystemTime,
    /// Why, for people.
    pub reason: Box<str>,
}

/// Everything, in percent.
const ALL: u64 = 100;

impl ZoneDrain {
    /// How far ahead it may end.
    pub const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
    /// A tenth at a time.
    pub const STEP: u32 = 10;
    /// Time for autoscalers and caches to follow.
    pub const INTERVAL: Duration = Duration::from_secs(10);

    /// What the zone keeps of its share, 0 to 1.
    pub fn kept(&self, now: SystemTime) -> f64 {
        // At most 100, so that this is exact.
        f64::from(u32::try_from(self.percent(now)).unwrap_or(100)) / 100.0
    }

    /// Whether it has an effect: it has begun, and not everything is back yet.
    pub fn is_on(&self, now: SystemTime) -> bool {
        self.percent(now) < ALL
    }

    /// A drain from now on. What an earlier one has moved already stays moved: traffic is never taken back only to be
    /// moved again, and at most one step is taken at once.
    #[must_use]
    pub fn begun(self, before: Option<&Self>, now: SystemTime) -> Self {
        let Some(before) = before else {
            return self;
        };
        let goes_on = before.expire_time > now && before.start_time <= now;
        if goes_on && (before.step, before.interval) == (self.step, self.interval) {
            return Self {
                start_time: before.start_time,
                ..self
            };
        }
        let taken = ALL.saturating_sub(before.percent(now)) / u64::from(self.step.max(1));
        let ago = self
            .interval
            .saturating_mul(u32::try_from(taken).unwrap_or(u32::MAX));
        Self {
            start_time: now.checked_sub(ago).unwrap_or(now),
            ..self
        }
    }

    /// The same, ended now unless it has ended already.
    #[must_use]
    pub fn ended(self, now: SystemTime) -> Self {
        Self {
            expire_time: self.expire_time.min(now),
            ..self
        }
    }

    fn percent(&self, now: SystemTime) -> u64 {
        match now.duration_since(self.expire_time) {
            Ok(since) => {
                let left = ALL.saturating_sub(self.steps_between(self.start_time, self.expire_time));
                left.saturating_add(self.steps(since)).min(ALL)
            }
            Err(_) => ALL.saturating_sub(self.steps_between(self.start_time, now)),
        }
    }

    fn steps_between(&self, from: SystemTime, to: SystemTime) -> u64 {
        to.duration_since(from).map_or(0, |elapsed| self.steps(elapsed))
    }

    /// The steps of so much time, in percent; the first is taken at once.
    fn steps(&self, elapsed: Duration) -> u64 {
        let intervals = elapsed.as_nanos().checked_div(self.interval.as_nanos());
        let steps = intervals.map_or(u64::MAX, |n| u64::try_from(n).unwrap_or(u64::MAX));
        steps.saturating_add(1).saturating_mul(u64::from(self.step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        START + Duration::from_secs(seconds)
    }

    fn drain(start: u64, end: u64) -> ZoneDrain {
        ZoneDrain {
            start_time: at(start),
            step: 10,
            interval: Duration::from_secs(10),
            expire_time: at(end),
            reason: "".into(),
        }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn a_share_goes_and_comes_back_step_by_step() {
        let drain = drain(100, 1000);
        for (seconds, kept) in [
            (0, 1.0),
            (99, 1.0),
            (100, 0.9),
            (109, 0.9),
            (110, 0.8),
            (180, 0.1),
            (190, 0.0),
            (999, 0.0),
            (1000, 0.1),
            (1010, 0.2),
            (1090, 1.0),
            (5000, 1.0),
        ] {
            assert!(close(drain.kept(at(seconds)), kept), "{seconds}");
        }
        assert!(
            !drain.is_on(at(99)) && drain.is_on(at(100)) && drain.is_on(at(1080)) && !drain.is_on(at(1090))
        );
    }

    #[test]
    fn one_that_ends_half_way_comes_back_from_there() {
        let ended = drain(0, 1000).ended(at(35));
        assert!(close(ended.kept(at(34)), 0.6));
        assert!(close(ended.kept(at(35)), 0.7));
        assert!(close(ended.kept(at(65)), 1.0));
        assert_eq!(ended.clone().ended(at(50)), ended, "it has ended already");
        // Ended before it began, it never was.
        let never = drain(100, 1000).ended(at(50));
        assert!((0..200).all(|s| close(never.kept(at(s)), 1.0)));
    }

    #[test]
    fn another_goes_on_from_what_was_moved() {
        let before = drain(0, 1000);
        let longer = drain(35, 5000).begun(Some(&before), at(35));
        assert_eq!((longer.start_time, longer.expire_time), (at(0), at(5000)));
        let faster = ZoneDrain {
            interval: Duration::from_secs(1),
            ..drain(35, 5000)
        };
        let faster = faster.begun(Some(&before), at(35));
        assert!(close(faster.kept(at(35)), 0.5) && close(faster.kept(at(36)), 0.4));
        let coming_back = before.ended(at(200));
        let again = drain(215, 5000).begun(Some(&coming_back), at(215));
        assert!(close(coming_back.kept(at(215)), 0.2) && close(again.kept(at(215)), 0.1));
        assert_eq!(drain(7, 9).begun(None, at(7)), drain(7, 9));
    }

    proptest! {
        #[test]
        fn it_never_moves_faster_than_its_rate(
            step in 1u32..=100, interval in 1u64..100, length in 0u64..5000,
            (from, pause) in (0u64..6000, 0u64..600),
        ) {
            let drain = ZoneDrain {
                step,
                interval: Duration::from_secs(interval),
                ..drain(100, 100 + length)
            };
            let (a, b) = (drain.kept(at(from)), drain.kept(at(from + pause)));
            // Going down and coming back may each have begun a step.
            let steps = pause / interval + 2;
            prop_assert!((a - b).abs() <= f64::from(step) / 100.0 * (steps as f64) + 1e-9);
            prop_assert!((0.0..=1.0).contains(&a));
        }

        #[test]
        fn another_drain_takes_at_most_a_step_at_once(
            (step, again) in (1u32..=100, 1u32..=100), now in 0u64..4000, length in 0u64..3000,
        ) {
            let before = ZoneDrain { step, ..drain(100, 100 + length) };
            let next = ZoneDrain { step: again, ..drain(now, 9999) }.begun(Some(&before), at(now));
            let (was, is) = (before.kept(at(now)), next.kept(at(now)));
            prop_assert!(is <= was + 1e-9, "{was} {is}");
            prop_assert!(was - is <= f64::from(again) / 100.0 + 1e-9, "{was} {is}");
        }
    }
}
