//! The kinds of resource.

use std::fmt;

/// The kinds of resource, in the order in which a snapshot is built from them.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// A failure domain and its proxies.
    Zone,
    /// A WebAssembly plugin.
    Plugin,
    /// Feature flags.
    FeatureFlags,
    /// Requests that were accepted and wait for their service.
    Queue,
    /// What protects services from overload and failure.
    ResiliencePolicy,
    /// A named set of endpoints.
    Service,
    /// What answers when a call can't be served.
    FallbackPolicy,
    /// Listeners for clients from outside.
    Gateway,
    /// Which requests go where.
    Route,
    /// Holds a circuit open or closed.
    CircuitOverride,
    /// What a part of the mesh gives up, and when.
    DegradationPolicy,
    /// Holds a level of a DegradationPolicy.
    DegradationOverride,
    /// Who may do what with services.
    AuthorizationPolicy,
    /// Which processes of a node get a certificate of their own.
    Workload,
    /// How a change goes out to proxies in steps.
    RolloutPolicy,
    /// Who may do what with the control plane.
    AccessPolicy,
    /// When backups of the store are made.
    BackupPolicy,
    /// How much of the store may be lost, and how long it may take to be back.
    RecoveryObjective,
}

impl Kind {
    /// Every kind, in order.
    pub const ALL: [Self; 18] = [
        Self::Zone,
        Self::Plugin,
        Self::FeatureFlags,
        Self::Queue,
        Self::ResiliencePolicy,
        Self::Service,
        Self::FallbackPolicy,
        Self::Gateway,
        Self::Route,
        Self::CircuitOverride,
        Self::DegradationPolicy,
        Self::DegradationOverride,
        Self::AuthorizationPolicy,
        Self::Workload,
        Self::RolloutPolicy,
        Self::AccessPolicy,
        Self::BackupPolicy,
        Self::RecoveryObjective,
    ];

    /// The name as YAML's `kind` has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zone => "Zone",
            Self::Plugin => "Plugin",
            Self::ResiliencePolicy => "ResiliencePolicy",
            Self::Service => "Service",
            Self::FallbackPolicy => "FallbackPolicy",
            Self::Gateway => "Gateway",
            Self::Route => "Route",
            Self::CircuitOverride => "CircuitOverride",
            Self::FeatureFlags => "FeatureFlags",
            Self::Queue => "Queue",
            Self::DegradationPolicy => "DegradationPolicy",
            Self::DegradationOverride => "DegradationOverride",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::Workload => "Workload",
            Self::RolloutPolicy => "RolloutPolicy",
            Self::AccessPolicy => "AccessPolicy",
            Self::BackupPolicy => "BackupPolicy",
            Self::RecoveryObjective => "RecoveryObjective",
        }
    }

    /// Whether proxies get it; what only the control plane reads they don't.
    pub const fn is_for_proxies(self) -> bool {
        match self {
            Self::RolloutPolicy | Self::AccessPolicy | Self::BackupPolicy | Self::RecoveryObjective => false,
            Self::Zone
            | Self::Plugin
            | Self::FeatureFlags
            | Self::Queue
            | Self::ResiliencePolicy
            | Self::Service
            | Self::FallbackPolicy
            | Self::Gateway
            | Self::Route
            | Self::CircuitOverride
            | Self::DegradationPolicy
            | Self::DegradationOverride
            | Self::AuthorizationPolicy
            | Self::Workload => true,
        }
    }

    /// Whether a change of it is an emergency's: it goes to all proxies at once, also while another change goes out in
    /// steps. Of a Zone, its drain does, too.
    pub const fn is_for_emergencies(self) -> bool {
        matches!(self, Self::CircuitOverride | Self::DegradationOverride)
    }

    /// The kind that people mean: in any case, in the singular or the plural.
    pub fn named(text: &str) -> Option<Self> {
        let means = |kind: &Self| {
            let name = kind.as_str();
            let plural = match name.strip_suffix('y') {
                Some(stem) => format!("{stem}ies"),
                None => format!("{name}s"),
            };
            text.eq_ignore_ascii_case(name) || text.eq_ignore_ascii_case(&plural)
        };
        Self::ALL.into_iter().find(means)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
