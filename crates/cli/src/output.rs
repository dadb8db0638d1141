//! What people see.

use clap::ValueEnum;
use leeward_policy::Kind;
use leeward_proto::v1;
use std::io::Write;

/// How things are shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Format {
    /// Columns, for people.
    Table,
    /// YAML that `apply` takes.
    Yaml,
    /// JSON.
    Json,
}

/// How resources are shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum GetFormat {
    /// Columns, for people.
    Table,
    /// More columns.
    Wide,
    /// KIND/NAME on each line, for scripts.
    Name,
    /// YAML that `apply` takes.
    Yaml,
    /// JSON.
    Json,
}

/// Why a command did not do what it should.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What was given is wrong; a line for each thing.
    BadInput(String),
    /// Something failed.
    Failed(anyhow::Error),
    /// What failed has been told.
    Told,
    /// The same, with an exit status of its own.
    Status(u8),
    /// Whether something is so can't be told, where 1 says that it isn't.
    Untold(String),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// One kind, or all.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kinds {
    All,
    One(Kind),
}

/// The kinds, in words.
const KINDS: &str = "zone, service, route, fallbackpolicy, plugin, resiliencepolicy, circuitoverride, featureflags, degradationpolicy, degradationoverride, queue, authorizationpolicy, gateway, rolloutpolicy, accesspolicy, backuppolicy, recoveryobjective, workload";

/// Reads a kind as people write it: any case, singular or plural, or short.
pub(crate) fn kind(text: &str) -> Result<Kinds, String> {
    let lower = text.to_lowercase();
    let singular = match lower.as_str() {
        "fallbackpolicies" | "fallbacks" | "fallback" | "fbp" => "fallbackpolicy",
        "resiliencepolicies" | "resilience" | "rp" => "resiliencepolicy",
        "circuits" | "circuit" | "co" => "circuitoverride",
        // The kind is a plural itself.
        "featureflags" | "featureflag" | "flags" | "flag" | "ff" => "featureflags",
        "degradationpolicies" | "dp" => "degradationpolicy",
        "degradations" | "degradation" | "do" => "degradationoverride",
        "authorizationpolicies" | "authz" | "ap" => "authorizationpolicy",
        "rolloutpolicies" | "ro" => "rolloutpolicy",
        "accesspolicies" | "access" => "accesspolicy",
        "backuppolicies" | "backups" | "backup" | "bp" => "backuppolicy",
        "rec" => "recoveryobjective",
        "all" => return Ok(Kinds::All),
        other => other.strip_suffix('s').unwrap_or(other),
    };
    let known = |k: &Kind| k.as_str().to_lowercase() == singular || short(*k) == singular;
    let found = Kind::ALL.into_iter().find(known).map(Kinds::One);
    found.ok_or_else(|| format!("want {KINDS} or all"))
}

const fn short(kind: Kind) -> &'static str {
    match kind {
        Kind::Zone => "z",
        Kind::Service => "svc",
        Kind::Route => "r",
        Kind::FallbackPolicy => "fbp",
        Kind::Plugin => "p",
        Kind::ResiliencePolicy => "rp",
        Kind::CircuitOverride => "co",
        Kind::FeatureFlags => "ff",
        Kind::DegradationPolicy => "dp",
        Kind::DegradationOverride => "do",
        Kind::Queue => "q",
        Kind::AuthorizationPolicy => "ap",
        Kind::Workload => "wl",
        Kind::Gateway => "gw",
        Kind::RolloutPolicy => "ro",
        Kind::AccessPolicy => "access",
        Kind::BackupPolicy => "bp",
        Kind::RecoveryObjective => "rec",
    }
}

/// Writes to standard output. That nobody reads it any more is no failure.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Writes to standard error.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The kind's name in a wire message.
pub(crate) fn kind_name(resource: &v1::Resource) -> &'static str {
    leeward_proto::spec_kind(resource).map_or("-", Kind::as_str)
}

/// Columns as wide as their widest cell.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let padded: Vec<_> = cells
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(head)];
    lines.extend(
        rows.iter()
            .map(|row| line(std::array::from_fn(|i| row.get(i).map_or("", String::as_str)))),
    );
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_people_write_them() {
        for (text, want) in [
            ("Service", Kind::Service),
            ("services", Kind::Service),
            ("svc", Kind::Service),
            ("FallbackPolicies", Kind::FallbackPolicy),
            ("fallback", Kind::FallbackPolicy),
            ("route", Kind::Route),
            ("ResiliencePolicies", Kind::ResiliencePolicy),
            ("resiliencepolicy", Kind::ResiliencePolicy),
            ("resilience", Kind::ResiliencePolicy),
            ("rp", Kind::ResiliencePolicy),
            ("circuitoverrides", Kind::CircuitOverride),
            ("circuits", Kind::CircuitOverride),
            ("co", Kind::CircuitOverride),
            ("FeatureFlags", Kind::FeatureFlags),
            ("flags", Kind::FeatureFlags),
            ("ff", Kind::FeatureFlags),
            ("DegradationPolicies", Kind::DegradationPolicy),
            ("degradationpolicy", Kind::DegradationPolicy),
            ("dp", Kind::DegradationPolicy),
            ("degradationoverrides", Kind::DegradationOverride),
            ("degradation", Kind::DegradationOverride),
            ("do", Kind::DegradationOverride),
            ("Queue", Kind::Queue),
            ("queues", Kind::Queue),
            ("q", Kind::Queue),
            ("AuthorizationPolicies", Kind::AuthorizationPolicy),
            ("authorizationpolicy", Kind::AuthorizationPolicy),
            ("authz", Kind::AuthorizationPolicy),
            ("ap", Kind::AuthorizationPolicy),
            ("Workloads", Kind::Workload),
            ("wl", Kind::Workload),
            ("Gateways", Kind::Gateway),
            ("gw", Kind::Gateway),
            ("AccessPolicies", Kind::AccessPolicy),
            ("access", Kind::AccessPolicy),
            ("BackupPolicies", Kind::BackupPolicy),
            ("bp", Kind::BackupPolicy),
            ("RecoveryObjectives", Kind::RecoveryObjective),
            ("rec", Kind::RecoveryObjective),
        ] {
            assert_eq!(kind(text), Ok(Kinds::One(want)), "{text}");
        }
        assert_eq!(kind("all"), Ok(Kinds::All));
        assert!(kind("pod").is_err());
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            ["a".to_owned(), "1".to_owned()],
            ["long".to_owned(), "2".to_owned()],
        ];
        assert_eq!(table(["NAME", "N"], &rows), "NAME  N\na     1\nlong  2");
    }
}
