//! Instances that trap are replaced, and leave nothing behind. Alone in its process: others' memory would count.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests"
)]

mod support;

use leeward_policy::model::PluginKind;
use leeward_wasm::Fault;
use support::{Rig, guest, resident};

#[tokio::test]
async fn ten_thousand_traps_leave_nothing_behind() {
    let rig = Rig::new(PluginKind::Fallback, &guest("fallback.wasm")).await;
    for _ in 0..200 {
        assert_eq!(rig.ask("panic").await, Err(Fault::Trap));
    }
    let before = resident();
    for _ in 0..10_000 {
        assert_eq!(rig.ask("panic").await, Err(Fault::Trap));
    }
    let grown = resident().saturating_sub(before);
    // Keeping as little as 2 KiB of each would show.
    assert!(grown < 16 << 20, "grew by {grown} bytes");
}
