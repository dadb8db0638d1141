//! A failure of the request path, and the only place that says what becomes of it.

use leeward_policy::model::Cause;
use leeward_telemetry::Reason;

/// Why a request was not served. Exhaustive on purpose: a new variant must not compile until someone has
/// decided what the client sees.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Failure {
    /// The request breaks HTTP's rules.
    #[error("bad request: {0}")]
    BadRequest(&'static str),
    /// The method is not for a mesh.
    #[error("the method CONNECT is not served")]
    NotImplemented,
    /// It has been through too many proxies.
    #[error("the request has passed {0} proxies; it seems to go in a circle")]
    Loop(usize),
    /// No route matches.
    #[error("no route")]
    NoRoute,
    /// The host is not one for this connection.
    #[error("this connection is not for that host")]
    Misdirected,
    /// The hop that another proxy asked for is not here.
    #[error("no such endpoint at this proxy")]
    UnknownEndpoint,
    /// A proxy of another zone asked for a service that its zone may not have.
    #[error("the service is not for callers of that zone")]
    NotExported,
    /// It came from another zone by no gateway.
    #[error("requests of other zones are taken from this zone's gateways only")]
    GatewayRequired,
    /// Whoever sent it speaks for another caller, and may not.
    #[error("only a gateway of this zone may speak for a caller, and only for one of another zone")]
    CallerRefused,
    /// A call failed.
    #[error("the call failed: {}", .0.as_str())]
    Call(Cause),
    /// A rung of the ladder ended it with this status.
    #[error("the call failed: {}", .cause.as_str())]
    Ended {
        /// 400 to 599.
        status: u16,
        /// Why the call failed.
        cause: Cause,
    },
    /// A plugin's fault, which policy doesn't let pass, ended it.
    #[error("a plugin failed")]
    Plugin,
}

/// What the proxy says and counts for a failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Answer {
    /// HTTP status.
    pub(crate) status: u16,
    /// gRPC status, for gRPC calls.
    pub(crate) grpc_status: u8,
    /// Stable code: the header `leeward-reason`, log field and metric label alike.
    pub(crate) reason: Reason,
    /// Close the connection, since what follows on it can't be trusted.
    pub(crate) close: bool,
}

/// gRPC's status codes that are used here.
mod grpc {
    pub(super) const INVALID_ARGUMENT: u8 = 3;
    pub(super) const DEADLINE_EXCEEDED: u8 = 4;
    pub(super) const PERMISSION_DENIED: u8 = 7;
    pub(super) const RESOURCE_EXHAUSTED: u8 = 8;
    pub(super) const UNIMPLEMENTED: u8 = 12;
    pub(super) const UNAVAILABLE: u8 = 14;
    pub(super) const UNAUTHENTICATED: u8 = 16;
}

/// The one table from failure to answer.
pub(crate) const fn answer(failure: &Failure) -> Answer {
    use Reason as R;
    if let Failure::Ended { status, cause } = failure {
        let call = answer(&Failure::Call(*cause));
        return Answer {
            status: *status,
            ..call
        };
    }
    let (status, grpc_status, reason, close) = match failure {
        Failure::BadRequest(_) => (400, grpc::INVALID_ARGUMENT, R::BadRequest, true),
        Failure::NotImplemented => (501, grpc::UNIMPLEMENTED, R::BadRequest, true),
        Failure::Loop(_) => (508, grpc::UNAVAILABLE, R::LoopDetected, false),
        Failure::NoRoute => (404, grpc::UNIMPLEMENTED, R::NoRoute, false),
        // RFC 9110 §15.5.20: on another connection it may be answered.
        Failure::Misdirected => (421, grpc::UNAVAILABLE, R::Misdirected, true),
        Failure::UnknownEndpoint => (503, grpc::UNAVAILABLE, R::UnknownEndpoint, false),
        Failure::NotExported => (403, grpc::PERMISSION_DENIED, R::NotExported, false),
        Failure::GatewayRequired => (403, grpc::PERMISSION_DENIED, R::GatewayRequired, false),
        Failure::CallerRefused => (403, grpc::PERMISSION_DENIED, R::CallerRefused, false),
        Failure::Call(Cause::ConnectFailure) => (503, grpc::UNAVAILABLE, R::ConnectFailure, false),
        Failure::Call(Cause::Timeout) => (504, grpc::DEADLINE_EXCEEDED, R::Timeout, false),
        Failure::Call(Cause::Reset) => (502, grpc::UNAVAILABLE, R::Reset, false),
        Failure::Call(Cause::NoEndpoint) => (503, grpc::UNAVAILABLE, R::NoEndpoint, false),
        Failure::Call(Cause::Overflow) => (503, grpc::RESOURCE_EXHAUSTED, R::Overflow, false),
        Failure::Call(Cause::CircuitOpen) => (503, grpc::UNAVAILABLE, R::CircuitOpen, false),
        Failure::Call(Cause::Overloaded) => (503, grpc::UNAVAILABLE, R::Overloaded, false),
        Failure::Call(Cause::RateLimited) => (429, grpc::RESOURCE_EXHAUSTED, R::RateLimited, false),
        // Only with the upstream's own answer at hand, which is then the one given.
        Failure::Call(Cause::UpstreamStatus) => (502, grpc::UNAVAILABLE, R::UpstreamStatus, false),
        Failure::Call(Cause::Disabled) => (503, grpc::UNAVAILABLE, R::Disabled, false),
        Failure::Call(Cause::AuthorizationDenied) => {
            (403, grpc::PERMISSION_DENIED, R::AuthorizationDenied, false)
        }
        // Whoever asks would be let pass, perhaps, if it were known who that is.
        Failure::Call(Cause::IdentityMissing) => (403, grpc::UNAUTHENTICATED, R::IdentityMissing, false),
        // 403, too: a 503 would have clients and other meshes ask again for what more asking can't bring.
        Failure::Call(Cause::AuthorizationUnknown) => {
            (403, grpc::PERMISSION_DENIED, R::AuthorizationUnknown, false)
        }
        // Above.
        Failure::Ended { .. } | Failure::Plugin => (503, grpc::UNAVAILABLE, R::PluginFault, false),
    };
    Answer {
        status,
        grpc_status,
        reason,
        close,
    }
}

