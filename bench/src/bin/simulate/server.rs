//! One server of a service.

use crate::chance::lognormal;
use leeward_resilience::Draw;
use std::collections::VecDeque;
use std::time::Duration;

/// A first-in-first-out queue in front of a few workers.
///
/// It doesn't know whether who asked still waits, so it works on requests that were given up as on any other.
/// That wasted work is what lets an overload outlive its cause.
#[derive(Debug)]
pub(crate) struct Server {
    workers: usize,
    busy: usize,
    queue: VecDeque<usize>,
    max_queue: usize,
    service_time: Duration,
    condition: Condition,
}

/// How a server does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Condition {
    /// It works, this many times slower than usual.
    Working {
        /// 1 is as usual.
        slowness: f64,
    },
    /// It answers everything with 500 after this time.
    Failing {
        /// Far less than the service time, mostly.
        after: Duration,
    },
}

/// What became of a request that reached a server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reception {
    /// A worker has it, and will be done after this time.
    Started(Duration),
    /// It waits.
    Queued,
    /// There is no room in the queue.
    Refused,
    /// It fails after this time.
    Failed(Duration),
}

/// Standard deviation of the logarithm of service times: the slowest hundredth takes thrice the median.
const SIGMA: f64 = 0.5;

impl Server {
    /// Answers `workers / service_time` requests a second at most.
    pub(crate) fn new(workers: usize, max_queue: usize, service_time: Duration) -> Self {
        Self {
            workers,
            busy: 0,
            queue: VecDeque::new(),
            max_queue,
            service_time,
            condition: Condition::Working { slowness: 1.0 },
        }
    }

    pub(crate) fn set(&mut self, condition: Condition) {
        self.condition = condition;
    }

    /// A request arrives; `id` is what [`Server::next`] gives back.
    pub(crate) fn receive(&mut self, id: usize, draw: &mut impl Draw) -> Reception {
        match self.condition {
            Condition::Failing { after } => Reception::Failed(after),
            Condition::Working { slowness } if self.busy < self.workers => {
                self.busy += 1;
                Reception::Started(self.time(slowness, draw))
            }
            Condition::Working { .. } if self.queue.len() < self.max_queue => {
                self.queue.push_back(id);
                Reception::Queued
            }
            Condition::Working { .. } => Reception::Refused,
        }
    }

    /// A worker is done: what it does next, and for how long.
    pub(crate) fn next(&mut self, draw: &mut impl Draw) -> Option<(usize, Duration)> {
        let Some(id) = self.queue.pop_front() else {
            self.busy -= 1;
            return None;
        };
        let slowness = match self.condition {
            Condition::Working { slowness } => slowness,
            Condition::Failing { .. } => 1.0,
        };
        Some((id, self.time(slowness, draw)))
    }

    fn time(&self, slowness: f64, draw: &mut impl Draw) -> Duration {
        lognormal(self.service_time, SIGMA, draw).mul_f64(slowness)
    }
}
