//! A queue in NATS JetStream: it outlives the node, and any proxy of the mesh delivers from it, one at a time.
//!
//! An entry is accepted once the stream's leader has acknowledged it, which with `replicas` above 1 means that most of
//! the replicas have it. How soon a server syncs its disk is a matter of its own settings: without replicas, what it
//! has acknowledged in the last moments survives `kill -9` but not a power cut.
//!
//! The proxy with the lease reads what waits, in order, into its schedule, and deletes from the stream what has ended.

mod layout;
mod lease;
mod message;
mod withdraw;

use crate::clock::Clock;
use crate::codec;
use crate::entry::{
    EntryDetail, EntryId, EntryState, EntrySummary, Listed, Listing, MAX_LISTED, Refused, StoredRequest,
    Which,
};
use crate::schedule::Row;
use crate::store::{Fetched, Health, LoadError, NewEntry, Shared, Totals, Why};
use crate::verdict::Settlement;
use arc_swap::ArcSwapOption;
use async_nats::connection::State;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::{Client, HeaderMap};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use layout::{Connected, Kind, failed, id_of};
use lease::{Lease, Renewed};
use leeward_policy::model::Queue;
use message::{Attempts, Meta, Outcome, Read};
use prost::Message;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use withdraw::Withdrawals;

/// How often the server is asked what there is.
const LOOK: Duration = Duration::from_millis(500);
/// How often a proxy asks for a lease that another has.
const LEAD: Duration = Duration::from_secs(1);
/// The pauses between attempts to connect: the first, and the longest, which each failure doubles up to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Messages read at once.
const PAGE: usize = 1000;
/// Requests to the server at once for one listing.
const AT_ONCE: usize = 32;

/// A queue's streams.
#[derive(Debug)]
pub(crate) struct JetStream {
    shared: Arc<Shared>,
    clock: Clock,
    /// Who holds the lease, for people.
    owner: String,
    connected: ArcSwapOption<Connected>,
    /// Held while this proxy delivers. Poison is harmless: it is only ever replaced.
    lease: Mutex<Option<Lease>>,
    /// Attempts of what waits, while this proxy delivers. Poison is harmless: entries are put in and taken out whole.
    attempts: Mutex<HashMap<EntryId, Attempts>>,
    reader: tokio::sync::Mutex<Option<Reader>>,
    withdrawals: Withdrawals,
}

/// What waits, in order, as far as it was fetched.
#[derive(Debug)]
struct Reader {
    generation: u64,
    after: u64,
    consumer: PullConsumer,
}

impl JetStream {
    /// A queue that [`Self::tend`] connects. `owner` is this proxy.
    pub(crate) fn new(owner: String, shared: Arc<Shared>, clock: Clock) -> Self {
        Self {
            shared,
            clock,
            owner,
            connected: ArcSwapOption::empty(),
            lease: Mutex::default(),
            attempts: Mutex::default(),
            reader: tokio::sync::Mutex::default(),
            withdrawals: Withdrawals::default(),
        }
    }

