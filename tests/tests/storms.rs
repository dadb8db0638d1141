//! Retries over many hops, and requests sent twice on purpose: neither may make a storm of a breeze.

use anyhow::ensure;
use leeward_testkit::policy::{resilience, route, service};
use leeward_testkit::{Answer, Backend, Behave, Client, Mesh, Protocol, Relay};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

const IN_TURN: &str = "loadBalancer: {policy: RoundRobin, slowStartWindow: 0s}";
const NONE_OUT: &str = "outlierDetection: {maxEjectionPercent: 0}";
/// Services that call one another; the last of them is the leaf.
const HOPS: usize = 4;
/// Workloads of each.
const EACH: usize = 3;

/// Services in a row, by turns in two zones. Each calls the next through its own node's proxy and hands on the
/// trace; the leaf fails.
struct Chain(Vec<Vec<Backend>>);

/// Where a hop's workloads are: zone and proxy.
fn place(hop: usize) -> (&'static str, &'static str) {
    if hop.is_multiple_of(2) {
        ("b", "b1")
    } else {
        ("a", "a1")
    }
}

impl Chain {
    fn start(mesh: &Mesh) -> anyhow::Result<Self> {
        let mut services = Vec::new();
        for hop in 0..HOPS {
            let via = mesh.node(place(hop).1)?.outbound;
            let mut backends = Vec::new();
            for _ in 0..EACH {
                let backend = Backend::start(&format!("hop{hop}"))?;
                backend.behave(if hop + 1 == HOPS {
                    Behave::Answer(Answer::status(503))
                } else {
                    Behave::Relay(Relay {
                        via,
                        host: format!("hop{}.example", hop + 1),
                        path: "/".to_owned(),
                    })
                });
                backends.push(backend);
            }
            services.push(backends);
        }
        Ok(Self(services))
    }

    fn policy(&self) -> String {
        let retry = ["retry: {maxAttempts: 3, retryOn: [5xx, Reset], baseInterval: 1ms, maxInterval: 2ms}"];
        let mut text = String::new();
        for (hop, backends) in self.0.iter().enumerate() {
            let name = format!("hop{hop}");
            let (zone, proxy) = place(hop);
            let endpoints: Vec<_> = backends.iter().map(|b| (b.address(), zone, proxy)).collect();
            text += &service(&name, &endpoints, &[IN_TURN, NONE_OUT]);
            text += &route(&name, &format!("{name}.example"), &name, &retry);
        }
        text
    }

    /// Requests that the leaf has got.
    fn leaf(&self) -> u64 {
        self.0.last().into_iter().flatten().map(Backend::requests).sum()
    }
}

