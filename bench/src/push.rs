//! What it costs a control plane to keep thousands of proxies up to date: a real one, and simulated proxies that speak the
//! real protocol, each with a certificate of its own.

mod apply;
mod beside;
mod control;
mod report;

use crate::measure::now;
use anyhow::{Context, ensure};
use clap::Args;
use control::{Control, DOMAIN, Place};
use leeward_identity::authority::Authority;
use leeward_testkit::{Fleet, TempDir, World};
use report::{Report, mebibytes, percentile};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How large the mesh is, and what is measured of it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Simulated proxies.
    #[arg(long, default_value_t = 10_000)]
    proxies: u32,
    /// Services.
    #[arg(long, default_value_t = 5_000)]
    services: u32,
    /// Endpoints of all services together.
    #[arg(long, default_value_t = 50_000)]
    endpoints: u32,
    /// Routes.
    #[arg(long, default_value_t = 5_000)]
    routes: u32,
    /// How often one route is changed, in each world.
    #[arg(long, default_value_t = 10)]
    changes: u32,
    /// How many proxies come at once that have nothing and need everything.
    #[arg(long, default_value_t = 200)]
    cold: u32,
    /// Seconds over which a control plane at rest is watched: a multiple of 10, in which each proxy is heard once.
    #[arg(long, default_value_t = 20, value_parser = beats)]
    rest: u32,
    /// Routes of the proxy that is measured beside Envoy; 0 leaves that out.
    #[arg(long, default_value_t = 10_000)]
    proxy_routes: u32,
    /// The leeward-proxy for that; the one beside this program if not given.
    #[arg(long, value_name = "FILE")]
    proxy: Option<PathBuf>,
    /// Only a part: apply (what a proxy does), small, large (both with simulated proxies), beside (Envoy).
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
    /// Write what was measured into this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The leeward-control to measure; the one beside this program if not given.
    #[arg(long, value_name = "FILE")]
    control: Option<PathBuf>,
}

/// How often each proxy says that it is there. They do so when they have connected, and that may be all at once, so that only
/// spans of so many seconds can be compared.
const BEAT: u32 = 10;

fn beats(text: &str) -> Result<u32, String> {
    let seconds: Option<u32> = text.parse().ok();
    seconds
        .filter(|seconds| *seconds > 0 && seconds.is_multiple_of(BEAT))
        .ok_or_else(|| format!("want a multiple of {BEAT}"))
}

/// A part of what is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Part {
    Apply,
    Small,
    Large,
    Beside,
}

impl Options {
    fn world(&self) -> World {
        World {
            zones: ZONES,
            services: self.services,
            endpoints: self.endpoints,
            routes: self.routes,
        }
    }

    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Zones that everything is spread over.
const ZONES: u32 = 10;
/// The small world, beside which the large one should cost no more for a change.
const SMALL: World = World {
    zones: ZONES,
    services: 10,
    endpoints: 100,
    routes: 10,
};
/// The first step of memory.
const SOME: usize = 1_000;
/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(600);
/// How long after all are connected memory is read, and how long a change rests before the next.
const PAUSE: Duration = Duration::from_millis(500);
/// What is looked at to tell whether a control plane is calm again.
const WINDOW: Duration = Duration::from_secs(1);
/// It is as long as it uses no more than this many times what it uses at rest, and a bit.
const CALM: (f64, f64) = (1.5, 0.03);

/// What is changed on a control plane, and what it takes.
struct Changes {
    /// When the n-th part of the proxies had acknowledged it, in milliseconds after the call began: a list for each change.
    acked: Vec<Vec<f64>>,
    /// When the control plane knew of all, likewise.
    known: Vec<f64>,
    /// When the call came back.
    applied: Vec<f64>,
    /// Of one change for one proxy.
    update_bytes: f64,
    wire_bytes: f64,
    cpu_us: f64,
}

/// Measures all of it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(options))
}

/// A program that was named, or the one of this name beside this one.
fn program(named: Option<&PathBuf>, name: &str) -> anyhow::Result<PathBuf> {
    let program = match named {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name(name),
    };
    ensure!(
        program.exists(),
        "{} is not there: build it first",
        program.display()
    );
    Ok(program)
}