    /// Connects, has the streams be as policy says, and looks how they are, for as long as it is polled. What has
    /// connected once connects again by itself.
    pub(crate) async fn tend(&self) {
        let mut pause = PAUSES.0;
        loop {
            let queue = self.shared.queue();
            let why = match layout::connect(&queue, &self.owner).await {
                Ok(client) => self.keep(client, &mut pause).await,
                Err(why) => why,
            };
            self.unavailable(why);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Ends with the reason for which the connection is to be made anew.
    async fn keep(&self, client: Client, pause: &mut Duration) -> Why {
        let mut done: Option<Arc<Queue>> = None;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            let queue = self.shared.queue();
            if client.connection_state() != State::Connected {
                self.unavailable("NATS is away".into());
                done = None;
                continue;
            }
            if done.as_ref().is_none_or(|done| !Arc::ptr_eq(done, &queue)) {
                let set_up = Box::pin(layout::set_up(client.clone(), &self.shared.name, &queue));
                let connected = match set_up.await {
                    Ok(connected) => connected,
                    Err(why) => return why,
                };
                self.connected.store(Some(Arc::new(connected)));
                done = Some(queue);
                self.shared.wake();
            }
            match self.look().await {
                Ok(totals) => {
                    self.shared.totals.store(Some(Arc::new(totals)));
                    self.shared.health.set(Health::Ready);
                    *pause = PAUSES.0;
                }
                Err(why) => {
                    self.unavailable(why);
                    done = None;
                    tokio::time::sleep(*pause).await;
                    *pause = (*pause * 2).min(PAUSES.1);
                }
            }
        }
    }

    fn unavailable(&self, why: Why) {
        if self.shared.health.is_ready() || self.shared.health.why() != why {
            tracing::warn!(queue = %self.shared.name, %why, "a queue can't be used");
        }
        self.shared.health.set(Health::Unavailable(why));
    }

    async fn look(&self) -> Result<Totals, Why> {
        let js = self.connected()?;
        let waiting = js.waiting.get_info().await.map_err(failed("look at a stream"))?;
        let dead = js.dead.get_info().await.map_err(failed("look at a stream"))?;
        let oldest = message::millis(waiting.state.first_timestamp.unix_timestamp_nanos());
        Ok(Totals {
            waiting: waiting.state.messages,
            bytes: waiting.state.bytes,
            dead: dead.state.messages,
            oldest_ms: (waiting.state.messages > 0).then_some(oldest),
        })
    }

    fn connected(&self) -> Result<Arc<Connected>, Why> {
        let connected = self
            .connected
            .load_full()
            .ok_or_else(|| self.shared.health.why())?;
        // What is asked of a client that is not connected is sent when it is again, which may be long after who
        // asked was told that it failed.
        if connected.client.connection_state() == State::Connected {
            Ok(connected)
        } else {
            Err("NATS is away".into())
        }
    }

    pub(crate) async fn accept(&self, new: NewEntry) -> Result<(), Refused> {
        let unavailable = |why| Refused::Unavailable { why };
        let js = self.connected().map_err(unavailable)?;
        let headers = Meta::new(&new, self.clock.now_ms()).headers(&new.id.to_string());
        let subject = Kind::Waiting.subject(&self.shared.name, new.id);
        match publish(&js, subject.clone(), headers, new.bytes).await {
            Ok(_) => Ok(()),
            Err(NotTaken::Full(limit)) => Err(Refused::Full { limit }),
            Err(NotTaken::TooLarge(why)) => Err(unavailable(why)),
            Err(NotTaken::Failed(why)) => {
                self.withdrawals.begin(js, &self.shared.name, new.id, subject);
                Err(unavailable(why))
            }
        }
    }

    pub(crate) async fn state(&self, id: EntryId) -> Result<Option<EntryState>, Why> {
        let js = self.connected()?;
        let subject = |kind: Kind| kind.subject(&self.shared.name, id);
        if let Some(found) = message::last(&js.results, &subject(Kind::Results)).await?
            && let Ok(outcome) = Outcome::decode(found.payload)
        {
            return Ok(Some(EntryState::Delivered {
                status: u16::try_from(outcome.status).unwrap_or(0),
                at_ms: message::millis(found.time.unix_timestamp_nanos()),
                attempts: outcome.attempts,
            }));
        }
        let found = self.find(&js, id).await?;
        Ok(found.map(|(_, summary, _)| summary.state))
    }

    pub(crate) async fn detail(&self, id: EntryId) -> Result<Option<EntryDetail>, Why> {
        let js = self.connected()?;
        let Some((_, summary, payload)) = self.find(&js, id).await? else {
            return Ok(None);
        };
        let request = codec::decode(payload).map_err(|error| Why::from(error.to_string()))?;
        Ok(Some(EntryDetail { summary, request }))
    }

    /// An entry that waits or is dead, with its request.
    async fn find(&self, js: &Connected, id: EntryId) -> Result<Option<(Listed, EntrySummary, Bytes)>, Why> {
        for (kind, stream, listed) in [
            (Kind::Waiting, &js.waiting, Listed::Waiting),
            (Kind::Dead, &js.dead, Listed::Dead),
        ] {
            let subject = kind.subject(&self.shared.name, id);
            if let Some(found) = message::last(stream, &subject).await? {
                let payload = found.payload.clone();
                let read = Read {
                    seq: found.sequence,
                    subject,
                    headers: found.headers,
                    payload: Bytes::new(),
                    at_ms: message::millis(found.time.unix_timestamp_nanos()),
                };
                let summary = self.summary(js, read, listed).await?;
                return Ok(summary.map(|summary| (listed, summary, payload)));
            }
        }
        Ok(None)
    }

    async fn summary(&self, js: &Connected, read: Read, listed: Listed) -> Result<Option<EntrySummary>, Why> {
        let Some(id) = id_of(&read.subject) else {
            return Ok(None);
        };
        let meta = Meta::of(&read.headers);
        let state = match listed {
            Listed::Dead => meta.dead(read.at_ms),
            Listed::Waiting => {
                let subject = Kind::Attempts.subject(&self.shared.name, id);
                let found = message::last(&js.attempts, &subject).await?;
                let attempts = found.and_then(|m| Attempts::decode(m.payload).ok());
                EntryState::Waiting {
                    since_ms: read.at_ms,
                    attempts: attempts.as_ref().map_or(0, |a| a.attempts),
                    last_error: attempts.map(|a| a.last_error.into()),
                }
            }
        };
        Ok(Some(EntrySummary {
            place: read.seq,
            id,
            state,
            service: meta.service.into(),
            route: meta.route.into(),
            key: meta.key.map(Arc::from),
            method: meta.method,
            target: meta.target,
            size: meta.size,
            accepted_ms: meta.accepted_ms,
        }))
    }

    pub(crate) async fn list(&self, what: Listing) -> Result<Vec<EntrySummary>, Why> {
        let js = self.connected()?;
        let stream = match what.kind {
            Listed::Waiting => &js.waiting,
            Listed::Dead => &js.dead,
        };
        let reader = message::reader(stream, what.after, true).await?;
        let page = message::page(&reader, what.limit.clamp(1, MAX_LISTED)).await?;
        let summaries = stream::iter(page.into_iter().map(|read| self.summary(&js, read, what.kind)));
        let summaries: Vec<_> = summaries.buffered(AT_ONCE).try_collect().await?;
        Ok(summaries.into_iter().flatten().collect())
    }

    pub(crate) async fn retry(&self, which: Which) -> Result<(u64, Option<&'static str>), Why> {
        let js = self.connected()?;
        if let Which::One(id) = which {
            return self.retry_one(&js, id).await;
        }
        // Those that become dead while this is done are not meant.
        let last = js
            .dead
            .get_info()
            .await
            .map_err(failed("look at a stream"))?
            .state
            .last_sequence;
        let reader = message::reader(&js.dead, 0, true).await?;
        let mut all = 0;
        loop {
            let page = message::page(&reader, PAGE).await?;
            let more = page.len() == PAGE;
            for read in page {
                if read.seq > last {
                    return Ok((all, None));
                }
                let Some(id) = id_of(&read.subject) else { continue };
                let (moved, full) = self.retry_one(&js, id).await?;
                all += moved;
                if full.is_some() {
                    return Ok((all, full));
                }
            }
            if !more {
                return Ok((all, None));
            }
        }
    }

    async fn retry_one(&self, js: &Connected, id: EntryId) -> Result<(u64, Option<&'static str>), Why> {
        let subject = Kind::Dead.subject(&self.shared.name, id);
        let Some(found) = message::last(&js.dead, &subject).await? else {
            return Ok((0, None));
        };
        let meta = Meta {
            reason: String::new(),
            attempts: 0,
            ..Meta::of(&found.headers)
        };
        // The same letter is made to wait once, should this be done again because its deletion failed.
        let headers = meta.headers(&format!("{id}.{}", found.sequence));
        let waiting = Kind::Waiting.subject(&self.shared.name, id);
        match publish(js, waiting, headers, found.payload).await {
            Ok(_) => {
                message::delete(&js.dead, found.sequence).await?;
                Ok((1, None))
            }
            Err(NotTaken::Full(limit)) => Ok((0, Some(limit))),
            Err(NotTaken::TooLarge(why) | NotTaken::Failed(why)) => Err(why),
        }
    }

    pub(crate) async fn discard(&self, which: Which) -> Result<u64, Why> {
        let js = self.connected()?;
        let id = match which {
            Which::AllDead => {
                let purged = js.dead.purge().await.map_err(failed("drop dead letters"))?;
                return Ok(purged.purged);
            }
            Which::One(id) => id,
        };
        let Some((listed, summary, _)) = self.find(&js, id).await? else {
            return Ok(0);
        };
        match listed {
            Listed::Dead => message::delete(&js.dead, summary.place).await?,
            Listed::Waiting => {
                message::delete(&js.waiting, summary.place).await?;
                self.shared.removed(summary.place);
            }
        }
        Ok(1)
    }

    /// How long to wait before [`Self::lead`] is asked again.
    pub(crate) const fn lead_again(&self) -> Duration {
        LEAD
    }

    pub(crate) async fn lead(&self) -> Result<bool, Why> {
        if self.held().is_some() {
            return Ok(true);
        }
        let js = self.connected()?;
        let Some(lease) = lease::take(&js, &self.shared.name, &self.owner).await? else {
            return Ok(false);
        };
        match self.read_attempts(&js).await {
            Ok(attempts) => {
                *self.attempts.lock().unwrap_or_else(PoisonError::into_inner) = attempts;
                *self.reader.lock().await = None;
                self.hold(Some(lease));
                Ok(true)
            }
            Err(why) => {
                lease::give_back(&js, &self.shared.name, lease).await;
                Err(why)
            }
        }
    }

    fn held(&self) -> Option<Lease> {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, lease: Option<Lease>) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    async fn read_attempts(&self, js: &Connected) -> Result<HashMap<EntryId, Attempts>, Why> {
        let reader = message::reader(&js.attempts, 0, false).await?;
        let mut all = HashMap::new();
        loop {
            let page = message::page(&reader, PAGE).await?;
            let last = page.len() < PAGE;
            all.extend(
                page.into_iter()
                    .filter_map(|read| Some((id_of(&read.subject)?, Attempts::decode(read.payload).ok()?))),
            );
            if last {
                return Ok(all);
            }
        }
    }

    /// Renews the lease for as long as it is polled; ends when that has failed for too long.
    pub(crate) async fn deposed(&self) {
        let mut failures = 0;
        while let Some(held) = self.held() {
            let js = self.connected().ok();
            match lease::renew(js.as_deref(), &self.shared.name, &self.owner, held, failures).await {
                Renewed::Held(lease) => {
                    self.hold(Some(lease));
                    failures = 0;
                }
                Renewed::Failed => failures += 1,
                Renewed::Lost => self.hold(None),
            }
        }
    }

    pub(crate) async fn resign(&self) {
        let held = self.held();
        self.hold(None);
        if let (Some(lease), Ok(js)) = (held, self.connected()) {
            lease::give_back(&js, &self.shared.name, lease).await;
        }
    }

    pub(crate) async fn fetch(&self, after: u64, limit: usize) -> Result<Fetched, Why> {
        let js = self.connected()?;
        let mut slot = self.reader.lock().await;
        let reader = match slot.take() {
            Some(reader) if reader.after == after && reader.generation == js.generation => reader,
            Some(_) | None => Reader {
                generation: js.generation,
                after,
                consumer: message::reader(&js.waiting, after, true).await?,
            },
        };
        // If this fails the next one begins with another reader at the same place.
        let page = message::page(&reader.consumer, limit).await?;
        let after = page.last().map_or(after, |read| read.seq);
        *slot = Some(Reader { after, ..reader });
        drop(slot);
        let known = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = page.into_iter().map(|read| {
            let meta = Meta::of(&read.headers);
            // What has no id of ours can't be an entry of ours: it is read, and found to be none.
            let id = id_of(&read.subject).unwrap_or(EntryId::of_bytes([0; 16]));
            let attempts = known.get(&id);
            Row {
                seq: read.seq,
                id,
                service: meta.service.into(),
                key: meta.key.map(Arc::from),
                attempts: attempts.map_or(0, |a| a.attempts),
                since_ms: read.at_ms,
                due_ms: attempts.map_or(0, |a| a.due_ms),
            }
        });
        let rows = rows.collect();
        Ok(Fetched {
            generation: js.generation,
            rows,
        })
    }

    pub(crate) async fn load(&self, seq: u64, id: EntryId) -> Result<Option<StoredRequest>, LoadError> {
        use async_nats::jetstream::stream::LastRawMessageErrorKind::NoMessageFound;
        if self.withdrawals.has(id) {
            return Ok(None);
        }
        let js = self.connected().map_err(LoadError::Unavailable)?;
        match js.waiting.get_raw_message(seq).await {
            Ok(found) => codec::decode(found.payload)
                .map(Some)
                .map_err(|error| LoadError::Unreadable(error.to_string().into())),
            Err(error) if error.kind() == NoMessageFound => Ok(None),
            Err(error) => Err(LoadError::Unavailable(failed("read an entry")(error))),
        }
    }

    pub(crate) async fn settle(&self, (seq, id): (u64, EntryId), settlement: Settlement) -> Result<(), Why> {
        let js = self.connected()?;
        let name = &*self.shared.name;
        match settlement {
            Settlement::Delivered { status, attempts } => {
                if !self.shared.queue().keep_results.is_zero() {
                    let status = u32::from(status);
                    let payload = Outcome { status, attempts }.encode_to_vec();
                    let subject = Kind::Results.subject(name, id);
                    publish(&js, subject, HeaderMap::new(), payload.into()).await?;
                }
                message::delete(&js.waiting, seq).await?;
                self.forget_attempts(&js, id).await
            }
            Settlement::Dead { reason, attempts } => {
                let Some(found) = self.raw(&js, seq).await? else {
                    return Ok(());
                };
                let meta = Meta {
                    reason: reason.as_ref().into(),
                    attempts,
                    ..Meta::of(&found.headers)
                };
                let headers = meta.headers(&format!("{id}.{seq}.dead"));
                publish(&js, Kind::Dead.subject(name, id), headers, found.payload).await?;
                message::delete(&js.waiting, seq).await?;
                self.forget_attempts(&js, id).await
            }
            Settlement::Again {
                attempts,
                due_ms,
                why,
            } => {
                let attempts = Attempts {
                    attempts,
                    due_ms,
                    last_error: why.as_ref().into(),
                };
                let payload = attempts.encode_to_vec();
                let subject = Kind::Attempts.subject(name, id);
                publish(&js, subject, HeaderMap::new(), payload.into()).await?;
                let mut known = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
                known.insert(id, attempts);
                Ok(())
            }
        }
    }

    async fn raw(
        &self,
        js: &Connected,
        seq: u64,
    ) -> Result<Option<async_nats::jetstream::message::StreamMessage>, Why> {
        use async_nats::jetstream::stream::LastRawMessageErrorKind::NoMessageFound;
        match js.waiting.get_raw_message(seq).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == NoMessageFound => Ok(None),
            Err(error) => Err(failed("read an entry")(error)),
        }
    }

