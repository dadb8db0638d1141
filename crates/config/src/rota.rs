//! Whose turn it is among control planes, and how long to wait before it.

use std::net::SocketAddr;
use std::time::Duration;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How often the control plane is told that the proxy is there.
    pub heartbeat: Duration,
    /// How long a control plane may be silent; longer means that it is gone.
    pub silence: Duration,
    /// First pause between tries; it doubles with each, with full jitter.
    pub first_pause: Duration,
    /// Longest pause between tries.
    pub max_pause: Duration,
}

impl Timing {
    /// What push.proto promises, and pauses from 100 ms to 10 s.
    pub const DEFAULT: Self = Self {
        heartbeat: Duration::from_secs(10),
        silence: Duration::from_secs(30),
        first_pause: Duration::from_millis(100),
        max_pause: Duration::from_secs(10),
    };
}

/// The control planes in turn, each try after a pause. Chance is an argument.
#[derive(Debug)]
pub struct Rota<'a> {
    control: &'a [SocketAddr],
    turn: usize,
    failures: u32,
    timing: Timing,
}

impl<'a> Rota<'a> {
    /// Begins with the first.
    pub const fn new(control: &'a [SocketAddr], timing: Timing) -> Self {
        Self {
            control,
            turn: 0,
            failures: 0,
            timing,
        }
    }

    /// Whose turn it is; nobody's if there are none.
    pub fn turn(&self) -> Option<SocketAddr> {
        self.control.get(self.turn).copied()
    }

    /// The one whose turn it is did not do what was asked, or no longer does, after so long: it is the next one's turn after
    /// the pause that this returns. `draw` is from 0 to 1.
    ///
    /// The pause has full jitter over an exponential bound ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so
    /// that proxies that lost a control plane together don't come back together.
    pub fn failed(&mut self, after: Duration, draw: f64) -> Duration {
        self.turn = (self.turn + 1) % self.control.len().max(1);
        // What lasted was good.
        self.failures = if after > self.timing.silence {
            0
        } else {
            self.failures.saturating_add(1)
        };
        let bound = self
            .timing
            .first_pause
            .saturating_mul(1 << self.failures.saturating_sub(1).min(16))
            .min(self.timing.max_pause);
        bound.mul_f64(draw.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_are_bounded_and_spread() {
        let after = |failures: u32, draw| {
            let mut rota = Rota::new(&[], Timing::DEFAULT);
            for _ in 1..failures {
                let _ = rota.failed(Duration::ZERO, 1.0);
            }
            rota.failed(Duration::ZERO, draw)
        };
        assert_eq!(after(1, 1.0), Duration::from_millis(100));
        assert_eq!(after(3, 1.0), Duration::from_millis(400));
        assert_eq!(after(30, 1.0), Duration::from_secs(10));
        assert_eq!(after(30, 0.0), Duration::ZERO);
        assert_eq!(after(2, 0.5), Duration::from_millis(100));
    }

    #[test]
    fn each_has_its_turn_and_what_lasted_counts_for_nothing() {
        let control = ["127.0.0.1:1", "127.0.0.1:2"].map(|address| address.parse().unwrap());
        let mut rota = Rota::new(&control, Timing::DEFAULT);
        let mut turns = Vec::new();
        for _ in 0..3 {
            turns.extend(rota.turn());
            rota.failed(Duration::ZERO, 1.0);
        }
        assert_eq!(turns, [control[0], control[1], control[0]]);
        let long = Timing::DEFAULT.silence + Duration::from_secs(1);
        rota.failed(long, 1.0);
        assert_eq!(rota.failed(Duration::ZERO, 1.0), Duration::from_millis(100));
        assert_eq!(Rota::new(&[], Timing::DEFAULT).turn(), None);
    }
}
