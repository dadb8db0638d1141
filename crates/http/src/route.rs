//! Route: from the request's head to a service and the limits of its rule.

use crate::admit::Received;
use crate::connection::Client;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::flags::About;
use crate::guard::Octets;
use crate::headers::{GRPC_TIMEOUT, IDEMPOTENCY_KEY, TIMEOUT, cookie};
use crate::inbound::{Forward, to_endpoint};
use crate::worker::Worker;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, header};
use leeward_policy::model::{
    Cause, FlagCondition, HashKey, Priority, Protocol, RequestPriority, Retry, RetryOn, RouteRule,
};
use leeward_policy::{FallbackIdx, Head, RuleIdx, RuleView, ServiceIdx, Snapshot, Target};
use leeward_resilience::deadline::{cut, parse};
use leeward_resilience::{hash_of, is_idempotent};
use leeward_telemetry::{Direction, FlagSeen, Peer};
use leeward_upstream::TCP_UPGRADE;
use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is to be done with a request.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) service: ServiceIdx,
    /// The endpoints that it may go to, of the service's.
    pub(crate) subset: Option<usize>,
    /// This endpoint of the service and no other; `None` lets the balancer choose.
    pub(crate) only: Option<usize>,
    /// The rule that it is by; its circuit and rate limits hold.
    pub(crate) rule: Option<RuleIdx>,
    /// When it is tried again.
    pub(crate) retry: Arc<Retry>,
    /// Longest attempt.
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) fallback: Option<FallbackIdx>,
    /// When the attempts must be over.
    pub(crate) attempts_until: Option<Instant>,
    /// A hash of what names it, where policy hashes.
    pub(crate) hash: Option<u64>,
    pub(crate) priority: Priority,
    /// Whether it may be sent twice.
    pub(crate) idempotent: bool,
    /// It is one more attempt of a call that failed: it takes of the retry budget, and no circuit is asked.
    pub(crate) again: bool,
    /// Why no call is made at all.
    pub(crate) refused: Option<Cause>,
    /// Endpoints that it may not go to.
    pub(crate) excluded: Vec<usize>,
    /// Flags, levels, a cache, a fault or a queue have a part in it.
    pub(crate) extras: bool,
    /// Its rule has filters or a router.
    pub(crate) has_plugins: bool,
    /// This proxy is the gateway that passes it on.
    pub(crate) forward: Option<Rc<Forward>>,
}

impl Plan {
    /// What a plugin has changed of a request counts.
    pub(crate) fn again(&mut self, exchange: &mut Exchange, request: &Received) {
        let snapshot = Arc::clone(&exchange.snapshot);
        let key = snapshot
            .service(self.service)
            .and_then(|view| view.spec.balance.policy.hash_key());
        self.hash = key.and_then(|key| hash(exchange, request, key));
        self.idempotent = may_be_sent_twice(request);
        if let Some(rule) = self.rule.and_then(|idx| snapshot.rule(idx)) {
            self.priority = priority(&rule.priority, request);
        }
    }

    /// A call of a service, for no rule.
    pub(crate) fn to(service: ServiceIdx, worker: &Worker) -> Self {
        Self::bare(service, Arc::clone(&worker.once))
    }

    /// The same, and when it is tried again.
    pub(crate) fn bare(service: ServiceIdx, retry: Arc<Retry>) -> Self {
        Self {
            service,
            subset: None,
            only: None,
            rule: None,
            retry,
            attempt_timeout: None,
            fallback: None,
            attempts_until: None,
            hash: None,
            priority: Priority::default(),
            idempotent: false,
            again: false,
            refused: None,
            excluded: Vec::new(),
            extras: false,
            has_plugins: false,
            forward: None,
        }
    }

    /// One attempt at another service, with what is left of the request's time.
    pub(crate) fn reroute(&self, service: ServiceIdx, exchange: &Exchange) -> Self {
        Self {
            attempts_until: exchange.deadline,
            priority: self.priority,
            idempotent: self.idempotent,
            ..Self::to(service, exchange.worker())
        }
    }

