//! Which endpoint of a zone gets a request.

use crate::draw::Draw;
use crate::hash::{Owner, Slots, maglev, ring};
use leeward_policy::model::BalancePolicy;
use std::time::Duration;

/// One endpoint that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Member {
    /// Its position in the service.
    pub endpoint: usize,
    /// Its share of requests relative to the others', above 0, slow start applied (but for the policies
    /// that hash).
    pub weight: f64,
}

/// What is known of endpoints' load. The caller keeps it in atomics; reads may be a little behind.
pub trait Load {
    /// Requests under way to an endpoint.
    fn active(&self, endpoint: usize) -> u32;
    /// Its latency in seconds, above 0; see [`PeakEwma::estimate`](crate::PeakEwma::estimate). Asked by
    /// `PEAK_EWMA` only.
    fn latency(&self, endpoint: usize) -> f64;
}

/// What part of its weight an endpoint of this age has while it warms up: age / window, at least 10 %, and
/// all of it once it is as old as the window. A window of zero is no slow start.
///
/// Source: Envoy's slow start with an aggression of 1 and its minimum.
pub fn slow_start(age: Duration, window: Duration) -> f64 {
    if age >= window {
        return 1.0;
    }
    (age.as_secs_f64() / window.as_secs_f64()).max(0.1)
}

/// The members of one zone that may be chosen, prepared for a policy. Made anew when they or their weights
/// change, at a cost that depends on the policy (a table of 65537 entries takes milliseconds);
/// many picks are made from each, by many threads.
#[derive(Clone, Debug)]
pub struct Group {
    members: Vec<Member>,
    chooser: Chooser,
}

#[derive(Clone, Debug)]
enum Chooser {
    /// Nothing to choose from, or nothing to choose.
    Obvious,
    /// The better of two.
    OfTwo {
        by: Measure,
        weights: Weights,
    },
    /// A sequence of members, over and over.
    InTurn(Vec<u32>),
    AtRandom(Weights),
    /// Whose key it is.
    ByKey {
        slots: Slots,
        /// Percent of the average; 0 is no bound.
        factor: u32,
        total_weight: f64,
        /// For requests without a key.
        weights: Weights,
    },
}

/// What makes one of two the better.
#[derive(Clone, Copy, Debug)]
enum Measure {
    Active,
    LatencyAndActive,
}

/// How members are drawn.
#[derive(Clone, Debug)]
enum Weights {
    /// Each as likely as the others.
    Alike,
    /// Vose's alias method: a column is drawn, then one of the two members that share it. With each, the
    /// member's weight over the mean.
    Unlike {
        columns: Vec<Column>,
        relative: Vec<f64>,
    },
}

#[derive(Clone, Copy, Debug)]
struct Column {
    /// The share of the column that is its own member's.
    own: f64,
    /// Whose the rest is.
    alias: usize,
}

/// Draws of a second member that may come out as the first before another is taken without regard to
/// weight.
const REDRAWS: u32 = 8;

/// Turns of a sequence for weights that have no short one, and turns for each member at least: shares are
/// exact to one part in it.
const FINE_TURNS: f64 = 1024.0;
const FINE_TURNS_EACH: f64 = 8.0;

