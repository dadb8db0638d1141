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
