//! Queued requests at a proxy: which wait, which are dead letters, and what is to become of those.

use crate::output::{Failure, Format, say, table};
use crate::proxy::{entries, get, post};
use clap::{Args, Subcommand};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show how each queue of a proxy is.
    List {
        #[command(flatten)]
        proxy: Proxy,
        /// How to show them.
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Show a queue's entries, or one of them.
    Show {
        #[command(flatten)]
        proxy: Proxy,
        /// The queue.
        queue: String,
        /// One entry, with all that is kept of it.
        id: Option<String>,
        /// The dead letters instead of what waits.
        #[arg(long, conflicts_with = "id")]
        dead: bool,
        /// Entries at most, 1 to 1000.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1000))]
        limit: u64,
        /// From after this place, as the listing before says.
        #[arg(long, default_value_t = 0)]
        after: u64,
        /// How to show them.
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Send dead letters again.
    Retry(Chosen),
    /// Drop dead letters, or one entry that waits. What is dropped is gone.
    Drop(Chosen),
}

/// Which proxy.
#[derive(Args, Debug)]
pub(crate) struct Proxy {
    /// The proxy's admin listener.
    #[arg(long, default_value = "127.0.0.1:15020", value_name = "IP:PORT")]
    admin: SocketAddr,
}

/// Which entries.
#[derive(Args, Debug)]
pub(crate) struct Chosen {
    #[command(flatten)]
    proxy: Proxy,
    /// The queue.
    queue: String,
    /// One entry.
    #[arg(required_unless_present = "all")]
    id: Option<String>,
    /// All dead letters.
    #[arg(long, conflicts_with = "id")]
    all: bool,
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::List { proxy, output } => {
            let answer = get(proxy.admin, "/queues").await?;
            show(&answer, output, queue_table);
        }
        Command::Show {
            proxy,
            queue,
            id: Some(id),
            output,
            ..
        } => {
            let answer = get(proxy.admin, &format!("/queues/{}/{}", part(&queue)?, part(&id)?)).await?;
            show(&answer, output, |answer| format!("{answer:#}"));
        }
        Command::Show {
            proxy,
            queue,
            id: None,
            dead,
            limit,
            after,
            output,
        } => {
            let state = if dead { "dead" } else { "waiting" };
            let path = format!(
                "/queues/{}?state={state}&limit={limit}&after={after}",
                part(&queue)?
            );
            let answer = get(proxy.admin, &path).await?;
            show(&answer, output, entry_table);
        }
        Command::Retry(chosen) => act(&chosen, "retry", "will be sent again").await?,
        Command::Drop(chosen) => act(&chosen, "drop", "dropped").await?,
    }
    Ok(())
}

async fn act(chosen: &Chosen, verb: &str, done: &str) -> Result<(), Failure> {
    let mut path = format!("/queues/{}/{verb}", part(&chosen.queue)?);
    path = match &chosen.id {
        Some(id) => format!("{path}?id={}", part(id)?),
        None => format!("{path}?all=true"),
    };
    let answer = post(chosen.proxy.admin, &path).await?;
    let count = answer.get("entries").and_then(Value::as_u64).unwrap_or(0);
    let what = if count == 1 { "entry" } else { "entries" };
    say(&format!("{count} {what} {done}"));
    Ok(())
}

/// A name that stands in a path as it is.
fn part(text: &str) -> Result<&str, Failure> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    if !text.is_empty() && text.bytes().all(plain) {
        return Ok(text);
    }
    Err(Failure::BadInput(format!(
        "{text:?} is neither a queue's name nor an entry's id; want letters, digits and dashes"
    )))
}

fn show(answer: &Value, format: Format, people: impl Fn(&Value) -> String) {
    match format {
        Format::Table => say(&people(answer)),
        // JSON is YAML.
        Format::Json | Format::Yaml => say(&format!("{answer:#}")),
    }
}

fn queue_table(answer: &Value) -> String {
    let rows: Vec<[String; 8]> = entries(answer, "queues")
        .iter()
        .map(|queue| {
            [
                text(queue, "queue"),
                text(queue, "store"),
                text(queue, "waiting"),
                text(queue, "bytes"),
                format!("{}s", text(queue, "oldest_seconds")),
                text(queue, "dead"),
                text(queue, "delivered_total"),
                text(queue, "state"),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "the proxy has no queues".to_owned();
    }
    table(
        [
            "QUEUE",
            "STORE",
            "WAITING",
            "BYTES",
            "OLDEST",
            "DEAD",
            "DELIVERED",
            "STATE",
        ],
        &rows,
    )
}

fn entry_table(answer: &Value) -> String {
    let rows: Vec<[String; 7]> = entries(answer, "entries")
        .iter()
        .map(|entry| {
            [
                text(entry, "id"),
                age(entry),
                text(entry, "key"),
                text(entry, "attempts"),
                format!("{} {}", text(entry, "method"), text(entry, "target")),
                text(entry, "bytes"),
                text(entry, "why"),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "no entries".to_owned();
    }
    let mut shown = table(["ID", "AGE", "KEY", "ATTEMPTS", "REQUEST", "BYTES", "WHY"], &rows);
    if let Some(next) = answer.get("next").and_then(Value::as_u64) {
        shown.push_str(&format!("\nthere may be more: --after {next}"));
    }
    shown
}

/// A field as people read it; a dash for what isn't there.
fn text(value: &Value, field: &str) -> String {
    match value.get(field) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn age(entry: &Value) -> String {
    let at = entry.get("accepted_unix_ms").and_then(Value::as_u64).unwrap_or(0);
    #[expect(clippy::disallowed_methods, reason = "an age for people")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let age = now.saturating_sub(Duration::from_millis(at));
    leeward_proto::manifest::duration_text(Duration::from_secs(age.as_secs()))
}
