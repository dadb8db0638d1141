//! `leeward supervise`: keeps processes alive, and replaces them without a lost request.
//!
//! - A child that ends is started again, after a pause that doubles with each end in a row, with full jitter.
//! - A child that hangs is as bad as one that has ended: if its `/livez` fails some times in a row it is
//!   killed, and started again.
//! - SIGHUP upgrades: beside each child that hands over (`leeward-proxy --handover`) a new one is started from
//!   the same command line, which may be a new program by now. The two settle it between them; the new one
//!   becomes the child when the old one has ended, and if it is the first to end the old one stays the child.
//! - SIGTERM and SIGINT are passed on as SIGTERM; who doesn't end in time is killed.
//!
//! Each child has a process group of its own, so that a signal from the terminal reaches it only through here.
//! If the supervisor itself is killed, a child that hands over serves on, and the next supervisor's takes its
//! place without a lost request; every other child is told to end (SIGTERM), since a second one could not have
//! its ports and its store.

mod child;
mod file;
mod liveness;
mod restarts;

use crate::output::{Failure, complain};
use child::{Child, Ended, Orders};
use clap::Args;
use file::{Livez, read};
use restarts::Limit;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What to keep alive, and how.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The children, as YAML: `children: [{name, command: [..], env: {..}, livez: URL, liveness: {grace, every,
    /// timeout, failures}}]`.
    #[arg(short, long, value_name = "FILE", required_unless_present = "command")]
    file: Option<PathBuf>,
    /// Where the one child that is given as a command answers if it is alive, such as
    /// http://127.0.0.1:15020/livez.
    #[arg(long, value_name = "URL", conflicts_with = "file", value_parser = Livez::parse)]
    livez: Option<Livez>,
    /// How long children may take to end after SIGTERM, such as 40s; then they are killed.
    #[arg(long, default_value = "40s", value_parser = duration, value_name = "DURATION")]
    stop_timeout: Duration,
    /// Give up, and end, when a child has been started again this often within `--within`. Without it a child
    /// is started again for as long as it takes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_restarts: Option<u32>,
    /// For `--max-restarts`.
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "DURATION", requires = "max_restarts")]
    within: Duration,
    /// The one child's command.
    #[arg(last = true, conflicts_with = "file", value_name = "COMMAND")]
    command: Vec<String>,
}

/// What is done before a child becomes what it is to be.
#[derive(Args, Debug)]
pub(crate) struct Exec {
    /// The process that the child is to end with.
    #[arg(long)]
    parent: u32,
    /// The child's command.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// How a line to the operator is meant.
#[derive(Clone, Copy, Debug)]
enum Level {
    Info,
    Warn,
    Error,
}

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let limit = options.max_restarts.map(|restarts| Limit {
        restarts,
        within: options.within,
    });
    let specs = match &options.file {
        Some(path) => read(path)?,
        None => vec![file::Spec::of(options.command, options.livez)],
    };
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hang_up = signal(SignalKind::hangup())?;
    let (orders, _) = watch::channel(Orders::default());
    let mut keeping = JoinSet::new();
    for spec in specs {
        let child = Child::new(Arc::new(spec), limit, options.stop_timeout);
        keeping.spawn(child.keep(orders.subscribe()));
    }
    let mut given_up = None;
    loop {
        tokio::select! {
            _ = terminate.recv() => tell(Level::Info, None, "terminated; the children are told to end"),
            _ = interrupt.recv() => tell(Level::Info, None, "interrupted; the children are told to end"),
            _ = hang_up.recv() => {
                orders.send_modify(|orders| orders.upgrades += 1);
                continue;
            }
            Some(ended) = keeping.join_next() => match ended? {
                Ended::Stopped => continue,
                Ended::GaveUp(name) => given_up = Some(name),
            }
        }
        break;
    }
    orders.send_modify(|orders| orders.stop = true);
    while let Some(ended) = keeping.join_next().await {
        ended?;
    }
    match given_up {
        None => Ok(()),
        Some(name) => Err(Failure::Failed(anyhow::anyhow!(
            "{name} does not stay up; the supervisor gives up"
        ))),
    }
}

/// Becomes a child, which ends with its supervisor: it gets SIGTERM when that dies, however it dies. Only the
/// process itself can ask for that (PR_SET_PDEATHSIG), and it holds across exec; so the supervisor starts this
/// program again, which asks, and then becomes the child, with the same process id.
pub(crate) fn exec(exec: &Exec) -> Result<(), Failure> {
    use std::os::unix::process::CommandExt;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .map_err(anyhow::Error::from)?;
    // It may have died before that.
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if parent != Some(exec.parent) {
        return Err(Failure::Failed(anyhow::anyhow!("the supervisor is gone")));
    }
    let Some((program, args)) = exec.command.split_first() else {
        return Ok(());
    };
    let error = std::process::Command::new(program).args(args).exec();
    Err(Failure::Failed(anyhow::anyhow!(
        "can't start {}: {error}",
        program.display()
    )))
}

/// A line on standard error, where the children's own are as well.
fn tell(level: Level, child: Option<&str>, text: &str) {
    let level = match level {
        Level::Info => "INFO",
        Level::Warn => "WARN",
        Level::Error => "ERROR",
    };
    match child {
        Some(child) => complain(&format!("{level} supervise: {child}: {text}")),
        None => complain(&format!("{level} supervise: {text}")),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .ok_or_else(|| "want a duration such as 500ms, 30s or 2m".to_owned())
}
