//! How failure and overload are met: the parts of services, routes and ResiliencePolicies that
//! `leeward-resilience` and the data path act on.

use crate::Name;
use std::time::{Duration, SystemTime};

/// Which endpoint gets a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LoadBalancer {
    /// The choice among a zone's endpoints.
    pub policy: BalancePolicy,
    /// How long the share of a new or recovered endpoint grows; zero for none.
    pub slow_start_window: Duration,
    /// Healthy share, in percent, below which health is disregarded; 0 never.
    pub panic_threshold: u32,
    /// How slow a failure counts; zero for not at all.
    pub failure_penalty: Duration,
    /// How requests are shared between zones.
    pub zones: ZoneFailover,
    /// Requests only go to zones that have the same value of this label as their caller's zone; `None` lets them go to
    /// all.
    pub within: Option<Box<str>>,
    /// Which zones serve.
    pub mode: ZoneMode,
}

impl LoadBalancer {
    /// Peak EWMA with Linkerd's numbers.
    pub const DEFAULT: Self = Self {
        policy: BalancePolicy::PeakEwma(Ewma::DEFAULT),
        slow_start_window: Duration::from_secs(30),
        panic_threshold: 50,
        failure_penalty: Duration::from_secs(5),
        zones: ZoneFailover::DEFAULT,
        within: None,
        mode: ZoneMode::Nearest,
    };
}

/// Which zones serve the requests of a service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ZoneMode {
    /// The caller's own, then the others in the order in which it turns to them.
    Nearest,
    /// These at once, each by its weight, of which one is above 0. Each zone once.
    ActiveActive(Vec<(Name, u32)>),
    /// These in this order, the same for every caller; at least one, each once.
    ActivePassive(Vec<Name>),
}

impl ZoneMode {
    /// The zones that it names, each with the path of the field that does, below that of `zoneFailover`.
    pub fn zones(&self) -> Vec<(String, &Name)> {
        match self {
            Self::Nearest => Vec::new(),
            Self::ActiveActive(zones) => (0..)
                .zip(zones)
                .map(|(i, (zone, _))| (format!("activeActive.zones[{i}].zone"), zone))
                .collect(),
            Self::ActivePassive(zones) => (0..)
                .zip(zones)
                .map(|(i, zone)| (format!("activePassive.zones[{i}]"), zone))
                .collect(),
        }
    }
}

/// A policy of choice among endpoints, with what only it needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BalancePolicy {
    /// The less loaded of two, by latency times requests under way.
    PeakEwma(Ewma),
    /// The less loaded of two, by requests under way over weight.
    LeastRequest,
    /// In turn, by weight.
    RoundRobin,
    /// At random, by weight.
    Random,
    /// Consistent hashing on a ring.
    RingHash {
        /// What is hashed.
        key: HashKey,
        /// Points on the ring, at least.
        minimum_size: u32,
        /// Percent of the average that an endpoint may carry; 0 is no bound.
        balance_factor: u32,
    },
    /// Consistent hashing by a table.
    Maglev {
        /// What is hashed.
        key: HashKey,
        /// A prime.
        table_size: u32,
        /// Percent of the average that an endpoint may carry; 0 is no bound.
        balance_factor: u32,
    },
}

impl BalancePolicy {
    /// What is hashed, where anything is.
    pub const fn hash_key(&self) -> Option<&HashKey> {
        match self {
            Self::RingHash { key, .. } | Self::Maglev { key, .. } => Some(key),
            Self::PeakEwma(_) | Self::LeastRequest | Self::RoundRobin | Self::Random => None,
        }
    }
}

/// The moving average of latency.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ewma {
    /// What is assumed of an endpoint that was never called.
    pub default_rtt: Duration,
    /// How fast what was measured is forgotten.
    pub decay_time: Duration,
}

impl Ewma {
    /// Linkerd's numbers.
    pub const DEFAULT: Self = Self {
        default_rtt: Duration::from_millis(30),
        decay_time: Duration::from_secs(10),
    };
}

