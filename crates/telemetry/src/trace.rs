//! W3C trace context: read strictly, passed on always.

use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// A request's place in a trace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TraceContext {
    /// The trace; never zero.
    pub trace_id: [u8; 16],
    /// The caller's span; `None` if the trace begins here.
    pub parent: Option<[u8; 8]>,
    /// The span of this request at this proxy; never zero.
    pub span_id: [u8; 8],
    /// Whether spans are exported whatever happens.
    pub sampled: bool,
    /// Whether this request is, or serves, one that a hop before has sent again.
    pub retry: bool,
}

/// The member of `tracestate` that marks what serves a retry. It stands there, and not in a field of its own,
/// because whatever passes a trace on from call to call passes this on too.
const MARK: &str = "leeward=retry";
/// The longest `tracestate` that is added to, in bytes; W3C asks for 512 at least.
const MAX_STATE: usize = 512;

impl TraceContext {
    /// Goes on with the trace that the headers name, or begins one that is sampled with probability `ratio`.
    pub(crate) fn begin(headers: &HeaderMap, ratio: f64) -> Self {
        let retry = is_marked(headers);
        if let Some((trace_id, parent, sampled)) = from_headers(headers) {
            return Self {
                retry,
                trace_id,
                parent: Some(parent),
                span_id: span_id(),
                sampled,
            };
        }
        let sampled = ratio > 0.0 && (ratio >= 1.0 || fastrand::f64() < ratio);
        Self {
            retry,
            trace_id: fastrand::u128(1..).to_be_bytes(),
            parent: None,
            span_id: span_id(),
            sampled,
        }
    }

    /// Marks what these headers begin as a retry, so that hops behind it don't try it again where it may have
    /// been acted on: retries of retries multiply.
    pub fn mark_retry(headers: &mut HeaderMap) {
        if is_marked(headers) {
            return;
        }
        // A list of members, the latest writer's first (W3C Trace Context §3.3).
        let mut state = MARK.to_owned();
        for value in headers.get_all(TRACESTATE) {
            if let Ok(value) = value.to_str()
                && state.len() + 1 + value.len() <= MAX_STATE
            {
                state.push(',');
                state.push_str(value);
            }
        }
        if let Ok(state) = HeaderValue::try_from(state) {
            headers.insert(TRACESTATE, state);
        }
    }

    /// Names `span` of this trace as the parent of what comes next. `tracestate` is left as it is.
    pub fn write(&self, headers: &mut HeaderMap, span: [u8; 8]) {
        let mut text = [0u8; 55];
        text.copy_from_slice(b"00-00000000000000000000000000000000-0000000000000000-00");
        let (_, rest) = text.split_at_mut(3);
        let (trace, rest) = rest.split_at_mut(32);
        hex(&self.trace_id, trace);
        let (parent, rest) = rest.split_at_mut(17);
        hex(&span, parent.split_at_mut(1).1);
        if self.sampled
            && let Some(flag) = rest.last_mut()
        {
            *flag = b'1';
        }
        // Hex digits and dashes are always a valid value.
        if let Ok(mut value) = HeaderValue::from_bytes(&text) {
            // No secret: but it never comes again, and HTTP/2 would put it into its table of what may, and throw
            // out something that does (RFC 7541 §6.2.3).
            value.set_sensitive(true);
            headers.insert(TRACEPARENT, value);
        }
    }
}

fn is_marked(headers: &HeaderMap) -> bool {
    headers
        .get_all(TRACESTATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|member| member.trim() == MARK)
}

/// A new span id.
pub(crate) fn span_id() -> [u8; 8] {
    fastrand::u64(1..).to_be_bytes()
}

fn hex(bytes: &[u8], out: &mut [u8]) {
    // No table and no branch: many at once.
    let digit = |d: u8| d + if d < 10 { b'0' } else { b'a' - 10 };
    for (byte, pair) in bytes.iter().zip(out.chunks_exact_mut(2)) {
        if let [high, low] = pair {
            *high = digit(byte >> 4);
            *low = digit(byte & 15);
        }
    }
}

/// Reads `traceparent` as W3C Trace Context §3.2 has it; anything else begins a new trace.
fn from_headers(headers: &HeaderMap) -> Option<([u8; 16], [u8; 8], bool)> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let value = values.next()?;
    if values.next().is_some() {
        return None;
    }
    parse(value.as_bytes())
}

