//! The levels in force: what overrides hold, what triggers ask for, and what a write changes of it.

use super::{Entry, Known};
use crate::store::{Hold, Judged, LevelChange, LevelWrites, Place, Store};
use leeward_policy::model::{DegradationOverride, DegradationPolicy};
use leeward_policy::{Key, Kind, Name, Resource, Spec};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Who ends an override whose time is over.
pub(super) const EXPIRY: &str = "expiry";
/// What the `by` of a trigger begins with; its place in the policy follows.
const TRIGGER: &str = "trigger ";

/// What the store says that holds.
#[derive(Debug, Default)]
pub(crate) struct Book {
    /// What triggers ask for.
    pub(crate) judged: BTreeMap<Place, Judged>,
    /// The overrides in force, by name.
    holds: BTreeMap<String, Hold>,
    /// The number of the last write of these.
    pub(super) at: u64,
}

/// A policy's level in a zone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct InForce {
    pub(crate) policy: String,
    pub(crate) zone: String,
    pub(crate) level: String,
    /// Since when, in milliseconds since 1970; `None` if it was never another.
    pub(crate) since_ms: Option<i64>,
    /// When it ends at the latest, if that is known.
    pub(crate) until_ms: Option<i64>,
    pub(crate) by: String,
    pub(crate) why: String,
}

/// The `by` of a trigger.
pub(crate) fn by_trigger(place: usize) -> String {
    format!("{TRIGGER}{place}")
}

/// The trigger's place, from its `by`.
fn trigger_of(by: &str) -> Option<usize> {
    by.strip_prefix(TRIGGER)?.parse().ok()
}

impl Book {
    pub(super) fn of(store: &Store) -> Self {
        let (judged, holds, at) = store.levels();
        Self { judged, holds, at }
    }

    /// Whether an override has ended and that has not been written down.
    pub(crate) fn is_due(&self, now: SystemTime) -> bool {
        let now = ms(now);
        self.holds.values().any(|hold| hold.until_ms <= now)
    }
}

/// What the end of overrides that are over changes.
pub(super) fn expired(known: &Known, book: &Book, now: SystemTime) -> LevelWrites {
    let world = World::new(known, book, &[]);
    let mut over: Vec<(&Name, &DegradationOverride)> = world
        .overrides
        .iter()
        .filter(|(name, held)| held.expire_time <= now && book.holds.contains_key(name.as_str()))
        .map(|(name, held)| (*name, *held))
        .collect();
    over.sort_by_key(|(_, held)| held.expire_time);
    let mut writes = LevelWrites::default();
    for (name, held) in over {
        writes.holds.push((name.to_string(), None));
        let Some(policy) = world.policy(&held.policy) else {
            continue;
        };
        let end = held.expire_time;
        let before = end.checked_sub(Duration::from_nanos(1)).unwrap_or(end);
        let from = |zone: &str| world.level(&held.policy, policy, zone, before);
        let to = |zone: &str| world.level(&held.policy, policy, zone, end);
        for (zone, from, to) in places(&held.zones, &world.zones(&held.policy), from, to) {
            writes.changes.push(LevelChange {
                time_ms: ms(end),
                policy: held.policy.to_string(),
                zone,
                from,
                to,
                by: EXPIRY.to_owned(),
                why: held.reason.to_string(),
            });
        }
    }
    // What holds without a resource that says so can't end by itself.
    let lost = book.holds.iter().filter(|(name, hold)| {
        hold.until_ms <= ms(now)
            && !world
                .overrides
                .keys()
                .any(|known| known.as_str() == name.as_str())
    });
    writes.holds.extend(lost.map(|(name, _)| (name.clone(), None)));
    writes
}

/// What resources that are applied change of the levels in force: `coming` are those that change.
pub(super) fn applied(
    known: &Known,
    book: &Book,
    coming: &[&Resource],
    who: &str,
    now: SystemTime,
) -> LevelWrites {
    let is_override = |r: &&&Resource| matches!(r.spec, Spec::DegradationOverride(_));
    if !coming.iter().any(|r| is_override(&r)) {
        return LevelWrites::default();
    }
    let mut writes = expired(known, book, now);
    // One after the other: the next starts from where the last has led.
    let mut world = World::new(known, book, coming);
    for resource in coming {
        if let Spec::DegradationOverride(held) = &resource.spec {
            let changed = Changed {
                name: &resource.name,
                held: Some(held),
                who,
                now,
            };
            changed.write(&mut world, &mut writes);
        }
    }
    writes
}

