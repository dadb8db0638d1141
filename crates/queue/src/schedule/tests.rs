//! The schedule with time as an argument.

use super::*;
use leeward_resilience::Seeded;
use proptest::prelude::*;

const QUEUE: Queue = Queue {
    base_interval: Duration::from_millis(100),
    max_interval: Duration::from_secs(1),
    max_rate: 1_000_000,
    max_concurrency: 4,
    max_age: Duration::from_secs(60),
    ..Queue::DEFAULT
};

/// A time to begin at, far from 0.
const T: u64 = 1_000_000;

fn row(seq: u64, service: &str, key: Option<&str>) -> Row {
    Row {
        seq,
        id: EntryId::of_bytes(u128::from(seq).to_be_bytes()),
        service: service.into(),
        key: key.map(Arc::from),
        attempts: 0,
        since_ms: T,
        due_ms: 0,
    }
}

fn filled(rows: impl IntoIterator<Item = Row>) -> Schedule {
    let mut schedule = Schedule::default();
    for row in rows {
        schedule.add(row, T, &QUEUE);
    }
    schedule
}

/// All that may be sent at this time.
fn all(schedule: &mut Schedule, now_ms: u64) -> Vec<Sending> {
    let mut all = Vec::new();
    while let Next::Send(sending) = schedule.next(now_ms, now_ms * 1_000_000, &QUEUE) {
        all.push(sending);
    }
    all
}

fn seqs(sendings: &[Sending]) -> Vec<u64> {
    sendings.iter().map(|s| s.seq).collect()
}

fn wait(schedule: &mut Schedule, now_ms: u64) -> u64 {
    match schedule.next(now_ms, now_ms * 1_000_000, &QUEUE) {
        Next::Wait(until) => until,
        Next::Send(sending) => panic!("{sending:?}"),
    }
}

#[test]
fn a_key_is_sent_one_after_the_other_and_others_beside_it() {
    let mut schedule = filled([
        row(1, "a", Some("k")),
        row(2, "a", Some("k")),
        row(3, "a", None),
        row(4, "a", Some("l")),
    ]);
    let first = all(&mut schedule, T);
    assert_eq!(seqs(&first), [1, 3, 4]);
    schedule.reached(&first[0], &QUEUE);
    schedule.end(1, T);
    assert_eq!(seqs(&all(&mut schedule, T)), [2]);
}

#[test]
fn a_head_that_pauses_holds_its_key_back_and_nobody_else() {
    let mut schedule = filled([row(1, "a", Some("k")), row(2, "a", Some("k")), row(3, "a", None)]);
    assert_eq!(seqs(&all(&mut schedule, T)), [1, 3]);
    schedule.again(1, 1, T + 500, T);
    schedule.end(3, T);
    assert_eq!(wait(&mut schedule, T + 499), T + 500);
    let again = all(&mut schedule, T + 500);
    assert_eq!(seqs(&again), [1]);
    assert_eq!((again[0].attempts, again[0].failures), (1, 1));
    // Dead, it lets the next go on.
    schedule.end(1, T + 500);
    assert_eq!(seqs(&all(&mut schedule, T + 500)), [2]);
}

#[test]
fn services_take_turns() {
    let mut schedule = filled([
        row(1, "a", None),
        row(2, "a", None),
        row(3, "b", None),
        row(4, "c", None),
    ]);
    assert_eq!(seqs(&all(&mut schedule, T)), [1, 3, 4, 2]);
}

#[test]
fn a_service_that_is_away_does_not_hold_up_another() {
    let mut schedule = filled([row(1, "a", None), row(2, "a", None), row(3, "b", None)]);
    let mut draw = Seeded(1);
    for sending in all(&mut schedule, T) {
        if sending.seq == 3 {
            schedule.reached(&sending, &QUEUE);
            schedule.end(3, T);
        } else {
            schedule.missed(&sending, None, &QUEUE, T, &mut draw);
        }
    }
    let until = wait(&mut schedule, T);
    assert!((T + 50..=T + 101).contains(&until), "{}", until - T);
    schedule.add(row(4, "b", None), T, &QUEUE);
    assert_eq!(seqs(&all(&mut schedule, T)), [4]);
    // One probe, the next in turn, and then more as they get through.
    let probe = all(&mut schedule, until);
    assert_eq!(seqs(&probe), [2]);
    schedule.reached(&probe[0], &QUEUE);
    schedule.end(2, until);
    assert_eq!(seqs(&all(&mut schedule, until)), [1]);
}

#[test]
fn no_more_are_under_way_than_policy_allows() {
    let mut schedule = filled((1..=10).map(|seq| row(seq, "a", None)));
    let four = all(&mut schedule, T);
    assert_eq!(four.len(), 4);
    assert_eq!(wait(&mut schedule, T), u64::MAX);
    schedule.end(four[0].seq, T);
    assert_eq!(all(&mut schedule, T).len(), 1);
}

