//! Three control planes on three members of etcd, under writes and traffic, while what may go wrong does: nothing that was
//! acknowledged is lost, all see one history, who lost a lease changes nothing, and no request fails.
//!
//! `LEEWARD_CHAOS_SECONDS` says for how long, `LEEWARD_CHAOS_SEED` which storm it is.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and says its figures; nothing here is anybody else's"
)]

mod check;
mod clients;
mod history;
mod kit;
mod lease;
mod nemesis;
mod registers;

use clients::{Client, ROUTE, TARGETS, resource, target};
use fastrand::Rng;
use history::{Ask, Log, Op, Outcome, Recorder, Replay};
use kit::{SOON, World};
use leeward_proto::{manifest, v1};
use leeward_testkit::policy::service;
use leeward_testkit::{Backend, EtcdVersion, Load, Protocol, eventually, get};
use nemesis::Nemesis;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a storm is, unless it is said.
const SECONDS: u64 = 30;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().unwrap())
}

fn zones(world: &World) -> String {
    let mut text = String::new();
    for node in &world.proxies {
        let (zone, name, inbound) = (&node.zone, &node.name, node.inbound);
        write!(
            text,
            "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {zone}}}\nspec: {{proxies: [{{name: {name}, address: \"{inbound}\"}}]}}\n"
        )
        .unwrap();
    }
    text
}

/// Counts of operations: all, and those with each outcome.
fn figures(ops: &[Op]) -> String {
    let mut of: BTreeMap<&str, usize> = BTreeMap::new();
    for op in ops {
        let is_write = matches!(op.ask, Ask::Put { .. } | Ask::Delete { .. });
        let what = match (is_write, &op.outcome) {
            (true, Outcome::Done(_)) => "writes acknowledged",
            (true, Outcome::Unknown) => "writes of unknown outcome",
            (true, Outcome::Conflict(..)) => "refused for the revision",
            (true, Outcome::Found(_)) => "with nothing to delete",
            (true, _) => "otherwise refused",
            (false, Outcome::Unknown) => "reads not answered",
            (false, _) => "reads answered",
        };
        *of.entry(what).or_default() += 1;
    }
    format!("{} operations {of:?}", ops.len())
}