    /// One attempt at the same service, in one of these zones (any, if none is named) other than this proxy's and
    /// those that were tried. `None`: there is no endpoint in such a zone.
    pub(crate) fn elsewhere(
        &self,
        zones: &[Arc<str>],
        tried: &[Arc<str>],
        exchange: &Exchange,
    ) -> Option<Self> {
        let view = exchange.snapshot.service(self.service)?;
        let own = &exchange.worker().zone;
        let is_out = |zone: &Arc<str>| {
            zone == own || tried.contains(zone) || !zones.is_empty() && !zones.contains(zone)
        };
        let endpoints = view.endpoints.iter().enumerate();
        let excluded: Vec<usize> = endpoints
            .filter(|(_, e)| is_out(&e.zone))
            .map(|(i, _)| i)
            .collect();
        (excluded.len() < view.endpoints.len()).then(|| Self {
            subset: self.subset,
            hash: self.hash,
            again: true,
            excluded,
            ..self.reroute(self.service, exchange)
        })
    }
}

/// The rule and the backend of a request that plugins have seen, or a client from outside has sent: neither is chosen anew by
/// what has become of it.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) rule: Arc<str>,
    pub(crate) service: Arc<str>,
    /// By the name of its state; `None` is any.
    pub(crate) subset: Option<Arc<str>>,
}

impl Choice {
    /// `None`: the rule is found again by the request.
    pub(crate) fn of(exchange: &Exchange, plan: &Plan) -> Option<Self> {
        let snapshot = &exchange.snapshot;
        let rule = snapshot.rule(plan.rule?)?;
        if !is_kept(rule, exchange.from_outside) {
            return None;
        }
        let service = snapshot.service(plan.service)?;
        Some(Self {
            rule: Arc::clone(&rule.id),
            service: Arc::clone(&service.name),
            subset: Some(service.subset_id(plan.subset)),
        })
    }

    /// Whether the rule is still there, and still such a one.
    pub(crate) fn holds(&self, snapshot: &Snapshot, from_outside: bool) -> bool {
        let found = self.rule(snapshot, from_outside);
        found.is_some_and(|(_, rule)| is_kept(rule, from_outside))
    }

    /// The rule, if it is still open to whoever has sent the request.
    fn rule<'s>(&self, snapshot: &'s Snapshot, from_outside: bool) -> Option<(RuleIdx, &'s RuleView)> {
        let found = snapshot.rule_with_id(&self.rule);
        found.filter(|(_, rule)| {
            if from_outside {
                rule.for_gateways
            } else {
                rule.for_mesh
            }
        })
    }

    /// The same backend, if it is still one of the rule's.
    fn target(&self, snapshot: &Snapshot, rule: &RuleView) -> Option<Target> {
        let mut targets = rule.choices().map(|(_, target, _)| target);
        targets.find(|target| {
            let view = snapshot.service(target.service);
            view.is_some_and(|view| {
                let subset = self.subset.as_ref();
                view.name == self.service && subset.is_none_or(|id| view.subset_id(target.subset) == *id)
            })
        })
    }
}

/// Whether what is sent again goes by its rule again: where plugins may have changed the request, and where a client from
/// outside has sent it, to whom only the rules of one listener are open.
const fn is_kept(rule: &RuleView, from_outside: bool) -> bool {
    rule.has_plugins || from_outside
}

/// A request's head as the route table reads it.
struct HeadView<'a> {
    host: Cow<'a, str>,
    request: &'a Received,
    worker: &'a Worker,
    snapshot: &'a Snapshot,
    peer: &'a Peer,
    /// Flags that were looked at on the way.
    flags: RefCell<Vec<FlagSeen>>,
}

