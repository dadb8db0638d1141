//! What is told to the control plane of what was seen, about once a second.

use leeward_proto::v1;
use leeward_resilience::degrade::SignalSample;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// Samples since it was last told. There are no more than services that triggers look at.
#[derive(Default)]
pub(super) struct Outgoing {
    told: Option<Instant>,
    samples: BTreeMap<Arc<str>, SignalSample>,
}

impl Outgoing {
    pub(super) fn add(&mut self, samples: Vec<(Arc<str>, SignalSample)>) {
        for (service, sample) in samples {
            match self.samples.entry(service) {
                Entry::Vacant(place) => drop(place.insert(sample)),
                Entry::Occupied(mut place) => join(place.get_mut(), &sample),
            }
        }
    }

    /// What there is to tell, if it is time to.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<v1::Signals> {
        let early = self
            .told
            .is_some_and(|told| now.saturating_duration_since(told) < INTERVAL);
        if early || self.samples.is_empty() {
            return None;
        }
        self.told = Some(now);
        let services = std::mem::take(&mut self.samples);
        Some(v1::Signals {
            services: services.iter().map(|(name, sample)| wire(name, sample)).collect(),
        })
    }
}

/// Adds a later sample of the same service.
fn join(earlier: &mut SignalSample, later: &SignalSample) {
    earlier.circuit_open = later.circuit_open;
    earlier.calls = earlier.calls.saturating_add(later.calls);
    earlier.failures = earlier.failures.saturating_add(later.failures);
    for (sum, more) in earlier.latencies.iter_mut().zip(&later.latencies) {
        *sum = sum.saturating_add(*more);
    }
    (earlier.demand, earlier.limit) = (later.demand, later.limit);
}

fn wire(service: &Arc<str>, sample: &SignalSample) -> v1::ServiceSignals {
    v1::ServiceSignals {
        service: service.to_string(),
        circuit_open: sample.circuit_open,
        calls: sample.calls,
        failures: sample.failures,
        latencies: sample.latencies.to_vec(),
        demand: sample.demand,
        limit: sample.limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_for_a_second_and_the_rest_is_the_latest() {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary origin")]
        let start = Instant::now();
        let mut outgoing = Outgoing::default();
        assert_eq!(outgoing.take_due(start), None, "there is nothing to tell");
        let sample = |calls, demand, circuit_open| {
            let mut latencies = [0; 64];
            latencies[3] = calls;
            SignalSample {
                circuit_open,
                calls,
                failures: 1,
                latencies,
                demand,
                limit: 10,
            }
        };
        let pay: Arc<str> = "pay".into();
        outgoing.add(vec![(Arc::clone(&pay), sample(2, 1000, true))]);
        assert_eq!(outgoing.take_due(start).unwrap().services.len(), 1);
        for (calls, open) in [(3, true), (4, false)] {
            outgoing.add(vec![(Arc::clone(&pay), sample(calls, 500 * calls, open))]);
        }
        assert_eq!(outgoing.take_due(start + INTERVAL / 2), None);
        let told = outgoing.take_due(start + INTERVAL).unwrap();
        let pay = &told.services[0];
        assert_eq!((pay.calls, pay.failures, pay.latencies[3]), (7, 2, 7));
        assert_eq!((pay.demand, pay.limit, pay.circuit_open), (2000, 10, false));
    }
}
