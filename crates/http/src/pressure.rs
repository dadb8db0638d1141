//! How short of memory the process is, which is a limit that all services share.

use std::sync::atomic::{AtomicU32, Ordering};

/// The share of the memory limit that is in use, in thousandths. Set now and then from outside, since asking
/// the system is too dear for a request.
#[derive(Debug, Default)]
pub struct Pressure(AtomicU32);

/// Below this share memory is no concern; what is above is stretched to the whole range, so that shedding's
/// marks, which are of limits that may be used up, fit it too.
const UNCONCERNED: f64 = 0.5;

impl Pressure {
    /// Sets how much of `limit` is in use, both in bytes. A limit of 0 is none.
    pub fn set(&self, used: u64, limit: u64) {
        let thousandths = if limit == 0 {
            0
        } else {
            u128::from(used) * 1000 / u128::from(limit)
        };
        let thousandths = u32::try_from(thousandths).unwrap_or(u32::MAX).min(1000);
        self.0.store(thousandths, Ordering::Relaxed);
    }

    /// As a utilisation from 0 to 1: 0 up to half of the limit, 1 at the whole.
    pub(crate) fn utilisation(&self) -> f64 {
        let share = f64::from(self.0.load(Ordering::Relaxed)) / 1000.0;
        ((share - UNCONCERNED) / (1.0 - UNCONCERNED)).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_counts_from_half_of_its_limit_on() {
        let pressure = Pressure::default();
        for (used, limit, want) in [
            (0, 100, 0.0),
            (50, 100, 0.0),
            (75, 100, 0.5),
            (200, 100, 1.0),
            (9, 0, 0.0),
        ] {
            pressure.set(used, limit);
            assert!((pressure.utilisation() - want).abs() < 1e-9, "{used} of {limit}");
        }
    }
}
