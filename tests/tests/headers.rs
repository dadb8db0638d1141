//! What an intermediary does to header fields: what is for one hop stays there, what is the mesh's own can't
//! be forged, requests don't go in circles (RFC 9110 §7.6).

use anyhow::Context;
use http::HeaderValue;
use leeward_identity::{Identity, SpiffeId};
use leeward_testkit::policy::{route, service};
use leeward_testkit::raw::exchange;
use leeward_testkit::{Answer, Backend, Behave, Capture, Mesh, Protocol, get};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const QUIET: Duration = Duration::from_millis(150);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_for_one_hop_of_a_request_stays_there() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let capture = Capture::start()?;
    let policy = service("near", &[(capture.address(), "a", "")], &[])
        + &service("far", &[(capture.address(), "b", "b1")], &[])
        + &route("near", "near.example", "near", &[])
        + &route("far", "far.example", "far", &[]);
    mesh.apply(&policy).await?;
    for (host, proxies) in [("near.example", 1), ("far.example", 2)] {
        let request = format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close, X-Secret , TE\r\nX-Secret: 1\r\n\
             Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nTE: gzip, trailers\r\n\
             Proxy-Authorization: Basic eA==\r\nUpgrade-Insecure-Requests: 1\r\nX-Kept: a\r\nX-Kept: b\r\n\
             Leeward-Endpoint: evil/1.2.3.4:5\r\nLeeward-Reason: ok\r\nVia: 1.0 before\r\nCookie: a=1\r\n\r\n"
        );
        let heard = exchange(mesh.node("a1")?.outbound, request.as_bytes(), QUIET).await?;
        assert_eq!(heard.statuses(), [200], "{:?}", heard.text());
        assert!(heard.closed, "the client asked to close");
        let seen = capture.take_requests().pop().context("no request came")?;
        for name in [
            "x-secret",
            "keep-alive",
            "proxy-connection",
            "proxy-authorization",
            "leeward-reason",
        ] {
            assert!(seen.all(name).is_empty(), "{host}: {name} in {:?}", seen.headers);
        }
        assert!(
            seen.all("leeward-endpoint").is_empty(),
            "{host}: {:?}",
            seen.headers
        );
        let connection = seen.all("connection").join(",").to_ascii_lowercase();
        assert!(
            !connection.contains("close") && !connection.contains("secret"),
            "{host}: {connection:?}"
        );
        assert_eq!(seen.all("te"), ["trailers"]);
        assert_eq!(seen.all("x-kept"), ["a", "b"]);
        assert_eq!(seen.all("upgrade-insecure-requests"), ["1"]);
        assert_eq!(seen.all("cookie"), ["a=1"]);
        assert_eq!(seen.all("host"), [host]);
        let via = seen.all("via").join(", ");
        assert!(
            via.starts_with("1.0 before, ") && via.matches("leeward-").count() == proxies,
            "{host}: {via}"
        );
    }
    assert_eq!(capture.violations(), [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_for_one_hop_of_an_answer_stays_there() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let capture = Capture::start()?;
    capture.answer(
        "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Authenticate: Basic\r\nX-Kept: a\r\nX-Kept: b\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\
         Leeward-Reason: timeout\r\nLeeward-Degraded: evil/0\r\nContent-Length: 2\r\n\r\nok",
    );
    let policy = service("near", &[(capture.address(), "a", "")], &[])
        + &service("far", &[(capture.address(), "b", "b1")], &[])
        + &route("near", "near.example", "near", &[])
        + &route("far", "far.example", "far", &[]);
    mesh.apply(&policy).await?;
    for host in ["near.example", "far.example"] {
        for protocol in [Protocol::Http1, Protocol::Http2] {
            let reply = mesh.workload("a1", protocol)?.get(host, "/").await?;
            assert_eq!(
                (reply.status.as_u16(), reply.text().as_str()),
                (200, "ok"),
                "{host}"
            );
            for name in [
                "x-secret",
                "keep-alive",
                "proxy-authenticate",
                "leeward-reason",
                "leeward-degraded",
            ] {
                assert!(
                    !reply.headers.contains_key(name),
                    "{host}: {name} in {:?}",
                    reply.headers
                );
            }
            let all = |name: &str| -> Vec<&HeaderValue> { reply.headers.get_all(name).iter().collect() };
            assert_eq!(all("x-kept"), ["a", "b"]);
            assert_eq!(all("set-cookie"), ["a=1", "b=2"]);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cookies_that_http_2_split_are_joined_for_http_1() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let capture = Capture::start()?;
    let policy = service("it", &[(capture.address(), "a", "")], &[]) + &route("it", "it.example", "it", &[]);
    mesh.apply(&policy).await?;
    let mut request = get("it.example", "/");
    request
        .headers_mut()
        .append("cookie", HeaderValue::from_static("a=1"));
    request
        .headers_mut()
        .append("cookie", HeaderValue::from_static("b=2"));
    mesh.workload("a1", Protocol::Http2)?.call(request).await?;
    let seen = capture.take_requests().pop().context("no request came")?;
    assert_eq!(seen.all("cookie"), ["a=1; b=2"]);
    assert_eq!(seen.all("host"), ["it.example"]);
    assert_eq!(capture.violations(), [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circle_is_cut() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    // A service whose endpoint is the proxy itself.
    let outbound = mesh.node("a1")?.outbound;
    let policy = service("self", &[(outbound, "a", "")], &[]) + &route("self", "self.example", "self", &[]);
    mesh.apply(&policy).await?;
    let reply = mesh
        .workload("a1", Protocol::Http1)?
        .get("self.example", "/")
        .await?;
    // The proxy's own answer comes back to it as that of a workload, so its reason is taken off.
    assert_eq!(reply.status.as_u16(), 508, "{reply:?}");
    let requests = mesh
        .node("a1")?
        .metric("leeward_requests_total", &["direction=\"outbound\""])
        .await?;
    assert!(requests <= 20.0, "{requests} requests were made of one");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_inbound_listener_is_for_proxies_and_for_its_own_workloads_only() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (mine, other) = (Backend::start("mine")?, Backend::start("other")?);
    mine.behave(Behave::Answer(Answer::text("mine")));
    let policy = service(
        "app",
        &[(mine.address(), "b", "b1"), (other.address(), "a", "a1")],
        &[],
    ) + &route("app", "app.example", "app", &[]);
    mesh.apply(&policy).await?;
    let inbound = mesh.node("b1")?.inbound;

    // Without TLS, nothing is answered.
    let heard = exchange(inbound, b"GET / HTTP/1.1\r\nHost: app.example\r\n\r\n", QUIET).await?;
    assert!(heard.closed && heard.statuses().is_empty(), "{:?}", heard.text());

    let ask = |who: &'static str, endpoint: String| {
        let identity = mesh.identity(who);
        async move {
            let identity = Identity::load(identity)?;
            let expect = SpiffeId::proxy("leeward.test", "b", "b1")?;
            let config = identity.client_config(&[b"http/1.1"], &expect)?;
            let stream = tokio::net::TcpStream::connect(inbound).await?;
            let name = inbound.ip().into();
            let mut stream = tokio_rustls::TlsConnector::from(config)
                .connect(name, stream)
                .await?;
            let request = format!(
                "GET / HTTP/1.1\r\nHost: app.example\r\nLeeward-Endpoint: {endpoint}\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await??;
            anyhow::Ok(answer)
        }
    };
    // A proxy gets what is behind this one,
    let answer = ask("a1", format!("app/{}", mine.address())).await?;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("mine"),
        "{answer}"
    );
    // and nothing else: not another zone's endpoint, not an address that policy doesn't name.
    for endpoint in [
        format!("app/{}", other.address()),
        format!("app/{}", mesh.node("b1")?.admin),
        "x".into(),
    ] {
        let answer = ask("a1", endpoint).await?;
        assert!(
            answer.starts_with("HTTP/1.1 503") && answer.contains("unknown_endpoint"),
            "{answer}"
        );
    }
    // A user's certificate is no proxy's.
    let answer = ask("user", format!("app/{}", mine.address())).await;
    assert!(answer.as_ref().map_or(true, String::is_empty), "{answer:?}");
    assert_eq!(other.requests(), 0);
    Ok(())
}
