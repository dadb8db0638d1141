//! `leeward plugin bench`: what a call of a module costs, in the host that proxies have.

use super::cases::{self, Case};
use super::check::{duration, outcome_of, size};
use super::local;
use super::project::{self, Target};
use super::rig::{Plugged, Rig, kind_of, now};
use super::run::once;
use super::test::Format;
use crate::output::{Failure, say, table};
use clap::Args;
use leeward_policy::model::PluginKind;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// Which module, and how long.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// A module (.wasm), or a project's directory.
    #[arg(default_value = ".", value_name = "MODULE|DIR")]
    target: PathBuf,
    /// The cases; cases.yaml beside the module or in the project if not given.
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,
    /// How long each case is measured.
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// A new instance for every call, as freshInstance has it.
    #[arg(long)]
    fresh: bool,
    /// How to show it.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

/// Calls of a case that are measured.
const MAX_CALLS: usize = 1_000_000;
/// Calls before that, for caches and for the guest's own beginnings.
const WARM_UP: usize = 20;
/// Calls with a new instance each that tell what an instance costs.
const INSTANCES: usize = 200;

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.01..=3600.0).contains(s));
    seconds.ok_or_else(|| "want seconds, from 0.01 to 3600".to_owned())
}

/// What a case cost.
struct Measured {
    name: String,
    outcome: String,
    per_second: f64,
    cpu: Costs,
    instance: Option<Duration>,
    memory: u64,
}

/// CPU time of calls.
struct Costs {
    mean: Duration,
    median: Duration,
    p99: Duration,
}

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let target = project::target(&options.target, options.cases.as_deref())?;
    let (measured, compiled) = local(measure(&target, &options)).await?;
    match options.output {
        Format::Text => say(&text(&measured, compiled)),
        Format::Json => say(&format!("{:#}", as_json(&target, &measured, compiled))),
    }
    Ok(())
}

async fn measure(
    target: &Target,
    options: &Options,
) -> Result<(Vec<Measured>, Option<(Duration, bool)>), Failure> {
    let module = project::module(&target.module)?;
    let kind = kind_of(&module);
    let cases = cases::read(&target.cases, kind)?;
    let rig = Rig::new(&target.module, kind)?;
    let mut measured = Vec::with_capacity(cases.len());
    let mut compiled = None;
    for case in &cases {
        let plugged = rig.plug(case, options.fresh).await?;
        compiled = compiled.or_else(|| rig.compiled(&plugged));
        // It shares the code of the one before.
        rig.keep_only(&plugged);
        measured.push(Box::pin(one(&rig, case, &plugged, options)).await?);
    }
    Ok((measured, compiled))
}

async fn one(rig: &Rig, case: &Case, plugged: &Plugged, options: &Options) -> Result<Measured, Failure> {
    let mut end = once(rig, plugged, case).await;
    for _ in 1..WARM_UP {
        end = once(rig, plugged, case).await;
    }
    let until = now() + Duration::from_secs_f64(options.seconds);
    let began = now();
    let mut samples = Vec::new();
    while samples.len() < MAX_CALLS && (samples.is_empty() || now() < until) {
        samples.push(cpu_of(rig, plugged, case).await);
    }
    let took = now() - began;
    #[expect(clippy::cast_precision_loss, reason = "at most a million")]
    let calls = samples.len() as f64;
    let cpu = Costs::of(samples);
    // A machine of proxy-wasm is one for all calls.
    let instance = if options.fresh || rig.kind == PluginKind::ProxyWasm {
        None
    } else {
        let plugged = rig.plug(case, true).await?;
        let mut fresh = Vec::with_capacity(INSTANCES);
        for _ in 0..INSTANCES {
            fresh.push(cpu_of(rig, &plugged, case).await);
        }
        Some(Costs::of(fresh).median.saturating_sub(cpu.median))
    };
    Ok(Measured {
        name: case.name.clone(),
        outcome: outcome_of(&end),
        per_second: calls / took.as_secs_f64(),
        cpu,
        instance,
        memory: rig.memory(plugged),
    })
}

/// The CPU time that one call takes of this thread, which is all that runs it.
async fn cpu_of(rig: &Rig, plugged: &Plugged, case: &Case) -> Duration {
    let before = thread_time();
    once(rig, plugged, case).await;
    thread_time().saturating_sub(before)
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), nanos)
}

impl Costs {
    fn of(mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        let at = |share: usize| {
            let place = samples.len() * share / 100;
            samples
                .get(place.min(samples.len().saturating_sub(1)))
                .copied()
                .unwrap_or_default()
        };
        let count = u32::try_from(samples.len()).unwrap_or(u32::MAX).max(1);
        Self {
            mean: samples.iter().sum::<Duration>() / count,
            median: at(50),
            p99: at(99),
        }
    }
}

fn text(measured: &[Measured], compiled: Option<(Duration, bool)>) -> String {
    let rows: Vec<[String; 8]> = measured
        .iter()
        .map(|case| {
            [
                case.name.clone(),
                case.outcome.clone(),
                format!("{:.0}", case.per_second),
                duration(case.cpu.mean),
                duration(case.cpu.median),
                duration(case.cpu.p99),
                case.instance.map_or_else(|| "-".to_owned(), duration),
                size(case.memory),
            ]
        })
        .collect();
    let head = [
        "CASE", "OUTCOME", "CALLS/S", "CPU MEAN", "CPU P50", "CPU P99", "INSTANCE", "MEMORY",
    ];
    let mut text = table(head, &rows);
    if let Some((took, cached)) = compiled {
        let how = if cached {
            "taken from the cache"
        } else {
            "compiled"
        };
        text.push_str(&format!("\n{how} in {}", duration(took)));
    }
    if cfg!(debug_assertions) {
        text.push_str("\nthis leeward is a debug build: its host is slower than a proxy's");
    }
    text
}

fn as_json(target: &Target, measured: &[Measured], compiled: Option<(Duration, bool)>) -> Value {
    let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
    let cases = measured.iter().map(|case| {
        json!({
            "name": case.name,
            "outcome": case.outcome,
            "calls_per_second": case.per_second,
            "cpu_mean_us": micros(case.cpu.mean),
            "cpu_p50_us": micros(case.cpu.median),
            "cpu_p99_us": micros(case.cpu.p99),
            "instance_us": case.instance.map(micros),
            "memory_bytes": case.memory,
        })
    });
    json!({
        "module": target.module.display().to_string(),
        "compile_seconds": compiled.map(|(took, _)| took.as_secs_f64()),
        "compiled_before": compiled.map(|(_, cached)| cached),
        "cases": cases.collect::<Vec<_>>(),
    })
}
