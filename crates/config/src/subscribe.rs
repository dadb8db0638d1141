//! The stream from a control plane: one at a time, another when it falls silent.

use crate::apply::{Batch, State, Warm};
use crate::live::{ControlLevel, Live};
use crate::rota::{Rota, Timing};
use leeward_identity::{Identity, channel};
use leeward_policy::Viewer;
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as FromControl;
use leeward_proto::v1::proxy_message::Message as FromProxy;
use leeward_proto::v1::push_service_client::PushServiceClient;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// What a proxy needs to know to subscribe.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who it is.
    pub viewer: Viewer,
    /// The control planes, in order of preference; at least one.
    pub control: Vec<SocketAddr>,
    /// The proxy's build.
    pub version: String,
    /// How long things may take.
    pub timing: Timing,
}

/// Messages to the control plane that may wait. One that is not read for as long as the silence limit ends
/// the stream.
const OUTBOX: usize = 16;
/// Whole changes that may wait while one is made live. When they are full nothing more is read, and the
/// control plane waits.
const BATCHES: usize = 1;
/// Levels that are taken in; a store has fewer policies.
const MAX_LEVELS: usize = 10_000;
/// Largest message from a control plane, in bytes. It sends updates of about 1 MiB.
const MAX_MESSAGE: usize = 16 << 20;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the control plane ended the stream")]
    Closed,
    #[error("the control plane was silent for {0:?}")]
    Silent(Duration),
    #[error("the control plane does not read")]
    Stuck,
    #[error("the control plane sent a change of {0} resources, which is more than any store has")]
    TooLarge(usize),
    #[error("the control plane refused: {}", .0.message())]
    Status(Box<tonic::Status>),
}

/// Keeps policy up to date until dropped.
pub async fn subscribe<W: Warm>(settings: Settings, identity: Arc<Identity>, warm: Arc<W>, live: Live) {
    let mut state = State::new(settings.viewer.clone(), warm, live.clone());
    let mut rota = Rota::new(&settings.control, settings.timing);
    while let Some(control) = rota.turn() {
        let began = tokio::time::Instant::now();
        let ended = session(&settings, &identity, control, &mut state, &live).await;
        live.say(|status| status.connected = false);
        live.say_levels(None);
        live.say_observed(0);
        tracing::warn!(%control, reason = %ended, "not connected to a control plane; policy stays as it is");
        let pause = rota.failed(began.elapsed(), fastrand::f64());
        state.settle_until(tokio::time::sleep(pause)).await;
    }
}

async fn session<W: Warm>(
    settings: &Settings,
    identity: &Arc<Identity>,
    control: SocketAddr,
    state: &mut State<W>,
    live: &Live,
) -> Ended {
    let timing = settings.timing;
    let mut client = PushServiceClient::new(channel::connect_lazy(Arc::clone(identity), control))
        .max_decoding_message_size(MAX_MESSAGE);
    // The writer's half is this channel: tonic reads it and writes to the connection on its own.
    let (outbox, messages) = mpsc::channel(OUTBOX);
    let hello = v1::Hello {
        proxy: settings.viewer.proxy.to_string(),
        zone: settings.viewer.zone.to_string(),
        version: settings.version.clone(),
        store_id: state.store_id.clone(),
        generation: state.generation,
    };
    if say(&outbox, FromProxy::Hello(hello), timing.silence)
        .await
        .is_err()
    {
        return Ended::Stuck;
    }
    let opened = tokio::time::timeout(timing.silence, client.subscribe(ReceiverStream::new(messages)));
    let mut stream = match state.settle_until(opened).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Ended::Status(Box::new(status)),
        Err(_) => return Ended::Silent(timing.silence),
    };
    live.say(|status| status.connected = true);
    // Making plugins ready can take its time; meanwhile the control plane is heard and told that the proxy
    // is there. When the stream ends, what came whole is still made live.
    let (whole, batches) = mpsc::channel(BATCHES);
    let (acked, first_ack) = oneshot::channel();
    let reading = async {
        tokio::select! {
            ended = read(&mut stream, whole, timing.silence, live) => ended,
            () = beat(&outbox, timing) => Ended::Stuck,
            () = tell_signals(live.signals(), first_ack, &outbox, timing.silence) => Ended::Stuck,
            () = tell_identity(live.identity(), &outbox, timing.silence) => Ended::Stuck,
            () = tell_requests(live.requests(), &outbox, timing.silence) => Ended::Stuck,
        }
    };
    let (ended, ()) = tokio::join!(
        reading,
        make_live(batches, state, &outbox, (timing.silence, acked))
    );
    ended
}