async fn measure(options: &Options) -> anyhow::Result<()> {
    let program = program(options.control.as_ref(), "leeward-control")?;
    raise_file_limit(u64::from(options.proxies) + 1_000)?;
    let dir = TempDir::new()?;
    let authority = Arc::new(Authority::create(&dir.path().join("ca"), DOMAIN)?);
    let mut out = std::io::stdout();
    writeln!(out, "{} ({})", program.display(), build(&program))?;
    let place = Place {
        program: &program,
        dir: dir.path(),
        authority: &authority,
    };
    let mut report = Report::default();
    if options.wants(Part::Apply) {
        apply(options, &mut report)?;
    }
    if options.wants(Part::Small) || options.wants(Part::Large) {
        let began = now();
        let mut fleet = Fleet::new(Arc::clone(&authority), ZONES, options.proxies).await?;
        writeln!(
            out,
            "\n{} simulated proxies with a certificate each, made in {:.1} s",
            fleet.len(),
            began.elapsed().as_secs_f64()
        )?;
        if options.wants(Part::Small) {
            small(options, &place, &mut fleet, &mut report).await?;
        }
        if options.wants(Part::Large) {
            large(options, &place, &mut fleet, &mut report).await?;
        }
    }
    if options.wants(Part::Beside) && options.proxy_routes > 0 {
        beside(options, &place, &mut report).await?;
    }
    if let Some(file) = &options.json {
        report
            .write_json(file)
            .with_context(|| format!("can't write {}", file.display()))?;
    }
    Ok(())
}

/// What a change costs each proxy.
fn apply(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let world = options.world();
    report.section(&title("What a proxy does with policy, on one thread", &world, 1))?;
    apply::measure(&world, options.changes.max(1), report)
}

/// One proxy beside Envoy.
async fn beside(options: &Options, place: &Place<'_>, report: &mut Report) -> anyhow::Result<()> {
    let program = program(options.proxy.as_ref(), "leeward-proxy")?;
    let world = World {
        routes: options.proxy_routes,
        ..options.world()
    };
    report.section(&title("A proxy beside Envoy", &world, 1))?;
    report.note(&format!("{} ({})", program.display(), build(&program)))?;
    beside::measure(place, &program, &world, options.changes.max(1), report).await
}

/// Everybody comes with nothing to a world that is small, and sees one route change.
async fn small(
    options: &Options,
    place: &Place<'_>,
    fleet: &mut Fleet,
    report: &mut Report,
) -> anyhow::Result<()> {
    let all = 0..fleet.len();
    report.section(&title("A small world", &SMALL, fleet.len()))?;
    let mut control = Control::start(place, "small").await?;
    let revision = control.apply(SMALL.resources()).await?;
    let (began, cpu) = (now(), control.cpu()?);
    fleet.connect(control.address(), all.clone());
    fleet
        .reached(all.clone(), (revision, began.into()), LIMIT)
        .await?;
    report.row(
        "all connected at once, with nothing: all acked after",
        seconds(began),
        "s",
    )?;
    let spent = (control.cpu()? - cpu).as_secs_f64() * 1e6 / fleet.len() as f64;
    report.row("control plane's CPU for a proxy that connects", spent, "us")?;
    let changes = change(options, &mut control, fleet, SMALL).await?;
    changes.tell(report)?;
    fleet.stop(all);
    Ok(())
}

