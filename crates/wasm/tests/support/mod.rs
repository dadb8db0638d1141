//! What the tests of the host have in common: a worker with a plugin, what it is asked, and a mesh that answers.

#![allow(dead_code, reason = "each test uses some of it")]

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use leeward_policy::model::{
    Cause, OnFault, Plugin, PluginAccess, PluginFrom, PluginKind, PluginLimits, PluginSource, Quarantine,
};
use leeward_wasm::{
    Action, AnswerPiece, AnswerTo, CallAttempt, CallBody, CallError, Called, Chosen, Events, Facts,
    FailedCall, Fault, FlagValue, Flags, Host, KeptAnswer, MeshAnswer, MeshCall, Reply, RequestHead,
    ResponseHead, Worker,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver};

/// A guest of `tests/guests`.
pub fn guest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/guests/built")
        .join(name)
}

/// A plugin of `plugins/built`.
pub fn built(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../plugins/built")
        .join(name)
}

pub fn spec(kind: PluginKind, file: &Path) -> Plugin {
    Plugin {
        kind,
        source: PluginSource {
            from: PluginFrom::File(file.display().to_string().into()),
            sha256: None,
            minisign_key: None,
        },
        config: "of the plugin".into(),
        limits: PluginLimits {
            // For a debug build on a busy machine.
            call_timeout: Duration::from_secs(1),
            max_instances: 2,
            ..PluginLimits::of(kind)
        },
        access: PluginAccess {
            services: vec!["reviews".parse().unwrap(), "loop".parse().unwrap()],
            imports: Vec::new(),
        },
        on_fault: if kind.is_rung() {
            OnFault::NextRung
        } else {
            OnFault::FailOpen
        },
        quarantine: Quarantine {
            faults: 1_000_000,
            ..Quarantine::default()
        },
        fresh_instance: false,
        when: None,
        canary: None,
    }
}

pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// What the worker told of its plugins.
#[derive(Default)]
pub struct Told {
    pub counted: RefCell<BTreeMap<String, u64>>,
    pub calls: RefCell<Vec<(&'static str, Result<(), Fault>)>>,
}

impl Events for Told {
    fn count(&self, _: &Arc<str>, name: &str, by: u64) {
        *self.counted.borrow_mut().entry(name.to_owned()).or_insert(0) += by;
    }

    fn gauge(&self, _: &Arc<str>, _: &str, _: f64) {}

    fn observe(&self, _: &Arc<str>, _: &str, _: f64) {}

    fn called(&self, call: &Called<'_>) {
        self.calls.borrow_mut().push((call.function, call.outcome));
    }
}

/// Says of every flag what it was asked with.
#[derive(Debug)]
struct AllFlags;

impl Flags for AllFlags {
    fn value(&self, key: &str, _: &Facts, head: &RequestHead, cause: Option<Cause>) -> Option<FlagValue> {
        (key != "none").then(|| FlagValue::Text(format!("{key} {} {cause:?}", head.path)))
    }
}

pub fn facts(config: &str) -> Facts {
    Facts {
        service: "recommendations".into(),
        route: "shop/0".into(),
        route_name: Some("shop".into()),
        zone: "a".into(),
        proxy: "p1".into(),
        peer: Some("spiffe://mesh/web".into()),
        address: Some("10.0.0.9:4000".parse().unwrap()),
        protocol: "HTTP/1.1",
        config: config.into(),
        deadline: None,
        began: now(),
        flags: Arc::new(AllFlags),
        origin: Arc::default(),
    }
}

pub fn headers(fields: &[(&str, &str)]) -> HeaderMap {
    let field = |(name, value): &(&str, &str)| {
        let name: HeaderName = name.parse().unwrap();
        (name, value.parse::<HeaderValue>().unwrap())
    };
    let mut headers = HeaderMap::new();
    for (name, value) in fields.iter().map(field) {
        headers.append(name, value);
    }
    headers
}

pub fn head(path: &str, fields: &[(&str, &str)]) -> RequestHead {
    RequestHead {
        method: Method::GET,
        scheme: "http",
        authority: "shop".into(),
        path: path.parse().unwrap(),
        headers: headers(fields),
    }
}

pub fn answer_head(status: u16, fields: &[(&str, &str)]) -> ResponseHead {
    ResponseHead {
        status: StatusCode::from_u16(status).unwrap(),
        headers: headers(fields),
    }
}

pub fn failed(config: &str) -> FailedCall {
    FailedCall {
        head: head("/r?limit=2", &[("x-many", "1"), ("x-many", "2")]),
        facts: facts(config),
        body: Some(Bytes::from_static(b"hello")),
        cause: Cause::Timeout,
        attempts: vec![CallAttempt {
            endpoint: "10.0.0.1:80".into(),
            zone: "a".into(),
            status: Some(503),
            cause: None,
            duration: Duration::from_micros(1500),
        }],
        kept: Some(KeptAnswer {
            reply: Reply {
                status: StatusCode::OK,
                headers: headers(&[("etag", "1")]),
                body: Bytes::from_static(b"old"),
                grpc_status: None,
            },
            age: Duration::from_secs(9),
            fresh: Duration::from_secs(5),
        }),
    }
}

/// A worker with one plugin, `p`.
pub struct Rig {
    pub host: Arc<Host>,
    pub worker: Worker,
    pub told: Rc<Told>,
    pub spec: Arc<Plugin>,
    pub calls: RefCell<UnboundedReceiver<MeshCall>>,
}

impl Rig {
    pub async fn new(kind: PluginKind, file: &Path) -> Self {
        Self::with(spec(kind, file), file).await
    }

