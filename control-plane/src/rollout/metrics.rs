//! Rollouts for scrapers.

use super::Rollouts;
use super::machine::Phase;
use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;

/// The bounds of how many revisions proxies are behind.
const BEHIND: [&str; 5] = ["0", "10", "100", "1000", "more"];

impl Rollouts {
    /// Where rollouts stand, as Prometheus text.
    pub(crate) fn metrics(&self) -> String {
        let (course, last) = (self.course.borrow().clone(), self.last.borrow().clone());
        let mut out = String::new();
        let mut head = |name: &str, kind: &str, help: &str, rows: &[(String, u64)]| {
            // Writing to a String does not fail.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in rows {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        let plain = |value: u64| [(String::new(), value)];
        let phase = last.as_ref().map(|rollout| match rollout.phase {
            Phase::Running => "running",
            Phase::Paused { .. } => "paused",
            Phase::RollingBack { .. } => "rolling_back",
            Phase::Promoted { .. } => "promoted",
            Phase::RolledBack { .. } => "rolled_back",
        });
        let phases = phase.map(|phase| (format!("{{phase=\"{phase}\"}}"), 1));
        head(
            "leeward_control_rollout_phase",
            "gauge",
            "1 for the phase of the last rollout.",
            phases.as_slice(),
        );
        let open = course.held.as_ref().map_or(0, |held| held.revision);
        head(
            "leeward_control_rollout_revision",
            "gauge",
            "The revision that goes out in steps; 0 if none does.",
            &plain(open),
        );
        let stage = last.filter(|rollout| rollout.revision == open && open != 0);
        head(
            "leeward_control_rollout_stage",
            "gauge",
            "The stage that it is in, from 1; 0 if none is under way.",
            &plain(stage.map_or(0, |rollout| rollout.stage as u64 + 1)),
        );
        let result = |word: &str| format!("{{result=\"{word}\"}}");
        head(
            "leeward_control_rollouts_total",
            "counter",
            "Rollouts that ended here, by how.",
            &[
                (result("promoted"), self.counts.promoted.load(Relaxed)),
                (result("rolled_back"), self.counts.rolled_back.load(Relaxed)),
            ],
        );
        head(
            "leeward_control_rollout_refusals_total",
            "counter",
            "Rollouts that a proxy's refusal stopped.",
            &plain(self.counts.refusals.load(Relaxed)),
        );
        let (behind, refusing) = self.proxies.lag(course.head);
        let rows: Vec<(String, u64)> = BEHIND
            .iter()
            .zip(behind)
            .map(|(bound, count)| (format!("{{revisions=\"{bound}\"}}"), count))
            .collect();
        head(
            "leeward_control_proxies_behind",
            "gauge",
            "Connected proxies by how many revisions they are behind, up to.",
            &rows,
        );
        head(
            "leeward_control_proxies_refusing",
            "gauge",
            "Connected proxies that refuse something.",
            &plain(refusing),
        );
        out
    }
}
