//! Links between real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[allow(dead_code, reason = "each test uses its part")]
mod common;

use bytes::Bytes;
use common::{Answers, Domain, Relay, channel, run, server, wait_for};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use leeward_zone::{
    Client, Code, Congestion, ConnectError, Health, Reports, SendError, ServiceHealth, StreamError,
};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://shop{path}"))
        .body(Empty::new())
        .unwrap()
}

fn post(body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post("http://shop/")
        .body(Full::new(body.into()))
        .unwrap()
}

async fn bytes(response: Response<leeward_zone::Incoming>) -> Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

#[test]
fn a_request_goes_there_and_its_answer_comes_back() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let mut request = post("hello");
        request.headers_mut().insert("x-one", "1".parse().unwrap());
        let response = link.send(request.into()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let seen = response.headers();
        assert_eq!(seen["x-method"], "POST");
        assert_eq!(seen["x-target"], "http://shop/");
        assert_eq!(seen["x-one"], "1");
        assert_eq!(seen["x-peer"], domain.id("a1").as_str());
        assert_eq!(bytes(response).await, "hello");
        assert_eq!(link.under_way(), 0);
        let response = link.send(get("/a?b=c").into()).await.unwrap();
        assert_eq!(response.headers()["x-target"], "http://shop/a?b=c");
        assert!(bytes(response).await.is_empty());
    });
}

#[test]
fn many_requests_share_a_link() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        // More than may be under way at once: the rest waits.
        let all = (0..3000u32).map(|i| {
            let link = link.clone();
            tokio::task::spawn_local(async move {
                let body = i.to_string();
                let response = link.send(post(body.clone()).into()).await.unwrap();
                assert_eq!(bytes(response).await, body);
            })
        });
        for one in all.collect::<Vec<_>>() {
            one.await.unwrap();
        }
        assert_eq!(served.connections.get(), 1);
        assert_eq!(link.under_way(), 0);
    });
}

#[test]
fn large_bodies_go_both_ways() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let body: Bytes = (0..=250u8).cycle().take(10 << 20).collect();
        let response = link.send(post(body.clone()).into()).await.unwrap();
        assert_eq!(bytes(response).await, body);
    });
}

#[test]
fn a_reader_that_stops_holds_the_writer_back() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Stuck).await;
        let link = served.link(&domain, "a1").await;
        let made = Rc::new(Cell::new(0usize));
        let counted = Rc::clone(&made);
        let frames = std::iter::from_fn(move || {
            counted.set(counted.get() + (64 << 10));
            Some(Ok::<_, std::io::Error>(Frame::data(Bytes::from(vec![
                7;
                64 << 10
            ]))))
        });
        let body = StreamBody::new(futures_util::stream::iter(frames));
        let request = Request::post("http://shop/").body(body).unwrap();
        let sending = tokio::task::spawn_local({
            let link = link.clone();
            async move {
                link.send(request.into())
                    .await
                    .map(drop)
                    .map_err(|e| e.to_string())
            }
        });
        wait_for(|| made.get() > 900 << 10).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        // A stream's window, and what is gathered.
        assert!(made.get() <= 2 << 20, "{} bytes", made.get());
        // Others don't wait for it.
        let response = link.send(get("/quick").into()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        sending.abort();
        wait_for(|| served.cancelled.get() == 1).await;
    });
}

#[test]
fn trailers_come_after_the_body() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let frames = [Frame::data(Bytes::from("x")), Frame::trailers(trailers.clone())];
        let body = StreamBody::new(futures_util::stream::iter(frames.map(Ok::<_, std::io::Error>)));
        let request = Request::post("http://shop/").body(body).unwrap();
        let response = link.send(request.into()).await.unwrap();
        let whole = response.into_body().collect().await.unwrap();
        assert_eq!(whole.trailers(), Some(&trailers));
        assert_eq!(whole.to_bytes(), "x");
    });
}

#[test]
fn trailers_are_the_end() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let frames = [Frame::data(Bytes::from("x")), Frame::trailers(trailers.clone())];
        let body = StreamBody::new(futures_util::stream::iter(frames.map(Ok::<_, std::io::Error>)));
        let request = Request::post("http://shop/").body(body).unwrap();
        let mut body = link.send(request.into()).await.unwrap().into_body();
        let data = body.frame().await.unwrap().unwrap();
        assert_eq!(data.into_data().unwrap(), "x");
        assert!(!body.is_end_stream());
        let last = body.frame().await.unwrap().unwrap();
        assert_eq!(last.into_trailers().unwrap(), trailers);
        // Whoever passes it on needn't ask again to know.
        assert!(body.is_end_stream());
        drop(body);
        assert_eq!(link.under_way(), 0);
        wait_for(|| served.under_way.get() == 0).await;
        assert_eq!(served.cancelled.get(), 0);
    });
}

