//! A backend that keeps every byte, and reads them more strictly than any server does.

use crate::port::Port;
use bytes::Bytes;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// An HTTP/1.1 request of which there is only one reading.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Captured {
    /// The request line.
    pub line: String,
    /// The header fields as they came: names in their case, values without the white space around them.
    pub headers: Vec<(String, String)>,
    /// The body, its framing taken off.
    pub body: Vec<u8>,
    /// The trailer fields.
    pub trailers: Vec<(String, String)>,
}

/// A TCP server that takes requests apart by itself. What can be read in two ways is a violation. Ends when
/// dropped.
#[derive(Debug)]
pub struct Capture {
    port: Port,
    kept: Arc<Kept>,
    token: CancellationToken,
}

#[derive(Debug, Default)]
struct Kept {
    answer: Mutex<Bytes>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    requests: Vec<Captured>,
    violations: Vec<String>,
    raw: Vec<u8>,
}

/// More than any test sends; what comes after is a violation.
const MOST: usize = 32 << 20;

impl Capture {
    /// Starts one that answers 200 with the body "ok".
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn start() -> anyhow::Result<Self> {
        let port = Port::reserve()?;
        let listener = port.listen()?;
        let (kept, token) = (Arc::<Kept>::default(), CancellationToken::new());
        let capture = Self {
            port,
            kept: Arc::clone(&kept),
            token: token.clone(),
        };
        capture.answer("HTTP/1.1 200 OK\r\nx-backend: capture\r\ncontent-length: 2\r\n\r\nok");
        tokio::spawn(
            token
                .clone()
                .run_until_cancelled_owned(accept(listener, kept, token)),
        );
        Ok(capture)
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Answers every request with these bytes from now on.
    pub fn answer(&self, bytes: impl Into<Bytes>) {
        *self.kept.answer.lock().unwrap_or_else(PoisonError::into_inner) = bytes.into();
    }

    /// The requests so far, which are forgotten here.
    pub fn take_requests(&self) -> Vec<Captured> {
        std::mem::take(&mut self.inner().requests)
    }

    /// What was not one request after the other, each with one reading.
    pub fn violations(&self) -> Vec<String> {
        self.inner().violations.clone()
    }

    /// Every byte so far, of all connections, which are forgotten here.
    pub fn take_raw(&self) -> Vec<u8> {
        std::mem::take(&mut self.inner().raw)
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.kept.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.token.cancel();
    }
}

async fn accept(listener: TcpListener, kept: Arc<Kept>, token: CancellationToken) {
    let tasks = TaskTracker::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        tasks.spawn(
            token
                .clone()
                .run_until_cancelled_owned(serve(stream, Arc::clone(&kept))),
        );
    }
}

async fn serve(mut stream: TcpStream, kept: Arc<Kept>) {
    let mut buffer = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        loop {
            match read(&buffer) {
                Ok(Some((request, consumed))) => {
                    buffer.drain(..consumed);
                    let answer = kept.answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    kept.lock().requests.push(request);
                    if stream.write_all(&answer).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(violation) => {
                    let shown: String = String::from_utf8_lossy(&buffer).chars().take(300).collect();
                    kept.lock().violations.push(format!("{violation} in {shown:?}"));
                    return;
                }
            }
        }
        match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => {
                // A request that was given up half-way is no harm: no server acts on it.
                return;
            }
            Ok(n) => {
                let new = chunk.get(..n).unwrap_or_default();
                kept.lock().raw.extend_from_slice(new);
                buffer.extend_from_slice(new);
                if buffer.len() > MOST {
                    kept.lock()
                        .violations
                        .push("a request of more than 32 MiB".to_owned());
                    return;
                }
            }
        }
    }
}

impl Kept {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Fields = Vec<(String, String)>;

/// Reads one request: `None` if more is needed, else it and its length.
fn read(bytes: &[u8]) -> Result<Option<(Captured, usize)>, String> {
    let Some(head_end) = find(bytes, b"\r\n\r\n") else {
        check_line_ends(bytes)?;
        return Ok(None);
    };
    let (head, rest) = bytes.split_at(head_end + 4);
    let head = head.strip_suffix(b"\r\n").unwrap_or(head);
    check_line_ends(head)?;
    let text = std::str::from_utf8(head).map_err(|_| "a head that is not UTF-8")?;
    let (line, fields) = text.split_once("\r\n").ok_or("no request line")?;
    let parts: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = parts[..] else {
        return Err(format!("the request line {line:?}"));
    };
    if !is_token(method) || target.is_empty() || version != "HTTP/1.1" {
        return Err(format!("the request line {line:?}"));
    }
    let headers = fields_of(fields)?;
    let all = |name: &str| -> Vec<&str> {
        headers
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.as_str())
            .collect()
    };
    if all("host").len() != 1 {
        return Err(format!("{} Host fields", all("host").len()));
    }
    let (body, trailers, length) = match (&all("content-length")[..], &all("transfer-encoding")[..]) {
        ([], []) => (Vec::new(), Vec::new(), 0),
        ([length], []) => {
            if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
                return Err(format!("Content-Length {length:?}"));
            }
            let length: usize = length.parse().map_err(|_| format!("Content-Length {length:?}"))?;
            match rest.get(..length) {
                Some(body) => (body.to_vec(), Vec::new(), length),
                None => return Ok(None),
            }
        }
        ([], ["chunked"]) => match read_chunks(rest)? {
            Some(read) => read,
            None => return Ok(None),
        },
        (lengths, codings) => {
            return Err(format!(
                "Content-Length {lengths:?} and Transfer-Encoding {codings:?}"
            ));
        }
    };
    let request = Captured {
        line: line.to_owned(),
        headers,
        body,
        trailers,
    };
    Ok(Some((request, head_end + 4 + length)))
}

