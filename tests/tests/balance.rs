//! Which endpoint gets a request: by each policy, and by zone.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, rules, service, service_of};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Load, Mesh, Node, Protocol, eventually, get, with_header,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(20);
const NONE_OUT: &str = "outlierDetection: {maxEjectionPercent: 0}";

async fn one_worker() -> anyhow::Result<Mesh> {
    Mesh::builder()
        .node("a", "a1")
        .flag("--workers", "1")
        .start()
        .await
}

fn backends<const N: usize>(names: [&str; N]) -> anyhow::Result<Vec<Backend>> {
    names.into_iter().map(Backend::start).collect()
}

/// `app.example`, whose endpoints are these, with these weights.
fn weighted(backends: &[Backend], weights: &[u32], spec: &[&str]) -> String {
    let endpoints: Vec<String> = backends
        .iter()
        .zip(weights)
        .map(|(b, weight)| format!("{{address: \"{}\", zone: a, weight: {weight}}}", b.address()))
        .collect();
    service_of("app", &endpoints, spec) + &route("app", "app.example", "app", &[])
}

/// Answers of so many requests, by backend.
async fn spread(client: &Client, requests: u32) -> anyhow::Result<BTreeMap<String, u32>> {
    let mut by_backend = BTreeMap::new();
    for _ in 0..requests {
        let reply = client.get("app.example", "/").await?;
        *by_backend.entry(reply.backend().to_owned()).or_default() += 1;
    }
    Ok(by_backend)
}

