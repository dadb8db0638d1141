//! The checkers. Each takes a history, and says what is wrong with it.

use crate::history::{Ask, Batch, Log, Logged, Name, Op, Outcome, Replay};
use std::collections::{BTreeMap, BTreeSet};

/// What is wrong.
pub type Verdict = Result<(), String>;

/// Which operation wrote each revision, if one of the history did: found by tags, which are unique, and for deletes by who
/// deleted what.
pub fn written_by(log: &Log, ops: &[Op]) -> Result<BTreeMap<u64, usize>, String> {
    let mut by_tag = BTreeMap::new();
    let mut deletes: BTreeMap<(&str, &Name), Vec<usize>> = BTreeMap::new();
    let mut acknowledged = BTreeMap::new();
    for (i, op) in ops.iter().enumerate() {
        match (&op.ask, &op.outcome) {
            (Ask::Put { tag, .. }, _) if by_tag.insert(tag, i).is_some() => {
                return Err(format!("the tag {tag} was used twice: the test is at fault"));
            }
            (Ask::Delete { .. }, Outcome::Done(revision)) => drop(acknowledged.insert(*revision, i)),
            (Ask::Delete { name, .. }, Outcome::Unknown) => {
                deletes.entry((&op.who, name)).or_default().push(i);
            }
            _ => {}
        }
    }
    deletes
        .values_mut()
        .for_each(|of| of.sort_by_key(|&i| ops[i].begin));
    let (mut writers, mut used) = (BTreeMap::new(), BTreeSet::new());
    let mut lost = Vec::new();
    let mut before = Replay::default();
    for (revision, logged) in (1..).zip(log) {
        let tags: BTreeSet<&String> = logged.changes.values().flatten().collect();
        let deleted = logged.changes.iter().filter(|(_, after)| after.is_none());
        let deleted: Vec<&Name> = deleted.map(|(name, _)| name).collect();
        let writer = match (&tags.iter().collect::<Vec<_>>()[..], &deleted[..]) {
            ([tag], []) => by_tag.get(**tag).copied(),
            ([], [name]) => match acknowledged.get(&revision) {
                Some(&writer) => Some(writer),
                None => {
                    let there = before.state.get(*name).map_or(0, |(revision, _)| *revision);
                    let candidates = deletes.get_mut(&(&*logged.who, *name));
                    let found = candidates.and_then(|candidates| lost_delete(candidates, ops, there));
                    lost.push((revision, (&*logged.who, *name), there));
                    Some(found.ok_or_else(|| {
                        format!("revision {revision} deletes {name} at {there}, and nobody asked for it")
                    })?)
                }
            },
            other => {
                return Err(format!(
                    "revision {revision} is of no write that there was: {other:?}"
                ));
            }
        };
        before.to(revision, log);
        // What nobody of the history wrote may be from before it.
        let Some(writer) = writer else { continue };
        if !used.insert(writer) {
            return Err(format!(
                "revision {revision} was written before: {:?}",
                ops[writer]
            ));
        }
        writers.insert(revision, writer);
    }
    // One that nothing is left for may have done it, earlier.
    for (revision, whose, there) in lost {
        let (Some(candidates), Some(writer)) = (deletes.get_mut(&whose), writers.get_mut(&revision)) else {
            continue;
        };
        let earlier = candidates.iter_mut().find(|candidate| {
            let op = &ops[**candidate];
            op.begin < ops[*writer].begin && may_delete(op, there)
        });
        if let Some(earlier) = earlier {
            std::mem::swap(earlier, writer);
        }
    }
    Ok(writers)
}

/// Whether a delete was of what is at a revision.
fn may_delete(op: &Op, there: u64) -> bool {
    matches!(op.ask, Ask::Delete { expect, .. } if expect == 0 || expect == there)
}

/// Takes the one out of several deletes with lost answers, in the order in which they were asked for, that deleted what was at a
/// revision: one that expected this can have deleted nothing else; else the one asked first, which may have been done the earliest.
fn lost_delete(candidates: &mut Vec<usize>, ops: &[Op], there: u64) -> Option<usize> {
    let expecting = |wanted: u64| {
        candidates
            .iter()
            .position(|&i| matches!(ops[i].ask, Ask::Delete { expect, .. } if expect == wanted))
    };
    let place = expecting(there).or_else(|| expecting(0))?;
    Some(candidates.remove(place))
}

