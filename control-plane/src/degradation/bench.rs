//! The judges: one for each policy in each zone, and one for each in the mesh.

use super::seen::Seen;
use crate::policy::{by_trigger, ms};
use crate::push::levels_frame;
use crate::store::{Judged, LevelChange, LevelWrites, Place};
use bytes::Bytes;
use leeward_policy::model::{DegradationPolicy, Scope, Signal};
use leeward_policy::{Resource, Spec};
use leeward_proto::v1;
use leeward_resilience::degrade::{Judge, Why, reading};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// All judges. Theirs is what triggers ask for; overrides don't concern them.
#[derive(Debug, Default)]
pub(super) struct Bench {
    revision: Option<u64>,
    policies: BTreeMap<String, Judgeable>,
    /// The zones that have a resource.
    zones: BTreeSet<String>,
    seats: BTreeMap<Place, Seat>,
}

/// A policy, for the judges of zones and for the one of the mesh.
#[derive(Debug)]
struct Judgeable {
    zone: Side,
    mesh: Side,
}

/// A policy with the triggers of one scope only.
#[derive(Debug)]
struct Side {
    policy: DegradationPolicy,
    /// Where each of its triggers stands in the policy as it was written.
    places: Vec<usize>,
}

#[derive(Debug)]
struct Seat {
    judge: Judge,
    /// What made its level change last.
    why: Option<Why>,
}

/// What proxies are told: encoded messages, by zone.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Told {
    zones: BTreeMap<String, Bytes>,
    /// What holds in zones of which nothing has been heard yet.
    elsewhere: Bytes,
}

impl Told {
    /// What the proxies of a zone are told.
    pub(crate) fn to(&self, zone: &str) -> &Bytes {
        self.zones.get(zone).unwrap_or(&self.elsewhere)
    }
}

impl Bench {
    /// Whether it judges by the policy of a revision.
    pub(super) fn is_at(&self, revision: u64) -> bool {
        self.revision == Some(revision)
    }

    /// Whether there is something to judge.
    pub(super) fn has_work(&self) -> bool {
        !self.policies.is_empty() || !self.seats.is_empty()
    }

    /// Takes other policies and zones. What stayed the same of a policy's triggers goes on.
    pub(super) fn take(&mut self, policies: &[Arc<Resource>], zones: BTreeSet<String>, revision: u64) {
        let of = |resource: &Arc<Resource>| match &resource.spec {
            Spec::DegradationPolicy(policy) => {
                let (zone, mesh) = (Side::new(policy, Scope::Zone), Side::new(policy, Scope::Mesh));
                Some((resource.name.to_string(), Judgeable { zone, mesh }))
            }
            Spec::Zone(_)
            | Spec::Service(_)
            | Spec::Route(_)
            | Spec::FallbackPolicy(_)
            | Spec::Plugin(_)
            | Spec::ResiliencePolicy(_)
            | Spec::CircuitOverride(_)
            | Spec::FeatureFlags(_)
            | Spec::DegradationOverride(_)
            | Spec::Queue(_)
            | Spec::AuthorizationPolicy(_)
            | Spec::Gateway(_)
            | Spec::Workload(_)
            | Spec::RolloutPolicy(_)
            | Spec::AccessPolicy(_)
            | Spec::BackupPolicy(_)
            | Spec::RecoveryObjective(_) => None,
        };
        self.policies = policies.iter().filter_map(of).collect();
        self.zones = zones;
        self.revision = Some(revision);
        // What a deleted policy's judge asked for has ended with the deletion.
        let known = &self.policies;
        self.seats.retain(|place, _| known.contains_key(&place.policy));
    }

    /// What triggers look at, and over what.
    pub(super) fn signals(&self) -> impl Iterator<Item = (Scope, &Signal)> {
        let sides = self.policies.values().flat_map(|p| [&p.zone, &p.mesh]);
        sides.flat_map(|side| side.policy.triggers.iter().map(|t| (t.scope, &t.signal)))
    }

