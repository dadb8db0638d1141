//! `leeward explain`: what policy would make of a request.

use crate::api::call;
use crate::lint::{Shown, client};
use crate::output::{Failure, say};
use crate::{Connection, check};
use clap::{Args, ValueEnum};
use leeward_identity::SpiffeId;
use leeward_policy::{Staged, World};
use leeward_proto::{parse, v1};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

/// Say what policy would make of a request, and why: nothing is sent. Live policy, if nothing else is said.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The request, as METHOD and PATH.
    #[arg(short, long, value_name = "METHOD PATH", default_value = "GET /")]
    request: String,
    /// Whom it is for.
    #[arg(long, value_name = "HOST")]
    host: String,
    /// A header field.
    #[arg(long, value_name = "NAME: VALUE", value_parser = header)]
    header: Vec<(String, String)>,
    /// The SPIFFE id of whoever asks; the proxy's own if it isn't said.
    #[arg(long = "as", value_name = "SPIFFE ID")]
    asks: Option<String>,
    /// The zone of the proxy that is asked.
    #[arg(long, value_name = "ZONE")]
    from_zone: Option<String>,
    /// The proxy that is asked.
    #[arg(long, value_name = "NAME")]
    proxy: Option<String>,
    /// A client from outside sends it, to this gateway.
    #[arg(long, value_name = "GATEWAY[/LISTENER]")]
    gateway: Option<String>,
    /// As if a flag had this variant.
    #[arg(long, value_name = "FLAG=VARIANT", value_parser = pair, value_delimiter = ',')]
    flags: Vec<(String, String)>,
    /// As if a DegradationPolicy had this level.
    #[arg(long, value_name = "POLICY=LEVEL", value_parser = pair, value_delimiter = ',')]
    level: Vec<(String, String)>,
    /// As if it had a valid token with these claims.
    #[arg(long, value_name = "JSON")]
    claims: Option<String>,
    /// Policy as in these files: with --dry-run as if they were applied to live policy, else they alone.
    #[arg(short, long, value_name = "FILE|DIR|-", conflicts_with = "revision")]
    file: Vec<PathBuf>,
    /// As if the files were applied to what the control plane has.
    #[arg(long, requires = "file")]
    dry_run: bool,
    /// Policy as it was at this revision.
    #[arg(long, value_name = "N", default_value_t = 0)]
    revision: u64,
    /// The trust domain of identities, where files are all that is looked at.
    #[arg(long, value_name = "DOMAIN", default_value = "mesh.example")]
    trust_domain: String,
    /// How it is told.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Format,
    /// The control plane.
    #[arg(
        long,
        env = "LEEWARD_CONTROL",
        default_value = "127.0.0.1:15010",
        value_name = "IP:PORT"
    )]
    control: std::net::SocketAddr,
    /// The directory with your cert.pem, key.pem and bundle.pem; not needed for files alone.
    #[arg(long, env = "LEEWARD_IDENTITY", value_name = "DIR")]
    identity: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// JSON.
    Json,
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("want NAME: VALUE")?;
    match name.trim() {
        "" => Err("has no name; want NAME: VALUE".to_owned()),
        name => Ok((name.to_owned(), value.trim().to_owned())),
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err("want two words with = between".to_owned()),
    }
}

impl Options {
    fn question(&self) -> v1::Question {
        let (method, path) = match self.request.trim().split_once(char::is_whitespace) {
            Some((method, path)) => (method, path.trim()),
            None if self.request.trim().starts_with('/') => ("GET", self.request.trim()),
            None => (self.request.trim(), "/"),
        };
        v1::Question {
            method: method.to_owned(),
            path: path.to_owned(),
            host: self.host.clone(),
            headers: self
                .header
                .iter()
                .map(|(name, value)| v1::QuestionHeader {
                    name: name.clone(),
                    value: value.clone(),
                })
                .collect(),
            identity: self.asks.clone().unwrap_or_default(),
            zone: self.from_zone.clone().unwrap_or_default(),
            proxy: self.proxy.clone().unwrap_or_default(),
            gateway: self.gateway.clone().unwrap_or_default(),
            flags: self.flags.iter().cloned().collect(),
            levels: self.level.iter().cloned().collect(),
            claims: self.claims.clone().unwrap_or_default(),
        }
    }
}

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let question = options.question();
    let told = if options.file.is_empty() || options.dry_run {
        Box::pin(on_server(&options, question)).await?
    } else {
        of_files(&options, &question)?
    };
    match options.output {
        Format::Text => say(&text(&told)),
        Format::Json => say(&format!("{:#}", json(&told))),
    }
    Ok(())
}

