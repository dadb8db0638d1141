//! How much may be under way at a service behind a proxy of another zone, by what that proxy reports.

use crate::Draw;
use std::time::{Duration, Instant};

/// What one caller may have under way at a service behind one proxy of another zone.
///
/// That proxy reports how much *each* of those that call it now may add ([`spare_for_each`]), by the most that it had under
/// way at once since the report before. A caller's bound is what it had under way then, and that. When that was isn't
/// told, so it is the median of the last looks: what began while the report was on its way must not count twice, and a
/// moment in which all requests have just ended must not count at all.
///
/// Half of what is spare is kept for those that begin to call: the other zone doesn't know how many will, but each
/// of them knows how many could. So what all add together between two reports is no more than what is spare, and what
/// is left over is halved with each report.
///
/// What is reported late holds until the next report, up to [`FRESH_FOR`].
///
/// A report that comes by a gateway ([`Headroom::relayed`]) may be two seconds old, and not all of it is of the same age.
/// Only what was under way all this time is sure to be in it; a bound rises by that alone. It isn't lowered for what began
/// since it rose, which would count the other way round: so it holds until the reports are of after that. And who has only
/// just begun to call takes no more than one that doesn't yet, since it wasn't counted.
#[derive(Clone, Debug, Default)]
pub struct Headroom {
    way: Way,
    /// Requests under way at the last looks.
    recent: [u32; LOOKS],
    /// The median of those, at the last looks.
    usual: [u32; RELAYED_LOOKS],
    /// Requests begun until the last look; it wraps around.
    begun: u32,
    /// When one was last seen to have begun, or to be under way.
    used: Option<Instant>,
    /// Since when there was never a long pause between those.
    calls_since: Option<Instant>,
    report: Option<Report>,
}

/// How reports come.
#[derive(Clone, Copy, Debug, Default)]
enum Way {
    /// From the proxy itself.
    #[default]
    Straight,
    /// From a gateway, which has heard it.
    Relayed,
}

#[derive(Clone, Copy, Debug)]
struct Report {
    each: u32,
    heard: Instant,
    /// When the bound was last set: that of one who doesn't call yet is drawn anew each [`DRAWN_FOR`].
    set: Instant,
    bound: u32,
}

/// What a caller has done at a service behind a proxy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Usage {
    /// Requests under way.
    pub under_way: u32,
    /// Requests begun since the start; it wraps around.
    pub begun: u32,
}

/// From one look to the next.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a report counts: three times the longest pause between two (docs/zone-protocol.md).
pub const FRESH_FOR: Duration = Duration::from_secs(15);
/// Looks that are remembered: a report is on its way for less than half of them.
const LOOKS: usize = 5;
/// Oldest news in what a gateway says: a second from one report of a proxy to its next, and the way to the gateway and from
/// there.
const RELAYED_WITHIN: Duration = Duration::from_secs(2);
/// Looks in this time.
const RELAYED_LOOKS: usize = 20;
/// How long one that has begun to call counts among those that do. Less than the [`CALLER_FOR`] of who counts them.
const ACTIVE_FOR: Duration = Duration::from_secs(5);
/// How long a proxy that has called counts among those that do, at least.
pub const CALLER_FOR: Duration = Duration::from_secs(10);
/// How long the bound of one who doesn't call holds.
const DRAWN_FOR: Duration = Duration::from_secs(1);

/// How many more requests each of so many callers may have under way: half of what is spare, in equal parts.
pub fn spare_for_each(spare: u32, callers: u32) -> u32 {
    spare / 2 / callers.max(1)
}

impl Headroom {
    /// By what gateways say.
    pub fn relayed() -> Self {
        Self {
            way: Way::Relayed,
            ..Self::default()
        }
    }

    /// Takes in what is under way; call every [`LOOK_EVERY`]. `others` is how many proxies could call, this one among
    /// them.
    pub fn look(&mut self, usage: Usage, others: u32, now: Instant, draw: &mut impl Draw) {
        self.recent.rotate_left(1);
        if let Some(last) = self.recent.last_mut() {
            *last = usage.under_way;
        }
        let mut recent = self.recent;
        recent.sort_unstable();
        self.usual.rotate_left(1);
        if let (Some(last), Some(median)) = (self.usual.last_mut(), recent.get(LOOKS / 2)) {
            *last = *median;
        }
        if usage.under_way > 0 || usage.begun != self.begun {
            if !self.is_active(now) {
                self.calls_since = Some(now);
            }
            self.used = Some(now);
        }
        self.begun = usage.begun;
        if let Some(report) = self.report
            && !self.is_counted(now)
            && now.saturating_duration_since(report.set) >= DRAWN_FOR
        {
            self.set(report.each, report.heard, others, now, draw);
        }
    }

