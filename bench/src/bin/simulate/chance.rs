//! Random times.

use leeward_resilience::Draw;
use std::time::Duration;

/// Exponentially distributed: the time between two arrivals of a Poisson process.
pub(crate) fn exponential(mean: Duration, draw: &mut impl Draw) -> Duration {
    mean.mul_f64(-(1.0 - draw.unit()).ln())
}

/// Log-normally distributed, by Box and Muller's transform, with `sigma` as the standard deviation of its
/// logarithm: the usual shape of service times, most below the mean and a few far above.
pub(crate) fn lognormal(mean: Duration, sigma: f64, draw: &mut impl Draw) -> Duration {
    let radius = (-2.0 * (1.0 - draw.unit()).ln()).sqrt();
    let normal = radius * (std::f64::consts::TAU * draw.unit()).cos();
    mean.mul_f64((sigma * normal - sigma * sigma / 2.0).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_resilience::Seeded;

    #[test]
    fn both_have_the_mean_that_was_asked_for() {
        let mut draw = Seeded(1);
        let mean = Duration::from_millis(20);
        let mut sums = [0.0; 2];
        for _ in 0..100_000 {
            sums[0] += exponential(mean, &mut draw).as_secs_f64();
            sums[1] += lognormal(mean, 0.5, &mut draw).as_secs_f64();
        }
        for sum in sums {
            assert!((sum / 2000.0 - 1.0).abs() < 0.02, "{sum}");
        }
    }
}
