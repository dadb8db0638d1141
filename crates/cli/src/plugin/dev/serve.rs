//! A plugin behind a port, in the host that proxies have.

use super::super::cases::{self, Case};
use super::super::check::outcome_of;
use super::super::project::{self, Target};
use super::super::rig::{Plugged, Rig, kind_of};
use super::super::run::{End, Passed, ask};
use crate::output::{Failure, complain};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use leeward_wasm::{Action, Reply};
use std::cell::RefCell;
use std::convert::Infallible;
use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, spawn_local};

/// Largest body of a request that is taken, in bytes.
const MAX_BODY: usize = 1 << 20;
/// What the plugin did, in a field of the answer.
const DID: HeaderName = HeaderName::from_static("x-leeward-plugin");

/// A build of the plugin that can be asked.
pub(super) struct Serving {
    shared: Rc<Shared>,
    mesh: JoinHandle<()>,
}

struct Shared {
    rig: Rig,
    plugged: Plugged,
    /// What is asked, but for the request.
    case: Case,
}

/// The build that requests get now.
#[derive(Default)]
pub(super) struct Served(RefCell<Option<Rc<Serving>>>);

impl Served {
    /// Requests get this one from now on; those under way end on the one that they began with.
    pub(super) fn swap(&self, serving: &Rc<Serving>) {
        self.0.replace(Some(Rc::clone(serving)));
    }
}

impl Serving {
    pub(super) async fn load(target: &Target) -> Result<Rc<Self>, Failure> {
        let kind = kind_of(&project::module(&target.module)?);
        let cases = if target.cases.is_file() {
            cases::read(&target.cases, kind)?
        } else {
            Vec::new()
        };
        let case = cases::for_serving(&cases, kind);
        let rig = Rig::new(&target.module, kind)?;
        let plugged = rig.plug(&case, false).await?;
        let shared = Rc::new(Shared { rig, plugged, case });
        let of_mesh = Rc::clone(&shared);
        let mesh = spawn_local(async move { of_mesh.rig.mesh(&of_mesh.plugged).await });
        Ok(Rc::new(Self { shared, mesh }))
    }

    /// What the plugin does about a request.
    pub(super) async fn ask(&self, request: cases::Request) -> End {
        let shared = Rc::clone(&self.shared);
        // Whoever asked may go before the guest is done.
        let asked = spawn_local(async move {
            let mut case = shared.case.clone();
            case.request = request;
            ask(&shared.rig, &shared.plugged, &case)
                .await
                .unwrap_or_else(End::Fault)
        });
        asked.await.unwrap_or(End::Fault(leeward_wasm::Fault::Trap))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.mesh.abort();
    }
}

/// Serves whatever build there is.
pub(super) async fn listen(
    address: SocketAddr,
    served: &Rc<Served>,
    record: Option<&Path>,
) -> Result<SocketAddr, Failure> {
    let bad = |error: std::io::Error| Failure::BadInput(format!("--listen: {address}: {error}"));
    let listener = TcpListener::bind(address).await.map_err(bad)?;
    let address = listener.local_addr().map_err(bad)?;
    let record = record.map(|path| {
        let opened = File::options().append(true).create(true).open(path);
        opened.map_err(|error| Failure::BadInput(format!("--record: {}: {error}", path.display())))
    });
    let record = Rc::new(record.transpose()?);
    let served = Rc::clone(served);
    spawn_local(async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    complain(&format!("leeward: a connection can't be accepted: {error}"));
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (served, record) = (Rc::clone(&served), Rc::clone(&record));
            spawn_local(async move {
                let service = service_fn(move |request| {
                    let (served, record) = (Rc::clone(&served), Rc::clone(&record));
                    async move { Ok::<_, Infallible>(handle(&served, record.as_ref().as_ref(), request).await) }
                });
                // Whoever breaks off knows that.
                let _ = http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    Ok(address)
}

async fn handle(served: &Served, record: Option<&File>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let body = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return said(StatusCode::PAYLOAD_TOO_LARGE, &format!("the body: {error}")),
    };
    let mut headers = parts.headers;
    let authority = headers.remove(header::HOST);
    let request = cases::Request {
        method: parts.method,
        scheme: "http",
        authority: authority.map_or_else(String::new, |host| {
            String::from_utf8_lossy(host.as_bytes()).into_owned()
        }),
        path: parts
            .uri
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| http::uri::PathAndQuery::from_static("/")),
        headers,
        body: if body.is_empty() { Vec::new() } else { vec![body] },
    };
    if let Some(mut file) = record
        && let Err(error) = writeln!(file, "{}", super::replay::line_of(&request))
    {
        complain(&format!("leeward: --record: {error}"));
    }
    let serving = served.0.borrow().clone();
    let Some(serving) = serving else {
        return said(
            StatusCode::SERVICE_UNAVAILABLE,
            "there is no build of the plugin yet",
        );
    };
    let end = serving.ask(request).await;
    let did = HeaderValue::from_str(&outcome_of(&end));
    let mut response = answer(end);
    if let Ok(did) = did {
        response.headers_mut().insert(DID, did);
    }
    response
}

fn answer(end: End) -> Response<Full<Bytes>> {
    let told = outcome_of(&end);
    match end {
        End::Action(Action::Respond(reply) | Action::Enqueue { reply, .. }) => of_reply(reply),
        End::Action(Action::Decline | Action::Stale | Action::Reroute(_)) => {
            said(StatusCode::SERVICE_UNAVAILABLE, &told)
        }
        End::Passed(passed) => of_passed(*passed),
        End::Chosen(_) => said(StatusCode::OK, &told),
        End::Fault(_) => said(StatusCode::SERVICE_UNAVAILABLE, &told),
    }
}

fn of_reply(reply: Reply) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(reply.body));
    *response.status_mut() = reply.status;
    *response.headers_mut() = reply.headers;
    response
}

fn of_passed(passed: Passed) -> Response<Full<Bytes>> {
    let Some(message) = passed.response else {
        return said(StatusCode::SERVICE_UNAVAILABLE, "no answer");
    };
    let mut response = Response::new(Full::new(message.body));
    *response.status_mut() = message.status.unwrap_or(StatusCode::OK);
    *response.headers_mut() = message.headers;
    response
}

fn said(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(format!("{text}\n").into()));
    *response.status_mut() = status;
    response
}
