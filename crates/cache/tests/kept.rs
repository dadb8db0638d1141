//! What is kept, confirmed, invalidated, and given when it is stale, as RFC 9111 and RFC 5861 have it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use http::{Method, StatusCode, header};
use leeward_cache::{Head, Look, MAX_KEY_BYTES};
use leeward_policy::model::Cache;
use std::time::Duration;
use support::{ALL, Ask, DATE, MINUTE, SETTINGS, TAG, answer, at, cache, fields, lead, look};

#[test]
fn statuses_and_what_policy_says_of_answers_that_do_not() {
    let policy = Cache {
        default_ttl: Duration::from_secs(10),
        ..SETTINGS
    };
    for (status, fields, settings, kept) in [
        (200, &[][..], policy, true),
        (200, &[], SETTINGS, false),
        (404, &[], policy, true),
        (410, &[], policy, true),
        (302, &[], policy, false),
        (302, &[MINUTE], SETTINGS, true),
        (500, &[], policy, false),
        (500, &[MINUTE], policy, false),
        (503, &[MINUTE], policy, false),
        (206, &[MINUTE], policy, false),
        (304, &[MINUTE], policy, false),
        (200, &[("cache-control", "private")], policy, false),
        (200, &[("cache-control", "max-age=0")], policy, true),
    ] {
        let cache = cache(settings);
        let fill = lead(&cache, &Ask::get("/", &[]), at(0));
        assert_eq!(
            answer(fill, status, fields, "b", at(0)),
            kept,
            "{status} {fields:?}"
        );
    }
    let cache = cache(policy);
    answer(lead(&cache, &Ask::get("/", &[]), at(0)), 200, &[TAG], "b", at(0));
    assert_eq!(look(&cache, &Ask::get("/", &[]), at(9)), "fresh b");
    assert_eq!(look(&cache, &Ask::get("/", &[]), at(10)), "validate b");
}

#[test]
fn an_answer_that_took_long_is_older() {
    let cache = cache(SETTINGS);
    let fill = lead(&cache, &Ask::get("/", &[]), at(0));
    answer(fill, 200, &[MINUTE, TAG, ("age", "5")], "b", at(20));
    let Look::Fresh(kept) = cache.look(&Ask::get("/", &[]).asked(), at(30)) else {
        panic!("not fresh");
    };
    assert_eq!(kept.headers[header::AGE], "35");
    assert_eq!(look(&cache, &Ask::get("/", &[]), at(55)), "validate b");
}

#[test]
fn fields_for_one_hop_are_not_kept_and_lines_are() {
    let cache = cache(SETTINGS);
    let fill = lead(&cache, &Ask::get("/", &[]), at(0));
    let head = [
        MINUTE,
        DATE,
        ("connection", "x-hop, close"),
        ("x-hop", "1"),
        ("keep-alive", "1"),
        ("transfer-encoding", "chunked"),
        ("link", "a"),
        ("link", "b"),
        ("x-own", "\u{e9}"),
    ];
    answer(fill, 200, &head, "body", at(0));
    let Look::Fresh(kept) = cache.look(&Ask::get("/", &[]).asked(), at(7)) else {
        panic!("not fresh");
    };
    let expected = [
        MINUTE,
        DATE,
        ("link", "a"),
        ("link", "b"),
        ("x-own", "\u{e9}"),
        ("age", "7"),
        ("content-length", "4"),
    ];
    assert_eq!(kept.headers, fields(&expected));
}

#[test]
fn targets_are_told_apart_and_authorities_have_no_case() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/x?y", &[]);
    answer(lead(&cache, &ask, at(0)), 200, &[MINUTE], "b", at(0));
    let with = |authority: &str, target: &str| Ask {
        authority: authority.into(),
        ..Ask::get(target, &[])
    };
    assert_eq!(look(&cache, &with("SHOP", "/x?y"), at(0)), "fresh b");
    assert_eq!(look(&cache, &with("shop", "http://other/x?y"), at(0)), "fresh b");
    assert_eq!(look(&cache, &with("shop:80", "/x?y"), at(0)), "miss");
    assert_eq!(look(&cache, &with("shop", "/x"), at(0)), "miss");
    assert_eq!(look(&cache, &with("shop", "/X?y"), at(0)), "miss");
    let long = format!("/{}", "x".repeat(MAX_KEY_BYTES));
    assert_eq!(look(&cache, &Ask::get(&long, &[]), at(0)), "bypass");
    assert!(!answer(
        lead(&cache, &Ask::get(&long, &[]), at(0)),
        200,
        &[MINUTE],
        "b",
        at(0)
    ));
}

