//! One request for many.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use http::{Method, StatusCode, header};
use leeward_cache::{Caches, Head, Joined, Kept, Look, PASS_FOR, RuleCache, Waiter};
use leeward_policy::model::Cache;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use support::{ALL, Ask, Fields, MINUTE, SETTINGS, TAG, answer, at, cache, fields, lead, look};

#[track_caller]
fn wait(cache: &Arc<RuleCache>, ask: &Ask) -> Waiter {
    match cache.join(&ask.asked(), at(0)) {
        Joined::Wait(waiter) => waiter,
        other @ (Joined::Fresh(_) | Joined::Lead(_)) => panic!("it doesn't wait: {other:?}"),
    }
}

/// What a waiter gets, on a thread and a runtime of its own.
fn elsewhere(mut waiter: Waiter) -> thread::JoinHandle<Option<Kept>> {
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(waiter.wait())
    })
}

/// 64 requests wait for one, which is answered with `head`; how many get what it got.
fn served(head: Option<(u16, Fields<'_>)>, whole: bool) -> usize {
    let caches = Caches::new();
    let cache = caches.rule(&"rule".into(), &SETTINGS);
    let ask = Ask::get("/", &[]);
    let mut fill = lead(&cache, &ask, at(0));
    let waiting: Vec<_> = (0..64).map(|_| elsewhere(wait(&cache, &ask))).collect();
    if let Some((status, headers)) = head {
        let _ = fill.head(StatusCode::from_u16(status).unwrap(), &fields(headers), at(1));
    }
    let mut fill = Some(fill);
    if whole && let Some(mut fill) = fill.take() {
        fill.data(&"bo".into());
        fill.data(&"dy".into());
        fill.finish(at(2));
    }
    if head.is_none() {
        // Of one that has a head that isn't kept they learn though it lives.
        fill = None;
    }
    let got: Vec<_> = waiting
        .into_iter()
        .filter_map(|thread| thread.join().unwrap())
        .collect();
    drop(fill);
    for kept in &got {
        assert_eq!(kept.body, "body");
        assert_eq!(kept.headers[header::AGE], "2");
    }
    let reading = &caches.readings()[0];
    assert_eq!(reading.coalesced, got.len() as u64);
    got.len()
}

#[test]
fn many_wait_for_one() {
    assert_eq!(served(Some((200, &[MINUTE])), true), 64);
}

#[test]
fn a_request_that_is_given_up_frees_them() {
    assert_eq!(served(None, false), 0);
}

#[test]
fn an_answer_that_is_not_kept_frees_them_at_its_head() {
    assert_eq!(served(Some((200, &[("cache-control", "private")])), false), 0);
    assert_eq!(served(Some((500, &[])), false), 0);
}

#[test]
fn one_that_each_must_have_confirmed_frees_them_too() {
    assert_eq!(
        served(Some((200, &[("cache-control", "no-cache"), TAG])), false),
        0
    );
}

#[tokio::test]
async fn a_cut_off_answer_frees_them() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    let fill = lead(&cache, &ask, at(0));
    let mut waiter = wait(&cache, &ask);
    answer(fill, 200, &[MINUTE, ("content-length", "9")], "body", at(0));
    assert!(waiter.wait().await.is_none());
}

#[tokio::test]
async fn one_that_grows_too_large_frees_them_before_its_end() {
    let cache = cache(Cache {
        max_object_bytes: 1024,
        ..SETTINGS
    });
    let ask = Ask::get("/", &[]);
    let mut fill = lead(&cache, &ask, at(0));
    let mut waiter = wait(&cache, &ask);
    assert!(matches!(
        fill.head(StatusCode::OK, &fields(&[MINUTE]), at(0)),
        Head::Keep
    ));
    fill.data(&vec![0; 2048].into());
    assert!(waiter.wait().await.is_none());
    drop(fill);
    drop(lead(&cache, &ask, at(1)));
}

#[tokio::test]
async fn an_answer_for_others_frees_whom_it_is_not_for() {
    let cache = cache(SETTINGS);
    let same = Ask::get("/", &[("accept", "x")]);
    let other = Ask::get("/", &[("accept", "y")]);
    let mut fill = lead(&cache, &same, at(0));
    let (mut for_same, mut for_other) = (wait(&cache, &same), wait(&cache, &other));
    assert!(matches!(
        fill.head(StatusCode::OK, &fields(&[MINUTE, ("vary", "accept")]), at(0)),
        Head::Keep
    ));
    assert!(for_other.wait().await.is_none());
    fill.finish(at(0));
    assert!(for_same.wait().await.is_some());
    // Now that it is known what selects, others don't wait for it.
    let _same = lead(&cache, &same, at(100));
    let _other = lead(&cache, &other, at(100));
}

#[tokio::test]
async fn who_looks_only_when_it_is_done_gets_no_others_answer_either() {
    let cache = cache(SETTINGS);
    let fill = lead(&cache, &Ask::get("/", &[("accept", "x")]), at(0));
    let mut waiter = wait(&cache, &Ask::get("/", &[("accept", "y")]));
    assert!(answer(fill, 200, &[MINUTE, ("vary", "accept")], "b", at(0)));
    assert!(waiter.wait().await.is_none());
}

