//! The proxy-wasm host with guests in text: calls of other services.

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

use bytes::Bytes;
use guest::{guest, pairs};
use http::{HeaderMap, Method, StatusCode};
use leeward_wasm::{AnswerPiece, AnswerTo, CallBody, CallError, Fault, MeshAnswer, MeshCall, Step};
use rig::{Rig, fields, head, now, resumed, run, spec, value};
use std::time::Duration;

/// Asks the service `auth` and holds the request up until it is told, then writes down what it was told and lets it go.
fn asking(upstream: &str, timeout: u32, told: &str) -> String {
    let headers = pairs(&[
        (":method", "POST"),
        (":path", "/check?a=1"),
        (":authority", "auth.example"),
        ("x-a", "1"),
        ("connection", "close"),
        ("content-length", "99"),
    ]);
    format!(
        r#"(global $id (mut i32) (i32.const 0))
           (global $number (mut i32) (i32.const 0))
           (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32)
             (global.set $id (local.get $id))
             (call $note @"sent"
               (call $proxy_http_call @"{upstream}" @"{headers}" @"body" @"" (i32.const {timeout}) (i32.const 16)))
             (global.set $number (i32.load (i32.const 16)))
             (i32.ne (global.get $number) (i32.const 0)))
           (func (export "proxy_on_http_call_response")
             (param $root i32) (param $number i32) (param $headers i32) (param $len i32) (param $trailers i32)
             (if (i32.ne (local.get $number) (global.get $number)) (then unreachable))
             (call $ok (call $proxy_set_effective_context (global.get $id)))
             (call $note @"headers" (local.get $headers))
             (call $note @"len" (local.get $len))
             (call $note @"trailers" (local.get $trailers))
             (call $ok (call $proxy_get_status (i32.const 24) (i32.const 16) (i32.const 20)))
             (call $note @"status" (i32.load (i32.const 24)))
             (call $ok (call $proxy_replace_header_map_value (i32.const 0) @"message" (call $got)))
             {told}
             (call $ok (call $proxy_continue_stream (i32.const 0))))"#
    )
}

const TOLD: &str = r#"
  (call $value (i32.const 6) @":status")
  (call $ok (call $proxy_replace_header_map_value (i32.const 0) @"answered" (call $got)))
  (call $value (i32.const 7) @"t")
  (call $ok (call $proxy_replace_header_map_value (i32.const 0) @"t" (call $got)))
  (call $ok (call $proxy_get_buffer_bytes (i32.const 4) (i32.const 0) (i32.const -1) (i32.const 16) (i32.const 20)))
  (call $ok (call $proxy_replace_header_map_value (i32.const 0) @"body" (call $got)))
  (call $note @"read-only" (call $proxy_replace_header_map_value (i32.const 6) @"a" @"b"))
"#;

fn reply(call: MeshCall, answer: Result<MeshAnswer, CallError>) {
    let AnswerTo::Whole(to) = call.answer else {
        panic!("a stream")
    };
    to.send(answer).unwrap();
}

fn answered(status: u16, body: &str) -> MeshAnswer {
    MeshAnswer {
        status: StatusCode::from_u16(status).unwrap(),
        headers: fields(&[("b", "2")]),
        body: rig::bytes(body),
        trailers: fields(&[("t", "3")]),
    }
}

#[test]
fn a_guest_asks_a_service_and_lets_the_request_go_on_its_answer() {
    run(async {
        for upstream in ["auth", "outbound|80||auth.default.svc.cluster.local"] {
            let rig = Rig::new(&guest(&asking(upstream, 1000, TOLD))).await;
            let mut filter = rig.filter().await;
            assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Wait));
            let call = rig.call().await;
            assert_eq!(
                (&*call.plugin, &*call.service, &call.method),
                ("p", "auth", &Method::POST)
            );
            assert_eq!(
                (call.path.as_str(), call.authority.as_deref()),
                ("/check?a=1", Some("auth.example"))
            );
            assert_eq!(call.headers, fields(&[("x-a", "1")]), "nothing for one hop");
            assert_eq!(value(&call.origin, "traceparent"), "00-1-2-01");
            assert!(matches!(&call.body, CallBody::Whole(body) if body == "body"));
            let left = call.until.saturating_duration_since(now());
            assert!(left <= Duration::from_secs(1), "{left:?}");
            reply(call, Ok(answered(201, "yes")));
            assert_eq!(resumed(&mut filter).await, Ok(Step::Go));
            let head = filter.take_request().unwrap();
            for (name, want) in [
                ("sent", "0"),
                ("headers", "2"),
                ("len", "3"),
                ("trailers", "1"),
                ("status", "0"),
                ("answered", "201"),
                ("t", "3"),
                ("body", "yes"),
                ("read-only", "2"),
            ] {
                assert_eq!(value(&head.headers, name), want, "{name}");
            }
        }
    });
}

