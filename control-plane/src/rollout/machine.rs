//! How a change goes on from stage to stage: time, what is seen, and commands come in, and whom the change has reached comes
//! out. What must survive a crash is [`Rollout`]; [`Watch`] may be lost, and then a stage is watched anew.

use super::compare::{Pair, Watched};
use super::reach::{Census, Reach};
use leeward_policy::Name;
use leeward_policy::model::{OnFailure, RolloutPolicy, RolloutStage, StageAmount, StageZones};
use std::time::Duration;

/// How long no more proxies may have come before some are drawn: after a restart they come back one by one, and of few a
/// draw would take in too many.
const SETTLED: Duration = Duration::from_secs(3);
/// How long that is waited for.
const UNSETTLED: Duration = Duration::from_secs(60);
/// How long those without a change are watched before everybody gets it in the first stage.
const BEFOREHAND: Duration = Duration::from_secs(10);
/// Of a hundred proxies of a stage, one may be missing.
const MISSING: u64 = 100;

/// A change on its way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Rollout {
    /// The revision, which is the rollout's id as well.
    pub(crate) revision: u64,
    /// The RolloutPolicy's name.
    pub(crate) name: Name,
    /// What it was when this began.
    pub(crate) policy: RolloutPolicy,
    /// Who applied it.
    pub(crate) by: String,
    pub(crate) stage: usize,
    /// Whether the stage's proxies have been drawn.
    pub(crate) drawn: bool,
    pub(crate) reach: Reach,
    pub(crate) phase: Phase,
    /// When it began and when the stage did, in milliseconds since 1970. For people only.
    pub(crate) started_ms: i64,
    pub(crate) stage_ms: i64,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    Running,
    /// `failed`: by a gate or a refusal, rather than by somebody.
    Paused {
        why: String,
        failed: bool,
    },
    /// The revision that takes it back is not written yet.
    RollingBack {
        why: String,
    },
    Promoted {
        why: String,
    },
    RolledBack {
        why: String,
        by: u64,
    },
}

/// What somebody wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Command {
    Pause,
    Resume,
    Promote,
    PromoteFull,
    Abort,
}

/// What is seen at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sight {
    pub(crate) census: Census,
    /// Connected proxies that it has reached.
    pub(crate) members: u64,
    /// Those of them that run it whole.
    pub(crate) running: u64,
    /// A member's refusal of something that it changed.
    pub(crate) refusal: Option<String>,
    /// A member that doesn't run it.
    pub(crate) laggard: Option<String>,
    /// Requests that ended since the last look.
    pub(crate) new: Pair,
    /// Control planes that didn't answer.
    pub(crate) missing: Vec<String>,
}

/// What is remembered from look to look.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    figures: Watched,
    /// When the stage was entered, and when its proxies first ran the change.
    entered: Option<Duration>,
    steady: Option<Duration>,
    /// The most proxies that there were, and since when there have been no more.
    most: u64,
    settled_since: Option<Duration>,
    /// The rollout and the stage that this is of, and when it was entered or resumed.
    of: Option<(u64, usize, i64)>,
}

impl Watch {
    fn is_settled(&self, now: Duration, entered: Duration) -> bool {
        let calm = self
            .settled_since
            .is_some_and(|since| now.saturating_sub(since) >= SETTLED);
        calm || now.saturating_sub(entered) >= UNSETTLED
    }

    fn note_crowd(&mut self, live: u64, now: Duration) {
        if self.settled_since.is_none() || live > self.most {
            self.settled_since = Some(now);
            self.most = live;
        }
    }

    fn begin_stage(&mut self, now: Duration) {
        self.entered = Some(now);
        self.steady = None;
        self.figures.turn();
    }
}

impl Rollout {
    pub(crate) fn new(revision: u64, name: Name, policy: RolloutPolicy, by: String, wall_ms: i64) -> Self {
        Self {
            revision,
            name,
            policy,
            by,
            stage: 0,
            drawn: false,
            reach: Reach::default(),
            phase: Phase::Running,
            started_ms: wall_ms,
            stage_ms: wall_ms,
        }
    }

    /// Whether it is still on its way, in whichever direction.
    pub(crate) const fn is_open(&self) -> bool {
        match self.phase {
            Phase::Running | Phase::Paused { .. } | Phase::RollingBack { .. } => true,
            Phase::Promoted { .. } | Phase::RolledBack { .. } => false,
        }
    }

    /// Whether anything can still come of looking at it.
    pub(crate) const fn is_watched(&self) -> bool {
        match self.phase {
            Phase::Running | Phase::Paused { failed: false, .. } => true,
            Phase::Paused { failed: true, .. }
            | Phase::RollingBack { .. }
            | Phase::Promoted { .. }
            | Phase::RolledBack { .. } => false,
        }
    }

