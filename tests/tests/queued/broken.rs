//! Queues that can't be used: it is said why, the next rung answers, and nothing else is the worse for it.

use crate::{QUICK, SOON, emptied, leeward_says, location, one, order, plain_order, policy, reading};
use anyhow::{Context, ensure};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Mesh, Protocol, eventually};
use std::path::Path;
use std::process::Command;

const NEXT: &str = "static: {status: 503, body: not now}";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_without_a_directory_for_data_queues_nothing_and_says_so() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").without_data().start().await?;
    let orders = Backend::refusing("orders")?;
    mesh.apply(&policy(&orders, QUICK, &[NEXT], &[])).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let reply = client.call(order("one")).await?;
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-degraded")),
        (503, "later/1")
    );
    let admin = mesh.node("a1")?.admin.to_string();
    let list = leeward_says(&["queue", "list", "--admin", &admin]).await?;
    assert!(
        list.contains("unavailable: the proxy has no directory for data (--data)"),
        "{list}"
    );
    let available = mesh.node("a1")?.metric("leeward_queue_available", &[]).await?;
    assert!(available < 0.1, "{available}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_file_is_set_aside_and_named() -> anyhow::Result<()> {
    let mut mesh = one().await?;
    let orders = Backend::refusing("orders")?;
    mesh.apply(&policy(&orders, QUICK, &[NEXT], &[])).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let lost = location(&client.call(order("lost")).await?)?;
    mesh.node_mut("a1")?.process.kill9()?;
    let dir = mesh.data("a1").join("queues");
    let file = dir.join("orders.db");
    let length = file.metadata().context("the queue's file")?.len();
    std::fs::write(&file, vec![0xa5; usize::try_from(length)?])?;
    for log in ["orders.db-wal", "orders.db-shm"] {
        // There may be none.
        drop(std::fs::remove_file(dir.join(log)));
    }
    let new = mesh.start_again("a1").await?;
    *mesh.node_mut("a1")? = new;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let place = eventually("the queue to begin anew", SOON, || async {
        location(&client.call(order("kept")).await?)
    })
    .await?;
    assert_eq!(client.get(crate::HOST, &lost).await?.status, 404);
    let aside = std::fs::read_dir(&dir)?
        .filter_map(|file| file.ok()?.file_name().into_string().ok())
        .find(|name| {
            name.starts_with("orders.db.corrupt-") && !name.ends_with("-wal") && !name.ends_with("-shm")
        })
        .context("nothing was set aside")?;
    let admin = node.admin.to_string();
    let list = leeward_says(&["queue", "list", "--admin", &admin]).await?;
    assert!(
        list.contains("a corrupt file was set aside as") && list.contains(&aside),
        "{list}"
    );
    assert!(node.process.log()?.contains("corrupt"));
    orders.resume()?;
    crate::reaches(&client, &place, "delivered").await?;
    Ok(())
}

/// A file system of its own, of a few bytes.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    /// `None` where this may not be done.
    fn mount(at: &'a Path, size: &str) -> anyhow::Result<Option<Self>> {
        std::fs::create_dir_all(at)?;
        let options = format!("size={size},mode=0700");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(at)
            .output()?;
        Ok(mounted.status.success().then_some(Self(at)))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        // Lazily: a process may still have it open.
        drop(Command::new("umount").arg("-l").arg(self.0).output());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_said_to_be_full_and_the_queue_goes_on_when_there_is_room() -> anyhow::Result<()> {
    let mut mesh = one().await?;
    let data = mesh.dir().join("small");
    let Some(_small) = Small::mount(&data, "2m")? else {
        eprintln!("left out: no file system can be mounted here");
        return Ok(());
    };
    let (orders, other) = (Backend::refusing("orders")?, Backend::start("other")?);
    let policy = policy(&orders, QUICK, &[NEXT], &[])
        + &service("other", &[(other.address(), "a", "")], &[])
        + &route("other", "other.example", "other", &[]);
    mesh.apply(&policy).await?;
    mesh.node_mut("a1")?.process.term_and_wait(SOON).await?;
    let dir = data.display().to_string();
    let new = mesh.start_again_with("a1", &[("--data", &dir)]).await?;
    *mesh.node_mut("a1")? = new;
    let node = mesh.node("a1")?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let large = "x".repeat(60 << 10);
    let mut taken_in = Vec::new();
    let refused = loop {
        let reply = client.call(plain_order(&large)).await?;
        if reply.status != 202 {
            break reply;
        }
        taken_in.push(location(&reply)?);
        ensure!(taken_in.len() < 100, "the disk is never full");
    };
    assert_eq!(
        (refused.status.as_u16(), refused.header("leeward-degraded")),
        (503, "later/1")
    );
    let admin = node.admin.to_string();
    eventually("people to be told", SOON, || async {
        // Whoever looks finds what the last write came to.
        let reply = client.call(plain_order(&large)).await?;
        let (now, list) = (
            reading(node).await?,
            leeward_says(&["queue", "list", "--admin", &admin]).await?,
        );
        ensure!(
            reply.status == 503 && now["available"] == false,
            "{reply:?} {now}"
        );
        ensure!(list.contains("unavailable: the disk is full"), "{list}");
        Ok(())
    })
    .await?;
    // Nobody else minds.
    assert_eq!(client.get("other.example", "/").await?.backend(), "other");

    let grown = Command::new("mount")
        .args(["-o", "remount,size=16m"])
        .arg(&data)
        .output()?;
    ensure!(grown.status.success(), "{grown:?}");
    let place = eventually("the queue to take in again", SOON, || async {
        location(&client.call(order("later")).await?)
    })
    .await?;
    orders.resume()?;
    crate::reaches(&client, &place, "delivered").await?;
    for place in &taken_in {
        crate::reaches(&client, place, "delivered").await?;
    }
    emptied(node, SOON).await?;
    // Before the file system is gone.
    mesh.node_mut("a1")?.process.term_and_wait(SOON).await?;
    Ok(())
}
