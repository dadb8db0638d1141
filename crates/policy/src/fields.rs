//! Header fields that are the proxy's to set.

/// Fields of an answer that frame the message or are for one hop (RFC 9110 §7.6.1, RFC 9112 §6).
const FRAMING: [&str; 10] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Whether an answer that policy or a plugin makes up may have this field (lower case): not what frames the
/// message, and not what only the mesh may say.
pub fn may_be_in_an_answer(name: &str) -> bool {
    !FRAMING.contains(&name) && !name.starts_with("leeward-")
}

/// Fields of a request in which other proxies tell workloads who asks, by a certificate that they have checked (Envoy,
/// Linkerd, RFC 9440). Ours tells nothing in them, so whoever sends them has made them up. The same goes for what looks
/// like ours and isn't ("x-leeward-identity"), lest a workload believe it.
const IDENTITY: [&str; 4] = [
    "client-cert",
    "client-cert-chain",
    "l5d-client-id",
    "x-forwarded-client-cert",
];

/// Whether a field (lower case) says who sent a request, which is for the mesh to say.
pub fn claims_identity(name: &str) -> bool {
    IDENTITY.contains(&name) || name.starts_with("x-leeward-")
}