/// What another proxy's reason says of an attempt through it: the cause, and whether the workload can have
/// seen anything of the request. `None` for reasons that are the workload's own business.
pub(crate) fn from_peer(reason: &[u8]) -> Option<(Cause, bool)> {
    let is = |r: Reason| r.as_str().as_bytes() == reason;
    if is(Reason::ConnectFailure)
        || is(Reason::UnknownEndpoint)
        || is(Reason::IdentityNotReady)
        || is(Reason::GatewayUnavailable)
    {
        Some((Cause::ConnectFailure, false))
    } else if is(Reason::NotExported) || is(Reason::GatewayRequired) || is(Reason::CallerRefused) {
        // Its policy is another than ours, for a moment: to us it isn't there, and nobody is to blame.
        Some((Cause::NoEndpoint, false))
    } else if is(Reason::Overflow) {
        Some((Cause::Overflow, false))
    } else if is(Reason::Overloaded) {
        Some((Cause::Overloaded, false))
    } else if is(Reason::CircuitOpen) {
        Some((Cause::CircuitOpen, false))
    } else if is(Reason::Disabled) {
        Some((Cause::Disabled, false))
    } else if is(Reason::AuthorizationDenied) {
        Some((Cause::AuthorizationDenied, false))
    } else if is(Reason::IdentityMissing) {
        Some((Cause::IdentityMissing, false))
    } else if is(Reason::AuthorizationUnknown) {
        Some((Cause::AuthorizationUnknown, false))
    } else if is(Reason::NoEndpoint) {
        Some((Cause::NoEndpoint, false))
    } else if is(Reason::Reset) || is(Reason::IdleTimeout) {
        Some((Cause::Reset, true))
    } else if is(Reason::Timeout) {
        Some((Cause::Timeout, true))
    } else {
        None
    }
}

/// Whether this is a gateway's own reason, by which it can't do its part. It never passes one on: what proxies behind it say
/// of this kind is a connection failure to it, which it tells as that.
pub(crate) fn is_gateways_own(reason: &[u8]) -> bool {
    let is = |r: Reason| r.as_str().as_bytes() == reason;
    is(Reason::IdentityNotReady) || is(Reason::UnknownEndpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_proxy_says_its_peer_understands() {
        let calls = [
            Cause::ConnectFailure,
            Cause::Timeout,
            Cause::Reset,
            Cause::NoEndpoint,
            Cause::Overflow,
            Cause::CircuitOpen,
            Cause::Overloaded,
            Cause::Disabled,
            Cause::AuthorizationDenied,
            Cause::IdentityMissing,
            Cause::AuthorizationUnknown,
        ];
        for cause in calls {
            let said = answer(&Failure::Call(cause)).reason.as_str();
            assert_eq!(
                from_peer(said.as_bytes()).map(|(cause, _)| cause),
                Some(cause),
                "{said}"
            );
        }
        for failure in [
            Failure::NotExported,
            Failure::GatewayRequired,
            Failure::CallerRefused,
        ] {
            let said = answer(&failure).reason.as_str();
            assert_eq!(
                from_peer(said.as_bytes()),
                Some((Cause::NoEndpoint, false)),
                "{said}"
            );
        }
        assert_eq!(from_peer(b"anything else"), None);
    }

    #[test]
    fn a_gateways_own_reason_is_told_from_one_of_who_is_behind_it() {
        for reason in [Reason::IdentityNotReady, Reason::UnknownEndpoint] {
            let said = reason.as_str().as_bytes();
            assert!(is_gateways_own(said), "{reason:?}");
            // What a gateway makes of it, if it is told so itself.
            let (cause, _) = from_peer(said).unwrap();
            let told = answer(&Failure::Call(cause)).reason.as_str();
            assert!(!is_gateways_own(told.as_bytes()), "{told}");
        }
    }
}
