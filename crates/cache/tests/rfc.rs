//! What RFC 9111 says of one answer and one request after it, case by case.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use leeward_policy::model::Cache;
use support::{ALL, Ask, DATE, Fields, MINUTE, SETTINGS, TAG, answer, at, cache, lead, look};

/// A request is answered at 0 s, and another follows.
struct Case {
    what: &'static str,
    asked: Fields<'static>,
    status: u16,
    answered: Fields<'static>,
    next: Fields<'static>,
    after: u64,
    expected: &'static str,
}

const fn case(
    what: &'static str,
    asked: Fields<'static>,
    answered: Fields<'static>,
    next: Fields<'static>,
    after: u64,
    expected: &'static str,
) -> Case {
    Case {
        what,
        asked,
        status: 200,
        answered,
        next,
        after,
        expected,
    }
}

const FRESHNESS: &[Case] = &[
    case("max-age", &[], &[MINUTE], &[], 59, "fresh b"),
    case("its end", &[], &[MINUTE], &[], 60, "miss"),
    case(
        "its end, with a validator",
        &[],
        &[MINUTE, TAG],
        &[],
        60,
        "validate b",
    ),
    case(
        "s-maxage before max-age",
        &[],
        &[("cache-control", "max-age=5, s-maxage=60")],
        &[],
        59,
        "fresh b",
    ),
    case(
        "a short s-maxage, too",
        &[],
        &[("cache-control", "max-age=60, s-maxage=5"), TAG],
        &[],
        6,
        "validate b",
    ),
    case(
        "max-age before Expires",
        &[],
        &[DATE, MINUTE, ("expires", "0")],
        &[],
        59,
        "fresh b",
    ),
    case(
        "Expires",
        &[],
        &[DATE, ("expires", "Fri, 15 Jan 2027 08:00:30 GMT")],
        &[],
        29,
        "fresh b",
    ),
    case(
        "its end",
        &[],
        &[DATE, ("expires", "Fri, 15 Jan 2027 08:00:30 GMT"), TAG],
        &[],
        30,
        "validate b",
    ),
    case(
        "Expires without Date",
        &[],
        &[("expires", "Fri, 15 Jan 2027 08:00:30 GMT")],
        &[],
        29,
        "fresh b",
    ),
    case(
        "Expires as of RFC 850",
        &[],
        &[DATE, ("expires", "Friday, 15-Jan-27 08:00:30 GMT")],
        &[],
        29,
        "fresh b",
    ),
    case(
        "Expires that is no date",
        &[],
        &[DATE, ("expires", "0"), TAG],
        &[],
        0,
        "validate b",
    ),
    case("Age", &[], &[MINUTE, TAG, ("age", "50")], &[], 9, "fresh b"),
    case(
        "Age at its end",
        &[],
        &[MINUTE, TAG, ("age", "50")],
        &[],
        10,
        "validate b",
    ),
    case(
        "an old Date",
        &[],
        &[MINUTE, TAG, ("date", "Fri, 15 Jan 2027 07:59:10 GMT")],
        &[],
        10,
        "validate b",
    ),
    case(
        "a Date to come",
        &[],
        &[MINUTE, ("date", "Fri, 15 Jan 2027 09:00:00 GMT")],
        &[],
        59,
        "fresh b",
    ),
    case(
        "an Age beyond measure",
        &[],
        &[MINUTE, TAG, ("age", "18446744073709551615")],
        &[],
        1,
        "validate b",
    ),
    case(
        "an Age that is none",
        &[],
        &[MINUTE, ("age", "old")],
        &[],
        1,
        "fresh b",
    ),
    case(
        "Last-Modified is no freshness",
        &[],
        &[DATE, ("last-modified", "Fri, 15 Jan 2010 08:00:00 GMT")],
        &[],
        0,
        "miss",
    ),
    case(
        "immutable is no freshness",
        &[],
        &[("cache-control", "immutable"), TAG],
        &[],
        0,
        "miss",
    ),
    case(
        "no-cache",
        &[],
        &[("cache-control", "no-cache, max-age=60"), TAG],
        &[],
        0,
        "validate b",
    ),
    case(
        "no-cache of one field",
        &[],
        &[("cache-control", "max-age=60, no-cache=\"x\""), TAG],
        &[],
        0,
        "validate b",
    ),
    case(
        "no-cache that nothing can confirm",
        &[],
        &[("cache-control", "no-cache, max-age=60")],
        &[],
        0,
        "miss",
    ),
    case(
        "two max-age",
        &[],
        &[("cache-control", "max-age=60, max-age=10"), TAG],
        &[],
        10,
        "validate b",
    ),
    case(
        "must-revalidate, fresh",
        &[],
        &[("cache-control", "must-revalidate, max-age=60")],
        &[],
        59,
        "fresh b",
    ),
    case(
        "proxy-revalidate, fresh",
        &[],
        &[("cache-control", "proxy-revalidate, max-age=60")],
        &[],
        59,
        "fresh b",
    ),
];

