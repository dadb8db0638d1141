//! The proxy-wasm host with guests in text: what a guest holds up, and turns that nobody waits for.

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

use guest::{ONCE, guest};
use leeward_wasm::{Fault, Step, Way};
use rig::{Rig, answer, bytes, fields, head, resumed, run, spec, value};
use std::time::Duration;

/// A callback for heads of requests, with these lines in it.
fn on_request(lines: &str) -> String {
    format!(
        r#"(func (export "proxy_on_request_headers") (param $id i32) (param $count i32) (param $end i32) (result i32)
             {lines})"#
    )
}

/// Holds a body up until it ends; then puts "<" before it, and ">" behind it, and something in place of the third byte.
const HOLD_BODY: &str = r#"
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
  (func (export "proxy_on_request_body") (param $id i32) (param $len i32) (param $end i32) (result i32)
    (call $gauge @"len" (local.get $len))
    (if (i32.eqz (local.get $end)) (then (return (i32.const 1))))
    (call $ok (call $proxy_get_buffer_status (i32.const 0) (i32.const 16) (i32.const 20)))
    (if (i32.ne (i32.load (i32.const 16)) (local.get $len)) (then unreachable))
    (call $ok (call $proxy_get_buffer_bytes
      (i32.const 0) (i32.const 1) (i32.const 2) (i32.const 16) (i32.const 20)))
    (call $ok (call $proxy_set_buffer_bytes (i32.const 0) (i32.const 2) (i32.const 1) (call $got)))
    (call $ok (call $proxy_set_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 0) @"<"))
    (call $ok (call $proxy_set_buffer_bytes (i32.const 0) (i32.const -1) (i32.const 0) @">"))
    (i32.const 0))"#;

#[test]
fn a_body_is_held_up_changed_and_let_go() {
    run(async {
        let rig = Rig::new(&guest(HOLD_BODY)).await;
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[]), false).await, Ok(Step::Go));
        assert!(filter.wants_request_body());
        assert_eq!(filter.request_body(bytes("abc"), false).await, Ok(Step::Wait));
        assert_eq!(filter.take_request_body(), "");
        assert_eq!(filter.request_body(bytes("def"), false).await, Ok(Step::Wait));
        assert_eq!(rig.seen.gauge("len"), Some(6.0));
        assert_eq!(filter.request_body(bytes(""), true).await, Ok(Step::Go));
        assert_eq!(filter.take_request_body(), "<abbcdef>");
    });
}

#[test]
fn a_body_is_held_up_within_bounds() {
    run(async {
        for (policy, bound) in [(0, 64 << 10), (10, 10)] {
            let rig = Rig::with(
                &guest(HOLD_BODY),
                spec(|spec| spec.limits.max_body_bytes = policy),
            )
            .await;
            let mut filter = rig.filter().await;
            filter.request(head(&[]), false).await.unwrap();
            filter.take_request();
            let full = "a".repeat(bound - 2);
            assert_eq!(filter.request_body(bytes(&full), false).await, Ok(Step::Wait));
            assert_eq!(
                filter.request_body(bytes("bcdef"), true).await,
                Err(Fault::BodyTooLarge)
            );
            assert_eq!(
                filter.take_request_body(),
                full + "bcdef",
                "what it held comes back"
            );
            drop(filter);
            // The machine has done nothing wrong.
            rig.pass().await;
            assert_eq!(rig.seen.called("start"), 1);
        }
    });
}

#[test]
fn a_body_that_is_not_held_up_goes_on_piece_by_piece_whatever_its_size() {
    run(async {
        let module = guest(
            r#"(func (export "proxy_on_response_body") (param $id i32) (param $len i32) (param $end i32) (result i32)
                 (call $ok (call $proxy_set_buffer_bytes (i32.const 1) (i32.const 0) (i32.const 1) @"X"))
                 (i32.const 0))"#,
        );
        let rig = Rig::with(&module, spec(|spec| spec.limits.max_body_bytes = 4)).await;
        let mut filter = rig.filter().await;
        rig.request(&mut filter).await;
        assert_eq!(filter.response(answer(&[]), false).await, Ok(Step::Go));
        assert!(filter.wants_response_body());
        assert_eq!(
            filter.response_body(bytes("abcdefghi"), false).await,
            Ok(Step::Go)
        );
        assert_eq!(filter.take_response_body(), "XbcdXfghX");
        assert_eq!(filter.response_body(bytes("jk"), true).await, Ok(Step::Go));
        assert_eq!(filter.take_response_body(), "Xk");
    });
}

