//! A server that answers as a test wants, plain or as a proxy of the mesh.

use super::*;
use http::Request;
use http_body_util::combinators::BoxBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

type Body = BoxBody<Bytes, Infallible>;

/// What the server does with a request.
pub(super) enum Reply {
    Now(Box<Response<Body>>),
    /// 200 after a while.
    Slow(Duration),
    Never,
}

impl Reply {
    pub(super) fn now(answer: Response<Body>) -> Self {
        Self::Now(Box::new(answer))
    }
}

/// This status and no body.
pub(super) fn status(status: u16) -> Reply {
    let answer = Response::builder().status(status);
    Reply::now(answer.body(Full::default().boxed()).unwrap())
}

/// A request as it came.
#[derive(Clone)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) host: String,
    pub(super) version: Version,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// The n-th request, from 0, and its answer.
type Answer = dyn Fn(usize, &Seen) -> Reply + Send + Sync;

struct State {
    answer: Box<Answer>,
    connections: AtomicUsize,
    open: watch::Sender<usize>,
    requests: watch::Sender<usize>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    last: Mutex<Option<Seen>>,
}

pub(super) struct Server {
    pub(super) address: SocketAddr,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

/// What the server speaks.
#[derive(Clone)]
enum Speaks {
    Plain(Protocol),
    Tls(TlsAcceptor),
}

impl Server {
    /// One that speaks this protocol and no other.
    pub(super) async fn start(
        protocol: Protocol,
        answer: impl Fn(usize, &Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::listen(Speaks::Plain(protocol), Box::new(answer)).await
    }

    /// One that speaks what is agreed on in TLS, to proxies only.
    pub(super) async fn start_tls(
        identity: &Identity,
        answer: impl Fn(usize, &Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let config = identity.server_config(&[b"h2", b"http/1.1"]).unwrap();
        Self::listen(Speaks::Tls(config.into()), Box::new(answer)).await
    }

    async fn listen(speaks: Speaks, answer: Box<Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            answer,
            connections: AtomicUsize::new(0),
            open: watch::Sender::new(0),
            requests: watch::Sender::new(0),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            last: Mutex::new(None),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, speaks, Arc::clone(&state)));
        Self {
            address,
            state,
            _tasks: tasks,
        }
    }

    /// Connections so far.
    pub(super) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Requests so far.
    pub(super) fn requests(&self) -> usize {
        *self.state.requests.borrow()
    }

    /// Most requests that were under way at the same time.
    pub(super) fn most_at_once(&self) -> usize {
        self.state.most_at_once.load(Ordering::SeqCst)
    }

    /// The last request.
    pub(super) fn last(&self) -> Seen {
        self.state.last.lock().unwrap().clone().unwrap()
    }

    /// Waits for so many requests.
    pub(super) async fn asked(&self, requests: usize) {
        let mut seen = self.state.requests.subscribe();
        let waiting = seen.wait_for(|&n| n >= requests);
        tokio::time::timeout(LONG, waiting).await.unwrap().unwrap();
    }

    /// Waits until no connection is open.
    pub(super) async fn left(&self) {
        let mut open = self.state.open.subscribe();
        let waiting = open.wait_for(|&n| n == 0);
        tokio::time::timeout(LONG, waiting).await.unwrap().unwrap();
    }
}

async fn accept(listener: TcpListener, speaks: Speaks, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (speaks, state) = (speaks.clone(), Arc::clone(&state));
        state.connections.fetch_add(1, Ordering::Relaxed);
        state.open.send_modify(|n| *n += 1);
        connections.spawn(async move {
            match speaks {
                Speaks::Plain(protocol) => serve(stream, protocol, &state).await,
                Speaks::Tls(acceptor) => {
                    // Those who are refused here are what some tests want.
                    if let Ok(stream) = acceptor.accept(stream).await {
                        let protocol = match stream.get_ref().1.alpn_protocol() {
                            Some(b"h2") => Protocol::Http2,
                            Some(b"http/1.1") => Protocol::Http1,
                            other => panic!("{other:?}"),
                        };
                        serve(stream, protocol, &state).await;
                    }
                }
            }
            state.open.send_modify(|n| *n -= 1);
        });
    }
}

async fn serve<T>(stream: T, protocol: Protocol, state: &Arc<State>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request| {
        let state = Arc::clone(state);
        async move { Ok::<_, Infallible>(respond(request, &state).await) }
    });
    let io = TokioIo::new(stream);
    match protocol {
        Protocol::Http1 | Protocol::Tcp => {
            let serving = hyper::server::conn::http1::Builder::new().serve_connection(io, service);
            drop(serving.await);
        }
        Protocol::Http2 => {
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            drop(builder.serve_connection(io, service).await);
        }
    }
}

async fn respond(request: Request<Incoming>, state: &State) -> Response<Body> {
    let now = state.at_once.fetch_add(1, Ordering::SeqCst) + 1;
    state.most_at_once.fetch_max(now, Ordering::SeqCst);
    let (head, body) = request.into_parts();
    let host = head.headers.get("host").map(|host| host.to_str().unwrap());
    let seen = Seen {
        method: head.method.to_string(),
        path: head.uri.path_and_query().unwrap().to_string(),
        host: host.or_else(|| head.uri.host()).unwrap_or_default().to_owned(),
        version: head.version,
        body: body.collect().await.unwrap().to_bytes().to_vec(),
        headers: head.headers,
    };
    let n = state.requests.borrow().to_owned();
    let reply = (state.answer)(n, &seen);
    *state.last.lock().unwrap() = Some(seen);
    state.requests.send_modify(|n| *n += 1);
    let answer = match reply {
        Reply::Now(answer) => *answer,
        Reply::Slow(pause) => {
            tokio::time::sleep(pause).await;
            Response::new(Full::default().boxed())
        }
        Reply::Never => std::future::pending().await,
    };
    state.at_once.fetch_sub(1, Ordering::SeqCst);
    answer
}
