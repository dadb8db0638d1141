//! How a service's requests are shared between zones.

use leeward_policy::model::ZoneFailover;
use std::time::{Duration, Instant};

/// How many of a zone's endpoints are healthy: numbers of them, or sums of their weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ZoneHealth {
    /// Those that are, at most `total`.
    pub healthy: f64,
    /// All. 0 is a zone that has none: it gets nothing.
    pub total: f64,
    /// What it keeps of its share while it is taken out of use, 0 to 1; 1 otherwise.
    pub kept: f64,
    /// What part of all requests may be there, by the spare capacity that the zone reports: 0 and more, above 1 if there
    /// is room for more than all. Infinite where nothing is known of it.
    pub room: f64,
    /// Its share relative to the others', where several zones serve at once; 0 only stands by. `None` in all of them
    /// where one serves, and the next what that can't.
    pub weight: Option<u32>,
}

impl ZoneHealth {
    /// A zone of which nothing else is known.
    pub const fn new(healthy: f64, total: f64) -> Self {
        Self {
            healthy,
            total,
            kept: 1.0,
            room: f64::INFINITY,
            weight: None,
        }
    }
}

/// Where the requests of a service go.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares {
    /// The share of each zone, in the order in which they were given. In sum 1; less, as far as nobody has room for the
    /// requests; all 0 when no zone has a healthy endpoint (and it is no panic).
    pub of: Vec<f64>,
    /// What of the requests that go to each zone has to stay within its spare capacity.
    pub spills: Vec<Spill>,
    /// How each zone stands, in the same order, for events and metrics.
    pub stages: Vec<Stage>,
    /// Whether health was disregarded, which holds for the choice within a zone, too.
    pub panic: Panic,
}

/// Which requests spill into a zone, and so have to stay within its spare capacity.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Spill {
    /// None: it is the one that is turned to first.
    #[default]
    Nothing,
    /// Those that were meant for another zone: its share is no more than its part by weight.
    Others,
    /// Any: its share is more than its part, or it has none.
    All,
}

impl Spill {
    /// Whether a request is bound by what the zone can spare; `meant`: it is in the zone's own share.
    pub const fn bounds(self, meant: bool) -> bool {
        match self {
            Self::Nothing => false,
            Self::Others => !meant,
            Self::All => true,
        }
    }
}

/// How bad things are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Panic {
    /// Requests go to healthy endpoints.
    No,
    /// So few are healthy that they would be overrun: requests go to all.
    Yes,
}

/// How a zone stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// It serves all that it can.
    Steady,
    /// It was unhealthy a moment ago: its share may fall but not rise.
    Dipped,
    /// It was unhealthy for too long, or again and again: its share may fall but not rise until it has been
    /// well for long.
    Left,
    /// It has been, and its share rises step by step.
    Returning,
}

/// How the zones of one service have been; kept across changes of policy. Zones are known by `Z`, a name.
///
/// The caller's own zone comes first. A zone serves what its healthy endpoints can carry, and what is left goes to
/// the next, at once. The way back is slow: traffic that goes to and fro is worse than traffic that goes
/// elsewhere, as connections, caches and autoscalers have to follow.
///
/// - A zone that is [`Stage::Steady`] dips when its healthy share is below `leave_below`.
/// - A dip ends once the zone has been well, at `return_above` or better, for `leave_after` in a row.
/// - It is left ([`Stage::Left`]) once the zone has been below `leave_below` for `leave_after` in a
///   row; or when twice `leave_after` have passed since it began, which a single dip that is short never
///   takes, but a zone that goes to and fro does; or at once if another dip ended less than `return_after`
///   ago.
/// - A zone that was left returns once it has been well for `return_after` in a row. Then its share may rise
///   by `return_step`, and again after each `return_interval`, until there is no bound any more. If it falls
///   below `leave_below` meanwhile, it is left again.
///
/// So traffic comes back to a zone at most once in any `return_after`, whatever its health does. The bounds
/// are lifted as far as no other zone can carry the requests.
///
/// A zone that is drained keeps a part of the share that all of this gives it, and the others take the rest as far
/// as their healthy endpoints can carry it, in the same order; what they can't carry stays. A zone that isn't drained
/// never gets less for it.
///
/// Where zones have weights, each has its part of the requests by its weight, by what it can carry of that. What is left
/// over goes to those of them that can carry all of theirs, by their weights; then to those without a weight, in
/// order.
///
/// What a zone gets beyond its own part (everything for the first, or by its weight) is bounded by the room that it
/// reports. What finds no room stays with zones that have none reported, the first above all; if those can't take
/// any, it is in nobody's share.
///
/// Source of the shares: Envoy's priority levels and their overprovisioning factor; the hysteresis is ours.
#[derive(Clone, Debug)]
pub struct Zones<Z> {
    known: Vec<Known<Z>>,
}