/// From files alone, as proxies that have nothing else.
fn of_files(options: &Options, question: &v1::Question) -> Result<v1::Explanation, Failure> {
    let mut staged = Staged::default();
    for wire in check::read(&options.file)? {
        // It was parsed when it was read.
        staged.upserts.extend(parse(&wire).ok().map(Arc::new));
    }
    let mut world = World::default();
    world.commit(staged);
    let own = |viewer: &leeward_policy::Viewer| {
        let id = SpiffeId::proxy(&options.trust_domain, viewer.zone.as_str(), viewer.proxy.as_str());
        Some(id.ok()?.as_str().to_owned())
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "policy has ends that are times of the wall clock"
    )]
    let now = SystemTime::now();
    leeward_proto::explain(&world, question, 0, now, own)
        .map_err(|bad| Failure::BadInput(format!("leeward: {}: {}", bad.path, bad.reason)))
}

async fn on_server(options: &Options, question: v1::Question) -> Result<v1::Explanation, Failure> {
    let Some(identity) = options.identity.clone() else {
        return Err(Failure::BadInput(
            "leeward: live policy is the control plane's; say who you are (--identity or LEEWARD_IDENTITY), or give files (-f)"
                .to_owned(),
        ));
    };
    let connection = Connection::of(options.control, identity);
    let resources = if options.file.is_empty() {
        Vec::new()
    } else {
        check::read(&options.file)?
    };
    let request = v1::ExplainRequest {
        question: Some(question),
        revision: options.revision,
        resources,
    };
    let mut client = client(&connection)?;
    Box::pin(call(connection.control, client.explain(request))).await
}

/// For people: a line for each decision, what it goes by below it.
fn text(told: &v1::Explanation) -> String {
    let revision = match told.revision {
        0 => "of these files".to_owned(),
        revision => format!("of revision {revision}"),
    };
    let mut lines = vec![
        told.summary.clone(),
        format!(
            "Policy {revision}, as proxy {} of zone {} has it.",
            told.proxy, told.zone
        ),
        String::new(),
    ];
    for step in &told.steps {
        add(&mut lines, step, 0);
    }
    if !told.findings.is_empty() {
        lines.push(String::new());
        lines.push("What the linter finds on its way:".to_owned());
        lines.extend(told.findings.iter().map(|found| Shown::of(found, None).text()));
    }
    lines.join("\n")
}

fn add(lines: &mut Vec<String>, step: &v1::Step, depth: usize) {
    let indent = "  ".repeat(depth);
    let by = match (step.resource.as_str(), step.path.as_str()) {
        ("", _) => String::new(),
        (resource, "") => format!("  [{resource}]"),
        (resource, path) => format!("  [{resource} {path}]"),
    };
    lines.push(format!("{indent}{}: {}{by}", step.stage, step.says));
    for below in &step.steps {
        add(lines, below, depth + 1);
    }
}

fn json(told: &v1::Explanation) -> Value {
    json!({
        "revision": told.revision, "zone": told.zone, "proxy": told.proxy, "summary": told.summary,
        "steps": told.steps.iter().map(step_json).collect::<Vec<_>>(),
        "findings": told.findings.iter().map(|found| Shown::of(found, None).json()).collect::<Vec<_>>(),
    })
}

fn step_json(step: &v1::Step) -> Value {
    let mut facts: Map<String, Value> = Map::new();
    for fact in &step.facts {
        // What is said several times is a list.
        match facts.get_mut(&fact.name) {
            None => drop(facts.insert(fact.name.clone(), json!(fact.value))),
            Some(Value::Array(values)) => values.push(json!(fact.value)),
            Some(first) => *first = json!([first.take(), fact.value]),
        }
    }
    json!({
        "stage": step.stage, "says": step.says, "resource": step.resource, "path": step.path, "facts": facts,
        "steps": step.steps.iter().map(step_json).collect::<Vec<_>>(),
    })
}