impl Head for HeadView<'_> {
    fn host(&self) -> &str {
        &self.host
    }

    fn path(&self) -> &str {
        self.request.path()
    }

    fn method(&self) -> &str {
        self.request.parts.method.as_str()
    }

    fn any_value(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        // Policy has checked the name, and nearly all are known statically.
        let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
            return false;
        };
        self.request
            .parts
            .headers
            .get_all(name)
            .iter()
            .any(|value| test(value.as_bytes()))
    }

    fn allows(&self, rule: RuleIdx) -> bool {
        let Some(rule) = self.snapshot.rule(rule) else {
            return false;
        };
        rule.when.as_ref().is_none_or(|condition| {
            let about = self.about(&rule.route);
            let (holds, seen) = about.holds(condition);
            self.flags.borrow_mut().push(seen);
            holds
        })
    }
}

impl HeadView<'_> {
    fn about<'a>(&'a self, route: &'a str) -> About<'a> {
        About {
            worker: self.worker,
            snapshot: self.snapshot,
            parts: &self.request.parts,
            peer: self.peer,
            host: &self.host,
            route: Some(route),
            cause: None,
        }
    }

    /// The backend for a request.
    fn backend(&self, rule: &RuleView) -> Option<Target> {
        let mut draw = |total| if total > 1 { fastrand::u64(..total) } else { 0 };
        if !rule.has_conditional_backends() {
            return rule.backend(draw(rule.total_weight()));
        }
        let about = self.about(&rule.route);
        let mut holds = |condition: &FlagCondition| {
            let (holds, seen) = about.holds(condition);
            self.flags.borrow_mut().push(seen);
            holds
        };
        rule.backend_when(&mut holds, &mut draw)
    }
}

/// Finds what to do with a request.
pub(crate) fn route(exchange: &mut Exchange, client: &Client, request: &Received) -> Result<Plan, Failure> {
    let host = check_authority(request.authority())?;
    match client.direction {
        Direction::Outbound | Direction::Ingress if request.upgrade.is_some() && asks_for_bytes(request) => {
            Err(Failure::BadRequest(
                "a change of protocol that only proxies ask for",
            ))
        }
        Direction::Outbound | Direction::Ingress => match by_rule(exchange, client, host, request) {
            Err(Failure::NoRoute) => by_destination(exchange, client, request),
            planned => planned,
        },
        Direction::Inbound => to_endpoint(exchange, request),
    }
}

/// Whether a request is a TCP connection's beginning, from proxy to proxy.
pub(crate) fn asks_for_bytes(request: &Received) -> bool {
    let protocol = request.parts.headers.get(header::UPGRADE);
    protocol.is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(TCP_UPGRADE.as_bytes()))
}

/// Where no route is for a request, but its client meant to connect to an address of a service: there, by every default
/// of a rule.
fn by_destination(exchange: &mut Exchange, client: &Client, request: &Received) -> Result<Plan, Failure> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let original = client.original.as_ref().ok_or(Failure::NoRoute)?;
    let service = snapshot.service_at(original.address()).ok_or(Failure::NoRoute)?;
    let view = snapshot.service(service).ok_or(Failure::NoRoute)?;
    if view.spec.protocol == Protocol::Tcp {
        return Err(Failure::NoRoute);
    }
    exchange.record.service = Some(Arc::clone(&view.name));
    let defaults = RouteRule::new(Vec::new(), Vec::new());
    let limit = cut(defaults.request_timeout, callers_timeout(exchange.grpc, request));
    let until = limit.and_then(|limit| exchange.record.started.checked_add(limit));
    exchange.deadline = until;
    exchange.intake.stall.limit(defaults.idle_timeout);
    let idempotent = may_be_sent_twice(request);
    exchange.intake.keep(kept_bytes(&defaults.retry, idempotent));
    let key = view.spec.balance.policy.hash_key();
    Ok(Plan {
        retry: Arc::clone(&exchange.worker().of_plugins),
        attempts_until: until,
        idempotent,
        hash: key.and_then(|key| hash(exchange, request, key)),
        ..Plan::to(service, exchange.worker())
    })
}

