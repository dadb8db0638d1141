//! One proxy in front of one service: the machines of `leeward-resilience`, put together as in the data path.

use crate::strategy::Strategy;
use leeward_policy::model::{BalancePolicy, Ewma, Priority};
use leeward_resilience::{
    Body, Breaker, Budget, CallEnd, Counts, Draw, Event, Facts, FailureKind, Gradient, Group, Health, Load,
    Member, Missed, Next, PeakEwma, Room, Sample, Standing, Tally, Ticket, Verdict, Window, after_failure,
    may_eject, outliers, rejection_probability, sheds,
};
use std::time::{Duration, Instant};

/// How an attempt, or a call, ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ended {
    /// With an answer.
    Served,
    /// With 500.
    Failed,
    /// With 503, by a server whose queue is full, or by a proxy that has asked one.
    Unavailable,
    /// With 503 by a proxy, before anything was done.
    Refused,
    /// It had its time.
    TimeUp,
}

/// What a retry of a call depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SoFar {
    /// Attempts.
    pub(crate) made: u8,
    /// When the client stops waiting.
    pub(crate) deadline: Instant,
    /// Whether the call is a retry of a hop before.
    pub(crate) is_retry: bool,
    /// Endpoints that were tried, a bit each.
    pub(crate) tried: u64,
}

/// A proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    strategy: Strategy,
    origin: Instant,
    endpoints: Vec<Endpoint>,
    /// Those that may be chosen, and which they are, a bit each.
    group: Group,
    healthy: u64,
    turn: u64,
    /// Calls under way.
    active: u32,
    budget: Option<Budget>,
    breaker: Breaker,
    /// Calls, failures and slow calls.
    breaker_window: Option<Window<3>>,
    gradient: Option<Gradient>,
    /// Requests and successes.
    admission_window: Option<Window<2>>,
    /// When endpoints were compared last.
    compared: Instant,
}

#[derive(Debug)]
struct Endpoint {
    health: Health,
    latency: PeakEwma,
    active: u32,
    /// Of the interval of outlier detection.
    requests: u64,
    failures: u64,
}

impl Proxy {
    pub(crate) fn new(strategy: &Strategy, endpoints: usize, origin: Instant) -> Self {
        let endpoint = || Endpoint {
            health: Health::NEW,
            latency: PeakEwma::new(0, &ewma(strategy)),
            active: 0,
            requests: 0,
            failures: 0,
        };
        Self {
            strategy: strategy.clone(),
            origin,
            endpoints: (0..endpoints).map(|_| endpoint()).collect(),
            group: group(0..endpoints, strategy),
            healthy: (1 << endpoints) - 1,
            turn: 0,
            active: 0,
            budget: strategy
                .retry_budget
                .map(|settings| Budget::new(&settings, origin)),
            breaker: Breaker::NEW,
            breaker_window: strategy
                .circuit_breaker
                .map(|settings| Window::new(settings.window, origin)),
            gradient: strategy
                .adaptive_concurrency
                .map(|settings| Gradient::new(&settings, origin)),
            admission_window: strategy
                .admission_control
                .map(|settings| Window::new(settings.window, origin)),
            compared: origin,
        }
    }

    /// Whether a request goes on; it must then be [released](Self::release).
    pub(crate) fn admit(&mut self, priority: Priority, now: Instant, draw: &mut impl Draw) -> bool {
        if let (Some(settings), Some(gradient)) = (&self.strategy.adaptive_concurrency, &self.gradient) {
            let limit = gradient.limit(settings);
            // The request itself counts, so that a small limit has room left for critical ones, too.
            let utilisation = f64::from(self.active + 1) / f64::from(limit);
            let shed = |settings| sheds(priority, utilisation, settings, draw);
            if self.active >= limit || self.strategy.load_shedding.as_ref().is_some_and(shed) {
                return false;
            }
        }
        if let (Some(settings), Some(window)) = (&self.strategy.admission_control, &self.admission_window) {
            let [requests, successes] = window.sums(now);
            let elapsed = settings.window.min(now - self.origin);
            if draw.unit() < rejection_probability(requests, successes, elapsed, settings) {
                return false;
            }
        }
        if let Some(budget) = &self.budget {
            budget.note_request(now);
        }
        self.active += 1;
        true
    }

    /// A request that was admitted is over.
    pub(crate) fn release(&mut self, ended: Ended, now: Instant) {
        self.active = self.active.saturating_sub(1);
        if let Some(window) = &self.admission_window {
            window.add(0, 1, now);
            window.add(1, u32::from(ended == Ended::Served), now);
        }
    }

