//! The gateways by which an endpoint of another zone is reached: which one a request goes by, and what is known of each.
//!
//! What becomes of a gateway is held against the gateway, and against nothing behind it; it is known to all workers, and
//! the same for every service.

use crate::chance::Chance;
use crate::connect::ConnectError;
use crate::endpoint::{Endpoint, Lease, Wants};
use crate::registry::EndpointState;
use bytes::Bytes;
use http_body::Body;
use leeward_policy::GatewayView;
use leeward_policy::model::{ConnectionPool, OutlierDetection, ZoneTransport};
use leeward_resilience::{Change, Draw, Event, FailureKind, Standing};
use leeward_zone::Link;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Whoever waited less than this for a connection may only have been in a hurry: a service's limit says what the service
/// needs, and not what the way to a gateway takes.
pub(crate) const LEAST_WAIT: Duration = Duration::from_secs(1);

/// What all workers know of a gateway.
#[derive(Debug)]
pub struct GatewayState {
    /// Which it is.
    pub(crate) view: GatewayView,
    /// Whether it can be reached, and does its work. Nothing else is used of this.
    pub(crate) health: Arc<EndpointState>,
    /// Answers that came through it. Relaxed is enough: only whether there are more counts.
    answers: AtomicU64,
    /// Somebody looks whether it can be reached, after a failure that says it of some requests only.
    doubted: AtomicBool,
}

/// Ends a doubt, also where the worker that has it ends.
struct Doubt(Arc<GatewayState>);

/// A gateway as one worker uses it for one endpoint.
pub(crate) struct Gateway<B> {
    state: Arc<GatewayState>,
    /// The connections to it.
    to: Rc<Endpoint<B>>,
}

/// The gateways of one endpoint. Cheap to clone.
pub(crate) struct Gateways<B> {
    all: Rc<[Gateway<B>]>,
    /// What is known of them.
    states: Rc<[Arc<GatewayState>]>,
    /// What a connection is tried with to see whether a gateway is back.
    probe: Wants,
}

/// Which gateway an attempt goes by: for who judges what becomes of the attempt.
#[derive(Debug, Default)]
pub struct Passage(RefCell<Option<Passing>>);

#[derive(Debug)]
struct Passing {
    gateway: Arc<GatewayState>,
    /// It, and the others by which the attempt could have gone.
    all: Rc<[Arc<GatewayState>]>,
    /// Its answers before.
    answers: u64,
    /// The link, if it is by QUIC, and what had come on it before.
    link: Option<(Link, u64)>,
    /// Where there is no QUIC, there may be TCP.
    or_tcp: bool,
}

/// What a failure says of a gateway.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The connection to it is gone.
    Lost,
    /// It broke off the request, or said nothing in time.
    Failed,
}

impl GatewayState {
    pub(crate) fn new(view: GatewayView, health: Arc<EndpointState>) -> Self {
        Self {
            view,
            health,
            answers: AtomicU64::new(0),
            doubted: AtomicBool::new(false),
        }
    }

    /// Whether requests may be sent to it, at least where there is nothing better.
    pub(crate) fn is_open(&self, now: Instant) -> bool {
        match self.health.standing(now) {
            Standing::Healthy | Standing::Ejected => true,
            Standing::ProbeDue | Standing::Unreachable | Standing::Unhealthy => false,
        }
    }

    /// Leave to look whether it can be reached: one at a time.
    fn doubt(self: &Arc<Self>) -> Option<Doubt> {
        let doubted = self.doubted.swap(true, Ordering::Relaxed);
        (!doubted).then(|| Doubt(Arc::clone(self)))
    }

    fn note(&self, event: Event, others: bool, now: Instant) {
        // The last one that works isn't ejected: it could only be replaced by none.
        let settings = &OutlierDetection::DEFAULT;
        let change = self.health.note(event, now, settings, || others, &mut Chance);
        let GatewayView { zone, name, address } = &self.view;
        match change {
            None => {}
            Some(Change::Lost) => {
                tracing::warn!(%zone, gateway = %name, %address, "zone gateway can't be reached");
            }
            Some(Change::Ejected(ejection)) => {
                tracing::warn!(%zone, gateway = %name, %address, length = ?ejection.length(), evidence = ?ejection.why, "zone gateway ejected");
            }
            Some(Change::Back | Change::ChecksFailed | Change::ChecksPassed) => {
                tracing::info!(%zone, gateway = %name, %address, "zone gateway is back");
            }
        }
    }
}

