//! The proxy-wasm host with guests in text: requests and answers on their way.

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

use guest::{guest, pairs, version};
use http::{HeaderMap, Method, StatusCode};
use leeward_wasm::{Fault, Filter, RequestHead, Step, Way};
use rig::{Rig, answer, bytes, fields, head, resumed, run, spec, value};
use std::time::Duration;

/// A callback for heads of requests, with these lines in it.
fn on_request(lines: &str) -> String {
    format!(
        r#"(func (export "proxy_on_request_headers") (param $id i32) (param $count i32) (param $end i32) (result i32)
             {lines})"#
    )
}

#[test]
fn a_head_is_read_and_changed() {
    run(async {
        let rig = Rig::new(&guest(&on_request(
            r#"(call $note @"count" (local.get $count))
               (call $note @"end" (local.get $end))
               (call $value (i32.const 0) @":path")
               (call $ok (call $proxy_add_header_map_value (i32.const 0) @"was" (call $got)))
               (call $value (i32.const 0) @"X-A")
               (call $ok (call $proxy_add_header_map_value (i32.const 0) @"was" (call $got)))
               (call $note @"missing"
                 (call $proxy_get_header_map_value (i32.const 0) @"none" (i32.const 16) (i32.const 20)))
               (call $ok (call $proxy_replace_header_map_value (i32.const 0) @":path" @"/other"))
               (call $note @"set-method" (call $proxy_replace_header_map_value (i32.const 0) @":method" @"POST"))
               (call $note @"set-host" (call $proxy_replace_header_map_value (i32.const 0) @"Host" @"other"))
               (call $ok (call $proxy_replace_header_map_value (i32.const 0) @":authority" @"shop:8080"))
               (call $ok (call $proxy_remove_header_map_value (i32.const 0) @"x-a"))
               (call $note @"bad" (call $proxy_add_header_map_value (i32.const 0) @"x" @"a\0d\0ab: c"))
               (call $note @"bad-name" (call $proxy_add_header_map_value (i32.const 0) @"x\ff" @"a"))
               (call $note @"no-map" (call $proxy_add_header_map_value (i32.const 9) @"x" @"a"))
               (call $note @"outside" (call $proxy_add_header_map_value
                 (i32.const 0) (i32.const -8) (i32.const 16) @"a"))
               (i32.const 0)"#,
        )))
        .await;
        let mut filter = rig.filter().await;
        let given = head(&[("x-a", "1"), ("x-b", "2")]);
        assert_eq!(filter.request(given, true).await, Ok(Step::Go));
        let head = filter.take_request().unwrap();
        for (name, want) in [
            ("count", "6"),
            ("end", "1"),
            ("missing", "1"),
            ("set-method", "2"),
            ("set-host", "2"),
            ("bad", "2"),
            ("bad-name", "2"),
            ("no-map", "2"),
            ("outside", "6"),
            ("x-a", ""),
            ("x-b", "2"),
        ] {
            assert_eq!(value(&head.headers, name), want, "{name}");
        }
        let was: Vec<_> = head.headers.get_all("was").iter().collect();
        assert_eq!(was, ["/p?q=1", "1"]);
        assert_eq!((head.path.as_str(), &head.method), ("/other", &Method::GET));
        assert!(filter.take_request().is_none());
        assert!(!filter.wants_request_body() && !filter.wants_response());
        assert_eq!(filter.version().len(), 12);
    });
}

