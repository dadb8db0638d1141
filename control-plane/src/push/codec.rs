//! gRPC's framing for messages that are encoded already. The generated server would encode every message
//! once for each proxy; this one copies bytes that all proxies share.

use super::Push;
use bytes::{BufMut, Bytes};
use leeward_proto::v1::{self, push_service_server};
use prost::Message;
use std::convert::Infallible;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Context, Poll, Service, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};

/// Takes bytes out, gives messages in.
struct Frames;

/// What a stream has at hand for messages, in bytes, either way; it is given more when it needs more. The usual 8 KiB would be
/// held twice by each of ten thousand proxies that say nothing.
const BUFFER: usize = 256;
/// Messages are put together up to this many bytes before they are written.
const TOGETHER: usize = 32 << 10;

impl Codec for Frames {
    type Encode = Bytes;
    type Decode = v1::ProxyMessage;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Frames {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, frame: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(frame);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER, TOGETHER)
    }
}

impl Decoder for Frames {
    type Item = v1::ProxyMessage;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<v1::ProxyMessage>, Status> {
        let message = v1::ProxyMessage::decode(from);
        message
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("not a ProxyMessage: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER, TOGETHER)
    }
}

impl NamedService for Push {
    const NAME: &'static str = push_service_server::SERVICE_NAME;
}

impl Service<http::Request<tonic::body::Body>> for Push {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        if request.uri().path() != "/leeward.v1.PushService/Subscribe" {
            let unknown = Status::unimplemented("the push has one method, Subscribe");
            return Box::pin(std::future::ready(Ok(unknown.into_http())));
        }
        let push = self.clone();
        Box::pin(async move { Ok(Grpc::new(Frames).streaming(push, request).await) })
    }
}

impl StreamingService<v1::ProxyMessage> for Push {
    type Response = Bytes;
    type ResponseStream = super::Outgoing;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<v1::ProxyMessage>>) -> Self::Future {
        let push = self.clone();
        Box::pin(async move { push.subscribe(request).await })
    }
}
