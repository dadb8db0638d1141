//! The world `filter`: one request's way past a component.

use crate::call::{RequestHead, ResponseHead};
use crate::fault::Fault;
use crate::filter::Step;
use bytes::Bytes;
use http::HeaderMap;

/// A component as a filter of one request.
#[derive(Debug, Default)]
pub(crate) struct Filter {
    request: Option<RequestHead>,
    response: Option<ResponseHead>,
}

impl Filter {
    pub(crate) async fn request(&mut self, head: RequestHead, end: bool) -> Result<Step, Fault> {
        let _ = end;
        self.request = Some(head);
        Err(Fault::NotLoaded)
    }

    pub(crate) fn take_request(&mut self) -> Option<RequestHead> {
        self.request.take()
    }

    pub(crate) fn wants_request_body(&mut self) -> bool {
        false
    }

    pub(crate) async fn request_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        let _ = (data, end);
        Err(Fault::NotLoaded)
    }

    pub(crate) async fn request_trailers(&mut self, trailers: HeaderMap) -> Result<(Step, HeaderMap), Fault> {
        Ok((Step::Go, trailers))
    }

    pub(crate) fn take_request_body(&mut self) -> Bytes {
        Bytes::new()
    }

    pub(crate) async fn resumed(&mut self) -> Result<Step, Fault> {
        std::future::pending().await
    }

    pub(crate) fn wants_response(&mut self) -> bool {
        false
    }

    pub(crate) async fn response(&mut self, head: ResponseHead, end: bool) -> Result<Step, Fault> {
        let _ = end;
        self.response = Some(head);
        Err(Fault::NotLoaded)
    }

    pub(crate) fn take_response(&mut self) -> Option<ResponseHead> {
        self.response.take()
    }

    pub(crate) fn wants_response_body(&mut self) -> bool {
        false
    }

    pub(crate) async fn response_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        let _ = (data, end);
        Err(Fault::NotLoaded)
    }

    pub(crate) async fn response_trailers(
        &mut self,
        trailers: HeaderMap,
    ) -> Result<(Step, HeaderMap), Fault> {
        Ok((Step::Go, trailers))
    }

    pub(crate) fn take_response_body(&mut self) -> Bytes {
        Bytes::new()
    }

    pub(crate) fn version(&self) -> &str {
        ""
    }
}