/// What of a request names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum HashKey {
    /// The value of a header, whose name is lower case.
    Header(Box<str>),
    /// A cookie.
    Cookie {
        /// Its name.
        name: Box<str>,
        /// How long one that the proxy makes is valid, zero for the session; `None` makes none.
        ttl: Option<Duration>,
        /// Path of one that the proxy makes.
        path: Box<str>,
    },
    /// The client's address.
    Source,
}

/// How requests are shared between zones. Shares are in percent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ZoneFailover {
    /// What a healthy endpoint can carry of its own share, at least 100.
    pub overprovisioning_factor: u32,
    /// Healthy share below which a zone is left.
    pub leave_below: u32,
    /// For how long it must be below.
    pub leave_after: Duration,
    /// Healthy share above which it comes back, at least `leave_below`.
    pub return_above: u32,
    /// For how long it must be above.
    pub return_after: Duration,
    /// Share that comes back at once.
    pub return_step: u32,
    /// Pause between steps.
    pub return_interval: Duration,
    /// Heed what the proxies of other zones report of their services.
    pub remote_reports: bool,
}

impl ZoneFailover {
    /// Envoy's factor; the hysteresis is our own.
    pub const DEFAULT: Self = Self {
        overprovisioning_factor: 140,
        leave_below: 70,
        leave_after: Duration::from_secs(10),
        return_above: 85,
        return_after: Duration::from_secs(60),
        return_step: 10,
        return_interval: Duration::from_secs(10),
        remote_reports: true,
    };
}

/// A proxy asks the endpoints how they are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HealthCheck {
    /// What is asked.
    pub kind: CheckKind,
    /// From one check to the next.
    pub interval: Duration,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Failures in a row that make an endpoint unhealthy.
    pub unhealthy_threshold: u32,
    /// Successes in a row that make it healthy.
    pub healthy_threshold: u32,
    /// Percentage by which an interval varies.
    pub interval_jitter: u32,
}

/// What a health check asks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CheckKind {
    /// GET.
    Http {
        /// The path.
        path: Box<str>,
        /// The host; `None` is the service's name.
        host: Option<Box<str>>,
        /// Statuses that pass, sorted; empty for 200 to 299.
        expected_statuses: Vec<u16>,
    },
    /// grpc.health.v1.Health/Check.
    Grpc {
        /// The service that is asked about; empty for the server.
        service: Box<str>,
    },
    /// Whether a connection can be made.
    Tcp,
}

/// Requests for a service without endpoints.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hold {
    /// Requests that wait at once; 0 holds none.
    pub max_requests: u32,
    /// Longest wait.
    pub max_wait: Duration,
}

impl Hold {
    /// Linkerd's numbers for its queue.
    pub const DEFAULT: Self = Self {
        max_requests: 100,
        max_wait: Duration::from_secs(3),
    };
}

/// Passive health: what calls say about an endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OutlierDetection {
    /// Failures in a row that eject.
    pub consecutive_5xx: u32,
    /// Gateway failures in a row that eject; 0 is off.
    pub consecutive_gateway_failure: u32,
    /// How often rates are looked at.
    pub interval: Duration,
    /// Length of the first ejection.
    pub base_ejection_time: Duration,
    /// Longest ejection, at least the first.
    pub max_ejection_time: Duration,
    /// Endpoints that may be ejected at once, in percent; one may be if this is above 0.
    pub max_ejection_percent: u32,
    /// Percentage by which an ejection is longer.
    pub ejection_jitter: u32,
    /// Against the others' success rate; a factor of 0 is off.
    pub success_rate: SuccessRateDetection,
    /// Against a fixed percentage; `None` is off.
    pub failure_percentage: Option<FailurePercentageDetection>,
}

impl OutlierDetection {
    /// Envoy's numbers, and a jitter of 10 %.
    pub const DEFAULT: Self = Self {
        consecutive_5xx: 5,
        consecutive_gateway_failure: 0,
        interval: Duration::from_secs(10),
        base_ejection_time: Duration::from_secs(30),
        max_ejection_time: Duration::from_secs(300),
        max_ejection_percent: 10,
        ejection_jitter: 10,
        success_rate: SuccessRateDetection::DEFAULT,
        failure_percentage: None,
    };
}

