//! The members of a cluster, and which of them is asked.

use crate::kv::KvError;
use hyper_util::rt::TokioIo;
use std::error::Error as _;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};

/// Endpoints there may be.
const MAX_ENDPOINTS: usize = 32;
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(2);
/// Longest wait for an answer of one member.
const ANSWER: Duration = Duration::from_secs(4);
/// Longest wait for an answer of any.
const IN_ALL: Duration = Duration::from_secs(10);
/// How often a silent member is asked whether it is there, and how long it may take to say so.
const PING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(5));
/// Longest pause between two tries, once all members have been tried; a random part of it.
const PAUSE: Duration = Duration::from_millis(500);

/// Where a cluster is, and how to come there.
#[derive(Clone, Debug, Default)]
pub struct EtcdSettings {
    /// `https://HOST:PORT`, or `http://HOST:PORT` on this host.
    pub endpoints: Vec<String>,
    /// What every key begins with.
    pub prefix: String,
    /// A file with the certificates, as PEM, that the members' certificates lead to.
    pub ca: Option<PathBuf>,
    /// Files with the certificate and the key, as PEM, that the members know us by.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Allows `http` to other hosts: whoever is on the way reads and changes everything.
    pub allow_plaintext: bool,
}

/// One member.
#[derive(Debug)]
struct Member {
    url: String,
    channel: Channel,
}

#[derive(Debug)]
pub(super) struct Endpoints {
    first: Member,
    others: Vec<Member>,
    /// The one that is asked.
    current: AtomicUsize,
}

/// How a call failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: Code,
    error: KvError,
}

impl From<Failure> for KvError {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

/// What a failure means.
enum Kind {
    /// It was not done, and another member may do it.
    Undone,
    /// It may have been done, and another member may be asked.
    Unknown,
    /// It was not done, and no member will do it.
    Refused,
}

impl Endpoints {
    pub(super) fn new(settings: EtcdSettings) -> Result<Self, KvError> {
        let count = settings.endpoints.len();
        if count == 0 || count > MAX_ENDPOINTS {
            let reason = format!("{count} endpoints; want 1 to {MAX_ENDPOINTS}");
            return Err(bad("--etcd-endpoints", reason));
        }
        let mut tls = None;
        let mut members = Vec::with_capacity(count);
        for url in &settings.endpoints {
            let wrong = |why: &str| bad(url, format!("{why}; want https://HOST:PORT"));
            let uri: Uri = url
                .parse()
                .map_err(|error| bad(url, format!("{error}; want https://HOST:PORT")))?;
            let host = uri.host().ok_or_else(|| wrong("has no host"))?;
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            let port = uri.port_u16().ok_or_else(|| wrong("has no port"))?;
            let config = match uri.scheme_str() {
                Some("https") => {
                    if tls.is_none() {
                        tls = Some(config(&settings)?);
                    }
                    tls.clone()
                }
                Some("http") => {
                    let is_here =
                        host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
                    if !is_here && !settings.allow_plaintext {
                        return Err(wrong("is another host, and http has no protection on the way"));
                    }
                    None
                }
                Some(_) | None => return Err(wrong("is neither https nor http")),
            };
            let channel = Endpoint::from(uri)
                .connect_timeout(CONNECT)
                .http2_keep_alive_interval(PING.0)
                .keep_alive_timeout(PING.1)
                .keep_alive_while_idle(true)
                .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                    connect(host.clone(), port, config.clone())
                }));
            members.push(Member {
                url: url.clone(),
                channel,
            });
        }
        // Control planes that start together don't all go to the first.
        let current = AtomicUsize::new(fastrand::usize(..members.len()));
        let mut members = members.into_iter();
        let first = members
            .next()
            .ok_or_else(|| bad("--etcd-endpoints", "are missing".to_owned()))?;
        let others = members.collect();
        Ok(Self {
            first,
            others,
            current,
        })
    }

    fn len(&self) -> usize {
        1 + self.others.len()
    }

    fn at(&self, place: usize) -> &Member {
        let other = place.checked_sub(1).and_then(|place| self.others.get(place));
        other.unwrap_or(&self.first)
    }

    /// The one that is asked now, with its place.
    pub(super) fn current(&self) -> (usize, Channel) {
        // Relaxed: any value is good.
        let place = self.current.load(Ordering::Relaxed);
        (place, self.at(place).channel.clone())
    }

    /// Another is asked from now on, if this one is still the one.
    pub(super) fn next(&self, place: usize) {
        let next = (place + 1) % self.len();
        // Another caller that has gone on already is not gone back from.
        let _ = self
            .current
            .compare_exchange(place, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(super) fn url(&self, place: usize) -> String {
        self.at(place).url.clone()
    }

    /// Asks what may be asked twice.
    pub(super) async fn read<T, F>(
        &self,
        act: &'static str,
        ask: impl FnMut(Channel) -> F,
    ) -> Result<T, KvError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        Ok(self.call(act, true, ask).await?)
    }

    /// Asks what must not be done twice.
    pub(super) async fn write<T, F>(
        &self,
        act: &'static str,
        ask: impl FnMut(Channel) -> F,
    ) -> Result<T, KvError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        Ok(self.call(act, false, ask).await?)
    }

    pub(super) async fn call<T, F>(
        &self,
        act: &'static str,
        is_repeatable: bool,
        mut ask: impl FnMut(Channel) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let until = Instant::now() + IN_ALL;
        let mut tries = 0;
        loop {
            let (place, channel) = self.current();
            let status = match tokio::time::timeout(ANSWER, ask(channel)).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {ANSWER:?}")),
            };
            tries += 1;
            let url = self.url(place);
            let kind = kind(&status);
            tracing::debug!(endpoint = url, act, %status, "etcd failed");
            if !matches!(kind, Kind::Refused) {
                self.next(place);
            }
            let again = match kind {
                Kind::Refused => false,
                Kind::Undone => true,
                Kind::Unknown => is_repeatable,
            };
            if !again || Instant::now() >= until {
                return Err(failure(act, url, &status, &kind, is_repeatable));
            }
            // Once round, a little pause: all of them at once is most often an election.
            if tries % self.len() == 0 {
                tokio::time::sleep(PAUSE.mul_f64(0.1 + 0.9 * fastrand::f64())).await;
            }
        }
    }
}

