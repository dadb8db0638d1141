//! What a path takes, by how long packets were on their way and how many of them were lost.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is known of a path. It has no clock of its own.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    shortest: Shortest,
    /// The last rounds that say something, the newest first.
    rounds: VecDeque<Round>,
    now: Round,
    ends: Option<Instant>,
    /// Bytes lately, older ones counting less.
    acked: u64,
    lost: u64,
}

/// What was acknowledged within one round trip.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// The shortest that a packet took: shortest, since a queue delays every packet, and a busy machine only some.
    least: Duration,
    length: Duration,
    packets: u32,
    bytes: u64,
}

/// The shortest round trips of the last half hour.
///
/// Not simply the shortest ever: whoever is not let run when a packet is due to be sent or has come dates it wrongly, and one
/// such round trip, shorter than the path, would make all later ones look as if they had queued.
#[derive(Clone, Debug, Default)]
struct Shortest {
    /// Of epochs that have ended, the newest first.
    before: VecDeque<Duration>,
    now: Lows,
    since: Option<Instant>,
}

/// The lowest of what rounds had for their shortest, in order.
#[derive(Clone, Debug)]
struct Lows {
    lowest: [Duration; LOWS],
    rounds: usize,
}

/// Share of lost bytes from which on loss is congestion, in percent: from there on PCC Allegro's senders slow down as well
/// (Dong et al., NSDI 2015, section 4.1).
const LOSS_PERCENT: u64 = 5;
/// What is counted is halved when it has come to so many bytes, some 350 packets.
const REMEMBER: u64 = 512 << 10;
/// What a connection begins with, so that one of its first packets lost is not yet a large share.
const HEAD_START: u64 = REMEMBER / 4;
/// A queue is what makes the shortest round trip of a round longer than the path's by an eighth of that, within these
/// bounds. It is how HyStart++ tells one (RFC 9406, section 4.3); less is what a busy machine does.
const QUEUE_PART: u32 = 8;
const LEAST_QUEUE: Duration = Duration::from_millis(4);
const MOST_QUEUE: Duration = Duration::from_millis(16);
/// A queue that overflows has been there for so many rounds; a busy machine keeps everything waiting for fewer, mostly.
const QUEUE_ROUNDS: usize = 4;
/// A round of fewer packets says nothing of a queue: the peer may have kept the acknowledgement of a single one for 25 ms
/// (max_ack_delay, RFC 9000, section 18.2).
const FEW: u32 = 4;
/// Rounds of which the best says what the path carries, as for BBR (Cardwell et al., ACM Queue 14(5), 2016).
const ROUNDS: usize = 10;
/// On a path that is shorter than this every loss counts: the buffers of fast switches are full before a queue of
/// [`LEAST_QUEUE`] has built up, and to wait for what was lost costs little.
const SHORT: Duration = Duration::from_millis(5);
/// Of so many rounds one may have been too short for the path.
const ONE_IN: usize = 8;
/// And of all rounds of an epoch so many, but for one.
const LOWS: usize = 16;
/// How long that is, as in Linux for TCP (`tcp_min_rtt_wlen`).
const EPOCH: Duration = Duration::from_secs(300);
/// Epochs that count when they have ended. Where a queue is never empty the path's own round trip is not seen for long, and to
/// forget it would be to take the queue for a longer path. One that has become longer is known to be after all of them, and by
/// the next connection, which mostly comes sooner.
const EPOCHS: usize = 5;

impl Default for Path {
    fn default() -> Self {
        Self {
            shortest: Shortest::default(),
            rounds: VecDeque::with_capacity(ROUNDS),
            now: Round::of(Duration::ZERO),
            ends: None,
            acked: HEAD_START,
            lost: 0,
        }
    }
}