/// Ejects what succeeds far less often than the others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SuccessRateDetection {
    /// Endpoints with enough requests that there must be.
    pub minimum_hosts: u32,
    /// Requests in the interval that are enough.
    pub request_volume: u32,
    /// Thousandths of a standard deviation; 0 is off.
    pub stdev_factor: u32,
}

impl SuccessRateDetection {
    /// Envoy's numbers.
    pub const DEFAULT: Self = Self {
        minimum_hosts: 5,
        request_volume: 100,
        stdev_factor: 1900,
    };
}

/// Ejects what fails at least this often.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FailurePercentageDetection {
    /// Failures in percent.
    pub threshold: u32,
    /// Endpoints with enough requests that there must be.
    pub minimum_hosts: u32,
    /// Requests in the interval that are enough.
    pub request_volume: u32,
}

impl FailurePercentageDetection {
    /// Envoy's numbers.
    pub const DEFAULT: Self = Self {
        threshold: 85,
        minimum_hosts: 5,
        request_volume: 50,
    };
}

/// What a service may take of one proxy: a bulkhead.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConnectionPool {
    /// Requests under way at once.
    pub max_requests: u32,
    /// Requests that wait for one of them to end.
    pub max_pending_requests: u32,
    /// Longest such wait.
    pub pending_timeout: Duration,
    /// Connections open at once, to all endpoints.
    pub max_connections: u32,
    /// Retries and hedges under way at once.
    pub max_retries: u32,
    /// Idle HTTP/1.1 connections kept for each endpoint and worker.
    pub max_idle_per_endpoint: u32,
    /// How long an idle connection is kept.
    pub idle_timeout: Duration,
    /// Bounds on each caller; `None` for none.
    pub per_caller: Option<PerCaller>,
}

impl ConnectionPool {
    /// 1024 requests and connections as in Envoy, 64 retries; 128 idle connections for a minute.
    pub const DEFAULT: Self = Self {
        max_requests: 1024,
        max_pending_requests: 0,
        pending_timeout: Duration::from_millis(100),
        max_connections: 1024,
        max_retries: 64,
        max_idle_per_endpoint: 128,
        idle_timeout: Duration::from_secs(60),
        per_caller: None,
    };
}

/// Bounds on each caller of a service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PerCaller {
    /// Requests under way at once.
    pub max_requests: u32,
    /// The header that names the caller, lower case; `None` for its identity or address.
    pub header: Option<Box<str>>,
}

/// What protects a service, and its callers, from overload and failure.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ResiliencePolicy {
    /// Of the service as a whole.
    pub circuit_breaker: Option<CircuitBreaker>,
    /// Of each endpoint.
    pub endpoint_circuit_breaker: Option<CircuitBreaker>,
    /// Bounds retries.
    pub retry_budget: RetryBudget,
    /// Bounds hedged requests.
    pub hedge_budget: RetryBudget,
    /// Finds the concurrency that the service bears.
    pub adaptive_concurrency: Option<AdaptiveConcurrency>,
    /// Refuses requests here when the service fails most of them.
    pub admission_control: Option<AdmissionControl>,
    /// Refuses what matters least as the service nears its limits.
    pub load_shedding: Option<LoadShedding>,
}

impl ResiliencePolicy {
    /// Budgets, and nothing else.
    pub const DEFAULT: Self = Self {
        circuit_breaker: None,
        endpoint_circuit_breaker: None,
        retry_budget: RetryBudget::DEFAULT,
        hedge_budget: RetryBudget::HEDGES,
        adaptive_concurrency: None,
        admission_control: None,
        load_shedding: None,
    };
    /// The policy of services that name none.
    pub const DEFAULT_NAME: &str = "default";
}