#[test]
fn as_many_fields_go_through_as_http_2_lets_clients_send() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let mut request = get("/");
        for i in 0..1985u16 {
            request.headers_mut().append("a", i.into());
        }
        let response = link.send(request.into()).await.unwrap();
        assert_eq!(response.headers().get_all("a").iter().count(), 1985);
    });
}

/// Here the loopback's link takes 64 KiB, and so jumbo frames. Ten of them, which is what the transport hands on at once, are
/// more than one UDP datagram may have.
#[cfg(target_os = "linux")]
#[test]
fn packets_are_as_large_as_the_way_takes() {
    run(async {
        const BODY: usize = 1 << 20;
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let (mut heard, mut lost) = (0, 0);
        // What may get through is found out while requests are under way; and a system with small buffers loses some.
        for _ in 0..50 {
            let (before, lost_before) = (link.heard(), link.losses().1);
            let response = link.send(post(vec![b'x'; BODY]).into()).await.unwrap();
            assert_eq!(bytes(response).await.len(), BODY);
            (heard, lost) = (link.heard() - before, link.losses().1 - lost_before);
            if heard < 300 && lost == 0 {
                break;
            }
        }
        // With acknowledgements of what was sent: of 1452 bytes each it would be 722 for the body alone.
        assert!(heard < 300, "{heard} datagrams for {BODY} bytes");
        assert_eq!(lost, 0);
    });
}

#[test]
fn both_ways_stream_at_once() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let (tx, body) = channel();
        let request = Request::post("http://shop/").body(body).unwrap();
        let mut response = link.send(request.into()).await.unwrap();
        for i in 0..20u8 {
            tx.send(Bytes::from(vec![i])).unwrap();
            let frame = response.body_mut().frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap()[..], [i]);
        }
        drop(tx);
        assert!(response.body_mut().frame().await.is_none());
        assert_eq!(link.under_way(), 0);
    });
}

#[test]
fn whoever_gives_up_an_answer_gives_up_the_request() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Never).await;
        let link = served.link(&domain, "a1").await;
        let sent = tokio::time::timeout(Duration::from_millis(100), link.send(get("/").into())).await;
        assert!(sent.is_err());
        wait_for(|| served.cancelled.get() == 1).await;
        assert_eq!(link.under_way(), 0);
        drop(served);
        let served = server(&domain, "b2", Answers::Endless).await;
        let link = served.link(&domain, "a1").await;
        let mut response = link.send(get("/").into()).await.unwrap();
        response.body_mut().frame().await.unwrap().unwrap();
        drop(response);
        wait_for(|| served.cancelled.get() == 1).await;
    });
}

#[test]
fn an_early_answer_ends_the_request() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Early).await;
        let link = served.link(&domain, "a1").await;
        let (tx, body) = channel();
        tx.send(Bytes::from_static(b"begin")).unwrap();
        let request = Request::post("http://shop/").body(body).unwrap();
        let response = link.send(request.into()).await.unwrap();
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        assert_eq!(bytes(response).await, "no");
        // The body has been let go of.
        wait_for(|| tx.is_closed()).await;
    });
}

