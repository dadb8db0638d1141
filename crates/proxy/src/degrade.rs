//! Levels of degradation: what is seen is judged and told to the control plane, and the levels that come of it are
//! published for requests.
//!
//! Of each policy, a level that somebody holds goes before what a control plane says, and that before this proxy's own
//! judgement, which is in force while there is none.

mod decide;
mod tell;

use self::decide::{Decider, Moved};
use self::tell::Outgoing;
use crate::resilience::wall;
use leeward_config::Live;
use leeward_policy::{Levels, Snapshot};
use leeward_telemetry::catalogue::DEGRADATION_LEVEL;
use leeward_telemetry::{Hub, Reading, Recorder};
use leeward_upstream::Registry;
use serde_json::Value;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often signals are looked at while there are policies for it. What somebody holds ends no later than this after
/// its time.
const TICK: Duration = Duration::from_millis(200);

/// The levels that are in force and why, for people and for metrics. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Degradation(Arc<Mutex<Decider>>);

impl Degradation {
    /// What `/degradation` answers.
    pub(crate) fn report(&self, now: Instant) -> Value {
        self.locked().report(now, wall())
    }

    /// Gauges, as of now.
    pub(crate) fn readings(&self) -> Vec<Reading> {
        let in_force = self.locked().in_force();
        let gauge = |labels| Reading {
            metric: DEGRADATION_LEVEL,
            labels,
            value: 1.0,
        };
        in_force.into_iter().map(gauge).collect()
    }

    fn locked(&self) -> MutexGuard<'_, Decider> {
        // Poison is harmless: the worst is a level that is one judgement late.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Judges and publishes, until dropped.
pub(crate) async fn judge(live: Live, registry: Arc<Registry>, hub: Arc<Hub>, degradation: Degradation) {
    let recorder = Recorder::new(&hub);
    let mut status = live.watch();
    let mut control = live.control_levels();
    let mut outgoing = Outgoing::default();
    let mut known: Option<Arc<Snapshot>> = None;
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let now = tokio::time::Instant::now().into_std();
        let snapshot = live.snapshot().load_full();
        let said = control.borrow_and_update().clone();
        let fresh = !known.as_ref().is_some_and(|known| Arc::ptr_eq(known, &snapshot));
        if fresh {
            registry.watch_signals(&snapshot);
        }
        let samples = registry.signals(&snapshot, now, wall());
        let moved = {
            let mut decider = degradation.locked();
            if fresh {
                decider.adopt(&snapshot, now);
            }
            decider.see(&samples, now);
            let moved = decider.decide(&snapshot, said.as_deref(), now, wall());
            if fresh || !moved.is_empty() {
                publish(&live, decider.levels(&snapshot));
            }
            moved
        };
        for moved in &moved {
            tell_of(&recorder, moved);
        }
        outgoing.add(samples);
        if let Some(signals) = outgoing.take_due(now) {
            live.tell_signals(signals);
        }
        let has_policies = !snapshot.degradations().is_empty();
        known = Some(snapshot);
        // Neither of the channels is closed while `live` is there.
        tokio::select! {
            _ = status.changed() => {}
            _ = control.changed() => {}
            _ = ticks.tick(), if has_policies => {}
        }
    }
}

fn publish(live: &Live, levels: Levels) {
    if **live.levels().load() != levels {
        live.levels().store(Arc::new(levels));
    }
}

/// Writes down that a level changed.
fn tell_of(recorder: &Recorder, moved: &Moved) {
    let Moved {
        policy,
        from,
        to,
        by,
        why,
    } = moved;
    recorder.degradation_changed(policy, to, by);
    tracing::info!(%policy, %from, %to, by, %why, "degradation level changed");
}
