//! A subscription against control planes that behave, restart, fall silent, and say odd things.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use leeward_config::{Status, Timing};
use leeward_proto::v1;
use std::net::SocketAddr;
use std::time::Duration;
use support::{Fake, Proxy, Site, TIMING, plugin, route, service, zone};

fn update(text: &str, generation: u64) -> v1::Update {
    v1::Update {
        store_id: "fake".into(),
        generation,
        upserts: support::yaml(text, generation),
        complete: true,
        ..v1::Update::default()
    }
}

fn full(text: &str, generation: u64) -> v1::Update {
    v1::Update {
        full: true,
        ..update(text, generation)
    }
}

fn at(generation: u64) -> impl Fn(&Status) -> bool {
    move |status| status.generation == Some(generation)
}

#[tokio::test]
async fn a_bad_resource_is_refused_alone_and_its_last_good_version_stays() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let proxy = Proxy::start(&site, &[fake.address]);
    let mut stream = fake.next().await;
    assert_eq!((stream.hello.generation, stream.hello.store_id.as_str()), (0, ""));
    let policy = zone("a") + &service("cart", 80) + &route("shop", "shop.example", "cart");
    stream.send(full(&policy, 1)).await;
    assert_eq!(stream.ack().await.quarantined, []);
    assert!(proxy.serves("shop.example"));

    // The next route is bad, the zone beside it is good.
    let mut next = update(&(route("shop", "new.example", "cart") + &zone("b")), 2);
    if let Some(v1::resource::Spec::Route(route)) = &mut next.upserts[0].spec {
        route.hostnames.push("no host".into());
    }
    stream.send(next).await;
    let ack = stream.ack().await;
    assert_eq!(ack.generation, 2);
    let [refused] = &ack.quarantined[..] else {
        panic!("{ack:?}")
    };
    assert_eq!((refused.revision, refused.running_revision), (2, 1));
    assert!(
        refused.reason.starts_with("spec.hostnames[1]: "),
        "{}",
        refused.reason
    );
    assert!(proxy.serves("shop.example") && !proxy.serves("new.example"));
    assert_eq!(proxy.live.status().quarantined.len(), 1);

    // A good one takes its place.
    stream
        .send(update(&route("shop", "new.example", "cart"), 3))
        .await;
    assert_eq!(stream.ack().await.quarantined, []);
    assert!(proxy.serves("new.example"));
}

#[tokio::test]
async fn a_plugin_that_cannot_be_made_ready_is_refused_and_the_rest_goes_live() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let proxy = Proxy::start(&site, &[fake.address]);
    let mut stream = fake.next().await;
    stream
        .send(full(&(zone("a") + &plugin("p", "/good.wasm")), 1))
        .await;
    stream.ack().await;
    stream
        .send(update(&(zone("b") + &plugin("p", "/bad.wasm")), 2))
        .await;
    let ack = stream.ack().await;
    let [refused] = &ack.quarantined[..] else {
        panic!("{ack:?}")
    };
    assert_eq!((refused.revision, refused.running_revision), (2, 1));
    assert_eq!(refused.reason, "spec.source.file: not a component");
    assert_eq!(proxy.live.status().generation, Some(2));
}

#[tokio::test]
async fn nothing_is_live_before_a_change_is_whole_and_half_a_change_is_asked_for_again() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let proxy = Proxy::start(&site, &[fake.address]);
    let mut stream = fake.next().await;
    stream
        .send(full(
            &(zone("a") + &service("cart", 80) + &route("shop", "one.example", "cart")),
            1,
        ))
        .await;
    stream.ack().await;
    let half = v1::Update {
        complete: false,
        ..update(&route("shop", "two.example", "cart"), 2)
    };
    stream.send(half).await;
    // The stream ends behind it.
    drop(stream);
    let mut stream = fake.next().await;
    assert_eq!(
        (stream.hello.generation, stream.hello.store_id.as_str()),
        (1, "fake")
    );
    assert!(proxy.serves("one.example"));
    stream.send(update(&zone("b"), 2)).await;
    stream.ack().await;
    assert!(
        proxy.serves("one.example") && !proxy.serves("two.example"),
        "half a change does not leak into the next"
    );
}

