//! Heads on their way, as the worlds `filter` and `router` see and change them.

use super::bindings::filter::leeward::plugin::passing;
use super::bindings::filter::leeward::plugin::passing::EditError;
use super::convert::{self, MAX_HEADERS};
use super::state::{State, Subject};
use crate::call::{Facts, RequestHead, ResponseHead};
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use wasmtime::Error;
use wasmtime::component::Resource;

/// What a guest has a handle of: the request of the call, whatever the handle's number.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it")]
pub enum RequestPassing {}

/// The answer of the call.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it")]
pub enum ResponsePassing {}

/// The number of the one request, and of the one answer, that a call is about.
pub(crate) const THIS: u32 = 0;
/// Fields of a head.
const MAX_FIELDS: usize = 128;
/// What a plugin may write down for a request.
const MAX_NOTES: usize = 16;
/// Bytes of the notes of a request together.
const MAX_NOTED: usize = 16 << 10;

/// A request and its answer on their way past a plugin.
#[derive(Debug)]
pub(crate) struct Passing {
    pub(crate) facts: Facts,
    pub(crate) request: Message<RequestHead>,
    pub(crate) response: Option<Message<ResponseHead>>,
    notes: Vec<(String, Vec<u8>)>,
}

/// A head that can be changed for as long as it hasn't gone on.
#[derive(Debug)]
pub(crate) struct Message<H> {
    pub(crate) head: H,
    /// It can still be changed.
    pub(crate) here: bool,
    /// What this call has changed, as it was before. A field is here once, and only for as long as it, or what it was, is in
    /// the head, so that there are at most twice [`MAX_FIELDS`].
    before: Vec<Before>,
}

/// A part of a head as it was.
#[derive(Debug)]
pub(crate) enum Before {
    /// A field and its values; none if it wasn't there.
    Field(HeaderName, Vec<HeaderValue>),
    Path(PathAndQuery),
    Status(StatusCode),
}

/// What the heads of requests and of answers have in common.
pub(crate) trait Head {
    fn headers(&mut self) -> &mut HeaderMap;

    /// Puts back what only this head has.
    fn put_back(&mut self, before: Before);
}

impl Head for RequestHead {
    fn headers(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    fn put_back(&mut self, before: Before) {
        if let Before::Path(path) = before {
            self.path = path;
        }
    }
}

impl Head for ResponseHead {
    fn headers(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    fn put_back(&mut self, before: Before) {
        if let Before::Status(status) = before {
            self.status = status;
        }
    }
}

impl<H: Head> Message<H> {
    pub(crate) const fn new(head: H, here: bool) -> Self {
        Self {
            head,
            here,
            before: Vec::new(),
        }
    }

    /// The head, to be changed in a part.
    fn edit(&mut self) -> Result<(&mut H, &mut Vec<Before>), EditError> {
        if self.here {
            Ok((&mut self.head, &mut self.before))
        } else {
            Err(EditError::Sent)
        }
    }

    /// Changes a field, if it may be changed and there is room.
    fn change(&mut self, name: HeaderName, change: Change) -> Result<(), EditError> {
        let (head, before) = self.edit()?;
        let headers = head.headers();
        let known = before
            .iter()
            .position(|before| matches!(before, Before::Field(known, _) if *known == name));
        // Looked up once: guests come here for each field, and to find one by its name takes longer than to compare it.
        let there = There::of(headers, &name, known.is_none());
        let is_there = !matches!(change, Change::Remove);
        let was = apply(headers, &name, change, there)?;
        match known {
            None => {
                if is_there || !was.is_empty() {
                    before.push(Before::Field(name, was));
                }
            }
            Some(at) => {
                let was_there = matches!(before.get(at), Some(Before::Field(_, was)) if !was.is_empty());
                if !is_there && !was_there {
                    before.swap_remove(at);
                }
            }
        }
        Ok(())
    }

    /// What the call changed holds.
    pub(crate) fn keep(&mut self) {
        self.before.clear();
    }

