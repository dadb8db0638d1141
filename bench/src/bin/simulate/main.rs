//! `simulate`: a service in trouble, with and without the machines of `leeward-resilience`.
//!
//! A discrete-event simulation in simulated time and on one thread: the same seed gives the same numbers. The
//! machines are those that run in the proxy; clients, network and servers are models.

mod agenda;
mod chance;
#[cfg(test)]
mod goals;
mod mesh;
mod plot;
mod proxy;
mod record;
mod report;
mod scenario;
mod server;
mod strategy;
mod table;

use anyhow::Context;
use clap::Parser;
use std::io::Write;
use std::path::PathBuf;
use strategy::Strategy;

/// A service in trouble, with and without what protects it.
#[derive(Debug, Parser)]
#[command(name = "simulate", version)]
struct Options {
    /// Of all chance. The same seed gives the same tables.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A directory to write simulation.md and simulation.svg to, instead of printing the tables.
    #[arg(long)]
    write: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let Options { seed, write } = Options::parse();
    let faults = scenario::fault::all(seed);
    let tables = [
        report::overloaded(&scenario::overload::all(seed)),
        report::faulted(&faults),
        report::one_slow(seed),
        report::one_failing(seed),
        report::chained(&scenario::chain::of(&Strategy::chain(), seed)),
    ];
    let mut page = report::INTRODUCTION.to_owned();
    page.push_str(&format!("\nThe numbers below are of seed {seed}.\n"));
    for table in &tables {
        page.push_str(&format!("\n{table}"));
    }
    let Some(directory) = write else {
        return std::io::stdout()
            .write_all(page.as_bytes())
            .context("cannot print the tables");
    };
    for (name, content) in [("simulation.md", page), ("simulation.svg", plot::svg(&faults))] {
        let path = directory.join(name);
        std::fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
