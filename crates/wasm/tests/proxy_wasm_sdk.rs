//! The proxy-wasm host with guests that were built with SDKs: `plugins/built`, made by `plugins/build.sh`.

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

#[path = "proxy_wasm/rig.rs"]
mod rig;

use http::StatusCode;
use leeward_policy::Name;
use leeward_policy::model::Plugin;
use leeward_wasm::{AnswerTo, CallBody, CallError, Fault, MeshAnswer, MeshCall, Step, Way, log_lines};
use rig::{Rig, answer, bytes, fields, head, resumed, run, spec, value};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn built(name: &str) -> Vec<u8> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/built");
    std::fs::read(built.join(name)).unwrap()
}

fn services(spec: &mut Plugin) {
    spec.access.services = vec![Name::parse("auth").unwrap(), Name::parse("audit").unwrap()];
}

#[test]
fn a_header_is_read_and_set() {
    run(async {
        let rig = Rig::new(&built("pw-headers.wasm")).await;
        for given in ["a", "b"] {
            let mut filter = rig.filter().await;
            let step = filter.request(head(&[("x-bench-in", given)]), true).await;
            assert_eq!(step, Ok(Step::Go));
            let head = filter.take_request().unwrap();
            assert_eq!(value(&head.headers, "x-bench-out"), given);
            assert_eq!(filter.response(answer(&[]), false).await, Ok(Step::Go));
            assert_eq!(filter.response_body(bytes("body"), true).await, Ok(Step::Go));
            assert_eq!(filter.take_response_body(), "body");
        }
        assert_eq!(rig.seen.called("start"), 1);
    });
}

const DEMO: &str =
    r#"{"auth": {"cluster": "outbound|80||auth.default.svc.cluster.local", "path": "/check"}}"#;

fn give(call: MeshCall, status: u16, headers: &[(&'static str, &str)]) {
    let AnswerTo::Whole(to) = call.answer else {
        panic!()
    };
    let given = MeshAnswer {
        status: StatusCode::from_u16(status).unwrap(),
        headers: fields(headers),
        body: bytes("why"),
        trailers: fields(&[]),
    };
    to.send(Ok(given)).unwrap();
}

#[test]
fn a_service_is_asked_whether_a_request_may_pass() {
    run(async {
        let rig = Rig::with(&built("pw-demo.wasm"), spec(services)).await;
        let mut filter = rig.filter_with(DEMO).await;
        let given = head(&[("authorization", "token"), ("x-auth-user", "root")]);
        assert_eq!(filter.request(given, false).await, Ok(Step::Wait));
        // The body may come meanwhile.
        assert_eq!(filter.request_body(bytes("body"), true).await, Ok(Step::Wait));
        let call = rig.call().await;
        assert_eq!((&*call.service, call.path.as_str()), ("auth", "/check"));
        assert_eq!(value(&call.headers, "authorization"), "token");
        assert_eq!(value(&call.headers, "x-for-path"), "/p?q=1");
        give(call, 200, &[("x-user", "ada")]);
        assert_eq!(resumed(&mut filter).await, Ok(Step::Go));
        let head = filter.take_request().unwrap();
        assert_eq!(value(&head.headers, "x-auth-user"), "ada");
        assert_eq!(value(&head.headers, "x-pw-source"), "10.0.0.1:4711");
        assert_eq!(filter.take_request_body(), "body");
        filter.response(answer(&[]), true).await.unwrap();
        assert_eq!(
            value(&filter.take_response().unwrap().headers, "x-pw-demo"),
            "shop/0"
        );
        // Refused, and not answered.
        for (status, want) in [
            (Some(401), StatusCode::FORBIDDEN),
            (None, StatusCode::SERVICE_UNAVAILABLE),
        ] {
            let mut filter = rig.filter_with(DEMO).await;
            assert_eq!(filter.request(rig::head(&[]), true).await, Ok(Step::Wait));
            let call = rig.call().await;
            match status {
                Some(status) => give(call, status, &[]),
                None => drop(call),
            }
            let Ok(Step::Respond(reply)) = resumed(&mut filter).await else {
                panic!()
            };
            assert_eq!(reply.status, want);
            assert_eq!(value(&reply.headers, "x-pw-demo"), "refused");
        }
        // What was refused went through a queue to the root context.
        rig.until(|seen| seen.counts.borrow().get("pw_demo_refused") == Some(&2))
            .await;
        assert_eq!(rig.seen.counts.borrow()["pw_demo_requests"], 3);
        assert_eq!(rig.seen.observed.borrow().len(), 3);
    });
}

#[test]
fn requests_of_all_workers_are_counted_together() {
    run(async {
        let rig = Rig::with(&built("pw-demo.wasm"), spec(services)).await;
        let other = Rig::of(Arc::clone(&rig.host), spec(services));
        for n in 1..=6 {
            let mut filter = if n % 2 == 0 { &rig } else { &other }.filter_with("{}").await;
            assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Go));
            assert_eq!(
                value(&filter.take_request().unwrap().headers, "x-pw-count"),
                n.to_string()
            );
        }
    });
}

