//! What is done.

use log::{error, info};
use proxy_wasm::hostcalls;
use proxy_wasm::types::{Action, BufferType, MapType, MetricType};
use std::cell::{Cell, RefCell};
use std::time::Duration;

/// What is to be done, and where.
#[derive(Clone, Default)]
pub(crate) struct List(String);

/// Whose callback it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Root,
    Request,
    Response,
}

thread_local! {
    static HOARD: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_log(level: u32, data: usize, size: usize) -> u32;
    fn proxy_get_buffer_bytes(kind: u32, start: usize, max: usize, data: usize, size: usize) -> u32;
    fn proxy_get_header_map_value(map: u32, key: usize, key_size: usize, data: usize, size: usize) -> u32;
    fn proxy_set_header_map_pairs(map: u32, data: *const u8, size: usize) -> u32;
    fn proxy_set_effective_context(context: u32) -> u32;
}

impl List {
    pub(crate) fn of(text: Option<Vec<u8>>) -> Self {
        Self(String::from_utf8_lossy(&text.unwrap_or_default()).into_owned())
    }

    pub(crate) fn has(&self, callback: &str) -> bool {
        self.at(callback).next().is_some()
    }

    fn at(&self, callback: &str) -> impl Iterator<Item = (&str, &str)> {
        self.0.split(';').filter_map(move |entry| {
            let (at, what) = entry.trim().split_once(':')?;
            (at == callback).then(|| what.split_once(' ').unwrap_or((what, "")))
        })
    }
}

/// Does what the list has for a callback, and says whether the stream goes on (of a root context: whether it succeeded).
///
/// - `panic`, `loop`, `memory`, `stack`, `grow` (a MiB that stays), `pause` (for ever, or until a call is answered)
/// - `flood`: logs, shared data, queues, metrics and properties without end; `call SERVICE`, `call-flood SERVICE`, `grpc
///   SERVICE`
/// - `split`, `bytes`, `length`, `hop`, `huge-header`, `many-headers`: fields that must be refused, or are too many
/// - `reply`, `reply-twice`, `reply-status` (99), `reply-split`, `reply-huge`
/// - `pointers` and `pairs`: memory that isn't there, and maps that aren't maps; `context`: one that isn't there; `offsets`:
///   of a body; `foreign`: a function that nobody has
/// - `count`: how often this instance did it, in the field `x-count`
pub(crate) fn act(list: &List, callback: &str, kind: Kind) -> Action {
    let mut action = Action::Continue;
    for (word, about) in list.at(callback) {
        match word {
            "panic" => panic!("as told"),
            "loop" => loop {
                std::hint::black_box(word);
            },
            "memory" => loop {
                grow();
            },
            "stack" => {
                std::hint::black_box(deeper(1));
            }
            "grow" => grow(),
            "pause" => action = Action::Pause,
            "flood" => flood(),
            "call" => {
                if call(about) {
                    action = Action::Pause;
                }
            }
            "call-flood" => {
                let made = (0..10_000).take_while(|_| call(about)).count();
                info!("{made} calls were made");
            }
            "grpc" => {
                let sent = hostcalls::dispatch_grpc_call(
                    about,
                    "a.B",
                    "C",
                    Vec::new(),
                    Some(b""),
                    Duration::from_secs(1),
                );
                if sent.is_ok() {
                    action = Action::Pause;
                }
            }
            "reply" => action = reply(200, vec![("x-by", b"pw-misbehave")], b"reply"),
            "reply-twice" => {
                reply(200, Vec::new(), b"first");
                action = reply(200, Vec::new(), b"second");
            }
            "reply-status" => action = reply(99, Vec::new(), b""),
            "reply-split" => action = reply(200, vec![("x-a", b"b\r\nset-cookie: c=d")], b""),
            "reply-huge" => action = reply(200, Vec::new(), &vec![b'x'; 2 << 20]),
            "pointers" => pointers(),
            "pairs" => pairs(kind),
            "context" => context(),
            "offsets" => offsets(kind),
            "foreign" => foreign(),
            "count" => {
                let calls = CALLS.with(|calls| {
                    calls.set(calls.get() + 1);
                    calls.get()
                });
                let _ = hostcalls::set_map_value(map(kind), "x-count", Some(&calls.to_string()));
            }
            word => edit(word, kind),
        }
    }
    action
}

fn map(kind: Kind) -> MapType {
    match kind {
        Kind::Root | Kind::Request => MapType::HttpRequestHeaders,
        Kind::Response => MapType::HttpResponseHeaders,
    }
}

/// Edits of a head that a host must refuse, or at some point. What it said is told in `x-edit`.
fn edit(word: &str, kind: Kind) {
    let set = |name: &str, value: &[u8]| raw_set(map(kind), name, value);
    let status = match word {
        "split" => set("x-a", b"b\r\nset-cookie: c=d"),
        "bytes" => set("x-a", b"\0\x7f"),
        "name" => set("x a\r\n", b"1"),
        "length" => set("content-length", b"5"),
        "hop" => set("transfer-encoding", b"chunked"),
        "huge-header" => set("x-a", &vec![b'a'; 70 << 10]),
        "many-headers" => (0..2000)
            .map(|n| set(&format!("x-{n}"), &[b'a'; 64]))
            .find(|s| *s != 0)
            .unwrap_or(0),
        _ => return,
    };
    set("x-edit", status.to_string().as_bytes());
}

/// The SDK's own panics on what a host refuses, and hides what it said.
fn raw_set(map: MapType, name: &str, value: &[u8]) -> u32 {
    #[link(wasm_import_module = "env")]
    unsafe extern "C" {
        fn proxy_replace_header_map_value(
            map: u32,
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
        ) -> u32;
    }
    // SAFETY: both are there for as long as the call is.
    unsafe {
        proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len())
    }
}

