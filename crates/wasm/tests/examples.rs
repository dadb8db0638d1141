//! The example plugins and the guests that misbehave, as they are built: `plugins/built`.

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

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use leeward_policy::model::{Plugin, PluginKind};
use leeward_wasm::{Action, AnswerPiece, AnswerTo, FailedCall, Fault, Filter, MeshAnswer, Step, Target};
use std::time::Duration;
use support::{Rig, answer_head, built, facts, failed, head, headers, spec};

async fn rig(kind: PluginKind, name: &str, services: &[&str]) -> Rig {
    let file = built(name);
    let mut spec: Plugin = spec(kind, &file);
    spec.limits.max_body_bytes = 1 << 20;
    spec.access.services = services.iter().map(|name| name.parse().unwrap()).collect();
    Rig::with(spec, &file).await
}

/// Asks while calls through the mesh are answered by the service's name and path: a status and a body, or none.
async fn with_mesh<T>(
    rig: &Rig,
    asked: impl Future<Output = T>,
    answers: impl Fn(&str, &str) -> Option<(u16, String)>,
) -> T {
    let mesh = async {
        let mut held = Vec::new();
        loop {
            let Some(call) = std::future::poll_fn(|cx| rig.calls.borrow_mut().poll_recv(cx)).await else {
                std::future::pending::<()>().await;
                continue;
            };
            let answer = answers(&call.service, call.path.as_str());
            let (AnswerTo::Whole(_), Some(_)) = (&call.answer, &answer) else {
                if let (AnswerTo::Pieces(pieces), Some((status, body))) = (&call.answer, answer) {
                    let status = StatusCode::from_u16(status).unwrap();
                    let mut fields = HeaderMap::new();
                    fields.insert("content-type", "text/plain".parse().unwrap());
                    pieces.send(AnswerPiece::Head(status, fields)).await.unwrap();
                    pieces.send(AnswerPiece::Data(body.into())).await.unwrap();
                    pieces
                        .send(AnswerPiece::Trailers(HeaderMap::new()))
                        .await
                        .unwrap();
                } else {
                    held.push(call);
                }
                continue;
            };
            let (AnswerTo::Whole(to), Some((status, body))) = (call.answer, answer) else {
                unreachable!()
            };
            drop(to.send(Ok(MeshAnswer {
                status: StatusCode::from_u16(status).unwrap(),
                headers: headers(&[("x-from", &call.service)]),
                body: body.into(),
                trailers: HeaderMap::new(),
            })));
        }
    };
    tokio::select! {
        asked = asked => asked,
        () = mesh => unreachable!(),
    }
}

fn respond(action: Result<Action, Fault>) -> (u16, HeaderMap, String) {
    match action {
        Ok(Action::Respond(reply)) => (
            reply.status.as_u16(),
            reply.headers,
            String::from_utf8(reply.body.to_vec()).unwrap(),
        ),
        other => panic!("{other:?}"),
    }
}

fn call(method: Method, config: &str, body: &'static str) -> FailedCall {
    let mut call = failed(config);
    call.head.method = method;
    call.body = Some(Bytes::from_static(body.as_bytes()));
    call
}

