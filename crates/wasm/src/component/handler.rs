//! `wasi:http`: a failed request as one that comes in, and what is answered.

use super::convert::{self, MAX_BODY, MAX_HEADERS};
use super::state::State;
use crate::call::{Action, FailedCall, Reply, RequestHead};
use bytes::Bytes;
use futures_util::future::{Either, select};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use std::pin::pin;
use tokio::sync::oneshot;
use wasmtime::Store;
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::Proxy;
use wasmtime_wasi_http::p2::bindings::http::types;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;

/// What comes of a request that is handed to the guest.
type Answered = oneshot::Receiver<Result<Response<HyperOutgoingBody>, types::ErrorCode>>;

/// Has a guest answer a failed call. It counts once the guest has ended well.
///
/// # Errors
///
/// A trap; within, what is wrong with the answer.
pub(crate) async fn handle(
    store: &mut Store<State>,
    guest: &Proxy,
    call: FailedCall,
) -> wasmtime::Result<Result<Action, String>> {
    let request = match incoming(call) {
        Ok(request) => request,
        Err(error) => return Ok(Err(format!("the request can't be told in wasi:http: {error}"))),
    };
    let (sender, answered) = oneshot::channel();
    let request = store
        .data_mut()
        .http()
        .new_incoming_request(types::Scheme::Http, request)?;
    let out = store.data_mut().http().new_response_outparam(sender)?;
    let handled = pin!(
        guest
            .wasi_http_incoming_handler()
            .call_handle(store, request, out)
    );
    // The guest waits until what it writes is taken.
    let answer = pin!(collect(answered));
    let answer = match select(handled, answer).await {
        Either::Left((handled, answer)) => {
            handled?;
            answer.await
        }
        Either::Right((Err(reason), _)) => Err(reason),
        Either::Right((Ok(reply), handled)) => {
            handled.await?;
            Ok(reply)
        }
    };
    Ok(answer.map(Action::Respond))
}

/// A failed request, as one that comes in.
fn incoming(call: FailedCall) -> Result<Request<Full<Bytes>>, http::Error> {
    let FailedCall {
        head, facts, body, ..
    } = call;
    let RequestHead {
        method,
        scheme: _,
        authority,
        path,
        headers,
    } = head;
    let authority = Authority::try_from(&*authority).or_else(|_| Authority::try_from(&*facts.service))?;
    let uri = Uri::builder()
        .scheme(Scheme::HTTP)
        .authority(authority)
        .path_and_query(path)
        .build()?;
    let mut request = Request::builder()
        .method(method)
        .uri(uri)
        .body(Full::new(body.unwrap_or_default()))?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// The whole answer.
async fn collect(answered: Answered) -> Result<Reply, String> {
    let response = match answered.await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return Err(format!("it answers with an error: {error:?}")),
        Err(_) => return Err("it has not answered".to_owned()),
    };
    let (parts, mut body) = response.into_parts();
    let Some(status) = convert::status(parts.status.as_u16()) else {
        return Err(format!(
            "status {} is out of range; want 200 to 599",
            parts.status
        ));
    };
    let headers = fields(parts.headers)?;
    let mut data = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| format!("its body broke off: {error}"))?;
        let Ok(piece) = frame.into_data() else { continue };
        if data.len() + piece.len() > MAX_BODY {
            return Err(format!("the body has more than {MAX_BODY} bytes"));
        }
        data.extend_from_slice(&piece);
    }
    Ok(Reply {
        status,
        headers,
        body: data.into(),
        grpc_status: None,
    })
}

/// The fields of an answer. What frames it has been seen to by `wasi:http`, and is written anew.
fn fields(mut headers: HeaderMap) -> Result<HeaderMap, String> {
    for name in [header::CONTENT_LENGTH, header::TRAILER] {
        headers.remove(name);
    }
    let mut size = 0;
    for (name, value) in &headers {
        size += name.as_str().len() + value.len();
        if !leeward_policy::may_be_in_an_answer(name.as_str()) {
            return Err(format!("the header {name} is the proxy's to set"));
        }
    }
    if size > MAX_HEADERS {
        return Err(format!(
            "the headers have {size} bytes; want at most {MAX_HEADERS}"
        ));
    }
    Ok(headers)
}
