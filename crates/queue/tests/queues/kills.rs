//! kill -9 at any moment, many times over.

use crate::bench::{Fixture, OnDisk, PATIENCE, Proxy, Service, body, failed, not_sent, quick, request};
use anyhow::{Context, ensure};
use leeward_policy::model::Queue;
use leeward_queue::Delivered;
use leeward_resilience::{Draw, Seeded};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

const ROUNDS: u32 = 100;
/// Entries with a key, by as many callers, and entries without.
const KEYS: u64 = 4;
const KEYLESS: u64 = 2;
/// The environment of the process that is killed.
const DIR: &str = "LEEWARD_QUEUE_CHILD_DIR";
const ROUND: &str = "LEEWARD_QUEUE_CHILD_ROUND";

fn queue() -> Queue {
    Queue {
        max_entries: 500,
        max_interval: Duration::from_millis(10),
        max_attempts: 0,
        ..quick()
    }
}

/// One line in one write, so that it is there whole or, for who reads it, not at all.
fn say(line: &str) {
    let line = format!("\n{line};\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

/// What the killed process does; nothing in a process that wasn't started for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accepts_and_delivers_until_killed() -> anyhow::Result<()> {
    let Some(dir) = std::env::var_os(DIR) else {
        return Ok(());
    };
    let round: u64 = std::env::var(ROUND)?.parse()?;
    let mut draw = Seeded(round);
    let service = Service::new(move |delivery| {
        let delivered = match draw.below(10) {
            0 => not_sent(),
            1 => failed(Some(503)),
            2 => failed(None),
            _ => Delivered::Answered { status: 200 },
        };
        let arrived = !matches!(delivered, Delivered::NotSent { .. });
        if arrived {
            let request = &delivery.request;
            let key = request.key.as_deref().unwrap_or("-");
            say(&format!("D {key} {} {}", body(request), request.idempotency_key));
        }
        delivered
    });
    let fixture = std::mem::ManuallyDrop::new(OnDisk(crate::bench::TempDir(PathBuf::from(dir))));
    let proxy = Arc::new(Proxy::start(&*fixture, &queue(), &service).await?);
    let mut callers = JoinSet::new();
    for caller in 0..KEYS + KEYLESS {
        let proxy = Arc::clone(&proxy);
        callers.spawn(async move {
            let key = (caller < KEYS).then(|| format!("k{caller}"));
            for n in round * 1_000_000.. {
                let body = format!("{caller}.{n}");
                match proxy.accept(key.as_deref(), &body).await {
                    Ok(_) => say(&format!("A {body}")),
                    // Full, which is how the callers are kept from running ahead for ever.
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        });
    }
    while callers.join_next().await.is_some() {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_it_loses_nothing_that_was_accepted() -> anyhow::Result<()> {
    let fixture = OnDisk::start().await?.context("there is always a disk")?;
    let log = fixture.0.path().join("log");
    let mut draw = Seeded(7);
    for round in 1..=ROUNDS {
        let out = File::options().create(true).append(true).open(&log)?;
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "--exact",
                "kills::accepts_and_delivers_until_killed",
                "--nocapture",
            ])
            .env(DIR, fixture.0.path())
            .env(ROUND, round.to_string())
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(Stdio::null())
            .spawn()?;
        // A moment that is random is the point, not a wait for something.
        tokio::time::sleep(Duration::from_millis(20 + draw.below(200))).await;
        ensure!(child.try_wait()?.is_none(), "round {round}: it ended by itself");
        child.kill()?;
        child.wait()?;
    }

    // What is left is delivered now.
    let last = Service::answering(200);
    let proxy = Proxy::start(&fixture, &queue(), &last).await?;
    let reading = tokio::time::timeout(PATIENCE, proxy.drained()).await??;
    ensure!(reading.dead == 0, "{reading:?}");
    ensure!(!reading.state.contains("corrupt"), "{reading:?}");
    proxy.close().await?;

    let text = std::fs::read_to_string(&log)?;
    let mut told = Told::default();
    // A line that was cut off by the kill has no end, or begins in the middle of another.
    for line in text.lines().filter_map(|line| line.strip_suffix(';')) {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["A", body] => told.accepted(body),
            ["D", key, body, idempotency_key] => told.delivered(key, body, idempotency_key)?,
            _ => {}
        }
    }
    let rest: Vec<_> = last.with(|seen| seen.log.iter().map(|(d, _)| d.request.clone()).collect());
    for r in rest {
        told.delivered(r.key.as_deref().unwrap_or("-"), &body(&r), &r.idempotency_key)?;
    }
    let lost: Vec<_> = told
        .accepted
        .iter()
        .filter(|b| !told.delivered.contains_key(*b))
        .collect();
    ensure!(
        lost.is_empty(),
        "{} of {} lost: {lost:?}",
        lost.len(),
        told.accepted.len()
    );
    let (accepted, attempts) = (told.accepted.len(), told.delivered.values().sum::<usize>());
    eprintln!(
        "{ROUNDS} kills: {accepted} entries accepted, {} delivered, {attempts} attempts arrived",
        told.delivered.len()
    );
    // Most rounds had time to do something, else this shows nothing.
    ensure!(accepted > 500, "only {accepted} entries in {ROUNDS} rounds");
    Ok(())
}

#[derive(Default)]
struct Told {
    accepted: BTreeSet<String>,
    /// How often each arrived.
    delivered: BTreeMap<String, usize>,
    last: BTreeMap<String, u64>,
}

impl Told {
    fn accepted(&mut self, body: &str) {
        self.accepted.insert(body.to_owned());
    }

    fn delivered(&mut self, key: &str, body: &str, idempotency_key: &str) -> anyhow::Result<()> {
        let own = request(None, body).idempotency_key;
        ensure!(idempotency_key == &*own, "{body} came with {idempotency_key}");
        *self.delivered.entry(body.to_owned()).or_default() += 1;
        if key != "-" {
            let (_, n) = body.split_once('.').context("a caller and a number")?;
            let n: u64 = n.parse()?;
            let last = self.last.insert(key.to_owned(), n).unwrap_or(0);
            ensure!(n >= last, "{key}: {n} after {last}");
        }
        Ok(())
    }
}
