//! A job that one process does at a time, by a lease. Whoever has it writes into the log with its fence, in good faith: it
//! doesn't look at whether it still has it, and goes on until a write is refused. So whatever was paused acts when it wakes.

use crate::clients::{resource, tag_of};
use crate::history::{Ask, Op, Outcome, Put, now};
use anyhow::Context;
use leeward_control::kv::{EtcdSettings, Kv, KvError};
use leeward_control::store::{Author, Change, Options, Store, StoreError, Write};
use leeward_policy::{Key, Kind, Name};
use leeward_testkit::{EtcdCluster, Process};
use prost::Message;
use rustix::process::{getpid, getppid};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Where etcd is, for a process that is to take part.
pub const ENDPOINTS: &str = "LEEWARD_CHAOS_ENDPOINTS";
/// Set for a holder that writes without its fence, which must be found out.
const UNFENCED: &str = "LEEWARD_CHAOS_UNFENCED";
/// How long a holder that is gone keeps the job.
pub const TTL: Duration = Duration::from_secs(3);
pub const JOB: &str = "chaos";
/// What a line of a holder's begins with.
const MARK: &str = "LEASE ";
/// Writes after which a holder gives the job up, if it believes then that it still has it.
const TURN: u32 = 20;
/// Pause between two writes.
const PAUSE: Duration = Duration::from_millis(100);
/// What holders write.
pub const WRITTEN: &str = "leased";
/// The label of records with the token.
pub const LABEL: &str = "fence";

/// A store beside the control planes', on the same keys.
pub async fn open(endpoints: &[String]) -> anyhow::Result<Store> {
    let kv = Kv::etcd(EtcdSettings {
        endpoints: endpoints.to_vec(),
        prefix: "/leeward/".to_owned(),
        ..EtcdSettings::default()
    })?;
    Ok(Store::open(kv, Options::default()).await?)
}

/// Starts this program once more, as one that shares the job. Its output goes to `DIR/NAME.log`.
pub fn spawn(name: &str, etcd: &EtcdCluster, dir: &Path, is_fenced: bool) -> anyhow::Result<Process> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["lease::holder", "--exact", "--nocapture"])
        .env(ENDPOINTS, etcd.endpoints().join(","));
    if !is_fenced {
        command.env(UNFENCED, "1");
    }
    Process::spawn(name, command, dir)
}

fn say(line: &Value) {
    println!("\n{MARK}{line}");
}

/// What [`spawn`] starts; among the other tests it has nothing to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holder() {
    let Ok(endpoints) = std::env::var(ENDPOINTS) else {
        return;
    };
    let endpoints: Vec<String> = endpoints.split(',').map(str::to_owned).collect();
    let parent = getppid();
    let is_fenced = std::env::var_os(UNFENCED).is_none();
    let store = loop {
        match open(&endpoints).await {
            Ok(store) => break store,
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    };
    say(&json!({"member": store.member()}));
    let key = Key {
        kind: Kind::Service,
        name: Name::parse(WRITTEN).unwrap(),
    };
    let mut number = 0;
    // Nobody is left to end it once the parent is gone.
    while getppid() == parent {
        let leadership = store.lead(JOB, TTL).await;
        let fence = leadership.fence();
        let token = fence.token();
        say(&json!({"leads": token}));
        for turn in 1.. {
            number += 1;
            let tag = format!("lease-{}-{number}", getpid().as_raw_nonzero());
            let resource = resource(&format!("Service/{WRITTEN}"), &tag, 0);
            let change = Change {
                writes: vec![Write {
                    key: key.clone(),
                    payload: Some(resource.encode_to_vec()),
                    expect: 0,
                }],
                author: Author {
                    labels: BTreeMap::from([(LABEL.to_owned(), token.to_string())]),
                    ..Author::of("holder")
                },
                fence: is_fenced.then(|| fence.clone()),
                ..Change::default()
            };
            say(&json!({"asks": tag, "begin": now()}));
            let (outcome, revision) = match store.write(change).await {
                Ok(revision) => ("done", revision),
                Err(StoreError::Fenced(_)) => ("fenced", 0),
                Err(StoreError::Kv(KvError::Unknown { .. })) => ("unknown", 0),
                Err(error) => {
                    eprintln!("{error}");
                    ("refused", 0)
                }
            };
            say(&json!({"outcome": outcome, "tag": tag, "revision": revision, "end": now()}));
            tokio::time::sleep(PAUSE).await;
            if outcome == "fenced" || turn >= TURN && leadership.is_held() {
                break;
            }
        }
    }
}

