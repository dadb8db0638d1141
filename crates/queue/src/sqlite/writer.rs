//! The thread that writes.

use super::file::{Identity, OpenError, explain, is_corrupt, is_passing};
use super::{Inner, tables};
use crate::store::{Health, Why};
use rusqlite::{Connection, TransactionBehavior};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Writes that share one transaction at most.
const BATCH: usize = 256;
/// How often it looks whether another process has written, and what is kept no longer.
const TICK: Duration = Duration::from_secs(1);
/// The pauses between attempts to open a file: the first, and the longest, which each failure doubles up to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Something to be written.
pub(super) trait Write: Send {
    /// Does it, in a transaction that may still fail.
    fn work(&mut self, db: &Connection) -> rusqlite::Result<()>;
    /// Answers: the transaction is durable, or why it isn't.
    fn answer(self: Box<Self>, durable: Result<(), Why>);
}

/// A [`Write`] whose result somebody waits for.
pub(super) struct Call<F, T> {
    work: F,
    value: Option<T>,
    reply: oneshot::Sender<Result<T, Why>>,
}

impl<F, T> Call<F, T> {
    pub(super) fn new(work: F, reply: oneshot::Sender<Result<T, Why>>) -> Self {
        Self {
            work,
            value: None,
            reply,
        }
    }
}

impl<F, T> Write for Call<F, T>
where
    F: Fn(&Connection) -> rusqlite::Result<T> + Send,
    T: Send,
{
    fn work(&mut self, db: &Connection) -> rusqlite::Result<()> {
        self.value = Some((self.work)(db)?);
        Ok(())
    }

    fn answer(self: Box<Self>, durable: Result<(), Why>) {
        let Self { value, reply, .. } = *self;
        let result = durable.and_then(|()| value.ok_or_else(|| "it was not written".into()));
        // Who asked may be gone. An entry that was accepted then stays: nobody can say that it wasn't wanted.
        let _ = reply.send(result);
    }
}

/// Why a file is left.
enum Left {
    /// Nobody can ask for anything any more.
    Unused,
    /// Open it again.
    Broken(Why),
    /// It is no whole database.
    Corrupt(Why),
}

type Writes = Receiver<Box<dyn Write>>;

