//! For the node that it runs on: is it alive, is it ready, what does it do and why.

use crate::degrade::Degradation;
use crate::drain::Phase;
use crate::gateways::Gateways;
use crate::is_ready;
use crate::side::Side;
use crate::{caches, identity, jwks, plugins, queues, resilience, state, workloads};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use leeward_cache::Caches;
use leeward_config::{Contact, Live, StateDir, Workloads};
use leeward_http::{Keyring, Node};
use leeward_identity::Identity;
use leeward_queue::Queues;
use leeward_telemetry::{Gauge, Hub};
use leeward_upstream::Registry;
use serde_json::json;
use std::sync::Arc;
use tokio::sync::watch;

/// Connections at once; more wait.
const MAX_CONNECTIONS: usize = 64;

/// What is asked for.
#[derive(Clone)]
struct View {
    hub: Arc<Hub>,
    live: Live,
    registry: Arc<Registry>,
    queues: Arc<Queues>,
    caches: Arc<Caches>,
    keyring: Arc<Keyring>,
    degradation: Degradation,
    gateways: Arc<Gateways>,
    identity: Option<Arc<Identity>>,
    plugins: Arc<leeward_wasm::Host>,
    state: Option<StateDir>,
    workloads: Option<Workloads>,
    phases: watch::Receiver<Phase>,
}

/// Answers until dropped, or until a successor has the listener. Everything is read-only but `/queues`.
pub(crate) async fn serve(
    listener: Side,
    node: Node,
    live: Live,
    degradation: Degradation,
    (gateways, state, workloads): (Arc<Gateways>, Option<StateDir>, Option<Workloads>),
    phases: watch::Receiver<Phase>,
) {
    let view = View {
        hub: node.hub,
        live,
        registry: node.registry,
        queues: node.queues,
        caches: node.caches,
        keyring: node.keyring,
        plugins: node.plugins,
        identity: node.identity,
        degradation,
        gateways,
        state,
        workloads,
        phases: phases.clone(),
    };
    let answer = move |request| {
        let view = view.clone();
        async move { view.answer(request).await }
    };
    listener.serve("admin", MAX_CONNECTIONS, phases, answer).await;
}

impl View {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.headers().contains_key(header::ORIGIN) {
            // A page in a browser on this node must not act for whoever looks at it.
            return text(StatusCode::FORBIDDEN, "not for pages\n".to_owned());
        }
        let path = request.uri().path();
        if path == "/queues" || path.starts_with("/queues/") {
            return queues::answer(&self.queues, &request).await;
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "want GET\n".to_owned());
        }
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => match self.ready() {
                Ok(()) => {
                    let stale = state::staleness(&self.live.status(), now());
                    let stale = stale.map(|stale| format!(", {stale}")).unwrap_or_default();
                    text(StatusCode::OK, format!("ok{stale}\n"))
                }
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            },
            "/metrics" => {
                self.set_gauges();
                let snapshot = self.live.snapshot().load();
                let mut readings = resilience::readings(&self.registry, &snapshot, now());
                readings.extend(queues::readings(&self.queues));
                readings.extend(caches::readings(&self.caches));
                readings.extend(jwks::readings(&self.keyring));
                readings.extend(self.degradation.readings());
                readings.extend(plugins::readings(&self.plugins, now()));
                readings.extend(identity::readings(self.identity.as_deref()));
                readings.extend(workloads::readings(self.workloads.as_ref(), identity::wall()));
                readings.extend(self.gateways.readings());
                readings.extend(state::readings(self.state.as_ref(), &self.live.status()));
                text(StatusCode::OK, self.hub.render_prometheus(readings))
            }
            "/config" => json(&self.config()),
            "/circuits" => {
                let snapshot = self.live.snapshot().load();
                json(&resilience::circuits(&self.registry, &snapshot, now()))
            }
            "/plugins" => json(&plugins::report(&self.plugins, now())),
            "/plugins/logs" => plugins::logs(request.uri().query()),
            "/degradation" => json(&self.degradation.report(now())),
            "/gateways" => json(&self.gateways.report()),
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /livez, /readyz, /metrics, /circuits, /degradation, /gateways, /plugins, /plugins/logs, /queues \
                 and /config\n"
                    .to_owned(),
            ),
        }
    }

    fn ready(&self) -> Result<(), &'static str> {
        let (status, phase) = (self.live.status(), *self.phases.borrow());
        is_ready(&status, &self.degradation, self.identity.as_deref(), phase)
    }

    fn set_gauges(&self) {
        let status = self.live.status();
        self.hub.set(Gauge::Generation, status.generation.unwrap_or(0));
        self.hub.set(Gauge::Quarantined, status.quarantined.len() as u64);
        self.hub.set(Gauge::Connected, status.connected.into());
        self.hub.set(Gauge::ConfigAge, age(status.heard).unwrap_or(0));
    }

    fn config(&self) -> serde_json::Value {
        let status = self.live.status();
        let quarantined: Vec<_> = status
            .quarantined
            .iter()
            .map(|(key, q)| json!({"resource": key.to_string(), "revision": q.revision, "running": q.running, "reason": q.reason}))
            .collect();
        let snapshot = self.live.snapshot().load();
        json!({
            "pid": std::process::id(),
            "proxy": snapshot.viewer.proxy.as_str(),
            "zone": snapshot.viewer.zone.as_str(),
            "generation": status.generation,
            "store_id": status.store_id,
            "source": status.source.as_str(),
            "state": self.state.as_ref().map(|state| state.path().display().to_string()),
            "connected": status.connected,
            "identity": identity::report(self.identity.as_deref()),
            "workloads": workloads::report(self.workloads.as_ref(), identity::wall()),
            "heard_seconds_ago": age(status.heard),
            "orphans": status.orphans,
            "quarantined": quarantined,
            "services": snapshot.services().len(),
            "rules": snapshot.rules().len(),
            "plugins": snapshot.plugins().iter().map(|p| &*p.name).collect::<Vec<_>>(),
        })
    }
}

fn age(heard: Option<Contact>) -> Option<u64> {
    heard.map(|contact| contact.age(now()).as_secs())
}

fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

fn json(value: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, format!("{value:#}\n"));
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
