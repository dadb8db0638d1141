//! Which level the triggers of a policy ask for.

use super::reading::Reading;
use leeward_policy::model::{DegradationPolicy, DegradationTrigger, Signal};
use std::time::{Duration, Instant};

/// Judges one policy in one place: a zone, the mesh, or what a proxy sees by itself.
///
/// Each trigger is a machine of its own. It is idle until its signal has been past its mark for `hold_for`, then
/// active until the signal has been clear for `clear_after` and `min_stay` is over. A signal of which nothing is known
/// is not past its mark, and it is clear: a service that nobody calls for `clear_after` ends a level. After `max_stay`
/// the trigger is spent, and idle again once its signal has been clear for `clear_after`.
///
/// The level is the most degraded one that an active trigger asks for, and the normal one if none is active.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    machines: Vec<Machine>,
    level: usize,
}

#[derive(Clone, Debug)]
struct Machine {
    /// What it was made from: as long as a policy has it, it is kept.
    trigger: DegradationTrigger,
    stage: Stage,
}

/// How a trigger stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// Nothing is wrong.
    Idle,
    /// Its signal is past its mark, not long enough yet.
    Pending {
        /// Since when.
        since: Instant,
    },
    /// It asks for its level.
    Active {
        /// Since when.
        since: Instant,
        /// Since when its signal has been clear.
        clearing: Option<Instant>,
    },
    /// It asked for as long as it may, and its signal has yet to clear.
    Spent {
        /// Since when its signal has been clear.
        clearing: Option<Instant>,
    },
}

impl Stage {
    /// The word used in logs and the admin API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Pending { .. } => "pending",
            Self::Active { .. } => "active",
            Self::Spent { .. } => "spent",
        }
    }
}

/// Another level.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Change {
    /// The level's position until now, in the policy as it was then.
    pub from: usize,
    /// The level's position from now on.
    pub to: usize,
    /// What made it so.
    pub why: Why,
}

/// What made a level change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Why {
    /// The position of the trigger that asks for the new level, or no longer for the old one; `None` if the policy has
    /// it no more.
    pub trigger: Option<usize>,
    /// What it saw, for people.
    pub text: String,
}

impl Judge {
    /// At the normal level.
    pub const fn new() -> Self {
        Self {
            machines: Vec::new(),
            level: 0,
        }
    }

    /// The level's position, as of the last judgement.
    pub const fn level(&self) -> usize {
        self.level
    }

    /// How a trigger stands, by its position as of the last judgement.
    pub fn stage(&self, trigger: usize) -> Option<Stage> {
        self.machines.get(trigger).map(|machine| machine.stage)
    }

    /// Looks at all triggers. `read` gives what the signal of one is now; for a trigger that is not judged here, it
    /// says `None` always. A trigger that is as it was, wherever it stands among the others, goes on from where it was.
    pub fn judge(
        &mut self,
        policy: &DegradationPolicy,
        mut read: impl FnMut(usize, &Signal) -> Option<Reading>,
        now: Instant,
    ) -> Option<Change> {
        self.take_over(policy);
        let mut ended = None;
        let mut read_of = Vec::with_capacity(self.machines.len());
        for (at, machine) in self.machines.iter_mut().enumerate() {
            let reading = read(at, &machine.trigger.signal);
            read_of.push(reading);
            let was_asking = machine.is_active();
            if let Some(over) = machine.step(reading, now)
                && was_asking
                && machine.trigger.level == self.level
            {
                ended = ended.or(Some((at, over)));
            }
        }
        let from = self.level;
        self.level = self.asked_for();
        if self.level == from {
            return None;
        }
        let rose = self.level > from;
        let asks = |machine: &Machine| machine.is_active() && machine.trigger.level == self.level;
        let why = match (rose, ended) {
            (true, _) => {
                let at = self.machines.iter().position(asks);
                let told = at.and_then(|at| Some((self.machines.get(at)?, read_of.get(at).copied()?)));
                Why {
                    trigger: at,
                    text: told.map_or_else(String::new, |(machine, reading)| machine.saw(reading)),
                }
            }
            (false, Some((at, over))) => {
                let told = self.machines.get(at).zip(read_of.get(at).copied());
                let text = told.map_or_else(String::new, |(machine, reading)| match over {
                    Over::Cleared => machine.saw(reading),
                    Over::TimeUp(max_stay) => format!("held for {max_stay:?}, as long as it may"),
                });
                Why {
                    trigger: Some(at),
                    text,
                }
            }
            (false, None) => Why {
                trigger: None,
                text: "no trigger of the policy asks for it any more".to_owned(),
            },
        };
        Some(Change {
            from,
            to: self.level,
            why,
        })
    }