fn reply(status: u32, headers: Vec<(&str, &[u8])>, body: &[u8]) -> Action {
    #[link(wasm_import_module = "env")]
    unsafe extern "C" {
        fn proxy_send_local_response(
            status: u32,
            details: *const u8,
            details_size: usize,
            body: *const u8,
            body_size: usize,
            headers: *const u8,
            headers_size: usize,
            grpc_status: i32,
        ) -> u32;
    }
    let pairs = serialized(&headers);
    // SAFETY: all of them are there for as long as the call is.
    let said = unsafe {
        proxy_send_local_response(
            status,
            std::ptr::null(),
            0,
            body.as_ptr(),
            body.len(),
            pairs.as_ptr(),
            pairs.len(),
            -1,
        )
    };
    info!("the reply {status} came to {said}");
    // A reply that was refused doesn't end the request.
    if said == 0 {
        Action::Pause
    } else {
        Action::Continue
    }
}

/// A map as the ABI has it.
fn serialized(pairs: &[(&str, &[u8])]) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let mut bytes = number(pairs.len()).to_vec();
    for (name, value) in pairs {
        bytes.extend(number(name.len()));
        bytes.extend(number(value.len()));
    }
    for (name, value) in pairs {
        for part in [name.as_bytes(), value] {
            bytes.extend(part);
            bytes.push(0);
        }
    }
    bytes
}

fn call(service: &str) -> bool {
    let headers = vec![(":method", "GET"), (":path", "/"), (":authority", service)];
    let wait = Duration::from_secs(1);
    hostcalls::dispatch_http_call(service, headers, None, Vec::new(), wait).is_ok()
}

/// Asks the host more than any plugin should, of all that it offers.
fn flood() {
    for n in 0..10_000 {
        info!("{}", "line ".repeat(1000));
        // What it refuses is refused.
        let _ = hostcalls::set_shared_data(&format!("key_{n}"), Some(&[0; 1000]), None);
        let _ = hostcalls::define_metric(MetricType::Counter, &format!("name_{n}"));
        let _ = hostcalls::set_property(vec!["flood", &n.to_string()], Some(&[0; 1000]));
        if let Ok(queue) = hostcalls::register_shared_queue(&format!("queue_{}", n % 100)) {
            let _ = hostcalls::enqueue_shared_queue(queue, Some(&[0; 1000]));
        }
    }
}

/// Addresses that aren't in this memory, or run out of it.
fn pointers() {
    const NOWHERE: usize = 0xffff_fff0;
    // SAFETY: none of the addresses is used here, and a host must look before it uses one.
    let said = unsafe {
        [
            ("log", proxy_log(2, NOWHERE, 64)),
            ("log of all", proxy_log(2, 8, usize::MAX)),
            ("buffer", proxy_get_buffer_bytes(7, 0, 10, NOWHERE, NOWHERE)),
            ("key", proxy_get_header_map_value(0, NOWHERE, 64, 8, 16)),
            ("pairs", proxy_set_header_map_pairs(0, NOWHERE as *const u8, 64)),
        ]
    };
    for (what, status) in said {
        if status == 0 {
            error!("BUG: {what} at an address that isn't there was taken");
        }
    }
}

/// Maps that say they have more than they have.
fn pairs(kind: Kind) {
    let mut long_name = serialized(&[("x-a", b"1")]);
    if let Some(size) = long_name.get_mut(4..8) {
        size.copy_from_slice(&u32::MAX.to_le_bytes());
    }
    for bytes in [
        vec![0xff; 4],
        vec![1, 0, 0],
        long_name,
        serialized(&[("x-a", b"b\r\nc: d")]),
    ] {
        // SAFETY: it is there for as long as the call is.
        let said = unsafe { proxy_set_header_map_pairs(map(kind) as u32, bytes.as_ptr(), bytes.len()) };
        if said == 0 {
            error!("BUG: {bytes:?} was taken for a map");
        }
    }
}

fn context() {
    // SAFETY: it is a number.
    if unsafe { proxy_set_effective_context(0x7fff_ffff) } == 0 {
        error!("BUG: there is a context that there isn't");
    }
}

/// Parts of a body that aren't in it: less is given, or nothing is, but never what isn't the body.
fn offsets(kind: Kind) {
    let body = match kind {
        Kind::Root => BufferType::PluginConfiguration,
        Kind::Request => BufferType::HttpRequestBody,
        Kind::Response => BufferType::HttpResponseBody,
    };
    // SAFETY: where the address and the size go is there for as long as the call is.
    for (start, max) in [(usize::MAX, usize::MAX), (1 << 30, 1), (1, usize::MAX)] {
        let (mut data, mut size) = (0_usize, 0_usize);
        let said = unsafe {
            proxy_get_buffer_bytes(
                body as u32,
                start,
                max,
                std::ptr::from_mut(&mut data) as usize,
                std::ptr::from_mut(&mut size) as usize,
            )
        };
        if said == 0 && start > 1 && size > 0 {
            error!("BUG: {size} bytes of a body at {start}");
        }
    }
}

fn foreign() {
    if let Ok(given) = hostcalls::call_foreign_function("nobody_has_this", Some(b"x")) {
        error!("BUG: a function that nobody has gave {given:?}");
    }
}

fn grow() {
    HOARD.with(|hoard| hoard.borrow_mut().push(vec![1; 1 << 20]));
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn deeper(n: u64) -> u64 {
    let frame = std::hint::black_box([n; 64]);
    let below = deeper(frame[0] + 1);
    std::hint::black_box(frame);
    below
}
