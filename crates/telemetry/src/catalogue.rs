//! Every metric that the data plane exports: name, labels, meaning. Nowhere else.

/// How a metric behaves.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Kind {
    /// Only goes up; the name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution; the name ends in its unit.
    Histogram,
}

/// One row of the catalogue.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Metric {
    /// Full Prometheus name.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Label keys, in order. Values come from policy and closed lists, never from traffic.
    pub labels: &'static [&'static str],
    /// One sentence for the operator.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($(#[$doc:meta])* $id:ident = $name:literal $kind:ident [$($label:literal),*] $help:literal;)*) => {
        $($(#[$doc])* pub const $id: Metric =
            Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };)*
        /// All of them, in the order of the exposition.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    /// Requests ended.
    REQUESTS = "leeward_requests_total" Counter
        ["direction", "route", "service", "zone", "outcome", "status_class", "reason"]
        "Requests ended, by what they came to and the zone that answered.";
    /// Time of requests.
    REQUEST_SECONDS = "leeward_request_duration_seconds" Histogram ["direction", "route"]
        "Time from a request's head to the end of its answer.";
    /// Requests under way.
    ACTIVE = "leeward_requests_active" Gauge ["direction"] "Requests under way.";
    /// Attempts ended.
    ATTEMPTS = "leeward_attempts_total" Counter ["service", "zone", "result"]
        "Attempts at endpoints, by the zone of the endpoint and how they ended.";
    /// Endpoints that changed.
    ENDPOINT_CHANGES = "leeward_endpoint_changes_total" Counter ["service", "change"]
        "Endpoints that were ejected, became unreachable, or came back.";
    /// Plugin faults.
    PLUGIN_FAULTS = "leeward_plugin_faults_total" Counter ["plugin", "fault"]
        "Plugin calls that ended in a fault.";
    /// Plugins' own counters.
    PLUGIN_CUSTOM = "leeward_plugin_custom_total" Counter ["plugin", "name"]
        "Counters that plugins keep themselves.";
    /// Connections refused.
    CONNECTIONS_REFUSED = "leeward_connections_refused_total" Counter []
        "Client connections closed at once because the proxy had too many.";
    /// Policy generation.
    GENERATION = "leeward_config_generation" Gauge [] "The policy revision in use.";
    /// Quarantined resources.
    QUARANTINED = "leeward_config_quarantined" Gauge [] "Resources whose newest revision was refused.";
    /// Whether a control plane is there.
    CONNECTED = "leeward_config_connected" Gauge [] "1 while a control plane is connected.";
    /// Age of the policy.
    CONFIG_AGE = "leeward_config_age_seconds" Gauge []
        "Time since a control plane, or the policy's files, were last heard from.";
    /// Spans dropped.
    SPANS_DROPPED = "leeward_spans_dropped_total" Counter [] "Spans dropped because the export fell behind.";
    /// Log lines dropped.
    LOG_DROPPED = "leeward_access_log_dropped_total" Counter []
        "Access log lines dropped because the writer fell behind.";
    /// Series that found no room.
    SERIES_OVERFLOW = "leeward_series_overflow_total" Counter []
        "Label sets that found no room and were counted under overflow=\"true\".";
    /// Panics.
    PANICS = "leeward_panics_total" Counter [] "Panics, each of which cost one connection. Any is a defect.";
    /// The build.
    BUILD_INFO = "leeward_build_info" Gauge ["version", "zone", "proxy"] "Always 1; the labels say what runs.";
}

/// Upper bounds of the duration histograms' buckets, in microseconds: OpenTelemetry's for HTTP durations,
/// and four below them, since a mesh adds less than those can show.
pub const BUCKETS_US: [u64; 18] = [
    500, 1_000, 2_500, 3_500, 5_000, 10_000, 25_000, 50_000, 75_000, 100_000, 250_000, 500_000, 750_000,
    1_000_000, 2_500_000, 5_000_000, 7_500_000, 10_000_000,
];

/// Label sets that one proxy keeps; what comes after is counted under `overflow="true"`.
pub const MAX_SERIES: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_keeps_its_conventions() {
        for metric in ALL {
            let name = metric.name;
            assert!(name.starts_with("leeward_"), "{name}: prefix");
            assert_eq!(
                name.ends_with("_total"),
                metric.kind == Kind::Counter,
                "{name}: suffix"
            );
            assert!(metric.help.ends_with('.'), "{name}: help is a sentence");
            assert_eq!(ALL.iter().filter(|m| m.name == name).count(), 1, "{name}: unique");
        }
        assert!(BUCKETS_US.is_sorted());
    }
}
