//! `leeward demo`: a whole mesh on this machine, broken on purpose, and what its users get meanwhile.

mod mesh;
mod operate;
mod summary;
mod traffic;

use crate::output::{Failure, complain, say};
use clap::Args;
use mesh::Mesh;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;
use summary::{Count, Expect, Phase, Summary};
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
    /// How long each phase lasts, in seconds, 1 to 8; from the sixth on, half as long.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=8))]
    seconds: u64,
}

/// How often the live line is drawn.
const LIVE: Duration = Duration::from_millis(500);
/// How soon a change of policy must have taken effect everywhere.
const CHANGE_WITHIN: Duration = Duration::from_secs(1);
/// How soon what was queued must have been delivered once its service is back.
const DELIVER_WITHIN: Duration = Duration::from_secs(10);
/// Phases of whole length; the others show what takes no time to come.
const LONG: usize = 5;

/// What is done to the mesh at the beginning of a phase.
#[derive(Clone, Copy, Debug)]
enum Act {
    Nothing,
    StopRecommendations,
    StopCatalogOfZoneA,
    KillControlPlane,
    RestoreEverything,
    SwitchRecommendationsOff,
    StopPayment,
    RestorePayment,
    StopCatalog,
    HoldTheCore,
    LetGo,
}

/// The phases, with what is promised in each.
const PHASES: [(&str, Act, Expect); 11] = [
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
    (
        "recommendations switched off",
        Act::SwitchRecommendationsOff,
        Expect::DegradedBy("recommendations"),
    ),
    ("payment stopped", Act::StopPayment, Expect::DegradedBy("payment")),
    ("payment back", Act::RestorePayment, Expect::ServedAgain),
    (
        "catalog stopped in both zones",
        Act::StopCatalog,
        Expect::DegradedBy("catalog"),
    ),
    ("held at core-only", Act::HoldTheCore, Expect::OrdersOnly),
    ("back to normal", Act::LetGo, Expect::ServedAgain),
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
        let before = look(mesh, act).await?;
        say(&format!("\n{name}"));
        let whole = Duration::from_secs(options.seconds);
        watch(&traffic, i, if i < LONG { whole } else { whole / 2 }).await;
        phases.push(Phase {
            name,
            expect,
            counts: traffic.counts(i),
            counted: count(mesh, act, before).await?,
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
    let orders = orders(mesh, &phases).await?;
    let summary = Summary {
        phases,
        orders,
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
        Act::RestoreEverything | Act::RestorePayment => mesh.restore().await?,
        Act::SwitchRecommendationsOff => mesh.switch("recommendations", "off").await?,
        Act::StopPayment => {
            mesh.switch("recommendations", "on").await?;
            mesh.kill(&["payment-a"]).await;
        }
        Act::StopCatalog => mesh.kill(&["catalog-a", "catalog-b"]).await,
        Act::HoldTheCore => {
            mesh.restore().await?;
            mesh.degrade("core-only").await?;
        }
        Act::LetGo => mesh.degrade("auto").await?,
    }
    Ok(())
}

/// What is counted as a phase begins, for [`count`].
async fn look(mesh: &Mesh, act: Act) -> anyhow::Result<u64> {
    if matches!(act, Act::SwitchRecommendationsOff) {
        return mesh.calls_of_recommendations().await;
    }
    Ok(0)
}

/// What is counted as a phase ends.
async fn count(mesh: &Mesh, act: Act, before: u64) -> anyhow::Result<Option<Count>> {
    Ok(match act {
        Act::SwitchRecommendationsOff => Some(Count {
            what: "calls of recommendations while they were off",
            value: mesh.calls_of_recommendations().await? - before,
            want: 0,
        }),
        Act::RestorePayment => Some(Count {
            what: "orders that still wait once payment is back",
            value: mesh.deliver(DELIVER_WITHIN).await?,
            want: 0,
        }),
        Act::Nothing
        | Act::StopRecommendations
        | Act::StopCatalogOfZoneA
        | Act::KillControlPlane
        | Act::RestoreEverything
        | Act::StopPayment
        | Act::StopCatalog
        | Act::HoldTheCore
        | Act::LetGo => None,
    })
}

/// Whether each order that was taken was paid for, and once.
async fn orders(mesh: &Mesh, phases: &[Phase]) -> anyhow::Result<Vec<Count>> {
    let got = || phases.iter().flat_map(|phase| phase.counts.values());
    let (taken, pending): (u64, u64) = (got().map(|g| g.orders).sum(), got().map(|g| g.pending).sum());
    let waiting = mesh.deliver(DELIVER_WITHIN).await?;
    let book = mesh.book().await?;
    say(&format!(
        "\n{taken} orders were taken, {pending} of them before they were paid for; payment was called {} times",
        book.calls
    ));
    let count = |what, value, want| Count { what, value, want };
    Ok(vec![
        count("orders that were never paid for", waiting, 0),
        count("different orders that payment has in its book", book.keys, taken),
        count("charges that it made", book.charges, taken),
    ])
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
