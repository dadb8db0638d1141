//! Levels of degradation: what is seen is judged and told to the control plane, and the levels that come of it are
//! published for requests.
//!
//! Of each policy, a level that somebody holds goes before what a control plane says, and that before this proxy's own
//! judgement, which is in force while there is none.

mod decide;
mod tell;

pub(crate) use self::decide::Handed;

use self::decide::{Decider, Moved};
use self::tell::Outgoing;
use crate::resilience::wall;
use leeward_config::Live;
use leeward_policy::{Levels, Snapshot};
use leeward_telemetry::catalogue::DEGRADATION_LEVEL;
use leeward_telemetry::{Hub, Reading, Recorder};
use leeward_upstream::Registry;
use serde_json::Value;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How often signals are looked at while there are policies for it. What somebody holds ends no later than this after
/// its time.
const TICK: Duration = Duration::from_millis(200);

/// The levels that are in force and why, for people and for metrics. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Degradation {
    decider: Arc<Mutex<Decider>>,
    /// Whether policy has been judged: what it holds is published from then on.
    judged: watch::Sender<bool>,
}

impl fmt::Debug for Degradation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Degradation").finish_non_exhaustive()
    }
}

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

    /// Whether the levels that policy asks for are in force.
    pub(crate) fn is_judged(&self) -> bool {
        *self.judged.borrow()
    }

    /// Returns when they are.
    pub(crate) async fn until_judged(&self) {
        let mut judged = self.judged.subscribe();
        // The sender lives as long as `self`.
        drop(judged.wait_for(|judged| *judged).await);
    }

    /// The levels that a process which takes over goes on from.
    pub(crate) fn hand_out(&self, now: Instant) -> Vec<Handed> {
        self.locked().hand_out(now)
    }

    /// Goes on from the levels of the process before this one, as soon as there is policy.
    pub(crate) fn inherit(&self, handed: &[Handed], now: Instant) {
        self.locked().inherit(handed, now);
    }

    fn locked(&self) -> MutexGuard<'_, Decider> {
        // Poison is harmless: the worst is a level that is one judgement late.
        self.decider.lock().unwrap_or_else(PoisonError::into_inner)
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
        // Before the snapshot, which is published first.
        let has_policy = live.status().generation.is_some();
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
            if has_policy && !degradation.is_judged() {
                decider.forget_inherited();
                degradation.judged.send_replace(true);
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

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_config::{Warm, load_dir};
    use leeward_policy::model::Plugin;
    use leeward_policy::{Name, Viewer};
    use leeward_testkit::TempDir;

    struct NoPlugins;

    impl Warm for NoPlugins {
        async fn warm(&self, _: &Name, _: &Plugin) -> Result<(), String> {
            Ok(())
        }

        fn retain(&self, _: &[&str]) {}
    }

    const POLICY: &str = "
apiVersion: leeward.dev/v1
kind: DegradationPolicy
metadata: {name: shop}
spec:
  levels: [{name: normal}, {name: core-only}]
---
apiVersion: leeward.dev/v1
kind: DegradationOverride
metadata: {name: exercise}
spec: {policy: shop, level: core-only, expireTime: \"2999-01-01T00:00:00Z\", reason: an exercise}
";

    #[tokio::test]
    async fn what_policy_holds_is_in_force_before_it_is_said_to_be_judged() {
        let viewer = Viewer {
            zone: Name::parse("a").unwrap(),
            proxy: Name::parse("a1").unwrap(),
        };
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("policy.yaml"), POLICY).unwrap();
        let live = Live::new(viewer.clone());
        let hub = Hub::new(leeward_telemetry::Settings {
            zone: viewer.zone.to_shared(),
            proxy: viewer.proxy.to_shared(),
            version: "test".into(),
            trace_ratio: 0.0,
            traces: None,
            access_log: None,
        });
        let degradation = Degradation::default();
        let registry = Arc::new(Registry::new(tokio::time::Instant::now().into_std()));
        let judge = judge(live.clone(), registry, hub.unwrap(), degradation.clone());
        let reader = async {
            // The judge has had its first turn, without policy.
            tokio::task::yield_now().await;
            assert!(!degradation.is_judged());
            load_dir(dir.path(), viewer, Arc::new(NoPlugins), &live)
                .await
                .unwrap();
            degradation.until_judged().await;
            let levels = live.levels().load();
            assert_eq!(
                levels.standing.first().map(|standing| &*standing.id),
                Some("shop/core-only")
            );
        };
        tokio::select! {
            biased;
            () = judge => panic!("it judges until it is dropped"),
            () = reader => {}
        }
    }
}
