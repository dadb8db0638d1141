//! Commands that talk to a control plane.

use crate::Connection;
use crate::check::read;
use crate::connect::{Link, link};
use crate::lint::Shown;
use crate::output::{Failure, Format, GetFormat, Kinds, complain, kind_name, say, table};
use clap::Args;
use leeward_policy::Kind;
use leeward_proto::manifest::{to_json, to_yaml};
use leeward_proto::v1::policy_service_client::PolicyServiceClient;
use leeward_proto::{render_kind, v1};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tonic_types::StatusExt;

/// Longest call.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Largest message, in bytes.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;
/// Resources on a page.
const PAGE: u32 = 1000;

/// How a change gets to proxies.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Way {
    /// In steps, by this RolloutPolicy; by the one named default if there is one and this isn't given.
    #[arg(long, value_name = "NAME")]
    rollout: Option<String>,
    /// To all proxies at once, also if there is a RolloutPolicy named default.
    #[arg(long, conflicts_with = "rollout")]
    at_once: bool,
    /// Take a rollout back first that is under way.
    #[arg(long)]
    supersede: bool,
}

/// A client of the API.
pub(crate) type Client = PolicyServiceClient<Link>;

pub(crate) fn client(connection: &Connection) -> Result<Client, Failure> {
    Ok(PolicyServiceClient::new(link(connection)?)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE))
}