/// Outbound: policy's routes decide.
fn by_rule(
    exchange: &mut Exchange,
    client: &Client,
    host: &str,
    request: &Received,
) -> Result<Plan, Failure> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let worker = Rc::clone(exchange.worker());
    let head = HeadView {
        host: lower_case(host),
        request,
        worker: &worker,
        snapshot: &snapshot,
        peer: &exchange.record.peer,
        flags: RefCell::default(),
    };
    let found = match &client.edge {
        None => snapshot.route(&head),
        Some(edge) => snapshot.route_at(edge.listener(&snapshot, &head.host)?, &head),
    };
    let target = found.and_then(|(_, rule)| head.backend(rule));
    let flags = head.flags.into_inner();
    for flag in flags {
        exchange.record.saw(flag);
    }
    let (idx, rule) = found.ok_or(Failure::NoRoute)?;
    planned(exchange, &snapshot, request, (idx, rule), target)
}

/// The same for a request that plugins have seen: by the rule of then, as policy has it now.
pub(crate) fn route_as(
    exchange: &mut Exchange,
    request: &Received,
    choice: &Choice,
) -> Result<Plan, Failure> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let found = choice.rule(&snapshot, exchange.from_outside);
    let (idx, rule) = found.ok_or(Failure::NoRoute)?;
    let target = choice.target(&snapshot, rule).or_else(|| rule.any_backend());
    planned(exchange, &snapshot, request, (idx, rule), target)
}

/// What a rule makes of a request.
fn planned(
    exchange: &mut Exchange,
    snapshot: &Snapshot,
    request: &Received,
    (idx, rule): (RuleIdx, &RuleView),
    target: Option<Target>,
) -> Result<Plan, Failure> {
    let record = &mut exchange.record;
    record.route = Some(Arc::clone(&rule.route));
    record.rule = rule.position;
    record.pattern = Some(Arc::clone(&rule.pattern));
    if rule.has_plugins || rule.fallback.is_some() {
        exchange.rule_id = Some(Arc::clone(&rule.id));
    }
    let record = &mut exchange.record;
    // Where no backend's condition holds, the ladder still has its turn.
    let refused = target.is_none().then_some(Cause::NoEndpoint);
    let Target { service, subset } = target
        .or_else(|| rule.any_backend())
        // What has no weight may still be a router's choice.
        .or_else(|| rule.choices().next().map(|(_, target, _)| target))
        .ok_or(Failure::Call(Cause::NoEndpoint))?;
    let view = snapshot.service(service);
    record.service = view.map(|view| Arc::clone(&view.name));
    let started = record.started;
    // Whoever calls may wait for less than policy lets a request take.
    let limit = cut(rule.request_timeout, callers_timeout(exchange.grpc, request));
    exchange.deadline = limit.and_then(|limit| started.checked_add(limit));
    // The ladder needs time of its own, or a timeout could never be answered.
    let ladder = rule.fallback.and_then(|idx| snapshot.fallback(idx));
    let attempts_until = limit.and_then(|limit| match ladder {
        Some(ladder) => started.checked_add(limit - limit / 100 * ladder.reserve_percent),
        None => started.checked_add(limit),
    });
    let idempotent = may_be_sent_twice(request);
    exchange.intake.stall.limit(rule.idle_timeout);
    let queued = ladder.map_or(0, |ladder| ladder.queued_bytes);
    let kept = kept_bytes(&rule.retry, idempotent).max(usize::try_from(queued).unwrap_or(usize::MAX));
    if kept > 0 {
        exchange.intake.keep(kept);
    }
    let key = view.and_then(|view| view.spec.balance.policy.hash_key());
    Ok(Plan {
        service,
        subset,
        only: None,
        rule: Some(idx),
        retry: Arc::clone(&rule.retry),
        attempt_timeout: rule.attempt_timeout,
        fallback: rule.fallback,
        attempts_until,
        hash: key.and_then(|key| hash(exchange, request, key)),
        priority: priority(&rule.priority, request),
        idempotent,
        again: false,
        refused,
        excluded: Vec::new(),
        extras: rule.extras,
        has_plugins: rule.has_plugins,
        forward: None,
    })
}

/// By its method, or because it says so.
pub(crate) fn may_be_sent_twice(request: &Received) -> bool {
    is_idempotent(request.parts.method.as_str())
        || !request.own_key && request.parts.headers.contains_key(IDEMPOTENCY_KEY)
}

