//! What must hold with every machine on, and what must be seen to go wrong without them. Each run has a fixed
//! seed, so these don't fail by chance; [`every_seed_will_do`] sees to it that the seed isn't a lucky one.

use crate::record::Record;
use crate::scenario::{CAPACITY, Run, chain, fault, one_bad, overload};
use crate::strategy::Strategy;

const SEED: u64 = 1;

fn only(mut runs: Vec<Run>) -> Record {
    assert_eq!(runs.len(), 1);
    runs.remove(0).record
}

fn goodput_in_overload(strategy: Strategy, seed: u64) -> f64 {
    let record = only(overload::of(&[strategy], seed));
    record.summary(overload::FROM, overload::TO).goodput() / CAPACITY
}

fn recovery(strategy: Strategy, seed: u64) -> Option<usize> {
    only(fault::of(&[strategy], seed)).recovery(fault::TO, fault::END, fault::WELL)
}

fn load_of_the_last(strategy: Strategy) -> f64 {
    only(chain::of(&[strategy], SEED))
        .summary(chain::FROM, chain::TO)
        .load_factor()
}

#[test]
fn twice_the_load_leaves_nine_tenths_of_capacity_useful() {
    let goodput = goodput_in_overload(Strategy::everything(), SEED);
    assert!(goodput >= 0.9, "{goodput}");
}

#[test]
fn in_an_overload_what_matters_more_is_served_more() {
    use leeward_policy::model::Priority;
    let record = only(overload::of(&[Strategy::everything()], SEED));
    let sum = record.summary(overload::FROM, overload::TO);
    let served = Priority::ALL.map(|priority| sum.success_of(priority));
    assert!(served.is_sorted(), "{served:?}");
    assert!(served[3] >= 0.85, "of the critical: {}", served[3]);
}

#[test]
fn a_service_recovers_within_ten_seconds_of_the_end_of_its_fault() {
    let recovery = recovery(Strategy::everything(), SEED);
    assert!(recovery.is_some_and(|seconds| seconds <= 10), "{recovery:?}");
}

#[test]
fn plain_retries_keep_a_failure_going_whose_cause_is_gone() {
    assert_eq!(recovery(Strategy::plain_retries(), SEED), None);
    // It is retries that do it: without them the service recovers, if slowly.
    assert!(recovery(Strategy::NONE, SEED).is_some());
}

#[test]
fn a_failing_service_is_spared_the_retries_of_a_whole_chain() {
    let plain = load_of_the_last(Strategy::plain_retries());
    assert!(plain > 60.0 && plain <= 81.0, "{plain}");
    let everything = load_of_the_last(Strategy::everything());
    assert!(everything <= 1.2, "{everything}");
}

#[test]
fn a_server_that_fails_fast_attracts_no_load() {
    let share = |strategy: Strategy| {
        let record = only(one_bad::failing(&[strategy], SEED));
        record.summary(one_bad::FROM, one_bad::TO).to_first()
    };
    let least_request = Strategy::balancers()
        .into_iter()
        .find(|s| s.name == "least request");
    assert!(share(least_request.unwrap()) > 0.1, "more than an equal share");
    assert!(share(Strategy::everything()) < 0.01);
}

#[test]
fn a_slow_server_gets_what_it_can_do() {
    let record = only(one_bad::slow(&[Strategy::everything()], SEED));
    let sum = record.summary(one_bad::FROM, one_bad::TO);
    assert!(sum.to_first() < 0.01, "{}", sum.to_first());
    assert!(sum.success() > 0.98, "{}", sum.success());
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let run = |seed| format!("{:?}", chain::of(&[Strategy::everything()], seed));
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn every_seed_will_do() {
    for seed in 2..4 {
        let goodput = goodput_in_overload(Strategy::everything(), seed);
        assert!(goodput >= 0.9, "seed {seed}: {goodput}");
        let recovery = recovery(Strategy::everything(), seed);
        assert!(
            recovery.is_some_and(|seconds| seconds <= 10),
            "seed {seed}: {recovery:?}"
        );
    }
}