/// A zone that has, or had a while ago, endpoints of the service.
#[derive(Clone, Debug)]
struct Known<Z> {
    zone: Z,
    state: State,
    /// Since when it has none.
    empty_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Steady {
        /// When the last dip ended, unless it was left since.
        dipped: Option<Instant>,
    },
    Dipped {
        since: Instant,
        run: Run,
        cap: f64,
    },
    Left {
        well_since: Option<Instant>,
        cap: f64,
    },
    Returning {
        since: Instant,
        from: f64,
        /// What it has risen to, as far as the zone was found well enough.
        cap: f64,
    },
}

/// What a dip has been like lately, and since when.
#[derive(Clone, Copy, Debug)]
enum Run {
    Below(Instant),
    Between,
    Well(Instant),
}

/// What part of all requests a zone can carry.
#[derive(Clone, Copy, Debug)]
struct Capacity {
    /// By its health alone.
    full: f64,
    /// As far as its past allows.
    allowed: f64,
    /// What it gets if every zone is well.
    part: f64,
    /// What it may get in all, by the room that it reports.
    limit: f64,
    /// Its share relative to the others'; 0 for all where the order decides.
    weight: f64,
}

impl Capacity {
    /// What a zone may take of what others leave, on top of its own part: one that can't carry all of that takes none.
    fn extra(self, can: f64) -> f64 {
        let whole = self.weight <= 0.0 || can > 1.0 - NOTHING;
        if whole { can.min(self.limit) } else { 0.0 }
    }
}

/// Less than this is nothing, as shares are sums of inexact numbers.
const NOTHING: f64 = 1e-9;

impl<Z: Clone + Eq> Zones<Z> {
    /// No zone is known; each starts [`Stage::Steady`].
    pub fn new() -> Self {
        Self { known: Vec::new() }
    }

    /// Takes in how the zones are, in the order in which the caller turns to them, and shares the requests
    /// out. What was said last is taken to have held until `now`; to be called at least every second or
    /// so, as bounds change with time alone.
    ///
    /// `panic_threshold` is the percentage of healthy endpoints, over all zones, below which health is
    /// disregarded: the first zone that has endpoints then gets everything. 0 never does; nor is it when
    /// the zones that are left can carry everything by `overprovisioning_factor`: the healthy ones would
    /// not be overrun, and requests would only go to a zone that is known to be down (as in Envoy).
    ///
    /// O(zones²), for few zones.
    pub fn update(
        &mut self,
        zones: &[(Z, ZoneHealth)],
        now: Instant,
        failover: &ZoneFailover,
        panic_threshold: u32,
    ) -> Shares {
        self.follow(zones, now, failover);
        let parts = parts(zones);
        let capacities: Vec<Capacity> = zones
            .iter()
            .zip(&parts)
            .map(|((zone, health), part)| {
                let full = health.capacity(failover);
                let allowed = self.state(zone).map_or(full, |state| state.allows(full));
                // A number that makes no sense is no room.
                let room = if health.room >= 0.0 { health.room } else { 0.0 };
                Capacity {
                    full,
                    allowed,
                    part: *part,
                    limit: room.max(*part),
                    weight: health.weight.map_or(0.0, f64::from),
                }
            })
            .collect();
        let stages = zones
            .iter()
            .map(|(zone, _)| self.state(zone).map_or(Stage::Steady, State::stage))
            .collect();
        let healthy: f64 = zones.iter().map(|(_, health)| health.healthy).sum();
        let total: f64 = zones.iter().map(|(_, health)| health.total).sum();
        let few = healthy * 100.0 < f64::from(panic_threshold) * total;
        let enough = capacities.iter().map(|c| c.full).sum::<f64>() > 1.0 - NOTHING;
        let (of, panic) = if few && !enough {
            let first = first_of_panic(zones);
            let all = (0..zones.len()).map(|i| if Some(i) == first { 1.0 } else { 0.0 });
            (all.collect(), Panic::Yes)
        } else {
            (drain(share(&capacities), &capacities, zones), Panic::No)
        };
        let spills = |(share, part): (&f64, &f64)| {
            if *part > 1.0 - NOTHING {
                Spill::Nothing
            } else if *part <= 0.0 || *share > part + NOTHING {
                Spill::All
            } else {
                Spill::Others
            }
        };
        Shares {
            spills: of.iter().zip(&parts).map(spills).collect(),
            of,
            stages,
            panic,
        }
    }

