//! What a store does, on every kv that there is: one suite, run on SQLite and on both versions of etcd.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use bytes::Bytes;
use leeward_control::kv::{EtcdSettings, Event, Kv, KvError, Txn, WatchError};
use leeward_control::store::{
    Author, Bounds, Change, Clock, Judged, LevelChange, LevelWrites, Options, Place, RevocationRow, Store,
    StoreError, Write,
};
use leeward_policy::{Key, Kind, Name};
use leeward_testkit::{EtcdCluster, EtcdVersion, TempDir, eventually};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Where stores are.
struct Site {
    dir: TempDir,
    etcd: Option<EtcdCluster>,
}

impl Site {
    fn sqlite() -> Self {
        let dir = TempDir::new().unwrap();
        Self { dir, etcd: None }
    }

    async fn etcd(version: EtcdVersion) -> Option<Self> {
        let etcd = EtcdCluster::start(version, 1).await.unwrap()?;
        Some(Self {
            dir: TempDir::new().unwrap(),
            etcd: Some(etcd),
        })
    }

    async fn kv(&self) -> Kv {
        if let Some(etcd) = &self.etcd {
            return Kv::etcd(EtcdSettings {
                endpoints: etcd.endpoints(),
                prefix: "/leeward-test/".to_owned(),
                ..EtcdSettings::default()
            })
            .unwrap();
        }
        let dir: PathBuf = self.dir.path().join("store");
        eventually("the file", SOON, || async { Ok(Kv::sqlite(&dir)?) })
            .await
            .unwrap()
    }

    async fn open(&self, options: Options) -> Store {
        Store::open(self.kv().await, options).await.unwrap()
    }

    async fn store(&self) -> Store {
        self.open(Options::default()).await
    }

    /// What another control plane has: where there can't be one, the same again.
    async fn beside(&self, store: &Store, options: Options) -> Store {
        if self.etcd.is_some() {
            self.open(options).await
        } else {
            store.clone()
        }
    }
}

fn key(name: &str) -> Key {
    Key {
        kind: Kind::Service,
        name: Name::parse(name).unwrap(),
    }
}

fn write(name: &str, payload: Option<&str>, expect: u64) -> Write {
    Write {
        key: key(name),
        payload: payload.map(|payload| payload.as_bytes().to_vec()),
        expect,
    }
}

fn change(writes: Vec<Write>) -> Change {
    Change {
        writes,
        author: Author::of("ada"),
        ..Change::default()
    }
}

fn put(name: &str, payload: &str) -> Change {
    change(vec![write(name, Some(payload), 0)])
}

type World = BTreeMap<String, Bytes>;

fn world(store: &Store) -> World {
    let (stored, _) = store.list(None, None, usize::MAX);
    stored
        .into_iter()
        .map(|stored| (stored.key.name.to_string(), stored.payload))
        .collect()
}

async fn what_was_written_is_read_and_is_there_after_a_restart(site: Site) {
    let id = {
        let store = site.store().await;
        assert_eq!(store.write(put("a", "1")).await.unwrap(), 1);
        assert_eq!(store.get(&key("a")).unwrap().payload, "1");
        let two = change(vec![write("b", Some("2"), 0), write("a", None, 0)]);
        assert_eq!(store.write(two).await.unwrap(), 2);
        assert!(store.get(&key("a")).is_none());
        store.id().to_owned()
    };
    let store = site.store().await;
    assert_eq!((store.id(), store.revision()), (id.as_str(), 2));
    assert_eq!(store.get(&key("b")).unwrap().payload, "2");
    assert!(store.get(&key("a")).is_none());
    assert_eq!(store.write(put("c", "3")).await.unwrap(), 3);
    // What one writes another reads once it has settled.
    let other = site.beside(&store, Options::default()).await;
    store.write(put("c", "4")).await.unwrap();
    assert_eq!(other.settle().await.unwrap(), 4);
    assert_eq!(other.get(&key("c")).unwrap().payload, "4");
    let mut heard = other.watch();
    store.write(put("c", "5")).await.unwrap();
    let heard = tokio::time::timeout(SOON, heard.wait_for(|revision| *revision == 5));
    assert_eq!(*heard.await.unwrap().unwrap(), 5);
}