    /// Takes another judge's level for its own, so that judging here from now on changes nothing by itself. Triggers
    /// that ask for that level begin now, as if they had been past their marks; those for more must be past theirs
    /// for `hold_for` once more. If no trigger asks for just that level, those for the next lower one do.
    pub fn seed(&mut self, policy: &DegradationPolicy, level: usize, now: Instant) {
        self.take_over(policy);
        let levels = self.machines.iter().map(|machine| machine.trigger.level);
        let level = levels.filter(|asked| *asked <= level).max().unwrap_or(0);
        let already = self
            .machines
            .iter()
            .any(|machine| machine.is_active() && machine.trigger.level == level);
        for machine in &mut self.machines {
            if machine.trigger.level == level && !already {
                machine.stage = Stage::Active {
                    since: now,
                    clearing: None,
                };
            } else if machine.trigger.level > level && machine.is_active() {
                machine.stage = Stage::Pending { since: now };
            }
        }
        self.level = self.asked_for();
    }

    fn asked_for(&self) -> usize {
        let active = self.machines.iter().filter(|machine| machine.is_active());
        active.map(|machine| machine.trigger.level).max().unwrap_or(0)
    }

    /// Makes the machines those of a policy's triggers.
    fn take_over(&mut self, policy: &DegradationPolicy) {
        let same = self
            .machines
            .iter()
            .map(|machine| &machine.trigger)
            .eq(&policy.triggers);
        if same {
            return;
        }
        let mut known = std::mem::take(&mut self.machines);
        self.machines = policy
            .triggers
            .iter()
            .map(|trigger| {
                let kept = known.iter().position(|machine| machine.trigger == *trigger);
                kept.map_or_else(|| Machine::new(trigger.clone()), |at| known.swap_remove(at))
            })
            .collect();
    }
}

/// Why a trigger no longer asks.
#[derive(Clone, Copy, Debug)]
enum Over {
    Cleared,
    TimeUp(Duration),
}

impl Machine {
    const fn new(trigger: DegradationTrigger) -> Self {
        Self {
            trigger,
            stage: Stage::Idle,
        }
    }

    const fn is_active(&self) -> bool {
        matches!(self.stage, Stage::Active { .. })
    }

    fn step(&mut self, reading: Option<Reading>, now: Instant) -> Option<Over> {
        let trigger = &self.trigger;
        let past = reading.is_some_and(|reading| reading.past);
        let clear = reading.is_none_or(|reading| reading.clear);
        let for_long = |since: Instant, length: Duration| now.saturating_duration_since(since) >= length;
        // Since when it has been clear, with this reading.
        let still = |clearing: Option<Instant>| clear.then(|| clearing.unwrap_or(now));
        let cleared =
            |clearing: Option<Instant>| clearing.is_some_and(|at| for_long(at, trigger.clear_after));
        let (next, over) = match self.stage {
            Stage::Idle if past => {
                let begins = trigger.hold_for.is_zero();
                (
                    if begins {
                        active(now)
                    } else {
                        Stage::Pending { since: now }
                    },
                    None,
                )
            }
            Stage::Pending { since } if past && for_long(since, trigger.hold_for) => (active(now), None),
            Stage::Pending { since } if past => (Stage::Pending { since }, None),
            Stage::Idle | Stage::Pending { .. } => (Stage::Idle, None),
            Stage::Active { since, clearing } => {
                let clearing = still(clearing);
                let time_up = trigger.max_stay.filter(|max_stay| for_long(since, *max_stay));
                if cleared(clearing) && for_long(since, trigger.min_stay) {
                    (Stage::Idle, Some(Over::Cleared))
                } else if let Some(max_stay) = time_up {
                    (Stage::Spent { clearing }, Some(Over::TimeUp(max_stay)))
                } else {
                    (Stage::Active { since, clearing }, None)
                }
            }
            Stage::Spent { clearing } => {
                let clearing = still(clearing);
                let stage = if cleared(clearing) {
                    Stage::Idle
                } else {
                    Stage::Spent { clearing }
                };
                (stage, None)
            }
        };
        self.stage = next;
        over
    }

    fn saw(&self, reading: Option<Reading>) -> String {
        let signal = &self.trigger.signal;
        reading.map_or_else(
            || format!("nothing is seen of {}", signal.service()),
            |reading| reading.describe(signal),
        )
    }
}

const fn active(now: Instant) -> Stage {
    Stage::Active {
        since: now,
        clearing: None,
    }
}