impl Drop for Doubt {
    fn drop(&mut self) {
        self.0.doubted.store(false, Ordering::Relaxed);
    }
}

impl<B> Gateway<B> {
    pub(crate) const fn new(state: Arc<GatewayState>, to: Rc<Endpoint<B>>) -> Self {
        Self { state, to }
    }
}

impl<B> Gateways<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    pub(crate) fn new(probe: Wants) -> Self {
        Self {
            all: Rc::from([]),
            states: Rc::from([]),
            probe,
        }
    }

    /// Takes in what policy says now. `make` is called for each that is new.
    pub(crate) fn update(
        &mut self,
        views: &[GatewayView],
        probe: Wants,
        bounds: &ConnectionPool,
        make: &mut dyn FnMut(&GatewayView) -> Gateway<B>,
    ) {
        self.probe = probe;
        for known in &*self.all {
            known.to.rebound(bounds);
        }
        let before = Rc::clone(&self.all);
        if before.len() == views.len()
            && before
                .iter()
                .zip(views)
                .all(|(known, view)| known.state.view == *view)
        {
            return;
        }
        let all = views.iter().map(|view| {
            let known = before.iter().find(|known| known.state.view == *view);
            known.map_or_else(|| make(view), Gateway::clone)
        });
        self.all = all.collect();
        self.states = self.all.iter().map(|known| Arc::clone(&known.state)).collect();
    }

    /// Whether one of them may be asked.
    pub(crate) fn is_open(&self, now: Instant) -> bool {
        self.all.iter().any(|gateway| gateway.state.is_open(now))
    }

    /// Sends one request's worth of connection through one of them: at random, so that load is spread evenly. One that
    /// can't be reached is left for another, since nothing was sent.
    pub(crate) async fn lease(
        &self,
        wants: Wants,
        passage: Option<&Passage>,
    ) -> Result<Lease<B>, ConnectError> {
        let all = &self.all;
        let mut tried = Vec::new();
        let mut last = None;
        while let Some((at, gateway)) = pick(all, &tried) {
            match gateway.to.lease_itself(wants).await {
                Ok(lease) => {
                    if let Some(passage) = passage {
                        passage.0.replace(Some(Passing {
                            gateway: Arc::clone(&gateway.state),
                            all: Rc::clone(&self.states),
                            answers: gateway.state.answers.load(Ordering::Relaxed),
                            link: lease.link().map(|link| (link.clone(), link.heard())),
                            or_tcp: wants.transport == ZoneTransport::Auto,
                        }));
                    }
                    return Ok(lease);
                }
                // Neither says anything about the gateway.
                Err(error @ (ConnectError::Full { .. } | ConnectError::Identity { .. })) => {
                    return Err(error);
                }
                Err(error) => {
                    // What another request has just found is written down already.
                    if !matches!(error, ConnectError::JustFailed { .. }) {
                        self.out_of_reach(gateway, &wants, &error);
                    }
                    tracing::debug!(gateway = %gateway.state.view.name, %error, "no connection to a zone gateway");
                    tried.push(at);
                    last = Some(Box::new(error));
                }
            }
        }
        Err(ConnectError::NoGateway { source: last })
    }

    /// A request got no connection to one of them.
    fn out_of_reach(&self, gateway: &Gateway<B>, wants: &Wants, error: &ConnectError) {
        if holds_for_all(&self.probe, wants, error) {
            gateway.state.note(Event::FailToConnect, true, now());
        } else if let Some(doubt) = gateway.state.doubt() {
            // As a probe.
            tokio::task::spawn_local(look(gateway.clone(), self.probe, doubt));
        }
    }

    /// Closes what has been idle for too long, and looks whether gateways that couldn't be reached are back. True if no
    /// connection is left.
    pub(crate) fn sweep(&self, now: Instant) -> bool {
        let mut at_rest = true;
        for gateway in &*self.all {
            at_rest &= gateway.to.sweep(now);
            let health = &gateway.state.health;
            if health.standing(now) == Standing::ProbeDue && health.probe(now) {
                // Its owner is the worker; it ends within the time for a connection. No request waits for it.
                tokio::task::spawn_local(probe(gateway.clone(), self.probe));
            }
        }
        at_rest
    }
}

