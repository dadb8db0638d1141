//! A trust domain, a server that answers in different ways, and what waits for things.

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use leeward_identity::authority::Authority;
use leeward_identity::{Identity, SpiffeId};
use leeward_zone::{
    BoxError, Caller, Client, Code, Congestion, ConnectError, Exchange, Link, Reports, Server, ServerLink,
    bind,
};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, LocalSet};

pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let within = Duration::from_secs(60);
    LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(within, test)
            .await
            .expect("done in a minute");
    });
}

pub(crate) async fn wait_for(mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within five seconds");
}

/// An authority and the identities that it issues, in a directory that is removed in the end.
pub(crate) struct Domain {
    root: PathBuf,
    authority: Authority,
}

const LIFE: Duration = Duration::from_secs(3600);

impl Domain {
    pub(crate) fn new() -> Self {
        Self::named("leeward.local")
    }

    pub(crate) fn named(name: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("leeward-zone-{}-{number}", std::process::id()));
        let authority = Authority::create(&root.join("ca"), name).unwrap();
        Self { root, authority }
    }

    pub(crate) fn id(&self, proxy: &str) -> SpiffeId {
        SpiffeId::proxy(self.authority.domain(), "z", proxy).unwrap()
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn issue_to(&self, proxy: &str, dir: &Path) {
        self.authority.issue(&self.id(proxy), LIFE, dir).unwrap();
    }

    pub(crate) fn identity(&self, proxy: &str) -> Arc<Identity> {
        let dir = self.dir(proxy);
        self.issue_to(proxy, &dir);
        Identity::load(dir).unwrap()
    }

    pub(crate) fn user(&self, name: &str) -> Arc<Identity> {
        let dir = self.dir(name);
        let id = SpiffeId::user(self.authority.domain(), name).unwrap();
        self.authority.issue(&id, LIFE, &dir).unwrap();
        Identity::load(dir).unwrap()
    }

    pub(crate) fn workload(&self, name: &str) -> Arc<Identity> {
        let dir = self.dir(name);
        let id = SpiffeId::workload(self.authority.domain(), "z", name).unwrap();
        self.authority.issue(&id, LIFE, &dir).unwrap();
        Identity::load(dir).unwrap()
    }

    /// One of this domain that believes another's authority.
    pub(crate) fn identity_with_bundle_of(&self, proxy: &str, other: &Self) -> Arc<Identity> {
        let dir = self.dir("forged");
        // The id is of the other domain, the signature of this one's authority.
        self.issue_to(proxy, &dir);
        std::fs::copy(other.dir("ca").join("ca.pem"), dir.join("bundle.pem")).unwrap();
        Identity::load(dir).unwrap()
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// How a server answers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answers {
    /// With what it got.
    Echo,
    /// Never.
    Never,
    /// To `/quick` only; of others it keeps the body and doesn't read it.
    Stuck,
    /// 403, without reading.
    Early,
    /// Without an end.
    Endless,
    /// Refuses.
    Refuse,
    /// Gives up at once.
    Reset(Code),
    /// Begins, and fails.
    BreakOff,
}

pub(crate) struct Served {
    pub(crate) address: SocketAddr,
    pub(crate) id: SpiffeId,
    pub(crate) connections: Rc<Cell<usize>>,
    pub(crate) under_way: Rc<Cell<usize>>,
    pub(crate) cancelled: Rc<Cell<usize>>,
    pub(crate) answered: Rc<Cell<u64>>,
    pub(crate) health: watch::Sender<Arc<Reports>>,
    leave: Rc<Notify>,
    clients: RefCell<Vec<Client>>,
}

pub(crate) async fn server(domain: &Domain, name: &str, answers: Answers) -> Served {
    let socket = bind(SocketAddr::from(([127, 0, 0, 1], 0)), 1).unwrap().remove(0);
    let (health, reports) = watch::channel(Arc::default());
    let server = Server::new(
        socket,
        domain.identity(name),
        Some(reports),
        Congestion::default(),
    )
    .unwrap();
    let address = server.local_addr().unwrap();
    let connections = Rc::<Cell<usize>>::default();
    let under_way = Rc::<Cell<usize>>::default();
    let cancelled = Rc::<Cell<usize>>::default();
    let answered = Rc::<Cell<u64>>::default();
    let leave = Rc::<Notify>::default();
    {
        let (connections, leave) = (Rc::clone(&connections), Rc::clone(&leave));
        let counts = Counts {
            under_way: Rc::clone(&under_way),
            cancelled: Rc::clone(&cancelled),
            answered: Rc::clone(&answered),
        };
        tokio::task::spawn_local(async move {
            while let Some(arriving) = server.accept().await {
                let counts = counts.clone();
                let (connections, leave) = (Rc::clone(&connections), Rc::clone(&leave));
                tokio::task::spawn_local(async move {
                    let Ok(link) = arriving.handshake().await else {
                        return;
                    };
                    connections.set(connections.get() + 1);
                    serve(link, answers, counts, leave).await;
                    connections.set(connections.get() - 1);
                });
            }
        });
    }
    Served {
        address,
        id: domain.id(name),
        connections,
        under_way,
        cancelled,
        answered,
        health,
        leave,
        clients: RefCell::default(),
    }
}

impl Served {
    pub(crate) async fn link(&self, domain: &Domain, name: &str) -> Link {
        self.link_at(domain, name, self.address).await
    }

    pub(crate) fn go_away(&self) {
        self.leave.notify_waiters();
    }

    /// A link whose packets go by another address.
    pub(crate) async fn link_at(&self, domain: &Domain, name: &str, to: SocketAddr) -> Link {
        let client = Client::new(domain.identity(name), Congestion::default());
        let link = client.connect(to, &self.id).await.unwrap();
        self.clients.borrow_mut().push(client);
        link
    }
}

async fn serve(link: ServerLink, answers: Answers, counts: Counts, leave: Rc<Notify>) {
    let mut silent = std::pin::pin!(link.silent_for(Duration::from_secs(1)));
    let mut leaving = false;
    loop {
        tokio::select! {
            exchange = link.accept() => {
                let Some(exchange) = exchange else { return };
                tokio::task::spawn_local(one(exchange, answers, link.peer().clone(), counts.clone()));
            }
            () = leave.notified() => {
                link.go_away();
                leaving = true;
            }
            () = silent.as_mut(), if leaving => return,
        }
    }
}

type Made = Pin<Box<dyn Body<Data = Bytes, Error = BoxError>>>;

/// Requests that have come: those under way, those that were not answered to the end, and the others.
#[derive(Clone)]
struct Counts {
    under_way: Rc<Cell<usize>>,
    cancelled: Rc<Cell<usize>>,
    answered: Rc<Cell<u64>>,
}

/// Counts one of them.
struct Counting {
    counts: Counts,
    done: bool,
}

impl Drop for Counting {
    fn drop(&mut self) {
        let Counts {
            under_way,
            cancelled,
            answered,
        } = &self.counts;
        under_way.set(under_way.get() - 1);
        if self.done {
            answered.set(answered.get() + 1);
        } else {
            cancelled.set(cancelled.get() + 1);
        }
    }
}

async fn one(exchange: Exchange, answers: Answers, peer: Caller, counts: Counts) {
    let Ok((request, responder)) = exchange.read().await else {
        return;
    };
    counts.under_way.set(counts.under_way.get() + 1);
    let mut counting = Counting { counts, done: false };
    if let Answers::Refuse = answers {
        counting.done = true;
        return responder.refuse();
    }
    if let Answers::Reset(code) = answers {
        return responder.reset(code);
    }
    let make = async move {
        let quick = request.uri().path() == "/quick";
        let full = |text: &'static str| {
            let body: Made = Box::pin(Full::from(text).map_err(|never| match never {}));
            body
        };
        match answers {
            Answers::Never => std::future::pending().await,
            Answers::Stuck if !quick => {
                let _request = request;
                std::future::pending().await
            }
            Answers::Early => {
                let mut response = Response::new(full("no"));
                *response.status_mut() = StatusCode::FORBIDDEN;
                response
            }
            Answers::Endless => {
                let frames = std::iter::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[7; 1000]))));
                Response::new(Box::pin(StreamBody::new(futures_util::stream::iter(frames))) as Made)
            }
            Answers::BreakOff => {
                let frames = [
                    Ok(Frame::data(Bytes::from_static(b"some"))),
                    Err(BoxError::from("broke off")),
                ];
                Response::new(Box::pin(StreamBody::new(futures_util::stream::iter(frames))) as Made)
            }
            Answers::Echo | Answers::Stuck | Answers::Refuse | Answers::Reset(_) => {
                let (parts, body) = request.into_parts();
                let mut response = Response::new(Box::pin(body.map_err(BoxError::from)) as Made);
                let headers = response.headers_mut();
                *headers = parts.headers;
                headers.insert("x-method", parts.method.as_str().parse().unwrap());
                headers.insert("x-target", parts.uri.to_string().parse().unwrap());
                headers.insert("x-peer", peer.id.as_str().parse().unwrap());
                response
            }
        }
    };
    let mut make = std::pin::pin!(make);
    let Ok(answer) = responder.unless_stopped(make.as_mut()).await else {
        return;
    };
    counting.done = responder.respond(answer).await.is_ok();
}

