//! What is done beside requests, about once a second: rates are looked at, endpoints asked how they are, memory
//! measured, and what nobody uses is forgotten.

use crate::exported::{exported, lost};
use arc_swap::ArcSwap;
use leeward_cache::Caches;
use leeward_http::{Pressure, Rates};
use leeward_identity::Identity;
use leeward_policy::{EndpointKey, Snapshot};
use leeward_resilience::{Change, Checked};
use leeward_telemetry::{Hub, Recorder};
use leeward_upstream::{Chance, CheckFailure, Checker, Registry, Subject, Verdicts};
use leeward_zone::Reports;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// What is tended.
pub(crate) struct Wards {
    pub(crate) live: Arc<ArcSwap<Snapshot>>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) rates: Arc<Rates>,
    pub(crate) pressure: Arc<Pressure>,
    pub(crate) caches: Arc<Caches>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) identity: Option<Arc<Identity>>,
    pub(crate) plugins: Arc<leeward_wasm::Host>,
    /// What other proxies are told of this node's services.
    pub(crate) exported: watch::Sender<Arc<Reports>>,
    /// Memory that the process may have, in bytes; 0 is no limit.
    pub(crate) memory_limit: u64,
}

/// How often.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between sweeps of what nobody uses.
const SWEEP: u32 = 30;

/// Tends until dropped.
pub(crate) async fn tend(wards: Wards) {
    let notes = Arc::new(Notes {
        registry: Arc::clone(&wards.registry),
        recorder: Mutex::new(Recorder::new(&wards.hub)),
    });
    let verdicts = Arc::clone(&notes) as Arc<dyn Verdicts>;
    let checker = Checker::new(wards.identity.clone(), verdicts);
    let mut checked: Option<Arc<Snapshot>> = None;
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for tick in 1u32.. {
        ticks.tick().await;
        let now = tokio::time::Instant::now().into_std();
        let snapshot = wards.live.load_full();
        if !checked
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, &snapshot))
        {
            checker.update(subjects(&snapshot));
            checked = Some(Arc::clone(&snapshot));
        }
        wards.registry.tend(&snapshot, now, &mut Chance, |key, change| {
            notes.changed(key, change);
        });
        wards.plugins.tend(now);
        for (key, at) in lost(&snapshot, &wards.registry, now) {
            tokio::spawn(ask(key, at, Arc::clone(&notes)));
        }
        let health = exported(&snapshot, &wards.registry, now);
        wards.exported.send_if_modified(|known| {
            let changed = **known != health;
            if changed {
                *known = Arc::new(health);
            }
            changed
        });
        wards.pressure.set(resident_bytes(), wards.memory_limit);
        if tick % SWEEP == 0 {
            wards.registry.sweep(&snapshot);
            wards.rates.sweep(snapshot.rules(), now);
            forget_caches(&wards.caches, &snapshot);
        }
    }
}

/// Forgets the caches of rules that have none any more.
fn forget_caches(caches: &Caches, snapshot: &Snapshot) {
    let cached = snapshot.rules().iter().filter(|rule| rule.cache.is_some());
    let cached: HashSet<&str> = cached.map(|rule| &*rule.cache_id).collect();
    caches.retain(|id| cached.contains(id));
}

/// Asks an endpoint that was lost, or the proxy in front of it, whether it can be reached. It ends within its time.
async fn ask(key: EndpointKey, at: SocketAddr, notes: Arc<Notes>) {
    let asked = tokio::time::timeout(TICK, tokio::net::TcpStream::connect(at)).await;
    if let Ok(Ok(_)) = asked {
        notes.checked(&key, Ok(()));
    }
}

/// The endpoints that policy has checked.
fn subjects(snapshot: &Snapshot) -> Vec<Subject> {
    let checked = snapshot.services().iter().filter_map(|view| {
        let check = view.spec.health_check.as_ref()?;
        Some(view.endpoints.iter().map(|endpoint| Subject {
            key: endpoint.key.clone(),
            address_text: Arc::clone(&endpoint.address_text),
            protocol: view.spec.protocol,
            gateways: endpoint.gateways.clone().unwrap_or_default(),
            check: check.clone(),
        }))
    });
    checked.flatten().collect()
}

