//! What is measured.

use leeward_policy::model::Priority;
use std::time::Duration;

/// What clients and servers saw, second by second.
#[derive(Debug, Default)]
pub(crate) struct Record {
    seconds: Vec<Second>,
}

/// One second of a run. What a request came to counts for the second in which it was sent, but for `good`.
#[derive(Clone, Debug, Default)]
struct Second {
    /// Requests that clients sent, by priority.
    sent: [u32; 4],
    /// Of those, the ones that were answered in time.
    served: [u32; 4],
    /// How long those took, in microseconds.
    took: Vec<u32>,
    /// Answers that came in time in this second, whenever the request was sent.
    good: u32,
    /// Attempts that were sent to the last service.
    attempts: u32,
    /// Of those, the ones to its first server.
    to_first: u32,
}

/// A span of a run, from one second to before another, summed up.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    seconds: f64,
    sent: [u32; 4],
    served: [u32; 4],
    good: u32,
    attempts: u32,
    to_first: u32,
    /// Sorted.
    took: Vec<u32>,
}

impl Record {
    /// A client sent a request so long after the start.
    pub(crate) fn sent(&mut self, at: Duration, priority: Priority) {
        self.in_second(at, |second| count(&mut second.sent, priority));
    }

    /// A client has its answer, and still waits for it.
    pub(crate) fn served(&mut self, sent_at: Duration, at: Duration, priority: Priority) {
        self.in_second(at, |second| second.good += 1);
        let took = u32::try_from((at - sent_at).as_micros()).unwrap_or(u32::MAX);
        self.in_second(sent_at, |second| {
            second.took.push(took);
            count(&mut second.served, priority);
        });
    }

    /// The last service is sent an attempt.
    pub(crate) fn attempt(&mut self, at: Duration, server: usize) {
        self.in_second(at, |second| {
            second.attempts += 1;
            second.to_first += u32::from(server == 0);
        });
    }

    /// Answers in time in each second.
    pub(crate) fn goodput(&self) -> impl Iterator<Item = u32> {
        self.seconds.iter().map(|second| second.good)
    }

    pub(crate) fn summary(&self, from: usize, to: usize) -> Summary {
        let mut sum = Summary {
            seconds: 0.0,
            sent: [0; 4],
            served: [0; 4],
            good: 0,
            attempts: 0,
            to_first: 0,
            took: Vec::new(),
        };
        for second in self.seconds.iter().take(to).skip(from) {
            sum.seconds += 1.0;
            for (sum, count) in sum.sent.iter_mut().zip(second.sent) {
                *sum += count;
            }
            for (sum, count) in sum.served.iter_mut().zip(second.served) {
                *sum += count;
            }
            sum.good += second.good;
            sum.attempts += second.attempts;
            sum.to_first += second.to_first;
            sum.took.extend_from_slice(&second.took);
        }
        sum.took.sort_unstable();
        sum
    }

    /// Whole seconds from `from` until the first of five seconds in a row in each of which `share` of the
    /// requests were served; `None` if there are none such before `to`.
    pub(crate) fn recovery(&self, from: usize, to: usize, share: f64) -> Option<usize> {
        let fine = |second: &Second| {
            let sent: u32 = second.sent.iter().sum();
            let served: u32 = second.served.iter().sum();
            f64::from(served) >= share * f64::from(sent)
        };
        let seconds = self.seconds.get(from..to.min(self.seconds.len()))?;
        seconds.windows(5).position(|five| five.iter().all(fine))
    }

    fn in_second(&mut self, at: Duration, change: impl FnOnce(&mut Second)) {
        let place = usize::try_from(at.as_secs()).unwrap_or(0);
        if self.seconds.len() <= place {
            self.seconds.resize_with(place + 1, Second::default);
        }
        if let Some(second) = self.seconds.get_mut(place) {
            change(second);
        }
    }
}

impl Summary {
    /// Answers in time for each second.
    pub(crate) fn goodput(&self) -> f64 {
        ratio(self.good.into(), self.seconds)
    }

    /// Share of the requests that were answered in time.
    pub(crate) fn success(&self) -> f64 {
        ratio(self.served.iter().sum::<u32>().into(), self.all_sent())
    }

    /// The same, of one priority.
    pub(crate) fn success_of(&self, priority: Priority) -> f64 {
        let of = |counts: &[u32; 4]| f64::from(counts.get(place(priority)).copied().unwrap_or(0));
        ratio(of(&self.served), of(&self.sent))
    }

    /// Attempts that the last service is sent for each request.
    pub(crate) fn load_factor(&self) -> f64 {
        ratio(self.attempts.into(), self.all_sent())
    }

    /// Share of the attempts that its first server is sent.
    pub(crate) fn to_first(&self) -> f64 {
        ratio(self.to_first.into(), self.attempts.into())
    }

    /// How long this many percent of the answers that came in time took at most; `None` if none came.
    pub(crate) fn percentile(&self, percent: usize) -> Option<Duration> {
        let rank = (self.took.len() * percent).div_ceil(100);
        let micros = self.took.get(rank.checked_sub(1)?)?;
        Some(Duration::from_micros(u64::from(*micros)))
    }

    fn all_sent(&self) -> f64 {
        self.sent.iter().sum::<u32>().into()
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn count(counts: &mut [u32; 4], priority: Priority) {
    if let Some(count) = counts.get_mut(place(priority)) {
        *count += 1;
    }
}

fn place(priority: Priority) -> usize {
    match priority {
        Priority::Low => 0,
        Priority::Normal => 1,
        Priority::High => 2,
        Priority::Critical => 3,
    }
}