fn parse(text: &[u8]) -> Option<([u8; 16], [u8; 8], bool)> {
    let (version, rest) = field(text, 2)?;
    let (trace, rest) = field(rest, 32)?;
    let (parent, rest) = field(rest, 16)?;
    let (flags, rest) = rest.split_at_checked(2)?;
    let [version] = unhex::<1>(version)?;
    // A later version may add fields after a dash; this one may not.
    let ends = if version == 0 {
        rest.is_empty()
    } else {
        rest.is_empty() || rest.starts_with(b"-")
    };
    if version == 0xff || !ends {
        return None;
    }
    let trace = unhex::<16>(trace)?;
    let parent = unhex::<8>(parent)?;
    let [flags] = unhex::<1>(flags)?;
    if trace == [0; 16] || parent == [0; 8] {
        return None;
    }
    Some((trace, parent, flags & 1 == 1))
}

/// The first `len` bytes, and what follows the dash after them.
fn field(text: &[u8], len: usize) -> Option<(&[u8], &[u8])> {
    let (field, rest) = text.split_at_checked(len)?;
    Some((field, rest.strip_prefix(b"-")?))
}

fn unhex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let mut out = [0u8; N];
    let mut good = true;
    let mut value = |d: u8| {
        let (digit, letter) = (d.wrapping_sub(b'0'), d.wrapping_sub(b'a'));
        good &= digit < 10 || letter < 6;
        if digit < 10 {
            digit
        } else {
            letter.wrapping_add(10)
        }
    };
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        if let [high, low] = pair {
            *byte = value(*high) << 4 | value(*low);
        }
    }
    good.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn takes_what_the_standard_takes() {
        let (trace, parent, sampled) = parse(GOOD.as_bytes()).unwrap();
        assert_eq!((trace[0], parent[0], sampled), (0x0a, 0xb7, true));
        assert!(
            parse(GOOD.replace("00-0a", "cc-0a").as_bytes()).is_some(),
            "a later version"
        );
        assert!(parse(format!("{}-more", GOOD.replace("00-0a", "cc-0a")).as_bytes()).is_some());
        for bad in [
            "",
            "00",
            &GOOD.replace("00-0a", "ff-0a"),
            &GOOD.to_uppercase(),
            &format!("{GOOD}-more"),
            &GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            &GOOD.replace("-01", "-1"),
            &GOOD.replace('-', "_"),
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_digit_is_one_of_sixteen() {
        for byte in 0..=u8::MAX {
            let digit = b"0123456789abcdef".iter().position(|digit| *digit == byte);
            let digit = digit.map(|at| u8::try_from(at).unwrap());
            assert_eq!(unhex::<1>(&[b'5', byte]), digit.map(|digit| [0x50 | digit]));
            assert_eq!(unhex::<1>(&[byte, b'a']), digit.map(|digit| [digit << 4 | 0xa]));
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut headers = HeaderMap::new();
        let begun = TraceContext::begin(&headers, 1.0);
        begun.write(&mut headers, [7; 8]);
        assert_eq!(from_headers(&headers), Some((begun.trace_id, [7; 8], true)));
        let unsampled = TraceContext::begin(&HeaderMap::new(), 0.0);
        unsampled.write(&mut headers, [8; 8]);
        let next = TraceContext::begin(&headers, 1.0);
        assert!(!next.sampled, "the parent decides");
        assert_eq!(next.parent, Some([8; 8]));
    }

    #[test]
    fn a_retry_is_marked_once_and_what_others_say_stays() {
        let mut headers = HeaderMap::new();
        assert!(!TraceContext::begin(&headers, 0.0).retry);
        headers.append(TRACESTATE, HeaderValue::from_static("vendor=1"));
        headers.append(TRACESTATE, HeaderValue::from_static("other=2"));
        TraceContext::mark_retry(&mut headers);
        TraceContext::mark_retry(&mut headers);
        assert!(TraceContext::begin(&headers, 0.0).retry);
        let states: Vec<_> = headers.get_all(TRACESTATE).iter().collect();
        assert_eq!(states, ["leeward=retry,vendor=1,other=2"]);
    }

    #[test]
    fn two_parents_are_none() {
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, HeaderValue::from_static(GOOD));
        headers.append(TRACEPARENT, HeaderValue::from_static(GOOD));
        assert_eq!(from_headers(&headers), None);
    }

    proptest! {
        #[test]
        fn never_panics(text in prop::collection::vec(any::<u8>(), 0..80)) {
            parse(&text);
        }
    }
}
