//! `leeward plugin dev`: builds and tries a plugin again whenever a source is saved, and serves it meanwhile.

mod replay;
mod serve;
mod watch;

use super::build::{RUST_TARGET, build};
use super::project::{Project, Target};
use super::test::{judge, line};
use super::{cases, local};
use crate::output::{Failure, complain, say};
use clap::Args;
use replay::Replay;
use serve::{Served, Serving};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use watch::Watch;

/// Which project, and what to do with it.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The project's directory.
    #[arg(default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// The cases; cases.yaml in the project if not given. Its config and services are those of what is served, and its calls
    /// are what services answer.
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,
    /// Serve the plugin over HTTP: to a fallback every request has failed, a filter is before an echo.
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// Write down what comes in there, for --replay.
    #[arg(long, value_name = "FILE", requires = "listen")]
    record: Option<PathBuf>,
    /// After each build, ask the plugin what is in this file (a JSON object with method, path, headers and body a line), and
    /// show what it answers otherwise than before.
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// What Rust is compiled for; wasm32-wasip1 for proxy-wasm modules.
    #[arg(long, default_value = RUST_TARGET, value_name = "TRIPLE")]
    target: String,
    /// Build once, and end.
    #[arg(long, conflicts_with = "listen")]
    once: bool,
}

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    local(develop(options)).await
}

async fn develop(options: Options) -> Result<(), Failure> {
    let project = Project::open(&options.dir)?;
    let target = Target {
        module: project.module(),
        cases: options
            .cases
            .clone()
            .unwrap_or_else(|| project.dir.join(cases::FILE)),
    };
    let mut replay = options.replay.as_deref().map(Replay::read).transpose()?;
    let served = Rc::<Served>::default();
    if let Some(listen) = options.listen {
        let address = serve::listen(listen, &served, options.record.as_deref()).await?;
        say(&format!("listening on http://{address}"));
    }
    let mut watch = Watch::new(&project.dir, &target.cases);
    loop {
        let well = turn(&project, &target, &options, &served, replay.as_mut()).await;
        if options.once {
            return well;
        }
        if let Err(failure) = well {
            tell(failure);
        }
        watch.changed().await;
        say("\na source has changed");
    }
}

/// Builds, swaps, and tries out.
async fn turn(
    project: &Project,
    target: &Target,
    options: &Options,
    served: &Served,
    replay: Option<&mut Replay>,
) -> Result<(), Failure> {
    say(&build(project, &options.target).await?);
    // What doesn't build, or doesn't load, leaves the one before in its place.
    let serving = Serving::load(target).await?;
    if options.listen.is_some() {
        served.swap(&serving);
    }
    if let Some(replay) = replay {
        replay.run(&serving).await;
    }
    if !target.cases.is_file() {
        complain(&format!(
            "{}: no such file; there are no cases to run",
            target.cases.display()
        ));
        return Ok(());
    }
    let judged = judge(target).await?;
    let failed = judged.iter().filter(|case| !case.differences.is_empty()).count();
    for case in &judged {
        say(&line(case));
    }
    say(&format!("{} passed, {failed} failed", judged.len() - failed));
    if failed > 0 { Err(Failure::Told) } else { Ok(()) }
}

fn tell(failure: Failure) {
    match failure {
        Failure::BadInput(lines) => complain(&lines),
        Failure::Failed(error) => complain(&format!("leeward: {error:#}")),
        Failure::Untold(why) => complain(&why),
        Failure::Told | Failure::Status(_) => {}
    }
}
