//! When backups of the store are made, and how much may be lost.

use crate::Name;
use std::time::Duration;

/// A schedule of backups to one place.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackupPolicy {
    /// The place's name. Where it is, and the secrets for it, control planes are told when they are started.
    pub destination: Name,
    /// How often.
    pub every: Duration,
    /// Up to how much later, by chance.
    pub jitter: Duration,
    /// What is kept.
    pub retention: BackupRetention,
    /// Whose secrets can read backups; empty: they are not encrypted.
    pub recipients: Vec<Box<str>>,
    /// Whether the log is shipped as it grows.
    pub continuous: bool,
    /// How often the newest is verified.
    pub verify_every: Duration,
}

/// What backups are kept. What any of the first three names stays, unless it is too old.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackupRetention {
    /// The newest.
    pub last: u32,
    /// The newest of each of so many days.
    pub daily: u32,
    /// The newest of each of so many weeks.
    pub weekly: u32,
    /// Older ones go.
    pub max_age: Option<Duration>,
}

/// How much may be lost, and how long it may take to be back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RecoveryObjective {
    /// The most that may be lost.
    pub rpo: Duration,
    /// The longest that it may take.
    pub rto: Duration,
    /// The place that drills restore from.
    pub destination: Name,
    /// How often a drill is made; `None`: by command only.
    pub drill_every: Option<Duration>,
}

impl BackupPolicy {
    /// How often, where it isn't said.
    pub const EVERY: Duration = Duration::from_secs(6 * 3600);
    /// How often the newest is verified, where it isn't said.
    pub const VERIFY_EVERY: Duration = Duration::from_secs(24 * 3600);
}

impl BackupRetention {
    /// A week of each, a fortnight of days, two months of weeks.
    pub const DEFAULT: Self = Self {
        last: 7,
        daily: 14,
        weekly: 8,
        max_age: None,
    };
}
