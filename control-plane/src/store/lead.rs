//! Single jobs hang on a lease, and so does being there at all.
//!
//! Who leads may act only with the [`Fence`] in the transaction that does it: a lease can end while its holder is paused, and no
//! clock that the holder could look at would tell it in time.

use super::{Inner, Store, StoreError, token};
use crate::kv::{Kv, KvError, LeaseId, Txn};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a control plane that is gone is still listed, and longest pause between tries to be.
const MEMBER_TTL: Duration = Duration::from_secs(15);
/// Pause after a failure: a random part of this.
const PAUSE: Duration = Duration::from_secs(1);

/// Proof of a lease, for the transactions of its holder.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fence {
    job: String,
    key: String,
    /// The revision at which the holder made the key.
    created: u64,
}

impl Fence {
    /// A transaction that is done only if the lease is still held.
    pub fn guard(&self, txn: Txn) -> Txn {
        txn.when_created(&*self.key, self.created)
    }

    /// A number that is larger for each holder than for the one before.
    pub fn token(&self) -> u64 {
        self.created
    }

    /// Whether the lease is held now.
    pub(super) async fn holds(&self, kv: &Kv) -> Result<bool, KvError> {
        let entry = kv.get(&self.key).await?;
        Ok(entry.is_some_and(|entry| entry.created == self.created))
    }

    /// What a writer is told whose transaction was not done for this.
    pub fn lost(&self) -> StoreError {
        StoreError::Fenced(self.job.clone())
    }
}

/// A job that is led. Dropping it ends that at once.
#[derive(Debug)]
pub struct Leadership {
    fence: Fence,
    lost: CancellationToken,
    _end: DropGuard,
}

impl Leadership {
    /// To be in every transaction of the job.
    pub fn fence(&self) -> Fence {
        self.fence.clone()
    }

    /// Waits until it is lost.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Whether it is held, as far as is known here. Only a transaction with the fence can tell for certain.
    pub fn is_held(&self) -> bool {
        !self.lost.is_cancelled()
    }
}

/// A control plane that is alive.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Member {
    /// [`Store::member`].
    pub id: String,
    /// Where its API is, as it says: `IP:PORT` or `NAME:PORT`.
    pub api: String,
}

impl Store {
    /// Waits until this control plane leads a job, and keeps it: until the lease is lost, or what this returns is dropped.
    /// Another one comes at most `ttl` after this process is gone.
    pub async fn lead(&self, job: &str, ttl: Duration) -> Leadership {
        self.inner.lead(job, ttl).await
    }

    /// Who leads a job now, by [`Store::member`].
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn leader(&self, job: &str) -> Result<Option<String>, StoreError> {
        let entry = self.inner.kv.get(&key(job)).await?;
        let value: Option<Value> = entry.and_then(|entry| serde_json::from_slice(&entry.value).ok());
        let member = value.as_ref().and_then(|value| value.get("member")?.as_str());
        Ok(member.map(str::to_owned))
    }

    /// Lets this control plane be listed, for as long as the store is open.
    pub fn register(&self, api: String) {
        tokio::spawn(register(Arc::clone(&self.inner), api));
    }

    /// The control planes that are alive, and those that were until a moment ago.
    ///
    /// # Errors
    ///
    /// If the kv can't be reached.
    pub async fn members(&self) -> Result<Vec<Member>, StoreError> {
        let entries = self.inner.kv.all("members/").await?;
        let members = entries.iter().filter_map(|entry| {
            let value: Value = serde_json::from_slice(&entry.value).ok()?;
            Some(Member {
                id: entry.key.strip_prefix("members/")?.to_owned(),
                api: value.get("api")?.as_str()?.to_owned(),
            })
        });
        Ok(members.collect())
    }
}

fn key(job: &str) -> String {
    format!("lead/{job}")
}