const SHARING: &[Case] = &[
    case(
        "no-store",
        &[],
        &[("cache-control", "no-store, max-age=60")],
        &[],
        0,
        "miss",
    ),
    case(
        "private",
        &[],
        &[("cache-control", "private, max-age=60")],
        &[],
        0,
        "miss",
    ),
    case(
        "Private",
        &[],
        &[("cache-control", "Private, Max-Age=60")],
        &[],
        0,
        "miss",
    ),
    case(
        "private for a field",
        &[],
        &[("cache-control", "max-age=60, private=\"x, y\"")],
        &[],
        0,
        "miss",
    ),
    case(
        "private in a later line",
        &[],
        &[ALL, ("cache-control", "private")],
        &[],
        0,
        "miss",
    ),
    case("Set-Cookie", &[], &[ALL, ("set-cookie", "a=b")], &[], 0, "miss"),
    case(
        "degraded",
        &[],
        &[ALL, ("leeward-degraded", "shop/static")],
        &[],
        0,
        "miss",
    ),
    case(
        "Authorization",
        &[("authorization", "a")],
        &[MINUTE],
        &[("authorization", "a")],
        0,
        "miss",
    ),
    case(
        "Authorization and public",
        &[("authorization", "a")],
        &[ALL],
        &[],
        0,
        "fresh b",
    ),
    case(
        "Authorization and s-maxage",
        &[("authorization", "a")],
        &[("cache-control", "s-maxage=9")],
        &[("authorization", "c")],
        0,
        "fresh b",
    ),
    case(
        "Authorization and must-revalidate",
        &[("authorization", "a")],
        &[("cache-control", "max-age=9, must-revalidate")],
        &[],
        0,
        "fresh b",
    ),
    case(
        "another's, for Authorization",
        &[],
        &[MINUTE],
        &[("authorization", "a")],
        0,
        "miss",
    ),
    case(
        "public, for Authorization",
        &[],
        &[ALL],
        &[("authorization", "a")],
        0,
        "fresh b",
    ),
    case(
        "Cookie",
        &[("cookie", "a=b")],
        &[MINUTE],
        &[("cookie", "a=b")],
        0,
        "miss",
    ),
    case(
        "Cookie and public",
        &[("cookie", "a=b")],
        &[ALL],
        &[("cookie", "c=d")],
        0,
        "fresh b",
    ),
    case(
        "another's, for Cookie",
        &[],
        &[MINUTE],
        &[("cookie", "a=b")],
        0,
        "miss",
    ),
    case(
        "Vary: Cookie, the same",
        &[("cookie", "a=b")],
        &[MINUTE, ("vary", "Cookie")],
        &[("cookie", "a=b")],
        0,
        "fresh b",
    ),
    case(
        "Vary: Cookie, another",
        &[("cookie", "a=b")],
        &[MINUTE, ("vary", "Cookie")],
        &[("cookie", "c=d")],
        0,
        "miss",
    ),
    case("Vary: *", &[], &[ALL, ("vary", "*")], &[], 0, "miss"),
    case(
        "Vary: * among others",
        &[],
        &[ALL, ("vary", "accept, *")],
        &[],
        0,
        "miss",
    ),
    case(
        "Vary that is no name",
        &[],
        &[ALL, ("vary", "acc ept")],
        &[],
        0,
        "miss",
    ),
    case(
        "Vary, the same",
        &[("accept", "x")],
        &[ALL, ("vary", "Accept")],
        &[("accept", "x")],
        0,
        "fresh b",
    ),
    case(
        "Vary, another",
        &[("accept", "x")],
        &[ALL, ("vary", "Accept")],
        &[("accept", "y")],
        0,
        "miss",
    ),
    case(
        "Vary, none",
        &[("accept", "x")],
        &[ALL, ("vary", "Accept")],
        &[],
        0,
        "miss",
    ),
    case(
        "Vary, empty is not none",
        &[],
        &[ALL, ("vary", "Accept")],
        &[("accept", "")],
        0,
        "miss",
    ),
    case(
        "Vary, a second line",
        &[("accept", "x")],
        &[ALL, ("vary", "Accept")],
        &[("accept", "x"), ("accept", "y")],
        0,
        "miss",
    ),
    case(
        "Vary in two lines",
        &[("b", "x")],
        &[ALL, ("vary", "a"), ("vary", "b")],
        &[("b", "y")],
        0,
        "miss",
    ),
];