/// Chunks up to and with the trailer section.
fn read_chunks(bytes: &[u8]) -> Result<Option<(Vec<u8>, Fields, usize)>, String> {
    let (mut at, mut body) = (0, Vec::new());
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let Some(end) = find(rest, b"\r\n") else {
            return if rest.len() > 64 {
                Err("an endless chunk size".to_owned())
            } else {
                Ok(None)
            };
        };
        let line = String::from_utf8_lossy(rest.get(..end).unwrap_or_default()).into_owned();
        if line.is_empty() || line.len() > 16 || !line.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("the chunk size {line:?}"));
        }
        let size = usize::from_str_radix(&line, 16).map_err(|_| format!("the chunk size {line:?}"))?;
        at += end + 2;
        if size == 0 {
            let rest = bytes.get(at..).unwrap_or_default();
            if rest.starts_with(b"\r\n") {
                return Ok(Some((body, Vec::new(), at + 2)));
            }
            let Some(end) = find(rest, b"\r\n\r\n") else {
                return Ok(None);
            };
            let trailers = rest.get(..end + 2).unwrap_or_default();
            check_line_ends(trailers)?;
            let text = std::str::from_utf8(trailers).map_err(|_| "trailers that are not UTF-8")?;
            return Ok(Some((body, fields_of(text)?, at + end + 4)));
        }
        let Some(chunk) = bytes.get(at..at.saturating_add(size).saturating_add(2)) else {
            return Ok(None);
        };
        let Some(data) = chunk.strip_suffix(b"\r\n") else {
            return Err(format!("a chunk of {size} bytes that doesn't end there"));
        };
        body.extend_from_slice(data);
        at += size + 2;
    }
}

fn fields_of(text: &str) -> Result<Fields, String> {
    let lines = text.split("\r\n").filter(|line| !line.is_empty());
    lines
        .map(|line| match line.split_once(':') {
            Some((name, value)) if is_token(name) => {
                Ok((name.to_owned(), value.trim_matches([' ', '\t']).to_owned()))
            }
            Some(_) | None => Err(format!("the field line {line:?}")),
        })
        .collect()
}

/// Lines end in CRLF, and CR, LF and NUL stand nowhere else.
fn check_line_ends(head: &[u8]) -> Result<(), String> {
    for (i, byte) in head.iter().enumerate() {
        let next = head.get(i + 1);
        let before = i.checked_sub(1).and_then(|i| head.get(i));
        match byte {
            0 => return Err("NUL in a head".to_owned()),
            b'\r' if !matches!(next, Some(b'\n') | None) => return Err("a bare CR in a head".to_owned()),
            b'\n' if before != Some(&b'\r') => return Err("a bare LF in a head".to_owned()),
            _ => {}
        }
    }
    Ok(())
}

fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}

impl Captured {
    /// All values of a header field.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let named = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_request_has_one_reading() {
        let bytes = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET";
        let (request, length) = read(bytes).unwrap().unwrap();
        assert_eq!(
            (request.body.as_slice(), length),
            (b"abc".as_slice(), bytes.len() - 3)
        );
        let bytes =
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nx: y\r\n\r\n";
        let (request, length) = read(bytes).unwrap().unwrap();
        assert_eq!((request.body.as_slice(), length), (b"ab".as_slice(), bytes.len()));
        assert_eq!(request.trailers, [("x".to_owned(), "y".to_owned())]);
    }

    #[test]
    fn what_has_two_readings_is_a_violation() {
        for bytes in [
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding : chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\nab\r\n",
            "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2;a\r\nab\r\n",
            "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: h\nX: y\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n",
            "GET / HTTP/1.0\r\nHost: h\r\n\r\n",
            "GET  / HTTP/1.1\r\nHost: h\r\n\r\n",
        ] {
            assert!(read(bytes.as_bytes()).is_err(), "{bytes:?}");
        }
        assert_eq!(read(b"GET / HT"), Ok(None));
    }
}
