//! What a path takes, by how long packets were on their way and how many of them were lost.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is known of a path. It has no clock of its own.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    /// The shortest round trip there was.
    least: Option<Duration>,
    /// The shortest of each of the last rounds, the newest first.
    rounds: VecDeque<Duration>,
    now: Option<Round>,
    /// Bytes lately, older ones counting less.
    acked: u64,
    lost: u64,
    /// Of the largest packet.
    packet: u64,
}

/// What was acknowledged within one round trip.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Instant,
    /// The shortest that a packet took: shortest, since a queue delays every packet, and a busy machine only some.
    least: Duration,
    packets: u32,
}

/// Share of lost bytes from which on loss is congestion, in percent: from there on PCC Allegro's senders slow down as well
/// (Dong et al., NSDI 2015, section 4.1).
const LOSS_PERCENT: u64 = 5;
/// What is counted is halved when it has come to so many packets of the largest size.
const REMEMBER: u64 = 400;
/// What a connection begins with, so that one of its first packets lost is not yet a large share.
const HEAD_START: u64 = REMEMBER / 4;
/// The largest packet before it is known what the way takes (RFC 9000, section 14).
const FIRST_PACKET: u64 = 1200;
/// A queue is what makes the shortest round trip of a round longer than the path's by an eighth of that, within these
/// bounds. It is how HyStart++ tells one (RFC 9406, section 4.3); less is what a busy machine does.
const QUEUE_PART: u32 = 8;
const LEAST_QUEUE: Duration = Duration::from_millis(4);
const MOST_QUEUE: Duration = Duration::from_millis(16);
/// A queue that overflows has been there for so many rounds; a busy machine keeps everything waiting for fewer, mostly.
const QUEUE_ROUNDS: usize = 4;
/// Whoever has fewer packets acknowledged in a round has not filled a path, and may have been told late: the peer keeps the
/// acknowledgement of a single one for up to 25 ms (max_ack_delay, RFC 9000, section 18.2).
const FEW: u32 = 4;
/// On a path that is shorter than this every loss counts: the buffers of fast switches are full before a queue of
/// [`LEAST_QUEUE`] has built up, and to wait for what was lost costs little.
const SHORT: Duration = Duration::from_millis(5);

impl Default for Path {
    fn default() -> Self {
        Self {
            least: None,
            rounds: VecDeque::with_capacity(QUEUE_ROUNDS),
            now: None,
            acked: HEAD_START * FIRST_PACKET,
            lost: 0,
            packet: FIRST_PACKET,
        }
    }
}

impl Path {
    /// A packet was acknowledged, after so long or up to so much `later`. `rtt` is the usual round trip, which rounds are as long
    /// as.
    pub(crate) fn acked(&mut self, now: Instant, took: Duration, later: Duration, bytes: u64, rtt: Duration) {
        self.count(bytes, 0);
        // One that is shorter than the path would make all that come look as if they had queued.
        let took_at_most = took.saturating_add(later);
        self.least = Some(self.least.map_or(took_at_most, |least| least.min(took_at_most)));
        let mut round = match self.now.take() {
            Some(round) if now < round.began + rtt => round,
            ended => {
                self.end_round(ended, now, rtt);
                Round {
                    began: now,
                    least: took,
                    packets: 0,
                }
            }
        };
        round.least = round.least.min(took);
        round.packets = round.packets.saturating_add(1);
        self.now = Some(round);
    }

    /// Packets are of up to so many bytes from now on. What was counted is as many packets as it was.
    pub(crate) fn packets_of(&mut self, bytes: u64) {
        self.acked = self.acked.saturating_mul(bytes) / self.packet;
        self.lost = self.lost.saturating_mul(bytes) / self.packet;
        self.packet = bytes.max(1);
    }

    /// Bytes were lost.
    pub(crate) fn lost(&mut self, bytes: u64) {
        self.count(0, bytes);
    }

    fn count(&mut self, acked: u64, lost: u64) {
        self.acked += acked;
        self.lost += lost;
        if self.acked + self.lost > REMEMBER * self.packet {
            self.acked /= 2;
            self.lost /= 2;
        }
    }

    fn end_round(&mut self, ended: Option<Round>, now: Instant, rtt: Duration) {
        let Some(ended) = ended else { return };
        // Neither does it say anything of now what was before a pause.
        let paused = now >= ended.began + 2 * rtt;
        if ended.packets < FEW || paused {
            self.rounds.clear();
        } else {
            self.rounds.truncate(QUEUE_ROUNDS - 1);
            self.rounds.push_front(ended.least);
        }
    }