/// Writes down what is found.
struct Notes {
    registry: Arc<Registry>,
    recorder: Mutex<Recorder>,
}

impl Notes {
    fn changed(&self, key: &EndpointKey, change: Change) {
        let (word, reason) = leeward_http::words(change);
        // Poison is harmless: counters are only added to.
        let recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        recorder.endpoint_changed(&key.service, word, reason);
        let (service, address) = (&*key.service, key.address);
        match change {
            Change::Ejected(ejection) => {
                tracing::warn!(service, %address, reason, length = ?ejection.length(), evidence = ?ejection.why, "endpoint ejected");
            }
            Change::Lost | Change::ChecksFailed => {
                tracing::warn!(service, %address, reason, "endpoint is left out");
            }
            Change::Back | Change::ChecksPassed => tracing::info!(service, %address, "endpoint is back"),
        }
    }
}

impl Verdicts for Notes {
    fn checked(&self, key: &EndpointKey, passed: Result<(), &CheckFailure>) {
        if let Err(error) = passed {
            tracing::debug!(service = %key.service, address = %key.address, %error, "health check failed");
            return;
        }
        let now = tokio::time::Instant::now().into_std();
        if let Some(change) = self.registry.reached(key, now) {
            self.changed(key, change);
        }
    }

    fn verdict(&self, key: &EndpointKey, healthy: bool, why: Option<&CheckFailure>) {
        let now = tokio::time::Instant::now().into_std();
        let says = if healthy {
            Checked::Passing
        } else {
            Checked::Failing
        };
        if let Some(error) = why {
            tracing::warn!(service = %key.service, address = %key.address, %error, "endpoint fails its checks");
        }
        if let Some(change) = self.registry.checked(key, says, now) {
            self.changed(key, change);
        }
    }
}

/// Memory that the process has, in bytes; 0 where the system doesn't say.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = resident.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::{self, Backend, HostMatch, PathMatch, Route, RouteMatch, RouteRule, Service};
    use leeward_policy::{Name, Resource, Spec, Viewer};
    use std::collections::BTreeMap;

    /// The policy of a route whose rule has a cache, or has none.
    fn snapshot(cache: Option<model::Cache>) -> Snapshot {
        let name = |text: &str| Name::parse(text).unwrap();
        let resource = |text: &str, spec| Resource {
            name: name(text),
            revision: 1,
            labels: BTreeMap::new(),
            spec,
        };
        let anything = RouteMatch {
            path: PathMatch::Prefix("/".into()),
            method: None,
            headers: Vec::new(),
        };
        let mut rule = RouteRule::new(vec![anything], vec![Backend::new(name("app"), 1)]);
        rule.cache = cache;
        let route = Route {
            hostnames: vec![HostMatch::Any],
            rules: vec![rule],
            parents: Vec::new(),
        };
        let world = [
            resource("app", Spec::Service(Service::new(Vec::new()))),
            resource("app", Spec::Route(route)),
        ];
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        Snapshot::compile(viewer, 1, &world)
    }

    #[test]
    fn what_a_rule_keeps_is_there_until_it_has_no_cache_any_more() {
        let caches = Caches::new();
        let with = snapshot(Some(model::Cache::DEFAULT));
        let rule = with.rules().first().unwrap();
        let cache = caches.rule(&rule.cache_id, rule.cache.as_ref().unwrap());
        forget_caches(&caches, &with);
        let after = caches.rule(&rule.cache_id, rule.cache.as_ref().unwrap());
        assert!(Arc::ptr_eq(&cache, &after), "it was forgotten");
        forget_caches(&caches, &snapshot(None));
        assert!(caches.readings().is_empty(), "it is still there");
    }
}