    /// The attempts of what has ended would count for nothing but a retry, which begins anew.
    async fn forget_attempts(&self, js: &Connected, id: EntryId) -> Result<(), Why> {
        let known = {
            let known = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
            known.contains_key(&id)
        };
        if known {
            let subject = Kind::Attempts.subject(&self.shared.name, id);
            js.attempts
                .purge()
                .filter(subject)
                .await
                .map_err(failed("forget attempts"))?;
            let mut known = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
            known.remove(&id);
        }
        Ok(())
    }
}

/// Why a message was not taken in.
enum NotTaken {
    Full(&'static str),
    /// It was not sent.
    TooLarge(Why),
    /// The server may have it all the same.
    Failed(Why),
}

impl From<NotTaken> for Why {
    fn from(not: NotTaken) -> Self {
        match not {
            NotTaken::Full(limit) => format!("the stream is full: {limit}").into(),
            NotTaken::TooLarge(why) | NotTaken::Failed(why) => why,
        }
    }
}

/// Sends a message and waits until the server has it.
async fn publish(
    js: &Connected,
    subject: String,
    headers: HeaderMap,
    payload: Bytes,
) -> Result<u64, NotTaken> {
    let size = payload.len();
    let sent = async {
        let ack = js.context.publish_with_headers(subject, headers, payload).await?;
        ack.await
    };
    sent.await.map(|ack| ack.sequence).map_err(|error| {
        let kind = error.kind();
        let why = failed("publish")(error);
        // The server has one code for all that its store refuses, and says which it was in words.
        if why.contains("maximum messages exceeded") {
            NotTaken::Full("maxEntries")
        } else if why.contains("maximum bytes exceeded") {
            NotTaken::Full("maxBytes")
        } else if kind == PublishErrorKind::MaxPayloadExceeded {
            NotTaken::TooLarge(
                format!("an entry has {size} bytes, and the server takes less (max_payload): {why}").into(),
            )
        } else {
            NotTaken::Failed(why)
        }
    })
}
