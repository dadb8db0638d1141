//! How much may be on its way: as Cubic says, but for losses that the path is not full at.
//!
//! Cubic takes every loss for congestion. Where 2 % of all packets are lost for other reasons, it keeps some ten packets on
//! their way, however much the path could take; requests that share a connection wait for each other then.

use crate::path::Path;
use quinn::Connection;
use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, Cubic, CubicConfig};
use quinn_proto::RttEstimator;
use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

/// Cubic (RFC 9438) that doesn't slow down for a loss on a long path if no queue has built up there and few packets are
/// lost.
///
/// All have to hold. A full queue shows in the round trips, and then this is Cubic, so that it shares a path with TCP as
/// fairly as that. A path that drops what is too much without queueing it shows by how much it drops.
///
/// Nor does it slow down below what the path has carried lately (as TCP Westwood+ does, Mascolo et al., MobiCom 2001): if that
/// was all that there is, its queue is gone then; and if there was no queue, nothing is lost by the mistake.
#[derive(Clone, Debug)]
pub(crate) struct Tolerant {
    cubic: Cubic,
    /// What the window is not to be less than.
    keeps: u64,
    path: Path,
}

/// Part of what a path carried that is kept: less than all, so that its queue is empty at times, and its round trip is seen.
const KEEPS: (u64, u64) = (7, 8);

/// Makes one for each connection.
#[derive(Debug, Default)]
pub(crate) struct TolerantConfig {
    cubic: Arc<CubicConfig>,
}

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Tolerant {
            cubic: Cubic::new(Arc::clone(&self.cubic), now, mtu),
            keeps: 0,
            path: Path::default(),
        })
    }
}

/// What is known of a connection's path, if its window is by this.
pub(crate) fn path(connection: &Connection) -> Option<Path> {
    let state = connection.congestion_state().into_any().downcast::<Tolerant>();
    state.ok().map(|tolerant| tolerant.path)
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
        self.path.lost(lost);
        // Nothing lost: the path has marked packets (ECN), which it does for a queue.
        if is_persistent || lost == 0 || self.path.is_full() {
            let before = self.window();
            self.cubic.on_congestion_event(now, sent, is_persistent, lost);
            // What marks has a short queue, if it has one.
            self.keeps = if is_persistent || lost == 0 {
                0
            } else {
                (self.path.carries() * KEEPS.0 / KEEPS.1).min(before)
            };
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.cubic.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().max(self.keeps)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.cubic.metrics();
        metrics.congestion_window = self.window();
        metrics
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
    use std::time::Duration;

    const RTT: Duration = Duration::from_millis(20);
    const PACKET: u64 = 1200;
    const NONE: Duration = Duration::ZERO;
    const LONG: Duration = Duration::from_millis(10);

    /// One on a path that carried ten packets in a round trip, and has kept all waiting for so long lately; and what time it is.
    fn made(late: Duration) -> (Tolerant, Instant) {
        let mut path = Path::default();
        let mut now = tokio::time::Instant::now().into_std() + Duration::from_secs(1);
        for took in [[RTT; 100], [RTT + late; 100]].as_flattened() {
            now += RTT / 10;
            path.acked(now, now.checked_sub(*took).unwrap(), PACKET, *took);
        }
        let cubic = Cubic::new(Arc::default(), now, 1200);
        let keeps = 0;
        (Tolerant { cubic, keeps, path }, now)
    }

    #[test]
    fn only_congestion_makes_the_window_smaller() {
        let shrinks = |late: Duration, is_persistent: bool, lost: u64| {
            let (mut made, now) = made(late);
            let before = made.window();
            made.on_congestion_event(now, now, is_persistent, lost);
            made.window() < before
        };
        assert!(!shrinks(NONE, false, PACKET), "a packet is lost");
        assert!(shrinks(NONE, false, 0), "the path marks packets");
        assert!(shrinks(NONE, true, PACKET), "nothing comes through");
        assert!(shrinks(LONG, false, PACKET), "there is a queue");
    }

    #[test]
    fn what_the_path_has_carried_is_kept_however_often_something_is_lost() {
        let (mut made, mut now) = made(LONG);
        for _ in 0..20 {
            now += RTT;
            made.on_congestion_event(now, now, false, PACKET);
        }
        assert!(made.cubic.window() < 5 * PACKET, "{made:?}");
        assert_eq!(made.window(), 10 * PACKET * 7 / 8);
        made.on_congestion_event(now + RTT, now + RTT, true, PACKET);
        assert!(made.window() < 5 * PACKET, "nothing comes through: {made:?}");
    }
}