    /// Judges everything, against what is written down. `wall` is the wall clock's `now`.
    pub(super) fn judge(
        &mut self,
        seen: &Seen,
        written: &BTreeMap<Place, Judged>,
        now: Instant,
        wall: SystemTime,
    ) -> LevelWrites {
        let mut writes = LevelWrites::default();
        let zones: BTreeSet<&String> = self.zones.iter().chain(seen.zones()).collect();
        let places = self.policies.iter().flat_map(|(policy, judgeable)| {
            let of_zones = zones.iter().map(|zone| ((*zone).clone(), &judgeable.zone));
            of_zones
                .chain([(String::new(), &judgeable.mesh)])
                .map(|(zone, side)| (policy.clone(), zone, side))
        });
        for (policy, zone, side) in places {
            let place = Place { policy, zone };
            let known = written.get(&place);
            if side.places.is_empty() && known.is_none() && !self.seats.contains_key(&place) {
                continue;
            }
            let seat = self
                .seats
                .entry(place.clone())
                .or_insert_with(|| Seat::new(&side.policy, known, now, wall));
            // Nobody is there to say how things are, and that may be for a moment only.
            if seen.is_connected(&place.zone, now) || !seen.is_present(&place.zone, now) {
                seat.judge(side, &place.zone, seen, now);
            }
            seat.write(place, side, known, wall, &mut writes);
        }
        let policies = &self.policies;
        self.seats.retain(|place, seat| {
            let side = policies.get(&place.policy).map(|policy| policy.side(&place.zone));
            let is_zone = place.zone.is_empty() || zones.contains(&place.zone);
            is_zone && (seat.judge.level() > 0 || side.is_some_and(|side| !side.places.is_empty()))
        });
        self.retire(seen, written, now, wall, &mut writes);
        writes
    }

    /// What was judged of zones that are no more.
    fn retire(
        &self,
        seen: &Seen,
        written: &BTreeMap<Place, Judged>,
        now: Instant,
        wall: SystemTime,
        writes: &mut LevelWrites,
    ) {
        for (place, judged) in written {
            let gone = !place.zone.is_empty()
                && !self.zones.contains(&place.zone)
                && !seen.is_present(&place.zone, now)
                && !seen.zones().any(|zone| *zone == place.zone);
            let Some(policy) = self.policies.get(&place.policy).filter(|_| gone) else {
                continue;
            };
            writes.judged.push((place.clone(), None));
            writes.changes.push(LevelChange {
                time_ms: ms(wall),
                policy: place.policy.clone(),
                zone: place.zone.clone(),
                from: judged.level.clone(),
                to: policy.zone.name_of(0),
                by: judged.by.clone(),
                why: "the zone has no proxies any more".to_owned(),
            });
        }
    }

    /// Takes over what another control plane has judged.
    pub(super) fn follow(&mut self, written: &BTreeMap<Place, Judged>, now: Instant, wall: SystemTime) {
        let seats = written.iter().filter_map(|(place, judged)| {
            let side = self.policies.get(&place.policy)?.side(&place.zone);
            let seat = Seat::new(&side.policy, Some(judged), now, wall);
            Some((place.clone(), seat))
        });
        self.seats = seats.collect();
    }

    /// What proxies are to be told.
    pub(super) fn told(&self) -> Told {
        let zones: BTreeSet<&str> = self.seats.keys().map(|place| place.zone.as_str()).collect();
        let frame = |zone: &str| {
            let levels = self.policies.iter().filter_map(|(name, policy)| {
                let at = |zone: &str| {
                    let place = Place {
                        policy: name.clone(),
                        zone: zone.to_owned(),
                    };
                    self.seats.get(&place).filter(|seat| seat.judge.level() > 0)
                };
                let seats = [at(""), if zone.is_empty() { None } else { at(zone) }];
                let seat = seats
                    .into_iter()
                    .flatten()
                    .max_by_key(|seat| seat.judge.level())?;
                Some(v1::Level {
                    policy: name.clone(),
                    level: policy.zone.name_of(seat.judge.level()),
                    why: seat.why.as_ref().map(|why| why.text.clone()).unwrap_or_default(),
                })
            });
            levels_frame(v1::Levels {
                levels: levels.collect(),
            })
        };
        Told {
            elsewhere: frame(""),
            zones: zones
                .into_iter()
                .filter(|zone| !zone.is_empty())
                .map(|zone| (zone.to_owned(), frame(zone)))
                .collect(),
        }
    }
}