fn kind(status: &Status) -> Kind {
    let message = status.message();
    match status.code() {
        // A member that knows that it has no leader, or too much to do, has not passed it on.
        Code::Unavailable if message.contains("etcdserver: no leader") => Kind::Undone,
        Code::Unavailable if never_left(status) => Kind::Undone,
        Code::ResourceExhausted if message.contains("too many requests") => Kind::Undone,
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::Unknown
        | Code::Internal
        | Code::Aborted => Kind::Unknown,
        Code::Ok
        | Code::ResourceExhausted
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => Kind::Refused,
    }
}

/// Whether there was no connection to send it on.
fn never_left(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

fn failure(act: &'static str, place: String, status: &Status, kind: &Kind, is_repeatable: bool) -> Failure {
    let mut reason = status.message().to_owned();
    let mut source = status.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !reason.contains(&text) {
            reason = format!("{reason}: {text}");
        }
        source = cause.source();
    }
    let error = match kind {
        // A read that was asked for twice has written nothing, whatever came of it.
        Kind::Undone => KvError::Unavailable { place, reason },
        Kind::Unknown if is_repeatable => KvError::Unavailable { place, reason },
        Kind::Unknown => KvError::Unknown { place, reason },
        Kind::Refused if status.code() == Code::ResourceExhausted => KvError::Full { place, reason },
        Kind::Refused => KvError::Failed { place, act, reason },
    };
    Failure {
        code: status.code(),
        error,
    }
}

fn bad(what: &str, reason: String) -> KvError {
    KvError::Failed {
        place: what.to_owned(),
        act: "be an endpoint of etcd",
        reason,
    }
}

fn config(settings: &EtcdSettings) -> Result<Arc<ClientConfig>, KvError> {
    let Some(ca) = &settings.ca else {
        return Err(bad(
            "--etcd-ca",
            "is missing: https needs the certificates that the members' lead to".to_owned(),
        ));
    };
    let mut roots = RootCertStore::empty();
    for root in certificates(ca)? {
        roots.add(root).map_err(|error| bad_file(ca, &error))?;
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let mut config = match &settings.identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let parsed = PrivateKeyDer::from_pem_file(key).map_err(|error| bad_file(key, &error))?;
            builder
                .with_client_auth_cert(certificates(chain)?, parsed)
                .map_err(|error| bad_file(chain, &error))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, KvError> {
    let read = CertificateDer::pem_file_iter(file).map_err(|error| bad_file(file, &error))?;
    let read: Result<Vec<_>, _> = read.collect();
    let read = read.map_err(|error| bad_file(file, &error))?;
    if read.is_empty() {
        return Err(bad_file(file, &"has no certificate"));
    }
    Ok(read)
}

fn bad_file(file: &Path, error: &dyn std::fmt::Display) -> KvError {
    KvError::Directory {
        path: file.to_owned(),
        reason: error.to_string(),
    }
}

/// A way to a member, with or without TLS.
trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}

async fn connect(
    host: String,
    port: u16,
    tls: Option<Arc<ClientConfig>>,
) -> io::Result<TokioIo<Box<dyn Stream>>> {
    let stream = TcpStream::connect((host.as_str(), port)).await?;
    stream.set_nodelay(true)?;
    let stream: Box<dyn Stream> = match tls {
        None => Box::new(stream),
        Some(config) => {
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            Box::new(TlsConnector::from(config).connect(name, stream).await?)
        }
    };
    Ok(TokioIo::new(stream))
}
