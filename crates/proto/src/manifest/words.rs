//! The words of enums in YAML, for reading and for writing.

use crate::v1;

/// Words and the numbers that they have on the wire.
pub(super) type Words = &'static [(&'static str, i32)];

/// How an endpoint is spoken to.
pub(super) const PROTOCOL: Words = &[
    ("HTTP1", v1::Protocol::Http1 as i32),
    ("HTTP2", v1::Protocol::Http2 as i32),
    ("TCP", v1::Protocol::Tcp as i32),
];

/// Where what policy doesn't know goes.
pub(super) const UNKNOWN_DESTINATION: Words = &[
    ("Pass", v1::UnknownDestination::Pass as i32),
    ("Refuse", v1::UnknownDestination::Refuse as i32),
];

/// How requests get from proxy to proxy.
pub(super) const TRANSPORT: Words = &[
    ("Auto", v1::ZoneTransport::Auto as i32),
    ("Quic", v1::ZoneTransport::Quic as i32),
    ("Tcp", v1::ZoneTransport::Tcp as i32),
];

/// What happens when a change makes things worse.
pub(super) const ROLLOUT_FAILURE: Words = &[
    ("Rollback", v1::RolloutFailure::Rollback as i32),
    ("Pause", v1::RolloutFailure::Pause as i32),
];

/// What becomes of requests that come by no gateway.
pub(super) const DIRECT_CALLERS: Words = &[
    ("Refuse", v1::DirectCallers::Refuse as i32),
    ("Allow", v1::DirectCallers::Allow as i32),
];

/// Policies of load balancing.
pub(super) const BALANCE: Words = &[
    ("PeakEwma", v1::LoadBalancerPolicy::PeakEwma as i32),
    ("LeastRequest", v1::LoadBalancerPolicy::LeastRequest as i32),
    ("RoundRobin", v1::LoadBalancerPolicy::RoundRobin as i32),
    ("Random", v1::LoadBalancerPolicy::Random as i32),
    ("RingHash", v1::LoadBalancerPolicy::RingHash as i32),
    ("Maglev", v1::LoadBalancerPolicy::Maglev as i32),
];

/// What a breaker does with its verdict.
pub(super) const MODE: Words = &[
    ("Enforce", v1::BreakerMode::Enforce as i32),
    ("Observe", v1::BreakerMode::Observe as i32),
    ("ForceOpen", v1::BreakerMode::ForceOpen as i32),
    ("ForceClosed", v1::BreakerMode::ForceClosed as i32),
];

/// How important requests are.
pub(super) const PRIORITY: Words = &[
    ("Critical", v1::Priority::Critical as i32),
    ("High", v1::Priority::High as i32),
    ("Normal", v1::Priority::Normal as i32),
    ("Low", v1::Priority::Low as i32),
];

/// Conditions of retries.
pub(super) const RETRY_ON: Words = &[
    ("ConnectFailure", v1::RetryOn::ConnectFailure as i32),
    ("RefusedStream", v1::RetryOn::RefusedStream as i32),
    ("Reset", v1::RetryOn::Reset as i32),
    ("GatewayError", v1::RetryOn::GatewayError as i32),
    ("5xx", v1::RetryOn::FiveXx as i32),
    ("RetriableStatusCodes", v1::RetryOn::RetriableStatusCodes as i32),
    ("Retriable4xx", v1::RetryOn::Retriable4xx as i32),
    ("GrpcCancelled", v1::RetryOn::GrpcCancelled as i32),
    ("GrpcDeadlineExceeded", v1::RetryOn::GrpcDeadlineExceeded as i32),
    ("GrpcInternal", v1::RetryOn::GrpcInternal as i32),
    ("GrpcResourceExhausted", v1::RetryOn::GrpcResourceExhausted as i32),
    ("GrpcUnavailable", v1::RetryOn::GrpcUnavailable as i32),
];

