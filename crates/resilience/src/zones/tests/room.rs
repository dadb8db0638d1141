//! Zones that report how much more they bear.

use super::*;
use crate::{Draw, Headroom, Seeded, Usage, spare_for_each};

const ALL: f64 = f64::INFINITY;

fn zones(of: &[(u32, f64)]) -> Vec<(usize, ZoneHealth)> {
    let zone = |(healthy, room): &(u32, f64)| ZoneHealth {
        room: *room,
        ..ZoneHealth::new(f64::from(*healthy), 100.0)
    };
    of.iter().map(zone).enumerate().collect()
}

fn shares(of: &[(u32, f64)]) -> Shares {
    Zones::new().update(&zones(of), Service::new().now, &FAILOVER, 0)
}

#[test]
fn what_spills_stays_within_the_room_and_the_rest_goes_to_the_next() {
    check(&shares(&[(50, ALL), (100, 2.0), (100, ALL)]), &[0.7, 0.3, 0.0]);
    check(&shares(&[(50, ALL), (100, 0.1), (100, ALL)]), &[0.7, 0.1, 0.2]);
    check(&shares(&[(50, ALL), (100, 0.0), (100, 0.2)]), &[0.8, 0.0, 0.2]);
    assert_eq!(
        shares(&[(50, ALL), (100, 0.1)]).spills,
        [Spill::Nothing, Spill::All]
    );
}

#[test]
fn what_finds_no_room_stays_where_it_is() {
    check(&shares(&[(50, ALL), (100, 0.1)]), &[0.9, 0.1]);
    // Or is nobody's, where nobody is left.
    check(&shares(&[(0, ALL), (100, 0.6)]), &[0.0, 0.6]);
    check(&shares(&[(0, ALL), (100, 0.6), (100, 0.1)]), &[0.0, 0.6, 0.1]);
    // More than their health would carry, if they say that they have room.
    check(&shares(&[(0, ALL), (10, 0.5), (10, 0.5)]), &[0.0, 0.5, 0.5]);
}

#[test]
fn the_first_zone_is_nobody_elses_to_bound() {
    check(&shares(&[(100, 0.1), (100, ALL)]), &[1.0, 0.0]);
    check(&shares(&[(50, 0.1), (0, ALL)]), &[1.0, 0.0]);
}

#[test]
fn a_drain_moves_no_more_than_there_is_room_for() {
    let mut drained = zones(&[(100, ALL), (100, 0.3), (100, 0.2)]);
    drained[0].1.kept = 0.0;
    let shares = Zones::new().update(&drained, Service::new().now, &FAILOVER, 0);
    check(&shares, &[0.5, 0.3, 0.2]);
}

#[test]
fn zones_that_serve_by_weight_bound_only_what_is_more() {
    let mut weighed = zones(&[(0, ALL), (100, 0.4), (100, 0.1), (100, ALL)]);
    for ((_, zone), weight) in weighed.iter_mut().zip([2, 1, 1, 0]) {
        zone.weight = Some(weight);
    }
    let shares = Zones::new().update(&weighed, Service::new().now, &FAILOVER, 0);
    check(&shares, &[0.0, 0.4, 0.25, 0.35]);
    assert_eq!(
        shares.spills,
        [Spill::Others, Spill::All, Spill::Others, Spill::All]
    );
}

#[test]
fn no_number_of_a_liar_moves_anything_but_its_own_share() {
    for room in [f64::NAN, -1.0, f64::NEG_INFINITY] {
        check(&shares(&[(50, ALL), (100, room), (100, ALL)]), &[0.7, 0.0, 0.3]);
    }
    check(&shares(&[(50, ALL), (100, 1e300), (100, ALL)]), &[0.7, 0.3, 0.0]);
}

/// Two callers whose own zone comes and goes each two and a half seconds, and which spill into another that bears so
/// much: what each look finds.
struct Flapping {
    callers: Vec<Caller>,
    bears: u32,
    /// Most at once since the last report.
    peak: u32,
    draw: Seeded,
    now: Instant,
    looks: u32,
}

#[derive(Default)]
struct Caller {
    zones: Zones<usize>,
    headroom: Headroom,
    there: Usage,
    here: u32,
    seen: Vec<Shares>,
}

impl Flapping {
    fn new(bears: u32, callers: usize) -> Self {
        Self {
            callers: (0..callers).map(|_| Caller::default()).collect(),
            bears,
            peak: 0,
            draw: Seeded(5),
            now: Service::new().now,
            looks: 0,
        }
    }

