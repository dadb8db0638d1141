//! What answers in place of a failed call, and what is given up on purpose.

use super::{PluginIdx, QueueIdx, ServiceIdx};
use crate::Name;
use crate::model::{
    Act, Cause, DegradationOverride, DegradationPolicy, FallbackPolicy, FlagCondition, Queue, Redirect, Rung,
    RungCause, StaticAnswer,
};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A fallback policy with its references resolved.
#[derive(Debug)]
pub struct FallbackView {
    /// Its name.
    pub name: Arc<str>,
    /// Leave out the header that says the answer is degraded.
    pub hide_header: bool,
    /// Tried in order.
    pub rungs: Vec<RungView>,
    /// Share of the request's time that is kept for the ladder, in percent.
    pub reserve_percent: u32,
    /// The largest body that one of its queues takes, in bytes; 0 if it has none.
    pub queued_bytes: u64,
    on: Vec<Cause>,
    on_statuses: Vec<u16>,
}

impl FallbackView {
    /// Whether a rung may queue requests with this method.
    pub fn queues(&self, method: &str) -> bool {
        let queues = |rung: &&RungView| matches!(rung.act, ActView::Queue(_)) && rung.is_for(method);
        self.queued_bytes > 0 && self.rungs.iter().any(|rung| queues(&rung))
    }

    /// Whether a failure of this cause leads here.
    pub fn acts_on(&self, cause: Cause) -> bool {
        self.on.contains(&cause)
    }

    /// Whether an upstream's answer with this status counts as failed.
    pub fn acts_on_status(&self, status: u16) -> bool {
        self.on_statuses.binary_search(&status).is_ok()
    }
}

/// One rung with its references resolved.
#[derive(Clone, Debug)]
pub struct RungView {
    /// Its position in the policy.
    pub position: usize,
    /// What it does.
    pub act: ActView,
    /// The failures that it is for; empty for every one.
    pub causes: Vec<RungCause>,
    /// The requests that it is for.
    pub when: Option<FlagCondition>,
    /// Its share of the time that is left when it begins, in percent.
    pub deadline_percent: u32,
    methods: Vec<Box<str>>,
}

impl RungView {
    /// Whether it is for requests with this method.
    pub fn is_for(&self, method: &str) -> bool {
        self.methods.is_empty() || self.methods.iter().any(|m| **m == *method)
    }
}

/// What a rung does, with its references resolved.
#[derive(Clone, Debug)]
pub enum ActView {
    /// Ask a plugin.
    Plugin {
        /// Which.
        plugin: PluginIdx,
        /// Handed to it as it stands: the rung's, or else the plugin's own.
        config: Arc<str>,
    },
    /// Answer with this.
    Static(Arc<StaticAnswer>),
    /// Send the request to another service.
    Service(ServiceIdx),
    /// One more attempt in another zone.
    Zone {
        /// Zones to choose from; empty for every other one.
        zones: Vec<Arc<str>>,
    },
    /// An answer that was kept.
    Stale {
        /// How long past its freshness; `None` for what the answer or the rule's cache says.
        max_stale: Option<Duration>,
    },
    /// Take the request in, and send it later.
    Queue(QueueIdx),
    /// Send the client elsewhere.
    Redirect(Arc<Redirect>),
    /// End the ladder.
    Fail {
        /// The status to fail with; `None` for the original failure.
        status: Option<u16>,
    },
}

/// A queue as policy has it; what is in it is the store's.
#[derive(Debug)]
pub struct QueueView {
    /// Its name.
    pub name: Arc<str>,
    /// Its settings.
    pub spec: Arc<Queue>,
}

/// What a part of the mesh gives up, as this proxy sees it.
#[derive(Debug)]
pub struct DegradationView {
    /// Its name.
    pub name: Arc<str>,
    /// Its settings.
    pub spec: Arc<DegradationPolicy>,
    /// The levels that are held in this zone, by when they end.
    pub held: Vec<HeldLevel>,
}

