//! How a signal reads.

use super::log::{Counts, SignalLog, ratio};
use leeward_policy::model::Signal;
use std::time::{Duration, Instant};

/// What a signal is, and how that compares with its marks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// In the signal's own unit: 1 for an open circuit and 0 for another, percent, milliseconds, or a factor.
    pub value: f64,
    /// It is at `above` or past it, and there are enough calls to say so.
    pub past: bool,
    /// It is below `clear_below`, or nothing at all. Never together with `past`.
    pub clear: bool,
}

/// How a signal reads now. `None` where nothing is known: nobody called the service in the window (the shorter one of
/// a burn rate), or nobody who sees it has said how it is in the last 5 s.
///
/// With fewer calls than `minimum_calls` a reading is never `past`, but it may well not be `clear`: what still fails
/// has not recovered because an open circuit lets little of it through.
///
/// A burn rate is the lower one of its windows: both must be past the mark, and it is over as soon as one is back.
pub fn reading(log: &SignalLog, signal: &Signal, now: Instant) -> Option<Reading> {
    match *signal {
        Signal::CircuitOpen { .. } => {
            let open = log.circuit_open(now)?;
            Some(Reading {
                value: if open { 1.0 } else { 0.0 },
                past: open,
                clear: !open,
            })
        }
        Signal::ErrorRate {
            above,
            clear_below,
            window,
            minimum_calls,
            ..
        } => {
            let counts = log.counts(window, now);
            let share = counts.failed()?;
            let enough = counts.calls >= u64::from(minimum_calls);
            Some(compare(100.0 * share, (above.into(), clear_below.into()), enough))
        }
        Signal::Latency {
            percentile,
            above,
            clear_below,
            window,
            minimum_calls,
            ..
        } => {
            let (value, calls) = log.percentile(percentile, window, now)?;
            let enough = calls >= u64::from(minimum_calls);
            Some(compare(
                millis(value),
                (millis(above), millis(clear_below)),
                enough,
            ))
        }
        Signal::Saturation {
            above, clear_below, ..
        } => {
            let value = log.saturation(now)?;
            Some(compare(value, (above.into(), clear_below.into()), true))
        }
        Signal::BurnRate {
            objective,
            above,
            clear_below,
            long_window,
            short_window,
            minimum_calls,
            ..
        } => {
            let short = log.counts(short_window, now);
            let long = log.counts(long_window, now);
            // The share that the objective lets fail; never nothing, as an objective is below 100 %.
            let budget = f64::from(100_000u32.saturating_sub(objective).max(1)) / 100_000.0;
            let value = short.failed()?.min(long.failed().unwrap_or_default()) / budget;
            let enough = short.calls >= u64::from(minimum_calls);
            let marks = (f64::from(above) / 10.0, f64::from(clear_below) / 10.0);
            Some(compare(value, marks, enough))
        }
    }
}

impl Reading {
    /// What it says, for people: what is looked at, its value, and the mark that it is past or below.
    pub fn describe(&self, signal: &Signal) -> String {
        let service = signal.service();
        let value = self.value;
        let compared = |above: String, clear_below: String| {
            if self.past {
                format!("past {above}")
            } else if self.clear {
                format!("below {clear_below}")
            } else {
                format!("between {clear_below} and {above}, or of too few calls")
            }
        };
        match *signal {
            Signal::CircuitOpen { .. } if self.past => format!("circuit of {service} open"),
            Signal::CircuitOpen { .. } => format!("circuit of {service} not open"),
            Signal::ErrorRate {
                above, clear_below, ..
            } => {
                let marks = compared(format!("{above} %"), format!("{clear_below} %"));
                format!("error rate of {service} {value:.1} %, {marks}")
            }
            Signal::Latency {
                percentile,
                above,
                clear_below,
                ..
            } => {
                let marks = compared(format!("{above:?}"), format!("{clear_below:?}"));
                format!("p{percentile} of {service} {value:.1} ms, {marks}")
            }
            Signal::Saturation {
                above, clear_below, ..
            } => {
                let marks = compared(format!("{above} %"), format!("{clear_below} %"));
                format!("saturation of {service} {value:.1} %, {marks}")
            }
            Signal::BurnRate {
                above, clear_below, ..
            } => {
                let tenths = |mark: u32| format!("{}.{}", mark / 10, mark % 10);
                let marks = compared(tenths(above), tenths(clear_below));
                format!("burn rate of {service} {value:.1}, {marks}")
            }
        }
    }
}

impl Counts {
    fn failed(&self) -> Option<f64> {
        (self.calls > 0).then(|| ratio(self.failures, self.calls))
    }
}

/// At the mark counts as past it: a rate of 100 % could not be past 100 %. What is nothing is clear whatever the mark,
/// as nothing is below a mark of 0.
fn compare(value: f64, (above, clear_below): (f64, f64), enough: bool) -> Reading {
    let past = enough && value >= above;
    Reading {
        value,
        past,
        clear: !past && (value < clear_below || value <= 0.0),
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
