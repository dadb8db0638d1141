//! What a guest can ask for by name: the attributes of Envoy that plugins read, and what the guest has set itself.

use super::abi::{self, Status, Way};
use super::context::{Http, Passing};
use super::fields::Fields;
use super::grpc;
use super::state::State;
use bytes::Bytes;
use http::{HeaderMap, header};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Envoy's number for a listener that takes the requests of workloads on their way out.
const OUTBOUND: i64 = 2;

impl State {
    /// The value of a property; the parts of its path have zero bytes between them.
    pub(crate) fn property(&self, path: &[u8], now: Instant) -> Result<Bytes, Status> {
        self.attribute(path, now)
            .or_else(|| self.http()?.property(path).cloned())
            .ok_or(Status::NotFound)
    }

    /// Keeps a property for the request.
    pub(crate) fn set_property(&mut self, path: &[u8], value: &[u8]) -> Result<(), Status> {
        let http = self.http_mut().ok_or(Status::NotFound)?;
        http.set_property(path, value)
    }

    fn attribute(&self, path: &[u8], now: Instant) -> Option<Bytes> {
        let mut parts = path.split(|b| *b == 0);
        let first = parts.next()?;
        let second = parts.next();
        // What comes after is the name of a field, in one part.
        let third = parts.next();
        if parts.next().is_some() {
            return None;
        }
        match (first, second, third) {
            (b"plugin_name" | b"plugin_vm_id", None, None) => Some(text(&self.plugin)),
            (b"plugin_root_id", None, None) => Some(Bytes::new()),
            (b"listener_direction", None, None) | (b"xds", Some(b"listener_direction"), None) => {
                Some(number(OUTBOUND))
            }
            (b"filter_state", Some(key), None) => {
                let key = key.strip_prefix(b"wasm.")?;
                self.http()?.property(key).cloned()
            }
            (b"xds", Some(b"node"), Some(rest)) => self.http()?.node(rest, None),
            (b"xds", Some(name), None) => self.http()?.place(name),
            (b"node", Some(name), rest) => self.http()?.node(name, rest),
            (b"request", Some(name), rest) => self.http()?.request(name, rest, now),
            (b"response", Some(name), rest) => self.http()?.response(name, rest),
            (b"connection", Some(name), None) => self.http()?.connection(name, self.effective()),
            (b"connection_id", None, None) => Some(number(self.effective())),
            (b"source", Some(name), None) => self.http()?.source(name),
            (b"destination", Some(b"port"), None) => self.http()?.port().map(number),
            (name, None, None) => self.http()?.place(name),
            _ => None,
        }
    }
}

impl Http {
    fn place(&self, name: &[u8]) -> Option<Bytes> {
        match name {
            b"cluster_name" => Some(text(&self.facts.service)),
            b"route_name" => Some(text(&self.facts.route)),
            _ => None,
        }
    }

    fn node(&self, name: &[u8], rest: Option<&[u8]>) -> Option<Bytes> {
        match (name, rest) {
            (b"id", None) | (b"metadata", Some(b"NAME")) => Some(text(&self.facts.proxy)),
            (b"locality", Some(b"zone")) => Some(text(&self.facts.zone)),
            _ => None,
        }
    }

    fn request(&self, name: &[u8], field: Option<&[u8]>, now: Instant) -> Option<Bytes> {
        let head = self.request.as_ref()?;
        let passing = self.passing(Way::Request);
        let header = |name: &[u8]| Fields::Request(head).value(name).map(Bytes::copy_from_slice);
        match (name, field) {
            (b"headers", Some(name)) => header(name),
            (b"headers", None) => Some(all(Fields::Request(head))),
            (_, Some(_)) => None,
            (b"path", _) => header(b":path"),
            (b"url_path", _) => Some(text(head.path.path())),
            (b"query", _) => Some(text(head.path.query().unwrap_or_default())),
            (b"host", _) => header(b":authority"),
            (b"scheme", _) => header(b":scheme"),
            (b"method", _) => header(b":method"),
            (b"referer", _) => header(b"referer"),
            (b"useragent", _) => header(b"user-agent"),
            (b"id", _) => header(b"x-request-id"),
            (b"protocol", _) => Some(text(self.facts.protocol)),
            (b"time", _) => Some(number(self.began_unix_nanos(now))),
            (b"size", _) => Some(number(size(&head.headers, passing))),
            (b"total_size", _) => Some(number(total(Fields::Request(head), &head.headers, passing))),
            (b"duration", _) => {
                let took = self.ended?.saturating_duration_since(self.facts.began);
                Some(number(i64::try_from(took.as_nanos()).unwrap_or(i64::MAX)))
            }
            _ => None,
        }
    }

