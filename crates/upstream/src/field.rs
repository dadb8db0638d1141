//! Who may be chosen: a worker's view of a service's endpoints by zone, looked at anew when anything changed.

use crate::circuit::{Circuit, CircuitStanding};
use crate::registry::{EndpointState, millis};
use crate::reports::Reported;
use crate::service::ServiceState;
use leeward_policy::model::BalancePolicy;
use leeward_policy::{ServiceView, Tier};
use leeward_resilience::{Draw, Group, Load, Member, Panic, Spill, Standing, ZoneHealth, Zones, slow_start};
use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// What was chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Choice {
    /// The endpoint's position in its service.
    pub endpoint: usize,
    /// Whether health was disregarded.
    pub panic: Panic,
}

/// Looks up what is known of an endpoint.
type Lookup<'a, T> = &'a dyn Fn(usize) -> Option<&'a Arc<T>>;

/// What a choice looks at.
pub(crate) struct Seen<'a> {
    pub(crate) view: &'a ServiceView,
    pub(crate) state: &'a ServiceState,
    pub(crate) now: Instant,
    pub(crate) endpoints: Lookup<'a, EndpointState>,
    pub(crate) circuits: Lookup<'a, Circuit>,
}

/// A service's endpoints, or a subset of them.
#[derive(Debug, Default)]
pub(crate) struct Field {
    looked_at: Option<Instant>,
    changes: u32,
    zones: Vec<ZoneField>,
    panic: bool,
    /// Those that answer, badly, each with the place of its zone: for when there is nothing better.
    ejected: Vec<(usize, usize)>,
}

/// The endpoints of one zone.
#[derive(Debug, Default)]
struct ZoneField {
    members: Vec<Member>,
    group: Option<Group>,
    /// Those that may be probed.
    due: Vec<usize>,
    /// The zone's share of requests and those of the zones before it.
    upto: f64,
    /// It is out of use: for when there is nobody else.
    drained: bool,
    /// It serves by its weight, also where it comes after others.
    serves: bool,
    /// What must stay within the room that it reports.
    spills: Spill,
}

/// How long a look at the endpoints is good for if nothing changes: time alone ends ejections and moves shares.
const GOOD_FOR: Duration = Duration::from_millis(250);
/// How an endpoint stands for a choice.
enum Class {
    Member,
    Due,
    Ejected,
    Unhealthy,
    Out,
}

impl Field {
    /// Looks at the endpoints anew, if that may make a difference. O(endpoints).
    pub(crate) fn refresh(&mut self, seen: &Seen<'_>, subset: Option<usize>) {
        let changes = seen.state.changes.load(Ordering::Relaxed);
        let fresh = |at: Instant| seen.now.saturating_duration_since(at) < GOOD_FOR;
        if changes == self.changes && self.looked_at.is_some_and(fresh) {
            return;
        }
        self.changes = changes;
        self.looked_at = Some(seen.now);
        seen.state.is_called(seen.now);
        let tiers = seen.view.tiers_of(subset);
        self.zones.resize_with(tiers.len(), ZoneField::default);
        self.ejected.clear();
        let mut healths = Vec::with_capacity(tiers.len());
        let mut reachable = Vec::with_capacity(tiers.len());
        let mut worse = Vec::new();
        let wanted = f64::from(seen.state.wanted().max(1));
        for (at, ((zone, tier), kept)) in self.zones.iter_mut().zip(tiers).zip(kept(tiers)).enumerate() {
            zone.drained = kept <= 0.0;
            zone.serves = tier.weight.is_some_and(|weight| weight > 0);
            zone.due.clear();
            let mut members = Vec::with_capacity(tier.endpoints.len());
            let mut others = Vec::new();
            for &endpoint in &tier.endpoints {
                match class(seen, endpoint) {
                    Class::Member => members.push(endpoint),
                    Class::Due => zone.due.push(endpoint),
                    Class::Ejected => {
                        self.ejected.push((endpoint, at));
                        others.push(endpoint);
                    }
                    Class::Unhealthy => others.push(endpoint),
                    Class::Out => {}
                }
            }
            let heard = Heard::of(seen, &members);
            let room = heard.room.map_or(f64::INFINITY, |room| room / wanted);
            let health = |healthy| health(tier, healthy, kept, room);
            healths.push(health(members.len().saturating_sub(heard.unwell)));
            reachable.push(health(members.len() + others.len()));
            worse.push((members, others));
        }
        let (shares, panic) = self.share(seen, subset, tiers, &healths, &reachable);
        self.panic = panic;
        let mut upto = 0.0;
        for ((zone, (mut members, others)), (share, spills)) in self.zones.iter_mut().zip(worse).zip(shares) {
            if panic {
                members.extend(others);
            }
            upto += share;
            zone.upto = upto;
            zone.spills = spills;
            zone.regroup(seen, members);
        }
    }

