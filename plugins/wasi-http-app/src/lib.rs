//! An ordinary `wasi:http/proxy` component: it knows nothing of Leeward and runs under any host of wasi:http, such as
//! `wasmtime serve`. As the answer of a rung it shows a page that says what is wrong, and on `/proxy/SERVICE/PATH` it hands
//! out what another service has.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: status-page}
//! spec:
//!   kind: WasiHttp
//!   source: {file: /var/lib/leeward/wasi-http-app.wasm}
//!   access: {services: [catalog]}
//!   onFault: NextRung
//! ---
//! kind: FallbackPolicy
//! metadata: {name: site}
//! spec:
//!   rungs:
//!     - plugin: {plugin: status-page}
//! ```

mod page;

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::outgoing_handler::{self, OutgoingRequest, RequestOptions};
use wasip2::http::types::{
    Fields, IncomingRequest, IncomingResponse, Method, OutgoingBody, OutgoingResponse, ResponseOutparam,
    Scheme,
};
use wasip2::io::streams::StreamError;

struct App;

/// How long another service is waited for, in nanoseconds.
const PATIENCE: u64 = 2_000_000_000;
/// As much as an output stream takes at once.
const PIECE: u64 = 4096;

impl Guest for App {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let path = request.path_with_query().unwrap_or_else(|| "/".to_owned());
        match page::target(&path) {
            Some((service, path)) => match fetch(service, path) {
                Ok(answer) => pass_on(&answer, out),
                Err(error) => show(out, 502, &page::html("Not there either", &error)),
            },
            None => {
                let said = format!("{} can't be shown at the moment.", page::without_query(&path));
                show(out, 503, &page::html("We'll be right back", &said));
            }
        }
    }
}

/// Answers with a page.
fn show(out: ResponseOutparam, status: u16, html: &str) {
    let headers = Fields::new();
    for (name, value) in [
        ("content-type", "text/html; charset=utf-8"),
        ("cache-control", "no-store"),
    ] {
        // Neither is one that a host forbids.
        let _ = headers.append(name, value.as_bytes());
    }
    let response = OutgoingResponse::new(headers);
    let _ = response.set_status_code(status);
    send(out, response, |write| write(html.as_bytes()));
}

/// Asks a service for a path.
fn fetch(service: &str, path: &str) -> Result<IncomingResponse, String> {
    let request = OutgoingRequest::new(Fields::new());
    let made = request
        .set_method(&Method::Get)
        .and_then(|()| request.set_scheme(Some(&Scheme::Http)))
        .and_then(|()| request.set_authority(Some(service)))
        .and_then(|()| request.set_path_with_query(Some(path)));
    made.map_err(|()| format!("{service}{path} can't be asked for"))?;
    let options = RequestOptions::new();
    // A host that has no such bound of its own says so; it has another.
    let _ = options.set_first_byte_timeout(Some(PATIENCE));
    let coming = outgoing_handler::handle(request, Some(options)).map_err(|e| format!("{service}: {e:?}"))?;
    coming.subscribe().block();
    match coming.get() {
        Some(Ok(Ok(answer))) => Ok(answer),
        Some(Ok(Err(error))) => Err(format!("{service}: {error:?}")),
        Some(Err(())) | None => Err(format!("{service}: no answer")),
    }
}

/// Answers with what a service answered, piece by piece.
fn pass_on(answer: &IncomingResponse, out: ResponseOutparam) {
    let headers = Fields::new();
    for value in answer.headers().get("content-type") {
        let _ = headers.append("content-type", &value);
    }
    let response = OutgoingResponse::new(headers);
    let _ = response.set_status_code(answer.status());
    send(out, response, |write| {
        let Ok(body) = answer.consume() else { return false };
        let Ok(pieces) = body.stream() else { return false };
        loop {
            match pieces.blocking_read(PIECE) {
                Ok(piece) if !write(&piece) => return false,
                Ok(_) => {}
                Err(StreamError::Closed) => return true,
                Err(StreamError::LastOperationFailed(_)) => return false,
            }
        }
    });
}

/// Sends the head, and a body as `fill` writes it; if that fails, the body has no proper end, so that nobody takes the part
/// for the whole.
fn send(
    out: ResponseOutparam,
    response: OutgoingResponse,
    fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> bool) -> bool,
) {
    let Ok(body) = response.body() else { return };
    ResponseOutparam::set(out, Ok(response));
    let Ok(stream) = body.write() else { return };
    let whole = fill(&mut |bytes| {
        bytes
            .chunks(4096)
            .all(|piece| stream.blocking_write_and_flush(piece).is_ok())
    });
    drop(stream);
    if whole {
        // The client may be gone, and then nobody wants to know.
        let _ = OutgoingBody::finish(body, None);
    }
}

wasip2::http::proxy::export!(App);