impl Inner {
    pub(super) async fn lead(&self, job: &str, ttl: Duration) -> Leadership {
        loop {
            match self.campaign(job, ttl).await {
                Ok(Some(leadership)) => return leadership,
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(job, %error, "can't ask for a lease");
                    tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
                }
            }
        }
    }

    /// Asks for a job; where somebody has it, waits for that to change, or for a while.
    async fn campaign(&self, job: &str, ttl: Duration) -> Result<Option<Leadership>, StoreError> {
        let key = key(job);
        let page = self.kv.range(&key, None, 1).await?;
        if page.entries.iter().any(|entry| entry.key == key) {
            let mut watch = self.kv.watch(&key, page.revision + 1);
            let patience = ttl.mul_f64(0.5 + 0.5 * fastrand::f64());
            // Whatever it says, it is time to look again; a watch that broke at once is none to hurry after.
            if let Ok(Err(error)) = tokio::time::timeout(patience, watch.next()).await {
                tracing::debug!(job, %error, "a watch was lost");
                tokio::time::sleep(PAUSE.mul_f64(fastrand::f64())).await;
            }
            return Ok(None);
        }
        let begun = Instant::now();
        let lease = self.kv.grant(ttl).await?;
        let value = json!({"member": self.member, "campaign": token()}).to_string();
        let txn = Txn::default()
            .when(&*key, 0)
            .put_leased(&*key, value.clone(), lease);
        let created = match self.kv.txn(txn).await {
            Ok(created) => created,
            Err(KvError::Unknown { .. }) => {
                let entry = self.kv.get(&key).await?;
                entry
                    .filter(|entry| entry.value == value.as_bytes())
                    .map(|entry| entry.created)
            }
            Err(error) => return Err(error.into()),
        };
        let Some(created) = created else {
            self.kv.revoke(lease).await?;
            return Ok(None);
        };
        let (lost, end) = (CancellationToken::new(), self.stop.child_token());
        let keep = keep(self.kv.clone(), lease, begun + ttl, ttl, end.clone());
        let told = lost.clone();
        tokio::spawn(async move {
            keep.await;
            told.cancel();
        });
        tracing::info!(job, member = self.member, "leads");
        let job = job.to_owned();
        Ok(Some(Leadership {
            fence: Fence { job, key, created },
            lost,
            _end: end.drop_guard(),
        }))
    }
}

/// Keeps a lease alive until it is lost or `end` is cancelled, and gives it back then. By this process's monotonic time it is
/// never believed to be held for longer than it is.
async fn keep(kv: Kv, lease: LeaseId, mut ends: Instant, ttl: Duration, end: CancellationToken) {
    loop {
        tokio::select! {
            () = end.cancelled() => break,
            () = tokio::time::sleep_until(ends) => break,
            () = tokio::time::sleep(ttl / 3) => {}
        }
        let asked = Instant::now();
        let kept = tokio::select! {
            () = end.cancelled() => break,
            () = tokio::time::sleep_until(ends) => break,
            kept = kv.keep_alive(lease) => kept,
        };
        match kept {
            Ok(true) => ends = asked + ttl,
            Ok(false) => break,
            Err(error) => tracing::debug!(%error, "can't keep a lease alive; trying again"),
        }
    }
    // Detached, since whoever waits for the loss must not wait for this.
    tokio::spawn(async move {
        if let Err(error) = kv.revoke(lease).await {
            tracing::debug!(%error, "a lease is left to its end");
        }
    });
}

async fn register(inner: Arc<Inner>, api: String) {
    let key = format!("members/{}", inner.member);
    let value = json!({"api": api}).to_string();
    loop {
        let begun = Instant::now();
        let granted = inner.kv.grant(MEMBER_TTL).await;
        let put = match granted {
            Ok(lease) => {
                let txn = Txn::default().put_leased(&*key, value.clone(), lease);
                inner.kv.txn(txn).await.map(|_| lease)
            }
            Err(error) => Err(error),
        };
        match put {
            Ok(lease) => {
                let end = inner.stop.clone();
                keep(inner.kv.clone(), lease, begun + MEMBER_TTL, MEMBER_TTL, end).await;
            }
            Err(error) => tracing::debug!(%error, "can't be listed among the control planes"),
        }
        tokio::select! {
            () = inner.stop.cancelled() => return,
            () = tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64())) => {}
        }
    }
}
