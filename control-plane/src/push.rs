//! The push: to each proxy what changed since what it has, and nothing else.

mod admission;
mod codec;
mod updates;

use crate::backup::Lead;
use crate::ca::Ca;
use crate::degradation::Degradation;
use crate::policy::Policy;
use crate::proxies::Proxies;
use crate::rollout::Rollouts;
use crate::rollout::course::Held;
use admission::{Admission, Has};
use bytes::Bytes;
use leeward_identity::{PeerInfo, Role};
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as ToProxy;
use leeward_proto::v1::proxy_message::Message as FromProxy;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use updates::{Sent, Updates, frame};

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

/// Longest wait for the store, for a proxy that has more than is here.
const SETTLE: Duration = Duration::from_secs(5);
/// Messages to a proxy that may wait; the next is read from the store when there is room.
const OUTBOX: usize = 4;

/// Serves the push.
#[derive(Clone, Debug)]
pub struct Push {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    policy: Policy,
    proxies: Arc<Proxies>,
    degradation: Degradation,
    rollouts: Rollouts,
    ca: Option<Ca>,
    /// Which of several with stores of their own leads, if there are several.
    lead: Option<Lead>,
    /// The trust bundle; empty where the control plane is no authority.
    trust: watch::Sender<Bytes>,
    timing: Timing,
    stop: CancellationToken,
    streams: AtomicU64,
    updates: Updates,
    admission: Admission,
}

impl Push {
    /// A push of `policy`. Streams end when `stop` is cancelled.
    pub(crate) fn new(
        proxies: Arc<Proxies>,
        degradation: Degradation,
        rollouts: Rollouts,
        ca: Option<Ca>,
        lead: Option<Lead>,
        timing: Timing,
        stop: CancellationToken,
    ) -> Self {
        let policy = rollouts.policy().clone();
        let shared = Shared {
            updates: Updates::new(policy.clone()),
            admission: Admission::new(),
            policy,
            proxies,
            degradation,
            rollouts,
            lead,
            trust: ca.as_ref().map_or_else(watch::Sender::default, Ca::trust),
            ca,
            timing,
            stop,
            streams: AtomicU64::new(1),
        };
        Self {
            shared: Arc::new(shared),
        }
    }
}

const LEADS_ELSEWHERE: &str = "another control plane leads, and has newer policy; try that";

type Outgoing = ReceiverStream<Result<Bytes, Status>>;

impl Push {
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
        // A generation that this store hasn't reached can't be its own, whatever the hello says.
        let ours = hello.store_id == self.shared.policy.store_id();
        let store = self.shared.policy.store();
        if ours && hello.generation > store.revision() && store.kv().is_shared() {
            // Another control plane has told it of what is not here yet. It isn't taken back to what was before.
            let settled = tokio::time::timeout(SETTLE, store.settle()).await;
            if !settled.is_ok_and(|settled| settled.is_ok()) {
                return Err(Status::unavailable(
                    "this control plane is behind what the proxy has, and can't reach the store; try another",
                ));
            }
        }
        if let Some(lead) = &self.shared.lead
            && !lead.may_serve(ours && hello.generation > store.revision())
        {
            // It has what the one that leads has said, or has to hear that from it.
            return Err(Status::unavailable(LEADS_ELSEWHERE));
        }
        if store.kv().is_shared() {
            // Another control plane may have let a change out to it that is held back here still.
            let brought = tokio::time::timeout(SETTLE, self.shared.rollouts.bring()).await;
            if !brought.is_ok_and(|brought| brought.is_ok()) {
                return Err(Status::unavailable(
                    "this control plane can't see how far a rollout is; try another",
                ));
            }
        }
        let has = Some(hello.generation).filter(|has| ours && *has <= self.shared.policy.revision());
        let wants = has.map_or(Has::Nothing, |_| Has::Something);
        let admitted = self.shared.admission.admit(wants).await?;
        self.shared
            .proxies
            .connected(&hello, has.unwrap_or(0), stream, now());
        if let Some(ca) = &self.shared.ca {
            ca.connected(&peer.id, stream, peer.not_after);
        }
        tracing::info!(zone, proxy = name, generation = has, "proxy connected");
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let ended = self.shared.stop.child_token();
        let acked = CancellationToken::new();
        let (zone, proxy) = (hello.zone.clone(), hello.proxy.clone());
        let stop = self.shared.stop.clone();
        tokio::spawn(admitted.stay(outbox.clone(), acked.clone(), ended.clone(), stop));
        // Reader and writer are apart: neither can hold the other up. Each ends both.
        tokio::spawn(read(
            Arc::clone(&self.shared),
            (hello, peer.clone()),
            stream,
            incoming,
            acked.clone(),
            ended.clone(),
        ));
        let shared = Arc::clone(&self.shared);
        tokio::spawn(
            Writer {
                shared,
                zone,
                proxy,
                peer,
                outbox,
                acked,
                ended,
            }
            .run(has.map(Sent::whole)),
        );
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

/// Levels as they go on the wire, the same bytes for all proxies of a zone.
pub(crate) fn levels_frame(levels: v1::Levels) -> Bytes {
    frame(ToProxy::Levels(levels))
}

/// A trust bundle as it goes on the wire, the same bytes for all proxies.
pub(crate) fn trust_frame(bundle: &v1::TrustBundle) -> Bytes {
    frame(ToProxy::Trust(bundle.clone()))
}

/// Waits until another store has taken the place of this one, where that can be.
async fn fenced(lead: Option<&Lead>) {
    match lead {
        Some(lead) => lead.fenced().await,
        None => std::future::pending().await,
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn read(
    shared: Arc<Shared>,
    (hello, peer): (v1::Hello, PeerInfo),
    stream: u64,
    mut incoming: Streaming<v1::ProxyMessage>,
    acked: CancellationToken,
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
                Some(FromProxy::Signals(signals)) => {
                    shared.degradation.heard(&hello.zone, &hello.proxy, &signals);
                    None
                }
                Some(FromProxy::Identity(report)) => {
                    if let Some(ca) = &shared.ca {
                        ca.heard(&peer.id, stream, &report);
                    }
                    None
                }
                Some(FromProxy::Requests(requests)) => {
                    shared.rollouts.heard(&hello, stream, &requests);
                    None
                }
                Some(FromProxy::Heartbeat(_)) | None => None,
            },
        };
        if ack.is_some() {
            acked.cancel();
        }
        shared.proxies.heard(&hello, stream, ack, now());
    };
    shared.proxies.gone(&hello, stream);
    if let Some(ca) = &shared.ca {
        ca.gone(&peer, stream);
    }
    tracing::info!(zone = hello.zone, proxy = hello.proxy, reason, "proxy gone");
}