impl Judgeable {
    fn side(&self, zone: &str) -> &Side {
        if zone.is_empty() { &self.mesh } else { &self.zone }
    }
}

impl Side {
    fn new(policy: &DegradationPolicy, scope: Scope) -> Self {
        let of_scope = policy
            .triggers
            .iter()
            .enumerate()
            .filter(|(_, t)| t.scope == scope);
        let (places, triggers) = of_scope.map(|(place, trigger)| (place, trigger.clone())).unzip();
        Self {
            policy: DegradationPolicy {
                levels: policy.levels.clone(),
                routes: Vec::new(),
                triggers,
            },
            places,
        }
    }

    fn name_of(&self, level: usize) -> String {
        let level = self.policy.levels.get(level);
        level.map_or_else(String::new, |level| level.name.to_string())
    }
}

impl Seat {
    /// A judge that goes on from what is written down.
    fn new(policy: &DegradationPolicy, written: Option<&Judged>, now: Instant, wall: SystemTime) -> Self {
        let mut judge = Judge::new();
        let Some((written, level)) = written.and_then(|w| Some((w, policy.level(&w.level)?))) else {
            return Self { judge, why: None };
        };
        // Its stay goes on where it was; how long its signal has been clear nobody knows.
        let begun = Duration::from_millis(u64::try_from(written.since_ms).unwrap_or(0));
        let ago = wall.duration_since(UNIX_EPOCH + begun).unwrap_or_default();
        judge.seed(policy, level, now.checked_sub(ago).unwrap_or(now));
        let trigger = None;
        let text = written.why.clone();
        let why = (judge.level() == level).then_some(Why { trigger, text });
        Self { judge, why }
    }

    fn judge(&mut self, side: &Side, zone: &str, seen: &Seen, now: Instant) {
        let read = |_: usize, signal: &Signal| {
            let log = seen.log(zone, signal.service().as_str())?;
            reading(log, signal, now)
        };
        if let Some(change) = self.judge.judge(&side.policy, read, now) {
            self.why = Some(change.why);
        }
    }

    /// Writes down where this differs from what is written down.
    fn write(
        &self,
        place: Place,
        side: &Side,
        written: Option<&Judged>,
        wall: SystemTime,
        writes: &mut LevelWrites,
    ) {
        let level = self.judge.level();
        let to = side.name_of(level);
        let from = written.map_or_else(|| side.name_of(0), |written| written.level.clone());
        if from == to {
            return;
        }
        let place_of = |trigger: usize| side.places.get(trigger).copied();
        let trigger = self.why.as_ref().and_then(|why| why.trigger).and_then(place_of);
        let by = match (trigger, written) {
            (Some(trigger), _) => by_trigger(trigger),
            (None, Some(written)) => written.by.clone(),
            (None, None) => String::new(),
        };
        let why = self.why.as_ref().map_or_else(
            || "the policy has no such level any more, or no trigger for it".to_owned(),
            |why| why.text.clone(),
        );
        let judged = (level > 0).then(|| Judged {
            level: to.clone(),
            since_ms: ms(wall),
            by: by.clone(),
            why: why.clone(),
        });
        writes.changes.push(LevelChange {
            time_ms: ms(wall),
            policy: place.policy.clone(),
            zone: place.zone.clone(),
            from,
            to,
            by,
            why,
        });
        writes.judged.push((place, judged));
    }
}

#[cfg(test)]
mod tests;