    /// What the call changed doesn't hold.
    pub(crate) fn undo(&mut self) {
        for before in self.before.drain(..) {
            match before {
                Before::Field(name, values) => {
                    let headers = self.head.headers();
                    headers.remove(&name);
                    for value in values {
                        headers.append(&name, value);
                    }
                }
                before @ (Before::Path(_) | Before::Status(_)) => self.head.put_back(before),
            }
        }
    }
}

impl Message<RequestHead> {
    fn set_path(&mut self, path: PathAndQuery) -> Result<(), EditError> {
        let (head, before) = self.edit()?;
        // A guest may do it as often as it likes.
        if !before.iter().any(|before| matches!(before, Before::Path(_))) {
            before.push(Before::Path(head.path.clone()));
        }
        head.path = path;
        Ok(())
    }
}

impl Message<ResponseHead> {
    fn set_status(&mut self, status: StatusCode) -> Result<(), EditError> {
        let (head, before) = self.edit()?;
        if !before.iter().any(|before| matches!(before, Before::Status(_))) {
            before.push(Before::Status(head.status));
        }
        head.status = status;
        Ok(())
    }
}

impl Passing {
    pub(crate) const fn new(facts: Facts, request: Message<RequestHead>) -> Self {
        Self {
            facts,
            request,
            response: None,
            notes: Vec::new(),
        }
    }

    pub(crate) fn keep(&mut self) {
        self.request.keep();
        if let Some(response) = &mut self.response {
            response.keep();
        }
    }

    pub(crate) fn undo(&mut self) {
        self.request.undo();
        if let Some(response) = &mut self.response {
            response.undo();
        }
    }

    fn note(&mut self, key: String, value: Vec<u8>) -> bool {
        let others = self.notes.iter().filter(|(k, _)| *k != key);
        let noted: usize = others.clone().map(|(k, v)| k.len() + v.len()).sum();
        if others.count() >= MAX_NOTES || noted + key.len() + value.len() > MAX_NOTED {
            return false;
        }
        match self.notes.iter_mut().find(|(k, _)| *k == key) {
            Some((_, kept)) => *kept = value,
            None => self.notes.push((key, value)),
        }
        true
    }
}

/// What a change does to a field.
enum Change {
    Set(Vec<u8>),
    Add(Vec<u8>),
    Remove,
}

/// What is in a head when a field of it is changed.
#[derive(Default)]
struct There {
    /// Other fields, and bytes of their names and values.
    others: (usize, usize),
    /// The same of the field, which may be there more than once.
    own: (usize, usize),
    /// The field's values, if they are to be remembered.
    was: Vec<HeaderValue>,
}

impl There {
    fn of(headers: &HeaderMap, name: &HeaderName, remembers: bool) -> Self {
        let mut there = Self::default();
        for (other, value) in headers {
            let is_own = other == name;
            let (fields, bytes) = if is_own { &mut there.own } else { &mut there.others };
            *fields += 1;
            *bytes += other.as_str().len() + value.len();
            if is_own && remembers {
                there.was.push(value.clone());
            }
        }
        there
    }
}

/// Changes a field; gives what there was of it.
fn apply(
    headers: &mut HeaderMap,
    name: &HeaderName,
    change: Change,
    there: There,
) -> Result<Vec<HeaderValue>, EditError> {
    let (value, replaces) = match change {
        Change::Remove => {
            if there.own.0 > 0 {
                headers.remove(name);
            }
            return Ok(there.was);
        }
        Change::Set(value) => (value, true),
        Change::Add(value) => (value, false),
    };
    let value = HeaderValue::from_maybe_shared(Bytes::from(value)).map_err(|_| EditError::Invalid)?;
    let (mut fields, mut bytes) = (there.others.0 + 1, there.others.1);
    bytes += name.as_str().len() + value.len();
    if !replaces {
        fields += there.own.0;
        bytes += there.own.1;
    }
    if fields > MAX_FIELDS || bytes > MAX_HEADERS {
        return Err(EditError::TooLarge);
    }
    if replaces {
        headers.insert(name, value);
    } else {
        headers.append(name, value);
    }
    Ok(there.was)
}

impl State {
    /// The name of a field that the plugin may change.
    fn field(&mut self, name: &str) -> Result<HeaderName, EditError> {
        match self.names.of(name) {
            Some(field) if field.may_change => Ok(field.name),
            None if !name.starts_with(':') => Err(EditError::Invalid),
            Some(_) | None => Err(EditError::Forbidden),
        }
    }

    fn change_request(&mut self, name: &str, change: Change) -> Edited {
        let field = self.field(name);
        let request = self.request()?;
        Ok(field.and_then(|field| request.change(field, change)))
    }

