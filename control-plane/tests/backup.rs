//! The program itself: what it ships survives its machine, however it or the recovery is cut short.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that can't be set up has failed"
)]

mod support;

use leeward_control::kv::{EtcdSettings, Kv};
use leeward_identity::{SpiffeId, channel};
use leeward_proto::v1;
use leeward_testkit::{EtcdCluster, EtcdVersion};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use support::{SOON, Site, Stream, apply, eventually, hello, service, zone};
use tokio::process::{Child, Command};
use tonic::transport::Channel;
use v1::backup_service_client::BackupServiceClient;

/// A running `leeward-control`; it is killed when dropped.
struct Running {
    child: Child,
    listen: SocketAddr,
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leeward-control"));
    command.kill_on_drop(true);
    command
}

async fn start(site: &Site, data: &Path, place: &str) -> Running {
    start_with(site, data, &["--backup-place", &format!("main={place}")]).await
}

async fn start_with(site: &Site, data: &Path, more: &[&str]) -> Running {
    let addresses = site.dir.join("addresses.json");
    let _ = std::fs::remove_file(&addresses);
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(site.dir.join("log"));
    let child = program()
        .args(["--listen", "127.0.0.1:0"])
        .args(more)
        .arg("--data")
        .arg(data)
        .arg("--identity")
        .arg(site.identity_dir(&Site::control_id()))
        .arg("--addresses-file")
        .arg(&addresses)
        .stdout(log.unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("it comes up", async || addresses.exists()).await;
    let text = std::fs::read_to_string(&addresses).unwrap();
    let (_, rest) = text.split_once("\"listen\":\"").unwrap();
    let listen = rest.split('"').next().unwrap().parse().unwrap();
    Running { child, listen }
}

fn backups(site: &Site, address: SocketAddr) -> BackupServiceClient<Channel> {
    let user = site.identity(&SpiffeId::user("leeward.test", "ada").unwrap());
    BackupServiceClient::new(channel::connect_lazy(user, address))
}

/// What a command of `leeward-control` says; and whether it went well.
async fn run(arguments: &[&str]) -> (bool, String) {
    let done = program().args(arguments).output().await.unwrap();
    let text = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8(text).unwrap())
}

async fn well(arguments: &[&str]) -> String {
    let (good, text) = run(arguments).await;
    assert!(good, "{arguments:?}: {text}");
    text
}

const POLICY: &str = "apiVersion: leeward.dev/v1
kind: BackupPolicy
metadata: {name: main}
spec: {destination: main, every: 24h, retention: {last: 3}}
";

/// Waits until it makes backups.
async fn leads(client: &mut BackupServiceClient<Channel>) {
    eventually("it leads", async || {
        let status = client.get_backup_status(v1::GetBackupStatusRequest {}).await;
        status.unwrap().into_inner().leads
    })
    .await;
}

async fn place_status(client: &mut BackupServiceClient<Channel>) -> Option<v1::PlaceStatus> {
    let status = client.get_backup_status(v1::GetBackupStatusRequest {}).await;
    status.unwrap().into_inner().places.into_iter().next()
}

/// Waits until there is nothing left to ship.
async fn shipped(client: &mut BackupServiceClient<Channel>) {
    // What was just acknowledged is seen first.
    let mut last = None;
    eventually("the log is shipped", async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = place_status(client)
            .await
            .filter(|p| p.continuous && p.waiting_since_ms == 0);
        let now = now.map(|p| p.shipped_position);
        let still = now.is_some() && now == last;
        last = now;
        still
    })
    .await;
}

