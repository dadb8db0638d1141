//! The stream from a control plane: one at a time, another when it falls silent.

use crate::address::Control;
use crate::apply::{Batch, State, Warm};
use crate::live::{Contact, ControlLevel, Live};
use crate::revoked;
use crate::rota::{Parting, Rota, Timing, Turn};
use crate::state::{StateDir, wall_ms};
use leeward_identity::{Identity, channel};
use leeward_policy::Viewer;
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as FromControl;
use leeward_proto::v1::proxy_message::Message as FromProxy;
use leeward_proto::v1::push_service_client::PushServiceClient;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};
use tonic_types::StatusExt;

/// What a proxy needs to know to subscribe.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who it is.
    pub viewer: Viewer,
    /// The control planes; at least one.
    pub control: Control,
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
    #[error("it can't be found: {0}")]
    Nowhere(std::io::Error),
    #[error("the control plane has no time now: {}", .0.message())]
    Busy(Box<tonic::Status>, Duration),
    #[error("the control plane is being stopped")]
    Goodbye(Duration),
    #[error("everything is asked for anew")]
    Again,
}

/// When a control plane that has no time doesn't say when it will.
const BUSY: Duration = Duration::from_secs(1);

/// A proxy's policy, from where it is to the newest that there is.
pub struct Subscription<W> {
    settings: Settings,
    identity: Arc<Identity>,
    state: State<W>,
    live: Live,
}

impl<W: Warm> Subscription<W> {
    /// One that has nothing yet.
    pub fn new(settings: Settings, identity: Arc<Identity>, warm: Arc<W>, live: Live) -> Self {
        let state = State::new(settings.viewer.clone(), warm, live.clone());
        Self {
            settings,
            identity,
            state,
            live,
        }
    }

    /// Keeps in this directory what is live from now on, and what is revoked. What is there from before is made live at once,
    /// whether a control plane answers or not: call it before anything is served.
    pub async fn keep_in(&mut self, dir: StateDir) {
        revoked::restore(&self.identity, &dir);
        let now = tokio::time::Instant::now().into_std();
        let version = self.settings.version.clone();
        self.state.keep_in(dir, version, now).await;
    }

    /// Keeps policy up to date until dropped.
    pub async fn run(mut self) {
        let control = self.settings.control.clone();
        let mut rota = Rota::new(&control, self.settings.timing);
        while let Some(turn) = rota.turn() {
            let began = tokio::time::Instant::now();
            let (ended, served) = self.session(turn).await;
            // One that was there for long without a change to tell of was good as well.
            let served = served || began.elapsed() > self.settings.timing.silence;
            self.live.say(|status| {
                status.connected = false;
                status.asking_until = None;
            });
            self.live.say_levels(None);
            self.live.say_observed(0);
            let how = match ended {
                Ended::Again => {
                    tracing::info!(control = %turn, "{ended}");
                    continue;
                }
                Ended::Goodbye(spread) => Parting::Goodbye(spread),
                Ended::Busy(_, asked) => Parting::Busy(asked),
                Ended::Closed
                | Ended::Silent(_)
                | Ended::Stuck
                | Ended::TooLarge(_)
                | Ended::Status(_)
                | Ended::Nowhere(_) => Parting::Lost,
            };
            tracing::warn!(control = %turn, reason = %ended, "not connected to a control plane; policy stays as it is");
            let pause = rota.parted(how, served, fastrand::f64());
            self.state.settle_until(tokio::time::sleep(pause)).await;
        }
    }

    /// Why it ended, and whether all that there was had come first.
    async fn session(&mut self, turn: Turn<'_>) -> (Ended, bool) {
        let timing = self.settings.timing;
        let control = match self.state.settle_until(turn.resolve()).await {
            Ok(control) => control,
            Err(error) => return (Ended::Nowhere(error), false),
        };
        let mut client = PushServiceClient::new(channel::connect_lazy(Arc::clone(&self.identity), control))
            .max_decoding_message_size(MAX_MESSAGE);
        // The writer's half is this channel: tonic reads it and writes to the connection on its own.
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let (store_id, generation) = self.state.has();
        let hello = v1::Hello {
            proxy: self.settings.viewer.proxy.to_string(),
            zone: self.settings.viewer.zone.to_string(),
            version: self.settings.version.clone(),
            store_id,
            generation,
        };
        if say(&outbox, FromProxy::Hello(hello), timing.silence)
            .await
            .is_err()
        {
            return (Ended::Stuck, false);
        }
        let opened = tokio::time::timeout(timing.open, client.subscribe(ReceiverStream::new(messages)));
        let mut stream = match self.state.settle_until(opened).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return (refused(status), false),
            Err(_) => return (Ended::Silent(timing.open), false),
        };
        let (state, live) = (&mut self.state, &self.live);
        live.say(|status| status.connected = true);
        // Making plugins ready can take its time; meanwhile the control plane is heard and told that the proxy
        // is there. When the stream ends, what came whole is still made live.
        let (whole, batches) = mpsc::channel(BATCHES);
        let (acked, first_ack) = oneshot::channel();
        let (asks_again, again) = oneshot::channel();
        let heard = Heard {
            is_newest: AtomicBool::new(false),
            kept_in: state.kept_in(),
            identity: Arc::clone(&self.identity),
        };
        let reading = async {
            tokio::select! {
                ended = read(&mut stream, whole, timing.silence, (live, &heard)) => ended,
                () = beat(&outbox, timing) => Ended::Stuck,
                () = tell_signals(live.signals(), first_ack, &outbox, timing.silence) => Ended::Stuck,
                () = tell_identity(live.identity(), &outbox, timing.silence) => Ended::Stuck,
                () = tell_requests(live.requests(), &outbox, timing.silence) => Ended::Stuck,
                Ok(()) = again => Ended::Again,
            }
        };
        let making = Making {
            outbox: &outbox,
            silence: timing.silence,
            acked: Some(acked),
            asks_again: Some(asks_again),
            heard: &heard,
        };
        let (ended, ()) = tokio::join!(reading, making.make_live(batches, state));
        (ended, heard.is_newest.into_inner())
    }
}