/// What a delete changes of the levels in force.
pub(super) fn deleted(known: &Known, book: &Book, key: &Key, who: &str, now: SystemTime) -> LevelWrites {
    match key.kind {
        Kind::DegradationOverride => {
            let mut writes = expired(known, book, now);
            let mut world = World::new(known, book, &[]);
            let changed = Changed {
                name: &key.name,
                held: None,
                who,
                now,
            };
            changed.write(&mut world, &mut writes);
            writes
        }
        Kind::DegradationPolicy => {
            let normal = World::new(known, book, &[])
                .policy(&key.name)
                .map_or_else(String::new, |policy| name_of(policy, 0));
            let mut writes = LevelWrites::default();
            for (place, judged) in book.judged.iter().filter(|(p, _)| p.policy == key.name.as_str()) {
                writes.judged.push((place.clone(), None));
                writes.changes.push(LevelChange {
                    time_ms: ms(now),
                    policy: place.policy.clone(),
                    zone: place.zone.clone(),
                    from: judged.level.clone(),
                    to: normal.clone(),
                    by: who.to_owned(),
                    why: "the policy was deleted".to_owned(),
                });
            }
            writes
        }
        Kind::Zone
        | Kind::Plugin
        | Kind::FeatureFlags
        | Kind::Queue
        | Kind::AuthorizationPolicy
        | Kind::Workload
        | Kind::BackupPolicy
        | Kind::RecoveryObjective
        | Kind::ResiliencePolicy
        | Kind::Service
        | Kind::FallbackPolicy
        | Kind::Gateway
        | Kind::RolloutPolicy
        | Kind::Route
        | Kind::CircuitOverride
        | Kind::AccessPolicy => LevelWrites::default(),
    }
}

/// Every policy's level in each of `zones`, by policy and zone. With each zone is whether what its own triggers ask for
/// is believed: otherwise that doesn't count.
pub(super) fn in_force(
    known: &Known,
    book: &Book,
    last: &BTreeMap<Place, i64>,
    zones: &BTreeMap<String, bool>,
    now: SystemTime,
) -> Vec<InForce> {
    let world = World::new(known, book, &[]);
    let mut rows = Vec::new();
    for (name, policy) in world.policies() {
        for (zone, believed) in zones {
            rows.push(world.row(name, policy, (zone, *believed), last, now));
        }
    }
    rows
}

/// An override that was applied or (`None`) deleted.
struct Changed<'a> {
    name: &'a Name,
    held: Option<&'a DegradationOverride>,
    who: &'a str,
    now: SystemTime,
}

impl<'a> Changed<'a> {
    /// Takes it over into the world, and writes down what that changes.
    fn write(&self, world: &mut World<'a>, writes: &mut LevelWrites) {
        let earlier = World {
            overrides: world.overrides.clone(),
            coming: BTreeMap::new(),
            ..*world
        };
        match self.held {
            Some(held) => world.overrides.insert(self.name, held),
            None => world.overrides.remove(self.name),
        };
        let world = &*world;
        let was = earlier.overrides.get(self.name).copied();
        let was = was.filter(|old| old.expire_time > self.now);
        let both = || was.into_iter().chain(self.held);
        // An override may move to another policy: it then ends in one, and begins in the other.
        let names: BTreeSet<&Name> = both().map(|held| &held.policy).collect();
        for name in names {
            let Some(policy) = world.policy(name) else {
                continue;
            };
            let earlier_policy = earlier.policy(name).unwrap_or(policy);
            let here = || both().filter(|held| held.policy == *name);
            let mut zones: Vec<Name> = here().flat_map(|held| held.zones.iter().cloned()).collect();
            zones.sort_unstable();
            zones.dedup();
            if here().any(|held| held.zones.is_empty()) {
                zones.clear();
            }
            let from = |zone: &str| earlier.level(name, earlier_policy, zone, self.now);
            let to = |zone: &str| world.level(name, policy, zone, self.now);
            for (zone, from, to) in places(&zones, &world.zones(name), from, to) {
                writes.changes.push(LevelChange {
                    time_ms: ms(self.now),
                    policy: name.to_string(),
                    zone,
                    from,
                    to,
                    by: self.who.to_owned(),
                    why: self
                        .held
                        .or(was)
                        .map_or_else(String::new, |held| held.reason.to_string()),
                });
            }
        }
        let stays = |held: &DegradationOverride| {
            was.is_some_and(|old| (&old.policy, &old.level) == (&held.policy, &held.level))
        };
        let hold = self.held.map(|held| Hold {
            since_ms: world
                .book
                .holds
                .get(self.name.as_str())
                .filter(|_| stays(held))
                .map_or_else(|| ms(self.now), |hold| hold.since_ms),
            until_ms: ms_after(held.expire_time),
            by: self.who.to_owned(),
        });
        writes.holds.push((self.name.to_string(), hold));
    }
}

