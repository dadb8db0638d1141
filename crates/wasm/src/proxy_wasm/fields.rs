//! Heads as a guest sees and changes them: fields, and among them what HTTP/2 has as fields whose names begin with a colon.

use super::abi::{MAX_FIELDS, MAX_HEADERS, Pair, Status};
use crate::call::{RequestHead, ResponseHead};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use std::mem;

/// A head that fields can be read from.
#[derive(Clone, Copy)]
pub(crate) enum Fields<'a> {
    Request(&'a RequestHead),
    Response(&'a StatusCode, &'a HeaderMap),
    Plain(&'a HeaderMap),
}

impl<'a> From<&'a ResponseHead> for Fields<'a> {
    fn from(head: &'a ResponseHead) -> Self {
        Self::Response(&head.status, &head.headers)
    }
}

impl<'a> Fields<'a> {
    const fn headers(self) -> &'a HeaderMap {
        match self {
            Self::Request(head) => &head.headers,
            Self::Response(_, headers) | Self::Plain(headers) => headers,
        }
    }

    /// The first value of a field.
    pub(crate) fn value(self, name: &[u8]) -> Option<&'a [u8]> {
        if name.first() == Some(&b':') {
            return self
                .pseudo()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| value);
        }
        // What is no name is the name of no field.
        let name = HeaderName::from_bytes(name).ok()?;
        match (self.headers().get(&name), self) {
            (Some(value), _) => Some(value.as_bytes()),
            (None, Self::Request(head)) if name == header::HOST => Some(head.authority.as_bytes()),
            (None, Self::Request(_) | Self::Response(..) | Self::Plain(_)) => None,
        }
    }

    /// What goes before the fields.
    fn pseudo(self) -> impl Iterator<Item = Pair<'a>> {
        let of_request = |head: &'a RequestHead| {
            [
                (&b":authority"[..], head.authority.as_bytes()),
                (b":path", head.path.as_str().as_bytes()),
                (b":method", head.method.as_str().as_bytes()),
                (b":scheme", head.scheme.as_bytes()),
            ]
        };
        let (request, status) = match self {
            Self::Request(head) => (Some(of_request(head)), None),
            Self::Response(status, _) => (None, Some((&b":status"[..], status.as_str().as_bytes()))),
            Self::Plain(_) => (None, None),
        };
        request.into_iter().flatten().chain(status)
    }

    /// All fields, those with a colon first.
    pub(crate) fn pairs(self) -> Vec<Pair<'a>> {
        let fields = self.headers().iter();
        let fields = fields.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
        self.pseudo().chain(fields).collect()
    }

    /// How many fields there are, those with a colon too.
    pub(crate) fn count(self) -> u32 {
        let pseudo = match self {
            Self::Request(_) => 4,
            Self::Response(..) => 1,
            Self::Plain(_) => 0,
        };
        u32::try_from(pseudo + self.headers().len()).unwrap_or(u32::MAX)
    }
}