#[test]
fn a_call_without_an_answer_is_told_too() {
    run(async {
        for (how, message) in [
            (Some(Err(CallError::Failed)), "reset"),
            (Some(Err(CallError::Loop)), "plugins call each other"),
            (
                Some(Ok(answered(200, &"a".repeat((1 << 20) + 1)))),
                "the answer is too large",
            ),
            (None, "timeout"),
        ] {
            let timeout = if how.is_some() { 60_000 } else { 20 };
            let rig = Rig::new(&guest(&asking("auth", timeout, ""))).await;
            let mut filter = rig.filter().await;
            assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Wait));
            let call = rig.call().await;
            let kept = match how {
                Some(answer) => {
                    reply(call, answer);
                    None
                }
                None => Some(call),
            };
            assert_eq!(resumed(&mut filter).await, Ok(Step::Go));
            drop(kept);
            let head = filter.take_request().unwrap();
            let get = |name| value(&head.headers, name);
            assert_eq!(
                (get("headers"), get("status"), get("message")),
                ("0", "11", message)
            );
        }
        // Nobody makes the call.
        let rig = Rig::new(&guest(&asking("auth", 0, ""))).await;
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Wait));
        drop(rig.call().await);
        assert_eq!(resumed(&mut filter).await, Ok(Step::Go));
    });
}

#[test]
fn a_guest_calls_only_what_policy_names_and_so_often() {
    run(async {
        let rig = Rig::new(&guest(&asking("other", 0, ""))).await;
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Go));
        assert_eq!(value(&filter.take_request().unwrap().headers, "sent"), "2");
        let call = |headers: &str, body: &str| {
            format!(r#"(call $proxy_http_call @"auth" @"{headers}" {body} @"" (i32.const 0) (i32.const 16))"#)
        };
        let good = pairs(&[(":method", "GET"), (":path", "/"), (":authority", "a")]);
        let no_path = pairs(&[(":method", "GET"), (":authority", "a")]);
        let bad_path = pairs(&[(":method", "GET"), (":path", "x"), (":authority", "a")]);
        let bad_value = pairs(&[
            (":method", "GET"),
            (":path", "/"),
            (":authority", "a"),
            ("x", "a\nb"),
        ]);
        let (small, large) = (r#"@"""#, "(i32.const 0) (i32.const 1048577)");
        let lines = format!(
            r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (if (i32.lt_u (memory.size) (i32.const 20)) (then (drop (memory.grow (i32.const 20)))))
                 (call $note @"no-path" {}) (call $note @"bad-path" {}) (call $note @"bad-value" {})
                 (call $note @"large" {})
                 (call $note @"1" {ok}) (call $note @"2" {ok}) (call $note @"3" {ok})
                 (i32.const 0))"#,
            call(&no_path, small),
            call(&bad_path, small),
            call(&bad_value, small),
            call(&good, large),
            ok = call(&good, small),
        );
        let rig = Rig::with(&guest(&lines), spec(|spec| spec.limits.max_calls = 2)).await;
        for _ in 0..2 {
            // Each request has calls of its own.
            let head = rig.pass().await;
            for (name, want) in [
                ("no-path", "2"),
                ("bad-path", "2"),
                ("bad-value", "2"),
                ("large", "2"),
                ("1", "0"),
                ("2", "0"),
                ("3", "10"),
            ] {
                assert_eq!(value(&head.headers, name), want, "{name}");
            }
        }
    });
}

