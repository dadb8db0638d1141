//! The linear memory of all instances together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the instances of a process may have of its memory, and have.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: u64,
    used: AtomicU64,
}

/// What the instances of one plugin have of it.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    bytes: AtomicU64,
    /// The most there were at once.
    peak: AtomicU64,
    instances: AtomicU64,
}

/// What one instance has; given back when it is dropped, which must be after the instance's store is.
#[derive(Debug)]
pub(crate) struct Lease {
    budget: Arc<Budget>,
    usage: Arc<Usage>,
    bytes: u64,
}

impl Budget {
    pub(crate) const fn new(limit: u64) -> Self {
        Self {
            limit,
            used: AtomicU64::new(0),
        }
    }

    fn take(&self, more: u64) -> bool {
        let fits = |used: u64| used.checked_add(more).filter(|sum| *sum <= self.limit);
        self.used
            .try_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .is_ok()
    }
}

impl Usage {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    pub(crate) fn instances(&self) -> u64 {
        self.instances.load(Ordering::Relaxed)
    }
}

impl Lease {
    /// The lease of a new instance, which has no memory yet.
    pub(crate) fn new(budget: &Arc<Budget>, usage: &Arc<Usage>) -> Self {
        usage.instances.fetch_add(1, Ordering::Relaxed);
        Self {
            budget: Arc::clone(budget),
            usage: Arc::clone(usage),
            bytes: 0,
        }
    }

    /// Whether the instance may have so many bytes more; it has them then. That it may not is for want of the process's
    /// memory, and no fault of the plugin's: [`crate::Fault::Busy`].
    pub(crate) fn grow(&mut self, more: usize) -> bool {
        let more = u64::try_from(more).unwrap_or(u64::MAX);
        if !self.budget.take(more) {
            return false;
        }
        self.bytes += more;
        let before = self.usage.bytes.fetch_add(more, Ordering::Relaxed);
        self.usage.peak.fetch_max(before + more, Ordering::Relaxed);
        true
    }

    /// Gives back what [`Lease::grow`] gave, and was not taken after all.
    pub(crate) fn give_back(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).min(self.bytes);
        self.bytes -= bytes;
        self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
        self.usage.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let all = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        self.give_back(all);
        self.usage.instances.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_instances_have_is_within_the_limit_and_comes_back(
            steps in prop::collection::vec((0usize..4, 0usize..60, any::<bool>()), 0..40)
        ) {
            let (budget, usage) = (Arc::new(Budget::new(100)), Arc::<Usage>::default());
            let mut leases: Vec<_> = (0..4).map(|_| Lease::new(&budget, &usage)).collect();
            let mut most = 0;
            for (who, bytes, more) in steps {
                let before = usage.bytes();
                let lease = &mut leases[who];
                if more {
                    let grown = lease.grow(bytes);
                    prop_assert_eq!(grown, before + bytes as u64 <= 100);
                } else {
                    lease.give_back(bytes);
                }
                most = most.max(usage.bytes());
                prop_assert_eq!(usage.peak(), most);
                prop_assert_eq!(usage.bytes(), leases.iter().map(|l| l.bytes).sum::<u64>());
                prop_assert_eq!(usage.bytes(), budget.used.load(Ordering::Relaxed));
                prop_assert!(usage.bytes() <= 100);
            }
            prop_assert_eq!(usage.instances(), 4);
            drop(leases);
            prop_assert_eq!((usage.bytes(), usage.instances()), (0, 0));
            prop_assert_eq!(budget.used.load(Ordering::Relaxed), 0);
        }
    }
}