/// Why a call failed. Some are not for every field; `convert` says which.
pub(super) const CAUSE: Words = &[
    ("ConnectFailure", v1::Cause::ConnectFailure as i32),
    ("Timeout", v1::Cause::Timeout as i32),
    ("Reset", v1::Cause::Reset as i32),
    ("NoEndpoint", v1::Cause::NoEndpoint as i32),
    ("Overflow", v1::Cause::Overflow as i32),
    ("UpstreamStatus", v1::Cause::UpstreamStatus as i32),
    ("CircuitOpen", v1::Cause::CircuitOpen as i32),
    ("Overloaded", v1::Cause::Overloaded as i32),
    ("RateLimited", v1::Cause::RateLimited as i32),
    ("Disabled", v1::Cause::Disabled as i32),
    ("ZoneDown", v1::Cause::ZoneDown as i32),
    ("PluginFault", v1::Cause::PluginFault as i32),
    ("AuthorizationDenied", v1::Cause::AuthorizationDenied as i32),
    ("IdentityMissing", v1::Cause::IdentityMissing as i32),
    ("AuthorizationUnknown", v1::Cause::AuthorizationUnknown as i32),
];

/// What it means that a rule of an AuthorizationPolicy matches.
pub(super) const ACTION: Words = &[
    ("Allow", v1::AuthorizationAction::Allow as i32),
    ("Deny", v1::AuthorizationAction::Deny as i32),
    ("Audit", v1::AuthorizationAction::Audit as i32),
];

/// Whether it is done.
pub(super) const AUTHORIZATION_MODE: Words = &[
    ("Enforce", v1::AuthorizationMode::Enforce as i32),
    ("DryRun", v1::AuthorizationMode::DryRun as i32),
];

/// How requests from outside are taken off the wire.
pub(super) const GATEWAY_PROTOCOL: Words = &[
    ("HTTP", v1::GatewayProtocol::Http as i32),
    ("HTTPS", v1::GatewayProtocol::Https as i32),
];

/// What becomes of TLS.
pub(super) const TLS_MODE: Words = &[("Terminate", v1::GatewayTlsMode::Terminate as i32)];

/// Versions of TLS.
pub(super) const TLS_VERSION: Words = &[
    ("1.2", v1::TlsVersion::TlsVersion12 as i32),
    ("1.3", v1::TlsVersion::TlsVersion13 as i32),
];

/// What a trigger is judged over.
pub(super) const SCOPE: Words = &[
    ("Zone", v1::DegradationScope::Zone as i32),
    ("Mesh", v1::DegradationScope::Mesh as i32),
];

/// What a plugin is for.
pub(super) const PLUGIN_KIND: Words = &[
    ("Fallback", v1::PluginKind::Fallback as i32),
    ("Filter", v1::PluginKind::Filter as i32),
    ("Router", v1::PluginKind::Router as i32),
    ("WasiHttp", v1::PluginKind::WasiHttp as i32),
    ("ProxyWasm", v1::PluginKind::ProxyWasm as i32),
];

/// What a plugin's fault means.
pub(super) const ON_FAULT: Words = &[
    ("NextRung", v1::OnFault::NextRung as i32),
    ("Fail", v1::OnFault::Fail as i32),
    ("FailOpen", v1::OnFault::FailOpen as i32),
    ("FailClosed", v1::OnFault::FailClosed as i32),
];

/// What somebody may do with the control plane.
pub(super) const ACCESS_ROLE: Words = &[
    ("Reader", v1::AccessRole::Reader as i32),
    ("Editor", v1::AccessRole::Editor as i32),
    ("Operator", v1::AccessRole::Operator as i32),
    ("Breakglass", v1::AccessRole::Breakglass as i32),
];

/// The word for a number; empty for one that says nothing, or that this build doesn't know.
pub(super) fn word(words: Words, number: i32) -> &'static str {
    let found = words.iter().find(|(_, known)| *known == number);
    found.map_or("", |(word, _)| word)
}