impl<B> Clone for Gateways<B> {
    fn clone(&self) -> Self {
        Self {
            all: Rc::clone(&self.all),
            states: Rc::clone(&self.states),
            probe: self.probe,
        }
    }
}

impl<B> Clone for Gateway<B> {
    fn clone(&self) -> Self {
        Self {
            state: Arc::clone(&self.state),
            to: Rc::clone(&self.to),
        }
    }
}

/// One that works; if none does, one that does badly.
fn pick<'a, B>(all: &'a Rc<[Gateway<B>]>, tried: &[usize]) -> Option<(usize, &'a Gateway<B>)> {
    let now = now();
    for wanted in [Standing::Healthy, Standing::Ejected] {
        let fit = || {
            let left = all.iter().enumerate().filter(|(at, _)| !tried.contains(at));
            left.filter(|(_, gateway)| gateway.state.health.standing(now) == wanted)
        };
        let count = fit().count() as u64;
        if count > 0 {
            let drawn = usize::try_from(Chance.below(count)).unwrap_or(0);
            return fit().nth(drawn);
        }
    }
    None
}

async fn probe<B>(gateway: Gateway<B>, wants: Wants)
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match gateway.is_reached(wants).await {
        Some(true) => gateway.state.note(Event::Succeed, true, now()),
        Some(false) => gateway.state.note(Event::FailToConnect, true, now()),
        None => {}
    }
}

/// Whether a gateway to which a request got no connection can't be reached by others either: by what a probe would try,
/// in the time that it would have. What finds no way by TCP alone says nothing of those that go by QUIC, nor does one in a
/// hurry of those that are in none.
fn holds_for_all(probe: &Wants, wants: &Wants, error: &ConnectError) -> bool {
    let in_a_hurry = matches!(error, ConnectError::Timeout { limit, .. } if *limit < LEAST_WAIT);
    let as_others = probe.transport == ZoneTransport::Tcp || wants.is_for_quic();
    as_others && !in_a_hurry
}

/// Tries a doubted gateway as others would. A connection is no answer: it takes nothing back.
async fn look<B>(gateway: Gateway<B>, wants: Wants, doubt: Doubt)
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if gateway.is_reached(wants).await == Some(false) {
        doubt.0.note(Event::FailToConnect, true, now());
    }
}

