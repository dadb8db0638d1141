//! Whose turn it is among control planes, and how long to wait before it. Pure, but for looking names up.

use crate::address::{Control, ControlAddress, Order};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How often the control plane is told that the proxy is there.
    pub heartbeat: Duration,
    /// How long a control plane may be silent; longer means that it is gone.
    pub silence: Duration,
    /// How long a control plane may take to take a stream.
    pub open: Duration,
    /// Bound of the first pause between tries; it doubles with each, with full jitter.
    pub first_pause: Duration,
    /// Longest pause between tries.
    pub max_pause: Duration,
    /// Over how long the proxies spread that lose a control plane which had served them.
    pub spread: Duration,
}

impl Timing {
    /// What push.proto promises, pauses from 250 ms to 30 s, and 5 s to spread over: of ten thousand proxies on three control
    /// planes that is at most 700 a second when one dies.
    pub const DEFAULT: Self = Self {
        heartbeat: Duration::from_secs(10),
        silence: Duration::from_secs(30),
        open: Duration::from_secs(10),
        first_pause: Duration::from_millis(250),
        max_pause: Duration::from_secs(30),
        spread: Duration::from_secs(5),
    };
}

/// The longest time that a control plane can ask a proxy to wait or to spread over.
const MAX_ASKED: Duration = Duration::from_secs(300);

/// How it ended with the control plane whose turn it was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Parting {
    /// It can't be reached, says no, or is gone.
    Lost,
    /// It is being stopped in order, and asks its proxies to spread over this.
    Goodbye(Duration),
    /// It has no time now, and asks not to be asked again before this.
    Busy(Duration),
}

/// The control planes in turn, each try after a pause. Chance is an argument.
#[derive(Debug)]
pub struct Rota<'a> {
    control: &'a Control,
    turn: usize,
    tries: u64,
    /// In a row, without one that served.
    failures: u32,
    timing: Timing,
}

/// One whose turn it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Turn<'a> {
    address: &'a ControlAddress,
    nth: u64,
}

impl Turn<'_> {
    /// Where it is now.
    ///
    /// # Errors
    ///
    /// If its name can't be looked up.
    pub async fn resolve(&self) -> io::Result<SocketAddr> {
        self.address.resolve(self.nth).await
    }
}

impl fmt::Display for Turn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

impl<'a> Rota<'a> {
    /// Begins with the first.
    pub const fn new(control: &'a Control, timing: Timing) -> Self {
        Self {
            control,
            turn: 0,
            tries: 0,
            failures: 0,
            timing,
        }
    }

    /// Whose turn it is; nobody's if there are none.
    pub fn turn(&self) -> Option<Turn<'a>> {
        let address = self.control.addresses.get(self.turn)?;
        let nth = self.control.first.wrapping_add(self.tries);
        Some(Turn { address, nth })
    }

    /// The one whose turn it is did not do what was asked: it is the next one's turn after the pause that this returns.
    /// `draw` is from 0 to 1.
    pub fn failed(&mut self, draw: f64) -> Duration {
        self.parted(Parting::Lost, false, draw)
    }

    /// The same, for how it ended, and whether what was asked was had first. What failed before is forgotten then, as Envoy
    /// does with the first answer on a stream: a control plane that dies soon after it is back is no worse than another.
    ///
    /// The pause has full jitter over an exponential bound ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so
    /// that proxies that lost a control plane together don't come back together. Proxies that one has served were all
    /// connected to it: they spread over more than that, and over as much as it asks them if it can.
    pub fn parted(&mut self, how: Parting, served: bool, draw: f64) -> Duration {
        let draw = draw.clamp(0.0, 1.0);
        let served = served || matches!(how, Parting::Goodbye(_));
        self.tries = self.tries.wrapping_add(1);
        self.turn = self.next(served);
        if served {
            self.failures = 0;
            return match how {
                Parting::Goodbye(spread) => spread.min(MAX_ASKED).mul_f64(draw),
                Parting::Lost | Parting::Busy(_) => self.timing.spread.mul_f64(draw),
            };
        }
        self.failures = self.failures.saturating_add(1);
        let bound = self
            .timing
            .first_pause
            .saturating_mul(1 << self.failures.saturating_sub(1).min(16))
            .min(self.timing.max_pause);
        let pause = bound.mul_f64(draw);
        match how {
            // Another one may have time.
            Parting::Busy(asked) if self.failures as usize >= self.control.addresses.len() => {
                pause.max(asked.min(MAX_ASKED).mul_f64(0.5 + draw))
            }
            Parting::Busy(_) | Parting::Lost | Parting::Goodbye(_) => pause,
        }
    }

    /// Whose turn is next: of those in order of preference the first, if it isn't that which just ended.
    fn next(&self, served: bool) -> usize {
        match self.control.order {
            Order::Preferred if served && self.turn != 0 => 0,
            Order::Preferred | Order::Random => (self.turn + 1) % self.control.addresses.len().max(1),
        }
    }
}

#[cfg(test)]
mod tests;