/// What holders did.
#[derive(Debug, Default)]
pub struct Holders {
    pub ops: Vec<Op>,
    /// Times that one took the job.
    pub terms: usize,
    /// Writes that were refused since the lease was lost.
    pub fenced: usize,
}

impl Holders {
    /// Reads a log. What was asked and not answered was cut off by the end of the process: nobody knows what became of it.
    pub fn read(&mut self, log: &str) -> anyhow::Result<()> {
        let mut asked: Option<(String, u64)> = None;
        let op = |(tag, begin): (String, u64), outcome, end| {
            let name = format!("Service/{WRITTEN}");
            let puts = vec![Put { name, expect: 0 }];
            let who = "holder".to_owned();
            Op {
                who,
                ask: Ask::Put { tag, puts },
                outcome,
                begin,
                end,
            }
        };
        for line in log.lines().filter_map(|line| line.strip_prefix(MARK)) {
            // A process that is killed may leave half a line, of what it had not said yet.
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            if line.get("leads").is_some() {
                self.terms += 1;
            }
            if let Some(tag) = line.get("asks") {
                let tag = tag.as_str().context("no tag")?.to_owned();
                let begin = line["begin"].as_u64().context("no time")?;
                if let Some(unanswered) = asked.replace((tag, begin)) {
                    self.ops.push(op(unanswered, Outcome::Unknown, begin));
                }
            }
            if let Some(outcome) = line.get("outcome") {
                let answered = asked.take().context("an answer to nothing")?;
                let outcome = match outcome.as_str() {
                    Some("done") => Outcome::Done(line["revision"].as_u64().context("no revision")?),
                    Some("unknown") => Outcome::Unknown,
                    _ => Outcome::Refused,
                };
                self.fenced += usize::from(line["outcome"] == "fenced");
                self.ops
                    .push(op(answered, outcome, line["end"].as_u64().context("no time")?));
            }
        }
        if let Some(unanswered) = asked {
            self.ops.push(op(unanswered, Outcome::Unknown, now()));
        }
        Ok(())
    }
}

/// The member that a holder's log says it is, last.
pub fn member(log: &str) -> Option<String> {
    let mut lines = log.lines().rev().filter_map(|line| line.strip_prefix(MARK));
    lines.find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        Some(line.get("member")?.as_str()?.to_owned())
    })
}

