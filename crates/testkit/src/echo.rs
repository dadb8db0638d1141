//! A WebSocket server that says what it hears.

use crate::port::Port;
use futures_util::{SinkExt, StreamExt};
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Echoes WebSocket messages until dropped.
#[derive(Debug)]
pub struct WebSocketEcho {
    port: Port,
    token: CancellationToken,
}

impl WebSocketEcho {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn start() -> anyhow::Result<Self> {
        let port = Port::reserve()?;
        let token = CancellationToken::new();
        let accept = accept(port.listen()?, token.clone());
        tokio::spawn(token.clone().run_until_cancelled_owned(accept));
        Ok(Self { port, token })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }
}

impl Drop for WebSocketEcho {
    fn drop(&mut self) {
        self.token.cancel();
    }
}

async fn accept(listener: TcpListener, token: CancellationToken) {
    let tasks = TaskTracker::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        tasks.spawn(token.clone().run_until_cancelled_owned(echo(stream)));
    }
}

async fn echo(stream: TcpStream) {
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
        return;
    };
    while let Some(Ok(message)) = socket.next().await {
        // The library answers pings and the closing handshake.
        let echoes = message.is_text() || message.is_binary();
        if echoes && socket.send(message).await.is_err() {
            return;
        }
    }
}