/// How long whoever sent a request says that it waits.
pub(crate) fn callers_timeout(grpc: bool, request: &Received) -> Option<Duration> {
    let headers = &request.parts.headers;
    let said = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| parse(value.as_bytes()))
    };
    let own = said(TIMEOUT);
    if grpc { cut(said(GRPC_TIMEOUT), own) } else { own }
}

/// How much of a body is kept: nothing where only what fails before a body is sent is tried again.
fn kept_bytes(retry: &Retry, idempotent: bool) -> usize {
    let early = |on: &RetryOn| matches!(on, RetryOn::ConnectFailure | RetryOn::RefusedStream);
    let late = retry.max_attempts > 1 && !retry.on.iter().all(early) || retry.hedge.is_some();
    if late && (idempotent || retry.non_idempotent) {
        usize::try_from(retry.max_body_bytes).unwrap_or(usize::MAX)
    } else {
        0
    }
}

fn priority(settings: &RequestPriority, request: &Received) -> Priority {
    let said = settings
        .header
        .as_deref()
        .and_then(|name| said_priority(request, name));
    said.unwrap_or(settings.default)
}

/// The priority that a header names, in any case.
pub(crate) fn said_priority(request: &Received, header: &str) -> Option<Priority> {
    let said = request.parts.headers.get(header)?.to_str().ok()?.trim();
    Priority::ALL
        .into_iter()
        .find(|p| p.as_str().eq_ignore_ascii_case(said))
}

/// A hash of what names a request; a cookie that isn't there is made, where policy says how.
fn hash(exchange: &mut Exchange, request: &Received, key: &HashKey) -> Option<u64> {
    let headers = &request.parts.headers;
    match key {
        HashKey::Header(name) => headers.get(&**name).map(|value| hash_of(value.as_bytes())),
        HashKey::Source => Some(hash_of(Octets::of(exchange.record.peer.address.ip()).as_bytes())),
        HashKey::Cookie { name, ttl, path } => {
            if let Some(value) = cookie(headers, name) {
                return Some(hash_of(value.as_bytes()));
            }
            let ttl = (*ttl)?;
            let value = format!("{:016x}", fastrand::u64(..));
            let age = if ttl.is_zero() {
                String::new()
            } else {
                format!("; Max-Age={}", ttl.as_secs().max(1))
            };
            let made = format!("{name}={value}; Path={path}{age}; HttpOnly");
            exchange.cookie = HeaderValue::try_from(made).ok();
            Some(hash_of(value.as_bytes()))
        }
    }
}

/// The host of an authority that is one (RFC 3986 §3.2), without its port.
pub(crate) fn check_authority(authority: &str) -> Result<&str, Failure> {
    plain_host(authority).map_or_else(|| any_host(authority), Ok)
}

fn any_host(authority: &str) -> Result<&str, Failure> {
    const BAD: Failure = Failure::BadRequest("Host is not an authority");
    // A percent code would be another spelling of a host, which nobody uses; but in an address it names a zone (RFC 6874).
    let coded = !authority.starts_with('[');
    let allowed =
        |b: u8| b.is_ascii_alphanumeric() || b"-._~:[]!$&'()*+,;=".contains(&b) || b == b'%' && !coded;
    if authority.is_empty() || !authority.bytes().all(allowed) {
        return Err(BAD);
    }
    let (host, port) = match authority.rfind(']') {
        Some(end) => authority.split_at(end + 1),
        None if authority.contains('[') => return Err(BAD),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let port = port.strip_prefix(':').unwrap_or(port);
    if host.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(BAD);
    }
    // Other proxies take what this takes, and it is rarely asked.
    if host.ends_with(']') && authority.parse::<Authority>().is_err() {
        return Err(BAD);
    }
    Ok(host)
}