    fn change_response(&mut self, name: &str, change: Change) -> Edited {
        let field = self.field(name);
        let response = self.response()?;
        Ok(field.and_then(|field| response.change(field, change)))
    }

    fn values(
        &mut self,
        name: &str,
        of: impl FnOnce(&mut Self) -> Result<&HeaderMap, Error>,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let field = self.names.of(name);
        let headers = of(self)?;
        Ok(field.map_or_else(Vec::new, |field| convert::values(headers, field.name)))
    }

    fn passing(&mut self) -> Result<&mut Passing, Error> {
        match &mut self.subject {
            Subject::Passing(passing) => Ok(passing),
            // Handles don't outlive a call.
            Subject::None | Subject::Failure(_) => Err(Error::msg("there is no request")),
        }
    }

    fn request(&mut self) -> Result<&mut Message<RequestHead>, Error> {
        Ok(&mut self.passing()?.request)
    }

    fn response(&mut self) -> Result<&mut Message<ResponseHead>, Error> {
        let response = self.passing()?.response.as_mut();
        response.ok_or_else(|| Error::msg("there is no answer"))
    }
}

/// What an edit comes to.
type Edited = Result<Result<(), EditError>, Error>;

impl passing::Host for State {}

impl passing::HostRequestHead for State {
    fn method(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.request()?.head.method.as_str().to_owned())
    }

    fn path(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.request()?.head.path.path().to_owned())
    }

    fn query(&mut self, _: Resource<RequestPassing>) -> Result<Option<String>, Error> {
        Ok(self.request()?.head.path.query().map(str::to_owned))
    }

    fn set_path(&mut self, _: Resource<RequestPassing>, path_and_query: String) -> Edited {
        let request = self.request()?;
        let Some(path) = super::calls::path(&path_and_query) else {
            return Ok(Err(EditError::Invalid));
        };
        Ok(request.set_path(path))
    }

    fn authority(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.request()?.head.authority.to_string())
    }

    fn header(&mut self, _: Resource<RequestPassing>, name: String) -> Result<Vec<Vec<u8>>, Error> {
        self.values(&name, |state| Ok(&state.request()?.head.headers))
    }

    fn headers(&mut self, _: Resource<RequestPassing>) -> Result<Vec<passing::Header>, Error> {
        Ok(convert::headers(&self.request()?.head.headers))
    }

    fn set_header(&mut self, _: Resource<RequestPassing>, name: String, value: Vec<u8>) -> Edited {
        self.change_request(&name, Change::Set(value))
    }

    fn add_header(&mut self, _: Resource<RequestPassing>, name: String, value: Vec<u8>) -> Edited {
        self.change_request(&name, Change::Add(value))
    }

    fn remove_header(&mut self, _: Resource<RequestPassing>, name: String) -> Edited {
        self.change_request(&name, Change::Remove)
    }

    fn service(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.passing()?.facts.service.to_string())
    }

    fn route(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.passing()?.facts.route.to_string())
    }

    fn zone(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.passing()?.facts.zone.to_string())
    }

    fn peer(&mut self, _: Resource<RequestPassing>) -> Result<Option<String>, Error> {
        Ok(self.passing()?.facts.peer.as_ref().map(ToString::to_string))
    }

    fn config(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.passing()?.facts.config.to_string())
    }

    fn note(&mut self, _: Resource<RequestPassing>, key: String) -> Result<Option<Vec<u8>>, Error> {
        let notes = &self.passing()?.notes;
        let note = notes.iter().find(|(noted, _)| *noted == key);
        Ok(note.map(|(_, value)| value.clone()))
    }

    fn set_note(&mut self, _: Resource<RequestPassing>, key: String, value: Vec<u8>) -> Result<bool, Error> {
        Ok(self.passing()?.note(key, value))
    }

    fn drop(&mut self, _: Resource<RequestPassing>) -> Result<(), Error> {
        Ok(())
    }
}

impl passing::HostResponseHead for State {
    fn status(&mut self, _: Resource<ResponsePassing>) -> Result<u16, Error> {
        Ok(self.response()?.head.status.as_u16())
    }

    fn set_status(&mut self, _: Resource<ResponsePassing>, status: u16) -> Edited {
        let response = self.response()?;
        let Some(status) = convert::status(status) else {
            return Ok(Err(EditError::Invalid));
        };
        Ok(response.set_status(status))
    }