impl Path {
    /// A packet was acknowledged. `rtt` is the usual round trip, which rounds are as long as.
    pub(crate) fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, rtt: Duration) {
        self.count(bytes, 0);
        if self.ends.is_none_or(|ends| now >= ends) {
            self.end_round(now);
            self.now = Round::of(rtt);
            self.ends = Some(now + rtt);
        }
        let round = &mut self.now;
        round.least = round.least.min(now.saturating_duration_since(sent));
        round.packets = round.packets.saturating_add(1);
        round.bytes = round.bytes.saturating_add(bytes);
    }

    /// Bytes were lost.
    pub(crate) fn lost(&mut self, bytes: u64) {
        self.count(0, bytes);
    }

    fn count(&mut self, acked: u64, lost: u64) {
        self.acked += acked;
        self.lost += lost;
        if self.acked + self.lost > REMEMBER {
            self.acked /= 2;
            self.lost /= 2;
        }
    }

    fn end_round(&mut self, now: Instant) {
        if self.now.packets > 0 {
            self.shortest.observe(self.now.least, now);
        }
        if self.now.packets >= FEW {
            self.rounds.truncate(ROUNDS - 1);
            self.rounds.push_front(self.now);
        }
    }

    /// How long a packet takes there and its acknowledgement back where nothing queues. `None` before the first one.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        let known = self.shortest.value();
        known.or_else(|| (self.now.packets > 0).then_some(self.now.least))
    }

    /// How much longer packets are on their way than they would be on an empty path.
    fn queue(&self) -> Duration {
        let rounds = self.rounds.iter().take(QUEUE_ROUNDS);
        let lately = rounds.map(|round| round.least).min();
        let (Some(lately), Some(empty)) = (lately, self.round_trip()) else {
            return Duration::ZERO;
        };
        // Of the round that goes on one packet is enough to say that there is none.
        lately.min(self.now.least).saturating_sub(empty)
    }

    /// Whether it takes no more.
    pub(crate) fn is_full(&self) -> bool {
        let Some(empty) = self.round_trip() else {
            return false;
        };
        if empty < SHORT {
            return true;
        }
        let most = (empty / QUEUE_PART).clamp(LEAST_QUEUE, MOST_QUEUE);
        self.queue() > most || self.lost * 100 >= (self.acked + self.lost) * LOSS_PERCENT
    }

    /// Bytes that it carried lately in the time of a round trip without a queue: so many are on their way on a path that is
    /// busy and has no queue.
    pub(crate) fn carries(&self) -> u64 {
        let Some(empty) = self.round_trip() else {
            return 0;
        };
        let carried = |round: &Round| {
            let length = round.length.as_micros().max(1);
            let bytes = u128::from(round.bytes) * empty.as_micros().min(length) / length;
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        self.rounds.iter().map(carried).max().unwrap_or(0)
    }
}

impl Round {
    const fn of(length: Duration) -> Self {
        Self {
            least: Duration::MAX,
            length,
            packets: 0,
            bytes: 0,
        }
    }
}

impl Shortest {
    /// A round has ended that had this for its shortest.
    fn observe(&mut self, least: Duration, now: Instant) {
        let since = *self.since.get_or_insert(now);
        if now.saturating_duration_since(since) >= EPOCH {
            self.before.truncate(EPOCHS - 1);
            if let Some(value) = std::mem::take(&mut self.now).value() {
                self.before.push_front(value);
            }
            self.since = Some(now);
        }
        self.now.add(least);
    }

    fn value(&self) -> Option<Duration> {
        let before = self.before.iter().min().copied();
        // An epoch that has just begun could be wrong by its first round.
        let now = self.now.value();
        let now = now.filter(|_| before.is_none() || self.now.rounds >= ONE_IN);
        [before, now].into_iter().flatten().min()
    }
}

impl Default for Lows {
    fn default() -> Self {
        Self {
            lowest: [Duration::MAX; LOWS],
            rounds: 0,
        }
    }
}

impl Lows {
    fn add(&mut self, least: Duration) {
        self.rounds += 1;
        if let Some(highest) = self.lowest.last_mut().filter(|highest| least < **highest) {
            *highest = least;
            self.lowest.sort_unstable();
        }
    }

    /// The lowest but for those that may be wrong.
    fn value(&self) -> Option<Duration> {
        let passed_over = (self.rounds / ONE_IN).min(LOWS - 1);
        self.lowest.get(passed_over).copied().filter(|_| self.rounds > 0)
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
            let sent = self.now.checked_sub(took).unwrap();
            self.path.acked(self.now, sent, PACKET, took);
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
        let mut trip = Trip::start();
        trip.send(200, NONE, 0);
        for _ in 0..20 {
            trip.now += 3 * RTT;
            trip.come(RTT + Duration::from_millis(25));
            assert!(!trip.path.is_full(), "{:?}", trip.path);
        }
    }

