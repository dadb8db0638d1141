//! How fast one service is tried when nothing gets through to it.

use crate::clock::millis;
use leeward_policy::model::Queue;
use leeward_resilience::Draw;
use std::time::Duration;

/// What holds back the deliveries to one service.
///
/// One that never reached the service closes it for a pause that doubles from `base_interval` to `max_interval`;
/// after each pause one delivery is let through to see. Once one has reached the service, as many as have got
/// through since may be under way at once (1, 2, 4 …), up to what policy allows: a service that has just come
/// back is not met by all that waited for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Gate {
    /// Nothing is held back.
    Open,
    /// Nothing gets through but a probe once the pause is over.
    Closed {
        /// Pauses in a row, this one included, at least 1.
        pauses: u32,
        /// When the pause ends, in milliseconds since 1970.
        until_ms: u64,
        /// A probe is under way.
        probing: bool,
    },
    /// So many may be under way at once.
    Ramp {
        /// Deliveries, at least 1.
        allowed: u32,
        /// Pauses before it, which count on if it closes again.
        pauses: u32,
    },
}

/// Leave to make one delivery, to be given back with what came of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Pass {
    probe: bool,
}

impl Gate {
    /// Whether one more may be sent, with so many of the service under way.
    pub(crate) const fn admits(&self, under_way: u32, now_ms: u64) -> bool {
        match self {
            Self::Open => true,
            Self::Closed {
                until_ms, probing, ..
            } => !*probing && now_ms >= *until_ms,
            Self::Ramp { allowed, .. } => under_way < *allowed,
        }
    }

    /// When it is worth while to ask again, if that is a matter of time alone.
    pub(crate) const fn opens_at(&self) -> Option<u64> {
        match self {
            Self::Closed {
                until_ms,
                probing: false,
                ..
            } => Some(*until_ms),
            Self::Open | Self::Closed { .. } | Self::Ramp { .. } => None,
        }
    }

    /// One is sent, which [`Self::admits`] has allowed.
    pub(crate) const fn pass(&mut self) -> Pass {
        match self {
            Self::Closed { probing, .. } => {
                *probing = true;
                Pass { probe: true }
            }
            Self::Open | Self::Ramp { .. } => Pass { probe: false },
        }
    }

    /// It has reached the service, whatever came of it there.
    pub(crate) fn reached(&mut self, max_concurrency: u32) {
        *self = match *self {
            Self::Open => Self::Open,
            Self::Closed { pauses, .. } => Self::Ramp { allowed: 1, pauses },
            Self::Ramp { allowed, .. } if allowed >= max_concurrency / 2 => Self::Open,
            Self::Ramp { allowed, pauses } => Self::Ramp {
                allowed: allowed * 2,
                pauses,
            },
        };
    }

    /// It has not. What was sent before the gate closed, and comes back after, says nothing new: false then.
    pub(crate) fn missed(
        &mut self,
        pass: Pass,
        retry_after: Option<Duration>,
        queue: &Queue,
        now_ms: u64,
        draw: &mut impl Draw,
    ) -> bool {
        let before = match *self {
            Self::Open => 0,
            Self::Ramp { pauses, .. } => pauses,
            Self::Closed { pauses, .. } if pass.probe => pauses,
            Self::Closed { .. } => return false,
        };
        let longest = longest_pause(queue, before);
        // From half to the whole, so that no draw makes the next probe follow at once.
        let pause = longest / 2 + drawn(longest / 2, draw);
        let pause = pause.max(bounded(retry_after, queue));
        *self = Self::Closed {
            pauses: before.saturating_add(1),
            until_ms: now_ms.saturating_add(millis(pause)),
            probing: false,
        };
        true
    }

    /// Nothing was sent after all.
    pub(crate) const fn unused(&mut self, pass: Pass) {
        if let Self::Closed { probing, .. } = self
            && pass.probe
        {
            *probing = false;
        }
    }
}

/// The pause after the n-th failure (the first is 0) at the most: `base_interval` * 2^n, up to `max_interval`.
fn longest_pause(queue: &Queue, n: u32) -> Duration {
    let factor = 1u32.checked_shl(n).unwrap_or(u32::MAX);
    queue.base_interval.saturating_mul(factor).min(queue.max_interval)
}

/// The pause after the n-th failure (the first is 0) of an entry, with full jitter (Brooker, "Exponential backoff
/// and jitter", AWS Architecture Blog, 2015), and not below what the service asked for.
pub(crate) fn backoff(
    queue: &Queue,
    n: u32,
    retry_after: Option<Duration>,
    draw: &mut impl Draw,
) -> Duration {
    drawn(longest_pause(queue, n), draw).max(bounded(retry_after, queue))
}