#[test]
fn a_map_is_read_and_set_whole() {
    run(async {
        let list = pairs(&[(":path", "/set"), ("only", "this"), ("two", "1"), ("two", "2")]);
        let rig = Rig::new(&guest(&on_request(&format!(
            r#"(call $ok (call $proxy_get_header_map_pairs (i32.const 0) (i32.const 16) (i32.const 20)))
               (call $ok (call $proxy_get_header_map_size (i32.const 0) (i32.const 24)))
               (if (i32.ne (i32.load (i32.const 20)) (i32.load (i32.const 24))) (then unreachable))
               (call $ok (call $proxy_set_header_map_pairs (i32.const 0) @"{list}"))
               ;; What was read goes into a field as it is, but for its zeros, and is compared outside.
               (call $note @"count" (i32.load (i32.load (i32.const 16))))
               (call $note @"bad" (call $proxy_set_header_map_pairs (i32.const 0) @"\02\00\00\00\01"))
               (call $note @"none" (call $proxy_get_header_map_size (i32.const 1) (i32.const 24)))
               (call $ok (call $proxy_get_header_map_pairs (i32.const 1) (i32.const 16) (i32.const 20)))
               (call $note @"empty" (i32.load (i32.const 20)))
               (i32.const 0)"#
        ))))
        .await;
        let mut filter = rig.filter().await;
        filter
            .request(head(&[("x-a", "1"), ("x-b", "2")]), true)
            .await
            .unwrap();
        let head = filter.take_request().unwrap();
        assert_eq!((head.path.as_str(), &head.method), ("/set", &Method::GET));
        let get = |name| value(&head.headers, name);
        assert_eq!(
            (get("count"), get("bad"), get("none"), get("empty")),
            ("6", "2", "2", "0")
        );
        assert_eq!((get("only"), get("x-a")), ("this", ""));
        assert_eq!(head.headers.get_all("two").iter().count(), 2);
    });
}

#[test]
fn an_answer_is_read_and_changed_and_the_request_still_read() {
    run(async {
        let rig = Rig::new(&guest(
            r#"(func (export "proxy_on_response_headers") (param $id i32) (param i32 i32) (result i32)
                 (call $value (i32.const 2) @":status")
                 (call $ok (call $proxy_replace_header_map_value (i32.const 2) @"was" (call $got)))
                 (call $value (i32.const 0) @":path")
                 (call $ok (call $proxy_replace_header_map_value (i32.const 2) @"path" (call $got)))
                 (call $ok (call $proxy_replace_header_map_value (i32.const 2) @":status" @"404"))
                 (call $note2 @"late" (call $proxy_replace_header_map_value (i32.const 0) @"a" @"b"))
                 (i32.const 0))"#,
        ))
        .await;
        let mut filter = rig.filter().await;
        let head = rig.request(&mut filter).await;
        assert_eq!(head.headers.len(), 0);
        assert!(filter.wants_response() && !filter.wants_response_body());
        assert_eq!(filter.response(answer(&[]), true).await, Ok(Step::Go));
        let answer = filter.take_response().unwrap();
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        let get = |name| value(&answer.headers, name);
        assert_eq!((get("was"), get("path"), get("late")), ("200", "/p?q=1", "2"));
    });
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

/// Answers by itself with the grpc-status in the field `grpc`.
const REPLY: &str = r#"
  (func $reply (param $grpc i32) (result i32)
    (call $proxy_send_local_response
      (i32.const 403) @"details" @"no 100%" @"\01\00\00\00\01\00\00\00\01\00\00\00a\001\00" (local.get $grpc)))
"#;

#[test]
fn a_guest_answers_by_itself() {
    run(async {
        let rig = Rig::new(&guest(&format!(
            r#"{REPLY} {}
               (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
                 (call $ok (call $reply (i32.const -1)))
                 (i32.const 0))"#,
            on_request("(call $ok (call $reply (i32.const -1))) (i32.const 1)")
        )))
        .await;
        let mut filter = rig.filter().await;
        let Ok(Step::Respond(reply)) = filter.request(head(&[]), true).await else {
            panic!()
        };
        assert_eq!(
            (reply.status, reply.body, reply.grpc_status),
            (StatusCode::FORBIDDEN, bytes("no 100%"), None)
        );
        assert_eq!(reply.headers, fields(&[("a", "1")]));
        // To a call of gRPC it is an answer of gRPC.
        let mut filter = rig.filter().await;
        let call = head(&[("content-type", "application/grpc+proto")]);
        let Ok(Step::Respond(reply)) = filter.request(call, true).await else {
            panic!()
        };
        assert_eq!(
            (reply.status, reply.body, reply.grpc_status),
            (StatusCode::OK, bytes(""), Some(7))
        );
        assert_eq!(value(&reply.headers, "grpc-message"), "no 100%25");
        // In the middle of an answer, too.
        assert_eq!(filter.response(answer(&[]), false).await, Ok(Step::Go));
        assert!(matches!(
            filter.response_body(bytes("x"), true).await,
            Ok(Step::Respond(_))
        ));
    });
}

