//! Admit: take a request apart, pin the policy, begin the record, refuse what can be read two ways.

use crate::body::{ClientBody, Intake};
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::{Found, look};
use crate::idle::Stall;
use crate::route::lower_case;
use crate::worker::Worker;
use http::{Method, Request, Version, header, request};
use hyper::upgrade::OnUpgrade;
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
}

impl Received {
    /// Whether the request is well-formed and meant for a mesh.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.parts.method == Method::CONNECT {
            return Err(Failure::NotImplemented);
        }
        self.found.check(self.parts.version, &self.parts.uri)
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
    mut request: Request<ClientBody>,
) -> (Box<Exchange>, Box<Received>) {
    let snapshot = worker.pin();
    let found = look(request.headers());
    let upgrade = found
        .wants_upgrade(request.version(), request.headers())
        .then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let record = worker.recorder.start(
        client.direction,
        &parts,
        &client.peer,
        snapshot.generation,
        worker.now(),
    );
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
        }),
    )
}

fn is_grpc(parts: &request::Parts) -> bool {
    parts
        .headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"))
}
