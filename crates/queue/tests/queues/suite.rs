//! What a queue does, whatever keeps it.

use crate::bench::{Fixture, Proxy, QUEUE, Service, failed, not_sent, request};
use anyhow::{Context, ensure};
use leeward_policy::model::Queue;
use leeward_queue::{Delivered, EntryState, Listed, Listing, QueueError, Refused, Which};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Every test for every store.
macro_rules! suite {
    ($($fixture:ident as $module:ident),*; $tests:tt) => {
        $($crate::suite::suite!(@ $fixture $module $tests);)*
    };
    (@ $fixture:ident $module:ident [$($test:ident),* $(,)?]) => {
        mod $module { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() -> anyhow::Result<()> {
                use crate::bench::Fixture;
                match crate::fixtures::$fixture::start().await? {
                    Some(fixture) => super::$test(fixture).await,
                    None => Ok(()),
                }
            }
        )* }
    };
}
pub(crate) use suite;

suite!(OnDisk as sqlite, InNats as jetstream; [
    what_is_accepted_is_delivered_as_it_came,
    bounds_refuse_with_their_name,
    what_is_too_old_is_dead,
    answers_that_will_not_change_make_dead_letters_at_once,
    attempts_are_bounded,
    dead_letters_are_bounded_and_the_oldest_go,
    dead_letters_are_sent_again_as_if_new,
    what_is_retried_finds_room_or_stays,
    what_is_discarded_is_gone_and_holds_nobody_back,
    what_is_discarded_while_it_is_sent_stays_gone,
    results_are_kept_for_their_time,
    what_was_not_sent_does_not_count_and_is_tried_one_at_a_time,
    a_restart_keeps_everything,
    one_process_delivers_and_the_next_takes_over,
    deliveries_are_parallel_within_bounds,
    deliveries_keep_to_the_rate,
    closing_waits_for_what_is_under_way,
    changed_settings_hold_at_once,
    listings_go_on_where_they_ended,
    a_panic_costs_one_attempt,
    a_retry_after_is_kept,
]);

fn dead(kind: &Option<EntryState>) -> bool {
    matches!(kind, Some(EntryState::Dead { .. }))
}

async fn what_is_accepted_is_delivered_as_it_came(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::down();
    let proxy = Proxy::start(&fixture, &fixture.queue(), &service).await?;
    let mut sent = request(Some("customer 7"), "one");
    sent.headers.push(("x-bytes".to_owned(), vec![0xff, 0, b' ']));
    sent.body = vec![0xc3, 0x28, 0].into();
    let id = proxy.queues.accept(QUEUE, sent.clone()).await?.id;
    let waiting = proxy.state(id).await;
    assert!(
        matches!(waiting, Some(EntryState::Waiting { attempts: 0, .. })),
        "{waiting:?}"
    );
    let shown = proxy.queues.show(QUEUE, &id).await?.context("it is there")?;
    assert_eq!(shown.request, sent);
    assert_eq!(shown.summary.key.as_deref(), Some("customer 7"));
    let reading = proxy.until("it is counted", |r| r.waiting == 1).await?;
    // A stream counts what a message has beside its entry.
    ensure!(reading.bytes >= shown.summary.size, "{reading:?}");

    service.answer(201);
    proxy
        .becomes(id, |state| {
            matches!(
                state,
                Some(EntryState::Delivered {
                    status: 201,
                    attempts: 1,
                    ..
                })
            )
        })
        .await?;
    let last = service.with(|seen| seen.log.last().unwrap().0.clone());
    assert_eq!((last.id, last.attempt, &*last.queue), (id, 1, QUEUE));
    assert_eq!(last.request, sent);
    let reading = proxy.ended(1).await?;
    assert_eq!((reading.bytes, reading.delivered_total, reading.dead), (0, 1, 0));
    assert!(proxy.queues.show(QUEUE, &id).await?.is_none());

    let unknown = proxy.queues.accept("nobody", sent).await;
    assert_eq!(unknown, Err(Refused::NoSuchQueue));
    proxy.close().await
}