    fn header(&mut self, _: Resource<ResponsePassing>, name: String) -> Result<Vec<Vec<u8>>, Error> {
        self.values(&name, |state| Ok(&state.response()?.head.headers))
    }

    fn headers(&mut self, _: Resource<ResponsePassing>) -> Result<Vec<passing::Header>, Error> {
        Ok(convert::headers(&self.response()?.head.headers))
    }

    fn set_header(&mut self, _: Resource<ResponsePassing>, name: String, value: Vec<u8>) -> Edited {
        self.change_response(&name, Change::Set(value))
    }

    fn add_header(&mut self, _: Resource<ResponsePassing>, name: String, value: Vec<u8>) -> Edited {
        self.change_response(&name, Change::Add(value))
    }

    fn remove_header(&mut self, _: Resource<ResponsePassing>, name: String) -> Edited {
        self.change_response(&name, Change::Remove)
    }

    fn drop(&mut self, _: Resource<ResponsePassing>) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Edit {
        Set(u8, u8),
        Add(u8, u8),
        Remove(u8),
        Path(u8),
    }

    fn edit() -> impl Strategy<Value = Edit> {
        prop_oneof![
            (0..6u8, 0..4u8).prop_map(|(name, value)| Edit::Set(name, value)),
            (0..6u8, 0..4u8).prop_map(|(name, value)| Edit::Add(name, value)),
            (0..6u8).prop_map(Edit::Remove),
            (0..4u8).prop_map(Edit::Path),
        ]
    }

    fn path(of: u8) -> PathAndQuery {
        format!("/{of}").parse().unwrap()
    }

    /// Fields by name, and the path.
    fn seen(head: &RequestHead) -> (BTreeMap<String, Vec<String>>, String) {
        let mut fields = BTreeMap::<_, Vec<_>>::new();
        for (name, value) in &head.headers {
            let value = value.to_str().unwrap().to_owned();
            fields.entry(name.as_str().to_owned()).or_default().push(value);
        }
        (fields, head.path.to_string())
    }

    proptest! {
        #[test]
        fn what_a_call_changed_is_undone_to_what_it_was(
            fields in proptest::collection::vec((0..6u8, 0..4u8), 0..8),
            kept in proptest::collection::vec(edit(), 0..10),
            undone in proptest::collection::vec(edit(), 0..40),
        ) {
            let mut head = RequestHead {
                method: Method::GET,
                scheme: "http",
                authority: "a".into(),
                path: path(0),
                headers: HeaderMap::new(),
            };
            for (name, value) in fields {
                let name: HeaderName = format!("x-{name}").parse().unwrap();
                head.headers.append(name, HeaderValue::from(u16::from(value)));
            }
            let mut message = Message::new(head, true);
            let make = |edits: Vec<Edit>, message: &mut Message<RequestHead>| {
                for edit in edits {
                    let (name, change) = match edit {
                        Edit::Set(name, value) => (name, Change::Set(value.to_string().into())),
                        Edit::Add(name, value) => (name, Change::Add(value.to_string().into())),
                        Edit::Remove(name) => (name, Change::Remove),
                        Edit::Path(to) => {
                            message.set_path(path(to)).unwrap();
                            continue;
                        }
                    };
                    message.change(format!("x-{name}").parse().unwrap(), change).unwrap();
                    // What is remembered is bounded by what is, or was, there.
                    assert!(message.before.len() <= 6 + 1);
                }
            };
            make(kept, &mut message);
            message.keep();
            let was = seen(&message.head);
            make(undone, &mut message);
            message.undo();
            prop_assert_eq!(seen(&message.head), was);
            prop_assert!(message.before.is_empty());
        }
    }

    #[test]
    fn names_that_come_and_go_are_not_remembered() {
        let head = ResponseHead {
            status: StatusCode::OK,
            headers: HeaderMap::new(),
        };
        let mut message = Message::new(head, true);
        for name in 0..1000 {
            let name: HeaderName = format!("x-{name}").parse().unwrap();
            message.change(name.clone(), Change::Set(vec![b'v'])).unwrap();
            message.change(name, Change::Remove).unwrap();
        }
        assert!(message.before.is_empty());
    }
}
