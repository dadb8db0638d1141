//! How fast it is. `cargo test --release -p leeward-queue figures -- --nocapture` prints it; as a test it only
//! demands that nothing is lost under load.

use crate::bench::{Fixture, Proxy, Service, request};
use crate::suite::suite;
use leeward_policy::model::Queue;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::task::JoinSet;
use tokio::time::Instant;

suite!(OnDisk as sqlite, InNats as jetstream; [load_is_borne]);

async fn load_is_borne(fixture: impl Fixture) -> anyhow::Result<()> {
    let each = if cfg!(debug_assertions) { 300 } else { 5000 };
    let queue = Queue {
        max_rate: 1_000_000,
        max_concurrency: 64,
        ..fixture.queue()
    };
    let service = Service::down();
    let proxy = Arc::new(Proxy::start(&fixture, &queue, &service).await?);
    let mut all = 0;
    for callers in [1, 64] {
        let entries = if callers == 1 { each / 5 } else { each };
        let left = Arc::new(AtomicU32::new(entries));
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..callers {
            let (proxy, left) = (Arc::clone(&proxy), Arc::clone(&left));
            tasks.spawn(async move {
                while left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                    .is_ok()
                {
                    let order = request(None, &"x".repeat(1000));
                    proxy.queues.accept(crate::bench::QUEUE, order).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        let rate = f64::from(entries) / begun.elapsed().as_secs_f64();
        eprintln!("{callers} callers: {rate:.0} entries of 1 kB accepted in a second");
        all += entries;
    }
    let begun = Instant::now();
    service.answer(200);
    proxy.ended(u64::from(all)).await?;
    let rate = f64::from(all) / begun.elapsed().as_secs_f64();
    eprintln!(
        "64 at once: {rate:.0} delivered in a second, the time until the service is found to be back included"
    );
    Arc::into_inner(proxy)
        .expect("all callers have ended")
        .close()
        .await
}
