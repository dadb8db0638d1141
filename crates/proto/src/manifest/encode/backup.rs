//! Schedules of backups.

use super::{duration, fields};
use crate::v1;
use serde_json::{Value, json};

pub(super) fn policy(policy: &v1::BackupPolicy) -> Value {
    let retention = policy.retention.as_ref().map(|keep| {
        fields([
            ("last", json!(keep.last)),
            ("daily", json!(keep.daily)),
            ("weekly", json!(keep.weekly)),
            ("maxAge", duration(keep.max_age.as_ref())),
        ])
    });
    let encryption = policy.encryption.as_ref();
    let encryption = encryption.map(|encryption| json!({"recipients": encryption.recipients}));
    fields([
        ("destination", json!(policy.destination)),
        ("every", duration(policy.every.as_ref())),
        ("jitter", duration(policy.jitter.as_ref())),
        ("retention", json!(retention)),
        ("encryption", json!(encryption)),
        ("continuous", json!(policy.continuous)),
        ("verifyEvery", duration(policy.verify_every.as_ref())),
    ])
}

pub(super) fn objective(objective: &v1::RecoveryObjective) -> Value {
    fields([
        ("rpo", duration(objective.rpo.as_ref())),
        ("rto", duration(objective.rto.as_ref())),
        ("destination", json!(objective.destination)),
        ("drillEvery", duration(objective.drill_every.as_ref())),
    ])
}