    /// How long a packet takes there and its acknowledgement back where nothing queues. `None` before the first.
    pub(crate) const fn round_trip(&self) -> Option<Duration> {
        self.least
    }

    /// How much longer packets are on their way than they would be on an empty path.
    fn queue(&self, empty: Duration) -> Duration {
        if self.rounds.len() < QUEUE_ROUNDS {
            return Duration::ZERO;
        }
        // Of the round that goes on one packet is enough to say that there is none.
        let now = self.now.iter().map(|round| round.least);
        let lately = self.rounds.iter().copied().chain(now).min();
        lately.unwrap_or(empty).saturating_sub(empty)
    }

    /// Whether it takes no more.
    pub(crate) fn is_full(&self) -> bool {
        if self.lost * 100 >= (self.acked + self.lost) * LOSS_PERCENT {
            return true;
        }
        self.least.is_some_and(|empty| {
            let most = (empty / QUEUE_PART).clamp(LEAST_QUEUE, MOST_QUEUE);
            empty < SHORT || self.queue(empty) > most
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RTT: Duration = Duration::from_millis(20);
    const PACKET: u64 = 1200;
    const NONE: Duration = Duration::ZERO;
    const LONG: Duration = Duration::from_millis(10);
    const MS: Duration = Duration::from_millis(1);

    fn start() -> Instant {
        tokio::time::Instant::now().into_std() + Duration::from_secs(1)
    }

    /// A path and what time it is there.
    struct Trip {
        path: Path,
        now: Instant,
    }

    impl Trip {
        fn start() -> Self {
            Self {
                path: Path::default(),
                now: start(),
            }
        }

        /// So many packets, one each millisecond, every one this late; of each hundred so many are lost.
        fn send(&mut self, packets: u32, late: Duration, percent: u32) {
            for n in 0..packets {
                self.now += MS;
                if n % 100 < percent {
                    self.path.lost(PACKET);
                } else {
                    self.come(RTT + late);
                }
            }
        }

        fn come(&mut self, took: Duration) {
            self.path.acked(self.now, took, NONE, PACKET, took);
        }
    }

    #[test]
    fn a_path_that_loses_a_few_packets_and_delays_none_is_not_full() {
        let mut trip = Trip::start();
        for percent in [0, 1, 2, 4] {
            trip.send(1000, NONE, percent);
            assert!(!trip.path.is_full(), "{percent} %: {:?}", trip.path);
        }
    }

    #[test]
    fn a_path_that_loses_many_is_full_until_it_loses_few_again() {
        let mut trip = Trip::start();
        trip.send(1000, NONE, 8);
        assert!(trip.path.is_full(), "{:?}", trip.path);
        trip.send(2000, NONE, 1);
        assert!(!trip.path.is_full(), "{:?}", trip.path);
    }

    #[test]
    fn on_a_short_path_every_loss_counts() {
        let mut trip = Trip::start();
        for _ in 0..100 {
            trip.now += MS;
            trip.come(MS);
        }
        assert!(trip.path.is_full(), "{:?}", trip.path);
    }

    #[test]
    fn the_first_packets_lost_are_not_yet_many() {
        let mut trip = Trip::start();
        trip.send(10, NONE, 2);
        assert!(!trip.path.is_full(), "{:?}", trip.path);
    }

    #[test]
    fn of_large_packets_as_many_may_be_lost_as_of_small_ones() {
        const LARGE: u64 = 8952;
        let full_after = |packet: u64, lost_before: u32| {
            let mut path = Path::default();
            for _ in 0..lost_before {
                path.lost(PACKET);
            }
            path.packets_of(packet);
            (lost_before..20).find(|_| {
                if path.is_full() {
                    return true;
                }
                path.lost(packet);
                false
            })
        };
        for before in [0, 3] {
            assert_eq!(full_after(LARGE, before), full_after(PACKET, before));
        }
        assert!(full_after(LARGE, 0) > Some(4), "{:?}", full_after(LARGE, 0));
    }

    #[test]
    fn a_queue_that_delays_all_packets_is_a_full_path_and_a_few_late_ones_are_not() {
        let mut trip = Trip::start();
        trip.send(100, NONE, 0);
        trip.send(300, Duration::from_millis(3), 0);
        assert!(!trip.path.is_full(), "{:?}", trip.path);
        trip.send(300, LONG, 0);
        assert!(trip.path.is_full(), "{:?}", trip.path);
        // One that comes as soon as on an empty path says that there is none.
        trip.come(RTT);
        assert!(!trip.path.is_full(), "{:?}", trip.path);
    }

    #[test]
    fn what_keeps_everything_waiting_for_two_rounds_is_no_queue() {
        let mut trip = Trip::start();
        for _ in 0..20 {
            trip.send(100, NONE, 0);
            trip.send(50, LONG, 0);
            assert!(!trip.path.is_full(), "{:?}", trip.path);
        }
    }

    #[test]
    fn single_packets_that_are_acknowledged_late_are_no_queue() {
        // Whether there was one before or not.
        for before in [NONE, LONG] {
            let mut trip = Trip::start();
            trip.send(60, NONE, 0);
            trip.send(400, before, 0);
            for _ in 0..20 {
                trip.now += 5 * RTT;
                trip.come(RTT + Duration::from_millis(25));
                trip.now += MS;
                trip.come(RTT + Duration::from_millis(25));
                assert!(!trip.path.is_full(), "{:?}", trip.path);
            }
            assert_eq!(trip.path.round_trip(), Some(RTT));
        }
    }

    #[test]
    fn what_may_have_come_later_than_it_seems_makes_no_path_shorter() {
        let mut trip = Trip::start();
        for _ in 0..100 {
            trip.now += MS;
            trip.path.acked(trip.now, RTT / 2, RTT, PACKET, RTT);
        }
        assert_eq!(trip.path.round_trip(), Some(RTT / 2 + RTT));
        trip.send(100, NONE, 0);
        assert_eq!(trip.path.round_trip(), Some(RTT));
        // Nor does it hide what is lost.
        for n in 0..1000 {
            trip.now += MS;
            if n % 10 == 0 {
                trip.path.lost(PACKET);
            } else {
                trip.path.acked(trip.now, RTT / 2, RTT, PACKET, RTT);
            }
        }
        assert!(trip.path.is_full(), "{:?}", trip.path);
    }

    #[test]
    fn many_are_lost_before_anything_else_is_known() {
        let mut path = Path::default();
        for _ in 0..100 {
            path.lost(PACKET);
        }
        assert!(path.is_full(), "{path:?}");
    }

    #[test]
    fn the_first_round_is_as_long_as_the_others() {
        let mut trip = Trip::start();
        // The round trip isn't known to the transport when the first acknowledgement comes.
        trip.path.acked(trip.now, RTT, NONE, PACKET, 5 * RTT);
        trip.send(20, NONE, 0);
        trip.send(5 * 30, LONG, 0);
        assert!(trip.path.is_full(), "{:?}", trip.path);
    }

    /// One who sends as much as it may, by a rule for losses.
    struct Sender {
        window: f64,
        /// Up to here it grows by a packet for each that came through.
        threshold: f64,
        under_way: u64,
        recovers_from: Option<Instant>,
        /// `None`: every loss counts, as for TCP.
        path: Option<Path>,
        delivered: u64,
    }

    /// What becomes known to a sender.
    struct Told {
        at: Instant,
        to: usize,
        sent: Instant,
        lost: bool,
    }

    impl Sender {
        fn new(path: Option<Path>) -> Self {
            Self {
                window: 10.0,
                threshold: f64::MAX,
                under_way: 0,
                recovers_from: None,
                path,
                delivered: 0,
            }
        }

        /// Grows by one packet in a round trip and keeps 7 of 10 after a loss that counts, as Cubic does where windows are small.
        fn hear(&mut self, told: &Told, rtt: Duration) {
            self.under_way -= 1;
            let recovering = self.recovers_from.is_some_and(|since| told.sent <= since);
            if !told.lost {
                self.delivered += 1;
                if let Some(path) = &mut self.path {
                    path.acked(told.at, rtt, NONE, PACKET, rtt);
                }
                if !recovering {
                    let slow_start = self.window < self.threshold;
                    self.window += if slow_start { 1.0 } else { 1.0 / self.window };
                }
                return;
            }
            let counts = match &mut self.path {
                None => true,
                Some(path) => {
                    path.lost(PACKET);
                    path.is_full()
                }
            };
            if counts && !recovering {
                self.recovers_from = Some(told.at);
                self.window = (0.7 * self.window).max(2.0);
                self.threshold = self.window;
            }
        }
    }

    /// Has senders share a path for a while that takes one packet in `each`, queues so many, and loses one in so many besides.
    /// How many packets of each came through in the second half of the time, and how many were dropped.
    fn share(
        senders: &mut [Sender],
        each: Duration,
        room: usize,
        lose_one_in: u64,
        lasts: Duration,
    ) -> (Vec<u64>, u64) {
        let began = start();
        let (mut now, mut free_at) = (began, began);
        let mut told: VecDeque<Told> = VecDeque::new();
        let (mut count, mut dropped) = (0u64, 0);
        let mut half = Vec::new();
        while now < began + lasts {
            now += Duration::from_micros(100);
            while let Some(next) = told.pop_front_if(|next| next.at <= now) {
                let rtt = next.at - next.sent;
                senders[next.to].hear(&next, rtt);
            }
            for (to, sender) in senders.iter_mut().enumerate() {
                if sender.under_way as f64 >= sender.window {
                    continue;
                }
                sender.under_way += 1;
                count += 1;
                free_at = free_at.max(now);
                let full = free_at - now > each * u32::try_from(room).unwrap();
                // What is lost is known when the next would have been acknowledged.
                let lost = full
                    || lose_one_in > 0
                        && count.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32 < (1 << 32) / lose_one_in;
                dropped += u64::from(full);
                if !full {
                    free_at += each;
                }
                let at = free_at + RTT;
                told.push_back(Told {
                    at,
                    to,
                    sent: now,
                    lost,
                });
            }
            if half.is_empty() && now >= began + lasts / 2 {
                half = senders.iter().map(|sender| sender.delivered).collect();
            }
        }
        let came = senders
            .iter()
            .zip(half)
            .map(|(sender, half)| sender.delivered - half);
        (came.collect(), dropped)
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_path_that_loses_packets_and_is_not_full_is_used() {
        let mut senders = [Sender::new(Some(Path::default())), Sender::new(None)];
        for (sender, least, most) in [(0, 140_000, u64::MAX), (1, 0, 60_000)] {
            let alone = &mut senders[sender..=sender];
            let (came, _) = share(alone, MS / 20, 1000, 50, MINUTE / 2);
            assert!((least..most).contains(&came[0]), "{sender}: {came:?}");
        }
    }

    #[test]
    fn a_path_that_is_full_is_shared_with_who_slows_down_for_each_loss() {
        // A queue of half a round trip, of one, and of four.
        for room in [20, 40, 160] {
            let mut senders = [Sender::new(Some(Path::default())), Sender::new(None)];
            let (came, _) = share(&mut senders, MS / 2, room, 0, 4 * MINUTE);
            let all: u64 = came.iter().sum();
            assert!(all > 2 * 120_000 * 9 / 10, "{room}: {came:?}");
            assert!(came[0] * 10 < all * 6, "{room}: {came:?}");
            assert!(came[1] * 10 < all * 6, "{room}: {came:?}");
        }
    }

    #[test]
    fn two_who_tolerate_losses_share_a_path_that_is_full_and_drop_little() {
        for room in [20, 40, 160] {
            let mut senders = [
                Sender::new(Some(Path::default())),
                Sender::new(Some(Path::default())),
            ];
            let (came, dropped) = share(&mut senders, MS / 2, room, 0, 4 * MINUTE);
            let all: u64 = came.iter().sum();
            assert!(all > 2 * 120_000 * 9 / 10, "{room}: {came:?}");
            assert!(came.iter().all(|came| came * 10 > all * 4), "{room}: {came:?}");
            assert!(dropped * 100 < all, "{room}: {dropped} of {all}");
        }
    }

    proptest! {
        /// Whatever comes, and however late: what is known of a path is within what has been seen of it.
        #[test]
        fn bounds_hold(steps in prop::collection::vec((0u64..50, 0u64..100, any::<bool>()), 1..500)) {
            let mut trip = Trip::start();
            trip.now += Duration::from_secs(1);
            let mut seen = Vec::new();
            for (pause, took, lost) in steps {
                trip.now += Duration::from_millis(pause);
                if lost {
                    trip.path.lost(PACKET);
                } else {
                    let took = Duration::from_millis(took);
                    trip.come(took);
                    seen.push(took);
                }
                prop_assert_eq!(trip.path.round_trip(), seen.iter().min().copied());
                prop_assert!(trip.path.rounds.len() <= QUEUE_ROUNDS);
                prop_assert!(trip.path.rounds.iter().all(|round| seen.contains(round)));
            }
        }
    }
}