    /// Looks. `now` is the time since any one moment, `wall_ms` the clock's, for people.
    pub(crate) fn look(&mut self, watch: &mut Watch, sight: &Sight, now: Duration, wall_ms: i64) {
        if !self.is_watched() {
            return;
        }
        let of = (self.revision, self.stage, self.stage_ms);
        if watch.of != Some(of) {
            if watch.of.is_some_and(|(revision, ..)| revision != self.revision) {
                *watch = Watch::default();
            }
            watch.of = Some(of);
            watch.begin_stage(now);
        }
        watch.note_crowd(sight.census.live(), now);
        watch.figures.add(&sight.new, now);
        if let Some(refusal) = &sight.refusal {
            self.fail(format!("refused by {refusal}"), wall_ms);
            return;
        }
        if let Some(why) = watch.figures.judge(&self.policy) {
            self.fail(why, wall_ms);
            return;
        }
        if self.phase != Phase::Running {
            return;
        }
        let entered = *watch.entered.get_or_insert(now);
        let Some(stage) = self.policy.stages.get(self.stage).cloned() else {
            self.promote("every stage is done".to_owned(), wall_ms);
            return;
        };
        if !self.drawn || sight.members == 0 {
            self.draw(watch, &stage, sight, now, entered);
            let since = watch.entered.unwrap_or(now);
            let long = now.saturating_sub(since) >= stage.hold.max(UNSETTLED);
            if sight.members == 0 && long && sight.missing.is_empty() {
                self.advance("there was nobody to watch", wall_ms);
            }
            return;
        }
        let behind = sight.members - sight.running.min(sight.members);
        if behind <= sight.members / MISSING && sight.missing.is_empty() {
            let steady = *watch.steady.get_or_insert(now);
            if now.saturating_sub(steady) >= stage.hold {
                self.advance("watched, and nothing got worse", wall_ms);
                return;
            }
        }
        if now.saturating_sub(entered) > stage.hold + self.policy.progress_deadline {
            let laggard = sight.laggard.as_deref().unwrap_or("nobody is named");
            let why = format!(
                "stage {} takes longer than {:?}: {} of {} proxies run it ({laggard})",
                self.stage, self.policy.progress_deadline, sight.running, sight.members
            );
            self.fail(why, wall_ms);
        }
    }

    /// Draws the stage's proxies, once it is known who there is.
    fn draw(
        &mut self,
        watch: &mut Watch,
        stage: &RolloutStage,
        sight: &Sight,
        now: Duration,
        entered: Duration,
    ) {
        let everybody = stage.zones == StageZones::All && stage.amount == StageAmount::Percent(100);
        let may_draw = everybody || watch.is_settled(now, entered) && sight.missing.is_empty();
        if !may_draw {
            return;
        }
        // Once everybody has it there is nothing to compare it with but what was before.
        if everybody
            && self.stage == 0
            && !self.drawn
            && now.saturating_sub(entered) < BEFOREHAND.min(stage.hold)
        {
            return;
        }
        let before = self.reach.clone();
        self.reach.grow(self.revision, stage, &sight.census);
        // While nobody is there, somebody may come.
        let is_new = self.reach != before || !self.drawn;
        if is_new && self.reach != Reach::default() {
            self.drawn = true;
            watch.begin_stage(now);
        }
    }

    fn advance(&mut self, why: &str, wall_ms: i64) {
        if self.stage + 1 < self.policy.stages.len() {
            self.stage += 1;
            self.drawn = false;
            self.stage_ms = wall_ms;
            self.phase = Phase::Running;
        } else {
            self.promote(why.to_owned(), wall_ms);
        }
    }

    fn promote(&mut self, why: String, wall_ms: i64) {
        self.reach = Reach::everybody();
        self.stage_ms = wall_ms;
        self.phase = Phase::Promoted { why };
    }

    fn fail(&mut self, why: String, wall_ms: i64) {
        self.stage_ms = wall_ms;
        self.phase = match self.policy.on_failure {
            OnFailure::Rollback => Phase::RollingBack { why },
            OnFailure::Pause => Phase::Paused { why, failed: true },
        };
    }

    /// The revision that takes it back is written.
    pub(crate) fn taken_back(&mut self, by: u64, wall_ms: i64) {
        if let Phase::RollingBack { why } = &self.phase {
            let why = why.clone();
            self.stage_ms = wall_ms;
            self.phase = Phase::RolledBack { why, by };
        }
    }

    /// Does as somebody says.
    ///
    /// # Errors
    ///
    /// Why it can't.
    pub(crate) fn steer(&mut self, command: Command, who: &str, wall_ms: i64) -> Result<(), String> {
        match (command, &self.phase) {
            (_, Phase::Promoted { .. }) => {
                return Err(format!(
                    "the rollout of revision {} is over: everybody has it",
                    self.revision
                ));
            }
            (_, Phase::RollingBack { .. } | Phase::RolledBack { .. }) => {
                return Err(format!("the rollout of revision {} is taken back", self.revision));
            }
            (Command::Pause, Phase::Running) => {
                self.phase = Phase::Paused {
                    why: format!("paused by {who}"),
                    failed: false,
                };
            }
            (Command::Pause, Phase::Paused { why, .. }) => {
                return Err(format!(
                    "the rollout of revision {} is paused already: {why}",
                    self.revision
                ));
            }
            (Command::Resume, Phase::Running) => {
                return Err(format!("the rollout of revision {} is not paused", self.revision));
            }
            (Command::Resume, Phase::Paused { .. }) => {
                self.stage_ms = wall_ms;
                self.phase = Phase::Running;
            }
            (Command::Promote, Phase::Running | Phase::Paused { .. }) => {
                self.advance(&format!("promoted by {who}"), wall_ms);
            }
            (Command::PromoteFull, Phase::Running | Phase::Paused { .. }) => {
                self.promote(format!("promoted by {who}"), wall_ms);
            }
            (Command::Abort, Phase::Running | Phase::Paused { .. }) => {
                self.stage_ms = wall_ms;
                self.phase = Phase::RollingBack {
                    why: format!("aborted by {who}"),
                };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
