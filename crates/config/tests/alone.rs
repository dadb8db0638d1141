//! A subscription that keeps what it has, and moves between control planes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use leeward_config::PolicySource;
use leeward_proto::v1;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::{BUSY, Fake, Proxy, Site, TIMING, route, service, zone};

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("leeward-alone-{name}-{}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn update(text: &str, generation: u64) -> v1::Update {
    v1::Update {
        store_id: "fake".into(),
        generation,
        upserts: support::yaml(text, generation),
        complete: true,
        full: generation == 1,
        ..v1::Update::default()
    }
}

/// Waits until a name is in one of the files.
async fn on_disk(scratch: &Scratch, name: &str) {
    let is_there = || {
        let files =
            ["policy", "policy.log"].map(|file| std::fs::read(scratch.0.join(file)).unwrap_or_default());
        let mut windows = files.iter().flat_map(|file| file.windows(name.len()));
        windows.any(|window| window == name.as_bytes())
    };
    for _ in 0..2000 {
        if is_there() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    unreachable!("{name} is never written");
}

fn nobody() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn what_came_is_there_without_a_control_plane_and_goes_on_from_where_it_was() {
    let (site, scratch) = (Site::new(), Scratch::new("again"));
    let mut fake = Fake::start(&site).await;
    let first = Proxy::start_with(&site, &[fake.address], Some(scratch.0.clone()), TIMING);
    let mut stream = fake.next().await;
    let policy = zone("a") + &service("cart", 80) + &route("shop", "shop.example", "cart");
    stream.send(update(&policy, 1)).await;
    stream.ack().await;
    stream.send(update(&zone("the-second"), 2)).await;
    stream.ack().await;
    on_disk(&scratch, "the-second").await;
    drop((first, stream));

    // Nobody is there.
    let alone = Proxy::start_with(&site, &[nobody()], Some(scratch.0.clone()), TIMING);
    alone
        .until("it has policy", |status| status.generation == Some(2))
        .await;
    assert!(alone.serves("shop.example"));
    alone
        .until("it does not wait", |status| status.asking_until.is_none())
        .await;
    assert_eq!(alone.live.status().source, PolicySource::Disk);
    drop(alone);

    // Somebody is, who says nothing yet, and then that nothing is new.
    let again = Proxy::start_with(&site, &[fake.address], Some(scratch.0.clone()), TIMING);
    let mut stream = fake.next().await;
    assert_eq!(
        (stream.hello.generation, stream.hello.store_id.as_str()),
        (2, "fake")
    );
    assert!(again.serves("shop.example"));
    assert_eq!(again.live.status().source, PolicySource::Disk);
    stream
        .send(v1::Update {
            full: false,
            ..update("", 2)
        })
        .await;
    let ack = stream.ack().await;
    assert_eq!((ack.generation, ack.quarantined.len(), ack.orphans), (2, 0, 0));
    assert_eq!(again.live.status().source, PolicySource::Control);
}

#[tokio::test]
async fn a_control_plane_that_does_not_read_is_left_for_another() {
    let site = Site::new();
    let (mut deaf, mut other) = (Fake::start(&site).await, Fake::start(&site).await);
    let proxy = Proxy::start(&site, &[deaf.address, other.address]);
    let mut stream = deaf.next().await;
    stream.send(update(&zone("a"), 1)).await;
    stream.ack().await;
    // It says that it is there, and reads nothing any more: what is under way is bounded, and then it is gone.
    let signals = v1::Signals {
        services: vec![v1::ServiceSignals {
            service: "x".repeat(16 << 10),
            ..v1::ServiceSignals::default()
        }],
    };
    let telling = async {
        loop {
            proxy.live.tell_signals(signals.clone());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let second = tokio::select! {
        second = other.next() => second,
        () = telling => unreachable!(),
    };
    assert_eq!(second.hello.generation, 1);
    drop(stream);
}

#[tokio::test]
async fn a_busy_control_plane_is_left_alone_for_as_long_as_it_asks() {
    let site = Site::new();
    let mut fake = Fake::start(&site).await;
    fake.busy.store(1, Ordering::SeqCst);
    let began = tokio::time::Instant::now();
    let proxy = Proxy::start(&site, &[fake.address]);
    let _stream = fake.next().await;
    // With jitter, half of it at least.
    assert!(began.elapsed() >= BUSY / 2, "{:?}", began.elapsed());
    drop(proxy);

    // Another that has time is asked at once.
    let mut other = Fake::start(&site).await;
    fake.busy.store(u64::MAX, Ordering::SeqCst);
    let _proxy = Proxy::start(&site, &[fake.address, other.address]);
    let _stream = other.next().await;
}

#[tokio::test]
async fn who_is_told_goodbye_goes_elsewhere() {
    let site = Site::new();
    let (mut first, mut second) = (Fake::start(&site).await, Fake::start(&site).await);
    let proxy = Proxy::start(&site, &[first.address, second.address]);
    let mut stream = first.next().await;
    stream.send(update(&zone("a"), 1)).await;
    stream.ack().await;
    let spread = Some(prost_types::Duration {
        seconds: 0,
        nanos: 20_000_000,
    });
    stream
        .say(v1::control_message::Message::Goodbye(v1::Goodbye { spread }))
        .await;
    let mut other = second.next().await;
    assert_eq!(other.hello.generation, 1);
    other
        .send(v1::Update {
            full: false,
            ..update("", 1)
        })
        .await;
    assert_eq!(other.ack().await.generation, 1);
    proxy.until("it is connected", |status| status.connected).await;
}
