//! The thread's own source of chance.

use leeward_resilience::Draw;

/// Draws from the thread's generator.
#[derive(Clone, Copy, Debug)]
pub struct Chance;

impl Draw for Chance {
    fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { fastrand::u64(..n) }
    }

    fn unit(&mut self) -> f64 {
        fastrand::f64()
    }
}
