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
    /// TCP connections ended.
    TCP_CONNECTIONS = "leeward_tcp_connections_total" Counter
        ["direction", "service", "zone", "outcome", "reason"]
        "Connections of TCP services, and those passed on to where policy knows nobody, that ended, and why.";
    /// Time of TCP connections.
    TCP_SECONDS = "leeward_tcp_connection_duration_seconds" Histogram ["direction", "service"]
        "Time from a TCP connection's beginning to its end.";
    /// TCP connections now.
    TCP_OPEN = "leeward_tcp_connections_open" Gauge ["direction"] "TCP connections that are open.";
    /// Their bytes.
    TCP_BYTES = "leeward_tcp_bytes_total" Counter ["direction", "service", "way"]
        "Bytes of TCP connections that ended: sent by their clients, or received by them.";
    /// Captured connections.
    CAPTURED = "leeward_captured_connections_total" Counter ["as"]
        "Captured connections by what they were taken for: http1, h2, tls, tcp, silent, or refused.";
    /// Attempts ended.
    ATTEMPTS = "leeward_attempts_total" Counter ["service", "zone", "transport", "result"]
        "Attempts at endpoints, by the endpoint's zone, what they went by (http1, h2, quic, tcp) and how they ended.";
    /// Fallbacks from QUIC.
    TRANSPORT_FALLBACKS = "leeward_zone_transport_fallbacks_total" Counter ["zone"]
        "Times that TCP was taken to a proxy of a zone since QUIC did not get through.";
    /// Choice by size.
    ANSWERS_LARGE = "leeward_zone_answers_large" Gauge ["kind", "name"]
        "1 while a rule's answers, or a service's to requests by no rule, are so large that its requests go to other zones by TCP where policy leaves the choice, 0 while they are not.";
    /// Gateways of other zones.
    ZONE_GATEWAY_UP = "leeward_zone_gateway_up" Gauge ["zone", "gateway"]
        "1 while a gateway of another zone is used, 0 while it is left since it can't be reached or doesn't answer.";
    /// Endpoints that changed.
    ENDPOINT_CHANGES = "leeward_endpoint_changes_total" Counter ["service", "change", "reason"]
        "Endpoints that were ejected, became unreachable, failed their checks, or came back.";
    /// Endpoints that are left out.
    ENDPOINT_OUT = "leeward_endpoint_out" Gauge ["service", "endpoint", "zone", "standing", "reason"]
        "1 for each endpoint that is left out now, with the reason.";
    /// Further attempts.
    RETRIES = "leeward_retries_total" Counter ["service", "kind"]
        "Attempts beyond a request's first: retries and hedges.";
    /// Requests that failed and were not tried again.
    RETRIES_REFUSED = "leeward_retries_refused_total" Counter ["service", "reason"]
        "Failed requests that were not tried again, by the reason.";
    /// Requests refused by a limit of this proxy.
    REFUSED = "leeward_refused_total" Counter ["service", "limit"]
        "Requests that a limit of this proxy refused, by the limit's name.";
    /// What policies said of requests.
    AUTHORIZATION = "leeward_authorization_decisions_total" Counter ["direction", "policy", "decision"]
        "What AuthorizationPolicies said of requests: allow, deny, audit, or would_deny in a dry run.";
    /// Whether keys are there.
    JWKS_AVAILABLE = "leeward_jwks_available" Gauge ["uri"]
        "1 while an issuer's keys were had when they were last asked for; 0 while older ones, or none, are in use.";
    /// Circuits that changed.
    CIRCUIT_CHANGES = "leeward_circuit_changes_total" Counter ["kind", "name", "to", "reason"]
        "Circuits that opened, let probes through, or closed.";
    /// Requests that a circuit would have refused.
    WOULD_REFUSE = "leeward_circuit_would_refuse_total" Counter ["service"]
        "Requests that passed only because their circuit's mode is to observe.";
    /// Circuits now.
    CIRCUIT_STATE = "leeward_circuit_state" Gauge ["kind", "name", "mode"]
        "0 while a circuit is closed, 1 while it lets a part of the calls through, 2 while it is open.";
    /// Panic.
    PANIC = "leeward_service_panic" Gauge ["service"]
        "1 while so few endpoints are healthy that health is disregarded.";
    /// Shares of zones.
    ZONE_SHARE = "leeward_zone_share" Gauge ["service", "zone"]
        "Share of a service's requests that goes to a zone, 0 to 1.";
    /// Spare capacity of zones.
    ZONE_SPARE = "leeward_zone_spare_requests" Gauge ["service", "zone"]
        "Further requests that the proxies of another zone let each proxy that calls have under way, as they last reported.";
    /// How much of a service's limit is in use.
    UTILIZATION = "leeward_service_utilization" Gauge ["service"]
        "Mean requests under way of the last 10 s over the limit in force. Scale on this, to 0.6 or so.";
    /// How much is asked for.
    SATURATION = "leeward_service_saturation" Gauge ["service"]
        "Mean requests under way, queued and held of the last 10 s over the limit in force; above 1 is too much.";
    /// How much is refused.
    SHED_RATIO = "leeward_service_shed_ratio" Gauge ["service"]
        "Share of the requests of the last 10 s that shedding, adaptive limits or the bulkhead refused, 0 to 1.";
    /// Held requests.
    HELD = "leeward_held_requests" Gauge ["service"]
        "Requests that wait for a service without endpoints to get one: a signal to scale from zero.";
    /// Levels of degradation that changed.
    DEGRADATION_CHANGES = "leeward_degradation_changes_total" Counter ["policy", "to", "by"]
        "Levels of degradation that came into force, and what set them: an override, the control plane, a trigger.";
    /// Levels of degradation now.
    DEGRADATION_LEVEL = "leeward_degradation_level" Gauge ["policy", "level"]
        "1 for the level of degradation that is in force.";
    /// Queued requests.
    QUEUE_WAITING = "leeward_queue_entries" Gauge ["queue"] "Queued requests that wait for their service.";
    /// Their size.
    QUEUE_BYTES = "leeward_queue_bytes" Gauge ["queue"] "Size of the queued requests that wait, in bytes.";
    /// Dead letters.
    QUEUE_DEAD = "leeward_queue_dead_letters" Gauge ["queue"]
        "Queued requests that could not be delivered, and wait for somebody to decide.";
    /// The oldest one.
    QUEUE_OLDEST = "leeward_queue_oldest_seconds" Gauge ["queue"] "Age of the oldest queued request that waits.";
    /// Whether a queue can be used.
    QUEUE_AVAILABLE = "leeward_queue_available" Gauge ["queue"] "1 while a queue's store can be used.";
    /// What happened to queued requests.
    QUEUE_TOTAL = "leeward_queue_entries_total" Counter ["queue", "event"]
        "Queued requests that were accepted, delivered, or became dead letters (of those, expired ones).";
    /// Entries of caches.
    CACHE_ENTRIES = "leeward_cache_entries" Gauge ["route"] "Answers that are kept for a rule.";
    /// Their size.
    CACHE_BYTES = "leeward_cache_bytes" Gauge ["route"] "Size of the answers that are kept for a rule, in bytes.";
    /// What caches did.
    CACHE_TOTAL = "leeward_cache_requests_total" Counter ["route", "result"]
        "Looks at a rule's cache, by what came of them; and answers that were evicted.";
    /// Plugin calls.
    PLUGIN_CALLS = "leeward_plugin_calls_total" Counter ["plugin", "function", "outcome"]
        "Calls of plugins that came to an end: ok, or the word for the fault.";
    /// Their time.
    PLUGIN_CALL_SECONDS = "leeward_plugin_call_seconds" Histogram ["plugin", "function"]
        "Time of plugin calls, with what they waited for an instance and for other services.";
    /// Plugins' versions.
    PLUGIN_VERSION_CALLS = "leeward_plugin_version_calls_total" Counter ["plugin", "version", "role", "outcome"]
        "Calls of the versions of a plugin that are in use, by their role: stable, canary or previous.";
    /// What becomes of plugins.
    PLUGIN_STATE = "leeward_plugin_state" Gauge ["plugin", "state"]
        "1 for what a plugin is: ready, quarantined, or that without a version, fetching, compiling or failed.";
    /// Whether the newest version is there.
    PLUGIN_PENDING = "leeward_plugin_pending" Gauge ["plugin"]
        "1 while the version of a plugin that policy names isn't the one in use.";
    /// What happened to versions.
    PLUGIN_EVENTS = "leeward_plugin_events_total" Counter ["plugin", "event"]
        "Versions of a plugin that were quarantined, or taken back for the last good one.";
    /// Memory of plugins.
    PLUGIN_MEMORY = "leeward_plugin_memory_bytes" Gauge ["plugin"]
        "Linear memory of a plugin's instances, in bytes.";
    /// Instances of plugins.
    PLUGIN_INSTANCES = "leeward_plugin_instances" Gauge ["plugin"] "Instances of a plugin.";
    /// How long compiling took.
    PLUGIN_COMPILE = "leeward_plugin_compile_seconds" Gauge ["plugin", "cached"]
        "Time that it took to have the code of the version in use, by whether it was compiled before.";
    /// Plugin faults.
    PLUGIN_FAULTS = "leeward_plugin_faults_total" Counter ["plugin", "fault"]
        "Plugin calls that ended in a fault.";
    /// Plugins' own counters.
    PLUGIN_CUSTOM = "leeward_plugin_custom_total" Counter ["plugin", "name"]
        "Counters that plugins keep themselves.";
    /// Plugins' own gauges.
    PLUGIN_CUSTOM_GAUGE = "leeward_plugin_custom" Gauge ["plugin", "name"]
        "Gauges that plugins keep themselves, as they were last set by any worker.";
    /// Plugins' own histograms.
    PLUGIN_CUSTOM_VALUES = "leeward_plugin_custom_values" Histogram ["plugin", "name"]
        "Values that plugins give to histograms of their own, in whatever unit is theirs.";
    /// How long a gateway's certificate is good.
    GATEWAY_CERTIFICATE_EXPIRY = "leeward_gateway_certificate_expiry_seconds" Gauge ["certificate"]
        "Time until a certificate for clients from outside ends; 0 when it has, or there is none.";
    /// Files of certificates that can't be used.
    GATEWAY_CERTIFICATE_FAILURES = "leeward_gateway_certificate_failures_total" Counter ["certificate"]
        "Times that the files of a certificate changed to what can't be used; the last good one goes on.";
    /// Connections from outside.
    GATEWAY_CONNECTIONS = "leeward_gateway_connections" Gauge ["address"]
        "Connections of clients from outside that are open, by the address that they came to.";
    /// Whether addresses are listened on.
    GATEWAY_LISTENING = "leeward_gateway_listening" Gauge ["address", "transport"]
        "1 while an address for clients from outside is listened on; udp is HTTP/3.";
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
        "Time since a control plane last said that the policy in use is the newest, or the policy's files were read.";
    /// Where the policy is from.
    CONFIG_SOURCE = "leeward_config_source" Gauge ["source"]
        "1 for where the policy in use is from: control, file, disk (kept from before this start), or none.";
    /// Writes of the state.
    STATE_WRITES = "leeward_state_writes_total" Counter ["outcome"]
        "Times that what this proxy runs was written to disk for its next start: written or failed.";
    /// Files that were set aside.
    STATE_CORRUPT = "leeward_state_corrupt_total" Counter ["file"]
        "Files of the state on disk that were found damaged at the start.";
    /// Whether the file of flags is broken.
    FLAGS_FILE_BROKEN = "leeward_flags_file_broken" Gauge []
        "1 while the file of feature flags can't be used as it is, and what it was before holds.";
    /// How long the certificate is good.
    IDENTITY_EXPIRY = "leeward_identity_expiry_seconds" Gauge []
        "Time until this proxy's certificate ends; 0 when it has.";
    /// Renewals.
    IDENTITY_RENEWALS = "leeward_identity_renewals_total" Counter ["outcome"]
        "Times that this proxy asked for its next certificate: renewed, refused, unreachable, unusable, unsupported.";
    /// Certificates of workloads.
    WORKLOAD_SVIDS = "leeward_workload_svids" Gauge []
        "Workloads of this node for which this proxy has a certificate that is good.";
    /// Calls of processes.
    WORKLOAD_STREAMS = "leeward_workload_streams" Gauge []
        "Calls of processes of this node that are told of certificates and roots as these change.";
    /// What came of asking for them.
    WORKLOAD_SVIDS_ASKED = "leeward_workload_svids_issued_total" Counter ["outcome"]
        "Times that this proxy asked for the certificate of a workload: renewed, unreachable, refused, unusable, unsupported.";
    /// Calls refused.
    WORKLOAD_REFUSED = "leeward_workload_refused_total" Counter ["reason"]
        "Calls of processes that were refused, or ended so: header, jwt, busy, unattested, no_workload, no_policy, no_certificate, ending.";
    /// Revocations.
    IDENTITY_REVOCATIONS = "leeward_identity_revocations" Gauge []
        "Ids whose older certificates this proxy refuses.";
    /// What came of them.
    IDENTITY_REVOKED = "leeward_identity_revoked_total" Counter ["event"]
        "Handshakes that were refused since the peer's certificate was revoked, and open connections that were closed for that: refused, closed.";
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

/// The same for calls of plugins, which take from a microsecond to a second.
pub const CALL_BUCKETS_US: [u64; BUCKETS_US.len()] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    1_000_000,
];

/// The same for values of plugins' own, which are numbers of anything.
pub const VALUE_BUCKETS: [u64; BUCKETS_US.len()] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 1_000_000,
    10_000_000,
];

impl Metric {
    /// Upper bounds of its buckets: microseconds, or, of what is no duration, plain numbers.
    pub(crate) fn buckets(&self) -> &'static [u64; BUCKETS_US.len()] {
        if *self == PLUGIN_CALL_SECONDS {
            &CALL_BUCKETS_US
        } else if self.is_duration() {
            &BUCKETS_US
        } else {
            &VALUE_BUCKETS
        }
    }

    /// Whether a histogram is of durations, which are shown in seconds.
    pub(crate) fn is_duration(&self) -> bool {
        *self != PLUGIN_CUSTOM_VALUES
    }
}

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
        assert!(BUCKETS_US.is_sorted() && CALL_BUCKETS_US.is_sorted() && VALUE_BUCKETS.is_sorted());
    }
}
