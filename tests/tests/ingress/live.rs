//! Listeners that come and go while the proxy runs, and a proxy that goes while they stay.

use crate::kit::{Hello, Rig, SOON, gateway, is, route_of};
use anyhow::ensure;
use http::StatusCode;
use leeward_proto::v1;
use leeward_testkit::{Client, Port, Protocol, eventually};
use std::net::{TcpListener, TcpStream};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_come_and_go_with_policy_and_the_others_stay() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    let plain = Port::reserve()?;
    let listener = format!(
        "{{name: plain, address: 127.0.0.1, port: {}, protocol: HTTP}}",
        plain.address().port()
    );
    rig.open(
        &[rig.https("https", "shop", "http3: true"), listener],
        &["shop.example"],
    )
    .await?;
    let client = Client::new(plain.address(), Protocol::Http1);
    is(
        &eventually("the second port", SOON, || client.get("shop.example", "/")).await?,
        StatusCode::OK,
    );
    let hello = Hello {
        sni: "shop.example",
        ..Hello::default()
    };
    let mut http3 = eventually("HTTP/3", SOON, || rig.http3(&hello)).await?;
    is(&http3.get("shop.example", "/").await?, StatusCode::OK);

    // One goes, and a request that is under way on it is served to its end.
    rig.backend.behave(leeward_testkit::Behave::Dribble(
        20,
        std::time::Duration::from_millis(50),
    ));
    let dribbling = tokio::spawn(async move { client.get("shop.example", "/slow").await });
    eventually("the request to be under way", SOON, || async {
        ensure!(rig.backend.requests() >= 3, "{}", rig.backend.requests());
        Ok(())
    })
    .await?;
    rig.mesh
        .apply(&gateway("public", &[rig.https("https", "shop", "")], ""))
        .await?;
    eventually("the port to be closed", SOON, || async {
        let refused = TcpStream::connect(plain.address()).is_err();
        ensure!(refused, "it is still open");
        Ok(())
    })
    .await?;
    let slow = dribbling.await??;
    assert_eq!((slow.status.as_u16(), slow.body.len()), (200, 20));
    rig.backend
        .behave(leeward_testkit::Behave::Answer(leeward_testkit::Answer::text(
            "ok",
        )));
    is(&rig.get("shop.example", "/").await?, StatusCode::OK);
    // HTTP/3 was taken away, too: clients are told, and come by TCP.
    let why = tokio::time::timeout(SOON, http3.driving).await??;
    assert!(why.contains("H3_NO_ERROR") || why.contains("Closing"), "{why}");
    let reply = rig.get("shop.example", "/").await?;
    assert!(!reply.headers.contains_key("alt-svc"), "{reply:?}");

    // All of it goes.
    for route in ["r0"] {
        rig.mesh.delete(v1::Kind::Route, route).await?;
    }
    rig.mesh.delete(v1::Kind::Gateway, "public").await?;
    eventually("the last port to be closed", SOON, || async {
        ensure!(TcpStream::connect(rig.address()).is_err(), "it is still open");
        Ok(())
    })
    .await?;
    assert_eq!(rig.gateways().await?["ports"].as_array().map(Vec::len), Some(0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_somebody_has_is_told_and_taken_when_it_is_free() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let inbound = rig.mesh.node("a1")?.inbound.port();
    let also =
        |name: &str, port: u16| format!("{{name: {name}, address: 127.0.0.1, port: {port}, protocol: HTTP}}");
    let listeners = [
        rig.https("https", "shop", ""),
        also("taken", taken.local_addr()?.port()),
        also("own", inbound),
    ];
    let text = gateway("public", &listeners, "") + &route_of("r0", "shop.example", "shop", "{name: public}");
    rig.mesh.apply(&text).await?;
    rig.wait_listening(true).await?;
    // The rest is live.
    is(&rig.get("shop.example", "/").await?, StatusCode::OK);
    let refused = |want: &'static str| {
        let rig = &rig;
        move || async move {
            let got = rig.mesh.get(v1::Kind::Gateway, "public").await?;
            let refusals = got.status.unwrap_or_default().refusals;
            ensure!(
                refusals.iter().any(|refusal| refusal.reason.contains(want)),
                "{refusals:?}"
            );
            anyhow::Ok(())
        }
    };
    eventually(
        "the port to be told",
        SOON,
        refused("spec.listeners[1].port: can't listen on"),
    )
    .await?;
    let shown = rig.gateways().await?.to_string();
    assert!(shown.contains("the proxy itself listens on"), "{shown}");
    // Somebody lets go of it.
    let address = taken.local_addr()?;
    drop(taken);
    let client = Client::new(address, Protocol::Http1);
    is(
        &eventually("the port to be taken", SOON, || client.get("shop.example", "/")).await?,
        StatusCode::OK,
    );
    eventually(
        "what is left to be told",
        SOON,
        refused("spec.listeners[2].port: the proxy itself listens on"),
    )
    .await?;
    Ok(())
}