    /// Takes in a report: how many more requests each that calls may have under way.
    pub fn report(&mut self, each: u32, others: u32, now: Instant, draw: &mut impl Draw) {
        self.set(each, now, others, now, draw);
    }

    /// Forgets what was reported.
    pub fn forget(&mut self) {
        self.report = None;
    }

    /// How many requests may be under way; `None` if nothing was reported lately, and so nothing is known.
    pub fn bound(&self, now: Instant) -> Option<u32> {
        let report = self.report?;
        (now.saturating_duration_since(report.heard) < FRESH_FOR).then_some(report.bound)
    }

    fn is_active(&self, now: Instant) -> bool {
        self.used
            .is_some_and(|at| now.saturating_duration_since(at) < ACTIVE_FOR)
    }

    /// Whether who reports has counted this one among those that call.
    fn is_counted(&self, now: Instant) -> bool {
        let age = match self.way {
            Way::Straight => Duration::ZERO,
            Way::Relayed => RELAYED_WITHIN,
        };
        let since = self.calls_since.filter(|_| self.is_active(now));
        since.is_some_and(|since| now.saturating_duration_since(since) >= age)
    }

    fn set(&mut self, each: u32, heard: Instant, others: u32, now: Instant, draw: &mut impl Draw) {
        let more = if self.is_counted(now) {
            each
        } else {
            // Its part of the other half; what is less than one is one now and then.
            let others = u64::from(others.max(1));
            let (whole, rest) = (u64::from(each) / others, u64::from(each) % others);
            let drawn = u64::from(rest > 0 && draw.below(others) < rest);
            u32::try_from(whole + drawn).unwrap_or(u32::MAX)
        };
        let has = self.usual.last().copied().unwrap_or(0);
        let had = match self.way {
            Way::Straight => has,
            Way::Relayed => self.usual.iter().copied().min().unwrap_or(0),
        };
        let safe = had.saturating_add(more);
        let bound = match self.bound(now) {
            Some(before) if safe < before => before.min(has.saturating_add(more)),
            Some(_) | None => safe,
        };
        self.report = Some(Report {
            each,
            heard,
            set: now,
            bound,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Seeded, Word};
    use proptest::prelude::*;

    #[expect(
        clippy::disallowed_methods,
        reason = "an arbitrary origin; only differences matter"
    )]
    fn origin() -> Instant {
        Instant::now()
    }

    const fn usage(under_way: u32, begun: u32) -> Usage {
        Usage { under_way, begun }
    }

    #[test]
    fn nothing_is_known_before_a_report_and_long_after_one() {
        let (mut headroom, now, mut draw) = (Headroom::default(), origin(), Seeded(1));
        headroom.look(usage(3, 3), 1, now, &mut draw);
        assert_eq!(headroom.bound(now), None);
        headroom.report(7, 1, now, &mut draw);
        assert!(headroom.bound(now).is_some());
        let late = now + FRESH_FOR;
        assert!(headroom.bound(late - Duration::from_millis(1)).is_some());
        assert_eq!(headroom.bound(late), None);
        headroom.report(7, 1, late, &mut draw);
        headroom.forget();
        assert_eq!(headroom.bound(late), None);
    }

    #[test]
    fn what_began_while_the_report_was_on_its_way_is_not_counted_twice() {
        let (mut headroom, now, mut draw) = (Headroom::default(), origin(), Seeded(1));
        for (under_way, begun) in [(10, 10), (10, 10), (0, 10), (40, 50), (40, 50)] {
            headroom.look(usage(under_way, begun), 4, now, &mut draw);
        }
        headroom.report(5, 4, now, &mut draw);
        assert_eq!(headroom.bound(now), Some(15));
        // Nonsense is no bound.
        headroom.report(u32::MAX, 4, now, &mut draw);
        assert_eq!(headroom.bound(now), Some(u32::MAX));
    }

