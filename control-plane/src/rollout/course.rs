//! What each proxy is to have: everything at head, or, outside of a rollout's reach, everything but the change that goes out.

use super::reach::{Reach, rank};
use crate::store::{Record, ResourceChange, Stored};
use leeward_policy::{Key, Kind};
use leeward_proto::v1;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the push follows. Another one takes its place whenever anything of it changes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Course {
    /// The revision up to which this is known.
    pub(crate) head: u64,
    /// What a rollout holds back from those that it hasn't reached.
    pub(crate) held: Option<Held>,
    /// The rollout for which proxies are to tell of their requests; 0 for none.
    pub(crate) observe: u64,
}

/// What is held back, and from whom it isn't.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// The revision that goes out.
    pub(crate) revision: u64,
    pub(crate) reach: Reach,
    pub(crate) values: Arc<Values>,
    /// How many later changes these are after.
    pub(crate) later: usize,
}

/// What there is in place of what is held back; `None`: nothing.
pub(crate) type Values = BTreeMap<Key, Option<Stored>>;

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        // The values follow from the two.
        (self.revision, self.later, &self.reach) == (other.revision, other.later, &other.reach)
    }
}

impl Eq for Held {}

impl Course {
    /// What is held back from a proxy.
    pub(crate) fn held_from(&self, zone: &str, proxy: &str) -> Option<&Held> {
        let held = self.held.as_ref()?;
        (!held.reach.has(zone, rank(held.revision, zone, proxy))).then_some(held)
    }
}

/// What proxies have in place of a change that goes out.
pub(crate) fn values(change: &Record, later: &[Record]) -> Values {
    let mut values = before(change, later);
    values.retain(|key, _| key.kind.is_for_proxies());
    values
}

/// What there was before a change that goes out, as later changes left it: those are an emergency's, and pass.
pub(crate) fn before(change: &Record, later: &[Record]) -> Values {
    // Who may do what isn't taken back with a change that happens to go beside it.
    let changes = change
        .changes
        .iter()
        .filter(|change| change.key.kind != Kind::AccessPolicy);
    let mut values: Values = changes
        .map(|change| (change.key.clone(), change.before.clone()))
        .collect();
    for change in later.iter().flat_map(|record| &record.changes) {
        let Some(value) = values.get_mut(&change.key) else {
            continue;
        };
        let merged = value.as_ref().filter(|_| is_drain(change));
        match merged.and_then(|value| with_drain_of(value, change.after.as_ref())) {
            Some(merged) => *value = Some(merged),
            // It is as it was meant to be everywhere.
            None if change.key.kind.is_for_emergencies() || !change.key.kind.is_for_proxies() => {
                values.remove(&change.key);
            }
            // What the control plane itself has put down of it goes where it goes.
            None => {}
        }
    }
    values
}

/// Whether a change is of a zone's drain alone.
fn is_drain(change: &ResourceChange) -> bool {
    let before = change.before.as_ref().and_then(zone);
    let after = change.after.as_ref().and_then(zone);
    change.key.kind == Kind::Zone && passes(&change.key, before.as_ref(), after.as_ref())
}

/// A zone with the drain that another state of it has; `None` if it is none, or there is no other.
pub(crate) fn with_drain_of(value: &Stored, other: Option<&Stored>) -> Option<Stored> {
    let after = other?;
    let (mut zone, new) = (zone(value)?, zone(after)?);
    let (Some(v1::resource::Spec::Zone(spec)), Some(v1::resource::Spec::Zone(new))) =
        (&mut zone.spec, new.spec)
    else {
        return None;
    };
    spec.drain = new.drain;
    Some(Stored {
        payload: zone.encode_to_vec().into(),
        revision: after.revision,
        updated_ms: after.updated_ms,
        ..value.clone()
    })
}

fn zone(stored: &Stored) -> Option<v1::Resource> {
    if stored.key.kind != Kind::Zone {
        return None;
    }
    v1::Resource::decode(&stored.payload[..]).ok()
}

