//! `leeward-shop`: five small HTTP services that call each other through the mesh.
//!
//! They know nothing of it: each calls `http://SERVICE.shop/` through its node's proxy, as it would through
//! any HTTP proxy on the way, and passes on the trace and who the customer is. What the mesh adds shows in what they answer: which
//! zone each part came from, and whether it is a fallback's.

mod book;
mod client;
mod services;

use crate::book::Book;
use crate::client::Mesh;
use crate::services::{Service, Shop};
use anyhow::Context;
use clap::Parser;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::TaskTracker;

/// One service of the shop.
#[derive(Debug, Parser)]
#[command(name = "leeward-shop", version)]
struct Settings {
    /// Which service to be.
    service: Service,
    /// Where to listen.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The node's proxy: its outbound listener.
    #[arg(long, value_name = "IP:PORT")]
    mesh: SocketAddr,
    /// The zone that this is in.
    #[arg(long)]
    zone: String,
    /// Where payment keeps its book; required there.
    #[arg(long, value_name = "FILE", required_if_eq("service", "payment"))]
    book: Option<PathBuf>,
    /// Write the bound address here, as JSON, once it listens.
    #[arg(long, value_name = "FILE")]
    addresses_file: Option<PathBuf>,
}

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests under way may take to end.
const GRACE: Duration = Duration::from_secs(5);

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let settings = Settings::parse();
    let book = settings.book.as_deref().map(Book::open).transpose()?;
    let listener = TcpListener::bind(settings.listen).await.context("can't listen")?;
    let address = listener.local_addr()?;
    if let Some(file) = &settings.addresses_file {
        let beside = file.with_extension("tmp");
        std::fs::write(&beside, format!("{{\"listen\":\"{address}\"}}\n"))?;
        std::fs::rename(&beside, file)?;
    }
    let shop = Arc::new(Shop {
        service: settings.service,
        zone: settings.zone,
        instance: address.to_string(),
        mesh: Mesh::new(settings.mesh),
        book: book.map(Arc::new),
        calls: AtomicU64::new(0),
    });
    let mut terminate = signal(SignalKind::terminate())?;
    let connections = TaskTracker::new();
    loop {
        let (stream, _) = tokio::select! {
            _ = terminate.recv() => break,
            accepted = listener.accept() => accepted?,
        };
        stream.set_nodelay(true)?;
        let shop = Arc::clone(&shop);
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let shop = Arc::clone(&shop);
                async move { Ok::<_, std::convert::Infallible>(shop.answer(request).await) }
            });
            // What goes wrong with one client is that client's business.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
    connections.close();
    // Idle clients keep their connections open for longer than anyone wants to wait.
    let _ = tokio::time::timeout(GRACE, connections.wait()).await;
    Ok(())
}