#[test]
fn bodies_are_rewritten() {
    run(async {
        let config =
            r#"{"requestBody": {"from": "secret", "to": "*"}, "responseBody": {"from": "a", "to": "bcd"}}"#;
        let rig = Rig::with(&built("pw-demo.wasm"), spec(services)).await;
        let mut filter = rig.filter_with(config).await;
        assert_eq!(
            filter.request(head(&[("content-length", "15")]), false).await,
            Ok(Step::Go)
        );
        assert_eq!(
            value(&filter.take_request().unwrap().headers, "content-length"),
            ""
        );
        assert_eq!(filter.request_body(bytes("the sec"), false).await, Ok(Step::Wait));
        assert_eq!(filter.request_body(bytes("ret and"), false).await, Ok(Step::Wait));
        assert_eq!(filter.request_body(bytes(" more"), true).await, Ok(Step::Go));
        assert_eq!(filter.take_request_body(), "the * and more");
        assert_eq!(filter.response(answer(&[]), false).await, Ok(Step::Go));
        assert_eq!(filter.response_body(bytes("aXa"), false).await, Ok(Step::Wait));
        // Trailers end the body.
        let trailers = rig::trailers(&mut filter, Way::Response, fields(&[("t", "1")])).await;
        assert_eq!(trailers, Ok((Step::Go, fields(&[("t", "1")]))));
        assert_eq!(filter.take_response_body(), "bcdXbcd");
    });
}

#[test]
fn a_timer_reports_by_grpc() {
    run(async {
        let config =
            r#"{"tickMs": 20, "audit": {"cluster": "audit", "service": "demo.Audit", "method": "Report"}}"#;
        let rig = Rig::with(&built("pw-demo.wasm"), spec(services)).await;
        let mut filter = rig.filter_with(config).await;
        rig.request(&mut filter).await;
        let call = rig.call().await;
        assert_eq!(
            (&*call.service, call.path.as_str()),
            ("audit", "/demo.Audit/Report")
        );
        assert_eq!(value(&call.headers, "x-reported-by"), "pw-demo");
        assert!(matches!(&call.body, CallBody::Whole(body) if body == &[0, 0, 0, 0, 2, 8, 1][..]));
        let AnswerTo::Whole(to) = call.answer else {
            panic!()
        };
        let took = MeshAnswer {
            status: StatusCode::OK,
            headers: fields(&[("content-type", "application/grpc")]),
            body: vec![0; 5].into(),
            trailers: fields(&[("grpc-status", "0")]),
        };
        to.send(Ok(took)).unwrap();
        rig.until(|seen| seen.counts.borrow().get("pw_demo_audited") == Some(&1))
            .await;
        assert_eq!(rig.seen.gauge("pw_demo_total"), Some(1.0));
        let AnswerTo::Whole(to) = rig.call().await.answer else {
            panic!()
        };
        to.send(Err(CallError::Failed)).unwrap();
        rig.call().await;
        assert_eq!(rig.seen.called("start"), 1, "a failed report is no fault");
    });
}

