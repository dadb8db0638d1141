//! What users got, and whether that is what was promised. Pure.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// What the users of one zone got.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Got {
    /// Whole pages.
    pub(crate) served: u64,
    /// Pages with a part that a fallback answered.
    pub(crate) degraded: u64,
    /// No page.
    pub(crate) failed: u64,
    /// Where the catalogue of their pages came from.
    pub(crate) from: BTreeMap<String, u64>,
}

/// What users got, by the zone that they are in.
pub(crate) type Counts = BTreeMap<String, Got>;

/// What is promised of a phase.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Expect {
    /// Every page whole.
    AllServed,
    /// No page missing, some degraded.
    SomeDegraded,
    /// No page missing, and users of zone a get zone b's catalogue.
    FromZoneB,
    /// No page missing.
    NoneFailed,
    /// No page missing, and whole ones again.
    ServedAgain,
}

/// One phase.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) expect: Expect,
    pub(crate) counts: Counts,
}

/// The whole demo.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    pub(crate) phases: Vec<Phase>,
    /// How long a changed route took to be in effect everywhere.
    pub(crate) changed_in: Duration,
    /// How long it may take.
    pub(crate) change_within: Duration,
}

impl Phase {
    fn sum(&self, of: impl Fn(&Got) -> u64) -> u64 {
        self.counts.values().map(of).sum()
    }

    /// Whether the promise was kept.
    fn kept(&self) -> bool {
        let (served, degraded, failed) = (
            self.sum(|g| g.served),
            self.sum(|g| g.degraded),
            self.sum(|g| g.failed),
        );
        let all_zones = !self.counts.is_empty() && self.counts.values().all(|g| g.served + g.degraded > 0);
        let promise = match self.expect {
            Expect::AllServed => degraded == 0,
            Expect::SomeDegraded => degraded > 0,
            Expect::FromZoneB => self
                .counts
                .get("a")
                .is_some_and(|a| a.from.get("b").is_some_and(|n| *n > 0)),
            Expect::NoneFailed => true,
            Expect::ServedAgain => served > 0,
        };
        failed == 0 && all_zones && promise
    }
}

impl Summary {
    /// Whether every promise was kept.
    pub(crate) fn kept(&self) -> bool {
        self.phases.iter().all(Phase::kept) && self.changed_in <= self.change_within
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let rows: Vec<_> = self
            .phases
            .iter()
            .flat_map(|phase| {
                phase.counts.iter().map(|(zone, got)| {
                    let from: Vec<_> = got.from.iter().map(|(zone, n)| format!("{zone}: {n}")).collect();
                    let kept = if phase.kept() { "kept" } else { "BROKEN" };
                    [
                        phase.name.to_owned(),
                        zone.clone(),
                        got.served.to_string(),
                        got.degraded.to_string(),
                        got.failed.to_string(),
                        from.join(", "),
                        kept.to_owned(),
                    ]
                })
            })
            .collect();
        let head = [
            "PHASE",
            "USERS IN",
            "SERVED",
            "DEGRADED",
            "FAILED",
            "CATALOG FROM",
            "PROMISE",
        ];
        let changed = if self.changed_in <= self.change_within {
            "kept"
        } else {
            "BROKEN"
        };
        format!(
            "\n{}\nroute change in effect after {} ms (at most {}): {changed}",
            crate::output::table(head, &rows),
            self.changed_in.as_millis(),
            self.change_within.as_millis(),
        )
    }

    /// For programs.
    pub(crate) fn to_json(&self) -> Value {
        let phases: Vec<_> = self
            .phases
            .iter()
            .map(|phase| {
                let zones: BTreeMap<_, _> = phase
                    .counts
                    .iter()
                    .map(|(zone, got)| {
                        let Got { served, degraded, failed, from } = got;
                        (zone, json!({"served": served, "degraded": degraded, "failed": failed, "catalog_from": from}))
                    })
                    .collect();
                json!({
                    "name": phase.name,
                    "served": phase.sum(|g| g.served),
                    "degraded": phase.sum(|g| g.degraded),
                    "failed": phase.sum(|g| g.failed),
                    "zones": zones,
                    "kept": phase.kept(),
                })
            })
            .collect();
        json!({"phases": phases, "route_change_ms": u64::try_from(self.changed_in.as_millis()).unwrap_or(u64::MAX), "ok": self.kept()})
    }
}

/// What users of each zone got since the last look.
pub(crate) fn live_line(now: &Counts, before: &Counts) -> String {
    let none = Got::default();
    let zones: Vec<_> = now
        .iter()
        .map(|(zone, got)| {
            let was = before.get(zone).unwrap_or(&none);
            let from: Vec<_> = got
                .from
                .iter()
                .map(|(from, n)| (from, n - was.from.get(from).unwrap_or(&0)))
                .filter(|(_, n)| *n > 0)
                .map(|(from, _)| from.as_str())
                .collect();
            format!(
                "users in {zone}: {:>3} served {:>3} degraded {:>3} failed, catalog from {}",
                got.served - was.served,
                got.degraded - was.degraded,
                got.failed - was.failed,
                if from.is_empty() {
                    "-".to_owned()
                } else {
                    from.join("+")
                },
            )
        })
        .collect();
    format!("  {}", zones.join("   |   "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn got(served: u64, degraded: u64, failed: u64, from: &str) -> Got {
        Got {
            served,
            degraded,
            failed,
            from: BTreeMap::from([(from.to_owned(), served + degraded)]),
        }
    }

    #[track_caller]
    fn check(expect: Expect, a: Got, b: Got, kept: bool) {
        let counts = Counts::from([("a".to_owned(), a), ("b".to_owned(), b)]);
        assert_eq!(
            Phase {
                name: "x",
                expect,
                counts
            }
            .kept(),
            kept
        );
    }

    #[test]
    fn a_promise_is_kept_or_broken_by_what_users_got() {
        check(Expect::AllServed, got(9, 0, 0, "a"), got(9, 0, 0, "b"), true);
        check(Expect::AllServed, got(9, 1, 0, "a"), got(9, 0, 0, "b"), false);
        check(Expect::AllServed, got(9, 0, 1, "a"), got(9, 0, 0, "b"), false);
        check(Expect::AllServed, got(9, 0, 0, "a"), got(0, 0, 0, "b"), false);
        check(Expect::SomeDegraded, got(0, 9, 0, "a"), got(1, 9, 0, "b"), true);
        check(Expect::SomeDegraded, got(9, 0, 0, "a"), got(9, 0, 0, "b"), false);
        check(Expect::FromZoneB, got(0, 9, 0, "b"), got(0, 9, 0, "b"), true);
        check(Expect::FromZoneB, got(0, 9, 0, "a"), got(0, 9, 0, "b"), false);
        check(Expect::ServedAgain, got(0, 9, 0, "a"), got(0, 9, 0, "b"), false);
    }

    #[test]
    fn the_summary_is_kept_if_every_phase_is() {
        let counts = Counts::from([("a".to_owned(), got(1, 0, 0, "a"))]);
        let phase = Phase {
            name: "steady",
            expect: Expect::AllServed,
            counts,
        };
        let ms = Duration::from_millis;
        let summary = Summary {
            phases: vec![phase],
            changed_in: ms(900),
            change_within: ms(1000),
        };
        assert!(summary.kept());
        assert_eq!(summary.to_json()["phases"][0]["zones"]["a"]["served"], 1);
        assert!(
            !Summary {
                changed_in: ms(1001),
                ..summary
            }
            .kept()
        );
    }
}