#[test]
fn an_answer_comes_to_a_guest_whose_request_is_over_and_to_no_machine_that_is_new() {
    run(async {
        let lines = asking("auth", 60_000, "");
        // It doesn't wait, and traps when it is told to.
        let lines = lines
            .replace("(i32.ne (global.get $number) (i32.const 0))", "(i32.const 0)")
            .replace(
                "(call $ok (call $proxy_set_effective_context (global.get $id)))",
                r#"(call $gauge @"told" (call $proxy_set_effective_context (global.get $id))) (return)"#,
            );
        let trap =
            r#"(func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) unreachable)"#;
        let rig = Rig::new(&guest(&format!("{lines} {trap}"))).await;
        rig.pass().await;
        reply(rig.call().await, Ok(answered(200, "")));
        rig.until(|seen| seen.gauge("told") == Some(2.0)).await;
        let mut filter = rig.filter().await;
        rig.request(&mut filter).await;
        let call = rig.call().await;
        assert_eq!(filter.response(rig::answer(&[]), true).await, Err(Fault::Trap));
        // The machine is gone, and nobody waits for the answer.
        let AnswerTo::Whole(mut to) = call.answer else {
            panic!()
        };
        to.closed().await;
        rig.pass().await;
        assert_eq!(rig.seen.called("proxy_on_http_call_response"), 1);
    });
}

#[test]
fn a_timer_calls_too() {
    run(async {
        let headers = pairs(&[(":method", "GET"), (":path", "/keys"), (":authority", "auth")]);
        let lines = format!(
            r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
               (func (export "proxy_on_configure") (param i32 i32) (result i32)
                 (call $ok (call $proxy_set_tick_period_milliseconds (i32.const 10)))
                 (i32.const 1))
               (func (export "proxy_on_tick") (param i32)
                 (call $ok (call $proxy_set_tick_period_milliseconds (i32.const 0)))
                 (call $ok (call $proxy_http_call @"auth" @"{headers}" @"" @"" (i32.const 0) (i32.const 16))))
               (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
                 (call $gauge @"len" (local.get 3)))"#
        );
        let rig = Rig::new(&guest(&lines)).await;
        rig.pass().await;
        let call = rig.call().await;
        assert!(call.origin.is_empty(), "it is part of no request");
        reply(call, Ok(answered(200, "12345")));
        rig.until(|seen| seen.gauge("len") == Some(5.0)).await;
    });
}

/// What a guest of gRPC is told is seen in gauges.
const HEARS: &str = r#"
  (func (export "proxy_on_grpc_receive_initial_metadata") (param i32 i32) (param $count i32)
    (call $gauge @"initial" (local.get $count))
    (call $value (i32.const 4) @"i"))
  (func (export "proxy_on_grpc_receive") (param i32) (param $number i32) (param $len i32)
    (call $gauge @"message" (local.get $len))
    (call $ok (call $proxy_get_buffer_bytes (i32.const 5) (i32.const 0) (i32.const -1) (i32.const 16) (i32.const 20)))
    (call $gauge @"first" (i32.load8_u (i32.load (i32.const 16)))))
  (func (export "proxy_on_grpc_receive_trailing_metadata") (param i32 i32) (param $count i32)
    (call $gauge @"trailing" (local.get $count))
    (call $value (i32.const 5) @"grpc-status"))
  (func (export "proxy_on_grpc_close") (param i32) (param $number i32) (param $status i32)
    (call $ok (call $proxy_get_status (i32.const 24) (i32.const 16) (i32.const 20)))
    (if (i32.ne (i32.load (i32.const 24)) (local.get $status)) (then unreachable))
    (call $gauge @"text" (i32.load (i32.const 20)))
    (call $gauge @"closed" (local.get $status)))
"#;

fn grpc(body: &'static [u8], trailers: &[(&'static str, &str)]) -> MeshAnswer {
    MeshAnswer {
        status: StatusCode::OK,
        headers: fields(&[("content-type", "application/grpc")]),
        body: Bytes::from_static(body),
        trailers: fields(trailers),
    }
}

