//! Chance and time for backends: the same seed gives the same run.

use std::time::Duration;

/// A number in `0.0..1.0` for the n-th request under a seed, evenly spread. It depends on nothing else, so that
/// requests that overtake each other change no other's.
pub(super) fn draw(seed: u64, nth: u64) -> f64 {
    // SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), the n-th output.
    let mut z = seed.wrapping_add(nth.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    // 32 bits are plenty, and exact in a float.
    let high = u32::try_from(z >> 32).unwrap_or(0);
    f64::from(high) / 4_294_967_296.0
}

/// A length between these; the shorter of them if they are the wrong way round.
pub(super) fn between(least: Duration, most: Duration, draw: f64) -> Duration {
    let least = least.min(most);
    least + (most - least).mul_f64(draw)
}

/// How many times `every` has passed whole; never, if it is zero.
pub(super) fn turn(every: Duration, elapsed: Duration) -> u128 {
    elapsed.as_nanos().checked_div(every.as_nanos()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_spread_evenly_and_differ_by_seed() {
        for seed in [0, 1, 42, u64::MAX] {
            let draws: Vec<f64> = (1..=10_000).map(|n| draw(seed, n)).collect();
            assert!(draws.iter().all(|d| (0.0..1.0).contains(d)));
            for tenth in 1..10 {
                let bound = f64::from(tenth) / 10.0;
                let below = draws.iter().filter(|d| **d < bound).count();
                let wanted = 1000 * usize::try_from(tenth).unwrap();
                assert!(below.abs_diff(wanted) < 250, "{seed}: {below} below {bound}");
            }
        }
        let first = |seed| (1..=64).map(|n| draw(seed, n) < 0.5).collect::<Vec<_>>();
        assert_eq!(first(7), first(7));
        assert_ne!(first(7), first(8));
    }

    #[test]
    fn lengths_stay_between_their_bounds() {
        let (one, two) = (Duration::from_secs(1), Duration::from_secs(2));
        assert_eq!(between(one, two, 0.0), one);
        assert_eq!(between(one, two, 0.5), Duration::from_millis(1500));
        assert_eq!(between(two, one, 0.5), one);
    }

    #[test]
    fn turns_are_of_equal_length() {
        let ms = Duration::from_millis;
        let turns = [0, 99, 100, 199, 200, 1000].map(|at| turn(ms(100), ms(at)));
        assert_eq!(turns, [0, 0, 1, 1, 2, 10]);
        assert_eq!(turn(Duration::ZERO, ms(5)), 0);
    }
}