async fn bounds_refuse_with_their_name(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::down();
    let queue = Queue {
        max_entries: 3,
        max_bytes: 64 << 10,
        max_entry_bytes: 30 << 10,
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let full = |limit| Err(Refused::Full { limit });
    assert_eq!(
        proxy.accept(None, &"x".repeat(31 << 10)).await,
        full("maxEntryBytes")
    );
    let large = "x".repeat(29 << 10);
    for _ in 0..2 {
        proxy.accept(None, &large).await?;
    }
    assert_eq!(proxy.accept(None, &large).await, full("maxBytes"));
    let small = proxy.accept(None, "small").await?;
    assert_eq!(proxy.accept(None, "small").await, full("maxEntries"));
    let reading = proxy.until("all are counted", |r| r.waiting == 3).await?;
    ensure!(reading.bytes <= queue.max_bytes, "{reading:?}");
    // Room for one, for exactly one.
    assert_eq!(proxy.queues.discard(QUEUE, Which::One(small)).await?, 1);
    proxy.accept(None, "small").await?;
    assert_eq!(proxy.accept(None, "small").await, full("maxEntries"));
    proxy.close().await
}

async fn what_is_too_old_is_dead(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::down();
    let queue = Queue {
        max_age: Duration::from_millis(700),
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let begun = Instant::now();
    let mut ids = Vec::new();
    // The second and third are held back by the first, and expire all the same.
    for (key, body) in [(Some("k"), "1"), (Some("k"), "2"), (Some("k"), "3"), (None, "4")] {
        ids.push(proxy.accept(key, body).await?);
    }
    for id in ids {
        proxy
            .becomes(
                id,
                |state| matches!(state, Some(EntryState::Dead { reason, attempts: 0, .. }) if **reason == *"expired"),
            )
            .await?;
    }
    ensure!(
        begun.elapsed() >= queue.max_age,
        "too early: {:?}",
        begun.elapsed()
    );
    let reading = proxy.ended(4).await?;
    assert_eq!(
        (reading.dead, reading.expired_total, reading.dead_total),
        (4, 4, 4)
    );
    proxy.close().await
}

async fn answers_that_will_not_change_make_dead_letters_at_once(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::answering(422);
    let proxy = Proxy::start(&fixture, &fixture.queue(), &service).await?;
    let id = proxy.accept(Some("k"), "1").await?;
    proxy.becomes(id, dead).await?;
    let state = proxy.state(id).await;
    assert!(
        matches!(&state, Some(EntryState::Dead { reason, attempts: 1, .. }) if reason.contains("422")),
        "{state:?}"
    );
    assert_eq!(service.calls(), 1);
    // A dead head lets the next of its key go on.
    service.answer(200);
    let next = proxy.accept(Some("k"), "2").await?;
    proxy
        .becomes(next, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    proxy.close().await
}

async fn attempts_are_bounded(fixture: impl Fixture) -> anyhow::Result<()> {
    // Of six attempts two have no answer, and don't count.
    let mut n = 0;
    let service = Service::new(move |_| {
        n += 1;
        failed((n % 3 != 0).then_some(503))
    });
    let queue = Queue {
        max_attempts: 4,
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let id = proxy.accept(None, "1").await?;
    proxy.becomes(id, dead).await?;
    let state = proxy.state(id).await;
    assert!(
        matches!(&state, Some(EntryState::Dead { reason, attempts: 4, .. }) if reason.contains("it failed")),
        "{state:?}"
    );
    let attempts = service.with(|seen| seen.log.iter().map(|(d, _)| d.attempt).collect::<Vec<_>>());
    assert_eq!(attempts, [1, 2, 3, 3, 4]);
    proxy.close().await
}

async fn dead_letters_are_bounded_and_the_oldest_go(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::answering(400);
    let queue = Queue {
        max_dead_letters: 3,
        max_concurrency: 1,
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let mut ids = Vec::new();
    for n in 0..6 {
        ids.push(proxy.accept(Some("k"), &n.to_string()).await?);
    }
    proxy
        .until("the oldest are gone", |r| r.dead == 3 && r.dead_total == 6)
        .await?;
    let listed = proxy
        .queues
        .list(
            QUEUE,
            Listing {
                kind: Listed::Dead,
                after: 0,
                limit: 100,
            },
        )
        .await?;
    let kept: Vec<_> = listed.iter().map(|entry| entry.id).collect();
    assert_eq!(kept, ids[3..]);
    assert_eq!(proxy.state(ids[0]).await, None);
    proxy.close().await
}

async fn dead_letters_are_sent_again_as_if_new(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::new(|_| failed(Some(500)));
    let queue = Queue {
        max_attempts: 2,
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(proxy.accept(None, &n.to_string()).await?);
    }
    proxy.until("all are dead", |r| r.dead == 5).await?;
    let unknown = Which::One("0123456789abcdef0123456789abcdef".parse()?);
    assert_eq!(proxy.queues.retry(QUEUE, unknown).await?, 0);
    service.answer(200);
    assert_eq!(proxy.queues.retry(QUEUE, Which::One(ids[2])).await?, 1);
    proxy
        .becomes(ids[2], |s| {
            matches!(s, Some(EntryState::Delivered { attempts: 1, .. }))
        })
        .await?;
    assert_eq!(service.served(), ["2"]);
    assert_eq!(proxy.queues.retry(QUEUE, Which::AllDead).await?, 4);
    for id in &ids {
        proxy
            .becomes(*id, |s| matches!(s, Some(EntryState::Delivered { .. })))
            .await?;
    }
    proxy
        .until("no letter is dead", |r| r.dead == 0 && r.waiting == 0)
        .await?;
    let keys = service.with(|seen| {
        let of_first = seen.log.iter().filter(|(d, _)| d.id == ids[0]);
        of_first
            .map(|(d, _)| d.request.idempotency_key.clone())
            .collect::<Vec<_>>()
    });
    assert_eq!(keys, vec![Arc::<str>::from("idem-0"); 3]);
    proxy.close().await
}

async fn what_is_retried_finds_room_or_stays(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::answering(400);
    let queue = Queue {
        max_entries: 2,
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    for n in 0..4 {
        let id = proxy.accept(None, &n.to_string()).await?;
        proxy.becomes(id, dead).await?;
    }
    service.script(|_| not_sent());
    proxy.accept(None, "waits").await?;
    assert_eq!(proxy.queues.retry(QUEUE, Which::AllDead).await?, 1);
    proxy
        .until("it is full", |r| r.waiting == 2 && r.dead == 3)
        .await?;
    let refused = proxy.queues.retry(QUEUE, Which::AllDead).await;
    let queue = QUEUE.into();
    assert_eq!(
        refused,
        Err(QueueError::Full {
            queue,
            limit: "maxEntries"
        })
    );
    assert_eq!(proxy.reading().dead, 3);
    proxy.close().await
}

async fn what_is_discarded_is_gone_and_holds_nobody_back(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::new(|delivery| match &delivery.request.body[..] {
        b"bad" => failed(Some(500)),
        b"worse" => Delivered::Answered { status: 400 },
        _ => Delivered::Answered { status: 200 },
    });
    let queue = Queue {
        base_interval: Duration::from_secs(3600),
        max_interval: Duration::from_secs(3600),
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let bad = proxy.accept(Some("k"), "bad").await?;
    let next = proxy.accept(Some("k"), "next").await?;
    let worse = proxy.accept(None, "worse").await?;
    proxy.becomes(worse, dead).await?;
    proxy
        .becomes(bad, |s| matches!(s, Some(EntryState::Waiting { attempts: 1, last_error: Some(why), .. }) if **why == *"it failed"))
        .await?;
    assert_eq!(service.served(), Vec::<String>::new());
    assert_eq!(proxy.queues.discard(QUEUE, Which::One(bad)).await?, 1);
    proxy
        .becomes(next, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    assert_eq!(proxy.state(bad).await, None);
    assert_eq!(proxy.queues.discard(QUEUE, Which::One(bad)).await?, 0);
    assert_eq!(proxy.queues.discard(QUEUE, Which::AllDead).await?, 1);
    assert_eq!(proxy.state(worse).await, None);
    proxy
        .until("nothing is left", |r| r.dead == 0 && r.waiting == 0)
        .await?;
    proxy.close().await
}

async fn what_is_discarded_while_it_is_sent_stays_gone(fixture: impl Fixture) -> anyhow::Result<()> {
    for delivered in [
        Delivered::Answered { status: 200 },
        Delivered::Answered { status: 400 },
        failed(Some(500)),
        not_sent(),
    ] {
        let service = Service::new(move |delivery| match &delivery.request.body[..] {
            b"1" => delivered.clone(),
            _ => Delivered::Answered { status: 200 },
        });
        service.take(Duration::from_millis(150));
        let proxy = Proxy::start(&fixture, &fixture.queue(), &service).await?;
        let id = proxy.accept(Some("k"), "1").await?;
        while service.with(|seen| seen.under_way) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(proxy.queues.discard(QUEUE, Which::One(id)).await?, 1);
        let next = proxy.accept(Some("k"), "2").await?;
        proxy
            .becomes(next, |s| matches!(s, Some(EntryState::Delivered { .. })))
            .await?;
        let waiting = proxy.drained().await?;
        assert_eq!((waiting.waiting, waiting.dead), (0, 0));
        assert!(!matches!(proxy.state(id).await, Some(EntryState::Waiting { .. })));
        proxy.close().await?;
    }
    Ok(())
}

async fn results_are_kept_for_their_time(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::answering(204);
    let queue = Queue {
        keep_results: Duration::from_secs(1),
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let id = proxy.accept(None, "1").await?;
    proxy
        .becomes(id, |s| {
            matches!(s, Some(EntryState::Delivered { status: 204, .. }))
        })
        .await?;
    let begun = Instant::now();
    proxy.becomes(id, Option::is_none).await?;
    ensure!(
        begun.elapsed() > Duration::from_millis(500),
        "{:?}",
        begun.elapsed()
    );
    proxy.close().await
}

async fn what_was_not_sent_does_not_count_and_is_tried_one_at_a_time(
    fixture: impl Fixture,
) -> anyhow::Result<()> {
    let service = Service::down();
    service.take(Duration::from_millis(5));
    let queue = Queue {
        max_attempts: 1,
        base_interval: Duration::from_millis(20),
        max_interval: Duration::from_millis(50),
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    for n in 0..40 {
        proxy.accept(None, &n.to_string()).await?;
    }
    // Not a wait for something to happen, but for nothing to: 1 s has room for 20 to 40 probes and for thousands
    // of careless attempts.
    let before = service.calls();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let probes = service.calls() - before;
    ensure!((2..=42).contains(&probes), "{probes} probes in a second");
    let reading = proxy.until("all are counted", |r| r.waiting == 40).await?;
    assert_eq!(reading.dead_total, 0);
    let first = service.with(|seen| seen.log.iter().all(|(d, _)| d.attempt == 1));
    assert!(first, "what was not sent was counted");

    service.answer(200);
    let reading = proxy.ended(40).await?;
    assert_eq!((reading.delivered_total, reading.dead), (40, 0));
    proxy.close().await
}

async fn a_restart_keeps_everything(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::new(|delivery| match &delivery.request.body[..] {
        b"dead" => Delivered::Answered { status: 404 },
        b"slow" => failed(Some(503)),
        _ => Delivered::Answered { status: 200 },
    });
    let queue = Queue {
        max_attempts: 5,
        base_interval: Duration::from_secs(600),
        max_interval: Duration::from_secs(600),
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let gone = proxy.accept(None, "dead").await?;
    let slow = proxy.accept(Some("k"), "slow").await?;
    let good = proxy.accept(None, "good").await?;
    let held = proxy.accept(Some("k"), "held").await?;
    proxy.becomes(gone, dead).await?;
    proxy
        .becomes(good, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    proxy
        .becomes(slow, |s| {
            matches!(s, Some(EntryState::Waiting { attempts: 1, .. }))
        })
        .await?;
    let before = proxy.until("two wait", |r| r.waiting == 2 && r.dead == 1).await?;
    proxy.close().await?;

    let again = Service::answering(200);
    let proxy = Proxy::start(&fixture, &queue, &again).await?;
    let after = proxy
        .until("it is as before", |r| r.waiting == 2 && r.dead == 1)
        .await?;
    assert_eq!(after.bytes, before.bytes);
    assert!(dead(&proxy.state(gone).await));
    assert!(matches!(
        proxy.state(good).await,
        Some(EntryState::Delivered { status: 200, .. })
    ));
    assert!(matches!(
        proxy.state(slow).await,
        Some(EntryState::Waiting { attempts: 1, .. })
    ));
    // The pause is kept too: it was drawn from ten minutes, and holds back the next of its key.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(again.calls(), 0);
    assert_eq!(proxy.queues.discard(QUEUE, Which::One(slow)).await?, 1);
    proxy
        .becomes(held, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    proxy.close().await
}

async fn one_process_delivers_and_the_next_takes_over(fixture: impl Fixture) -> anyhow::Result<()> {
    let (old_service, new_service) = (Service::answering(200), Service::answering(200));
    let old = Proxy::start(&fixture, &fixture.queue(), &old_service).await?;
    old.until("the old one delivers", |r| r.delivering).await?;
    let new = Proxy::start(&fixture, &fixture.queue(), &new_service).await?;
    for n in 0..20 {
        let proxy = if n % 2 == 0 { &old } else { &new };
        proxy.accept(Some("k"), &n.to_string()).await?;
    }
    let served = old.ended(20).await?;
    assert_eq!(served.delivered_total, 20);
    let want: Vec<_> = (0..20).map(|n| n.to_string()).collect();
    assert_eq!(old_service.served(), want);
    assert_eq!(new_service.calls(), 0);
    let reading = new.reading();
    assert!(reading.state.contains("elsewhere"), "{reading:?}");

    old.close().await?;
    new.until("the new one delivers", |r| r.delivering).await?;
    new.accept(Some("k"), "20").await?;
    new.ended(1).await?;
    assert_eq!(new_service.served(), ["20"]);
    new.close().await
}

async fn deliveries_are_parallel_within_bounds(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::answering(200);
    service.take(Duration::from_millis(20));
    let queue = Queue {
        max_concurrency: 4,
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    for n in 0..24 {
        proxy.accept(None, &n.to_string()).await?;
    }
    proxy.ended(24).await?;
    assert_eq!(service.with(|seen| seen.most), 4);
    proxy.close().await
}

async fn deliveries_keep_to_the_rate(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::answering(200);
    let queue = Queue {
        max_rate: 50,
        ..fixture.queue()
    };
    let mut proxy = Proxy::open(&fixture, &queue, &service).await?;
    proxy.run();
    proxy.until("it is open", |r| r.available).await?;
    let begun = Instant::now();
    for n in 0..26 {
        proxy.accept(None, &n.to_string()).await?;
    }
    proxy.ended(26).await?;
    // The first at once, and 25 more.
    ensure!(
        begun.elapsed() >= Duration::from_millis(490),
        "{:?}",
        begun.elapsed()
    );
    proxy.close().await
}

async fn closing_waits_for_what_is_under_way(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::answering(200);
    service.take(Duration::from_millis(300));
    let proxy = Proxy::start(&fixture, &fixture.queue(), &service).await?;
    let id = proxy.accept(Some("k"), "1").await?;
    let next = proxy.accept(Some("k"), "2").await?;
    while service.with(|seen| seen.under_way) == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    proxy.queues.close().await;
    assert_eq!(service.served(), ["1"]);
    assert!(matches!(
        proxy.state(id).await,
        Some(EntryState::Delivered { .. })
    ));
    assert!(matches!(
        proxy.state(next).await,
        Some(EntryState::Waiting { .. })
    ));
    // It goes on taking in.
    proxy.accept(None, "3").await?;
    proxy.close().await
}

async fn changed_settings_hold_at_once(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::down();
    let queue = Queue {
        max_entries: 1,
        ..fixture.queue()
    };
    let proxy = Proxy::start(&fixture, &queue, &service).await?;
    let first = proxy.accept(None, "1").await?;
    let refused = proxy.accept(None, "2").await;
    assert_eq!(refused, Err(Refused::Full { limit: "maxEntries" }));
    let wider = Queue {
        max_entries: 2,
        ..queue
    };
    proxy
        .queues
        .reconcile(vec![(QUEUE.into(), Arc::new(wider.clone()))]);
    let until = Instant::now() + crate::bench::PATIENCE;
    while let Err(refused) = proxy.accept(None, "2").await {
        ensure!(Instant::now() < until, "still {refused}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Closed, its entries stay.
    proxy.queues.reconcile(vec![]);
    assert_eq!(proxy.accept(None, "3").await, Err(Refused::NoSuchQueue));
    assert!(proxy.queues.readings().is_empty());
    service.answer(200);
    // Whoever comes just before it is opened waits for it.
    let (early, ()) = tokio::join!(proxy.accept(None, "3"), async {
        tokio::task::yield_now().await;
        proxy.queues.reconcile(vec![(QUEUE.into(), Arc::new(wider))]);
    });
    assert_ne!(early, Err(Refused::NoSuchQueue));
    proxy
        .becomes(first, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    proxy.close().await
}

async fn listings_go_on_where_they_ended(fixture: impl Fixture) -> anyhow::Result<()> {
    let service = Service::down();
    let proxy = Proxy::start(&fixture, &fixture.queue(), &service).await?;
    let mut ids = Vec::new();
    for n in 0..7 {
        ids.push(proxy.accept(None, &n.to_string()).await?);
    }
    let (mut got, mut after) = (Vec::new(), 0);
    loop {
        let what = Listing {
            kind: Listed::Waiting,
            after,
            limit: 3,
        };
        let page = proxy.queues.list(QUEUE, what).await?;
        let Some(last) = page.last() else { break };
        ensure!(page.len() <= 3, "{} entries", page.len());
        after = last.place;
        got.extend(page.iter().map(|entry| entry.id));
    }
    assert_eq!(got, ids);
    let nobody = proxy
        .queues
        .list(
            "nobody",
            Listing {
                kind: Listed::Dead,
                after: 0,
                limit: 1,
            },
        )
        .await;
    assert!(
        matches!(nobody, Err(QueueError::NoSuchQueue { .. })),
        "{nobody:?}"
    );
    proxy.close().await
}

async fn a_panic_costs_one_attempt(fixture: impl Fixture) -> anyhow::Result<()> {
    let mut first = true;
    let service = Service::new(move |_| {
        assert!(!std::mem::take(&mut first), "a panic on purpose");
        Delivered::Answered { status: 200 }
    });
    let healthy = Service::answering(200);
    let proxy = Proxy::start(&fixture, &fixture.queue(), &service).await?;
    let id = proxy.accept(None, "1").await?;
    proxy
        .becomes(id, |s| matches!(s, Some(EntryState::Waiting { last_error: Some(why), .. }) if why.contains("panicked")))
        .await?;
    // The script's lock is poisoned by it, so this service panics for ever; the queue goes on all the same.
    proxy.close().await?;
    let proxy = Proxy::start(&fixture, &fixture.queue(), &healthy).await?;
    proxy
        .becomes(id, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    proxy.close().await
}

async fn a_retry_after_is_kept(fixture: impl Fixture) -> anyhow::Result<()> {
    let mut first = true;
    let service = Service::new(move |_| {
        if std::mem::take(&mut first) {
            Delivered::Failed {
                why: "status 503".into(),
                status: Some(503),
                retry_after: Some(Duration::from_millis(600)),
            }
        } else {
            Delivered::Answered { status: 200 }
        }
    });
    let proxy = Proxy::start(&fixture, &fixture.queue(), &service).await?;
    let begun = Instant::now();
    let id = proxy.accept(None, "1").await?;
    proxy
        .becomes(id, |s| matches!(s, Some(EntryState::Delivered { .. })))
        .await?;
    ensure!(
        begun.elapsed() >= Duration::from_millis(600),
        "{:?}",
        begun.elapsed()
    );
    proxy.close().await
}