/// Makes one call, within its time; what went wrong is told by line.
pub(crate) async fn call<T>(
    control: std::net::SocketAddr,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Failure> {
    call_within(control, TIMEOUT, call).await
}

/// The same with another time.
pub(crate) async fn call_within<T>(
    control: std::net::SocketAddr,
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Failure> {
    answer_within(control, limit, call)
        .await?
        .map_err(|status| told(control, &status))
}

/// Makes one call, within its time, for callers to whom some refusals are no failure.
pub(crate) async fn answer<T>(
    control: std::net::SocketAddr,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<Result<T, tonic::Status>, Failure> {
    answer_within(control, TIMEOUT, call).await
}

async fn answer_within<T>(
    control: std::net::SocketAddr,
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<Result<T, tonic::Status>, Failure> {
    match tokio::time::timeout(limit, call).await {
        Ok(answered) => Ok(answered.map(tonic::Response::into_inner)),
        Err(_) => Err(Failure::Failed(anyhow::anyhow!(
            "the control plane at {control} did not answer within {limit:?}"
        ))),
    }
}

/// What a refusal means to the one who asked.
pub(crate) fn told(control: std::net::SocketAddr, status: &tonic::Status) -> Failure {
    if let Some(details) = status.get_details_bad_request() {
        let lines = details
            .field_violations
            .iter()
            .map(|v| format!("{}: {}", v.field, v.description));
        return Failure::BadInput(lines.collect::<Vec<_>>().join("\n"));
    }
    if status.code() == tonic::Code::Unavailable {
        let mut why = status.message().to_owned();
        let mut source = std::error::Error::source(status);
        while let Some(cause) = source {
            why = cause.to_string();
            source = cause.source();
        }
        return Failure::Failed(anyhow::anyhow!("no control plane at {control}: {why}"));
    }
    Failure::Failed(anyhow::anyhow!("{}", status.message()))
}

/// For whom resources are kept, and what becomes of those that are no longer in the files.
#[derive(Args, Clone, Debug)]
pub(crate) struct ManagerOptions {
    /// For whom the resources are kept, such as the name of a pipeline; you, if not given.
    #[arg(long, env = "LEEWARD_MANAGER", default_value = "", hide_default_value = true)]
    manager: String,
    /// Take over resources of other managers.
    #[arg(long)]
    force: bool,
    /// Delete what the manager has applied before and is no longer in the files.
    #[arg(long)]
    prune: bool,
    /// With --prune: only resources with these labels, such as app=shop.
    #[arg(short = 'l', long, default_value = "", requires = "prune")]
    selector: String,
    /// With --prune: delete nothing if it would be more than this.
    #[arg(long, value_name = "N", default_value_t = 10, requires = "prune", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_deletes: u32,
}

/// How to apply.
#[derive(Args, Clone, Debug)]
pub(crate) struct ApplyOptions {
    /// Check everything, write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Only make new resources: write nothing if one is there already.
    #[arg(long)]
    if_absent: bool,
    #[command(flatten)]
    manager: ManagerOptions,
    #[command(flatten)]
    way: Way,
}

impl ManagerOptions {
    /// The request of these files.
    pub(crate) fn request(self, files: &[PathBuf]) -> Result<v1::ApplyRequest, Failure> {
        let prune = v1::Prune {
            selector: self.selector,
            max_deletes: self.max_deletes,
        };
        Ok(v1::ApplyRequest {
            resources: read(files)?,
            manager: self.manager,
            force: self.force,
            prune: self.prune.then_some(prune),
            ..v1::ApplyRequest::default()
        })
    }
}

pub(crate) async fn apply(
    connection: &Connection,
    files: &[PathBuf],
    options: ApplyOptions,
) -> Result<(), Failure> {
    let request = v1::ApplyRequest {
        dry_run: options.dry_run,
        if_absent: options.if_absent,
        rollout: options.way.rollout.unwrap_or_default(),
        at_once: options.way.at_once,
        supersede: options.way.supersede,
        ..options.manager.request(files)?
    };
    let mut client = client(connection)?;
    let applied = call(connection.control, client.apply(request)).await?;
    let (would, verb) = if options.dry_run {
        ("would be ", "would be applied")
    } else {
        ("", "applied")
    };
    for (resource, changed) in applied.resources.iter().zip(&applied.changed) {
        let name = resource.metadata.as_ref().map_or("", |m| m.name.as_str());
        let what = if *changed { verb } else { "unchanged" };
        say(&format!("{}/{name} {what}", kind_name(resource)));
    }
    for pruned in &applied.pruned {
        say(&format!("{} {would}deleted", shown(pruned)));
    }
    say(&format!("revision {}", applied.revision));
    if !applied.rollout.is_empty() {
        let to = &applied.rollout;
        say(&format!(
            "goes to proxies in steps, by {to}: see leeward rollout status"
        ));
    }
    // Beside what was done, not part of it.
    for warning in &applied.warnings {
        complain(&Shown::of(warning, None).text());
    }
    Ok(())
}

/// A resource's kind and name, for people.
pub(crate) fn shown(of: &v1::ResourceRef) -> String {
    let kind = leeward_proto::kind_of(of.kind()).map_or("-", Kind::as_str);
    format!("{kind}/{}", of.name)
}

pub(crate) async fn get(
    connection: &Connection,
    kinds: Kinds,
    name: Option<String>,
    selector: String,
    format: GetFormat,
) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let resources = match (kinds, name) {
        (Kinds::All, Some(_)) => {
            return Err(Failure::BadInput(
                "leeward: a name needs a kind, such as `get service cart`".to_owned(),
            ));
        }
        (Kinds::One(kind), Some(name)) => {
            let request = v1::GetRequest {
                r#ref: Some(reference(kind, name)),
            };
            vec![Box::pin(call(connection.control, client.get(request))).await?]
        }
        (kinds, None) => selected(connection, &mut client, kinds, selector).await?,
    };
    match format {
        GetFormat::Yaml => say(&resources.iter().map(to_yaml).collect::<Vec<_>>().join("---\n")),
        GetFormat::Json => {
            let all: Vec<Value> = resources.iter().map(to_json).collect();
            let value = if let [one] = all.as_slice() {
                one.clone()
            } else {
                json!({"items": all})
            };
            say(&format!("{value:#}"));
        }
        GetFormat::Name => {
            for resource in &resources {
                let name = resource.metadata.as_ref().map_or("", |m| m.name.as_str());
                say(&format!("{}/{name}", kind_name(resource)));
            }
        }
        GetFormat::Table => say(&resource_table(&resources)),
        GetFormat::Wide => say(&wide_table(&resources)),
    }
    Ok(())
}

pub(crate) async fn list(
    connection: &Connection,
    client: &mut Client,
    kinds: Kinds,
) -> Result<Vec<v1::Resource>, Failure> {
    selected(connection, client, kinds, String::new()).await
}

async fn selected(
    connection: &Connection,
    client: &mut Client,
    kinds: Kinds,
    selector: String,
) -> Result<Vec<v1::Resource>, Failure> {
    let kind = match kinds {
        Kinds::All => v1::Kind::Unspecified,
        Kinds::One(kind) => render_kind(kind),
    };
    let (mut resources, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListRequest {
            kind: kind.into(),
            page_size: PAGE,
            page_token,
            selector: selector.clone(),
        };
        let page = call(connection.control, client.list(request)).await?;
        resources.extend(page.resources);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(resources);
        }
    }
}

fn wide_table(resources: &[v1::Resource]) -> String {
    let rows: Vec<[String; 7]> = resources
        .iter()
        .map(|resource| {
            let metadata = resource.metadata.clone().unwrap_or_default();
            let status = resource.status.clone().unwrap_or_default();
            let labels: std::collections::BTreeMap<_, _> = metadata.labels.into_iter().collect();
            let labels = labels.iter().map(|(key, value)| format!("{key}={value}"));
            [
                kind_name(resource).to_owned(),
                metadata.name,
                metadata.revision.to_string(),
                format!("{}/{}", status.live, status.proxies),
                metadata.manager,
                metadata
                    .update_time
                    .map(|time| time.to_string())
                    .unwrap_or_default(),
                labels.collect::<Vec<_>>().join(","),
            ]
        })
        .collect();
    table(
        ["KIND", "NAME", "REVISION", "LIVE", "MANAGER", "UPDATED", "LABELS"],
        &rows,
    )
}

fn resource_table(resources: &[v1::Resource]) -> String {
    let rows: Vec<[String; 5]> = resources
        .iter()
        .map(|resource| {
            let metadata = resource.metadata.clone().unwrap_or_default();
            let status = resource.status.clone().unwrap_or_default();
            let refused = status
                .refusals
                .iter()
                .map(|r| format!("{}: {}", r.proxy, r.reason))
                .collect::<Vec<_>>();
            [
                kind_name(resource).to_owned(),
                metadata.name,
                metadata.revision.to_string(),
                format!("{}/{}", status.live, status.proxies),
                refused.join("; "),
            ]
        })
        .collect();
    table(["KIND", "NAME", "REVISION", "LIVE", "REFUSED"], &rows)
}

pub(crate) async fn delete(
    connection: &Connection,
    kinds: Kinds,
    name: String,
    (revision, way): (u64, Way),
) -> Result<(), Failure> {
    let Kinds::One(kind) = kinds else {
        return Err(Failure::BadInput(
            "leeward: delete one resource at a time, such as `delete route shop`".to_owned(),
        ));
    };
    let mut client = client(connection)?;
    let request = v1::DeleteRequest {
        r#ref: Some(reference(kind, name.clone())),
        revision,
        rollout: way.rollout.unwrap_or_default(),
        at_once: way.at_once,
        supersede: way.supersede,
    };
    let deleted = call(connection.control, client.delete(request)).await?;
    say(&format!("{kind}/{name} deleted\nrevision {}", deleted.revision));
    Ok(())
}

pub(crate) async fn watch(connection: &Connection, after: u64, selector: String) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let request = v1::WatchRequest {
        after_revision: after,
        kind: v1::Kind::Unspecified.into(),
        selector,
    };
    let mut events = call(connection.control, client.watch(request)).await?;
    while let Some(event) = events.message().await.map_err(|s| told(connection.control, &s))? {
        let what = match event.event {
            Some(v1::watch_event::Event::Put(resource)) => {
                let name = resource.metadata.as_ref().map_or("", |m| m.name.as_str());
                format!("put {}/{name}", kind_name(&resource))
            }
            Some(v1::watch_event::Event::Deleted(key)) => format!("deleted {}", shown(&key)),
            Some(v1::watch_event::Event::Synced(_)) => "synced".to_owned(),
            None => continue,
        };
        say(&format!("{} {what}", event.revision));
    }
    Ok(())
}

pub(crate) async fn proxies(connection: &Connection, format: Format) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let answer = call(connection.control, client.list_proxies(v1::ListProxiesRequest {})).await?;
    let refusal = |q: &v1::Quarantined| {
        let key = q.r#ref.clone().unwrap_or_default();
        format!(
            "{:?}/{} revision {}: {}",
            key.kind(),
            key.name,
            q.revision,
            q.reason
        )
    };
    if format != Format::Table {
        let proxies: Vec<Value> = answer
            .proxies
            .iter()
            .map(|p| {
                json!({
                    "name": p.name, "zone": p.zone, "version": p.version, "connected": p.connected,
                    "generation": p.generation, "orphans": p.orphans,
                    "quarantined": p.quarantined.iter().map(refusal).collect::<Vec<_>>(),
                })
            })
            .collect();
        say(&format!(
            "{:#}",
            json!({"revision": answer.revision, "proxies": proxies, "missing": answer.missing})
        ));
        return Ok(());
    }
    let rows: Vec<[String; 6]> = answer
        .proxies
        .iter()
        .map(|p| {
            [
                p.name.clone(),
                p.zone.clone(),
                if p.connected {
                    "yes".to_owned()
                } else {
                    "no".to_owned()
                },
                p.generation.to_string(),
                answer.revision.saturating_sub(p.generation).to_string(),
                p.quarantined.iter().map(refusal).collect::<Vec<_>>().join("; "),
            ]
        })
        .collect();
    say(&table(
        ["NAME", "ZONE", "CONNECTED", "GENERATION", "BEHIND", "QUARANTINED"],
        &rows,
    ));
    for missing in &answer.missing {
        complain(&format!("leeward: no answer from the control plane at {missing}"));
    }
    Ok(())
}

pub(crate) fn reference(kind: Kind, name: String) -> v1::ResourceRef {
    v1::ResourceRef {
        kind: render_kind(kind).into(),
        name,
    }
}
