//! The SPIFFE Workload API: who calls is attested for each answer, and told again when something changes.

use super::Shared;
use super::peer::{Found, Peer};
use super::places::{Place, Places};
use super::stock::{Had, Hold};
use crate::certificates::wall;
use crate::live::Status as Policy;
use leeward_identity::{Bundle, Svid};
use leeward_policy::Name;
use leeward_policy::model::Process;
use leeward_proto::spiffe;
use leeward_proto::spiffe::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tonic::{Code, Request, Response, Status};

/// What every call carries, which a page in a browser can't (SPIFFE Workload Endpoint standard).
const HEADER: &str = "workload.spiffe.io";
/// Calls at once on one connection; more wait.
const CALLS: u32 = 32;
/// Largest message that is taken, in bytes. Those of the methods that there are have nothing in them.
const MAX_ASKED: usize = 16 << 10;
/// How long an answer waits for certificates that aren't there yet.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked at what a process that is told of changes is, whether or not anything is heard to have changed.
const LOOK: Duration = Duration::from_secs(5);
/// Connections past those that there may be, which are told so. Past these, too, they are closed.
const TURNED_AWAY: usize = 64;
/// How long calls may take to end when this process is to.
const GRACE: Duration = Duration::from_secs(2);

/// Serves until stopped.
pub(super) async fn serve(shared: Arc<Shared>, listener: UnixListener, stop: CancellationToken) {
    let (peers, accepted) = mpsc::channel(1);
    // It ends when nobody takes what it accepts.
    tokio::spawn(accept(Arc::clone(&shared), listener, peers, stop.clone()));
    let desk = Desk {
        shared,
        stop: stop.clone(),
        told: Arc::default(),
    };
    let service = SpiffeWorkloadApiServer::new(desk).max_decoding_message_size(MAX_ASKED);
    let serving = tonic::transport::Server::builder()
        .max_concurrent_streams(CALLS)
        .add_service(service)
        .serve_with_incoming_shutdown(ReceiverStream::new(accepted), stop.clone().cancelled_owned());
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => {
            if let Err(error) = ended {
                tracing::error!(%error, "processes of this node are given no certificates any more");
            }
            return;
        }
        () = stop.cancelled() => {}
    }
    // Who hasn't ended by then is cut off.
    drop(tokio::time::timeout(GRACE, serving).await);
}

/// Accepts, at once and always: the later it is, the less is known of who it was.
async fn accept(
    shared: Arc<Shared>,
    listener: UnixListener,
    peers: mpsc::Sender<io::Result<Connection>>,
    stop: CancellationToken,
) {
    let turned_away = Places::new(TURNED_AWAY, TURNED_AWAY);
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            () = peers.closed() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "can't accept a process");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(uid) = stream.peer_cred().map(|credentials| credentials.uid()) else {
            // It is gone.
            continue;
        };
        let (place, caller) = match shared.connections.take(uid) {
            Ok(place) => (
                Ok(place),
                Peer::of(&stream).map_err(|error| Refused::Unattested(error.to_string())),
            ),
            Err(full) => {
                let refused = Refused::Busy(format!("there are connections of {full}"));
                (turned_away.take(uid), Err(refused))
            }
        };
        let Ok(place) = place else {
            tracing::warn!(uid, "a process's connection is closed: there are too many");
            continue;
        };
        let caller = Caller(Arc::new(caller));
        let connection = Connection {
            stream,
            caller,
            _place: place,
        };
        if peers.send(Ok(connection)).await.is_err() {
            return;
        }
    }
}

/// Who is at the other end of a connection; or why nobody there is answered.
#[derive(Clone, Debug)]
struct Caller(Arc<Result<Peer, Refused>>);

/// A connection that knows who has made it.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    caller: Caller,
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Why a call is refused, or ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Refused {
    /// It lacks the metadata that shows that it is no browser's.
    Header,
    /// There are JWT-SVIDs nowhere here.
    Jwt,
    /// There are too many calls, connections or workloads.
    Busy(String),
    /// It isn't known which process calls.
    Unattested(String),
    /// The process is no workload.
    Nobody {
        zone: Name,
        uid: u32,
        cgroup: Option<String>,
    },
    /// The proxy has no policy yet.
    NoPolicy,
    /// There is no certificate, and why.
    NoCertificate(String),
    /// The proxy ends, or is replaced.
    Ending,
}

