//! What a queue is made of in NATS, and how a proxy gets there.
//!
//! For the queue NAME there are four streams: what waits, dead letters, failed attempts of what waits, and results. In
//! each an entry is one message under a subject of its own, which ends in the entry's id. All mesh has one bucket of
//! leases beside them. No stream or bucket is used by two queues: a queue's name has no underscore.

use crate::entry::EntryId;
use crate::store::Why;
use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType, Stream};
use async_nats::jetstream::{self, Context, kv};
use async_nats::{Client, ConnectOptions, ServerAddr};
use leeward_policy::model::{Queue, QueueStore};
use std::error::Error;
use std::time::Duration;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the server may take for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a lease is good without being renewed.
pub(super) const LEASE: Duration = Duration::from_secs(10);
/// How long the server keeps what waits. Entries expire by the hand of whoever delivers, which makes dead letters of
/// them; where nobody has for long, the streams still don't grow for ever. Twice the longest `max_age` of policy, and
/// not that of the queue: were it lowered, the server would drop what it has accepted, and nobody would hear of it.
const FORGOTTEN: Duration = Duration::from_secs(61 * 24 * 3600);
/// Results that are kept, whatever policy's time for them; the oldest go first.
const MAX_RESULTS: i64 = 1_000_000;

/// A queue's streams, at a server that answers.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) client: Client,
    pub(super) context: Context,
    pub(super) waiting: Stream,
    pub(super) dead: Stream,
    pub(super) attempts: Stream,
    pub(super) results: Stream,
    pub(super) leases: kv::Store,
    /// Of the stream of what waits: another one begins to count anew.
    pub(super) generation: u64,
}

/// The kinds of message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Waiting,
    Dead,
    Attempts,
    Results,
}

impl Kind {
    const fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Dead => "dead",
            Self::Attempts => "attempts",
            Self::Results => "results",
        }
    }

    fn stream(self, queue: &str) -> String {
        format!("leeward_{queue}_{}", self.word())
    }

    /// The subject of an entry's message.
    pub(super) fn subject(self, queue: &str, id: EntryId) -> String {
        format!("leeward.queue.{queue}.{}.{id}", self.word())
    }
}

/// The entry of a subject.
pub(super) fn id_of(subject: &str) -> Option<EntryId> {
    subject.rsplit('.').next()?.parse().ok()
}

/// Connects to one of the servers of a queue.
pub(super) async fn connect(queue: &Queue, name: &str) -> Result<Client, Why> {
    let QueueStore::JetStream {
        servers,
        credentials_file,
        ..
    } = &queue.store
    else {
        return Err("it is kept on disk".into());
    };
    let mut addresses = Vec::new();
    for server in servers {
        let address: ServerAddr = server
            .parse()
            .map_err(|error| Why::from(format!("can't read the server's URL {server:?}: {error}")))?;
        addresses.push(address);
    }
    let mut options = ConnectOptions::new()
        .name(name)
        .connection_timeout(CONNECT)
        .request_timeout(Some(ANSWER));
    if let Some(file) = credentials_file {
        let text = tokio::fs::read_to_string(&**file)
            .await
            .map_err(|error| Why::from(format!("can't read {file}: {error}")))?;
        options = options
            .credentials(&text)
            .map_err(|error| Why::from(format!("{file} has no credentials: {error}")))?;
    }
    options
        .connect(addresses)
        .await
        .map_err(failed("connect to NATS"))
}

/// Makes the streams of a queue, or has them be as policy says now.
pub(super) async fn set_up(client: Client, name: &str, queue: &Queue) -> Result<Connected, Why> {
    let context = jetstream::context::ContextBuilder::new()
        .timeout(ANSWER)
        .ack_timeout(ANSWER)
        .build(client.clone());
    let replicas = match &queue.store {
        QueueStore::JetStream { replicas, .. } => usize::try_from(*replicas).unwrap_or(1),
        QueueStore::Sqlite => 1,
    };
    let base = |kind: Kind| Config {
        name: kind.stream(name),
        subjects: vec![format!("leeward.queue.{name}.{}.*", kind.word())],
        storage: StorageType::File,
        num_replicas: replicas,
        max_messages_per_subject: 1,
        max_bytes: -1,
        max_messages: -1,
        ..Config::default()
    };
    let configs = [
        Config {
            max_messages: signed(queue.max_entries),
            max_bytes: signed(queue.max_bytes),
            max_age: FORGOTTEN,
            discard: DiscardPolicy::New,
            // One message under a subject is the newest, whatever `discard` says; ids differ.
            ..base(Kind::Waiting)
        },
        Config {
            max_messages: signed(queue.max_dead_letters),
            discard: DiscardPolicy::Old,
            ..base(Kind::Dead)
        },
        Config {
            max_messages: signed(queue.max_entries),
            max_age: FORGOTTEN,
            discard: DiscardPolicy::Old,
            ..base(Kind::Attempts)
        },
        Config {
            max_messages: MAX_RESULTS,
            max_age: queue.keep_results.max(Duration::from_secs(1)),
            discard: DiscardPolicy::Old,
            ..base(Kind::Results)
        },
    ];
    for config in configs {
        context
            .create_or_update_stream(config)
            .await
            .map_err(failed("make a stream"))?;
    }
    let leases = leases(&context, replicas).await?;
    let waiting = stream(&context, Kind::Waiting, name).await?;
    let created = waiting.cached_info().created.unix_timestamp_nanos();
    Ok(Connected {
        dead: stream(&context, Kind::Dead, name).await?,
        attempts: stream(&context, Kind::Attempts, name).await?,
        results: stream(&context, Kind::Results, name).await?,
        generation: u64::try_from(created).unwrap_or(1),
        waiting,
        leases,
        client,
        context,
    })
}

async fn stream(context: &Context, kind: Kind, queue: &str) -> Result<Stream, Why> {
    context
        .get_stream(kind.stream(queue))
        .await
        .map_err(failed("read a stream"))
}

async fn leases(context: &Context, replicas: usize) -> Result<kv::Store, Why> {
    let bucket = "leeward_leases";
    if let Ok(found) = context.get_key_value(bucket).await {
        return Ok(found);
    }
    // A bucket is a stream of this form. The library's own way to make one reads the account first, which it can't
    // of servers before 2.10.
    let config = Config {
        name: format!("KV_{bucket}"),
        description: Some("which proxy delivers from a queue".to_owned()),
        subjects: vec![format!("$KV.{bucket}.>")],
        storage: StorageType::File,
        max_messages_per_subject: 1,
        max_bytes: -1,
        max_messages: -1,
        max_age: LEASE,
        num_replicas: replicas,
        discard: DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..Config::default()
    };
    context
        .create_stream(config)
        .await
        .map_err(failed("make the bucket of leases"))?;
    context
        .get_key_value(bucket)
        .await
        .map_err(failed("use the bucket of leases"))
}

/// What an error says, with what is behind it.
pub(super) fn failed<E: Error>(act: &'static str) -> impl Fn(E) -> Why {
    move |error| {
        let mut text = format!("can't {act}: {error}");
        let mut source = error.source();
        while let Some(error) = source {
            let said = error.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            source = error.source();
        }
        text.into()
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