/// When a circuit opens, and how it closes again. Rates are in percent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CircuitBreaker {
    /// Failed calls that open it; 0 is off.
    pub failure_rate: u32,
    /// Slow calls that open it; 0 is off.
    pub slow_call_rate: u32,
    /// From when on a call is slow.
    pub slow_call_duration: Duration,
    /// Failures in a row that open it; 0 is off.
    pub consecutive_failures: u32,
    /// Calls in the window before rates count.
    pub minimum_calls: u32,
    /// Length of the window.
    pub window: Duration,
    /// How long it stays open the first time.
    pub open_time: Duration,
    /// The longest, at least `open_time`.
    pub max_open_time: Duration,
    /// Percentage by which each is longer.
    pub open_jitter: u32,
    /// Probes under way at once, and successes that close it.
    pub half_open_probes: u32,
    /// How long traffic takes to grow back.
    pub ramp: Duration,
    /// What is done with the verdict.
    pub mode: BreakerMode,
}

impl CircuitBreaker {
    /// Half of 20 calls in 10 s; open for 5 s, then up to 60.
    pub const DEFAULT: Self = Self {
        failure_rate: 50,
        slow_call_rate: 0,
        slow_call_duration: Duration::from_secs(1),
        consecutive_failures: 0,
        minimum_calls: 20,
        window: Duration::from_secs(10),
        open_time: Duration::from_secs(5),
        max_open_time: Duration::from_secs(60),
        open_jitter: 20,
        half_open_probes: 3,
        ramp: Duration::from_secs(10),
        mode: BreakerMode::Enforce,
    };
}

/// What a breaker does with its verdict.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum BreakerMode {
    /// Obey it.
    Enforce,
    /// Count and tell, refuse nothing.
    Observe,
    /// Open, whatever happens.
    ForceOpen,
    /// Closed, whatever happens.
    ForceClosed,
}

/// A bound on retries, as a share of requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RetryBudget {
    /// Of the requests of the last window.
    pub percent: u32,
    /// Length of the window.
    pub window: Duration,
    /// Allowed in any case.
    pub min_per_second: u32,
}

impl RetryBudget {
    /// Gateway API's numbers.
    pub const DEFAULT: Self = Self {
        percent: 20,
        window: Duration::from_secs(10),
        min_per_second: 10,
    };
    /// For hedged requests: the slowest twentieth.
    pub const HEDGES: Self = Self {
        percent: 5,
        window: Duration::from_secs(10),
        min_per_second: 1,
    };
}

/// Finds the concurrency that a service bears from its latency.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AdaptiveConcurrency {
    /// Percentile of latency that is compared.
    pub percentile: u32,
    /// How often the limit is computed.
    pub update_interval: Duration,
    /// The largest limit.
    pub max_limit: u32,
    /// How often the minimum latency is measured anew.
    pub min_rtt_interval: Duration,
    /// Requests that measuring takes.
    pub min_rtt_requests: u32,
    /// Percentage by which the interval is longer.
    pub min_rtt_jitter: u32,
    /// The limit while measuring, and the smallest.
    pub min_limit: u32,
    /// Latency above the minimum, in percent, that is no reason to slow down.
    pub buffer: u32,
}

impl AdaptiveConcurrency {
    /// Envoy's numbers.
    pub const DEFAULT: Self = Self {
        percentile: 50,
        update_interval: Duration::from_millis(100),
        max_limit: 1000,
        min_rtt_interval: Duration::from_secs(60),
        min_rtt_requests: 50,
        min_rtt_jitter: 15,
        min_limit: 3,
        buffer: 25,
    };
}

/// Client-side throttling.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AdmissionControl {
    /// What is looked back on.
    pub window: Duration,
    /// Success rate in percent below which it begins.
    pub success_threshold: u32,
    /// In percent; more refuses more.
    pub aggression: u32,
    /// Requests a second below which nothing is refused.
    pub rps_threshold: u32,
    /// Largest probability of a refusal, in percent.
    pub max_rejection_probability: u32,
}

impl AdmissionControl {
    /// Envoy's numbers.
    pub const DEFAULT: Self = Self {
        window: Duration::from_secs(30),
        success_threshold: 95,
        aggression: 100,
        rps_threshold: 0,
        max_rejection_probability: 80,
    };
}

/// Utilisation in percent from which on requests of a priority are refused. Critical ones never are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LoadShedding {
    /// For low priority.
    pub low: u32,
    /// For normal priority, at least `low`.
    pub normal: u32,
    /// For high priority, at least `normal`.
    pub high: u32,
}

