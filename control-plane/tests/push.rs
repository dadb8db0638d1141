//! The push as a proxy sees it: what changed since what it has, and nothing else.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use leeward_control::push::Timing;
use leeward_proto::v1;
use std::time::Duration;
use support::{SOON, Site, Stream, apply, eventually, hello, names, reference, service, zone};
use tonic::Code;

fn known(proxy: &str, last: &v1::Update) -> v1::Hello {
    v1::Hello {
        store_id: last.store_id.clone(),
        generation: last.generation,
        ..hello(proxy)
    }
}

#[tokio::test]
async fn everything_first_then_only_what_changes() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&(zone("a") + &service("cart", 80) + &service("pay", 81))))
        .await
        .unwrap();
    let client = site.push(control.address, "p1");
    let mut stream = Stream::open(&client, hello("p1")).await.unwrap();
    let first = stream.change().await;
    assert!(first[0].full);
    assert_eq!(names(&first), ["a", "cart", "pay"]);
    api.apply(apply(&service("pay", 82))).await.unwrap();
    let second = stream.change().await;
    assert!(!second[0].full);
    assert_eq!(names(&second), ["pay"]);
    let request = v1::DeleteRequest {
        r#ref: Some(reference(v1::Kind::Service, "pay")),
        revision: 0,
    };
    api.delete(request).await.unwrap();
    let third = stream.change().await;
    assert_eq!(
        (names(&third).len(), &third[0].deletes),
        (0, &vec![reference(v1::Kind::Service, "pay")])
    );
    control.stop().await;
}

#[tokio::test]
async fn a_proxy_that_comes_back_gets_only_what_it_missed_even_from_a_restarted_control_plane() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&(zone("a") + &service("cart", 80) + &service("pay", 81))))
        .await
        .unwrap();
    let mut stream = Stream::open(&site.push(control.address, "p1"), hello("p1"))
        .await
        .unwrap();
    let had = stream.change().await.pop().unwrap();
    drop(stream);
    api.apply(apply(&service("new", 83))).await.unwrap();
    let request = v1::DeleteRequest {
        r#ref: Some(reference(v1::Kind::Service, "pay")),
        revision: 0,
    };
    api.delete(request).await.unwrap();
    drop(api);
    control.stop().await;

    let control = site.start("store", Timing::DEFAULT).await;
    let client = site.push(control.address, "p1");
    let mut stream = Stream::open(&client, known("p1", &had)).await.unwrap();
    let missed = stream.change().await;
    assert!(!missed[0].full);
    assert_eq!(names(&missed), ["new"]);
    assert_eq!(missed[0].deletes, [reference(v1::Kind::Service, "pay")]);
    drop(stream);

    // With nothing missed there is one update without a resource, so that the proxy says what it refuses.
    let mut stream = Stream::open(&client, known("p1", &missed[0])).await.unwrap();
    let nothing = stream.change().await;
    assert_eq!(
        (nothing.len(), names(&nothing).len(), nothing[0].deletes.len()),
        (1, 0, 0)
    );
    let mut api = site.api(control.address);
    eventually("the control plane knows what it runs", async || {
        let proxies = api.list_proxies(v1::ListProxiesRequest {}).await.unwrap();
        proxies
            .into_inner()
            .proxies
            .iter()
            .any(|p| p.connected && p.generation == 3)
    })
    .await;
    control.stop().await;
}

#[tokio::test]
async fn another_stores_generation_counts_for_nothing() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    site.api(control.address).apply(apply(&zone("a"))).await.unwrap();
    let client = site.push(control.address, "p1");
    let elsewhere = v1::Hello {
        store_id: "another".into(),
        generation: 1,
        ..hello("p1")
    };
    let mut stream = Stream::open(&client, elsewhere).await.unwrap();
    let whole = stream.change().await;
    assert!(whole[0].full);
    assert_eq!(names(&whole), ["a"]);
    // A restored backup: this store's id, but a generation that it has yet to reach.
    let ahead = v1::Hello {
        generation: 99,
        ..known("p1", &whole[0])
    };
    let mut stream = Stream::open(&client, ahead).await.unwrap();
    assert!(stream.change().await[0].full);
    control.stop().await;
}

#[tokio::test]
async fn a_large_policy_comes_in_pieces() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let zones: String = (0..1201).map(|i| zone(&format!("z{i}"))).collect();
    site.api(control.address).apply(apply(&zones)).await.unwrap();
    let mut stream = Stream::open(&site.push(control.address, "p1"), hello("p1"))
        .await
        .unwrap();
    let updates = stream.change().await;
    let sizes: Vec<_> = updates.iter().map(|u| u.upserts.len()).collect();
    assert_eq!(sizes, [500, 500, 201]);
    let complete: Vec<_> = updates.iter().map(|u| u.complete).collect();
    assert_eq!(complete, [false, false, true]);
    control.stop().await;
}

