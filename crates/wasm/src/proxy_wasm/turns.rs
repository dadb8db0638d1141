//! What a machine does for a request: it has its guest called with heads, bodies and trailers, and says what becomes of them.

use super::abi::Way;
use super::context::{At, Body, Http};
use super::fields::Fields;
use super::machine::{Machine, Slot};
use crate::call::{RequestHead, ResponseHead};
use crate::fault::Fault;
use crate::filter::Step;
use bytes::Bytes;
use http::HeaderMap;
use std::mem;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Notify;

/// A head.
pub(crate) enum Head {
    Request(RequestHead),
    Response(ResponseHead),
}

/// What a turn has come to.
pub(crate) struct Turned {
    pub(crate) way: Way,
    pub(crate) step: Result<Step, Fault>,
    /// The number of the request's context.
    pub(crate) context: Option<u32>,
    /// What goes on; after a fault, what there was before it.
    pub(crate) head: Option<Head>,
    pub(crate) body: Body,
    pub(crate) trailers: Option<HeaderMap>,
    /// While the message is held up: is woken when the guest has something to say.
    pub(crate) wake: Option<Arc<Notify>>,
    pub(crate) wants: Wants,
}

/// What a guest is to be given.
#[derive(Clone, Copy, Default)]
pub(crate) struct Wants {
    pub(crate) request_body: bool,
    pub(crate) response: bool,
    pub(crate) response_body: bool,
}

impl Turned {
    pub(crate) fn new(way: Way, step: Result<Step, Fault>) -> Self {
        Self {
            way,
            step,
            context: None,
            head: None,
            body: Body::default(),
            trailers: None,
            wake: None,
            wants: Wants::default(),
        }
    }
}

impl Head {
    pub(crate) const fn way(&self) -> Way {
        match self {
            Self::Request(_) => Way::Request,
            Self::Response(_) => Way::Response,
        }
    }
}

impl Http {
    fn put(&mut self, head: Head) {
        match head {
            Head::Request(head) => self.request = Some(head),
            Head::Response(head) => self.response = Some(head),
        }
    }

    fn head(&self, way: Way) -> Option<Head> {
        match way {
            Way::Request => self.request.clone().map(Head::Request),
            Way::Response => self.response.clone().map(Head::Response),
        }
    }

    fn count(&self, way: Way) -> u32 {
        let fields = match way {
            Way::Request => self.request.as_ref().map(Fields::Request),
            Way::Response => self.response.as_ref().map(Fields::from),
        };
        fields.map_or(0, Fields::count)
    }

    /// Lets all go that has come of a message.
    fn release(&mut self, way: Way) {
        let passing = self.way(way);
        (passing.sent, passing.shown, passing.held_at, passing.go) = (true, false, None, false);
        passing.undo.clear();
        let body = passing.body.take();
        passing.out.push(body);
    }

    /// Hands over what is to go on. The head stays to be read, until the request is over.
    fn hand_over(&mut self, turned: &mut Turned) {
        let way = turned.way;
        if self.passing(way).sent && !mem::replace(&mut self.way(way).taken, true) {
            turned.head = self.head(way);
        }
        let passing = self.way(way);
        turned.body = mem::take(&mut passing.out);
        turned.trailers.clone_from(&passing.trailers);
    }

    /// Hands over all that there is, as it was before the guest faulted.
    fn give_up(&mut self, turned: &mut Turned) {
        if !mem::replace(&mut self.way(turned.way).taken, true) {
            turned.head = self.head(turned.way);
        }
        let passing = self.way(turned.way);
        turned.body = mem::take(&mut passing.out);
        turned.body.push(passing.body.take());
        turned.trailers.clone_from(&passing.trailers);
    }
}

impl Slot {
    /// A head has come.
    pub(crate) async fn head(
        &mut self,
        machine: &Rc<Machine>,
        context: u32,
        head: Head,
        end: bool,
    ) -> Turned {
        let way = head.way();
        let Some(http) = self.http(context) else {
            let mut turned = self.turned(context, way, Err(Fault::Trap));
            turned.head = Some(head);
            return turned;
        };
        http.put(head);
        let count = http.count(way);
        let passing = http.way(way);
        (passing.complete, passing.go) = (end, false);
        let step = match way {
            Way::Request => {
                self.show_request(machine, context, (context, count, u32::from(end)))
                    .await
            }
            Way::Response => {
                self.show_response(machine, context, (context, count, u32::from(end)))
                    .await
            }
        };
        let step = step.and_then(|action| self.after(context, way, At::Head, action));
        self.turned(context, way, step)
    }