#[test]
fn the_rate_is_kept_and_changes_with_policy() {
    let slow = Queue {
        max_rate: 10,
        max_concurrency: 1000,
        ..QUEUE
    };
    let mut schedule = filled((1..=100).map(|seq| row(seq, "a", None)));
    let (mut sent, mut now) = (0, T);
    while now < T + 2000 {
        match schedule.next(now, now * 1_000_000, &slow) {
            Next::Send(_) => sent += 1,
            Next::Wait(until) => now = until,
        }
    }
    assert_eq!(sent, 20);
    let fast = Queue {
        max_rate: 1_000_000,
        ..slow
    };
    assert!(matches!(
        schedule.next(now, now * 1_000_000, &fast),
        Next::Send(_)
    ));
}

#[test]
fn what_is_too_old_comes_out_once_wherever_it_waits() {
    let mut schedule = filled([
        row(1, "a", Some("k")),
        row(2, "a", Some("k")),
        row(3, "a", None),
        Row {
            due_ms: T + 90_000,
            ..row(4, "a", None)
        },
    ]);
    let under_way = schedule.next(T, T, &QUEUE);
    assert!(matches!(under_way, Next::Send(Sending { seq: 1, .. })));
    assert_eq!(schedule.expires_at(&QUEUE), T + 60_000);
    assert!(schedule.expired(T + 59_999, &QUEUE).is_none());
    let mut expired = Vec::new();
    while let Some((seq, ..)) = schedule.expired(T + 60_000, &QUEUE) {
        expired.push(seq);
    }
    // What is under way is let be.
    assert_eq!(expired, [2, 3, 4]);
    for seq in expired {
        schedule.end(seq, T + 60_000);
    }
    assert_eq!(schedule.len(), 1);
    schedule.end(1, T + 60_000);
    assert_eq!(schedule.len(), 0);
    assert!(schedule.services.is_empty() && schedule.keys.is_empty() && schedule.ages.is_empty());
}

#[test]
fn a_pause_from_a_clock_that_went_ahead_ends() {
    let ahead = Row {
        due_ms: u64::MAX,
        ..row(1, "a", None)
    };
    let mut schedule = filled([ahead]);
    assert_eq!(wait(&mut schedule, T), T + 3_600_000);
}

proptest! {
    /// Whatever is done, in whatever order: one of a key at a time, in order, no more than allowed, and what is
    /// neither ended nor given out is given out in the end.
    #[test]
    fn nothing_is_forgotten_and_no_order_broken(
        entries in proptest::collection::vec((0u8..3, proptest::option::of(0u8..4)), 1..60),
        steps in proptest::collection::vec((0usize..4, 0u8..5, 0u64..300), 0..200),
        seed: u64,
    ) {
        let mut draw = Seeded(seed);
        let rows = entries.iter().zip(1..).map(|((service, key), seq)| {
            row(seq, &format!("s{service}"), key.map(|k| format!("k{k}")).as_deref())
        });
        let rows: Vec<Row> = rows.collect();
        let mut schedule = filled(rows.clone());
        let (mut flying, mut ended, mut now) = (Vec::<Sending>::new(), BTreeSet::new(), T);
        let drain = std::iter::repeat_n((0, 0, 1000), 40 * rows.len());
        for (which, what, later) in steps.into_iter().chain(drain) {
            now += later;
            while let Next::Send(sending) = schedule.next(now, now * 1_000_000, &QUEUE) {
                let key = &rows[usize::try_from(sending.seq).unwrap() - 1].key;
                prop_assert!(!ended.contains(&sending.seq));
                prop_assert!(schedule.is_under_way(sending.seq));
                if key.is_some() {
                    let before = rows.iter().filter(|r| r.key == *key && r.seq < sending.seq);
                    prop_assert!(before.clone().all(|r| ended.contains(&r.seq)), "{} too early", sending.seq);
                }
                flying.push(sending);
                prop_assert!(flying.len() <= 4);
            }
            if flying.is_empty() {
                continue;
            }
            let sending = flying.remove(which % flying.len());
            match what {
                0 | 1 => {
                    schedule.reached(&sending, &QUEUE);
                    schedule.end(sending.seq, now);
                    ended.insert(sending.seq);
                }
                2 => {
                    schedule.reached(&sending, &QUEUE);
                    schedule.again(sending.seq, sending.attempts + 1, now + later, now);
                }
                3 => schedule.missed(&sending, None, &QUEUE, now, &mut draw),
                _ => schedule.unused(&sending, now + later, now),
            }
        }
        prop_assert_eq!(ended.len(), rows.len());
        prop_assert_eq!(schedule.len(), 0);
        prop_assert!(schedule.services.is_empty() && schedule.keys.is_empty());
        prop_assert!(schedule.ages.is_empty() && schedule.pausing.is_empty());
        prop_assert_eq!(schedule.under_way, 0);
    }
}
