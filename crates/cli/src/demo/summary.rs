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
    /// No page, since a level of degradation spares the shop such requests.
    pub(crate) shed: u64,
    /// Orders that were taken; they are among the pages.
    pub(crate) orders: u64,
    /// Those of them that are yet to be paid for.
    pub(crate) pending: u64,
    /// Parts that a fallback answered, by the fallback: `POLICY/RUNG`.
    pub(crate) fallbacks: BTreeMap<String, u64>,
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
    /// No page missing, and some with a part that this FallbackPolicy answered, in both zones.
    DegradedBy(&'static str),
    /// No order missing, and no page but those that were on their way.
    OrdersOnly,
    /// No page missing but those that were on their way, and whole ones again.
    ServedAgain,
}

/// Something that was counted, and must be as many.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Count {
    pub(crate) what: &'static str,
    pub(crate) value: u64,
    pub(crate) want: u64,
}

impl Count {
    const fn kept(&self) -> bool {
        self.value == self.want
    }

    fn line(&self) -> String {
        let Self { what, value, want } = self;
        format!("{what}: {value} (to be {want}): {}\n", word(self.kept()))
    }

    fn to_json(&self) -> Value {
        json!({"what": self.what, "value": self.value, "want": self.want, "kept": self.kept()})
    }
}

const fn word(kept: bool) -> &'static str {
    if kept { "kept" } else { "BROKEN" }
}

/// One phase.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) expect: Expect,
    pub(crate) counts: Counts,
    /// What users don't see.
    pub(crate) counted: Option<Count>,
}

/// The whole demo.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    pub(crate) phases: Vec<Phase>,
    /// What the orders of all phases came to.
    pub(crate) orders: Vec<Count>,
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
        let by = |got: &Got, policy: &str| {
            let of = |rung: &String| {
                rung.strip_prefix(policy)
                    .is_some_and(|rest| rest.starts_with('/'))
            };
            got.fallbacks.keys().any(of)
        };
        let every = |of: &dyn Fn(&Got) -> bool| self.counts.values().all(of);
        let none_shed = self.sum(|g| g.shed) == 0;
        let promise = match self.expect {
            Expect::AllServed => none_shed && degraded == 0,
            Expect::SomeDegraded => none_shed && degraded > 0,
            Expect::FromZoneB => {
                let a = self.counts.get("a");
                none_shed && a.is_some_and(|a| a.from.get("b").is_some_and(|n| *n > 0))
            }
            Expect::NoneFailed => none_shed,
            Expect::DegradedBy(policy) => none_shed && every(&|got| by(got, policy)),
            Expect::OrdersOnly => every(&|got| got.shed > 0 && got.orders > 0),
            Expect::ServedAgain => served > 0 && every(&|got| !got.from.is_empty()),
        };
        failed == 0 && all_zones && promise && self.counted.as_ref().is_none_or(Count::kept)
    }
}