async fn storm(version: EtcdVersion) {
    // One storm at a time is enough for a machine.
    static ONE: Mutex<()> = Mutex::const_new(());
    let _one = ONE.lock().await;
    let seconds = setting("LEEWARD_CHAOS_SECONDS", SECONDS);
    let seed = setting("LEEWARD_CHAOS_SEED", fastrand::u64(..1_000_000));
    eprintln!("etcd {version:?}, LEEWARD_CHAOS_SEED={seed}, {seconds} s");
    let Some(mut world) = World::start(version).await.unwrap() else {
        return;
    };
    let backends = TARGETS.map(|name| Backend::start(name).unwrap());
    let mut resources = zones(&world);
    for backend in &backends {
        resources += &service(backend.name(), &[(backend.address(), "b", "b1")], &[]);
    }
    let mut resources = manifest::parse("chaos", &resources).unwrap();
    resources.push(resource(ROUTE, "", 0));
    let mut test = world.apis("test").unwrap();
    let request = v1::ApplyRequest {
        resources,
        ..v1::ApplyRequest::default()
    };
    let base = test[0].apply(request).await.unwrap().into_inner().revision;
    world.converged(base).await.unwrap();
    for node in &world.proxies {
        node.wait_ready().await.unwrap();
    }

    let loads: Vec<Load> = world
        .proxies
        .iter()
        .zip([Protocol::Http1, Protocol::Http2])
        .map(|(node, protocol)| {
            Load::start(
                node.outbound,
                protocol,
                ("app.example", "/"),
                2,
                Duration::from_millis(20),
            )
        })
        .collect();
    let recorder = Arc::<Recorder>::default();
    let (stop, last) = (CancellationToken::new(), Arc::<AtomicU64>::default());
    let mut rng = Rng::with_seed(seed);
    let mut client = |who: &str| Client {
        who: who.to_owned(),
        apis: world.apis(who).unwrap(),
        recorder: Arc::clone(&recorder),
        rng: rng.fork(),
        stop: stop.clone(),
    };
    let (mut tasks, mut watches) = (JoinSet::new(), JoinSet::new());
    for who in ["w0", "w1", "w2", "w3"] {
        tasks.spawn(client(who).write());
    }
    for who in ["r0", "r1"] {
        tasks.spawn(client(who).read());
    }
    let end = client("test");
    for _ in 0..3 {
        watches.spawn(client("watch").watch(base, Arc::clone(&last)));
    }
    let observer = lease::open(&world.etcd.endpoints()).await.unwrap();
    let mut nemesis = Nemesis::new(seed, seconds >= 120);
    let until = Instant::now() + Duration::from_secs(seconds);
    nemesis.storm(&mut world, &observer, until).await.unwrap();
    stop.cancel();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let mut held = lease::Holders::default();
    for place in 0..world.holders.len() {
        world.holders[place].kill9().unwrap();
        held.read(&world.holder_log(place).unwrap()).unwrap();
    }

    end.seal().await;
    // A store that nobody has seen before: what it reads is what is in etcd.
    let fresh = lease::open(&world.etcd.endpoints()).await.unwrap();
    let log = lease::log(&fresh).await.unwrap();
    // Relaxed: it is one value.
    last.store(log.len() as u64, Ordering::Relaxed);
    world.converged(log.len() as u64).await.unwrap();
    let mut batches = Vec::new();
    while let Some(ended) = watches.join_next().await {
        batches.push(ended.unwrap().unwrap());
    }
    served(&world, &log).await;
    let mut tallies = Vec::new();
    for load in loads {
        tallies.push(load.stop().await);
    }
    let mut ops = recorder.take();
    let (by_api, by_holders) = (figures(&ops), figures(&held.ops));
    ops.extend(held.ops);
    let sent: u64 = tallies.iter().map(|tally| tally.sent).sum();
    let failed: u64 = tallies.iter().map(|tally| tally.failed).sum();
    eprintln!(
        "{} revisions; {by_api}; under the lease: {} terms, {} refused for its loss, {by_holders}; {sent} requests, {failed} failed; faults: {:?}",
        log.len(),
        held.terms,
        held.fenced,
        nemesis.done
    );
    for batches in &batches {
        check::watch(&log, batches).unwrap();
    }
    check::log(&log, &ops, base + 1).unwrap();
    check::revisions(&log, &ops).unwrap();
    check::lists(&log, &ops).unwrap();
    check::fences(&log).unwrap();
    registers::registers(&log, &ops, base + 1).unwrap();
    agreed(&world, &log).await;
    assert_eq!(failed, 0, "{tallies:?}");
    assert!(held.terms > 1, "the job never changed hands");
    if nemesis.done.contains_key(&nemesis::Fault::FreezeHolder) {
        assert!(held.fenced > 0, "nobody acted on a lease that was lost");
    }
}

/// Every control plane shows what the log ends with.
async fn agreed(world: &World, log: &Log) {
    let mut replay = Replay::default();
    replay.to(log.len() as u64, log);
    for mut api in world.apis("test").unwrap() {
        let list = api.list(v1::ListRequest::default()).await.unwrap().into_inner();
        assert_eq!(
            (list.revision, list.resources.len()),
            (replay.revision, replay.state.len())
        );
    }
}

/// Traffic goes where the last revision says.
async fn served(world: &World, log: &Log) {
    let mut replay = Replay::default();
    replay.to(log.len() as u64, log);
    let wanted = target(&replay.state[ROUTE].1);
    for node in &world.proxies {
        let client = leeward_testkit::Client::new(node.outbound, Protocol::Http1);
        eventually("traffic to go where it should", SOON, || async {
            let reply = client.call(get("app.example", "/")).await?;
            anyhow::ensure!(reply.backend() == wanted, "{} of {wanted}", reply.backend());
            Ok(())
        })
        .await
        .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_in_a_storm_3_4() {
    storm(EtcdVersion::V3_4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_in_a_storm_3_5() {
    storm(EtcdVersion::V3_5).await;
}