/// Opens the file, writes, and begins again when something is wrong with it, until nobody can ask any more.
pub(super) fn run(inner: &Inner, writes: &Writes) {
    let mut pause = PAUSES.0;
    let mut last = None;
    loop {
        let left = match inner.place.open_writer() {
            Ok(db) => {
                pause = PAUSES.0;
                serve(inner, db, writes, &mut last)
            }
            Err(OpenError::Corrupt(why)) => Left::Corrupt(why),
            Err(OpenError::Other(why)) => Left::Broken(why),
        };
        let why = match left {
            Left::Unused => return,
            Left::Broken(why) => why,
            Left::Corrupt(why) => match set_aside(inner, &why) {
                Ok(()) => continue,
                Err(why) => why,
            },
        };
        tracing::warn!(queue = %inner.shared.name, %why, "a queue can't be used");
        inner.shared.health.set(Health::Unavailable(why.clone()));
        if !refuse(writes, &why, pause) {
            return;
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Writes until something is wrong. `last` is the file that was served before, and then this one.
fn serve(inner: &Inner, mut db: Connection, writes: &Writes, last: &mut Option<Identity>) -> Left {
    let identity = inner.place.identity();
    let begun = tables::totals(&db).map(|totals| inner.set_totals(totals));
    if let Err(error) = begun {
        return left(&error);
    }
    inner.suspect.store(false, Ordering::Relaxed);
    // The same file once more has the same entries: what is known of them, and under way, goes on.
    if identity.is_none() || *last != identity {
        inner.generation.fetch_add(1, Ordering::Relaxed);
        *last = identity;
    }
    inner.shared.health.set(Health::Ready);
    inner.shared.wake();
    let (mut version, mut ticked) = (None, Instant::now());
    loop {
        let mut batch = Vec::new();
        match writes.recv_timeout(TICK) {
            Ok(first) => {
                batch.push(first);
                batch.extend(writes.try_iter().take(BATCH - 1));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Left::Unused,
        }
        let suspect = inner.suspect.swap(false, Ordering::Relaxed);
        // Whoever delivers has set the file aside, which may be another process: what is written to this one now
        // would never be sent.
        let moved = inner.place.identity() != identity;
        if suspect || moved {
            let why = Why::from(if moved {
                "its file was replaced"
            } else {
                "its file is corrupt"
            });
            batch.into_iter().for_each(|write| write.answer(Err(why.clone())));
            return if moved {
                Left::Broken(why)
            } else {
                Left::Corrupt(why)
            };
        }
        let mut done = Ok(());
        if !batch.is_empty() {
            done = commit(inner, &mut db, batch);
        }
        if done.is_ok() && ticked.elapsed() >= TICK {
            ticked = Instant::now();
            done = tick(inner, &mut db, &mut version);
        }
        match done {
            Ok(()) => inner.shared.health.set(Health::Ready),
            Err(error) if is_passing(&error) => inner.shared.health.set(Health::Unavailable(explain(&error))),
            Err(error) => return left(&error),
        }
    }
}

fn left(error: &rusqlite::Error) -> Left {
    if is_corrupt(error) {
        Left::Corrupt(explain(error))
    } else {
        Left::Broken(explain(error))
    }
}

/// One transaction with all of them, one fsync, and then their answers.
fn commit(inner: &Inner, db: &mut Connection, mut batch: Vec<Box<dyn Write>>) -> rusqlite::Result<()> {
    let done = (|| {
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for write in &mut batch {
            write.work(&tx)?;
        }
        let totals = tables::totals(&tx)?;
        tx.commit()?;
        Ok(totals)
    })();
    let answer = match &done {
        Ok(totals) => {
            inner.set_totals(*totals);
            Ok(())
        }
        Err(error) => Err(explain(error)),
    };
    // Before the answers: who is refused finds the state that says why.
    if let Err(why) = &answer {
        inner.shared.health.set(Health::Unavailable(why.clone()));
    }
    batch.into_iter().for_each(|write| write.answer(answer.clone()));
    done.map(drop)
}

/// Takes in what another process has written, and deletes what is kept no longer.
fn tick(inner: &Inner, db: &mut Connection, version: &mut Option<i64>) -> rusqlite::Result<()> {
    let queue = inner.shared.queue();
    let now_ms = inner.clock.now_ms();
    // A disk that was full is asked by a write, since nobody else may ask.
    if !inner.shared.health.is_ready() || tables::untidy(db, &queue, now_ms)? {
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tables::tidy(&tx, &queue, now_ms)?;
        tx.commit()?;
    }
    let seen: i64 = db.query_row("PRAGMA data_version", [], |row| row.get(0))?;
    if version.replace(seen) != Some(seen) {
        inner.set_totals(tables::totals(db)?);
    }
    Ok(())
}

/// Refuses what is asked while `pause` passes. False if nobody can ask any more.
fn refuse(writes: &Writes, why: &Why, pause: Duration) -> bool {
    let until = Instant::now() + pause;
    loop {
        match writes.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(write) => write.answer(Err(why.clone())),
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        if Instant::now() >= until {
            return true;
        }
    }
}

/// Only who delivers sets a file aside, or who could: else two processes would each do it to the other's fresh one.
fn set_aside(inner: &Inner, why: &Why) -> Result<(), Why> {
    let held = {
        let held = inner.lock.lock().unwrap_or_else(PoisonError::into_inner);
        held.is_some()
    };
    let _for_now = if held {
        None
    } else {
        let lock = inner.place.open_lock();
        let locked = lock.map_err(|error| Why::from(format!("{why}; can't lock it: {error}")))?;
        locked.try_lock().map_err(|_| {
            Why::from(format!(
                "{why}; the process that delivers from it will set it aside"
            ))
        })?;
        Some(locked)
    };
    let to = inner.place.set_aside(inner.clock.now_ms())?;
    tracing::error!(queue = %inner.shared.name, %why, file = %to.display(), "a queue's file is corrupt: it is set aside, and a fresh one begun");
    inner.shared.health.set_aside(to);
    Ok(())
}