#[test]
fn a_method_is_called() {
    run(async {
        let metadata = pairs(&[("x-a", "1"), ("te", "trailers")]);
        // As Envoy's SDKs have it: the cluster within a message.
        let upstream = "\\0a\\06\\0a\\04auth";
        let lines = format!(
            r#"{HEARS}
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (call $ok (call $proxy_grpc_call @"{upstream}" @"pkg.Service" @"Method" @"{metadata}" @"abc"
                   (i32.const 1000) (i32.const 16)))
                 (call $note @"send" (call $proxy_grpc_send (i32.load (i32.const 16)) @"x" (i32.const 0)))
                 (call $note @"unknown" (call $proxy_grpc_call @"other" @"S" @"M" @"" @""
                   (i32.const 0) (i32.const 20)))
                 (i32.const 0))"#
        );
        for (answer, want) in [
            (Ok(grpc(b"\0\0\0\0\x02ok", &[("grpc-status", "0")])), None),
            (
                Ok(grpc(b"", &[("grpc-status", "5"), ("grpc-message", "not%20here")])),
                Some((5.0, 8.0)),
            ),
            (
                Ok(grpc(b"\x01\0\0\0\0", &[("grpc-status", "0")])),
                Some((13.0, 24.0)),
            ),
            (Ok(grpc(b"", &[])), Some((2.0, 0.0))),
            (
                Ok(MeshAnswer {
                    status: StatusCode::BAD_GATEWAY,
                    ..grpc(b"", &[])
                }),
                Some((14.0, 0.0)),
            ),
            (Err(CallError::Failed), Some((14.0, 5.0))),
            (Err(CallError::Timeout), Some((4.0, 7.0))),
        ] {
            let rig = Rig::new(&guest(&lines)).await;
            let head = rig.pass().await;
            assert_eq!(
                (value(&head.headers, "send"), value(&head.headers, "unknown")),
                ("2", "4")
            );
            let call = rig.call().await;
            assert_eq!(
                (&*call.service, call.path.as_str(), &call.method),
                ("auth", "/pkg.Service/Method", &Method::POST)
            );
            assert_eq!(
                call.headers,
                fields(&[("x-a", "1"), ("content-type", "application/grpc")])
            );
            assert!(matches!(&call.body, CallBody::Whole(body) if body == &b"\0\0\0\0\x03abc"[..]));
            reply(call, answer);
            match want {
                None => {
                    rig.until(|seen| seen.gauge("message") == Some(2.0)).await;
                    assert_eq!(rig.seen.gauge("first"), Some(f64::from(b'o')));
                    assert_eq!(rig.seen.called("proxy_on_grpc_close"), 0);
                }
                Some((status, text)) => {
                    rig.until(|seen| seen.gauge("closed").is_some()).await;
                    assert_eq!(
                        (rig.seen.gauge("closed"), rig.seen.gauge("text")),
                        (Some(status), Some(text))
                    );
                    assert_eq!(rig.seen.called("proxy_on_grpc_receive"), 0);
                }
            }
        }
    });
}

/// Opens a stream, and sends two messages.
fn streaming(rest: &str) -> String {
    format!(
        r#"{HEARS}
           (global $number (mut i32) (i32.const 0))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (call $ok (call $proxy_grpc_stream @"auth" @"S" @"Chat" @"" (i32.const 16)))
             (global.set $number (i32.load (i32.const 16)))
             (call $ok (call $proxy_grpc_send (global.get $number) @"one" (i32.const 0)))
             {rest}
             (i32.const 0))"#
    )
}

#[test]
fn a_stream_goes_both_ways() {
    run(async {
        let last = r#"(call $ok (call $proxy_grpc_send (global.get $number) @"two" (i32.const 1)))
                      (call $note @"late" (call $proxy_grpc_send (global.get $number) @"three" (i32.const 0)))"#;
        let rig = Rig::new(&guest(&streaming(last))).await;
        let head = rig.pass().await;
        assert_eq!(value(&head.headers, "late"), "2");
        let call = rig.call().await;
        assert_eq!(call.path.as_str(), "/S/Chat");
        let (CallBody::Pieces(mut sent), AnswerTo::Pieces(to)) = (call.body, call.answer) else {
            panic!()
        };
        assert_eq!(sent.recv().await.unwrap(), &b"\0\0\0\0\x03one"[..]);
        assert_eq!(sent.recv().await.unwrap(), &b"\0\0\0\0\x03two"[..]);
        assert!(sent.recv().await.is_none(), "it has said its last");
        to.send(AnswerPiece::Head(StatusCode::OK, fields(&[("i", "1")])))
            .await
            .unwrap();
        rig.until(|seen| seen.gauge("initial") == Some(1.0)).await;
        // Messages come cut at any place.
        for piece in [&b"\0\0\0\0\x02a"[..], b"b\0\0\0\0\x01c\0"] {
            to.send(AnswerPiece::Data(Bytes::from_static(piece)))
                .await
                .unwrap();
        }
        rig.until(|seen| seen.called("proxy_on_grpc_receive") == 2).await;
        assert_eq!(
            (rig.seen.gauge("message"), rig.seen.gauge("first")),
            (Some(1.0), Some(f64::from(b'c')))
        );
        let trailers = fields(&[("grpc-status", "0"), ("x", "y")]);
        to.send(AnswerPiece::Trailers(trailers)).await.unwrap();
        rig.until(|seen| seen.gauge("closed") == Some(0.0)).await;
        assert_eq!(rig.seen.gauge("trailing"), Some(2.0));
    });
}