#[test]
fn what_is_not_there_is_said_not_to_be() {
    run(async {
        let rig = Rig::new(&guest(&on_request(
            r#"(call $note @"body" (call $proxy_get_buffer_bytes
                 (i32.const 0) (i32.const 0) (i32.const 9) (i32.const 16) (i32.const 20)))
               (call $note @"tcp" (call $proxy_get_buffer_status (i32.const 2) (i32.const 16) (i32.const 20)))
               (call $note @"no-buffer" (call $proxy_get_buffer_status (i32.const 9) (i32.const 16) (i32.const 20)))
               (call $note @"read-only" (call $proxy_set_buffer_bytes (i32.const 6) (i32.const 0) (i32.const 0) @"x"))
               (call $note @"config" (call $proxy_get_buffer_status (i32.const 7) (i32.const 16) (i32.const 20)))
               (call $note @"overflow" (call $proxy_get_buffer_bytes
                 (i32.const 6) (i32.const -1) (i32.const 9) (i32.const 16) (i32.const 20)))
               (call $note @"foreign" (call $proxy_call_foreign_function
                 @"compress" @"x" (i32.const 16) (i32.const 20)))
               (call $note @"context" (call $proxy_set_effective_context (i32.const 4711)))
               (call $note @"done" (call $proxy_done))
               (call $note @"stream" (call $proxy_continue_stream (i32.const 2)))
               (call $note @"close" (call $proxy_close_stream (i32.const 4)))
               (call $note @"metric" (call $proxy_get_metric (i32.const 77) (i32.const 16)))
               (call $note @"queue" (call $proxy_resolve_shared_queue @"" @"q" (i32.const 16)))
               (call $note @"unknown-queue" (call $proxy_dequeue_shared_queue (i32.const 5) (i32.const 16) (i32.const 20)))
               (call $note @"data" (call $proxy_get_shared_data @"\ff" (i32.const 16) (i32.const 20) (i32.const 24)))
               (call $note @"grpc" (call $proxy_grpc_cancel (i32.const 5)))
               (call $note @"level" (call $proxy_log (i32.const 6) @"x"))
               (call $ok (call $proxy_log (i32.const 2) @"bad \ff\fe bytes\0a"))
               (call $ok (call $proxy_get_log_level (i32.const 16)))
               (if (i32.gt_u (i32.load (i32.const 16)) (i32.const 5)) (then unreachable))
               (call $ok (call $proxy_get_current_time_nanoseconds (i32.const 16)))
               (if (i64.lt_u (i64.load (i32.const 16)) (i64.const 1700000000000000000)) (then unreachable))
               (call $ok (call $proxy_get_status (i32.const 24) (i32.const 16) (i32.const 20)))
               (call $note @"status" (i32.load (i32.const 24)))
               (i32.const 0)"#,
        )))
        .await;
        let head = rig.pass().await;
        for (name, want) in [
            ("body", "1"),
            ("tcp", "1"),
            ("no-buffer", "2"),
            ("read-only", "2"),
            ("config", "1"),
            ("overflow", "2"),
            ("foreign", "1"),
            ("context", "2"),
            ("done", "1"),
            ("stream", "12"),
            ("close", "2"),
            ("metric", "1"),
            ("queue", "1"),
            ("unknown-queue", "1"),
            ("data", "1"),
            ("grpc", "1"),
            ("level", "2"),
            ("status", "0"),
        ] {
            assert_eq!(value(&head.headers, name), want, "{name}");
        }
    });
}

#[test]
fn trailers_are_read_and_changed_and_let_a_body_go() {
    run(async {
        let rig = Rig::new(&guest(
            r#"(func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.const 1))
               (func (export "proxy_on_request_trailers") (param $id i32) (param $count i32) (result i32)
                 (if (i32.ne (local.get $count) (i32.const 2)) (then unreachable))
                 (call $value (i32.const 1) @"a")
                 (call $ok (call $proxy_replace_header_map_value (i32.const 1) @"b" (call $got)))
                 (call $ok (call $proxy_set_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 1) @"B"))
                 (i32.const 0))
               (func (export "proxy_on_response_trailers") (param $id i32) (param $count i32) (result i32)
                 (call $ok (call $proxy_remove_header_map_value (i32.const 3) @"a"))
                 (i32.const 0))"#,
        ))
        .await;
        let mut filter = rig.filter().await;
        filter.request(head(&[]), false).await.unwrap();
        assert_eq!(filter.request_body(bytes("body"), false).await, Ok(Step::Wait));
        let trailers = rig::trailers(&mut filter, Way::Request, fields(&[("a", "1"), ("b", "2")])).await;
        assert_eq!(trailers, Ok((Step::Go, fields(&[("a", "1"), ("b", "1")]))));
        assert_eq!(filter.take_request_body(), "Body");
        filter.response(answer(&[]), false).await.unwrap();
        assert!(filter.wants_response_body());
        assert_eq!(filter.response_body(bytes("x"), false).await, Ok(Step::Go));
        let trailers = rig::trailers(&mut filter, Way::Response, fields(&[("a", "1"), ("b", "2")])).await;
        assert_eq!(trailers, Ok((Step::Go, fields(&[("b", "2")]))));
        assert_eq!(filter.take_response_body(), "x");
    });
}

