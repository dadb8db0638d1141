//! Does what a plugin must not, as the rung's configuration says: for the tests of the host.

use leeward_plugin::{Action, FailedRequest, Fallback, Header, Level, Response, count, log};
use std::cell::Cell;
use std::mem::ManuallyDrop;

struct Misbehave;

/// What Rust's standard library imports on wasm32-wasip2, and no plugin gets.
mod wasi {
    wit_bindgen::generate!({
        inline: "
            package leeward:misbehave;
            world wasi {
                import wasi:random/random@0.2.6;
            }
            package wasi:random@0.2.6 {
                interface random {
                    get-random-bytes: func(len: u64) -> list<u8>;
                    get-random-u64: func() -> u64;
                }
            }
        ",
        generate_all,
    });
}

thread_local! {
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

impl Fallback for Misbehave {
    fn on_failure(request: &FailedRequest) -> Action {
        let calls = CALLS.with(|calls| {
            calls.set(calls.get() + 1);
            calls.get()
        });
        let config = request.config();
        match config.as_str() {
            "loop" => loop {
                std::hint::black_box(calls);
            },
            "memory" => {
                let mut hoard = Vec::new();
                loop {
                    hoard.push(std::hint::black_box(vec![1u8; 1 << 20]));
                }
            }
            "panic" => panic!("as told"),
            "stack" => deeper(u64::from(calls)),
            "bad-status" => Action::Respond(Response::new(99)),
            "hop-by-hop" => Action::Respond(Response::new(200).header("transfer-encoding", "chunked")),
            "split" => Action::Respond(Response::new(200).header("x-a", "b\r\nset-cookie: c=d")),
            "ours" => Action::Respond(Response::new(200).header("leeward-reason", "ok")),
            "huge" => Action::Respond(Response::new(200).body(vec![b'x'; 2 << 20])),
            "alias" => Action::Respond(alias()),
            "random" => Action::Respond(
                Response::new(200).body(wasi::wasi::random::random::get_random_u64().to_string()),
            ),
            "log" => {
                log(Level::Warn, "first\nERROR forged");
                Action::Decline
            }
            "name" => {
                count(&format!("call_{calls}"), 1);
                Action::Decline
            }
            "flood" => {
                for i in 0..10_000 {
                    log(Level::Info, &"line ".repeat(1000));
                    count(&format!("name_{i}"), 1);
                }
                Action::Decline
            }
            "reroute" => Action::Reroute("somewhere".to_owned()),
            "calls" => Action::Respond(Response::new(200).body(calls.to_string())),
            "echo" => Action::Respond(Response::new(200).body(echo(request))),
            _ => Action::Decline,
        }
    }
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn deeper(n: u64) -> Action {
    let frame = std::hint::black_box([n; 64]);
    let action = deeper(frame[0] + 1);
    std::hint::black_box(frame);
    action
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

/// Everything that a plugin can see, as text.
fn echo(request: &FailedRequest) -> String {
    let attempts: Vec<_> = request
        .attempts()
        .iter()
        .map(|a| {
            format!(
                "{} {} {:?} {:?} {}us",
                a.endpoint, a.zone, a.status, a.cause, a.duration_us
            )
        })
        .collect();
    format!(
        "{} {} {:?} {}\ncause {:?}\nattempts {attempts:?}\nservice {} route {} zone {}\nx-many {:?}\nheaders {}\nbody {:?}\nleft {}",
        request.method(),
        request.path(),
        request.query(),
        request.authority(),
        request.cause(),
        request.service(),
        request.route(),
        request.zone(),
        request
            .header("x-many")
            .iter()
            .map(|v| String::from_utf8_lossy(v).into_owned())
            .collect::<Vec<_>>(),
        request.headers().len(),
        request.body().map(|b| String::from_utf8_lossy(&b).into_owned()),
        request.time_left_us() <= 10_000_000,
    )
}

leeward_plugin::export!(Misbehave);
