//! Those who write, read and watch, at whichever control plane, and write down what came of it.

use crate::history::{Ask, Batch, Name, Op, Outcome, Put, Recorder, now};
use crate::kit::SOON;
use anyhow::{Context, bail};
use fastrand::Rng;
use leeward_proto::{manifest, v1};
use leeward_testkit::policy::{route, service};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use v1::policy_service_client::PolicyServiceClient;

pub type Api = PolicyServiceClient<Channel>;

/// Services that only writers and readers know.
const SERVICES: usize = 6;
/// The route that the traffic takes. Writers switch it between two services.
pub const ROUTE: &str = "Route/app";
/// The services that it goes to.
pub const TARGETS: [&str; 2] = ["one", "two"];
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(12);
/// How long a watch may be silent: others write all the time.
const SILENCE: Duration = Duration::from_secs(5);
/// The label that has the tag of a write.
const TAG: &str = "op";

fn names() -> Vec<Name> {
    (0..SERVICES).map(|i| format!("Service/k{i}")).collect()
}

pub fn tag_of(resource: &v1::Resource) -> String {
    let metadata = resource.metadata.as_ref();
    metadata
        .and_then(|metadata| metadata.labels.get(TAG))
        .cloned()
        .unwrap_or_default()
}

/// A resource of this name and tag, and the revision that must be there. The route goes where the tag says: see [`target`].
pub fn resource(name: &str, tag: &str, expect: u64) -> v1::Resource {
    let text = match name.split_once('/') {
        Some(("Route", name)) => route(name, "app.example", target(tag), &[]),
        Some((_, name)) => service(name, &[], &[]),
        None => panic!("{name} is no name"),
    };
    let mut resource = manifest::parse("chaos", &text).unwrap().remove(0);
    let metadata = resource.metadata.get_or_insert_default();
    metadata.labels.insert(TAG.to_owned(), tag.to_owned());
    metadata.revision = expect;
    resource
}

/// Where the route goes with a tag.
pub fn target(tag: &str) -> &'static str {
    TARGETS[tag.bytes().fold(0, |sum, byte| sum + usize::from(byte)) % 2]
}

fn reference(name: &str) -> v1::ResourceRef {
    let (kind, name) = name.split_once('/').unwrap();
    let kind = match kind {
        "Service" => v1::Kind::Service,
        "Route" => v1::Kind::Route,
        other => panic!("{other}"),
    };
    v1::ResourceRef {
        kind: kind.into(),
        name: name.to_owned(),
    }
}

fn deletion(name: &str) -> v1::DeleteRequest {
    v1::DeleteRequest {
        r#ref: Some(reference(name)),
        ..v1::DeleteRequest::default()
    }
}

fn seen(resource: &v1::Resource) -> (u64, String) {
    (
        resource.metadata.as_ref().map_or(0, |metadata| metadata.revision),
        tag_of(resource),
    )
}

/// `Kind/name` of what was read.
fn name_of(resource: &v1::Resource) -> Name {
    leeward_proto::parse(resource).unwrap().key().to_string()
}

/// Asks.
async fn ask(api: &mut Api, ask: &Ask) -> Result<Outcome, Status> {
    match ask {
        Ask::Put { tag, puts } => {
            let resources = puts
                .iter()
                .map(|put| resource(&put.name, tag, put.expect))
                .collect();
            let request = v1::ApplyRequest {
                resources,
                ..v1::ApplyRequest::default()
            };
            Ok(Outcome::Done(api.apply(request).await?.into_inner().revision))
        }
        Ask::Delete { name, expect } => {
            let request = v1::DeleteRequest {
                revision: *expect,
                ..deletion(name)
            };
            Ok(Outcome::Done(api.delete(request).await?.into_inner().revision))
        }
        Ask::Get { name } => {
            let request = v1::GetRequest {
                r#ref: Some(reference(name)),
            };
            Ok(Outcome::Found(Some(seen(&api.get(request).await?.into_inner()))))
        }
        Ask::List => {
            let list = api.list(v1::ListRequest::default()).await?.into_inner();
            let resources = list
                .resources
                .iter()
                .map(|resource| (name_of(resource), seen(resource)));
            Ok(Outcome::Listed(list.revision, resources.collect()))
        }
    }
}

