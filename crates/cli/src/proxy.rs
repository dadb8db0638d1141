//! Asks a proxy's admin listener.

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long a proxy has to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer of a proxy that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// What it answers to GET.
pub(crate) async fn get(admin: SocketAddr, path: &str) -> anyhow::Result<Value> {
    ask(admin, Method::GET, path).await
}

/// What it answers to POST.
pub(crate) async fn post(admin: SocketAddr, path: &str) -> anyhow::Result<Value> {
    ask(admin, Method::POST, path).await
}

async fn ask(admin: SocketAddr, method: Method, path: &str) -> anyhow::Result<Value> {
    let sent = tokio::time::timeout(PATIENCE, send(admin, method, path)).await;
    let body =
        sent.map_err(|_| anyhow::anyhow!("the proxy at {admin} did not answer within {PATIENCE:?}"))??;
    serde_json::from_slice(&body)
        .map_err(|error| anyhow::anyhow!("the proxy at {admin} did not answer in JSON: {error}"))
}

async fn send(admin: SocketAddr, method: Method, path: &str) -> anyhow::Result<Bytes> {
    let stream = TcpStream::connect(admin)
        .await
        .map_err(|error| anyhow::anyhow!("no proxy at {admin}: {error}"))?;
    let (mut sender, serving) = handshake(TokioIo::new(stream)).await?;
    // Ends with the connection, at the latest when this command does.
    tokio::spawn(serving);
    let request = Request::builder()
        .method(method.clone())
        .uri(path)
        .header(header::HOST, admin.to_string())
        .body(Empty::<Bytes>::new())?;
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, MAX_ANSWER)
        .collect()
        .await
        .map_err(anyhow::Error::from_boxed)?
        .to_bytes();
    if head.status.is_success() {
        return Ok(body);
    }
    let said = serde_json::from_slice::<Value>(&body).ok();
    let why = said
        .as_ref()
        .and_then(|said| said.get("error"))
        .and_then(Value::as_str);
    anyhow::bail!(
        "the proxy at {admin} answered {} to {method} {path}{}",
        head.status,
        why.map(|why| format!(": {why}")).unwrap_or_default()
    );
}