    /// Brings every zone's state up to `now`.
    fn follow(&mut self, zones: &[(Z, ZoneHealth)], now: Instant, failover: &ZoneFailover) {
        for (zone, health) in zones {
            // A zone that never had endpoints has lost none.
            if health.total > 0.0 && self.state(zone).is_none() {
                self.known.push(Known {
                    zone: zone.clone(),
                    state: State::Steady { dipped: None },
                    empty_since: None,
                });
            }
        }
        let none = ZoneHealth::new(0.0, 0.0);
        for known in &mut self.known {
            let listed = zones.iter().find(|(zone, _)| *zone == known.zone);
            let health = listed.map_or(none, |(_, health)| *health);
            known.empty_since = if health.total > 0.0 {
                None
            } else {
                known.empty_since.or(Some(now))
            };
            known.state = known
                .state
                .give_up(now, failover)
                .meet(health, now, failover)
                .give_up(now, failover)
                .recover(now, failover);
        }
        // One that stays away is not remembered for longer than it would be held against it.
        let memory = failover.return_after.max(failover.leave_after * 2);
        self.known
            .retain(|known| known.empty_since.is_none_or(|since| !past(since, memory, now)));
    }

    fn state(&self, zone: &Z) -> Option<State> {
        self.known
            .iter()
            .find(|known| known.zone == *zone)
            .map(|known| known.state)
    }
}

impl<Z: Clone + Eq> Default for Zones<Z> {
    fn default() -> Self {
        Self::new()
    }
}

impl ZoneHealth {
    /// What part of all requests it can carry by its health.
    fn capacity(self, failover: &ZoneFailover) -> f64 {
        if self.total <= 0.0 {
            return 0.0;
        }
        (self.healthy / self.total * f64::from(failover.overprovisioning_factor) / 100.0).min(1.0)
    }

    fn is_below(self, percent: u32) -> bool {
        self.total <= 0.0 || self.healthy * 100.0 < f64::from(percent) * self.total
    }
}

impl State {
    fn stage(self) -> Stage {
        match self {
            Self::Steady { .. } => Stage::Steady,
            Self::Dipped { .. } => Stage::Dipped,
            Self::Left { .. } => Stage::Left,
            Self::Returning { .. } => Stage::Returning,
        }
    }

    /// What of a capacity may be used.
    fn allows(self, full: f64) -> f64 {
        match self {
            Self::Steady { .. } => full,
            Self::Dipped { cap, .. } | Self::Left { cap, .. } | Self::Returning { cap, .. } => full.min(cap),
        }
    }

    /// A dip that has been too long is leaving, whatever the zone is found to be now.
    fn give_up(self, now: Instant, failover: &ZoneFailover) -> Self {
        let Self::Dipped { since, run, cap } = self else {
            return self;
        };
        let long = failover.leave_after;
        let too_long = past(since, long.saturating_mul(2), now);
        let (leaves, well_since) = match run {
            Run::Below(at) => (too_long || past(at, long, now), None),
            Run::Between => (too_long, None),
            // One that was well in time recovers if it still is.
            Run::Well(at) => (too_long && past(since, long, at), Some(at)),
        };
        if leaves {
            Self::Left { well_since, cap }
        } else {
            self
        }
    }