impl LoadShedding {
    /// Lowest first, with room for what is left.
    pub const DEFAULT: Self = Self {
        low: 60,
        normal: 80,
        high: 90,
    };
}

/// Holds one circuit open or closed for a while.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CircuitOverride {
    /// Whose circuit.
    pub target: OverrideTarget,
    /// `ForceOpen` or `ForceClosed`.
    pub mode: BreakerMode,
    /// When it ends.
    pub expire_time: SystemTime,
    /// Why, for people.
    pub reason: Box<str>,
}

/// Whose circuit is held.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum OverrideTarget {
    /// A Service's.
    Service(Name),
    /// That of all rules of a Route.
    Route(Name),
}

/// When a failed attempt is made again.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Retry {
    /// Attempts in all, at least 1.
    pub max_attempts: u8,
    /// Conditions, any of which must hold.
    pub on: Vec<RetryOn>,
    /// For [`RetryOn::RetriableStatusCodes`], sorted.
    pub status_codes: Vec<u16>,
    /// Backoff.
    pub base_interval: Duration,
    /// Longest backoff, at least the base.
    pub max_interval: Duration,
    /// Retry what isn't idempotent, too.
    pub non_idempotent: bool,
    /// Largest body that is kept to be sent again, in bytes.
    pub max_body_bytes: u64,
    /// A second request when the first takes long.
    pub hedge: Option<Hedge>,
}

impl Retry {
    /// What can't have reached the upstream, three attempts in all.
    pub fn default_on() -> Vec<RetryOn> {
        vec![RetryOn::ConnectFailure, RetryOn::RefusedStream]
    }

    /// Every default.
    pub fn standard() -> Self {
        Self {
            max_attempts: 3,
            on: Self::default_on(),
            status_codes: Vec::new(),
            base_interval: Duration::from_millis(25),
            max_interval: Duration::from_millis(250),
            non_idempotent: false,
            max_body_bytes: 64 << 10,
            hedge: None,
        }
    }
}

/// A condition under which an attempt is made again.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum RetryOn {
    /// No connection could be made.
    ConnectFailure,
    /// The upstream refused it unprocessed.
    RefusedStream,
    /// The connection or stream ended early, or the attempt's time was up.
    Reset,
    /// 502, 503 and 504.
    GatewayError,
    /// Any 5xx, and no answer.
    FiveXx,
    /// A status that policy lists.
    RetriableStatusCodes,
    /// 409.
    Retriable4xx,
    /// gRPC status 1.
    GrpcCancelled,
    /// gRPC status 4.
    GrpcDeadlineExceeded,
    /// gRPC status 13.
    GrpcInternal,
    /// gRPC status 8.
    GrpcResourceExhausted,
    /// gRPC status 14.
    GrpcUnavailable,
}

/// Further requests when an answer takes long.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hedge {
    /// How long to wait before each.
    pub delay: Duration,
    /// How many beyond the first.
    pub max_hedges: u8,
}

/// A token bucket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RateLimit {
    /// Tokens for each interval.
    pub requests: u32,
    /// Their interval.
    pub interval: Duration,
    /// Tokens that the bucket holds.
    pub burst: u32,
    /// Whose bucket it is.
    pub key: RateLimitKey,
}

/// Whose bucket a rate limit fills.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RateLimitKey {
    /// One for the rule.
    Rule,
    /// One for each caller.
    Caller {
        /// Buckets kept at most.
        max_keys: u32,
    },
    /// One for each value of a header.
    Header {
        /// Its name, lower case.
        name: Box<str>,
        /// Buckets kept at most.
        max_keys: u32,
    },
}

/// How important requests are, least first.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Priority {
    /// Can wait.
    Low,
    /// Most requests.
    #[default]
    Normal,
    /// Should be served.
    High,
    /// Must be served.
    Critical,
}

impl Priority {
    /// Every priority, least first.
    pub const ALL: [Self; 4] = [Self::Low, Self::Normal, Self::High, Self::Critical];

    /// The word used in headers, traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }
}

/// Where a request's priority is from.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RequestPriority {
    /// Unless the header says another.
    pub default: Priority,
    /// The header, lower case.
    pub header: Option<Box<str>>,
}