impl Group {
    /// Prepares members for a policy. `id_of` names an endpoint so that the name stays the same in every
    /// proxy and as long as the endpoint is the same; only policies that hash ask, and no two endpoints
    /// may have the same. A weight that is no number above 0 counts as next to nothing.
    pub fn new<'a>(
        mut members: Vec<Member>,
        policy: &BalancePolicy,
        id_of: impl Fn(usize) -> &'a str,
    ) -> Self {
        for member in &mut members {
            if !(member.weight.is_finite() && member.weight >= 1e-6) {
                member.weight = 1e-6;
            }
        }
        if members.len() < 2 {
            return Self {
                members,
                chooser: Chooser::Obvious,
            };
        }
        let chooser = match *policy {
            BalancePolicy::PeakEwma(_) => Chooser::OfTwo {
                by: Measure::LatencyAndActive,
                weights: Weights::of(&members),
            },
            BalancePolicy::LeastRequest => Chooser::OfTwo {
                by: Measure::Active,
                weights: Weights::of(&members),
            },
            BalancePolicy::RoundRobin => Chooser::InTurn(sequence(&members)),
            BalancePolicy::Random => Chooser::AtRandom(Weights::of(&members)),
            BalancePolicy::RingHash {
                minimum_size,
                balance_factor,
                ..
            } => {
                members.sort_by(|a, b| id_of(a.endpoint).cmp(id_of(b.endpoint)));
                Chooser::by_key(
                    ring(&owners(&members, &id_of), minimum_size),
                    balance_factor,
                    &members,
                )
            }
            BalancePolicy::Maglev {
                table_size,
                balance_factor,
                ..
            } => {
                members.sort_by(|a, b| id_of(a.endpoint).cmp(id_of(b.endpoint)));
                Chooser::by_key(
                    maglev(&owners(&members, &id_of), table_size),
                    balance_factor,
                    &members,
                )
            }
        };
        Self { members, chooser }
    }

    /// How many members there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The members, in no particular order.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Chooses an endpoint; `None` if there is none but those that `skip`.
    ///
    /// `turn` is the caller's counter, for `ROUND_ROBIN`. `hash` is that of the request's key, for the
    /// policies that hash (see [`hash_of`](crate::hash_of)); a request without one goes anywhere.
    /// `skip(endpoint)` says of an endpoint that this request has tried it.
    ///
    /// Takes a few nanoseconds beyond the calls of `load`, except: a ring takes O(log points); members that
    /// are skipped, and a bounded load whose first choice is busy, may make it look at every member.
    pub fn pick(
        &self,
        turn: u64,
        hash: Option<u64>,
        load: &impl Load,
        skip: impl Fn(usize) -> bool,
        draw: &mut impl Draw,
    ) -> Option<usize> {
        let members = self.members.as_slice();
        let member = match &self.chooser {
            Chooser::Obvious => members.first().filter(|only| !skip(only.endpoint)),
            Chooser::OfTwo { by, weights } => of_two(members, *by, weights, load, &skip, draw),
            Chooser::InTurn(sequence) => {
                let at = turn.checked_rem(sequence.len() as u64).unwrap_or(0);
                from_slot(members, sequence, index(at), |m| !skip(m.endpoint))
            }
            Chooser::AtRandom(weights) => at_random(members, weights, &skip, draw),
            Chooser::ByKey {
                slots,
                factor,
                total_weight,
                weights,
            } => match hash {
                None => at_random(members, weights, &skip, draw),
                Some(hash) => {
                    let bound = (*factor > 0).then(|| f64::from(*factor) / 100.0 / total_weight);
                    by_key(members, slots, hash, bound, load, &skip)
                }
            },
        };
        member.map(|m| m.endpoint)
    }
}

impl Chooser {
    fn by_key(slots: Slots, factor: u32, members: &[Member]) -> Self {
        Self::ByKey {
            slots,
            factor,
            total_weight: total(members),
            weights: Weights::of(members),
        }
    }
}

/// Power of two choices: of two distinct members drawn by weight, the less loaded; the first where they are
/// equal, so that an idle group's requests are shared by weight.
///
/// Requests under way count relative to the member's weight. Without weights the measure is Linkerd's,
/// latency * (active + 1). Were all of it divided by the weight, then of two idle members the heavier would
/// get every request.
///
/// Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001.
fn of_two<'m>(
    members: &'m [Member],
    by: Measure,
    weights: &Weights,
    load: &impl Load,
    skip: &impl Fn(usize) -> bool,
    draw: &mut impl Draw,
) -> Option<&'m Member> {
    let measure = |position: usize, member: &Member| {
        let active = f64::from(load.active(member.endpoint)) / weights.relative(position);
        match by {
            Measure::Active => active,
            Measure::LatencyAndActive => load.latency(member.endpoint) * (active + 1.0),
        }
    };
    let better = |a: (usize, &'m Member), b: (usize, &'m Member)| {
        if measure(b.0, b.1) < measure(a.0, a.1) {
            b.1
        } else {
            a.1
        }
    };
    let n = members.len();
    let first = weights.draw(n, draw);
    let second = weights.draw_other(n, first, draw);
    let (a, b) = (members.get(first)?, members.get(second)?);
    match (skip(a.endpoint), skip(b.endpoint)) {
        (false, false) => Some(better((first, a), (second, b))),
        (true, _) | (_, true) => {
            let first = one_of(members, |_, m| !skip(m.endpoint), draw)?;
            let second = one_of(members, |i, m| i != first.0 && !skip(m.endpoint), draw);
            Some(second.map_or(first.1, |second| better(first, second)))
        }
    }
}