/// Every acknowledged write is in the log once, at the revision that was said; what was refused isn't; what nobody knows of
/// is at most once. `first` is the revision at which the history begins.
pub fn log(log: &Log, ops: &[Op], first: u64) -> Verdict {
    let writers = written_by(log, ops)?;
    let revisions: BTreeMap<usize, u64> = writers.iter().map(|(revision, op)| (*op, *revision)).collect();
    for (i, op) in ops.iter().enumerate() {
        let there = revisions.get(&i).copied();
        let names: BTreeSet<&Name> = match &op.ask {
            Ask::Put { puts, .. } => puts.iter().map(|put| &put.name).collect(),
            Ask::Delete { name, .. } => [name].into(),
            Ask::Get { .. } | Ask::List => continue,
        };
        match &op.outcome {
            Outcome::Done(revision) if there != Some(*revision) => {
                return Err(format!(
                    "an acknowledged write is lost, or elsewhere ({there:?}): {op:?}"
                ));
            }
            Outcome::Refused | Outcome::Conflict(..) | Outcome::Found(_) if there.is_some() => {
                return Err(format!("a write that was refused is at {there:?}: {op:?}"));
            }
            _ => {}
        }
        if let Some(revision) = there {
            let logged = &log[usize::try_from(revision).unwrap() - 1];
            if logged.changes.keys().collect::<BTreeSet<_>>() != names {
                return Err(format!(
                    "{revision} is {logged:?}, in part only what was asked: {op:?}"
                ));
            }
        }
    }
    for revision in first..=log.len() as u64 {
        if !writers.contains_key(&revision) {
            return Err(format!("nobody asked for revision {revision}"));
        }
    }
    Ok(())
}

/// The counter of revisions is linearisable: writes take the next number each, lists see it. Each operation says which value
/// it saw, so that there is one order they could have been done in, and it must agree with the order in time.
pub fn revisions(log: &Log, ops: &[Op]) -> Verdict {
    let writers = written_by(log, ops)?;
    let mut order: Vec<((u64, bool), &Op)> = writers
        .iter()
        .map(|(revision, op)| ((*revision, false), &ops[*op]))
        .collect();
    let lists = ops.iter().filter_map(|op| match op.outcome {
        // After the write of the same number.
        Outcome::Listed(revision, _) => Some(((revision, true), op)),
        _ => None,
    });
    order.extend(lists);
    order.sort_by_key(|(rank, _)| *rank);
    // The operation before this one that began last.
    let mut latest: Option<((u64, bool), &Op)> = None;
    for group in order.chunk_by(|a, b| a.0 == b.0) {
        for (rank, op) in group {
            if let Some((other_rank, other)) = latest
                && op.until() < other.begin
            {
                return Err(format!(
                    "{op:?} ended before {other:?} began, and comes after it: {rank:?}, {other_rank:?}"
                ));
            }
        }
        let last = group.iter().max_by_key(|(_, op)| op.begin);
        if let Some(last) = last
            && latest.is_none_or(|(_, op)| op.begin < last.1.begin)
        {
            latest = Some(*last);
        }
    }
    Ok(())
}

/// What lists showed is what the log says there was at their revision.
pub fn lists(log: &Log, ops: &[Op]) -> Verdict {
    let mut lists: Vec<_> = ops
        .iter()
        .filter_map(|op| match &op.outcome {
            Outcome::Listed(revision, shown) => Some((*revision, shown)),
            _ => None,
        })
        .collect();
    lists.sort_by_key(|(revision, _)| *revision);
    let mut replay = Replay::default();
    for (revision, shown) in lists {
        replay.to(revision, log);
        if replay.revision != revision {
            return Err(format!(
                "a list shows revision {revision}, and the last is {}",
                log.len()
            ));
        }
        if *shown != replay.state {
            return Err(format!(
                "at {revision} a list shows {shown:?}, and there was {:?}",
                replay.state
            ));
        }
    }
    Ok(())
}