/// Hands whole batches on, until the stream ends. A batch that is not whole then is dropped: the generation
/// that the next hello names is one that was applied whole.
async fn read(
    stream: &mut Streaming<v1::ControlMessage>,
    whole: mpsc::Sender<Batch>,
    silence: Duration,
    live: &Live,
) -> Ended {
    let mut pending = Batch::default();
    loop {
        let message = match tokio::time::timeout(silence, stream.message()).await {
            Ok(Ok(Some(message))) => message.message,
            Ok(Ok(None)) => return Ended::Closed,
            Ok(Err(status)) => return Ended::Status(Box::new(status)),
            Err(_) => return Ended::Silent(silence),
        };
        let now = tokio::time::Instant::now().into_std();
        live.say(|status| status.heard = Some(now));
        let update = match message {
            Some(FromControl::Update(update)) => update,
            Some(FromControl::Levels(levels)) => {
                live.say_levels(Some(control_levels(levels)));
                continue;
            }
            Some(FromControl::Observe(observe)) => {
                live.say_observed(observe.rollout);
                continue;
            }
            Some(FromControl::Trust(bundle)) => {
                live.say_trust(bundle);
                continue;
            }
            Some(FromControl::Heartbeat(_)) | None => continue,
        };
        match pending.add(update) {
            Ok(Some(batch)) => {
                if whole.send(batch).await.is_err() {
                    return Ended::Closed;
                }
            }
            Ok(None) => {}
            Err(size) => return Ended::TooLarge(size),
        }
    }
}

/// Says that the proxy is there, until that can't be said.
async fn beat(outbox: &mpsc::Sender<v1::ProxyMessage>, timing: Timing) {
    loop {
        tokio::time::sleep(timing.heartbeat).await;
        let heartbeat = FromProxy::Heartbeat(v1::Heartbeat {});
        if say(outbox, heartbeat, timing.silence).await.is_err() {
            return;
        }
    }
}

/// Says what certificate and which roots the proxy has, at once and whenever they are others, until that can't be said.
async fn tell_identity(
    mut reports: watch::Receiver<Option<v1::IdentityReport>>,
    outbox: &mpsc::Sender<v1::ProxyMessage>,
    limit: Duration,
) {
    loop {
        let report = reports.borrow_and_update().clone();
        if let Some(report) = report
            && say(outbox, FromProxy::Identity(report), limit).await.is_err()
        {
            return;
        }
        if reports.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Says what came of requests, which somebody measures only while the control plane asks; until that can't be said.
async fn tell_requests(
    mut requests: watch::Receiver<v1::RequestSignals>,
    outbox: &mpsc::Sender<v1::ProxyMessage>,
    limit: Duration,
) {
    // What was said until now is old.
    requests.mark_unchanged();
    while requests.changed().await.is_ok() {
        let latest = requests.borrow_and_update().clone();
        if say(outbox, FromProxy::Requests(latest), limit).await.is_err() {
            return;
        }
    }
    // Nobody measures any more.
    std::future::pending::<()>().await;
}

/// What a control plane says of levels; what is more than a store has policies is cut off.
fn control_levels(levels: v1::Levels) -> Arc<[ControlLevel]> {
    let level = |level: v1::Level| ControlLevel {
        policy: level.policy.into(),
        level: level.level.into(),
        why: level.why.into(),
    };
    levels.levels.into_iter().take(MAX_LEVELS).map(level).collect()
}

/// Says what was seen of services once the first ack is out, the latest of what there is, until that can't be said.
async fn tell_signals(
    mut signals: watch::Receiver<v1::Signals>,
    first_ack: oneshot::Receiver<()>,
    outbox: &mpsc::Sender<v1::ProxyMessage>,
    limit: Duration,
) {
    if first_ack.await.is_err() {
        // No more is made live: the stream is about to end for another reason.
        return std::future::pending().await;
    }
    // What was said until now is old.
    signals.mark_unchanged();
    while signals.changed().await.is_ok() {
        let latest = signals.borrow_and_update().clone();
        if say(outbox, FromProxy::Signals(latest), limit).await.is_err() {
            return;
        }
    }
}

/// Makes batch after batch live, and what comes of plugins that took longer, and says so; until there are no more batches.
async fn make_live<W: Warm>(
    mut batches: mpsc::Receiver<Batch>,
    state: &mut State<W>,
    outbox: &mpsc::Sender<v1::ProxyMessage>,
    (silence, acked): (Duration, oneshot::Sender<()>),
) {
    let mut acked = Some(acked);
    loop {
        tokio::select! {
            batch = batches.recv() => match batch {
                Some(batch) => state.apply(batch, tokio::time::Instant::now().into_std()).await,
                None => return,
            },
            () = state.settle() => {
                if acked.is_some() {
                    // The control plane has said nothing yet that could be answered.
                    continue;
                }
            }
        }
        // A stream that is over has no use for it; the next begins with one.
        let said = say(outbox, FromProxy::Ack(state.ack()), silence).await;
        if let (Ok(()), Some(acked)) = (said, acked.take()) {
            let _ = acked.send(());
        }
    }
}

/// An error means that the message could not be handed over in time.
async fn say(outbox: &mpsc::Sender<v1::ProxyMessage>, message: FromProxy, limit: Duration) -> Result<(), ()> {
    let message = v1::ProxyMessage {
        message: Some(message),
    };
    match tokio::time::timeout(limit, outbox.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(()),
    }
}