    /// A zone that is well now, and has been for long enough, recovers.
    fn recover(self, now: Instant, failover: &ZoneFailover) -> Self {
        match self {
            Self::Dipped {
                run: Run::Well(at), ..
            } if past(at, failover.leave_after, now) => Self::Steady { dipped: Some(now) },
            Self::Left {
                well_since: Some(at),
                cap,
            } if past(at, failover.return_after, now) => Self::Returning {
                since: now,
                from: cap,
                cap: risen(cap, now, now, failover),
            },
            Self::Returning { cap, .. } if cap > 1.0 - NOTHING => Self::Steady { dipped: None },
            Self::Steady { .. } | Self::Dipped { .. } | Self::Left { .. } | Self::Returning { .. } => self,
        }
    }

    /// What it becomes when the zone is found so.
    fn meet(self, health: ZoneHealth, now: Instant, failover: &ZoneFailover) -> Self {
        let below = health.is_below(failover.leave_below);
        let well = !health.is_below(failover.return_above);
        let full = health.capacity(failover);
        match self {
            Self::Steady { dipped } if below => {
                if dipped.is_some_and(|at| !past(at, failover.return_after, now)) {
                    return Self::Left {
                        well_since: None,
                        cap: full,
                    };
                }
                Self::Dipped {
                    since: now,
                    run: Run::Below(now),
                    cap: full,
                }
            }
            Self::Dipped { since, run, cap } => {
                let run = match run {
                    Run::Below(_) if below => run,
                    Run::Well(_) if well => run,
                    Run::Below(_) | Run::Between | Run::Well(_) => {
                        if below {
                            Run::Below(now)
                        } else if well {
                            Run::Well(now)
                        } else {
                            Run::Between
                        }
                    }
                };
                Self::Dipped {
                    since,
                    run,
                    cap: cap.min(full),
                }
            }
            Self::Left { well_since, cap } => Self::Left {
                well_since: well.then(|| well_since.unwrap_or(now)),
                cap: cap.min(full),
            },
            Self::Returning { cap, .. } if below => Self::Left {
                well_since: None,
                cap: cap.min(full),
            },
            Self::Returning { since, from, .. } => Self::Returning {
                since,
                from,
                cap: risen(from, since, now, failover),
            },
            Self::Steady { .. } => self,
        }
    }
}

/// What each zone gets if all are well: everything is the first one's, or each has its part by weight. Zones without
/// endpoints are not there.
fn parts<Z>(zones: &[(Z, ZoneHealth)]) -> Vec<f64> {
    let weight = |health: &ZoneHealth| {
        let there = health.total > 0.0;
        health.weight.filter(|_| there).map_or(0.0, f64::from)
    };
    let total: f64 = zones.iter().map(|(_, health)| weight(health)).sum();
    if total > 0.0 {
        return zones.iter().map(|(_, health)| weight(health) / total).collect();
    }
    let first = zones.iter().position(|(_, health)| health.total > 0.0);
    (0..zones.len())
        .map(|i| if Some(i) == first { 1.0 } else { 0.0 })
        .collect()
}

/// Shares of zones with these capacities, in order.
fn share(capacities: &[Capacity]) -> Vec<f64> {
    let mut shares: Vec<f64> = capacities.iter().map(|c| c.part * c.allowed).collect();
    let mut left = (1.0 - shares.iter().sum::<f64>()).max(0.0);
    left = pour(&mut shares, left, capacities, |c| c.extra(c.allowed));
    // What no zone may take is for those that could if they had not been left.
    left = pour(&mut shares, left, capacities, |c| {
        c.extra(c.full).max(c.part * c.full)
    });
    if left <= NOTHING {
        return shares;
    }
    // And what is more than all can carry is shared like the rest, as far as there is room.
    let carried = shares.clone();
    spread(&mut shares, left, |zone| {
        let of = |zone: usize| carried.get(zone).copied().unwrap_or(0.0);
        (of(zone), capacities.get(zone).map_or(0.0, |c| c.limit))
    });
    shares
}

/// Gives out what is left to zones: by weight among those that have one, then in order, each up to its limit. What
/// still is left.
fn pour(shares: &mut [f64], left: f64, capacities: &[Capacity], limit: impl Fn(&Capacity) -> f64) -> f64 {
    let mut left = left;
    if capacities.iter().any(|c| c.weight > 0.0) {
        left = spread(shares, left, |zone| {
            let of = capacities.get(zone);
            of.map_or((0.0, 0.0), |c| (c.weight, limit(c)))
        });
    }
    for (share, capacity) in shares.iter_mut().zip(capacities) {
        if left <= NOTHING {
            break;
        }
        let part = (limit(capacity) - *share).clamp(0.0, left);
        left -= part;
        *share += part;
    }
    left
}

