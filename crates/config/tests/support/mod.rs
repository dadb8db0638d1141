//! A proxy's subscription without the proxy, and control planes to subscribe to: a real one, and one that
//! says what the test says.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test that can't be set up has failed"
)]

use leeward_config::{Live, Settings, StateDir, Status, Subscription, Timing, Warm};
use leeward_control::backup::{BackupSettings, Backups};
use leeward_control::kv::{Kv, KvError};
use leeward_control::store::{Options, Store};
use leeward_control::{Policy, Server, serve};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, channel, tls};
use leeward_policy::model::{Plugin, PluginFrom};
use leeward_policy::{Head, Name, RuleIdx, Viewer};
use leeward_proto::v1;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Streaming};
use tonic_types::{ErrorDetails, StatusExt};
use v1::policy_service_client::PolicyServiceClient;
use v1::push_service_server::{PushService, PushServiceServer};

/// Longer than anything here takes.
const SOON: Duration = Duration::from_secs(20);
const DOMAIN: &str = "leeward.test";

/// Short, so that silence is noticed within a test.
pub const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(100),
    silence: Duration::from_millis(600),
    open: Duration::from_secs(5),
    first_pause: Duration::from_millis(10),
    max_pause: Duration::from_millis(50),
    spread: Duration::from_millis(50),
};
/// How long [`Compiler`] takes over a slow plugin: more than the silence limit.
const SLOW: Duration = Duration::from_millis(1500);

/// A directory with an authority; it goes when the test ends.
pub struct Site {
    dir: PathBuf,
    authority: Authority,
}