fn at_random<'m>(
    members: &'m [Member],
    weights: &Weights,
    skip: &impl Fn(usize) -> bool,
    draw: &mut impl Draw,
) -> Option<&'m Member> {
    let drawn = members.get(weights.draw(members.len(), draw))?;
    if skip(drawn.endpoint) {
        return one_of(members, |_, m| !skip(m.endpoint), draw).map(|(_, member)| member);
    }
    Some(drawn)
}

/// One of those that `may`, at random by weight. O(members).
fn one_of<'m>(
    members: &'m [Member],
    may: impl Fn(usize, &Member) -> bool,
    draw: &mut impl Draw,
) -> Option<(usize, &'m Member)> {
    let candidates = || members.iter().enumerate().filter(|(i, m)| may(*i, m));
    let total: f64 = candidates().map(|(_, m)| m.weight).sum();
    let mut rest = draw.unit() * total;
    let mut last = None;
    for candidate in candidates() {
        last = Some(candidate);
        rest -= candidate.1.weight;
        if rest < 0.0 {
            break;
        }
    }
    last
}

/// The key's own member, or the next along the slots that may have it. `bound` is what part of all requests
/// under way a member may have for each unit of its weight.
///
/// Source of the bound: Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2016.
fn by_key<'m>(
    members: &'m [Member],
    slots: &Slots,
    hash: u64,
    bound: Option<f64>,
    load: &impl Load,
    skip: &impl Fn(usize) -> bool,
) -> Option<&'m Member> {
    let slot = slots.of_key(hash);
    let own = owner(members, *slots.owners().get(slot)?)?;
    let own_active = if bound.is_some() {
        load.active(own.endpoint)
    } else {
        0
    };
    // One request each is always allowed.
    if own_active == 0 && !skip(own.endpoint) {
        return Some(own);
    }
    if let Some(bound) = bound {
        let active: f64 = members.iter().map(|m| f64::from(load.active(m.endpoint))).sum();
        let allowance = bound * (active + 1.0);
        let fits = |m: &Member| {
            // A product that is a whole number is not to be rounded up for being inexact.
            let most = (allowance * m.weight - 1e-9).ceil().max(1.0);
            !skip(m.endpoint) && f64::from(load.active(m.endpoint)) + 1.0 <= most
        };
        // There always is one unless it is skipped, or the load has changed since.
        if let Some(found) = from_slot(members, slots.owners(), slot, fits) {
            return Some(found);
        }
    }
    from_slot(members, slots.owners(), slot, |m| !skip(m.endpoint))
}

/// The first member that `may` be chosen, going along the slots from one. Those without a slot come last.
fn from_slot<'m>(
    members: &'m [Member],
    slots: &[u32],
    slot: usize,
    may: impl Fn(&Member) -> bool,
) -> Option<&'m Member> {
    if let Some(first) = slots
        .get(slot)
        .and_then(|s| owner(members, *s))
        .filter(|m| may(m))
    {
        return Some(first);
    }
    // Going along the slots ends soon if any may, and is spared if none may.
    let any = members.iter().find(|m| may(m))?;
    let (before, after) = slots.split_at_checked(slot)?;
    let mut along = after.iter().chain(before).filter_map(|s| owner(members, *s));
    Some(along.find(|m| may(m)).unwrap_or(any))
}

fn owner(members: &[Member], slot: u32) -> Option<&Member> {
    members.get(usize::try_from(slot).ok()?)
}

