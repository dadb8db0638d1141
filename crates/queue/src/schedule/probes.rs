//! Which entry is a gate's probe.

use super::*;
use leeward_resilience::Seeded;

const QUEUE: Queue = Queue {
    max_concurrency: 4,
    max_rate: 1_000_000,
    base_interval: Duration::from_millis(100),
    max_interval: Duration::from_secs(1),
    ..Queue::DEFAULT
};

/// Entries 1, 2 … of one service, with these keys.
fn schedule(keys: &[Option<&str>]) -> Schedule {
    let mut schedule = Schedule::default();
    for (seq, key) in (1..).zip(keys) {
        let row = Row {
            seq,
            id: EntryId::of_bytes([0; 16]),
            service: "payment".into(),
            key: key.map(Arc::from),
            attempts: 0,
            since_ms: 1,
            due_ms: 0,
        };
        schedule.add(row, 1, &QUEUE);
    }
    schedule
}

/// What is sent next, once it is time.
fn send(schedule: &mut Schedule, now_ms: &mut u64) -> Sending {
    for _ in 0..10 {
        match schedule.next(*now_ms, *now_ms * 1_000_000, &QUEUE) {
            Next::Send(sending) => return sending,
            Next::Wait(until_ms) => {
                assert_ne!(until_ms, u64::MAX, "it waits for nothing");
                *now_ms = until_ms.max(*now_ms + 1);
            }
        }
    }
    panic!("nothing is sent")
}

#[test]
fn each_probe_is_another_entry_in_turn_and_order_within_keys_stays() {
    let mut schedule = schedule(&[Some("a"), Some("a"), Some("b"), None]);
    let (mut now_ms, mut draw) = (1, Seeded(1));
    let mut sent = Vec::new();
    for _ in 0..7 {
        let sending = send(&mut schedule, &mut now_ms);
        sent.push(sending.seq);
        schedule.missed(&sending, None, &QUEUE, now_ms, &mut draw);
    }
    assert_eq!(sent, [1, 3, 4, 1, 3, 4, 1]);
}

#[test]
fn one_that_never_gets_through_holds_only_its_key_back() {
    let mut keys = vec![Some("a"), Some("a")];
    keys.resize(50, None);
    let mut schedule = schedule(&keys);
    let (mut now_ms, mut draw) = (1, Seeded(1));
    let mut missed = 0;
    while schedule.len() > 2 {
        let sending = send(&mut schedule, &mut now_ms);
        if sending.seq == 1 {
            missed += 1;
            assert!(missed <= 24, "{missed} pauses, and {} left", schedule.len());
            schedule.missed(&sending, None, &QUEUE, now_ms, &mut draw);
        } else {
            schedule.reached(&sending, &QUEUE);
            schedule.end(sending.seq, now_ms);
        }
    }
    assert_eq!(
        send(&mut schedule, &mut now_ms).seq,
        1,
        "before the second of its key"
    );
}

#[test]
fn what_was_not_sent_before_an_open_gate_goes_first() {
    let mut schedule = schedule(&[None; 6]);
    let (mut now_ms, mut draw) = (1, Seeded(1));
    let first = [(); 4].map(|()| send(&mut schedule, &mut now_ms));
    for sending in &first {
        schedule.missed(sending, None, &QUEUE, now_ms, &mut draw);
    }
    let probe = send(&mut schedule, &mut now_ms);
    assert_eq!(probe.seq, 2, "after the one that closed it");
}

#[test]
fn a_probe_that_could_not_be_read_leaves_the_next_its_turn() {
    let mut schedule = schedule(&[None, None]);
    let (mut now_ms, mut draw) = (1, Seeded(1));
    let sending = send(&mut schedule, &mut now_ms);
    schedule.missed(&sending, None, &QUEUE, now_ms, &mut draw);
    let probe = send(&mut schedule, &mut now_ms);
    assert_eq!(probe.seq, 2);
    schedule.spoilt(&probe);
    assert!(schedule.is_under_way(2), "until its end is written down");
    schedule.end(2, now_ms);
    assert_eq!(send(&mut schedule, &mut now_ms).seq, 1);
}
