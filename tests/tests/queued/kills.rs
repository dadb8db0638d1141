//! Proxies that end in the middle: by force, and in order.

use crate::{QUICK, SOON, TAKE_ALL_IN, emptied, one, order, policy};
use anyhow::{Context, bail, ensure};
use leeward_testkit::{Answer, Backend, Behave, Client, Mesh, Protocol, eventually};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Clients that send orders, each with a key of its own, until they are told to stop. What can't be sent, or isn't
/// answered, is left; a client that pleases to try again would only blur the count.
struct Customers {
    accepted: Arc<Mutex<BTreeSet<String>>>,
    next: Arc<AtomicU64>,
    stop: CancellationToken,
    clients: JoinSet<anyhow::Result<()>>,
}

impl Customers {
    fn new() -> Self {
        Self {
            accepted: Arc::default(),
            next: Arc::default(),
            stop: CancellationToken::new(),
            clients: JoinSet::new(),
        }
    }

    /// Sends to `to` until the proxy there is gone.
    fn send_to(&mut self, to: SocketAddr, pause: Duration) {
        for _ in 0..4 {
            let (accepted, next) = (Arc::clone(&self.accepted), Arc::clone(&self.next));
            let stop = self.stop.clone();
            self.clients.spawn(async move {
                let mut client = Client::new(to, Protocol::Http1);
                while !stop.is_cancelled() {
                    let key = format!("order-{}", next.fetch_add(1, Ordering::Relaxed));
                    match client.call(order(&key)).await {
                        Ok(reply) => {
                            ensure!(reply.status == 202, "{reply:?} {}", reply.text());
                            accepted.lock().unwrap().insert(key);
                        }
                        Err(_) => client = Client::new(to, Protocol::Http1),
                    }
                    tokio::time::sleep(pause).await;
                }
                Ok(())
            });
        }
    }

    fn accepted(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }

    async fn more(&mut self, more: usize) -> anyhow::Result<()> {
        let before = self.accepted();
        let accepted = Arc::clone(&self.accepted);
        let enough = eventually("more orders to be taken in", SOON, || async {
            let now = accepted.lock().unwrap().len();
            ensure!(now >= before + more, "{} of {more}", now - before);
            Ok(())
        });
        tokio::select! {
            enough = enough => enough,
            // None ends before it is told to, but for what it says.
            Some(ended) = self.clients.join_next() => {
                ended??;
                bail!("a client has ended")
            }
        }
    }

    async fn stop(&mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        while let Some(done) = self.clients.join_next().await {
            done??;
        }
        self.stop = CancellationToken::new();
        Ok(())
    }
}

/// An order that was said to be taken in has arrived; what else has arrived was at least sent by somebody.
fn all_arrived(customers: &Customers, orders: &Backend) -> (usize, u64) {
    let (accepted, counts) = (customers.accepted.lock().unwrap(), orders.counts());
    let lost: Vec<&String> = accepted.iter().filter(|key| !counts.contains_key(*key)).collect();
    assert!(lost.is_empty(), "{} lost: {lost:?}", lost.len());
    let sent = customers.next.load(Ordering::Relaxed);
    let is_sent = |key: &String| {
        let n = key.strip_prefix("order-").and_then(|n| n.parse::<u64>().ok());
        n.is_some_and(|n| n < sent)
    };
    assert!(counts.keys().all(is_sent), "{counts:?}");
    let again = counts.values().map(|n| n - 1).sum();
    (counts.len(), again)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_in_outlives_kill_9_of_the_proxy() -> anyhow::Result<()> {
    const ROUNDS: u64 = 10;
    let mut mesh = one().await?;
    let orders = Backend::start("orders")?;
    orders.count_by("idempotency-key");
    orders.behave(Behave::LateBetween {
        least: Duration::ZERO,
        most: Duration::from_millis(30),
        seed: 11,
        answer: Answer::status(200),
    });
    mesh.apply(&policy(&orders, QUICK, &[], &[TAKE_ALL_IN])).await?;
    let mut customers = Customers::new();
    for round in 0..ROUNDS {
        customers.send_to(mesh.node("a1")?.outbound, Duration::ZERO);
        let before = orders.requests();
        customers.more(20 + usize::try_from(round * 7)?).await?;
        eventually("deliveries beside", SOON, || async {
            ensure!(orders.requests() > before);
            Ok(())
        })
        .await?;
        mesh.node_mut("a1")?.process.kill9()?;
        customers.stop().await?;
        let new = mesh.start_again("a1").await?;
        *mesh.node_mut("a1")? = new;
    }
    let now = emptied(mesh.node("a1")?, SOON).await?;
    assert_eq!(now["dead"], 0, "{now}");
    let (arrived, again) = all_arrived(&customers, &orders);
    eprintln!(
        "{ROUNDS} rounds: {} taken in, {arrived} arrived, {again} of them once more with the same key",
        customers.accepted()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_delivers_what_its_predecessor_took_in_and_neither_delivers_twice() -> anyhow::Result<()>
{
    let mut mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--drain-timeout", "20s")
        .handover()
        .start()
        .await?;
    let orders = Backend::start("orders")?;
    orders.count_by("idempotency-key");
    // Slow, so that some are under way at any time, and more wait.
    orders.behave(Behave::Late(Duration::from_millis(150), Answer::status(200)));
    let lines = [QUICK, &["keyHeader: x-customer"]].concat();
    mesh.apply(&policy(&orders, &lines, &[], &[TAKE_ALL_IN])).await?;
    let mut customers = Customers::new();
    customers.send_to(mesh.node("a1")?.outbound, Duration::from_millis(5));
    customers.more(100).await?;
    for _ in 0..2 {
        let new = mesh.start_again("a1").await?;
        let mut old = std::mem::replace(mesh.node_mut("a1")?, new);
        customers.more(50).await?;
        let ended = old.process.wait(SOON).await?;
        assert!(ended.success(), "{ended}");
        let log = mesh.node("a1")?.process.log()?;
        assert!(!log.contains("cut off"), "{log}");
    }
    customers.stop().await?;
    let now = emptied(mesh.node("a1")?, SOON).await.context("the successor")?;
    assert_eq!(
        (&now["dead"], &now["delivering"]),
        (&0.into(), &true.into()),
        "{now}"
    );
    let (arrived, again) = all_arrived(&customers, &orders);
    assert_eq!((arrived, again), (customers.accepted(), 0));
    Ok(())
}
