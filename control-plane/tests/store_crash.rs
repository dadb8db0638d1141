//! The program itself, with its store on a file and on etcd: killed while it writes, out of room, and with files of earlier
//! builds.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use leeward_control::kv::Kv;
use leeward_control::store::{Options, Store};
use leeward_proto::v1;
use leeward_testkit::{EtcdCluster, EtcdVersion, Process, TempDir, eventually};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use support::{Site, apply, service, zone};
use tonic::Code;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Starts the program; `before` is what a shell does first.
async fn start(site: &Site, dir: &TempDir, etcd: Option<&EtcdCluster>, before: &str) -> Process {
    let addresses = dir.path().join("control.addresses");
    let _ = std::fs::remove_file(&addresses);
    let process = Process::spawn("control", command(site, &addresses, etcd, before), dir.path()).unwrap();
    eventually("the program", SOON, || async {
        Ok(std::fs::metadata(&addresses)?)
    })
    .await
    .unwrap();
    process
}

fn command(site: &Site, addresses: &Path, etcd: Option<&EtcdCluster>, before: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{before} exec \"$0\" \"$@\"")])
        .arg(env!("CARGO_BIN_EXE_leeward-control"))
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .arg("--data")
        .arg(site.dir.join("store"))
        .arg("--identity")
        .arg(site.identity_dir(&Site::control_id()))
        .arg("--addresses-file")
        .arg(addresses);
    if let Some(etcd) = etcd {
        command.args(["--store", "etcd", "--etcd-endpoints", &etcd.endpoints().join(",")]);
    }
    command
}