/// What a change means for zones: each with its level before and after. One line for all zones where it is the same
/// for all.
fn places(
    zones: &[Name],
    all: &[String],
    from: impl Fn(&str) -> String,
    to: impl Fn(&str) -> String,
) -> Vec<(String, String, String)> {
    let line = |zone: &str| (zone.to_owned(), from(zone), to(zone));
    if !zones.is_empty() {
        return zones.iter().map(|zone| line(zone.as_str())).collect();
    }
    let everywhere = line("");
    let each: Vec<_> = all.iter().map(|zone| line(zone)).collect();
    let same = |(_, from, to): &(String, String, String)| (from, to) == (&everywhere.1, &everywhere.2);
    if each.iter().all(same) {
        vec![everywhere]
    } else {
        each
    }
}

/// Policies, overrides and judgements, as they are or as a write would leave them.
struct World<'a> {
    known: &'a Known,
    book: &'a Book,
    coming: BTreeMap<Key, &'a Resource>,
    overrides: BTreeMap<&'a Name, &'a DegradationOverride>,
}

impl<'a> World<'a> {
    fn new(known: &'a Known, book: &'a Book, coming: &[&'a Resource]) -> Self {
        let overrides = of_kind(known, Kind::DegradationOverride).filter_map(|(name, resource)| {
            if let Spec::DegradationOverride(held) = &resource.spec {
                Some((name, held))
            } else {
                None
            }
        });
        Self {
            known,
            book,
            overrides: overrides.collect(),
            coming: coming.iter().map(|r| (r.key(), *r)).collect(),
        }
    }

    fn policy(&self, name: &Name) -> Option<&'a DegradationPolicy> {
        let key = Key {
            kind: Kind::DegradationPolicy,
            name: name.clone(),
        };
        let resource = match self.coming.get(&key) {
            Some(resource) => resource,
            None => self.known.get(&key)?.resource.as_deref()?,
        };
        if let Spec::DegradationPolicy(policy) = &resource.spec {
            Some(policy)
        } else {
            None
        }
    }

    fn policies(&self) -> impl Iterator<Item = (&'a Name, &'a DegradationPolicy)> {
        of_kind(self.known, Kind::DegradationPolicy).filter_map(|(name, resource)| {
            if let Spec::DegradationPolicy(policy) = &resource.spec {
                Some((name, policy))
            } else {
                None
            }
        })
    }

    /// The zones that a policy may have different levels in.
    fn zones(&self, policy: &Name) -> Vec<String> {
        let judged = self.book.judged.keys().filter(|p| p.policy == policy.as_str());
        let judged = judged.map(|p| p.zone.clone()).filter(|zone| !zone.is_empty());
        let coming = self.coming.keys().filter(|key| key.kind == Kind::Zone);
        let named = zone_names(self.known).chain(coming.map(|key| &key.name));
        let zones: BTreeSet<String> = named.map(Name::to_string).chain(judged).collect();
        zones.into_iter().collect()
    }

    /// The override that holds in a zone: of several, the one of the most degraded level.
    fn held(
        &self,
        name: &Name,
        policy: &DegradationPolicy,
        zone: &str,
        at: SystemTime,
    ) -> Option<(usize, &'a Name, &'a DegradationOverride)> {
        let here = |held: &DegradationOverride| {
            held.policy == *name
                && held.expire_time > at
                && (held.zones.is_empty() || held.zones.iter().any(|z| z.as_str() == zone))
        };
        let holding = self.overrides.iter().filter(|(_, held)| here(held));
        let leveled = holding.filter_map(|(by, held)| Some((policy.level(held.level.as_str())?, *by, *held)));
        leveled.max_by_key(|(level, _, held)| (*level, held.expire_time))
    }

