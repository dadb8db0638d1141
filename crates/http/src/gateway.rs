//! Gateways: clients from outside, who have no identity and are believed nothing that they say of themselves.
//!
//! A *door* is an address that this proxy listens on for them (`doors`); which listener of policy a request is for is
//! decided by the host that it names, and must be the one that the connection was made for (`tls`). From there on it goes
//! through the same stages as everybody's.

mod doors;
mod forwarded;
mod http3;
mod tls;

#[cfg(test)]
pub(crate) use doors::tests::door_in_the_clear;
pub(crate) use doors::{Counted, Opened, serve_tcp};
pub use doors::{Door, DoorNews, DoorSettings, Doors};
pub use tls::PortTls;

use crate::admit::Received;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::respond::Outcome;
use crate::route::{check_authority, lower_case};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, Uri, header};
use leeward_policy::model::{GatewayProtocol, HttpsRedirect};
use leeward_policy::{ListenerView, Snapshot};
use leeward_telemetry::Outcome as Told;
use std::net::SocketAddr;
use std::sync::Arc;
use tls::Secure;

/// Where a client from outside came in.
pub(crate) struct Edge {
    door: Arc<Door>,
    /// What TLS has settled; `None` is in the clear.
    secure: Option<Secure>,
    /// Whether it came by HTTP/3.
    http3: bool,
    /// Its place among the connections of the door: what becomes of the connection, such as a tunnel, keeps it.
    _place: Counted,
}

impl Edge {
    /// The listener that a request for `host` (lower case, without a port) is for.
    ///
    /// # Errors
    ///
    /// [`Failure::Misdirected`] if there is none, or if the connection was made for another one: what is asked of a client
    /// in the handshake, such as a certificate, holds for one listener (RFC 9110 §7.4).
    pub(crate) fn listener<'s>(
        &self,
        snapshot: &'s Snapshot,
        host: &str,
    ) -> Result<&'s ListenerView, Failure> {
        let port = snapshot.port(self.door.address);
        let listener = port
            .and_then(|port| port.listener(host))
            .ok_or(Failure::Misdirected)?;
        let agrees = match &self.secure {
            None => listener.spec.tls().is_none(),
            Some(secure) => {
                listener.spec.tls().is_some()
                    && secure.agrees(listener, host)
                    && (!self.http3 || listener.spec.has_http3())
            }
        };
        if agrees {
            Ok(listener)
        } else {
            Err(Failure::Misdirected)
        }
    }

    /// Takes a request in, or says at once what becomes of it.
    pub(crate) fn enter(&self, exchange: &Exchange, request: &Received) -> Option<Outcome> {
        let entered = check_authority(request.authority()).and_then(|host| {
            let listener = self.listener(&exchange.snapshot, &lower_case(host))?;
            Ok((host, listener))
        });
        match entered {
            Err(failure) => Some(Outcome::Failed(failure)),
            Ok((host, listener)) => match &listener.spec.protocol {
                GatewayProtocol::Http {
                    redirect: Some(redirect),
                } => Some(redirected(*redirect, host, &request.parts.uri)),
                GatewayProtocol::Http { redirect: None } | GatewayProtocol::Https { .. } => None,
            },
        }
    }

    /// Whether clients of the listener that a request is for may have requests queued: in the queue of this name, or in any.
    pub(crate) fn queues(&self, snapshot: &Snapshot, request: &Received, queue: Option<&str>) -> bool {
        let listener = self.listener(snapshot, &request.host());
        listener.is_ok_and(|listener| snapshot.queues_at(listener, queue))
    }

    /// Takes out of a request's head what only those may say who are believed, and puts in what is so. Returns the address
    /// of whoever asks, which is the peer's unless there are proxies in front that are believed.
    pub(crate) fn receive(
        &self,
        snapshot: &Snapshot,
        headers: &mut HeaderMap,
        uri: &Uri,
        peer: SocketAddr,
    ) -> SocketAddr {
        let authority = match uri.authority() {
            Some(authority) => Some(authority.as_str().to_owned()),
            None => headers
                .get(header::HOST)
                .and_then(|host| host.to_str().ok())
                .map(str::to_owned),
        };
        let host = authority
            .as_deref()
            .and_then(|authority| check_authority(authority).ok());
        let listener = host.and_then(|host| self.listener(snapshot, &lower_case(host)).ok());
        let hops = listener.map_or(0, |listener| listener.trusted_hops);
        let scheme = if self.secure.is_some() { "https" } else { "http" };
        let host = host.and(authority.as_deref());
        let client = forwarded::settle(headers, hops as usize, peer.ip(), scheme, host);
        if client == peer.ip() {
            peer
        } else {
            SocketAddr::new(client, 0)
        }
    }

    /// Where HTTP/3 is to be had, for those who don't speak it.
    pub(crate) fn alt_svc(&self) -> Option<HeaderValue> {
        let secure = self.secure.as_ref().filter(|_| !self.http3)?;
        secure.has_http3.then(|| self.door.settings().alt_svc.clone())?
    }
}

/// An answer that sends a client to HTTPS.
fn redirected(redirect: HttpsRedirect, host: &str, uri: &Uri) -> Outcome {
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    // OPTIONS * is for no path.
    let target = if target.starts_with('/') { target } else { "/" };
    let location = match redirect.port {
        443 => format!("https://{host}{target}"),
        port => format!("https://{host}:{port}{target}"),
    };
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::MOVED_PERMANENTLY);
    // Host and target were both checked: always a valid value.
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Outcome::Local(response, Told::Served)
}