#[test]
fn an_answer_of_a_guest_is_checked() {
    run(async {
        let smuggled = pairs(&[("a", "b\r\nset-cookie: c")]);
        let framed = pairs(&[("transfer-encoding", "chunked")]);
        let length = pairs(&[("content-length", "1")]);
        let reply = |status: u32, headers: &str, grpc: i32| {
            format!(
                r#"(call $proxy_send_local_response (i32.const {status}) @"" @"body" @"{headers}" (i32.const {grpc}))"#
            )
        };
        let rig = Rig::new(&guest(&on_request(&format!(
            r#"(call $note @"smuggled" {})
               (call $note @"framed" {})
               (call $note @"status" {})
               (call $note @"informational" {})
               (call $value (i32.const 0) @"answer")
               (if (i32.load8_u (i32.load (i32.const 16))) (then (call $ok {})))
               (i32.const 0)"#,
            reply(200, &smuggled, -1),
            reply(200, &framed, -1),
            reply(4711, "", -1),
            reply(100, "", -1),
            reply(200, &length, 5),
        ))))
        .await;
        let mut filter = rig.filter().await;
        assert_eq!(
            filter.request(head(&[("answer", "")]), true).await,
            Ok(Step::Go),
            "none was given"
        );
        let head = filter.take_request().unwrap();
        for name in ["smuggled", "framed", "status", "informational"] {
            assert_eq!(value(&head.headers, name), "2", "{name}");
        }
        let mut filter = rig.filter().await;
        let Ok(Step::Respond(reply)) = filter.request(rig::head(&[("answer", "y")]), true).await else {
            panic!()
        };
        assert_eq!(reply.headers.len(), 0, "the proxy knows the length");
        assert_eq!(reply.grpc_status, None, "it is no call of gRPC");
    });
}

#[test]
fn a_guest_breaks_a_request_off() {
    run(async {
        let rig = Rig::new(&guest(&on_request(
            "(call $ok (call $proxy_close_stream (i32.const 0))) (i32.const 1)",
        )))
        .await;
        let mut filter = rig.filter().await;
        let Ok(Step::Respond(reply)) = filter.request(head(&[]), true).await else {
            panic!()
        };
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    });
}

