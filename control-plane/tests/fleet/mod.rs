//! Proxies that speak the push, and whose requests fail if they are told to.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test that can't be set up has failed"
)]

use crate::support::{Site, from_proxy};
use leeward_identity::{Identity, SpiffeId, channel};
use leeward_proto::v1;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use v1::control_message::Message as FromControl;
use v1::proxy_message::Message as FromProxy;
use v1::push_service_client::PushServiceClient;

/// Proxies, and the control plane that they are to be connected to.
pub struct Fleet<'a> {
    site: &'a Site,
    control: watch::Sender<SocketAddr>,
    proxies: Vec<Proxy>,
    /// Requests to services at this port fail.
    pub failing_port: Option<u16>,
    /// Services at this port are refused.
    pub refused_port: Option<u16>,
}

pub struct Proxy {
    zone: String,
    name: String,
    identity: Arc<Identity>,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    connected: bool,
    store_id: String,
    generation: u64,
    through: u64,
    resources: BTreeMap<(i32, String), v1::Resource>,
    quarantined: BTreeMap<(i32, String), u64>,
    observed: u64,
    ever_failed: bool,
    ever_refused: bool,
    failing_port: Option<u16>,
    refused_port: Option<u16>,
}

impl<'a> Fleet<'a> {
    pub fn new(site: &'a Site, control: SocketAddr) -> Self {
        Self {
            site,
            control: watch::Sender::new(control),
            proxies: Vec::new(),
            failing_port: None,
            refused_port: None,
        }
    }

    pub fn proxies(&self) -> &[Proxy] {
        &self.proxies
    }

    pub fn start(&mut self, zone: &str, name: &str) {
        let id = SpiffeId::proxy("leeward.test", zone, name).unwrap();
        let state = Arc::new(Mutex::new(State {
            failing_port: self.failing_port,
            refused_port: self.refused_port,
            ..State::default()
        }));
        let identity = self.site.identity(&id);
        let task = run(&identity, &state, self.control.subscribe(), zone, name);
        self.proxies.push(Proxy {
            zone: zone.into(),
            name: name.into(),
            identity,
            state,
            task,
        });
    }

    /// Its connection is lost; it has what it had.
    pub fn restart(&mut self, name: &str) {
        let proxy = self.proxies.iter_mut().find(|proxy| proxy.name == name).unwrap();
        proxy.task.abort();
        proxy.locked().connected = false;
        proxy.task = run(
            &proxy.identity,
            &proxy.state,
            self.control.subscribe(),
            &proxy.zone,
            &proxy.name,
        );
    }

    pub fn move_to(&self, control: SocketAddr) {
        self.control.send_replace(control);
    }

    pub fn ever_failed(&self) -> Vec<&str> {
        let failed = self.proxies.iter().filter(|proxy| proxy.locked().ever_failed);
        failed.map(Proxy::name).collect()
    }

    pub fn ever_refused(&self) -> Vec<&str> {
        let refused = self.proxies.iter().filter(|proxy| proxy.locked().ever_refused);
        refused.map(Proxy::name).collect()
    }

    pub async fn stop(self) {
        for proxy in self.proxies {
            proxy.task.abort();
            let _ = proxy.task.await;
        }
    }
}

impl Proxy {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn is_connected(&self) -> bool {
        self.locked().connected
    }

    pub fn has(&self, kind: v1::Kind, name: &str) -> bool {
        self.locked()
            .resources
            .contains_key(&(kind.into(), name.to_owned()))
    }

    /// The port of a service's first endpoint.
    pub fn port(&self, service: &str) -> Option<u16> {
        let state = self.locked();
        port(
            state
                .resources
                .get(&(v1::Kind::Service.into(), service.to_owned()))?,
        )
    }

