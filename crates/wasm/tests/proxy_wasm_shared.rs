//! The proxy-wasm host with guests in text: what outlives machines, and what compilers have their
//! modules import.

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

use guest::{ONCE, PASS, guest};
use leeward_wasm::{Fault, Step};
use rig::{Rig, answer, head, run, spec, value};
use std::sync::Arc;

#[test]
fn shared_data_is_shared_outlives_machines_and_loses_no_change() {
    run(async {
        let lines = format!(
            r#"{ONCE}
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (call $note @"found" (call $proxy_get_shared_data @"key" (i32.const 16) (i32.const 20) (i32.const 24)))
                 (call $note @"len" (i32.load (i32.const 20)))
                 (call $note @"mismatch"
                   (call $proxy_set_shared_data @"key" @"other" (i32.add (i32.load (i32.const 24)) (i32.const 1))))
                 (call $ok (call $proxy_set_shared_data @"key" @"value" (i32.load (i32.const 24))))
                 (call $note @"too-large" (call $proxy_set_shared_data @"large" (i32.const 0) (i32.const 200000) (i32.const 0)))
                 (call $trap)
                 (i32.const 0))"#
        );
        let rig = Rig::with(&guest(&lines), spec(|spec| spec.limits.store_bytes = 100_000)).await;
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[]), true).await, Err(Fault::Trap));
        let other = Rig::of(
            Arc::clone(&rig.host),
            spec(|spec| spec.limits.store_bytes = 100_000),
        );
        for rig in [&rig, &other] {
            let head = rig.pass().await;
            let get = |name| value(&head.headers, name);
            assert_eq!(
                (get("found"), get("len"), get("mismatch"), get("too-large")),
                ("0", "5", "8", "10")
            );
        }
    });
}

#[test]
fn an_item_of_a_queue_comes_to_who_registered_it_on_whichever_worker() {
    run(async {
        let lines = format!(
            r#"{PASS}
               (func (export "proxy_on_configure") (param $root i32) (param $len i32) (result i32)
                 (if (i32.eq (local.get $len) (i32.const 6)) (then
                   (call $ok (call $proxy_register_shared_queue @"q" (i32.const 16)))))
                 (i32.const 1))
               (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
                 (call $ok (call $proxy_resolve_shared_queue @"any" @"q" (i32.const 16)))
                 (call $ok (call $proxy_enqueue_shared_queue (i32.load (i32.const 16)) @"item"))
                 (i32.const 0))
               (func (export "proxy_on_queue_ready") (param $root i32) (param $queue i32)
                 (call $ok (call $proxy_dequeue_shared_queue (local.get $queue) (i32.const 16) (i32.const 20)))
                 (call $gauge @"len" (i32.load (i32.const 20)))
                 (call $gauge @"empty" (call $proxy_dequeue_shared_queue (local.get $queue) (i32.const 16) (i32.const 20))))"#
        );
        let reader = Rig::new(&guest(&lines)).await;
        let mut filter = reader.filter_with("reader").await;
        reader.request(&mut filter).await;
        let writer = Rig::of(Arc::clone(&reader.host), spec(|_| {}));
        let mut filter = writer.filter_with("other").await;
        writer.request(&mut filter).await;
        for n in 1..=3 {
            filter.response(answer(&[]), true).await.unwrap();
            reader
                .until(|seen| seen.called("proxy_on_queue_ready") == n)
                .await;
        }
        assert_eq!(
            (reader.seen.gauge("len"), reader.seen.gauge("empty")),
            (Some(4.0), Some(7.0))
        );
        assert_eq!(writer.seen.called("proxy_on_queue_ready"), 0);
    });
}

