//! Which service a guest means: by its name, or by what Envoy and Istio call its cluster.

use leeward_policy::Name;

/// The service of `allowed` that `upstream` means. That is a service's name; the name of a cluster, such as
/// `outbound|80||reviews.default.svc.cluster.local`, whose host or its first label is one; a URI or `HOST:PORT`; or a
/// serialized `envoy.config.core.v3.GrpcService` with any of these in it.
pub(crate) fn service<'a>(upstream: &[u8], allowed: &'a [Name]) -> Option<&'a Name> {
    let text = str::from_utf8(grpc_service(upstream).unwrap_or(upstream)).ok()?;
    if text.contains(char::is_control) {
        return None;
    }
    let host = text.rsplit(['|', '/']).next()?;
    let host = host.split(':').next()?;
    // A service's name is one label.
    let label = host.split('.').next()?;
    allowed.iter().find(|service| service.as_str() == label)
}

/// The name of the cluster, or the target's URI, if this is a `GrpcService`: field 1 of its field 1 or 2.
fn grpc_service(bytes: &[u8]) -> Option<&[u8]> {
    let target = field(bytes, 1).or_else(|| field(bytes, 2))?;
    field(target, 1)
}

/// The bytes of a field of a protobuf message; `None` if it isn't there, or the message is none.
fn field(mut message: &[u8], number: u64) -> Option<&[u8]> {
    let mut found = None;
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let len = match tag & 7 {
            0 => {
                varint(&mut message)?;
                0
            }
            1 => 8,
            2 => usize::try_from(varint(&mut message)?).ok()?,
            5 => 4,
            _ => return None,
        };
        let (value, rest) = message.split_at_checked(len)?;
        if tag >> 3 == number && tag & 7 == 2 {
            found = Some(value);
        }
        message = rest;
    }
    found
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> Vec<Name> {
        ["reviews", "ratings"]
            .map(|name| Name::parse(name).unwrap())
            .into()
    }

    #[test]
    fn a_cluster_means_a_service() {
        for (upstream, want) in [
            ("reviews", Some("reviews")),
            ("ratings.prod", Some("ratings")),
            ("outbound|80||reviews.default.svc.cluster.local", Some("reviews")),
            ("outbound|9080|v1|ratings", Some("ratings")),
            ("http://reviews.prod:8080", Some("reviews")),
            ("ratings:443", Some("ratings")),
            ("outbound|80||other.default.svc.cluster.local", None),
            ("reviews2", None),
            ("", None),
            ("|", None),
        ] {
            let names = names();
            let got = service(upstream.as_bytes(), &names).map(Name::as_str);
            assert_eq!(got, want, "{upstream:?}");
        }
    }

    #[test]
    fn a_grpc_service_has_a_cluster_or_a_target() {
        let message = |number: u8, text: &str| {
            let mut inner = vec![0x0a, u8::try_from(text.len()).unwrap()];
            inner.extend_from_slice(text.as_bytes());
            // An authority behind it, and a timeout behind that.
            inner.extend_from_slice(&[0x12, 1, b'x']);
            let mut outer = vec![number << 3 | 2, u8::try_from(inner.len()).unwrap()];
            outer.extend(inner);
            outer.extend_from_slice(&[0x1a, 2, 0x08, 5]);
            outer
        };
        let names = names();
        let cluster = message(1, "outbound|50051||ratings.default.svc.cluster.local");
        assert_eq!(service(&cluster, &names).map(Name::as_str), Some("ratings"));
        let target = message(2, "reviews:50051");
        assert_eq!(service(&target, &names).map(Name::as_str), Some("reviews"));
        assert_eq!(service(&cluster[..cluster.len() - 9], &names), None);
    }

    proptest! {
        #[test]
        fn no_upstream_is_too_odd(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let names = names();
            let _ = service(&bytes, &names);
        }
    }
}
