//! The worlds `filter` and `router`, with real components.

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
use http::{HeaderMap, StatusCode};
use leeward_policy::model::PluginKind;
use leeward_wasm::{Fault, Filter, Step, Target, Way};
use std::time::Duration;
use support::{Rig, answer_head, facts, guest, head, headers, now, spec};

async fn rig() -> Rig {
    let file = guest("filter.wasm");
    let mut spec = spec(PluginKind::Filter, &file);
    spec.limits.max_body_bytes = 100;
    Rig::with(spec, &file).await
}

/// A filter of a request that asks for this, and what it says of its head.
async fn begun(rig: &Rig, acts: &str, end: bool) -> (Filter, Result<Step, Fault>) {
    let mut filter = rig.worker.filter(&rig.chosen(), facts("cfg")).await.unwrap();
    let step = filter
        .request(head("/a?b=c", &[("x-do", acts), ("x-a", "old")]), end)
        .await;
    (filter, step)
}

/// A field of a request's head, once it has passed.
async fn field(rig: &Rig, acts: &str, name: &str) -> Vec<String> {
    let (mut filter, step) = begun(rig, acts, true).await;
    assert_eq!(step, Ok(Step::Go), "{acts}");
    values(&filter.take_request().unwrap().headers, name)
}

fn values(headers: &HeaderMap, name: &str) -> Vec<String> {
    let values = headers.get_all(name).iter();
    values.map(|value| value.to_str().unwrap().to_owned()).collect()
}

