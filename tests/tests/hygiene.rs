//! Raw bytes at the outbound listener, and the bytes that the backend gets: what has two readings is refused,
//! what is passed on has one (RFC 9112, RFC 9110).

use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::raw::{Heard, Raw, exchange};
use leeward_testkit::{Capture, Captured, Mesh};
use std::net::SocketAddr;
use std::time::Duration;

/// Silence after which nothing more is expected.
const QUIET: Duration = Duration::from_millis(150);

/// One proxy with everything routed to a backend that keeps what it gets.
struct Bench {
    _mesh: Mesh,
    capture: Capture,
    outbound: SocketAddr,
}

impl Bench {
    async fn start() -> anyhow::Result<Self> {
        let mesh = Mesh::builder().node("a", "a1").start().await?;
        let capture = Capture::start()?;
        let policy = service("it", &[(capture.address(), "a", "")], &[])
            + &route("it", "*", "it", &["timeouts: {request: 2s}"]);
        mesh.apply(&policy).await?;
        let outbound = mesh.node("a1")?.outbound;
        Ok(Self {
            _mesh: mesh,
            capture,
            outbound,
        })
    }

    async fn say(&self, bytes: impl AsRef<[u8]>) -> anyhow::Result<(Heard, Vec<Captured>)> {
        let heard = exchange(self.outbound, bytes.as_ref(), QUIET).await?;
        Ok((heard, self.capture.take_requests()))
    }

