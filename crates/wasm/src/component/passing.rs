//! Heads on their way, as the worlds `filter` and `router` see and change them.

use super::bindings::filter::leeward::plugin::passing;
use super::bindings::filter::leeward::plugin::passing::EditError;
use super::convert::{self, MAX_HEADERS};
use super::state::{State, Subject};
use crate::call::{Facts, RequestHead, ResponseHead};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
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
    /// As it was before this call; only there once it was changed.
    before: Option<H>,
}

impl<H: Clone> Message<H> {
    pub(crate) const fn new(head: H, here: bool) -> Self {
        Self {
            head,
            here,
            before: None,
        }
    }

    /// The head, to be changed.
    fn edit(&mut self) -> Result<&mut H, EditError> {
        if !self.here {
            return Err(EditError::Sent);
        }
        if self.before.is_none() {
            self.before = Some(self.head.clone());
        }
        Ok(&mut self.head)
    }

    /// What the call changed holds.
    pub(crate) fn keep(&mut self) {
        self.before = None;
    }

    /// What the call changed doesn't hold.
    pub(crate) fn undo(&mut self) {
        if let Some(before) = self.before.take() {
            self.head = before;
        }
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

/// Changes a field, if it may be changed and there is room.
fn change(headers: &mut HeaderMap, name: &HeaderName, change: Change) -> Result<(), EditError> {
    let (value, replaces) = match change {
        Change::Remove => {
            headers.remove(name);
            return Ok(());
        }
        Change::Set(value) => (value, true),
        Change::Add(value) => (value, false),
    };
    let value = HeaderValue::from_maybe_shared(Bytes::from(value)).map_err(|_| EditError::Invalid)?;
    let (mut fields, mut bytes) = (1, name.as_str().len() + value.len());
    for (other, value) in &*headers {
        if !(replaces && other == name) {
            fields += 1;
            bytes += other.as_str().len() + value.len();
        }
    }
    if fields > MAX_FIELDS || bytes > MAX_HEADERS {
        return Err(EditError::TooLarge);
    }
    if replaces {
        headers.insert(name, value);
    } else {
        headers.append(name, value);
    }
    Ok(())
}

/// The name of a field that a plugin may change.
fn field(name: &str) -> Result<HeaderName, EditError> {
    if name.starts_with(':') {
        return Err(EditError::Forbidden);
    }
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| EditError::Invalid)?;
    if name == header::HOST || !leeward_policy::may_be_in_an_answer(name.as_str()) {
        return Err(EditError::Forbidden);
    }
    Ok(name)
}

fn change_request(request: &mut Message<RequestHead>, name: &str, what: Change) -> Result<(), EditError> {
    let name = field(name)?;
    change(&mut request.edit()?.headers, &name, what)
}

fn change_response(response: &mut Message<ResponseHead>, name: &str, what: Change) -> Result<(), EditError> {
    let name = field(name)?;
    change(&mut response.edit()?.headers, &name, what)
}

impl State {
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
        Ok(request.edit().map(|head| head.path = path))
    }

    fn authority(&mut self, _: Resource<RequestPassing>) -> Result<String, Error> {
        Ok(self.request()?.head.authority.to_string())
    }

    fn header(&mut self, _: Resource<RequestPassing>, name: String) -> Result<Vec<Vec<u8>>, Error> {
        Ok(convert::values(&self.request()?.head.headers, &name))
    }

    fn headers(&mut self, _: Resource<RequestPassing>) -> Result<Vec<passing::Header>, Error> {
        Ok(convert::headers(&self.request()?.head.headers))
    }

    fn set_header(&mut self, _: Resource<RequestPassing>, name: String, value: Vec<u8>) -> Edited {
        Ok(change_request(self.request()?, &name, Change::Set(value)))
    }

    fn add_header(&mut self, _: Resource<RequestPassing>, name: String, value: Vec<u8>) -> Edited {
        Ok(change_request(self.request()?, &name, Change::Add(value)))
    }

    fn remove_header(&mut self, _: Resource<RequestPassing>, name: String) -> Edited {
        Ok(change_request(self.request()?, &name, Change::Remove))
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
        Ok(response.edit().map(|head| head.status = status))
    }

    fn header(&mut self, _: Resource<ResponsePassing>, name: String) -> Result<Vec<Vec<u8>>, Error> {
        Ok(convert::values(&self.response()?.head.headers, &name))
    }

    fn headers(&mut self, _: Resource<ResponsePassing>) -> Result<Vec<passing::Header>, Error> {
        Ok(convert::headers(&self.response()?.head.headers))
    }

    fn set_header(&mut self, _: Resource<ResponsePassing>, name: String, value: Vec<u8>) -> Edited {
        Ok(change_response(self.response()?, &name, Change::Set(value)))
    }

    fn add_header(&mut self, _: Resource<ResponsePassing>, name: String, value: Vec<u8>) -> Edited {
        Ok(change_response(self.response()?, &name, Change::Add(value)))
    }

    fn remove_header(&mut self, _: Resource<ResponsePassing>, name: String) -> Edited {
        Ok(change_response(self.response()?, &name, Change::Remove))
    }

    fn drop(&mut self, _: Resource<ResponsePassing>) -> Result<(), Error> {
        Ok(())
    }
}