/// What a refusal says of the outcome. Whatever is not known to mean that nothing was done may have been done.
fn refusal(ask: &Ask, status: &Status) -> Outcome {
    let message = status.message();
    if matches!(ask, Ask::Get { .. } | Ask::List) && status.code() != Code::NotFound {
        return Outcome::Unknown;
    }
    match status.code() {
        Code::NotFound => Outcome::Found(None),
        Code::Aborted => conflict(message).unwrap_or(Outcome::Refused),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::PermissionDenied => {
            Outcome::Refused
        }
        // The control plane's word that it wrote nothing is taken, and checked.
        Code::Unavailable
            if message.starts_with("the store failed: http://")
                && message.contains(" is not available: ") =>
        {
            Outcome::Refused
        }
        _ => Outcome::Unknown,
    }
}

/// `Kind/name is at revision 3, not 2`
fn conflict(message: &str) -> Option<Outcome> {
    let (name, rest) = message.split_once(" is at revision ")?;
    let (found, _) = rest.split_once(", not ")?;
    let name = name.contains('/').then(|| name.to_owned())?;
    Some(Outcome::Conflict(name, found.parse().ok()?))
}

/// Somebody with the APIs of all control planes.
pub struct Client {
    pub who: String,
    pub apis: Vec<Api>,
    pub recorder: Arc<Recorder>,
    pub rng: Rng,
    pub stop: CancellationToken,
}

