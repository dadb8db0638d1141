//! Commands that talk to a control plane.

use crate::Connection;
use crate::check::read;
use crate::lint::Shown;
use crate::output::{Failure, Format, Kinds, complain, kind_name, say, table};
use leeward_identity::{Identity, channel};
use leeward_policy::Kind;
use leeward_proto::manifest::{to_json, to_yaml};
use leeward_proto::v1::policy_service_client::PolicyServiceClient;
use leeward_proto::{render_kind, v1};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::Channel;
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
pub(crate) type Client = PolicyServiceClient<Channel>;

pub(crate) fn client(connection: &Connection) -> Result<Client, Failure> {
    let identity = Identity::load(&connection.identity)?;
    Ok(
        PolicyServiceClient::new(channel::connect_lazy(identity, connection.control))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE),
    )
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

pub(crate) async fn apply(
    connection: &Connection,
    files: &[PathBuf],
    dry_run: bool,
    way: Way,
) -> Result<(), Failure> {
    let resources = read(files)?;
    let mut client = client(connection)?;
    let request = v1::ApplyRequest {
        resources,
        dry_run,
        rollout: way.rollout.unwrap_or_default(),
        at_once: way.at_once,
        supersede: way.supersede,
    };
    let applied = call(connection.control, client.apply(request)).await?;
    let verb = if dry_run { "would be applied" } else { "applied" };
    for (resource, changed) in applied.resources.iter().zip(&applied.changed) {
        let name = resource.metadata.as_ref().map_or("", |m| m.name.as_str());
        let what = if *changed { verb } else { "unchanged" };
        say(&format!("{}/{name} {what}", kind_name(resource)));
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

pub(crate) async fn get(
    connection: &Connection,
    kinds: Kinds,
    name: Option<String>,
    format: Format,
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
        (kinds, None) => list(connection, &mut client, kinds).await?,
    };
    match format {
        Format::Yaml => say(&resources.iter().map(to_yaml).collect::<Vec<_>>().join("---\n")),
        Format::Json => {
            let all: Vec<Value> = resources.iter().map(to_json).collect();
            let value = if let [one] = all.as_slice() {
                one.clone()
            } else {
                json!({"items": all})
            };
            say(&format!("{value:#}"));
        }
        Format::Table => say(&resource_table(&resources)),
    }
    Ok(())
}

pub(crate) async fn list(
    connection: &Connection,
    client: &mut Client,
    kinds: Kinds,
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
        };
        let page = call(connection.control, client.list(request)).await?;
        resources.extend(page.resources);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(resources);
        }
    }
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

pub(crate) async fn watch(connection: &Connection, after: u64) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let request = v1::WatchRequest {
        after_revision: after,
        kind: v1::Kind::Unspecified.into(),
    };
    let mut events = call(connection.control, client.watch(request)).await?;
    while let Some(event) = events.message().await.map_err(|s| told(connection.control, &s))? {
        let what = match event.event {
            Some(v1::watch_event::Event::Put(resource)) => {
                let name = resource.metadata.as_ref().map_or("", |m| m.name.as_str());
                format!("put {}/{name}", kind_name(&resource))
            }
            Some(v1::watch_event::Event::Deleted(key)) => format!("deleted {:?}/{}", key.kind(), key.name),
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
        crate::output::complain(&format!("leeward: no answer from the control plane at {missing}"));
    }
    Ok(())
}

pub(crate) fn reference(kind: Kind, name: String) -> v1::ResourceRef {
    v1::ResourceRef {
        kind: render_kind(kind).into(),
        name,
    }
}