async fn a_failed_precondition_writes_nothing(site: Site) {
    let store = site.store().await;
    let first = store.write(put("a", "1")).await.unwrap();
    let bad = change(vec![write("b", Some("x"), 0), write("a", Some("2"), first + 5)]);
    let error = store.write(bad).await.unwrap_err();
    assert_eq!(error.to_string(), "Service/a is at revision 1, not 6");
    assert!(store.get(&key("b")).is_none());
    assert_eq!(store.settle().await.unwrap(), first);
    let stale = Change {
        at: Some(first - 1),
        ..put("c", "1")
    };
    let error = store.write(stale).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Moved { wanted: 0, found: 1 }),
        "{error}"
    );
    store
        .write(change(vec![write("a", Some("2"), first)]))
        .await
        .unwrap();
}

async fn many_writers_lose_nothing(site: Site) {
    const WRITERS: u64 = 4;
    const EACH: u64 = 8;
    let store = site.store().await;
    store.write(put("n", "0")).await.unwrap();
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let store = if writer % 2 == 0 {
            store.clone()
        } else {
            site.beside(&store, Options::default()).await
        };
        writers.push(tokio::spawn(async move {
            let mut revisions = Vec::new();
            for i in 0..EACH {
                loop {
                    store.settle().await.unwrap();
                    let found = store.get(&key("n")).unwrap();
                    let n: u64 = String::from_utf8_lossy(&found.payload).parse().unwrap();
                    let next = (n + 1).to_string();
                    let own = format!("w{writer}-{i}");
                    let both = change(vec![
                        write("n", Some(&next), found.revision),
                        write(&own, Some("x"), 0),
                    ]);
                    match store.write(both).await {
                        Ok(revision) => break revisions.push(revision),
                        Err(StoreError::Conflict { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            revisions
        }));
    }
    let mut revisions = Vec::new();
    for writer in writers {
        revisions.extend(writer.await.unwrap());
    }
    revisions.sort_unstable();
    let dense: Vec<u64> = (2..=1 + WRITERS * EACH).collect();
    assert_eq!(
        revisions, dense,
        "each number is given once, and none is left out"
    );
    store.settle().await.unwrap();
    assert_eq!(
        store.get(&key("n")).unwrap().payload,
        (WRITERS * EACH).to_string()
    );
    let history = store.history(0, 1000).await.unwrap();
    let numbers: Vec<u64> = history.iter().map(|record| record.revision).rev().collect();
    assert_eq!(numbers, (1..=1 + WRITERS * EACH).collect::<Vec<_>>());
    assert!(history.iter().all(|record| record.author.who == "ada"));
}

async fn a_large_write_is_seen_whole_or_not_at_all(site: Site) {
    const MANY: usize = 10_000;
    let store = site.store().await;
    let other = site.beside(&store, Options::default()).await;
    let looking = other.clone();
    let (done, mut is_done) = tokio::sync::oneshot::channel::<()>();
    let looks = tokio::spawn(async move {
        loop {
            let (all, revision) = looking.list(None, None, usize::MAX);
            assert_eq!(all.len(), if revision == 0 { 0 } else { MANY });
            if is_done.try_recv().is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let payload = "p".repeat(300);
    let writes = (0..MANY).map(|i| write(&format!("s{i}"), Some(&payload), 0));
    assert_eq!(store.write(change(writes.collect())).await.unwrap(), 1);
    assert_eq!(other.settle().await.unwrap(), 1);
    assert_eq!(world(&other).len(), MANY);
    done.send(()).unwrap();
    looks.await.unwrap();
    let parts = store.kv().keys("log/", None, 100).await.unwrap();
    assert!(parts.entries.len() > 3, "a large write is in parts");
    // One that opens now reads it, too.
    let again = site.beside(&store, Options::default()).await;
    assert_eq!(world(&again).len(), MANY);
    assert_eq!(again.record(1).await.unwrap().unwrap().changes.len(), MANY);
}

/// Small enough that all of it happens in a few writes.
fn small() -> Options {
    Options {
        bounds: Bounds {
            records: 25,
            recent: (6, usize::MAX),
            snapshot_every: (5, usize::MAX),
            snapshots: 3,
            ..Bounds::DEFAULT
        },
        every: Duration::from_millis(20),
        ..Options::default()
    }
}

async fn history_tells_every_state_that_is_not_forgotten(site: Site) {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let store = site.open(small()).await;
    let mut worlds: Vec<World> = vec![World::new()];
    for n in 1..=60u64 {
        let mut next = worlds.last().unwrap().clone();
        let mut writes = BTreeMap::new();
        for _ in 0..random.usize(1..4) {
            let name = format!("s{}", random.usize(0..6));
            let payload = random.bool().then(|| format!("{n}-{}", random.u8(..)));
            writes.insert(name.clone(), write(&name, payload.as_deref(), 0));
            match payload {
                Some(payload) => next.insert(name, payload.into()),
                None => next.remove(&name),
            };
        }
        let written = store.write(change(writes.into_values().collect())).await;
        assert_eq!(written.unwrap(), n, "seed {seed}");
        worlds.push(next);
        if n % 10 == 0 {
            // Housekeeping comes along.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    eventually("old records are forgotten", SOON, || async {
        anyhow::ensure!(store.oldest().await? > 20);
        Ok(())
    })
    .await
    .unwrap();
    let check = async |store: &Store| {
        let oldest = store.oldest().await.unwrap();
        for (revision, world) in worlds.iter().enumerate() {
            let revision = revision as u64;
            let found = store.at(revision).await.unwrap();
            if revision < oldest {
                assert!(found.is_none(), "seed {seed}: {revision} is forgotten");
                continue;
            }
            let found: World = found
                .unwrap_or_else(|| panic!("seed {seed}: {revision} is not forgotten, {oldest} is oldest"))
                .into_iter()
                .map(|stored| (stored.key.name.to_string(), stored.payload))
                .collect();
            assert_eq!(&found, world, "seed {seed}, revision {revision}");
        }
        assert!(store.at(61).await.unwrap().is_none());
        // In memory are a few; between any two of them it is known what changed, either way round.
        let mut told = 0;
        for from in 0..worlds.len() {
            for to in 0..worlds.len() {
                let Some(changes) = store.changes_between(from as u64, to as u64) else {
                    continue;
                };
                told += 1;
                let mut state = worlds[from].clone();
                for (_, key) in changes.deletes {
                    state.remove(key.name.as_str());
                }
                for stored in changes.upserts {
                    state.insert(stored.key.name.to_string(), stored.payload);
                }
                assert_eq!(state, worlds[to], "seed {seed}, from {from} to {to}");
            }
        }
        assert!(told > worlds.len(), "only {told}");
        // Whoever was in step at any revision, and applies the changes since, is in step again.
        for (revision, world) in worlds.iter().enumerate() {
            let changes = store.changes_since(revision as u64).unwrap();
            let mut world = world.clone();
            for (_, key) in changes.deletes {
                world.remove(key.name.as_str());
            }
            for stored in changes.upserts {
                world.insert(stored.key.name.to_string(), stored.payload);
            }
            assert_eq!(&world, worlds.last().unwrap(), "seed {seed}, since {revision}");
        }
        let times: Vec<i64> = store
            .history(0, 1000)
            .await
            .unwrap()
            .iter()
            .map(|record| record.time_ms)
            .collect();
        assert!(times.is_sorted_by(|a, b| a >= b), "seed {seed}: {times:?}");
    };
    check(&store).await;
    drop(store);
    let store = site.open(small()).await;
    assert_eq!(&world(&store), worlds.last().unwrap(), "seed {seed}");
    check(&store).await;
    let snapshots = store.kv().keys("snapshots/", None, 100).await.unwrap();
    assert!(
        (1..=3).contains(&snapshots.entries.len()),
        "{}",
        snapshots.entries.len()
    );
}

async fn levels_and_policy_are_written_in_one_step(site: Site) {
    let store = site.store().await;
    let other = site.beside(&store, Options::default()).await;
    let place = Place {
        policy: "shop".to_owned(),
        zone: "a".to_owned(),
    };
    let judged = Judged {
        level: "reduced".to_owned(),
        since_ms: 7,
        by: "trigger 0".to_owned(),
        why: "error rate 62 %".to_owned(),
    };
    let line = LevelChange {
        time_ms: store.now_ms(),
        policy: "shop".to_owned(),
        zone: "a".to_owned(),
        from: "normal".to_owned(),
        to: "reduced".to_owned(),
        by: "trigger 0".to_owned(),
        why: "error rate 62 %".to_owned(),
    };
    let levels = LevelWrites {
        changes: vec![line.clone()],
        judged: vec![(place.clone(), Some(judged.clone()))],
        ..LevelWrites::default()
    };
    let both = Change {
        levels: levels.clone(),
        ..put("a", "1")
    };
    assert_eq!(store.write(both).await.unwrap(), 1);
    let alone = Change {
        levels,
        ..change(Vec::new())
    };
    assert_eq!(
        store.write(alone.clone()).await.unwrap(),
        1,
        "levels alone make no revision"
    );
    let (_, _, at) = store.levels();
    let stale = Change {
        levels_at: Some(at - 1),
        ..alone
    };
    let error = store.write(stale).await.unwrap_err();
    assert!(matches!(error, StoreError::Moved { .. }), "{error}");
    other.settle().await.unwrap();
    assert_eq!(other.judged_levels(), [(place, judged)].into());
    assert_eq!(other.level_changes("shop", 0, 10), [(2, line.clone()), (1, line)]);
}

async fn a_watch_from_what_is_forgotten_says_so(site: Site) {
    let kv = site.kv().await;
    let mut last = 0;
    for n in 0..10 {
        let txn = Txn::default().put("t/a", n.to_string());
        last = kv.txn(txn).await.unwrap().unwrap();
    }
    let mut whole = kv.watch("t/", last - 4);
    let mut seen = Vec::new();
    while seen.len() < 5 {
        let events = tokio::time::timeout(SOON, whole.next()).await.unwrap().unwrap();
        seen.extend(events.into_iter().map(|event| match event {
            Event::Put(entry) => entry.modified,
            Event::Delete { modified, .. } => modified,
        }));
    }
    assert_eq!(seen, (last - 4..=last).collect::<Vec<_>>());
    kv.compact(last - 2).await.unwrap();
    let mut late = kv.watch("t/", 1);
    let error = tokio::time::timeout(SOON, late.next())
        .await
        .unwrap()
        .unwrap_err();
    let WatchError::Compacted(upto) = error else {
        panic!("{error}");
    };
    assert!((1..last).contains(&upto), "{upto} of {last}");
    // From after that it goes on.
    let mut again = kv.watch("t/", last);
    let events = tokio::time::timeout(SOON, again.next()).await.unwrap().unwrap();
    assert_eq!(events.len(), 1);
    kv.txn(Txn::default().delete("t/a")).await.unwrap();
    let events = tokio::time::timeout(SOON, again.next()).await.unwrap().unwrap();
    assert!(matches!(&events[..], [Event::Delete { key, .. }] if key == "t/a"));
    // A store goes on over it, too.
    let store = Store::open(kv.clone(), Options::default()).await.unwrap();
    let other = site.beside(&store, Options::default()).await;
    store.write(put("a", "1")).await.unwrap();
    let now = kv.range("head", None, 1).await.unwrap().revision;
    kv.compact(now).await.unwrap();
    let mut heard = other.watch();
    store.write(put("a", "2")).await.unwrap();
    let heard = tokio::time::timeout(SOON, heard.wait_for(|revision| *revision == 2));
    heard.await.unwrap().unwrap();
}

async fn one_leads_and_a_holder_that_lost_its_lease_cannot_act(site: Site) {
    let store = site.store().await;
    let other = site.beside(&store, Options::default()).await;
    let ttl = Duration::from_secs(3);
    let first = store.lead("job", ttl).await;
    assert_eq!(
        store.leader("job").await.unwrap().as_deref(),
        Some(store.member())
    );
    let waiting = {
        let other = other.clone();
        tokio::spawn(async move { other.lead("job", ttl).await })
    };
    let act = |fence, n: &str| Change {
        fence: Some(fence),
        ..put("acted", n)
    };
    // For longer than the lease lasts without being kept.
    for n in 0..8 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        store.write(act(first.fence(), &n.to_string())).await.unwrap();
        assert!(!waiting.is_finished(), "two lead at once");
    }
    // Its lease ends, as for one that is paused for too long; it doesn't know of it.
    store.kv().txn(Txn::default().delete("lead/job")).await.unwrap();
    let second = tokio::time::timeout(SOON, waiting).await.unwrap().unwrap();
    assert!(second.fence().token() > first.fence().token());
    let before = store.settle().await.unwrap();
    let error = store.write(act(first.fence(), "late")).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Fenced(job) if job == "job"),
        "{error}"
    );
    assert_eq!(
        store.settle().await.unwrap(),
        before,
        "what was fenced is not there"
    );
    assert_eq!(other.write(act(second.fence(), "now")).await.unwrap(), before + 1);
    // Whoever gives it up is followed at once, and long before the lease would end.
    let third = {
        let store = store.clone();
        tokio::spawn(async move { store.lead("job", Duration::from_secs(60)).await })
    };
    drop(second);
    let third = tokio::time::timeout(SOON, third).await.unwrap().unwrap();
    assert!(third.is_held());
}

async fn a_lease_ends_unless_it_is_kept(site: Site) {
    let kv = site.kv().await;
    let kept = kv.grant(Duration::from_secs(2)).await.unwrap();
    let left = kv.grant(Duration::from_secs(2)).await.unwrap();
    kv.txn(Txn::default().put_leased("l/kept", "1", kept))
        .await
        .unwrap();
    kv.txn(Txn::default().put_leased("l/left", "1", left))
        .await
        .unwrap();
    eventually("the end of a lease", SOON, || async {
        anyhow::ensure!(kv.keep_alive(kept).await?, "the one that is kept has ended");
        anyhow::ensure!(kv.get("l/left").await?.is_none());
        Ok(())
    })
    .await
    .unwrap();
    assert!(kv.get("l/kept").await.unwrap().is_some());
    assert!(!kv.keep_alive(left).await.unwrap());
    kv.revoke(kept).await.unwrap();
    assert!(kv.get("l/kept").await.unwrap().is_none());
    kv.revoke(kept).await.unwrap();
}

async fn members_are_listed_while_they_are_there(site: Site) {
    let store = site.store().await;
    store.register("10.0.0.1:15010".to_owned());
    let other = site.beside(&store, Options::default()).await;
    let id = store.member().to_owned();
    eventually("the member", SOON, || async {
        let members = other.members().await?;
        anyhow::ensure!(
            members
                .iter()
                .any(|member| member.id == id && member.api == "10.0.0.1:15010")
        );
        Ok(())
    })
    .await
    .unwrap();
}

async fn what_is_too_large_is_refused(site: Site) {
    let kv = site.kv().await;
    let error = kv.txn(Txn::default().put("k", vec![0; (1 << 20) + 1])).await;
    assert!(matches!(error, Err(KvError::TooLarge { .. })), "{error:?}");
    let many = (0..200).fold(Txn::default(), |txn, n| txn.put(format!("k{n}"), "v"));
    assert!(matches!(kv.txn(many).await, Err(KvError::TooLarge { .. })));
    let store = Store::open(kv, Options::default()).await.unwrap();
    let payload = "x".repeat(16 << 20);
    let writes = (0..9).map(|n| write(&format!("s{n}"), Some(&payload), 0));
    let error = store.write(change(writes.collect())).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
    assert_eq!(store.settle().await.unwrap(), 0);
    // A large resource is no matter.
    store.write(put("s", &"y".repeat(3 << 20))).await.unwrap();
}

async fn a_later_schema_is_refused_or_only_read(site: Site) {
    let kv = site.kv().await;
    let running = Store::open(kv.clone(), Options::default()).await.unwrap();
    running.write(put("a", "1")).await.unwrap();
    let set = async |schema: u64, readable_from: u64| {
        let meta = format!(
            r#"{{"id":"{}","schema":{schema},"readableFrom":{readable_from},"later":true}}"#,
            running.id()
        );
        kv.txn(Txn::default().put("meta", meta)).await.unwrap();
    };
    set(2, 1).await;
    // Whoever ran when a later build brought it forward writes no more.
    let error = running.write(put("a", "2")).await.unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly(2)), "{error}");
    let reads = Store::open(kv.clone(), Options::default()).await.unwrap();
    assert_eq!(reads.get(&key("a")).unwrap().payload, "1");
    let error = reads.write(put("a", "2")).await.unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly(2)), "{error}");
    set(3, 2).await;
    let error = Store::open(kv.clone(), Options::default()).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the store has schema 3, readable from builds that know 2 on"),
        "{error}"
    );
    // What a later build has added to what this one writes stays.
    set(1, 1).await;
    let head = kv.get("head").await.unwrap().unwrap();
    let mut object: serde_json::Value = serde_json::from_slice(&head.value).unwrap();
    object["later"] = "stays".into();
    kv.txn(Txn::default().put("head", object.to_string()))
        .await
        .unwrap();
    running.settle().await.unwrap();
    running.write(put("a", "3")).await.unwrap();
    let head = kv.get("head").await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&head.value).contains(r#""later":"stays""#));
}