    #[test]
    fn one_that_begins_has_its_part_of_what_is_kept_for_such() {
        let (mut headroom, now, mut draw) = (Headroom::default(), origin(), Seeded(1));
        headroom.report(100, 10, now, &mut draw);
        assert_eq!(headroom.bound(now), Some(10));
        // Less than one for each is one for some, anew each second.
        headroom.report(5, 10, now, &mut draw);
        let mut drawn = [0, 0];
        for second in 1..=14 {
            let now = now + DRAWN_FOR * second;
            headroom.look(Usage::default(), 10, now, &mut draw);
            drawn[headroom.bound(now).unwrap() as usize] += 1;
        }
        assert!(drawn[0] > 2 && drawn[1] > 2, "{drawn:?}");
        // And once it calls it has as much as the others.
        headroom.look(usage(0, 1), 10, now, &mut draw);
        headroom.report(5, 10, now, &mut draw);
        assert_eq!(headroom.bound(now), Some(5));
    }

    /// A zone that bears so many requests at once, and callers that want some there: how many each has under way.
    struct Zone {
        now: Instant,
        bears: u32,
        /// Those of the zone's own callers.
        own: u32,
        callers: Vec<(Headroom, Usage)>,
        /// Most at once since the last report.
        peak: u32,
        /// How many looks a report takes.
        delay: usize,
        reports: Vec<(usize, u32)>,
        /// When in each second the gateways speak, by which alone reports come, if there are some.
        gateways: Vec<usize>,
        /// What they say, when it is there, and which of them says it.
        relays: Vec<(usize, usize, u32)>,
        words: Vec<Option<Word>>,
        draw: Seeded,
    }

    impl Zone {
        fn new(bears: u32, own: u32, callers: usize, delay: usize) -> Self {
            Self {
                now: origin(),
                bears,
                own,
                callers: vec![(Headroom::default(), Usage::default()); callers],
                peak: own,
                delay,
                reports: Vec::new(),
                gateways: Vec::new(),
                relays: Vec::new(),
                words: Vec::new(),
                draw: Seeded(7),
            }
        }

        fn behind(self, gateways: &[usize]) -> Self {
            let relayed = (Headroom::relayed(), Usage::default());
            Self {
                callers: vec![relayed; self.callers.len()],
                gateways: gateways.to_vec(),
                words: vec![None; gateways.len()],
                ..self
            }
        }

        /// What callers hear at a look.
        fn heard(&mut self, look: usize) -> Option<u32> {
            let heard = |(at, each): &(usize, u32)| (*at <= look).then_some((*at, *each));
            let last = self.reports.iter().rev().find_map(heard);
            if self.gateways.is_empty() {
                return last.filter(|(at, _)| *at == look).map(|(_, each)| each);
            }
            for (gateway, phase) in self.gateways.iter().enumerate() {
                if let Some((_, each)) = last
                    && (look + phase).is_multiple_of(10)
                {
                    self.relays.push((look + self.delay, gateway, each));
                }
            }
            let mut news = false;
            for (_, gateway, spare) in self.relays.iter().filter(|(at, ..)| *at == look) {
                self.words[*gateway] = Some(Word {
                    healthy: 1,
                    spare: *spare,
                });
                news = true;
            }
            let said = Word::agreed(self.words.iter().copied().flatten());
            said.filter(|_| news).map(|word| word.spare)
        }

        fn under_way(&self) -> u32 {
            self.own + self.callers.iter().map(|(_, usage)| usage.under_way).sum::<u32>()
        }

        /// One look of all. Each wants so many under way, as far as it may; a part of those it has has ended.
        fn step(&mut self, look: usize, wanted: u32, ends: f64) {
            self.now += LOOK_EVERY;
            let others = u32::try_from(self.callers.len()).unwrap();
            let due = self.heard(look);
            for (headroom, usage) in &mut self.callers {
                headroom.look(*usage, others, self.now, &mut self.draw);
                if let Some(each) = due {
                    headroom.report(each, others, self.now, &mut self.draw);
                }
            }
            for (headroom, usage) in &mut self.callers {
                let ended = (0..usage.under_way).filter(|_| self.draw.unit() < ends).count();
                usage.under_way -= u32::try_from(ended).unwrap();
                // Nothing is sent before anything is known, as by a caller that has a zone of its own.
                let bound = headroom.bound(self.now).unwrap_or(0);
                while usage.under_way < wanted.min(bound) {
                    usage.under_way += 1;
                    usage.begun = usage.begun.wrapping_add(1);
                }
            }
            self.peak = self.peak.max(self.under_way());
            if look.is_multiple_of(10) {
                let callers = self.callers.iter().filter(|(h, u)| {
                    let began = u.begun != h.begun || u.under_way > 0;
                    began || h.used.is_some_and(|at| self.now - at < CALLER_FOR)
                });
                let callers = u32::try_from(callers.count()).unwrap();
                let spare = self.bears.saturating_sub(self.peak);
                self.peak = self.under_way();
                self.reports
                    .push((look + self.delay, spare_for_each(spare, callers)));
            }
        }
    }

