//! `leeward demo`: a whole mesh on this machine, broken on purpose, and what its users get meanwhile.

mod mesh;
mod summary;
mod traffic;

use crate::output::{Failure, complain, say};
use clap::Args;
use mesh::Mesh;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;
use summary::{Expect, Phase, Summary};
use tokio::signal::unix::{SignalKind, signal};
use traffic::Traffic;

/// How to run the demo.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Print the summary as one JSON object on the last line.
    #[arg(long)]
    json: bool,
    /// Leave the mesh up at the end, until interrupted.
    #[arg(long)]
    keep: bool,
    /// How long each phase lasts, in seconds, 1 to 8.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=8))]
    seconds: u64,
}

/// How often the live line is drawn.
const LIVE: Duration = Duration::from_millis(500);
/// How soon a change of policy must have taken effect everywhere.
const CHANGE_WITHIN: Duration = Duration::from_secs(1);

/// What is done to the mesh at the beginning of a phase.
#[derive(Clone, Copy, Debug)]
enum Act {
    Nothing,
    StopRecommendations,
    StopCatalogOfZoneA,
    KillControlPlane,
    RestoreEverything,
}

/// The phases, with what is promised in each.
const PHASES: [(&str, Act, Expect); 5] = [
    ("steady", Act::Nothing, Expect::AllServed),
    (
        "recommendations stopped",
        Act::StopRecommendations,
        Expect::SomeDegraded,
    ),
    (
        "catalog of zone a stopped",
        Act::StopCatalogOfZoneA,
        Expect::FromZoneB,
    ),
    ("control plane killed", Act::KillControlPlane, Expect::NoneFailed),
    ("restored", Act::RestoreEverything, Expect::ServedAgain),
];

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut stopped = false;
    let mut mesh = Mesh::prepare()?;
    let shown = tokio::select! {
        shown = show(&options, &mut mesh) => shown,
        _ = terminate.recv() => { stopped = true; Ok(None) }
        _ = interrupt.recv() => { stopped = true; Ok(None) }
    };
    let kept = match shown {
        Ok(summary) => {
            if options.keep && !stopped {
                say(&mesh.how_to_reach());
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            }
            match summary {
                Some(summary) if !summary.kept() => {
                    Err(anyhow::anyhow!("the mesh did not keep its promises"))
                }
                Some(_) => Ok(()),
                None => Err(anyhow::anyhow!("interrupted")),
            }
        }
        Err(error) => Err(error),
    };
    mesh.end().await;
    if kept.is_err() && !stopped {
        complain(&format!("leeward: the logs are in {}", mesh.logs().display()));
    } else {
        mesh.tidy();
    }
    Ok(kept?)
}

async fn show(options: &Options, mesh: &mut Mesh) -> anyhow::Result<Option<Summary>> {
    say("starting a control plane, two zones with a proxy each, and the shop in both");
    mesh.start().await?;
    say("every proxy runs the policy; users of both zones come in");
    let traffic = Arc::new(Traffic::new(PHASES.len()));
    let users = traffic.start(mesh.outbound());
    let mut phases = Vec::new();
    for (i, (name, act, expect)) in PHASES.into_iter().enumerate() {
        // First, so that whoever feels the act counts for its phase.
        traffic.enter(i);
        act_on(mesh, act).await?;
        say(&format!("\n{name}"));
        watch(&traffic, i, Duration::from_secs(options.seconds)).await;
        phases.push(Phase {
            name,
            expect,
            counts: traffic.counts(i),
        });
    }
    say("\na route is changed by apply");
    let changed_in = mesh.change_a_route(CHANGE_WITHIN * 5).await?;
    say(&format!(
        "  in effect at both proxies after {} ms",
        changed_in.as_millis()
    ));
    traffic.stop();
    for user in users {
        user.await?;
    }
    // Requests that were under way when a phase ended have ended by now.
    for (i, phase) in phases.iter_mut().enumerate() {
        phase.counts = traffic.counts(i);
    }
    let summary = Summary {
        phases,
        changed_in,
        change_within: CHANGE_WITHIN,
    };
    say(&summary.table());
    if let Some(failure) = traffic.first_failure() {
        say(&format!("the first failure: {failure}"));
    }
    if options.json {
        say(&summary.to_json().to_string());
    }
    Ok(Some(summary))
}

async fn act_on(mesh: &mut Mesh, act: Act) -> anyhow::Result<()> {
    match act {
        Act::Nothing => {}
        Act::StopRecommendations => mesh.kill(&["recommendations-a", "recommendations-b"]).await,
        Act::StopCatalogOfZoneA => mesh.kill(&["catalog-a"]).await,
        Act::KillControlPlane => mesh.kill(&["control"]).await,
        Act::RestoreEverything => mesh.restore().await?,
    }
    Ok(())
}

/// Shows what users get while a phase lasts.
async fn watch(traffic: &Traffic, phase: usize, length: Duration) {
    let terminal = std::io::stdout().is_terminal();
    let end = tokio::time::Instant::now() + length;
    let mut ticks = tokio::time::interval(LIVE);
    ticks.tick().await;
    let mut before = traffic.counts(phase);
    while tokio::time::Instant::now() < end {
        ticks.tick().await;
        let now = traffic.counts(phase);
        let line = summary::live_line(&now, &before);
        if terminal {
            // Drawn over itself.
            let _ = std::io::Write::write_all(&mut std::io::stdout(), format!("\r\x1b[K{line}").as_bytes());
            let _ = std::io::Write::flush(&mut std::io::stdout());
        } else {
            say(&line);
        }
        before = now;
    }
    if terminal {
        say("");
    }
}