#[test]
fn a_refusal_is_known_to_be_one() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Refuse).await;
        let link = served.link(&domain, "a1").await;
        match link.send(post("x").into()).await {
            Err(SendError::Refused(StreamError::Reset(Code::Refused))) => {}
            other => panic!("{other:?}"),
        }
        drop(served);
        for (answers, want) in [
            (Answers::Reset(Code::Internal), Code::Internal),
            (Answers::Reset(Code::TooLarge), Code::TooLarge),
            (Answers::Reset(Code::Timeout), Code::Timeout),
            (Answers::BreakOff, Code::Internal),
        ] {
            let served = server(&domain, "b1", answers).await;
            let link = served.link(&domain, "a1").await;
            match link.send(post("x").into()).await {
                Err(SendError::Broken(StreamError::Reset(code))) if code == want => {}
                Ok(response) => {
                    let error = response.into_body().collect().await.unwrap_err();
                    assert!(
                        matches!(error, StreamError::Reset(code) if code == want),
                        "{error}"
                    );
                }
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn a_body_that_breaks_off_is_no_whole_one() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let frames = [
            Ok(Frame::data(Bytes::from("part"))),
            Err(std::io::Error::other("broke off")),
        ];
        let body = StreamBody::new(futures_util::stream::iter(frames));
        let request = Request::post("http://shop/").body(body).unwrap();
        match link.send(request.into()).await {
            Err(SendError::Broken(_)) => {}
            Ok(response) => {
                response.into_body().collect().await.unwrap_err();
            }
            other => panic!("{other:?}"),
        }
        // A body that is shorter than it says.
        let mut request = post("short");
        request
            .headers_mut()
            .insert("content-length", "10".parse().unwrap());
        match link.send(request.into()).await {
            Err(SendError::Broken(_)) => {}
            Ok(response) => {
                response.into_body().collect().await.unwrap_err();
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_head_that_is_too_large_is_not_sent() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let mut request = get("/");
        for i in 0..40 {
            let name = http::HeaderName::try_from(format!("x-{i}")).unwrap();
            let value = "v".repeat(2 << 10).parse().unwrap();
            request.headers_mut().insert(name, value);
        }
        match link.send(request.into()).await {
            Err(SendError::Refused(StreamError::Violation(error))) => {
                assert!(error.to_string().starts_with("a head of "), "{error}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(link.send(get("/").into()).await.unwrap().status(), StatusCode::OK);
    });
}

#[test]
fn whoever_leaves_lets_what_has_begun_end() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let (tx, body) = channel();
        let request = Request::post("http://shop/").body(body).unwrap();
        let response = link.send(request.into()).await.unwrap();
        served.go_away();
        wait_for(|| link.is_draining()).await;
        assert!(!link.is_usable() && link.is_open());
        assert!(matches!(
            link.send(get("/").into()).await,
            Err(SendError::Unsent(_))
        ));
        tx.send(Bytes::from_static(b"late")).unwrap();
        drop(tx);
        assert_eq!(bytes(response).await, "late");
        // The last has ended.
        tokio::time::timeout(Duration::from_secs(1), link.closed())
            .await
            .unwrap();
        wait_for(|| served.connections.get() == 0).await;
    });
}

#[test]
fn a_peer_that_died_is_noticed_within_two_seconds() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Never).await;
        let relay = Relay::to(served.address).await;
        let link = served.link_at(&domain, "a1", relay.address).await;
        let waiting = tokio::task::spawn_local({
            let link = link.clone();
            async move { link.send(get("/").into()).await }
        });
        wait_for(|| served.under_way.get() == 1).await;
        // A slow answer is no death.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert!(link.is_usable() && !waiting.is_finished());
        relay.cut();
        let from = Instant::now();
        match waiting.await.unwrap() {
            Err(SendError::Broken(StreamError::Lost(lost))) => assert!(lost.is_silence(), "{lost}"),
            other => panic!("{other:?}"),
        }
        assert!(from.elapsed() < Duration::from_secs(2), "{:?}", from.elapsed());
        assert!(!link.is_usable() && !link.is_open());
        // The other side has found out as well, and gives up what it does for nobody.
        wait_for(|| served.cancelled.get() == 1).await;
    });
}

#[test]
fn a_dead_path_is_found_though_nothing_more_can_be_sent() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Never).await;
        let relay = Relay::to(served.address).await;
        let link = served.link_at(&domain, "a1", relay.address).await;
        wait_for(|| link.settings().is_some()).await;
        relay.cut();
        let from = Instant::now();
        // More than may be sent and not acknowledged.
        let all: Vec<_> = (0..24)
            .map(|_| {
                let link = link.clone();
                tokio::task::spawn_local(
                    async move { link.send(post(vec![7; 1 << 20]).into()).await.map(drop) },
                )
            })
            .collect();
        for one in all {
            match one.await.unwrap() {
                Err(SendError::Broken(StreamError::Lost(lost))) => assert!(lost.is_silence(), "{lost}"),
                other => panic!("{other:?}"),
            }
        }
        assert!(
            from.elapsed() < Duration::from_millis(2500),
            "{:?}",
            from.elapsed()
        );
    });
}

#[test]
fn an_answer_on_its_way_outlives_its_link() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let (tx, body) = channel();
        let request = Request::post("http://shop/").body(body).unwrap();
        let response = link.send(request.into()).await.unwrap();
        served.go_away();
        wait_for(|| link.is_draining()).await;
        // Less than a stream's window: the server is done with it long before it is read.
        tx.send(vec![7; 900 << 10].into()).unwrap();
        drop(tx);
        // The server lets go of its end when it has been silent for a second.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(bytes(response).await.len(), 900 << 10);
        wait_for(|| served.connections.get() == 0).await;
        assert_eq!(served.cancelled.get(), 0);
    });
}

#[test]
fn peers_are_told_what_is_for_their_zone() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let only = |service: &str| {
            let mut health = Health::default();
            health.set(service, ServiceHealth::default());
            Arc::new(health)
        };
        let seen = |name: &str| link.health().is_some_and(|health| health.get(name).is_some());
        let to = |zone: &str| Reports {
            others: only("for-others"),
            zones: [(Arc::from(zone), only("for-zone"))].into(),
        };
        served.health.send(Arc::new(to("nowhere"))).unwrap();
        wait_for(|| seen("for-others")).await;
        assert!(!seen("for-zone"));
        served.health.send(Arc::new(to("z"))).unwrap();
        wait_for(|| seen("for-zone")).await;
        assert!(!seen("for-others"));
    });
}

