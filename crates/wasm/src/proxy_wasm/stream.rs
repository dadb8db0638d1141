//! One request's way past a proxy-wasm module: an HTTP context.
//!
//! As in Envoy, a head that the guest holds up holds up all behind it: the guest sees the body once it lets the head go. A
//! body that it holds up is shown to it whole each time that more has come, up to `maxBody` (64 KiB where policy names
//! no bound), and goes on as the guest leaves it.

use super::abi::Way;
use super::context::Body;
use super::machine::{Machine, Slot, Turn};
use super::turns::{Head, Turned, Wants};
use crate::call::{Facts, RequestHead, ResponseHead};
use crate::fault::Fault;
use crate::filter::{Step, Wake};
use bytes::Bytes;
use http::HeaderMap;
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Instant;
use tokio::sync::{Notify, oneshot};

/// An HTTP context.
pub(crate) struct Stream {
    machine: Rc<Machine>,
    facts: Facts,
    /// Its number, once the guest knows of it.
    context: Option<u32>,
    request: Option<RequestHead>,
    response: Option<ResponseHead>,
    ways: [Passing; 2],
    wants: Wants,
    /// A turn that is not over.
    turn: Option<Turning>,
}

/// A message on its way.
#[derive(Default)]
struct Passing {
    /// What goes on of its body.
    body: Body,
    trailers: Option<HeaderMap>,
    /// Trailers behind a head that is held up; the guest hasn't seen them.
    behind: Option<HeaderMap>,
    /// What is woken when the guest that holds it up has something to say.
    wake: Option<Arc<Notify>>,
    /// The head has gone on.
    head_gone: bool,
    /// A turn that nobody waited for has let it go.
    goes: bool,
}

/// A turn under way. It is brought to its end whatever becomes of whoever waits for it: others have the same machine.
enum Turning {
    /// By whoever waits for it.
    Here(Pin<Box<dyn Future<Output = Turned>>>),
    /// Beside requests, since nobody waits for it any more.
    Aside(oneshot::Receiver<Turned>),
}

/// What comes next for a message.
enum Next {
    Turn(Turn),
    Ended(Step),
}

/// Waits for a turn. Dropped before that is over, it has it brought to its end beside requests.
struct Waiting<'a> {
    machine: &'a Machine,
    turn: &'a mut Option<Turning>,
}

impl Waiting<'_> {
    async fn turned(&mut self) -> Option<Turned> {
        let turned = match self.turn.as_mut()? {
            Turning::Here(turn) => Some(turn.await),
            // Only once the worker is gone is there nobody to end it.
            Turning::Aside(turned) => turned.await.ok(),
        };
        *self.turn = None;
        turned
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        match self.turn.take() {
            Some(Turning::Here(turn)) => {
                let (tell, turned) = oneshot::channel();
                self.machine.attend(Box::pin(async move {
                    // It may be that nobody asks any more.
                    drop(tell.send(turn.await));
                }));
                *self.turn = Some(Turning::Aside(turned));
            }
            other => *self.turn = other,
        }
    }
}

impl Stream {
    pub(crate) fn new(machine: Rc<Machine>, facts: &Facts) -> Self {
        Self {
            machine,
            facts: facts.clone(),
            context: None,
            request: None,
            response: None,
            ways: Default::default(),
            wants: Wants::default(),
            turn: None,
        }
    }

    pub(crate) async fn request(&mut self, head: RequestHead, end: bool) -> Result<Step, Fault> {
        self.head(Head::Request(head), end).await
    }

    pub(crate) fn take_request(&mut self) -> Option<RequestHead> {
        self.request.take()
    }

    pub(crate) fn wants_request_body(&mut self) -> bool {
        self.wants.request_body
    }

