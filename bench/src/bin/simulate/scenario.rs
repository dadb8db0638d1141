//! What is simulated.

use crate::mesh::{Change, Hop, PATIENCE, Setup, run};
use crate::record::Record;
use crate::server::Condition;
use crate::strategy::Strategy;
use std::time::Duration;

/// The service of all scenarios but the last: what one of its servers can do, times their number, is
/// [`CAPACITY`].
const SERVICE: Hop = Hop::Works {
    servers: SERVERS,
    workers: 4,
    max_queue: 500,
    service_time: Duration::from_millis(20),
};
pub(crate) const SERVERS: usize = 10;
/// Requests a second that the service can answer.
pub(crate) const CAPACITY: f64 = 2000.0;
const PROXIES: usize = 4;

/// One strategy's run.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) name: &'static str,
    pub(crate) record: Record,
}

fn runs(setup: &Setup, strategies: &[Strategy], seed: u64) -> Vec<Run> {
    strategies
        .iter()
        .map(|strategy| Run {
            name: strategy.name,
            record: run(setup, strategy, seed),
        })
        .collect()
}

/// Twice as many requests as the service can answer.
pub(crate) mod overload {
    use super::{CAPACITY, Change, Duration, PROXIES, Run, SERVICE, Setup, Strategy, runs};

    /// The seconds in which there are too many.
    pub(crate) const FROM: usize = 20;
    pub(crate) const TO: usize = 80;

    pub(crate) fn all(seed: u64) -> Vec<Run> {
        of(&Strategy::ladder(), seed)
    }

    pub(crate) fn of(strategies: &[Strategy], seed: u64) -> Vec<Run> {
        let setup = Setup {
            hops: vec![SERVICE],
            proxies: PROXIES,
            rate: 0.8 * CAPACITY,
            changes: vec![(Duration::from_secs(20), Change::Rate(2.0 * CAPACITY))],
            length: Duration::from_secs(81),
        };
        runs(&setup, strategies, seed)
    }
}

/// Every server is slow for a while, and then as fast as before; the load is the same all the time.
pub(crate) mod fault {
    use super::{CAPACITY, Change, Condition, Duration, PROXIES, Run, SERVICE, Setup, Strategy, runs};

    /// Requests a second, as a part of what the service can answer when it is well.
    pub(crate) const LOAD: f64 = 0.85;
    /// What part of it the service can answer during the fault.
    pub(crate) const LEFT: f64 = 0.3;
    /// The seconds of the fault.
    pub(crate) const FROM: usize = 20;
    pub(crate) const TO: usize = 40;
    pub(crate) const END: usize = 110;
    /// Part of the requests that must be served in five seconds in a row for it to be over.
    pub(crate) const WELL: f64 = 0.95;

    pub(crate) fn all(seed: u64) -> Vec<Run> {
        of(&Strategy::ladder(), seed)
    }

    pub(crate) fn of(strategies: &[Strategy], seed: u64) -> Vec<Run> {
        let slow = Condition::Working { slowness: 1.0 / LEFT };
        let well = Condition::Working { slowness: 1.0 };
        let setup = Setup {
            hops: vec![SERVICE],
            proxies: PROXIES,
            rate: LOAD * CAPACITY,
            changes: vec![
                (Duration::from_secs(20), Change::All(slow)),
                (Duration::from_secs(40), Change::All(well)),
            ],
            length: Duration::from_secs(111),
        };
        runs(&setup, strategies, seed)
    }
}

/// One of the servers is bad from some time on.
pub(crate) mod one_bad {
    use super::{CAPACITY, Change, Condition, Duration, PROXIES, Run, SERVICE, Setup, Strategy, runs};

    /// Requests a second, as a part of what the service can answer.
    pub(crate) const LOAD: f64 = 0.6;
    pub(crate) const SLOWNESS: f64 = 10.0;
    pub(crate) const FAILS_AFTER: Duration = Duration::from_millis(1);
    /// The seconds that are looked at.
    pub(crate) const FROM: usize = 20;
    pub(crate) const TO: usize = 80;

    pub(crate) fn slow(strategies: &[Strategy], seed: u64) -> Vec<Run> {
        of(Condition::Working { slowness: SLOWNESS }, strategies, seed)
    }

    pub(crate) fn failing(strategies: &[Strategy], seed: u64) -> Vec<Run> {
        of(Condition::Failing { after: FAILS_AFTER }, strategies, seed)
    }

    fn of(condition: Condition, strategies: &[Strategy], seed: u64) -> Vec<Run> {
        let setup = Setup {
            hops: vec![SERVICE],
            proxies: PROXIES,
            rate: LOAD * CAPACITY,
            changes: vec![(Duration::from_secs(20), Change::First(condition))],
            length: Duration::from_secs(81),
        };
        runs(&setup, strategies, seed)
    }
}

/// Four services in a row, the last of which fails every request from some time on.
pub(crate) mod chain {
    use super::{Change, Condition, Duration, Hop, PROXIES, Run, Setup, Strategy, runs};

    pub(crate) const HOPS: usize = 4;
    /// Requests a second.
    pub(crate) const RATE: f64 = 400.0;
    /// The seconds that are looked at.
    pub(crate) const FROM: usize = 10;
    pub(crate) const TO: usize = 30;

    pub(crate) fn of(strategies: &[Strategy], seed: u64) -> Vec<Run> {
        let caller = Hop::Calls {
            servers: 4,
            after: Duration::from_millis(1),
        };
        let leaf = Hop::Works {
            servers: 4,
            workers: 100,
            max_queue: 500,
            service_time: Duration::from_millis(5),
        };
        let mut hops = vec![caller; HOPS - 1];
        hops.push(leaf);
        let failing = Condition::Failing {
            after: Duration::from_millis(1),
        };
        let setup = Setup {
            hops,
            proxies: PROXIES,
            rate: RATE,
            changes: vec![(Duration::from_secs(10), Change::All(failing))],
            length: Duration::from_secs(31),
        };
        runs(&setup, strategies, seed)
    }
}

// A request that is sent in the last second that counts has its answer by the end of the run.
const _: () = assert!(PATIENCE.as_secs() <= 1);
