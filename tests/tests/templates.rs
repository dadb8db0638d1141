//! Answers and redirections that say what a request has, and requests that would rather say more.

use anyhow::{Context, ensure};
use http::{HeaderName, HeaderValue, Method};
use leeward_testkit::policy::{fallback, route, service};
use leeward_testkit::{Backend, Mesh, Protocol, Reply, empty_body, request};
use serde_json::Value;

/// What a request would have to say to get out of each of its places.
const NASTY: [&str; 6] = [
    r#"","admin":true,"x":""#,
    r#"\","admin":true,"x":"\"#,
    "\"><script>alert('1')</script>&amp;",
    "a\tb \u{e9}\u{2028}",
    "%0d%0ax-evil: 1%00",
    "${cause}$$",
];

/// A mesh in which everything falls back, with these rungs by the names of their hosts.
async fn falling(rungs: &[(&str, &str)]) -> anyhow::Result<(Mesh, Backend)> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let dead = Backend::refusing("dead")?;
    let mut policy = service("shop", &[(dead.address(), "a", "")], &[]);
    for (name, rung) in rungs {
        // Only one of the two causes that a dead service has, so that its name is known.
        policy += &fallback(name, &[rung], &[]);
        policy += &route(
            name,
            &format!("{name}.example"),
            "shop",
            &[&format!("fallback: {name}"), "fault: {abort: Reset}"],
        );
    }
    mesh.apply(&policy).await?;
    Ok((mesh, dead))
}

