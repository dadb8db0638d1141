//! Why an endpoint failed a check.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Why an endpoint failed a check.
#[derive(Debug, thiserror::Error)]
pub enum CheckFailure {
    /// The system could not connect to the workload, or to the proxy in front of it.
    #[error("cannot connect to {to}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The proxy in front of it is not who it should be, or does not speak our TLS.
    #[error("no TLS session with {peer} at {to}")]
    Tls {
        /// Where to.
        to: SocketAddr,
        /// Who should be there.
        peer: Box<str>,
        /// What the TLS library said.
        #[source]
        source: io::Error,
    },
    /// The check's time was up.
    #[error("no answer within {limit:?}")]
    Timeout {
        /// The limit.
        limit: Duration,
    },
    /// The connection broke, or what came on it was not HTTP.
    #[error("the connection ended without a whole answer")]
    Reset {
        /// What hyper said.
        #[source]
        source: hyper::Error,
    },
    /// An HTTP status that does not pass.
    #[error("the status is {0}")]
    Status(u16),
    /// A gRPC status other than 0.
    #[error("the grpc status is {0}{meaning}", meaning = grpc_meaning(*.0))]
    GrpcStatus(u32),
    /// The health service says anything but SERVING.
    #[error("the health service says {}", serving_status(*.0))]
    NotServing(i32),
    /// Not an answer of a health service.
    #[error("not an answer of a grpc health service: {0}")]
    Malformed(&'static str),
    /// The proxy in front of it did not get an answer.
    #[error("the proxy in front of it says {}", .0.as_str())]
    ByProxy(ProxyReason),
    /// The policy's path or host does not make a request. Nothing was sent.
    #[error("the check's path or host makes no request")]
    Request {
        /// What is wrong with them.
        #[source]
        source: http::Error,
    },
}

/// Why the proxy in front of an endpoint gave the answer itself: its word in `leeward-reason`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ProxyReason {
    /// It could not connect to the workload.
    ConnectFailure,
    /// The workload took too long.
    Timeout,
    /// The workload ended the connection early.
    Reset,
    /// It holds the workload to be unfit.
    NoEndpoint,
    /// The workload is not behind it.
    UnknownEndpoint,
    /// Anything else: the request did not get to the workload, through no limit of the proxy.
    Other,
}

impl ProxyReason {
    /// The proxy's word. `None` for its own limits, and for what it thinks of whoever asks, which say nothing of the
    /// endpoint.
    pub(super) fn read(word: &[u8]) -> Option<Self> {
        match word {
            b"overflow" | b"overloaded" | b"rate_limited" | b"circuit_open" | b"not_exported"
            | b"gateway_required" | b"caller_refused" => None,
            b"connect_failure" => Some(Self::ConnectFailure),
            b"timeout" => Some(Self::Timeout),
            b"reset" => Some(Self::Reset),
            b"no_endpoint" => Some(Self::NoEndpoint),
            b"unknown_endpoint" => Some(Self::UnknownEndpoint),
            _ => Some(Self::Other),
        }
    }

    /// The word used in logs and in `leeward-reason`; `other` for what has no name here.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConnectFailure => "connect_failure",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::NoEndpoint => "no_endpoint",
            Self::UnknownEndpoint => "unknown_endpoint",
            Self::Other => "other",
        }
    }

    /// Whether a connection to the workload was made all the same: it is after that that these go wrong.
    pub(super) const fn connected(self) -> bool {
        match self {
            Self::Timeout | Self::Reset => true,
            Self::ConnectFailure | Self::NoEndpoint | Self::UnknownEndpoint | Self::Other => false,
        }
    }
}

/// What the statuses mean that people get when the health service is not set up; for the others the number
/// has to do.
fn grpc_meaning(status: u32) -> &'static str {
    match status {
        5 => ", not found: the server does not know the service that is asked about",
        12 => ", unimplemented: the server has no grpc.health.v1.Health",
        _ => "",
    }
}

/// The names of `HealthCheckResponse.ServingStatus`.
fn serving_status(status: i32) -> String {
    match status {
        0 => "UNKNOWN".to_owned(),
        2 => "NOT_SERVING".to_owned(),
        3 => "SERVICE_UNKNOWN".to_owned(),
        other => format!("{other}, which is no known status"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_words_are_read_back() {
        let reasons = [
            ProxyReason::ConnectFailure,
            ProxyReason::Timeout,
            ProxyReason::Reset,
            ProxyReason::NoEndpoint,
            ProxyReason::UnknownEndpoint,
            ProxyReason::Other,
        ];
        for reason in reasons {
            assert_eq!(ProxyReason::read(reason.as_str().as_bytes()), Some(reason));
        }
        assert_eq!(ProxyReason::read(b"loop_detected"), Some(ProxyReason::Other));
        for limit in [
            "overflow",
            "overloaded",
            "rate_limited",
            "circuit_open",
            "not_exported",
            "gateway_required",
            "caller_refused",
        ] {
            assert_eq!(ProxyReason::read(limit.as_bytes()), None, "{limit}");
        }
    }

    #[test]
    fn people_are_told_what_to_mend() {
        assert_eq!(
            CheckFailure::GrpcStatus(12).to_string(),
            "the grpc status is 12, unimplemented: the server has no grpc.health.v1.Health"
        );
        assert_eq!(CheckFailure::GrpcStatus(14).to_string(), "the grpc status is 14");
        assert_eq!(
            CheckFailure::NotServing(2).to_string(),
            "the health service says NOT_SERVING"
        );
    }
}
