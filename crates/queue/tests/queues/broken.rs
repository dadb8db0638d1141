//! What is wrong with a file or a disk is a state with a reason, and passes when it does.

use crate::bench::{Fixture, OnDisk, PATIENCE, Proxy, QUEUE, Service, TempDir, quick, request};
use anyhow::{Context, bail, ensure};
use leeward_policy::model::Queue;
use leeward_queue::{EntryId, EntryState, Listed, Listing, Queues, Refused, Settings, Which};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

fn database(fixture: &OnDisk) -> PathBuf {
    fixture.0.path().join("queues").join(format!("{QUEUE}.db"))
}

fn set_aside(fixture: &OnDisk) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for file in std::fs::read_dir(fixture.0.path().join("queues"))? {
        let name = file?.file_name().to_string_lossy().into_owned();
        if name.contains(".corrupt-") && !name.ends_with("-wal") && !name.ends_with("-shm") {
            names.push(name);
        }
    }
    Ok(names)
}

/// A file with some entries, which nobody has open.
async fn filled(fixture: &OnDisk, entries: usize) -> anyhow::Result<()> {
    let proxy = Proxy::open(fixture, &quick(), &Service::down()).await?;
    for n in 0..entries {
        proxy.accept(None, &format!("{n} {}", "x".repeat(3000))).await?;
    }
    proxy.close().await?;
    // Its thread closes the file, whose log is gone then.
    let log = database(fixture).with_extension("db-wal");
    let until = Instant::now() + PATIENCE;
    while log.exists() {
        ensure!(Instant::now() < until, "{} stays", log.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// The file that is there now is good, and what was there is kept.
async fn is_replaced(fixture: &OnDisk, proxy: &Proxy, service: &Service) -> anyhow::Result<()> {
    let reading = proxy
        .until("the file is set aside", |r| {
            r.available && r.state.contains("corrupt")
        })
        .await?;
    let names = set_aside(fixture)?;
    ensure!(names.len() == 1, "{names:?}");
    ensure!(reading.state.contains(&names[0]), "{reading:?}");
    service.answer(200);
    let id = accepts(proxy, "new").await?;
    proxy
        .becomes(id, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await
}

async fn accepts(proxy: &Proxy, body: &str) -> anyhow::Result<EntryId> {
    let until = Instant::now() + PATIENCE;
    loop {
        match proxy.accept(None, body).await {
            Ok(id) => return Ok(id),
            Err(refused) => ensure!(Instant::now() < until, "still {refused}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_with_a_hole_is_set_aside_and_a_fresh_one_begun() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    filled(&fixture, 100).await?;
    let file = File::options().write(true).open(database(&fixture))?;
    let size = file.metadata()?.len();
    ensure!(size > 200_000, "{size} bytes");
    file.write_all_at(&[0x5a; 100_000], size / 2 - 50_000)?;
    let service = Service::down();
    let proxy = Proxy::start(&fixture, &quick(), &service).await?;
    is_replaced(&fixture, &proxy, &service).await?;
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_no_database_is_set_aside() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    std::fs::create_dir(fixture.0.path().join("queues"))?;
    std::fs::write(database(&fixture), "This is no database. ".repeat(1000))?;
    let service = Service::down();
    let proxy = Proxy::start(&fixture, &quick(), &service).await?;
    is_replaced(&fixture, &proxy, &service).await?;
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_becomes_corrupt_while_it_is_used_is_set_aside() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    filled(&fixture, 2000).await?;
    let service = Service::down();
    let proxy = Proxy::start(&fixture, &quick(), &service).await?;
    let file = File::options().write(true).open(database(&fixture))?;
    let size = file.metadata()?.len();
    file.write_all_at(&vec![0x5a; usize::try_from(size)? - 8192], 8192)?;
    // Whatever reads finds it.
    let until = Instant::now() + PATIENCE;
    while set_aside(&fixture)?.is_empty() {
        ensure!(
            Instant::now() < until,
            "nobody has noticed: {:?}",
            proxy.reading()
        );
        let what = Listing {
            kind: Listed::Waiting,
            after: 0,
            limit: 1000,
        };
        let _ = proxy.queues.list(QUEUE, what).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    is_replaced(&fixture, &proxy, &service).await?;
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupt_files_are_not_gathered_without_end() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    let dir = fixture.0.path().join("queues");
    std::fs::create_dir(&dir)?;
    for n in 0..8 {
        std::fs::write(dir.join(format!("{QUEUE}.db.corrupt-{n}")), "x")?;
    }
    std::fs::write(database(&fixture), "This is no database. ".repeat(1000))?;
    let proxy = Proxy::open(&fixture, &quick(), &Service::down()).await?;
    let reading = proxy
        .until("it says so", |r| r.state.contains("remove some"))
        .await?;
    ensure!(!reading.available, "{reading:?}");
    std::fs::remove_file(dir.join(format!("{QUEUE}.db.corrupt-3")))?;
    accepts(&proxy, "1").await?;
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_a_later_version_is_left_alone() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    filled(&fixture, 1).await?;
    let db = rusqlite::Connection::open(database(&fixture))?;
    db.execute_batch("PRAGMA user_version = 99;")?;
    drop(db);
    let proxy = Proxy::open(&fixture, &quick(), &Service::down()).await?;
    let reading = proxy
        .until("it says so", |r| r.state.contains("unavailable"))
        .await?;
    ensure!(
        reading.state.contains("schema 99") && reading.state.contains("up to 1"),
        "{reading:?}"
    );
    let refused = proxy.accept(None, "1").await;
    ensure!(
        matches!(&refused, Err(Refused::Unavailable { why }) if why.contains("schema 99")),
        "{refused:?}"
    );
    ensure!(set_aside(&fixture)?.is_empty(), "it was set aside");
    proxy.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_can_not_be_used_is_tried_again() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    let in_the_way = fixture.0.path().join("queues");
    std::fs::write(&in_the_way, "")?;
    let proxy = Proxy::open(&fixture, &quick(), &Service::down()).await?;
    let reading = proxy
        .until("it says so", |r| r.state.contains("unavailable"))
        .await?;
    ensure!(reading.state.contains("queues"), "{reading:?}");
    std::fs::remove_file(&in_the_way)?;
    accepts(&proxy, "1").await?;
    proxy.close().await
}

#[tokio::test]
async fn without_a_directory_a_queue_says_what_is_missing() {
    let settings = Settings {
        data: None,
        proxy: "p".into(),
        zone: "a".into(),
    };
    let queues = Queues::new(settings, Service::down());
    queues.reconcile(vec![(QUEUE.into(), Arc::new(quick()))]);
    let refused = queues.accept(QUEUE, request(None, "1")).await;
    assert!(
        matches!(&refused, Err(Refused::Unavailable { why }) if why.contains("--data")),
        "{refused:?}"
    );
    assert!(queues.readings()[0].state.contains("--data"));
    // Nothing to end, so closing ends at once.
    queues.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_file_opened_again_sends_nothing_twice() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    let service = Service::answering(200);
    service.take(Duration::from_secs(3));
    let proxy = Proxy::start(&fixture, &quick(), &service).await?;
    let id = proxy.accept(Some("k"), "1").await?;
    let until = Instant::now() + PATIENCE;
    while service.with(|seen| seen.under_way) == 0 {
        ensure!(Instant::now() < until, "nothing is sent");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // For a moment its directory is away, as when a volume is mounted anew.
    let (dir, away) = (fixture.0.path().join("queues"), fixture.0.path().join("away"));
    std::fs::rename(&dir, &away)?;
    std::fs::write(&dir, "")?;
    let refused = proxy.accept(Some("k"), "2").await;
    ensure!(matches!(refused, Err(Refused::Unavailable { .. })), "{refused:?}");
    proxy.until("it is noticed", |r| !r.available).await?;
    std::fs::remove_file(&dir)?;
    std::fs::rename(&away, &dir)?;
    accepts(&proxy, "3").await?;
    ensure!(
        service.with(|seen| seen.log.is_empty()),
        "the first has ended before the file was there again"
    );
    proxy
        .becomes(id, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    proxy.ended(2).await?;
    ensure!(service.with(|seen| seen.overlaps) == 0, "two at once of a key");
    assert_eq!(service.served(), ["1", "3"]);
    proxy.close().await
}

/// A file system of 2 MiB, which takes root.
struct Small(TempDir);

impl Small {
    fn mount() -> anyhow::Result<Option<Self>> {
        let dir = TempDir::new()?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
            .arg(dir.path())
            .output();
        Ok(mounted.is_ok_and(|out| out.status.success()).then_some(Self(dir)))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// Takes in until it is refused, and what it said then.
async fn fill(proxy: &Proxy) -> anyhow::Result<(Vec<EntryId>, Refused)> {
    let mut ids = Vec::new();
    for n in 0..2000 {
        match proxy.accept(None, &format!("{n} {}", "x".repeat(20_000))).await {
            Ok(id) => ids.push(id),
            Err(refused) => return Ok((ids, refused)),
        }
    }
    bail!("{} entries, and no end", ids.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_a_state_and_passes() -> anyhow::Result<()> {
    let Some(small) = Small::mount()? else {
        eprintln!(
            "LEFT OUT: a full disk needs root, to mount a small one; files have a limit in the test beside this"
        );
        return Ok(());
    };
    let ballast = small.0.path().join("ballast");
    std::fs::write(&ballast, vec![1; 1 << 20])?;
    let fixture = OnDisk(TempDir(small.0.path().join("data")));
    std::fs::create_dir(fixture.0.path())?;
    let service = Service::down();
    let proxy = Proxy::start(&fixture, &quick(), &service).await?;
    let (mut ids, refused) = fill(&proxy).await?;
    ensure!(
        matches!(&refused, Refused::Unavailable { why } if why.contains("full")),
        "{refused:?}"
    );
    proxy
        .until("the state says so", |r| {
            !r.available && r.state.contains("disk is full")
        })
        .await?;
    ensure!(ids.len() > 2, "only {} were taken in", ids.len());
    // What was taken in is there, and can be read.
    for id in &ids {
        ensure!(proxy.queues.show(QUEUE, id).await?.is_some(), "{id} is gone");
    }
    // Room again: it takes in by itself.
    std::fs::remove_file(&ballast)?;
    ids.push(accepts(&proxy, "more").await?);
    let reading = proxy.until("it says so", |r| r.available).await?;
    ensure!(reading.state.contains("delivering"), "{reading:?}");
    service.answer(200);
    proxy.ended(ids.len() as u64).await?;
    proxy.close().await
}

/// Where a file can grow no further.
const LIMITED: &str = "LEEWARD_QUEUE_LIMITED_DIR";

/// What the limited process does; nothing in one that isn't.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fills_its_file_in_a_limited_process() -> anyhow::Result<()> {
    let Some(dir) = std::env::var_os(LIMITED) else {
        return Ok(());
    };
    let fixture = OnDisk(TempDir(PathBuf::from(dir)));
    let service = Service::down();
    let queue = Queue {
        max_bytes: 1 << 40,
        ..quick()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let (ids, refused) = fill(&proxy).await?;
    ensure!(matches!(refused, Refused::Unavailable { .. }), "{refused:?}");
    ensure!(ids.len() > 2, "only {} were taken in", ids.len());
    for id in &ids {
        ensure!(proxy.queues.show(QUEUE, id).await?.is_some(), "{id} is gone");
    }
    eprintln!("limited: {} entries, then {refused}", ids.len());
    Ok(())
}

#[test]
fn a_file_that_can_not_grow_is_a_state() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    // SIGXFSZ would end the process; ignored, writing fails.
    let out = Command::new("sh")
        .args(["-c", r#"trap '' XFSZ; ulimit -f 4096; exec "$0" "$@""#])
        .arg(std::env::current_exe()?)
        .args([
            "--exact",
            "broken::fills_its_file_in_a_limited_process",
            "--nocapture",
        ])
        .env(LIMITED, dir.path())
        .output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(
        out.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&out.stdout)
    );
    ensure!(said.contains("limited: "), "it did nothing: {said}");
    Ok(())
}

#[test]
fn the_small_disk_is_gone_after_its_test() -> anyhow::Result<()> {
    let Some(small) = Small::mount()? else {
        return Ok(());
    };
    let path: PathBuf = small.0.path().to_owned();
    drop(small);
    ensure!(!is_mounted(&path)?, "{} stays", path.display());
    Ok(())
}

fn is_mounted(path: &Path) -> anyhow::Result<bool> {
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    Ok(mounts.contains(&path.display().to_string()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_all_dead_letters_touches_nothing_that_waits() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("a disk")?;
    filled(&fixture, 3).await?;
    let proxy = Proxy::start(&fixture, &quick(), &Service::down()).await?;
    assert_eq!(proxy.queues.discard(QUEUE, Which::AllDead).await?, 0);
    proxy.until("all are there", |r| r.waiting == 3).await?;
    proxy.close().await
}