/// Whether a change of a resource is an emergency's, which goes to everybody at once.
pub(crate) fn passes(key: &Key, before: Option<&v1::Resource>, after: Option<&v1::Resource>) -> bool {
    if !key.kind.is_for_proxies() || key.kind.is_for_emergencies() {
        return true;
    }
    let spec = |resource: Option<&v1::Resource>| {
        let Some(v1::resource::Spec::Zone(zone)) = resource?.spec.clone() else {
            return None;
        };
        Some(zone)
    };
    let (Some(mut before), Some(after)) = (spec(before), spec(after)) else {
        return false;
    };
    before.drain = after.drain.clone();
    before == after
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Author;
    use leeward_policy::Name;

    fn key(kind: Kind, name: &str) -> Key {
        let name = Name::parse(name).unwrap();
        Key { kind, name }
    }

    fn drain(reason: &str) -> v1::ZoneDrain {
        v1::ZoneDrain {
            reason: reason.into(),
            ..v1::ZoneDrain::default()
        }
    }

    fn zone(failover: &[&str], drain: Option<v1::ZoneDrain>) -> v1::Resource {
        v1::Resource {
            spec: Some(v1::resource::Spec::Zone(v1::Zone {
                failover: failover.iter().map(ToString::to_string).collect(),
                drain,
                ..v1::Zone::default()
            })),
            ..v1::Resource::default()
        }
    }

    fn stored(key: &Key, revision: u64, resource: &v1::Resource) -> Stored {
        Stored {
            key: key.clone(),
            revision,
            payload: resource.encode_to_vec().into(),
            created_ms: 0,
            updated_ms: 0,
        }
    }

    fn record(revision: u64, changes: Vec<ResourceChange>) -> Record {
        Record {
            revision,
            time_ms: 0,
            author: Author::default(),
            changes,
        }
    }

    fn change(key: &Key, before: Option<Stored>, after: Option<Stored>) -> ResourceChange {
        let key = key.clone();
        ResourceChange { key, before, after }
    }

    #[test]
    fn a_drain_passes_what_is_held_back() {
        let (a, r, policy) = (
            key(Kind::Zone, "a"),
            key(Kind::Route, "r"),
            key(Kind::RolloutPolicy, "p"),
        );
        let old = stored(&a, 1, &zone(&["b"], None));
        let new = stored(&a, 5, &zone(&["c"], None));
        let changed = record(
            5,
            vec![
                change(&a, Some(old.clone()), Some(new.clone())),
                change(&r, None, Some(stored(&r, 5, &v1::Resource::default()))),
                change(&policy, None, Some(stored(&policy, 5, &v1::Resource::default()))),
            ],
        );
        let held = values(&changed, &[]);
        assert_eq!(held, Values::from([(a.clone(), Some(old)), (r.clone(), None)]));
        let drained = stored(&a, 6, &zone(&["c"], Some(drain("fire"))));
        let later = [record(6, vec![change(&a, Some(new), Some(drained))])];
        let held = values(&changed, &later);
        assert_eq!(held[&a], Some(stored(&a, 6, &zone(&["b"], Some(drain("fire"))))));
        assert_eq!(held[&r], None);
    }

    #[test]
    fn what_an_emergency_changes_is_held_no_more() {
        let over = key(Kind::CircuitOverride, "o");
        let resource = v1::Resource::default();
        let changed = record(5, vec![change(&over, None, Some(stored(&over, 5, &resource)))]);
        let later = [record(
            6,
            vec![change(&over, Some(stored(&over, 5, &resource)), None)],
        )];
        assert_eq!(values(&changed, &later), Values::new());
    }

    #[test]
    fn overrides_and_drains_pass_and_nothing_else_of_a_zone() {
        let a = key(Kind::Zone, "a");
        let (plain, drained) = (zone(&["b"], None), zone(&["b"], Some(drain("x"))));
        assert!(passes(&a, Some(&plain), Some(&drained)));
        assert!(passes(&a, Some(&drained), Some(&plain)));
        assert!(!passes(&a, Some(&plain), Some(&zone(&["c"], Some(drain("x"))))));
        assert!(!passes(&a, None, Some(&drained)));
        assert!(!passes(&a, Some(&plain), None));
        for (kind, want) in [
            (Kind::DegradationOverride, true),
            (Kind::CircuitOverride, true),
            (Kind::RolloutPolicy, true),
            (Kind::Route, false),
            (Kind::FeatureFlags, false),
        ] {
            assert_eq!(
                passes(&key(kind, "x"), None, Some(&v1::Resource::default())),
                want,
                "{kind}"
            );
        }
    }
}