/// Holds the head, the body or the trailers of a request up, as the field `hold` says, until a timer lets it go.
const HOLD: &str = r#"
  (global $held (mut i32) (i32.const 0))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (call $ok (call $proxy_set_tick_period_milliseconds (i32.const 1)))
    (i32.const 1))
  (func $at (param $c i32) (result i32)
    (call $value (i32.const 0) @"hold")
    (i32.eq (i32.load8_u (i32.load (i32.const 16))) (local.get $c)))
  (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32)
    (global.set $held (local.get $id))
    (call $at (i32.const 104)))
  (func (export "proxy_on_request_body") (param $id i32) (param $len i32) (param $end i32) (result i32)
    (call $gauge @"len" (local.get $len))
    (call $gauge @"end" (local.get $end))
    (call $at (i32.const 98)))
  (func (export "proxy_on_request_trailers") (param i32 i32) (result i32) (call $at (i32.const 116)))
  (func (export "proxy_on_tick") (param $root i32)
    (if (i32.eqz (global.get $held)) (then (return)))
    (call $ok (call $proxy_set_effective_context (global.get $held)))
    (call $ok (call $proxy_continue_stream (i32.const 0)))
    (global.set $held (i32.const 0)))"#;

#[test]
fn what_is_held_up_goes_on_when_the_guest_says_so_later() {
    run(async {
        let rig = Rig::new(&guest(HOLD)).await;
        // A head that is held up.
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[("hold", "h")]), true).await, Ok(Step::Wait));
        assert!(filter.take_request().is_none());
        assert_eq!(resumed(&mut filter).await, Ok(Step::Go));
        assert_eq!(value(&filter.take_request().unwrap().headers, "hold"), "h");
        // A body.
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[("hold", "b")]), false).await, Ok(Step::Go));
        assert_eq!(filter.request_body(bytes("body"), true).await, Ok(Step::Wait));
        assert_eq!(resumed(&mut filter).await, Ok(Step::Go));
        assert_eq!(filter.take_request_body(), "body");
        // Trailers: they come when the guest lets them.
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[("hold", "t")]), false).await, Ok(Step::Go));
        assert_eq!(filter.request_body(bytes("body"), false).await, Ok(Step::Go));
        let trailers = rig::trailers(&mut filter, Way::Request, fields(&[("a", "1")])).await;
        assert_eq!(trailers, Ok((Step::Go, fields(&[("a", "1")]))));
    });
}

#[test]
fn what_comes_behind_a_head_that_is_held_up_waits_and_is_shown_then() {
    run(async {
        // The timer begins with a second request, so that there is time for the body to come.
        let lines = HOLD
            .replace(
                "(global.set $held (local.get $id))",
                "(if (call $at (i32.const 103)) (then (call $ok (call $proxy_set_tick_period_milliseconds (i32.const 1)))
                   (return (i32.const 0))))
                 (global.set $held (local.get $id))",
            )
            .replace(
                "(call $ok (call $proxy_set_tick_period_milliseconds (i32.const 1)))\n    (i32.const 1)",
                "(i32.const 1)",
            );
        let rig = Rig::new(&guest(&lines)).await;
        let mut filter = rig.filter().await;
        assert_eq!(
            filter.request(head(&[("hold", "h")]), false).await,
            Ok(Step::Wait)
        );
        assert_eq!(filter.request_body(bytes("ab"), false).await, Ok(Step::Wait));
        assert_eq!(filter.request_body(bytes("cd"), true).await, Ok(Step::Wait));
        assert_eq!(rig.seen.called("proxy_on_request_body"), 0);
        let mut other = rig.filter().await;
        assert_eq!(other.request(head(&[("hold", "g")]), true).await, Ok(Step::Go));
        assert_eq!(resumed(&mut filter).await, Ok(Step::Go));
        assert!(filter.take_request().is_some());
        assert_eq!(filter.take_request_body(), "abcd");
        assert_eq!(
            (rig.seen.gauge("len"), rig.seen.gauge("end")),
            (Some(4.0), Some(1.0))
        );
    });
}

#[test]
fn a_body_behind_a_head_that_is_held_up_has_its_bound() {
    run(async {
        let lines = HOLD.replace("(call $proxy_continue_stream (i32.const 0))", "(i32.const 0)");
        let rig = Rig::with(&guest(&lines), spec(|spec| spec.limits.max_body_bytes = 3)).await;
        let mut filter = rig.filter().await;
        assert_eq!(
            filter.request(head(&[("hold", "h")]), false).await,
            Ok(Step::Wait)
        );
        assert_eq!(filter.request_body(bytes("abc"), false).await, Ok(Step::Wait));
        assert_eq!(
            filter.request_body(bytes("d"), false).await,
            Err(Fault::BodyTooLarge)
        );
        assert_eq!(filter.take_request_body(), "abcd");
        assert!(filter.take_request().is_some());
    });
}

