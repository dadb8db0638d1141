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

/// The lines of JSON that it answers to GET.
pub(crate) async fn get_lines(admin: SocketAddr, path: &str) -> anyhow::Result<Vec<Value>> {
    let body = ask_raw(admin, Method::GET, path).await?;
    let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| parsed(admin, line)).collect()
}

/// What it answers to POST.
pub(crate) async fn post(admin: SocketAddr, path: &str) -> anyhow::Result<Value> {
    ask(admin, Method::POST, path).await
}

/// A list in its answer; empty if there is none.
pub(crate) fn entries<'a>(answer: &'a Value, field: &str) -> &'a [Value] {
    answer
        .get(field)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

async fn ask(admin: SocketAddr, method: Method, path: &str) -> anyhow::Result<Value> {
    parsed(admin, &ask_raw(admin, method, path).await?)
}

fn parsed(admin: SocketAddr, text: &[u8]) -> anyhow::Result<Value> {
    serde_json::from_slice(text)
        .map_err(|error| anyhow::anyhow!("the proxy at {admin} did not answer in JSON: {error}"))
}

async fn ask_raw(admin: SocketAddr, method: Method, path: &str) -> anyhow::Result<Bytes> {
    let sent = tokio::time::timeout(PATIENCE, send(admin, method, path)).await;
    sent.map_err(|_| anyhow::anyhow!("the proxy at {admin} did not answer within {PATIENCE:?}"))?
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_proxys_answer_is_read_and_its_refusal_is_told() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = listener.local_addr().unwrap();
        let proxy = tokio::spawn(async move {
            for answer in [
                "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
                "HTTP/1.1 404 Not Found\r\ncontent-length: 17\r\n\r\n{\"error\": \"none\"}",
            ] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 1024];
                let n = stream.read(&mut asked).await.unwrap();
                assert!(asked[..n].starts_with(b"GET /circuits HTTP/1.1\r\n"));
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        assert_eq!(get(admin, "/circuits").await.unwrap(), serde_json::json!({}));
        let refused = get(admin, "/circuits").await.unwrap_err().to_string();
        assert_eq!(
            refused,
            format!("the proxy at {admin} answered 404 Not Found to GET /circuits: none")
        );
        proxy.await.unwrap();
        let gone = get(admin, "/circuits").await.unwrap_err().to_string();
        assert!(gone.starts_with(&format!("no proxy at {admin}: ")), "{gone}");
    }
}