    fn share(
        &self,
        seen: &Seen<'_>,
        subset: Option<usize>,
        tiers: &[Tier],
        healths: &[ZoneHealth],
        reachable: &[ZoneHealth],
    ) -> (Vec<(f64, Spill)>, bool) {
        let settings = &seen.view.spec.balance;
        let with = |healths: &[ZoneHealth]| -> Vec<(Arc<str>, ZoneHealth)> {
            let zones = tiers.iter().map(|tier| Arc::clone(&tier.zone));
            zones.zip(healths.iter().copied()).collect()
        };
        let id = seen.view.subset_id(subset);
        // Poison is harmless: the worst is a zone that comes back late.
        let mut known = seen.state.zones.lock().unwrap_or_else(PoisonError::into_inner);
        let zones = known.entry(id).or_default();
        let shares = zones.update(
            &with(healths),
            seen.now,
            &settings.zones,
            settings.panic_threshold,
        );
        drop(known);
        let panic = shares.panic == Panic::Yes;
        let shares = if panic {
            // All that can be reached counts as healthy then, in the order of the zones.
            Zones::new().update(&with(reachable), seen.now, &settings.zones, 0)
        } else {
            shares
        };
        if subset.is_none() {
            let told = tiers
                .iter()
                .zip(&shares.of)
                .map(|(tier, share)| (Arc::clone(&tier.zone), *share));
            seen.state.tell_shares(told.collect(), panic);
        }
        (shares.of.into_iter().zip(shares.spills).collect(), panic)
    }

    /// Chooses an endpoint that was not tried: in a zone drawn by its share, by the service's policy; then in
    /// other zones, last in those that are drained; then one that answers badly; then one whose probe is due.
    pub(crate) fn choose(
        &self,
        seen: &Seen<'_>,
        turn: u64,
        hash: Option<u64>,
        tried: &[usize],
        draw: &mut impl Draw,
    ) -> Option<Choice> {
        let panic = if self.panic { Panic::Yes } else { Panic::No };
        let choice = |endpoint| Choice { endpoint, panic };
        let (first, meant) = self.draw_zone(draw);
        if let Some(due) = self.due_probe(seen, first, tried, draw) {
            return Some(choice(due));
        }
        let loads = Loads::new(seen);
        let skip = |zone: &ZoneField, meant: bool, endpoint: usize| {
            tried.contains(&endpoint) || zone.spills.bounds(meant) && !has_room(seen, endpoint)
        };
        let rest = |drained: bool| {
            let zones = self.zones.iter().enumerate();
            let rest = zones.filter(move |(i, zone)| *i != first && zone.drained == drained);
            rest.map(|(_, zone)| (zone, false))
        };
        let drawn = self.zones.get(first).map(|zone| (zone, meant)).into_iter();
        for (zone, meant) in drawn.chain(rest(false)).chain(rest(true)) {
            let group = zone.group.as_ref();
            let picked =
                group.and_then(|group| group.pick(turn, hash, &loads, |e| skip(zone, meant, e), draw));
            if let Some(picked) = picked {
                return Some(choice(picked));
            }
        }
        let last_resort = |endpoint| Choice {
            endpoint,
            panic: Panic::Yes,
        };
        let may = |(endpoint, zone): &(usize, usize)| {
            let zone = self.zones.get(*zone);
            zone.is_some_and(|zone| !skip(zone, false, *endpoint))
        };
        let left: Vec<usize> = self.ejected.iter().filter(|of| may(of)).map(|of| of.0).collect();
        let at = usize::try_from(draw.below(left.len() as u64)).unwrap_or(0);
        if let Some(ejected) = left.get(at) {
            return Some(last_resort(*ejected));
        }
        let due = self.zones.iter().flat_map(|zone| &zone.due).copied();
        due.filter(|e| !tried.contains(e))
            .find(|e| takes_probe(seen, *e))
            .map(last_resort)
    }