/// Puts properties into fields of the head on its way: as text, or as a number.
fn property(path: &str, is_number: bool) -> String {
    let escaped = path.replace('.', "\\00").replace("%2e", ".");
    let field = path.replace("%2e", ".");
    let put = if is_number {
        format!(r#"(call $note @"{field}" (i32.wrap_i64 (i64.load (i32.load (i32.const 16)))))"#)
    } else {
        format!(
            r#"(call $ok (call $proxy_replace_header_map_value (i32.const $map) @"{field}" (call $got)))"#
        )
    };
    format!(
        r#"(if (i32.eqz (call $proxy_get_property @"{escaped}" (i32.const 16) (i32.const 20))) (then {put}))
        "#
    )
}

#[test]
fn properties_are_what_plugins_of_envoy_ask_for() {
    run(async {
        let texts = [
            ("request.path", "/p?q=1"),
            ("request.url_path", "/p"),
            ("request.query", "q=1"),
            ("request.host", "shop:8080"),
            ("request.scheme", "http"),
            ("request.method", "GET"),
            ("request.headers.x-a", "1"),
            ("request.referer", "r"),
            ("request.useragent", "u"),
            ("request.id", "i"),
            ("request.protocol", "HTTP/1.1"),
            ("source.address", "10.0.0.1:4711"),
            ("connection.uri_san_peer_certificate", "spiffe://mesh/shop"),
            ("connection.requested_server_name", "reviews"),
            ("plugin_name", "p"),
            ("plugin_vm_id", "p"),
            ("plugin_root_id", ""),
            ("cluster_name", "reviews"),
            ("route_name", "shop/0"),
            ("xds.cluster_name", "reviews"),
            ("xds.route_name", "shop/0"),
            ("xds.node.id", "node-1"),
            ("node.id", "node-1"),
            ("node.metadata.NAME", "node-1"),
            ("node.locality.zone", "a"),
            ("mine", "kept"),
            ("filter_state.wasm%2emine", "kept"),
        ];
        let numbers = [
            ("source.port", "4711"),
            ("destination.port", "8080"),
            ("listener_direction", "2"),
            ("xds.listener_direction", "2"),
            ("request.size", "12"),
        ];
        let missing = [
            "upstream.address",
            "request",
            "nothing",
            "request.nothing",
            "response.code",
            "request.duration",
        ];
        let lines: String = texts
            .iter()
            .map(|(path, _)| property(path, false))
            .chain(numbers.iter().map(|(path, _)| property(path, true)))
            .chain(missing.iter().map(|path| property(path, false)))
            .collect::<String>()
            .replace("$map", "0");
        let lines = format!(
            r#"(call $ok (call $proxy_set_property @"mine" @"kept"))
               (call $ok (call $proxy_get_property @"connection\00mtls" (i32.const 16) (i32.const 20)))
               (call $note @"mtls" (i32.load8_u (i32.load (i32.const 16))))
               (call $ok (call $proxy_get_property @"request\00time" (i32.const 16) (i32.const 20)))
               (if (i64.lt_u (i64.load (i32.load (i32.const 16))) (i64.const 1700000000000000000)) (then unreachable))
               (call $ok (call $proxy_get_property @"request\00headers" (i32.const 16) (i32.const 20)))
               (call $note @"all" (i32.load (i32.load (i32.const 16))))
               {lines} (i32.const 0)"#
        );
        let rig = Rig::new(&guest(&on_request(&lines))).await;
        let mut filter = rig.filter().await;
        let given = [
            ("x-a", "1"),
            ("referer", "r"),
            ("user-agent", "u"),
            ("x-request-id", "i"),
            ("content-length", "12"),
        ];
        assert_eq!(filter.request(head(&given), false).await, Ok(Step::Go));
        let head = filter.take_request().unwrap();
        for (path, want) in texts
            .iter()
            .chain(&numbers)
            .chain(&[("mtls", "1"), ("all", "10")])
        {
            let name = path.replace("%2e", ".");
            assert!(head.headers.contains_key(&name), "{name}");
            assert_eq!(value(&head.headers, &name), *want, "{name}");
        }
        for path in missing {
            assert!(!head.headers.contains_key(path), "{path}");
        }
    });
}

#[test]
fn a_guest_reads_what_has_been_when_it_writes_it_down() {
    run(async {
        let rig = Rig::new(&guest(
            r#"(func $number (param $path i32) (param $len i32) (result i32)
                 (call $ok (call $proxy_get_property (local.get $path) (local.get $len) (i32.const 16) (i32.const 20)))
                 (i32.wrap_i64 (i64.load (i32.load (i32.const 16)))))
               (func (export "proxy_on_response_trailers") (param i32 i32) (result i32) (i32.const 0))
               (func (export "proxy_on_log") (param $id i32)
                 (call $gauge @"code" (call $number @"response\00code"))
                 (call $gauge @"flags" (call $number @"response\00flags"))
                 (call $gauge @"size" (call $number @"response\00size"))
                 (call $gauge @"total" (call $number @"response\00total_size"))
                 (call $gauge @"grpc" (call $number @"response\00grpc_status"))
                 (call $gauge @"took" (i32.ne (i32.const 0) (call $number @"request\00duration")))
                 (call $ok (call $proxy_get_property @"response\00headers\00a" (i32.const 16) (i32.const 20)))
                 (call $ok (call $proxy_get_property @"response\00code_details" (i32.const 16) (i32.const 20)))
                 (call $value (i32.const 0) @":path")
                 (call $value (i32.const 2) @":status"))"#,
        ))
        .await;
        let mut filter = rig.filter().await;
        rig.request(&mut filter).await;
        filter.response(answer(&[("a", "1")]), false).await.unwrap();
        filter.response_body(bytes("12345"), false).await.unwrap();
        filter
            .response_trailers(fields(&[("grpc-status", "9")]))
            .await
            .unwrap();
        drop(filter);
        rig.until(|seen| seen.called("proxy_on_log") == 1).await;
        assert_eq!(rig.seen.calls.borrow().last(), Some(&("proxy_on_log", Ok(()))));
        for (name, want) in [
            ("code", 200.0),
            ("flags", 0.0),
            ("size", 5.0),
            ("total", 17.0),
            ("grpc", 9.0),
            ("took", 1.0),
        ] {
            assert_eq!(rig.seen.gauge(name), Some(want), "{name}");
        }
    });
}

