//! A cluster of etcd (3.4 or later, API v3), for any number of control planes.
//!
//! Calls go to one endpoint until it fails, then to the next. What is tried again is what can't be done twice: reads, and
//! writes that never left. Of any other write that failed it is said that nobody knows ([`KvError::Unknown`]).

mod endpoints;
mod watch;

pub use endpoints::EtcdSettings;
pub(super) use watch::Tail;

use super::{Compare, Entry, KvError, LeaseId, Op, Page, Txn, prefix_end};
use endpoints::{Endpoints, Failure};
use etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use etcdserverpb::request_op::Request as Operation;
use etcdserverpb::{self as pb, kv_client::KvClient, lease_client::LeaseClient};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Request};

/// Generated from `proto/etcd`.
#[allow(
    missing_docs,
    unreachable_pub,
    unnameable_types,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]
mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

/// Generated from `proto/etcd`.
#[allow(
    missing_docs,
    unreachable_pub,
    unnameable_types,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]
mod mvccpb {
    tonic::include_proto!("mvccpb");
}

/// Largest answer, in bytes.
const MAX_ANSWER: usize = 256 << 20;

/// A cluster.
#[derive(Debug)]
pub struct Etcd {
    endpoints: Endpoints,
    prefix: String,
}

impl Etcd {
    pub(super) fn new(settings: EtcdSettings) -> Result<Self, KvError> {
        let prefix = settings.prefix.clone();
        let endpoints = Endpoints::new(settings)?;
        Ok(Self { endpoints, prefix })
    }