/// A watch told all that changed, in order: between two revisions the last change of each resource, and nothing else.
pub fn watch(log: &Log, batches: &[Batch]) -> Verdict {
    let mut at = batches.first().map_or(0, |first| first.after);
    for batch in batches {
        if batch.after != at || batch.to < at {
            return Err(format!(
                "a watch goes from {at} to {} and {}",
                batch.after, batch.to
            ));
        }
        at = batch.to;
        let (from, to) = (
            usize::try_from(batch.after).unwrap(),
            usize::try_from(batch.to).unwrap(),
        );
        let Some(between) = log.get(from..to) else {
            return Err(format!(
                "a watch is at {to}, and the last revision is {}",
                log.len()
            ));
        };
        let mut last = BTreeMap::new();
        for (revision, logged) in (batch.after + 1..).zip(between) {
            for (name, after) in &logged.changes {
                last.insert(name.clone(), (revision, after.clone()));
            }
        }
        let mut wanted: Vec<_> = last
            .into_iter()
            .map(|(name, (revision, after))| (revision, name, after))
            .collect();
        wanted.sort();
        let mut told = batch.events.clone();
        if !told.is_sorted_by_key(|(revision, _, _)| *revision) {
            return Err(format!("not in order: {told:?}"));
        }
        told.sort();
        if told != wanted {
            return Err(format!(
                "from {from} to {to} a watch told {told:?}, and there was {wanted:?}"
            ));
        }
    }
    Ok(())
}

