//! How many other proxies call a service here.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts callers by linear counting (Whang et al. 1990): each sets the bit that its hash names, and how many bits are left
/// says how many have come. Good to a few percent up to some thousands, in 256 bytes, and one load for a caller that
/// is known.
#[derive(Debug)]
pub(crate) struct Callers {
    /// Those since the last turn, and those of the time before.
    now: [AtomicU64; WORDS],
    before: [AtomicU64; WORDS],
}

const WORDS: usize = 16;
const BITS: u32 = 1024;

impl Default for Callers {
    fn default() -> Self {
        Self {
            now: std::array::from_fn(|_| AtomicU64::new(0)),
            before: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Callers {
    /// A caller has come, who is known by a hash.
    pub(crate) fn note(&self, hash: u64) {
        let bit = hash % u64::from(BITS);
        let word = usize::try_from(bit / 64).ok().and_then(|at| self.now.get(at));
        let mask = 1u64 << (bit % 64);
        if let Some(word) = word
            && word.load(Ordering::Relaxed) & mask == 0
        {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// Forgets those that came before the last turn and not since.
    pub(crate) fn turn(&self) {
        for (now, before) in self.now.iter().zip(&self.before) {
            before.store(now.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// How many have come since the turn before the last one.
    pub(crate) fn count(&self) -> u32 {
        let pairs = self.now.iter().zip(&self.before);
        let set: u32 = pairs
            .map(|(now, before)| (now.load(Ordering::Relaxed) | before.load(Ordering::Relaxed)).count_ones())
            .sum();
        // With every bit set there is no telling; the formula's end is at BITS * ln(BITS).
        let bits = f64::from(BITS);
        let left = f64::from(BITS.saturating_sub(set).max(1));
        let estimate = -bits * (left / bits).ln();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to 7098"
        )]
        let estimate = estimate.round() as u32;
        estimate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_resilience::{Draw, Seeded};

    #[test]
    fn each_caller_counts_once_while_it_comes() {
        let callers = Callers::default();
        let mut draw = Seeded(3);
        assert_eq!(callers.count(), 0);
        let hashes: Vec<u64> = (0..1000).map(|_| draw.below(u64::MAX)).collect();
        for (come, hash) in (1u32..).zip(&hashes) {
            callers.note(*hash);
            callers.note(*hash);
            let off = f64::from(callers.count().abs_diff(come));
            assert!(off <= 2.0 + f64::from(come) * 0.1, "{off} at {come}");
        }
        callers.turn();
        callers.note(hashes[0]);
        assert!(callers.count() > 900);
        callers.turn();
        assert_eq!(callers.count(), 1);
        callers.turn();
        assert_eq!(callers.count(), 0);
    }

    #[test]
    fn more_than_can_be_told_apart_are_many() {
        let callers = Callers::default();
        (0..BITS).for_each(|hash| callers.note(hash.into()));
        assert!(callers.count() > 7000);
    }
}