/// The half that sends.
struct Writer {
    shared: Arc<Shared>,
    /// The proxy's.
    zone: String,
    proxy: String,
    peer: PeerInfo,
    outbox: mpsc::Sender<Result<Bytes, Status>>,
    /// Cancelled by the proxy's first ack.
    acked: CancellationToken,
    ended: CancellationToken,
}

impl Writer {
    /// Sends what changed, for as long as there is someone to send it to. `sent` is what the proxy has.
    async fn run(self, mut sent: Option<Sent>) {
        let _ends_both = self.ended.clone().drop_guard();
        let mut courses = self.shared.rollouts.course();
        let mut levels = self.shared.degradation.watch();
        let mut trust = self.shared.trust.subscribe();
        let (mut told, mut trusted, mut observing) = (Bytes::new(), Bytes::new(), 0);
        // The first update is sent even if it says nothing: its ack tells what the proxy refuses.
        let mut greeted = false;
        loop {
            // Whom to trust comes first: no policy, however large or bad, is in its way.
            let trusts = trust.borrow_and_update().clone();
            if trusts != trusted {
                if !self.send(trusts.clone()).await {
                    return;
                }
                trusted = trusts;
                continue;
            }
            if let Some(at) = self.shared.ca.as_ref().and_then(|ca| ca.refuses(&self.peer)) {
                // It has just been told so with the rest of the list. Nothing more is for it.
                let _ = self.outbox.try_send(Err(crate::ca::revoked(&self.peer.id, at)));
                return;
            }
            let course = Arc::clone(&courses.borrow_and_update());
            let held = course.held_from(&self.zone, &self.proxy);
            if !greeted || sent.is_none_or(|sent| !sent.is_at(course.head, held)) {
                match self.update(sent, course.head, held).await {
                    Some(Some(to)) => {
                        (sent, greeted) = (Some(to), true);
                        continue;
                    }
                    // What is known of rollouts comes after the store, and there will be another course at once.
                    Some(None) => {}
                    None => return,
                }
            } else if course.observe != observing {
                let rollout = course.observe;
                if !self.send(frame(ToProxy::Observe(v1::Observe { rollout }))).await {
                    return;
                }
                observing = rollout;
                continue;
            }
            // Levels are of policies, and come after them.
            let acked = self.acked.is_cancelled();
            let judged = levels.borrow_and_update().clone().filter(|_| acked);
            if let Some(now) = judged.map(|judged| judged.to(&self.zone).clone())
                && now != told
            {
                if !self.send(now.clone()).await {
                    return;
                }
                told = now;
                continue;
            }
            tokio::select! {
                () = self.ended.cancelled() => return,
                changed = courses.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    tokio::time::sleep(self.shared.timing.debounce).await;
                }
                changed = trust.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = fenced(self.shared.lead.as_ref()) => {
                    // What it has from here is all there is from here: whoever leads has newer.
                    let _ = self.outbox.try_send(Err(Status::unavailable(LEADS_ELSEWHERE)));
                    return;
                }
                () = self.acked.cancelled(), if !acked => {}
                changed = levels.changed(), if acked => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = tokio::time::sleep(self.shared.timing.heartbeat) => {
                    if !self.send(frame(ToProxy::Heartbeat(v1::Heartbeat {}))).await {
                        return;
                    }
                }
            }
        }
    }

    /// Sends what is new since `sent`, and says up to where that is; `Some(None)` if that can't be said yet, `None` if the
    /// stream is over.
    async fn update(&self, sent: Option<Sent>, head: u64, held: Option<&Held>) -> Option<Option<Sent>> {
        let (to, frames) = match self.shared.updates.bring(sent, head, held).await {
            Ok(Some(ready)) => ready,
            Ok(None) => return Some(None),
            Err(error) => {
                tracing::error!(%error, "can't read policy for a push");
                // The proxy comes back, and finds the store mended or another control plane.
                let _ = self.outbox.try_send(Err(Status::unavailable("the store failed")));
                return None;
            }
        };
        for frame in &*frames {
            if !self.send(frame.clone()).await {
                return None;
            }
        }
        Some(Some(to))
    }

    /// Whether it went out: `false` means that the proxy is gone, or has not read for too long.
    async fn send(&self, frame: Bytes) -> bool {
        tokio::select! {
            () = self.ended.cancelled() => false,
            sent = tokio::time::timeout(self.shared.timing.silence, self.outbox.send(Ok(frame))) => {
                matches!(sent, Ok(Ok(())))
            }
        }
    }
}
