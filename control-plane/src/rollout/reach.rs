//! Which proxies a change has reached: a stable draw, so that they only grow in number.

use leeward_policy::Name;
use leeward_policy::model::{RolloutPolicy, RolloutStage, StageAmount, StageZones};
use leeward_resilience::hash_of;
use std::collections::BTreeMap;

/// Lowest ranks that are known of a zone: as many as a stage may count.
pub(crate) const LOWEST: usize = RolloutPolicy::MAX_COUNTED as usize;

/// The place of a proxy in the order in which a rollout takes proxies in. Every control plane draws the same, and another
/// rollout draws others.
pub(crate) fn rank(rollout: u64, zone: &str, proxy: &str) -> u64 {
    hash_of(format!("{rollout}/{zone}/{proxy}").as_bytes())
}

/// The place of a zone, likewise.
fn zone_rank(rollout: u64, zone: &str) -> u64 {
    hash_of(format!("{rollout}/{zone}").as_bytes())
}

/// The proxies with a rank up to a bound, of all zones or of one. Bounds only rise.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Reach {
    /// Of all zones; `None` for nobody.
    pub(crate) all: Option<u64>,
    /// Of single zones, besides.
    pub(crate) zones: BTreeMap<String, u64>,
}

/// How many proxies there are, and the first in the order.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Census {
    pub(crate) zones: BTreeMap<String, ZoneCensus>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct ZoneCensus {
    /// Proxies that are connected.
    pub(crate) live: u64,
    /// Their lowest ranks, in order; at most [`LOWEST`].
    pub(crate) lowest: Vec<u64>,
}

impl ZoneCensus {
    /// Counts one more.
    pub(crate) fn add(&mut self, rank: u64) {
        self.live += 1;
        let at = self.lowest.partition_point(|known| *known < rank);
        if at < LOWEST {
            self.lowest.insert(at, rank);
            self.lowest.truncate(LOWEST);
        }
    }
}

impl Census {
    /// Takes in what another control plane counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (zone, theirs) in &other.zones {
            let ours = self.zones.entry(zone.clone()).or_default();
            ours.live += theirs.live;
            ours.lowest.extend(&theirs.lowest);
            ours.lowest.sort_unstable();
            ours.lowest.truncate(LOWEST);
        }
    }

    /// All that are connected.
    pub(crate) fn live(&self) -> u64 {
        self.zones.values().map(|zone| zone.live).sum()
    }
}

impl Reach {
    /// Everybody.
    pub(crate) fn everybody() -> Self {
        Self {
            all: Some(u64::MAX),
            zones: BTreeMap::new(),
        }
    }

    /// Whether a proxy of that rank in that zone has been reached.
    pub(crate) fn has(&self, zone: &str, rank: u64) -> bool {
        let within = |bound: u64| rank <= bound;
        self.all.is_some_and(within) || self.zones.get(zone).copied().is_some_and(within)
    }

    /// Takes in the proxies of a stage as well.
    pub(crate) fn grow(&mut self, rollout: u64, stage: &RolloutStage, census: &Census) {
        if stage.zones == StageZones::All && stage.amount == StageAmount::Percent(100) {
            *self = Self::everybody();
            return;
        }
        let zones = zones_of(rollout, &stage.zones, census);
        let Some(bound) = bound(stage.amount, &zones, census) else {
            return;
        };
        if stage.zones == StageZones::All {
            self.all = self.all.max(Some(bound));
            return;
        }
        for zone in zones {
            let known = self.zones.entry(zone.to_owned()).or_default();
            *known = (*known).max(bound);
        }
    }
}

/// The zones of a stage. Named ones are in it also while none of their proxies is connected.
fn zones_of<'a>(rollout: u64, zones: &'a StageZones, census: &'a Census) -> Vec<&'a str> {
    let known = census.zones.keys().map(String::as_str);
    match zones {
        StageZones::All => known.collect(),
        StageZones::Named(names) => names.iter().map(Name::as_str).collect(),
        StageZones::Count(count) => {
            let with_proxies = known.filter(|zone| census.zones.get(*zone).is_some_and(|z| z.live > 0));
            let mut drawn: Vec<&str> = with_proxies.collect();
            drawn.sort_by_key(|zone| (zone_rank(rollout, zone), *zone));
            drawn.truncate(usize::try_from(*count).unwrap_or(usize::MAX));
            drawn
        }
    }
}

