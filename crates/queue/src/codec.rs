//! A request as bytes, the same in every store.

use crate::entry::StoredRequest;
use bytes::Bytes;
use leeward_policy::model::Priority;
use prost::Message;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

/// What is written. Fields are only ever added; one that a later version has written and this one doesn't know is
/// passed over.
#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    route: String,
    #[prost(string, optional, tag = "3")]
    key: Option<String>,
    #[prost(string, tag = "4")]
    idempotency_key: String,
    #[prost(string, tag = "5")]
    method: String,
    #[prost(string, tag = "6")]
    target: String,
    #[prost(string, tag = "7")]
    authority: String,
    #[prost(message, repeated, tag = "8")]
    headers: Vec<WireHeader>,
    #[prost(bytes = "bytes", tag = "9")]
    body: Bytes,
    /// The position in [`Priority::ALL`], plus 1.
    #[prost(uint32, tag = "10")]
    priority: u32,
    /// IP:PORT.
    #[prost(string, tag = "11")]
    client: String,
    #[prost(string, optional, tag = "12")]
    identity: Option<String>,
    /// What was written before there were gateways doesn't say, and is the mesh's.
    #[prost(bool, tag = "13")]
    from_outside: bool,
}

#[derive(Clone, PartialEq, Message)]
struct WireHeader {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// Who sent a request that doesn't say.
const NOBODY: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));

/// Bytes that were not written by [`encode`].
#[derive(Clone, Debug, thiserror::Error)]
#[error("an entry can't be read: {0}")]
pub(crate) struct Unreadable(prost::DecodeError);

/// A request's bytes, whose number is its size.
pub(crate) fn encode(request: &StoredRequest) -> Bytes {
    let headers = request.headers.iter().map(|(name, value)| WireHeader {
        name: name.clone(),
        value: value.clone(),
    });
    let priority = Priority::ALL.iter().position(|p| *p == request.priority);
    let wire = Wire {
        service: request.service.as_ref().into(),
        route: request.route.as_ref().into(),
        key: request.key.as_deref().map(Into::into),
        idempotency_key: request.idempotency_key.as_ref().into(),
        method: request.method.clone(),
        target: request.target.clone(),
        authority: request.authority.clone(),
        headers: headers.collect(),
        body: request.body.clone(),
        priority: priority.and_then(|p| u32::try_from(p + 1).ok()).unwrap_or(0),
        client: request.client.to_string(),
        identity: request.identity.as_deref().map(Into::into),
        from_outside: request.from_outside,
    };
    wire.encode_to_vec().into()
}

/// The request of these bytes.
pub(crate) fn decode(bytes: Bytes) -> Result<StoredRequest, Unreadable> {
    let wire = Wire::decode(bytes).map_err(Unreadable)?;
    let position = usize::try_from(wire.priority).ok().and_then(|p| p.checked_sub(1));
    let priority = position.and_then(|p| Priority::ALL.get(p)).copied();
    Ok(StoredRequest {
        service: wire.service.into(),
        route: wire.route.into(),
        key: wire.key.map(Arc::from),
        idempotency_key: wire.idempotency_key.into(),
        method: wire.method,
        target: wire.target,
        authority: wire.authority,
        headers: wire.headers.into_iter().map(|h| (h.name, h.value)).collect(),
        body: wire.body,
        priority: priority.unwrap_or_default(),
        client: wire.client.parse().unwrap_or(NOBODY),
        identity: wire.identity.map(Arc::from),
        from_outside: wire.from_outside,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            texts in proptest::collection::vec(".{0,20}", 6),
            key in proptest::option::of(".{0,20}"),
            headers in proptest::collection::vec(("[a-z-]{1,9}", proptest::collection::vec(any::<u8>(), 0..30)), 0..9),
            body: Vec<u8>,
            priority in 0usize..4,
            (address, port, identity) in (any::<[u8; 4]>(), any::<u16>(), proptest::option::of(".{0,20}")),
            from_outside: bool,
        ) {
            let request = StoredRequest {
                service: texts[0].as_str().into(),
                route: texts[1].as_str().into(),
                key: key.map(Arc::from),
                idempotency_key: texts[2].as_str().into(),
                method: texts[3].clone(),
                target: texts[4].clone(),
                authority: texts[5].clone(),
                headers,
                body: body.into(),
                priority: Priority::ALL[priority],
                client: SocketAddr::from((address, port)),
                identity: identity.map(Arc::from),
                from_outside,
            };
            prop_assert_eq!(decode(encode(&request)).unwrap(), request);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = decode(bytes.into());
        }
    }
}
