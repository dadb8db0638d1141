//! Which level each policy has, and who says so.

use leeward_config::ControlLevel;
use leeward_policy::model::{DegradationTrigger, Scope, Signal};
use leeward_policy::{DegradationView, Levels, Snapshot};
use leeward_resilience::degrade::{Judge, Reading, SignalLog, SignalSample, reading};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Decides, by what it is told of services and of a control plane.
#[derive(Default)]
pub(super) struct Decider {
    logs: HashMap<Arc<str>, SignalLog>,
    policies: BTreeMap<Arc<str>, Standing>,
}

/// How one policy stands.
struct Standing {
    view: PolicyView,
    /// The level that is in force.
    level: usize,
    since: Instant,
    by: By,
    /// What this proxy makes of what it sees.
    judge: Judge,
    /// Why the judge is where it is; `None` if it never was elsewhere.
    judged: Option<Judged>,
    /// What the control plane said last: the level, and why. `None` while it says nothing.
    said: Option<(usize, Box<str>)>,
    /// What the triggers' signals were last.
    readings: Vec<Option<Reading>>,
}

/// What there is to say of a policy after its snapshot is gone.
struct PolicyView {
    levels: Vec<Arc<str>>,
    triggers: Vec<DegradationTrigger>,
}

/// A judge's last change.
#[derive(Clone)]
struct Judged {
    trigger: Option<usize>,
    text: Box<str>,
}

/// Who says which level is in force.
#[derive(Clone)]
enum By {
    Override { until: SystemTime, reason: Box<str> },
    Control { why: Box<str> },
    Trigger(Option<Judged>),
}

/// A level that came into force.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Moved {
    pub(super) policy: Arc<str>,
    /// The level's name until now.
    pub(super) from: Arc<str>,
    /// The level's name from now on.
    pub(super) to: Arc<str>,
    pub(super) by: &'static str,
    /// Why, for people.
    pub(super) why: String,
}

/// Whose samples they are, in logs that have those of one proxy only.
const SELF: &str = "self";

impl Decider {
    /// Another policy is in force. What hangs on policies that it has still is kept.
    pub(super) fn adopt(&mut self, snapshot: &Snapshot, now: Instant) {
        let views = snapshot.degradations();
        let mut signals: BTreeMap<&str, Vec<&Signal>> = BTreeMap::new();
        for trigger in views.iter().flat_map(|view| &view.spec.triggers) {
            let of = signals.entry(trigger.signal.service().as_str());
            of.or_default().push(&trigger.signal);
        }
        self.logs.retain(|service, _| signals.contains_key(&**service));
        for (service, signals) in signals {
            match self.logs.get_mut(service) {
                Some(log) => log.keep_for(signals),
                None => drop(self.logs.insert(service.into(), SignalLog::new(signals, now))),
            }
        }
        let named = |name: &Arc<str>| views.iter().any(|view| view.name == *name);
        self.policies.retain(|name, _| named(name));
    }

    /// Takes in what was seen of services.
    pub(super) fn see(&mut self, samples: &[(Arc<str>, SignalSample)], now: Instant) {
        for (service, sample) in samples {
            if let Some(log) = self.logs.get_mut(service) {
                log.add(SELF, sample, now);
            }
        }
    }

    /// Looks at every policy, and gives those whose levels are others now. `control` is what the control plane says,
    /// if it says anything.
    pub(super) fn decide(
        &mut self,
        snapshot: &Snapshot,
        control: Option<&[ControlLevel]>,
        now: Instant,
        wall: SystemTime,
    ) -> Vec<Moved> {
        let logs = &self.logs;
        let mut moved = Vec::new();
        for view in snapshot.degradations() {
            let standing = self
                .policies
                .entry(Arc::clone(&view.name))
                .or_insert_with(|| Standing::new(view, now));
            let read = |signal: &Signal| reading(logs.get(signal.service().as_str())?, signal, now);
            moved.extend(standing.decide(view, control, read, now, wall));
        }
        moved
    }

    /// What the levels that are in force mean for requests.
    pub(super) fn levels(&self, snapshot: &Snapshot) -> Levels {
        let standing = snapshot.degradations().iter().filter_map(|view| {
            let standing = self.policies.get(&view.name)?;
            Some((&view.name, &*view.spec, standing.level))
        });
        Levels::new(standing)
    }

    /// Each policy's name and that of its level.
    pub(super) fn in_force(&self) -> Vec<Vec<Arc<str>>> {
        let of = |(name, standing): (&Arc<str>, &Standing)| {
            vec![Arc::clone(name), standing.view.name(standing.level)]
        };
        self.policies.iter().map(of).collect()
    }

    /// For people.
    pub(super) fn report(&self, now: Instant, wall: SystemTime) -> Value {
        let policies: Vec<Value> = self
            .policies
            .iter()
            .map(|(name, standing)| standing.report(name, now, wall))
            .collect();
        json!({"policies": policies})
    }
}

impl Standing {
    fn new(view: &DegradationView, now: Instant) -> Self {
        Self {
            view: PolicyView::of(view),
            level: 0,
            since: now,
            by: By::Trigger(None),
            judge: Judge::new(),
            judged: None,
            said: None,
            readings: Vec::new(),
        }
    }