    async fn show_request(
        &mut self,
        machine: &Rc<Machine>,
        context: u32,
        params: (u32, u32, u32),
    ) -> Result<Option<u32>, Fault> {
        let name = "proxy_on_request_headers";
        if self
            .exports()
            .is_some_and(|exports| exports.on_request_headers.with_end.is_some())
        {
            return self
                .call(machine, name, context, |e| &e.on_request_headers.with_end, params)
                .await;
        }
        let params = (params.0, params.1);
        self.call(machine, name, context, |e| &e.on_request_headers.without, params)
            .await
    }

    async fn show_response(
        &mut self,
        machine: &Rc<Machine>,
        context: u32,
        params: (u32, u32, u32),
    ) -> Result<Option<u32>, Fault> {
        let name = "proxy_on_response_headers";
        if self
            .exports()
            .is_some_and(|exports| exports.on_response_headers.with_end.is_some())
        {
            return self
                .call(
                    machine,
                    name,
                    context,
                    |e| &e.on_response_headers.with_end,
                    params,
                )
                .await;
        }
        let params = (params.0, params.1);
        self.call(machine, name, context, |e| &e.on_response_headers.without, params)
            .await
    }

    /// Some of a body has come.
    pub(crate) async fn body(
        &mut self,
        machine: &Rc<Machine>,
        context: u32,
        way: Way,
        data: Bytes,
        end: bool,
    ) -> Turned {
        let step = self.show_pieces(machine, context, way, data, end).await;
        self.turned(context, way, step)
    }

    async fn show_pieces(
        &mut self,
        machine: &Rc<Machine>,
        context: u32,
        way: Way,
        mut data: Bytes,
        end: bool,
    ) -> Result<Step, Fault> {
        let Some(http) = self.http(context) else {
            if let Some(http) = self.lost(context) {
                http.way(way).body.push(data);
            }
            return Err(Fault::Trap);
        };
        let passing = http.way(way);
        passing.size = passing.size.saturating_add(data.len() as u64);
        passing.complete = end;
        if passing.go {
            match passing.held_at {
                // What has come behind the head is shown with what comes now.
                Some(At::Head) => (passing.sent, passing.held_at, passing.go) = (true, None, false),
                Some(At::Body | At::Trailers) => http.release(way),
                None => {}
            }
        }
        let bound = self.state().map_or(0, |state| state.body_bound());
        loop {
            let http = self.http(context).ok_or(Fault::Trap)?;
            let passing = http.way(way);
            let room = bound.saturating_sub(passing.body.len()).min(data.len());
            if room == 0 && !data.is_empty() {
                passing.body.push(data);
                return Err(Fault::BodyTooLarge);
            }
            passing.body.push(data.split_to(room));
            if passing.held_at == Some(At::Head) {
                if data.is_empty() {
                    return Ok(Step::Wait);
                }
                continue;
            }
            let last = data.is_empty();
            match self.show_body(machine, context, way, last && end).await {
                Ok(Step::Go | Step::Wait) if !last => {}
                step => {
                    if let Some(http) = self.any(context) {
                        http.way(way).body.push(data);
                    }
                    return step;
                }
            }
        }
    }

    /// Shows the guest as much of a body as is here.
    async fn show_body(
        &mut self,
        machine: &Rc<Machine>,
        context: u32,
        way: Way,
        end: bool,
    ) -> Result<Step, Fault> {
        let http = self.http(context).ok_or(Fault::Trap)?;
        let passing = http.way(way);
        (passing.shown, passing.go) = (true, false);
        let len = u32::try_from(passing.body.len()).unwrap_or(u32::MAX);
        let params = (context, len, u32::from(end));
        let action = match way {
            Way::Request => {
                let name = "proxy_on_request_body";
                self.call(machine, name, context, |e| &e.on_request_body, params)
                    .await
            }
            Way::Response => {
                let name = "proxy_on_response_body";
                self.call(machine, name, context, |e| &e.on_response_body, params)
                    .await
            }
        };
        self.after(context, way, At::Body, action?)
    }