/// What a service may ask for at most, unless policy's own longest pause is longer.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

fn bounded(retry_after: Option<Duration>, queue: &Queue) -> Duration {
    retry_after
        .unwrap_or_default()
        .min(queue.max_interval.max(MAX_RETRY_AFTER))
}

fn drawn(most: Duration, draw: &mut impl Draw) -> Duration {
    let nanos = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(draw.below(nanos.saturating_add(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_resilience::Seeded;

    const QUEUE: Queue = Queue {
        base_interval: Duration::from_millis(100),
        max_interval: Duration::from_secs(1),
        ..Queue::DEFAULT
    };

    #[test]
    fn one_probe_at_a_time_with_pauses_that_double() {
        let (mut gate, mut draw, mut now) = (Gate::Open, Seeded(3), 1_000_000);
        let mut last = gate.pass();
        for longest in [100, 200, 400, 800, 1000, 1000] {
            gate.missed(last, None, &QUEUE, now, &mut draw);
            let at = gate.opens_at().unwrap();
            assert!(
                (longest / 2..=longest + 1).contains(&(at - now)),
                "{} of {longest}",
                at - now
            );
            assert!(!gate.admits(0, at - 1));
            assert!(gate.admits(0, at));
            last = gate.pass();
            assert!(!gate.admits(0, at + 10_000), "one probe");
            now = at;
        }
    }

    #[test]
    fn what_comes_back_late_changes_nothing() {
        let (mut gate, mut draw) = (Gate::Open, Seeded(3));
        let passes = [gate.pass(), gate.pass(), gate.pass()];
        gate.missed(passes[0], None, &QUEUE, 0, &mut draw);
        let closed = gate.clone();
        gate.missed(passes[1], None, &QUEUE, 50, &mut draw);
        assert_eq!(gate, closed);
    }

    #[test]
    fn it_opens_in_steps() {
        let (mut gate, mut draw) = (Gate::Open, Seeded(3));
        let pass = gate.pass();
        gate.missed(pass, None, &QUEUE, 0, &mut draw);
        let _ = gate.pass();
        for allowed in [1, 2, 4] {
            gate.reached(8);
            assert!(
                gate.admits(allowed - 1, 0) && !gate.admits(allowed, 0),
                "{gate:?}"
            );
        }
        gate.reached(8);
        assert_eq!(gate, Gate::Open);
    }

    #[test]
    fn pauses_count_on_if_it_closes_while_opening() {
        let (mut gate, mut draw) = (Gate::Open, Seeded(3));
        for _ in 0..3 {
            let pass = gate.pass();
            gate.missed(pass, None, &QUEUE, 0, &mut draw);
        }
        let _ = gate.pass();
        gate.reached(8);
        let pass = gate.pass();
        gate.missed(pass, None, &QUEUE, 0, &mut draw);
        assert!(matches!(gate, Gate::Closed { pauses: 4, .. }), "{gate:?}");
    }

    #[test]
    fn it_waits_as_long_as_it_was_asked_to() {
        let (mut gate, mut draw) = (Gate::Open, Seeded(3));
        let pass = gate.pass();
        gate.missed(pass, Some(Duration::from_secs(7)), &QUEUE, 0, &mut draw);
        assert_eq!(gate.opens_at(), Some(7000));
        let pass = gate.pass();
        gate.missed(pass, Some(Duration::MAX), &QUEUE, 0, &mut draw);
        assert_eq!(gate.opens_at(), Some(300_000), "within reason");
    }

    #[test]
    fn a_probe_that_was_not_sent_leaves_the_next_its_turn() {
        let (mut gate, mut draw) = (Gate::Open, Seeded(3));
        let pass = gate.pass();
        gate.missed(pass, None, &QUEUE, 0, &mut draw);
        let pass = gate.pass();
        assert!(!gate.admits(0, 5000));
        gate.unused(pass);
        assert!(gate.admits(0, 5000));
    }

    #[test]
    fn pauses_of_entries_are_drawn_from_the_whole_range() {
        let mut draw = Seeded(5);
        for (n, longest) in [(0, 100), (1, 200), (3, 800), (4, 1000), (u32::MAX, 1000)] {
            let draws: Vec<_> = (0..1000)
                .map(|_| backoff(&QUEUE, n, None, &mut draw).as_millis())
                .collect();
            assert!(draws.iter().all(|d| *d <= longest));
            assert!(draws.iter().any(|d| *d < longest / 10) && draws.iter().any(|d| *d > longest * 9 / 10));
        }
        let asked = Duration::from_secs(2);
        assert!(backoff(&QUEUE, 0, Some(asked), &mut draw) >= asked);
    }
}
