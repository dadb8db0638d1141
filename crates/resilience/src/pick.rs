//! Which endpoint is next.

use crate::health::Standing;

/// What was chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Choice {
    /// The endpoint's position in its service.
    pub endpoint: usize,
    /// The tier it came from; 0 is the local zone's, if it has endpoints at all.
    pub tier: usize,
    /// Whether it was taken for want of better.
    pub panic: Panic,
}

/// How bad things are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Panic {
    /// A healthy endpoint was chosen.
    No,
    /// None was healthy: one that is ejected, or a probe of one that couldn't be reached.
    Yes,
}

/// Chooses in turn among the endpoints of the first tier that has a healthy one; when no tier has, among
/// the ejected; when there are none either, one whose probe is due. `None`: there is nothing to try.
///
/// An endpoint whose probe is due is also chosen now and then in its own tier before others are (`turn`
/// falls on it), which is how it comes back. `probe(i)` is asked before one is chosen so, and must say yes
/// to one caller only. Endpoints for which `tried(i)` are left out. `turn` is the caller's counter.
///
/// O(endpoints).
pub fn pick<'a>(
    tiers: impl Iterator<Item = &'a [usize]> + Clone,
    turn: usize,
    standing: impl Fn(usize) -> Standing,
    tried: impl Fn(usize) -> bool,
    mut probe: impl FnMut(usize) -> bool,
) -> Option<Choice> {
    for (tier, members) in tiers.clone().enumerate() {
        for (step, endpoint) in in_turn(members, turn).enumerate() {
            if tried(endpoint) {
                continue;
            }
            let panic = Panic::No;
            match standing(endpoint) {
                Standing::Healthy => {
                    return Some(Choice {
                        endpoint,
                        tier,
                        panic,
                    });
                }
                Standing::ProbeDue if step == 0 && probe(endpoint) => {
                    return Some(Choice {
                        endpoint,
                        tier,
                        panic,
                    });
                }
                Standing::ProbeDue | Standing::Ejected | Standing::Unreachable | Standing::Unhealthy => {}
            }
        }
    }
    let panic = Panic::Yes;
    for (tier, members) in tiers.clone().enumerate() {
        for endpoint in in_turn(members, turn).filter(|&e| !tried(e)) {
            if standing(endpoint) == Standing::Ejected {
                return Some(Choice {
                    endpoint,
                    tier,
                    panic,
                });
            }
        }
    }
    for (tier, members) in tiers.enumerate() {
        for endpoint in in_turn(members, turn).filter(|&e| !tried(e)) {
            if standing(endpoint) == Standing::ProbeDue && probe(endpoint) {
                return Some(Choice {
                    endpoint,
                    tier,
                    panic,
                });
            }
        }
    }
    None
}

/// The members from the one whose turn it is.
fn in_turn(members: &[usize], turn: usize) -> impl Iterator<Item = usize> {
    let at = turn.checked_rem(members.len()).unwrap_or(0);
    let (before, after) = members.split_at(at);
    after.iter().chain(before).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn standing() -> impl Strategy<Value = Standing> {
        prop_oneof![
            Just(Standing::Healthy),
            Just(Standing::Ejected),
            Just(Standing::ProbeDue),
            Just(Standing::Unreachable)
        ]
    }

    proptest! {
        #[test]
        fn never_worse_than_the_best_there_is(
            tiers in prop::collection::vec(prop::collection::vec((standing(), any::<bool>()), 0..5), 0..4),
            turn: usize,
        ) {
            let flat: Vec<_> = tiers.iter().flatten().copied().collect();
            let mut next = 0..;
            let index: Vec<Vec<usize>> =
                tiers.iter().map(|tier| tier.iter().map(|_| next.next().unwrap()).collect()).collect();
            let chosen = pick(
                index.iter().map(Vec::as_slice), turn, |i| flat[i].0, |i| flat[i].1, |_| true,
            );
            let left: Vec<_> = flat.iter().filter(|(_, tried)| !tried).map(|(s, _)| *s).collect();
            match chosen {
                Some(choice) => {
                    let (got, tried) = flat[choice.endpoint];
                    prop_assert!(!tried);
                    prop_assert!(got != Standing::Unreachable);
                    if left.contains(&Standing::Healthy) {
                        prop_assert!(matches!(got, Standing::Healthy | Standing::ProbeDue));
                        prop_assert_eq!(choice.panic, Panic::No);
                    }
                }
                None => prop_assert!(left.iter().all(|s| *s == Standing::Unreachable)),
            }
        }

        #[test]
        fn turns_share_evenly(n in 1usize..20, rounds in 1usize..20) {
            let members: Vec<usize> = (0..n).collect();
            let mut counts = HashMap::new();
            for turn in 0..n * rounds {
                let choice = pick([&members[..]].into_iter(), turn, |_| Standing::Healthy, |_| false, |_| false);
                *counts.entry(choice.unwrap().endpoint).or_insert(0usize) += 1;
            }
            prop_assert!(counts.values().all(|&c| c == rounds));
        }
    }

    #[test]
    fn another_zone_only_when_the_local_one_has_nothing_healthy() {
        let tiers = [&[0, 1][..], &[2]];
        let states = |a, b| move |i: usize| [a, b, Standing::Healthy][i];
        let run = |a, b| pick(tiers.into_iter(), 0, states(a, b), |_| false, |_| false).unwrap();
        assert_eq!(run(Standing::Unreachable, Standing::Healthy).endpoint, 1);
        let over = run(Standing::Unreachable, Standing::Ejected);
        assert_eq!((over.endpoint, over.tier, over.panic), (2, 1, Panic::No));
    }
}