#[tokio::test]
async fn an_empty_update_deletes_nothing_and_a_tombstone_one_resource() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let proxy = Proxy::start(&site, &[fake.address]);
    let mut stream = fake.next().await;
    let policy = zone("a")
        + &service("cart", 80)
        + &route("one", "one.example", "cart")
        + &route("two", "two.example", "cart");
    stream.send(full(&policy, 1)).await;
    stream.ack().await;
    stream.send(full("", 2)).await;
    let ack = stream.ack().await;
    assert_eq!(
        (ack.generation, ack.orphans),
        (2, 4),
        "kept, and said to be unknown there"
    );
    assert!(proxy.serves("one.example") && proxy.serves("two.example"));
    let tombstone = v1::ResourceRef {
        kind: v1::Kind::Route.into(),
        name: "two".into(),
    };
    let delete = v1::Update {
        deletes: vec![tombstone],
        ..update("", 3)
    };
    stream.send(delete).await;
    assert_eq!(stream.ack().await.orphans, 3);
    assert!(proxy.serves("one.example") && !proxy.serves("two.example"));
}

#[tokio::test]
async fn a_control_plane_that_falls_silent_is_left_for_another() {
    let site = Site::new();
    let (mut silent, mut other) = (Fake::start(&site).await, Fake::start(&site).await);
    silent.heartbeats = false;
    let proxy = Proxy::start(&site, &[silent.address, other.address]);
    let mut stream = silent.next().await;
    stream.send(full(&zone("a"), 1)).await;
    stream.ack().await;
    proxy.until("it is connected", |status| status.connected).await;
    // The connection stays open, and nothing comes.
    let mut second = other.next().await;
    assert_eq!(second.hello.generation, 1);
    second.send(update("", 1)).await;
    assert_eq!(second.ack().await.generation, 1);
    proxy
        .until("it is connected again", |status| status.connected)
        .await;
    drop(stream);
}

/// A control plane that has served is come back to soon, though it is gone again at once: what failed before doesn't count.
#[tokio::test]
async fn a_control_plane_that_served_is_asked_again_soon_however_short_it_was_there() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let hour = Duration::from_secs(3600);
    let timing = Timing {
        first_pause: hour,
        max_pause: hour,
        ..TIMING
    };
    let _proxy = Proxy::start_with(&site, &[fake.address], None, timing);
    for _ in 0..3 {
        let mut stream = fake.next().await;
        stream.send(full(&zone("a"), 1)).await;
        stream.ack().await;
    }
}