async fn a_clock_that_jumps_changes_neither_order_nor_leases(site: Site) {
    let ms = Arc::new(AtomicU64::new(1_000_000));
    let options = Options {
        clock: Clock::Set(Arc::clone(&ms)),
        ..Options::default()
    };
    let store = site.open(options).await;
    let leadership = store.lead("job", Duration::from_secs(5)).await;
    let fenced = |n: u64| Change {
        fence: Some(leadership.fence()),
        ..put("a", &n.to_string())
    };
    for (n, now) in [1_000_000, 10, 999_999_999_999, 5, 0].into_iter().enumerate() {
        ms.store(now, Ordering::Relaxed);
        let n = n as u64 + 1;
        assert_eq!(store.write(fenced(n)).await.unwrap(), n);
    }
    assert!(leadership.is_held());
    let history = store.history(0, 10).await.unwrap();
    let times: Vec<i64> = history.iter().rev().map(|record| record.time_ms).collect();
    assert_eq!(
        times,
        [
            1_000_000,
            1_000_000,
            999_999_999_999,
            999_999_999_999,
            999_999_999_999
        ]
    );
    let stored = store.get(&key("a")).unwrap();
    assert_eq!(
        (stored.created_ms, stored.updated_ms),
        (1_000_000, 999_999_999_999)
    );
}