#[test]
fn variants_are_kept_beside_each_other_up_to_a_bound() {
    let cache = cache(SETTINGS);
    let ask = |n: usize| Ask::get("/", &[("accept", &format!("{n}"))]);
    for n in 0..17 {
        answer(
            lead(&cache, &ask(n), at(0)),
            200,
            &[ALL, ("vary", "accept")],
            &format!("{n}"),
            at(0),
        );
    }
    assert_eq!(look(&cache, &ask(0), at(0)), "miss", "the oldest is gone");
    for n in 1..17 {
        assert_eq!(look(&cache, &ask(n), at(0)), format!("fresh {n}"));
    }
    answer(
        lead(&cache, &ask(3), at(60)),
        200,
        &[ALL, ("vary", "accept")],
        "new",
        at(60),
    );
    assert_eq!(look(&cache, &ask(3), at(60)), "fresh new");
}

#[test]
fn a_304_freshens_what_is_kept() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    let head = [
        MINUTE,
        DATE,
        TAG,
        ("x-a", "1"),
        ("x-b", "1"),
        ("x-b", "2"),
        ("vary", "a"),
        ("vary", "b"),
    ];
    answer(lead(&cache, &ask, at(0)), 200, &head, "b", at(0));
    let Look::Validate { conditions, .. } = cache.look(&ask.asked(), at(100)) else {
        panic!("it is stale");
    };
    assert_eq!(conditions, fields(&[("if-none-match", "\"1\"")]));
    let mut fill = lead(&cache, &ask, at(100));
    assert_eq!(fill.conditions(), conditions);
    let date = ("date", "Fri, 15 Jan 2027 08:01:40 GMT");
    let not_modified = [
        date,
        ("etag", "W/\"1\""),
        ("x-a", "2"),
        ("x-c", "3"),
        ("content-length", "9"),
    ];
    let Head::Freshened(kept) = fill.head(StatusCode::NOT_MODIFIED, &fields(&not_modified), at(100)) else {
        panic!("not confirmed");
    };
    assert_eq!(kept.status, StatusCode::OK);
    assert_eq!(kept.body, "b");
    let expected = [
        MINUTE,
        date,
        ("etag", "W/\"1\""),
        ("x-a", "2"),
        ("x-b", "1"),
        ("x-b", "2"),
        ("x-c", "3"),
        ("vary", "a"),
        ("vary", "b"),
        ("age", "0"),
        ("content-length", "1"),
    ];
    assert_eq!(kept.headers, fields(&expected));
    assert_eq!(look(&cache, &ask, at(159)), "fresh b");
    assert_eq!(look(&cache, &Ask::get("/", &[("b", "x")]), at(159)), "miss");
}

#[test]
fn a_304_without_a_date_is_of_now() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    answer(lead(&cache, &ask, at(0)), 200, &[MINUTE, DATE, TAG], "b", at(0));
    let confirmed = lead(&cache, &ask, at(100)).head(StatusCode::NOT_MODIFIED, &fields(&[TAG]), at(100));
    assert!(matches!(confirmed, Head::Freshened(kept) if kept.headers[header::AGE] == "0"));
    assert_eq!(look(&cache, &ask, at(159)), "fresh b");
}

#[test]
fn a_304_may_end_what_is_kept() {
    let ask = Ask::get("/", &[]);
    for (what, not_modified, freshened) in [
        ("about another", &[("etag", "\"2\"")][..], false),
        ("private now", &[("cache-control", "private")], true),
        ("with a cookie", &[MINUTE, ("set-cookie", "a=b")], true),
    ] {
        let cache = cache(SETTINGS);
        answer(lead(&cache, &ask, at(0)), 200, &[MINUTE, TAG], "b", at(0));
        let mut fill = lead(&cache, &ask, at(100));
        match fill.head(StatusCode::NOT_MODIFIED, &fields(not_modified), at(100)) {
            Head::Freshened(kept) if freshened => assert_eq!(kept.body, "b", "{what}"),
            Head::Again if !freshened => {}
            other @ (Head::Keep | Head::Pass | Head::Freshened(_) | Head::Again) => {
                panic!("{what}: {other:?}")
            }
        }
        assert_eq!(look(&cache, &ask, at(100)), "miss", "{what}");
    }
}

#[test]
fn a_304_to_the_clients_own_conditions_is_the_clients() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[("if-none-match", "\"0\"")]);
    answer(lead(&cache, &ask, at(0)), 200, &[MINUTE, TAG], "b", at(0));
    let Look::Validate { conditions, .. } = cache.look(&ask.asked(), at(100)) else {
        panic!("it is stale");
    };
    assert!(conditions.is_empty());
    let mut fill = lead(&cache, &ask, at(100));
    assert!(fill.conditions().is_empty());
    let head = fill.head(
        StatusCode::NOT_MODIFIED,
        &fields(&[MINUTE, ("etag", "\"0\"")]),
        at(100),
    );
    assert!(matches!(head, Head::Pass));
    assert_eq!(look(&cache, &Ask::get("/", &[]), at(100)), "validate b");
}

