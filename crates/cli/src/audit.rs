//! Who did what with the control plane.

use crate::Connection;
use crate::api::{call, reference, shown};
use crate::connect::link;
use crate::output::{Failure, Format, Kinds, say, table};
use clap::Args;
use leeward_proto::v1;
use leeward_proto::v1::audit_service_client::AuditServiceClient;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// Entries on a page.
const PAGE: u32 = 500;

/// What to show.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    connection: Connection,
    /// Only of whom: a SPIFFE id, or oidc: and a name; a * at the end stands for anything.
    #[arg(long, default_value = "", hide_default_value = true)]
    who: String,
    /// Only what changed this resource, such as route/shop.
    #[arg(long, value_name = "KIND/NAME", value_parser = resource)]
    resource: Option<v1::ResourceRef>,
    /// Only what is no older than this, such as 2h.
    #[arg(long, value_name = "DURATION", value_parser = age)]
    since: Option<Duration>,
    /// At most this many.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// How to show them.
    #[arg(short, long, default_value = "table")]
    output: Format,
}

fn age(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .ok_or_else(|| "want a duration such as 30m or 24h".to_owned())
}

fn resource(text: &str) -> Result<v1::ResourceRef, String> {
    let want = "want KIND/NAME, such as route/shop";
    let (kind, name) = text.split_once('/').ok_or(want)?;
    match crate::output::kind(kind)? {
        Kinds::One(kind) => Ok(reference(kind, name.to_owned())),
        Kinds::All => Err(want.to_owned()),
    }
}

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let mut client = AuditServiceClient::new(link(&options.connection)?)
        .max_decoding_message_size(crate::api::MAX_MESSAGE);
    #[expect(
        clippy::disallowed_methods,
        reason = "people say how long ago by their own clock"
    )]
    let since = options.since.and_then(|age| SystemTime::now().checked_sub(age));
    let limit = usize::try_from(options.limit).unwrap_or(usize::MAX);
    let (mut entries, mut page_token) = (Vec::new(), String::new());
    while entries.len() < limit {
        let request = v1::ListAuditRequest {
            who: options.who.clone(),
            resource: options.resource.clone(),
            since: since.map(prost_types::Timestamp::from),
            page_size: PAGE.min(options.limit),
            page_token,
        };
        let page = call(options.connection.control, client.list_audit(request)).await?;
        entries.extend(page.entries);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    entries.truncate(limit);
    match options.output {
        Format::Json => say(&format!(
            "{:#}",
            json!({"entries": entries.iter().map(to_json).collect::<Vec<_>>()})
        )),
        Format::Yaml => {
            return Err(Failure::BadInput("leeward: want -o table or -o json".to_owned()));
        }
        Format::Table => {
            let rows: Vec<_> = entries.iter().map(row).collect();
            say(&table(
                ["TIME", "WHO", "METHOD", "FROM", "OUTCOME", "WHAT"],
                &rows,
            ));
        }
    }
    Ok(())
}

fn row(entry: &v1::AuditEntry) -> [String; 6] {
    let change = |change: &v1::AuditChange| {
        let name = change.r#ref.as_ref().map(shown).unwrap_or_default();
        match (change.before, change.after) {
            (0, after) => format!("{name} made at {after}"),
            (_, 0) => format!("{name} deleted"),
            (before, after) => format!("{name} {before} -> {after}"),
        }
    };
    let mut what: Vec<_> = entry.changes.iter().map(change).collect();
    if !entry.message.is_empty() {
        what.push(entry.message.clone());
    }
    if !entry.reason.is_empty() {
        let role = if entry.breakglass { "BREAKGLASS, " } else { "" };
        what.push(format!("({role}for {:?})", entry.reason));
    }
    [
        entry.time.map(|time| time.to_string()).unwrap_or_default(),
        entry.who.clone(),
        entry.method.trim_start_matches("leeward.v1.").to_owned(),
        entry.from.clone(),
        entry.outcome.clone(),
        what.join(", "),
    ]
}

fn to_json(entry: &v1::AuditEntry) -> Value {
    let change = |change: &v1::AuditChange| {
        let name = change.r#ref.as_ref().map(shown).unwrap_or_default();
        json!({"resource": name, "before": change.before, "after": change.after})
    };
    json!({
        "time": entry.time.map(|time| time.to_string()), "who": entry.who, "method": entry.method, "from": entry.from,
        "userAgent": entry.user_agent, "outcome": entry.outcome, "message": entry.message, "reason": entry.reason,
        "breakglass": entry.breakglass, "revision": entry.revision,
        "changes": entry.changes.iter().map(change).collect::<Vec<_>>(),
    })
}
