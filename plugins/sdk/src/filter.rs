//! Plugins that see requests and answers on their way.

pub use crate::bindings::leeward::plugin::passing::{
    BodyMode, BodyVerdict, Interest, RequestHead, RequestVerdict, ResponseHead, ResponseVerdict,
};
use crate::host::text;

/// What a filter does. Only [`on_request`](Self::on_request) has to be there; the others are called where it, or the
/// one before, asked for them.
///
/// The calls for one request may come to different instances. What a later one must know of an earlier one is a
/// [note](RequestHead::set_note).
///
/// ```no_run
/// use leeward_plugin::{
///     BodyMode, BodyVerdict, Filter, Interest, RequestHead, RequestVerdict, Response, ResponseHead, ResponseVerdict,
/// };
///
/// struct Gate;
///
/// impl Filter for Gate {
///     fn on_request(request: &RequestHead) -> RequestVerdict {
///         if request.header_text("x-key").is_none() {
///             return RequestVerdict::Respond(Response::new(401).body("x-key is missing\n"));
///         }
///         // The key is nobody's business further on. A field that can't be removed was never there.
///         let _ = request.remove_header("x-key");
///         RequestVerdict::Proceed(Interest::RESPONSE)
///     }
///
///     fn on_response(_: &RequestHead, response: &ResponseHead) -> ResponseVerdict {
///         let _ = response.set_header("x-gate", b"passed");
///         ResponseVerdict::Proceed(BodyMode::None)
///     }
/// }
///
/// leeward_plugin::filter!(Gate);
/// # fn main() {}
/// ```
pub trait Filter {
    /// The head of a request has come.
    fn on_request(request: &RequestHead) -> RequestVerdict;

    /// A piece of its body, if that was asked for; `end` with the last one, which may be empty. Asked for
    /// [whole](BodyMode::Whole), it comes in one piece of at most Plugin.limits.maxBody; a longer one is a fault.
    fn on_request_body(request: &RequestHead, data: Vec<u8>, end: bool) -> BodyVerdict {
        let _ = (request, data, end);
        BodyVerdict::Pass
    }

    /// The head of the answer has come, if that was asked for. The request can only be read.
    fn on_response(request: &RequestHead, response: &ResponseHead) -> ResponseVerdict {
        let _ = (request, response);
        ResponseVerdict::Proceed(BodyMode::None)
    }

    /// A piece of the answer's body, if that was asked for. [Whole](BodyMode::Whole), the head can still be changed;
    /// in pieces, an edit of the head is refused with [`EditError::Sent`](crate::EditError::Sent).
    fn on_response_body(
        request: &RequestHead,
        response: &ResponseHead,
        data: Vec<u8>,
        end: bool,
    ) -> BodyVerdict {
        let _ = (request, response, data, end);
        BodyVerdict::Pass
    }
}

impl Interest {
    /// The filter has done what it wanted.
    pub const NOTHING: Self = Self {
        request_body: BodyMode::None,
        response: false,
    };
    /// It wants to see the answer's head.
    pub const RESPONSE: Self = Self {
        request_body: BodyMode::None,
        response: true,
    };

    /// It wants to see the request's body, too.
    #[must_use]
    pub const fn with_request_body(self, mode: BodyMode) -> Self {
        Self {
            request_body: mode,
            response: self.response,
        }
    }
}

impl RequestHead {
    /// The first value of a header (by its lower-case name), if it is there and is UTF-8.
    pub fn header_text(&self, name: &str) -> Option<String> {
        text(self.header(name))
    }
}

impl ResponseHead {
    /// The first value of a header (by its lower-case name), if it is there and is UTF-8.
    pub fn header_text(&self, name: &str) -> Option<String> {
        text(self.header(name))
    }
}

/// Makes a type that implements [`Filter`](crate::Filter) the plugin of this crate, which can have only one.
#[macro_export]
macro_rules! filter {
    ($plugin:ty) => {
        const _: () = {
            mod world {
                $crate::__world_filter!();
            }

            struct Exported;

            impl world::Guest for Exported {
                fn on_request(request: &$crate::RequestHead) -> $crate::RequestVerdict {
                    <$plugin as $crate::Filter>::on_request(request)
                }

                fn on_request_body(
                    request: &$crate::RequestHead,
                    data: Vec<u8>,
                    end: bool,
                ) -> $crate::BodyVerdict {
                    <$plugin as $crate::Filter>::on_request_body(request, data, end)
                }

                fn on_response(
                    request: &$crate::RequestHead,
                    response: &$crate::ResponseHead,
                ) -> $crate::ResponseVerdict {
                    <$plugin as $crate::Filter>::on_response(request, response)
                }

                fn on_response_body(
                    request: &$crate::RequestHead,
                    response: &$crate::ResponseHead,
                    data: Vec<u8>,
                    end: bool,
                ) -> $crate::BodyVerdict {
                    <$plugin as $crate::Filter>::on_response_body(request, response, data, end)
                }
            }

    world::export!(Exported with_types_in world);
        };
    };
}