impl Refused {
    /// The words for them, in metrics.
    pub(super) const WORDS: [&'static str; 8] = [
        "header",
        "jwt",
        "busy",
        "unattested",
        "no_workload",
        "no_policy",
        "no_certificate",
        "ending",
    ];

    /// Where its word stands.
    pub(super) const fn position(&self) -> usize {
        match self {
            Self::Header => 0,
            Self::Jwt => 1,
            Self::Busy(_) => 2,
            Self::Unattested(_) => 3,
            Self::Nobody { .. } => 4,
            Self::NoPolicy => 5,
            Self::NoCertificate(_) => 6,
            Self::Ending => 7,
        }
    }

    /// What the caller is told. Whoever is no workload must hear `PERMISSION_DENIED`, by the standard.
    fn status(&self) -> Status {
        let (code, message) = match self {
            Self::Header => (
                Code::InvalidArgument,
                format!("the metadata {HEADER}: true is missing"),
            ),
            Self::Jwt => (
                Code::Unimplemented,
                "there are no JWT-SVIDs here; X509-SVIDs are by FetchX509SVID".to_owned(),
            ),
            Self::Busy(why) => (Code::ResourceExhausted, format!("{why}; try again later")),
            Self::Unattested(why) => (Code::PermissionDenied, why.clone()),
            Self::Nobody { zone, uid, cgroup } => {
                let group = match cgroup {
                    Some(path) => format!("in the control group {path:?}"),
                    None => "in no control group of version 2 that the kernel tells".to_owned(),
                };
                let why = format!(
                    "no Workload of the zone {zone} that is for this proxy fits this process, which runs as the user {uid} {group}"
                );
                (Code::PermissionDenied, why)
            }
            Self::NoPolicy => (
                Code::Unavailable,
                "the proxy has no policy yet, which says who this process is".to_owned(),
            ),
            Self::NoCertificate(why) => (Code::Unavailable, why.clone()),
            Self::Ending => (
                Code::Unavailable,
                "the proxy ends, or another takes its place; connect again".to_owned(),
            ),
        };
        Status::new(code, message)
    }
}

/// Answers calls.
#[derive(Clone, Debug)]
struct Desk {
    shared: Arc<Shared>,
    stop: CancellationToken,
    /// The second in which a refusal was last told in the log: anybody can be refused as often as he likes.
    told: Arc<AtomicU64>,
}

/// A call that is answered more than once.
struct Session {
    desk: Desk,
    caller: Caller,
    policy: watch::Receiver<Policy>,
    svids: watch::Receiver<u64>,
    roots: watch::Receiver<u64>,
    hold: Option<Hold>,
    _place: Place,
}

/// What a call answers.
trait Answer: 'static {
    type Message: Clone + PartialEq + Send + 'static;

    fn answer(session: &mut Session) -> impl Future<Output = Result<Self::Message, Refused>> + Send;
}

/// The certificates of a process.
struct Svids;
/// The roots for it.
struct Bundles;

impl Answer for Svids {
    type Message = spiffe::X509svidResponse;

    async fn answer(session: &mut Session) -> Result<Self::Message, Refused> {
        let until = Instant::now() + PATIENCE;
        let stop = session.desk.stop.clone();
        loop {
            session.mark_unchanged();
            let names = session.names()?;
            session.want(&names)?;
            let had = session.desk.shared.stock.have(&names, wall());
            if !had.pending.is_empty() && Instant::now() < until {
                tokio::select! {
                    () = session.changed() => {}
                    () = tokio::time::sleep_until(until) => {}
                    () = stop.cancelled() => return Err(Refused::Ending),
                }
                continue;
            }
            return if had.svids.is_empty() {
                Err(Refused::NoCertificate(why_none(&had)))
            } else {
                Ok(response(&had, &session.desk.shared.identity.bundle()))
            };
        }
    }
}

impl Answer for Bundles {
    type Message = spiffe::X509BundlesResponse;

