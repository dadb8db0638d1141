//! What holds whatever comes: bounds, ages, and whose answer it is.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use http::{Method, StatusCode};
use leeward_cache::{Caches, Fill, Head, Joined, Kept, Look, RuleCache};
use leeward_policy::model::Cache;
use proptest::prelude::*;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use support::{ALL, Ask, MINUTE, SETTINGS, answer, at, cache, fields, lead, look};

const SMALL: Cache = Cache {
    max_bytes: 64 << 10,
    max_object_bytes: 32 << 10,
    ..Cache::DEFAULT
};

fn bytes(caches: &Caches) -> u64 {
    caches.readings()[0].bytes
}

#[test]
fn the_least_recently_used_goes_first() {
    let caches = Caches::new();
    let cache = caches.rule(&"rule".into(), &SMALL);
    let ask = |n: usize| Ask::get(&format!("/{n}"), &[]);
    let body = "x".repeat(7_500);
    for n in 0..7 {
        answer(lead(&cache, &ask(n), at(0)), 200, &[MINUTE], &body, at(0));
    }
    assert_eq!(look(&cache, &ask(0), at(0)).len(), 6 + body.len());
    answer(lead(&cache, &ask(7), at(0)), 200, &[MINUTE], &body, at(0));
    assert_eq!(look(&cache, &ask(1), at(0)), "miss");
    assert_ne!(look(&cache, &ask(0), at(0)), "miss");
    let reading = &caches.readings()[0];
    assert_eq!((reading.entries, reading.evicted), (7, 1));
}

#[test]
fn answers_on_their_way_count_and_give_back_what_they_held() {
    let caches = Caches::new();
    let cache = caches.rule(&"rule".into(), &SMALL);
    let ask = |n: usize| Ask::get(&format!("/{n}"), &[]);
    answer(
        lead(&cache, &ask(0), at(0)),
        200,
        &[MINUTE],
        &"x".repeat(20 << 10),
        at(0),
    );
    let before = bytes(&caches);
    let mut fills: Vec<Fill> = (1..4)
        .map(|n| {
            let mut fill = lead(&cache, &ask(n), at(0));
            let headers = fields(&[MINUTE, ("content-length", "30000")]);
            assert!(matches!(fill.head(StatusCode::OK, &headers, at(0)), Head::Keep));
            fill.data(&vec![0; 10_000].into());
            fill
        })
        .collect();
    assert_eq!(look(&cache, &ask(0), at(0)), "miss", "{before} bytes had to go");
    assert_eq!(bytes(&caches), 60_000, "the third has no room");
    fills.clear();
    assert_eq!(bytes(&caches), 0);
}

#[test]
fn a_large_answer_is_not_kept() {
    let cache = cache(SMALL);
    let ask = Ask::get("/", &[]);
    let body = "x".repeat(32 << 10);
    let length = format!("{}", body.len());
    let mut fill = lead(&cache, &ask, at(0));
    let head = fill.head(
        StatusCode::OK,
        &fields(&[MINUTE, ("content-length", &length)]),
        at(0),
    );
    assert!(matches!(head, Head::Pass), "the length says so");
    answer(lead(&cache, &ask, at(0)), 200, &[MINUTE], &body, at(0));
    assert_eq!(look(&cache, &ask, at(0)), "miss");
    answer(
        lead(&cache, &ask, at(0)),
        200,
        &[MINUTE],
        &body[..31 << 10],
        at(0),
    );
    assert_ne!(look(&cache, &ask, at(0)), "miss");
}

#[test]
fn settings_are_taken_over_and_what_fits_stays() {
    let caches = Caches::new();
    let id: Arc<str> = "rule".into();
    let cache = caches.rule(&id, &SETTINGS);
    let ask = |n: usize| Ask::get(&format!("/{n}"), &[]);
    for n in 0..10 {
        answer(
            lead(&cache, &ask(n), at(0)),
            200,
            &[MINUTE],
            &"x".repeat(10_000),
            at(0),
        );
    }
    assert!(Arc::ptr_eq(&cache, &caches.rule(&id, &SMALL)));
    assert_eq!(caches.readings()[0].entries, 5);
    assert!(bytes(&caches) <= SMALL.max_bytes);
    assert_eq!(look(&cache, &ask(4), at(0)), "miss");
    assert_ne!(look(&cache, &ask(5), at(0)), "miss");
    caches.retain(|rule| rule != "rule");
    assert!(caches.readings().is_empty());
    assert_eq!(look(&caches.rule(&id, &SMALL), &ask(5), at(0)), "miss");
}

/// One thing that happens to a cache.
#[derive(Clone, Debug)]
enum Step {
    Ask {
        ask: usize,
        accept: usize,
        answered: Answered,
        seconds: u64,
    },
    Begin {
        ask: usize,
        length: usize,
    },
    Forget,
    Invalidate {
        ask: usize,
    },
    Resize {
        max: u64,
    },
}