#[test]
fn a_stream_ends_in_many_ways() {
    run(async {
        for (pieces, want) in [
            (
                vec![AnswerPiece::Head(
                    StatusCode::OK,
                    fields(&[("i", "1"), ("grpc-status", "7")]),
                )],
                7.0,
            ),
            (
                vec![AnswerPiece::Head(StatusCode::FORBIDDEN, HeaderMap::new())],
                7.0,
            ),
            (vec![AnswerPiece::Failed(CallError::NotAllowed)], 14.0),
            (
                vec![
                    AnswerPiece::Head(StatusCode::OK, fields(&[("i", "1")])),
                    AnswerPiece::Data(Bytes::from_static(b"\x01\0\0\0\0")),
                ],
                13.0,
            ),
            (vec![], 14.0),
        ] {
            let rig = Rig::new(&guest(&streaming(""))).await;
            rig.pass().await;
            let call = rig.call().await;
            let AnswerTo::Pieces(to) = call.answer else {
                panic!()
            };
            for piece in pieces {
                to.send(piece).await.unwrap();
            }
            drop(to);
            rig.until(|seen| seen.gauge("closed").is_some()).await;
            assert_eq!(rig.seen.gauge("closed"), Some(want));
        }
    });
}

#[test]
fn a_stream_is_closed_or_given_up() {
    run(async {
        let close = r#"(call $ok (call $proxy_grpc_close (global.get $number)))"#;
        let rig = Rig::new(&guest(&streaming(close))).await;
        rig.pass().await;
        let call = rig.call().await;
        let (CallBody::Pieces(mut sent), AnswerTo::Pieces(to)) = (call.body, call.answer) else {
            panic!()
        };
        sent.recv().await.unwrap();
        assert!(sent.recv().await.is_none());
        to.send(AnswerPiece::Head(StatusCode::OK, fields(&[("i", "1")])))
            .await
            .unwrap();
        rig.until(|seen| seen.gauge("initial") == Some(1.0)).await;
        let cancel = r#"(call $ok (call $proxy_grpc_cancel (global.get $number)))
                        (call $note @"gone" (call $proxy_grpc_cancel (global.get $number)))
                        (call $note @"closed" (call $proxy_grpc_close (global.get $number)))"#;
        let rig = Rig::new(&guest(&streaming(cancel))).await;
        let head = rig.pass().await;
        assert_eq!(
            (value(&head.headers, "gone"), value(&head.headers, "closed")),
            ("1", "1")
        );
        let AnswerTo::Pieces(to) = rig.call().await.answer else {
            panic!()
        };
        to.closed().await;
        assert_eq!(rig.seen.called("proxy_on_grpc_close"), 0);
    });
}

#[test]
fn calls_that_are_given_up_at_once_count_all_the_same() {
    run(async {
        let lines = r#"
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $n i32) (local $sent i32)
            (loop $more
              (if (i32.eqz (call $proxy_grpc_call @"auth" @"S" @"M" @"" @"abc" (i32.const 1000) (i32.const 16)))
                (then
                  (local.set $sent (i32.add (local.get $sent) (i32.const 1)))
                  (call $ok (call $proxy_grpc_cancel (i32.load (i32.const 16))))))
              (local.set $n (i32.add (local.get $n) (i32.const 1)))
              (br_if $more (i32.lt_u (local.get $n) (i32.const 100))))
            (call $note @"sent" (local.get $sent))
            (i32.const 0))"#;
        let rig = Rig::new(&guest(lines)).await;
        for _ in 0..2 {
            assert_eq!(value(&rig.pass().await.headers, "sent"), "4");
        }
        let mut calls = 0;
        while rig.mesh.borrow_mut().try_recv().is_ok() {
            calls += 1;
        }
        assert_eq!(calls, 8);
    });
}