fn listen(dir: &TempDir) -> std::net::SocketAddr {
    let text = std::fs::read_to_string(dir.path().join("control.addresses")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["listen"].as_str().unwrap().parse().unwrap()
}

fn get(name: &str) -> v1::GetRequest {
    v1::GetRequest {
        r#ref: Some(support::reference(v1::Kind::Service, name)),
    }
}

/// Kills the program again and again while three services are written in each call.
async fn kills(etcd: Option<EtcdCluster>) {
    let (site, dir) = (Site::new(), TempDir::new().unwrap());
    let mut acknowledged: Vec<(u32, u64)> = Vec::new();
    let mut next = 0;
    for round in 0..5 {
        let mut control = start(&site, &dir, etcd.as_ref(), "").await;
        let mut api = site.api(listen(&dir));
        if round == 0 {
            api.apply(apply(&zone("a"))).await.unwrap();
        }
        let from = next;
        let writer = tokio::spawn(async move {
            let mut done = Vec::new();
            for n in from.. {
                let three: String = ["x", "y", "z"]
                    .map(|part| service(&format!("s{n}-{part}"), 80))
                    .concat();
                match api.apply(apply(&three)).await {
                    Ok(answer) => done.push((n, answer.into_inner().revision)),
                    Err(_) => return (done, n + 1),
                }
            }
            unreachable!()
        });
        tokio::time::sleep(Duration::from_millis(300 + fastrand::u64(..700))).await;
        control.kill9().unwrap();
        let (done, after) = writer.await.unwrap();
        acknowledged.extend(done);
        next = after;
    }
    assert!(acknowledged.len() > 10, "only {} writes", acknowledged.len());
    let _control = start(&site, &dir, etcd.as_ref(), "").await;
    let mut api = site.api(listen(&dir));
    let mut there = 0;
    let known: std::collections::BTreeMap<u32, u64> = acknowledged.iter().copied().collect();
    for n in 0..next {
        let mut revisions = Vec::new();
        for part in ["x", "y", "z"] {
            match api.get(get(&format!("s{n}-{part}"))).await {
                Ok(found) => revisions.push(found.into_inner().metadata.unwrap().revision),
                Err(status) => assert_eq!(status.code(), Code::NotFound, "{status}"),
            }
        }
        if let Some(revision) = known.get(&n) {
            assert_eq!(revisions, [*revision; 3], "what was acknowledged is there: {n}");
        }
        assert!(
            revisions.is_empty() || (revisions.len() == 3 && revisions.iter().all(|r| *r == revisions[0])),
            "{n} is there in part: {revisions:?}"
        );
        there += u64::from(!revisions.is_empty());
    }
    // Numbers are dense: one for the zone, one for each that is there.
    let list = api.list(v1::ListRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.revision, there + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kills_on_a_file() {
    kills(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kills_on_etcd() {
    if let Some(etcd) = EtcdCluster::start(EtcdVersion::V3_4, 1).await.unwrap() {
        kills(Some(etcd)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_nothing_is_written_and_reads_and_push_go_on() {
    let (site, dir) = (Site::new(), TempDir::new().unwrap());
    // No file may grow beyond 4 MiB: what a full disk is to a database.
    let control = start(&site, &dir, None, "trap '' XFSZ; ulimit -S -f 8192;").await;
    let mut api = site.api(listen(&dir));
    api.apply(apply(&zone("a"))).await.unwrap();
    let mut stream = support::Stream::open(&site.push(listen(&dir), "p1"), support::hello("p1"))
        .await
        .unwrap();
    stream.change().await;
    let label = "l".repeat(63);
    let large = |n: usize| -> String {
        let services = (0..300).map(|i| {
            service(&format!("s{n}-{i}"), 80).replace(
                "metadata: {",
                &format!("metadata: {{labels: {{a: {label}, b: {label}, c: {label}}}, "),
            )
        });
        services.collect()
    };
    let mut written = 0;
    let refused = loop {
        match api.apply(apply(&large(written))).await {
            Ok(_) => written += 1,
            Err(status) => break status,
        }
        assert!(written < 200, "it is never full");
    };
    assert!(
        matches!(refused.code(), Code::Unavailable | Code::ResourceExhausted),
        "{refused}"
    );
    let list = api.list(v1::ListRequest::default()).await.unwrap().into_inner();
    let revision = list.revision;
    assert_eq!(
        revision,
        written as u64 + 1,
        "nothing of what was refused is there"
    );
    api.get(get("s0-0")).await.unwrap();
    // A proxy that comes now gets everything.
    let mut late = support::Stream::open(&site.push(listen(&dir), "p2"), support::hello("p2"))
        .await
        .unwrap();
    let updates = late.change().await;
    assert_eq!(support::names(&updates).len(), written * 300 + 1);
    // Room again, and writes again.
    let pid = Pid::from_raw(i32::try_from(control.id()).unwrap()).unwrap();
    let limit = Rlimit {
        current: None,
        maximum: None,
    };
    prlimit(Some(pid), Resource::Fsize, limit).unwrap();
    let answer = api.apply(apply(&large(written))).await.unwrap().into_inner();
    assert_eq!(answer.revision, revision + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_waits_for_a_cluster_that_is_not_there_yet() {
    let Some(mut etcd) = EtcdCluster::start(EtcdVersion::V3_4, 1).await.unwrap() else {
        return;
    };
    etcd.kill9(0).unwrap();
    let (site, dir) = (Site::new(), TempDir::new().unwrap());
    let addresses = dir.path().join("control.addresses");
    let control = Process::spawn("control", command(&site, &addresses, Some(&etcd), ""), dir.path()).unwrap();
    eventually("it says that it waits", SOON, || async {
        anyhow::ensure!(control.log()?.contains("the store is not there yet"));
        Ok(())
    })
    .await
    .unwrap();
    assert!(control.log().unwrap().contains(&etcd.endpoints()[0]));
    etcd.restart(0).unwrap();
    eventually("the program", SOON, || async {
        Ok(std::fs::metadata(&addresses)?)
    })
    .await
    .unwrap();
    let mut api = site.api(listen(&dir));
    api.apply(apply(&zone("a"))).await.unwrap();
}

/// The tables of schema 4, as the builds had them that wrote it.
const SCHEMA_4: &str = "
    CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE resources (
        kind INTEGER NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, payload BLOB NOT NULL,
        created_ms INTEGER NOT NULL, updated_ms INTEGER NOT NULL, PRIMARY KEY (kind, name)
    ) WITHOUT ROWID;
    CREATE INDEX resources_by_revision ON resources (revision);
    CREATE TABLE tombstones (
        kind INTEGER NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, PRIMARY KEY (kind, name)
    ) WITHOUT ROWID;
    CREATE INDEX tombstones_by_revision ON tombstones (revision);
    INSERT INTO meta VALUES ('id', 'abcd'), ('revision', 7), ('compacted', 2);
    INSERT INTO resources VALUES (30, 's', 6, x'0a', 1000, 2000), (10, 'a', 1, x'0b', 500, 500);
    INSERT INTO tombstones VALUES (30, 'gone', 7);";
const SCHEMA_4_LEVELS: &str = "
    CREATE TABLE level_changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time_ms INTEGER NOT NULL, policy TEXT NOT NULL, zone TEXT NOT NULL,
        from_level TEXT NOT NULL, to_level TEXT NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL
    );
    CREATE TABLE judged_levels (
        policy TEXT NOT NULL, zone TEXT NOT NULL, level TEXT NOT NULL, since_ms INTEGER NOT NULL,
        who TEXT NOT NULL, why TEXT NOT NULL, PRIMARY KEY (policy, zone)
    ) WITHOUT ROWID;
    CREATE TABLE level_holds (
        name TEXT PRIMARY KEY, since_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL, who TEXT NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO judged_levels VALUES ('shop', 'a', 'reduced', 5, 'trigger 0', 'why');
    INSERT INTO level_holds VALUES ('hold', 1, 2, 'ada');
    INSERT INTO level_changes VALUES (3, 7, 'shop', 'a', 'normal', 'reduced', 'trigger 0', 'w'),
        (4, 8, 'shop', 'b', 'normal', 'reduced', 'trigger 0', 'w'), (9, 9, 'feed', '', 'a', 'b', 'ada', 'w');";
const SCHEMA_4_REST: &str = "
    CREATE TABLE modules (
        sha256 BLOB PRIMARY KEY, kind TEXT NOT NULL, version TEXT NOT NULL, imports TEXT NOT NULL,
        exports TEXT NOT NULL, size INTEGER NOT NULL, created_ms INTEGER NOT NULL, who TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE module_chunks (
        sha256 BLOB NOT NULL, place INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (sha256, place)
    );
    CREATE TABLE module_signatures (
        sha256 BLOB NOT NULL, signature TEXT NOT NULL, PRIMARY KEY (sha256, signature)
    ) WITHOUT ROWID;
    INSERT INTO modules VALUES (zeroblob(32), 'ProxyWasm', '0.2.1', 'i1' || char(10) || 'i2', 'e', 5, 77, 'ada');
    INSERT INTO module_chunks VALUES (zeroblob(32), 0, x'010203'), (zeroblob(32), 1, x'0405');
    INSERT INTO module_signatures VALUES (zeroblob(32), 'sig');
    CREATE TABLE join_tokens (
        hash BLOB PRIMARY KEY, id TEXT NOT NULL, who TEXT NOT NULL, created_ms INTEGER NOT NULL,
        expires_ms INTEGER NOT NULL, used_ms INTEGER
    ) WITHOUT ROWID;
    INSERT INTO join_tokens VALUES (zeroblob(32), 'id', 'ada', 1, 1000, NULL), (randomblob(32), 'id', 'ada', 1, 1000, 5);
    CREATE TABLE certificates (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, fingerprint TEXT NOT NULL, root TEXT NOT NULL,
        not_after_ms INTEGER NOT NULL
    );
    INSERT INTO certificates (id, fingerprint, root, not_after_ms) VALUES ('p', 'f1', 'r', 10), ('p', 'f2', 'r', 20);";

async fn open(dir: &Path) -> Store {
    let kv = eventually("the file", SOON, || async { Ok(Kv::sqlite(dir)?) })
        .await
        .unwrap();
    Store::open(kv, Options::default()).await.unwrap()
}

#[tokio::test]
async fn a_file_of_schema_4_is_brought_over_whole() {
    use leeward_control::store::TokenUse;
    let dir = TempDir::new().unwrap();
    let db = rusqlite::Connection::open(dir.path().join("leeward.db")).unwrap();
    db.execute_batch(&format!(
        "{SCHEMA_4} {SCHEMA_4_LEVELS} {SCHEMA_4_REST} PRAGMA user_version = 4;"
    ))
    .unwrap();
    drop(db);
    // The second time it is of this build.
    for round in 0..2 {
        let store = open(dir.path()).await;
        assert_eq!(
            (store.id(), store.revision()),
            ("abcd", 7 + round),
            "revisions go on"
        );
        let names: Vec<String> = store
            .list(None, None, 10)
            .0
            .iter()
            .map(|stored| stored.key.to_string())
            .collect();
        assert_eq!(names, ["Zone/a", "Service/s"]);
        let changes = store.changes_since(2).unwrap();
        let service = &changes.upserts[0];
        assert_eq!((service.created_ms, &*service.payload), (1000, &b"\x0a"[..]));
        assert_eq!(changes.deletes.len(), 1);
        assert!(store.changes_since(1).is_none(), "what was forgotten stays so");
        assert_eq!(store.oldest().await.unwrap(), 7);
        assert_eq!(store.at(7).await.unwrap().unwrap().len(), 2);
        assert!(store.at(6).await.unwrap().is_none());
        let lines = store.level_changes("", 0, 10);
        let numbers: Vec<u64> = lines.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [9, 4, 3], "gaps and all");
        assert_eq!(store.judged_levels().len(), 1);
        assert_eq!(store.level_holds()["hold"].until_ms, 2);
        let module = store.module(&[0; 32]).await.unwrap().unwrap();
        assert_eq!(module.module.imports.len(), 2);
        assert_eq!(module.signatures, ["sig"]);
        let bytes = store.module_chunks(&[0; 32], 0, 10).await.unwrap().concat();
        assert_eq!(bytes, [1, 2, 3, 4, 5]);
        assert_eq!(store.modules_size().await.unwrap().0, 5);
        let used = store
            .use_token(&[0; 32], ("id", None), &format!("key {round}"), 10)
            .await
            .unwrap();
        let wanted = if round == 0 {
            TokenUse::Good
        } else {
            TokenUse::Used(10)
        };
        assert_eq!(used, wanted);
        let certificates = store.certificates(15).await.unwrap();
        assert_eq!(certificates.len(), 1);
        assert_eq!(certificates[0].fingerprint, "f2");
        if round == 0 {
            let write = leeward_control::store::Write {
                key: service.key.clone(),
                payload: Some(b"\x0a".to_vec()),
                expect: 6,
            };
            let change = leeward_control::store::Change {
                writes: vec![write],
                ..leeward_control::store::Change::default()
            };
            assert_eq!(store.write(change).await.unwrap(), 8);
        }
    }
}

#[tokio::test]
async fn files_of_the_first_schemas_are_brought_over_too() {
    for (schema, tables) in [
        (1, SCHEMA_4.to_owned()),
        (2, format!("{SCHEMA_4} {SCHEMA_4_LEVELS}")),
    ] {
        let dir = TempDir::new().unwrap();
        let db = rusqlite::Connection::open(dir.path().join("leeward.db")).unwrap();
        db.execute_batch(&format!("{tables} PRAGMA user_version = {schema};"))
            .unwrap();
        drop(db);
        let store = open(dir.path()).await;
        assert_eq!((store.revision(), store.list(None, None, 10).0.len()), (7, 2));
        assert_eq!(store.judged_levels().len(), schema - 1);
    }
}