async fn what_was_cut_short_is_taken_away(site: Site) {
    let kv = site.kv().await;
    let large = "z".repeat(2 << 20);
    {
        let store = Store::open(kv.clone(), Options::default()).await.unwrap();
        store.write(put("large", &large)).await.unwrap();
    }
    let orphans = [
        "log/rev-0000000000000001-dead/0000",
        "snap/0000000000000001-dead/000000",
        "chunks/dead-00/00000000",
    ];
    for orphan in orphans {
        kv.txn(Txn::default().put(orphan, "x")).await.unwrap();
    }
    let coming = "log/rev-0000000000000002-live/0000";
    kv.txn(Txn::default().put(coming, "x")).await.unwrap();
    let options = Options {
        every: Duration::from_millis(20),
        ..Options::default()
    };
    let store = Store::open(kv.clone(), options.clone()).await.unwrap();
    eventually("they go", SOON, || async {
        for orphan in orphans {
            anyhow::ensure!(kv.get(orphan).await?.is_none(), "{orphan}");
        }
        Ok(())
    })
    .await
    .unwrap();
    assert!(
        kv.get(coming).await.unwrap().is_some(),
        "its number is still to come"
    );
    drop(store);
    let store = Store::open(kv, options).await.unwrap();
    assert_eq!(store.get(&key("large")).unwrap().payload.len(), large.len());
}

