//! The push: to each proxy what changed since what it has, and nothing else.

use crate::policy::{Policy, Refused, wire};
use crate::proxies::Proxies;
use crate::store::Changes;
use leeward_identity::{PeerInfo, Role};
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as ToProxy;
use leeward_proto::v1::proxy_message::Message as FromProxy;
use leeward_proto::v1::push_service_server::PushService;
use prost::Message;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How often a proxy is told that the control plane is there.
    pub heartbeat: Duration,
    /// How long a proxy may be silent, or not read.
    pub silence: Duration,
    /// How long a change waits for others to go with it.
    pub debounce: Duration,
}

impl Timing {
    /// What push.proto promises, and 10 ms for changes to come together.
    pub const DEFAULT: Self = Self {
        heartbeat: Duration::from_secs(10),
        silence: Duration::from_secs(30),
        debounce: Duration::from_millis(10),
    };
}

/// Bytes of resources in one update, about.
const UPDATE_BYTES: usize = 1 << 20;
/// Resources in one update.
const UPDATE_RESOURCES: usize = 500;
/// Messages to a proxy that may wait; the next is read from the store when there is room.
const OUTBOX: usize = 4;
/// Changes that are kept ready, since most proxies need the same one.
const CACHED: usize = 8;

/// Serves the push.
#[derive(Clone, Debug)]
pub struct Push {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    policy: Policy,
    proxies: Arc<Proxies>,
    timing: Timing,
    stop: CancellationToken,
    streams: AtomicU64,
    ready: Mutex<VecDeque<Ready>>,
}

/// The updates from one revision to another.
#[derive(Clone, Debug)]
struct Ready {
    from: u64,
    to: u64,
    updates: Arc<Vec<v1::Update>>,
}

impl Push {
    /// A push of `policy`. Streams end when `stop` is cancelled.
    pub fn new(policy: Policy, proxies: Arc<Proxies>, timing: Timing, stop: CancellationToken) -> Self {
        let shared = Shared {
            policy,
            proxies,
            timing,
            stop,
            streams: AtomicU64::new(1),
            ready: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }
}

type Outgoing = Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::ControlMessage, Status>> + Send>>;

#[tonic::async_trait]
impl PushService for Push {
    type SubscribeStream = Outgoing;