    /// Chooses an endpoint that was not `tried`; `None` if the circuit is open or there is none.
    pub(crate) fn begin(
        &mut self,
        tried: u64,
        now: Instant,
        draw: &mut impl Draw,
    ) -> Option<(usize, Option<Ticket>)> {
        let ticket = match &self.strategy.circuit_breaker {
            Some(settings) => match self.breaker.ask(now, settings, draw) {
                (Verdict::Pass(ticket), transition) => {
                    self.forget_if(transition.is_some_and(|t| t.is_fresh()));
                    Some(ticket)
                }
                (Verdict::Refuse { .. }, _) => return None,
            },
            None => None,
        };
        self.regroup(now);
        let seen = Seen {
            endpoints: &self.endpoints,
            now: millis(now - self.origin),
            ewma: ewma(&self.strategy),
        };
        let has_tried = |endpoint: usize| tried & (1 << endpoint) != 0;
        let chosen = self.group.pick(self.turn, None, &seen, has_tried, draw)?;
        self.turn += 1;
        let endpoint = self.endpoints.get_mut(chosen)?;
        endpoint.active += 1;
        Some((chosen, ticket))
    }

    /// Takes in how an attempt ended.
    pub(crate) fn end(
        &mut self,
        endpoint: usize,
        ticket: Option<Ticket>,
        (ended, took): (Ended, Duration),
        now: Instant,
        draw: &mut impl Draw,
    ) {
        if let (Some(settings), Some(gradient)) = (&self.strategy.adaptive_concurrency, &mut self.gradient)
            && matches!(ended, Ended::Served | Ended::TimeUp)
        {
            let under_way = self.active;
            gradient.sample(Sample { took, under_way }, now, settings, draw);
        }
        if let Some(ticket) = ticket {
            self.settle(ticket, ended, took, now, draw);
        }
        let (ejected, total) = self.ejected(now);
        let Some(endpoint) = self.endpoints.get_mut(endpoint) else {
            return;
        };
        endpoint.active = endpoint.active.saturating_sub(1);
        let counts_as = match ended {
            Ended::Served => took,
            Ended::Failed | Ended::Unavailable | Ended::Refused | Ended::TimeUp => {
                took.max(self.strategy.failure_penalty)
            }
        };
        endpoint.latency =
            endpoint
                .latency
                .observe(counts_as, millis(now - self.origin), &ewma(&self.strategy));
        endpoint.requests += 1;
        endpoint.failures += u64::from(ended != Ended::Served);
        if let Some(settings) = &self.strategy.outlier_detection {
            let event = match ended {
                Ended::Served => Event::Succeed,
                Ended::Failed => Event::Fail(FailureKind::Server5xx),
                Ended::Unavailable | Ended::Refused | Ended::TimeUp => Event::Fail(FailureKind::Gateway),
            };
            let may = || may_eject(ejected, total, settings.max_ejection_percent);
            (endpoint.health, _) = endpoint.health.on(event, now, settings, may, draw);
        }
    }

    /// After which pause a call is tried again; `None` if it isn't.
    pub(crate) fn again(
        &mut self,
        ended: Ended,
        so_far: &SoFar,
        now: Instant,
        draw: &mut impl Draw,
    ) -> Option<Duration> {
        let missed = match ended {
            Ended::Served => return None,
            Ended::Failed => answer(500),
            Ended::Unavailable | Ended::Refused => answer(503),
            Ended::TimeUp => Missed::AttemptTimeout,
        };
        let facts = Facts {
            made: so_far.made,
            retry: self.strategy.retry.as_ref()?,
            missed,
            may_have_acted: ended != Ended::Refused,
            idempotent: true,
            body: Body::Whole,
            is_retry_of_hop_before: self.strategy.mark_retries && so_far.is_retry,
            other_endpoint: self.healthy & !so_far.tried != 0,
            deadline: Some(so_far.deadline),
            retry_after: None,
        };
        let take_room = || match (&self.budget, &self.strategy.retry_budget) {
            (Some(budget), Some(settings)) if !budget.try_spend(now, settings) => Room::BudgetExhausted,
            _ => Room::Taken,
        };
        match after_failure(&facts, now, draw, take_room) {
            Next::Retry { wait } => Some(wait),
            Next::GiveUp(_) => None,
        }
    }