async fn large(
    options: &Options,
    place: &Place<'_>,
    fleet: &mut Fleet,
    report: &mut Report,
) -> anyhow::Result<()> {
    let all = 0..fleet.len();
    let world = options.world();
    report.section(&title("The large world", &world, fleet.len()))?;
    let mut control = Control::start(place, "large").await?;
    report.row(
        "memory of an empty control plane",
        mebibytes(control.resident()?),
        "MiB",
    )?;
    let began = now();
    let revision = control.apply(world.resources()).await?;
    report.row(
        "the whole world applied, checked and on disk after",
        seconds(began),
        "s",
    )?;
    // One that has nothing tells which store it is.
    fleet.adopt(all.clone(), "", 0);
    fleet.connect(control.address(), 0..1);
    fleet.reached(0..1, (revision, began.into()), LIMIT).await?;
    let whole = fleet.tallied(0..1).first().map_or(0, |one| one.update_bytes);
    report.row("the whole world as updates, about", mebibytes(whole), "MiB")?;
    let (store_id, generation) = fleet.has(0).context("there are no proxies")?;
    fleet.stop(0..1);
    fleet.adopt(all.clone(), &store_id, generation);

    report.section("Memory of the control plane, the proxies having the world already")?;
    tokio::time::sleep(PAUSE).await;
    let none = control.resident()?;
    report.row("no proxies", mebibytes(none), "MiB")?;
    for part in [SOME, fleet.len()] {
        let part = part.min(fleet.len());
        let began = now();
        fleet.connect(control.address(), 0..part);
        fleet.reached(0..part, (generation, began.into()), LIMIT).await?;
        tokio::time::sleep(PAUSE).await;
        let some = control.resident()?;
        report.row(format!("{part} proxies"), mebibytes(some), "MiB")?;
        let each = some.saturating_sub(none) as f64 / 1024.0 / part as f64;
        report.row("for each proxy", each, "KiB")?;
    }

    report.section("One route changed in the large world")?;
    let changes = change(options, &mut control, fleet, world).await?;
    changes.tell(report)?;
    report.row("memory after that", mebibytes(control.resident()?), "MiB")?;

    report.section("Everything as it was before these changes")?;
    let began = now();
    let revision = control.roll_back(generation).await?;
    report.row("rolled back: on disk after", seconds(began) * 1e3, "ms")?;
    let acked = fleet
        .reached(all.clone(), (revision, began.into()), LIMIT)
        .await?;
    report.goal(
        "99 % acked after",
        percentile(&since(began, &acked), 0.99),
        "ms",
        5_000.0,
    )?;

    let rest = rest(options, &mut control, report).await?;
    let generation = fleet.has(0).map_or(0, |(_, generation)| generation);
    report.section("All reconnect at once, with what they have")?;
    for (what, killed) in [("kill -9 and restart", true), ("every connection cut", false)] {
        let fulls = total(fleet, |one| u64::from(one.fulls));
        let tries = total(fleet, |one| u64::from(one.tries));
        let (began, before) = (now(), if killed { Duration::ZERO } else { control.cpu()? });
        if killed {
            control.restart().await?;
            report.row("the control plane listens again after", seconds(began), "s")?;
        } else {
            fleet.cut();
        }
        let acked = fleet
            .reached(all.clone(), (generation, began.into()), LIMIT)
            .await?;
        let after = since(began, &acked);
        report.row(
            format!("{what}: half of the proxies acked after"),
            percentile(&after, 0.5) / 1e3,
            "s",
        )?;
        report.row(
            format!("{what}: 99 % acked after"),
            percentile(&after, 0.99) / 1e3,
            "s",
        )?;
        report.goal(
            format!("{what}: all acked after"),
            percentile(&after, 1.0) / 1e3,
            "s",
            30.0,
        )?;
        let tries = total(fleet, |one| u64::from(one.tries)) - tries;
        report.row(
            format!("{what}: tries of each"),
            tries as f64 / fleet.len() as f64,
            "",
        )?;
        let spent = (control.cpu()? - before).as_secs_f64();
        report.row(format!("{what}: the control plane's CPU until then"), spent, "s")?;
        calm(&control, rest).await?;
        report.goal(format!("{what}: calm again after"), seconds(began), "s", 30.0)?;
        let fulls = total(fleet, |one| u64::from(one.fulls)) - fulls;
        report.row(format!("{what}: full pushes"), fulls as f64, "")?;
        report.row(format!("{what}: most memory"), mebibytes(control.peak()?), "MiB")?;
    }

    let cold = usize::try_from(options.cold)?.min(fleet.len());
    report.section(&format!(
        "{cold} proxies come at once that have nothing, beside the others"
    ))?;
    fleet.stop(0..cold);
    tokio::time::sleep(PAUSE).await;
    fleet.adopt(0..cold, "", 0);
    control.peak()?;
    let (began, before) = (now(), control.cpu()?);
    fleet.connect(control.address(), 0..cold);
    let acked = fleet.reached(0..cold, (generation, began.into()), LIMIT).await?;
    let after = since(began, &acked);
    report.row("all have everything after", percentile(&after, 1.0) / 1e3, "s")?;
    let spent = (control.cpu()? - before).as_secs_f64() * 1e3 / cold as f64;
    report.row("control plane's CPU for each", spent, "ms")?;
    report.row("most memory meanwhile", mebibytes(control.peak()?), "MiB")?;
    fleet.stop(all);
    Ok(())
}