impl Summary {
    /// Whether every promise was kept.
    pub(crate) fn kept(&self) -> bool {
        self.phases.iter().all(Phase::kept)
            && self.orders.iter().all(Count::kept)
            && self.changed_in <= self.change_within
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let rows: Vec<_> = self
            .phases
            .iter()
            .flat_map(|phase| {
                phase.counts.iter().map(|(zone, got)| {
                    let from: Vec<_> = got.from.iter().map(|(zone, n)| format!("{zone}: {n}")).collect();
                    [
                        phase.name.to_owned(),
                        zone.clone(),
                        got.served.to_string(),
                        got.degraded.to_string(),
                        got.failed.to_string(),
                        got.shed.to_string(),
                        format!("{} ({} pending)", got.orders, got.pending),
                        from.join(", "),
                        word(phase.kept()).to_owned(),
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
            "SHED",
            "ORDERS",
            "CATALOG FROM",
            "PROMISE",
        ];
        let counted = self.phases.iter().filter_map(|phase| phase.counted.as_ref());
        let lines: String = counted.chain(&self.orders).map(Count::line).collect();
        format!(
            "\n{}\n{lines}route change in effect after {} ms (at most {}): {}",
            crate::output::table(head, &rows),
            self.changed_in.as_millis(),
            self.change_within.as_millis(),
            word(self.changed_in <= self.change_within),
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
                        let fields = json!({
                            "served": got.served, "degraded": got.degraded, "failed": got.failed,
                            "shed": got.shed, "orders": got.orders, "pending": got.pending,
                            "fallbacks": got.fallbacks, "catalog_from": got.from,
                        });
                        (zone, fields)
                    })
                    .collect();
                json!({
                    "name": phase.name,
                    "served": phase.sum(|g| g.served),
                    "degraded": phase.sum(|g| g.degraded),
                    "failed": phase.sum(|g| g.failed),
                    "shed": phase.sum(|g| g.shed),
                    "orders": phase.sum(|g| g.orders),
                    "pending": phase.sum(|g| g.pending),
                    "zones": zones,
                    "counted": phase.counted.as_ref().map(Count::to_json),
                    "kept": phase.kept(),
                })
            })
            .collect();
        let orders: Vec<_> = self.orders.iter().map(Count::to_json).collect();
        let changed_in = u64::try_from(self.changed_in.as_millis()).unwrap_or(u64::MAX);
        json!({"phases": phases, "orders": orders, "route_change_ms": changed_in, "ok": self.kept()})
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
                "users in {zone}: {:>3} served {:>3} degraded {:>3} failed {:>3} shed, catalog from {}",
                got.served - was.served,
                got.degraded - was.degraded,
                got.failed - was.failed,
                got.shed - was.shed,
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
            ..Got::default()
        }
    }

    fn part(by: &str) -> Got {
        Got {
            fallbacks: BTreeMap::from([(by.to_owned(), 1)]),
            ..got(1, 8, 0, "a")
        }
    }

    fn core(shed: u64, orders: u64, failed: u64) -> Got {
        Got {
            served: orders,
            failed,
            shed,
            orders,
            ..Got::default()
        }
    }

    #[track_caller]
    fn check(expect: Expect, a: Got, b: Got, kept: bool) {
        let counts = Counts::from([("a".to_owned(), a), ("b".to_owned(), b)]);
        assert_eq!(
            Phase {
                name: "x",
                expect,
                counts,
                counted: None,
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
        check(Expect::ServedAgain, got(9, 0, 0, "a"), core(0, 9, 0), false);
        let by = Expect::DegradedBy("catalog");
        check(by, part("catalog/0"), part("catalog/1"), true);
        check(by, part("catalog/0"), part("catalogs/0"), false);
        check(by, part("catalog/0"), got(9, 0, 0, "b"), false);
        check(Expect::OrdersOnly, core(9, 1, 0), core(9, 1, 0), true);
        check(Expect::OrdersOnly, core(9, 1, 0), core(9, 0, 0), false);
        check(Expect::OrdersOnly, core(0, 9, 0), core(9, 1, 0), false);
        check(Expect::OrdersOnly, core(9, 1, 1), core(9, 1, 0), false);
        check(Expect::NoneFailed, core(1, 9, 0), core(0, 9, 0), false);
    }

    #[test]
    fn the_summary_is_kept_if_every_phase_is() {
        let counts = Counts::from([("a".to_owned(), got(1, 0, 0, "a"))]);
        let phase = Phase {
            name: "steady",
            expect: Expect::AllServed,
            counts,
            counted: None,
        };
        let count = |value| Count {
            what: "orders that payment has charged for",
            value,
            want: 9,
        };
        let ms = Duration::from_millis;
        let summary = Summary {
            phases: vec![phase.clone()],
            orders: vec![count(9)],
            changed_in: ms(900),
            change_within: ms(1000),
        };
        assert!(summary.kept());
        assert_eq!(summary.to_json()["phases"][0]["zones"]["a"]["served"], 1);
        assert!(
            !Summary {
                changed_in: ms(1001),
                ..summary.clone()
            }
            .kept()
        );
        assert!(
            !Summary {
                orders: vec![count(8)],
                ..summary.clone()
            }
            .kept()
        );
        let phase = Phase {
            counted: Some(count(10)),
            ..phase
        };
        let summary = Summary {
            phases: vec![phase],
            ..summary
        };
        assert!(!summary.kept());
        assert!(summary.table().contains("charged for: 10 (to be 9): BROKEN"));
    }
}