    /// Whether an endpoint that wasn't tried is passed over only since its zone has no room for more.
    pub(crate) fn lacks_room(&self, has_room: impl Fn(usize) -> bool, tried: &[usize]) -> bool {
        let spilt = self.zones.iter().filter(|zone| zone.spills.bounds(false));
        spilt
            .flat_map(|zone| &zone.members)
            .any(|member| !tried.contains(&member.endpoint) && !has_room(member.endpoint))
    }

    /// A zone by its share, and whether the request is in that.
    fn draw_zone(&self, draw: &mut impl Draw) -> (usize, bool) {
        match self.zones.first() {
            // Nearly always.
            Some(own) if own.upto >= 1.0 || self.zones.len() == 1 => (0, true),
            Some(_) => {
                let drawn = draw.unit();
                let zone = self.zones.iter().position(|zone| drawn < zone.upto);
                if let Some(zone) = zone {
                    return (zone, true);
                }
                // Nobody has room for it, no zone is well, or it is for want of exact sums.
                let zone = self.zones.iter().position(|zone| !zone.drained);
                (zone.unwrap_or(0), false)
            }
            None => (0, true),
        }
    }

    /// A probe now and then of what would be a choice in this zone, a nearer one, or one that serves beside it, so that it
    /// comes back by itself even where healthy ones take all the load.
    fn due_probe(
        &self,
        seen: &Seen<'_>,
        zone: usize,
        tried: &[usize],
        draw: &mut impl Draw,
    ) -> Option<usize> {
        let zones = self.zones.iter().enumerate();
        let nearer = zones.filter(|(i, near)| *i <= zone || near.serves);
        for (_, zone) in nearer.filter(|(i, near)| !near.due.is_empty() && (*i == zone || !near.drained)) {
            let due = zone.due.len() as u64;
            let drawn = draw.below(due + zone.members.len() as u64);
            let Some(&endpoint) = usize::try_from(drawn).ok().and_then(|at| zone.due.get(at)) else {
                continue;
            };
            if !tried.contains(&endpoint) && takes_probe(seen, endpoint) {
                return Some(endpoint);
            }
        }
        None
    }
}

impl ZoneField {
    fn regroup(&mut self, seen: &Seen<'_>, endpoints: Vec<usize>) {
        let settings = &seen.view.spec.balance;
        let hashes = settings.policy.hash_key().is_some();
        let now = millis(seen.state.origin(), seen.now);
        let weight = |endpoint: usize| {
            let weight = seen
                .view
                .endpoints
                .get(endpoint)
                .map_or(1.0, |e| f64::from(e.weight));
            if hashes {
                return weight;
            }
            let age = (seen.endpoints)(endpoint).map_or(Duration::MAX, |state| state.age(now));
            weight * slow_start(age, settings.slow_start_window)
        };
        let members: Vec<Member> = endpoints
            .into_iter()
            .map(|endpoint| Member {
                endpoint,
                weight: weight(endpoint),
            })
            .collect();
        // A table for a hash takes milliseconds to make, so only a change makes another.
        if self.group.is_none() || members != self.members {
            let id = |endpoint: usize| {
                let seen = seen.view.endpoints.get(endpoint);
                seen.map_or("", |seen| &*seen.id)
            };
            self.group = Some(Group::new(members.clone(), &settings.policy, id));
            self.members = members;
        }
    }
}

fn class(seen: &Seen<'_>, endpoint: usize) -> Class {
    let Some(state) = (seen.endpoints)(endpoint) else {
        return Class::Out;
    };
    let circuit = (seen.circuits)(endpoint).map_or(CircuitStanding::Passing, |c| c.standing(seen.now));
    // Its own proxy knows better than calls that have not been made.
    let is_down = state.behind().is_some_and(|behind| behind.healthy() == Some(0));
    match (state.standing(seen.now), circuit) {
        (Standing::Unreachable, _) | (_, CircuitStanding::Shut) => Class::Out,
        // Checks find out when it is back, at nobody's cost.
        (Standing::ProbeDue, _) if seen.view.spec.health_check.is_some() => Class::Out,
        (Standing::ProbeDue | Standing::Healthy, _) if is_down => Class::Unhealthy,
        (Standing::ProbeDue, _) | (Standing::Healthy, CircuitStanding::Probing) => Class::Due,
        (Standing::Healthy, CircuitStanding::Passing | CircuitStanding::Ramping) => Class::Member,
        (Standing::Ejected, _) => Class::Ejected,
        (Standing::Unhealthy, _) => Class::Unhealthy,
    }
}