    fn settle(&mut self, ticket: Ticket, ended: Ended, took: Duration, now: Instant, draw: &mut impl Draw) {
        let (Some(settings), Some(window)) = (&self.strategy.circuit_breaker, &self.breaker_window) else {
            return;
        };
        let end = CallEnd {
            ended: match ended {
                Ended::Served => leeward_resilience::Ended::Succeed,
                Ended::Failed | Ended::Unavailable | Ended::Refused | Ended::TimeUp => {
                    leeward_resilience::Ended::Fail
                }
            },
            took,
        };
        if self.breaker.is_counted(ticket, settings) {
            window.add(0, 1, now);
            window.add(1, u32::from(ended != Ended::Served), now);
            window.add(2, u32::from(end.is_slow(settings)), now);
        }
        let [calls, failures, slow] = window.sums(now);
        let counts = Counts {
            calls,
            failures,
            slow,
        };
        let transition = self.breaker.settle(ticket, &end, &counts, now, settings, draw);
        self.forget_if(transition.is_some_and(|t| t.is_fresh()));
    }

    /// Clears the breaker's window where it says nothing about the breaker's new state.
    fn forget_if(&self, fresh: bool) {
        if let Some(window) = self.breaker_window.as_ref().filter(|_| fresh) {
            window.clear();
        }
    }

    /// Compares endpoints, if it is time to.
    pub(crate) fn compare(&mut self, now: Instant, draw: &mut impl Draw) {
        let Some(settings) = &self.strategy.outlier_detection else {
            return;
        };
        if now - self.compared < settings.interval {
            return;
        }
        self.compared = now;
        let tallies: Vec<Tally> = self
            .endpoints
            .iter()
            .enumerate()
            .map(|(place, endpoint)| Tally {
                endpoint: place,
                requests: endpoint.requests,
                failures: endpoint.failures,
            })
            .collect();
        for (place, why) in outliers(&tallies, settings) {
            let (ejected, total) = self.ejected(now);
            if !may_eject(ejected, total, settings.max_ejection_percent) {
                break;
            }
            if let Some(endpoint) = self.endpoints.get_mut(place) {
                (endpoint.health, _) = endpoint.health.eject(why, now, settings, draw);
            }
        }
        for endpoint in &mut self.endpoints {
            endpoint.requests = 0;
            endpoint.failures = 0;
        }
    }

    /// How many endpoints are ejected, and how many there are.
    fn ejected(&self, now: Instant) -> (u32, u32) {
        let out = self.endpoints.iter().filter(|e| e.health.ejection(now).is_some());
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        (count(out.count()), count(self.endpoints.len()))
    }

    /// Leaves out endpoints that are ejected now, and takes back those that no longer are.
    fn regroup(&mut self, now: Instant) {
        let healthy = |place: &usize| {
            let endpoint = self.endpoints.get(*place);
            endpoint.is_some_and(|e| e.health.standing(now) == Standing::Healthy)
        };
        let members: Vec<usize> = (0..self.endpoints.len()).filter(healthy).collect();
        let bits = members.iter().fold(0, |bits, place| bits | 1 << place);
        if bits != self.healthy {
            self.healthy = bits;
            self.group = group(members.into_iter(), &self.strategy);
        }
    }
}

fn group(members: impl Iterator<Item = usize>, strategy: &Strategy) -> Group {
    let members = members.map(|endpoint| Member {
        endpoint,
        weight: 1.0,
    });
    // Only policies that hash ask for names, and none here does.
    Group::new(members.collect(), &strategy.balance, |_| "")
}

/// What a choice among endpoints looks at.
struct Seen<'a> {
    endpoints: &'a [Endpoint],
    now: u32,
    ewma: Ewma,
}

impl Load for Seen<'_> {
    fn active(&self, endpoint: usize) -> u32 {
        self.endpoints.get(endpoint).map_or(0, |e| e.active)
    }

    fn latency(&self, endpoint: usize) -> f64 {
        self.endpoints
            .get(endpoint)
            .map_or(0.0, |e| e.latency.estimate(self.now, &self.ewma))
    }
}

fn answer(status: u16) -> Missed {
    Missed::Answer {
        status,
        grpc_status: None,
    }
}

fn ewma(strategy: &Strategy) -> Ewma {
    match strategy.balance {
        BalancePolicy::PeakEwma(ewma) => ewma,
        BalancePolicy::LeastRequest
        | BalancePolicy::RoundRobin
        | BalancePolicy::Random
        | BalancePolicy::RingHash { .. }
        | BalancePolicy::Maglev { .. } => Ewma::DEFAULT,
    }
}

fn millis(since: Duration) -> u32 {
    u32::try_from(since.as_millis()).unwrap_or(u32::MAX)
}
