//! Calls to other services, through the node's proxy.

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use tokio::net::TcpStream;

/// The way to the other services: connections to the proxy, kept for the next call.
#[derive(Debug)]
pub(crate) struct Mesh {
    proxy: SocketAddr,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// Connections kept.
const IDLE: usize = 64;
/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 20;

impl Mesh {
    pub(crate) fn new(proxy: SocketAddr) -> Self {
        Self {
            proxy,
            idle: Mutex::default(),
        }
    }

    /// One call. `passed` are headers of the caller's that go on.
    pub(crate) async fn call(
        &self,
        mut request: Request<Full<Bytes>>,
        host: &'static str,
        passed: &HeaderMap,
    ) -> anyhow::Result<Response<Bytes>> {
        request
            .headers_mut()
            .insert(header::HOST, header::HeaderValue::from_static(host));
        request.headers_mut().extend(passed.clone());
        let mut sender = self.connection().await?;
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MAX_ANSWER)
            .collect()
            .await
            .map_err(anyhow::Error::from_boxed)?
            .to_bytes();
        let closes = parts
            .headers
            .get(header::CONNECTION)
            .is_some_and(|c| c == "close");
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if !closes && idle.len() < IDLE {
            idle.push(sender);
        }
        Ok(Response::from_parts(parts, body))
    }

    async fn connection(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        while let Some(mut sender) = self.pop() {
            if !sender.is_closed() && sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(self.proxy).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn pop(&self) -> Option<SendRequest<Full<Bytes>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}
