//! Connections that are no HTTP, and those of workloads that know nothing of the mesh.

use super::{AuthorizationRule, Protocol, Spec};
use crate::{Key, Kind, Name};
use std::time::Duration;

/// What is done with captured connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Capture {
    /// Where what policy doesn't know goes.
    pub unknown: UnknownDestination,
    /// How long a connection may take to show what it speaks.
    pub detect_timeout: Duration,
    /// Longest silence of a connection to where policy knows nobody; `None` is no limit.
    pub idle_timeout: Option<Duration>,
}

impl Capture {
    /// A second is more than a client that speaks first takes on a busy node, and what one that speaks second to a
    /// destination of which policy says nothing waits once for each connection. Linkerd waits 10 s.
    pub const DEFAULT: Self = Self {
        unknown: UnknownDestination::Pass,
        detect_timeout: Duration::from_secs(1),
        idle_timeout: TcpSettings::DEFAULT.idle_timeout,
    };
}

/// Where what policy doesn't know goes.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum UnknownDestination {
    /// To where the workload meant it to go.
    Pass,
    /// Nowhere.
    Refuse,
}

/// Connections of a TCP service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TcpSettings {
    /// Longest silence; `None` is no limit.
    pub idle_timeout: Option<Duration>,
    /// Attempts at endpoints, at least 1.
    pub max_connect_attempts: u8,
}

impl TcpSettings {
    /// An hour, as Envoy's TCP proxy has it; as many attempts as requests have.
    pub const DEFAULT: Self = Self {
        idle_timeout: Some(Duration::from_secs(3600)),
        max_connect_attempts: 3,
    };
}

impl AuthorizationRule {
    /// Whether it looks at what only a request has. Such a rule doesn't match connections of TCP services.
    pub fn looks_at_requests(&self) -> bool {
        !self.to.is_empty() || !self.when.is_empty()
    }
}

/// Why a service of a protocol can't be where it is named.
const NO_ROUTE: &str = "is of protocol TCP, to which no request can be sent; want one of HTTP1 or HTTP2";
const NO_REQUESTS: &str = "is of protocol TCP, whose connections never match a rule that looks at requests (to, when); leave it out, or leave those out";

impl Spec {
    /// Services that it names in places where TCP can't be: the field, the service, and why not.
    ///
    /// `protocol_of` says what a service speaks; `None` of one that isn't there, which is another error.
    pub fn tcp_misfits(
        &self,
        protocol_of: impl Fn(&Name) -> Option<Protocol>,
    ) -> Vec<(String, Key, &'static str)> {
        let why = match self {
            Self::Route(_) | Self::FallbackPolicy(_) | Self::Plugin(_) => NO_ROUTE,
            Self::AuthorizationPolicy(policy)
                if policy.rules.iter().any(AuthorizationRule::looks_at_requests) =>
            {
                NO_REQUESTS
            }
            Self::AuthorizationPolicy(_)
            | Self::Zone(_)
            | Self::Gateway(_)
            | Self::Service(_)
            | Self::ResiliencePolicy(_)
            | Self::CircuitOverride(_)
            | Self::FeatureFlags(_)
            | Self::DegradationPolicy(_)
            | Self::DegradationOverride(_)
            | Self::Workload(_)
            | Self::RolloutPolicy(_)
            | Self::Queue(_)
            | Self::AccessPolicy(_)
            | Self::BackupPolicy(_)
            | Self::RecoveryObjective(_) => return Vec::new(),
        };
        let named = self.references().into_iter();
        named
            .filter(|(_, to)| to.kind == Kind::Service && protocol_of(&to.name) == Some(Protocol::Tcp))
            .map(|(path, to)| (path, to, why))
            .collect()
    }
}
