//! The program itself: what it acknowledged survives its death, and it ends when asked.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use leeward_proto::v1;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use support::{SOON, Site, apply, service, zone};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// A running `leeward-control`; it is killed when dropped.
struct Running {
    child: Child,
    listen: SocketAddr,
    admin: SocketAddr,
}

async fn start(site: &Site) -> Running {
    let addresses = site.dir.join("addresses.json");
    let _ = std::fs::remove_file(&addresses);
    let child = Command::new(env!("CARGO_BIN_EXE_leeward-control"))
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .arg("--data")
        .arg(site.dir.join("store"))
        .arg("--identity")
        .arg(site.identity_dir(&Site::control_id()))
        .arg("--addresses-file")
        .arg(&addresses)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let deadline = tokio::time::Instant::now() + SOON;
    while !addresses.exists() {
        assert!(tokio::time::Instant::now() < deadline, "it never came up");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let (listen, admin) = (read(&addresses, "listen"), read(&addresses, "admin"));
    Running { child, listen, admin }
}

fn read(file: &Path, name: &str) -> SocketAddr {
    let text = std::fs::read_to_string(file).unwrap();
    let (_, rest) = text.split_once(&format!("\"{name}\":\"")).unwrap();
    rest.split('"').next().unwrap().parse().unwrap()
}

async fn fetch(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: admin\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_kill() {
    let site = Site::new();
    let mut running = start(&site).await;
    let mut api = site.api(running.listen);
    api.apply(apply(&zone("a"))).await.unwrap();
    let writer = tokio::spawn(async move {
        let mut acknowledged = Vec::new();
        for i in 0u16.. {
            let name = format!("s{i}");
            match api.apply(apply(&service(&name, 80))).await {
                Ok(answer) => acknowledged.push((name, answer.into_inner().revision)),
                Err(_) => break,
            }
        }
        acknowledged
    });
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    running.child.kill().await.unwrap();
    let acknowledged = writer.await.unwrap();
    assert!(
        acknowledged.len() > 5,
        "only {} writes in time",
        acknowledged.len()
    );

    let running = start(&site).await;
    let mut api = site.api(running.listen);
    for (name, revision) in &acknowledged {
        let request = v1::GetRequest {
            r#ref: Some(support::reference(v1::Kind::Service, name)),
        };
        let there = api.get(request).await.unwrap().into_inner();
        assert_eq!(there.metadata.unwrap().revision, *revision, "{name}");
    }
    let next = api
        .apply(apply(&service("next", 80)))
        .await
        .unwrap()
        .into_inner()
        .revision;
    assert!(
        next > acknowledged.last().unwrap().1,
        "a revision is never given twice"
    );
}

#[tokio::test]
async fn it_answers_probes_and_ends_when_asked() {
    let site = Site::new();
    let mut running = start(&site).await;
    assert!(fetch(running.admin, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(fetch(running.admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(
        fetch(running.admin, "/metrics")
            .await
            .contains("\nleeward_control_revision 0\n")
    );
    assert!(fetch(running.admin, "/else").await.starts_with("HTTP/1.1 404"));
    // An open watch and a connected proxy are no reason to stay.
    let mut api = site.api(running.listen);
    let _watch = api.watch(v1::WatchRequest::default()).await.unwrap();
    let client = site.push(running.listen, "p1");
    let _stream = support::Stream::open(&client, support::hello("p1"))
        .await
        .unwrap();
    let pid = i32::try_from(running.child.id().unwrap()).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    let status = tokio::time::timeout(SOON, running.child.wait())
        .await
        .unwrap()
        .unwrap();
    assert!(status.success(), "{status}");
}
