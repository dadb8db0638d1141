//! What answers when a call can't be served.

use super::degradation::FlagCondition;
use super::template::Template;
use crate::Name;
use std::sync::Arc;
use std::time::Duration;

/// What answers when a call can't be served.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FallbackPolicy {
    /// The causes that lead here; never empty unless `on_statuses` isn't.
    pub on: Vec<Cause>,
    /// Upstream statuses that lead here too, sorted.
    pub on_statuses: Vec<u16>,
    /// Tried in order; at least one.
    pub rungs: Vec<Rung>,
    /// Leave out the header that says the answer is degraded.
    pub hide_header: bool,
    /// Share of the request's time that is kept for the ladder, in percent, 1 to 90.
    pub reserve_percent: u32,
}

impl FallbackPolicy {
    /// What is kept for the ladder where policy doesn't say, in percent.
    pub const RESERVE_PERCENT: u32 = 10;
}

/// Why a call failed.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Cause {
    /// No connection could be made.
    ConnectFailure,
    /// The deadline passed.
    Timeout,
    /// The upstream closed the connection early.
    Reset,
    /// No endpoint was healthy.
    NoEndpoint,
    /// A limit of the proxy was hit.
    Overflow,
    /// The upstream's status counts as failed.
    UpstreamStatus,
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
}

impl Cause {
    /// Every cause.
    pub const ALL: [Self; 13] = [
        Self::ConnectFailure,
        Self::Timeout,
        Self::Reset,
        Self::NoEndpoint,
        Self::Overflow,
        Self::UpstreamStatus,
        Self::CircuitOpen,
        Self::Overloaded,
        Self::RateLimited,
        Self::Disabled,
        Self::AuthorizationDenied,
        Self::IdentityMissing,
        Self::AuthorizationUnknown,
    ];
    /// What a FallbackPolicy that names none acts on.
    pub const DEFAULT: [Self; 8] = [
        Self::ConnectFailure,
        Self::Timeout,
        Self::Reset,
        Self::NoEndpoint,
        Self::Overflow,
        Self::CircuitOpen,
        Self::Overloaded,
        Self::Disabled,
    ];

    /// The word used in traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConnectFailure => "connect_failure",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::NoEndpoint => "no_endpoint",
            Self::Overflow => "overflow",
            Self::UpstreamStatus => "upstream_status",
            Self::CircuitOpen => "circuit_open",
            Self::Overloaded => "overloaded",
            Self::RateLimited => "rate_limited",
            Self::Disabled => "disabled",
            Self::AuthorizationDenied => "authorization_denied",
            Self::IdentityMissing => "identity_missing",
            Self::AuthorizationUnknown => "authorization_unknown",
        }
    }

    /// Whether whoever asks may not.
    pub const fn is_denial(self) -> bool {
        matches!(
            self,
            Self::AuthorizationDenied | Self::IdentityMissing | Self::AuthorizationUnknown
        )
    }
}

/// One rung of the ladder.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rung {
    /// What it does.
    pub act: Act,
    /// The failures that it is for; empty for every one.
    pub causes: Vec<RungCause>,
    /// The methods that it is for; empty for every one.
    pub methods: Vec<Box<str>>,
    /// The requests that it is for.
    pub when: Option<FlagCondition>,
    /// Its share of the time that is left when it begins, in percent, 1 to 100.
    pub deadline_percent: u32,
}

impl Rung {
    /// A rung for every request.
    pub const fn new(act: Act) -> Self {
        Self {
            act,
            causes: Vec::new(),
            methods: Vec::new(),
            when: None,
            deadline_percent: 100,
        }
    }
}

/// A failure that a rung is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RungCause {
    /// The call failed for this cause.
    Of(Cause),
    /// No endpoint of the caller's own zone is healthy.
    ZoneDown,
    /// An earlier rung's plugin failed.
    PluginFault,
}

/// What a rung does.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Act {
    /// Ask a plugin.
    Plugin {
        /// The plugin's name.
        plugin: Name,
        /// Handed to it as it stands.
        config: Arc<str>,
    },
    /// Answer with this.
    Static(Arc<StaticAnswer>),
    /// Send the request to another service.
    Service {
        /// The service's name.
        service: Name,
    },
    /// One more attempt in another zone.
    Zone {
        /// Zones to choose from; empty for every other one.
        zones: Vec<Name>,
    },
    /// An answer that was kept.
    Stale {
        /// How long past its freshness; `None` for what the answer or the rule's cache says.
        max_stale: Option<Duration>,
    },
    /// Take the request in, and send it later.
    Queue {
        /// The queue's name.
        queue: Name,
    },
    /// Send the client elsewhere.
    Redirect(Arc<Redirect>),
    /// End the ladder.
    Fail {
        /// The status to fail with; `None` for the original failure.
        status: Option<u16>,
    },
}

/// A fixed answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StaticAnswer {
    /// 200 to 599.
    pub status: u16,
    /// Valid HTTP, no hop-by-hop fields, no Content-Length.
    pub headers: Vec<(Box<str>, Template)>,
    /// The body.
    pub body: Template,
    /// Whether headers and body were read as templates.
    pub template: bool,
}

/// A redirection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Redirect {
    /// Where to.
    pub location: Template,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}
