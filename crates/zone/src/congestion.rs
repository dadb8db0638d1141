//! How much may be on its way: as Cubic says, but for losses that the path is not full at.
//!
//! Cubic takes every loss for congestion. Where 2 % of all packets are lost for other reasons, it keeps some ten packets on
//! their way, however much the path could take; requests that share a connection wait for each other then.

use quinn::Connection;
use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, Cubic, CubicConfig};
use quinn_proto::RttEstimator;
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Cubic (RFC 9438) that doesn't slow down for a loss on a long path if no queue has built up there and few packets are
/// lost.
///
/// All have to hold. A full queue shows in the round trips, and then this is Cubic, so that it shares a path with TCP as
/// fairly as that. A path that drops what is too much without queueing it shows by how much it drops.
#[derive(Clone, Debug)]
pub(crate) struct Tolerant {
    cubic: Cubic,
    path: Path,
}

/// Makes one for each connection.
#[derive(Debug, Default)]
pub(crate) struct TolerantConfig {
    cubic: Arc<CubicConfig>,
}

/// What is known of the path.
#[derive(Clone, Debug)]
struct Path {
    /// The shortest round trip there was.
    least: Duration,
    /// The shortest of the round before this one, and of this one so far: shortest, since a queue delays every packet, and
    /// a busy machine only some.
    before: Option<Duration>,
    now: Option<Duration>,
    round_ends: Option<Instant>,
    /// Bytes lately, older ones counting less.
    acked: u64,
    lost: u64,
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
/// On a path that is shorter than this every loss counts: the buffers of fast switches are full before a queue of
/// [`LEAST_QUEUE`] has built up, and to wait for what was lost costs little.
const SHORT: Duration = Duration::from_millis(5);

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Tolerant {
            cubic: Cubic::new(Arc::clone(&self.cubic), now, mtu),
            path: Path::default(),
        })
    }
}

/// Whether a connection's path takes no more. Where nobody can tell, it doesn't.
pub(crate) fn is_full(connection: &Connection) -> bool {
    let state = connection.congestion_state().into_any().downcast::<Tolerant>();
    state.map_or(true, |tolerant| tolerant.path.is_full())
}

impl Default for Path {
    fn default() -> Self {
        Self {
            least: Duration::MAX,
            before: None,
            now: None,
            round_ends: None,
            acked: HEAD_START,
            lost: 0,
        }
    }
}

impl Path {
    /// A packet was acknowledged. `rtt` is the usual round trip, which rounds are as long as.
    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, rtt: Duration) {
        self.count(bytes, 0);
        let took = now.saturating_duration_since(sent);
        self.least = self.least.min(took);
        if self.round_ends.is_none_or(|ends| now >= ends) {
            self.before = self.now.take();
            self.round_ends = Some(now + rtt);
        }
        self.now = Some(self.now.map_or(took, |least| least.min(took)));
    }

    fn count(&mut self, acked: u64, lost: u64) {
        self.acked += acked;
        self.lost += lost;
        if self.acked + self.lost > REMEMBER {
            self.acked /= 2;
            self.lost /= 2;
        }
    }

    /// How much longer packets are on their way than they would be on an empty path.
    fn queue(&self) -> Duration {
        let lately = [self.before, self.now].into_iter().flatten().min();
        lately.unwrap_or(self.least).saturating_sub(self.least)
    }

    fn is_full(&self) -> bool {
        if self.least < SHORT {
            return true;
        }
        let most = (self.least / QUEUE_PART).clamp(LEAST_QUEUE, MOST_QUEUE);
        self.queue() > most || self.lost * 100 >= (self.acked + self.lost) * LOSS_PERCENT
    }
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.path.acked(now, sent, bytes, rtt.get());
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost: u64) {
        self.path.count(0, lost);
        // Nothing lost: the path has marked packets (ECN), which it does for a queue.
        if is_persistent || lost == 0 || self.path.is_full() {
            self.cubic.on_congestion_event(now, sent, is_persistent, lost);
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.cubic.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(20);
    const PACKET: u64 = 1200;

    /// A path and what time it is there.
    struct Trip {
        path: Path,
        now: Instant,
    }

    impl Trip {
        fn start() -> Self {
            Self {
                path: Path::default(),
                now: tokio::time::Instant::now().into_std() + Duration::from_secs(1),
            }
        }

        /// So many packets, one each millisecond, every one this late; of each hundred so many are lost.
        fn send(&mut self, packets: u32, late: Duration, percent: u32) {
            for n in 0..packets {
                self.now += Duration::from_millis(1);
                if n % 100 < percent {
                    self.path.count(0, PACKET);
                } else {
                    self.come(late);
                }
            }
        }

        fn come(&mut self, late: Duration) {
            let took = RTT + late;
            let sent = self.now.checked_sub(took).unwrap();
            self.path.acked(self.now, sent, PACKET, took);
        }
    }

    const NONE: Duration = Duration::ZERO;
    const LONG: Duration = Duration::from_millis(10);

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
            trip.now += Duration::from_millis(1);
            let sent = trip.now.checked_sub(Duration::from_millis(1)).unwrap();
            trip.path.acked(trip.now, sent, PACKET, Duration::from_millis(1));
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
        trip.send(100, Duration::from_millis(3), 0);
        assert!(!trip.path.is_full(), "{:?}", trip.path);
        trip.send(200, LONG, 0);
        assert!(trip.path.is_full(), "{:?}", trip.path);
        // One that comes as soon as on an empty path says that there is none.
        trip.come(NONE);
        assert!(!trip.path.is_full(), "{:?}", trip.path);
    }

    #[test]
    fn only_congestion_makes_the_window_smaller() {
        let shrinks = |late: Duration, is_persistent: bool, lost: u64| {
            let mut trip = Trip::start();
            trip.send(200, NONE, 0);
            trip.send(200, late, 0);
            let mut made = Tolerant {
                cubic: Cubic::new(Arc::default(), trip.now, 1200),
                path: trip.path,
            };
            let before = made.window();
            made.on_congestion_event(trip.now, trip.now, is_persistent, lost);
            made.window() < before
        };
        assert!(!shrinks(NONE, false, PACKET), "a packet is lost");
        assert!(shrinks(NONE, false, 0), "the path marks packets");
        assert!(shrinks(NONE, true, PACKET), "nothing comes through");
        assert!(shrinks(LONG, false, PACKET), "there is a queue");
    }
}
