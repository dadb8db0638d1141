//! Which level each policy has, and who says so.

use leeward_config::ControlLevel;
use leeward_policy::model::{DegradationTrigger, Scope, Signal};
use leeward_policy::{DegradationView, Levels, Snapshot};
use leeward_resilience::degrade::{Judge, Reading, SignalLog, SignalSample, reading};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Decides, by what it is told of services and of a control plane.
#[derive(Default)]
pub(super) struct Decider {
    logs: HashMap<Arc<str>, SignalLog>,
    policies: BTreeMap<Arc<str>, Standing>,
    /// What the process before this one had, of policies that are not here yet: the level's name, and since when.
    inherited: BTreeMap<Box<str>, (Box<str>, Instant)>,
}

/// A level as it is handed from one process to the next.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Handed {
    policy: String,
    level: String,
    /// How long it has been in force.
    age_ms: u64,
}

impl Handed {
    /// Which level of which policy.
    pub(crate) fn what(&self) -> (String, String) {
        (self.policy.clone(), self.level.clone())
    }

    /// The same, in force for so much longer.
    pub(crate) fn aged(mut self, by: Duration) -> Self {
        self.age_ms = self.age_ms.saturating_add(millis(by));
        self
    }
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

    /// The levels past the normal one, without what somebody holds: that is in policy.
    pub(super) fn hand_out(&self, now: Instant) -> Vec<Handed> {
        let handed = |(policy, standing): (&Arc<str>, &Standing)| {
            let level = standing.by_itself();
            (level > 0).then(|| Handed {
                policy: policy.to_string(),
                level: standing.view.name(level).to_string(),
                age_ms: millis(now.saturating_duration_since(standing.since)),
            })
        };
        self.policies.iter().filter_map(handed).collect()
    }

    /// Policies of these names, when they come, begin from these levels.
    pub(super) fn inherit(&mut self, handed: &[Handed], now: Instant) {
        self.inherited.extend(handed.iter().map(|handed| {
            let since = now.checked_sub(Duration::from_millis(handed.age_ms));
            let level = handed.level.as_str().into();
            (handed.policy.as_str().into(), (level, since.unwrap_or(now)))
        }));
    }

    /// A policy that comes from now on is another than the process before this one had.
    pub(super) fn forget_inherited(&mut self) {
        self.inherited.clear();
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
        let (logs, inherited) = (&self.logs, &mut self.inherited);
        let mut moved = Vec::new();
        for view in snapshot.degradations() {
            let standing = self.policies.entry(Arc::clone(&view.name)).or_insert_with(|| {
                match inherited.remove(&*view.name) {
                    Some((level, since)) => Standing::after(view, &level, since, now),
                    None => Standing::new(view, now),
                }
            });
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

    /// Where the process before this one was.
    fn after(view: &DegradationView, level: &str, since: Instant, now: Instant) -> Self {
        let mut standing = Self::new(view, now);
        if let Some(level) = view.spec.level(level).filter(|level| *level > 0) {
            standing.judge.seed(&view.spec, level, since);
            standing.judged = Some(Judged {
                trigger: None,
                text: "kept from the process before this one".into(),
            });
            (standing.level, standing.since) = (level, since);
        }
        standing
    }

    /// The level that would be in force if nobody held one.
    fn by_itself(&self) -> usize {
        self.said
            .as_ref()
            .map_or_else(|| self.judge.level(), |(level, _)| *level)
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
