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
use leeward_wasm::{Fault, Filter, RequestHead, Step};
use rig::{Rig, answer, bytes, fields, head, run, value};

/// Answers by itself with the grpc-status in the field `grpc`.
const REPLY: &str = r#"
  (func $reply (param $grpc i32) (result i32)
    (call $proxy_send_local_response
      (i32.const 403) @"details" @"no 100%" @"\01\00\00\00\01\00\00\00\01\00\00\00a\001\00" (local.get $grpc)))
"#;

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
