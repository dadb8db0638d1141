//! `leeward plugin test`: cases against the real host.

use super::check::{Difference, check, duration, outcome, size};
use super::project::{self, Target};
use super::rig::{Rig, kind_of};
use super::run::{Seen, run};
use super::{cases, diff, local};
use crate::output::{Failure, say};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Which module, and which cases.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// A module (.wasm), or a project's directory.
    #[arg(default_value = ".", value_name = "MODULE|DIR")]
    target: PathBuf,
    /// The cases; cases.yaml beside the module or in the project if not given.
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,
    /// Only cases whose names have this in them.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// How to show them.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

/// How results are shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Format {
    /// Lines, for people.
    Text,
    /// JSON.
    Json,
}

/// What came of a case.
pub(crate) struct Judged {
    pub(crate) name: String,
    pub(crate) seen: Seen,
    pub(crate) differences: Vec<Difference>,
}

pub(crate) async fn run_cases(options: Options) -> Result<(), Failure> {
    let target = project::target(&options.target, options.cases.as_deref())?;
    let mut judged = local(judge(&target)).await?;
    if let Some(only) = &options.only {
        judged.retain(|case| case.name.contains(only.as_str()));
        if judged.is_empty() {
            return Err(Failure::BadInput(format!(
                "--only: no case of {} has {only:?} in its name",
                target.cases.display()
            )));
        }
    }
    let failed = judged.iter().filter(|case| !case.differences.is_empty()).count();
    match options.output {
        Format::Text => {
            for case in &judged {
                say(&line(case));
            }
            say(&format!("{} passed, {failed} failed", judged.len() - failed));
        }
        Format::Json => say(&format!("{:#}", as_json(&target, &judged))),
    }
    if failed > 0 {
        return Err(Failure::Told);
    }
    Ok(())
}

/// Runs all cases of a module.
pub(crate) async fn judge(target: &Target) -> Result<Vec<Judged>, Failure> {
    let module = project::module(&target.module)?;
    let kind = kind_of(&module);
    let cases = cases::read(&target.cases, kind)?;
    let rig = Rig::new(&target.module, kind)?;
    let mut judged = Vec::with_capacity(cases.len());
    for case in cases {
        let (plugged, seen) = Box::pin(run(&rig, &case)).await?;
        // The next one shares this one's code.
        rig.keep_only(&plugged);
        judged.push(Judged {
            differences: check(&case, &seen),
            name: case.name,
            seen,
        });
    }
    Ok(judged)
}

/// A case on a line, with what is different beneath it.
pub(crate) fn line(case: &Judged) -> String {
    let word = if case.differences.is_empty() {
        "ok  "
    } else {
        "FAIL"
    };
    let mut text = format!(
        "{word}  {}  ({}, {}, {})",
        case.name,
        outcome(&case.seen),
        duration(case.seen.time),
        size(case.seen.memory)
    );
    for difference in &case.differences {
        text.push_str(&format!("\n      {} (- wanted, + got):", difference.field));
        for line in diff::lines(&difference.want, &difference.got) {
            text.push_str("\n        ");
            text.push_str(&line);
        }
    }
    if !case.differences.is_empty() && !case.seen.log.is_empty() {
        text.push_str("\n      log:");
        for line in &case.seen.log {
            text.push_str("\n        ");
            text.push_str(line);
        }
    }
    text
}

fn as_json(target: &Target, judged: &[Judged]) -> Value {
    let cases = judged.iter().map(|case| {
        let differences = case.differences.iter().map(
            |difference| json!({"field": difference.field, "want": difference.want, "got": difference.got}),
        );
        json!({
            "name": case.name,
            "passed": case.differences.is_empty(),
            "outcome": outcome(&case.seen),
            "time_us": case.seen.time.as_secs_f64() * 1e6,
            "memory_bytes": case.seen.memory,
            "log": case.seen.log,
            "counters": case.seen.counters,
            "differences": differences.collect::<Vec<_>>(),
        })
    });
    json!({
        "module": shown(&target.module),
        "cases_file": shown(&target.cases),
        "passed": judged.iter().filter(|case| case.differences.is_empty()).count(),
        "failed": judged.iter().filter(|case| !case.differences.is_empty()).count(),
        "cases": cases.collect::<Vec<_>>(),
    })
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