impl Client {
    async fn run(&mut self, what: Ask) -> Outcome {
        let place = self.rng.usize(..self.apis.len());
        let begin = now();
        let answer = tokio::time::timeout(PATIENCE, ask(&mut self.apis[place], &what)).await;
        let end = now();
        let outcome = match answer {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(status)) => refusal(&what, &status),
            Err(_) => Outcome::Unknown,
        };
        self.recorder.add(Op {
            who: self.who.clone(),
            ask: what,
            outcome: outcome.clone(),
            begin,
            end,
        });
        outcome
    }

    async fn pause(&mut self, ms: std::ops::Range<u64>) {
        let pause = Duration::from_millis(self.rng.u64(ms));
        self.stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    }

    /// Writes until it is told to stop.
    pub async fn write(mut self) {
        let names = names();
        let mut known: BTreeMap<Name, u64> = BTreeMap::new();
        let mut number = 0_u64;
        while !self.stop.is_cancelled() {
            number += 1;
            let tag = format!("{}-{number}", self.who);
            let name = names[self.rng.usize(..names.len())].clone();
            let expect = known.get(&name).copied().unwrap_or(0);
            let put = |name: &Name, expect| Put {
                name: name.clone(),
                expect,
            };
            let what = match self.rng.u32(..10) {
                0..3 => Ask::Put {
                    tag,
                    puts: vec![put(&name, 0)],
                },
                3..5 => Ask::Put {
                    tag,
                    puts: vec![put(&name, expect)],
                },
                5 => {
                    let other = names.iter().find(|other| **other != name).unwrap();
                    Ask::Put {
                        tag,
                        puts: vec![put(&name, expect), put(other, 0)],
                    }
                }
                6 => Ask::Delete {
                    name: name.clone(),
                    expect: 0,
                },
                7 => Ask::Delete {
                    name: name.clone(),
                    expect,
                },
                8 => Ask::Put {
                    tag,
                    puts: vec![put(&ROUTE.to_owned(), 0)],
                },
                _ => Ask::Get { name: name.clone() },
            };
            let outcome = self.run(what).await;
            match outcome {
                Outcome::Done(revision) | Outcome::Found(Some((revision, _))) => {
                    known.insert(name, revision);
                }
                Outcome::Conflict(name, revision) => {
                    known.insert(name, revision);
                }
                Outcome::Found(None) => {
                    known.remove(&name);
                }
                Outcome::Refused | Outcome::Unknown | Outcome::Listed(..) => {}
            }
            self.pause(20..150).await;
        }
    }

    /// Writes once more, so that whatever was under way is done before it or never. Waits until that is acknowledged.
    pub async fn seal(mut self) {
        for number in 0.. {
            let tag = format!("{}-{number}", self.who);
            let puts = vec![Put {
                name: ROUTE.to_owned(),
                expect: 0,
            }];
            if let Outcome::Done(_) = self.run(Ask::Put { tag, puts }).await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Reads until it is told to stop.
    pub async fn read(mut self) {
        let names = names();
        while !self.stop.is_cancelled() {
            let what = if self.rng.bool() {
                Ask::List
            } else {
                let name = names[self.rng.usize(..names.len())].clone();
                Ask::Get { name }
            };
            self.run(what).await;
            self.pause(20..150).await;
        }
    }

    /// Watches from after a revision, at one control plane after another, and goes on where it was. Ends at the revision in
    /// `last` once there is one.
    pub async fn watch(mut self, mut after: u64, last: Arc<AtomicU64>) -> anyhow::Result<Vec<Batch>> {
        let mut batches = Vec::new();
        let mut place = self.rng.usize(..self.apis.len());
        let mut stopped = None;
        loop {
            // Relaxed: it is one value.
            if (1..=after).contains(&last.load(Ordering::Relaxed)) {
                return Ok(batches);
            }
            if self.stop.is_cancelled() {
                let since = *stopped.get_or_insert_with(now);
                if now() - since > u64::try_from(SOON.as_nanos()).unwrap() {
                    bail!("a watch is at {after}, and doesn't come to {last:?}");
                }
            }
            if let Err(status) = watch_one(&mut self.apis[place], &mut after, &mut batches, &last).await
                && matches!(
                    status.code(),
                    Code::InvalidArgument | Code::OutOfRange | Code::PermissionDenied
                )
            {
                return Err(status).context("a watch was refused");
            }
            place = (place + 1) % self.apis.len();
            tokio::time::sleep(Duration::from_millis(self.rng.u64(20..200))).await;
        }
    }
}

async fn watch_one(
    api: &mut Api,
    after: &mut u64,
    batches: &mut Vec<Batch>,
    last: &AtomicU64,
) -> Result<(), Status> {
    let silent = |_| Status::deadline_exceeded("silence");
    let request = v1::WatchRequest {
        after_revision: *after,
        ..v1::WatchRequest::default()
    };
    let mut stream = tokio::time::timeout(SILENCE, api.watch(request))
        .await
        .map_err(silent)??
        .into_inner();
    let mut events = Vec::new();
    while let Some(event) = tokio::time::timeout(SILENCE, stream.message())
        .await
        .map_err(silent)??
    {
        match event.event {
            Some(v1::watch_event::Event::Put(resource)) => {
                events.push((event.revision, name_of(&resource), Some(tag_of(&resource))));
            }
            Some(v1::watch_event::Event::Deleted(gone)) => {
                let key = leeward_proto::parse_key(&gone).unwrap();
                events.push((event.revision, key.to_string(), None));
            }
            Some(v1::watch_event::Event::Synced(to)) => {
                let events = std::mem::take(&mut events);
                batches.push(Batch {
                    after: *after,
                    to,
                    events,
                });
                *after = to;
                if (1..=to).contains(&last.load(Ordering::Relaxed)) {
                    return Ok(());
                }
            }
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_not_to_be_done_is_refused() {
        let put = Ask::Put {
            tag: "t".to_owned(),
            puts: Vec::new(),
        };
        let outcome = |code, message: &str| refusal(&put, &Status::new(code, message));
        let at = Outcome::Conflict("Service/a".to_owned(), 7);
        assert_eq!(outcome(Code::Aborted, "Service/a is at revision 7, not 3"), at);
        let moved = "the store is at revision 7, not 3; somebody else has written";
        assert_eq!(outcome(Code::Aborted, moved), Outcome::Refused);
        let gone = "the store failed: http://127.0.0.1:1 is not available: no leader";
        assert_eq!(outcome(Code::Unavailable, gone), Outcome::Refused);
        let lost = "the store failed: http://127.0.0.1:1 did not say what became of a write: timed out";
        for unknown in [lost, "transport error", "tcp connect error"] {
            assert_eq!(outcome(Code::Unavailable, unknown), Outcome::Unknown);
        }
        assert_eq!(outcome(Code::Internal, ""), Outcome::Unknown);
        let get = Ask::Get {
            name: "Service/a".to_owned(),
        };
        assert_eq!(refusal(&get, &Status::not_found("")), Outcome::Found(None));
        assert_eq!(refusal(&get, &Status::unavailable(gone)), Outcome::Unknown);
    }
}
