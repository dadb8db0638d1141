//! The world that is simulated: clients, proxies and servers, and the calls between them.

use crate::agenda::Agenda;
use crate::chance::exponential;
use crate::proxy::{Ended, Proxy, SoFar};
use crate::record::Record;
use crate::server::{Condition, Reception, Server};
use crate::strategy::Strategy;
use leeward_policy::model::Priority;
use leeward_resilience::{Draw, Seeded, Ticket};
use std::time::{Duration, Instant};

/// What is simulated, and for how long.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Services, each called by the one before; the first by clients.
    pub(crate) hops: Vec<Hop>,
    /// Proxies in front of each service.
    pub(crate) proxies: usize,
    /// Requests a second at the start.
    pub(crate) rate: f64,
    /// What happens when, since the start.
    pub(crate) changes: Vec<(Duration, Change)>,
    pub(crate) length: Duration,
}

/// A service.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hop {
    /// Its servers do the work.
    Works {
        servers: usize,
        workers: usize,
        max_queue: usize,
        service_time: Duration,
    },
    /// After this time its servers call the next service, and answer what that answers. They take any number
    /// of requests at once.
    Calls { servers: usize, after: Duration },
}

/// Something that changes during a run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// Requests a second.
    Rate(f64),
    /// Of every server of the last service.
    All(Condition),
    /// Of its first server.
    First(Condition),
}

/// How long a client waits.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// From one machine to another.
const WIRE: Duration = Duration::from_micros(500);
/// How often proxies compare endpoints with each other.
const SWEEP: Duration = Duration::from_secs(1);

/// Low, normal, high and critical requests: how many percent of all are of it or a lower priority.
const PRIORITIES: [(u64, Priority); 4] = [
    (20, Priority::Low),
    (70, Priority::Normal),
    (95, Priority::High),
    (100, Priority::Critical),
];

#[derive(Debug)]
enum Event {
    /// A client sends a request.
    Send,
    /// An attempt is at its server.
    Reach(usize),
    /// A server has forwarded an attempt's request.
    Forward(usize),
    /// A worker of a server has done an attempt's work.
    Done(usize),
    /// The answer to an attempt is at the proxy.
    Answer(usize, Ended),
    /// An attempt has had its time.
    TimeUp(usize),
    /// A call's pause is over.
    Again(usize),
    /// Endpoints are compared.
    Sweep,
    Change(Change),
}

/// A request at one proxy.
#[derive(Debug)]
struct Call {
    hop: usize,
    proxy: usize,
    caller: Caller,
    priority: Priority,
    began: Instant,
    so_far: SoFar,
}

#[derive(Clone, Copy, Debug)]
enum Caller {
    Client,
    /// A server of the hop before, for this attempt.
    Attempt(usize),
}

#[derive(Debug)]
struct Attempt {
    call: usize,
    server: usize,
    began: Instant,
    /// The circuit breaker's.
    ticket: Option<Ticket>,
    /// Whether it, or its call, is a retry.
    is_retry: bool,
    /// Whether the proxy has its answer, or has given it up.
    over: bool,
}

#[derive(Debug)]
struct Mesh<'a> {
    strategy: &'a Strategy,
    origin: Instant,
    agenda: Agenda<Event>,
    draw: Seeded,
    services: Vec<Service>,
    rate: f64,
    calls: Vec<Call>,
    attempts: Vec<Attempt>,
    record: Record,
}

#[derive(Debug)]
struct Service {
    hop: Hop,
    proxies: Vec<Proxy>,
    servers: Vec<Server>,
}

/// Simulates, and says what was seen. The same seed gives the same.
pub(crate) fn run(setup: &Setup, strategy: &Strategy, seed: u64) -> Record {
    #[expect(
        clippy::disallowed_methods,
        reason = "an arbitrary origin; only differences matter"
    )]
    let origin = Instant::now();
    let mut mesh = Mesh {
        strategy,
        origin,
        agenda: Agenda::new(origin),
        draw: Seeded(seed),
        services: setup
            .hops
            .iter()
            .map(|hop| Service::new(*hop, setup.proxies, strategy, origin))
            .collect(),
        rate: setup.rate,
        calls: Vec::new(),
        attempts: Vec::new(),
        record: Record::default(),
    };
    mesh.agenda.after(Duration::ZERO, Event::Send);
    mesh.agenda.after(SWEEP, Event::Sweep);
    for (at, change) in &setup.changes {
        mesh.agenda.after(*at, Event::Change(*change));
    }
    while let Some(event) = mesh.agenda.next(origin + setup.length) {
        mesh.happen(event);
    }
    mesh.record
}

