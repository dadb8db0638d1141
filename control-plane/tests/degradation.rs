//! Levels of degradation over the wire: what proxies are told, what people see, and what is written down.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod support;

use leeward_control::kv::{EtcdSettings, Kv};
use leeward_control::push::Timing;
use leeward_proto::v1;
use leeward_proto::v1::control_message::Message as ToProxy;
use leeward_proto::v1::proxy_message::Message as FromProxy;
use leeward_testkit::{EtcdCluster, EtcdVersion};
use std::time::{Duration, SystemTime};
use support::{SOON, Site, Stream, apply, eventually, from_proxy, hello, reference, service, zone};
use tonic::Code;
use tonic::transport::Channel;
use v1::degradation_service_client::DegradationServiceClient;

const POLICY: &str = "apiVersion: leeward.dev/v1\nkind: DegradationPolicy\nmetadata: {name: shop}\nspec:\n  levels: [{name: normal}, {name: core-only}]\n  triggers: [{level: core-only, circuitOpen: pay, holdFor: 0s, clearAfter: 1h, minStay: 1h}]\n---\n";

fn ada() -> String {
    "spiffe://leeward.test/user/ada".to_owned()
}

fn held(name: &str, level: &str, length: Duration, reason: &str) -> String {
    #[expect(clippy::disallowed_methods, reason = "overrides end by the wall clock")]
    let end = prost_types::Timestamp::from(SystemTime::now() + length);
    format!(
        "apiVersion: leeward.dev/v1\nkind: DegradationOverride\nmetadata: {{name: {name}}}\nspec: {{policy: shop, level: {level}, expireTime: \"{end}\", reason: {reason}}}\n---\n"
    )
}

fn signals(open: bool) -> v1::ProxyMessage {
    signals_of("pay", open)
}

fn signals_of(service: &str, open: bool) -> v1::ProxyMessage {
    from_proxy(FromProxy::Signals(v1::Signals {
        services: vec![v1::ServiceSignals {
            service: service.into(),
            circuit_open: open,
            calls: 1,
            ..v1::ServiceSignals::default()
        }],
    }))
}