    #[test]
    fn two_callers_fill_a_zone_and_never_overrun_it() {
        for delay in 1..=LOOKS / 2 {
            let mut zone = Zone::new(100, 20, 2, delay);
            for look in 0..300 {
                zone.step(look, 500, 0.0);
                assert!(zone.under_way() <= 100, "{} at {look}", zone.under_way());
            }
            assert!(zone.under_way() >= 96, "{}", zone.under_way());
        }
    }

    #[test]
    fn callers_fill_a_zone_behind_gateways_and_never_overrun_it() {
        for gateways in [&[0][..], &[9], &[3, 8], &[0, 4, 7]] {
            for delay in 1..=LOOKS / 2 {
                let mut zone = Zone::new(100, 20, 2, delay).behind(gateways);
                for look in 0..600 {
                    zone.step(look, 500, 0.0);
                    assert!(zone.under_way() <= 100, "{} at {look}", zone.under_way());
                }
                assert!(zone.under_way() >= 96, "{} by {gateways:?}", zone.under_way());
            }
        }
    }

    #[test]
    fn a_gateway_that_is_lost_leaves_the_bound_to_the_others() {
        let mut zone = Zone::new(100, 20, 2, 1).behind(&[3, 8]);
        for look in 0..200 {
            zone.step(look, 500, 0.0);
        }
        let before = zone.under_way();
        // What it has said last isn't counted any more.
        zone.gateways.pop();
        zone.words.pop();
        zone.relays.retain(|(_, gateway, _)| *gateway == 0);
        for look in 200..400 {
            zone.step(look, 500, 0.2);
            assert!(zone.under_way() <= 100, "{} at {look}", zone.under_way());
        }
        assert!(zone.under_way() >= before, "{} of {before}", zone.under_way());
    }

    #[test]
    fn one_of_many_that_could_call_has_what_it_needs_in_seconds() {
        let mut zone = Zone::new(1000, 0, 1, 1);
        let mut looks = 0;
        let others = 500;
        while zone.under_way() < 400 {
            zone.step(looks, 500, 0.0);
            // The others don't.
            let (headroom, usage) = &mut zone.callers[0];
            headroom.look(*usage, others, zone.now, &mut zone.draw);
            looks += 1;
            assert!(looks < 60, "{} after 6 s", zone.under_way());
        }
    }

    proptest! {
        #[test]
        fn callers_together_stay_within_what_a_zone_bears(
            (bears, own, callers, delay) in (20u32..2000, 0u32..20, 1usize..12, 1usize..=LOOKS / 2),
            steps in prop::collection::vec((0u32..800, 0.0f64..1.0), 1..150),
        ) {
            let mut zone = Zone::new(bears, own, callers, delay);
            for (look, (wanted, ends)) in steps.into_iter().enumerate() {
                zone.step(look, wanted, ends);
                // What is drawn by those that begin may be one more for each.
                let most = bears + u32::try_from(callers).unwrap();
                prop_assert!(zone.under_way() <= most, "{} of {bears}", zone.under_way());
            }
        }

        #[test]
        fn callers_stay_within_it_behind_gateways_too(
            (bears, own, callers, delay) in (20u32..2000, 0u32..20, 1usize..12, 1usize..=LOOKS / 2),
            gateways in prop::collection::vec(0usize..10, 1..4),
            steps in prop::collection::vec((0u32..800, 0.0f64..1.0), 1..150),
        ) {
            let mut zone = Zone::new(bears, own, callers, delay).behind(&gateways);
            for (look, (wanted, ends)) in steps.into_iter().enumerate() {
                zone.step(look, wanted, ends);
                let most = bears + u32::try_from(callers).unwrap();
                prop_assert!(zone.under_way() <= most, "{} of {bears}", zone.under_way());
            }
        }
    }
}
