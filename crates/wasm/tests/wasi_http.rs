//! `wasi:http` applications as the answer of a rung, with a real one.

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

use http::Method;
use leeward_policy::model::PluginKind;
use leeward_wasm::{Action, FailedCall, Fault};
use std::time::{Duration, Instant};
use support::{Rig, body_of, failed, guest, headers, now};

async fn rig() -> Rig {
    Rig::new(PluginKind::WasiHttp, &guest("http.wasm")).await
}

fn call(path: &str) -> FailedCall {
    let mut call = failed("");
    call.head.path = path.parse().unwrap();
    call
}

async fn ask(rig: &Rig, call: FailedCall) -> Result<Action, Fault> {
    tokio::select! {
        action = rig.fail(call) => action,
        () = rig.mesh() => unreachable!(),
    }
}

#[tokio::test]
async fn an_application_answers_a_failed_request() {
    let rig = rig().await;
    let Ok(Action::Respond(reply)) = rig.fail(call("/shop")).await else {
        panic!()
    };
    assert_eq!((reply.status.as_u16(), &*reply.body), (503, b"later".as_slice()));
    assert_eq!(reply.headers, headers(&[("content-type", "text/plain")]));
    assert_eq!(*rig.told.calls.borrow(), [("handle", Ok(()))]);
    let mut posted = call("/echo/x?y=z");
    posted.head.method = Method::POST;
    posted.head.headers.insert("connection", "close".parse().unwrap());
    posted.body = Some(vec![b'b'; 20_000].into());
    let echoed = body_of(rig.fail(posted).await);
    assert!(
        echoed.starts_with("Method::Post /echo/x?y=z shop 2 bbb"),
        "{}",
        &echoed[..60]
    );
    assert_eq!(echoed.matches('b').count(), 20_000);
    let mut nobody = call("/echo");
    (nobody.body, nobody.head.authority) = (None, "".into());
    assert_eq!(
        body_of(rig.fail(nobody).await),
        "Method::Get /echo recommendations 2 "
    );
}

#[tokio::test]
async fn instances_are_reused_and_replaced() {
    let rig = rig().await;
    assert_eq!(body_of(rig.fail(call("/calls")).await), "1");
    assert_eq!(body_of(rig.fail(call("/calls")).await), "2");
    for (path, want) in [
        ("/status/102", Fault::BadResponse),
        ("/status/600", Fault::BadResponse),
        ("/mesh", Fault::BadResponse),
        ("/big/1048577", Fault::BadResponse),
        ("/none", Fault::BadResponse),
        ("/trap-late", Fault::Trap),
        ("/loop", Fault::Time),
        ("/sleep", Fault::Time),
    ] {
        assert_eq!(rig.fail(call(path)).await, Err(want), "{path}");
        assert_eq!(body_of(rig.fail(call("/calls")).await), "1", "after {path}");
    }
    let Ok(Action::Respond(big)) = rig.fail(call("/big/1048576")).await else {
        panic!()
    };
    assert_eq!(big.body.len(), 1 << 20);
    let Ok(Action::Respond(told)) = rig.fail(call("/length")).await else {
        panic!()
    };
    assert_eq!(
        (told.headers.len(), &*told.body),
        (0, b"12345".as_slice()),
        "the proxy frames it anew"
    );
}

#[tokio::test]
async fn an_application_calls_services_through_the_mesh() {
    let rig = rig().await;
    for (path, want) in [
        (
            "/get/reviews/top?n=3",
            "200 p reviews /top?n=3 None 0 pieces 0 whole",
        ),
        (
            "/get/reviews.mesh:8080/top",
            "200 p reviews /top None 0 pieces 0 whole",
        ),
        ("/post/reviews/in", "200 p reviews /in None 0 pieces 200000 whole"),
    ] {
        assert_eq!(body_of(ask(&rig, call(path)).await), want);
    }
    for (path, want) in [
        ("/get/payments/", "DestinationNotFound"),
        ("/get/10.0.0.1:80/", "DestinationNotFound"),
        ("/https/reviews/", "HttpRequestDenied"),
        ("/get/loop/", "LoopDetected"),
        ("/get/reviews/broken", "broken"),
    ] {
        let got = body_of(ask(&rig, call(path)).await);
        assert!(got.contains(want), "{path}: {got}");
    }
    let many = body_of(ask(&rig, call("/many/reviews")).await);
    assert_eq!(many.matches("200 ").count(), 4, "{many}");
    assert_eq!(many.matches("ConnectionLimitReached").count(), 5, "{many}");
}

#[tokio::test]
async fn an_application_that_waits_ends_with_the_request() {
    let rig = rig().await;
    let began: Instant = now();
    let mut waiting = call("/get/reviews/silent");
    waiting.facts.deadline = Some(began + Duration::from_millis(400));
    let asked = ask(&rig, waiting).await;
    // There is a moment left to tell, which a busy machine may not give it.
    if !matches!(asked, Err(Fault::Busy | Fault::Time)) {
        assert!(body_of(asked).contains("HttpResponseTimeout"));
    }
    assert!(
        began.elapsed() >= Duration::from_millis(380),
        "longer than its own 200 ms"
    );
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(body_of(ask(&rig, call("/get/reviews/x")).await).starts_with("200"));
}