/// Whether this call may be an endpoint's probe. A circuit's probe is asked for when the attempt begins.
fn takes_probe(seen: &Seen<'_>, endpoint: usize) -> bool {
    (seen.endpoints)(endpoint).is_some_and(|state| match state.standing(seen.now) {
        Standing::ProbeDue => state.probe(seen.now),
        Standing::Healthy => true,
        Standing::Ejected | Standing::Unreachable | Standing::Unhealthy => false,
    })
}

#[expect(clippy::cast_precision_loss, reason = "a zone has at most 4096 endpoints")]
fn health(tier: &Tier, healthy: usize, kept: f64, room: f64) -> ZoneHealth {
    ZoneHealth {
        kept,
        room,
        weight: tier.weight,
        ..ZoneHealth::new(healthy as f64, tier.endpoints.len() as f64)
    }
}

fn has_room(seen: &Seen<'_>, endpoint: usize) -> bool {
    (seen.endpoints)(endpoint).is_none_or(|state| state.has_room())
}

/// What the proxies in front of a zone's endpoints report of them.
struct Heard {
    /// Endpoints that this proxy takes to be healthy and those don't; which, they don't say.
    unwell: usize,
    /// How many requests may be under way in all; `None` if one of them doesn't say.
    room: Option<f64>,
}

impl Heard {
    fn of(seen: &Seen<'_>, members: &[usize]) -> Self {
        let behind = |endpoint: &usize| (seen.endpoints)(*endpoint).and_then(|state| state.behind());
        // Nearly always so for a proxy's own zone.
        if !members
            .iter()
            .any(|e| behind(e).is_some_and(|b| b.bound().is_some()))
        {
            return Self {
                unwell: 0,
                room: None,
            };
        }
        let mut room = Some(0.0);
        let mut proxies: HashMap<*const Reported, (usize, &Arc<Reported>)> = HashMap::new();
        for endpoint in members {
            match behind(endpoint) {
                Some(behind) => proxies.entry(Arc::as_ptr(behind)).or_insert((0, behind)).0 += 1,
                None => room = None,
            }
        }
        let mut unwell = 0;
        for (taken, behind) in proxies.values() {
            let healthy = behind.healthy().and_then(|n| usize::try_from(n).ok());
            unwell += healthy.map_or(0, |healthy| taken.saturating_sub(healthy));
            let bound = behind.bound().map(f64::from);
            room = room.zip(bound).map(|(room, bound)| room + bound);
        }
        Self { unwell, room }
    }
}

/// What each zone keeps of its share now.
fn kept(tiers: &[Tier]) -> impl Iterator<Item = f64> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a drain is a function of the wall clock, the same at every proxy"
    )]
    let wall = tiers
        .iter()
        .any(|tier| tier.drain.is_some())
        .then(SystemTime::now);
    tiers.iter().map(move |tier| {
        let drain = tier.drain.as_ref().zip(wall);
        drain.map_or(1.0, |(drain, wall)| drain.kept(wall))
    })
}

/// The endpoints' load, as the machines of choice ask for it.
struct Loads<'a, 'b> {
    seen: &'a Seen<'b>,
    /// Made when it is first asked for: a zone of one endpoint asks for nothing.
    now: OnceCell<u64>,
}

impl<'a, 'b> Loads<'a, 'b> {
    const fn new(seen: &'a Seen<'b>) -> Self {
        Self {
            seen,
            now: OnceCell::new(),
        }
    }
}

impl Load for Loads<'_, '_> {
    fn active(&self, endpoint: usize) -> u32 {
        (self.seen.endpoints)(endpoint).map_or(0, |state| state.active())
    }

    fn latency(&self, endpoint: usize) -> f64 {
        let seen = self.seen;
        let BalancePolicy::PeakEwma(settings) = &seen.view.spec.balance.policy else {
            return 0.0;
        };
        let now = *self.now.get_or_init(|| millis(seen.state.origin(), seen.now));
        (seen.endpoints)(endpoint).map_or(0.0, |state| state.latency(now, settings))
    }
}

#[cfg(test)]
mod tests;