#[test]
fn what_waits_to_be_sent_is_the_guests_memory() {
    run(async {
        // Messages of 300 KiB, of which three fit.
        let flood = r#"
          (drop (memory.grow (i32.const 8)))
          (global.set $heap (i32.const 524288))
          (block $full (loop $more
            (br_if $full (call $proxy_grpc_send (global.get $number) (i32.const 0) (i32.const 307200) (i32.const 0)))
            (global.set $sent (i32.add (global.get $sent) (i32.const 1)))
            (br $more)))
          (call $note @"sent" (global.get $sent))"#;
        let lines = format!("(global $sent (mut i32) (i32.const 0)) {}", streaming(flood));
        let rig = Rig::new(&guest(&lines)).await;
        let mut filter = rig.filter().await;
        let head = rig.request(&mut filter).await;
        // Two short ones come first.
        assert_eq!(value(&head.headers, "sent"), "3");
        let memory = || rig.host.report(now()).remove(0).memory;
        let with = memory();
        let call = rig.call().await;
        let CallBody::Pieces(mut messages) = call.body else {
            panic!()
        };
        let mut taken = 0;
        while let Ok(message) = messages.try_recv() {
            taken += message.len();
        }
        assert!(taken > 3 * 307_200, "{taken}");
        assert_eq!(memory(), with - taken as u64);
    });
}

#[test]
fn messages_that_wait_are_bounded() {
    run(async {
        let flood = r#"
          (loop $more (br_if $more (i32.eqz (call $proxy_grpc_send (global.get $number) @"x" (i32.const 0)))))
          (call $note @"full" (call $proxy_grpc_send (global.get $number) @"x" (i32.const 0)))"#;
        let rig = Rig::new(&guest(&streaming(flood))).await;
        let head = rig.pass().await;
        assert_eq!(value(&head.headers, "full"), "2");
    });
}

#[test]
fn a_trap_while_it_is_told_costs_the_machine_and_no_more() {
    run(async {
        let lines = asking("auth", 60_000, "unreachable");
        let rig = Rig::new(&guest(&lines)).await;
        for _ in 0..2 {
            let mut filter = rig.filter().await;
            assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Wait));
            reply(rig.call().await, Ok(answered(200, "")));
            assert_eq!(resumed(&mut filter).await, Err(Fault::Trap));
            let head = filter.take_request().unwrap();
            assert_eq!(value(&head.headers, "headers"), "", "what it changed is undone");
            assert_eq!(
                value(&head.headers, "sent"),
                "0",
                "what it had changed before is not"
            );
        }
        let metadata =
            |name: &str| format!("(export \"{name}\") (param i32 i32) (param $count i32) unreachable");
        for (bad, pieces) in [
            (
                "proxy_on_grpc_receive_initial_metadata",
                vec![AnswerPiece::Head(StatusCode::OK, HeaderMap::new())],
            ),
            (
                "proxy_on_grpc_receive",
                vec![
                    AnswerPiece::Head(StatusCode::OK, HeaderMap::new()),
                    AnswerPiece::Data(Bytes::from_static(b"\0\0\0\0\0")),
                ],
            ),
            (
                "proxy_on_grpc_receive_trailing_metadata",
                vec![AnswerPiece::Trailers(HeaderMap::new())],
            ),
            (
                "proxy_on_grpc_close",
                vec![AnswerPiece::Failed(CallError::Failed)],
            ),
        ] {
            let lines = streaming("").replace(HEARS, &format!("(func {})", metadata(bad)));
            let rig = Rig::new(&guest(&lines)).await;
            rig.pass().await;
            let AnswerTo::Pieces(to) = rig.call().await.answer else {
                panic!()
            };
            for piece in pieces {
                to.send(piece).await.unwrap();
            }
            rig.until(|seen| seen.called(bad) == 1).await;
            assert_eq!(rig.seen.calls.borrow().last(), Some(&(bad, Err(Fault::Trap))));
            rig.pass().await;
            assert_eq!(rig.seen.called("start"), 2);
        }
    });
}
