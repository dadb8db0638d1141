//! `flags`: what evaluating a feature flag for a request takes, in nanoseconds.

use clap::Parser;
use leeward_flags::{Attributes, FlagSet};
use std::borrow::Cow;
use std::fmt::Write as _;
use std::hint::black_box;
use std::io::Write as _;
use std::time::{Duration, UNIX_EPOCH};
use tokio::time::Instant;

/// What evaluating a feature flag for a request takes, in nanoseconds.
#[derive(Debug, Parser)]
#[command(name = "flags", version)]
struct Options {
    /// Evaluations for each figure, 1000 to 100000000.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1000..=100_000_000))]
    evaluations: u32,
}

/// Rounds of each, of which the fastest counts: what else runs on the machine only adds.
const ROUNDS: u32 = 5;

const FLAGS: &str = r#"{"flags": {
    "1 static": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on"},
    "2 one comparison on a header": {
        "state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off",
        "targeting": {"if": [{"==": [{"var": "headers.x-tier"}, "gold"]}, "on", "off"]}
    },
    "3 fractional": {
        "state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off",
        "targeting": {"fractional": [["on", 10], ["off", 90]]}
    },
    "4 nested and/or with sem_ver": {
        "state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off",
        "targeting": {"if": [{"and": [
            {"or": [{"==": [{"var": "zone"}, "b"]}, {"starts_with": [{"var": "path"}, "/buy"]}]},
            {"sem_ver": [{"var": "headers.x-app-version"}, ">=", "2.1.0"]},
            {"in": [{"var": "headers.x-tier"}, ["gold", "silver"]]}
        ]}, {"fractional": [{"var": "headers.x-user"}, ["on", 50], ["off", 50]]}, "off"]}
    }
}}"#;

/// A request with as many headers as one from a browser has.
struct Request {
    headers: Vec<(&'static str, &'static str)>,
}

impl Attributes for Request {
    fn attribute(&self, path: &str) -> Option<Cow<'_, str>> {
        match path {
            "targetingKey" => Some(Cow::Borrowed("7f3c2a90-0d55-4c1e-9a5b-2f64c1d7be10")),
            "path" => Some(Cow::Borrowed("/buy/42")),
            "zone" => Some(Cow::Borrowed("a")),
            _ => {
                let name = path.strip_prefix("headers.")?;
                let found = self.headers.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| Cow::Borrowed(*value))
            }
        }
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let flags =
        FlagSet::parse(FLAGS).map_err(|errors| anyhow::anyhow!("the flags are broken: {errors:?}"))?;
    let mut headers = vec![("accept", "*/*"); 12];
    headers.extend([
        ("x-tier", "gold"),
        ("x-user", "ada-lovelace"),
        ("x-app-version", "2.3.1"),
    ]);
    let request = Request { headers };
    let wall = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let mut table = String::from("| Flag | ns |\n|---|---|\n");
    for key in flags.keys() {
        let Some(flag) = flags.get(key) else { continue };
        let round = |_| {
            let began = Instant::now();
            for _ in 0..options.evaluations {
                black_box(flag.evaluate(black_box(&request), wall));
            }
            began.elapsed()
        };
        let fastest = (0..ROUNDS).map(round).min().unwrap_or_default();
        let each = fastest.as_nanos() / u128::from(options.evaluations);
        writeln!(table, "| {key} | {each} |")?;
    }
    write!(std::io::stdout(), "{table}")?;
    Ok(())
}
