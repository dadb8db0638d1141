//! What the service gets once it is back: everything, once, in order, and at its own pace.

use crate::{
    HOST, QUICK, SOON, TAKE_ALL_IN, emptied, location, one, order, plain_order, policy, reaches, reading,
};
use anyhow::ensure;
use leeward_testkit::{
    Answer, Backend, Behave, Client, Protocol, bytes_body, eventually, request, with_header,
};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_of_one_customer_come_in_the_order_in_which_they_were_taken_in() -> anyhow::Result<()> {
    const CUSTOMERS: usize = 6;
    const EACH: usize = 25;
    let mesh = one().await?;
    let orders = Backend::refusing("orders")?;
    orders.count_by("idempotency-key");
    let lines = [QUICK, &["keyHeader: x-customer"]].concat();
    mesh.apply(&policy(&orders, &lines, &[], &[])).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut customers = JoinSet::new();
    for customer in 0..CUSTOMERS {
        customers.spawn(async move {
            let client = Client::new(outbound, Protocol::Http1);
            for n in 0..EACH {
                let order = request(http::Method::POST, HOST, &format!("/{n}"), bytes_body("an order"));
                let order = with_header(order, "x-customer", &customer.to_string());
                let order = with_header(order, "idempotency-key", &format!("{customer}-{n}"));
                location(&client.call(order).await?)?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = customers.join_next().await {
        done??;
    }
    // Slow and fast answers, so that those which run beside each other overtake each other.
    orders.behave(Behave::LateBetween {
        least: Duration::ZERO,
        most: Duration::from_millis(20),
        seed: 7,
        answer: Answer::status(200),
    });
    orders.resume()?;
    emptied(mesh.node("a1")?, SOON).await?;
    let mut came: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for seen in orders.take_seen() {
        let customer = seen.headers["x-customer"].to_str()?.to_owned();
        came.entry(customer).or_default().push(seen.target);
    }
    let in_order: Vec<String> = (0..EACH).map(|n| format!("/{n}")).collect();
    assert_eq!(came.len(), CUSTOMERS);
    for (customer, came) in came {
        assert_eq!(came, in_order, "customer {customer}");
    }
    let counts = orders.counts();
    assert!(
        counts.len() == CUSTOMERS * EACH && counts.values().all(|n| *n == 1),
        "{counts:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_fails_is_asked_no_more_often_than_its_circuit_lets_it() -> anyhow::Result<()> {
    const OPEN: Duration = Duration::from_secs(1);
    let mesh = one().await?;
    let orders = Backend::start("orders")?;
    orders.behave(Behave::Answer(Answer::status(503)));
    let lines = [QUICK, &["maxAttempts: 0"]].concat();
    let circuit = "circuitBreaker: {failureRate: 0, consecutiveFailures: 3, openTime: 1s, maxOpenTime: 1s, \
                   openJitter: 0, halfOpenProbes: 1, ramp: 0s}";
    mesh.apply(&policy(&orders, &lines, &[], &[circuit])).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    for _ in 0..3 {
        location(&client.call(plain_order("opens it")).await?)?;
    }
    let begun = Instant::now();
    let mut places = Vec::new();
    for n in 0..40 {
        places.push(location(&client.call(order(&format!("k-{n}"))).await?)?);
    }
    // Long enough for each of them to be tried many times, by the queue's own pauses.
    tokio::time::sleep_until(begun + 3 * OPEN).await;
    let asked = orders.requests();
    let turns = begun.elapsed().as_millis() / OPEN.as_millis() + 1;
    // Three that opened it, what was on its way just then, and a probe at each turn.
    assert!(
        u128::from(asked) <= 3 + 4 + turns,
        "asked {asked} times in {turns} turns"
    );
    orders.count_by("idempotency-key");
    orders.behave(Behave::Answer(Answer::status(200)));
    for place in &places {
        reaches(&client, place, "delivered").await?;
    }
    let now = emptied(mesh.node("a1")?, SOON).await?;
    assert_eq!(now["dead"], 0, "{now}");
    assert!(orders.counts().values().all(|n| *n == 1), "{:?}", orders.counts());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_orders_wait_for_their_service_and_none_is_lost() -> anyhow::Result<()> {
    const ORDERS: usize = 10_000;
    const CLIENTS: usize = 32;
    let mesh = one().await?;
    let orders = Backend::refusing("orders")?;
    orders.count_by("idempotency-key");
    mesh.apply(&policy(&orders, QUICK, &[], &[])).await?;
    let node = mesh.node("a1")?;
    let outbound = node.outbound;
    let begun = Instant::now();
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(async move {
            let to = Client::new(outbound, Protocol::Http1);
            for n in (client..ORDERS).step_by(CLIENTS) {
                location(&to.call(order(&format!("order-{n}"))).await?)?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    let taken_in = begun.elapsed();
    let now = reading(node).await?;
    assert_eq!(
        (&now["waiting"], &now["accepted_total"]),
        (&ORDERS.into(), &ORDERS.into())
    );
    assert!(orders.counts().is_empty());

    let begun = Instant::now();
    orders.resume()?;
    emptied(node, 2 * SOON).await?;
    let delivered = begun.elapsed();
    let all = f64::from(u32::try_from(ORDERS)?);
    let rate = |time: Duration| all / time.as_secs_f64();
    eprintln!(
        "{ORDERS} orders: {:.0} taken in per second, {:.0} delivered per second",
        rate(taken_in),
        rate(delivered)
    );
    // What is written down is counted a moment later.
    eventually("the count", SOON, || async {
        let now = reading(node).await?;
        ensure!(now["dead"] == 0 && now["delivered_total"] == ORDERS, "{now}");
        Ok(())
    })
    .await?;
    let counts = orders.counts();
    assert_eq!(counts.len(), ORDERS);
    assert!(
        counts.values().all(|n| *n == 1),
        "{:?}",
        counts.iter().find(|(_, n)| **n > 1)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_that_never_ends_does_not_keep_a_proxy_from_ending() -> anyhow::Result<()> {
    let mut mesh = one().await?;
    let orders = Backend::start("orders")?;
    orders.behave(Behave::Hang);
    let rule = ["timeouts: {request: 0s}", TAKE_ALL_IN];
    mesh.apply(&policy(&orders, QUICK, &[], &rule)).await?;
    // The mesh's own proxy goes, and one with a shorter patience comes.
    mesh.node_mut("a1")?.process.term_and_wait(SOON).await?;
    let new = mesh.start_again_with("a1", &[("--drain-timeout", "1s")]).await?;
    *mesh.node_mut("a1")? = new;
    let client = mesh.workload("a1", Protocol::Http1)?;
    location(&client.call(order("stuck")).await?)?;
    eventually("the delivery to be under way", SOON, || async {
        ensure!(orders.requests() == 1);
        Ok(())
    })
    .await?;
    let begun = Instant::now();
    let ended = mesh.node_mut("a1")?.process.term_and_wait(SOON).await?;
    assert!(ended.success(), "{ended}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    // And nothing is lost by it.
    orders.behave(Behave::Answer(Answer::status(200)));
    orders.count_by("idempotency-key");
    let new = mesh.start_again("a1").await?;
    *mesh.node_mut("a1")? = new;
    emptied(mesh.node("a1")?, SOON).await?;
    // Where its answer comes too late it is sent once more, with the same key.
    assert_eq!(orders.counts().into_keys().collect::<Vec<_>>(), ["stuck"]);
    Ok(())
}
