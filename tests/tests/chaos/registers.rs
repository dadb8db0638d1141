//! Each resource is a register with compare-and-swap, and its history linearisable: checked by the algorithm of Wing and Gong,
//! with Lowe's memory of what was tried, as the crate `todc-utils` has it.

use crate::check::{Verdict, written_by};
use crate::history::{Ask, Log, Name, Op, Outcome};
use std::collections::{BTreeMap, BTreeSet};
use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::{Action, History};
use todc_utils::specifications::Specification;

/// What one operation did to one resource, or saw of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// It became another, at this revision, having been at the expected one (0: at any).
    Put { revision: u64, expect: u64 },
    /// It went, likewise.
    Delete { revision: u64, expect: u64 },
    /// It was seen at this revision; 0: it was not there.
    Seen { revision: u64 },
}

struct Register;

impl Specification for Register {
    /// The revision of the last change, and whether the resource is there.
    type State = (u64, bool);
    type Operation = Step;

    fn init() -> Self::State {
        (0, false)
    }

    fn apply(step: &Step, &(last, is_there): &Self::State) -> (bool, Self::State) {
        let current = if is_there { last } else { 0 };
        match *step {
            Step::Put { revision, expect } => {
                let may = revision > last && (expect == 0 || expect == current);
                (may, (revision, true))
            }
            Step::Delete { revision, expect } => {
                let may = revision > last && is_there && (expect == 0 || expect == current);
                (may, (revision, false))
            }
            Step::Seen { revision } => (revision == current, (last, is_there)),
        }
    }
}

/// Where an operation is of no effect and saw nothing, it is left out; one whose answer was lost, and that the log has, may have
/// been done at any time after it was asked for. `first` is the revision at which the history begins.
pub fn registers(log: &Log, ops: &[Op], first: u64) -> Verdict {
    let revisions: BTreeMap<usize, u64> = written_by(log, ops)?
        .into_iter()
        .map(|(revision, op)| (op, revision))
        .collect();
    let mut steps: BTreeMap<&Name, Vec<(u64, u64, Step)>> = BTreeMap::new();
    let by_history: BTreeSet<u64> = revisions.values().copied().collect();
    // What was there at the beginning was put there at no time, but where who shares the lease was quicker than the beginning.
    for (revision, logged) in (1..first).zip(log) {
        if by_history.contains(&revision) {
            continue;
        }
        for (name, after) in &logged.changes {
            let step = match after {
                Some(_) => Step::Put { revision, expect: 0 },
                None => Step::Delete { revision, expect: 0 },
            };
            steps.entry(name).or_default().push((revision, revision, step));
        }
    }
    for (i, op) in ops.iter().enumerate() {
        let mut add = |name, step| steps.entry(name).or_default().push((op.begin, op.until(), step));
        let written = revisions.get(&i).copied();
        match (&op.ask, &op.outcome, written) {
            (_, Outcome::Conflict(name, revision), _) => add(name, Step::Seen { revision: *revision }),
            (Ask::Put { puts, .. }, _, Some(revision)) => {
                for put in puts {
                    add(
                        &put.name,
                        Step::Put {
                            revision,
                            expect: put.expect,
                        },
                    );
                }
            }
            (Ask::Delete { name, expect }, _, Some(revision)) => {
                add(
                    name,
                    Step::Delete {
                        revision,
                        expect: *expect,
                    },
                );
            }
            (Ask::Get { name } | Ask::Delete { name, .. }, Outcome::Found(seen), _) => {
                let revision = seen.as_ref().map_or(0, |(revision, _)| *revision);
                add(name, Step::Seen { revision });
            }
            _ => {}
        }
    }
    for (name, steps) in steps {
        if !linearizable(&steps) {
            return Err(format!(
                "{name} has a history that no order explains, up to: {:?}",
                up_to_fault(steps)
            ));
        }
    }
    tags(log, ops)
}

/// What was read at a revision is what was written there.
fn tags(log: &Log, ops: &[Op]) -> Verdict {
    for op in ops {
        let (Ask::Get { name }, Outcome::Found(Some((revision, tag)))) = (&op.ask, &op.outcome) else {
            continue;
        };
        let place = usize::try_from(*revision).unwrap().checked_sub(1);
        let there = place.and_then(|place| log.get(place)?.changes.get(name));
        if there != Some(&Some(tag.clone())) {
            return Err(format!("{op:?} is not what was written there: {there:?}"));
        }
    }
    Ok(())
}

/// The last steps of the shortest beginning that no order explains.
fn up_to_fault(mut steps: Vec<(u64, u64, Step)>) -> Vec<(u64, u64, Step)> {
    const SHOWN: usize = 12;
    steps.sort_by_key(|(begin, ..)| *begin);
    let count = (1..=steps.len()).find(|&count| !linearizable(&steps[..count]));
    steps.truncate(count.unwrap_or(steps.len()));
    steps.split_off(steps.len().saturating_sub(SHOWN))
}