/// What was written under a lease was written by one holder after another: tokens never go down.
pub fn fences(log: &Log) -> Verdict {
    let mut last: Option<(u64, u64)> = None;
    for (revision, logged) in (1_u64..).zip(log) {
        let Logged {
            fence: Some(fence), ..
        } = logged
        else {
            continue;
        };
        if let Some((before, at)) = last
            && before > *fence
        {
            return Err(format!(
                "revision {revision} was written with token {fence}, after {at} with {before}"
            ));
        }
        last = Some((*fence, revision));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Put;

    fn op(who: &str, ask: Ask, outcome: Outcome, (begin, end): (u64, u64)) -> Op {
        Op {
            who: who.to_owned(),
            ask,
            outcome,
            begin,
            end,
        }
    }

    fn put(tag: &str, outcome: Outcome, times: (u64, u64)) -> Op {
        let puts = vec![Put {
            name: "Service/a".to_owned(),
            expect: 0,
        }];
        op(
            "w",
            Ask::Put {
                tag: tag.to_owned(),
                puts,
            },
            outcome,
            times,
        )
    }

    fn delete(outcome: Outcome, times: (u64, u64)) -> Op {
        op(
            "w",
            Ask::Delete {
                name: "Service/a".to_owned(),
                expect: 0,
            },
            outcome,
            times,
        )
    }

    fn logged(after: Option<&str>) -> Logged {
        Logged {
            who: "w".to_owned(),
            fence: None,
            changes: [("Service/a".to_owned(), after.map(str::to_owned))].into(),
        }
    }

    fn list(revision: u64, shown: &[(&str, u64, &str)], times: (u64, u64)) -> Op {
        let shown = shown
            .iter()
            .map(|(name, revision, tag)| ((*name).to_owned(), (*revision, (*tag).to_owned())));
        op("r", Ask::List, Outcome::Listed(revision, shown.collect()), times)
    }

    fn says(verdict: Verdict, words: &str) {
        let error = verdict.unwrap_err();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn a_good_log_is_one() {
        let ops = [
            put("1", Outcome::Done(1), (0, 5)),
            put("2", Outcome::Unknown, (6, 7)),
            put("3", Outcome::Unknown, (8, 9)),
            put("4", Outcome::Refused, (10, 11)),
            delete(Outcome::Unknown, (12, 13)),
            delete(Outcome::Done(3), (14, 15)),
        ];
        let lines = vec![logged(Some("1")), logged(Some("3")), logged(None)];
        log(&lines, &ops, 1).unwrap();
        revisions(&lines, &ops).unwrap();
    }

    #[test]
    fn what_was_lost_done_twice_or_done_though_refused_is_seen() {
        let lines = vec![logged(Some("1")), logged(Some("2"))];
        let one = put("1", Outcome::Done(1), (0, 1));
        let two = put("2", Outcome::Done(2), (2, 3));
        log(&lines, &[one.clone(), two.clone()], 1).unwrap();
        says(
            log(&lines[..1].to_vec(), &[one.clone(), two.clone()], 1),
            "is lost",
        );
        let swapped = vec![logged(Some("2")), logged(Some("1"))];
        says(
            log(&swapped, &[one.clone(), two.clone()], 1),
            "elsewhere (Some(2))",
        );
        let twice = vec![logged(Some("1")), logged(Some("2")), logged(Some("2"))];
        says(log(&twice, &[one.clone(), two], 1), "was written before");
        let refused = put("2", Outcome::Refused, (2, 3));
        says(log(&lines, &[one.clone(), refused], 1), "was refused is at");
        // Nobody's tag, and nobody's delete.
        says(
            log(&lines, std::slice::from_ref(&one), 1),
            "nobody asked for revision 2",
        );
        let deleted = vec![logged(Some("1")), logged(None)];
        says(
            log(&deleted, std::slice::from_ref(&one), 1),
            "nobody asked for it",
        );
        // One that nobody knows of was done twice.
        let unknown = delete(Outcome::Unknown, (2, 3));
        let deleted = vec![logged(Some("1")), logged(None), logged(None)];
        says(log(&deleted, &[one, unknown], 1), "nobody asked for it");
    }

    #[test]
    fn deletes_with_lost_answers_are_told_apart_by_what_they_expected() {
        let lost = |expect, times| {
            let name = "Service/a".to_owned();
            op("w", Ask::Delete { name, expect }, Outcome::Unknown, times)
        };
        let one = put("1", Outcome::Done(1), (0, 1));
        let lines = vec![logged(Some("1")), logged(None)];
        // The first expected what is not there any more.
        let ops = [one.clone(), lost(7, (2, 3)), lost(1, (4, 5))];
        assert_eq!(written_by(&lines, &ops).unwrap()[&2], 2);
        let ops = [one.clone(), lost(7, (2, 3)), lost(0, (4, 5))];
        assert_eq!(written_by(&lines, &ops).unwrap()[&2], 2);
        let ops = [one.clone(), lost(0, (2, 3)), lost(0, (4, 5))];
        assert_eq!(written_by(&lines, &ops).unwrap()[&2], 1);
        says(
            log(&lines, &[one.clone(), lost(7, (2, 3))], 1),
            "nobody asked for it",
        );
        // Who didn't say what to expect was earlier, and may have done it; but not where nobody else did the next.
        let ops = [
            one,
            lost(0, (2, 3)),
            lost(1, (4, 5)),
            put("2", Outcome::Done(3), (6, 7)),
        ];
        assert_eq!(written_by(&lines, &ops[..3]).unwrap()[&2], 1);
        let lines = [lines, vec![logged(Some("2")), logged(None)]].concat();
        let writers = written_by(&lines, &ops).unwrap();
        assert_eq!((writers[&2], writers[&4]), (2, 1));
    }

    #[test]
    fn a_write_in_part_is_seen() {
        let puts = ["Service/a", "Service/b"].map(|name| Put {
            name: name.to_owned(),
            expect: 0,
        });
        let both = Ask::Put {
            tag: "1".to_owned(),
            puts: puts.to_vec(),
        };
        let ops = [op("w", both, Outcome::Unknown, (0, 1))];
        says(log(&vec![logged(Some("1"))], &ops, 1), "in part");
    }

    #[test]
    fn numbers_that_go_back_in_time_are_seen() {
        let lines = vec![logged(Some("1")), logged(Some("2"))];
        let one = put("1", Outcome::Done(1), (10, 11));
        let two = put("2", Outcome::Done(2), (5, 6));
        says(revisions(&lines, &[one.clone(), two]), "ended before");
        // Neither may a list show less than was acknowledged before it began, nor what comes only later.
        let two = put("2", Outcome::Done(2), (20, 30));
        revisions(&lines, &[one.clone(), two.clone(), list(1, &[], (21, 22))]).unwrap();
        revisions(&lines, &[one.clone(), two.clone(), list(2, &[], (21, 22))]).unwrap();
        says(
            revisions(&lines, &[one.clone(), two.clone(), list(1, &[], (31, 32))]),
            "ended before",
        );
        says(
            revisions(&lines, &[one.clone(), two.clone(), list(2, &[], (15, 16))]),
            "ended before",
        );
        // Two lists, of which the second goes back.
        let lists = [list(2, &[], (21, 22)), list(1, &[], (23, 24))];
        says(
            revisions(&lines, &[vec![one.clone(), two], lists.to_vec()].concat()),
            "ended before",
        );
        // One whose answer was lost may be done late, and not before it was asked for.
        let late = put("2", Outcome::Unknown, (0, 1));
        revisions(&lines, &[one.clone(), late, list(1, &[], (40, 41))]).unwrap();
        let early = put("2", Outcome::Unknown, (50, 51));
        says(
            revisions(&lines, &[one, early, list(2, &[], (40, 41))]),
            "ended before",
        );
    }

    #[test]
    fn a_list_of_what_was_not_there_is_seen() {
        let lines = vec![logged(Some("1")), logged(Some("2")), logged(None)];
        let good = [
            list(1, &[("Service/a", 1, "1")], (0, 0)),
            list(2, &[("Service/a", 2, "2")], (0, 0)),
            list(3, &[], (0, 0)),
        ];
        lists(&lines, &good).unwrap();
        for bad in [
            list(2, &[("Service/a", 1, "1")], (0, 0)),
            list(3, &[("Service/a", 2, "2")], (0, 0)),
            list(1, &[], (0, 0)),
        ] {
            says(lists(&lines, &[bad]), "a list shows");
        }
        says(lists(&lines, &[list(4, &[], (0, 0))]), "the last is 3");
    }

    #[test]
    fn a_watch_with_gaps_or_out_of_order_is_seen() {
        let mut other = logged(Some("2"));
        other.changes = [("Service/b".to_owned(), Some("2".to_owned()))].into();
        let lines = vec![logged(Some("1")), other, logged(Some("3")), logged(None)];
        let event =
            |revision, name: &str, tag: Option<&str>| (revision, name.to_owned(), tag.map(str::to_owned));
        let batch = |after, to, events: &[_]| Batch {
            after,
            to,
            events: events.to_vec(),
        };
        let (one, two, three) = (
            event(1, "Service/a", Some("1")),
            event(2, "Service/b", Some("2")),
            event(3, "Service/a", Some("3")),
        );
        let end = event(4, "Service/a", None);
        watch(
            &lines,
            &[
                batch(0, 1, std::slice::from_ref(&one)),
                batch(1, 4, &[two.clone(), end]),
            ],
        )
        .unwrap();
        // The first change of a resource may be left out once the second is told.
        watch(&lines, &[batch(0, 3, &[two.clone(), three.clone()])]).unwrap();
        says(
            watch(&lines, &[batch(0, 3, &[three.clone(), two.clone()])]),
            "not in order",
        );
        says(
            watch(&lines, &[batch(0, 3, std::slice::from_ref(&three))]),
            "a watch told",
        );
        says(
            watch(&lines, &[batch(0, 3, &[one.clone(), two.clone(), three.clone()])]),
            "a watch told",
        );
        says(
            watch(&lines, &[batch(0, 1, &[one]), batch(2, 3, &[three])]),
            "goes from 1",
        );
        says(watch(&lines, &[batch(0, 9, &[two])]), "the last revision is 4");
    }

    #[test]
    fn a_holder_that_acts_after_the_next_is_seen() {
        let with = |fence| Logged {
            fence,
            ..logged(Some("1"))
        };
        fences(&vec![with(Some(3)), with(None), with(Some(3)), with(Some(7))]).unwrap();
        says(
            fences(&vec![with(Some(3)), with(Some(7)), with(None), with(Some(3))]),
            "token 3, after 2 with 7",
        );
    }
}