#[tokio::test]
async fn static_json_answers_by_its_configuration() {
    for file in ["static-json.wasm", "compat/static-json-0.1.wasm"] {
        let rig = rig(PluginKind::Fallback, file, &[]).await;
        let config = r#"{"status": 203, "body": {"a": 1}, "headers": {"X-A": "b"}}"#;
        let (status, fields, body) = respond(rig.ask(config).await);
        assert_eq!((status, body.as_str()), (203, r#"{"a":1}"#), "{file}");
        assert_eq!(
            fields,
            headers(&[("content-type", "application/json"), ("x-a", "b")])
        );
        assert_eq!(rig.ask("no JSON").await, Ok(Action::Decline));
    }
}

#[tokio::test]
async fn the_popular_list_is_read_anew_and_kept() {
    let rig = rig(
        PluginKind::Fallback,
        "recommendations-fallback.wasm",
        &["catalog"],
    )
    .await;
    let config =
        r#"{"popular": ["tea"], "refresh": {"service": "catalog", "path": "/popular", "everyMs": 3600000}}"#;
    let body = with_mesh(&rig, rig.text(config), |service, path| {
        assert_eq!((service, path), ("catalog", "/popular"));
        Some((200, r#"{"items": ["rope", "soap", "figs"]}"#.to_owned()))
    });
    let body = body.await;
    assert!(body.contains(r#""items":["rope","soap"]"#), "{body}");
    let body = rig.text(config).await;
    assert!(
        body.contains(r#""items":["rope","soap"]"#),
        "kept, and nobody was asked: {body}"
    );
}

#[tokio::test]
async fn the_popular_list_of_the_configuration_stands_in_for_a_service_that_fails() {
    let rig = rig(
        PluginKind::Fallback,
        "recommendations-fallback.wasm",
        &["catalog"],
    )
    .await;
    let config = r#"{"popular": ["tea"], "refresh": {"service": "catalog", "path": "/popular"}}"#;
    let body = with_mesh(&rig, rig.text(config), |_, _| Some((500, String::new()))).await;
    assert!(body.contains(r#""items":["tea"]"#), "{body}");
    let barred = r#"{"popular": ["soap"], "refresh": {"service": "payment", "path": "/"}}"#;
    assert!(rig.text(barred).await.contains(r#""items":["soap"]"#));
}

#[tokio::test]
async fn an_order_gets_a_receipt() {
    let rig = rig(PluginKind::Fallback, "order-receipt.wasm", &[]).await;
    let config = r#"{"queue": "orders", "echo": ["items"]}"#;
    let mut order = call(Method::POST, config, r#"{"items": ["tea"], "card": "4111"}"#);
    order.head.headers = headers(&[("idempotency-key", "\"k-1\"")]);
    let Ok(Action::Enqueue { queue, reply }) = rig.fail(order).await else {
        panic!()
    };
    assert_eq!((queue.as_str(), reply.status.as_u16()), ("orders", 202));
    let receipt = std::str::from_utf8(&reply.body).unwrap();
    assert!(
        receipt.contains(r#""order":"k-1""#)
            && receipt.contains(r#""items":["tea"]"#)
            && !receipt.contains("4111")
    );
    let mut ids = Vec::new();
    for _ in 0..2 {
        let Ok(Action::Enqueue { reply, .. }) = rig.fail(call(Method::POST, config, "{}")).await else {
            panic!()
        };
        ids.push(reply.body);
    }
    assert_ne!(ids[0], ids[1], "each order has an id of its own");
    assert_eq!(rig.ask(config).await, Ok(Action::Decline), "a GET is no order");
}

#[tokio::test]
async fn partners_are_asked_in_turn() {
    let rig = rig(PluginKind::Fallback, "partner-hedge.wasm", &["a", "b"]).await;
    let config = r#"{"partners": ["a", "b"], "patienceMs": 50}"#;
    for a in [Some((500, "broken".to_owned())), None] {
        let asked = with_mesh(&rig, rig.ask(config), |service, path| {
            assert_eq!(path, "/r?limit=2");
            if service == "a" {
                a.clone()
            } else {
                Some((200, "quote".to_owned()))
            }
        });
        let (status, fields, body) = respond(asked.await);
        assert_eq!((status, body.as_str()), (200, "quote"));
        assert_eq!(fields, headers(&[("x-from", "b"), ("x-answered-by", "b")]));
    }
    let nobody = with_mesh(&rig, rig.ask(config), |_, _| Some((503, String::new()))).await;
    assert_eq!(nobody, Ok(Action::Stale), "what was kept is better than nothing");
    let mut nothing_kept = failed(config);
    nothing_kept.kept = None;
    let nobody = with_mesh(&rig, rig.fail(nothing_kept), |_, _| Some((503, String::new()))).await;
    assert_eq!(nobody, Ok(Action::Decline));
    assert_eq!(
        rig.fail(call(Method::POST, config, "")).await,
        Ok(Action::Decline)
    );
}

async fn begun(rig: &Rig, config: &str, fields: &[(&str, &str)], end: bool) -> (Filter, Result<Step, Fault>) {
    let mut filter = rig.worker.filter(&rig.chosen(), facts(config)).await.unwrap();
    let step = filter.request(head("/a", fields), end).await;
    (filter, step)
}

#[tokio::test]
async fn headers_are_rewritten() {
    let rig = rig(PluginKind::Filter, "header-rewrite.wasm", &[]).await;
    let config = r#"{"request": {"rename": {"x-user": "x-customer"}, "remove": ["x-debug"]}, "response": {"set": {"server": "shop"}}}"#;
    let fields = [("x-user", "u"), ("x-debug", "1"), ("x-customer", "forged")];
    let (mut filter, step) = begun(&rig, config, &fields, true).await;
    assert_eq!(step, Ok(Step::Go));
    assert_eq!(
        filter.take_request().unwrap().headers,
        headers(&[("x-customer", "u")])
    );
    assert!(filter.wants_response() && !filter.wants_response_body());
    let step = filter
        .response(answer_head(200, &[("server", "nginx")]), true)
        .await;
    assert_eq!(step, Ok(Step::Go));
    assert_eq!(
        filter.take_response().unwrap().headers,
        headers(&[("server", "shop")])
    );
    for wrong in ["no JSON", r#"{"request": {"set": {"host": "a"}}}"#] {
        assert_eq!(begun(&rig, wrong, &[], true).await.1, Err(Fault::Trap), "{wrong}");
    }
}

#[tokio::test]
async fn json_is_redacted_and_what_cannot_be_read_is_refused() {
    let rig = rig(PluginKind::Filter, "json-redactor.wasm", &[]).await;
    let config = r#"{"fields": ["card"], "request": true}"#;
    let json = ("content-type", "application/json");
    let (mut filter, step) = begun(&rig, config, &[json, ("accept-encoding", "gzip")], false).await;
    assert_eq!(step, Ok(Step::Wait), "the head waits for the body");
    assert_eq!(
        filter.request_body(Bytes::from_static(b"{\"card\""), false).await,
        Ok(Step::Wait)
    );
    assert_eq!(
        filter
            .request_body(Bytes::from_static(b": 1, \"n\": 1.0}"), true)
            .await,
        Ok(Step::Go)
    );
    assert_eq!(filter.take_request().unwrap().headers, headers(&[json]));
    assert_eq!(
        filter.take_request_body(),
        br#"{"card": "***", "n": 1.0}"#.as_slice()
    );
    for (encoding, body, want) in [
        (
            None,
            r#"{"a": [{"card": {"n": 1}}]}"#,
            Ok(r#"{"a": [{"card": "***"}]}"#),
        ),
        (None, "<card>", Err(502)),
        (Some("gzip"), "", Err(502)),
    ] {
        let (mut filter, _) = begun(&rig, config, &[], true).await;
        let encoding = encoding.map(|encoding| ("content-encoding", encoding));
        let fields: Vec<_> = [json, ("etag", "\"1\"")].into_iter().chain(encoding).collect();
        let mut step = filter.response(answer_head(200, &fields), false).await.unwrap();
        if !matches!(step, Step::Respond(_)) {
            step = filter
                .response_body(Bytes::from_static(body.as_bytes()), true)
                .await
                .unwrap();
        }
        let got = match &step {
            Step::Respond(reply) => Err(reply.status.as_u16()),
            Step::Go | Step::Wait => Ok(filter.take_response_body()),
        };
        match (got, want) {
            (Ok(got), Ok(want)) => {
                assert_eq!(got, want);
                assert_eq!(
                    filter.take_response().unwrap().headers,
                    headers(&[json]),
                    "the tag was another body's"
                );
            }
            (got, want) => assert_eq!(got.err(), want.err(), "{body}"),
        }
    }
    let (mut filter, _) = begun(&rig, config, &[], true).await;
    let html = answer_head(200, &[("content-type", "text/html")]);
    assert_eq!(filter.response(html, false).await, Ok(Step::Go));
    assert!(!filter.wants_response_body(), "what isn't JSON costs nothing");
}

#[tokio::test]
async fn a_canary_is_chosen_while_it_is_healthy() {
    let rig = rig(PluginKind::Router, "canary-router.wasm", &[]).await;
    let target = |service: &str, healthy| Target {
        service: service.into(),
        weight: 1,
        healthy,
        endpoints: 2,
        circuit_open: false,
        under_way: 0,
    };
    for (healthy, fields, want) in [
        (2, &[("x-customer", "c")][..], Some(1)),
        (2, &[("x-customer", "c"), ("x-canary", "never")], None),
        (0, &[("x-customer", "c")], None),
        (2, &[], None),
    ] {
        let targets = vec![target("stable", 2), target("next", healthy)];
        let facts = facts(r#"{"canary": "next", "percent": 100}"#);
        let chosen = rig
            .worker
            .route(&rig.chosen(), head("/a", fields), &facts, targets)
            .await;
        assert_eq!(chosen.1, Ok(want), "{fields:?}");
    }
}

#[tokio::test]
async fn an_application_shows_a_page_and_what_another_service_has() {
    let rig = rig(PluginKind::WasiHttp, "wasi-http-app.wasm", &["catalog"]).await;
    let ask = async |path: &str| {
        let mut call = failed("");
        call.head.path = path.parse().unwrap();
        let asked = with_mesh(&rig, rig.fail(call), |service, path| {
            Some((200, format!("{service} {path}")))
        });
        respond(asked.await)
    };
    let (status, fields, body) = ask("/a?token=1").await;
    assert_eq!(
        (status, &fields["content-type"]),
        (503, &"text/html; charset=utf-8".parse().unwrap())
    );
    assert!(
        body.contains("/a can't be shown") && !body.contains("token"),
        "{body}"
    );
    let (status, fields, body) = ask("/proxy/catalog/items?n=1").await;
    assert_eq!((status, body.as_str()), (200, "catalog /items?n=1"));
    assert_eq!(fields, headers(&[("content-type", "text/plain")]));
    let (status, _, body) = ask("/proxy/payment/").await;
    assert_eq!(status, 502, "{body}");
}

#[tokio::test]
async fn what_a_fallback_must_not_do_is_a_fault_and_harms_no_other_call() {
    let rig = rig(PluginKind::Fallback, "misbehave.wasm", &["loop"]).await;
    let faults: &[(Fault, &[&str])] = &[
        (Fault::Time, &["loop", "sleep 60000"]),
        (Fault::Memory, &["memory"]),
        (Fault::Trap, &["panic", "stack", "utf8", "exit"]),
        (
            Fault::BadResponse,
            &[
                "bad-status",
                "informational",
                "hop-by-hop",
                "length",
                "split",
                "split-name",
                "bytes",
                "pseudo",
                "ours",
                "huge-header",
                "many-headers",
                "huge",
            ],
        ),
    ];
    for (fault, words) in faults {
        for word in *words {
            assert_eq!(rig.ask(word).await, Err(*fault), "{word}");
            assert_eq!(rig.text("calls").await, "1", "after {word}");
        }
    }
    assert!(rig.ask("alias").await.is_err(), "a hundred MiB are not copied");
    assert_eq!(rig.ask("log").await, Ok(Action::Decline));
    assert_eq!(rig.text("large").await.len(), 1 << 20);
}

#[tokio::test]
async fn a_flood_of_host_calls_is_bounded() {
    let file = built("misbehave.wasm");
    let mut patient = spec(PluginKind::Fallback, &file);
    patient.limits.call_timeout = Duration::from_secs(10);
    let rig = Rig::with(patient, &file).await;
    assert_eq!(rig.ask("flood").await, Ok(Action::Decline));
    assert!(
        rig.told.counted.borrow().len() <= 33,
        "32 names, and what was too much"
    );
}

#[tokio::test]
async fn state_stays_with_an_instance() {
    let rig = rig(PluginKind::Fallback, "misbehave.wasm", &[]).await;
    for n in ["1", "2"] {
        assert_eq!(rig.ask("grow").await, Ok(Action::Decline));
        assert_eq!(rig.text("hoarded").await, n);
    }
}

#[tokio::test]
async fn what_a_filter_must_not_do_is_a_fault_in_each_callback() {
    let rig = rig(PluginKind::Filter, "misbehave-filter.wasm", &[]).await;
    for callback in ["request", "request-body", "response", "response-body"] {
        for (word, fault) in [
            ("panic", Fault::Trap),
            ("loop", Fault::Time),
            ("memory", Fault::Memory),
            ("stack", Fault::Trap),
            ("split", Fault::BadResponse),
        ] {
            let act = format!("{callback}:{word}");
            assert_eq!(pass(&rig, &act).await.err(), Some(fault), "{act}");
            assert_eq!(pass(&rig, "").await, Ok(String::new()), "after {act}");
        }
    }
    for (word, want) in [
        ("edit-split", "invalid"),
        ("edit-name", "invalid"),
        ("edit-bytes", "invalid"),
        ("edit-length", "forbidden"),
        ("edit-hop", "forbidden"),
        ("edit-host", "forbidden"),
        ("edit-pseudo", "forbidden"),
        ("edit-huge", "too-large"),
        ("edit-many", "too-large"),
    ] {
        assert_eq!(
            pass(&rig, &format!("request:{word}")).await.as_deref(),
            Ok(want),
            "{word}"
        );
    }
}

/// Passes a request and its answer through the filter; what it says of edits of the request's head.
async fn pass(rig: &Rig, acts: &str) -> Result<String, Fault> {
    let data = || Bytes::from_static(b"data");
    let (mut filter, step) = begun(rig, "", &[("x-misbehave", acts)], false).await;
    step?;
    let passed = filter.take_request().unwrap();
    if filter.wants_request_body() {
        filter.request_body(data(), true).await?;
    }
    if filter.wants_response() {
        filter.response(answer_head(200, &[]), false).await?;
    }
    if filter.wants_response_body() {
        filter.response_body(data(), true).await?;
    }
    let told = passed
        .headers
        .get("x-edit")
        .map(|told| told.to_str().unwrap().to_owned());
    Ok(told.unwrap_or_default())
}
