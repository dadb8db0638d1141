//! How a change goes out to proxies in steps.

use crate::Name;
use std::time::Duration;

/// The steps of a change, and what stops it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RolloutPolicy {
    /// 1 to 16; the last takes in every proxy.
    pub stages: Vec<RolloutStage>,
    /// Which increase of the share of failed requests is too much.
    pub errors: ErrorGate,
    /// Which increase of the time of requests is too much.
    pub latency: LatencyGate,
    /// What happens when a gate says no, or a stage takes too long.
    pub on_failure: OnFailure,
    /// Longest time of a stage beyond its hold.
    pub progress_deadline: Duration,
}

/// Proxies that get a change together.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RolloutStage {
    /// In which zones.
    pub zones: StageZones,
    /// How many there.
    pub amount: StageAmount,
    /// How long it is watched at least.
    pub hold: Duration,
}

/// The zones of a stage.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StageZones {
    /// All.
    All,
    /// These.
    Named(Vec<Name>),
    /// So many; which, is drawn for each rollout.
    Count(u32),
}

/// How many proxies of a stage's zones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StageAmount {
    /// So many.
    Proxies(u32),
    /// This share of them, in percent, and at least one.
    Percent(u32),
}

/// Share of failed requests, at proxies with a change and at those without it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ErrorGate {
    /// Largest increase, in hundredths of a percentage point.
    pub max_increase: u32,
    /// Together with it: largest ratio, in percent.
    pub max_ratio: u32,
    /// Requests that must have been seen.
    pub minimum_requests: u32,
}

/// Time of requests, likewise.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LatencyGate {
    /// Which percentile.
    pub percentile: u32,
    /// Largest ratio, in percent.
    pub max_ratio: u32,
    /// Requests that must have been seen.
    pub minimum_requests: u32,
    /// An increase of less than this is none.
    pub min_increase: Duration,
}

/// What happens when a change makes things worse.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnFailure {
    /// It is taken back everywhere.
    Rollback,
    /// It stays where it is, until somebody says what is to happen.
    Pause,
}

impl RolloutPolicy {
    /// The name of the policy that holds for applies which name none.
    pub const DEFAULT: &'static str = "default";
    /// Stages at most.
    pub const MAX_STAGES: usize = 16;
    /// Proxies of a stage that are counted rather than shared out, at most.
    pub const MAX_COUNTED: u32 = 64;
    /// How long a stage is watched if nothing is said.
    pub const HOLD: Duration = Duration::from_secs(30);
    /// How long one may take beyond that if nothing is said.
    pub const PROGRESS_DEADLINE: Duration = Duration::from_secs(600);

    /// The stages if nothing is said: one proxy, 1 %, one zone, all.
    pub fn default_stages() -> Vec<RolloutStage> {
        let stage = |zones, amount| RolloutStage {
            zones,
            amount,
            hold: Self::HOLD,
        };
        vec![
            stage(StageZones::All, StageAmount::Proxies(1)),
            stage(StageZones::All, StageAmount::Percent(1)),
            stage(StageZones::Count(1), StageAmount::Percent(100)),
            stage(StageZones::All, StageAmount::Percent(100)),
        ]
    }
}

impl ErrorGate {
    /// One point, and half as many again, after 50 requests.
    pub const DEFAULT: Self = Self {
        max_increase: 100,
        max_ratio: 150,
        minimum_requests: 50,
    };
}

impl LatencyGate {
    /// Twice the 99th percentile, after 200 requests.
    pub const DEFAULT: Self = Self {
        percentile: 99,
        max_ratio: 200,
        minimum_requests: 200,
        min_increase: Duration::from_millis(10),
    };
}
