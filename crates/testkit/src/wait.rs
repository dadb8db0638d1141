//! Waiting for a condition, never for a time.

use anyhow::Context;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

/// How often a condition is looked at.
const EVERY: Duration = Duration::from_millis(10);

/// Asks `probe` until it is `Ok`.
///
/// # Errors
///
/// What `probe` said last, once `within` has passed.
pub async fn eventually<T, F, P>(what: &str, within: Duration, mut probe: P) -> anyhow::Result<T>
where
    P: FnMut() -> F,
    F: Future<Output = anyhow::Result<T>>,
{
    let until = Instant::now() + within;
    loop {
        let last = match tokio::time::timeout_at(until, probe()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(_) => anyhow::anyhow!("the last look at it did not end"),
        };
        if Instant::now() + EVERY >= until {
            return Err(last).with_context(|| format!("waited {within:?} for: {what}"));
        }
        tokio::time::sleep(EVERY).await;
    }
}
