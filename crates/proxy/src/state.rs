//! What this proxy keeps on disk beside policy, and what it says of it.

use crate::degrade::{Degradation, Handed};
use crate::identity::wall;
use crate::settings::Settings;
use leeward_config::{Blob, Live, PolicySource, StateDir, Status};
use leeward_policy::Viewer;
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::{CONFIG_SOURCE, STATE_CORRUPT, STATE_WRITES};
use std::time::{Duration, Instant, UNIX_EPOCH};

/// How often levels of degradation, and the age of policy, are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often people are told that policy is old.
const REMIND: Duration = Duration::from_secs(3600);

/// The directory that the settings name, if they name one and it can be used: what can't be kept is no reason not to serve.
pub(crate) async fn open(settings: &Settings, viewer: &Viewer) -> Option<StateDir> {
    let path = settings.state()?;
    let (shown, viewer) = (path.display().to_string(), viewer.clone());
    let opened = tokio::task::spawn_blocking(move || StateDir::open(path, &viewer)).await;
    match opened {
        Ok(Ok(state)) => Some(state),
        Ok(Err(error)) => {
            tracing::error!(
                directory = shown,
                %error,
                "the directory for this proxy's state can't be used; started again while no control plane answers it would have no policy (see --state)"
            );
            None
        }
        Err(_) => None,
    }
}

/// Keeps the levels of degradation that hold, and goes on from those that held.
pub(crate) async fn keep_levels(state: StateDir, degradation: Degradation) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut kept = None;
    loop {
        ticks.tick().await;
        if !degradation.is_judged() {
            // What is there is to go on from.
            continue;
        }
        let levels = degradation.hand_out(tokio::time::Instant::now().into_std());
        // How long they have held is told from when they began to.
        let now = Some(levels.iter().map(Handed::what).collect::<Vec<_>>());
        if now == kept {
            continue;
        }
        kept = now;
        let written = serde_json::json!({"unix_ms": unix_ms(), "levels": levels});
        state.keep(Blob::Levels, written.to_string().into_bytes());
    }
}

/// The levels that held when this was written, to go on from.
pub(crate) fn restore_levels(state: &StateDir, degradation: &Degradation, now: Instant) {
    #[derive(serde::Deserialize)]
    struct Kept {
        unix_ms: u64,
        levels: Vec<Handed>,
    }
    let Some(bytes) = state.blob(Blob::Levels) else {
        return;
    };
    let kept: Kept = match serde_json::from_slice(&bytes) {
        Ok(kept) => kept,
        Err(error) => {
            tracing::warn!(%error, "the levels of degradation on disk can't be read; they are judged anew");
            return;
        }
    };
    let since = Duration::from_millis(unix_ms().saturating_sub(kept.unix_ms));
    let levels: Vec<_> = kept.levels.into_iter().map(|level| level.aged(since)).collect();
    degradation.inherit(&levels, now);
}

/// Tells people while policy is older than it may be without their knowing. It goes on to be used.
pub(crate) async fn warn_of_age(live: Live, limit: Duration) {
    let mut told: Option<tokio::time::Instant> = None;
    loop {
        let now = tokio::time::Instant::now();
        let status = live.status();
        let age = status.heard.map(|heard| heard.age(now.into_std()));
        let is_kept = match status.source {
            PolicySource::Disk | PolicySource::Control => true,
            PolicySource::Nowhere | PolicySource::Files => false,
        };
        match age.filter(|age| is_kept && *age >= limit) {
            Some(age) if told.is_none_or(|at| now - at >= REMIND) => {
                told = Some(now);
                tracing::warn!(
                    age_seconds = age.as_secs(),
                    generation = status.generation,
                    source = status.source.as_str(),
                    "policy is old: no control plane has said for long that it is the newest; it goes on to be used"
                );
            }
            Some(_) => {}
            None => told = None,
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// For whoever asks whether this proxy is ready: how old policy is that nobody vouches for now.
pub(crate) fn staleness(status: &Status, now: Instant) -> Option<String> {
    let age = status.heard.map_or(0, |heard| heard.age(now).as_secs());
    match status.source {
        PolicySource::Disk => Some(format!(
            "stale: policy is from this proxy's disk, {age} s old; no control plane has answered since it started"
        )),
        PolicySource::Control if !status.connected => Some(format!(
            "stale: policy is {age} s old; no control plane is connected"
        )),
        PolicySource::Control | PolicySource::Nowhere | PolicySource::Files => None,
    }
}

/// Gauges and counts, as of now.
#[expect(clippy::cast_precision_loss, reason = "metrics' values; exact to 2^53")]
pub(crate) fn readings(state: Option<&StateDir>, status: &Status) -> Vec<Reading> {
    let reading = |metric, label: &str, value| Reading {
        metric,
        labels: vec![label.into()],
        value,
    };
    let mut readings: Vec<_> = PolicySource::ALL
        .iter()
        .map(|source| {
            let is_it = f64::from(u8::from(*source == status.source));
            reading(CONFIG_SOURCE, source.as_str(), is_it)
        })
        .collect();
    if let Some(report) = state.map(StateDir::report) {
        readings.push(reading(STATE_WRITES, "written", report.written as f64));
        readings.push(reading(STATE_WRITES, "failed", report.failed as f64));
        for (file, count) in report.corrupt {
            readings.push(reading(STATE_CORRUPT, file, count as f64));
        }
    }
    readings
}

fn unix_ms() -> u64 {
    let since = wall().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