    async fn answer(session: &mut Session) -> Result<Self::Message, Refused> {
        session.mark_unchanged();
        // Roots are no secret, but whoever is no workload has no use for them.
        session.names()?;
        let identity = &session.desk.shared.identity;
        let domain = format!("spiffe://{}", identity.id().trust_domain());
        Ok(spiffe::X509BundlesResponse {
            crl: Vec::new(),
            bundles: [(domain, der(&identity.bundle()))].into(),
        })
    }
}

impl Desk {
    /// Begins a call that is answered until something ends it.
    async fn open<A: Answer, T>(
        &self,
        request: &Request<T>,
    ) -> Result<Response<ReceiverStream<Result<A::Message, Status>>>, Status> {
        let begun = async {
            let mut session = self.session(request)?;
            let first = A::answer(&mut session).await?;
            Ok::<_, Refused>((session, first))
        };
        let (session, first) = begun.await.map_err(|refused| self.refuse(&refused))?;
        session.tell();
        let (send, receive) = mpsc::channel(1);
        // Its owner is the receiver: it ends when that is dropped.
        tokio::spawn(session.follow::<A>(first, send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    fn session<T>(&self, request: &Request<T>) -> Result<Session, Refused> {
        check_header(request)?;
        let caller = request.extensions().get::<Caller>().cloned();
        let caller =
            caller.ok_or_else(|| Refused::Unattested("the connection is none of a process's".into()))?;
        let peer = (*caller.0).as_ref().map_err(Clone::clone)?;
        let place = self.shared.streams.take(peer.uid());
        let place = place.map_err(|full| Refused::Busy(format!("there are calls of {full}")))?;
        Ok(Session {
            policy: self.shared.live.watch(),
            svids: self.shared.stock.changes(),
            roots: self.shared.identity.changes(),
            desk: self.clone(),
            caller,
            hold: None,
            _place: place,
        })
    }

    /// Counts a refusal, and says so in the log, once a second at most.
    fn refuse(&self, refused: &Refused) -> Status {
        self.shared.counts.refused(refused);
        let status = refused.status();
        let second = wall()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        if self.told.swap(second, Ordering::Relaxed) != second {
            let reason = status.message();
            tracing::warn!(code = ?status.code(), reason, "a process is given no certificates");
        }
        status
    }
}

/// Refuses what a page in a browser could send.
fn check_header<T>(request: &Request<T>) -> Result<(), Refused> {
    let mut values = request.metadata().get_all(HEADER).iter();
    match (values.next(), values.next()) {
        (Some(value), None) if value.as_bytes() == b"true" => Ok(()),
        _ => Err(Refused::Header),
    }
}

impl Session {
    /// What the process is found to be now.
    fn look(&self) -> Result<Found, Refused> {
        let peer = (*self.caller.0).as_ref().map_err(Clone::clone)?;
        peer.look()
            .map_err(|error| Refused::Unattested(error.to_string()))
    }

    /// The workloads that it is now, at least one.
    fn names(&self) -> Result<Vec<Name>, Refused> {
        let found = self.look()?;
        if self.policy.borrow().generation.is_none() {
            return Err(Refused::NoPolicy);
        }
        let snapshot = self.desk.shared.live.snapshot().load();
        let process = Process {
            uid: found.uid,
            cgroup: found.cgroup.as_deref(),
        };
        let names = snapshot.workloads().of(&process);
        if names.is_empty() {
            return Err(Refused::Nobody {
                zone: snapshot.viewer.zone.clone(),
                uid: found.uid,
                cgroup: found.cgroup,
            });
        }
        Ok(names)
    }

    /// Has certificates of these kept for as long as the call lasts, and of no others.
    fn want(&mut self, names: &[Name]) -> Result<(), Refused> {
        if self.hold.as_ref().is_some_and(|hold| hold.is_of(names)) {
            return Ok(());
        }
        let hold = self.desk.shared.stock.hold(names, fastrand::f64);
        self.hold = Some(hold.map_err(|error| Refused::Busy(error.to_string()))?);
        Ok(())
    }

    fn mark_unchanged(&mut self) {
        self.policy.mark_unchanged();
        self.svids.mark_unchanged();
        self.roots.mark_unchanged();
    }

    /// Waits until the answer may be another. Cancel-safe.
    async fn changed(&mut self) {
        tokio::select! {
            // Whoever sends these lives as long as the process.
            Ok(()) = self.policy.changed() => {}
            Ok(()) = self.svids.changed() => {}
            Ok(()) = self.roots.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }

    /// Says in the log who is given what.
    fn tell(&self) {
        if let (Ok(found), Ok(names)) = (self.look(), self.names()) {
            let names: Vec<&str> = names.iter().map(Name::as_str).collect();
            tracing::info!(
                pid = found.pid,
                uid = found.uid,
                cgroup = found.cgroup,
                workloads = ?names,
                "audit: a process is told what it is"
            );
        }
    }

    /// Answers again whenever the answer is another, until the caller has gone, or is no more what it was.
    async fn follow<A: Answer>(mut self, first: A::Message, send: mpsc::Sender<Result<A::Message, Status>>) {
        let stop = self.desk.stop.clone();
        let mut last = first.clone();
        // Whoever doesn't take the first waits for no other.
        drop(send.send(Ok(first)).await);
        loop {
            let answer = tokio::select! {
                () = send.closed() => return,
                () = stop.cancelled() => Err(Refused::Ending),
                () = self.changed() => A::answer(&mut self).await,
            };
            match answer {
                Ok(next) if next == last => {}
                Ok(next) => {
                    last = next.clone();
                    drop(send.send(Ok(next)).await);
                }
                Err(refused) => {
                    let status = self.desk.refuse(&refused);
                    drop(send.send(Err(status)).await);
                    return;
                }
            }
        }
    }
}

/// Why a process gets none of the certificates that it may have.
fn why_none(had: &Had) -> String {
    let refused = had.refused.iter().map(|(name, failed)| (name, Some(failed)));
    let pending = had.pending.iter().map(|(name, failed)| (name, failed.as_ref()));
    let each = refused.chain(pending).map(|(name, failed)| match failed {
        Some(failed) => format!("{name}: {}: {}", failed.renewal.as_str(), failed.reason),
        None => format!("{name}: the control plane has not answered within {PATIENCE:?}"),
    });
    let each: Vec<String> = each.take(SHOWN).collect();
    format!(
        "there is no certificate for this process that is good: {}",
        each.join("; ")
    )
}

/// Workloads that an error names.
const SHOWN: usize = 8;

fn response(had: &Had, bundle: &Bundle) -> spiffe::X509svidResponse {
    let bundle = der(bundle);
    let svid = |(name, svid): &(Name, Arc<Svid>)| spiffe::X509svid {
        spiffe_id: svid.id().to_string(),
        x509_svid: svid.chain(),
        x509_svid_key: svid.key().to_vec(),
        bundle: bundle.clone(),
        hint: name.to_string(),
    };
    spiffe::X509svidResponse {
        svids: had.svids.iter().map(svid).collect(),
        ..spiffe::X509svidResponse::default()
    }
}

/// The roots, one after the other.
fn der(bundle: &Bundle) -> Vec<u8> {
    bundle
        .roots()
        .iter()
        .flat_map(|root| root.cert.iter().copied())
        .collect()
}

type Outgoing<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Desk {
    type FetchX509SVIDStream = Outgoing<spiffe::X509svidResponse>;
    type FetchX509BundlesStream = Outgoing<spiffe::X509BundlesResponse>;
    type FetchJWTBundlesStream = Outgoing<spiffe::JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<spiffe::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.open::<Svids, _>(&request).await
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<spiffe::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.open::<Bundles, _>(&request).await
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<spiffe::JwtsvidRequest>,
    ) -> Result<Response<spiffe::JwtsvidResponse>, Status> {
        Err(self.no_jwt(&request))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<spiffe::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Err(self.no_jwt(&request))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<spiffe::ValidateJwtsvidRequest>,
    ) -> Result<Response<spiffe::ValidateJwtsvidResponse>, Status> {
        Err(self.no_jwt(&request))
    }
}

impl Desk {
    fn no_jwt<T>(&self, request: &Request<T>) -> Status {
        let refused = check_header(request).err().unwrap_or(Refused::Jwt);
        self.refuse(&refused)
    }
}