#[test]
fn a_wrong_configuration_is_refused_by_the_guest() {
    run(async {
        let rig = Rig::with(&built("pw-demo.wasm"), spec(services)).await;
        let mut filter = rig.filter_with(r#"{"auht": 1}"#).await;
        assert_eq!(filter.request(head(&[]), true).await, Err(Fault::NotLoaded));
    });
}

/// A worker with the guest that misbehaves; its log lines are told apart by its name.
async fn misbehaving(name: &str, config: &str) -> Rig {
    let spec = spec(|spec| {
        services(spec);
        spec.config = config.into();
        spec.limits.call_timeout = Duration::from_millis(500);
    });
    Rig::named(name, &built("pw-misbehave.wasm"), spec).await
}

/// Nothing was taken that must be refused.
fn no_bug(name: &str) {
    let (lines, _) = log_lines(Some(name));
    let bugs: Vec<_> = lines.iter().filter(|line| line.text.contains("BUG")).collect();
    assert!(bugs.is_empty(), "{bugs:?}");
}

#[test]
fn every_fault_costs_its_request_and_no_other() {
    run(async {
        let rig = misbehaving("faults", "").await;
        for (word, want) in [
            ("panic", Fault::Trap),
            ("loop", Fault::Time),
            ("memory", Fault::Memory),
            ("stack", Fault::Trap),
        ] {
            let mut filter = rig.filter_with("").await;
            let list = format!("request_headers:{word}");
            let step = filter.request(head(&[("x-misbehave", &list)]), true).await;
            assert_eq!(step, Err(want), "{word}");
            assert_eq!(
                value(&filter.take_request().unwrap().headers, "x-misbehave"),
                list
            );
            let mut filter = rig.filter_with("").await;
            let step = filter
                .request(head(&[("x-misbehave", "request_headers:count")]), true)
                .await;
            assert_eq!(step, Ok(Step::Go));
            assert_eq!(
                value(&filter.take_request().unwrap().headers, "x-count"),
                "1",
                "{word}"
            );
        }
    });
}

#[test]
fn what_must_be_refused_is() {
    run(async {
        let rig = misbehaving("refused", "").await;
        for (word, want) in [
            ("split", "2"),
            ("bytes", "2"),
            ("name", "2"),
            ("hop", "2"),
            ("huge-header", "2"),
            ("length", "0"),
        ] {
            for way in ["request_headers", "response_headers"] {
                let list = format!("{way}:{word}");
                let mut filter = rig.filter_with("").await;
                assert_eq!(
                    filter.request(head(&[("x-misbehave", &list)]), true).await,
                    Ok(Step::Go)
                );
                let mut headers = filter.take_request().unwrap().headers;
                assert_eq!(filter.response(answer(&[]), true).await, Ok(Step::Go));
                headers.extend(filter.take_response().unwrap().headers);
                assert_eq!(value(&headers, "x-edit"), want, "{list}");
                assert_eq!(headers.len(), 2, "{list}: {headers:?}");
            }
        }
        for word in ["pointers", "pairs", "context", "foreign"] {
            let list = format!(
                "request_headers:{word};response_headers:{word};done:{word};log:{word};delete:{word}"
            );
            let mut filter = rig.filter_with("").await;
            assert_eq!(
                filter.request(head(&[("x-misbehave", &list)]), true).await,
                Ok(Step::Go),
                "{word}"
            );
            assert_eq!(filter.response(answer(&[]), true).await, Ok(Step::Go), "{word}");
        }
        let mut filter = rig
            .filter_with("request_body:offsets;response_body:offsets")
            .await;
        assert_eq!(filter.request(head(&[]), false).await, Ok(Step::Go));
        assert_eq!(filter.request_body(bytes("body"), true).await, Ok(Step::Go));
        assert_eq!(filter.response(answer(&[]), false).await, Ok(Step::Go));
        assert_eq!(filter.response_body(bytes("body"), true).await, Ok(Step::Go));
        drop(filter);
        no_bug("refused");
        assert_eq!(rig.seen.called("start"), 1);
    });
}

#[test]
fn replies_are_checked() {
    run(async {
        let rig = misbehaving("replies", "").await;
        for (word, want) in [
            ("reply", Some("reply")),
            ("reply-twice", Some("first")),
            ("reply-status", None),
            ("reply-split", None),
            ("reply-huge", None),
        ] {
            let list = format!("request_headers:{word}");
            let mut filter = rig.filter_with("").await;
            let got = match filter
                .request(head(&[("x-misbehave", &list)]), true)
                .await
                .unwrap()
            {
                Step::Respond(reply) => Some(reply.body),
                Step::Go | Step::Wait => None,
            };
            assert_eq!(got.as_deref(), want.map(str::as_bytes), "{word}");
        }
    });
}

#[test]
fn a_flood_of_calls_ends_at_their_bound() {
    run(async {
        let rig = misbehaving("floods", "").await;
        let mut filter = rig.filter_with("request_headers:call-flood auth").await;
        assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Go));
        assert_eq!(log_lines(Some("floods")).0[0].text.as_ref(), "4 calls were made");
        let mut filter = rig.filter_with("request_headers:call elsewhere").await;
        assert_eq!(
            filter.request(head(&[]), true).await,
            Ok(Step::Go),
            "policy doesn't name it"
        );
        // More of everything than there may be: the SDK takes a refusal for a reason to trap.
        let mut filter = rig.filter_with("request_headers:flood").await;
        let flooded = filter.request(head(&[]), true).await;
        assert!(matches!(flooded, Err(Fault::Trap | Fault::Time)), "{flooded:?}");
        assert!(log_lines(Some("floods")).0.len() < 200);
    });
}

#[test]
fn what_goes_wrong_beside_requests_costs_none_that_comes_after() {
    run(async {
        for (config, function) in [
            ("tick:panic", "proxy_on_tick"),
            ("tick:loop", "proxy_on_tick"),
            ("queue:panic", "proxy_on_queue_ready"),
        ] {
            let rig = misbehaving("beside", "").await;
            let mut filter = rig.filter_with(config).await;
            rig.request(&mut filter).await;
            rig.until(|seen| {
                seen.calls
                    .borrow()
                    .iter()
                    .any(|(f, outcome)| *f == function && outcome.is_err())
            })
            .await;
            assert_eq!(filter.response(answer(&[]), true).await, Err(Fault::Trap));
            let mut filter = rig.filter_with("").await;
            rig.request(&mut filter).await;
        }
        let rig = misbehaving("beside", "vm_start:panic").await;
        for _ in 0..2 {
            let mut filter = rig.filter_with("").await;
            assert_eq!(filter.request(head(&[]), true).await, Err(Fault::Trap));
        }
        let rig = misbehaving("beside", "").await;
        let mut filter = rig.filter_with("configure:panic").await;
        assert_eq!(filter.request(head(&[]), true).await, Err(Fault::Trap));
        let mut filter = rig.filter_with("request_headers:count").await;
        rig.request(&mut filter).await;
    });
}