/// The rank up to which proxies are in a stage; `None` while there is nobody.
fn bound(amount: StageAmount, zones: &[&str], census: &Census) -> Option<u64> {
    let counted = zones.iter().filter_map(|zone| census.zones.get(*zone));
    let live: u64 = counted.clone().map(|zone| zone.live).sum();
    let (wanted, share) = match amount {
        StageAmount::Percent(100) => return Some(u64::MAX),
        StageAmount::Percent(percent) => (
            (live * u64::from(percent)).div_ceil(100),
            u64::MAX / 100 * u64::from(percent),
        ),
        StageAmount::Proxies(proxies) => (u64::from(proxies), 0),
    };
    let mut lowest: Vec<u64> = counted.flat_map(|zone| &zone.lowest).copied().collect();
    lowest.sort_unstable();
    let last = usize::try_from(wanted.max(1) - 1).unwrap_or(usize::MAX);
    match (lowest.get(last), amount) {
        (Some(bound), _) if last < LOWEST => Some(*bound),
        // There are fewer: all of them.
        (_, StageAmount::Proxies(_)) => lowest.last().copied(),
        // Of many, the draw is as good as counting.
        (_, StageAmount::Percent(_)) => (live > 0).then_some(share),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn census(rollout: u64, zones: &[(&str, usize)]) -> (Census, Vec<(String, u64)>) {
        let (mut census, mut all) = (Census::default(), Vec::new());
        for (zone, count) in zones {
            for i in 0..*count {
                let rank = rank(rollout, zone, &format!("p{i}"));
                census.zones.entry((*zone).to_owned()).or_default().add(rank);
                all.push(((*zone).to_owned(), rank));
            }
        }
        (census, all)
    }

    fn stage(zones: StageZones, amount: StageAmount) -> RolloutStage {
        RolloutStage {
            zones,
            amount,
            hold: RolloutPolicy::HOLD,
        }
    }

    fn reached(reach: &Reach, all: &[(String, u64)]) -> usize {
        all.iter().filter(|(zone, rank)| reach.has(zone, *rank)).count()
    }

    #[test]
    fn the_default_goes_from_one_over_a_zone_to_all() {
        let (census, all) = census(7, &[("a", 150), ("b", 250)]);
        let mut reach = Reach::default();
        let mut sizes = Vec::new();
        for stage in RolloutPolicy::default_stages() {
            reach.grow(7, &stage, &census);
            sizes.push(reached(&reach, &all));
        }
        assert_eq!(sizes[..2], [1, 4]);
        // The zone that is drawn, and what was reached elsewhere before.
        assert!(
            (150..=153).contains(&sizes[2]) || (250..=253).contains(&sizes[2]),
            "{sizes:?}"
        );
        assert_eq!(sizes[3], 400);
    }

    #[test]
    fn a_share_of_few_is_counted_and_of_many_drawn() {
        for (live, percent, want) in [(3, 1, 1..=1), (10, 50, 5..=5), (5000, 10, 420..=580)] {
            let (census, all) = census(3, &[("a", live)]);
            let mut reach = Reach::default();
            reach.grow(3, &stage(StageZones::All, StageAmount::Percent(percent)), &census);
            assert!(want.contains(&reached(&reach, &all)), "{live} {percent}");
        }
    }

    #[test]
    fn nobody_is_reached_while_nobody_is_there() {
        let mut reach = Reach::default();
        reach.grow(
            1,
            &stage(StageZones::All, StageAmount::Proxies(1)),
            &Census::default(),
        );
        assert_eq!(reach, Reach::default());
    }

    fn stages() -> impl Strategy<Value = RolloutStage> {
        let zones = prop_oneof![
            Just(StageZones::All),
            (1..3u32).prop_map(StageZones::Count),
            Just(StageZones::Named(vec![Name::parse("b").unwrap()])),
        ];
        let amount = prop_oneof![
            (1..64u32).prop_map(StageAmount::Proxies),
            (1..=100u32).prop_map(StageAmount::Percent),
        ];
        (zones, amount).prop_map(|(zones, amount)| stage(zones, amount))
    }

    proptest! {
        /// Whoever is in stays in, whatever comes, goes, and is asked for; and a stage that can have somebody does.
        #[test]
        fn reach_only_grows(
            rollout in any::<u64>(),
            steps in prop::collection::vec((stages(), 1..80usize, 1..200usize), 1..6),
        ) {
            let mut reach = Reach::default();
            for (stage, a, b) in steps {
                let (census, all) = census(rollout, &[("a", a), ("b", b)]);
                let before = reach.clone();
                reach.grow(rollout, &stage, &census);
                for (zone, rank) in &all {
                    prop_assert!(!before.has(zone, *rank) || reach.has(zone, *rank));
                }
                prop_assert!(reached(&reach, &all) > 0);
                if stage.zones == StageZones::All && let StageAmount::Proxies(wanted) = stage.amount {
                    let wanted = usize::try_from(wanted).unwrap().min(all.len());
                    prop_assert!(reached(&reach, &all) >= wanted);
                }
            }
        }

        /// It doesn't matter to which control plane a proxy is connected.
        #[test]
        fn counts_of_several_are_those_of_one(split in prop::collection::vec(any::<bool>(), 1..150)) {
            let (whole, all) = census(9, &[("a", split.len())]);
            let mut parts = [Census::default(), Census::default()];
            for ((zone, rank), left) in all.iter().zip(&split) {
                let part = &mut parts[usize::from(*left)];
                part.zones.entry(zone.clone()).or_default().add(*rank);
            }
            let [mut one, two] = parts;
            one.merge(&two);
            prop_assert_eq!(one, whole);
        }
    }
}