    /// What triggers ask for in a zone: the more degraded of the zone's own level and the mesh's.
    fn judged(&self, name: &Name, policy: &DegradationPolicy, zones: &[&str]) -> Option<(usize, &'a Judged)> {
        let at = |zone: &&str| {
            let place = Place {
                policy: name.to_string(),
                zone: (*zone).to_owned(),
            };
            let judged = self.book.judged.get(&place)?;
            Some((policy.level(&judged.level)?, judged))
        };
        zones.iter().filter_map(at).max_by_key(|(level, _)| *level)
    }

    /// The name of the level in force in a zone, or (empty) in all of which nothing in particular is known.
    fn level(&self, name: &Name, policy: &DegradationPolicy, zone: &str, at: SystemTime) -> String {
        let level = match self.held(name, policy, zone, at) {
            Some((level, ..)) => level,
            None => self
                .judged(name, policy, &["", zone])
                .map_or(0, |(level, _)| level),
        };
        name_of(policy, level)
    }

    fn row(
        &self,
        name: &Name,
        policy: &DegradationPolicy,
        (zone, believed): (&str, bool),
        last: &BTreeMap<Place, i64>,
        now: SystemTime,
    ) -> InForce {
        let row = |level, since_ms, until_ms, by: &str, why: &str| InForce {
            policy: name.to_string(),
            zone: zone.to_owned(),
            level: name_of(policy, level),
            since_ms,
            until_ms,
            by: by.to_owned(),
            why: why.to_owned(),
        };
        if let Some((level, by, held)) = self.held(name, policy, zone, now) {
            let hold = self.book.holds.get(by.as_str());
            let (since_ms, who) = (hold.map(|h| h.since_ms), hold.map_or("", |h| h.by.as_str()));
            return row(
                level,
                since_ms,
                Some(ms_after(held.expire_time)),
                who,
                &held.reason,
            );
        }
        let zones: &[&str] = if believed { &["", zone] } else { &[""] };
        if let Some((level, judged)) = self.judged(name, policy, zones).filter(|(level, _)| *level > 0) {
            let trigger = trigger_of(&judged.by).and_then(|place| policy.triggers.get(place));
            let stay = trigger.and_then(|trigger| trigger.max_stay);
            let until =
                stay.and_then(|stay| judged.since_ms.checked_add(i64::try_from(stay.as_millis()).ok()?));
            return row(level, Some(judged.since_ms), until, &judged.by, &judged.why);
        }
        let last_of = |zone: &str| {
            let place = Place {
                policy: name.to_string(),
                zone: zone.to_owned(),
            };
            last.get(&place).copied()
        };
        row(0, last_of("").max(last_of(zone)), None, "", "")
    }
}

fn of_kind(known: &Known, kind: Kind) -> impl Iterator<Item = (&Name, &Resource)> {
    let entries = known.iter().filter(move |(key, _)| key.kind == kind);
    entries.filter_map(|(key, entry): (&Key, &Entry)| Some((&key.name, &**entry.resource.as_ref()?)))
}

fn zone_names(known: &Known) -> impl Iterator<Item = &Name> {
    let zones = known.keys().filter(|key| key.kind == Kind::Zone);
    zones.map(|key| &key.name)
}

/// The policies with what they say, for whoever judges them.
pub(super) fn policies(known: &Known) -> Vec<Arc<Resource>> {
    let policies = known
        .iter()
        .filter(|(key, _)| key.kind == Kind::DegradationPolicy);
    policies.filter_map(|(_, entry)| entry.resource.clone()).collect()
}

/// Whether there is a policy of this name.
pub(super) fn is_there(known: &Known, policy: &str) -> bool {
    Name::parse(policy).is_ok_and(|name| {
        known.contains_key(&Key {
            kind: Kind::DegradationPolicy,
            name,
        })
    })
}

/// The zones that have a resource.
pub(super) fn zones(known: &Known) -> BTreeSet<String> {
    zone_names(known).map(Name::to_string).collect()
}

fn name_of(policy: &DegradationPolicy, level: usize) -> String {
    policy
        .levels
        .get(level)
        .map_or_else(String::new, |level| level.name.to_string())
}

/// Milliseconds since 1970, cut off.
pub(crate) fn ms(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The first whole millisecond at which a time has come.
fn ms_after(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