async fn services(site: &Site, address: SocketAddr) -> Vec<String> {
    let request = v1::ListRequest {
        kind: v1::Kind::Service.into(),
        ..v1::ListRequest::default()
    };
    let listed = site.api(address).list(request).await.unwrap().into_inner();
    let names = listed.resources.into_iter();
    names.map(|r| r.metadata.unwrap().name).collect()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_shipped_is_there_after_the_machine_is_gone() {
    everything(&Site::new(), None).await;
}

/// Loses the store, and has it back from `place`, or a directory.
async fn everything(site: &Site, place: Option<String>) {
    let place = place.unwrap_or_else(|| text(&site.dir.join("place")));
    let data = site.dir.join("data");
    let mut running = start(site, &data, &place).await;
    let mut api = site.api(running.listen);
    api.apply(apply(&(zone("a") + "---\n" + POLICY))).await.unwrap();
    let mut client = backups(site, running.listen);
    eventually("the first backup", async || {
        place_status(&mut client)
            .await
            .is_some_and(|p| p.last_good_ms > 0 && p.continuous)
    })
    .await;
    for n in 0..20 {
        api.apply(apply(&service(&format!("s{n}"), 80))).await.unwrap();
    }
    // A proxy has all of it.
    let push = site.push(running.listen, "p1");
    let mut stream = Stream::open(&push, hello("p1")).await.unwrap();
    let update = stream.change().await.pop().unwrap();
    assert_eq!(update.generation, 21);
    let kinds: Vec<bool> = update.upserts.iter().map(is_backup_policy).collect();
    assert!(!kinds.contains(&true), "what is for the control plane was pushed");
    shipped(&mut client).await;
    let names = services(site, running.listen).await;
    running.child.kill().await.unwrap();
    std::fs::remove_dir_all(&data).unwrap();

    let said = well(&["backup", "list", "--from", &place]).await;
    assert_eq!(said.lines().count(), 2, "{said}");
    let said = well(&["backup", "verify", "--from", &place]).await;
    assert!(said.contains("is good") && said.contains("revision 21"), "{said}");
    let said = well(&["backup", "list", "--from", &place]).await;
    assert!(!said.contains(" no\n"), "it is not said to be verified: {said}");
    let dry = well(&[
        "backup",
        "restore",
        "--from",
        &place,
        "--data",
        &text(&data),
        "--dry-run",
    ])
    .await;
    assert!(dry.starts_with("would restore ") && !data.exists(), "{dry}");
    let said = well(&["backup", "restore", "--from", &place, "--data", &text(&data)]).await;
    assert!(said.contains("revision 21"), "{said}");
    let (again, said) = run(&["backup", "restore", "--from", &place, "--data", &text(&data)]).await;
    assert!(!again && said.contains("is a store already"), "{said}");

    let running = start(site, &data, &place).await;
    assert_eq!(services(site, running.listen).await, names);
    // The proxy is told everything anew, by a store that it doesn't know.
    let known = v1::Hello {
        store_id: update.store_id.clone(),
        generation: update.generation,
        ..hello("p1")
    };
    let push = site.push(running.listen, "p1");
    let mut stream = Stream::open(&push, known).await.unwrap();
    let anew = stream.change().await;
    assert!(
        anew[0].full,
        "a store that came back must not be taken for the one before"
    );
    assert_ne!(anew[0].store_id, update.store_id);
    // It ships on, beside what the store before has shipped.
    let mut api = site.api(running.listen);
    api.apply(apply(&service("after", 80))).await.unwrap();
    let mut client = backups(site, running.listen);
    shipped(&mut client).await;
    drop(running);
    let third = site.dir.join("third");
    let said = well(&["backup", "restore", "--from", &place, "--data", &text(&third)]).await;
    assert!(said.contains("revision 22"), "{said}");
    // And to where it was, of the store before.
    let at = site.dir.join("at-ten");
    let old = &update.store_id;
    let arguments = ["backup", "restore", "--from", &place, "--data", &text(&at)];
    let said = well(&[&arguments[..], &["--to-revision", "10", "--store-id", old]].concat()).await;
    assert!(said.contains("revision 10 of"), "{said}");
    let running = start(site, &at, &text(&site.dir.join("elsewhere"))).await;
    assert_eq!(services(site, running.listen).await.len(), 9);
}

fn is_backup_policy(resource: &v1::Resource) -> bool {
    matches!(resource.spec, Some(v1::resource::Spec::BackupPolicy(_)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_in_the_middle_leaves_no_backup_that_looks_whole_and_no_store_that_looks_restored() {
    let site = Site::new();
    let (place, data) = (text(&site.dir.join("place")), site.dir.join("data"));
    let mut running = start(&site, &data, &place).await;
    let mut api = site.api(running.listen);
    api.apply(apply(&zone("a"))).await.unwrap();
    for batch in 0..10 {
        let many: Vec<String> = (0..300).map(|n| service(&format!("s{batch}-{n}"), 80)).collect();
        api.apply(apply(&many.join("---\n"))).await.unwrap();
    }
    let mut whole = 0;
    for round in 0..6u64 {
        let mut client = backups(&site, running.listen);
        leads(&mut client).await;
        let making = tokio::spawn(async move {
            client
                .create_backup(v1::CreateBackupRequest::default())
                .await
                .is_ok()
        });
        tokio::time::sleep(Duration::from_millis(round * round * 15)).await;
        running.child.kill().await.unwrap();
        whole += u32::from(making.await.unwrap());
        let said = well(&["backup", "list", "--from", &place]).await;
        for line in said.lines().skip(1) {
            let name = line.split(' ').next().unwrap();
            well(&["backup", "verify", "--from", &place, name]).await;
        }
        assert!(
            said.lines().count() > whole as usize,
            "an acknowledged backup is gone: {said}"
        );
        running = start(&site, &data, &place).await;
    }
    let mut client = backups(&site, running.listen);
    leads(&mut client).await;
    client
        .create_backup(v1::CreateBackupRequest::default())
        .await
        .unwrap();
    let names = services(&site, running.listen).await.len();
    drop(running);

    let to = site.dir.join("restored");
    let arguments = ["backup", "restore", "--from", &place, "--data", &text(&to)];
    let mut cut = 0;
    for round in 0..8u64 {
        let mut child = program().args(arguments).stdout(Stdio::null()).spawn().unwrap();
        let late = tokio::time::timeout(Duration::from_millis(10 + round * round * 8), child.wait()).await;
        child.kill().await.ok();
        if late.is_ok() {
            break;
        }
        cut += 1;
        if to.join("leeward.db").exists() {
            break;
        }
    }
    assert!(cut > 0, "no restore was cut short");
    if !to.join("leeward.db").exists() {
        well(&arguments).await;
    }
    let running = start(&site, &to, &text(&site.dir.join("elsewhere"))).await;
    assert_eq!(services(&site, running.listen).await.len(), names);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drill_measures_what_would_be_lost_and_says_whether_that_is_too_much() {
    let site = Site::new();
    let (place, data) = (text(&site.dir.join("place")), site.dir.join("data"));
    let running = start(&site, &data, &place).await;
    let mut api = site.api(running.listen);
    api.apply(apply(&(zone("a") + "---\n" + POLICY))).await.unwrap();
    let mut client = backups(&site, running.listen);
    shipped(&mut client).await;
    let report = site.dir.join("reports");
    let base = ["drill", "restore", "--from", &place, "--report", &text(&report)];
    let said = well(&[&base[..], &["--rpo", "30s", "--rto", "120s"]].concat()).await;
    assert!(said.contains("objective met"), "{said}");
    // The mesh is three revisions on, and a minute: more than may be lost.
    let status = client
        .get_backup_status(v1::GetBackupStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    let later = prost_types::Timestamp {
        seconds: status.revision_ms / 1000 + 60,
        nanos: 0,
    };
    let live = [
        "--rpo",
        "30s",
        "--rto",
        "120s",
        "--live-revision",
        &(status.revision + 3).to_string(),
        "--live-time",
        &later.to_string(),
    ];
    let (met, said) = run(&[&base[..], &live].concat()).await;
    assert!(!met && said.contains("3 revisions"), "{said}");
    let reports = std::fs::read_dir(&report).unwrap().count();
    assert_eq!(reports, 4, "two drills, each as JSON and Markdown");
    let (met, said) = run(&[&base[..], &["--rpo", "30s", "--rto", "1ms"]].concat()).await;
    assert!(!met && said.contains("NOT met"), "{said}");
}

/// The same on something that speaks S3 and is not ours. Set LEEWARD_TEST_S3 to the program of moto's server, or to
/// `required` where it must be found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_is_a_place_as_any_other() {
    let wanted = std::env::var("LEEWARD_TEST_S3").unwrap_or_default();
    let program = match wanted.as_str() {
        "" | "required" => PathBuf::from("moto_server"),
        path => PathBuf::from(path),
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let server = Command::new(&program)
        .args(["-H", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let _server = match server {
        Ok(server) => server,
        Err(error) if wanted.is_empty() => {
            println!("left out: no {} here: {error}", program.display());
            return;
        }
        Err(error) => panic!("{}: {error}", program.display()),
    };
    let site = Site::new();
    let bucket = format!(
        "PUT /backups HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    );
    eventually("a bucket", async || {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let Ok(mut stream) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await else {
            return false;
        };
        let mut answer = String::new();
        stream.write_all(bucket.as_bytes()).await.is_ok()
            && stream.read_to_string(&mut answer).await.is_ok()
            && answer.starts_with("HTTP/1.1 200")
    })
    .await;
    let credentials = site.dir.join("credentials");
    std::fs::write(
        &credentials,
        "[default]\naws_access_key_id = one\naws_secret_access_key = two\n",
    )
    .unwrap();
    let place = format!(
        "s3://backups/mesh/a?region=us-east-1&endpoint=http://127.0.0.1:{port}&credentials={}",
        credentials.display()
    );
    everything(&site, Some(place)).await;
}

fn signal(running: &Running, signal: rustix::process::Signal) {
    let pid = i32::try_from(running.child.id().unwrap()).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// A control plane, and another that follows it, on one place.
async fn pair(site: &Site, promote_after: Option<&str>) -> (Running, Running) {
    let place = text(&site.dir.join("place"));
    let backup = format!("main={place}");
    let leads = ["--backup-place", &backup, "--epoch", &place, "--epoch-ttl", "3s"];
    let leader = start_with(site, &site.dir.join("data"), &leads).await;
    let mut api = site.api(leader.listen);
    let policy = zone("a") + "---\n" + POLICY;
    eventually("it leads", async || api.apply(apply(&policy)).await.is_ok()).await;
    let mut client = backups(site, leader.listen);
    eventually("the first backup", async || {
        place_status(&mut client)
            .await
            .is_some_and(|p| p.last_good_ms > 0)
    })
    .await;
    let standby = stand_by(site, promote_after).await;
    (leader, standby)
}

/// The other, as it is started each time.
async fn stand_by(site: &Site, promote_after: Option<&str>) -> Running {
    let place = text(&site.dir.join("place"));
    let backup = format!("main={place}");
    let mut follows = vec![
        "--standby-of",
        &place,
        "--epoch-ttl",
        "3s",
        "--backup-place",
        &backup,
    ];
    follows.extend(
        promote_after
            .map(|after| ["--promote-after", after])
            .into_iter()
            .flatten(),
    );
    start_with(site, &site.dir.join("standby"), &follows).await
}

/// Waits until a service can be applied at one that is to lead.
async fn takes_writes(site: &Site, address: SocketAddr, name: &str) {
    eventually("it leads", async || {
        let applied = site.api(address).apply(apply(&service(name, 80))).await;
        applied.is_ok()
    })
    .await;
}

async fn revision(site: &Site, address: SocketAddr) -> u64 {
    let listed = site.api(address).list(v1::ListRequest::default()).await;
    listed.map_or(0, |listed| listed.into_inner().revision)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_follows_and_takes_over_and_the_one_that_was_paused_takes_no_writes() {
    let site = Site::new();
    let (leader, standby) = pair(&site, Some("1s")).await;
    let mut api = site.api(leader.listen);
    for n in 0..10 {
        api.apply(apply(&service(&format!("s{n}"), 80))).await.unwrap();
    }
    eventually("it follows", async || revision(&site, standby.listen).await == 11).await;
    assert_eq!(services(&site, standby.listen).await.len(), 10);
    // What it says to whoever writes to it; a proxy gets what is known.
    let mut other = site.api(standby.listen);
    let refused = other.apply(apply(&service("no", 80))).await.unwrap_err();
    assert!(
        refused.message().contains(&leader.listen.to_string()),
        "{refused}"
    );
    let mut stream = Stream::open(&site.push(standby.listen, "p1"), hello("p1"))
        .await
        .unwrap();
    let before = stream.change().await.pop().unwrap();
    assert_eq!(before.generation, 11);
    let mut old = Stream::open(&site.push(leader.listen, "p2"), hello("p2"))
        .await
        .unwrap();
    old.change().await;
    // The leader stops in the middle of whatever it does, and knows nothing of it.
    signal(&leader, rustix::process::Signal::STOP);
    takes_writes(&site, standby.listen, "after").await;
    signal(&leader, rustix::process::Signal::CONT);
    let refused = api.apply(apply(&service("late", 80))).await.unwrap_err();
    assert_ne!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    eventually("it says who leads", async || {
        let refused = api.apply(apply(&service("late", 80))).await.unwrap_err();
        refused.message().contains(&standby.listen.to_string())
    })
    .await;
    // Nobody goes on with policy from a store that is behind.
    let ended = loop {
        match old.messages.message().await {
            Ok(Some(_)) => {}
            ended => break ended,
        }
    };
    assert!(
        ended
            .unwrap_err()
            .message()
            .contains("another control plane leads")
    );
    let names = services(&site, standby.listen).await;
    assert!(
        names.contains(&"after".to_owned()) && !names.contains(&"late".to_owned()),
        "{names:?}"
    );
    // Proxies see that it is another store.
    let mut stream = Stream::open(&site.push(standby.listen, "p1"), hello("p1"))
        .await
        .unwrap();
    let after = stream.change().await.pop().unwrap();
    assert_ne!(after.store_id, before.store_id);
    // It is a leader as any other: it backs up.
    let mut client = backups(&site, standby.listen);
    eventually("it backs up", async || {
        place_status(&mut client)
            .await
            .is_some_and(|p| p.last_good_ms > 0 && p.continuous)
    })
    .await;
    // Started again as it was the first time, it leads on with what it has.
    signal(&standby, rustix::process::Signal::KILL);
    let mut standby = stand_by(&site, Some("1s")).await;
    takes_writes(&site, standby.listen, "again").await;
    let names = services(&site, standby.listen).await;
    assert!(names.contains(&"after".to_owned()), "{names:?}");
    // But not once another has taken over from it: who leads is told from what was written last.
    signal(&standby, rustix::process::Signal::TERM);
    standby.child.wait().await.unwrap();
    let claims = site.dir.join("place").join("epochs");
    let mut claims: Vec<_> = std::fs::read_dir(claims)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    claims.sort();
    let last = std::fs::read_to_string(claims.last().unwrap()).unwrap();
    let mut claim: serde_json::Value = serde_json::from_str(&last).unwrap();
    claim["store_id"] = "another".into();
    std::fs::write(claims.last().unwrap(), claim.to_string()).unwrap();
    let place = text(&site.dir.join("place"));
    let (data, identity) = (
        text(&site.dir.join("standby")),
        text(&site.identity_dir(&Site::control_id())),
    );
    let base = [
        "--listen",
        "127.0.0.1:0",
        "--data",
        &data,
        "--identity",
        &identity,
    ];
    let (good, said) = run(&[&base[..], &["--standby-of", &place]].concat()).await;
    assert!(
        !good && said.contains("led itself until another took over"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_lets_a_standby_lead_and_nobody_acknowledges_on_both_sides() {
    let site = Site::new();
    let (leader, standby) = pair(&site, None).await;
    eventually("it follows", async || revision(&site, standby.listen).await == 1).await;
    let writer = |address: SocketAddr, name: &'static str| {
        let mut api = site.api(address);
        async move {
            // When each was sent and acknowledged.
            let mut acknowledged = Vec::new();
            let until = tokio::time::Instant::now() + Duration::from_secs(14);
            for n in 0u32.. {
                let begun = tokio::time::Instant::now();
                if begun > until {
                    break;
                }
                if api
                    .apply(apply(&service(&format!("{name}{n}"), 80)))
                    .await
                    .is_ok()
                {
                    acknowledged.push(tokio::time::Instant::now());
                } else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            acknowledged
        }
    };
    let writing = (
        tokio::spawn(writer(leader.listen, "old")),
        tokio::spawn(writer(standby.listen, "new")),
    );
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut client = backups(&site, standby.listen);
    client.promote(v1::PromoteRequest {}).await.unwrap();
    let (old, new) = (writing.0.await.unwrap(), writing.1.await.unwrap());
    assert!(
        !old.is_empty() && !new.is_empty(),
        "{} and {}",
        old.len(),
        new.len()
    );
    assert!(old.last() < new.first(), "both acknowledged at once");
    // What is no standby can't be made to lead, and one that is behind must not.
    let refused = backups(&site, leader.listen)
        .promote(v1::PromoteRequest {})
        .await
        .unwrap_err();
    assert!(refused.message().contains("this one is behind"), "{refused}");
}

#[tokio::test]
async fn what_can_not_be_done_is_said() {
    let site = Site::new();
    let nothing = text(&site.dir.join("nothing"));
    for (arguments, wanted) in [
        (
            vec!["backup", "verify", "--from", &nothing],
            "there is no backup in",
        ),
        (vec!["backup", "list", "--from", "ftp://x"], "want a directory"),
        (
            vec!["backup", "restore", "--from", &nothing, "--data", &nothing],
            "there is no backup",
        ),
        (
            vec!["backup", "restore", "--from", &nothing, "--etcd"],
            "LEEWARD_ETCD_ENDPOINTS",
        ),
    ] {
        let (good, said) = run(&arguments).await;
        assert!(!good && said.contains(wanted), "{arguments:?}: {said}");
    }
    let running = start(&site, &site.dir.join("data"), &text(&site.dir.join("place"))).await;
    let mut client = backups(&site, running.listen);
    let request = |destination: &str, include_ca| v1::CreateBackupRequest {
        destination: destination.into(),
        include_ca,
    };
    let refused = client.create_backup(request("else", false)).await.unwrap_err();
    assert_eq!(refused.message(), "there is no place else; there are main");
    leads(&mut client).await;
    let refused = client.create_backup(request("", true)).await.unwrap_err();
    assert!(
        refused.message().contains("is no certificate authority"),
        "{refused}"
    );
    // A proxy has no business here.
    let proxy = site.identity(&Site::proxy_id("p1"));
    let mut stranger = BackupServiceClient::new(channel::connect_lazy(proxy, running.listen));
    let refused = stranger
        .list_backups(v1::ListBackupsRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    tokio::time::timeout(SOON, client.create_backup(request("", false)))
        .await
        .unwrap()
        .unwrap();
}

/// A mesh that grows from one node's file to etcd goes the same way as one that lost its etcd.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_is_restored_whole_or_not_at_all() {
    let Some(etcd) = EtcdCluster::start(EtcdVersion::V3_4, 1).await.unwrap() else {
        return;
    };
    let site = Site::new();
    let (place, data) = (text(&site.dir.join("place")), site.dir.join("data"));
    let running = start(&site, &data, &place).await;
    let mut api = site.api(running.listen);
    api.apply(apply(&(zone("a") + "---\n" + POLICY))).await.unwrap();
    for batch in 0..6 {
        let many: Vec<String> = (0..300).map(|n| service(&format!("s{batch}-{n}"), 80)).collect();
        api.apply(apply(&many.join("---\n"))).await.unwrap();
    }
    let mut client = backups(&site, running.listen);
    leads(&mut client).await;
    client
        .create_backup(v1::CreateBackupRequest::default())
        .await
        .unwrap();
    shipped(&mut client).await;
    let names = services(&site, running.listen).await;
    drop(running);

    let endpoints = etcd.endpoints().join(",");
    let command = |arguments: &[&str]| {
        let mut command = program();
        command
            .args(arguments)
            .env("LEEWARD_ETCD_ENDPOINTS", &endpoints)
            .env("LEEWARD_ETCD_PREFIX", "/restored/");
        command
    };
    let restore = ["backup", "restore", "--from", &place, "--etcd"];
    let control = ["--store", "etcd", "--listen", "127.0.0.1:0", "--data"];
    let scratch = text(&site.dir.join("beside"));
    let identity = text(&site.identity_dir(&Site::control_id()));
    let control = [&control[..], &[&scratch, "--identity", &identity]].concat();
    // Cut short, it is no store, and says so.
    let kv = Kv::etcd(EtcdSettings {
        endpoints: etcd.endpoints(),
        prefix: "/restored/".into(),
        ..EtcdSettings::default()
    })
    .unwrap();
    let mut child = command(&restore).stdout(Stdio::null()).spawn().unwrap();
    eventually("it has begun", async || {
        kv.get("restoring").await.unwrap().is_some()
    })
    .await;
    child.kill().await.unwrap();
    assert!(
        kv.get("restoring").await.unwrap().is_some(),
        "it had ended already"
    );
    let refused = command(&control).output().await.unwrap();
    let said = String::from_utf8([refused.stdout, refused.stderr].concat()).unwrap();
    assert!(
        !refused.status.success() && said.contains("restore again"),
        "{said}"
    );
    let done = command(&restore).output().await.unwrap();
    let said = String::from_utf8([done.stdout, done.stderr].concat()).unwrap();
    assert!(done.status.success(), "{said}");
    let again = command(&restore).output().await.unwrap();
    assert!(!again.status.success(), "it was restored over a store");
    let etcd = [
        "--store",
        "etcd",
        "--etcd-endpoints",
        &endpoints,
        "--etcd-prefix",
        "/restored/",
    ];
    let running = start_with(&site, &site.dir.join("beside"), &etcd).await;
    assert_eq!(services(&site, running.listen).await, names);
}