#[test]
fn a_client_that_has_it_gets_a_304() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[("if-none-match", "\"1\"")]);
    answer(
        lead(&cache, &ask, at(0)),
        200,
        &[MINUTE, TAG, ("x-a", "1")],
        "b",
        at(0),
    );
    let Look::Fresh(kept) = cache.look(&ask.asked(), at(5)) else {
        panic!("it is fresh");
    };
    assert!(kept.not_modified(&ask.asked()));
    let not_modified = kept.into_not_modified();
    assert_eq!(not_modified.status, StatusCode::NOT_MODIFIED);
    assert_eq!(not_modified.headers, fields(&[MINUTE, TAG, ("age", "5")]));
    assert!(not_modified.body.is_empty());
}

#[test]
fn unsafe_methods_invalidate_when_they_succeed() {
    let ask = Ask::get("/", &[]);
    for (method, status, kept) in [
        (Method::POST, 200, false),
        (Method::PUT, 201, false),
        (Method::DELETE, 204, false),
        (Method::PATCH, 303, false),
        (Method::POST, 404, true),
        (Method::POST, 500, true),
        (Method::GET, 200, true),
        (Method::OPTIONS, 200, true),
    ] {
        let cache = cache(SETTINGS);
        answer(lead(&cache, &ask, at(0)), 200, &[MINUTE], "b", at(0));
        answer(
            lead(&cache, &Ask::get("/2", &[]), at(0)),
            200,
            &[MINUTE],
            "c",
            at(0),
        );
        let on_its_way = lead(&cache, &Ask::get("/", &[("cookie", "a")]), at(0));
        let other = ask.clone().with_method(method.clone());
        cache.invalidate(&other.asked(), StatusCode::from_u16(status).unwrap());
        assert_eq!(look(&cache, &ask, at(1)) == "fresh b", kept, "{method} {status}");
        answer(on_its_way, 200, &[ALL], "old", at(1));
        assert_eq!(
            look(&cache, &ask, at(1)) == "fresh old",
            kept,
            "{method} {status}"
        );
        assert_eq!(look(&cache, &Ask::get("/2", &[]), at(1)), "fresh c");
    }
}

#[test]
fn head_is_answered_from_a_get_and_not_kept() {
    let cache = cache(SETTINGS);
    let head = Ask::get("/", &[]).with_method(Method::HEAD);
    assert!(!answer(lead(&cache, &head, at(0)), 200, &[MINUTE], "", at(0)));
    assert_eq!(look(&cache, &Ask::get("/", &[]), at(0)), "miss");
    answer(
        lead(&cache, &Ask::get("/", &[]), at(0)),
        200,
        &[MINUTE, TAG],
        "body",
        at(0),
    );
    let Look::Fresh(kept) = cache.look(&head.asked(), at(0)) else {
        panic!("not answered");
    };
    assert_eq!(kept.headers[header::CONTENT_LENGTH], "4");
    assert!(kept.body.is_empty());
    let mut fill = lead(&cache, &head, at(100));
    let confirmed = fill.head(StatusCode::NOT_MODIFIED, &fields(&[TAG]), at(100));
    assert!(matches!(confirmed, Head::Freshened(kept) if kept.body.is_empty()));
    assert_eq!(look(&cache, &Ask::get("/", &[]), at(100)), "fresh body");
}

#[test]
fn other_methods_bypass() {
    let cache = cache(SETTINGS);
    for method in [Method::POST, Method::PUT, Method::OPTIONS, Method::CONNECT] {
        let ask = Ask::get("/", &[]).with_method(method);
        assert_eq!(look(&cache, &ask, at(0)), "bypass");
        assert!(!answer(lead(&cache, &ask, at(0)), 200, &[ALL], "b", at(0)));
    }
    assert!(
        Ask::get("/", &[("cache-control", "only-if-cached")])
            .asked()
            .only_if_cached()
    );
}

/// Policy's windows, the answer's Cache-Control, a rung's bound, and how long past its freshness (10 s) it is given.
const STALE_IF_ERROR: &[(u64, &str, Option<u64>, u64)] = &[
    (0, "max-age=10", None, 0),
    (60, "max-age=10", None, 60),
    (60, "max-age=10, stale-if-error=5", None, 5),
    (5, "max-age=10, stale-if-error=60", None, 60),
    (60, "max-age=10, stale-if-error=0", None, 0),
    (0, "max-age=10", Some(7), 7),
    (60, "max-age=10, stale-if-error=5", Some(7), 7),
    (60, "max-age=10, must-revalidate", Some(7), 0),
    (60, "max-age=10, proxy-revalidate", Some(7), 0),
    (60, "max-age=10, Must-Revalidate, stale-if-error=9", None, 0),
    (60, "s-maxage=10", Some(7), 0),
    (60, "s-maxage=10, stale-if-error=9", None, 9),
    (60, "s-maxage=10, stale-if-error=9", Some(7), 7),
];

