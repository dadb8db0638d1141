//! The closed lists of how a request can end.

/// What a request came to.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Outcome {
    /// The service answered.
    Served,
    /// A fallback answered in its place.
    Degraded,
    /// It failed.
    Failed,
}

impl Outcome {
    /// The word used in traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        }
    }
}

/// Why a request ended as it did. The same word stands in the header `leeward-reason`, in traces, in the
/// access log and in metrics.
///
/// | reason | status | Envoy's response flag |
/// |---|---|---|
/// | `ok` | the service's | `-` |
/// | `upstream_status` | the service's, 5xx | `-` |
/// | `no_route` | 404 | `NR` |
/// | `no_endpoint` | 503 | `UH` |
/// | `connect_failure` | 503 | `UF` |
/// | `timeout` | 504 | `UT` |
/// | `reset` | 502 | `UC` |
/// | `overflow` | 503 | `UO` |
/// | `circuit_open` | 503 | `UO` |
/// | `overloaded` | 503 | `OM` |
/// | `rate_limited` | 429 | `RL` |
/// | `disabled` | 503 | `-` |
/// | `authorization_denied` | 403 | `UAEX` |
/// | `identity_missing` | 403 | `UAEX` |
/// | `authorization_unknown` | 403 | `UAEX` |
/// | `idle_timeout` | the service's, its body cut short | `SI` |
/// | `bad_request` | 400, 501 | `DPE` |
/// | `plugin_fault` | 503 | `-` |
/// | `loop_detected` | 508 | `-` |
/// | `unknown_endpoint` | 503 | `NC` |
/// | `client_gone` | none | `DC` |
/// | `identity_not_ready` | 503 | `UF` |
/// | `gateway_unavailable` | 503 | `UF` |
/// | `gateway_required` | 403 | `-` |
/// | `caller_refused` | 403 | `-` |
/// | `not_exported` | 403 | `-` |
/// | `misdirected` | 421 | `-` |
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Reason {
    /// Nothing went wrong.
    Ok,
    /// The service answered with a failure of its own.
    UpstreamStatus,
    /// No route matches the request.
    NoRoute,
    /// No endpoint of the service is fit to be tried.
    NoEndpoint,
    /// No connection could be made.
    ConnectFailure,
    /// The request's time was up.
    Timeout,
    /// The upstream ended the connection or the stream early.
    Reset,
    /// A limit of this proxy was hit.
    Overflow,
    /// A circuit breaker is open.
    CircuitOpen,
    /// Refused here to spare the service.
    Overloaded,
    /// A rate limit was passed.
    RateLimited,
    /// A flag has switched the call off.
    Disabled,
    /// Policy doesn't let whoever asks.
    AuthorizationDenied,
    /// The same, since nobody knows who asks.
    IdentityMissing,
    /// The same, since a policy that would say who may can't be used.
    AuthorizationUnknown,
    /// A body stood still for too long.
    IdleTimeout,
    /// The request breaks HTTP's rules.
    BadRequest,
    /// A plugin's fault ended the ladder of fallbacks.
    PluginFault,
    /// The request has passed too many proxies.
    LoopDetected,
    /// Another proxy asked for an endpoint that is not behind this one.
    UnknownEndpoint,
    /// The client went away before its answer had ended.
    ClientGone,
    /// This proxy has no certificate of its own that is good.
    IdentityNotReady,
    /// The zone is reached through gateways only, and none of them can be reached.
    GatewayUnavailable,
    /// A request from another zone came by no gateway.
    GatewayRequired,
    /// Whoever is no gateway of the zone spoke for another caller.
    CallerRefused,
    /// The service is not for callers of that zone.
    NotExported,
    /// A client from outside asked for a host that its connection, or its port, isn't for.
    Misdirected,
}

impl Reason {
    /// The word used in headers, traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::UpstreamStatus => "upstream_status",
            Self::NoRoute => "no_route",
            Self::NoEndpoint => "no_endpoint",
            Self::ConnectFailure => "connect_failure",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Overflow => "overflow",
            Self::CircuitOpen => "circuit_open",
            Self::Overloaded => "overloaded",
            Self::RateLimited => "rate_limited",
            Self::Disabled => "disabled",
            Self::AuthorizationDenied => "authorization_denied",
            Self::IdentityMissing => "identity_missing",
            Self::AuthorizationUnknown => "authorization_unknown",
            Self::IdleTimeout => "idle_timeout",
            Self::BadRequest => "bad_request",
            Self::PluginFault => "plugin_fault",
            Self::LoopDetected => "loop_detected",
            Self::UnknownEndpoint => "unknown_endpoint",
            Self::ClientGone => "client_gone",
            Self::IdentityNotReady => "identity_not_ready",
            Self::GatewayUnavailable => "gateway_unavailable",
            Self::GatewayRequired => "gateway_required",
            Self::CallerRefused => "caller_refused",
            Self::NotExported => "not_exported",
            Self::Misdirected => "misdirected",
        }
    }
}