#[derive(Clone, Debug)]
struct Answered {
    max_age: u64,
    age: u64,
    varies: bool,
    length: usize,
    confirms: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let answered = (0u64..40, 0u64..20, any::<bool>(), 0usize..9_000, any::<bool>()).prop_map(
        |(max_age, age, varies, length, confirms)| Answered {
            max_age,
            age,
            varies,
            length,
            confirms,
        },
    );
    prop_oneof![
        12 => (0usize..12, 0usize..24, answered, 0u64..8).prop_map(|(ask, accept, answered, seconds)| Step::Ask {
            ask,
            accept,
            answered,
            seconds,
        }),
        2 => (0usize..12, 0usize..20_000).prop_map(|(ask, length)| Step::Begin { ask, length }),
        1 => Just(Step::Forget),
        1 => (0usize..12).prop_map(|ask| Step::Invalidate { ask }),
        1 => (1u64..80_000).prop_map(|max| Step::Resize { max }),
    ]
}

/// What the service says in an answer of itself: what it was asked, whether it varies, and until when it is fresh.
fn tagged(kept: &Kept) -> (String, bool, u64) {
    let own = kept.headers["x-own"].to_str().unwrap();
    let mut parts = own.split(' ');
    let accept = parts.next().unwrap().into();
    let varies = parts.next().unwrap() == "true";
    (accept, varies, parts.next().unwrap().parse().unwrap())
}

fn one(cache: &Arc<RuleCache>, ask: &Ask, accept: &str, answered: &Answered, now: u64) -> Option<Kept> {
    match cache.look(&ask.asked(), at(now)) {
        Look::Fresh(kept) => return Some(kept),
        Look::Revalidate { .. } => panic!("policy allows none"),
        Look::Validate { .. } | Look::Miss | Look::Bypass => {}
    }
    let Joined::Lead(mut fill) = cache.join(&ask.asked(), at(now)) else {
        // Somebody has begun it, and others wait.
        return None;
    };
    let until = now + answered.max_age.saturating_sub(answered.age);
    let own = format!("{accept} {} {until}", answered.varies);
    let (control, age) = (
        format!("max-age={}", answered.max_age),
        format!("{}", answered.age),
    );
    let mut head = vec![
        ("cache-control", control.as_str()),
        ("age", &age),
        ("x-own", &own),
        ("etag", "\"1\""),
    ];
    if answered.varies {
        head.push(("vary", "accept"));
    }
    if answered.confirms && !fill.conditions().is_empty() {
        let Head::Freshened(kept) = fill.head(StatusCode::NOT_MODIFIED, &fields(&head), at(now)) else {
            panic!("not confirmed");
        };
        return Some(kept);
    }
    let _ = fill.head(StatusCode::OK, &fields(&head), at(now));
    for chunk in vec![7; answered.length].chunks(1000) {
        fill.data(&chunk.to_vec().into());
    }
    fill.finish(at(now));
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn bounds_ages_and_variants_hold(steps in prop::collection::vec(step(), 1..120)) {
        let caches = Caches::new();
        let id: Arc<str> = "rule".into();
        let mut settings = Cache { max_bytes: 40_000, max_object_bytes: 8_000, stale_if_error: Duration::ZERO, ..SMALL };
        let cache = caches.rule(&id, &settings);
        let mut begun = Vec::new();
        let mut now = 0;
        for step in steps {
            match step {
                Step::Ask { ask, accept, answered, seconds } => {
                    now += seconds;
                    let accept = format!("{accept}");
                    let ask = Ask::get(&format!("/{ask}"), &[("accept", &accept)]);
                    if let Some(kept) = one(&cache, &ask, &accept, &answered, now) {
                        let (own, varies, until) = tagged(&kept);
                        prop_assert!(!varies || own == accept, "{own} was given for {accept}");
                        let confirmed = until == now + answered.max_age.saturating_sub(answered.age);
                        prop_assert!(now < until || confirmed, "{until} was given at {now}");
                    }
                }
                Step::Begin { ask, length } => {
                    let ask = Ask::get(&format!("/{ask}"), &[("accept", "begun")]);
                    if let Joined::Lead(mut fill) = cache.join(&ask.asked(), at(now)) {
                        let head = [ALL, ("x-own", "begun true 0"), ("vary", "accept")];
                        let _ = fill.head(StatusCode::OK, &fields(&head), at(now));
                        fill.data(&vec![0; length].into());
                        begun.push(fill);
                    }
                }
                Step::Forget => begun.clear(),
                Step::Invalidate { ask } => {
                    let ask = Ask::get(&format!("/{ask}"), &[]).with_method(Method::POST);
                    cache.invalidate(&ask.asked(), StatusCode::OK);
                    prop_assert_eq!(look(&cache, &ask.with_method(Method::GET), at(now)), "miss");
                }
                Step::Resize { max } => {
                    // What is on its way is held already, and can only be given up by who has it.
                    begun.clear();
                    settings.max_bytes = max;
                    settings.max_object_bytes = max.min(8_000);
                    caches.rule(&id, &settings);
                }
            }
            prop_assert!(bytes(&caches) <= settings.max_bytes);
        }
        begun.clear();
        settings.max_bytes = 0;
        caches.rule(&id, &settings);
        let reading = &caches.readings()[0];
        prop_assert_eq!((reading.bytes, reading.entries), (0, 0), "all that was counted is given back");
    }
}