    pub(crate) async fn request_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        self.body(Way::Request, data, end).await
    }

    pub(crate) fn take_request_body(&mut self) -> Bytes {
        self.way(Way::Request).body.take()
    }

    pub(crate) fn wants_response(&mut self) -> bool {
        self.wants.response
    }

    pub(crate) async fn response(&mut self, head: ResponseHead, end: bool) -> Result<Step, Fault> {
        self.head(Head::Response(head), end).await
    }

    pub(crate) fn take_response(&mut self) -> Option<ResponseHead> {
        self.response.take()
    }

    pub(crate) fn wants_response_body(&mut self) -> bool {
        self.wants.response_body
    }

    pub(crate) const fn asked_for_response_body(&self) -> bool {
        self.wants.response_body
    }

    pub(crate) async fn response_body(&mut self, data: Bytes, end: bool) -> Result<Step, Fault> {
        self.body(Way::Response, data, end).await
    }

    pub(crate) fn take_response_body(&mut self) -> Bytes {
        self.way(Way::Response).body.take()
    }

    pub(crate) fn version(&self) -> &str {
        &self.machine.version.short
    }

    async fn head(&mut self, head: Head, end: bool) -> Result<Step, Fault> {
        let way = head.way();
        let slot = match self.turn_for(way).await {
            Ok(Next::Turn(slot)) => slot,
            Ok(Next::Ended(step)) => return Ok(step),
            Err(fault) => {
                let mut turned = Turned::new(way, Err(fault));
                turned.head = Some(head);
                return self.take(turned);
            }
        };
        let (facts, context) = (self.facts.clone(), self.context);
        let turn = async move |machine: &Rc<Machine>, slot: &mut Slot| {
            let entered = match context {
                Some(context) => Ok(context),
                None => slot.enter(machine, &facts).await,
            };
            match entered {
                Ok(context) => slot.head(machine, context, head, end).await,
                Err(fault) => {
                    let mut turned = Turned::new(head.way(), Err(fault));
                    turned.head = Some(head);
                    turned
                }
            }
        };
        self.take_turn(slot, turn).await
    }

    async fn body(&mut self, way: Way, data: Bytes, end: bool) -> Result<Step, Fault> {
        let next = self.turn_for(way).await;
        match (self.context, next) {
            (Some(context), Ok(Next::Turn(slot))) => {
                let turn = async move |machine: &Rc<Machine>, slot: &mut Slot| {
                    slot.body(machine, context, way, data, end).await
                };
                self.take_turn(slot, turn).await
            }
            (_, next) => {
                self.way(way).body.push(data);
                match next? {
                    Next::Ended(step) => Ok(step),
                    Next::Turn(_) => Err(Fault::Trap),
                }
            }
        }
    }

    pub(crate) async fn trailers(&mut self, way: Way, trailers: HeaderMap) -> Result<Step, Fault> {
        let mut slot = match self.turn_for(way).await? {
            Next::Turn(slot) => slot,
            Next::Ended(step) => return Ok(step),
        };
        let context = self.context.ok_or(Fault::Trap)?;
        if slot.is_held_at_head(context, way) {
            // What is behind a head waits for it.
            self.way(way).behind = Some(trailers);
            return Ok(Step::Wait);
        }
        self.show_trailers(slot, context, way, trailers).await
    }

    async fn show_trailers(
        &mut self,
        slot: Turn,
        context: u32,
        way: Way,
        trailers: HeaderMap,
    ) -> Result<Step, Fault> {
        let turn = async move |machine: &Rc<Machine>, slot: &mut Slot| {
            slot.trailers(machine, context, way, trailers).await
        };
        self.take_turn(slot, turn).await
    }

    pub(crate) fn take_trailers(&mut self, way: Way) -> Option<HeaderMap> {
        let passing = self.way(way);
        passing.trailers.take().or_else(|| passing.behind.take())
    }

    pub(crate) fn wake(&mut self, way: Way) -> Option<Wake> {
        self.way(way).wake.clone().map(Wake)
    }

    pub(crate) async fn resume(&mut self, way: Way) -> Result<Step, Fault> {
        let slot = match self.turn_for(way).await? {
            Next::Turn(slot) => slot,
            Next::Ended(step) => return Ok(step),
        };
        if mem::take(&mut self.way(way).goes) {
            return Ok(Step::Go);
        }
        let context = self.context.ok_or(Fault::Trap)?;
        let turn =
            async move |machine: &Rc<Machine>, slot: &mut Slot| slot.resume(machine, context, way).await;
        let step = self.take_turn(slot, turn).await?;
        if self.way(way).behind.is_none() || matches!(step, Step::Respond(_)) {
            return Ok(step);
        }
        let mut slot = self.machine.turn(self.until(way)).await?;
        if slot.is_held_at_head(context, way) {
            return Ok(step);
        }
        match self.way(way).behind.take() {
            Some(trailers) => self.show_trailers(slot, context, way, trailers).await,
            None => Ok(step),
        }
    }

    /// The right to the machine, for something about a message. Or, if a turn that nobody waited for has ended that message,
    /// how it ended: what the guest has said once it doesn't say again.
    async fn turn_for(&mut self, way: Way) -> Result<Next, Fault> {
        match self.end_turn().await? {
            Some((of, step @ Step::Respond(_))) if of == way => return Ok(Next::Ended(step)),
            Some((of, Step::Go)) => self.way(of).goes = true,
            Some((_, Step::Wait | Step::Respond(_))) | None => {}
        }
        match self.machine.turn(self.until(way)).await {
            Ok(slot) => Ok(Next::Turn(slot)),
            Err(fault) => {
                // What the guest holds is in the machine, and nothing more is asked of it.
                if self.way(way).wake.is_some() {
                    self.give_up(way).await;
                }
                Err(fault)
            }
        }
    }

    /// How long to wait for a turn: a request that hasn't gone on has until its answer must have begun. For one that has, and
    /// for the answer, that says nothing.
    const fn until(&self, way: Way) -> Option<Instant> {
        let [request, _] = &self.ways;
        match way {
            Way::Request if !request.head_gone => self.facts.deadline,
            Way::Request | Way::Response => None,
        }
    }

    pub(crate) async fn give_up(&mut self, way: Way) {
        // Whatever that comes to, nothing more is asked.
        let _ = self.end_turn().await;
        if let Some(context) = self.context {
            let turned = self.machine.any_turn().await.give_up(context, way);
            let _ = self.take(turned);
        }
    }

    /// Has the guest do something, from begin to end.
    async fn take_turn(
        &mut self,
        mut slot: Turn,
        turn: impl AsyncFnOnce(&Rc<Machine>, &mut Slot) -> Turned + 'static,
    ) -> Result<Step, Fault> {
        let machine = Rc::clone(&self.machine);
        self.turn = Some(Turning::Here(Box::pin(async move {
            let turned = turn(&machine, &mut slot).await;
            slot.tidy(&machine).await;
            turned
        })));
        let turned = self.end_turn().await?;
        // There is a turn.
        turned.map(|(_, step)| step).ok_or(Fault::Trap)
    }

    /// Brings the turn under way to its end, if there is one.
    async fn end_turn(&mut self) -> Result<Option<(Way, Step)>, Fault> {
        let mut waiting = Waiting {
            machine: &self.machine,
            turn: &mut self.turn,
        };
        let turned = waiting.turned().await;
        drop(waiting);
        let Some(turned) = turned else {
            return Ok(None);
        };
        let way = turned.way;
        self.take(turned).map(|step| Some((way, step)))
    }

    fn take(&mut self, mut turned: Turned) -> Result<Step, Fault> {
        self.context = turned.context.or(self.context);
        self.wants = turned.wants;
        if turned.head.is_some() {
            self.way(turned.way).head_gone = true;
        }
        match turned.head {
            Some(Head::Request(head)) => self.request = Some(head),
            Some(Head::Response(head)) => self.response = Some(head),
            None => {}
        }
        let passing = self.way(turned.way);
        passing.wake = turned.wake;
        match &passing.wake {
            // It is to be asked once more.
            Some(wake) if passing.goes => wake.notify_one(),
            Some(_) | None => passing.goes = false,
        }
        passing.body.push(turned.body.take());
        if turned.trailers.is_some() {
            passing.trailers = turned.trailers;
        }
        turned.step
    }

    const fn way(&mut self, way: Way) -> &mut Passing {
        let [request, response] = &mut self.ways;
        match way {
            Way::Request => request,
            Way::Response => response,
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let (turn, context) = (self.turn.take(), self.context);
        if turn.is_none() && context.is_none() {
            return;
        }
        let machine = Rc::clone(&self.machine);
        let slot = if turn.is_some() {
            None
        } else {
            self.machine.try_turn()
        };
        let at_once = slot.is_some() && tokio::runtime::Handle::try_current().is_ok();
        let mut finish: super::machine::Task = Box::pin(async move {
            let context = match turn {
                Some(Turning::Here(turn)) => turn.await.context.or(context),
                Some(Turning::Aside(turned)) => {
                    turned.await.ok().and_then(|turned| turned.context).or(context)
                }
                None => context,
            };
            let mut slot = match slot {
                Some(slot) => slot,
                None => machine.any_turn().await,
            };
            if let Some(context) = context {
                // A fault has been reported, and there is nobody else to tell.
                let _ = slot.finish(&machine, context).await;
                slot.tidy(&machine).await;
            }
        });
        // Almost always it takes no more than this.
        let mut nobody = Context::from_waker(Waker::noop());
        if !at_once || finish.as_mut().poll(&mut nobody).is_pending() {
            self.machine.attend(finish);
        }
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream")
            .field("plugin", &self.machine.plugin)
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}