/// Gives out what is left in proportion to weights, to each zone up to its limit; `of` is both. What still is left.
fn spread(shares: &mut [f64], left: f64, of: impl Fn(usize) -> (f64, f64)) -> f64 {
    let mut left = left;
    // Each round fills up a zone at least, or ends.
    for _ in 0..shares.len() {
        let open = |(zone, share): &(usize, f64)| {
            let (weight, limit) = of(*zone);
            weight > 0.0 && limit > share + NOTHING
        };
        let able: Vec<(usize, f64)> = shares.iter().copied().enumerate().filter(open).collect();
        let total: f64 = able.iter().map(|(zone, _)| of(*zone).0).sum();
        if left <= NOTHING || able.is_empty() {
            break;
        }
        let to_give = left;
        for (zone, had) in able {
            let (weight, limit) = of(zone);
            let part = (to_give * weight / total).min(limit - had);
            left -= part;
            if let Some(share) = shares.get_mut(zone) {
                *share += part;
            }
        }
    }
    left.max(0.0)
}

/// Moves what zones give up that are drained.
fn drain<Z>(mut shares: Vec<f64>, capacities: &[Capacity], zones: &[(Z, ZoneHealth)]) -> Vec<f64> {
    if zones.iter().all(|(_, health)| health.kept >= 1.0) {
        return shares;
    }
    let before = shares.clone();
    let mut left = 0.0f64;
    for (share, (_, health)) in shares.iter_mut().zip(zones) {
        let given = *share * (1.0 - health.kept).clamp(0.0, 1.0);
        *share -= given;
        left += given;
    }
    let kept = |zone: usize| zones.get(zone).map_or(1.0, |(_, health)| health.kept);
    // First those that aren't drained, as far as their past allows, then by their health alone; then those that
    // keep most. So all that nobody else can carry ends where it came from.
    let whole: Vec<Capacity> = capacities
        .iter()
        .enumerate()
        .map(|(zone, capacity)| {
            if kept(zone) >= 1.0 {
                return *capacity;
            }
            Capacity {
                full: 0.0,
                allowed: 0.0,
                ..*capacity
            }
        })
        .collect();
    left = pour(&mut shares, left, &whole, |c| c.extra(c.allowed));
    left = pour(&mut shares, left, &whole, |c| c.extra(c.full));
    let mut drained: Vec<usize> = (0..zones.len()).filter(|zone| kept(*zone) < 1.0).collect();
    drained.sort_by(|a, b| kept(*b).total_cmp(&kept(*a)));
    for zone in drained {
        let had = before.get(zone).copied().unwrap_or(0.0);
        let could = capacities.get(zone).map_or(0.0, |c| c.extra(c.full));
        if let Some(share) = shares.get_mut(zone) {
            let part = (could.max(had) - *share).clamp(0.0, left);
            left -= part;
            *share += part;
        }
    }
    shares
}

/// The first zone that has endpoints, of those that keep most of their share.
fn first_of_panic<Z>(zones: &[(Z, ZoneHealth)]) -> Option<usize> {
    let kept = |(_, (_, health)): &(usize, &(Z, ZoneHealth))| health.kept;
    let able = || {
        zones
            .iter()
            .enumerate()
            .filter(|(_, (_, health))| health.total > 0.0)
    };
    let most = able().map(|zone| kept(&zone)).fold(0.0f64, f64::max);
    able().find(|zone| kept(zone) >= most).map(|(i, _)| i)
}

/// The bound on a zone that returns: its share rises at once by a step, and by one after each interval.
fn risen(from: f64, since: Instant, now: Instant, failover: &ZoneFailover) -> f64 {
    let elapsed = now.saturating_duration_since(since).as_nanos();
    match elapsed.checked_div(failover.return_interval.as_nanos()) {
        Some(intervals) => from + f64::from(failover.return_step) / 100.0 * (intervals as f64 + 1.0),
        None => 1.0,
    }
}

/// Whether so much time has passed since.
fn past(since: Instant, length: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) >= length
}

#[cfg(test)]
mod tests;