#[test]
fn metrics_are_counted_set_and_observed() {
    run(async {
        let lines = r#"
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (call $ok (call $proxy_define_metric (i32.const 0) @"a.Counter" (i32.const 16)))
            (call $ok (call $proxy_increment_metric (i32.load (i32.const 16)) (i64.const 2)))
            (call $ok (call $proxy_record_metric (i32.load (i32.const 16)) (i64.const 3)))
            (call $note @"down" (call $proxy_increment_metric (i32.load (i32.const 16)) (i64.const -1)))
            (call $ok (call $proxy_get_metric (i32.load (i32.const 16)) (i32.const 32)))
            (call $note @"value" (i32.load (i32.const 32)))
            (call $ok (call $proxy_define_metric (i32.const 1) @"gauge" (i32.const 16)))
            (call $ok (call $proxy_record_metric (i32.load (i32.const 16)) (i64.const 7)))
            (call $ok (call $proxy_increment_metric (i32.load (i32.const 16)) (i64.const -3)))
            (call $ok (call $proxy_define_metric (i32.const 2) @"histogram" (i32.const 16)))
            (call $ok (call $proxy_record_metric (i32.load (i32.const 16)) (i64.const 9)))
            (call $ok (call $proxy_record_metric (i32.load (i32.const 16)) (i64.const 8)))
            (call $note @"read" (call $proxy_get_metric (i32.load (i32.const 16)) (i32.const 32)))
            (call $note @"kind" (call $proxy_define_metric (i32.const 3) @"x" (i32.const 16)))
            (i32.const 0))"#;
        let rig = Rig::new(&guest(lines)).await;
        let head = rig.pass().await;
        let get = |name| value(&head.headers, name).to_owned();
        assert_eq!(
            [get("down"), get("value"), get("read"), get("kind")],
            ["2", "5", "2", "2"]
        );
        assert_eq!(rig.seen.counts.borrow()["a_counter"], 5);
        assert_eq!(rig.seen.gauge("gauge"), Some(4.0));
        let observed = [("histogram".to_owned(), 9.0), ("histogram".to_owned(), 8.0)];
        assert_eq!(*rig.seen.observed.borrow(), observed);
    });
}

