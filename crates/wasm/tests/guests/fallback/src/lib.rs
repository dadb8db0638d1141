//! Does what the rung's configuration says: a word, and what it is about.

use leeward::plugin::{host, mesh, store, types::Response};
use std::cell::Cell;

wit_bindgen::generate!({ path: "../../../../../plugins/wit", world: "fallback", generate_all });

struct Probe;

thread_local! {
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

fn text(status: u16, body: impl Into<Vec<u8>>) -> Action {
    Action::Respond(Response {
        status,
        headers: Vec::new(),
        body: body.into(),
    })
}

fn header(name: &str, value: &[u8]) -> Action {
    let header = leeward::plugin::types::Header {
        name: name.to_owned(),
        value: value.to_vec(),
    };
    Action::Respond(Response {
        status: 200,
        headers: vec![header],
        body: Vec::new(),
    })
}

impl Guest for Probe {
    fn on_failure(request: &FailedRequest) -> Action {
        let calls = CALLS.with(|calls| {
            calls.set(calls.get() + 1);
            calls.get()
        });
        let config = request.config();
        let (word, rest) = config.split_once(' ').unwrap_or((&config, ""));
        let args: Vec<&str> = rest.split(' ').collect();
        match word {
            "calls" => text(200, calls.to_string()),
            "echo" => text(200, echo(request)),
            "stale" => Action::Stale,
            "reroute" => Action::Reroute(rest.to_owned()),
            "enqueue" => Action::Enqueue(leeward::plugin::failure::Receipt {
                queue: rest.to_owned(),
                response: Response {
                    status: 202,
                    headers: Vec::new(),
                    body: b"taken in".to_vec(),
                },
            }),
            "flag" => text(200, format!("{:?}", host::flag(rest))),
            "get" => text(
                200,
                format!(
                    "{:?}",
                    store::get(rest).map(|v| String::from_utf8_lossy(&v).into_owned())
                ),
            ),
            "set" => {
                let ttl = args.get(2).and_then(|ttl| ttl.parse().ok());
                text(200, format!("{:?}", store::set(args[0], args[1].as_bytes(), ttl)))
            }
            "set-large" => text(
                200,
                format!(
                    "{:?}",
                    store::set("large", &vec![b'x'; rest.parse().unwrap()], None)
                ),
            ),
            "increment" => text(
                200,
                format!("{:?}", store::increment(args[0], args[1].parse().unwrap(), None)),
            ),
            "delete" => {
                store::delete(rest);
                Action::Decline
            }
            "keys" => text(200, store::keys(rest, 10).join(",")),
            "send" => text(200, send(&args)),
            "send-many" => text(200, (0..9).map(|_| send(&args)).collect::<Vec<_>>().join(" ")),
            "loop" => loop {
                std::hint::black_box(calls);
            },
            "send-loop" => {
                send(&args);
                loop {
                    std::hint::black_box(calls);
                }
            }
            "memory" => {
                let mut hoard = Vec::new();
                loop {
                    hoard.push(std::hint::black_box(vec![1u8; 1 << 20]));
                }
            }
            "panic" => panic!("as told"),
            "stack" => deeper(u64::from(calls)),
            "flood" => {
                for n in 0..10_000 {
                    host::log(host::Level::Info, &"line ".repeat(1000));
                    host::count(&format!("name_{n}"), 1);
                    store::set(&format!("key_{n}"), &[0; 1000], None).unwrap();
                }
                Action::Decline
            }
            "bad-status" => text(99, ""),
            "header" => header(args[0], args[1].as_bytes()),
            "split" => header("x-a", b"b\r\nset-cookie: c=d"),
            "huge-header" => header("x-a", &vec![b'a'; 70 << 10]),
            "huge" => text(200, vec![b'x'; 2 << 20]),
            "utf8" => {
                // SAFETY: none; the host must find out.
                let bad = unsafe { String::from_utf8_unchecked(vec![b'a', 0xff]) };
                host::log(host::Level::Info, &bad);
                Action::Decline
            }
            "sleep" => {
                let millis: u64 = rest.parse().unwrap();
                wasip2::clocks::monotonic_clock::subscribe_duration(millis * 1_000_000).block();
                text(200, "slept")
            }
            "clock" => text(200, wasip2::clocks::wall_clock::now().seconds.to_string()),
            "random" => text(200, wasip2::random::random::get_random_u64().to_string()),
            "print" => {
                let out = wasip2::cli::stdout::get_stdout();
                out.blocking_write_and_flush(rest.as_bytes()).unwrap();
                Action::Decline
            }
            "node" => text(200, node()),
            "hoard" => {
                let number: u64 = rest.parse().unwrap();
                let hoard: Vec<_> = (0..number)
                    .map(wasip2::clocks::monotonic_clock::subscribe_duration)
                    .collect();
                std::hint::black_box(hoard);
                Action::Decline
            }
            "exit" => {
                wasip2::cli::exit::exit(Ok(()));
                Action::Decline
            }
            _ => Action::Decline,
        }
    }
}

/// What there is to be had of the node.
fn node() -> String {
    use wasip2::sockets::{
        instance_network, ip_name_lookup, network::IpAddressFamily, tcp_create_socket, udp_create_socket,
    };
    format!(
        "env {} args {} dirs {} stdin {:?} tcp {:?} udp {:?} name {:?}",
        wasip2::cli::environment::get_environment().len(),
        wasip2::cli::environment::get_arguments().len(),
        wasip2::filesystem::preopens::get_directories().len(),
        wasip2::cli::stdin::get_stdin().blocking_read(1).is_ok(),
        tcp_create_socket::create_tcp_socket(IpAddressFamily::Ipv4).is_ok(),
        udp_create_socket::create_udp_socket(IpAddressFamily::Ipv4).is_ok(),
        {
            let network = instance_network::instance_network();
            match ip_name_lookup::resolve_addresses(&network, "localhost") {
                Ok(found) => found.resolve_next_address().is_ok(),
                Err(_) => false,
            }
        },
    )
}

fn send(args: &[&str]) -> String {
    let headers = args.get(3).map(|header| {
        let (name, value) = header.split_once('=').unwrap();
        leeward::plugin::types::Header {
            name: name.to_owned(),
            value: value.as_bytes().to_vec(),
        }
    });
    let answer = mesh::send(&mesh::Call {
        service: args[0].to_owned(),
        method: "GET".to_owned(),
        path: args[1].to_owned(),
        headers: headers.into_iter().collect(),
        body: Vec::new(),
        timeout_ms: args.get(2).and_then(|timeout| timeout.parse().ok()),
    });
    match answer {
        Ok(answer) => format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body)),
        Err(error) => format!("{error:?}"),
    }
}

fn echo(request: &FailedRequest) -> String {
    let many: Vec<_> = request
        .header("x-many")
        .iter()
        .map(|v| String::from_utf8_lossy(v).into_owned())
        .collect();
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
    let kept = request
        .kept()
        .map(|kept| format!("{} {} of {}", kept.response.status, kept.age_ms, kept.fresh_ms));
    format!(
        "{} {} {:?} {}\ncause {:?}\n{}\nservice {} route {} zone {} peer {:?}\nx-many {many:?}\nheaders {}\nbody {:?}\nkept {kept:?}\nleft {}",
        request.method(),
        request.path(),
        request.query(),
        request.authority(),
        request.cause(),
        attempts.join("\n"),
        request.service(),
        request.route(),
        request.zone(),
        request.peer(),
        request.headers().len(),
        request
            .body()
            .map(|body| String::from_utf8_lossy(&body).into_owned()),
        host::time_left_us() > 0,
    )
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn deeper(n: u64) -> Action {
    let frame = std::hint::black_box([n; 64]);
    let action = deeper(frame[0] + 1);
    std::hint::black_box(frame);
    action
}

export!(Probe);
