//! What proxies have seen of the services that triggers look at.

use leeward_policy::model::{Scope, Signal};
use leeward_proto::v1;
use leeward_resilience::degrade::{SignalLog, SignalSample};
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Services that are taken from one message.
const MAX_SERVICES: usize = 10_000;
/// How long a zone of which no proxy is connected counts as if one were: a control plane that has just started, and a
/// net that has just come back, don't know better than what was judged before.
const ABSENT: Duration = Duration::from_secs(60);

/// A log for each service in each zone, and one in the mesh, as triggers want them: nothing of any other service is
/// kept.
#[derive(Debug)]
pub(super) struct Seen {
    started: Instant,
    /// When a proxy of each zone was last connected.
    present: BTreeMap<String, Instant>,
    /// By service, what triggers look at.
    wanted: HashMap<String, Wanted>,
    zones: HashMap<String, HashMap<String, SignalLog>>,
    mesh: HashMap<String, SignalLog>,
}

#[derive(Debug, Default)]
struct Wanted {
    zone: Vec<Signal>,
    mesh: Vec<Signal>,
}

impl Seen {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            started: now,
            present: BTreeMap::new(),
            wanted: HashMap::new(),
            zones: HashMap::new(),
            mesh: HashMap::new(),
        }
    }

    /// Keeps what these look at, and nothing else.
    pub(super) fn keep<'a>(&mut self, signals: impl IntoIterator<Item = (Scope, &'a Signal)>, now: Instant) {
        self.wanted.clear();
        for (scope, signal) in signals {
            let wanted = self.wanted.entry(signal.service().to_string()).or_default();
            match scope {
                Scope::Zone => wanted.zone.push(signal.clone()),
                Scope::Mesh => wanted.mesh.push(signal.clone()),
            }
        }
        let wanted = &self.wanted;
        for logs in self.zones.values_mut() {
            logs.retain(|service, _| wanted.get(service).is_some_and(|w| !w.zone.is_empty()));
            for (service, log) in logs {
                log.keep_for(wanted.get(service).into_iter().flat_map(|w| &w.zone));
            }
        }
        self.mesh
            .retain(|service, _| wanted.get(service).is_some_and(|w| !w.mesh.is_empty()));
        for (service, w) in wanted.iter().filter(|(_, w)| !w.mesh.is_empty()) {
            match self.mesh.get_mut(service) {
                Some(log) => log.keep_for(&w.mesh),
                None => drop(self.mesh.insert(service.clone(), SignalLog::new(&w.mesh, now))),
            }
        }
    }

    /// Takes what a proxy has seen. A service that no trigger looks at is passed over.
    pub(super) fn add(&mut self, zone: &str, proxy: &str, signals: &v1::Signals, now: Instant) {
        // A proxy's name is unique in its zone only.
        let proxy = format!("{zone}/{proxy}");
        for signals in signals.services.iter().take(MAX_SERVICES) {
            let service = &signals.service;
            let Some(wanted) = self.wanted.get(service) else {
                continue;
            };
            let sample = sample(signals);
            if let Some(log) = self.mesh.get_mut(service) {
                log.add(&proxy, &sample, now);
            }
            if wanted.zone.is_empty() {
                continue;
            }
            if !self.zones.contains_key(zone) {
                self.zones.insert(zone.to_owned(), HashMap::new());
            }
            let Some(logs) = self.zones.get_mut(zone) else {
                continue;
            };
            if !logs.contains_key(service) {
                logs.insert(service.clone(), SignalLog::new(&wanted.zone, now));
            }
            if let Some(log) = logs.get_mut(service) {
                log.add(&proxy, &sample, now);
            }
        }
    }

    /// What was seen of a service in a zone, or (empty) in all.
    pub(super) fn log(&self, zone: &str, service: &str) -> Option<&SignalLog> {
        if zone.is_empty() {
            self.mesh.get(service)
        } else {
            self.zones.get(zone)?.get(service)
        }
    }

    /// Notes which zones have proxies now, and whether one is connected; forgets the others.
    pub(super) fn note(&mut self, zones: &BTreeMap<String, bool>, now: Instant) {
        self.zones.retain(|zone, _| zones.contains_key(zone));
        self.present.retain(|zone, _| zones.contains_key(zone));
        let connected = zones.iter().filter(|(_, connected)| **connected);
        self.present
            .extend(connected.map(|(zone, _)| (zone.clone(), now)));
    }

    /// Whether a proxy of a zone, or (empty) of any, is connected.
    pub(super) fn is_connected(&self, zone: &str, now: Instant) -> bool {
        self.last(zone).is_some_and(|at| at >= now)
    }

    /// Whether one is or was until a moment ago, or that can't be said yet.
    pub(super) fn is_present(&self, zone: &str, now: Instant) -> bool {
        let last = self.last(zone).unwrap_or(self.started).max(self.started);
        now.saturating_duration_since(last) < ABSENT
    }

    /// The zones of which proxies were connected lately.
    pub(super) fn zones(&self) -> impl Iterator<Item = &String> {
        self.present.keys()
    }

    fn last(&self, zone: &str) -> Option<Instant> {
        if zone.is_empty() {
            self.present.values().max().copied()
        } else {
            self.present.get(zone).copied()
        }
    }
}

fn sample(signals: &v1::ServiceSignals) -> SignalSample {
    let mut sample = SignalSample {
        circuit_open: signals.circuit_open,
        calls: signals.calls,
        failures: signals.failures,
        demand: signals.demand,
        limit: signals.limit,
        ..SignalSample::default()
    };
    // Of more than there are buckets for, the rest is not ours.
    for (bucket, count) in sample.latencies.iter_mut().zip(&signals.latencies) {
        *bucket = *count;
    }
    sample
}