    async fn subscribe(
        &self,
        request: Request<Streaming<v1::ProxyMessage>>,
    ) -> Result<Response<Outgoing>, Status> {
        let peer = request.extensions().get::<PeerInfo>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("no peer certificate"))?;
        let Role::Proxy { zone, name } = peer.id.role() else {
            return Err(Status::permission_denied(format!(
                "{} is not a proxy; only proxies subscribe",
                peer.id
            )));
        };
        let mut incoming = request.into_inner();
        let timing = self.shared.timing;
        let first = tokio::time::timeout(timing.silence, incoming.message()).await;
        let hello = match first {
            Ok(Ok(Some(v1::ProxyMessage {
                message: Some(FromProxy::Hello(hello)),
            }))) => hello,
            Ok(Ok(_)) => return Err(Status::invalid_argument("the first message must be a hello")),
            Ok(Err(status)) => return Err(status),
            Err(_) => return Err(Status::deadline_exceeded("no hello")),
        };
        if hello.zone != zone || hello.proxy != name {
            return Err(Status::permission_denied(format!(
                "the hello says zone {:?} and proxy {:?}, the certificate {:?} and {:?}",
                hello.zone, hello.proxy, zone, name
            )));
        }
        let stream = self.shared.streams.fetch_add(1, Ordering::Relaxed);
        self.shared.proxies.connected(&hello, stream, now());
        tracing::info!(
            zone,
            proxy = name,
            generation = hello.generation,
            "proxy connected"
        );
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let ended = self.shared.stop.child_token();
        // Reader and writer are apart: neither can hold the other up. Each ends both.
        tokio::spawn(read(
            Arc::clone(&self.shared),
            hello.clone(),
            stream,
            incoming,
            ended.clone(),
        ));
        tokio::spawn(write(Arc::clone(&self.shared), hello, outbox, ended));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn read(
    shared: Arc<Shared>,
    hello: v1::Hello,
    stream: u64,
    mut incoming: Streaming<v1::ProxyMessage>,
    ended: CancellationToken,
) {
    let _ends_both = ended.clone().drop_guard();
    let reason = loop {
        let message = tokio::select! {
            () = ended.cancelled() => break "stream ended".to_owned(),
            message = tokio::time::timeout(shared.timing.silence, incoming.message()) => message,
        };
        let ack = match message {
            Err(_) => break format!("silent for {:?}", shared.timing.silence),
            Ok(Err(status)) => break status.message().to_owned(),
            Ok(Ok(None)) => break "closed".to_owned(),
            Ok(Ok(Some(message))) => match message.message {
                Some(FromProxy::Ack(ack)) => Some(ack),
                Some(FromProxy::Hello(_)) => break "said hello twice".to_owned(),
                Some(FromProxy::Heartbeat(_)) | None => None,
            },
        };
        shared.proxies.heard(&hello, stream, ack, now());
    };
    shared.proxies.gone(&hello, stream);
    tracing::info!(zone = hello.zone, proxy = hello.proxy, reason, "proxy gone");
}

async fn write(
    shared: Arc<Shared>,
    hello: v1::Hello,
    outbox: mpsc::Sender<Result<v1::ControlMessage, Status>>,
    ended: CancellationToken,
) {
    let _ends_both = ended.clone().drop_guard();
    let mut revisions = shared.policy.watch();
    let mut sent = (hello.store_id == shared.policy.store_id()).then_some(hello.generation);
    // A generation that this store hasn't reached can't be its own.
    sent = sent.filter(|generation| *generation <= shared.policy.revision());
    loop {
        let current = *revisions.borrow_and_update();
        if sent.is_none_or(|sent| sent < current) {
            let (to, updates) = match shared.updates(sent).await {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "can't read policy for a push");
                    // The proxy comes back, and finds the store mended or another control plane.
                    let _ = outbox.try_send(Err(Status::unavailable("the store failed")));
                    return;
                }
            };
            for update in &*updates {
                if send(&shared, &outbox, ToProxy::Update(update.clone()))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            sent = Some(to);
            continue;
        }
        tokio::select! {
            () = ended.cancelled() => return,
            changed = revisions.changed() => {
                if changed.is_err() {
                    return;
                }
                tokio::time::sleep(shared.timing.debounce).await;
            }
            () = tokio::time::sleep(shared.timing.heartbeat) => {
                if send(&shared, &outbox, ToProxy::Heartbeat(v1::Heartbeat {})).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// An error means that the proxy is gone, or has not read for too long.
async fn send(
    shared: &Shared,
    outbox: &mpsc::Sender<Result<v1::ControlMessage, Status>>,
    message: ToProxy,
) -> Result<(), ()> {
    let message = Ok(v1::ControlMessage {
        message: Some(message),
    });
    match tokio::time::timeout(shared.timing.silence, outbox.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(()),
    }
}

impl Shared {
    /// What brings a proxy from `from` (`None`: from nothing that this store knows) up to date.
    async fn updates(&self, from: Option<u64>) -> Result<(u64, Arc<Vec<v1::Update>>), Refused> {
        if let Some(from) = from {
            let current = self.policy.revision();
            {
                let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(hit) = ready.iter().find(|r| r.from == from && r.to == current) {
                    return Ok((hit.to, Arc::clone(&hit.updates)));
                }
            }
            if let Some(changes) = self.policy.changes_since(from).await? {
                let to = changes.to;
                let updates = Arc::new(split(self.policy.store_id(), changes, false));
                let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
                ready.truncate(CACHED - 1);
                ready.push_front(Ready {
                    from,
                    to,
                    updates: Arc::clone(&updates),
                });
                return Ok((to, updates));
            }
        }
        let changes = self.policy.everything().await?;
        Ok((changes.to, Arc::new(split(self.policy.store_id(), changes, true))))
    }
}

/// Cuts changes into updates of bounded size; the last is complete.
fn split(store_id: &str, changes: Changes, full: bool) -> Vec<v1::Update> {
    let new = || v1::Update {
        store_id: store_id.to_owned(),
        generation: changes.to,
        ..v1::Update::default()
    };
    let mut updates = vec![v1::Update { full, ..new() }];
    let mut bytes = 0;
    for stored in &changes.upserts {
        let resource = wire(stored);
        bytes += resource.encoded_len();
        let room = updates.last().is_some_and(|u| u.upserts.len() < UPDATE_RESOURCES);
        if bytes > UPDATE_BYTES || !room {
            updates.push(new());
            bytes = resource.encoded_len();
        }
        if let Some(last) = updates.last_mut() {
            last.upserts.push(resource);
        }
    }
    for chunk in changes.deletes.chunks(UPDATE_RESOURCES * 20) {
        let deletes = chunk
            .iter()
            .map(|(_, key)| leeward_proto::render_key(key))
            .collect();
        updates.push(v1::Update { deletes, ..new() });
    }
    if let Some(last) = updates.last_mut() {
        last.complete = true;
    }
    updates
}