#[test]
fn trailers_behind_a_head_that_is_held_up_are_shown_after_it() {
    run(async {
        let rig = Rig::new(&guest(HOLD)).await;
        let mut filter = rig.filter().await;
        assert_eq!(
            filter.request(head(&[("hold", "h")]), false).await,
            Ok(Step::Wait)
        );
        assert_eq!(filter.request_body(bytes("body"), false).await, Ok(Step::Wait));
        let trailers = rig::trailers(&mut filter, Way::Request, fields(&[("a", "1")])).await;
        assert_eq!(trailers, Ok((Step::Go, fields(&[("a", "1")]))));
        assert!(filter.take_request().is_some());
        assert_eq!(filter.take_request_body(), "body");
        let called = |function| rig.seen.called(function);
        assert_eq!(
            (
                called("proxy_on_request_body"),
                called("proxy_on_request_trailers")
            ),
            (1, 1)
        );
    });
}

#[test]
fn what_is_held_up_for_too_long_is_taken_away_whole() {
    run(async {
        let lines = HOLD.replace("(call $proxy_continue_stream (i32.const 0))", "(i32.const 0)");
        let rig = Rig::new(&guest(&lines)).await;
        // A head, and what is behind it.
        let mut filter = rig.filter().await;
        let given = head(&[("hold", "h")]);
        assert_eq!(filter.request(given, false).await, Ok(Step::Wait));
        assert_eq!(filter.request_body(bytes("ab"), false).await, Ok(Step::Wait));
        assert_eq!(filter.request_body(bytes("cd"), true).await, Ok(Step::Wait));
        assert!(filter.take_request().is_none() && filter.take_request_body().is_empty());
        filter.give_up(Way::Request).await;
        assert_eq!(value(&filter.take_request().unwrap().headers, "hold"), "h");
        assert_eq!(filter.take_request_body(), "abcd");
        // A body.
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[("hold", "b")]), false).await, Ok(Step::Go));
        assert!(filter.take_request().is_some());
        assert_eq!(filter.request_body(bytes("ab"), false).await, Ok(Step::Wait));
        assert_eq!(filter.request_body(bytes("cd"), true).await, Ok(Step::Wait));
        filter.give_up(Way::Request).await;
        assert!(filter.take_request().is_none());
        assert_eq!(filter.take_request_body(), "abcd");
    });
}

#[test]
fn waiting_can_be_given_up_and_taken_up_again() {
    run(async {
        let rig = Rig::new(&guest(HOLD)).await;
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[("hold", "h")]), true).await, Ok(Step::Wait));
        // Time and again it is asked and nobody waits for the answer.
        let resumed = loop {
            tokio::select! {
                biased;
                () = tokio::task::yield_now() => {}
                step = resumed(&mut filter) => break step,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        assert_eq!(resumed, Ok(Step::Go));
        assert!(filter.take_request().is_some());
    });
}

#[test]
fn a_turn_that_nobody_waits_for_any_more_keeps_nobody_else_out() {
    run(async {
        let lines = format!(
            r#"{ONCE}
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (local $n i32)
                 (call $value (i32.const 0) @"do")
                 (if (i32.eq (i32.load8_u (i32.load (i32.const 16))) (i32.const 108)) (then
                   (local.set $n (i32.const 400000000))
                   (loop $again
                     (local.set $n (i32.sub (local.get $n) (i32.const 1)))
                     (br_if $again (local.get $n)))))
                 (i32.const 0))"#
        );
        let long = spec(|spec| spec.limits.call_timeout = Duration::from_secs(60));
        let rig = Rig::with(&guest(&lines), long).await;
        let mut first = rig.filter().await;
        assert_eq!(first.request(head(&[("do", "g")]), true).await, Ok(Step::Go));
        let mut slow = rig.filter().await;
        tokio::select! {
            biased;
            step = slow.request(head(&[("do", "l")]), true) => panic!("it was to take long: {step:?}"),
            () = tokio::task::yield_now() => {}
        }
        // It lives on, and nobody asks it.
        rig.until(|seen| seen.called("proxy_on_request_headers") == 2)
            .await;
        let mut other = rig.filter().await;
        assert_eq!(other.request(head(&[("do", "g")]), true).await, Ok(Step::Go));
        // What has come of it is there when it is asked.
        assert_eq!(slow.resume(Way::Request).await, Ok(Step::Go));
        assert!(slow.take_request().is_some());
    });
}