/// Longer than the silence limit: both sides hear of each other all the while.
#[tokio::test]
async fn a_plugin_that_takes_long_does_not_end_the_stream() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let _proxy = Proxy::start(&site, &[fake.address]);
    let mut stream = fake.next().await;
    stream.send(full(&plugin("p", "/slow.wasm"), 1)).await;
    let mut beats = 0;
    let ack = loop {
        match stream.message().await {
            v1::proxy_message::Message::Ack(ack) => break ack,
            v1::proxy_message::Message::Heartbeat(_) => beats += 1,
            v1::proxy_message::Message::Hello(_) => panic!("a second hello"),
            v1::proxy_message::Message::Signals(_) => panic!("signals before the first ack"),
            v1::proxy_message::Message::Requests(_) => panic!("nobody asked for them"),
            v1::proxy_message::Message::Identity(_) => {}
        }
    };
    assert_eq!(ack.generation, 1);
    assert!(beats >= 3, "{beats} heartbeats");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_lives_through_a_restart_and_gets_what_it_missed() {
    let site = Site::new();
    let control = site.control("store", None).await;
    let policy = zone("a") + &service("cart", 80) + &route("one", "one.example", "cart");
    control.apply(&policy).await;
    let proxy = Proxy::start(&site, &[control.address]);
    proxy.until("it has the policy", at(1)).await;
    let address = control.stop().await;
    proxy.until("it has noticed", |status| !status.connected).await;
    assert!(proxy.serves("one.example"), "what is known stays");

    let control = site.control("store", Some(address)).await;
    control.apply(&route("two", "two.example", "cart")).await;
    proxy.until("it has what is new", at(2)).await;
    assert!(proxy.serves("one.example") && proxy.serves("two.example"));
    // And the control plane knows where it stands.
    control
        .until("its watermark is known", |p| p.connected && p.generation == 2)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_store_takes_nothing_away() {
    let site = Site::new();
    let control = site.control("store", None).await;
    let policy = zone("a") + &service("cart", 80) + &route("one", "one.example", "cart");
    control.apply(&policy).await;
    let proxy = Proxy::start(&site, &[control.address]);
    proxy.until("it has the policy", at(1)).await;
    let address: SocketAddr = control.stop().await;
    let control = site.control("lost-its-disk", Some(address)).await;
    proxy
        .until("it has met the new store", |status| status.orphans == 3)
        .await;
    assert!(proxy.serves("one.example"));
    control.until("people can see it", |p| p.orphans == 3).await;
    // Applied again, they are known again.
    control.apply(&policy).await;
    proxy
        .until("nothing is orphaned", |status| status.orphans == 0)
        .await;
    assert!(proxy.serves("one.example"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_live_well_within_a_second() {
    let site = Site::new();
    let control = site.control("store", None).await;
    control.apply(&(zone("a") + &service("cart", 80))).await;
    let proxy = Proxy::start(&site, &[control.address]);
    proxy.until("it has the policy", at(1)).await;
    let begun = tokio::time::Instant::now();
    control.apply(&route("one", "one.example", "cart")).await;
    proxy.until("it has the route", at(2)).await;
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "took {:?}",
        begun.elapsed()
    );
}

fn saw(calls: u64) -> v1::Signals {
    let seen = v1::ServiceSignals {
        service: "cart".into(),
        calls,
        ..v1::ServiceSignals::default()
    };
    v1::Signals { services: vec![seen] }
}

/// The calls that the next signals tell of, and whether an ack came before them; heartbeats are passed over.
async fn signals(stream: &mut support::FakeStream) -> (u64, bool) {
    let mut acked = false;
    loop {
        match stream.message().await {
            v1::proxy_message::Message::Signals(signals) => {
                return (signals.services.iter().map(|seen| seen.calls).sum(), acked);
            }
            v1::proxy_message::Message::Ack(_) => acked = true,
            v1::proxy_message::Message::Hello(_)
            | v1::proxy_message::Message::Heartbeat(_)
            | v1::proxy_message::Message::Requests(_)
            | v1::proxy_message::Message::Identity(_) => {}
        }
    }
}

#[tokio::test]
async fn signals_are_told_after_the_first_ack_and_only_those_from_then_on() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let proxy = Proxy::start(&site, &[fake.address]);
    for calls in [1, 10] {
        let mut stream = fake.next().await;
        proxy.until("connected", |status| status.connected).await;
        proxy.live.tell_signals(saw(calls));
        stream.send(full(&zone("a"), calls)).await;
        // Told anew until it gets there: nobody says when the ack is out.
        let telling = async {
            loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                proxy.live.tell_signals(saw(calls + 1));
            }
        };
        let told = tokio::select! {
            told = signals(&mut stream) => told,
            () = telling => unreachable!(),
        };
        assert_eq!(told, (calls + 1, true));
        drop(stream);
        proxy.until("cut off", |status| !status.connected).await;
    }
}

#[tokio::test]
async fn levels_hold_for_as_long_as_the_stream_that_told_of_them() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    let proxy = Proxy::start(&site, &[fake.address]);
    let mut levels = proxy.live.control_levels();
    for _ in 0..2 {
        let mut stream = fake.next().await;
        stream.send(full(&zone("a"), 1)).await;
        stream.ack().await;
        assert!(
            levels.borrow_and_update().is_none(),
            "nothing was said in this stream"
        );
        stream.send_levels(&[]).await;
        levels
            .wait_for(|said| said.as_ref().is_some_and(|levels| levels.is_empty()))
            .await
            .unwrap();
        stream.send_levels(&[("shop", "core-only")]).await;
        let said = levels.wait_for(|said| said.as_ref().is_some_and(|levels| levels.len() == 1));
        let said = said.await.unwrap().clone().unwrap();
        assert_eq!(
            (&*said[0].policy, &*said[0].level, &*said[0].why),
            ("shop", "core-only", "seen")
        );
        drop(stream);
        levels.wait_for(Option::is_none).await.unwrap();
    }
}