#[test]
fn runtimes_find_what_they_start_with_and_nothing_of_the_node() {
    run(async {
        let start = |lines: &str, imports: &str| {
            wat::parse_str(format!(
                r#"(module
                     (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
                     {imports}
                     (memory (export "memory") 1)
                     (func (export "proxy_abi_version_0_2_0"))
                     (func $is (param $got i32) (param $want i32)
                       (if (i32.ne (local.get $got) (local.get $want)) (then unreachable)))
                     {lines} {PASS})"#
            ))
            .unwrap()
        };
        let wasi = |name: &str, params: &str| {
            format!(
                r#"(import "wasi_snapshot_preview1" "{name}" (func ${name} (param {params}) (result i32)))
                "#
            )
        };
        // A reactor, as Go and Rust have them: main comes behind.
        let imports = [
            wasi("fd_write", "i32 i32 i32 i32"),
            wasi("fd_prestat_get", "i32 i32"),
            wasi("fd_prestat_dir_name", "i32 i32 i32"),
            wasi("path_open", "i32 i32 i32 i32 i32 i64 i64 i32 i32"),
            wasi("fd_read", "i32 i32 i32 i32"),
            wasi("fd_fdstat_get", "i32 i32"),
            wasi("fd_fdstat_set_flags", "i32 i32"),
            wasi("sched_yield", ""),
            wasi("poll_oneoff", "i32 i32 i32 i32"),
            wasi("random_get", "i32 i32"),
            wasi("clock_time_get", "i32 i64 i32"),
            wasi("clock_res_get", "i32 i32"),
            wasi("args_sizes_get", "i32 i32"),
            wasi("args_get", "i32 i32"),
            wasi("environ_sizes_get", "i32 i32"),
            wasi("environ_get", "i32 i32"),
            wasi("sock_send", "i32 i32 i32 i32 i32"),
        ]
        .concat();
        let module = start(
            r#"(global $began (mut i32) (i32.const 0))
               (data (i32.const 100) "hello\nthere\n")
               (func (export "_start") unreachable)
               (func (export "_initialize")
                 (call $is (call $fd_prestat_get (i32.const 3) (i32.const 0)) (i32.const 8))
                 (call $is (call $fd_prestat_dir_name (i32.const 3) (i32.const 0) (i32.const 9)) (i32.const 8))
                 (call $is (call $path_open (i32.const 3) (i32.const 0) (i32.const 100) (i32.const 5) (i32.const 0)
                   (i64.const 0) (i64.const 0) (i32.const 0) (i32.const 0)) (i32.const 8))
                 (call $is (call $fd_read (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)) (i32.const 8))
                 (call $is (call $fd_fdstat_get (i32.const 1) (i32.const 200)) (i32.const 0))
                 (call $is (i32.load8_u (i32.const 200)) (i32.const 2))
                 (call $is (call $fd_fdstat_get (i32.const 3) (i32.const 200)) (i32.const 8))
                 (call $is (call $fd_fdstat_set_flags (i32.const 1) (i32.const 4)) (i32.const 0))
                 (call $is (call $sched_yield) (i32.const 0))
                 (call $is (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 300)) (i32.const 0))
                 (if (i64.lt_u (i64.load (i32.const 300)) (i64.const 1700000000000000000)) (then unreachable))
                 (call $is (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 300)) (i32.const 0))
                 (if (i64.eqz (i64.load (i32.const 300))) (then unreachable))
                 (call $is (call $clock_time_get (i32.const 2) (i64.const 0) (i32.const 300)) (i32.const 58))
                 (call $is (call $clock_res_get (i32.const 1) (i32.const 300)) (i32.const 0))
                 (call $is (call $random_get (i32.const 400) (i32.const 32)) (i32.const 0))
                 (if (i64.eq (i64.load (i32.const 400)) (i64.load (i32.const 408))) (then unreachable))
                 (call $is (call $random_get (i32.const 400) (i32.const -1)) (i32.const 28))
                 (call $is (call $args_sizes_get (i32.const 500) (i32.const 504)) (i32.const 0))
                 (call $is (i32.load (i32.const 500)) (i32.const 0))
                 (call $is (call $environ_sizes_get (i32.const 500) (i32.const 504)) (i32.const 0))
                 (call $is (i32.load (i32.const 504)) (i32.const 0))
                 (call $is (call $args_get (i32.const 500) (i32.const 504)) (i32.const 0))
                 (call $is (call $environ_get (i32.const 500) (i32.const 504)) (i32.const 0))
                 (call $is (call $sock_send (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)) (i32.const 52))
                 ;; Waiting for a clock, with 77 as what to tell it by: it has happened at once.
                 (i64.store (i32.const 600) (i64.const 77))
                 (call $is (call $poll_oneoff (i32.const 600) (i32.const 700) (i32.const 1) (i32.const 800)) (i32.const 0))
                 (call $is (i32.load (i32.const 800)) (i32.const 1))
                 (call $is (i32.load (i32.const 700)) (i32.const 77))
                 (i32.store (i32.const 900) (i32.const 100)) (i32.store (i32.const 904) (i32.const 12))
                 (call $is (call $fd_write (i32.const 1) (i32.const 900) (i32.const 1) (i32.const 908)) (i32.const 0))
                 (call $is (i32.load (i32.const 908)) (i32.const 12))
                 (call $is (call $fd_write (i32.const 3) (i32.const 900) (i32.const 1) (i32.const 908)) (i32.const 8))
                 (call $is (call $fd_write (i32.const 2) (i32.const -4) (i32.const 1) (i32.const 908)) (i32.const 21))
                 (global.set $began (i32.const 1)))
               (func (export "main") (param i32 i32) (result i32)
                 (call $is (global.get $began) (i32.const 1))
                 (global.set $began (i32.const 2))
                 (i32.const 0))
               (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
                 (i32.eq (global.get $began) (i32.const 2)))"#,
            &imports,
        );
        let rig = Rig::named("runtime", &module, spec(|_| {})).await;
        rig.pass().await;
        let (kept, _) = leeward_wasm::log_lines(Some("runtime"));
        let texts: Vec<_> = kept.iter().map(|line| line.text.to_string()).collect();
        assert_eq!(texts, ["hello", "there"]);
        // A command that says that it ends well, and one that doesn't.
        let exit = r#"(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))"#;
        for (code, want) in [(0, Ok(Step::Go)), (1, Err(Fault::Trap))] {
            let lines = format!(r#"(func (export "_start") (call $exit (i32.const {code})) unreachable)"#);
            let rig = Rig::new(&start(&lines, exit)).await;
            let mut filter = rig.filter().await;
            assert_eq!(filter.request(head(&[]), true).await, want);
        }
    });
}

#[test]
fn a_guest_without_memory_to_give_gets_no_data() {
    run(async {
        let module = wat::parse_str(
            r#"(module
                 (import "env" "proxy_get_header_map_value"
                   (func $value (param i32 i32 i32 i32 i32) (result i32)))
                 (memory (export "memory") 1)
                 (data (i32.const 0) ":path")
                 (func (export "proxy_abi_version_0_2_0"))
                 (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                   (if (i32.ne (i32.const 6)
                         (call $value (i32.const 0) (i32.const 0) (i32.const 5) (i32.const 16) (i32.const 20)))
                     (then unreachable))
                   (i32.const 0)))"#,
        )
        .unwrap();
        Rig::new(&module).await.pass().await;
    });
}