#[test]
fn health_comes_beside_requests() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let link = served.link(&domain, "a1").await;
        let is = |healthy| ServiceHealth {
            healthy,
            total: 3,
            spare: 100,
        };
        let mut health = Health::default();
        health.set("default/cart", is(3));
        health.set("default/pay", is(1));
        served
            .health
            .send(Arc::new(Reports::from(health.clone())))
            .unwrap();
        let seen = |name: &str| link.health().and_then(|health| health.get(name));
        wait_for(|| seen("default/cart") == Some(is(3))).await;
        assert_eq!(seen("default/pay"), Some(is(1)));
        assert!(link.settings().is_some());
        let from = Instant::now();
        let mut health = Health::default();
        health.set("default/cart", is(2));
        served.health.send(Arc::new(Reports::from(health))).unwrap();
        wait_for(|| seen("default/cart") == Some(is(2))).await;
        assert_eq!(seen("default/pay"), None);
        assert!(
            from.elapsed() > Duration::from_millis(500),
            "at most once a second"
        );
        // Who comes later hears what is known.
        let late = served.link(&domain, "a2").await;
        wait_for(|| late.health().is_some()).await;
        // And that it still holds, though nothing changes.
        let known = late.report().unwrap();
        let confirmed = async {
            while late.report().unwrap().heard == known.heard {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), confirmed)
            .await
            .unwrap();
        assert_eq!(late.report().unwrap().health, known.health);
    });
}

#[test]
fn only_who_is_expected_is_spoken_to() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let client = Client::new(domain.identity("a1"), Congestion::default());
        let to = served.address;
        let refused = |error: ConnectError, word: &str| {
            assert!(error.was_answered(), "{error}");
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            assert!(text.contains(word), "{text}");
        };
        // Another proxy is there than the one that is wanted.
        refused(client.connect(to, &domain.id("b2")).await.unwrap_err(), "b2");
        // The server is of another trust domain.
        let other = Domain::named("elsewhere.local");
        let stranger = Client::new(other.identity("a1"), Congestion::default());
        refused(stranger.connect(to, &other.id("b1")).await.unwrap_err(), "b1");
        // The server is right, but doesn't take the client: that is known when it has answered.
        let forged = Client::new(
            other.identity_with_bundle_of("a1", &domain),
            Congestion::default(),
        );
        common::not_welcome(forged.connect(to, &domain.id("b1")).await).await;
        // A person is no proxy.
        let person = Client::new(domain.user("ann"), Congestion::default());
        common::not_welcome(person.connect(to, &domain.id("b1")).await).await;
        // Nor is a workload.
        let workload = Client::new(domain.workload("pay"), Congestion::default());
        common::not_welcome(workload.connect(to, &domain.id("b1")).await).await;
        assert_eq!(served.connections.get(), 0);
    });
}

#[test]
fn what_is_sent_before_a_client_is_seen_to_be_unwelcome_was_refused() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let other = Domain::named("elsewhere.local");
        let forged = Client::new(
            other.identity_with_bundle_of("a1", &domain),
            Congestion::default(),
        );
        // TLS 1.3: the client is done before the server has seen its certificate.
        let link = forged.connect(served.address, &domain.id("b1")).await.unwrap();
        let refused = link.send(post("1").into()).await;
        assert!(
            matches!(refused, Err(SendError::Refused(StreamError::Lost(_)))),
            "{refused:?}"
        );
        assert_eq!(served.connections.get(), 0);
    });
}

#[test]
fn a_reload_reaches_new_links() {
    run(async {
        let domain = Domain::new();
        let served = server(&domain, "b1", Answers::Echo).await;
        let identity = domain.identity("a1");
        let client = Client::new(Arc::clone(&identity), Congestion::Bbr);
        let link = client.connect(served.address, &domain.id("b1")).await.unwrap();
        let first = bytes(link.send(post("1").into()).await.unwrap()).await;
        assert_eq!(first, "1");
        // Another authority: the server doesn't know it, nor the client the server's.
        Domain::named("leeward.local").issue_to("a1", &domain.dir("a1"));
        assert!(identity.reload().unwrap());
        let refused = client.connect(served.address, &domain.id("b1")).await;
        assert!(refused.is_err(), "the new identity is in use");
        assert_eq!(
            bytes(link.send(post("2").into()).await.unwrap()).await,
            "2",
            "the old link stays"
        );
    });
}
