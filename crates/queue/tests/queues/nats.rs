//! Queues in NATS: a server of its own for each test, and what happens when it is away.

use crate::bench::{Fixture, PATIENCE, Proxy, QUEUE, Service, TempDir, quick, request};
use anyhow::{Context, bail, ensure};
use leeward_policy::model::{Queue, QueueStore};
use leeward_queue::{EntryState, Queues, Refused, Settings};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// `required` makes tests fail, and not be left out, where there is no server.
const REQUIRED: &str = "LEEWARD_TEST_NATS";

/// In a server that is ended on drop.
pub(crate) struct InNats {
    dir: TempDir,
    program: PathBuf,
    child: std::sync::Mutex<Child>,
    url: String,
}

/// Where Debian has it, which is not in everyone's PATH, or anywhere in PATH.
fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.push("/usr/sbin".into());
    dirs.into_iter()
        .map(|dir| dir.join("nats-server"))
        .find(|file| file.is_file())
}

fn spawn(program: &Path, dir: &Path, port: &str) -> anyhow::Result<Child> {
    Command::new(program)
        .args(["-js", "-a", "127.0.0.1", "-p", port, "--ports_file_dir"])
        .arg(dir)
        .arg("-sd")
        .arg(dir.join("store"))
        .arg("-l")
        .arg(dir.join("log"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("can't start {}", program.display()))
}

/// The address that a server has written down.
async fn address(dir: &Path, child: &mut Child) -> anyhow::Result<String> {
    let file = dir.join(format!("nats-server_{}.ports", child.id()));
    let until = Instant::now() + PATIENCE;
    loop {
        // {"nats":["nats://127.0.0.1:4222"]}
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let address = text.split('"').find(|part| part.starts_with("nats://"));
        if let (Some(address), true) = (address, text.contains(']')) {
            return Ok(address.to_owned());
        }
        if let Some(status) = child.try_wait()? {
            let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
            bail!("nats-server ended with {status}:\n{log}");
        }
        ensure!(
            Instant::now() < until,
            "nats-server has no port after {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Fixture for InNats {
    async fn start() -> anyhow::Result<Option<Self>> {
        let Some(program) = program() else {
            ensure!(
                std::env::var_os(REQUIRED).is_none_or(|value| value != "required"),
                "there is no nats-server: apt-get install nats-server"
            );
            eprintln!(
                "LEFT OUT: there is no nats-server to test queues in NATS with: apt-get install nats-server"
            );
            return Ok(None);
        };
        let dir = TempDir::new()?;
        let mut child = spawn(&program, dir.path(), "-1")?;
        let url = address(dir.path(), &mut child).await?;
        Ok(Some(Self {
            dir,
            program,
            child: child.into(),
            url,
        }))
    }

    fn data(&self) -> Option<PathBuf> {
        None
    }

    fn queue(&self) -> Queue {
        Queue {
            store: QueueStore::JetStream {
                servers: vec![self.url.as_str().into()],
                replicas: 1,
                credentials_file: None,
            },
            ..quick()
        }
    }
}

impl InNats {
    /// kill -9.
    fn kill(&self) -> anyhow::Result<()> {
        let mut child = self.child.lock().unwrap();
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Has it stop, or go on.
    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let id = self.child.lock().unwrap().id();
        let sent = Command::new("kill")
            .args(["-s", name, &id.to_string()])
            .status()?;
        ensure!(sent.success(), "kill -s {name}: {sent}");
        Ok(())
    }

    /// The server again, at its old port.
    async fn revive(&self) -> anyhow::Result<()> {
        let port = self.url.rsplit(':').next().context("a port")?;
        let mut child = spawn(&self.program, self.dir.path(), port)?;
        address(self.dir.path(), &mut child).await?;
        *self.child.lock().unwrap() = child;
        Ok(())
    }
}

impl Drop for InNats {
    fn drop(&mut self) {
        // One that has ended doesn't mind.
        let _ = self.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_the_server_loses_nothing_and_it_is_found_again() -> anyhow::Result<()> {
    let Some(nats) = InNats::start().await? else {
        return Ok(());
    };
    let service = Service::answering(200);
    service.take(Duration::from_millis(1));
    let proxy = Proxy::start(&nats, &nats.queue(), &service).await?;
    let (mut accepted, mut n) = (Vec::new(), 0);
    for round in 0..5 {
        let until = Instant::now() + Duration::from_millis(100 + 37 * round);
        while Instant::now() < until {
            n += 1;
            accepted.push((proxy.accept(Some("k"), &n.to_string()).await?, n.to_string()));
        }
        nats.kill()?;
        let away = proxy
            .until("it is noticed", |r| {
                !r.available && r.state.contains("unavailable")
            })
            .await?;
        ensure!(away.state.contains("NATS"), "{away:?}");
        let refused = proxy.accept(Some("k"), "away").await;
        ensure!(matches!(refused, Err(Refused::Unavailable { .. })), "{refused:?}");
        nats.revive().await?;
        proxy.until("it is back", |r| r.available).await?;
    }
    for (id, body) in &accepted {
        proxy
            .becomes(*id, |s| matches!(s, Some(EntryState::Delivered { .. })))
            .await
            .with_context(|| format!("entry {body} of {}", accepted.len()))?;
    }
    proxy.drained().await?;
    let served = service.served();
    let mut order: Vec<u32> = served.iter().filter_map(|body| body.parse().ok()).collect();
    ensure!(order.is_sorted(), "out of order: {order:?}");
    order.dedup();
    ensure!(
        order.len() == accepted.len(),
        "{} of {}",
        order.len(),
        accepted.len()
    );
    ensure!(
        !served.contains(&"away".to_owned()),
        "what was refused was delivered"
    );
    eprintln!(
        "{} entries through 5 kills, {} attempts",
        accepted.len(),
        served.len()
    );
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_holder_of_the_lease_dies_another_goes_on() -> anyhow::Result<()> {
    let Some(nats) = InNats::start().await? else {
        return Ok(());
    };
    let (first, second) = (Service::answering(200), Service::answering(200));
    let holder = Proxy::start(&nats, &nats.queue(), &first).await?;
    holder.until("it delivers", |r| r.delivering).await?;
    let other = Proxy::start(&nats, &nats.queue(), &second).await?;
    // Its tasks end in the middle of whatever they do, and give nothing back.
    drop(holder);
    let begun = Instant::now();
    let id = other.accept(Some("k"), "1").await?;
    other
        .becomes(id, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    let waited = begun.elapsed();
    ensure!(
        waited > Duration::from_secs(5) && waited < Duration::from_secs(15),
        "{waited:?}"
    );
    assert_eq!(second.served(), ["1"]);
    other.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_server_a_queue_says_so_and_connects_when_there_is_one() -> anyhow::Result<()> {
    let Some(nats) = InNats::start().await? else {
        return Ok(());
    };
    nats.kill()?;
    let service = Service::answering(200);
    let mut proxy = Proxy::open(&nats, &nats.queue(), &service).await?;
    proxy.run();
    let reading = proxy
        .until("it says so", |r| r.state.contains("unavailable"))
        .await?;
    ensure!(reading.state.contains("connect to NATS"), "{reading:?}");
    let refused = proxy.accept(None, "1").await;
    ensure!(matches!(refused, Err(Refused::Unavailable { .. })), "{refused:?}");
    nats.revive().await?;
    proxy.until("it is there", |r| r.available).await?;
    proxy.accept(None, "2").await?;
    proxy.ended(1).await?;
    assert_eq!(service.served(), ["2"]);
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_the_server_would_not_take_says_why() -> anyhow::Result<()> {
    let Some(nats) = InNats::start().await? else {
        return Ok(());
    };
    let queue = Queue {
        max_entry_bytes: 8 << 20,
        ..nats.queue()
    };
    let proxy = Proxy::start(&nats, &queue, &Service::down()).await?;
    let mut large = request(None, "x");
    large.body = vec![b'x'; 2 << 20].into();
    let refused = proxy.queues.accept(QUEUE, large).await;
    ensure!(
        matches!(&refused, Err(Refused::Unavailable { why }) if why.contains("max_payload")),
        "{refused:?}"
    );
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_refused_for_want_of_an_answer_is_not_delivered() -> anyhow::Result<()> {
    let Some(nats) = InNats::start().await? else {
        return Ok(());
    };
    let service = Service::answering(200);
    let proxy = Proxy::start(&nats, &nats.queue(), &service).await?;
    proxy.until("it delivers", |r| r.delivering).await?;
    // It takes what it is sent, and does nothing with it until it goes on.
    nats.signal("STOP")?;
    let refused = proxy.accept(None, "1").await;
    nats.signal("CONT")?;
    ensure!(matches!(refused, Err(Refused::Unavailable { .. })), "{refused:?}");
    let until = Instant::now() + PATIENCE;
    while let Err(refused) = proxy.accept(None, "2").await {
        ensure!(Instant::now() < until, "still {refused}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    proxy.ended(1).await?;
    assert_eq!(service.served(), ["2"]);
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lower_age_leaves_the_dropping_to_whoever_delivers() -> anyhow::Result<()> {
    let Some(nats) = InNats::start().await? else {
        return Ok(());
    };
    let longest = Duration::from_secs(30 * 24 * 3600);
    let queue = Queue {
        max_age: longest,
        ..nats.queue()
    };
    let proxy = Proxy::start(&nats, &queue, &Service::down()).await?;
    let js = async_nats::jetstream::new(async_nats::connect(&nats.url).await?);
    let stream = format!("leeward_{QUEUE}_waiting");
    let kept = js.get_stream(&stream).await?.cached_info().config.max_age;
    ensure!(kept > longest, "{kept:?}");
    proxy.close().await?;
    let queue = Queue {
        max_age: Duration::from_secs(60),
        ..queue
    };
    let proxy = Proxy::start(&nats, &queue, &Service::down()).await?;
    assert_eq!(js.get_stream(&stream).await?.cached_info().config.max_age, kept);
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_that_are_not_there_are_named() -> anyhow::Result<()> {
    let settings = Settings {
        data: None,
        proxy: "p".into(),
        zone: "a".into(),
    };
    let queues = Queues::new(settings, Service::down());
    let queue = Queue {
        store: QueueStore::JetStream {
            servers: vec!["nats://127.0.0.1:1".into()],
            replicas: 1,
            credentials_file: Some("/nowhere/at/all.creds".into()),
        },
        ..quick()
    };
    queues.reconcile(vec![(QUEUE.into(), Arc::new(queue))]);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(Arc::clone(&queues).run());
    let until = Instant::now() + PATIENCE;
    while !queues.readings()[0].state.contains("/nowhere/at/all.creds") {
        ensure!(Instant::now() < until, "{:?}", queues.readings());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    queues.close().await;
    Ok(())
}
