//! What an operator does in the demo, and what is counted where users don't see it.

use super::mesh::{Mesh, START, ZONES, parsed};
use crate::proxy;
use anyhow::Context;
use leeward_proto::v1::resource::Spec;
use serde_json::{Value, json};
use std::time::Duration;

/// The DegradationPolicy of the shop.
const POLICY: &str = "shop";
/// How long a level is held, longer than the demo lasts.
const HELD: &str = "10m";
/// How often queues are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long requests that are under way may take to end when nothing hinders them.
const SETTLE: Duration = Duration::from_millis(300);

/// What payment has in its book.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Book {
    /// Different keys.
    pub(crate) keys: u64,
    /// Charges that were made.
    pub(crate) charges: u64,
    /// Calls that asked for one.
    pub(crate) calls: u64,
}

impl Mesh {
    /// Gives a boolean flag another variant by default, as an operator would: in the policy, and by apply. Returns once
    /// every proxy runs it, and what began before has ended.
    pub(crate) async fn switch(&self, flag: &str, variant: &str) -> anyhow::Result<()> {
        let mut changed = Vec::new();
        for mut resource in parsed(&self.policy()?)? {
            let Some(Spec::FeatureFlags(flags)) = &mut resource.spec else {
                continue;
            };
            let mut document: Value = serde_json::from_str(&flags.document)?;
            let default = document.pointer_mut(&format!("/flags/{flag}/defaultVariant"));
            *default.with_context(|| format!("the policy has no flag {flag}"))? = json!(variant);
            flags.document = document.to_string();
            changed.push(resource);
        }
        let revision = self.apply_all(changed).await?;
        self.wait_for(revision).await?;
        tokio::time::sleep(SETTLE).await;
        Ok(())
    }

    /// Holds a level with `leeward degrade`, or, with `auto`, lets go of it.
    pub(crate) async fn degrade(&self, level: &str) -> anyhow::Result<()> {
        let mut command = tokio::process::Command::new(std::env::current_exe()?);
        command.args(["degrade", POLICY, level]);
        if level != "auto" {
            command.args(["--for", HELD, "--reason", "the demo wants to see it"]);
        }
        let connection = self.connection()?;
        command
            .env("LEEWARD_CONTROL", connection.control.to_string())
            .env("LEEWARD_IDENTITY", &connection.identity)
            .kill_on_drop(true);
        let ended = tokio::time::timeout(START, command.output())
            .await
            .context("leeward degrade doesn't end")??;
        anyhow::ensure!(
            ended.status.success(),
            "leeward degrade {POLICY} {level}: {}",
            String::from_utf8_lossy(&ended.stderr)
        );
        Ok(())
    }

    /// How often recommendations were called since their instances began.
    pub(crate) async fn calls_of_recommendations(&self) -> anyhow::Result<u64> {
        let mut calls = 0;
        for zone in ZONES {
            let address = self.address(&format!("recommendations-{zone}"), "listen")?;
            calls += number(&proxy::get(address, "/calls").await?, "calls")?;
        }
        Ok(calls)
    }

    /// Requests that wait in the proxies' queues, and those that could not be delivered.
    pub(crate) async fn waiting(&self) -> anyhow::Result<u64> {
        let mut waiting = 0;
        for zone in ZONES {
            let admin = self.address(&format!("proxy-{zone}"), "admin")?;
            let answer = proxy::get(admin, "/queues").await?;
            let queues = answer.get("queues").and_then(Value::as_array);
            for queue in queues.context("a proxy doesn't tell of its queues")? {
                waiting += number(queue, "waiting")? + number(queue, "dead")?;
            }
        }
        Ok(waiting)
    }

    /// Waits until the queues are empty, or for so long. How many wait then.
    pub(crate) async fn deliver(&self, patience: Duration) -> anyhow::Result<u64> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let waiting = self.waiting().await?;
            if waiting == 0 || tokio::time::Instant::now() >= deadline {
                return Ok(waiting);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What payment has charged.
    pub(crate) async fn book(&self) -> anyhow::Result<Book> {
        let answer = proxy::get(self.address("payment-a", "listen")?, "/charges").await?;
        Ok(Book {
            keys: number(&answer, "keys")?,
            charges: number(&answer, "charges")?,
            calls: number(&answer, "calls")?,
        })
    }
}

fn number(answer: &Value, field: &str) -> anyhow::Result<u64> {
    let value = answer.get(field).and_then(Value::as_u64);
    value.with_context(|| format!("no {field} in {answer}"))
}
