//! Order within keys, whatever fails.

use crate::bench::{Fixture, Proxy, Service, body, failed, not_sent};
use crate::suite::suite;
use leeward_policy::model::Queue;
use leeward_queue::Delivered;
use leeward_resilience::{Draw, Seeded};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

suite!(OnDisk as sqlite, InNats as jetstream; [those_of_a_key_keep_their_order_under_random_failures]);

/// Keys, and entries of each.
const KEYS: usize = 6;
const OF_EACH: usize = 15;

async fn those_of_a_key_keep_their_order_under_random_failures(fixture: impl Fixture) -> anyhow::Result<()> {
    for seed in [1, 2, 3] {
        round(&fixture, seed).await?;
    }
    Ok(())
}

async fn round(fixture: &impl Fixture, seed: u64) -> anyhow::Result<()> {
    let mut draw = Seeded(seed);
    let service = Service::new(move |_| match draw.below(10) {
        0 => not_sent(),
        1 => failed(None),
        2 => failed(Some(503)),
        3 => Delivered::Answered { status: 429 },
        4 => Delivered::Answered { status: 410 },
        _ => Delivered::Answered { status: 200 },
    });
    service.take(Duration::from_millis(1));
    let queue = Queue {
        max_attempts: 3,
        ..fixture.queue()
    };
    let proxy = Proxy::start(fixture, &queue, &service).await?;
    let dead_before = proxy.reading().dead;
    let mut accepted = BTreeSet::new();
    for n in 0..OF_EACH {
        for key in 0..KEYS {
            accepted.insert(
                proxy
                    .accept(Some(&format!("{seed}-{key}")), &n.to_string())
                    .await?,
            );
        }
        accepted.insert(proxy.accept(None, &n.to_string()).await?);
    }
    let reading = proxy.ended(accepted.len() as u64).await?;
    service.with(|seen| {
        assert_eq!(seen.overlaps, 0, "seed {seed}: two of a key at once");
        let (mut last, mut ends, mut keys) = (BTreeMap::new(), BTreeMap::new(), HashMap::new());
        for (delivery, delivered) in &seen.log {
            let n: usize = body(&delivery.request).parse().unwrap();
            let same = keys
                .entry(delivery.id)
                .or_insert_with(|| delivery.request.idempotency_key.clone());
            assert_eq!(*same, delivery.request.idempotency_key);
            assert!(accepted.contains(&delivery.id));
            if let Delivered::Answered { status: 200 | 410 } = delivered {
                assert!(
                    ends.insert(delivery.id, n).is_none(),
                    "seed {seed}: {n} came after its end"
                );
            }
            if let Some(key) = &delivery.request.key {
                let before = last.insert(key.clone(), n).unwrap_or(0);
                assert!(
                    n == before || n == before + 1,
                    "seed {seed}: {n} of {key} after {before}"
                );
            }
        }
        assert_eq!(keys.len(), accepted.len(), "seed {seed}: every one was sent");
    });
    assert_eq!(
        reading.dead - dead_before,
        reading.dead_total,
        "seed {seed}: every dead letter is kept"
    );
    proxy.close().await
}
