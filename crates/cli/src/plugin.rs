//! Plugins: their modules, from a file to the proxies.

mod store;

use crate::output::Failure;
use clap::Subcommand;

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring a module to the control plane, from which proxies take it by its SHA-256.
    Push(store::Push),
    /// Show the modules that the control plane has, and what it took from registries.
    List(store::List),
    /// Delete a module that no Plugin names.
    Delete(store::Delete),
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Push(push) => store::push(push).await,
        Command::List(list) => store::list(list).await,
        Command::Delete(delete) => store::delete(delete).await,
    }
}
