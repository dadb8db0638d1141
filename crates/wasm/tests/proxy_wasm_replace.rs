//! Ten thousand machines of proxy-wasm, in a process of its own, whose memory nothing else changes.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    dead_code,
    reason = "tests"
)]

#[path = "proxy_wasm/guest.rs"]
mod guest;
#[path = "proxy_wasm/rig.rs"]
mod rig;

use guest::guest;
use leeward_wasm::Fault;
use rig::{Rig, head, run};

#[test]
fn ten_thousand_machines_come_and_go() {
    run(async {
        let lines = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                         (i32.store (i32.const 262140) (i32.const 1)) unreachable)"#;
        let rig = Rig::new(&guest(lines)).await;
        let mut before = 0;
        for n in 0..10_000 {
            let mut filter = rig.filter().await;
            assert_eq!(filter.request(head(&[]), true).await, Err(Fault::Trap));
            drop(filter);
            // What a machine leaves to do has its turn.
            tokio::task::yield_now().await;
            rig.seen.calls.borrow_mut().clear();
            if n == 1000 {
                before = resident();
            }
        }
        let after = resident();
        assert!(after < before + (16 << 20), "{before} became {after}");
    });
}

/// Memory that this process has, in bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