async fn revocations_are_one_list_for_all_control_planes(site: Site) {
    let store = site.store().await;
    let other = site.beside(&store, Options::default()).await;
    let row = |id: &str, at_ms: i64| RevocationRow {
        id: format!("spiffe://td/zone/a/proxy/{id}"),
        at_ms,
        until_ms: 9000,
        reason: "stolen".into(),
        who: "ada".into(),
    };
    store.put_revocation(&row("b", 1000), 0).await.unwrap();
    other.put_revocation(&row("a", 2000), 0).await.unwrap();
    let later = store.put_revocation(&row("a", 1000), 0).await.unwrap();
    assert_eq!(later, row("a", 2000), "what was said later stays");
    for store in [&store, &other] {
        let all = store.revocations(9000).await.unwrap();
        assert_eq!(all, [row("a", 2000), row("b", 1000)]);
        assert!(store.revocations(9001).await.unwrap().is_empty());
    }
    let id = row("b", 1000).id;
    assert_eq!(other.take_revocation(&id).await.unwrap(), Some(row("b", 1000)));
    assert_eq!(store.revocation(&id).await.unwrap(), None);
}

macro_rules! everywhere {
    ($($name:ident,)*) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(super::Site::sqlite()).await;
                }
            )*
        }
        mod etcd_3_4 {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    if let Some(site) = super::Site::etcd(super::EtcdVersion::V3_4).await {
                        super::$name(site).await;
                    }
                }
            )*
        }
        mod etcd_3_5 {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    if let Some(site) = super::Site::etcd(super::EtcdVersion::V3_5).await {
                        super::$name(site).await;
                    }
                }
            )*
        }
    };
}

everywhere! {
    what_was_written_is_read_and_is_there_after_a_restart,
    a_failed_precondition_writes_nothing,
    many_writers_lose_nothing,
    a_large_write_is_seen_whole_or_not_at_all,
    history_tells_every_state_that_is_not_forgotten,
    levels_and_policy_are_written_in_one_step,
    a_watch_from_what_is_forgotten_says_so,
    one_leads_and_a_holder_that_lost_its_lease_cannot_act,
    a_lease_ends_unless_it_is_kept,
    members_are_listed_while_they_are_there,
    what_is_too_large_is_refused,
    a_later_schema_is_refused_or_only_read,
    a_clock_that_jumps_changes_neither_order_nor_leases,
    what_was_cut_short_is_taken_away,
    revocations_are_one_list_for_all_control_planes,
}