impl Site {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("leeward-config-{}-{n}", std::process::id()));
        let authority = Authority::create(&dir.join("ca"), DOMAIN).unwrap();
        Self { dir, authority }
    }

    fn identity(&self, id: &SpiffeId) -> Arc<Identity> {
        let dir = self.dir.join(id.as_str().replace([':', '/'], "-"));
        if !dir.exists() {
            self.authority.issue(id, Duration::from_secs(3600), &dir).unwrap();
        }
        Identity::load(dir).unwrap()
    }

    /// Connections that are about to end may still have it for a moment.
    async fn store(&self, name: &str) -> Store {
        let until = tokio::time::Instant::now() + SOON;
        loop {
            match Kv::sqlite(&self.dir.join(name)) {
                Err(KvError::InUse { .. }) if tokio::time::Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                kv => return Store::open(kv.unwrap(), Options::default()).await.unwrap(),
            }
        }
    }

    /// A real control plane on the store of a name.
    pub async fn control(&self, store: &str, address: Option<SocketAddr>) -> Control {
        let address = address.unwrap_or_else(|| ([127, 0, 0, 1], 0).into());
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let policy = Policy::open(self.store(store).await).await.unwrap();
        let server = Server {
            listener,
            admin: None,
            identity: self.identity(&SpiffeId::control(DOMAIN).unwrap()),
            ca: None,
            backups: Backups::open(policy.clone(), BackupSettings::default()).unwrap(),
            policy,
            oidc: None,
            registry_auth: None,
            timing: leeward_control::push::Timing {
                heartbeat: TIMING.heartbeat,
                silence: TIMING.silence,
                ..leeward_control::push::Timing::DEFAULT
            },
        };
        let user = self.identity(&SpiffeId::user(DOMAIN, "ada").unwrap());
        Control {
            address,
            api: PolicyServiceClient::new(channel::connect_lazy(user, address)),
            task: tokio::spawn(serve(server, stop.clone())),
            stop,
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A real control plane.
pub struct Control {
    pub address: SocketAddr,
    api: PolicyServiceClient<tonic::transport::Channel>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Control {
    pub async fn apply(&self, text: &str) {
        let request = v1::ApplyRequest {
            resources: yaml(text, 0),
            ..v1::ApplyRequest::default()
        };
        self.api.clone().apply(request).await.unwrap();
    }

    /// Waits until it says this of a proxy.
    pub async fn until(&self, what: &str, is: impl Fn(&v1::ProxyStatus) -> bool) {
        let deadline = tokio::time::Instant::now() + SOON;
        loop {
            let proxies = self.api.clone().list_proxies(v1::ListProxiesRequest {}).await;
            let proxies = proxies.unwrap().into_inner().proxies;
            if proxies.iter().any(&is) {
                return;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "never: {what}; {proxies:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Stops it, and gives its address back.
    pub async fn stop(self) -> SocketAddr {
        self.stop.cancel();
        tokio::time::timeout(SOON, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        self.address
    }
}

/// Proxy a1 of zone a, as far as policy goes.
pub struct Proxy {
    pub live: Live,
    task: JoinHandle<()>,
}

/// A request for `/`.
struct Get<'a> {
    host: &'a str,
}

impl Head for Get<'_> {
    fn host(&self) -> &str {
        self.host
    }

    fn path(&self) -> &str {
        "/"
    }

    fn method(&self) -> &str {
        "GET"
    }

    fn any_value(&self, _: &str, _: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        false
    }

    fn allows(&self, _: RuleIdx) -> bool {
        true
    }
}

/// Judges plugins by the names of their files.
struct Compiler;

impl Warm for Compiler {
    async fn warm(&self, _: &Name, plugin: &Plugin) -> Result<(), String> {
        let has = |word| matches!(&plugin.source.from, PluginFrom::File(file) if file.contains(word));
        if has("slow") {
            tokio::time::sleep(SLOW).await;
        }
        match has("bad") {
            true => Err("spec.source.file: not a component".to_owned()),
            false => Ok(()),
        }
    }

    fn retain(&self, _: &[&str]) {}
}

impl Proxy {
    pub fn start(site: &Site, control: &[SocketAddr]) -> Self {
        Self::start_with(site, control, None, TIMING)
    }

    /// The same, with what is kept in a directory, and other times.
    pub fn start_with(site: &Site, control: &[SocketAddr], state: Option<PathBuf>, timing: Timing) -> Self {
        let name = |text| Name::parse(text).unwrap();
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        let live = Live::new(viewer.clone());
        let state = state.map(|state| StateDir::open(state, &viewer).unwrap());
        let settings = Settings {
            viewer,
            control: control.into(),
            version: "test".into(),
            timing,
        };
        let identity = site.identity(&SpiffeId::proxy(DOMAIN, "a", "a1").unwrap());
        let mut subscription = Subscription::new(settings, identity, Arc::new(Compiler), live.clone());
        let task = tokio::spawn(async move {
            let Some(state) = state else {
                return subscription.run().await;
            };
            subscription.keep_in(state.clone()).await;
            tokio::join!(subscription.run(), state.run());
        });
        Self { live, task }
    }

    /// Whether a request to a host finds a route.
    pub fn serves(&self, host: &str) -> bool {
        self.live.snapshot().load().route(&Get { host }).is_some()
    }

    /// Waits until its status is so.
    pub async fn until(&self, what: &str, is: impl Fn(&Status) -> bool) {
        let mut status = self.live.watch();
        let waited = tokio::time::timeout(SOON, status.wait_for(|status| is(status))).await;
        assert!(waited.is_ok(), "never: {what}; {:?}", self.live.status());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A control plane that says what the test says.
pub struct Fake {
    pub address: SocketAddr,
    /// Whether the streams that are taken from now on are kept alive.
    pub heartbeats: bool,
    /// How many of the next streams are refused, and asked to come back after [`BUSY`].
    pub busy: Arc<AtomicU64>,
    streams: mpsc::Receiver<(v1::Hello, Streaming<v1::ProxyMessage>, Outbox)>,
    task: JoinHandle<()>,
}

type Outbox = mpsc::Sender<Result<v1::ControlMessage, tonic::Status>>;

/// One stream of it.
pub struct FakeStream {
    pub hello: v1::Hello,
    incoming: Streaming<v1::ProxyMessage>,
    outbox: Outbox,
    beats: Option<JoinHandle<()>>,
}

/// What a busy [`Fake`] asks for.
pub const BUSY: Duration = Duration::from_millis(400);

struct FakePush(
    mpsc::Sender<(v1::Hello, Streaming<v1::ProxyMessage>, Outbox)>,
    Arc<AtomicU64>,
);

#[tonic::async_trait]
impl PushService for FakePush {
    type SubscribeStream = ReceiverStream<Result<v1::ControlMessage, tonic::Status>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<v1::ProxyMessage>>,
    ) -> Result<Response<Self::SubscribeStream>, tonic::Status> {
        let busy = self
            .1
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if busy.is_ok() {
            let details = ErrorDetails::with_retry_info(Some(BUSY));
            return Err(tonic::Status::with_error_details(
                Code::ResourceExhausted,
                "busy",
                details,
            ));
        }
        let mut incoming = request.into_inner();
        let Some(v1::proxy_message::Message::Hello(hello)) =
            incoming.message().await?.and_then(|m| m.message)
        else {
            return Err(tonic::Status::invalid_argument("no hello"));
        };
        let (outbox, messages) = mpsc::channel(16);
        let _ = self.0.send((hello, incoming, outbox)).await;
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

impl Fake {
    pub async fn start(site: &Site) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (taken, streams) = mpsc::channel(16);
        let busy = Arc::<AtomicU64>::default();
        let refuses = Arc::clone(&busy);
        let identity = site.identity(&SpiffeId::control(DOMAIN).unwrap());
        let incoming = ReceiverStream::new(tls::incoming(listener, identity, &[b"h2"]));
        let task = tokio::spawn(async move {
            let push = PushServiceServer::new(FakePush(taken, refuses));
            let server = tonic::transport::Server::builder().add_service(push);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Self {
            address,
            heartbeats: true,
            busy,
            streams,
            task,
        }
    }

    /// The next stream that a proxy opens.
    pub async fn next(&mut self) -> FakeStream {
        let next = tokio::time::timeout(SOON, self.streams.recv()).await;
        let (hello, incoming, outbox) = next.unwrap().unwrap();
        let beats = self.heartbeats.then(|| {
            let outbox = outbox.clone();
            tokio::spawn(async move {
                let beat = || v1::ControlMessage {
                    message: Some(v1::control_message::Message::Heartbeat(v1::Heartbeat {})),
                };
                while outbox.send(Ok(beat())).await.is_ok() {
                    tokio::time::sleep(TIMING.heartbeat).await;
                }
            })
        });
        FakeStream {
            hello,
            incoming,
            outbox,
            beats,
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeStream {
    pub async fn send(&self, update: v1::Update) {
        self.say(v1::control_message::Message::Update(update)).await;
    }

    pub async fn say(&self, message: v1::control_message::Message) {
        let message = Some(message);
        self.outbox
            .send(Ok(v1::ControlMessage { message }))
            .await
            .unwrap();
    }

    pub async fn send_levels(&self, levels: &[(&str, &str)]) {
        let level = |(policy, level): &(&str, &str)| v1::Level {
            policy: (*policy).to_owned(),
            level: (*level).to_owned(),
            why: "seen".to_owned(),
        };
        let levels = levels.iter().map(level).collect();
        self.say(v1::control_message::Message::Levels(v1::Levels { levels }))
            .await;
    }

    pub async fn message(&mut self) -> v1::proxy_message::Message {
        let message = tokio::time::timeout(SOON, self.incoming.message()).await;
        message.unwrap().unwrap().unwrap().message.unwrap()
    }

    /// The next ack; heartbeats are passed over.
    pub async fn ack(&mut self) -> v1::Ack {
        loop {
            if let v1::proxy_message::Message::Ack(ack) = self.message().await {
                return ack;
            }
        }
    }
}

impl Drop for FakeStream {
    fn drop(&mut self) {
        if let Some(beats) = &self.beats {
            beats.abort();
        }
    }
}

/// Resources at a revision.
pub fn yaml(text: &str, revision: u64) -> Vec<v1::Resource> {
    let mut resources = leeward_proto::manifest::parse("test", text).unwrap();
    for resource in &mut resources {
        resource.metadata.as_mut().unwrap().revision = revision;
    }
    resources
}

fn manifest(kind: &str, name: &str, spec: &str) -> String {
    format!("apiVersion: leeward.dev/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n")
}

pub fn zone(name: &str) -> String {
    manifest("Zone", name, "{}")
}

pub fn service(name: &str, port: u16) -> String {
    manifest(
        "Service",
        name,
        &format!("{{endpoints: [{{address: \"127.0.0.1:{port}\", zone: a}}]}}"),
    )
}

pub fn route(name: &str, host: &str, to: &str) -> String {
    manifest(
        "Route",
        name,
        &format!("{{hostnames: [{host}], rules: [{{backendRefs: [{{service: {to}}}]}}]}}"),
    )
}

pub fn plugin(name: &str, file: &str) -> String {
    manifest(
        "Plugin",
        name,
        &format!("{{kind: Fallback, source: {{file: {file}}}, onFault: Fail}}"),
    )
}