/// A level that somebody holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HeldLevel {
    /// Its position.
    pub level: usize,
    /// When it ends.
    pub until: SystemTime,
    /// Why, for people.
    pub reason: Box<str>,
}

impl DegradationView {
    /// The level that is held now: of several, the most degraded one.
    pub fn held_at(&self, wall: SystemTime) -> Option<&HeldLevel> {
        let holding = self.held.iter().filter(|held| held.until > wall);
        holding.max_by_key(|held| held.level)
    }
}

impl FallbackView {
    pub(super) fn new(
        name: &Name,
        policy: &FallbackPolicy,
        resolve: &impl Fn(&Act) -> Option<ActView>,
        entry_bytes: &impl Fn(QueueIdx) -> u64,
    ) -> Self {
        let rung = |(position, rung): (usize, &Rung)| {
            Some(RungView {
                position,
                act: resolve(&rung.act)?,
                causes: rung.causes.clone(),
                when: rung.when.clone(),
                deadline_percent: rung.deadline_percent,
                methods: rung.methods.clone(),
            })
        };
        let rungs: Vec<_> = policy.rungs.iter().enumerate().filter_map(rung).collect();
        let queued = rungs.iter().filter_map(|rung| match rung.act {
            ActView::Queue(queue) => Some(entry_bytes(queue)),
            ActView::Plugin { .. }
            | ActView::Static(_)
            | ActView::Service(_)
            | ActView::Zone { .. }
            | ActView::Stale { .. }
            | ActView::Redirect(_)
            | ActView::Fail { .. } => None,
        });
        Self {
            name: name.to_shared(),
            hide_header: policy.hide_header,
            queued_bytes: queued.max().unwrap_or(0),
            rungs,
            reserve_percent: policy.reserve_percent,
            on: policy.on.clone(),
            on_statuses: policy.on_statuses.clone(),
        }
    }
}

pub(super) fn resolve(
    act: &Act,
    plugin_of: &impl Fn(&Name, &Arc<str>) -> Option<(PluginIdx, Arc<str>)>,
    service_of: &impl Fn(&Name) -> Option<ServiceIdx>,
    queue_of: &impl Fn(&Name) -> Option<QueueIdx>,
) -> Option<ActView> {
    Some(match act {
        Act::Plugin { plugin, config } => {
            let (plugin, config) = plugin_of(plugin, config)?;
            ActView::Plugin { plugin, config }
        }
        Act::Static(answer) => ActView::Static(Arc::clone(answer)),
        Act::Service { service } => ActView::Service(service_of(service)?),
        Act::Zone { zones } => ActView::Zone {
            zones: zones.iter().map(Name::to_shared).collect(),
        },
        Act::Stale { max_stale } => ActView::Stale {
            max_stale: *max_stale,
        },
        Act::Queue { queue } => ActView::Queue(queue_of(queue)?),
        Act::Redirect(redirect) => ActView::Redirect(Arc::clone(redirect)),
        Act::Fail { status } => ActView::Fail { status: *status },
    })
}

impl DegradationView {
    pub(super) fn new(
        name: &Name,
        policy: &DegradationPolicy,
        held: &[&DegradationOverride],
        zone: &Name,
    ) -> Self {
        let here = |held: &&&DegradationOverride| {
            held.policy == *name && (held.zones.is_empty() || held.zones.contains(zone))
        };
        let mut held: Vec<HeldLevel> = held
            .iter()
            .filter(here)
            .filter_map(|held| {
                Some(HeldLevel {
                    level: policy.level(held.level.as_str())?,
                    until: held.expire_time,
                    reason: held.reason.clone(),
                })
            })
            .collect();
        held.sort_by_key(|held| held.until);
        Self {
            name: name.to_shared(),
            spec: Arc::new(policy.clone()),
            held,
        }
    }
}