#[test]
fn a_stale_answer_stands_in_for_a_failure_for_a_while() {
    let ask = Ask::get("/", &[("cache-control", "max-age=1")]);
    for &(policy, control, asked, past) in STALE_IF_ERROR {
        let cache = cache(Cache {
            stale_if_error: Duration::from_secs(policy),
            ..SETTINGS
        });
        let fields = [("cache-control", control), TAG];
        answer(lead(&cache, &ask, at(0)), 200, &fields, "b", at(0));
        let given = |now| cache.stale(&ask.asked(), asked.map(Duration::from_secs), at(now));
        let what = format!("{policy} {control} {asked:?}");
        assert!(given(9).is_some(), "{what}: fresh");
        assert_eq!(given(10 + past).is_some(), past > 0, "{what}: at the end");
        assert!(given(10 + past + 1).is_none(), "{what}: past it");
    }
    let cache = cache(Cache::DEFAULT);
    answer(
        lead(&cache, &ask, at(0)),
        200,
        &[("cache-control", "no-cache"), TAG],
        "b",
        at(0),
    );
    assert!(
        cache
            .stale(&ask.asked(), Some(Duration::from_secs(9)), at(0))
            .is_none()
    );
}

#[test]
fn a_stale_answer_is_given_while_one_request_fetches_another() {
    let cache = cache(Cache {
        stale_while_revalidate: Duration::from_secs(30),
        ..SETTINGS
    });
    let ask = Ask::get("/", &[("if-none-match", "\"0\"")]);
    answer(lead(&cache, &ask, at(0)), 200, &[MINUTE, TAG], "old", at(0));
    assert_eq!(
        look(&cache, &ask.clone().with_method(Method::HEAD), at(61)),
        "stale "
    );
    let Look::Revalidate {
        kept,
        refresh: Some(mut fill),
    } = cache.look(&ask.asked(), at(61))
    else {
        panic!("nobody is to fetch it");
    };
    assert_eq!(kept.body, "old");
    assert_eq!(kept.headers[header::AGE], "61");
    assert_eq!(fill.conditions(), fields(&[("if-none-match", "\"1\"")]));
    assert_eq!(look(&cache, &ask, at(62)), "stale old");
    let eager = Ask::get("/", &[("cache-control", "no-cache")]);
    assert_eq!(look(&cache, &eager, at(62)), "validate old");
    assert!(matches!(
        fill.head(StatusCode::OK, &fields(&[MINUTE]), at(61)),
        Head::Keep
    ));
    fill.data(&"new".into());
    fill.finish(at(63));
    assert_eq!(look(&cache, &ask, at(63)), "fresh new");
    assert_eq!(
        look(&cache, &ask, at(61 + 61)),
        "refresh new",
        "which is dropped at once"
    );
    assert_eq!(look(&cache, &ask, at(61 + 60 + 30)), "refresh new");
    assert_eq!(
        look(&cache, &ask, at(61 + 60 + 31)),
        "miss",
        "the window has ended"
    );
}

#[test]
fn must_revalidate_and_the_answers_own_windows_count_for_that_too() {
    for (control, expected) in [
        ("max-age=10, must-revalidate", "validate b"),
        ("max-age=10, proxy-revalidate", "validate b"),
        ("s-maxage=10", "validate b"),
        ("s-maxage=10, stale-while-revalidate=5", "refresh b"),
        ("max-age=10, stale-while-revalidate=4", "validate b"),
        ("max-age=10", "refresh b"),
    ] {
        let cache = cache(Cache {
            stale_while_revalidate: Duration::from_secs(30),
            ..SETTINGS
        });
        let ask = Ask::get("/", &[]);
        answer(
            lead(&cache, &ask, at(0)),
            200,
            &[("cache-control", control), TAG],
            "b",
            at(0),
        );
        assert_eq!(look(&cache, &ask, at(15)), expected, "{control}");
    }
}

#[test]
fn an_answer_that_is_not_whole_is_not_kept() {
    let cache = cache(SETTINGS);
    let ask = Ask::get("/", &[]);
    answer(
        lead(&cache, &ask, at(0)),
        200,
        &[MINUTE, ("content-length", "3")],
        "ab",
        at(0),
    );
    assert_eq!(look(&cache, &ask, at(0)), "miss");
    let mut fill = lead(&cache, &ask, at(0));
    assert!(matches!(
        fill.head(StatusCode::OK, &fields(&[MINUTE]), at(0)),
        Head::Keep
    ));
    fill.data(&"ab".into());
    drop(fill);
    assert_eq!(look(&cache, &ask, at(0)), "miss");
}