fn share(of: &BTreeMap<String, u32>, name: &str) -> f64 {
    let all: u32 = of.values().sum();
    f64::from(of.get(name).copied().unwrap_or(0)) / f64::from(all.max(1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn turns_are_by_weight_exactly_and_chance_is_nearly() -> anyhow::Result<()> {
    let mesh = one_worker().await?;
    let all = backends(["one", "two", "three"])?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let apply = |policy: &str| {
        let balance = format!("loadBalancer: {{policy: {policy}, slowStartWindow: 0s}}");
        weighted(&all, &[1, 2, 3], &[&balance])
    };
    mesh.apply(&apply("RoundRobin")).await?;
    let turns = spread(&client, 60).await?;
    let want = [("one", 10), ("three", 30), ("two", 20)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(turns, BTreeMap::from(want));
    // By latency they can differ by any measure: one that was slow once gets less for a while.
    for policy in ["Random", "LeastRequest"] {
        mesh.apply(&apply(policy)).await?;
        let drawn = spread(&client, 600).await?;
        assert_eq!(drawn.len(), 3, "{policy}: {drawn:?}");
        assert!(
            share(&drawn, "three") > share(&drawn, "one"),
            "{policy} by weight: {drawn:?}"
        );
        if policy == "Random" {
            // Six times a standard deviation of 2 %.
            assert!((share(&drawn, "three") - 0.5).abs() < 0.12, "{policy}: {drawn:?}");
            assert!(
                (share(&drawn, "one") - 1.0 / 6.0).abs() < 0.1,
                "{policy}: {drawn:?}"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_least_loaded_of_two_is_taken() -> anyhow::Result<()> {
    let mesh = one_worker().await?;
    let all = backends(["busy", "idle"])?;
    let balance = ["loadBalancer: {policy: LeastRequest, slowStartWindow: 0s}"];
    mesh.apply(&weighted(&all, &[1, 1], &balance)).await?;
    let outbound = mesh.node("a1")?.outbound;
    // Requests pile up at one of them.
    for backend in &all {
        backend.behave(Behave::Hang);
    }
    let mut waiting = tokio::task::JoinSet::new();
    let total = || all.iter().map(Backend::requests).sum::<u64>();
    for n in 1..=8 {
        waiting.spawn(async move {
            Client::new(outbound, Protocol::Http1)
                .get("app.example", "/")
                .await
        });
        eventually("the request", SOON, || async {
            ensure!(total() == n);
            Ok(())
        })
        .await?;
        let (one, other) = (all[0].requests(), all[1].requests());
        assert!(one.abs_diff(other) <= 1, "after {n}: {one} and {other}");
    }
    waiting.shutdown().await;
    Ok(())
}

/// The backend of each key, if it is always the same.
async fn owners(client: &Client, keys: u32, times: u32) -> anyhow::Result<BTreeMap<String, String>> {
    let mut owners = BTreeMap::new();
    for key in 0..keys {
        let key = format!("user-{key}");
        let mut seen = BTreeSet::new();
        for _ in 0..times {
            let reply = client
                .call(with_header(get("app.example", "/"), "x-user", &key))
                .await?;
            ensure!(reply.status == 200, "{reply:?}");
            seen.insert(reply.backend().to_owned());
        }
        ensure!(seen.len() == 1, "{key} is at {seen:?}");
        owners.insert(key, seen.pop_first().unwrap_or_default());
    }
    Ok(owners)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_stays_where_it_is_and_only_a_dead_endpoints_keys_move() -> anyhow::Result<()> {
    // With the worker threads of a real node: where a key belongs is the same for all.
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let all = backends(["one", "two", "three", "four"])?;
    for policy in ["RingHash", "Maglev"] {
        let balance = format!(
            "loadBalancer: {{policy: {policy}, hashKey: {{header: x-user}}, hashBalanceFactor: 0, \
             panicThreshold: 0}}"
        );
        mesh.apply(&weighted(&all, &[1, 1, 1, 1], &[&balance])).await?;
        let client = mesh.workload("a1", Protocol::Http1)?;
        let before = owners(&client, 200, 3).await?;
        let used: BTreeSet<_> = before.values().collect();
        assert_eq!(used.len(), 4, "{policy} leaves an endpoint out");

        all[2].stop().await;
        // Found out by the first that are sent there.
        for key in before
            .iter()
            .filter(|(_, owner)| *owner == "three")
            .take(10)
            .map(|(key, _)| key)
        {
            client
                .call(with_header(get("app.example", "/"), "x-user", key))
                .await?;
        }
        let during = owners(&client, 200, 1).await?;
        let moved = |now: &BTreeMap<String, String>, of_dead: bool| {
            let was_dead = |owner: &str| (owner == "three") == of_dead;
            let of_interest = before.iter().filter(|(_, owner)| was_dead(owner));
            of_interest
                .filter(|(key, owner)| now.get(*key) != Some(owner))
                .count()
        };
        let dead = before.values().filter(|owner| *owner == "three").count();
        assert_eq!(moved(&during, true), dead, "{policy}");
        // A ring leaves every other key where it is; a table moves a few of them (Eisenbud et al. 2016, §5.3).
        let others = moved(&during, false);
        let most = if policy == "RingHash" { 0 } else { 15 };
        assert!(others <= most, "{policy} moved {others} keys of living endpoints");

        all[2].resume()?;
        eventually("its keys to come back", SOON, || async {
            let after = owners(&client, 200, 1).await?;
            ensure!(after == before, "{} keys are elsewhere", moved(&after, true));
            Ok(())
        })
        .await
        .with_context(|| policy.to_owned())?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cookie_is_made_once_and_leads_back() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let all = backends(["one", "two", "three"])?;
    let balance = "loadBalancer: {policy: RingHash, hashKey: {cookie: {name: session, ttl: 1h, path: /cart}}, hashBalanceFactor: 0}";
    mesh.apply(&weighted(&all, &[1, 1, 1], &[balance])).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let (mut cookies, mut homes) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..30 {
        let reply = client.get("app.example", "/").await?;
        let made = reply.header("set-cookie").to_owned();
        ensure!(
            reply.headers.get_all("set-cookie").iter().count() == 1,
            "{reply:?}"
        );
        let (pair, attributes) = made.split_once("; ").context("no attributes")?;
        assert_eq!(attributes, "Path=/cart; Max-Age=3600; HttpOnly");
        let home = reply.backend().to_owned();
        for _ in 0..5 {
            let again = with_header(get("app.example", "/"), "cookie", &format!("theme=dark; {pair}"));
            let reply = client.call(again).await?;
            assert_eq!(reply.backend(), home, "{pair}");
            assert!(!reply.headers.contains_key("set-cookie"), "{reply:?}");
        }
        cookies.insert(pair.to_owned());
        homes.insert(home);
    }
    assert_eq!((cookies.len(), homes.len()), (30, 3), "{cookies:?} {homes:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_may_choose_a_part_of_the_endpoints_by_their_labels() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let all = backends(["old", "older", "new"])?;
    let endpoints: Vec<String> = all
        .iter()
        .zip(["\"1\"", "\"1\"", "\"2\""])
        .map(|(b, version)| {
            format!(
                "{{address: \"{}\", zone: a, labels: {{version: {version}}}}}",
                b.address()
            )
        })
        .collect();
    let policy = service_of("app", &endpoints, &[])
        + &rules(
            "app",
            "app.example",
            &[
                &[
                    "matches: [{path: {prefix: /new}}]",
                    "backendRefs: [{service: app, subset: {version: \"2\"}}]",
                ],
                &[
                    "matches: [{path: {prefix: /none}}]",
                    "backendRefs: [{service: app, subset: {version: \"3\"}}]",
                    "timeouts: {request: 300ms}",
                ],
                &["backendRefs: [{service: app, subset: {version: \"1\"}}]"],
            ],
        );
    mesh.apply(&policy).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut seen = BTreeSet::new();
    for _ in 0..40 {
        assert_eq!(client.get("app.example", "/new").await?.backend(), "new");
        seen.insert(client.get("app.example", "/").await?.backend().to_owned());
    }
    assert_eq!(seen, BTreeSet::from(["old".to_owned(), "older".to_owned()]));
    let nobody = client.get("app.example", "/none").await?;
    assert_eq!(
        (nobody.status.as_u16(), nobody.header("leeward-reason")),
        (503, "no_endpoint")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_fast_attracts_no_load() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let all = backends(["hole", "one", "two"])?;
    all[0].behave(Behave::Answer(Answer::status(500)));
    for backend in &all[1..] {
        backend.behave(Behave::Late(Duration::from_millis(20), Answer::text("well")));
    }
    let balance = "loadBalancer: {policy: PeakEwma, slowStartWindow: 0s}";
    mesh.apply(&weighted(&all, &[1, 1, 1], &[balance, NONE_OUT]))
        .await?;
    let outbound = mesh.node("a1")?.outbound;
    let load = Load::start(
        outbound,
        Protocol::Http1,
        ("app.example", "/"),
        6,
        Duration::from_millis(1),
    );
    eventually("some load", SOON, || async {
        ensure!(load.tally().sent >= 600);
        Ok(())
    })
    .await?;
    let tally = load.stop().await;
    assert!(
        tally.failed > 0 && tally.failed * 20 < tally.sent,
        "its share would be a third: {tally:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_endpoint_gets_little_at_first_and_its_share_later() -> anyhow::Result<()> {
    const WINDOW: Duration = Duration::from_secs(5);
    let mesh = one_worker().await?;
    let mut all = backends(["one", "two"])?;
    let balance = "loadBalancer: {policy: RoundRobin, slowStartWindow: 5s}";
    mesh.apply(&weighted(&all, &[1, 1], &[balance])).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    // The endpoints are as old as their first call.
    client.get("app.example", "/").await?;
    tokio::time::sleep(WINDOW).await;
    all.push(Backend::start("new")?);
    mesh.apply(&weighted(&all, &[1, 1, 1], &[balance])).await?;
    let early = spread(&client, 200).await?;
    assert!(share(&early, "new") < 0.2, "{early:?}");
    tokio::time::sleep(WINDOW).await;
    let late = spread(&client, 200).await?;
    assert!((share(&late, "new") - 1.0 / 3.0).abs() < 0.05, "{late:?}");
    assert!(share(&early, "new") > 0.0, "{early:?}");
    Ok(())
}

async fn zone_share(node: &Node, zone: &str) -> anyhow::Result<f64> {
    let label = format!("zone=\"{zone}\"");
    node.metric("leeward_zone_share", &["service=\"app\"", label.as_str()])
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_that_comes_and_goes_is_left_once_and_comes_back_when_it_stays() -> anyhow::Result<()> {
    // All of this is five times as fast as the defaults are, and so is the zone, which would come and go at
    // 0.2 Hz: a fifth of a minute is a minute.
    const HALF: Duration = Duration::from_millis(500);
    const MINUTE: Duration = Duration::from_secs(12);
    let mesh = Mesh::two_zones().await?;
    let (here, there) = (backends(["here", "here"])?, backends(["there", "there"])?);
    let endpoints: Vec<_> = here
        .iter()
        .map(|b| (b.address(), "a", ""))
        .chain(there.iter().map(|b| (b.address(), "b", "")))
        .collect();
    let spec = [
        "loadBalancer: {zoneFailover: {leaveAfter: 2s, returnAfter: 12s, returnInterval: 200ms}, slowStartWindow: 0s}",
        "healthCheck: {http: {path: /healthz}, interval: 100ms, intervalJitter: 0, unhealthyThreshold: 1, \
         healthyThreshold: 1}",
    ];
    mesh.apply(&(service("app", &endpoints, &spec) + &route("app", "app.example", "app", &[])))
        .await?;
    let node = mesh.node("a1")?;
    let pause = Duration::from_millis(5);
    let load = Load::start(node.outbound, Protocol::Http1, ("app.example", "/"), 2, pause);
    eventually("the local zone to serve", SOON, || async {
        ensure!(zone_share(node, "a").await? > 0.99);
        Ok(())
    })
    .await?;
    load.take();

    let begun = Instant::now();
    let (mut local, mut failovers, mut flips) = (true, 0, 0);
    while begun.elapsed() < MINUTE {
        let up = (begun.elapsed().as_millis() / HALF.as_millis()) % 2 == 1;
        for backend in &here {
            backend.set_health(up);
        }
        let now_local = zone_share(node, "a").await? > 0.5;
        flips += u32::from(now_local != local);
        failovers += u32::from(local && !now_local);
        local = now_local;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert_eq!((failovers, flips), (1, 1), "in what would be a minute");
    // It did come and go, each of its endpoints about a dozen times.
    let dips = node
        .metric("leeward_endpoint_changes_total", &["change=\"unhealthy\""])
        .await?;
    assert!(dips >= 10.0, "{dips}");
    let during = load.take();
    assert_eq!(during.failed, 0, "{during:?}");

    for backend in &here {
        backend.set_health(true);
    }
    eventually("the local zone to serve again", SOON, || async {
        let share = zone_share(node, "a").await?;
        ensure!(share > 0.99, "{share}");
        Ok(())
    })
    .await?;
    assert_eq!(load.stop().await.failed, 0);
    Ok(())
}
