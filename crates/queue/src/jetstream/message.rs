//! What messages carry, and how many are read at once.

use super::layout::failed;
use crate::entry::EntryState;
use crate::store::{NewEntry, Why};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use futures_util::StreamExt;
use prost::Message;
use std::time::Duration;

/// The header that says what an entry is, so that a listing needs no bodies.
const ENTRY: &str = "Leeward-Entry";
/// How long a page may take.
const PAGE: Duration = Duration::from_secs(10);
/// How long a consumer that nobody asks stays at the server.
const IDLE: Duration = Duration::from_secs(60);

/// What an entry is.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Meta {
    #[prost(string, tag = "1")]
    pub(super) service: String,
    #[prost(string, tag = "2")]
    pub(super) route: String,
    #[prost(string, optional, tag = "3")]
    pub(super) key: Option<String>,
    #[prost(string, tag = "4")]
    pub(super) method: String,
    #[prost(string, tag = "5")]
    pub(super) target: String,
    #[prost(uint64, tag = "6")]
    pub(super) size: u64,
    /// In milliseconds since 1970.
    #[prost(uint64, tag = "7")]
    pub(super) accepted_ms: u64,
    /// Of a dead letter.
    #[prost(string, tag = "8")]
    pub(super) reason: String,
    /// Of a dead letter.
    #[prost(uint32, tag = "9")]
    pub(super) attempts: u32,
}

/// What has become of an entry's attempts so far.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Attempts {
    #[prost(uint32, tag = "1")]
    pub(super) attempts: u32,
    #[prost(uint64, tag = "2")]
    pub(super) due_ms: u64,
    #[prost(string, tag = "3")]
    pub(super) last_error: String,
}

/// That an entry was delivered.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Outcome {
    #[prost(uint32, tag = "1")]
    pub(super) status: u32,
    #[prost(uint32, tag = "2")]
    pub(super) attempts: u32,
}

impl Meta {
    pub(super) fn new(new: &NewEntry, now_ms: u64) -> Self {
        Self {
            service: new.service.as_ref().into(),
            route: new.route.as_ref().into(),
            key: new.key.as_deref().map(Into::into),
            method: new.method.clone(),
            target: new.target.clone(),
            size: new.size(),
            accepted_ms: now_ms,
            reason: String::new(),
            attempts: 0,
        }
    }

    /// Headers with it, and the id by which the server knows a message that it has already.
    pub(super) fn headers(&self, message_id: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", message_id);
        // A header's value is a line of text; a key or a target may have anything in it.
        let hex: String = self.encode_to_vec().iter().map(|b| format!("{b:02x}")).collect();
        headers.insert(ENTRY, hex.as_str());
        headers
    }

    /// Of a message; empty if it has none, as one that somebody else has sent.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let read = || {
            let hex = headers.get(ENTRY)?.as_str();
            let digits = hex.as_bytes().chunks(2);
            let bytes: Option<Vec<u8>> = digits
                .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
                .collect();
            Self::decode(bytes?.as_slice()).ok()
        };
        read().unwrap_or_default()
    }

    pub(super) fn dead(&self, at_ms: u64) -> EntryState {
        EntryState::Dead {
            reason: self.reason.as_str().into(),
            at_ms,
            attempts: self.attempts,
        }
    }
}

/// A message without its payload, or with it.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) seq: u64,
    pub(super) subject: String,
    pub(super) headers: HeaderMap,
    pub(super) payload: bytes::Bytes,
    /// When the server took it in, in milliseconds since 1970.
    pub(super) at_ms: u64,
}

/// A reader of a stream from after a place, which goes away at the server when it isn't used.
pub(super) async fn reader(stream: &Stream, after: u64, headers_only: bool) -> Result<PullConsumer, Why> {
    let config = pull::Config {
        deliver_policy: DeliverPolicy::ByStartSequence {
            start_sequence: after.saturating_add(1),
        },
        ack_policy: AckPolicy::None,
        headers_only,
        inactive_threshold: IDLE,
        memory_storage: true,
        num_replicas: 1,
        ..pull::Config::default()
    };
    stream
        .create_consumer(config)
        .await
        .map_err(failed("read a stream"))
}

/// The next messages of a reader that are there, at most `limit`; fewer mean that there are no more.
pub(super) async fn page(reader: &PullConsumer, limit: usize) -> Result<Vec<Read>, Why> {
    let read = async {
        let mut messages = reader
            .fetch()
            .max_messages(limit)
            .messages()
            .await
            .map_err(failed("read a stream"))?;
        let mut page = Vec::new();
        while let Some(message) = messages.next().await {
            let message = message.map_err(|error| Why::from(format!("can't read a stream: {error}")))?;
            let info = message
                .info()
                .map_err(|error| Why::from(format!("can't read a message: {error}")))?;
            page.push(Read {
                seq: info.stream_sequence,
                at_ms: millis(info.published.unix_timestamp_nanos()),
                subject: message.subject.to_string(),
                headers: message.headers.clone().unwrap_or_default(),
                payload: message.payload.clone(),
            });
        }
        Ok(page)
    };
    tokio::time::timeout(PAGE, read)
        .await
        .unwrap_or_else(|_| Err(format!("NATS didn't answer within {PAGE:?}").into()))
}

/// The message under a subject, if there is one.
pub(super) async fn last(stream: &Stream, subject: &str) -> Result<Option<StreamMessage>, Why> {
    match stream.get_last_raw_message_by_subject(subject).await {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(failed("read a message")(error)),
    }
}

/// Deletes a message. One that is not there is as good.
pub(super) async fn delete(stream: &Stream, seq: u64) -> Result<(), Why> {
    use async_nats::jetstream::stream::DeleteMessageErrorKind;
    match stream.delete_message(seq).await {
        Ok(_) => Ok(()),
        Err(error) => match error.kind() {
            DeleteMessageErrorKind::JetStream(said) if is_absent(&said) => Ok(()),
            DeleteMessageErrorKind::JetStream(_)
            | DeleteMessageErrorKind::Request
            | DeleteMessageErrorKind::TimedOut => Err(failed("delete a message")(error)),
        },
    }
}

/// A sequence that a stream has not comes as an error of its own, or, if there was once a message, as the store's
/// words.
fn is_absent(said: &async_nats::jetstream::Error) -> bool {
    said.error_code() == async_nats::jetstream::ErrorCode::SEQUENCE_NOT_FOUND
        || said.error_code() == async_nats::jetstream::ErrorCode::NO_MESSAGE_FOUND
        || said.to_string().contains("no message found")
        || said.to_string().contains("message not found")
}

/// Milliseconds of the server's nanoseconds.
pub(super) fn millis(nanos: i128) -> u64 {
    u64::try_from(nanos / 1_000_000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_says_what_an_entry_is(service in ".*", key in proptest::option::of(".*"), target in ".*", size: u64) {
            let meta = Meta { service, key, target, size, ..Meta::default() };
            prop_assert_eq!(Meta::of(&meta.headers("1")), meta);
        }

        #[test]
        fn a_header_of_others_says_nothing(value in "[ -~]*") {
            let mut headers = HeaderMap::new();
            headers.insert(ENTRY, value.as_str());
            let _ = Meta::of(&headers);
        }
    }
}
