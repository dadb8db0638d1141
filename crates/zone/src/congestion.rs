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
    /// When packets came that were looked at last, and how long after that.
    looked: Option<(Instant, Duration)>,
}

/// Makes one for each connection.
#[derive(Debug, Default)]
pub(crate) struct TolerantConfig {
    cubic: Arc<CubicConfig>,
}

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Tolerant {
            cubic: Cubic::new(Arc::clone(&self.cubic), now, mtu),
            path: Path::default(),
            looked: None,
        })
    }
}

/// What is known of a connection's path, if its window is by this.
pub(crate) fn path(connection: &Connection) -> Option<Path> {
    let state = connection.congestion_state().into_any().downcast::<Tolerant>();
    state.ok().map(|tolerant| tolerant.path)
}

impl Tolerant {
    /// How much later than it was dated something may have come.
    ///
    /// The transport asks for the time once, and then reads what there is. Where it is kept from running in between, what comes
    /// meanwhile seems to have come before. It is looked at so much after its date.
    fn later(&mut self, now: Instant) -> Duration {
        // Many are acknowledged at once.
        if let Some((at, later)) = self.looked
            && at == now
        {
            return later;
        }
        let later = tokio::time::Instant::now()
            .into_std()
            .saturating_duration_since(now);
        self.looked = Some((now, later));
        later
    }
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        let took = now.saturating_duration_since(sent);
        // It matters of what would make the path shorter, which is next to nothing.
        let shortens = self.path.round_trip().is_none_or(|least| took < least);
        let later = if shortens { self.later(now) } else { Duration::ZERO };
        self.path.acked(now, took, later, bytes, rtt.get());
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost: u64) {
        self.path.lost(lost);
        // Nothing lost: the path has marked packets (ECN), which it does for a queue.
        if is_persistent || lost == 0 || self.path.is_full() {
            self.cubic.on_congestion_event(now, sent, is_persistent, lost);
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.cubic.on_mtu_update(mtu);
        self.path.packets_of(mtu.into());
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

    fn now() -> Instant {
        tokio::time::Instant::now().into_std() + Duration::from_secs(1)
    }

    #[test]
    fn only_congestion_makes_the_window_smaller() {
        let shrinks = |late: Duration, is_persistent: bool, lost: u64| {
            let (mut path, mut now) = (Path::default(), now());
            for took in [[RTT; 100], [RTT + late; 100]].as_flattened() {
                now += RTT / 10;
                path.acked(now, *took, Duration::ZERO, PACKET, *took);
            }
            let mut made = Tolerant {
                cubic: Cubic::new(Arc::default(), now, 1200),
                path,
                looked: None,
            };
            let before = made.window();
            made.on_congestion_event(now, now, is_persistent, lost);
            made.window() < before
        };
        assert!(!shrinks(Duration::ZERO, false, PACKET), "a packet is lost");
        assert!(shrinks(Duration::ZERO, false, 0), "the path marks packets");
        assert!(shrinks(Duration::ZERO, true, PACKET), "nothing comes through");
        assert!(shrinks(RTT / 2, false, PACKET), "there is a queue");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_looked_at_after_its_date_may_have_come_so_much_later() {
        let mut made = Tolerant {
            cubic: Cubic::new(Arc::default(), now(), 1200),
            path: Path::default(),
            looked: None,
        };
        let read = tokio::time::Instant::now().into_std();
        assert_eq!(made.later(read), Duration::ZERO);
        tokio::time::advance(RTT).await;
        assert_eq!(made.later(read), Duration::ZERO, "the same batch");
        assert_eq!(made.later(read + RTT / 4), RTT * 3 / 4);
        assert_eq!(made.later(read + RTT), Duration::ZERO);
    }
}