/// The host of an authority that is a name or an address of IPv4, as most are, with a port or without: told in one go.
fn plain_host(authority: &str) -> Option<&str> {
    let is_plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    let len = authority.bytes().take_while(is_plain).count();
    let (host, port) = authority.split_at_checked(len)?;
    let is_port =
        port.is_empty() || port.starts_with(':') && port.bytes().skip(1).all(|b| b.is_ascii_digit());
    (!host.is_empty() && is_port).then_some(host)
}

pub(crate) fn lower_case(host: &str) -> Cow<'_, str> {
    if host.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::{
        Backend, Gateway, HostMatch, Parent, PathMatch, Route, RouteMatch, Service, Spec, Zone,
    };
    use leeward_policy::{Name, Resource, Staged, Viewer, World};

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    /// Policy with one rule, `r/0`, whose route has these parents; `None` is without it.
    fn policy(parents: Option<&[Parent]>) -> Snapshot {
        let any = RouteMatch {
            path: PathMatch::Prefix("".into()),
            method: None,
            headers: vec![],
        };
        let route = parents.map(|parents| {
            let route = Route {
                hostnames: vec![HostMatch::Any],
                rules: vec![RouteRule::new(vec![any], vec![Backend::new(name("s"), 1)])],
                parents: parents.to_vec(),
            };
            ("r", Spec::Route(route))
        });
        let gateway = Gateway {
            zones: vec![name("a")],
            proxies: vec![],
            listeners: vec![],
            trusted_hops: 0,
        };
        let base = [
            ("g", Spec::Gateway(gateway)),
            ("a", Spec::Zone(Zone::new(vec![], vec![]))),
            ("s", Spec::Service(Service::new(vec![]))),
        ];
        let upserts = base.into_iter().chain(route).map(|(text, spec)| {
            Arc::new(Resource {
                name: name(text),
                revision: 1,
                labels: std::collections::BTreeMap::new(),
                spec,
            })
        });
        let mut world = World::default();
        world.commit(Staged {
            upserts: upserts.collect(),
            ..Staged::default()
        });
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("p"),
        };
        world.snapshot(viewer, 1)
    }

    #[test]
    fn what_is_sent_again_goes_by_rules_that_are_open_to_its_sender() {
        let gateway = Parent::Gateway {
            gateway: name("g"),
            listener: None,
        };
        let choice = Choice {
            rule: "r/0".into(),
            service: "s".into(),
            subset: None,
        };
        for (parents, mesh, outside) in [
            (Some(&[][..]), true, false),
            (Some(&[Parent::Mesh]), true, false),
            (Some(std::slice::from_ref(&gateway)), false, true),
            (Some(&[Parent::Mesh, gateway.clone()]), true, true),
            (None, false, false),
        ] {
            let snapshot = policy(parents);
            let is_open = |from_outside| choice.rule(&snapshot, from_outside).is_some();
            assert_eq!((is_open(false), is_open(true)), (mesh, outside), "{parents:?}");
            // Without plugins the mesh's are routed anew, and those from outside never.
            assert_eq!(
                (choice.holds(&snapshot, false), choice.holds(&snapshot, true)),
                (false, outside)
            );
        }
    }

    #[test]
    fn hosts_are_read_without_their_ports() {
        assert_eq!(check_authority("a.example:80"), Ok("a.example"));
        assert_eq!(check_authority("a.example:"), Ok("a.example"));
        assert_eq!(check_authority("[::1]:80"), Ok("[::1]"));
        assert_eq!(lower_case("A.Example"), "a.example");
        for bad in [
            "",
            ":80",
            "a/b",
            "a b",
            "u@h",
            "a:80:80",
            "a:x",
            "h\u{e9}",
            "%61.example",
            "[::1",
            "::1]",
            "[[::1]]",
            "a[::1",
        ] {
            assert!(check_authority(bad).is_err(), "{bad:?}");
        }
    }

    proptest::proptest! {
        /// What is told in one go is told as it is otherwise.
        #[test]
        fn a_plain_host_is_a_host(authority in "[a-z0-9._:%@\\[\\]é-]{0,12}") {
            if let Some(host) = plain_host(&authority) {
                proptest::prop_assert_eq!(any_host(&authority), Ok(host));
            }
        }
    }
}