    pub fn is_drained(&self, zone: &str) -> bool {
        let state = self.locked();
        let zone = state.resources.get(&(v1::Kind::Zone.into(), zone.to_owned()));
        matches!(zone.and_then(|zone| zone.spec.as_ref()), Some(v1::resource::Spec::Zone(zone)) if zone.drain.is_some())
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn port(resource: &v1::Resource) -> Option<u16> {
    let Some(v1::resource::Spec::Service(service)) = &resource.spec else {
        return None;
    };
    let address: SocketAddr = service.endpoints.first()?.address.parse().ok()?;
    Some(address.port())
}

fn kind(resource: &v1::Resource) -> i32 {
    leeward_proto::render_kind(leeward_proto::parse(resource).unwrap().spec.kind()).into()
}

/// Connects, and again, until dropped.
fn run(
    identity: &Arc<Identity>,
    state: &Arc<Mutex<State>>,
    mut control: watch::Receiver<SocketAddr>,
    zone: &str,
    name: &str,
) -> JoinHandle<()> {
    let (identity, state) = (Arc::clone(identity), Arc::clone(state));
    let (zone, name) = (zone.to_owned(), name.to_owned());
    tokio::spawn(async move {
        loop {
            let address = *control.borrow_and_update();
            tokio::select! {
                _ = session(&identity, &state, address, &zone, &name) => {}
                _ = control.changed() => {}
            }
            locked(&state).connected = false;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
}

async fn session(
    identity: &Arc<Identity>,
    state: &Mutex<State>,
    address: SocketAddr,
    zone: &str,
    name: &str,
) -> Option<()> {
    let channel = channel::connect_lazy(Arc::clone(identity), address);
    let mut client = PushServiceClient::new(channel).max_decoding_message_size(64 << 20);
    let (out, messages) = mpsc::channel(8);
    let hello = {
        let state = locked(state);
        v1::Hello {
            proxy: name.into(),
            zone: zone.into(),
            version: "test".into(),
            store_id: state.store_id.clone(),
            generation: state.generation,
        }
    };
    out.send(from_proxy(FromProxy::Hello(hello))).await.ok()?;
    let mut stream = client
        .subscribe(ReceiverStream::new(messages))
        .await
        .ok()?
        .into_inner();
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    loop {
        let message = tokio::select! {
            message = stream.message() => message.ok()??,
            _ = ticks.tick() => {
                let told = requests(&mut locked(state));
                if let Some(told) = told {
                    out.send(from_proxy(FromProxy::Requests(told))).await.ok()?;
                }
                continue;
            }
        };
        match message.message {
            Some(FromControl::Update(update)) => {
                let ack = take(&mut locked(state), update);
                if let Some(ack) = ack {
                    out.send(from_proxy(FromProxy::Ack(ack))).await.ok()?;
                }
            }
            Some(FromControl::Observe(observe)) => locked(state).observed = observe.rollout,
            Some(_) | None => {}
        }
    }
}

/// What it is asked to tell: a hundred requests, that fail if they go to the port that fails.
fn requests(state: &mut State) -> Option<v1::RequestSignals> {
    let cart = state
        .resources
        .get(&(v1::Kind::Service.into(), "cart".to_owned()));
    let fails = state.failing_port.is_some() && cart.and_then(port) == state.failing_port;
    state.ever_failed |= fails;
    (state.observed != 0).then(|| {
        let times = [vec![0; 3], vec![100], vec![0; 15]].concat();
        v1::RequestSignals {
            rollout: state.observed,
            routes: vec![v1::RouteSignals {
                direction: "outbound".into(),
                route: "shop".into(),
                requests: 100,
                failures: if fails { 60 } else { 1 },
                times,
            }],
        }
    })
}

fn take(state: &mut State, update: v1::Update) -> Option<v1::Ack> {
    state.connected = true;
    for resource in update.upserts {
        let metadata = resource.metadata.clone().unwrap();
        let key = (kind(&resource), metadata.name);
        assert_ne!(
            key.0,
            i32::from(v1::Kind::RolloutPolicy),
            "that is not for proxies"
        );
        if state.refused_port.is_some() && port(&resource) == state.refused_port {
            state.ever_refused = true;
            state.quarantined.insert(key, metadata.revision);
        } else {
            state.quarantined.remove(&key);
            state.resources.insert(key, resource);
        }
    }
    for delete in update.deletes {
        state.resources.remove(&(delete.kind, delete.name));
    }
    if !update.complete {
        return None;
    }
    assert!(
        update.store_id != state.store_id || update.generation >= state.generation,
        "a generation went back"
    );
    (state.store_id, state.generation, state.through) = (update.store_id, update.generation, update.through);
    let quarantined = state
        .quarantined
        .iter()
        .map(|((kind, name), revision)| v1::Quarantined {
            r#ref: Some(v1::ResourceRef {
                kind: *kind,
                name: name.clone(),
            }),
            revision: *revision,
            reason: "refused".into(),
            running_revision: 0,
        });
    Some(v1::Ack {
        generation: state.generation,
        quarantined: quarantined.collect(),
        orphans: 0,
        through: state.through,
    })
}