/// Tells what a proxy sees again and again, as proxies do, until aborted.
fn see(stream: &Stream, open: bool) -> tokio::task::JoinHandle<()> {
    let out = stream.out.clone();
    tokio::spawn(async move {
        while out.send(signals(open)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

/// The same of a service whose circuit is open.
fn see_of(stream: &Stream, service: &'static str) -> tokio::task::JoinHandle<()> {
    let out = stream.out.clone();
    tokio::spawn(async move {
        while out.send(signals_of(service, true)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

/// The next levels that a proxy is told, as `policy/level`.
async fn told(stream: &mut Stream) -> Vec<String> {
    loop {
        let message = tokio::time::timeout(SOON, stream.messages.message()).await;
        if let Some(ToProxy::Levels(levels)) = message.unwrap().unwrap().unwrap().message {
            let levels = levels.levels.iter();
            return levels.map(|l| format!("{}/{}", l.policy, l.level)).collect();
        }
    }
}

async fn changes(client: &DegradationServiceClient<Channel>) -> Vec<v1::LevelChange> {
    let request = v1::ListChangesRequest::default();
    client
        .clone()
        .list_changes(request)
        .await
        .unwrap()
        .into_inner()
        .changes
}

/// From, to, by and why, the oldest first.
async fn audit(client: &DegradationServiceClient<Channel>) -> Vec<[String; 4]> {
    let changes = changes(client).await.into_iter().rev();
    changes.map(|c| [c.from, c.to, c.by, c.why]).collect()
}

fn line(from: &str, to: &str, by: &str, why: &str) -> [String; 4] {
    [from, to, by, why].map(str::to_owned)
}

async fn levels(client: &DegradationServiceClient<Channel>) -> Vec<v1::ZoneLevel> {
    let request = v1::ListLevelsRequest::default();
    client
        .clone()
        .list_levels(request)
        .await
        .unwrap()
        .into_inner()
        .levels
}

/// The next levels until they are these.
async fn until_told(stream: &mut Stream, wanted: &[&str]) {
    loop {
        let told = told(stream).await;
        if told == wanted {
            return;
        }
        eprintln!("told {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_proxies_of_one_control_plane_see_counts_at_every_other() {
    let Some(etcd) = EtcdCluster::start(EtcdVersion::V3_4, 1).await.unwrap() else {
        return;
    };
    let kv = || {
        Kv::etcd(EtcdSettings {
            endpoints: etcd.endpoints(),
            prefix: "/t/".into(),
            ..EtcdSettings::default()
        })
        .unwrap()
    };
    let site = Site::new();
    let (one, two) = (site.start_on(kv()).await, site.start_on(kv()).await);
    let feed = POLICY.replace("name: shop", "name: feed").replace("pay", "cart");
    let policy = zone("a") + &service("pay", 80) + &service("cart", 81) + POLICY + &feed;
    let written = site.api(one.address).apply(apply(&policy)).await.unwrap();
    let listed = site.api(two.address).list(v1::ListRequest::default()).await;
    assert_eq!(
        listed.unwrap().into_inner().revision,
        written.into_inner().revision
    );
    let mut of_one = Stream::open(&site.push(one.address, "p1"), hello("p1"))
        .await
        .unwrap();
    let mut of_two = Stream::open(&site.push(two.address, "p2"), hello("p2"))
        .await
        .unwrap();
    of_one.change().await;
    of_two.change().await;
    // One of the two judges; whichever it is, both are told of both.
    let seeing = see_of(&of_one, "pay");
    until_told(&mut of_one, &["shop/core-only"]).await;
    until_told(&mut of_two, &["shop/core-only"]).await;
    seeing.abort();
    let seeing = see_of(&of_two, "cart");
    let both = ["feed/core-only", "shop/core-only"];
    until_told(&mut of_one, &both).await;
    until_told(&mut of_two, &both).await;
    seeing.abort();
    for control in [&one, &two] {
        let client = site.levels(control.address);
        assert_eq!(changes(&client).await.len(), 2, "each is judged once");
        let shown = levels(&client).await;
        let shown: Vec<_> = shown.iter().map(|l| l.level.as_str()).collect();
        assert_eq!(shown, ["core-only", "core-only"]);
    }
    // Without the one that judged, the other goes on from what is written down.
    one.stop().await;
    let control = &two;
    let mut late = Stream::open(&site.push(control.address, "p3"), hello("p3"))
        .await
        .unwrap();
    late.change().await;
    until_told(&mut late, &both).await;
    two.stop().await;
}

#[tokio::test]
async fn a_proxy_is_told_the_levels_after_its_first_ack_and_whenever_they_change() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let policy = zone("a") + &zone("b") + &service("pay", 80) + POLICY;
    api.apply(apply(&policy)).await.unwrap();
    let client = site.push(control.address, "p1");
    let mut stream = Stream::open(&client, hello("p1")).await.unwrap();
    let update = stream.update().await;
    // Without an ack, nothing but policy, and signals that nobody is to miss.
    stream.out.send(signals(false)).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(300), stream.messages.message()).await;
    assert!(early.is_err(), "{early:?}");
    stream.ack(update.generation, vec![]).await;
    assert_eq!(told(&mut stream).await, Vec::<String>::new());
    let seeing = see(&stream, true);
    assert_eq!(told(&mut stream).await, ["shop/core-only"]);
    seeing.abort();

    let levels_client = site.levels(control.address);
    let shown = levels(&levels_client).await;
    let shown: Vec<_> = shown
        .iter()
        .map(|l| (l.zone.as_str(), l.level.as_str(), l.by.as_str(), l.why.as_str()))
        .collect();
    let open = "circuit of pay open";
    assert_eq!(
        shown,
        [("a", "core-only", "trigger 0", open), ("b", "normal", "", "")]
    );
    assert_eq!(
        audit(&levels_client).await,
        [line("normal", "core-only", "trigger 0", open)]
    );

    // A restart doesn't end it, nor writes it down twice.
    drop((stream, api, levels_client));
    control.stop().await;
    let control = site.start("store", Timing::DEFAULT).await;
    let client = site.push(control.address, "p1");
    let mut stream = Stream::open(&client, hello("p1")).await.unwrap();
    stream.change().await;
    assert_eq!(told(&mut stream).await, ["shop/core-only"]);
    let levels_client = site.levels(control.address);
    assert_eq!(changes(&levels_client).await.len(), 1);
    drop(stream);
    control.stop().await;
}

#[tokio::test]
async fn the_audit_says_who_held_a_level_and_that_it_ended_though_nobody_was_there() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let policy = zone("a") + &service("pay", 80) + POLICY;
    api.apply(apply(&policy)).await.unwrap();
    let client = site.levels(control.address);
    assert!(changes(&client).await.is_empty());
    let hour = Duration::from_secs(3600);
    api.apply(apply(&held("one", "core-only", hour, "slow")))
        .await
        .unwrap();
    let shown = levels(&client).await.remove(0);
    assert_eq!((shown.level.as_str(), shown.by), ("core-only", ada()));
    assert!(shown.since.is_some() && shown.until.is_some());
    // What is refused leaves no trace, and neither does what changes nothing.
    let refused = api.apply(apply(&held("one", "nothing", hour, "typo"))).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    let mut dry = apply(&held("one", "normal", hour, "dry"));
    dry.dry_run = true;
    api.apply(dry).await.unwrap();
    let delete = v1::DeleteRequest {
        r#ref: Some(reference(v1::Kind::DegradationOverride, "one")),
        revision: 0,
        ..v1::DeleteRequest::default()
    };
    api.delete(delete).await.unwrap();
    let mut want = vec![
        line("normal", "core-only", &ada(), "slow"),
        line("core-only", "normal", &ada(), "slow"),
    ];
    assert_eq!(audit(&client).await, want);

    // One that ends while the control plane is there is noticed within a second, or a little more when it is busy.
    api.apply(apply(&held("two", "core-only", Duration::from_secs(1), "soon")))
        .await
        .unwrap();
    want.push(line("normal", "core-only", &ada(), "soon"));
    want.push(line("core-only", "normal", "expiry", "soon"));
    eventually("the end to be written down", async || {
        changes(&client).await.len() == 4
    })
    .await;
    assert_eq!(audit(&client).await, want);

    // And one that ends while it is away, when it is back, with the time when it ended.
    let begun = Duration::from_secs(1);
    api.apply(apply(&held("three", "core-only", begun, "away")))
        .await
        .unwrap();
    let applied = changes(&client).await.remove(0).time.unwrap();
    drop((api, client));
    control.stop().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let control = site.start("store", Timing::DEFAULT).await;
    let client = site.levels(control.address);
    eventually("the end to be written down", async || {
        changes(&client).await.len() == 6
    })
    .await;
    let ended = changes(&client).await.remove(0);
    assert_eq!((ended.by.as_str(), ended.why.as_str()), ("expiry", "away"));
    let ms = |t: prost_types::Timestamp| t.seconds * 1000 + i64::from(t.nanos / 1_000_000);
    let lasted = ms(ended.time.unwrap()) - ms(applied);
    assert!((900..=1000).contains(&lasted), "{lasted} ms");
    let shown = levels(&client).await.remove(0);
    assert_eq!((shown.level.as_str(), shown.by.as_str()), ("normal", ""));
    assert_eq!(shown.since, ended.time);
    control.stop().await;
}

#[tokio::test]
async fn changes_come_in_pages_to_users_only_and_bad_requests_are_told_so() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&(zone("a") + &service("pay", 80) + POLICY)))
        .await
        .unwrap();
    let hour = Duration::from_secs(3600);
    for i in 0..5 {
        let text = held("one", "core-only", hour, &format!("r{i}"));
        api.apply(apply(&text)).await.unwrap();
    }
    let mut client = site.levels(control.address);
    let (mut seen, mut before) = (Vec::new(), 0);
    loop {
        let request = v1::ListChangesRequest {
            policy: "shop".into(),
            page_size: 2,
            before,
        };
        let page = client.list_changes(request).await.unwrap().into_inner().changes;
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 2);
        before = last.id;
        seen.extend(page.into_iter().map(|c| (c.id, c.why)));
    }
    let want: Vec<_> = (0..5u64).rev().map(|i| (i + 1, format!("r{i}"))).collect();
    assert_eq!(seen, want);
    let other = v1::ListChangesRequest {
        policy: "other".into(),
        ..v1::ListChangesRequest::default()
    };
    assert!(
        client
            .list_changes(other)
            .await
            .unwrap()
            .into_inner()
            .changes
            .is_empty()
    );

    let many = v1::ListChangesRequest {
        page_size: 1001,
        ..v1::ListChangesRequest::default()
    };
    let refused = client.list_changes(many).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (
            Code::InvalidArgument,
            "page_size: 1001 is out of range; want at most 1000"
        )
    );
    let nothing = v1::ListLevelsRequest {
        policy: "other".into(),
    };
    let refused = client.list_levels(nothing).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::NotFound, "there is no DegradationPolicy/other")
    );
    let mut proxy = site.levels_as(control.address, &Site::proxy_id("p1"));
    let refused = proxy
        .list_changes(v1::ListChangesRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let refused = proxy
        .list_levels(v1::ListLevelsRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    control.stop().await;
}
