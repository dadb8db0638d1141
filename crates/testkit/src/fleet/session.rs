//! One stream of a simulated proxy. HTTP/2 is driven by hand: a client of tonic for each of ten thousand proxies would cost
//! more than the control plane under test.

use super::Member;
use anyhow::{Context, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use http::{Request, header};
use leeward_proto::v1;
use leeward_proto::v1::proxy_message::Message as FromProxy;
use prost::Message;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as Task, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// Longest wait for a connection, as `leeward_identity::channel` has it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a control plane is told that the proxy is there.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long it may say nothing.
const SILENCE: Duration = Duration::from_secs(30);
/// What may be on its way to a proxy: a stream's, and a connection's. As hyper's clients have it.
const WINDOWS: (u32, u32) = (2 << 20, 5 << 20);
/// gRPC's framing: whether it is compressed, and the length.
const PREFIX: usize = 5;
/// Largest message that is taken, in bytes.
const MAX_MESSAGE: usize = 16 << 20;

/// What is looked at of a `ControlMessage`; its resources stay bytes.
#[derive(Clone, PartialEq, prost::Message)]
struct Glance {
    #[prost(message, optional, tag = "1")]
    update: Option<Update>,
}

/// The same of an `Update`.
#[derive(Clone, PartialEq, prost::Message)]
struct Update {
    #[prost(string, tag = "1")]
    store_id: String,
    #[prost(uint64, tag = "2")]
    generation: u64,
    #[prost(bytes = "bytes", repeated, tag = "3")]
    upserts: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "4")]
    deletes: Vec<Bytes>,
    #[prost(bool, tag = "5")]
    complete: bool,
    #[prost(bool, tag = "6")]
    full: bool,
}

/// What there is to count of an update.
pub(super) struct Seen {
    pub(super) resources: u64,
    pub(super) bytes: u64,
    pub(super) full: bool,
}

/// A stream from its beginning to its end, whatever the reason.
pub(super) async fn run(member: &Arc<Member>, control: SocketAddr) {
    // Why it ended is the control plane's to log; the fleet counts.
    drop(Box::pin(stream(member, control)).await);
}

async fn stream(member: &Arc<Member>, control: SocketAddr) -> anyhow::Result<()> {
    let config = member.identity.client_config(&[b"h2"], &member.control)?;
    let connecting = async {
        let stream = TcpStream::connect(control).await?;
        stream.set_nodelay(true)?;
        let metered = Metered {
            stream,
            read: Arc::clone(&member.wire_bytes),
        };
        let connector = TlsConnector::from(config);
        connector.connect(ServerName::from(control.ip()), metered).await
    };
    let tls = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await??;
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .handshake::<_, Bytes>(tls)
        .await?;
    tokio::select! {
        ended = connection => Ok(ended?),
        ended = talk(member, client) => ended,
    }
}

async fn talk(member: &Arc<Member>, client: h2::client::SendRequest<Bytes>) -> anyhow::Result<()> {
    let mut client = client.ready().await?;
    let request = Request::post("http://leeward-control/leeward.v1.PushService/Subscribe")
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(())?;
    let (response, mut out) = client.send_request(request, false)?;
    let store_id = member.store_id.lock().map_or_else(
        |poisoned| poisoned.into_inner().clone(),
        |store_id| store_id.clone(),
    );
    let hello = v1::Hello {
        proxy: member.name.clone(),
        zone: member.zone.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store_id,
        generation: member.generation.load(Ordering::Acquire),
    };
    say(&mut out, FromProxy::Hello(hello))?;
    let mut next_beat = Instant::now() + HEARTBEAT;
    let mut response = pin!(tokio::time::timeout(SILENCE, response));
    let response = loop {
        tokio::select! {
            response = &mut response => break response??,
            () = tokio::time::sleep_until(next_beat) => beat(&mut out, &mut next_beat)?,
        }
    };
    // A stream that is refused has its status in the head.
    ensure!(
        response.status() == 200 && !response.headers().contains_key("grpc-status"),
        "refused: {:?}",
        response.headers()
    );
    member.sessions.fetch_add(1, Ordering::Relaxed);
    let mut messages = Messages {
        body: response.into_body(),
        read: BytesMut::new(),
    };
    let mut last_heard = Instant::now();
    loop {
        let message = tokio::select! {
            message = messages.next() => message?,
            () = tokio::time::sleep_until(next_beat.min(last_heard + SILENCE)) => {
                ensure!(last_heard.elapsed() < SILENCE, "the control plane is silent");
                beat(&mut out, &mut next_beat)?;
                continue;
            }
        };
        last_heard = Instant::now();
        let bytes = (message.len() + PREFIX) as u64;
        let Some(update) = Glance::decode(message)?.update else {
            continue;
        };
        member.see(&Seen {
            resources: (update.upserts.len() + update.deletes.len()) as u64,
            bytes,
            full: update.full,
        });
        if update.complete {
            let ack = v1::Ack {
                generation: update.generation,
                ..v1::Ack::default()
            };
            say(&mut out, FromProxy::Ack(ack))?;
            member.acked(&update.store_id, update.generation);
        }
    }
}

fn beat(out: &mut SendStream<Bytes>, next: &mut Instant) -> anyhow::Result<()> {
    *next = Instant::now() + HEARTBEAT;
    say(out, FromProxy::Heartbeat(v1::Heartbeat {}))
}

/// What a proxy says is small: the window has room for it, and if the control plane doesn't read, the silence ends it.
fn say(out: &mut SendStream<Bytes>, message: FromProxy) -> anyhow::Result<()> {
    let message = v1::ProxyMessage {
        message: Some(message),
    };
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length)?);
    message.encode(&mut frame)?;
    out.send_data(frame.freeze(), false)?;
    Ok(())
}

/// Whole messages from a stream.
struct Messages {
    body: RecvStream,
    read: BytesMut,
}

impl Messages {
    /// Cancel-safe.
    async fn next(&mut self) -> anyhow::Result<Bytes> {
        loop {
            if let Some(prefix) = self.read.first_chunk::<PREFIX>() {
                let [compressed, length @ ..] = *prefix;
                ensure!(compressed == 0, "a message is compressed");
                let length = usize::try_from(u32::from_be_bytes(length))?;
                ensure!(length <= MAX_MESSAGE, "a message of {length} bytes");
                if self.read.len() >= PREFIX + length {
                    self.read.advance(PREFIX);
                    return Ok(self.read.split_to(length).freeze());
                }
                self.read.reserve(PREFIX + length - self.read.len());
            }
            let data = self.body.data().await.context("the stream ended")??;
            self.body.flow_control().release_capacity(data.len())?;
            self.read.extend_from_slice(&data);
        }
    }
}

/// A connection whose incoming bytes are counted.
struct Metered {
    stream: TcpStream,
    read: Arc<AtomicU64>,
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Task<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let came = buf.filled().len() - before;
        self.read.fetch_add(came as u64, Ordering::Relaxed);
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Task<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