    fn decide(
        &mut self,
        view: &DegradationView,
        control: Option<&[ControlLevel]>,
        read: impl Fn(&Signal) -> Option<Reading>,
        now: Instant,
        wall: SystemTime,
    ) -> Option<Moved> {
        let from = self.view.name(self.level);
        if !self.view.is_of(view) {
            self.view = PolicyView::of(view);
        }
        let said = control.map(|levels| said_of(view, levels));
        if let (None, Some((level, why))) = (&said, &self.said) {
            // Cut off: from what was in force on, it goes by what is seen here.
            self.judge.seed(&view.spec, *level, now);
            let kept = (*level > 0).then(|| Judged {
                trigger: None,
                text: format!("kept from the control plane, which said: {why}").into(),
            });
            self.judged = kept;
        }
        self.said = said;
        self.readings.clear();
        let readings = &mut self.readings;
        let judged = self.judge.judge(
            &view.spec,
            |_, signal| {
                let read = read(signal);
                readings.push(read);
                read
            },
            now,
        );
        if let Some(change) = judged {
            self.judged = Some(Judged {
                trigger: change.why.trigger,
                text: change.why.text.into(),
            });
        }
        (self.level, self.by) = match (view.held_at(wall), &self.said) {
            (Some(held), _) => {
                let by = By::Override {
                    until: held.until,
                    reason: held.reason.clone(),
                };
                (held.level, by)
            }
            (None, Some((level, why))) => (*level, By::Control { why: why.clone() }),
            (None, None) => (self.judge.level(), By::Trigger(self.judged.clone())),
        };
        let to = self.view.name(self.level);
        if from == to {
            return None;
        }
        self.since = now;
        Some(Moved {
            policy: Arc::clone(&view.name),
            from,
            to,
            by: self.by.as_str(),
            why: self.by.why().to_owned(),
        })
    }

    fn report(&self, policy: &Arc<str>, now: Instant, wall: SystemTime) -> Value {
        let (until, trigger) = match &self.by {
            By::Override { until, .. } => (until.duration_since(wall).ok().map(millis), None),
            By::Control { .. } | By::Trigger(None) => (None, None),
            By::Trigger(Some(judged)) => (None, judged.trigger),
        };
        let triggers: Vec<Value> = self
            .view
            .triggers
            .iter()
            .enumerate()
            .map(|(at, trigger)| self.trigger(at, trigger))
            .collect();
        json!({
            "policy": &**policy,
            "level": &*self.view.name(self.level),
            "position": self.level,
            "since_ms": millis(now.saturating_duration_since(self.since)),
            "by": self.by.as_str(),
            "why": self.by.why(),
            "until_ms": until,
            "trigger": trigger,
            "control": self.said.as_ref().map(|(level, why)| json!({
                "level": &*self.view.name(*level),
                "why": &**why,
            })),
            "own": {
                "level": &*self.view.name(self.judge.level()),
                "why": self.judged.as_ref().map(|judged| &*judged.text),
                "trigger": self.judged.as_ref().and_then(|judged| judged.trigger),
            },
            "triggers": triggers,
        })
    }

    fn trigger(&self, at: usize, trigger: &DegradationTrigger) -> Value {
        let read = self.readings.get(at).copied().flatten();
        json!({
            "level": &*self.view.name(trigger.level),
            "signal": signal(&trigger.signal),
            "service": trigger.signal.service().as_str(),
            "scope": match trigger.scope {
                Scope::Zone => "zone",
                Scope::Mesh => "mesh",
            },
            "stage": self.judge.stage(at).map(|stage| stage.as_str()),
            "value": read.map(|read| read.value),
            "past": read.is_some_and(|read| read.past),
            "clear": read.is_none_or(|read| read.clear),
            "saw": read.map(|read| read.describe(&trigger.signal)),
        })
    }
}

impl PolicyView {
    fn of(view: &DegradationView) -> Self {
        let name = |level: &leeward_policy::model::DegradationLevel| level.name.to_shared();
        Self {
            levels: view.spec.levels.iter().map(name).collect(),
            triggers: view.spec.triggers.clone(),
        }
    }

    fn is_of(&self, view: &DegradationView) -> bool {
        let names = view.spec.levels.iter().map(|level| level.name.as_str());
        self.triggers == view.spec.triggers && self.levels.iter().map(|name| &**name).eq(names)
    }

    fn name(&self, level: usize) -> Arc<str> {
        self.levels.get(level).map_or_else(|| "-".into(), Arc::clone)
    }
}

impl By {
    const fn as_str(&self) -> &'static str {
        match self {
            Self::Override { .. } => "override",
            Self::Control { .. } => "control",
            Self::Trigger(_) => "trigger",
        }
    }

    fn why(&self) -> &str {
        match self {
            Self::Override { reason: why, .. } | Self::Control { why } => why,
            Self::Trigger(judged) => judged.as_ref().map_or("", |judged| &judged.text),
        }
    }
}

/// What a control plane says of a policy: the normal level, if nothing. So it is, too, with a level that the policy
/// hasn't here: the policy that has it is about to come.
fn said_of(view: &DegradationView, levels: &[ControlLevel]) -> (usize, Box<str>) {
    let said = levels.iter().find(|said| *said.policy == *view.name);
    let at = said.and_then(|said| Some((view.spec.level(&said.level)?, said.why.clone())));
    at.unwrap_or_default()
}

const fn signal(signal: &Signal) -> &'static str {
    match signal {
        Signal::CircuitOpen { .. } => "circuitOpen",
        Signal::ErrorRate { .. } => "errorRate",
        Signal::Latency { .. } => "latency",
        Signal::Saturation { .. } => "saturation",
        Signal::BurnRate { .. } => "burnRate",
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