/// A body that is sent from elsewhere.
#[derive(Debug)]
pub(crate) struct Channel(mpsc::UnboundedReceiver<Bytes>);

pub(crate) fn channel() -> (mpsc::UnboundedSender<Bytes>, Channel) {
    let (tx, rx) = mpsc::unbounded_channel();
    (tx, Channel(rx))
}

impl Body for Channel {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.0
            .poll_recv(cx)
            .map(|next| next.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// The server doesn't take this client, and says so by closing.
pub(crate) async fn not_welcome(connected: Result<Link, ConnectError>) {
    // TLS 1.3: the client is done before the server has seen its certificate.
    if let Ok(link) = connected {
        let lost = tokio::time::timeout(Duration::from_secs(2), link.closed()).await;
        assert!(!lost.expect("closed").is_silence());
        assert!(!link.is_usable());
    }
}

/// Passes packets on between one client and a server, until it is cut.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    passing: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        back.connect(server).await.unwrap();
        let address = front.local_addr().unwrap();
        let passing = tokio::task::spawn_local(async move {
            let mut client = None;
            let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
            loop {
                tokio::select! {
                    Ok((n, from)) = front.recv_from(&mut there) => {
                        client = Some(from);
                        back.send(&there[..n]).await.unwrap();
                    }
                    Ok(n) = back.recv(&mut here) => {
                        if let Some(client) = client {
                            front.send_to(&here[..n], client).await.unwrap();
                        }
                    }
                }
            }
        });
        Self { address, passing }
    }

    /// From now on nothing passes.
    pub(crate) fn cut(&self) {
        self.passing.abort();
    }
}

/// Believes any server.
#[derive(Debug)]
pub(crate) struct Anyone(pub(crate) Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
