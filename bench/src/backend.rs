//! What the proxies have behind them: 1 KiB, or 1 MiB for `/1m`, over HTTP/1.1 on one port and HTTP/2 on another.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::io::Write;
use tokio::net::TcpListener;

/// Prints both ports and serves until killed.
pub(crate) fn run() -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve())
}

async fn serve() -> anyhow::Result<()> {
    let (first, second) = (
        TcpListener::bind("127.0.0.1:0").await?,
        TcpListener::bind("127.0.0.1:0").await?,
    );
    writeln!(
        std::io::stdout(),
        "{} {}",
        first.local_addr()?.port(),
        second.local_addr()?.port()
    )?;
    let (small, large) = (Bytes::from(vec![b'x'; 1024]), Bytes::from(vec![b'x'; 1 << 20]));
    loop {
        let ((stream, _), two) = tokio::select! {
            accepted = first.accept() => (accepted?, false),
            accepted = second.accept() => (accepted?, true),
        };
        stream.set_nodelay(true)?;
        let (small, large) = (small.clone(), large.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let body = if request.uri().path() == "/1m" {
                    &large
                } else {
                    &small
                };
                let response = Response::new(Full::new(body.clone()));
                async move { Ok::<_, Infallible>(response) }
            });
            let io = TokioIo::new(stream);
            // A client that goes away in the middle is no matter here.
            if two {
                drop(
                    http2::Builder::new(TokioExecutor::new())
                        .max_concurrent_streams(1024)
                        .serve_connection(io, service)
                        .await,
                );
            } else {
                drop(http1::Builder::new().serve_connection(io, service).await);
            }
        });
    }
}