#[test]
fn version_0_1_0_runs() {
    run(async {
        let module = version(
            "proxy_abi_version_0_1_0",
            r#"(func (export "proxy_on_configure") (param $root i32) (param $len i32) (result i32)
                 (call $ok (call $proxy_get_configuration (i32.const 16) (i32.const 20)))
                 (i32.eq (i32.load (i32.const 20)) (local.get $len)))
               (func (export "proxy_on_request_headers") (param $id i32) (param $count i32) (result i32)
                 (call $note @"count" (local.get $count))
                 (call $value (i32.const 0) @"missing")
                 (call $note @"empty" (i32.load (i32.const 20)))
                 (call $ok (call $proxy_clear_route_cache))
                 (call $ok (call $proxy_continue_request))
                 (i32.const 1))
               (func (export "proxy_on_response_headers") (param $id i32) (param $count i32) (result i32)
                 (call $ok (call $proxy_continue_response))
                 (i32.const 1))"#,
        );
        let rig = Rig::new(&module).await;
        let mut filter = rig.filter().await;
        let head = rig.request(&mut filter).await;
        assert_eq!(
            (value(&head.headers, "count"), value(&head.headers, "empty")),
            ("4", "0")
        );
        assert_eq!(filter.response(answer(&[]), true).await, Ok(Step::Go));
    });
}

#[test]
fn fields_are_bounded() {
    run(async {
        let rig = Rig::new(&guest(&on_request(
            r#"(local $n i32)
               (loop $more
                 (local.set $n (i32.add (local.get $n) (i32.const 1)))
                 (br_if $more (i32.eqz (call $proxy_add_header_map_value (i32.const 0) @"x" @"1"))))
               (call $ok (call $proxy_remove_header_map_value (i32.const 0) @"x"))
               (call $note @"fields" (local.get $n))
               (call $note @"large" (call $proxy_add_header_map_value
                 (i32.const 0) @"x" (i32.const 131072) (i32.const 65536)))
               (i32.const 0)"#,
        )))
        .await;
        let head = rig.pass().await;
        assert_eq!(
            (value(&head.headers, "fields"), value(&head.headers, "large")),
            ("129", "2")
        );
    });
}

async fn request_with(filter: &mut Filter, head: RequestHead) -> Result<HeaderMap, Fault> {
    let step = filter.request(head, true).await?;
    assert_eq!(step, Step::Go);
    Ok(filter.take_request().unwrap().headers)
}