/// Whether what is live is the newest, once a stream has said what that is.
struct Heard {
    is_newest: AtomicBool,
    kept_in: Option<StateDir>,
    /// By which peers are refused whose certificates the stream says are revoked.
    identity: Arc<Identity>,
}

fn refused(status: tonic::Status) -> Ended {
    if status.code() != Code::ResourceExhausted {
        return Ended::Status(Box::new(status));
    }
    let info = status.get_details_retry_info();
    let asked = info.and_then(|info| info.retry_delay).unwrap_or(BUSY);
    Ended::Busy(Box::new(status), asked)
}

/// Hands whole batches on, until the stream ends. A batch that is not whole then is dropped: the generation
/// that the next hello names is one that was applied whole.
async fn read(
    stream: &mut Streaming<v1::ControlMessage>,
    whole: mpsc::Sender<Batch>,
    silence: Duration,
    (live, heard): (&Live, &Heard),
) -> Ended {
    let mut pending = Batch::default();
    loop {
        let message = match tokio::time::timeout(silence, stream.message()).await {
            Ok(Ok(Some(message))) => message.message,
            Ok(Ok(None)) => return Ended::Closed,
            Ok(Err(status)) => return Ended::Status(Box::new(status)),
            Err(_) => return Ended::Silent(silence),
        };
        // On one task with what sets it.
        if heard.is_newest.load(Ordering::Relaxed) {
            let now = tokio::time::Instant::now().into_std();
            live.say(|status| status.heard = Some(Contact::now(now)));
            if let Some(dir) = &heard.kept_in {
                dir.heard(wall_ms());
            }
        }
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
            Some(FromControl::Trust(mut bundle)) => {
                // Before any policy that comes after it.
                if let Some(list) = bundle.revoked.take() {
                    revoked::take(&heard.identity, &list, heard.kept_in.as_ref());
                }
                live.say_trust(bundle);
                continue;
            }
            Some(FromControl::Goodbye(goodbye)) => {
                let spread = goodbye.spread.unwrap_or_default();
                return Ended::Goodbye(Duration::try_from(spread).unwrap_or_default());
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

/// How batches are made live.
struct Making<'a> {
    outbox: &'a mpsc::Sender<v1::ProxyMessage>,
    silence: Duration,
    /// Told by the first ack.
    acked: Option<oneshot::Sender<()>>,
    /// Told when the stream is to end, for another that asks for everything.
    asks_again: Option<oneshot::Sender<()>>,
    heard: &'a Heard,
}

impl Making<'_> {
    /// Makes batch after batch live, and what comes of plugins that took longer, and says so; until there are no more batches.
    async fn make_live<W: Warm>(mut self, mut batches: mpsc::Receiver<Batch>, state: &mut State<W>) {
        loop {
            tokio::select! {
                batch = batches.recv() => match batch {
                    Some(batch) => {
                        state.apply(batch, tokio::time::Instant::now().into_std()).await;
                        self.heard.is_newest.store(true, Ordering::Relaxed);
                    }
                    None => return,
                },
                () = state.settle() => {
                    if self.acked.is_some() {
                        // The control plane has said nothing yet that could be answered.
                        continue;
                    }
                }
            }
            // A stream that is over has no use for it; the next begins with one.
            let said = say(self.outbox, FromProxy::Ack(state.ack()), self.silence).await;
            if let (Ok(()), Some(acked)) = (said, self.acked.take()) {
                let _ = acked.send(());
            }
            if state.asks_again()
                && let Some(asks_again) = self.asks_again.take()
            {
                let _ = asks_again.send(());
            }
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