/// How often status is asked for to see what once costs.
const ASKED: u32 = 200;

/// What a control plane uses that nobody asks for anything, and what asking costs. Returns the first, as a share of a core.
async fn rest(options: &Options, control: &mut Control, report: &mut Report) -> anyhow::Result<f64> {
    report.section("At rest, and asked for its status")?;
    let span = Duration::from_secs(u64::from(options.rest));
    calm(control, 0.0).await?;
    let (began, before) = (now(), control.cpu()?);
    tokio::time::sleep(span).await;
    let rest = (control.cpu()? - before).as_secs_f64() / seconds(began);
    report.row("at rest, of one core", rest * 100.0, "%")?;
    let mut size = (0, 0);
    for what in ["the watermark (/metrics)", "ListProxies"] {
        // One after the other: what once a second costs is less than what the rest varies by.
        let (began, before) = (now(), control.cpu()?);
        for _ in 0..ASKED {
            if what == "ListProxies" {
                size = control.proxies().await?;
            } else {
                control.standing().await?;
            }
        }
        let spent = (control.cpu()? - before).as_secs_f64() - rest * seconds(began);
        let each = spent.max(0.0) / f64::from(ASKED);
        report.row(format!("{what}: CPU for each"), each * 1e3, "ms")?;
        report.goal(
            format!("{what} once a second: of one core"),
            each * 100.0,
            "%",
            1.0,
        )?;
    }
    report.row("ListProxies: proxies in the answer", size.0 as f64, "")?;
    report.row("ListProxies: the answer", mebibytes(size.1 as u64), "MiB")?;
    Ok(rest)
}

/// Changes one route, again and again, and waits each time until all have it.
async fn change(
    options: &Options,
    control: &mut Control,
    fleet: &Fleet,
    world: World,
) -> anyhow::Result<Changes> {
    let all = 0..fleet.len();
    let bytes = |fleet: &Fleet| {
        (
            total(fleet, |one| one.update_bytes),
            total(fleet, |one| one.wire_bytes),
        )
    };
    calm(control, 0.0).await?;
    // What goes on all the time is not what a change costs.
    let (began, cpu) = (now(), control.cpu()?);
    tokio::time::sleep(Duration::from_secs(u64::from(BEAT))).await;
    let idle = (control.cpu()? - cpu).as_secs_f64() / seconds(began);
    let mut changes = Changes {
        acked: Vec::new(),
        known: Vec::new(),
        applied: Vec::new(),
        update_bytes: 0.0,
        wire_bytes: 0.0,
        cpu_us: 0.0,
    };
    let (mut updates, mut wire, mut spent) = (0, 0, 0.0);
    for i in 0..options.changes {
        let (before, cpu, began) = (bytes(fleet), control.cpu()?, now());
        let route = world.route(0, Duration::from_millis(20_000 + u64::from(i)));
        let revision = control.apply(vec![route]).await?;
        changes.applied.push(seconds(began) * 1e3);
        let acked = fleet
            .reached(all.clone(), (revision, began.into()), LIMIT)
            .await?;
        changes.acked.push(since(began, &acked));
        control.knows(fleet.len(), revision, LIMIT).await?;
        changes.known.push(seconds(began) * 1e3);
        let after = bytes(fleet);
        (updates, wire) = (updates + after.0 - before.0, wire + after.1 - before.1);
        tokio::time::sleep(PAUSE).await;
        spent += (control.cpu()? - cpu).as_secs_f64() - idle * seconds(began);
    }
    let each = f64::from(options.changes) * fleet.len() as f64;
    changes.update_bytes = updates as f64 / each;
    changes.wire_bytes = wire as f64 / each;
    changes.cpu_us = spent * 1e6 / each;
    Ok(changes)
}

