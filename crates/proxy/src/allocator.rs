//! The allocator of the process: mimalloc, asked without an alignment wherever its blocks have it anyway.
//!
//! The crate `mimalloc` states an alignment with every request. mimalloc then looks whether the next free block has it, and
//! where it has none at hand, as for all that is larger than 1 KiB, takes the long way: for most sizes a larger block, and a
//! pointer into it. Of the 22 blocks of a request over HTTP/1.1 that was so for 9, and 6 of them were larger than they had to be
//! (counted with callgrind).

#![allow(
    unsafe_code,
    reason = "the trait of allocators is unsafe, and so is every function that is not written in Rust"
)]

use libmimalloc_sys as sys;
use std::alloc::{GlobalAlloc, Layout};

/// What every block is aligned to that is no smaller than this: `MI_MAX_ALIGN_SIZE` of mimalloc, which is that of C's
/// `max_align_t`.
const BLOCK_ALIGN: usize = 16;

/// Memory from mimalloc.
pub(crate) struct Allocator;

/// Whether a block of this size is aligned so whoever asks for it. A smaller one than [`BLOCK_ALIGN`] is aligned to the
/// largest power of two that is in its size, or to more.
const fn is_aligned_anyway(size: usize, align: usize) -> bool {
    align <= size && align <= BLOCK_ALIGN
}

// SAFETY: mimalloc's functions give blocks of at least the size that is asked for, which nobody else has until they are
// given back, or null; they don't unwind. A block is aligned as the layout says, either because mimalloc is told to, or
// because it is by itself (see above). `realloc` keeps what was there, and leaves the block alone where it gives null.
// Blocks that were asked for in one way may be given back, or made larger, in the other: there is one `mi_free`.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        // SAFETY: any size, and any power of two, may be asked for.
        unsafe {
            if is_aligned_anyway(size, align) {
                sys::mi_malloc(size).cast()
            } else {
                sys::mi_malloc_aligned(size, align).cast()
            }
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        // SAFETY: as for `alloc`.
        unsafe {
            if is_aligned_anyway(size, align) {
                sys::mi_zalloc(size).cast()
            } else {
                sys::mi_zalloc_aligned(size, align).cast()
            }
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, _: Layout) {
        // SAFETY: the caller's block is one of ours.
        unsafe { sys::mi_free(block.cast()) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's block is one of ours. One that may stay where it is has the alignment already.
        unsafe {
            if is_aligned_anyway(size, layout.align()) {
                sys::mi_realloc(block.cast(), size).cast()
            } else {
                sys::mi_realloc_aligned(block.cast(), size, layout.align()).cast()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes up to where blocks are pages of their own, each beside its neighbours.
    fn sizes() -> impl Iterator<Item = usize> {
        let around = (5..22).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 1, (1 << bits) + 24]);
        (1..1100).chain(around)
    }

    #[test]
    fn blocks_are_aligned_and_keep_what_is_in_them() {
        for size in sizes() {
            for align in [1, 2, 4, 8, 16, 32, 64, 4096] {
                let layout = Layout::from_size_align(size, align).unwrap();
                // Some at once: the first block of a page is aligned to more than the next.
                let blocks: Vec<*mut u8> = (0..5_u8)
                    .map(|n| unsafe {
                        let block = Allocator.alloc(layout);
                        assert!(!block.is_null());
                        assert_eq!(block.addr() % align, 0, "{layout:?}");
                        block.write_bytes(n, size);
                        block
                    })
                    .collect();
                let larger = size * 3 / 2 + 1;
                for (n, block) in blocks.into_iter().enumerate() {
                    unsafe {
                        assert!(
                            std::slice::from_raw_parts(block, size)
                                .iter()
                                .all(|byte| usize::from(*byte) == n)
                        );
                        let moved = Allocator.realloc(block, layout, larger);
                        assert_eq!(moved.addr() % align, 0, "{layout:?} to {larger}");
                        assert!(
                            std::slice::from_raw_parts(moved, size)
                                .iter()
                                .all(|byte| usize::from(*byte) == n)
                        );
                        let smaller = Layout::from_size_align(larger, align).unwrap();
                        let moved = Allocator.realloc(moved, smaller, size);
                        assert_eq!(moved.addr() % align, 0, "{smaller:?} to {size}");
                        assert!(
                            std::slice::from_raw_parts(moved, size)
                                .iter()
                                .all(|byte| usize::from(*byte) == n)
                        );
                        Allocator.dealloc(moved, layout);
                    }
                }
                unsafe {
                    let zeroed = Allocator.alloc_zeroed(layout);
                    assert_eq!(zeroed.addr() % align, 0, "{layout:?}");
                    assert!(
                        std::slice::from_raw_parts(zeroed, size)
                            .iter()
                            .all(|byte| *byte == 0)
                    );
                    Allocator.dealloc(zeroed, layout);
                }
            }
        }
    }
}