    pub async fn with(spec: Plugin, file: &Path) -> Self {
        let host = Host::new().unwrap();
        host.load("p", &spec, file.to_owned(), None).await.unwrap();
        Self::on(&host, spec)
    }

    /// Another worker.
    pub fn on(host: &Arc<Host>, spec: Plugin) -> Self {
        let told = Rc::<Told>::default();
        let (mesh, calls) = mpsc::unbounded_channel();
        Self {
            host: Arc::clone(host),
            worker: Worker::new(host, Rc::<Told>::clone(&told), mesh),
            told,
            spec: Arc::new(spec),
            calls: RefCell::new(calls),
        }
    }

    pub fn chosen(&self) -> Chosen {
        self.worker.choose(&"p".into(), &self.spec, false).unwrap()
    }

    pub async fn fail(&self, call: FailedCall) -> Result<Action, Fault> {
        self.worker.on_failure(&self.chosen(), call).await
    }

    pub async fn ask(&self, config: &str) -> Result<Action, Fault> {
        self.fail(failed(config)).await
    }

    pub async fn text(&self, config: &str) -> String {
        body_of(self.ask(config).await)
    }

    /// As long as this is polled, calls of `reviews` are answered with what they asked for, those of `loop` are refused,
    /// and those of `/silent` never are answered.
    pub async fn mesh(&self) {
        let mut held = Vec::new();
        while let Some(call) = poll_fn(|context| self.calls.borrow_mut().poll_recv(context)).await {
            if call.path.path() == "/silent" {
                held.push(call);
            } else {
                answer(call).await;
            }
        }
    }

    /// Asks while the mesh answers.
    pub async fn text_with_mesh(&self, config: &str) -> String {
        tokio::select! {
            text = self.text(config) => text,
            () = self.mesh() => unreachable!(),
        }
    }
}

pub fn body_of(action: Result<Action, Fault>) -> String {
    match action {
        Ok(Action::Respond(reply)) => String::from_utf8(reply.body.to_vec()).unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn answer(call: MeshCall) {
    let mut said = format!(
        "{} {} {} {:?} {}",
        call.plugin,
        call.service,
        call.path,
        call.authority,
        call.headers.len()
    );
    match call.body {
        CallBody::Whole(body) => said += &format!(" whole {}", body.len()),
        CallBody::Pieces(mut pieces) => {
            let mut bytes = 0;
            while let Some(piece) = pieces.recv().await {
                bytes += piece.len();
            }
            said += &format!(" pieces {bytes}");
        }
    }
    let refused = (&*call.service == "loop").then_some(CallError::Loop);
    match call.answer {
        AnswerTo::Whole(answer) => {
            let told = refused.map_or_else(
                || {
                    Ok(MeshAnswer {
                        status: StatusCode::OK,
                        headers: HeaderMap::new(),
                        body: said.into(),
                        trailers: HeaderMap::new(),
                    })
                },
                Err,
            );
            drop(answer.send(told));
        }
        AnswerTo::Pieces(pieces) => {
            let told = match refused {
                Some(error) => vec![AnswerPiece::Failed(error)],
                None if call.path.path() == "/broken" => vec![
                    AnswerPiece::Head(StatusCode::OK, HeaderMap::new()),
                    AnswerPiece::Data(Bytes::from_static(b"half")),
                    AnswerPiece::Failed(CallError::Failed),
                ],
                None => vec![
                    AnswerPiece::Head(StatusCode::OK, HeaderMap::new()),
                    AnswerPiece::Data(said.into()),
                    AnswerPiece::Trailers(HeaderMap::new()),
                ],
            };
            for piece in told {
                if pieces.send(piece).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Resident memory of this process, in bytes.
pub fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}
