//! The API over HTTP and JSON: the same services, calls and refusals, for those who don't speak gRPC.
//!
//! Each call becomes the gRPC call that it stands for, and goes where those go: through the same checks of who may do what,
//! to the same code. Messages are in protobuf's JSON. What there is to call is in the descriptors, and in [`routes`].

mod answer;
mod body;
mod openapi;
mod question;
mod routes;

use answer::{Answer, refusal};
use http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, TE};
use http::{HeaderValue, Method, Request, Response, Version};
use prost_reflect::{DescriptorPool, MethodDescriptor};
use routes::Found;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

/// Where the document of the API is.
const DOCUMENT: &str = "/openapi.json";

/// Everything that the API and its errors are made of.
pub(crate) fn descriptors() -> &'static DescriptorPool {
    static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
        let mut pool = DescriptorPool::new();
        // Both were made by the compiler that made this program; a test reads them.
        for set in [leeward_proto::DESCRIPTORS, tonic_types::pb::FILE_DESCRIPTOR_SET] {
            if let Err(error) = pool.decode_file_descriptor_set(set) {
                tracing::error!(%error, "descriptors can't be read");
            }
        }
        pool
    });
    &POOL
}

/// Serves the API's document, wherever the request comes from.
pub(crate) fn document<B: Send + 'static>()
-> impl Service<Request<B>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
+ Clone
+ Send
+ Sync
+ 'static {
    tower::service_fn(|_: Request<B>| async {
        let response = Response::new(Body::new(http_body_util::Full::new(openapi::document().clone())));
        Ok(with_type(response, "application/json"))
    })
}

fn with_type<B>(mut response: Response<B>, content: &'static str) -> Response<B> {
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content));
    response
}

/// Lets in JSON beside gRPC.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JsonLayer;

/// What [`JsonLayer`] makes of a service.
#[derive(Clone, Debug)]
pub(crate) struct Json<S> {
    inner: S,
}

impl<S> Layer<S> for JsonLayer {
    type Service = Json<S>;

    fn layer(&self, inner: S) -> Json<S> {
        Json { inner }
    }
}

impl<S> Service<Request<Body>> for Json<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if is_grpc(&request) {
            return Box::pin(self.inner.call(request));
        }
        // The one that was asked whether it is ready.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        Box::pin(async move {
            if request.uri().path() == DOCUMENT && request.method() == Method::GET {
                let response = inner.call(request).await?;
                return Ok(match Status::from_header_map(response.headers()) {
                    Some(status) => refusal(&status),
                    None => response,
                });
            }
            let (request, method, stream) = match translate(request) {
                Ok(translated) => translated,
                Err(response) => return Ok(*response),
            };
            let response = inner.call(request).await?;
            Ok(Answer { method, stream }.of(response).await)
        })
    }
}

fn is_grpc<B>(request: &Request<B>) -> bool {
    let content = request.headers().get(CONTENT_TYPE);
    content.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// The gRPC call that a request stands for, or what there is to say instead.
fn translate(request: Request<Body>) -> Result<(Request<Body>, MethodDescriptor, bool), Box<Response<Body>>> {
    let refuse = |status: &Status| Box::new(refusal(status));
    let (mut parts, body) = request.into_parts();
    let route = match routes::find(&parts.method, &parts.uri) {
        Found::Route(route) => route,
        Found::OtherMethods(allowed) => {
            let status = Status::unimplemented(format!(
                "{} can't be done with {}; there are {allowed}",
                parts.method,
                parts.uri.path()
            ));
            let mut response = refusal(&status);
            *response.status_mut() = http::StatusCode::METHOD_NOT_ALLOWED;
            if let Ok(allowed) = HeaderValue::from_str(&allowed) {
                response.headers_mut().insert(ALLOW, allowed);
            }
            return Err(Box::new(response));
        }
        Found::Nothing => {
            let path: String = parts.uri.path().chars().take(200).collect();
            return Err(refuse(&Status::not_found(format!(
                "there is nothing at {path}; what there is stands in {DOCUMENT}"
            ))));
        }
    };
    let method = route.method.clone();
    let question = question::Question::new(&route, &parts).map_err(|status| {
        let mut response = refusal(&status);
        if status.code() == Code::Unimplemented {
            *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
        }
        Box::new(response)
    })?;
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let stream = method.is_server_streaming();
    parts.method = Method::POST;
    parts.version = Version::HTTP_2;
    parts.uri = path
        .parse()
        .map_err(|_| refuse(&Status::internal("a method has no path")))?;
    parts.headers.remove(CONTENT_LENGTH);
    parts
        .headers
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    parts.headers.insert(TE, HeaderValue::from_static("trailers"));
    let body = Body::new(body::Upward::new(body, question));
    Ok((Request::from_parts(parts, body), method, stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptors_can_be_read() {
        let pool = descriptors();
        for name in ["leeward.v1.Resource", "google.rpc.Status", "google.rpc.ErrorInfo"] {
            assert!(pool.get_message_by_name(name).is_some(), "{name}");
        }
    }
}