/// Sends as many requests to the first hop, from a few clients at once.
async fn send(outbound: SocketAddr, requests: u64) -> anyhow::Result<()> {
    const CLIENTS: u64 = 4;
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(async move {
            let client = Client::new(outbound, Protocol::Http1);
            for _ in 0..requests / CLIENTS {
                let reply = client.get("hop0.example", "/").await?;
                ensure!(reply.status == 503, "{reply:?}");
            }
            Ok(())
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leaf_that_fails_gets_hardly_more_than_it_is_asked_over_four_hops() -> anyhow::Result<()> {
    const REQUESTS: u64 = 400;
    let budget = "retryBudget: {percent: 20, window: 10s, minPerSecond: 0}";
    let open_budget = "retryBudget: {percent: 100, window: 10s, minPerSecond: 1000000}";
    let breaker = "circuitBreaker: {minimumCalls: 20, openTime: 1s}";
    // What the leaf may get for each request. Without a breaker each of four hops adds its fifth to what the one
    // before made of it, at most. With the marker alone each of them adds its own two retries, which are not
    // tried again behind it: a sum, where it would be a product.
    let cases: [(&str, &[&str], f64); 3] = [
        ("budget and breaker", &[budget, breaker], 1.2),
        ("budget", &[budget], 1.2f64.powi(4)),
        ("marker", &[open_budget], 9.0),
    ];
    let mut factors = Vec::new();
    for (name, spec, most) in cases {
        // A mesh of its own, so that nothing is left of the case before.
        let mesh = Mesh::two_zones().await?;
        let outbound = mesh.node("a1")?.outbound;
        let chain = Chain::start(&mesh)?;
        mesh.apply(&(resilience("default", spec) + &chain.policy()))
            .await?;
        send(outbound, REQUESTS).await?;
        let factor = chain.leaf() as f64 / REQUESTS as f64;
        println!("{name}: {factor:.2} requests at the leaf for each");
        factors.push((name, factor, most));
    }
    println!(
        "without any of these each hop tries three times: {} requests at the leaf for each",
        3u32.pow(4)
    );
    for (name, factor, most) in &factors {
        assert!(factor <= most, "{name}: {factor} of at most {most}; {factors:?}");
    }
    assert!(factors.iter().all(|(_, factor, _)| *factor > 0.0), "{factors:?}");
    Ok(())
}

/// Three backends, of which one takes half a second.
struct Trio {
    mesh: Mesh,
    slow: Backend,
    _fast: [Backend; 2],
}

impl Trio {
    async fn start(balance: &str, hedge_budget: &str) -> anyhow::Result<Self> {
        let mesh = Mesh::builder().node("a", "a1").start().await?;
        let (slow, fast) = (
            Backend::start("slow")?,
            [Backend::start("one")?, Backend::start("two")?],
        );
        slow.behave(Behave::Late(Duration::from_millis(500), Answer::text("slow")));
        let endpoints: Vec<_> = [&slow, &fast[0], &fast[1]]
            .iter()
            .map(|b| (b.address(), "a", ""))
            .collect();
        let hedge = ["retry: {hedge: {delay: 50ms}}"];
        let policy = resilience("default", &[&format!("hedgeBudget: {{{hedge_budget}}}")])
            + &service("app", &endpoints, &[balance, NONE_OUT])
            + &route("app", "app.example", "app", &hedge);
        mesh.apply(&policy).await?;
        Ok(Self {
            mesh,
            slow,
            _fast: fast,
        })
    }

    /// Latencies of so many requests, the shortest first.
    async fn latencies(&self, requests: usize) -> anyhow::Result<Vec<Duration>> {
        const CLIENTS: usize = 6;
        let outbound = self.mesh.node("a1")?.outbound;
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(async move {
                let client = Client::new(outbound, Protocol::Http1);
                let mut took = Vec::new();
                for _ in 0..requests / CLIENTS {
                    let begun = Instant::now();
                    let reply = client.get("app.example", "/").await?;
                    ensure!(reply.status == 200, "{reply:?}");
                    took.push(begun.elapsed());
                }
                Ok(took)
            });
        }
        let mut all = Vec::new();
        while let Some(took) = clients.join_next().await {
            all.extend(took??);
        }
        all.sort_unstable();
        Ok(all)
    }

    async fn hedges(&self) -> anyhow::Result<f64> {
        let node = self.mesh.node("a1")?;
        node.metric("leeward_retries_total", &["kind=\"hedge\""]).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_request_hides_a_slow_endpoint() -> anyhow::Result<()> {
    let trio = Trio::start(IN_TURN, "percent: 50, minPerSecond: 5").await?;
    let took = trio.latencies(600).await?;
    let p99 = took[took.len() * 99 / 100];
    let hedges = trio.hedges().await?;
    println!("p50 {:?}, p99 {p99:?}, {hedges} hedges", took[took.len() / 2]);
    assert!(p99 < Duration::from_millis(300), "{p99:?}");
    // The slow one was asked as often as its turn came, and nothing but it needed a second request.
    assert!(trio.slow.requests() > 100, "{}", trio.slow.requests());
    assert!(hedges > 100.0 && hedges <= 300.0, "{hedges}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_requests_stay_within_their_budget() -> anyhow::Result<()> {
    let trio = Trio::start(IN_TURN, "percent: 5, minPerSecond: 0").await?;
    let took = trio.latencies(120).await?;
    let hedges = trio.hedges().await?;
    assert!((1.0..=6.0).contains(&hedges), "{hedges} hedges of 120 requests");
    let slow = took
        .iter()
        .filter(|took| **took >= Duration::from_millis(450))
        .count();
    assert!(slow >= 25, "the others wait for the slow one: {slow}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_outrun_is_known_to_be_slow() -> anyhow::Result<()> {
    const REQUESTS: usize = 300;
    let by_latency = "loadBalancer: {policy: PeakEwma, slowStartWindow: 0s}";
    let trio = Trio::start(by_latency, "percent: 100, minPerSecond: 100").await?;
    let took = trio.latencies(REQUESTS).await?;
    assert!(
        took.iter().all(|took| *took < Duration::from_millis(450)),
        "{took:?}"
    );
    // Nobody waits for its answers, but that they didn't come in time is known.
    let slow = trio.slow.requests();
    assert!(slow > 0 && slow < 30, "it was asked {slow} times of {REQUESTS}");
    Ok(())
}