    /// The request is refused with `status`, the connection is closed, and the backend hears nothing of it:
    /// neither of the request nor of what follows it.
    async fn refuses(&self, bytes: impl AsRef<[u8]>, status: u16) -> anyhow::Result<()> {
        let bytes = bytes.as_ref();
        // What a smuggler would hide behind it.
        let with_more = [bytes, b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"].concat();
        for bytes in [bytes, &with_more] {
            let shown = shown(bytes);
            let (heard, requests) = self.say(bytes).await?;
            ensure!(
                heard.statuses() == [status],
                "{shown}: want {status}, heard {:?}",
                heard.text()
            );
            ensure!(heard.closed, "{shown}: the connection stays open");
            ensure!(requests.is_empty(), "{shown}: passed on as {requests:?}");
        }
        self.is_clean()
    }

    /// The request is answered and passed on in a form with one reading, alone.
    async fn passes(&self, bytes: impl AsRef<[u8]>) -> anyhow::Result<Captured> {
        let shown = shown(bytes.as_ref());
        let (heard, mut requests) = self.say(bytes).await?;
        ensure!(heard.statuses() == [200], "{shown}: heard {:?}", heard.text());
        ensure!(requests.len() == 1, "{shown}: passed on as {requests:?}");
        self.is_clean()?;
        requests.pop().context("no request")
    }

    /// Nothing that the backend got has two readings.
    fn is_clean(&self) -> anyhow::Result<()> {
        let violations = self.capture.violations();
        ensure!(violations.is_empty(), "the backend got {violations:?}");
        Ok(())
    }
}

fn shown(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().take(200).collect();
    format!("{text:?}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_with_both_framings_is_chunked_and_the_last_on_its_connection() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    let (body, more) = ("0\r\n\r\n", "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n");
    for framing in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "transfer-ENCODING: chunked\r\ncontent-LENGTH: 5",
        "Content-Length: 5\r\nX: y\r\nTransfer-Encoding: chunked",
    ] {
        let head = format!("POST / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n");
        // RFC 9112 §6.1: refuse, or go by Transfer-Encoding alone and close the connection. Whole, and in
        // pieces: the second piece begins in the middle of a field's name.
        let split = head
            .to_ascii_lowercase()
            .find("ding")
            .context("no Transfer-Encoding")?;
        for at in [0, split, head.len() - 1] {
            let mut raw = Raw::connect(bench.outbound).await?;
            raw.write(&head.as_bytes()[..at]).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
            raw.write(&[&head.as_bytes()[at..], body.as_bytes(), more.as_bytes()].concat())
                .await?;
            let heard = raw.listen(QUIET).await;
            let requests = bench.capture.take_requests();
            let statuses = heard.statuses();
            assert!(
                matches!(statuses[..], [200 | 400]),
                "{framing:?}: {:?}",
                heard.text()
            );
            assert!(
                heard.closed,
                "{framing:?} in pieces of {at}: the connection stays open"
            );
            assert_eq!(
                requests.len(),
                usize::from(statuses == [200]),
                "{framing:?}: {requests:?}"
            );
            assert!(
                requests
                    .iter()
                    .all(|r| r.body.is_empty() && r.line == "POST / HTTP/1.1")
            );
            bench.is_clean()?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_whose_framing_is_unclear_are_refused() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    for framing in [
        "Content-Length: 5\r\nTransfer-Encoding: gzip, chunked",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5, 6",
        // No lengths.
        "Content-Length: -5",
        "Content-Length: +5",
        "Content-Length: 5 5",
        "Content-Length: 0x5",
        "Content-Length: five",
        "Content-Length:",
        "Content-Length: 18446744073709551616",
        "Content-Length: 99999999999999999999999999",
        // Chunked that isn't the last coding, or isn't chunked.
        "Transfer-Encoding: chunked, gzip",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunkedx",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding:",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: chunked;",
    ] {
        let request = format!("POST / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n0\r\n\r\n");
        bench
            .refuses(request, 400)
            .await
            .with_context(|| framing.to_owned())?;
    }
    // The same length twice may be taken for one (RFC 9112 §6.3), if one goes on.
    for framing in [
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 05",
        "Content-Length: 5,5",
        "Content-Length: 5, 5",
    ] {
        let request = format!("POST / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n0\r\n\r\n");
        let (heard, requests) = bench.say(request).await?;
        match heard.statuses()[..] {
            // The capture finds it a violation if there is not exactly one framing field.
            [200] => assert_eq!(
                (requests.len(), &requests[0].body[..]),
                (1, &b"0\r\n\r\n"[..]),
                "{framing}"
            ),
            [400] => assert!(requests.is_empty() && heard.closed, "{framing}"),
            _ => panic!("{framing}: {:?}", heard.text()),
        }
        bench.is_clean()?;
    }
    // Two layers of chunking: the first is the framing, the second nobody has asked for.
    for framing in [
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, chunked",
    ] {
        let request = format!("POST / HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n0\r\n\r\n");
        bench
            .refuses(request, 400)
            .await
            .with_context(|| framing.to_owned())?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_and_values_that_servers_read_differently_are_refused() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    for field in [
        // White space before the colon (RFC 9112 §5.1), also where it hides a framing field.
        "X-A : b",
        "Transfer-Encoding : chunked",
        "Content-Length : 5",
        "X-A\t: b",
        // Folding (§5.2).
        "X-A: b\r\n c",
        "X-A: b\r\n\tc",
        "Transfer-Encoding:\r\n chunked",
        // A field line that begins with white space, after another.
        "X-A: b\r\n X-B: c",
        // Control characters.
        "X-A: b\0c",
        "X-A: b\rc",
        "X-A: b\x01c",
        "X-A: b\x7fc",
        "X-\0A: b",
        "X-\x0bA: b",
        // Not names.
        ": b",
        "X A: b",
        "X(A): b",
        "X-A",
        "\u{e9}: b",
        "Transfer\rEncoding: chunked",
        "Transfer-Encoding\0: chunked",
    ] {
        let request = format!("GET / HTTP/1.1\r\nHost: h\r\n{field}\r\n\r\n");
        bench
            .refuses(request, 400)
            .await
            .with_context(|| field.to_owned())?;
    }
    // A first field that begins with white space (RFC 9112 §2.2).
    bench
        .refuses("GET / HTTP/1.1\r\n Host: h\r\nHost: h\r\n\r\n", 400)
        .await?;
    // Bytes above 0x7f are opaque, and go on as they are.
    let request = bench
        .passes(b"GET / HTTP/1.1\r\nHost: h\r\nX-A: \xc3\xa9\r\n\r\n")
        .await?;
    assert_eq!(request.all("x-a"), ["\u{e9}"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_lines_that_are_none_are_refused() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    for line in [
        "GET /",
        "GET",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 x",
        "GET / a HTTP/1.1",
        "GET /\tHTTP/1.1",
        "G\0T / HTTP/1.1",
        "G(T / HTTP/1.1",
        " GET / HTTP/1.1",
        "GET /a\0b HTTP/1.1",
        "GET /a\x01b HTTP/1.1",
        "GET /a\x7fb HTTP/1.1",
        "GET a HTTP/1.1",
        "GET ?a HTTP/1.1",
        "GET http:// HTTP/1.1",
        "GET http://u@h/ HTTP/1.1",
        "GET / HTTP/1",
        "GET / HTTP/1.",
        "GET / HTTP/1.12",
        "GET / HTTP/11.1",
        "GET / http/1.1",
        "GET / HTTQ/1.1",
        "GET / HTTP/ 1.1",
    ] {
        bench
            .refuses(format!("{line}\r\nHost: h\r\n\r\n"), 400)
            .await
            .with_context(|| line.to_owned())?;
    }
    for line in ["CONNECT h:80 HTTP/1.1"] {
        bench
            .refuses(format!("{line}\r\nHost: h:80\r\n\r\n"), 501)
            .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_that_are_not_served_are_refused() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    for version in ["HTTP/2.0", "HTTP/0.9", "HTTP/1.2", "HTTP/3.0"] {
        let (heard, requests) = bench.say(format!("GET / {version}\r\nHost: h\r\n\r\n")).await?;
        // RFC 9110 §15.6.6 has 505; 400 says as much. A later minor version is 1.1 to us (§2.5).
        let statuses = heard.statuses();
        assert!(
            matches!(statuses[..], [400 | 505]),
            "{version}: {:?}",
            heard.text()
        );
        assert!(requests.is_empty() && heard.closed, "{version}: {requests:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_is_there_once_and_is_one() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    for head in [
        "GET / HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nhost: i\r\n",
        "GET / HTTP/1.1\r\nHost:\r\n",
        "GET / HTTP/1.1\r\nHost: h, i\r\n",
        "GET / HTTP/1.1\r\nHost: h i\r\n",
        "GET / HTTP/1.1\r\nHost: h/i\r\n",
        "GET / HTTP/1.1\r\nHost: u@h\r\n",
        "GET / HTTP/1.1\r\nHost: h:port\r\n",
        "GET / HTTP/1.1\r\nHost: h:80:80\r\n",
        "GET / HTTP/1.1\r\nHost: [::1\r\n",
        "GET / HTTP/1.1\r\nHost: h]\r\n",
        "GET http://h/ HTTP/1.1\r\n",
        "GET http://h/ HTTP/1.1\r\nHost: h\r\nHost: h\r\n",
    ] {
        bench
            .refuses(format!("{head}\r\n"), 400)
            .await
            .with_context(|| head.to_owned())?;
    }
    // With a target in absolute form, that is the authority and Host is replaced (RFC 9112 §3.2.2).
    let request = bench
        .passes("GET http://h.example:81/a?b HTTP/1.1\r\nHost: other.example\r\n\r\n")
        .await?;
    assert_eq!(
        (request.line.as_str(), request.all("host")),
        ("GET /a?b HTTP/1.1", vec!["h.example:81"])
    );
    let request = bench
        .passes("GET http://h.example HTTP/1.1\r\nHost: h.example\r\n\r\n")
        .await?;
    assert_eq!(
        (request.line.as_str(), request.all("host")),
        ("GET / HTTP/1.1", vec!["h.example"])
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn line_ends_are_made_right_or_refused() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    // A recipient may take a bare LF for a line's end (RFC 9112 §2.2); what goes on has CRLF.
    for bytes in [
        "GET /lf HTTP/1.1\nHost: h\n\n",
        "GET /lf HTTP/1.1\r\nHost: h\nX-A: b\r\n\r\n",
        "GET /lf HTTP/1.1\r\nHost: h\r\nX-A: b\n\n",
    ] {
        let (heard, requests) = bench.say(bytes).await?;
        let statuses = heard.statuses();
        assert!(
            matches!(statuses[..], [200 | 400]),
            "{bytes:?}: {:?}",
            heard.text()
        );
        assert_eq!(
            requests.len(),
            usize::from(statuses == [200]),
            "{bytes:?}: {requests:?}"
        );
        bench.is_clean()?;
    }
    // A bare CR is never a line's end.
    bench.refuses("GET / HTTP/1.1\rHost: h\r\r", 400).await?;
    bench
        .refuses("GET / HTTP/1.1\r\nHost: h\rX-A: b\r\n\r\n", 400)
        .await?;
    // Empty lines before a request line are skipped (§2.2).
    bench.passes("\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunked_bodies_are_read_strictly_and_framed_anew() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    let head = "POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (body, want) in [
        ("3\r\nabc\r\n0\r\n\r\n", "abc"),
        ("3\r\nabc\r\n00B\r\nhello world\r\n000\r\n\r\n", "abchello world"),
        (
            "A\r\n0123456789\r\na\r\nabcdefghij\r\n0\r\n\r\n",
            "0123456789abcdefghij",
        ),
        // Extensions are for this hop, and end here.
        ("3;name=value\r\nabc\r\n0;last\r\n\r\n", "abc"),
        ("3 ;name=\"va lue\"\r\nabc\r\n0\r\n\r\n", "abc"),
        ("0\r\n\r\n", ""),
    ] {
        let request = bench
            .passes(format!("{head}{body}"))
            .await
            .with_context(|| body.to_owned())?;
        assert_eq!(String::from_utf8_lossy(&request.body), want, "{body:?}");
        assert_eq!(
            request.all("content-length").len() + request.all("transfer-encoding").len(),
            1
        );
    }
    for body in [
        "g\r\nabc\r\n0\r\n\r\n",
        "-3\r\nabc\r\n0\r\n\r\n",
        "+3\r\nabc\r\n0\r\n\r\n",
        "0x3\r\nabc\r\n0\r\n\r\n",
        "\r\nabc\r\n0\r\n\r\n",
        " 3\r\nabc\r\n0\r\n\r\n",
        "3 3\r\nabc\r\n0\r\n\r\n",
        "3\nabc\n0\n\n",
        "3\r\nabc\n0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\r\nab\r\n0\r\n\r\n",
        "3\rabc\r0\r\r",
        "3;a\nb\r\nabc\r\n0\r\n\r\n",
        "3;a\r\r\nabc\r\n0\r\n\r\n",
        "10000000000000003\r\nabc\r\n0\r\n\r\n",
        "f0000000000000003\r\nabc\r\n0\r\n\r\n",
    ] {
        // The head is good, so the request may have begun to be passed on; it must never be whole, and
        // nothing after it is a request.
        let bytes = format!("{head}{body}GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n");
        let (heard, requests) = bench.say(bytes).await?;
        let statuses = heard.statuses();
        assert!(
            heard.closed,
            "{body:?}: the connection stays open; heard {:?}",
            heard.text()
        );
        assert!(
            matches!(statuses[..], [] | [400 | 502]),
            "{body:?}: {:?}",
            heard.text()
        );
        assert!(requests.is_empty(), "{body:?}: passed on as {requests:?}");
        bench.is_clean()?;
    }
    // More than can ever come is a body that doesn't end.
    let endless = format!("{head}ffffffffffffffff\r\nGET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n");
    let (heard, requests) = bench.say(endless).await?;
    assert!(
        matches!(heard.statuses()[..], [400 | 504]) && requests.is_empty(),
        "{:?}",
        heard.text()
    );
    bench.is_clean()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_go_on_only_as_trailers() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    let request = bench
        .passes(
            "POST /t HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n\
             3\r\nabc\r\n0\r\nX-Sum: 1\r\nContent-Length: 99\r\nHost: evil\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
        .await?;
    assert_eq!(request.body, b"abc");
    assert_eq!(request.all("host"), ["h"]);
    for (name, _) in &request.trailers {
        let name = name.to_ascii_lowercase();
        assert!(
            !["content-length", "host", "transfer-encoding"].contains(&name.as_str()),
            "{request:?}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_that_are_too_large_are_431() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    let long = "a".repeat(256 << 10);
    bench
        .refuses(format!("GET / HTTP/1.1\r\nHost: h\r\nX-A: {long}\r\n\r\n"), 431)
        .await?;
    let many: String = (0..200).map(|i| format!("X-{i}: a\r\n")).collect();
    bench
        .refuses(format!("GET / HTTP/1.1\r\nHost: h\r\n{many}\r\n"), 431)
        .await?;
    // A target that is too long may be 414 as well (RFC 9112 §3).
    let (heard, requests) = bench
        .say(format!("GET /{long} HTTP/1.1\r\nHost: h\r\n\r\n"))
        .await?;
    assert!(matches!(heard.statuses()[..], [414 | 431]), "{:?}", heard.text());
    assert!(requests.is_empty() && heard.closed);
    // What browsers send at most goes through.
    let fair = "a".repeat(16 << 10);
    let request = bench
        .passes(format!("GET / HTTP/1.1\r\nHost: h\r\nX-A: {fair}\r\n\r\n"))
        .await?;
    assert_eq!(request.all("x-a"), [fair]);
    let fair: String = (0..90).map(|i| format!("X-{i}: a\r\n")).collect();
    bench
        .passes(format!("GET / HTTP/1.1\r\nHost: h\r\n{fair}\r\n"))
        .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_1_0_is_served_and_its_connections_end() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    for head in [
        "GET /old HTTP/1.0\r\nHost: h\r\n",
        "GET /old HTTP/1.0\r\nHost: h\r\nConnection: close\r\n",
    ] {
        let (heard, requests) = bench.say(format!("{head}\r\n")).await?;
        assert_eq!(heard.statuses(), [200], "{:?}", heard.text());
        assert!(
            heard.closed,
            "an HTTP/1.0 client waits for the end: {:?}",
            heard.text()
        );
        assert!(
            !heard.text().to_ascii_lowercase().contains("transfer-encoding"),
            "{:?}",
            heard.text()
        );
        assert_eq!(requests.len(), 1);
        assert_eq!(requests[0].line, "GET /old HTTP/1.1");
        bench.is_clean()?;
    }
    // RFC 9112 §3.2: HTTP/1.0 has no Host; without one there is nothing to route by.
    bench.refuses("GET /old HTTP/1.0\r\n\r\n", 400).await?;
    // §6.1: a server that gets Transfer-Encoding in HTTP/1.0 must treat the framing as faulty.
    bench
        .refuses(
            "POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        )
        .await?;
    // An answer of unknown length ends with the connection.
    bench
        .capture
        .answer("HTTP/1.1 200 OK\r\nx-backend: c\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    let (heard, _) = bench
        .say("GET /old HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n")
        .await?;
    let text = heard.text();
    assert!(heard.closed && text.ends_with("\r\n\r\nabc"), "{text:?}");
    assert!(
        !text.to_ascii_lowercase().contains("transfer-encoding"),
        "{text:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_requests_are_answered_in_order() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    let one = "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n";
    let two = "POST /2 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc";
    let three = "POST /3 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let four = "GET /4 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let after = "GET /never HTTP/1.1\r\nHost: h\r\n\r\n";
    let (heard, requests) = bench.say([one, two, three, four, after].concat()).await?;
    assert_eq!(heard.statuses(), [200, 200, 200, 200], "{:?}", heard.text());
    assert!(heard.closed, "the client asked to close");
    let lines: Vec<_> = requests.iter().map(|r| r.line.as_str()).collect();
    assert_eq!(
        lines,
        [
            "GET /1 HTTP/1.1",
            "POST /2 HTTP/1.1",
            "POST /3 HTTP/1.1",
            "GET /4 HTTP/1.1"
        ]
    );
    assert_eq!(
        (requests[1].body.as_slice(), requests[2].body.as_slice()),
        (b"abc".as_slice(), b"abc".as_slice())
    );
    bench.is_clean()?;

    // A bad one ends the connection after the answers before it.
    let bad = "GET /5 HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n";
    let (heard, requests) = bench.say([one, bad, one].concat()).await?;
    assert_eq!(heard.statuses(), [200, 400], "{:?}", heard.text());
    assert!(heard.closed && requests.len() == 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_is_never_read_as_a_request() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    let hidden = "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
    for method in ["GET", "POST", "DELETE", "HEAD", "OPTIONS", "QUERY"] {
        let bytes = format!(
            "{method} /b HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{hidden}",
            hidden.len()
        );
        if method == "HEAD" {
            bench
                .capture
                .answer("HTTP/1.1 200 OK\r\nx-backend: c\r\ncontent-length: 2\r\n\r\n");
        }
        let request = bench.passes(bytes).await?;
        assert_eq!(request.line, format!("{method} /b HTTP/1.1"));
        assert_eq!(String::from_utf8_lossy(&request.body), hidden);
        bench
            .capture
            .answer("HTTP/1.1 200 OK\r\nx-backend: c\r\ncontent-length: 2\r\n\r\nok");
    }
    // A body whose end never comes reaches the backend as a request that never ends.
    let mut raw = Raw::connect(bench.outbound).await?;
    raw.write(b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\nabc")
        .await?;
    raw.finish().await?;
    let heard = raw.listen(QUIET).await;
    assert!(
        heard.closed && heard.statuses().iter().all(|s| *s >= 400),
        "{:?}",
        heard.text()
    );
    assert!(bench.capture.take_requests().is_empty());
    bench.is_clean()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn targets_go_on_in_the_one_form_that_is_theirs() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    // What RFC 3986 takes for the same is one; the rest goes on as it came.
    for (target, want) in [
        ("/a//b/../c/./d", "/a//c/d"),
        ("/a/%2e%2E/%2f%00%7e%41", "/%2F%00~A"),
        ("/a?b=c&d=%20e?f%2e/../", "/a?b=c&d=%20e?f%2e/../"),
        ("/a;b=c,d%3a%2B", "/a;b=c,d%3A%2B"),
        ("/*'()!", "/*'()!"),
        ("/a|b\\{c}", "/a%7Cb%5C%7Bc%7D"),
        ("//h/a", "//h/a"),
    ] {
        let request = bench
            .passes(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n"))
            .await;
        let request = request.with_context(|| target.to_owned())?;
        assert_eq!(request.line, format!("GET {want} HTTP/1.1"));
    }
    for target in ["/a%zz", "/a%2", "/..", "/a/%2e%2e/../b"] {
        bench
            .refuses(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n"), 400)
            .await
            .with_context(|| target.to_owned())?;
    }
    // "*" is not below "/", so no path prefix matches it.
    let (heard, _) = bench.say("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n").await?;
    assert_eq!(heard.statuses(), [404], "{:?}", heard.text());
    // A fragment is never part of a request (RFC 9112 §3.2): refused, or left out.
    let (heard, requests) = bench.say("GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n").await?;
    assert!(matches!(heard.statuses()[..], [200 | 400]), "{:?}", heard.text());
    assert!(requests.iter().all(|r| !r.line.contains('#')), "{requests:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_can_be_read_two_ways_are_not_passed_on() -> anyhow::Result<()> {
    let bench = Bench::start().await?;
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nX-A: b\0c\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nX-A: b\rc\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "nonsense\r\n\r\n",
        // Nobody asked for another coding, and taking off the framing would lose it.
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nConnection: close\r\n\r\nok",
    ] {
        bench.capture.answer(answer);
        let (heard, _) = bench.say("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await?;
        assert_eq!(heard.statuses(), [502], "{answer:?}: {:?}", heard.text());
    }
    // Both framings: the proxy takes one and says only that (RFC 9112 §6.3), or refuses.
    bench.capture.answer(
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    );
    let (heard, _) = bench.say("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await?;
    let text = heard.text().to_ascii_lowercase();
    assert!(
        !(text.contains("content-length: 9") && text.contains("transfer-encoding")),
        "{text:?}"
    );
    assert!(matches!(heard.statuses()[..], [200 | 502]), "{text:?}");
    // What follows an answer on its connection is nobody's answer.
    bench.capture.answer(
        "HTTP/1.1 200 OK\r\nx-backend: c\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
    );
    for _ in 0..5 {
        let (heard, _) = bench.say("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await?;
        assert!(!heard.text().contains("evil"), "{:?}", heard.text());
    }
    // And a good one is passed on after all of these.
    bench
        .capture
        .answer("HTTP/1.1 200 OK\r\nx-backend: c\r\nContent-Length: 2\r\n\r\nok");
    bench.passes("GET / HTTP/1.1\r\nHost: h\r\n\r\n").await?;
    Ok(())
}
