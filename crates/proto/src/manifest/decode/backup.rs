//! Schedules of backups.

use super::fields::Fields;
use crate::v1;

pub(super) fn policy(f: &mut Fields<'_>) -> v1::BackupPolicy {
    v1::BackupPolicy {
        destination: f.text("destination"),
        every: f.duration("every"),
        jitter: f.duration("jitter"),
        retention: f.object("retention", |f| v1::BackupRetention {
            last: f.small("last"),
            daily: f.optional_small("daily"),
            weekly: f.optional_small("weekly"),
            max_age: f.duration("maxAge"),
        }),
        encryption: f.object("encryption", |f| v1::BackupEncryption {
            recipients: f.text_list("recipients"),
        }),
        continuous: f.optional_bool("continuous"),
        verify_every: f.duration("verifyEvery"),
    }
}

pub(super) fn objective(f: &mut Fields<'_>) -> v1::RecoveryObjective {
    v1::RecoveryObjective {
        rpo: f.duration("rpo"),
        rto: f.duration("rto"),
        destination: f.text("destination"),
        drill_every: f.duration("drillEvery"),
    }
}
