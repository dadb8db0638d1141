//! Flags, what hangs on them, and what a part of the mesh gives up when it is in trouble.

use super::fallback::Cause;
use super::resilience::Priority;
use crate::Name;
use leeward_flags::FlagSet;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Feature flags in flagd's format.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FeatureFlags {
    /// The flags, with the document that they were read from.
    pub set: Arc<FlagSet>,
}

/// Holds while a flag's value is as wanted for a request.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct FlagCondition {
    /// The flag's key.
    pub flag: Arc<str>,
    /// Variants one of which must be the result; empty if the value must be `true`.
    pub variants: Vec<Box<str>>,
    /// The header, lower case, whose value is the targeting key; `None` for who calls.
    pub targeting_key_header: Option<Box<str>>,
    /// What holds where the flag gives no value.
    pub default: bool,
}

impl FlagCondition {
    /// The flag's value must be `true`.
    pub fn is_true(flag: &str) -> Self {
        Self {
            flag: flag.into(),
            variants: Vec::new(),
            targeting_key_header: None,
            default: false,
        }
    }
}

/// A shared cache of answers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cache {
    /// How long an answer is fresh that doesn't say; zero keeps none of these.
    pub default_ttl: Duration,
    /// How long past its freshness an answer may stand in for a failure, where it doesn't say.
    pub stale_if_error: Duration,
    /// How long past its freshness an answer may be given while a fresh one is fetched, where it doesn't say.
    pub stale_while_revalidate: Duration,
    /// Bound on all answers of the rule, in bytes.
    pub max_bytes: u64,
    /// Bound on one answer, in bytes, at most `max_bytes`.
    pub max_object_bytes: u64,
    /// Whether requests for the same thing wait for the first of them.
    pub coalesce: bool,
}

impl Cache {
    /// What holds where policy doesn't say.
    pub const DEFAULT: Self = Self {
        default_ttl: Duration::ZERO,
        stale_if_error: Duration::from_secs(60),
        stale_while_revalidate: Duration::ZERO,
        max_bytes: 16 << 20,
        max_object_bytes: 1 << 20,
        coalesce: true,
    };
}

/// A fault that is injected.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fault {
    /// Share of requests, 1 to 100.
    pub percent: u32,
    /// How long requests are held up.
    pub delay: Option<Duration>,
    /// How they then fail.
    pub abort: Option<Cause>,
    /// Only requests for which this holds.
    pub when: Option<FlagCondition>,
}

/// What a part of the mesh gives up, and when.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DegradationPolicy {
    /// From the normal one to the last resort; two at least.
    pub levels: Vec<DegradationLevel>,
    /// The routes that shedding holds for; empty for all.
    pub routes: Vec<Name>,
    /// What asks for a level.
    pub triggers: Vec<DegradationTrigger>,
}

impl DegradationPolicy {
    /// The position of a level.
    pub fn level(&self, name: &str) -> Option<usize> {
        self.levels.iter().position(|level| level.name.as_str() == name)
    }
}

/// One level.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DegradationLevel {
    /// Its name.
    pub name: Name,
    /// Flags that have another variant while it holds.
    pub flags: BTreeMap<Box<str>, Box<str>>,
    /// Requests of a lower priority are refused.
    pub shed_below: Option<Priority>,
}

/// Asks for a level while a signal is past its mark.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DegradationTrigger {
    /// The position of the level that it asks for, 1 at least.
    pub level: usize,
    /// What is looked at.
    pub signal: Signal,
    /// How long the signal must be past its mark.
    pub hold_for: Duration,
    /// How long it must be back.
    pub clear_after: Duration,
    /// How long the level holds at least.
    pub min_stay: Duration,
    /// How long at most; `None` is no bound.
    pub max_stay: Option<Duration>,
    /// What it is judged over.
    pub scope: Scope,
}

/// What a trigger is judged over.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Scope {
    /// What the proxies of a zone see together.
    Zone,
    /// What all proxies see together.
    Mesh,
}

/// What a trigger looks at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Signal {
    /// The circuit of a service is open.
    CircuitOpen {
        /// The service.
        service: Name,
    },
    /// Share of failed calls, in percent.
    ErrorRate {
        /// The service.
        service: Name,
        /// Past this it begins.
        above: u32,
        /// Below this it ends.
        clear_below: u32,
        /// What is looked back on.
        window: Duration,
        /// Calls that there must be to begin.
        minimum_calls: u32,
    },
    /// A percentile of the time to the head of the answer.
    Latency {
        /// The service.
        service: Name,
        /// 1 to 99.
        percentile: u32,
        /// Past this it begins.
        above: Duration,
        /// Below this it ends.
        clear_below: Duration,
        /// What is looked back on.
        window: Duration,
        /// Calls that there must be to begin.
        minimum_calls: u32,
    },
    /// Demand over the limit, in percent.
    Saturation {
        /// The service.
        service: Name,
        /// Past this it begins.
        above: u32,
        /// Below this it ends.
        clear_below: u32,
    },
    /// How fast an error budget is used up.
    BurnRate {
        /// The service.
        service: Name,
        /// In thousandths of a percent, 50000 to 99999.
        objective: u32,
        /// Past this it begins, in tenths.
        above: u32,
        /// Below this it ends, in tenths.
        clear_below: u32,
        /// The window that shows that it matters.
        long_window: Duration,
        /// The window that shows that it still goes on.
        short_window: Duration,
        /// Calls that there must be in the short window to begin.
        minimum_calls: u32,
    },
}

impl Signal {
    /// The service that it is about.
    pub const fn service(&self) -> &Name {
        match self {
            Self::CircuitOpen { service }
            | Self::ErrorRate { service, .. }
            | Self::Latency { service, .. }
            | Self::Saturation { service, .. }
            | Self::BurnRate { service, .. } => service,
        }
    }
}

/// Holds a level for a while.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DegradationOverride {
    /// The policy.
    pub policy: Name,
    /// The level's name. One that the policy hasn't (any more) changes nothing.
    pub level: Name,
    /// When it ends.
    pub expire_time: SystemTime,
    /// Why, for people.
    pub reason: Box<str>,
    /// Where it holds; empty for everywhere.
    pub zones: Vec<Name>,
}
