//! Schedules of backups.

use super::{DAY, HOUR, MINUTE, SECOND};
use crate::field::Fields;
use crate::v1;
use leeward_policy::model::{BackupPolicy, BackupRetention, RecoveryObjective};
use std::time::Duration;

/// Recipients at most.
const MAX_RECIPIENTS: usize = 16;

pub(super) fn backup_policy(f: &mut Fields, wire: &v1::BackupPolicy) -> Option<BackupPolicy> {
    let mut s = f.section("spec");
    let destination = s.name("destination", &wire.destination);
    let every = s.duration(
        "every",
        wire.every.as_ref(),
        BackupPolicy::EVERY,
        MINUTE..=30 * DAY,
    );
    let jitter = s.duration(
        "jitter",
        wire.jitter.as_ref(),
        Duration::ZERO,
        Duration::ZERO..=every,
    );
    let default = BackupRetention::DEFAULT;
    let retention = match &wire.retention {
        None => default,
        Some(wire) => {
            let mut s = s.section("retention");
            BackupRetention {
                last: s.small("last", wire.last, default.last, 1..=10_000),
                daily: s.optional("daily", wire.daily, default.daily, 0..=10_000),
                weekly: s.optional("weekly", wire.weekly, default.weekly, 0..=1000),
                max_age: s.optional_duration("maxAge", wire.max_age.as_ref(), HOUR..=3650 * DAY),
            }
        }
    };
    let recipients: &[String] = wire.encryption.as_ref().map_or(&[], |e| &e.recipients);
    let verify_every = s.duration(
        "verifyEvery",
        wire.verify_every.as_ref(),
        BackupPolicy::VERIFY_EVERY,
        MINUTE..=30 * DAY,
    );
    let path = "spec.encryption.recipients";
    f.count(path, recipients.len(), 0..=MAX_RECIPIENTS);
    for (i, recipient) in recipients.iter().enumerate() {
        if !is_recipient(recipient) {
            let shown: String = recipient.chars().take(80).collect();
            f.reject::<()>(
                format!("{path}[{i}]"),
                format!("{shown:?} is no age recipient; want age1 and 58 more letters and digits, as age-keygen prints it"),
            );
        }
    }
    f.unique(path, "", recipients);
    Some(BackupPolicy {
        destination: destination?,
        every,
        jitter,
        retention,
        recipients: recipients.iter().map(|r| r.as_str().into()).collect(),
        continuous: wire.continuous.unwrap_or(true),
        verify_every,
    })
}

/// By its looks: its check sum is looked at where it is used.
fn is_recipient(text: &str) -> bool {
    let rest = text.strip_prefix("age1");
    rest.is_some_and(|rest| {
        rest.len() == 58 && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    })
}

pub(super) fn recovery_objective(f: &mut Fields, wire: &v1::RecoveryObjective) -> Option<RecoveryObjective> {
    let mut s = f.section("spec");
    let mut wanted = |field: &str, value: Option<&prost_types::Duration>| {
        if value.is_none() {
            return s.reject(field, "is missing; want a duration of 1s to 30d");
        }
        Some(s.duration(field, value, SECOND, SECOND..=30 * DAY))
    };
    let rpo = wanted("rpo", wire.rpo.as_ref());
    let rto = wanted("rto", wire.rto.as_ref());
    let destination = s.name("destination", &wire.destination);
    let drill_every = s.optional_duration("drillEvery", wire.drill_every.as_ref(), MINUTE..=365 * DAY);
    Some(RecoveryObjective {
        rpo: rpo?,
        rto: rto?,
        destination: destination?,
        drill_every,
    })
}