    fn response(&self, name: &[u8], field: Option<&[u8]>) -> Option<Bytes> {
        let head = self.response.as_ref()?;
        let passing = self.passing(Way::Response);
        match (name, field) {
            (b"headers", Some(name)) => Fields::from(head).value(name).map(Bytes::copy_from_slice),
            (b"headers", None) => Some(all(Fields::from(head))),
            (b"trailers", Some(name)) => {
                let trailers = Fields::Plain(passing.trailers.as_ref()?);
                trailers.value(name).map(Bytes::copy_from_slice)
            }
            (_, Some(_)) => None,
            (b"code", _) => Some(number(head.status.as_u16())),
            (b"code_details", _) => Some(Bytes::from_static(b"via_upstream")),
            (b"flags", _) => Some(number(0)),
            (b"size", _) => Some(number(size(&head.headers, passing))),
            (b"total_size", _) => Some(number(total(Fields::from(head), &head.headers, passing))),
            (b"grpc_status", _) => {
                let fields = passing.trailers.as_ref().into_iter().chain([&head.headers]);
                let (status, _) = fields.into_iter().find_map(grpc::status)?;
                Some(number(status))
            }
            _ => None,
        }
    }

    fn connection(&self, name: &[u8], context: u32) -> Option<Bytes> {
        match name {
            b"mtls" => Some(Bytes::copy_from_slice(&[u8::from(self.facts.peer.is_some())])),
            b"uri_san_peer_certificate" => self.facts.peer.as_deref().map(text),
            b"requested_server_name" if self.facts.peer.is_some() => Some(text(&self.facts.service)),
            // Nobody else has the number.
            b"id" => Some(number(context)),
            _ => None,
        }
    }

    fn source(&self, name: &[u8]) -> Option<Bytes> {
        let address = self.facts.address?;
        match name {
            b"address" => Some(text(&address.to_string())),
            b"port" => Some(number(address.port())),
            _ => None,
        }
    }

    /// The port that the client asked for.
    fn port(&self) -> Option<u16> {
        let head = self.request.as_ref()?;
        let port = head
            .authority
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse().ok());
        port.or_else(|| Some(if head.scheme == "https" { 443 } else { 80 }))
    }

    fn began_unix_nanos(&self, now: Instant) -> i64 {
        let since = now.saturating_duration_since(self.facts.began);
        let began = unix_nanos().saturating_sub(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        i64::try_from(began).unwrap_or(i64::MAX)
    }
}

/// The time, in nanoseconds since 1970.
pub(crate) fn unix_nanos() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "a stamp for the guest")]
    let now = SystemTime::now();
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The length of a body, by what was announced or by what has come.
fn size(headers: &HeaderMap, passing: &Passing) -> i64 {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    announced.unwrap_or_else(|| i64::try_from(passing.size).unwrap_or(i64::MAX))
}

fn total(fields: Fields<'_>, headers: &HeaderMap, passing: &Passing) -> i64 {
    let fields: usize = fields
        .pairs()
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    size(headers, passing).saturating_add(i64::try_from(fields).unwrap_or(i64::MAX))
}

fn all(fields: Fields<'_>) -> Bytes {
    abi::serialize(fields.pairs().into_iter()).into()
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn number(number: impl Into<i64>) -> Bytes {
    Bytes::copy_from_slice(&number.into().to_le_bytes())
}
