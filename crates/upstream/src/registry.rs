//! What all workers share about endpoints and services.

use dashmap::DashMap;
use leeward_policy::EndpointKey;
use leeward_resilience::{Change, Event, Health, Limits, Standing};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Run-time state by stable id. It survives every change of policy that leaves the id in place.
#[derive(Debug, Default)]
pub struct Registry {
    endpoints: DashMap<EndpointKey, Arc<EndpointState>>,
    services: DashMap<Arc<str>, Arc<ServiceState>>,
}

impl Registry {
    /// The state of an endpoint, made at the first call.
    pub fn endpoint(&self, key: &EndpointKey) -> Arc<EndpointState> {
        if let Some(state) = self.endpoints.get(key) {
            return Arc::clone(&state);
        }
        Arc::clone(&self.endpoints.entry(key.clone()).or_default())
    }

    /// The state of a service, made at the first call.
    pub fn service(&self, name: &Arc<str>) -> Arc<ServiceState> {
        if let Some(state) = self.services.get(name) {
            return Arc::clone(&state);
        }
        Arc::clone(&self.services.entry(Arc::clone(name)).or_default())
    }

    /// Forgets what no worker refers to any more. Call now and then; endpoints under the current policy
    /// that were not called since lose only a clean slate.
    pub fn sweep(&self) {
        self.endpoints
            .retain(|_, state| Arc::strong_count(state) > 1 || !state.is_clean());
        self.services.retain(|_, state| Arc::strong_count(state) > 1);
    }

    /// Endpoints that are not healthy at `now`, with how they stand: for metrics and people.
    pub fn unhealthy(&self, now: Instant) -> Vec<(EndpointKey, Standing)> {
        self.endpoints
            .iter()
            .map(|entry| (entry.key().clone(), entry.value().standing(now)))
            .filter(|(_, standing)| *standing != Standing::Healthy)
            .collect()
    }
}

/// The health of one endpoint.
#[derive(Debug)]
pub struct EndpointState {
    /// True while nothing is held against the endpoint, which is nearly always: the lock is for the rest.
    /// Relaxed is enough: a worker that reads a stale value is one request late.
    clean: AtomicBool,
    health: Mutex<Health>,
}

impl Default for EndpointState {
    fn default() -> Self {
        Self {
            clean: AtomicBool::new(true),
            health: Mutex::new(Health::NEW),
        }
    }
}

impl EndpointState {
    /// How the endpoint stands.
    pub fn standing(&self, now: Instant) -> Standing {
        if self.is_clean() {
            Standing::Healthy
        } else {
            self.locked(|health| health.standing(now))
        }
    }

    /// Takes the probe that is due; true for one caller.
    pub fn probe(&self, now: Instant) -> bool {
        self.locked(|health| health.probe(now))
    }

    /// Writes down how a call ended.
    pub fn note(&self, event: Event, now: Instant, limits: &Limits) -> Option<Change> {
        if event == Event::Succeed && self.is_clean() {
            return None;
        }
        self.locked(|health| {
            let (next, change) = health.on(event, now, limits);
            *health = next;
            change
        })
    }

    fn is_clean(&self) -> bool {
        self.clean.load(Ordering::Relaxed)
    }

    fn locked<T>(&self, act: impl FnOnce(&mut Health) -> T) -> T {
        // Poison is harmless: a health is `Copy` and replaced in one assignment.
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let out = act(&mut health);
        self.clean.store(health.is_clean(), Ordering::Relaxed);
        out
    }
}

/// What one service takes of this proxy.
#[derive(Debug, Default)]
pub struct ServiceState {
    active: AtomicU32,
}

/// Leave to have one request under way; given back when dropped.
#[derive(Debug)]
#[must_use = "dropping a permit gives it back"]
pub struct ServicePermit(Arc<ServiceState>);

impl ServiceState {
    /// A permit, unless `max` requests are under way.
    pub fn admit(self: &Arc<Self>, max: u32) -> Option<ServicePermit> {
        // The count orders nothing else, so relaxed is enough; it may pass `max` for the moment between
        // the two operations of a refused request, never for an admitted one.
        if self.active.fetch_add(1, Ordering::Relaxed) >= max {
            self.active.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(ServicePermit(Arc::clone(self)))
    }

    /// Requests under way.
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }
}

impl Drop for ServicePermit {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_bounded_and_come_back() {
        let service = Arc::new(ServiceState::default());
        let first = service.admit(2).unwrap();
        let second = service.admit(2).unwrap();
        assert!(service.admit(2).is_none());
        drop(first);
        let third = service.admit(2).unwrap();
        assert_eq!(service.active(), 2);
        drop((second, third));
        assert_eq!(service.active(), 0);
    }
}