    #[test]
    fn round_trips_that_are_shorter_than_the_path_are_passed_over() {
        let mut trip = Trip::start();
        trip.send(100, NONE, 0);
        for _ in 0..15 {
            trip.come(RTT / 2);
            trip.send(500, NONE, 2);
            assert_eq!(trip.path.round_trip(), Some(RTT));
            assert!(!trip.path.is_full(), "{:?}", trip.path);
        }
    }

    #[test]
    fn the_first_round_trip_may_be_one_of_them() {
        let mut trip = Trip::start();
        trip.come(RTT / 2);
        trip.send(200, NONE, 2);
        assert_eq!(trip.path.round_trip(), Some(RTT));
    }

    #[test]
    fn a_path_that_has_become_longer_is_known_to_be() {
        let mut trip = Trip::start();
        trip.send(1000, NONE, 0);
        trip.send(1000, LONG, 0);
        assert!(trip.path.is_full(), "{:?}", trip.path);
        for _ in 0..=EPOCHS {
            trip.now += EPOCH;
            trip.send(1000, LONG, 0);
        }
        assert_eq!(trip.path.round_trip(), Some(RTT + LONG));
        assert!(!trip.path.is_full(), "{:?}", trip.path);
    }

    #[test]
    fn what_a_path_carries_is_what_came_through_without_what_was_in_its_queue() {
        let mut trip = Trip::start();
        trip.send(300, NONE, 0);
        assert_eq!(trip.path.carries(), 20 * PACKET);
        // The same rate, but of each 30 ms ten are in the queue.
        trip.send(600, LONG, 0);
        assert_eq!(trip.path.carries(), 20 * PACKET);
    }

    /// One who sends as much as it may, by a rule for losses.
    struct Sender {
        window: f64,
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
                    path.acked(told.at, told.sent, PACKET, rtt);
                }
                if !recovering {
                    self.window += 1.0 / self.window;
                }
                return;
            }
            let keeps = match &mut self.path {
                None => Some(0),
                Some(path) => {
                    path.lost(PACKET);
                    path.is_full().then(|| path.carries())
                }
            };
            let Some(keeps) = keeps.filter(|_| !recovering) else {
                return;
            };
            self.recovers_from = Some(told.at);
            let keeps = (keeps / PACKET * 7 / 8) as f64;
            self.window = (0.7 * self.window).max(keeps.min(self.window)).max(2.0);
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
            assert!(came[0] * 10 < all * 7, "{room}: {came:?}");
            assert!(came[1] * 10 < all * 7, "{room}: {came:?}");
        }
    }

    #[test]
    fn two_who_tolerate_losses_share_a_path_that_is_full_and_drop_little() {
        for room in [20, 40, 160] {
            let mut senders = [
                Sender::new(Some(Path::default())),
                Sender::new(Some(Path::default())),
            ];
            let (came, dropped) = share(&mut senders, MS / 2, room, 0, 12 * MINUTE);
            let all: u64 = came.iter().sum();
            assert!(all > 2 * 360_000 * 9 / 10, "{room}: {came:?}");
            assert!(came.iter().all(|came| came * 4 > all), "{room}: {came:?}");
            // What they have queued for all the time is not taken for the path.
            let seen = senders
                .each_ref()
                .map(|sender| sender.path.as_ref().unwrap().round_trip());
            assert!(
                seen.iter().all(|seen| *seen < Some(RTT + 6 * MS)),
                "{room}: {seen:?}"
            );
            assert!(dropped * 100 < all * 2, "{room}: {dropped} of {all}");
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
                prop_assert_eq!(trip.path.round_trip().is_some(), !seen.is_empty());
                if let Some(known) = trip.path.round_trip() {
                    prop_assert!(seen.iter().min() <= Some(&known) && Some(&known) <= seen.iter().max());
                }
                prop_assert!(trip.path.rounds.len() <= ROUNDS);
                prop_assert!(trip.path.carries() <= u64::try_from(seen.len()).unwrap() * PACKET);
            }
        }
    }
}
