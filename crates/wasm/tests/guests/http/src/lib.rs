//! An ordinary `wasi:http` application; what it does is in the path.

use std::cell::Cell;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::outgoing_handler::{self, OutgoingRequest};
use wasip2::http::types::{
    Fields, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam, Scheme,
};
use wasip2::io::streams::StreamError;

struct Probe;

thread_local! {
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

impl Guest for Probe {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        CALLS.with(|calls| calls.set(calls.get() + 1));
        let path = request.path_with_query().unwrap_or_default();
        let parts: Vec<&str> = path.trim_start_matches('/').splitn(3, '/').collect();
        match parts[0] {
            "calls" => answer(out, 200, &[], CALLS.with(Cell::get).to_string().as_bytes()),
            "echo" => {
                let authority = request.authority().unwrap_or_default();
                let line = format!(
                    "{:?} {path} {authority} {} ",
                    request.method(),
                    request.headers().entries().len()
                );
                let body = request.consume().unwrap();
                let stream = body.stream().unwrap();
                let mut all = line.into_bytes();
                loop {
                    match stream.blocking_read(4096) {
                        Ok(piece) => all.extend(piece),
                        Err(StreamError::Closed) => break,
                        Err(error) => panic!("{error:?}"),
                    }
                }
                answer(out, 200, &[], &all);
            }
            "get" | "https" | "post" => {
                let scheme = if parts[0] == "https" {
                    Scheme::Https
                } else {
                    Scheme::Http
                };
                let sent = (parts[0] == "post").then_some(200_000);
                let told = fetch(scheme, parts[1], parts[2], sent);
                answer(out, 200, &[], told.as_bytes());
            }
            "many" => {
                let told: Vec<_> = (0..9).map(|_| fetch(Scheme::Http, parts[1], "x", None)).collect();
                answer(out, 200, &[], told.join(" ").as_bytes());
            }
            "length" => answer(out, 200, &[("content-length", "5")], b"12345"),
            "mesh" => answer(out, 200, &[("leeward-reason", "x")], b""),
            "status" => answer(out, parts[1].parse().unwrap(), &[], b""),
            "big" => answer(out, 200, &[], &vec![b'x'; parts[1].parse().unwrap()]),
            "none" => drop(out),
            "trap-late" => {
                answer(out, 200, &[], b"fine");
                panic!("as told");
            }
            "loop" => loop {
                std::hint::black_box(&path);
            },
            "sleep" => wasip2::clocks::monotonic_clock::subscribe_duration(60_000_000_000).block(),
            _ => answer(out, 503, &[("content-type", "text/plain")], b"later"),
        }
    }
}

fn answer(out: ResponseOutparam, status: u16, headers: &[(&str, &str)], body: &[u8]) {
    let fields = Fields::new();
    for (name, value) in headers {
        fields.append(name, value.as_bytes()).unwrap();
    }
    let response = OutgoingResponse::new(fields);
    response.set_status_code(status).unwrap();
    let outgoing = response.body().unwrap();
    ResponseOutparam::set(out, Ok(response));
    write(&outgoing, body);
    OutgoingBody::finish(outgoing, None).unwrap();
}

fn write(outgoing: &OutgoingBody, body: &[u8]) {
    let stream = outgoing.write().unwrap();
    for piece in body.chunks(4096) {
        if stream.blocking_write_and_flush(piece).is_err() {
            return;
        }
    }
}

fn fetch(scheme: Scheme, authority: &str, path: &str, sent: Option<usize>) -> String {
    let request = OutgoingRequest::new(Fields::new());
    request.set_scheme(Some(&scheme)).unwrap();
    request.set_authority(Some(authority)).unwrap();
    request.set_path_with_query(Some(&format!("/{path}"))).unwrap();
    if sent.is_some() {
        request.set_method(&Method::Post).unwrap();
    }
    let body = request.body().unwrap();
    let pending = match outgoing_handler::handle(request, None) {
        Ok(pending) => pending,
        Err(error) => return format!("{error:?}"),
    };
    if let Some(bytes) = sent {
        write(&body, &vec![b'y'; bytes]);
    }
    OutgoingBody::finish(body, None).unwrap();
    pending.subscribe().block();
    match pending.get().unwrap().unwrap() {
        Err(error) => format!("{error:?}"),
        Ok(response) => {
            let status = response.status();
            let body = response.consume().unwrap();
            let stream = body.stream().unwrap();
            let mut all = Vec::new();
            let ended = loop {
                match stream.blocking_read(4096) {
                    Ok(piece) => all.extend(piece),
                    Err(StreamError::Closed) => break "whole",
                    Err(StreamError::LastOperationFailed(_)) => break "broken",
                }
            };
            format!("{status} {} {ended}", String::from_utf8_lossy(&all))
        }
    }
}

wasip2::http::proxy::export!(Probe);
