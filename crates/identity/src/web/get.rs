//! Small documents from the web: issuers' keys, and where they are.

use super::secure;
use bytes::Bytes;
use http::uri::{Authority, PathAndQuery};
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Why a document can't be had.
#[derive(Debug, thiserror::Error)]
pub enum GetError {
    /// The text is no URL of a host.
    #[error("is no URL with a host")]
    Url,
    /// Without TLS, to somebody else than this machine.
    #[error("http is for loopback addresses only")]
    Plain,
    /// The connection failed.
    #[error("can't {act}: {source}")]
    Connection {
        /// What was being done.
        act: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The exchange failed.
    #[error(transparent)]
    Exchange(#[from] hyper::Error),
    /// The answer is another than 200.
    #[error("the answer is {0}")]
    Status(StatusCode),
    /// The answer's body broke off, or is longer than it may be.
    #[error("the answer broke off, or is too long: {0}")]
    Body(String),
}

/// Gets a document of JSON, by TLS with the certificates that the system trusts; from this machine without, too. Nothing is
/// followed elsewhere. It takes as long as it takes: callers have a limit.
///
/// # Errors
///
/// [`GetError`], also if it has more than `most` bytes.
pub async fn get(uri: &str, most: usize) -> Result<Bytes, GetError> {
    let uri: Uri = uri.parse().map_err(|_| GetError::Url)?;
    let host = uri.host().ok_or(GetError::Url)?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let is_secure = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if is_secure { 443 } else { 80 });
    let failed = |act| move |source| GetError::Connection { act, source };
    let stream = TcpStream::connect((bare, port))
        .await
        .map_err(failed("connect"))?;
    let target = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let request = Request::get(target)
        .header(header::HOST, uri.authority().map_or(host, Authority::as_str))
        .header(header::ACCEPT, "application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|_| GetError::Url)?;
    if is_secure {
        let stream = secure(stream, bare).await.map_err(failed("speak TLS"))?;
        return ask(stream, request, most).await;
    }
    // The name "localhost" is the resolver's to say.
    let peer = stream.peer_addr().map_err(failed("connect"))?;
    if !peer.ip().is_loopback() {
        return Err(GetError::Plain);
    }
    ask(stream, request, most).await
}

async fn ask<T>(stream: T, request: Request<Empty<Bytes>>, most: usize) -> Result<Bytes, GetError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let answer = async {
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(GetError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), most).collect().await;
        body.map(|body| body.to_bytes())
            .map_err(|error| GetError::Body(error.to_string()))
    };
    tokio::pin!(connection, answer);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        ended = &mut connection => {
            ended?;
            // It has ended with the last byte, which the answer has by now.
            answer.await
        }
    }
}