fn owners<'a>(members: &[Member], id_of: &impl Fn(usize) -> &'a str) -> Vec<Owner<'a>> {
    let owner = |m: &Member| Owner {
        id: id_of(m.endpoint),
        weight: m.weight,
    };
    members.iter().map(owner).collect()
}

fn total(members: &[Member]) -> f64 {
    members.iter().map(|m| m.weight).sum()
}

impl Weights {
    fn of(members: &[Member]) -> Self {
        let mean = total(members) / members.len() as f64;
        let relative: Vec<f64> = members.iter().map(|m| m.weight / mean).collect();
        if relative.iter().all(|r| (r - 1.0).abs() < 1e-9) {
            return Self::Alike;
        }
        // Every column is one mean high. Members below it leave room, which those above it fill.
        let mut columns: Vec<Column> = (0..relative.len())
            .map(|alias| Column { own: 1.0, alias })
            .collect();
        let mut height = relative.clone();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) =
            (0..height.len()).partition(|i| height.get(*i).is_some_and(|h| *h < 1.0));
        while let (Some(low), Some(&high)) = (small.pop(), large.last()) {
            let own = height.get(low).copied().unwrap_or(1.0);
            if let Some(column) = columns.get_mut(low) {
                *column = Column { own, alias: high };
            }
            let Some(rest) = height.get_mut(high) else { break };
            *rest -= 1.0 - own;
            if *rest < 1.0 {
                large.pop();
                small.push(high);
            }
        }
        Self::Unlike { columns, relative }
    }

    /// Weight over the mean.
    fn relative(&self, position: usize) -> f64 {
        match self {
            Self::Alike => 1.0,
            Self::Unlike { relative, .. } => relative.get(position).copied().unwrap_or(1.0),
        }
    }

    /// A position below `n`, the number of members, by weight.
    fn draw(&self, n: usize, draw: &mut impl Draw) -> usize {
        let position = index(draw.below(n as u64));
        match self {
            Self::Alike => position,
            Self::Unlike { columns, .. } => match columns.get(position) {
                Some(column) if draw.unit() >= column.own => column.alias,
                Some(_) | None => position,
            },
        }
    }

    /// Another position than `not`; `n` is at least 2.
    fn draw_other(&self, n: usize, not: usize, draw: &mut impl Draw) -> usize {
        if let Self::Unlike { .. } = self {
            for _ in 0..REDRAWS {
                let position = self.draw(n, draw);
                if position != not {
                    return position;
                }
            }
        }
        let other = index(draw.below((n as u64).saturating_sub(1)));
        if other < not { other } else { other + 1 }
    }
}

/// A number below that of some members or slots, which is a usize.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(0)
}

/// Positions of members in an order in which each has turns in proportion to its weight, spread evenly.
/// Exact where the weights have a common measure that makes a sequence of at most [`FINE_TURNS`],
/// otherwise to one part in that. O(turns * log turns).
fn sequence(members: &[Member]) -> Vec<u32> {
    let total = total(members);
    let smallest = members.iter().map(|m| m.weight).fold(f64::INFINITY, f64::min);
    let fine = FINE_TURNS.max(FINE_TURNS_EACH * members.len() as f64);
    let whole = |turns: f64| (turns - turns.round()).abs() < 1e-6;
    let unit = (1u32..)
        .map(|parts| smallest / f64::from(parts))
        .take_while(|unit| total / unit <= fine)
        .find(|unit| members.iter().all(|m| whole(m.weight / unit)))
        .unwrap_or(total / fine);
    let mut turns: Vec<(f64, u32)> = Vec::new();
    for (member, position) in members.iter().zip(0u32..) {
        let count = (member.weight / unit).round().max(1.0);
        // The middles of as many equal parts of the round.
        let middle = |i: u32| ((f64::from(i) + 0.5) / count, position);
        turns.extend((0u32..).map_while(|i| (f64::from(i) < count).then(|| middle(i))));
    }
    turns.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    turns.into_iter().map(|(_, position)| position).collect()
}

#[cfg(test)]
mod tests;