/// The log of all revisions, as the store has it.
pub async fn log(store: &Store) -> anyhow::Result<crate::history::Log> {
    let head = store.settle().await?;
    let mut log = Vec::new();
    for revision in 1..=head {
        let record = store.record(revision).await?;
        let record = record.with_context(|| format!("there is no revision {revision} of {head}"))?;
        anyhow::ensure!(record.revision == revision, "{record:?} at {revision}");
        let mut changes = BTreeMap::new();
        for change in record.changes {
            let after = match change.after {
                None => None,
                Some(stored) => {
                    anyhow::ensure!(stored.revision == revision, "{stored:?} at {revision}");
                    Some(tag_of(&leeward_proto::v1::Resource::decode(&*stored.payload)?))
                }
            };
            changes.insert(change.key.to_string(), after);
        }
        let fence = record
            .author
            .labels
            .get(LABEL)
            .map(|token| token.parse())
            .transpose()?;
        let who = record
            .author
            .who
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        log.push(crate::history::Logged { who, fence, changes });
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Verdict};
    use crate::kit::SOON;
    use leeward_testkit::{EtcdVersion, TempDir, eventually};
    use rustix::process::Signal;

    /// Two share a job. The first is frozen until the second has it, and wakes; then `done` is waited for.
    async fn wakes_late(is_fenced: bool, done: fn(&Holders, &Verdict) -> bool) {
        let Some(etcd) = EtcdCluster::start(EtcdVersion::V3_4, 1).await.unwrap() else {
            return;
        };
        let dir = TempDir::new().unwrap();
        let store = open(&etcd.endpoints()).await.unwrap();
        let leads = async |holder: &Process| {
            eventually("it to lead", SOON, || async {
                anyhow::ensure!(holder.log()?.contains("\"leads\""), "not yet");
                Ok(())
            })
            .await
            .unwrap();
        };
        let first = spawn("first", &etcd, dir.path(), is_fenced).unwrap();
        leads(&first).await;
        let second = spawn("second", &etcd, dir.path(), is_fenced).unwrap();
        eventually("it to come up", SOON, || async {
            member(&second.log()?).context("not yet")
        })
        .await
        .unwrap();
        // Only while the first has it: what the second did before doesn't count.
        eventually("the first to lead", SOON, || async {
            let leader = store.leader(JOB).await?;
            anyhow::ensure!(leader.is_some() && leader == member(&first.log()?), "{leader:?}");
            Ok(())
        })
        .await
        .unwrap();
        first.signal(Signal::STOP);
        eventually("the second to lead", SOON, || async {
            let leader = store.leader(JOB).await?;
            anyhow::ensure!(leader.is_some() && leader == member(&second.log()?), "{leader:?}");
            Ok(())
        })
        .await
        .unwrap();
        let written = store.settle().await.unwrap();
        eventually("the second to write", SOON, || async {
            anyhow::ensure!(store.settle().await? > written + 2, "not yet");
            Ok(())
        })
        .await
        .unwrap();
        first.signal(Signal::CONT);
        eventually("what comes of it", SOON, || async {
            let mut holders = Holders::default();
            holders.read(&first.log()?)?;
            let verdict = check::fences(&log(&store).await?);
            anyhow::ensure!(done(&holders, &verdict), "{verdict:?}");
            Ok(())
        })
        .await
        .unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn who_wakes_after_its_lease_is_refused() {
        wakes_late(true, |holders, verdict| holders.fenced > 0 && verdict.is_ok()).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn without_fences_the_checker_sees_two_act() {
        wakes_late(false, |_, verdict| verdict.is_err()).await;
    }

    #[test]
    fn what_a_killed_holder_had_asked_is_not_known() {
        let mut holders = Holders::default();
        let log = r#"
LEASE {"member": "m"}
LEASE {"leads": 3}
LEASE {"asks": "1", "begin": 1}
LEASE {"outcome": "done", "tag": "1", "revision": 4, "end": 2}
LEASE {"asks": "2", "begin": 3}
LEASE {"outco
LEASE {"member": "n"}
LEASE {"leads": 9}
LEASE {"asks": "3", "begin": 5}
LEASE {"outcome": "fenced", "tag": "3", "revision": 0, "end": 6}
LEASE {"asks": "4", "begin": 7}
"#;
        holders.read(log).unwrap();
        let outcomes: Vec<_> = holders.ops.iter().map(|op| op.outcome.clone()).collect();
        assert_eq!(
            outcomes,
            [
                Outcome::Done(4),
                Outcome::Unknown,
                Outcome::Refused,
                Outcome::Unknown
            ]
        );
        assert_eq!((holders.terms, holders.fenced), (2, 1));
        assert_eq!(member(log).as_deref(), Some("n"));
    }
}