    fn full(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.prefix).into_bytes()
    }

    fn range_end(&self, prefix: &str) -> Vec<u8> {
        prefix_end(&format!("{}{prefix}", self.prefix))
    }

    fn entry(&self, kv: mvccpb::KeyValue) -> Entry {
        let key = String::from_utf8_lossy(&kv.key);
        Entry {
            key: key.strip_prefix(&self.prefix).unwrap_or(&key).to_owned(),
            value: kv.value,
            created: unsigned(kv.create_revision),
            modified: unsigned(kv.mod_revision),
        }
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<Entry>, KvError> {
        let request = pb::RangeRequest {
            key: self.full(key).into(),
            ..pb::RangeRequest::default()
        };
        let answer = self.read(request).await?;
        Ok(answer.kvs.into_iter().next().map(|kv| self.entry(kv)))
    }

    pub(super) async fn range(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
        keys_only: bool,
    ) -> Result<Page, KvError> {
        let mut key = self.full(after.unwrap_or(prefix));
        if after.is_some() {
            key.push(0);
        }
        let request = pb::RangeRequest {
            key: key.into(),
            range_end: self.range_end(prefix).into(),
            limit: i64::try_from(limit).unwrap_or(i64::MAX),
            keys_only,
            ..pb::RangeRequest::default()
        };
        let answer = self.read(request).await?;
        Ok(Page {
            revision: revision(answer.header.as_ref()),
            more: answer.more,
            entries: answer.kvs.into_iter().map(|kv| self.entry(kv)).collect(),
        })
    }

    async fn read(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, KvError> {
        self.endpoints
            .read("read", |channel| {
                let mut client = kv(channel);
                let request = led(request.clone());
                async move { client.range(request).await }
            })
            .await
    }

    pub(super) async fn txn(&self, txn: Txn) -> Result<Option<u64>, KvError> {
        let compare = txn.compares.iter().map(|compare| {
            let (key, target, union) = match compare {
                Compare::Modified(key, at) => {
                    (key, CompareTarget::Mod, TargetUnion::ModRevision(signed(*at)))
                }
                Compare::Created(key, at) => (
                    key,
                    CompareTarget::Create,
                    TargetUnion::CreateRevision(signed(*at)),
                ),
            };
            pb::Compare {
                result: CompareResult::Equal.into(),
                target: target.into(),
                key: self.full(key).into(),
                target_union: Some(union),
            }
        });
        let success = txn.ops.iter().map(|op| {
            let request = match op {
                Op::Put { key, value, lease } => Operation::RequestPut(pb::PutRequest {
                    key: self.full(key).into(),
                    value: value.clone(),
                    lease: lease.map_or(0, |LeaseId(id)| id),
                }),
                Op::Delete(key) => Operation::RequestDeleteRange(pb::DeleteRangeRequest {
                    key: self.full(key).into(),
                    range_end: bytes::Bytes::new(),
                }),
                Op::DeletePrefix(prefix) => Operation::RequestDeleteRange(pb::DeleteRangeRequest {
                    key: self.full(prefix).into(),
                    range_end: self.range_end(prefix).into(),
                }),
            };
            pb::RequestOp {
                request: Some(request),
            }
        });
        let request = pb::TxnRequest {
            compare: compare.collect(),
            success: success.collect(),
            failure: Vec::new(),
        };
        let answer = self
            .endpoints
            .write("write", |channel| {
                let mut client = kv(channel);
                let request = led(request.clone());
                async move { client.txn(request).await }
            })
            .await?;
        Ok(answer.succeeded.then(|| revision(answer.header.as_ref())))
    }

    pub(super) async fn grant(&self, ttl: Duration) -> Result<LeaseId, KvError> {
        // Whole seconds, and none too few.
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let request = pb::LeaseGrantRequest {
            ttl: signed(seconds.max(1)),
            id: 0,
        };
        // One that was granted unheard of ends by itself.
        let answer = self
            .endpoints
            .read("grant a lease", |channel| {
                let mut client = lease(channel);
                async move { client.lease_grant(led(request)).await }
            })
            .await?;
        Ok(LeaseId(answer.id))
    }

    pub(super) async fn keep_alive(&self, LeaseId(id): LeaseId) -> Result<bool, KvError> {
        let answer = self
            .endpoints
            .read("keep a lease", |channel| {
                let mut client = lease(channel);
                async move {
                    let request = pb::LeaseKeepAliveRequest { id };
                    let answers = client.lease_keep_alive(led(tokio_stream::once(request))).await?;
                    let answer = answers.into_inner().message().await?;
                    answer
                        .map(tonic::Response::new)
                        .ok_or_else(|| tonic::Status::unavailable("the stream ended without an answer"))
                }
            })
            .await?;
        Ok(answer.ttl > 0)
    }

    pub(super) async fn revoke(&self, LeaseId(id): LeaseId) -> Result<(), KvError> {
        let revoked = self.endpoints.call("end a lease", true, |channel| {
            let mut client = lease(channel);
            async move { client.lease_revoke(led(pb::LeaseRevokeRequest { id })).await }
        });
        match revoked.await {
            Err(Failure {
                code: Code::NotFound, ..
            }) => Ok(()),
            revoked => Ok(revoked.map(drop)?),
        }
    }

    pub(super) async fn compact(&self, revision: u64) -> Result<(), KvError> {
        let request = pb::CompactionRequest {
            revision: signed(revision),
            physical: false,
        };
        let compacted = self.endpoints.call("compact", true, |channel| {
            let mut client = kv(channel);
            async move { client.compact(led(request)).await }
        });
        match compacted.await {
            // Somebody else has compacted further.
            Err(Failure {
                code: Code::OutOfRange,
                ..
            }) => Ok(()),
            compacted => Ok(compacted.map(drop)?),
        }
    }

    pub(super) fn watch(this: &Arc<Self>, prefix: &str, from: u64) -> Tail {
        Tail::new(Arc::clone(this), prefix, from)
    }
}

fn kv(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn lease(channel: Channel) -> LeaseClient<Channel> {
    LeaseClient::new(channel)
}

/// A request that a member without a leader refuses at once, rather than to let it wait.
fn led<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let is_led = tonic::metadata::MetadataValue::from_static("true");
    request.metadata_mut().insert("hasleader", is_led);
    request
}

fn revision(header: Option<&pb::ResponseHeader>) -> u64 {
    header.map_or(0, |header| unsigned(header.revision))
}

/// etcd's integers are signed; revisions stay far below the difference.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}
