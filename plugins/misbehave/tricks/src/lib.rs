//! What a plugin must not do, and how: for the tests of the host.

use leeward_plugin::mesh::Call;
use leeward_plugin::{Header, Level, Response, count, log, store};
use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;

thread_local! {
    static CALLS: Cell<u32> = const { Cell::new(0) };
    static HOARD: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Counts this call; how many this instance has had with it.
pub fn calls() -> u32 {
    CALLS.with(|calls| {
        calls.set(calls.get() + 1);
        calls.get()
    })
}

/// Does what has no answer, if this is what the word is for: `loop`, `memory`, `panic`, `stack`, `log`, `flood`, `utf8`,
/// `grow` (a MiB that stays), `sleep` (as many milliseconds), `exit`.
pub fn act(word: &str, about: &str) -> bool {
    match word {
        "loop" => loop {
            std::hint::black_box(word);
        },
        "memory" => loop {
            grow();
        },
        "panic" => panic!("as told"),
        "stack" => {
            std::hint::black_box(deeper(1));
        }
        "log" => log(Level::Warn, "first\nERROR forged"),
        "flood" => flood(),
        "utf8" => {
            // SAFETY: it isn't sound: the host is to find out.
            let bad = unsafe { String::from_utf8_unchecked(vec![b'a', 0xff]) };
            log(Level::Warn, &bad);
        }
        "grow" => grow(),
        "sleep" => {
            let millis: u64 = about.parse().unwrap_or(1000);
            wasip2::clocks::monotonic_clock::subscribe_duration(millis * 1_000_000).block();
        }
        "exit" => wasip2::cli::exit::exit(Err(())),
        _ => return false,
    }
    true
}

/// The answer that the word is for, none of them one that a host may send, but `large`, `hoarded` and `call`.
pub fn answer(word: &str, about: &str) -> Option<Response> {
    let response = Response::new(200);
    Some(match word {
        "bad-status" => Response::new(99),
        "informational" => Response::new(101),
        "hop-by-hop" => response.header("transfer-encoding", "chunked"),
        "length" => response.header("content-length", "5").body("0123456789"),
        "split" => response.header("x-a", "b\r\nset-cookie: c=d"),
        "split-name" => response.header("x-a: b\r\nset-cookie", "c=d"),
        "bytes" => response.header("x-a", b"\0\x01\x7f"),
        "pseudo" => response.header(":status", "204"),
        "ours" => response.header("leeward-reason", "ok"),
        "huge-header" => response.header("x-a", vec![b'a'; 70 << 10]),
        "many-headers" => (0..2000).fold(response, |r, n| r.header(&format!("x-{n}"), [b'a'; 64])),
        "alias" => alias(),
        "huge" => response.body(vec![b'x'; 2 << 20]),
        "large" => response.body(vec![b'x'; 1 << 20]),
        "hoarded" => response.body(HOARD.with(|hoard| hoard.borrow().len()).to_string()),
        "call" => response.body(call(about)),
        "calls-many" => response.body((0..100).map(|_| call(about) + "\n").collect::<String>()),
        _ => return None,
    })
}

/// Calls `SERVICE/PATH`, which may lead back here, and tells what came of it.
fn call(target: &str) -> String {
    let at = target.find('/').unwrap_or(target.len());
    let (service, path) = target.split_at(at);
    match Call::get(service, if path.is_empty() { "/" } else { path }).send() {
        Ok(answer) => format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body)),
        Err(error) => error.name().to_owned(),
    }
}

fn grow() {
    HOARD.with(|hoard| hoard.borrow_mut().push(vec![1; 1 << 20]));
}

/// Asks the host more than any plugin should, of all that it offers.
fn flood() {
    for n in 0..10_000 {
        log(Level::Info, &"line ".repeat(1000));
        count(&format!("name_{n}"), 1);
        // What it refuses is refused.
        let _ = store::set(&format!("key_{n}"), [0; 1000], None);
    }
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn deeper(n: u64) -> u64 {
    let frame = std::hint::black_box([n; 64]);
    let below = deeper(frame[0] + 1);
    std::hint::black_box(frame);
    below
}

/// An answer of a hundred headers, all of whose values are the same MiB.
fn alias() -> Response {
    let mut shared = ManuallyDrop::new(vec![b'x'; 1 << 20]);
    let mut response = Response::new(200);
    for n in 0..100 {
        // SAFETY: it isn't: whoever frees one frees all. The host ends this instance before anybody does.
        let value = unsafe { Vec::from_raw_parts(shared.as_mut_ptr(), shared.len(), shared.len()) };
        response.headers.push(Header {
            name: format!("x-{n}"),
            value,
        });
    }
    response
}
