//! gRPC calls of bytes: messages without a schema.

use bytes::{Buf, BufMut, Bytes};
use http::Uri;
use http::uri::PathAndQuery;
use std::net::SocketAddr;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

/// Messages are bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct BytesCodec;

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// A channel through the proxy at `via` to the service known as `host`.
///
/// # Errors
///
/// If `host` is none.
pub fn grpc_channel(via: SocketAddr, host: &str) -> anyhow::Result<Channel> {
    let origin = Uri::try_from(format!("http://{host}"))?;
    Ok(Endpoint::from_shared(format!("http://{via}"))?
        .origin(origin)
        .connect_lazy())
}

/// Begins a bidirectional call: what is sent into the sender goes out, what comes back is in the stream.
///
/// # Errors
///
/// The status, if the call was refused.
pub async fn call_streaming(
    channel: Channel,
    method: &'static str,
) -> Result<(mpsc::Sender<Bytes>, Response<Streaming<Bytes>>), Status> {
    let (sender, receiver) = mpsc::channel(16);
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(format!("no connection: {error}")))?;
    let request = Request::new(ReceiverStream::new(receiver));
    let response = grpc
        .streaming(request, PathAndQuery::from_static(method), BytesCodec)
        .await?;
    Ok((sender, response))
}
