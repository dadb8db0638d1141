//! Plugins: from a project to a module, from there to the control plane, and what proxies say of it.
//!
//! `test`, `bench` and `dev` run modules in the same host that proxies have, in this process ([`rig`]).

mod bench;
mod build;
mod cases;
mod check;
mod dev;
mod diff;
mod inspect;
mod logs;
mod new;
mod project;
mod rig;
mod run;
mod store;
mod test;
mod why;
mod wit;

use crate::output::Failure;
use clap::Subcommand;
use tokio::task::LocalSet;

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a project that builds, with cases that pass.
    New(new::Options),
    /// Build and try a plugin again whenever a source is saved, and serve it meanwhile.
    Dev(dev::Options),
    /// Build a project's module.
    Build(build::Options),
    /// Try a module out: cases from a file, against the real host.
    Test(test::Options),
    /// Measure what a call of a module costs.
    Bench(bench::Options),
    /// Show what a module is, and what it may do.
    Inspect(inspect::Options),
    /// Show what a plugin wrote, from the proxies that it runs on.
    Logs(logs::Options),
    /// Bring a module to the control plane, from which proxies take it by its SHA-256.
    Push(store::Push),
    /// Show the modules that the control plane has, and what it took from registries.
    List(store::List),
    /// Delete a module that no Plugin names.
    Delete(store::Delete),
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::New(options) => new::run(&options),
        Command::Dev(options) => dev::run(options).await,
        Command::Build(options) => build::run(&options).await,
        Command::Test(options) => test::run_cases(options).await,
        Command::Bench(options) => bench::run(options).await,
        Command::Inspect(options) => inspect::run(&options),
        Command::Logs(options) => logs::run(options).await,
        Command::Push(push) => store::push(push).await,
        Command::List(list) => store::list(list).await,
        Command::Delete(delete) => store::delete(delete).await,
    }
}

/// Does what must stay on one thread, as all that a worker of a proxy does.
async fn local<T>(work: impl Future<Output = T>) -> T {
    Box::pin(LocalSet::new().run_until(work)).await
}
