//! `faults`: what a caller sees of one bad endpoint among three, without and with a policy for it.
//!
//! A control plane, a proxy and three backends run as real processes and servers on this machine. Requests come
//! at a fixed rate, whatever becomes of those before, and each is timed from when it was due, so that one that
//! has to wait its turn counts as slow. A mesh is made anew for each row and column.

use anyhow::Context;
use clap::Parser;
use leeward_testkit::policy::{resilience, route, service};
use leeward_testkit::{Answer, Backend, Behave, Client, Mesh, Protocol};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// What a caller sees of one bad endpoint among three, without and with a policy for it.
#[derive(Debug, Parser)]
#[command(name = "faults", version)]
struct Options {
    /// Seconds of load for each row and column, 1 to 600.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Requests a second, 1 to 2000.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=2000))]
    rate: u32,
    /// Write faults.md into this directory, besides printing the table.
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
}

/// A row: what is wrong with one of the three backends.
struct Fault {
    name: &'static str,
    behave: fn() -> Behave,
}

/// A column: the policy.
struct Policy {
    resilience: &'static [&'static str],
    service: &'static [&'static str],
    rule: &'static [&'static str],
}

/// What became of the requests of one row and column.
struct Seen {
    requests: usize,
    served: usize,
    p50: Duration,
    p99: Duration,
}

const FAULTS: [Fault; 6] = [
    Fault {
        name: "none",
        behave: || Behave::Answer(Answer::text("well")),
    },
    Fault {
        name: "answers 503 to 30 % of requests",
        behave: || Behave::failing(0.3, 503, 1),
    },
    Fault {
        name: "takes requests and never answers",
        behave: || Behave::Hang,
    },
    Fault {
        name: "resets the connection at each request",
        behave: || Behave::Reset,
    },
    Fault {
        name: "takes 300 ms",
        behave: || Behave::Late(Duration::from_millis(300), Answer::text("slow")),
    },
    Fault {
        name: "answers 503 for 200 ms, then is well for 200 ms",
        behave: || Behave::flapping(Duration::from_millis(200), 503),
    },
];

const HEAD: &str = "\
| one of three endpoints | without: served | p50 | p99 | with: served | p50 | p99 |
|---|---|---|---|---|---|---|
";

/// A proxy that only proxies: turns, one attempt, one limit of time.
const WITHOUT: Policy = Policy {
    resilience: &[],
    service: &[
        "loadBalancer: {policy: RoundRobin, panicThreshold: 0}",
        "outlierDetection: {maxEjectionPercent: 0}",
    ],
    rule: &["timeouts: {request: 2s}", "retry: {maxAttempts: 1}"],
};

