//! Where chance comes from.

/// A source of uniform draws, which the caller owns. The proxy gives its thread's generator; tests and
/// simulations give [`Seeded`], so that a run can be repeated.
pub trait Draw {
    /// A number in `0..n`, each as likely as the others; 0 if `n` is 0.
    fn below(&mut self, n: u64) -> u64;
    /// A number in `0.0..1.0`, never 1.0 itself.
    fn unit(&mut self) -> f64;
}

/// `SplitMix64`, for tests and simulations: the same seed gives the same draws. It holds the seed and then
/// the state; any value will do. Not for secrets.
///
/// Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seeded(pub u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

impl Draw for Seeded {
    fn below(&mut self, n: u64) -> u64 {
        // The high half of the product is uniform but for n parts in 2^64 (Lemire, "Fast Random Integer
        // Generation in an Interval", ACM TOMACS 29(1), 2019).
        let (_, high) = self.next().carrying_mul(n, 0);
        high
    }

    fn unit(&mut self) -> f64 {
        // The 53 bits that an f64 holds exactly, over 2^53.
        (self.next() >> 11) as f64 * f64::EPSILON / 2.0
    }
}

/// `SplitMix64`'s finaliser: every bit of `x` changes half of the bits of the result, and no two values of
/// `x` have the same.
pub(crate) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn draws_stay_in_their_range(seed: u64, n: u64) {
            let mut draw = Seeded(seed);
            let unit = draw.unit();
            prop_assert!((0.0..1.0).contains(&unit));
            let below = draw.below(n);
            prop_assert!(below < n || (n == 0 && below == 0));
        }

        #[test]
        fn every_number_is_drawn_about_as_often(seed: u64, n in 1u64..20) {
            let mut draw = Seeded(seed);
            let mut counts = HashMap::new();
            for _ in 0..2000 * n {
                *counts.entry(draw.below(n)).or_insert(0u32) += 1;
            }
            // 2000 expected, standard deviation below 45: seven of them.
            prop_assert_eq!(counts.len() as u64, n);
            prop_assert!(counts.values().all(|c| (1690..2310).contains(c)), "{counts:?}");
        }
    }

    #[test]
    fn the_whole_range_of_the_unit_is_drawn_from() {
        let mut draw = Seeded(1);
        let draws: Vec<f64> = (0..10_000).map(|_| draw.unit()).collect();
        let mean = draws.iter().sum::<f64>() / 10_000.0;
        assert!((0.48..0.52).contains(&mean), "{mean}");
        assert!(draws.iter().any(|d| *d < 0.01) && draws.iter().any(|d| *d > 0.99));
    }
}
