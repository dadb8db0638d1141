//! What a plugin may answer: valid HTTP, and nothing that frames a message or is the mesh's to say.

use crate::bindings::leeward::plugin::types::Response;

/// Bytes of all names and values together.
const MAX_HEADERS: usize = 64 << 10;
/// Bytes of the body.
const MAX_BODY: usize = 1 << 20;

/// Checks an answer; the error says what is wrong with it.
pub(crate) fn check(response: &Response) -> Result<(), String> {
    if !(200..=599).contains(&response.status) {
        return Err(format!(
            "status {} is out of range; want 200 to 599",
            response.status
        ));
    }
    if response.body.len() > MAX_BODY {
        return Err(format!(
            "the body has {} bytes; want at most {MAX_BODY}",
            response.body.len()
        ));
    }
    let size: usize = response
        .headers
        .iter()
        .map(|h| h.name.len() + h.value.len())
        .sum();
    if size > MAX_HEADERS {
        return Err(format!(
            "the headers have {size} bytes; want at most {MAX_HEADERS}"
        ));
    }
    for header in &response.headers {
        let name = header.name.to_ascii_lowercase();
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if name.is_empty() || !name.bytes().all(token) {
            return Err(format!("{:?} is not a header name", header.name));
        }
        if !leeward_policy::may_be_in_an_answer(&name) {
            return Err(format!("the header {name} is the proxy's to set"));
        }
        if header
            .value
            .iter()
            .any(|b| *b < b' ' && *b != b'\t' || *b == 0x7f)
        {
            return Err(format!("the value of {name} has a control character"));
        }
    }
    Ok(())
}