fn linearizable(steps: &[(u64, u64, Step)]) -> bool {
    // What began when another ended is taken to be at the same time.
    let mut moments: Vec<(u64, bool, usize)> = Vec::new();
    for (i, (begin, end, _)) in steps.iter().enumerate() {
        moments.push((*begin, false, i));
        moments.push((*end, true, i));
    }
    moments.sort_unstable();
    if moments.is_empty() {
        return true;
    }
    let actions = moments.into_iter().map(|(_, is_end, i)| {
        let step = steps[i].2;
        (
            i,
            if is_end {
                Action::Response(step)
            } else {
                Action::Call(step)
            },
        )
    });
    WGLChecker::<Register>::is_linearizable(History::from_actions(actions.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Logged, Put};

    const fn put(revision: u64, expect: u64) -> Step {
        Step::Put { revision, expect }
    }

    const fn seen(revision: u64) -> Step {
        Step::Seen { revision }
    }

    #[test]
    fn a_read_sees_what_was_acknowledged_before_it() {
        let write = (0, 10, put(1, 0));
        let again = (20, 30, put(2, 1));
        assert!(linearizable(&[write, again, (40, 50, seen(2))]));
        assert!(
            linearizable(&[write, again, (25, 50, seen(1))]),
            "at the same time"
        );
        assert!(!linearizable(&[write, again, (40, 50, seen(1))]), "an old value");
        assert!(
            !linearizable(&[write, again, (12, 15, seen(2))]),
            "a value from the future"
        );
        assert!(!linearizable(&[write, (40, 50, seen(0))]), "a lost write");
        assert!(
            !linearizable(&[write, (25, 26, seen(2)), (27, 28, seen(1)), again]),
            "it went back"
        );
    }

    #[test]
    fn two_writers_that_expect_the_same_do_not_both_win() {
        let first = (0, 10, put(1, 0));
        assert!(linearizable(&[first, (20, 30, put(2, 1)), (20, 30, seen(2))]));
        assert!(!linearizable(&[first, (20, 30, put(2, 1)), (20, 30, put(3, 1))]));
        assert!(
            !linearizable(&[first, (20, 30, put(2, 7))]),
            "it expected what never was"
        );
    }

    #[test]
    fn what_is_deleted_is_gone() {
        let first = (0, 10, put(1, 0));
        let delete = (
            20,
            30,
            Step::Delete {
                revision: 2,
                expect: 1,
            },
        );
        assert!(linearizable(&[
            first,
            delete,
            (40, 50, seen(0)),
            (60, 70, put(3, 0))
        ]));
        assert!(!linearizable(&[first, delete, (40, 50, seen(1))]));
        assert!(!linearizable(&[first, delete, (40, 50, put(3, 1))]));
        assert!(!linearizable(&[delete]), "nothing to delete");
    }

    #[test]
    fn a_lost_answer_may_be_done_late_and_is_not_undone() {
        let first = (0, 10, put(1, 0));
        let lost = (20, u64::MAX, put(2, 0));
        assert!(linearizable(&[first, lost, (40, 50, seen(1)), (60, 70, seen(2))]));
        assert!(linearizable(&[first, lost]));
        assert!(!linearizable(&[
            first,
            lost,
            (40, 50, seen(2)),
            (60, 70, seen(1))
        ]));
        assert!(
            !linearizable(&[first, lost, (12, 15, seen(2))]),
            "before it was asked for"
        );
    }

    #[test]
    fn it_is_drawn_from_histories() {
        let name = "Service/a".to_owned();
        let log = vec![Logged {
            who: "w".to_owned(),
            fence: None,
            changes: [(name.clone(), Some("t".to_owned()))].into(),
        }];
        let op = |ask, outcome, (begin, end)| Op {
            who: "w".to_owned(),
            ask,
            outcome,
            begin,
            end,
        };
        let puts = vec![Put {
            name: name.clone(),
            expect: 0,
        }];
        let write = op(
            Ask::Put {
                tag: "t".to_owned(),
                puts,
            },
            Outcome::Done(1),
            (0, 10),
        );
        let get = |seen: Option<(u64, &str)>, times| {
            let seen = seen.map(|(revision, tag)| (revision, tag.to_owned()));
            op(Ask::Get { name: name.clone() }, Outcome::Found(seen), times)
        };
        registers(
            &log,
            &[write.clone(), get(Some((1, "t")), (20, 30)), get(None, (5, 30))],
            1,
        )
        .unwrap();
        registers(&log, &[write.clone(), get(None, (20, 30))], 1).unwrap_err();
        registers(&log, &[write.clone(), get(Some((1, "other")), (20, 30))], 1).unwrap_err();
        let conflict = |found, times| {
            let puts = vec![Put {
                name: name.clone(),
                expect: 9,
            }];
            let ask = Ask::Put {
                tag: "u".to_owned(),
                puts,
            };
            op(ask, Outcome::Conflict(name.clone(), found), times)
        };
        registers(&log, &[write.clone(), conflict(1, (20, 30))], 1).unwrap();
        registers(&log, &[write.clone(), conflict(0, (20, 30))], 1).unwrap_err();
        // What the history did before it is said to begin is no second write.
        registers(&log, &[write.clone(), get(Some((1, "t")), (20, 30))], 2).unwrap();
        let fault = registers(&log, &[write, get(None, (20, 30)), get(None, (40, 50))], 2).unwrap_err();
        assert!(fault.contains("20, 30") && !fault.contains("40, 50"), "{fault}");
    }
}