async fn asked(
    mesh: &Mesh,
    protocol: Protocol,
    host: &str,
    target: &str,
    said: &[u8],
) -> anyhow::Result<Reply> {
    let mut request = request(Method::PUT, host, target, empty_body());
    let name = HeaderName::from_static("x-said");
    request.headers_mut().insert(name, HeaderValue::from_bytes(said)?);
    mesh.workload("a1", protocol)?.call(request).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_are_what_they_are_and_stay_where_they_belong() -> anyhow::Result<()> {
    let json = "static: {status: 200, template: true, headers: [{name: Content-Type, value: application/problem+json}, \
        {name: x-echo, value: \"<${request.header.x-said}>\"}, {name: x-plain, value: \"$$5 ${zone}\"}], \
        body: '{\"said\":\"${request.header.X-Said}\",\"method\":\"${request.method}\",\"path\":\"${request.path}\",\
        \"query\":\"${request.query}\",\"host\":\"${request.host}\",\"cause\":\"${cause}\",\"route\":\"${route}\",\
        \"service\":\"${service}\",\"zone\":\"${zone}\",\"none\":\"${request.header.x-none}\",\"price\":\"$$5\"}'}";
    let html = "static: {status: 200, template: true, headers: [{name: content-type, value: text/html; charset=utf-8}], \
        body: '<p title=\"${request.header.x-said}\">${request.header.x-said}</p>'}";
    let text = "static: {status: 200, template: true, headers: [{name: content-type, value: text/plain}], \
        body: \"${request.method} ${request.header.x-said}\"}";
    let fixed = "static: {status: 200, headers: [{name: x-echo, value: \"${cause}$\"}], body: \"${request.path} $$\"}";
    let rungs = [("json", json), ("html", html), ("text", text), ("fixed", fixed)];
    let (mesh, _dead) = falling(&rungs).await?;
    let long = "\"<".repeat(4 << 10);
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for said in NASTY.into_iter().chain([long.as_str()]) {
            let target = "/a%22b/%0d%0a'c'?q=%3Cb%3E&r='s'";
            let reply = asked(&mesh, protocol, "JSON.example:80", target, said.as_bytes()).await?;
            let body: Value = serde_json::from_slice(&reply.body).with_context(|| reply.text())?;
            let want = serde_json::json!({
                "said": said, "method": "PUT", "path": "/a%22b/%0D%0A'c'", "query": "q=%3Cb%3E&r='s'",
                "host": "json.example", "cause": "reset", "route": "json", "service": "shop", "zone": "a",
                "none": "", "price": "$5",
            });
            assert_eq!(body, want);
            let shown: String = said.chars().filter(|c| matches!(c, ' '..='~')).collect();
            assert_eq!(reply.header("x-echo"), format!("<{shown}>"));
            assert_eq!(reply.header("x-plain"), "$5 a");
            assert!(!reply.headers.contains_key("x-evil"), "{:?}", reply.headers);

            let reply = asked(&mesh, protocol, "html.example", "/", said.as_bytes()).await?;
            let escaped = said
                .replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('>', "&gt;")
                .replace('"', "&quot;")
                .replace('\'', "&#39;");
            assert_eq!(reply.text(), format!("<p title=\"{escaped}\">{escaped}</p>"));

            let reply = asked(&mesh, protocol, "text.example", "/", said.as_bytes()).await?;
            assert_eq!(reply.text(), format!("PUT {said}"));

            // What isn't said to be a template is none.
            let reply = asked(&mesh, protocol, "fixed.example", "/", said.as_bytes()).await?;
            assert_eq!(reply.text(), "${request.path} $$");
            assert_eq!(reply.header("x-echo"), "${cause}$");
        }
        // Bytes that are no text don't make the answer one either, nor take it away.
        let reply = asked(&mesh, protocol, "json.example", "/", b"a\xff\"b").await?;
        let body: Value = serde_json::from_slice(&reply.body).with_context(|| reply.text())?;
        assert_eq!(body.get("said"), Some(&Value::from("a\u{fffd}\"b")));
        assert_eq!(reply.header("x-echo"), "<a\"b>");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirection_leads_where_policy_says_whatever_a_request_says() -> anyhow::Result<()> {
    let rungs = [
        (
            "moved",
            "redirect: {location: \"https://new.example${request.path}?${request.query}\", status: 308}",
        ),
        (
            "asked",
            "redirect: {location: \"/down?from=${request.path}&q=${request.query}&s=${request.header.x-said}&c=${cause}\"}",
        ),
        (
            "said",
            "redirect: {location: \"/a/${request.header.x-said}/x\", status: 302}",
        ),
        (
            "fixed",
            "redirect: {location: \"https://status.example/a?b#c$$\", status: 301}",
        ),
    ];
    let (mesh, _dead) = falling(&rungs).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for (host, target, said, status, want) in [
            (
                "moved",
                "/a%20b/c'd?x=1&y=%26",
                "",
                308,
                "https://new.example/a%20b/c'd?x=1&y=%26",
            ),
            (
                "moved",
                "//evil.example/a",
                "",
                308,
                "https://new.example//evil.example/a?",
            ),
            (
                "asked",
                "/a%20b?x=1&y=%26",
                "&<\"'\t/é?#",
                307,
                "/down?from=/a%2520b&q=x%3D1%26y%3D%2526&s=%26%3C%22%27%09/%C3%A9%3F%23&c=reset",
            ),
            ("said", "/", "//evil.example", 302, "/a///evil.example/x"),
            ("said", "/", "\\evil.example", 302, "/a/%5Cevil.example/x"),
            ("fixed", "/a", "b", 301, "https://status.example/a?b#c$"),
        ] {
            let reply = asked(
                &mesh,
                protocol,
                &format!("{host}.example"),
                target,
                said.as_bytes(),
            )
            .await?;
            assert_eq!(
                (reply.status.as_u16(), reply.header("location")),
                (status, want),
                "{protocol:?} {host} {target} {said:?}"
            );
            assert!(
                reply.body.is_empty() && reply.header("leeward-degraded").starts_with(host),
                "{reply:?}"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_location_that_leaves_its_host_to_requests_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    for location in [
        "${request.path}",
        "/${request.path}",
        "//status.example/",
        "//${request.header.x-said}/",
        "https://${request.host}/",
        "https://shop${request.header.x-said}.example/",
        "https://shop.example:${request.header.x-said}/",
        "ftp://shop.example/",
        "shop.example/",
    ] {
        let policy = fallback(
            "ladder",
            &[&format!("redirect: {{location: \"{location}\"}}")],
            &[],
        );
        let refused = mesh.apply_only(&policy).await;
        let said = format!(
            "{:?}",
            refused.err().with_context(|| format!("{location} was taken"))?
        );
        ensure!(
            said.contains("leaves open where it leads") && said.contains("location"),
            "{said}"
        );
    }
    Ok(())
}
