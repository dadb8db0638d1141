//! One request's way past a proxy-wasm module: an HTTP context.
//!
//! As in Envoy, a head that the guest holds up holds up all behind it: the guest sees the body once it lets the head go. A
//! body that it holds up is shown to it whole each time that more has come, up to `maxBodyBytes` (64 KiB where policy names
//! no bound), and goes on as the guest leaves it.

use super::abi::Way;
use super::context::Body;
use super::machine::{Machine, Slot, Turn};
use super::turns::{Head, Turned, Wants};
use crate::call::{Facts, RequestHead, ResponseHead};
use crate::fault::Fault;
use crate::filter::Step;
use bytes::Bytes;
use http::HeaderMap;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use tokio::sync::Notify;

/// An HTTP context.
pub(crate) struct Stream {
    machine: Rc<Machine>,
    facts: Facts,
    /// Its number, once the guest knows of it.
    context: Option<u32>,
    request: Option<RequestHead>,
    response: Option<ResponseHead>,
    bodies: [Body; 2],
    trailers: Option<HeaderMap>,
    /// The message that is held up, and what is woken when the guest has something to say.
    held: Option<(Way, Arc<Notify>)>,
    wants: Wants,
    /// A turn that is not over. Should whoever waits for it lose interest, it is brought to its end all the same: others
    /// have the same machine.
    turn: Option<Pin<Box<dyn Future<Output = Turned>>>>,
}

impl Stream {
    pub(crate) fn new(machine: Rc<Machine>, facts: &Facts) -> Self {
        Self {
            machine,
            facts: facts.clone(),
            context: None,
            request: None,
            response: None,
            bodies: Default::default(),
            trailers: None,
            held: None,
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

    pub(crate) async fn request_trailers(&mut self, trailers: HeaderMap) -> Result<(Step, HeaderMap), Fault> {
        self.trailers(Way::Request, trailers).await
    }

    pub(crate) fn take_request_body(&mut self) -> Bytes {
        self.out(Way::Request).take()
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

    pub(crate) async fn response_trailers(
        &mut self,
        trailers: HeaderMap,
    ) -> Result<(Step, HeaderMap), Fault> {
        self.trailers(Way::Response, trailers).await
    }

    pub(crate) fn take_response_body(&mut self) -> Bytes {
        self.out(Way::Response).take()
    }

    pub(crate) fn version(&self) -> &str {
        &self.machine.version.short
    }

    async fn head(&mut self, head: Head, end: bool) -> Result<Step, Fault> {
        self.end_turn().await?;
        let slot = match self.machine.turn(self.facts.deadline).await {
            Ok(slot) => slot,
            Err(fault) => {
                let mut turned = Turned::new(head.way(), Err(fault));
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
        self.end_turn().await?;
        let context = self.context.ok_or(Fault::Trap);
        let slot = match context {
            Ok(_) => self.machine.turn(self.facts.deadline).await,
            Err(fault) => Err(fault),
        };
        match (context, slot) {
            (Ok(context), Ok(slot)) => {
                let turn = async move |machine: &Rc<Machine>, slot: &mut Slot| {
                    slot.body(machine, context, way, data, end).await
                };
                self.take_turn(slot, turn).await
            }
            (Err(fault), _) | (_, Err(fault)) => {
                self.out(way).push(data);
                Err(fault)
            }
        }
    }

    async fn trailers(&mut self, way: Way, trailers: HeaderMap) -> Result<(Step, HeaderMap), Fault> {
        self.end_turn().await?;
        let context = self.context.ok_or(Fault::Trap)?;
        let mut slot = self.machine.turn(self.facts.deadline).await?;
        if slot.is_held_at_head(context, way) {
            // What is behind a head waits for it.
            drop(slot);
            match self.resumed().await? {
                Step::Go => {}
                step @ (Step::Wait | Step::Respond(_)) => return Ok((step, trailers)),
            }
            slot = self.machine.turn(self.facts.deadline).await?;
        }
        let turn = async move |machine: &Rc<Machine>, slot: &mut Slot| {
            slot.trailers(machine, context, way, trailers).await
        };
        let mut step = self.take_turn(slot, turn).await?;
        if step == Step::Wait {
            step = self.resumed().await?;
        }
        Ok((step, self.trailers.take().unwrap_or_default()))
    }

    pub(crate) async fn resumed(&mut self) -> Result<Step, Fault> {
        loop {
            match self.end_turn().await? {
                Some(step) if step != Step::Wait => return Ok(step),
                _ => {}
            }
            let (Some((way, wake)), Some(context)) = (self.held.clone(), self.context) else {
                return std::future::pending().await;
            };
            let slot = self.machine.turn(self.facts.deadline).await?;
            let turn =
                async move |machine: &Rc<Machine>, slot: &mut Slot| slot.resume(machine, context, way).await;
            match self.take_turn(slot, turn).await? {
                Step::Wait => wake.notified().await,
                step @ (Step::Go | Step::Respond(_)) => return Ok(step),
            }
        }
    }

    /// Has the guest do something, from begin to end.
    async fn take_turn(
        &mut self,
        mut slot: Turn,
        turn: impl AsyncFnOnce(&Rc<Machine>, &mut Slot) -> Turned + 'static,
    ) -> Result<Step, Fault> {
        let machine = Rc::clone(&self.machine);
        self.turn = Some(Box::pin(async move {
            let turned = turn(&machine, &mut slot).await;
            slot.tidy(&machine).await;
            turned
        }));
        let step = self.end_turn().await?;
        // There is a turn.
        step.ok_or(Fault::Trap)
    }

    /// Brings the turn under way to its end, if there is one.
    async fn end_turn(&mut self) -> Result<Option<Step>, Fault> {
        let Some(turn) = &mut self.turn else {
            return Ok(None);
        };
        let turned = turn.await;
        self.turn = None;
        self.take(turned).map(Some)
    }

    fn take(&mut self, turned: Turned) -> Result<Step, Fault> {
        self.context = turned.context.or(self.context);
        self.wants = turned.wants;
        self.held = turned.wake.map(|wake| (turned.way, wake));
        match turned.head {
            Some(Head::Request(head)) => self.request = Some(head),
            Some(Head::Response(head)) => self.response = Some(head),
            None => {}
        }
        let mut body = turned.body;
        self.out(turned.way).push(body.take());
        if turned.trailers.is_some() {
            self.trailers = turned.trailers;
        }
        turned.step
    }

    const fn out(&mut self, way: Way) -> &mut Body {
        let [request, response] = &mut self.bodies;
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
                Some(turn) => turn.await.context.or(context),
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