fn was_not_sent(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<hyper::Error>()
        .is_some_and(hyper::Error::is_canceled)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_the_ports_over_and_no_request_is_lost() -> anyhow::Result<()> {
    let rig = Rig::with(leeward_testkit::MeshBuilder::handover).await?;
    rig.certify("shop", &["shop.example"])?;
    rig.open(&[rig.https("https", "shop", "http3: true")], &["shop.example"])
        .await?;
    let hello = Hello {
        sni: "shop.example",
        ..Hello::default()
    };
    let mut before = eventually("HTTP/3", SOON, || rig.http3(&hello)).await?;
    is(&before.get("shop.example", "/").await?, StatusCode::OK);
    let stop = tokio_util::sync::CancellationToken::new();
    let asking = async {
        let mut asked = 0u32;
        while !stop.is_cancelled() {
            let reply = match rig.get("shop.example", "/").await {
                // The old process may say goodbye on a connection before the request is on it: nothing was sent, and
                // clients take another.
                Err(error) if was_not_sent(&error) => continue,
                reply => reply?,
            };
            is(&reply, StatusCode::OK);
            asked += 1;
        }
        anyhow::Ok(asked)
    };
    let replacing = async {
        let again = rig.mesh.start_again("a1").await?;
        // The old one ends when its clients have gone.
        eventually("the old process to end", SOON, || async {
            let log = rig.mesh.node("a1")?.process.log()?;
            ensure!(
                log.contains("a new process has taken over") && log.contains("done"),
                "{log}"
            );
            Ok(())
        })
        .await?;
        stop.cancel();
        anyhow::Ok(again)
    };
    let (asked, again) = tokio::join!(asking, replacing);
    let (asked, _again) = (asked?, again?);
    assert!(asked > 0);
    // The connection by HTTP/3 was asked to leave; a new one comes to the successor once the address is its own.
    drop(before);
    let mut after = eventually("HTTP/3 at the successor", SOON, || rig.http3(&hello)).await?;
    is(&after.get("shop.example", "/").await?, StatusCode::OK);
    Ok(())
}

/// What docs/ingress.md shows, at ports of the test's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_the_documentation_works() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let paper = std::fs::read_to_string(leeward_testkit::binaries::workspace().join("docs/ingress.md"))?;
    let (_, rest) = paper.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let plain = Port::reserve()?;
    let at = |port: u16| format!("address: 127.0.0.1\n      port: {port}\n");
    let example = example
        .replace("port: 443\n", &at(rig.address().port()))
        .replace("port: 80\n", &at(plain.address().port()));
    rig.certify("shop", &["shop.example"])?;
    rig.certify("partners", &["a.partners.example"])?;
    rig.put("partner-roots.pem", &rig.ca.pem)?;
    rig.mesh.apply(&example).await?;
    rig.wait_listening(true).await?;
    is(&rig.get("shop.example", "/api/x").await?, StatusCode::OK);
    is(&rig.get("shop.example", "/other").await?, StatusCode::NOT_FOUND);
    assert!(
        rig.get("a.partners.example", "/").await.is_err(),
        "a partner shows a certificate"
    );
    let own = rig.ca.issue(&[])?;
    let partner = Hello {
        sni: "a.partners.example",
        alpn: &["h2"],
        own: Some(&own),
        ..Hello::default()
    };
    let reply = rig
        .ask(&partner, leeward_testkit::get("a.partners.example", "/"))
        .await?;
    is(&reply, StatusCode::NOT_FOUND);
    let client = Client::new(plain.address(), Protocol::Http1);
    let sent = eventually("the port for plain HTTP", SOON, || {
        client.get("shop.example", "/api?x=1")
    })
    .await?;
    is(&sent, StatusCode::MOVED_PERMANENTLY);
    assert_eq!(sent.header("location"), "https://shop.example/api?x=1");
    Ok(())
}