const REQUESTS: &[Case] = &[
    case(
        "no-cache",
        &[],
        &[MINUTE, TAG],
        &[("cache-control", "no-cache")],
        0,
        "validate b",
    ),
    case(
        "Pragma",
        &[],
        &[MINUTE, TAG],
        &[("pragma", "no-cache")],
        0,
        "validate b",
    ),
    case(
        "no-store",
        &[],
        &[MINUTE],
        &[("cache-control", "no-store")],
        0,
        "bypass",
    ),
    case(
        "no-store, before",
        &[("cache-control", "no-store")],
        &[MINUTE],
        &[],
        0,
        "miss",
    ),
    case(
        "max-age",
        &[],
        &[MINUTE, TAG],
        &[("cache-control", "max-age=5")],
        5,
        "fresh b",
    ),
    case(
        "max-age, older",
        &[],
        &[MINUTE, TAG],
        &[("cache-control", "max-age=5")],
        6,
        "validate b",
    ),
    case(
        "min-fresh",
        &[],
        &[MINUTE, TAG],
        &[("cache-control", "min-fresh=10")],
        50,
        "fresh b",
    ),
    case(
        "min-fresh, too late",
        &[],
        &[MINUTE, TAG],
        &[("cache-control", "min-fresh=10")],
        51,
        "validate b",
    ),
    case(
        "max-stale is policy's to say",
        &[],
        &[MINUTE, TAG],
        &[("cache-control", "max-stale")],
        61,
        "validate b",
    ),
    case("Range", &[], &[MINUTE], &[("range", "bytes=0-1")], 0, "bypass"),
    case("If-Match", &[], &[MINUTE], &[("if-match", "\"1\"")], 0, "bypass"),
    case(
        "Upgrade",
        &[],
        &[MINUTE],
        &[("upgrade", "websocket")],
        0,
        "bypass",
    ),
    case("a body", &[], &[MINUTE], &[("content-length", "3")], 0, "bypass"),
    case(
        "no body",
        &[],
        &[MINUTE],
        &[("content-length", "0")],
        0,
        "fresh b",
    ),
];

#[track_caller]
fn check(cases: &[Case], settings: Cache) {
    for case in cases {
        let cache = cache(settings);
        let fill = lead(&cache, &Ask::get("/x?y", case.asked), at(0));
        answer(fill, case.status, case.answered, "b", at(0));
        let found = look(&cache, &Ask::get("/x?y", case.next), at(case.after));
        assert_eq!(found, case.expected, "{}: {:?}", case.what, case.answered);
    }
}

#[test]
fn freshness() {
    check(FRESHNESS, SETTINGS);
}

#[test]
fn sharing() {
    check(SHARING, SETTINGS);
}

#[test]
fn wishes_of_requests() {
    check(REQUESTS, SETTINGS);
}
