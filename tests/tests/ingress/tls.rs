//! Which listener and which certificate, and who is refused.

use crate::kit::{Hello, Rig, gateway, is, route_of};
use anyhow::ensure;
use http::StatusCode;
use leeward_testkit::{Client, Protocol, eventually, get};

const H2: &[&str] = &["h2", "http/1.1"];
const H1: &[&str] = &["http/1.1"];

fn hello<'a>(sni: &'a str, alpn: &'a [&'a str]) -> Hello<'a> {
    Hello {
        sni,
        alpn,
        ..Hello::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_gets_the_closest_certificate_and_only_what_its_connection_is_for() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example", "also.example", "127.0.0.1"])?;
    rig.certify("wild", &["*.wild.example"])?;
    rig.certify("other", &["other.example", "www.other.example"])?;
    let listeners = [
        rig.https("shop", "shop, other", ""),
        rig.https("wild", "wild", "hostname: \"*.wild.example\""),
    ];
    let hosts = [
        "shop.example",
        "also.example",
        "other.example",
        "*.wild.example",
        "127.0.0.1",
    ];
    rig.open(&listeners, &hosts).await?;

    // The client checks that the certificate is for the host.
    for host in [
        "shop.example",
        "other.example",
        "a.wild.example",
        "B.Wild.Example",
    ] {
        for alpn in [H2, H1] {
            is(
                &rig.ask(&hello(host, alpn), get(host, "/")).await?,
                StatusCode::OK,
            );
        }
    }
    // No host is asked for: the first certificate of the listener for every host.
    is(
        &rig.ask(&hello("", H1), get("127.0.0.1", "/")).await?,
        StatusCode::OK,
    );
    // Another host of the same listener, for which the same certificate stands (RFC 9113 §9.1.1).
    is(
        &rig.ask(&hello("shop.example", H2), get("also.example", "/"))
            .await?,
        StatusCode::OK,
    );

    // Everything else is misdirected, and the backend hears nothing of it.
    let before = rig.backend.requests();
    for (asked, host) in [
        // The same listener, but not a host of the certificate: domain fronting.
        ("shop.example", "other.example"),
        // Another listener.
        ("shop.example", "a.wild.example"),
        ("a.wild.example", "shop.example"),
    ] {
        for alpn in [H2, H1] {
            let reply = rig.ask(&hello(asked, alpn), get(host, "/")).await?;
            is(&reply, StatusCode::MISDIRECTED_REQUEST);
            assert_eq!(reply.header("leeward-reason"), "misdirected");
            if alpn == H1 {
                assert_eq!(reply.header("connection"), "close");
            }
        }
    }
    assert_eq!(rig.backend.requests(), before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_routes_that_name_the_gateway_are_reached() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify(
        "shop",
        &[
            "shop.example",
            "inner.example",
            "both.example",
            "part.example",
            "queue.example",
        ],
    )?;
    rig.open(&[rig.https("one", "shop", "")], &["shop.example"])
        .await?;
    let routes = leeward_testkit::policy::route("inner", "inner.example", "shop", &[])
        + &route_of("both", "both.example", "shop", "{name: public}, {kind: Mesh}")
        + &route_of("part", "part.example", "shop", "{name: public, sectionName: one}");
    rig.mesh.apply(&routes).await?;
    for (host, outside, inside) in [
        ("shop.example", 200, 404),
        ("part.example", 200, 404),
        ("both.example", 200, 200),
        ("inner.example", 404, 200),
    ] {
        assert_eq!(rig.get(host, "/").await?.status, outside, "{host} from outside");
        let workload = rig.mesh.workload("a1", Protocol::Http1)?;
        assert_eq!(
            workload.get(host, "/").await?.status,
            inside,
            "{host} from inside"
        );
    }
    let wrong = route_of("part", "part.example", "shop", "{name: public, sectionName: two}");
    let refused = rig.mesh.apply_only(&wrong).await.unwrap_err();
    assert!(
        format!("{refused:#}").contains("is not a listener of Gateway/public; want one of one"),
        "{refused:#}"
    );
    let clash = gateway("second", &[rig.https("x", "shop", "")], "");
    let refused = rig.mesh.apply_only(&clash).await.unwrap_err();
    assert!(
        format!("{refused:#}").contains("same address, port and hostname"),
        "{refused:#}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_certificate_is_taken_up_and_a_bad_one_changes_nothing() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["old.example", "shop.example"])?;
    rig.open(&[rig.https("https", "shop", "")], &["*"]).await?;
    is(&rig.get("old.example", "/").await?, StatusCode::OK);

    // A connection from before goes on, through everything that follows.
    let stream = rig.tls(&hello("shop.example", H2)).await?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut kept, connection) =
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await?;
    let connection = tokio::spawn(connection);
    let mut still = async || {
        let request = http::Request::get("https://shop.example/").body(leeward_testkit::empty_body())?;
        anyhow::Ok(kept.send_request(request).await?.status())
    };
    assert_eq!(still().await?, StatusCode::OK);

    rig.certify("shop", &["new.example", "shop.example"])?;
    eventually("the new certificate", crate::kit::SOON, || async {
        is(&rig.get("new.example", "/").await?, StatusCode::OK);
        Ok(())
    })
    .await?;
    assert!(
        rig.get("old.example", "/").await.is_err(),
        "the old one is not shown any more"
    );
    assert_eq!(still().await?, StatusCode::OK);

    // A key that doesn't fit: the last good pair goes on, and it is told everywhere.
    let (_, key) = rig.ca.issue(&["new.example"])?;
    rig.put("shop.key", &key)?;
    let told = eventually("the bad pair to be told", crate::kit::SOON, || async {
        let shown = rig.gateways().await?;
        let problem = shown["certificates"][0]["problem"].as_str().map(str::to_owned);
        problem.ok_or_else(|| anyhow::anyhow!("{shown}"))
    })
    .await?;
    assert!(told.contains("don't fit"), "{told}");
    is(&rig.get("new.example", "/").await?, StatusCode::OK);
    assert_eq!(still().await?, StatusCode::OK);
    let node = rig.mesh.node("a1")?;
    let metric = node
        .metric(
            "leeward_gateway_certificate_failures_total",
            &["certificate=\"shop\""],
        )
        .await?;
    assert!(metric >= 1.0, "{metric}");
    let left = node
        .metric(
            "leeward_gateway_certificate_expiry_seconds",
            &["certificate=\"shop\""],
        )
        .await?;
    assert!(left > 0.0, "{left}");
    eventually("the control plane to hear of it", crate::kit::SOON, || async {
        let got =
            leeward_testkit::leeward(&rig.mesh, &["get", "gateway", "public", "--output", "yaml"]).await?;
        let text = String::from_utf8_lossy(&got.stdout).into_owned();
        ensure!(text.contains("the last good one is in use"), "{text} {got:?}");
        Ok(())
    })
    .await?;
    rig.certify("shop", &["new.example", "shop.example"])?;
    eventually("all to be well", crate::kit::SOON, || async {
        let shown = rig.gateways().await?;
        ensure!(shown["certificates"][0]["problem"].is_null(), "{shown}");
        Ok(())
    })
    .await?;
    assert_eq!(still().await?, StatusCode::OK);
    drop(connection);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_show_certificates_where_they_must_and_old_tls_is_refused() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example", "admin.example"])?;
    rig.put("clients.pem", &rig.ca.pem)?;
    let listeners = [
        rig.https("shop", "shop", ""),
        rig.https(
            "admin",
            "",
            "hostname: admin.example, tls: {certificateRefs: [shop], minVersion: \"1.3\", clientValidation: {caCertificateRefs: [clients]}}",
        ),
    ];
    rig.open(&listeners, &["shop.example", "admin.example"]).await?;
    let (good, stranger) = (rig.ca.issue(&[])?, crate::kit::Ca::new()?.issue(&[])?);
    let servers = rig.ca.issue(&["x.example"])?;
    let with = |own| Hello {
        own,
        ..hello("admin.example", H2)
    };
    is(
        &rig.ask(&with(Some(&good)), get("admin.example", "/")).await?,
        StatusCode::OK,
    );
    for (what, own) in [("none", None), ("a stranger's", Some(&stranger))] {
        let asked = rig.ask(&with(own), get("admin.example", "/")).await;
        assert!(asked.is_err(), "{what}: {asked:?}");
    }
    // A certificate for everything is one for clients, too (RFC 5280 §4.2.1.12).
    is(
        &rig.ask(&with(Some(&servers)), get("admin.example", "/")).await?,
        StatusCode::OK,
    );
    // The way around: in by the listener that asks for none.
    let around = rig
        .ask(&hello("shop.example", H2), get("admin.example", "/"))
        .await?;
    is(&around, StatusCode::MISDIRECTED_REQUEST);
    // TLS 1.2 is for those who allow it.
    let old = |sni| Hello {
        tls12: true,
        own: Some(&good),
        ..hello(sni, H2)
    };
    is(
        &rig.ask(&old("shop.example"), get("shop.example", "/")).await?,
        StatusCode::OK,
    );
    assert!(rig.tls(&old("admin.example")).await.is_err());
    // Without its roots a listener lets nobody in, and the other one goes on.
    std::fs::remove_file(rig.certificates.join("clients.pem"))?;
    let again = gateway("public", &[
        rig.https("shop", "shop", ""),
        rig.https("admin", "", "hostname: admin.example, tls: {certificateRefs: [shop], clientValidation: {caCertificateRefs: [gone]}}"),
    ], "");
    rig.mesh.apply(&again).await?;
    eventually("the listener to be shut", crate::kit::SOON, || async {
        let shown = rig.gateways().await?;
        ensure!(
            rig.shown_port(&shown)?["listeners"][1]["problem"].is_string(),
            "{shown}"
        );
        Ok(())
    })
    .await?;
    is(&rig.get("shop.example", "/").await?, StatusCode::OK);
    let shut = rig.ask(&with(Some(&good)), get("admin.example", "/")).await?;
    is(&shut, StatusCode::MISDIRECTED_REQUEST);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_http_is_served_or_sent_to_https() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let port = rig.address().port();
    let listeners = [
        format!("{{name: plain, address: 127.0.0.1, port: {port}, protocol: HTTP, hostname: plain.example}}"),
        format!(
            "{{name: sent, address: 127.0.0.1, port: {port}, protocol: HTTP, hostname: \"*.sent.example\", httpsRedirect: {{statusCode: 308, port: 8443}}}}"
        ),
    ];
    rig.open(&listeners, &["*"]).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = Client::new(rig.address(), protocol);
        is(&client.get("plain.example", "/").await?, StatusCode::OK);
        let sent = client.get("a.sent.example:80", "/a?b=c").await?;
        is(&sent, StatusCode::PERMANENT_REDIRECT);
        assert_eq!(sent.header("location"), "https://a.sent.example:8443/a?b=c");
        is(
            &client.get("nobody.example", "/").await?,
            StatusCode::MISDIRECTED_REQUEST,
        );
    }
    Ok(())
}
