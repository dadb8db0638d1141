//! `leeward lint`: what is wrong with policy, before or after it is applied.

mod show;

use crate::api::{MAX_MESSAGE, call};
use crate::connect::{Link, link};
use crate::output::{Failure, say};
use crate::{Connection, check};
use clap::{Args, ValueEnum};
use leeward_policy::lint::{Severity, lint, rules};
use leeward_policy::{Key, Resource};
use leeward_proto::manifest::Located;
use leeward_proto::v1::explain_service_client::ExplainServiceClient;
use leeward_proto::{parse, parse_key, render_finding, v1};
use show::Seen;
pub(crate) use show::Shown;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

/// Find what is wrong with policy: in files, without a control plane, or as a control plane would have it.
///
/// Ends with 0 if nothing is wrong, 1 if there are errors (with --strict: or warnings), 2 if what was given can't be read.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Files, or directories of .yaml files, or - for standard input.
    #[arg(value_name = "FILE|DIR|-")]
    paths: Vec<PathBuf>,
    /// The same.
    #[arg(short, long, value_name = "FILE|DIR|-")]
    file: Vec<PathBuf>,
    /// How findings are shown.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Format,
    /// Warnings count as errors.
    #[arg(long)]
    strict: bool,
    /// Leave out the findings of these rules, apart by commas.
    #[arg(long, value_name = "CODE", value_delimiter = ',')]
    allow: Vec<String>,
    /// Leave out findings that are less bad.
    #[arg(long, value_name = "SEVERITY", default_value = "info")]
    least: Least,
    /// As if the files were applied to this control plane; without files, what it has.
    #[arg(long)]
    server: bool,
    /// The control plane.
    #[arg(
        long,
        env = "LEEWARD_CONTROL",
        default_value = "127.0.0.1:15010",
        value_name = "IP:PORT"
    )]
    control: std::net::SocketAddr,
    /// The directory with your cert.pem, key.pem and bundle.pem.
    #[arg(
        long,
        env = "LEEWARD_IDENTITY",
        value_name = "DIR",
        required_if_eq("server", "true")
    )]
    identity: Option<PathBuf>,
    /// Say what the rules are, as docs/lint.md has it.
    #[arg(long)]
    rules: bool,
}

/// How findings are shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// JSON.
    Json,
    /// SARIF 2.1.0, for code scanning.
    Sarif,
    /// Workflow commands, which GitHub shows at the lines.
    Github,
}

/// How bad a finding is to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Least {
    Info,
    Warning,
    Error,
}

/// There are findings that count.
const FOUND: u8 = 1;
/// What was given can't be read.
const UNREADABLE: u8 = 2;

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    if options.rules {
        say(&show::rules());
        return Ok(());
    }
    let paths: Vec<PathBuf> = options.paths.iter().chain(&options.file).cloned().collect();
    for code in &options.allow {
        if !rules().any(|rule| rule.code == code) {
            return Err(unreadable(&format!(
                "leeward: {code:?} is no rule; see leeward lint --rules"
            )));
        }
    }
    if paths.is_empty() && !options.server {
        return Err(unreadable("leeward: nothing to look at; give files, or --server"));
    }
    let (located, errors) = if paths.is_empty() {
        (Vec::new(), Vec::new())
    } else {
        match check::locate(&paths) {
            Ok(read) => read,
            Err(Failure::BadInput(lines)) => return Err(unreadable(&lines)),
            Err(other) => return Err(other),
        }
    };
    if !errors.is_empty() {
        let shown: Vec<Shown> = errors.iter().map(Shown::unread).collect();
        let seen = Seen {
            shown,
            resources: located.len(),
            ..Seen::default()
        };
        say(&show::all(&seen, options.output));
        return Err(Failure::Status(UNREADABLE));
    }
    let mut seen = if options.server {
        on_server(&options, &located).await?
    } else {
        of_files(&located)
    };
    let least = match options.least {
        Least::Info => Severity::Info,
        Least::Warning => Severity::Warning,
        Least::Error => Severity::Error,
    };
    let allowed = |shown: &Shown| options.allow.contains(&shown.code);
    let before = seen.shown.len();
    seen.shown.retain(|shown| !allowed(shown));
    seen.ignored += before - seen.shown.len();
    seen.shown.retain(|shown| shown.severity >= least);
    say(&show::all(&seen, options.output));
    let counts = if options.strict {
        Severity::Warning
    } else {
        Severity::Error
    };
    if seen.shown.iter().any(|shown| shown.severity >= counts) {
        return Err(Failure::Status(FOUND));
    }
    Ok(())
}

fn unreadable(lines: &str) -> Failure {
    crate::output::complain(lines);
    Failure::Status(UNREADABLE)
}

/// Where resources stand, the last of a name that stands twice.
type Places<'a> = BTreeMap<Key, (&'a str, &'a Located)>;

fn of_files(located: &[(String, Located)]) -> Seen {
    let mut places = Places::new();
    let mut parsed: Vec<Resource> = Vec::with_capacity(located.len());
    let mut shown = Vec::new();
    for (file, at) in located {
        // It was parsed when it was read.
        let Ok(resource) = parse(&at.resource) else {
            continue;
        };
        let key = resource.key();
        if let Some((first, before)) = places.insert(key.clone(), (file, at)) {
            shown.push(Shown::twice(
                &key,
                (file, at.place("")),
                (first, before.place("")),
            ));
        }
        parsed.push(resource);
    }
    #[expect(
        clippy::disallowed_methods,
        reason = "policy has ends that are times of the wall clock"
    )]
    let now = SystemTime::now();
    let report = lint(&parsed, now);
    shown.extend(
        report
            .findings
            .iter()
            .map(|found| place(&places, &render_finding(found))),
    );
    Seen {
        shown,
        resources: parsed.len(),
        left_out: report.left_out,
        ignored: report.ignored,
    }
}

/// A finding, where it stands if it stands in a file.
fn place(places: &Places<'_>, found: &v1::Finding) -> Shown {
    let key = found.r#ref.as_ref().and_then(|key| parse_key(key).ok());
    let at = key.and_then(|key| places.get(&key).copied());
    Shown::of(
        found,
        at.map(|(file, located)| (file, located.place(&found.path))),
    )
}

async fn on_server(options: &Options, located: &[(String, Located)]) -> Result<Seen, Failure> {
    // Without an identity the command line is refused.
    let identity = options.identity.clone().unwrap_or_default();
    let connection = Connection::of(options.control, identity);
    let resources: Vec<v1::Resource> = located.iter().map(|(_, at)| at.resource.clone()).collect();
    let mut places = Places::new();
    for (file, at) in located {
        if let Ok(resource) = parse(&at.resource) {
            places.insert(resource.key(), (file, at));
        }
    }
    let count = resources.len();
    let mut client = client(&connection)?;
    let answer = call(connection.control, client.lint(v1::LintRequest { resources })).await?;
    Ok(Seen {
        shown: answer
            .findings
            .iter()
            .map(|found| place(&places, found))
            .collect(),
        resources: count,
        left_out: usize::try_from(answer.left_out).unwrap_or(usize::MAX),
        ignored: usize::try_from(answer.ignored).unwrap_or(usize::MAX),
    })
}

/// A client of the service that explains and lints.
pub(crate) fn client(connection: &Connection) -> Result<ExplainServiceClient<Link>, Failure> {
    Ok(ExplainServiceClient::new(link(connection)?)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE))
}
