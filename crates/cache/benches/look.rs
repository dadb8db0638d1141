//! What a look costs, and what a kept answer takes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a measurement, read by people"
)]

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use leeward_cache::{Asked, Caches, Joined, Look, RuleCache};
use leeward_policy::model::Cache;
use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// Few enough that most rounds are over before the thread is interrupted.
const LOOKS: u32 = 1_000;
const ROUNDS: usize = 1_001;
const ENTRIES: u32 = 50_000;
const BODY: usize = 1024;

fn main() {
    let settings = Cache {
        max_bytes: 1 << 30,
        ..Cache::DEFAULT
    };
    let caches = Caches::new();
    let cache = caches.rule(&"rule".into(), &settings);
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let asked = fields(&[
        ("host", "shop"),
        ("accept", "application/json"),
        ("accept-encoding", "gzip"),
        ("user-agent", "shop/1.0"),
        (
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
        ("via", "1.1 leeward-a"),
    ]);
    let before = resident();
    for n in 0..ENTRIES {
        keep(&cache, &format!("/items/{n}?full=true"), &asked, now);
    }
    let reading = caches.readings().pop().unwrap();
    println!(
        "kept: {} answers of {BODY} bytes; counted {} bytes each, resident {} each",
        reading.entries,
        reading.bytes / reading.entries,
        (resident() - before) / reading.entries
    );
    report("look, fresh", &cache, "/items/77?full=true", &asked, now);
    report("look, miss", &cache, "/none/77?full=true", &asked, now);
    let mut target = 0u32;
    let filled = measure(LOOKS / 10, || {
        target += 1;
        keep(&cache, &format!("/new/{target}"), &asked, now);
    });
    println!("join, head, data, finish: {filled}");
    for threads in [1, 2, 4] {
        let began = Instant::now();
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| (0..200).for_each(|_| looks(&cache, "/items/30000?full=true", &asked, now)));
            }
        });
        let each = began.elapsed() / (200 * LOOKS * threads);
        println!("look, fresh, {threads} threads on one target: {each:?} of wall time each");
    }
}

fn fields(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    fields
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect()
}

fn keep(cache: &Arc<RuleCache>, target: &str, headers: &HeaderMap, now: SystemTime) {
    let asked = Asked {
        method: &Method::GET,
        authority: "shop.example:8080",
        uri: &target.parse().unwrap(),
        headers,
    };
    let Joined::Lead(mut fill) = cache.join(&asked, now) else {
        return;
    };
    let head = fields(&[
        ("content-type", "application/json"),
        ("cache-control", "max-age=60"),
        ("vary", "accept-encoding"),
        ("date", "Fri, 15 Jan 2027 08:00:00 GMT"),
        ("etag", "\"0af7651916cd43dd\""),
        ("server", "shop/1.0"),
        ("x-request-id", "0af7651916cd43dd8448eb211c80319c"),
    ]);
    let _ = fill.head(StatusCode::OK, &head, now);
    fill.data(&Bytes::from_static(&[7; BODY]));
    fill.finish(now);
}

fn looks(cache: &Arc<RuleCache>, target: &str, headers: &HeaderMap, now: SystemTime) {
    let uri: Uri = target.parse().unwrap();
    let asked = Asked {
        method: &Method::GET,
        authority: "shop.example:8080",
        uri: &uri,
        headers,
    };
    for _ in 0..LOOKS {
        match black_box(cache.look(&asked, now)) {
            Look::Fresh(_) | Look::Miss => {}
            other => panic!("{other:?}"),
        }
    }
}

fn report(what: &str, cache: &Arc<RuleCache>, target: &str, headers: &HeaderMap, now: SystemTime) {
    println!(
        "{what}: {}",
        measure(1, || looks(cache, target, headers, now)).per(LOOKS)
    );
}

/// The least and the median of many rounds.
struct Taken(Duration, Duration);

impl Taken {
    fn per(self, times: u32) -> Self {
        Self(self.0 / times, self.1 / times)
    }
}

impl std::fmt::Display for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "least {:?}, median {:?}", self.0, self.1)
    }
}

fn measure(times: u32, mut act: impl FnMut()) -> Taken {
    let mut rounds: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            (0..times).for_each(|_| act());
            began.elapsed() / times
        })
        .collect();
    rounds.sort_unstable();
    Taken(rounds[0], rounds[ROUNDS / 2])
}

/// This process's resident memory, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}
