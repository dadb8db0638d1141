//! What answers if the call fails, rung by rung.

use super::{Step, Telling, key};
use crate::lint::text::{duration, list};
use crate::model::RungCause;
use crate::{ActView, Kind, RuleView, RungView};
use std::time::Duration;

impl Telling<'_> {
    pub(super) fn ladder(&mut self, rule: &RuleView) {
        let Some(ladder) = rule.fallback.and_then(|idx| self.snapshot.fallback(idx)) else {
            let says = "no ladder: a failure is what the client gets";
            self.steps.push(Step::new("fallback", says));
            return;
        };
        self.involve(Kind::FallbackPolicy, &ladder.name);
        let causes = crate::model::Cause::ALL
            .into_iter()
            .filter(|cause| ladder.acts_on(*cause));
        let causes = list(causes.map(crate::model::Cause::as_str));
        let statuses = list((400..=599).filter(|status| ladder.acts_on_status(*status)));
        let mut left = self.reserve(rule);
        let has_limit = rule.request_timeout.is_some();
        let mut steps = Vec::new();
        let mut ended = None;
        for rung in &ladder.rungs {
            let (step, takes, ends) = self.rung(rule, rung, left, has_limit, ended);
            let mut step = step;
            if let Some(key) = key(Kind::FallbackPolicy, &ladder.name) {
                step = step.by(key, format!("spec.rungs[{}]", rung.position));
            }
            left = left.saturating_sub(takes);
            if ends && ended.is_none() {
                ended = Some(rung.position);
            }
            steps.push(step);
        }
        let says = format!(
            "Route/{} has FallbackPolicy/{} for failures, and {} kept for it",
            rule.route,
            ladder.name,
            duration(self.reserve(rule))
        );
        let mut step = Step::new("fallback", says).fact("on", causes).with(steps);
        if !statuses.is_empty() {
            step = step.fact("onStatuses", statuses);
        }
        step.resource = key(Kind::FallbackPolicy, &ladder.name);
        self.steps.push(step);
    }

    /// One rung: what it does, the time that it takes of what is left at worst, and whether it ends the ladder for this
    /// request.
    fn rung(
        &mut self,
        rule: &RuleView,
        rung: &RungView,
        left: Duration,
        has_limit: bool,
        ended: Option<usize>,
    ) -> (Step, Duration, bool) {
        let share = left * rung.deadline_percent.min(100) / 100;
        let mut plugin_when = None;
        let (does, takes, ends) = match &rung.act {
            ActView::Plugin { plugin, .. } => {
                let view = self.snapshot.plugin(*plugin);
                let name = view.map_or("", |view| &*view.name);
                plugin_when = view.and_then(|view| view.spec.when.as_ref());
                self.involve(Kind::Plugin, name);
                let call = view.map_or(Duration::ZERO, |view| view.spec.limits.call_timeout);
                (
                    format!("asks Plugin/{name}, for up to {}", duration(call)),
                    call.min(share),
                    false,
                )
            }
            ActView::Service(idx) => {
                let name = self.snapshot.service(*idx).map_or("", |view| &*view.name);
                self.involve(Kind::Service, name);
                (format!("one attempt at Service/{name}"), share, false)
            }
            ActView::Zone { zones } if zones.is_empty() => {
                ("one more attempt in another zone".to_owned(), share, false)
            }
            ActView::Zone { zones } => (format!("one more attempt in {}", list(zones)), share, false),
            ActView::Queue(idx) => {
                let name = self.snapshot.queue(*idx).map_or("", |view| &*view.name);
                self.involve(Kind::Queue, name);
                (
                    format!("takes the request in, in Queue/{name}, and answers 202"),
                    share,
                    false,
                )
            }
            ActView::Stale { max_stale } => {
                let old = max_stale.map_or_else(
                    || "as long as the answer or the cache says".to_owned(),
                    |old| format!("{} past its freshness", duration(old)),
                );
                let kept = if rule.cache.is_some() {
                    ""
                } else {
                    "; nothing is kept, since the rule has no cache"
                };
                (
                    format!("gives the answer that was kept, {old}{kept}"),
                    Duration::ZERO,
                    false,
                )
            }
            ActView::Static(answer) => (
                format!(
                    "answers {} with {} bytes",
                    answer.status,
                    answer.body.as_fixed().map_or(0, str::len)
                ),
                Duration::ZERO,
                true,
            ),
            ActView::Redirect(redirect) => (
                format!("answers {} to another place", redirect.status),
                Duration::ZERO,
                true,
            ),
            ActView::Fail { status: None } => {
                ("ends with the original failure".to_owned(), Duration::ZERO, true)
            }
            ActView::Fail { status: Some(status) } => (format!("ends with {status}"), Duration::ZERO, true),
        };
        let for_method = rung.is_for(self.asked.method());
        let conditions = rung.when.iter().chain(plugin_when);
        let conditions: Vec<(bool, String)> = conditions
            .map(|condition| self.condition(condition, Some(&rule.route)))
            .collect();
        let off = conditions.iter().find(|(holds, _)| !holds);
        let causes = rung.causes.iter().map(|cause| match cause {
            RungCause::Of(cause) => cause.as_str(),
            RungCause::ZoneDown => "zone_down",
            RungCause::PluginFault => "plugin_fault",
        });
        let causes = list(causes);
        let passed = if let Some(ended) = ended {
            Some(format!("never tried: rungs[{ended}] has answered"))
        } else if !for_method {
            Some(format!("not for {}", self.asked.method()))
        } else {
            off.map(|(_, why)| format!("passed over: {why}"))
        };
        let is_for = passed.is_none();
        let only = if causes.is_empty() {
            String::new()
        } else {
            format!(", after {causes} only")
        };
        let says = match &passed {
            None => format!("rungs[{}] {does}{only}", rung.position),
            Some(why) => format!("rungs[{}] {does}{only}: {why}", rung.position),
        };
        let mut step = Step::new("rung", says).fact(
            "applies",
            if !is_for {
                "no"
            } else if causes.is_empty() {
                "yes"
            } else {
                "by cause"
            },
        );
        if !causes.is_empty() {
            step = step.fact("causes", &causes);
        }
        if has_limit && crate::lint::time::takes_own_time(&rung.act) {
            step = step.fact("time", duration(share));
        }
        for (_, why) in conditions {
            step = step.fact("when", why);
        }
        let takes = if is_for && causes.is_empty() {
            takes
        } else {
            Duration::ZERO
        };
        (step, takes, ends && is_for && causes.is_empty())
    }
}