impl Changes {
    fn tell(&self, report: &mut Report) -> anyhow::Result<()> {
        let median = |values: &[f64]| {
            let mut sorted = values.to_vec();
            sorted.sort_by(f64::total_cmp);
            percentile(&sorted, 0.5)
        };
        let at = |share| {
            self.acked
                .iter()
                .map(|acked| percentile(acked, share))
                .collect::<Vec<_>>()
        };
        let worst = at(0.99).into_iter().fold(0.0, f64::max);
        report.row(
            "one route changed: on disk after (median)",
            median(&self.applied),
            "ms",
        )?;
        report.row("50 % acked after (median)", median(&at(0.5)), "ms")?;
        report.goal("99 % acked after (median)", median(&at(0.99)), "ms", 2_000.0)?;
        report.goal("99 % acked after (worst)", worst, "ms", 2_000.0)?;
        report.row("100 % acked after (median)", median(&at(1.0)), "ms")?;
        report.row(
            "the control plane knows of 100 % after (median)",
            median(&self.known),
            "ms",
        )?;
        report.row("update for one proxy", self.update_bytes, "bytes")?;
        report.row(
            "on the wire to one proxy, heartbeats included",
            self.wire_bytes,
            "bytes",
        )?;
        report.row("control plane's CPU for one proxy and change", self.cpu_us, "us")
    }
}

/// Waits until a control plane uses about as much CPU as at rest; where that is not known, until it uses no less any more.
async fn calm(control: &Control, rest: f64) -> anyhow::Result<()> {
    let until = now() + LIMIT;
    let mut last = f64::MAX;
    while now() < until {
        let (began, before) = (now(), control.cpu()?);
        tokio::time::sleep(WINDOW).await;
        let used = (control.cpu()? - before).as_secs_f64() / seconds(began);
        let bound = if rest > 0.0 { rest } else { last };
        if used <= bound * CALM.0 + CALM.1 && last < f64::MAX {
            return Ok(());
        }
        last = used;
    }
    anyhow::bail!("the control plane is not calm after {LIMIT:?}")
}

fn total(fleet: &Fleet, of: impl Fn(&leeward_testkit::Tallied) -> u64) -> u64 {
    fleet.tallied(0..fleet.len()).iter().map(of).sum()
}

/// Sorted times in milliseconds after a beginning.
fn since(began: std::time::Instant, times: &[tokio::time::Instant]) -> Vec<f64> {
    let after = |time: &tokio::time::Instant| time.into_std().saturating_duration_since(began);
    times.iter().map(|time| after(time).as_secs_f64() * 1e3).collect()
}

fn seconds(began: std::time::Instant) -> f64 {
    began.elapsed().as_secs_f64()
}

fn title(what: &str, world: &World, proxies: usize) -> String {
    let World {
        services,
        endpoints,
        routes,
        ..
    } = world;
    format!("{what}: {services} services, {endpoints} endpoints, {routes} routes, {proxies} proxies")
}

/// By the directory that cargo puts it into.
fn build(program: &Path) -> &'static str {
    let is = |profile: &str| program.parent().is_some_and(|dir| dir.ends_with(profile));
    match (is("release"), is("debug")) {
        (true, _) => "release build",
        (_, true) => "debug build: figures are far above those of a release",
        _ => "build unknown",
    }
}

/// Each simulated proxy has a connection, and who may can raise the hard limit as well.
fn raise_file_limit(files: u64) -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= files) {
        return Ok(());
    }
    let raised = Rlimit {
        current: Some(files),
        maximum: limit.maximum.map(|maximum| maximum.max(files)),
    };
    setrlimit(Resource::Nofile, raised)
        .with_context(|| format!("{files} open files are needed; raise the limit with ulimit -n"))
}
