//! A control plane in this process, and everyone who may call it.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test that can't be set up has failed"
)]

use leeward_control::backup::{BackupSettings, Backups};
use leeward_control::ca::Files;
use leeward_control::kv::{Kv, KvError};
use leeward_control::push::Timing;
use leeward_control::store::{Options, Store};
use leeward_control::{OidcSettings, Policy, Server, serve};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId, channel};
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
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use v1::degradation_service_client::DegradationServiceClient;
use v1::explain_service_client::ExplainServiceClient;
use v1::policy_service_client::PolicyServiceClient;
use v1::push_service_client::PushServiceClient;

/// Longer than anything here takes.
pub const SOON: Duration = Duration::from_secs(20);
pub const DOMAIN: &str = "leeward.test";

type WithReason = Box<dyn FnMut(tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> + Send>;
/// The API as a user with reasons sees it.
pub type ApiOf = PolicyServiceClient<InterceptedService<Channel, WithReason>>;

/// A directory with an authority and whom it has issued; it goes when the test ends.
pub struct Site {
    pub dir: PathBuf,
    pub authority: Authority,
}

/// A control plane that runs.
pub struct Control {
    pub address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

/// A proxy's stream, driven by hand.
pub struct Stream {
    pub out: mpsc::Sender<v1::ProxyMessage>,
    pub messages: tonic::Streaming<v1::ControlMessage>,
}

impl Site {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("leeward-control-{}-{n}", std::process::id()));
        let authority = Authority::create(&dir.join("ca"), DOMAIN).unwrap();
        Self { dir, authority }
    }

    pub fn identity_dir(&self, id: &SpiffeId) -> PathBuf {
        let dir = self.dir.join(id.as_str().replace([':', '/'], "-"));
        if !dir.exists() {
            self.authority.issue(id, Duration::from_secs(3600), &dir).unwrap();
        }
        dir
    }

    pub fn identity(&self, id: &SpiffeId) -> Arc<Identity> {
        Identity::load(self.identity_dir(id)).unwrap()
    }

    pub fn control_id() -> SpiffeId {
        SpiffeId::control(DOMAIN).unwrap()
    }

    pub fn proxy_id(name: &str) -> SpiffeId {
        SpiffeId::proxy(DOMAIN, "a", name).unwrap()
    }

    /// Starts a control plane on the store of a name.
    pub async fn start(&self, store: &str, timing: Timing) -> Control {
        let identity = self.identity(&Self::control_id());
        let store = self.store(store).await;
        Self::start_as(store, timing, identity, None, None).await
    }

    /// The same, on what others may use too.
    pub async fn start_on(&self, kv: Kv) -> Control {
        let identity = self.identity(&Self::control_id());
        let store = Store::open(kv, Options::default()).await.unwrap();
        Self::start_as(store, Timing::DEFAULT, identity, None, None).await
    }

    /// The same, that lets users in by tokens, too.
    pub async fn start_with_tokens(&self, store: &str, oidc: OidcSettings) -> Control {
        let identity = self.identity(&Self::control_id());
        let store = self.store(store).await;
        Self::start_as(store, Timing::DEFAULT, identity, None, Some(oidc)).await
    }

    /// The same, that is the authority, with an intermediate in `authority` and certificates of this life.
    pub async fn start_authority(&self, store: &str, life: Duration) -> Control {
        let mut files = self.authority_files(life);
        let identity = files.identity(&self.dir.join("own")).unwrap();
        let store = self.store(store).await;
        Self::start_as(store, Timing::DEFAULT, identity, Some(files), None).await
    }

    /// The same, on what others may use too, with a certificate of its own in a directory of this name.
    pub async fn start_authority_on(&self, kv: Kv, own: &str, life: Duration) -> Control {
        let mut files = self.authority_files(life);
        let identity = files.identity(&self.dir.join(own)).unwrap();
        let store = Store::open(kv, Options::default()).await.unwrap();
        Self::start_as(store, Timing::DEFAULT, identity, Some(files), None).await
    }

    fn authority_files(&self, life: Duration) -> Files {
        let dir = self.dir.join("authority");
        if !dir.exists() {
            self.authority.intermediate(100 * life, &dir).unwrap();
        }
        Files::open(&dir, life).unwrap()
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

    async fn start_as(
        store: Store,
        timing: Timing,
        identity: Arc<Identity>,
        ca: Option<Files>,
        oidc: Option<OidcSettings>,
    ) -> Control {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let policy = Policy::open(store).await.unwrap();
        policy.store().register(address.to_string());
        let server = Server {
            listener,
            admin: None,
            identity,
            ca,
            backups: Backups::open(policy.clone(), BackupSettings::default()).unwrap(),
            policy,
            oidc,
            registry_auth: None,
            timing,
        };
        let task = tokio::spawn(serve(server, stop.clone()));
        Control { address, stop, task }
    }

    /// The API, as a user sees it.
    pub fn api(&self, address: SocketAddr) -> PolicyServiceClient<Channel> {
        let user = self.identity(&SpiffeId::user(DOMAIN, "ada").unwrap());
        PolicyServiceClient::new(channel::connect_lazy(user, address)).max_decoding_message_size(64 << 20)
    }

    /// A channel of a user.
    pub fn channel(&self, address: SocketAddr, user: &str) -> Channel {
        channel::connect_lazy(self.identity(&Self::user_id(user)), address)
    }

    pub fn user_id(name: &str) -> SpiffeId {
        SpiffeId::user(DOMAIN, name).unwrap()
    }

    /// The API, as another user sees it, with a reason for everything if there is one.
    pub fn api_of(&self, address: SocketAddr, user: &str, reason: Option<&'static str>) -> ApiOf {
        let reason = move |mut request: tonic::Request<()>| {
            if let Some(reason) = reason {
                request
                    .metadata_mut()
                    .insert("leeward-reason", reason.parse().unwrap());
            }
            Ok(request)
        };
        PolicyServiceClient::new(InterceptedService::new(
            self.channel(address, user),
            Box::new(reason),
        ))
    }

    /// Levels and their audit, as the same user sees them.
    pub fn levels(&self, address: SocketAddr) -> DegradationServiceClient<Channel> {
        self.levels_as(address, &SpiffeId::user(DOMAIN, "ada").unwrap())
    }

    /// The same, as somebody else.
    pub fn levels_as(&self, address: SocketAddr, id: &SpiffeId) -> DegradationServiceClient<Channel> {
        DegradationServiceClient::new(channel::connect_lazy(self.identity(id), address))
    }

    /// Explanations and the linter, as somebody sees them.
    pub fn explain_as(&self, address: SocketAddr, id: &SpiffeId) -> ExplainServiceClient<Channel> {
        ExplainServiceClient::new(channel::connect_lazy(self.identity(id), address))
    }

    /// The push, as the proxy of a name in zone a sees it.
    pub fn push(&self, address: SocketAddr, proxy: &str) -> PushServiceClient<Channel> {
        let identity = self.identity(&Self::proxy_id(proxy));
        PushServiceClient::new(channel::connect_lazy(identity, address)).max_decoding_message_size(64 << 20)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Control {
    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(SOON, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

impl Stream {
    /// Opens a stream with this hello.
    pub async fn open(client: &PushServiceClient<Channel>, hello: v1::Hello) -> Result<Self, tonic::Status> {
        let (out, messages) = mpsc::channel(8);
        out.send(from_proxy(v1::proxy_message::Message::Hello(hello)))
            .await
            .unwrap();
        let messages = client.clone().subscribe(ReceiverStream::new(messages)).await?;
        Ok(Self {
            out,
            messages: messages.into_inner(),
        })
    }

    /// The updates up to the next that is complete, acknowledged.
    pub async fn change(&mut self) -> Vec<v1::Update> {
        let mut updates = Vec::new();
        loop {
            let update = self.update().await;
            let (complete, generation) = (update.complete, update.generation);
            updates.push(update);
            if complete {
                self.ack(generation, vec![]).await;
                return updates;
            }
        }
    }

    /// The next update; heartbeats are passed over.
    pub async fn update(&mut self) -> v1::Update {
        loop {
            let message = tokio::time::timeout(SOON, self.messages.message()).await;
            let message = message.unwrap().unwrap().unwrap();
            if let Some(v1::control_message::Message::Update(update)) = message.message {
                return update;
            }
        }
    }

    pub async fn ack(&self, generation: u64, quarantined: Vec<v1::Quarantined>) {
        let ack = v1::Ack {
            generation,
            quarantined,
            ..v1::Ack::default()
        };
        let message = from_proxy(v1::proxy_message::Message::Ack(ack));
        self.out.send(message).await.unwrap();
    }
}

pub fn from_proxy(message: v1::proxy_message::Message) -> v1::ProxyMessage {
    v1::ProxyMessage {
        message: Some(message),
    }
}

/// A first hello of a proxy in zone a.
pub fn hello(proxy: &str) -> v1::Hello {
    v1::Hello {
        proxy: proxy.into(),
        zone: "a".into(),
        version: "test".into(),
        ..v1::Hello::default()
    }
}

/// Asks until the answer is yes.
pub async fn eventually(what: &str, mut is: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + SOON;
    while !is().await {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn yaml(text: &str) -> Vec<v1::Resource> {
    leeward_proto::manifest::parse("test", text).unwrap()
}

pub fn zone(name: &str) -> String {
    format!("apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}}}\nspec: {{}}\n---\n")
}

/// A service of one endpoint in zone a.
pub fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{endpoints: [{{address: \"127.0.0.1:{port}\", zone: a}}]}}\n---\n"
    )
}

pub fn apply(text: &str) -> v1::ApplyRequest {
    v1::ApplyRequest {
        resources: yaml(text),
        dry_run: false,
        ..v1::ApplyRequest::default()
    }
}

pub fn reference(kind: v1::Kind, name: &str) -> v1::ResourceRef {
    v1::ResourceRef {
        kind: kind.into(),
        name: name.into(),
    }
}

pub fn names(updates: &[v1::Update]) -> Vec<&str> {
    let resources = updates.iter().flat_map(|u| &u.upserts);
    resources
        .filter_map(|r| r.metadata.as_ref())
        .map(|m| m.name.as_str())
        .collect()
}