impl<B> Gateway<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Whether a connection comes about; `None` if what kept it from that says nothing of the gateway.
    async fn is_reached(&self, wants: Wants) -> Option<bool> {
        match self.to.lease_itself(wants).await {
            Ok(_) => Some(true),
            Err(ConnectError::Full { .. } | ConnectError::Identity { .. }) => None,
            Err(_) => Some(false),
        }
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Passage {
    /// The gateway's name, once one was chosen.
    pub fn gateway(&self) -> Option<Arc<str>> {
        let passing = self.0.borrow();
        passing
            .as_ref()
            .map(|passing| Arc::clone(&passing.gateway.view.name))
    }

    /// An answer came through it, whoever made it.
    pub fn answered(&self, now: Instant) {
        if let Some(passing) = &*self.0.borrow() {
            passing.gateway.answers.fetch_add(1, Ordering::Relaxed);
            passing.gateway.note(Event::Succeed, true, now);
        }
    }

    /// It is to blame for a failure.
    pub fn failed(&self, fault: Fault, now: Instant) {
        if let Some(passing) = &*self.0.borrow() {
            let event = match fault {
                // By TCP it may be there yet. Others would serve meanwhile, so that nobody has to wait to know; where there
                // are none, the next request finds out.
                Fault::Lost if passing.is_all_there_is(now) => Event::Fail(FailureKind::Gateway),
                Fault::Lost => Event::FailToConnect,
                // Of an endpoint that was out, a failure says that it accepts connections again. Of a gateway, what was on
                // its way when it was lost says no such thing.
                Fault::Failed if passing.gateway.health.standing(now) != Standing::Healthy => return,
                Fault::Failed => Event::Fail(FailureKind::Gateway),
            };
            passing.gateway.note(event, passing.has_other(now), now);
        }
    }

    /// Whether there is another that works.
    pub fn has_other(&self, now: Instant) -> bool {
        let passing = self.0.borrow();
        passing.as_ref().is_some_and(|passing| passing.has_other(now))
    }

    /// There was no answer in time: whether that is the gateway's fault, of which nothing was heard meanwhile, rather than
    /// that of who is behind it. By QUIC that is known, since whatever is sent is acknowledged; by TCP other answers
    /// must have come through it.
    pub fn was_silent(&self) -> bool {
        let passing = self.0.borrow();
        passing.as_ref().is_some_and(|passing| match &passing.link {
            Some((link, heard)) => link.heard() == *heard,
            None => passing.gateway.answers.load(Ordering::Relaxed) == passing.answers,
        })
    }

    /// Whether it is by QUIC.
    pub fn is_by_link(&self) -> bool {
        self.0
            .borrow()
            .as_ref()
            .is_some_and(|passing| passing.link.is_some())
    }
}

impl Passing {
    /// Whether no other works, and it may do so by TCP.
    fn is_all_there_is(&self, now: Instant) -> bool {
        self.or_tcp && self.gateway.is_open(now) && !self.has_other(now)
    }

    fn has_other(&self, now: Instant) -> bool {
        let mut others = self.all.iter().filter(|it| !Arc::ptr_eq(it, &self.gateway));
        others.any(|other| other.health.standing(now) == Standing::Healthy)
    }
}

impl<B> std::fmt::Debug for Gateways<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.all.iter().map(|gateway| &gateway.state.view.name);
        f.debug_list().entries(names).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Connection;
    use crate::registry::Registry;
    use leeward_policy::model::Protocol;

    fn view(name: &str) -> GatewayView {
        GatewayView {
            zone: "b".into(),
            name: name.into(),
            address: ([127, 0, 0, 1], 15008).into(),
        }
    }

    fn passage(gateway: &Arc<GatewayState>, others: bool) -> Passage {
        let now = now();
        let other = others.then(|| Registry::new(now).gateway(&view("other"), now));
        Passage(RefCell::new(Some(Passing {
            gateway: Arc::clone(gateway),
            all: std::iter::once(Arc::clone(gateway)).chain(other).collect(),
            answers: gateway.answers.load(Ordering::Relaxed),
            link: None,
            or_tcp: false,
        })))
    }

    #[test]
    fn a_gateway_is_silent_while_no_answer_comes_through_it() {
        let now = now();
        let gateway = Registry::new(now).gateway(&view("g1"), now);
        let waiting = passage(&gateway, true);
        assert!(waiting.was_silent());
        assert_eq!(waiting.gateway().as_deref(), Some("g1"));
        // Another request's.
        passage(&gateway, true).answered(now);
        assert!(!waiting.was_silent() && !waiting.is_by_link());
        // One that has not come as far as a gateway is nobody's fault.
        let nowhere = Passage::default();
        assert!(!nowhere.was_silent());
        nowhere.failed(Fault::Lost, now);
        assert_eq!(nowhere.gateway(), None);
    }

    #[test]
    fn what_breaks_off_is_held_against_the_gateway() {
        let now = now();
        let registry = Registry::new(now);
        let changes = || registry.of_gateways().changes.load(Ordering::Relaxed);
        let gateway = registry.gateway(&view("g1"), now);
        assert!(Arc::ptr_eq(&gateway, &registry.gateway(&view("g1"), now)));
        passage(&gateway, true).failed(Fault::Lost, now);
        assert!(!gateway.is_open(now) && changes() == 1);
        // Somebody looks whether it is back; no request does.
        let later = now + Duration::from_secs(3);
        assert_eq!(gateway.health.standing(later), Standing::ProbeDue);
        assert!(!gateway.is_open(later));
        passage(&gateway, true).answered(later);
        assert!(gateway.is_open(later) && changes() == 2);
    }

    #[test]
    fn what_was_on_its_way_brings_no_lost_gateway_back() {
        let now = now();
        let gateway = Registry::new(now).gateway(&view("g1"), now);
        passage(&gateway, true).failed(Fault::Lost, now);
        for after in [Duration::ZERO, Duration::from_secs(3)] {
            passage(&gateway, true).failed(Fault::Failed, now + after);
            assert!(!gateway.is_open(now + after));
        }
    }

    #[test]
    fn what_some_requests_find_is_not_held_against_a_gateway_for_all() {
        let to = view("g1").address;
        let auto = Wants {
            protocol: Protocol::Http1,
            connection: Connection::New,
            transport: ZoneTransport::Auto,
            upgrade: false,
            length: None,
            large_answer: false,
            limit: LEAST_WAIT,
        };
        let late = |limit| ConnectError::Timeout { to, limit };
        let refused = || ConnectError::Tcp {
            to,
            source: std::io::ErrorKind::ConnectionRefused.into(),
        };
        assert!(holds_for_all(&auto, &auto, &late(LEAST_WAIT)));
        assert!(holds_for_all(&auto, &auto, &refused()));
        assert!(!holds_for_all(&auto, &auto, &late(LEAST_WAIT / 2)));
        // By TCP, where others go by QUIC, and where they don't.
        let upgrade = Wants {
            upgrade: true,
            ..auto
        };
        assert!(!holds_for_all(&auto, &upgrade, &refused()));
        let tcp = |wants| Wants {
            transport: ZoneTransport::Tcp,
            ..wants
        };
        assert!(holds_for_all(&tcp(auto), &tcp(upgrade), &refused()));
        // One looks for all.
        let now = now();
        let gateway = Registry::new(now).gateway(&view("g1"), now);
        let doubt = gateway.doubt();
        assert!(doubt.is_some() && gateway.doubt().is_none());
        drop(doubt);
        assert!(gateway.doubt().is_some());
    }

    #[test]
    fn a_zone_whose_links_are_all_lost_may_be_reached_by_tcp() {
        let now = now();
        let registry = Registry::new(now);
        let (first, last) = (
            registry.gateway(&view("g1"), now),
            registry.gateway(&view("g2"), now),
        );
        let lose = |gateway: &Arc<GatewayState>, or_tcp: bool| {
            let passing = Passing {
                gateway: Arc::clone(gateway),
                all: Rc::from([Arc::clone(&first), Arc::clone(&last)]),
                answers: 0,
                link: None,
                or_tcp,
            };
            Passage(RefCell::new(Some(passing))).failed(Fault::Lost, now);
        };
        lose(&first, true);
        assert!(!first.is_open(now), "another serves");
        // Each request that was on its way.
        for _ in 0..10 {
            lose(&last, true);
        }
        assert_eq!(last.health.standing(now), Standing::Healthy);
        lose(&last, false);
        assert!(!last.is_open(now), "there is nothing but QUIC");
    }

    #[test]
    fn the_last_that_works_is_not_ejected() {
        let now = now();
        let registry = Registry::new(now);
        let (last, other) = (
            registry.gateway(&view("g1"), now),
            registry.gateway(&view("g2"), now),
        );
        for _ in 0..20 {
            passage(&last, false).failed(Fault::Failed, now);
            passage(&other, true).failed(Fault::Failed, now);
        }
        assert_eq!(last.health.standing(now), Standing::Healthy);
        assert_eq!(other.health.standing(now), Standing::Ejected);
        assert!(other.is_open(now), "where there is nothing better");
    }
}
