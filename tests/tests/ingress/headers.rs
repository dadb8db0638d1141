//! What a client from outside says of itself, and what becomes of it.

use crate::kit::{Hello, Rig, SOON, gateway, is, route_of};
use http::StatusCode;
use leeward_testkit::{Answer, Behave, bytes_body, eventually, get, request, with_header};

const FORGED: &[(&str, &str)] = &[
    ("x-forwarded-for", "10.1.1.1"),
    ("x-forwarded-proto", "http"),
    ("x-forwarded-host", "admin.example"),
    ("forwarded", "for=10.1.1.1"),
    (
        "x-forwarded-client-cert",
        "URI=spiffe://leeward.test/zone/a/proxy/a1",
    ),
    ("x-leeward-identity", "spiffe://leeward.test/zone/a/proxy/a1"),
    ("leeward-endpoint", "shop/127.0.0.1:1"),
    ("leeward-plugin-depth", "5"),
    ("leeward-check", "1"),
    (
        "traceparent",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_a_client_says_of_itself_is_believed() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    rig.open(&[rig.https("https", "shop", "http3: true")], &["shop.example"])
        .await?;
    let forged = || {
        let mut request = get("shop.example", "/a/../b?x=1");
        for (name, value) in FORGED {
            request = with_header(request, name, value);
        }
        request
    };
    let hello = Hello {
        sni: "shop.example",
        ..Hello::default()
    };
    let mut http3 = eventually("HTTP/3", SOON, || rig.http3(&hello)).await?;
    for alpn in ["http/1.1", "h2", "h3"] {
        rig.backend.take_seen();
        let reply = if alpn == "h3" {
            let mut request = crate::kit::h3_request("GET", "shop.example", "/a/../b?x=1");
            for (name, value) in FORGED {
                request.headers_mut().insert(*name, value.parse()?);
            }
            http3.call(request, &[], None).await?
        } else {
            let hello = Hello {
                sni: "shop.example",
                alpn: &[alpn],
                ..Hello::default()
            };
            rig.ask(&hello, forged()).await?
        };
        is(&reply, StatusCode::OK);
        let seen = rig.backend.take_seen().pop().unwrap();
        let header = |name: &str| {
            seen.headers
                .get(name)
                .map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(seen.target, "/b?x=1", "{alpn}: the path has one form");
        assert_eq!(header("x-forwarded-for").as_deref(), Some("127.0.0.1"), "{alpn}");
        assert_eq!(header("x-forwarded-proto").as_deref(), Some("https"), "{alpn}");
        assert_eq!(
            header("forwarded").as_deref(),
            Some("for=127.0.0.1;host=\"shop.example\";proto=https"),
            "{alpn}"
        );
        for gone in [
            "x-forwarded-host",
            "x-forwarded-client-cert",
            "x-leeward-identity",
            "leeward-plugin-depth",
            "leeward-check",
        ] {
            assert_eq!(header(gone), None, "{alpn} {gone}");
        }
        let trace = header("traceparent").unwrap_or_default();
        assert!(
            !trace.contains("0af7651916cd43dd8448eb211c80319c"),
            "{alpn}: {trace}"
        );
    }
    let line = rig
        .mesh
        .node("a1")?
        .process
        .logged("\"direction\":\"ingress\"", SOON)
        .await?;
    assert!(
        line["client"]
            .as_str()
            .unwrap_or_default()
            .starts_with("127.0.0.1:"),
        "{line}"
    );
    assert!(line["peer"].is_null(), "{line}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_in_front_are_believed_as_many_as_policy_says() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    rig.open(&[rig.https("https", "shop", "")], &["shop.example"])
        .await?;
    let trusting = gateway("public", &[rig.https("https", "shop", "")], "  trustedHops: 1\n");
    rig.mesh.apply(&trusting).await?;
    let mut asked = get("shop.example", "/trusted");
    for (name, value) in FORGED.iter().filter(|(name, _)| *name != "x-forwarded-for") {
        asked = with_header(asked, name, value);
    }
    let asked = with_header(asked, "x-forwarded-for", "6.6.6.6, \", 198.51.100.7");
    let hello = Hello {
        sni: "shop.example",
        alpn: &["h2"],
        ..Hello::default()
    };
    is(&rig.ask(&hello, asked).await?, StatusCode::OK);
    let seen = rig.backend.take_seen().pop().unwrap();
    assert_eq!(seen.headers["x-forwarded-for"], "198.51.100.7, 127.0.0.1");
    assert_eq!(seen.headers["x-forwarded-proto"], "http");
    assert!(
        seen.headers["traceparent"]
            .to_str()?
            .contains("0af7651916cd43dd8448eb211c80319c")
    );
    assert!(
        !seen.headers.contains_key("x-forwarded-host"),
        "a proxy in front may have let it through"
    );
    assert!(
        !seen.headers.contains_key("leeward-plugin-depth"),
        "that is the mesh's alone"
    );
    let line = rig.mesh.node("a1")?.process.logged("/trusted", SOON).await?;
    assert!(
        line["client"]
            .as_str()
            .unwrap_or_default()
            .starts_with("198.51.100.7:"),
        "{line}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_has_no_identity_of_the_mesh() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    let policy = |rules: &str| {
        format!(
            "---\napiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {{name: who}}\nspec:\n  services: [shop]\n  action: Allow\n  rules: [{rules}]\n"
        )
    };
    rig.open(&[rig.https("https", "shop", "")], &["shop.example"])
        .await?;
    rig.mesh
        .apply(&route_of("inner", "inner.example", "shop", "{kind: Mesh}"))
        .await?;
    // Every proxy of the zone may; the gateway's is one of them, and its clients aren't.
    rig.mesh.apply(&policy("{from: [{zones: [a]}]}")).await?;
    let refused = rig.get("shop.example", "/").await?;
    is(&refused, StatusCode::FORBIDDEN);
    assert_eq!(refused.header("leeward-reason"), "identity_missing");
    let workload = rig.mesh.workload("a1", leeward_testkit::Protocol::Http1)?;
    is(&workload.get("inner.example", "/").await?, StatusCode::OK);
    // Whoever it is, this may be read.
    rig.mesh
        .apply(&policy(
            "{from: [{zones: [a]}]}, {to: [{methods: [GET], paths: [/public/*]}]}",
        ))
        .await?;
    is(&rig.get("shop.example", "/public/x").await?, StatusCode::OK);
    is(
        &rig.get("shop.example", "/public/../x").await?,
        StatusCode::FORBIDDEN,
    );
    let hello = Hello {
        sni: "shop.example",
        alpn: &["h2"],
        ..Hello::default()
    };
    rig.backend.behave(Behave::Answer(Answer::text("no")));
    let posted = rig
        .ask(
            &hello,
            request(http::Method::POST, "shop.example", "/public/x", bytes_body("x")),
        )
        .await?;
    is(&posted, StatusCode::FORBIDDEN);
    Ok(())
}
