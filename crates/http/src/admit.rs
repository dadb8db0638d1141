//! Admit: take a request apart, pin the policy, begin the record, refuse what can be read two ways.

use crate::body::Intake;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::{Found, look};
use crate::idle::Stall;
use crate::route::lower_case;
use crate::worker::Worker;
use http::{Method, Request, Uri, Version, header, request};
use hyper::upgrade::OnUpgrade;
use leeward_policy::path;
use leeward_upstream::IncomingBody;
use std::borrow::Cow;
use std::rc::Rc;

/// A request as it came in.
pub(crate) struct Received {
    pub(crate) parts: request::Parts,
    pub(crate) found: Found,
    /// The client's half of a change of protocol, if it asks for one.
    pub(crate) upgrade: Option<OnUpgrade>,
    /// The proxy has made its Idempotency-Key: its client hasn't said that it may be sent twice.
    pub(crate) own_key: bool,
    /// Whether the head is as the next hop wants it.
    pub(crate) prepared: bool,
    /// Its path.
    pub(crate) path: Path,
}

/// How the path of a request is matched.
#[derive(Debug, Default)]
pub(crate) enum Path {
    /// It hasn't been looked at.
    #[default]
    Unknown,
    /// As it is sent on.
    Same,
    /// By this, which means the same.
    Other(Box<str>),
}

impl Received {
    /// Whether the request is well-formed and meant for a mesh.
    pub(crate) fn check(&mut self) -> Result<(), Failure> {
        if self.parts.method == Method::CONNECT {
            return Err(Failure::NotImplemented);
        }
        self.found.check(self.parts.version, &self.parts.uri)?;
        self.settle_path()
    }

    /// Puts the path in the one form that everything after goes by: rules, caches, plugins, and the workload.
    pub(crate) fn settle_path(&mut self) -> Result<(), Failure> {
        const BAD: Failure = Failure::BadRequest("a path that can't be sent on");
        let path = self.parts.uri.path();
        if path::is_plain(path) || path == "*" && self.parts.method == Method::OPTIONS {
            self.path = Path::Same;
            return Ok(());
        }
        let normal = path::normalise(path).map_err(|bad| {
            Failure::BadRequest(match bad {
                path::BadPath::Percent => "a percent sign without two hex digits in the path",
                path::BadPath::AboveRoot => "a path that leads above its root",
                path::BadPath::Control => "a control character in the path",
                path::BadPath::Relative => "a path without a slash at its beginning",
            })
        })?;
        self.path = match path::for_matching(&normal) {
            Cow::Borrowed(_) => Path::Same,
            Cow::Owned(matched) if matched == *normal => Path::Same,
            Cow::Owned(matched) => Path::Other(matched.into()),
        };
        if let Cow::Owned(normal) = normal {
            let target = match self.parts.uri.query() {
                Some(query) => format!("{normal}?{query}"),
                None => normal,
            };
            let mut parts = std::mem::take(&mut self.parts.uri).into_parts();
            parts.path_and_query = Some(target.try_into().map_err(|_| BAD)?);
            self.parts.uri = Uri::from_parts(parts).map_err(|_| BAD)?;
        }
        Ok(())
    }

    /// The path as it is matched, without the query.
    pub(crate) fn path(&self) -> &str {
        match &self.path {
            Path::Unknown | Path::Same => self.parts.uri.path(),
            Path::Other(matched) => matched,
        }
    }

    /// Whether [`Self::path`] is the path of what is sent on.
    pub(crate) const fn path_is_settled(&self) -> bool {
        !matches!(self.path, Path::Unknown)
    }

    /// The host that the request is for, lower case, without a port.
    pub(crate) fn host(&self) -> Cow<'_, str> {
        let authority = self.authority();
        let end = match authority.rfind(']') {
            Some(end) => end + 1,
            None => authority.find(':').unwrap_or(authority.len()),
        };
        lower_case(authority.get(..end).unwrap_or(authority))
    }

    /// The authority that the request is for; empty if it names none.
    pub(crate) fn authority(&self) -> &str {
        match self.parts.uri.authority() {
            Some(authority) => authority.as_str(),
            None => self
                .parts
                .headers
                .get(header::HOST)
                .and_then(|host| host.to_str().ok())
                .unwrap_or_default(),
        }
    }
}

/// Begins the exchange.
pub(crate) fn admit(
    worker: &Rc<Worker>,
    client: &Rc<Client>,
    mut request: Request<IncomingBody>,
) -> (Box<Exchange>, Box<Received>) {
    let snapshot = worker.pin();
    let mut peer = Cow::Borrowed(&client.peer);
    if let Some(edge) = &client.edge {
        let uri = std::mem::take(request.uri_mut());
        let address = edge.receive(&snapshot, request.headers_mut(), &uri, client.peer.address);
        *request.uri_mut() = uri;
        if address != client.peer.address {
            peer.to_mut().address = address;
        }
    }
    let mut found = look(request.headers());
    found.disown(request.headers_mut());
    let upgrade = found
        .wants_upgrade(request.version(), request.headers())
        .then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let record = worker
        .recorder
        .start(client.direction, &parts, &peer, snapshot.generation, worker.now());
    let intake = Intake::new(body, Stall::new(&worker.house));
    let mut exchange = Exchange::new(Rc::clone(worker), Rc::clone(client), record, snapshot, intake);
    exchange.http1 = parts.version < Version::HTTP_2;
    exchange.grpc = is_grpc(&parts);
    exchange.wants_upgrade = upgrade.is_some();
    (
        exchange,
        Box::new(Received {
            parts,
            found,
            upgrade,
            own_key: false,
            prepared: false,
            path: Path::Unknown,
        }),
    )
}

fn is_grpc(parts: &request::Parts) -> bool {
    parts
        .headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"))
}