impl Service {
    fn new(hop: Hop, proxies: usize, strategy: &Strategy, origin: Instant) -> Self {
        let (count, server) = match hop {
            Hop::Works {
                servers,
                workers,
                max_queue,
                service_time,
            } => (servers, (workers, max_queue, service_time)),
            Hop::Calls { servers, after } => (servers, (0, 0, after)),
        };
        let (workers, max_queue, service_time) = server;
        Self {
            hop,
            proxies: (0..proxies)
                .map(|_| Proxy::new(strategy, count, origin))
                .collect(),
            servers: (0..count)
                .map(|_| Server::new(workers, max_queue, service_time))
                .collect(),
        }
    }
}

impl Mesh<'_> {
    fn happen(&mut self, event: Event) {
        match event {
            Event::Send => self.send(),
            Event::Reach(attempt) => self.reach(attempt),
            Event::Forward(attempt) => self.forward(attempt),
            Event::Done(attempt) => self.done(attempt),
            Event::Answer(attempt, ended) => self.end(attempt, ended),
            Event::TimeUp(attempt) => self.end(attempt, Ended::TimeUp),
            Event::Again(call) => self.attempt(call),
            Event::Sweep => self.sweep(),
            Event::Change(change) => self.change(change),
        }
    }

    fn send(&mut self) {
        let pause = exponential(Duration::from_secs_f64(1.0 / self.rate), &mut self.draw);
        self.agenda.after(pause, Event::Send);
        let percent = self.draw.below(100);
        let priority = PRIORITIES
            .iter()
            .find(|(below, _)| percent < *below)
            .map_or(Priority::Normal, |(_, priority)| *priority);
        let now = self.agenda.now();
        self.record.sent(now - self.origin, priority);
        let so_far = SoFar {
            made: 0,
            deadline: now + PATIENCE,
            is_retry: false,
            tried: 0,
        };
        self.call(0, Caller::Client, priority, so_far);
    }

    /// A proxy in front of the hop is given a request.
    fn call(&mut self, hop: usize, caller: Caller, priority: Priority, so_far: SoFar) {
        let now = self.agenda.now();
        let Some(service) = self.services.get_mut(hop) else {
            return;
        };
        let count = u64::try_from(service.proxies.len()).unwrap_or(1);
        let proxy = usize::try_from(self.draw.below(count)).unwrap_or(0);
        let id = self.calls.len();
        self.calls.push(Call {
            hop,
            proxy,
            caller,
            priority,
            began: now,
            so_far,
        });
        let admitted = service
            .proxies
            .get_mut(proxy)
            .is_some_and(|proxy| proxy.admit(priority, now, &mut self.draw));
        if admitted {
            self.attempt(id);
        } else {
            self.answer(id, Ended::Refused);
        }
    }

    /// The proxy sends a request to a server.
    fn attempt(&mut self, id: usize) {
        let now = self.agenda.now();
        let Some(call) = self.calls.get_mut(id) else {
            return;
        };
        let last = call.hop + 1 == self.services.len();
        let Some(proxy) = self
            .services
            .get_mut(call.hop)
            .and_then(|service| service.proxies.get_mut(call.proxy))
        else {
            return;
        };
        call.so_far.made += 1;
        let Some((server, ticket)) = proxy.begin(call.so_far.tried, now, &mut self.draw) else {
            let ended = if call.so_far.made == 1 {
                Ended::Refused
            } else {
                Ended::Unavailable
            };
            proxy.release(ended, now);
            self.answer(id, ended);
            return;
        };
        call.so_far.tried |= 1 << server;
        let time_up = self
            .strategy
            .attempt_timeout
            .map_or(call.so_far.deadline, |timeout| {
                call.so_far.deadline.min(now + timeout)
            });
        let attempt = self.attempts.len();
        self.attempts.push(Attempt {
            call: id,
            server,
            began: now,
            ticket,
            is_retry: call.so_far.is_retry || call.so_far.made > 1,
            over: false,
        });
        if last {
            self.record.attempt(now - self.origin, server);
        }
        self.agenda.after(WIRE, Event::Reach(attempt));
        self.agenda.at(time_up, Event::TimeUp(attempt));
    }

    fn reach(&mut self, id: usize) {
        let Some((call, server)) = self.attempts.get(id).map(|a| (a.call, a.server)) else {
            return;
        };
        let Some(service) = self
            .calls
            .get(call)
            .and_then(|call| self.services.get_mut(call.hop))
        else {
            return;
        };
        if let Hop::Calls { after, .. } = service.hop {
            self.agenda.after(after, Event::Forward(id));
            return;
        }
        let Some(server) = service.servers.get_mut(server) else {
            return;
        };
        match server.receive(id, &mut self.draw) {
            Reception::Started(time) => self.agenda.after(time, Event::Done(id)),
            Reception::Queued => {}
            Reception::Refused => self.agenda.after(WIRE, Event::Answer(id, Ended::Unavailable)),
            Reception::Failed(time) => self.agenda.after(WIRE + time, Event::Answer(id, Ended::Failed)),
        }
    }

    fn forward(&mut self, id: usize) {
        let Some(attempt) = self.attempts.get(id) else {
            return;
        };
        let Some(call) = self.calls.get(attempt.call) else {
            return;
        };
        let so_far = SoFar {
            made: 0,
            deadline: call.so_far.deadline,
            is_retry: attempt.is_retry,
            tried: 0,
        };
        self.call(call.hop + 1, Caller::Attempt(id), call.priority, so_far);
    }

    fn done(&mut self, id: usize) {
        self.agenda.after(WIRE, Event::Answer(id, Ended::Served));
        let Some((call, server)) = self.attempts.get(id).map(|a| (a.call, a.server)) else {
            return;
        };
        let next = self
            .calls
            .get(call)
            .and_then(|call| self.services.get_mut(call.hop))
            .and_then(|service| service.servers.get_mut(server))
            .and_then(|server| server.next(&mut self.draw));
        if let Some((next, time)) = next {
            self.agenda.after(time, Event::Done(next));
        }
    }

    /// An attempt is over for its proxy. What comes later is nothing to it.
    fn end(&mut self, id: usize, ended: Ended) {
        let now = self.agenda.now();
        let Some(attempt) = self.attempts.get_mut(id) else {
            return;
        };
        if std::mem::replace(&mut attempt.over, true) {
            return;
        }
        let Some(call) = self.calls.get_mut(attempt.call) else {
            return;
        };
        let Some(proxy) = self
            .services
            .get_mut(call.hop)
            .and_then(|service| service.proxies.get_mut(call.proxy))
        else {
            return;
        };
        let took = now - attempt.began;
        proxy.end(attempt.server, attempt.ticket, (ended, took), now, &mut self.draw);
        let call_id = attempt.call;
        let pause = proxy.again(ended, &call.so_far, now, &mut self.draw);
        if let Some(pause) = pause {
            self.agenda.after(pause, Event::Again(call_id));
        } else {
            proxy.release(ended, now);
            self.answer(call_id, ended);
        }
    }

    /// A call's answer goes to whoever called.
    fn answer(&mut self, id: usize, ended: Ended) {
        let now = self.agenda.now();
        let Some(call) = self.calls.get(id) else { return };
        match call.caller {
            Caller::Client if ended == Ended::Served => {
                self.record
                    .served(call.began - self.origin, now - self.origin, call.priority);
            }
            Caller::Client => {}
            Caller::Attempt(attempt) => {
                self.agenda.after(WIRE, Event::Answer(attempt, ended));
            }
        }
    }

    fn sweep(&mut self) {
        let now = self.agenda.now();
        for proxy in self.services.iter_mut().flat_map(|service| &mut service.proxies) {
            proxy.compare(now, &mut self.draw);
        }
        self.agenda.after(SWEEP, Event::Sweep);
    }

    fn change(&mut self, change: Change) {
        let last = self.services.last_mut();
        let servers = last
            .map(|service| service.servers.as_mut_slice())
            .unwrap_or_default();
        match change {
            Change::Rate(rate) => self.rate = rate,
            Change::All(condition) => servers.iter_mut().for_each(|server| server.set(condition)),
            Change::First(condition) => servers
                .iter_mut()
                .take(1)
                .for_each(|server| server.set(condition)),
        }
    }
}
