//! Does what a filter must not: as the request's field `x-misbehave` says, or else the configuration. It is a list, separated
//! by `;`, of `CALLBACK:WORD` or `CALLBACK:WORD ABOUT`, where the callback is `request`, `request-body`, `response` or
//! `response-body`, and the word one of [`misbehave_tricks`] or `edit-…`.
//!
//! What became of an edit is told in the field `x-edit` of the head. It asks for whatever its list needs: bodies in pieces,
//! or whole if the list has `whole`.

use leeward_plugin::{
    BodyMode, BodyVerdict, EditError, Filter, Interest, RequestHead, RequestVerdict, Response, ResponseHead,
    ResponseVerdict,
};
use misbehave_tricks as tricks;

struct Misbehave;

/// What is to be done.
struct List(String);

/// A head of either kind.
enum Head<'a> {
    Request(&'a RequestHead),
    Response(&'a ResponseHead),
}

impl Head<'_> {
    fn set(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
        match self {
            Self::Request(head) => head.set_header(name, value),
            Self::Response(head) => head.set_header(name, value),
        }
    }

    fn add(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
        match self {
            Self::Request(head) => head.add_header(name, value),
            Self::Response(head) => head.add_header(name, value),
        }
    }
}

impl List {
    fn of(request: &RequestHead) -> Self {
        Self(
            request
                .header_text("x-misbehave")
                .unwrap_or_else(|| request.config()),
        )
    }

    /// What is to be done in a callback.
    fn at(&self, callback: &str) -> impl Iterator<Item = (&str, &str)> {
        self.0.split(';').filter_map(move |entry| {
            let (at, what) = entry.trim().split_once(':')?;
            (at == callback).then(|| what.split_once(' ').unwrap_or((what, "")))
        })
    }

    fn has(&self, callback: &str) -> bool {
        self.at(callback).next().is_some()
    }

    fn mode(&self, callback: &str) -> BodyMode {
        if !self.has(callback) {
            BodyMode::None
        } else if self.0.contains("whole") {
            BodyMode::Whole
        } else {
            BodyMode::Pieces
        }
    }

    /// Does it; an answer, if one came of it.
    fn act(&self, callback: &str, head: &Head<'_>) -> Option<Response> {
        for (word, about) in self.at(callback) {
            if tricks::act(word, about) {
                continue;
            }
            if let Some(response) = tricks::answer(word, about) {
                return Some(response);
            }
            // Room for what is told is taken before, since an edit may leave none.
            let _ = head.set("x-edit", b"?");
            let told = match edit(word, head) {
                Some(Ok(())) => "done",
                Some(Err(error)) => error.name(),
                None => "",
            };
            // A head that is on its way takes nothing more.
            let _ = head.set("x-edit", told.as_bytes());
        }
        None
    }
}

fn edit(word: &str, head: &Head<'_>) -> Option<Result<(), EditError>> {
    Some(match word {
        "edit-split" => head.set("x-a", b"b\r\nset-cookie: c=d"),
        "edit-name" => head.set("x-a: b\r\nset-cookie", b"c=d"),
        "edit-bytes" => head.set("x-a", b"\0"),
        "edit-length" => head.set("content-length", b"5"),
        "edit-hop" => head.set("transfer-encoding", b"chunked"),
        "edit-host" => head.set("host", b"elsewhere"),
        "edit-pseudo" => head.set(":path", b"/elsewhere"),
        "edit-huge" => head.set("x-a", &vec![b'a'; 70 << 10]),
        "edit-many" => (0..1000).try_for_each(|n| head.add(&format!("x-{n}"), b"1")),
        _ => return None,
    })
}

/// What goes on in a body's place, if anything does.
fn body_verdict(list: &List, callback: &str, answer: Option<Response>, data: &[u8]) -> BodyVerdict {
    if let Some(response) = answer {
        return BodyVerdict::Respond(response);
    }
    for (word, about) in list.at(callback) {
        match word {
            "replace" => return BodyVerdict::Replace(about.into()),
            "swell" => return BodyVerdict::Replace(data.repeat(about.parse().unwrap_or(2))),
            _ => {}
        }
    }
    BodyVerdict::Pass
}

impl Filter for Misbehave {
    fn on_request(request: &RequestHead) -> RequestVerdict {
        let calls = tricks::calls();
        let list = List::of(request);
        if let Some(response) = list.act("request", &Head::Request(request)) {
            return RequestVerdict::Respond(response);
        }
        if list.at("request").any(|(word, _)| word == "calls") {
            return RequestVerdict::Respond(Response::new(200).body(calls.to_string()));
        }
        RequestVerdict::Proceed(Interest {
            request_body: list.mode("request-body"),
            response: list.has("response") || list.has("response-body"),
        })
    }

    fn on_request_body(request: &RequestHead, data: Vec<u8>, _: bool) -> BodyVerdict {
        let list = List::of(request);
        let answer = list.act("request-body", &Head::Request(request));
        body_verdict(&list, "request-body", answer, &data)
    }

    fn on_response(request: &RequestHead, response: &ResponseHead) -> ResponseVerdict {
        let list = List::of(request);
        match list.act("response", &Head::Response(response)) {
            Some(answer) => ResponseVerdict::Respond(answer),
            None => ResponseVerdict::Proceed(list.mode("response-body")),
        }
    }

    fn on_response_body(
        request: &RequestHead,
        response: &ResponseHead,
        data: Vec<u8>,
        _: bool,
    ) -> BodyVerdict {
        let list = List::of(request);
        let answer = list.act("response-body", &Head::Response(response));
        body_verdict(&list, "response-body", answer, &data)
    }
}

leeward_plugin::filter!(Misbehave);
