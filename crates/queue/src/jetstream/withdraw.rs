//! Entries that were refused, though the server may have them: they are deleted until they are known to be gone.

use super::layout::{Connected, failed};
use crate::entry::EntryId;
use crate::store::Why;
use async_nats::connection::State;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

/// Entries that are withdrawn at once; more are left where they may be.
const MAX: usize = 1024;
/// Attempts to delete one, while the server is there.
const TRIES: u32 = 32;
/// Attempts that find nothing after which there is nothing: what was sent late may be behind the first of them.
const ABSENT: u32 = 4;
/// The pauses between attempts: the first, and the longest, which each doubles up to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often it looks whether the server is there again.
const LOOK: Duration = Duration::from_millis(100);

/// Those under way. They end when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Withdrawals {
    /// Poison is harmless: ids are put in and taken out whole.
    ids: Arc<Mutex<HashSet<EntryId>>>,
    /// Poison is harmless: tasks are put in and taken out whole.
    tasks: Mutex<JoinSet<()>>,
}

impl Withdrawals {
    /// Deletes what the server has under `subject`, which is the entry's that waits.
    pub(super) fn begin(&self, js: Arc<Connected>, queue: &Arc<str>, id: EntryId, subject: String) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        if tasks.len() >= MAX {
            tracing::warn!(%queue, entry = %id, "a refused entry may be stored, and is not looked for: {MAX} others are");
            return;
        }
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        let (ids, queue) = (Arc::clone(&self.ids), Arc::clone(queue));
        tasks.spawn(async move {
            if let Err(why) = withdraw(&js, &subject).await {
                tracing::warn!(%queue, entry = %id, %why, "a refused entry may be stored, and delivered");
            }
            ids.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
    }

    /// Whether an entry is being withdrawn, and must not be sent.
    pub(super) fn has(&self, id: EntryId) -> bool {
        let ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        ids.contains(&id)
    }
}

async fn withdraw(js: &Connected, subject: &str) -> Result<(), Why> {
    let (mut absent, mut pause, mut last) = (0, PAUSES.0, Why::from("it can't be found out"));
    for _ in 0..TRIES {
        // What the client holds back meanwhile may be the entry itself, so there is no end to this.
        while js.client.connection_state() != State::Connected {
            tokio::time::sleep(LOOK).await;
        }
        match js.waiting.purge().filter(subject).await {
            Ok(purged) if purged.purged > 0 => return Ok(()),
            Ok(_) => absent += 1,
            Err(error) => last = failed("delete a message")(error),
        }
        if absent >= ABSENT {
            return Ok(());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
    Err(last)
}
