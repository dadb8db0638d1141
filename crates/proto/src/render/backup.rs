//! Schedules of backups, on the wire, with their defaults written out.

use super::duration;
use crate::v1;
use leeward_policy::model::{BackupPolicy, RecoveryObjective};

pub(super) fn policy(policy: &BackupPolicy) -> v1::BackupPolicy {
    let keep = &policy.retention;
    v1::BackupPolicy {
        destination: policy.destination.to_string(),
        every: duration(policy.every),
        jitter: duration(policy.jitter),
        retention: Some(v1::BackupRetention {
            last: keep.last,
            daily: Some(keep.daily),
            weekly: Some(keep.weekly),
            max_age: keep.max_age.and_then(duration),
        }),
        encryption: (!policy.recipients.is_empty()).then(|| v1::BackupEncryption {
            recipients: policy.recipients.iter().map(ToString::to_string).collect(),
        }),
        continuous: Some(policy.continuous),
        verify_every: duration(policy.verify_every),
    }
}

pub(super) fn objective(objective: &RecoveryObjective) -> v1::RecoveryObjective {
    v1::RecoveryObjective {
        rpo: duration(objective.rpo),
        rto: duration(objective.rto),
        destination: objective.destination.to_string(),
        drill_every: objective.drill_every.and_then(duration),
    }
}