#[test]
fn threads_at_once_never_share_what_differs_nor_pass_the_bound() {
    let caches = Caches::new();
    let cache = caches.rule(&"rule".into(), &SMALL);
    thread::scope(|scope| {
        for worker in 0..4u64 {
            let (cache, caches) = (&cache, &caches);
            scope.spawn(move || {
                let mut random = worker + 1;
                for round in 0..5_000u64 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let (target, accept) = ((random >> 33) % 40, format!("{}", (random >> 40) % 3));
                    let ask = Ask::get(&format!("/{target}"), &[("accept", &accept)]);
                    let answered = Answered {
                        max_age: (random >> 45) % 10,
                        age: 0,
                        varies: true,
                        length: usize::try_from((random >> 50) % 4_000).unwrap(),
                        confirms: random >> 63 == 1,
                    };
                    if round % 50 == worker {
                        cache.invalidate(&ask.clone().with_method(Method::POST).asked(), StatusCode::OK);
                    }
                    let now = round / 100;
                    if let Some(kept) = one(cache, &ask, &accept, &answered, now) {
                        assert_eq!(tagged(&kept).0, accept);
                    }
                    assert!(bytes(caches) <= SMALL.max_bytes);
                }
            });
        }
    });
    caches.rule(
        &"rule".into(),
        &Cache {
            max_bytes: 0,
            ..SMALL
        },
    );
    assert_eq!(bytes(&caches), 0);
}

/// Words that fields of caching are made of, and what is none.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let words = [
        "max-age=",
        "s-maxage=",
        "60",
        "18446744073709551615",
        "99999999999999999999",
        "-1",
        ",",
        ", ",
        "\"",
        "\\",
        "=",
        " ",
        "public",
        "Private",
        "no-store",
        "NO-CACHE",
        "must-revalidate",
        "stale-if-error=9",
        "accept",
        "*",
        "\u{e9}",
        "Fri, 15 Jan 2027 08:00:00 GMT",
        "Thu, 01 Jan 1970 00:00:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "W/",
        "\"1\"",
    ];
    let word = prop::sample::select(words.map(|word| word.as_bytes().to_vec()).to_vec());
    let odd = prop::collection::vec(0x80u8.., 1..4);
    prop::collection::vec(prop_oneof![8 => word, 1 => odd], 0..6).prop_map(|words| words.concat())
}

fn hostile() -> impl Strategy<Value = http::HeaderMap> {
    let names = prop::sample::select(vec![
        "cache-control",
        "pragma",
        "expires",
        "date",
        "age",
        "vary",
        "etag",
        "last-modified",
        "connection",
        "content-length",
        "if-none-match",
        "if-modified-since",
        "accept",
        "warning",
    ]);
    prop::collection::vec((names, value()), 0..12).prop_map(|fields| {
        let mut map = http::HeaderMap::new();
        for (name, value) in fields {
            map.append(name, http::HeaderValue::from_bytes(&value).unwrap());
        }
        map
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_field_of_a_peer_brings_it_down(
        asked in hostile(),
        answered in hostile(),
        not_modified in hostile(),
        next in hostile(),
        days in 0u64..4_000_000,
    ) {
        let cache = cache(Cache { default_ttl: Duration::from_secs(5), ..SETTINGS });
        let with = |headers: &http::HeaderMap| Ask { headers: headers.clone(), ..Ask::get("/", &[]) };
        let (first, second) = (with(&asked), with(&next));
        if let Joined::Lead(mut fill) = cache.join(&first.asked(), at(0)) {
            let _ = fill.head(StatusCode::OK, &answered, at(0));
            fill.finish(at(0));
        }
        let later = at(days * 86_400);
        let given = [
            cache.stale(&second.asked(), Some(Duration::MAX), later),
            cache.stale(&first.asked(), None, at(0)),
        ];
        for kept in given.into_iter().flatten() {
            let _ = kept.not_modified(&second.asked());
            let shared = answered.get_all("cache-control").iter().all(|line| {
                line.as_bytes() != b"Private" && line.as_bytes() != b"no-store"
            });
            prop_assert!(shared, "it was kept");
        }
        let _ = cache.look(&second.asked(), later);
        if let Joined::Lead(mut fill) = cache.join(&first.asked(), later) {
            let _ = fill.head(StatusCode::NOT_MODIFIED, &not_modified, later);
        }
    }
}