/// A head that can be changed.
pub(crate) enum FieldsMut<'a> {
    Request(&'a mut RequestHead),
    Response(&'a mut ResponseHead),
    Plain(&'a mut HeaderMap),
}

/// What is done to a field.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change<'a> {
    Add(&'a [u8]),
    Replace(&'a [u8]),
    Remove,
}

/// What has to be done to have a head as it was before a call.
#[derive(Debug)]
pub(crate) enum Undo {
    Field(HeaderName, Vec<HeaderValue>),
    Headers(HeaderMap),
    Path(PathAndQuery),
    Status(StatusCode),
}

impl FieldsMut<'_> {
    const fn headers(&mut self) -> &mut HeaderMap {
        match self {
            Self::Request(head) => &mut head.headers,
            Self::Response(head) => &mut head.headers,
            Self::Plain(headers) => headers,
        }
    }

    /// Changes a field.
    ///
    /// # Errors
    ///
    /// [`Status::BadArgument`] if it is not valid, or not a plugin's to set, or there is no room.
    pub(crate) fn change(
        &mut self,
        name: &[u8],
        change: Change<'_>,
        undo: &mut Vec<Undo>,
    ) -> Result<(), Status> {
        let bad = Status::BadArgument;
        let is_host = matches!(self, Self::Request(_)) && name.eq_ignore_ascii_case(b"host");
        let name = if is_host { b":authority" } else { name };
        if name.first() == Some(&b':') {
            return match change {
                Change::Add(value) | Change::Replace(value) => self.set_pseudo(name, value, undo),
                Change::Remove => Err(bad),
            };
        }
        let name = HeaderName::from_bytes(name).map_err(|_| bad)?;
        let headers = self.headers();
        let (value, replaces) = match change {
            Change::Remove => {
                let before: Vec<_> = headers.get_all(&name).iter().cloned().collect();
                if before.is_empty() {
                    return Ok(());
                }
                if !is_dropped(&name) && !is_of_guests(&name) {
                    return Err(bad);
                }
                headers.remove(&name);
                undo.push(Undo::Field(name, before));
                return Ok(());
            }
            Change::Add(value) => (value, false),
            Change::Replace(value) => (value, true),
        };
        let value = HeaderValue::from_bytes(value).map_err(|_| bad)?;
        if is_dropped(&name) {
            return Ok(());
        }
        if !is_of_guests(&name) {
            return Err(bad);
        }
        let mut bytes = name.as_str().len() + value.len();
        for (name, value) in &*headers {
            bytes += name.as_str().len() + value.len();
        }
        if headers.len() >= MAX_FIELDS || bytes > MAX_HEADERS {
            return Err(bad);
        }
        let before = headers.get_all(&name).iter().cloned().collect();
        undo.push(Undo::Field(name.clone(), before));
        if replaces {
            headers.insert(name, value);
        } else {
            headers.append(name, value);
        }
        Ok(())
    }

    /// Has these fields and no others. What begins with a colon stays where the list doesn't have it; and what is not a guest's
    /// to set stays whatever the list has, since guests hand over what they were given.
    ///
    /// # Errors
    ///
    /// As for [`FieldsMut::change`]; then nothing has changed.
    pub(crate) fn set_all(&mut self, pairs: &[Pair<'_>], undo: &mut Vec<Undo>) -> Result<(), Status> {
        let (is_request, is_new) = (matches!(self, Self::Request(_)), matches!(self, Self::Plain(_)));
        let stays = |name: &HeaderName| {
            is_request && *name == header::HOST || !is_new && !is_dropped(name) && !is_of_guests(name)
        };
        let headers = self.headers();
        let before = mem::take(headers);
        for (name, value) in before.iter().filter(|(name, _)| stays(name)) {
            headers.append(name, value.clone());
        }
        let mut changes = vec![Undo::Headers(before)];
        let mut others = pairs.iter().filter(|(name, _)| {
            let name = HeaderName::from_bytes(name);
            // What is no name is refused below.
            name.as_ref()
                .map_or(true, |name| *name == header::HOST || !stays(name))
        });
        let changed =
            others.try_for_each(|(name, value)| self.change(name, Change::Add(value), &mut changes));
        if changed.is_err() {
            self.undo(&mut changes);
        }
        undo.append(&mut changes);
        changed
    }

    fn set_pseudo(&mut self, name: &[u8], value: &[u8], undo: &mut Vec<Undo>) -> Result<(), Status> {
        let bad = Status::BadArgument;
        let text = str::from_utf8(value).map_err(|_| bad)?;
        match self {
            Self::Request(head) => {
                let is = match name {
                    b":path" => {
                        let path = path(text).ok_or(bad)?;
                        undo.push(Undo::Path(mem::replace(&mut head.path, path)));
                        return Ok(());
                    }
                    b":method" => head.method.as_str(),
                    b":scheme" => head.scheme,
                    b":authority" => &*head.authority,
                    _ => return Err(bad),
                };
                // These are the proxy's; but guests hand over what they were given.
                if text != is {
                    return Err(bad);
                }
            }
            Self::Response(head) => {
                if name != b":status" {
                    return Err(bad);
                }
                let status = text.parse().ok().and_then(status).ok_or(bad)?;
                undo.push(Undo::Status(mem::replace(&mut head.status, status)));
            }
            Self::Plain(_) => return Err(bad),
        }
        Ok(())
    }

    /// Has everything as it was.
    pub(crate) fn undo(&mut self, undo: &mut Vec<Undo>) {
        while let Some(change) = undo.pop() {
            match (change, &mut *self) {
                (Undo::Field(name, values), _) => {
                    let headers = self.headers();
                    headers.remove(&name);
                    for value in values {
                        headers.append(&name, value);
                    }
                }
                (Undo::Headers(headers), _) => *self.headers() = headers,
                (Undo::Path(path), Self::Request(head)) => head.path = path,
                (Undo::Status(status), Self::Response(head)) => head.status = status,
                // Made for another kind of head.
                (Undo::Path(_) | Undo::Status(_), Self::Request(_) | Self::Response(_) | Self::Plain(_)) => {}
            }
        }
    }
}

/// Whether a field is a guest's to set or remove.
fn is_of_guests(name: &HeaderName) -> bool {
    leeward_policy::may_be_in_an_answer(name.as_str())
}

/// What a plugin may say, and the proxy knows better: the length of a body.
pub(crate) fn is_dropped(name: &HeaderName) -> bool {
    *name == header::CONTENT_LENGTH
}

/// Path and query, if this is one that can be sent as it is.
pub(crate) fn path(text: &str) -> Option<PathAndQuery> {
    // What follows a "#" would be dropped without a word.
    let sent_as_it_is = text.starts_with('/') && !text.contains('#');
    sent_as_it_is.then(|| text.parse().ok()).flatten()
}

/// A status that an answer may have.
pub(crate) fn status(number: u32) -> Option<StatusCode> {
    let number = u16::try_from(number).ok()?;
    let valid = (200..=599).contains(&number);
    valid.then(|| StatusCode::from_u16(number).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;

    fn request() -> RequestHead {
        let mut headers = HeaderMap::new();
        headers.append("a", HeaderValue::from_static("1"));
        headers.append("a", HeaderValue::from_static("2"));
        RequestHead {
            method: Method::GET,
            scheme: "http",
            authority: "shop:80".into(),
            path: PathAndQuery::from_static("/p?q=1"),
            headers,
        }
    }

    #[track_caller]
    fn change(head: &mut RequestHead, name: &str, change: Change<'_>, want: Result<(), Status>) -> Vec<Undo> {
        let mut undo = Vec::new();
        assert_eq!(
            FieldsMut::Request(head).change(name.as_bytes(), change, &mut undo),
            want,
            "{name}"
        );
        undo
    }

    fn value(head: &RequestHead, name: &str) -> Option<String> {
        let value = Fields::Request(head).value(name.as_bytes())?;
        Some(String::from_utf8(value.to_vec()).unwrap())
    }

    #[test]
    fn what_goes_before_the_fields_is_read_and_set_as_fields() {
        let mut head = request();
        change(&mut head, ":path", Change::Replace(b"/other"), Ok(()));
        for (name, is) in [
            (":method", "GET"),
            (":path", "/other"),
            (":authority", "shop:80"),
            (":scheme", "http"),
            ("host", "shop:80"),
        ] {
            assert_eq!(value(&head, name).as_deref(), Some(is));
            change(&mut head, name, Change::Replace(is.as_bytes()), Ok(()));
            assert_eq!(value(&head, name).as_deref(), Some(is));
        }
        for (name, bad) in [
            (":method", "POST"),
            (":path", "other"),
            (":path", "/a b"),
            (":path", "/a#b"),
            (":path", "/\u{0}"),
            (":authority", "else"),
            ("host", "else"),
            (":scheme", "https"),
            (":status", "200"),
            (":other", "x"),
        ] {
            change(
                &mut head,
                name,
                Change::Replace(bad.as_bytes()),
                Err(Status::BadArgument),
            );
        }
        change(&mut head, ":path", Change::Remove, Err(Status::BadArgument));
        assert_eq!(value(&head, ":path").as_deref(), Some("/other"));
        let mut answer = ResponseHead {
            status: StatusCode::OK,
            headers: HeaderMap::new(),
        };
        for (status, want) in [("404", 404), ("101", 404), ("600", 404), ("x", 404)] {
            let set = FieldsMut::Response(&mut answer).change(
                b":status",
                Change::Replace(status.as_bytes()),
                &mut Vec::new(),
            );
            assert_eq!(set.is_ok(), status == "404");
            assert_eq!(answer.status.as_u16(), want);
        }
    }

    #[test]
    fn what_frames_a_message_or_ends_a_line_is_refused() {
        for (name, value) in [
            ("transfer-encoding", &b"chunked"[..]),
            ("Connection", b"close"),
            ("leeward-reason", b"x"),
            ("a b", b"x"),
            ("", b"x"),
            ("x", b"a\r\nset-cookie: b"),
            ("x", b"a\0"),
        ] {
            let head = &mut request();
            change(head, name, Change::Add(value), Err(Status::BadArgument));
            change(head, name, Change::Replace(value), Err(Status::BadArgument));
            assert_eq!(head.headers, request().headers);
        }
        let mut head = request();
        change(&mut head, "content-length", Change::Replace(b"5"), Ok(()));
        assert_eq!(value(&head, "content-length"), None, "the proxy knows it");
    }

    #[test]
    fn what_is_handed_back_as_it_was_is_as_it_was() {
        for host in [None, Some("shop:80")] {
            let mut head = request();
            let own = [
                ("te", "trailers"),
                ("connection", "close"),
                ("leeward-plugin-depth", "1"),
            ];
            for (name, value) in own.into_iter().chain(host.map(|host| ("host", host))) {
                head.headers.append(name, HeaderValue::from_static(value));
            }
            let before = head.headers.clone();
            let given = head.clone();
            let mut undo = Vec::new();
            let pairs = Fields::Request(&given).pairs();
            assert_eq!(FieldsMut::Request(&mut head).set_all(&pairs, &mut undo), Ok(()));
            let sorted = |headers: &HeaderMap| {
                let mut all: Vec<_> = headers.iter().map(|(n, v)| (n.to_string(), v.clone())).collect();
                all.sort();
                all
            };
            assert_eq!(sorted(&head.headers), sorted(&before));
            assert_eq!(
                (&head.method, &*head.authority),
                (&given.method, &*given.authority)
            );
            // Nor does a list without them, or with others in their place, change them.
            let pairs: [Pair<'_>; 3] = [(b"b", b"2"), (b"te", b"other"), (b"leeward-plugin-depth", b"0")];
            assert_eq!(FieldsMut::Request(&mut head).set_all(&pairs, &mut undo), Ok(()));
            assert_eq!(value(&head, "te").as_deref(), Some("trailers"));
            assert_eq!(value(&head, "leeward-plugin-depth").as_deref(), Some("1"));
            assert_eq!(head.headers.contains_key("host"), host.is_some());
            assert_eq!(
                (value(&head, "b").as_deref(), value(&head, "a")),
                (Some("2"), None)
            );
            let other: [Pair<'_>; 1] = [(b"host", b"other")];
            assert_eq!(
                FieldsMut::Request(&mut head).set_all(&other, &mut undo),
                Err(Status::BadArgument)
            );
        }
    }

    #[test]
    fn what_is_the_proxys_stays() {
        let mut head = request();
        for name in ["te", "connection", "leeward-plugin-depth"] {
            change(&mut head, name, Change::Remove, Ok(()));
            head.headers.append(name, HeaderValue::from_static("x"));
            change(&mut head, name, Change::Remove, Err(Status::BadArgument));
            assert_eq!(value(&head, name).as_deref(), Some("x"));
        }
        head.headers
            .append("content-length", HeaderValue::from_static("5"));
        change(&mut head, "content-length", Change::Remove, Ok(()));
        assert_eq!(value(&head, "content-length"), None);
    }

    #[test]
    fn there_is_room_for_so_much() {
        let mut head = request();
        change(
            &mut head,
            "big",
            Change::Add(&vec![b'a'; MAX_HEADERS]),
            Err(Status::BadArgument),
        );
        for n in 2..MAX_FIELDS {
            change(&mut head, &format!("x-{n}"), Change::Add(b"1"), Ok(()));
        }
        change(&mut head, "more", Change::Add(b"1"), Err(Status::BadArgument));
    }

    #[test]
    fn what_a_failed_call_changed_is_undone() {
        let mut head = request();
        let mut undo = Vec::new();
        for (name, change) in [
            ("a", Change::Replace(&b"3"[..])),
            ("a", Change::Add(b"4")),
            ("b", Change::Add(b"5")),
            ("a", Change::Remove),
            (":path", Change::Replace(b"/x")),
        ] {
            FieldsMut::Request(&mut head)
                .change(name.as_bytes(), change, &mut undo)
                .unwrap();
        }
        let all: [(&[u8], &[u8]); 2] = [(b":path", b"/y"), (b"c", b"6")];
        FieldsMut::Request(&mut head).set_all(&all, &mut undo).unwrap();
        assert_eq!((head.headers.len(), head.path.as_str()), (1, "/y"));
        let bad: [(&[u8], &[u8]); 2] = [(b"d", b"7"), (b"e", b"\n")];
        assert!(FieldsMut::Request(&mut head).set_all(&bad, &mut undo).is_err());
        assert_eq!(value(&head, "c").as_deref(), Some("6"));
        FieldsMut::Request(&mut head).undo(&mut undo);
        assert_eq!(head.headers, request().headers);
        assert_eq!(
            (&head.method, head.path.as_str(), &*head.authority, head.scheme),
            (&Method::GET, "/p?q=1", "shop:80", "http")
        );
    }
}