fn data(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

#[tokio::test]
async fn a_head_is_read_and_changed() {
    let rig = rig().await;
    let (mut filter, step) = begun(
        &rig,
        "req copy x-a x-b; req set x-a new; req add x-a more; req remove x-do; req path /other?q",
        true,
    )
    .await;
    assert_eq!(step, Ok(Step::Go));
    assert!(!filter.wants_request_body() && !filter.wants_response());
    let passed = filter.take_request().unwrap();
    assert_eq!(passed.path, "/other?q");
    assert_eq!(
        passed.headers,
        headers(&[("x-a", "new"), ("x-a", "more"), ("x-b", "old")])
    );
    assert_eq!(filter.take_request().map(|head| head.path), None, "it has gone");
    assert_eq!(
        field(&rig, "req tell", "x-told").await,
        ["GET /a Some(\"b=c\") shop recommendations shop/0 a Some(\"spiffe://mesh/web\") cfg 2"]
    );
    assert!(field(&rig, "req flag f", "x-flag").await[0].contains("f /a?b=c None"));
    assert_eq!(rig.told.calls.borrow()[0], ("on-request", Ok(())));
}

#[tokio::test]
async fn what_is_not_a_plugins_to_change_is_refused() {
    let rig = rig().await;
    for (act, want) in [
        ("set content-length 5", "Forbidden"),
        ("add transfer-encoding chunked", "Forbidden"),
        ("remove connection", "Forbidden"),
        ("set host other", "Forbidden"),
        ("set :path /x", "Forbidden"),
        ("set leeward-depth 0", "Forbidden"),
        ("set a/b x", "Invalid"),
        ("set x-a aCRLFhost:b", "Invalid"),
        ("path other", "Invalid"),
        ("path http://other/", "Invalid"),
        ("path /a#b", "Invalid"),
        ("fill", "TooLarge"),
        ("large", "TooLarge"),
    ] {
        let refused = field(&rig, &format!("req {act}"), "x-refused").await;
        let kebab = want.replace("TooLarge", "too-large").to_lowercase();
        assert!(refused.concat().contains(&kebab), "{act}: {refused:?}");
    }
    assert_eq!(field(&rig, "req notes", "x-notes").await, ["16 false"]);
}

#[tokio::test]
async fn a_filter_answers_in_the_services_place() {
    let rig = rig().await;
    let (mut filter, step) = begun(&rig, "req set x-a new; req respond 403 no", false).await;
    let Ok(Step::Respond(reply)) = step else {
        panic!("{step:?}")
    };
    assert_eq!(
        (reply.status, &*reply.body),
        (StatusCode::FORBIDDEN, b"no".as_slice())
    );
    assert!(!filter.wants_request_body() && !filter.wants_response());
    assert!(filter.take_request().is_some());
    let (_, step) = begun(&rig, "req respond 999 no", false).await;
    assert_eq!(step, Err(Fault::BadResponse));
}

#[tokio::test]
async fn an_answer_may_go_on_after_the_time_in_which_it_must_begin() {
    let rig = rig().await;
    let mut facts = facts("cfg");
    facts.deadline = Some(now() + Duration::from_secs(2));
    let mut filter = rig.worker.filter(&rig.chosen(), facts.clone()).await.unwrap();
    let acts = "req response; req body pieces; body upper; res body pieces; rbody upper";
    let step = filter.request(head("/", &[("x-do", acts)]), false).await;
    assert_eq!(step, Ok(Step::Go));
    assert!(filter.take_request().is_some() && filter.wants_request_body());
    tokio::time::sleep_until((facts.deadline.unwrap() + Duration::from_millis(1)).into()).await;
    // The request has gone on: its answer may have begun.
    assert_eq!(filter.request_body(data("up"), false).await, Ok(Step::Go));
    assert_eq!(filter.take_request_body(), "UP");
    assert_eq!(filter.response(answer_head(200, &[]), false).await, Ok(Step::Go));
    assert!(filter.take_response().is_some() && filter.wants_response_body());
    assert_eq!(filter.response_body(data("down"), false).await, Ok(Step::Go));
    assert_eq!(filter.take_response_body(), "DOWN");
}

#[tokio::test(start_paused = true)]
async fn of_a_request_that_tries_a_filter_every_call_tells() {
    let file = guest("filter.wasm");
    let mut spec = spec(PluginKind::Filter, &file);
    spec.quarantine.faults = 1;
    let rig = Rig::with(spec, &file).await;
    let admits = || rig.worker.choose(&"p".into(), &rig.spec, false).map(drop);
    let (mut filter, step) = begun(&rig, "req body pieces; body trap", false).await;
    assert_eq!(step, Ok(Step::Go));
    assert_eq!(filter.request_body(data("a"), true).await, Err(Fault::Trap));
    assert_eq!(admits(), Err(Fault::Quarantined));
    let over = rig.spec.quarantine.duration + Duration::from_secs(1);
    tokio::time::advance(over).await;
    // It does well with the head, which proves nothing.
    let (mut filter, step) = begun(&rig, "req body pieces; body trap", false).await;
    assert_eq!(step, Ok(Step::Go));
    assert_eq!(admits(), Err(Fault::Quarantined));
    assert_eq!(filter.request_body(data("a"), true).await, Err(Fault::Trap));
    drop(filter);
    assert_eq!(admits(), Err(Fault::Quarantined));
    tokio::time::advance(over).await;
    let (mut filter, step) = begun(&rig, "req body pieces; body upper", false).await;
    assert_eq!(step, Ok(Step::Go));
    assert_eq!(filter.request_body(data("a"), true).await, Ok(Step::Go));
    assert_eq!(admits(), Err(Fault::Quarantined));
    drop(filter);
    assert_eq!(admits(), Ok(()));
}

#[tokio::test]
async fn a_body_passes_piece_by_piece() {
    let rig = rig().await;
    let (mut filter, step) = begun(&rig, "req body pieces; body upper", false).await;
    assert_eq!(step, Ok(Step::Go));
    assert!(filter.take_request().is_some());
    assert!(filter.wants_request_body());
    // However much: what isn't held needs no bound.
    for _ in 0..3 {
        assert_eq!(
            filter.request_body(Bytes::from(vec![b'a'; 90]), false).await,
            Ok(Step::Go)
        );
        assert_eq!(filter.take_request_body(), vec![b'A'; 90]);
    }
    assert_eq!(filter.request_body(Bytes::new(), true).await, Ok(Step::Go));
    assert!(!filter.wants_request_body(), "there is no more");
    let (mut filter, _) = begun(&rig, "req body pieces; body swallow", false).await;
    assert_eq!(filter.request_body(data("x"), false).await, Ok(Step::Go));
    assert!(filter.take_request_body().is_empty());
    let (mut filter, _) = begun(&rig, "req body pieces; body ends", false).await;
    let step = filter.request_trailers(headers(&[("t", "1")])).await;
    assert_eq!(
        (step, filter.take_trailers(Way::Request)),
        (Ok(Step::Go), Some(headers(&[("t", "1")])))
    );
    assert_eq!(filter.take_request_body(), "[0 true]", "trailers end a body");
    let (mut filter, _) = begun(&rig, "req body pieces; body set x-a late", false).await;
    filter.take_request().unwrap();
    assert_eq!(filter.request_body(data("x"), true).await, Ok(Step::Go));
    assert!(String::from_utf8_lossy(&filter.take_request_body()).contains("sent"));
}

#[tokio::test]
async fn a_body_that_is_wanted_whole_is_held_with_its_head() {
    let rig = rig().await;
    let (mut filter, step) = begun(&rig, "req body whole; body set x-a late", false).await;
    assert_eq!(step, Ok(Step::Wait));
    for piece in ["one ", "two "] {
        assert_eq!(filter.request_body(data(piece), false).await, Ok(Step::Wait));
        assert!(filter.take_request_body().is_empty());
    }
    assert_eq!(filter.request_body(data("three"), true).await, Ok(Step::Go));
    assert_eq!(values(&filter.take_request().unwrap().headers, "x-a"), ["late"]);
    assert_eq!(filter.take_request_body(), "one two three");
    assert!(!filter.wants_request_body());
    let calls = rig.told.calls.borrow().clone();
    assert_eq!(calls, [("on-request", Ok(())), ("on-request-body", Ok(()))]);

    let (mut filter, _) = begun(&rig, "req body whole; body ends", false).await;
    assert_eq!(filter.request_body(data("x"), false).await, Ok(Step::Wait));
    assert_eq!(filter.request_trailers(HeaderMap::new()).await, Ok(Step::Go));
    assert_eq!(filter.take_request_body(), "[1 true]");
    let (filter, step) = begun(&rig, "req body whole", true).await;
    assert_eq!(step, Ok(Step::Go), "there is none");
    drop(filter);
}

#[tokio::test]
async fn a_body_that_is_too_large_to_hold_is_a_fault_that_loses_nothing() {
    let rig = rig().await;
    let (mut filter, _) = begun(&rig, "req set x-a new; req body whole; body upper", false).await;
    assert_eq!(
        filter.request_body(Bytes::from(vec![b'a'; 100]), false).await,
        Ok(Step::Wait)
    );
    assert_eq!(
        filter.request_body(data("b"), false).await,
        Err(Fault::BodyTooLarge)
    );
    assert_eq!(
        rig.told.calls.borrow().last(),
        Some(&("on-request-body", Err(Fault::BodyTooLarge)))
    );
    assert_eq!(filter.take_request_body().len(), 101);
    assert_eq!(values(&filter.take_request().unwrap().headers, "x-a"), ["new"]);
    assert!(!filter.wants_request_body());
}

#[tokio::test]
async fn after_a_fault_there_is_what_there_was_before_the_call() {
    let rig = rig().await;
    for (word, fault) in [
        ("trap", Fault::Trap),
        ("loop", Fault::Time),
        ("sleep 9999", Fault::Time),
    ] {
        let (mut filter, step) =
            begun(&rig, &format!("req set x-a new; req path /b; req {word}"), false).await;
        assert_eq!(step, Err(fault), "{word}");
        let passed = filter.take_request().unwrap();
        assert_eq!(
            (passed.path.as_str(), &*values(&passed.headers, "x-a")),
            ("/a?b=c", &["old".to_owned()][..])
        );
        assert!(!filter.wants_request_body() && !filter.wants_response());
    }
    let acts = "req set x-a new; req response; req body whole; body set x-a newer; body trap";
    let (mut filter, step) = begun(&rig, acts, false).await;
    assert_eq!(step, Ok(Step::Wait));
    assert_eq!(filter.request_body(data("one "), false).await, Ok(Step::Wait));
    assert_eq!(filter.request_body(data("two"), true).await, Err(Fault::Trap));
    assert_eq!(filter.take_request_body(), "one two");
    assert_eq!(
        values(&filter.take_request().unwrap().headers, "x-a"),
        ["new"],
        "the first call was good"
    );
    assert!(!filter.wants_response(), "nothing more is asked of it");

    let (mut filter, _) = begun(&rig, "req response; req body pieces; body trap", false).await;
    filter.take_request().unwrap();
    assert_eq!(filter.request_body(data("one"), false).await, Err(Fault::Trap));
    assert_eq!(filter.take_request_body(), "one");
}

#[tokio::test]
async fn a_call_that_is_given_up_gives_its_head_back() {
    let rig = rig().await;
    let mut filter = rig.worker.filter(&rig.chosen(), facts("")).await.unwrap();
    let request = filter.request(
        head(
            "/",
            &[("x-do", "req set x-a new; req sleep 9999"), ("x-a", "old")],
        ),
        true,
    );
    let given_up = tokio::time::timeout(Duration::from_millis(30), request).await;
    assert!(given_up.is_err());
    assert_eq!(values(&filter.take_request().unwrap().headers, "x-a"), ["old"]);
}

#[tokio::test]
async fn an_answer_passes_a_filter_that_asked_for_it() {
    let rig = rig().await;
    let acts = "req note n kept; req response; res rtell; res rnote n; res rset x-b 2; res rremove server; res status 299; res set x-a late";
    let (mut filter, step) = begun(&rig, acts, true).await;
    assert_eq!(step, Ok(Step::Go));
    assert!(filter.take_request().is_some());
    assert!(filter.wants_response());
    let answered = filter.response(answer_head(200, &[("server", "s")]), false).await;
    assert_eq!(answered, Ok(Step::Go));
    let passed = filter.take_response().unwrap();
    assert_eq!(passed.status.as_u16(), 299);
    assert_eq!(values(&passed.headers, "x-told"), ["200 1 /a"]);
    assert_eq!(values(&passed.headers, "x-note"), ["kept"]);
    assert_eq!(values(&passed.headers, "x-b"), ["2"]);
    assert!(values(&passed.headers, "server").is_empty());
    assert!(
        values(&passed.headers, "x-refused").concat().contains("sent"),
        "the request has gone"
    );
    assert!(!filter.wants_response_body());

    let (mut filter, _) = begun(&rig, "req response; res respond 500 instead", true).await;
    filter.take_request().unwrap();
    let step = filter.response(answer_head(200, &[]), false).await;
    assert!(
        matches!(&step, Ok(Step::Respond(reply)) if &*reply.body == b"instead"),
        "{step:?}"
    );

    let (mut filter, _) = begun(&rig, "req response; res rset x-b 2; res trap", true).await;
    filter.take_request().unwrap();
    let step = filter.response(answer_head(200, &[("x-b", "1")]), false).await;
    assert_eq!(step, Err(Fault::Trap));
    assert_eq!(values(&filter.take_response().unwrap().headers, "x-b"), ["1"]);

    let (mut filter, _) = begun(&rig, "res status 500", true).await;
    filter.take_request().unwrap();
    assert!(!filter.wants_response());
    assert_eq!(filter.response(answer_head(200, &[]), false).await, Ok(Step::Go));
    assert_eq!(filter.take_response().unwrap().status, StatusCode::OK);
}

#[tokio::test]
async fn the_body_of_an_answer_passes_as_that_of_a_request_does() {
    let rig = rig().await;
    let answered = async |acts: &str| {
        let (mut filter, _) = begun(&rig, acts, true).await;
        filter.take_request().unwrap();
        let step = filter.response(answer_head(200, &[]), false).await;
        (filter, step)
    };
    let (mut filter, step) = answered("req response; res body pieces; rbody upper").await;
    assert_eq!(step, Ok(Step::Go));
    assert!(filter.take_response().is_some() && filter.wants_response_body());
    assert_eq!(filter.response_body(data("one"), false).await, Ok(Step::Go));
    assert_eq!(filter.take_response_body(), "ONE");
    assert_eq!(filter.response_body(Bytes::new(), true).await, Ok(Step::Go));

    let (mut filter, step) = answered("req response; res body whole; rbody rset x-b 2").await;
    assert_eq!(step, Ok(Step::Wait));
    assert_eq!(filter.response_body(data("one "), false).await, Ok(Step::Wait));
    assert_eq!(filter.response_body(data("two"), true).await, Ok(Step::Go));
    assert_eq!(values(&filter.take_response().unwrap().headers, "x-b"), ["2"]);
    assert_eq!(filter.take_response_body(), "one two");

    let (mut filter, _) = answered("req response; res body pieces; rbody rset x-b 2").await;
    filter.take_response().unwrap();
    assert_eq!(filter.response_body(data("one"), false).await, Ok(Step::Go));
    assert!(String::from_utf8_lossy(&filter.take_response_body()).contains("sent"));

    let (mut filter, _) = answered("req response; res body pieces; rbody respond 500 broken").await;
    filter.take_response().unwrap();
    let step = filter.response_body(data("one"), false).await;
    assert!(matches!(step, Ok(Step::Respond(_))), "{step:?}");

    let (mut filter, _) = answered("req response; res body whole; rbody ends").await;
    assert_eq!(
        filter.response_trailers(headers(&[("t", "1")])).await,
        Ok(Step::Go)
    );
    assert_eq!(filter.take_trailers(Way::Response), Some(headers(&[("t", "1")])));
    assert_eq!(filter.take_response_body(), "[0 true]");
}

#[tokio::test]
async fn a_bad_request_spoils_nothing_for_the_next() {
    let rig = rig().await;
    for acts in [
        "req trap",
        "req loop",
        "req respond 999 x",
        "req body pieces; body trap",
    ] {
        let (mut filter, _) = begun(&rig, acts, false).await;
        drop(filter.request_body(data("x"), true).await);
        assert_eq!(
            field(&rig, "req set x-a new", "x-a").await,
            ["new"],
            "after {acts}"
        );
    }
}

fn target(service: &str, healthy: u32) -> Target {
    Target {
        service: service.into(),
        weight: 1,
        healthy,
        endpoints: 3,
        circuit_open: false,
        under_way: 0,
    }
}

#[tokio::test]
async fn a_router_chooses_or_leaves_it() {
    let rig = Rig::new(PluginKind::Router, &guest("router.wasm")).await;
    let chosen = rig.chosen();
    for (word, want) in [
        ("1", Ok(Some(1))),
        ("none", Ok(None)),
        ("2", Ok(None)),
        ("4294967295", Ok(None)),
        ("healthy", Ok(Some(1))),
        ("service", Ok(Some(1))),
        ("edit", Ok(Some(0))),
        ("trap", Err(Fault::Trap)),
        ("loop", Err(Fault::Time)),
    ] {
        let targets = vec![target("a", 0), target("b", 2)];
        let request = head("/a?b=c", &[("x-choose", word)]);
        let (after, got) = rig
            .worker
            .route(&chosen, request.clone(), &facts("b"), targets)
            .await;
        assert_eq!(got, want, "{word}");
        assert_eq!((after.path, after.headers), (request.path, request.headers));
    }
    assert_eq!(rig.told.calls.borrow()[0], ("choose", Ok(())));
}