    /// The trailers have come, behind a body that was let go, or is held up where it ends.
    pub(crate) async fn trailers(
        &mut self,
        machine: &Rc<Machine>,
        context: u32,
        way: Way,
        trailers: HeaderMap,
    ) -> Turned {
        let Some(http) = self.http(context) else {
            let mut turned = self.turned(context, way, Err(Fault::Trap));
            turned.trailers = Some(trailers);
            return turned;
        };
        let passing = http.way(way);
        let count = Fields::Plain(&trailers).count();
        (passing.trailers, passing.complete) = (Some(trailers), true);
        if passing.go {
            http.release(way);
        }
        let params = (context, count);
        let action = match way {
            Way::Request => {
                let name = "proxy_on_request_trailers";
                self.call(machine, name, context, |e| &e.on_request_trailers, params)
                    .await
            }
            Way::Response => {
                let name = "proxy_on_response_trailers";
                self.call(machine, name, context, |e| &e.on_response_trailers, params)
                    .await
            }
        };
        let step = match action {
            // A guest that doesn't want them has the body still.
            Ok(None) if self.is_held(context, way) => Ok(Step::Wait),
            action => action.and_then(|action| self.after(context, way, At::Trailers, action)),
        };
        self.turned(context, way, step)
    }

    /// Looks whether the guest lets a message go that it holds up.
    pub(crate) async fn resume(&mut self, machine: &Rc<Machine>, context: u32, way: Way) -> Turned {
        let step = self.go_on(machine, context, way).await;
        self.turned(context, way, step)
    }

    async fn go_on(&mut self, machine: &Rc<Machine>, context: u32, way: Way) -> Result<Step, Fault> {
        let http = self.http(context).ok_or(Fault::Trap)?;
        if let Some(reply) = http.reply.take() {
            return Ok(Step::Respond(reply));
        }
        let passing = http.way(way);
        if !passing.go {
            return Ok(Step::Wait);
        }
        if passing.held_at == Some(At::Head) && passing.body.len() > 0 {
            (passing.sent, passing.held_at, passing.go) = (true, None, false);
            let end = passing.complete;
            return self.show_body(machine, context, way, end).await;
        }
        http.release(way);
        Ok(Step::Go)
    }

    /// Takes a message away from a guest that has held it up for too long.
    pub(crate) fn give_up(&mut self, context: u32, way: Way) -> Turned {
        self.turned(context, way, Err(Fault::Time))
    }

    /// What the guest's answer means for a message; no answer lets it go.
    fn after(&mut self, context: u32, way: Way, at: At, action: Option<u32>) -> Result<Step, Fault> {
        let http = self.http(context).ok_or(Fault::Trap)?;
        if let Some(reply) = http.reply.take() {
            return Ok(Step::Respond(reply));
        }
        let passing = http.way(way);
        // Envoy has several words for holding a message up; they differ in what is done with what comes behind.
        if action.unwrap_or_default() != 0 && !mem::take(&mut passing.go) {
            passing.held_at = Some(at);
            passing.shown |= at == At::Body;
            return Ok(Step::Wait);
        }
        http.release(way);
        Ok(Step::Go)
    }

    /// Puts together what a turn has come to.
    fn turned(&mut self, context: u32, way: Way, step: Result<Step, Fault>) -> Turned {
        let mut turned = Turned::new(way, step);
        turned.context = Some(context);
        if let Some(exports) = self.exports() {
            turned.wants = Wants {
                request_body: exports.on_request_body.is_some() || exports.on_request_trailers.is_some(),
                response: exports.wants_response(),
                response_body: exports.on_response_body.is_some() || exports.on_response_trailers.is_some(),
            };
        }
        if turned.step.is_err() {
            if let Some(http) = self.any(context) {
                http.give_up(&mut turned);
            }
            self.forget_lost(context);
        } else if let Some(http) = self.http(context) {
            if turned.step == Ok(Step::Wait) {
                turned.wake = Some(Arc::clone(http.way(way).wake.get_or_insert_default()));
            }
            http.hand_over(&mut turned);
        }
        turned
    }

    /// Whether the guest holds a head up, and hasn't let it go yet.
    pub(crate) fn is_held_at_head(&mut self, context: u32, way: Way) -> bool {
        let http = self.http(context);
        http.is_some_and(|http| http.passing(way).held_at == Some(At::Head))
    }

    fn is_held(&mut self, context: u32, way: Way) -> bool {
        self.http(context)
            .is_some_and(|http| http.passing(way).held_at.is_some())
    }

    /// A request, whether its machine is there or gone.
    fn any(&mut self, context: u32) -> Option<&mut Http> {
        if self.has(context) {
            self.http(context)
        } else {
            self.lost(context)
        }
    }
}