/// What a proxy that does not read costs is a few messages, whatever happens meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_queued_for_a_proxy_that_does_not_read() {
    let site = Site::new();
    let patient = Timing {
        silence: Duration::from_secs(300),
        ..Timing::DEFAULT
    };
    let control = site.start("store", patient).await;
    let mut api = site.api(control.address);
    api.apply(apply(&zone("a"))).await.unwrap();
    let open = async |name| {
        let mut stream = Stream::open(&site.push(control.address, name), hello(name))
            .await
            .unwrap();
        stream.change().await;
        stream
    };
    // The witness reads every version, so that each is pushed by itself.
    let (mut stream, mut witness) = (open("p1").await, open("witness").await);
    // Large and cheap to check: half a megabyte of answers.
    let rung = v1::Rung {
        kind: Some(v1::rung::Kind::Static(v1::StaticRung {
            status: 200,
            headers: vec![],
            body: "x".repeat(64 << 10),
            template: false,
        })),
        ..v1::Rung::default()
    };
    let mut big = v1::Resource {
        metadata: Some(v1::Metadata {
            name: "big".into(),
            ..v1::Metadata::default()
        }),
        spec: Some(v1::resource::Spec::FallbackPolicy(v1::FallbackPolicy {
            rungs: vec![rung; 8],
            ..v1::FallbackPolicy::default()
        })),
        status: None,
    };
    const ROUNDS: u16 = 60;
    let mut last = 0;
    for round in 0..ROUNDS {
        // A label makes another version of it, cheaply.
        let labels = [("round".to_owned(), round.to_string())];
        big.metadata.as_mut().unwrap().labels = labels.into();
        last = api
            .apply(v1::ApplyRequest {
                resources: vec![big.clone()],
                dry_run: false,
                ..v1::ApplyRequest::default()
            })
            .await
            .unwrap()
            .into_inner()
            .revision;
        while witness.change().await.last().unwrap().generation < last {}
    }
    let mut versions = 0;
    loop {
        let update = stream.update().await;
        versions += update.upserts.len();
        if update.generation == last {
            break;
        }
    }
    assert!(
        versions < usize::from(ROUNDS) / 2,
        "{versions} of {ROUNDS} versions were kept for it"
    );
    control.stop().await;
}

/// Every proxy has a change well within a second; they share one encoding of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_reaches_many_proxies_at_once() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&zone("a"))).await.unwrap();
    let client = site.push(control.address, "p1");
    let mut streams = Vec::new();
    for _ in 0..100 {
        let mut stream = Stream::open(&client, hello("p1")).await.unwrap();
        stream.change().await;
        streams.push(stream);
    }
    let begun = tokio::time::Instant::now();
    api.apply(apply(&service("cart", 80))).await.unwrap();
    for stream in &mut streams {
        assert_eq!(names(&stream.change().await), ["cart"]);
    }
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "took {:?}",
        begun.elapsed()
    );
    control.stop().await;
}

#[tokio::test]
async fn a_silent_proxy_is_dropped_and_one_that_says_it_is_there_is_not() {
    let site = Site::new();
    let timing = Timing {
        heartbeat: Duration::from_millis(50),
        silence: Duration::from_millis(400),
        ..Timing::DEFAULT
    };
    let control = site.start("store", timing).await;
    let mut silent = Stream::open(&site.push(control.address, "silent"), hello("silent"))
        .await
        .unwrap();
    let mut alive = Stream::open(&site.push(control.address, "alive"), hello("alive"))
        .await
        .unwrap();
    silent.update().await;
    alive.update().await;
    let out = alive.out.clone();
    let beats = tokio::spawn(async move {
        let beat = || support::from_proxy(v1::proxy_message::Message::Heartbeat(v1::Heartbeat {}));
        while out.send(beat()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let ended = async { while let Ok(Some(_)) = silent.messages.message().await {} };
    tokio::time::timeout(SOON, ended).await.unwrap();
    let mut api = site.api(control.address);
    let proxies = api.list_proxies(v1::ListProxiesRequest {}).await.unwrap();
    let connected: Vec<_> = proxies
        .into_inner()
        .proxies
        .into_iter()
        .map(|p| (p.name, p.connected))
        .collect();
    assert_eq!(
        connected,
        [("alive".to_owned(), true), ("silent".to_owned(), false)]
    );
    // It is told as well that the control plane is there.
    let message = tokio::time::timeout(SOON, alive.messages.message()).await;
    let message = message.unwrap().unwrap().unwrap().message;
    assert!(
        matches!(message, Some(v1::control_message::Message::Heartbeat(_))),
        "{message:?}"
    );
    beats.abort();
    control.stop().await;
}

#[tokio::test]
async fn only_the_proxy_of_the_certificate_subscribes() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let open = async |hello| {
        let client = site.push(control.address, "p1");
        Stream::open(&client, hello)
            .await
            .err()
            .map(|status| status.code())
    };
    let elsewhere = v1::Hello {
        zone: "b".into(),
        ..hello("p1")
    };
    assert_eq!(open(hello("p2")).await, Some(Code::PermissionDenied));
    assert_eq!(open(elsewhere).await, Some(Code::PermissionDenied));
    assert_eq!(open(hello("p1")).await, None);
    control.stop().await;
}