/// What we recommend for requests that may be sent twice. The balancer is the default one.
const WITH: Policy = Policy {
    resilience: &["endpointCircuitBreaker: {minimumCalls: 10, openTime: 2s}"],
    service: &["outlierDetection: {consecutive5xx: 3, baseEjectionTime: 5s, maxEjectionPercent: 34}"],
    rule: &[
        "timeouts: {request: 2s, backendRequest: 500ms}",
        "retry: {retryOn: [5xx, Reset], baseInterval: 5ms, maxInterval: 50ms, hedge: {delay: 50ms}}",
    ],
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut out = std::io::stdout();
    let mut table = HEAD.to_owned();
    out.write_all(HEAD.as_bytes())?;
    for fault in &FAULTS {
        let mut row = format!("| {} |", fault.name);
        for policy in [&WITHOUT, &WITH] {
            let seen = run(fault, policy, &options).await;
            let seen = seen.with_context(|| fault.name)?;
            // A String takes whatever is written to it.
            let _ = write!(
                row,
                " {} % | {} | {} |",
                percent(seen.served, seen.requests),
                millis(seen.p50),
                millis(seen.p99)
            );
        }
        row.push('\n');
        out.write_all(row.as_bytes())?;
        table += &row;
    }
    if let Some(dir) = &options.write {
        let path = dir.join("faults.md");
        std::fs::create_dir_all(dir)?;
        std::fs::write(&path, page(&table, &options))
            .with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

/// The manifests of a column, for these backends.
fn manifests(backends: &[Backend], policy: &Policy) -> String {
    let endpoints: Vec<_> = backends.iter().map(|b| (b.address(), "a", "")).collect();
    let service =
        service("app", &endpoints, policy.service) + &route("app", "app.example", "app", policy.rule);
    if policy.resilience.is_empty() {
        service
    } else {
        resilience("default", policy.resilience) + &service
    }
}

async fn run(fault: &Fault, policy: &Policy, options: &Options) -> anyhow::Result<Seen> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let backends = [
        Backend::start("bad")?,
        Backend::start("one")?,
        Backend::start("two")?,
    ];
    mesh.apply(&manifests(&backends, policy)).await?;
    let client = Arc::new(mesh.workload("a1", Protocol::Http1)?);
    // Connections, and estimates of latency, as a service has them that was well until now.
    load(&client, options.rate, Duration::from_secs(1)).await?;
    if let Some(bad) = backends.first() {
        bad.behave((fault.behave)());
    }
    let length = Duration::from_secs(options.seconds.into());
    let mut ended = load(&client, options.rate, length).await?;
    let served = ended.iter().filter(|(served, _)| *served).count();
    ended.sort_unstable_by_key(|(_, took)| *took);
    let at = |percent: usize| {
        let position = (ended.len() * percent / 100).min(ended.len().saturating_sub(1));
        ended.get(position).map(|(_, took)| *took).context("no request")
    };
    Ok(Seen {
        requests: ended.len(),
        served,
        p50: at(50)?,
        p99: at(99)?,
    })
}

/// Sends requests at a fixed rate; whether each was served, and how long after it was due it had ended.
async fn load(client: &Arc<Client>, rate: u32, length: Duration) -> anyhow::Result<Vec<(bool, Duration)>> {
    let start = Instant::now();
    let pause = Duration::from_secs(1) / rate;
    let mut under_way = JoinSet::new();
    let mut due = start;
    while due < start + length {
        tokio::time::sleep_until(due).await;
        let client = Arc::clone(client);
        under_way.spawn(async move {
            let reply = client.get("app.example", "/").await;
            let served = reply.is_ok_and(|reply| reply.status == 200);
            (served, due.elapsed())
        });
        due += pause;
    }
    let mut ended = Vec::with_capacity(under_way.len());
    while let Some(one) = under_way.join_next().await {
        ended.push(one?);
    }
    Ok(ended)
}

/// With two places, rounded down: a single failure is never rounded away.
fn percent(part: usize, whole: usize) -> String {
    let hundredths = part * 10_000 / whole.max(1);
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

fn millis(length: Duration) -> String {
    format!("{:.1} ms", length.as_secs_f64() * 1000.0)
}

/// The page around the table.
fn page(table: &str, options: &Options) -> String {
    let Options { seconds, rate, .. } = options;
    let build = if cfg!(debug_assertions) {
        "a development build"
    } else {
        "a release build"
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let lines = |policy: &Policy| {
        let mut text = String::new();
        for (what, lines) in [
            ("ResiliencePolicy", policy.resilience),
            ("Service", policy.service),
            ("the Route's rule", policy.rule),
        ] {
            if lines.is_empty() {
                continue;
            }
            text += &format!("# {what}\n");
            for line in lines {
                text += line;
                text.push('\n');
            }
        }
        text
    };
    format!(
        "# One bad endpoint of three\n\n\
         What callers see while one of a service's three endpoints misbehaves: the share of requests that were\n\
         answered with 200, and how long all of them took. The left three columns are of a proxy that only\n\
         proxies, the right three of one with the policy that we recommend for requests that may be sent twice.\n\n\
         {table}\n\
         {rate} GETs a second for {seconds} s, each timed from when it was due, after one second in which all is\n\
         well; a control plane, one proxy, the backends and the load together on a machine with {cores} cores that\n\
         others use too; {build}. Times of a few milliseconds are the machine's more than the proxy's:\n\
         `leeward-bench` measures those. The other two endpoints answer at once.\n\n\
         Without:\n\n```yaml\n{}```\n\nWith:\n\n```yaml\n{}```\n\n\
         The two differ in more than retries: on the left, what the proxy does of itself is turned off, too\n\
         (balancing by latency, ejection, retries after failures to connect). So the difference is that of all of\n\
         it together, not of any one setting. It is one run of each, and the bad endpoint is one of three, whose\n\
         work the other two can do; where all fail, see [simulation.md](simulation.md). Requests that may not be\n\
         sent twice (POST without an `Idempotency-Key`) are neither retried after a failure nor hedged, and were\n\
         not measured.\n\n\
         To run it again: `cargo run --release -p leeward-bench --bin faults -- --write docs`.\n",
        lines(&WITHOUT),
        lines(&WITH),
    )
}