    fn there(&self) -> u32 {
        self.callers.iter().map(|caller| caller.there.under_way).sum()
    }

    /// One look: requests end, and each caller has `wanted` anew, one by one to the zone that is drawn for it.
    fn step(&mut self, healthy_here: u32, wanted: u32) {
        self.now += crate::LOOK_EVERY;
        self.looks += 1;
        let others = u32::try_from(self.callers.len()).unwrap();
        self.peak = self.peak.max(self.there());
        let spare = self.bears.saturating_sub(self.peak);
        let calling = self
            .callers
            .iter()
            .filter(|caller| caller.there.begun > 0)
            .count();
        let each = spare_for_each(spare, u32::try_from(calling).unwrap());
        for caller in &mut self.callers {
            caller
                .headroom
                .look(caller.there, others, self.now, &mut self.draw);
            if self.looks.is_multiple_of(10) {
                caller.headroom.report(each, others, self.now, &mut self.draw);
            }
            let bound = caller.headroom.bound(self.now).unwrap_or(0);
            let room = f64::from(bound) / f64::from(wanted.max(1));
            let list = zones(&[(healthy_here, ALL), (100, room)]);
            let shares = caller.zones.update(&list, self.now, &FAILOVER, 0);
            (caller.here, caller.there.under_way) = (0, 0);
            for _ in 0..wanted {
                if self.draw.unit() < shares.of[0] {
                    caller.here += 1;
                } else if caller.there.under_way < bound {
                    caller.there.under_way += 1;
                    caller.there.begun = caller.there.begun.wrapping_add(1);
                }
            }
            caller.seen.push(shares);
        }
        if self.looks.is_multiple_of(10) {
            self.peak = 0;
        }
    }
}

#[test]
fn two_callers_whose_zone_flaps_leave_it_once_and_never_overrun_the_other() {
    let mut spill = Flapping::new(100, 2);
    for look in 0..3000u32 {
        // Down for two and a half seconds, up for as long.
        let down = look > 100 && (look / 25).is_multiple_of(2);
        spill.step(if down { 0 } else { 100 }, 80);
        assert!(spill.there() <= 100, "{} at {look}", spill.there());
    }
    // Each look draws anew, so that a part of the room is kept for what varies.
    assert!(spill.there() > 70, "{} is not what it bears", spill.there());
    for caller in &spill.callers {
        assert_eq!(changes(&caller.seen, Stage::Dipped, Stage::Left), 1);
        // One failover, and nothing that comes back and goes again within a minute.
        let minute = usize::try_from(60_000 / crate::LOOK_EVERY.as_millis()).unwrap();
        for minute in caller.seen.windows(minute) {
            let left = changes(minute, Stage::Steady, Stage::Dipped)
                + changes(minute, Stage::Returning, Stage::Left);
            assert!(left <= 1, "{left}");
        }
    }
}

proptest! {
    #[test]
    fn no_zone_gets_more_than_it_has_room_for(
        zones in prop::collection::vec((0u32..=100, 0u32..=100, 0.0f64..2.0, any::<bool>()), 2..6),
        panic_threshold in prop_oneof![Just(0u32), Just(50)],
    ) {
        let with: Vec<_> = zones
            .iter()
            .enumerate()
            .map(|(zone, (healthy, kept, room, reports))| {
                let health = ZoneHealth {
                    kept: f64::from(*kept) / 100.0,
                    room: if *reports && zone > 0 { *room } else { ALL },
                    ..ZoneHealth::new(f64::from(*healthy), 100.0)
                };
                (zone, health)
            })
            .collect();
        let shares = Zones::new().update(&with, Service::new().now, &FAILOVER, panic_threshold);
        let sum: f64 = shares.of.iter().sum();
        prop_assert!(sum <= 1.0 + 1e-9);
        for (share, (zone, health)) in shares.of.iter().zip(&with) {
            prop_assert!(*share >= -1e-9);
            let bound = *zone > 0 && shares.panic == Panic::No;
            prop_assert!(!bound || *share <= health.room + 1e-9, "{shares:?}");
        }
        // As long as a zone is well that reports nothing, nothing is refused.
        let open = with.iter().any(|(_, health)| health.room.is_infinite() && health.healthy > 0.0);
        prop_assert!(!open || (sum - 1.0).abs() < 1e-6, "{shares:?}");
    }
}