#[test]
fn who_has_credentials_does_not_wait_for_who_has_none() {
    let cache = cache(SETTINGS);
    let _anonymous = lead(&cache, &Ask::get("/", &[]), at(0));
    let _cookie = lead(&cache, &Ask::get("/", &[("cookie", "a")]), at(0));
    let _authorized = lead(&cache, &Ask::get("/", &[("authorization", "a")]), at(0));
    drop(wait(&cache, &Ask::get("/", &[("cookie", "b")])));
}

#[tokio::test]
async fn an_answer_is_not_given_to_other_credentials_that_waited() {
    for (head, given) in [(MINUTE, false), (ALL, true)] {
        let cache = cache(SETTINGS);
        let fill = lead(&cache, &Ask::get("/", &[("authorization", "a")]), at(0));
        let mut waiter = wait(&cache, &Ask::get("/", &[("authorization", "b")]));
        answer(fill, 200, &[head], "b", at(0));
        assert_eq!(waiter.wait().await.is_some(), given, "{head:?}");
    }
}

#[test]
fn what_was_not_shared_is_asked_for_beside_each_other_for_a_while() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    answer(lead(&cache, &ask, at(0)), 200, &[], "b", at(0));
    let first = lead(&cache, &ask, at(1));
    let second = lead(&cache, &ask, at(1));
    assert!(answer(first, 200, &[MINUTE], "b", at(1)), "it may be kept again");
    drop(second);
    assert_eq!(look(&cache, &ask, at(2)), "fresh b");
    let after = PASS_FOR.as_secs();
    cache.invalidate(&ask.clone().with_method(Method::POST).asked(), StatusCode::OK);
    let _third = lead(&cache, &ask, at(after));
    assert!(matches!(cache.join(&ask.asked(), at(after)), Joined::Wait(_)));
}

#[test]
fn an_outage_does_not_let_them_all_through() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    answer(lead(&cache, &ask, at(0)), 503, &[], "", at(0));
    let _first = lead(&cache, &ask, at(0));
    drop(wait(&cache, &ask));
}

#[test]
fn an_invalid_answer_on_its_way_is_not_waited_for() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    let old = lead(&cache, &ask, at(0));
    cache.invalidate(&ask.clone().with_method(Method::PUT).asked(), StatusCode::OK);
    let new = lead(&cache, &ask, at(0));
    answer(old, 200, &[MINUTE], "old", at(0));
    let waiter = wait(&cache, &ask);
    answer(new, 200, &[MINUTE], "new", at(0));
    assert_eq!(elsewhere(waiter).join().unwrap().unwrap().body, "new");
}

#[test]
fn without_coalescing_each_asks() {
    let cache = cache(Cache {
        coalesce: false,
        ..SETTINGS
    });
    let ask = Ask::get("/", &[]);
    let first = lead(&cache, &ask, at(0));
    let _second = lead(&cache, &ask, at(0));
    answer(first, 200, &[MINUTE], "b", at(0));
    let joined = cache.join(&ask.asked(), at(0));
    assert!(matches!(joined, Joined::Fresh(kept) if kept.body == "b"));
}

#[test]
fn threads_that_ask_at_once_make_one_request() {
    let cache = cache(SETTINGS);
    let asked = AtomicU64::new(0);
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                for round in 0..500 {
                    let ask = Ask::get(&format!("/{round}"), &[]);
                    barrier.wait();
                    let body = match cache.look(&ask.asked(), at(0)) {
                        Look::Fresh(kept) => kept.body,
                        Look::Miss => match cache.join(&ask.asked(), at(0)) {
                            Joined::Fresh(kept) => kept.body,
                            Joined::Wait(mut waiter) => runtime.block_on(waiter.wait()).unwrap().body,
                            Joined::Lead(fill) => {
                                asked.fetch_add(1, Ordering::Relaxed);
                                answer(fill, 200, &[MINUTE], &format!("{round}"), at(0));
                                format!("{round}").into()
                            }
                        },
                        other @ (Look::Revalidate { .. } | Look::Validate { .. } | Look::Bypass) => {
                            panic!("{other:?}")
                        }
                    };
                    assert_eq!(body, format!("{round}"));
                }
            });
        }
    });
    assert_eq!(asked.into_inner(), 500);
}

#[tokio::test]
async fn who_gives_up_on_a_slow_reader_frees_those_to_come() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    let mut fill = lead(&cache, &ask, at(0));
    let mut waiter = wait(&cache, &ask);
    assert!(matches!(
        fill.head(StatusCode::OK, &fields(&[("cache-control", "max-age=60")]), at(0)),
        Head::Keep
    ));
    waiter.head().await;
    waiter.leave();
    assert!(matches!(cache.join(&ask.asked(), at(0)), Joined::Lead(_)));
}
