//! One worker's pen: begins records, and writes them down.

use crate::access;
use crate::catalogue::{
    ACTIVE, ATTEMPTS, AUTHORIZATION, CAPTURED, CIRCUIT_CHANGES, CONNECTIONS_REFUSED, DEGRADATION_CHANGES,
    ENDPOINT_CHANGES, IDENTITY_RENEWALS, Metric, PLUGIN_CALL_SECONDS, PLUGIN_CALLS, PLUGIN_CUSTOM,
    PLUGIN_CUSTOM_VALUES, PLUGIN_FAULTS, REFUSED, REQUEST_SECONDS, REQUESTS, RETRIES, RETRIES_REFUSED,
    TCP_BYTES, TCP_CONNECTIONS, TCP_OPEN, TCP_SECONDS, TRANSPORT_FALLBACKS, WOULD_REFUSE,
};
use crate::hub::Hub;
use crate::reason::{Outcome, Reason};
use crate::record::{Attempt, Direction, Peer, Record, Tcp};
use crate::series::{Cell, Histogram, Labels, Shard};
use crate::span;
use crate::trace::TraceContext;
use http::{header, request};
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Counts and records what one worker does. Not shared: nothing in it is locked on the way of a request.
#[derive(Debug)]
pub struct Recorder {
    hub: Arc<Hub>,
    shard: Arc<Shard>,
    active: [Arc<Cell>; 3],
    tcp_open: [Arc<Cell>; 3],
    requests: RefCell<Cache<RequestKey, RequestCells>>,
    attempts: RefCell<Cache<AttemptKey, (Kept, Arc<Cell>)>>,
    plugin_calls: RefCell<Cache<[usize; 3], PluginCells>>,
    authorized: RefCell<Cache<AuthorizedKey, AuthorizedCell>>,
}

type Cache<K, V> = HashMap<K, V, BuildHasherDefault<Mixer>>;
/// Label texts, by the address of the shared text. The entry keeps the texts, so that no address is used for
/// another one while it stands here.
type Kept = [Option<Arc<str>>; 3];

#[derive(Debug, Eq, Hash, PartialEq)]
struct RequestKey {
    texts: [usize; 3],
    direction: Direction,
    outcome: Outcome,
    reason: Reason,
    class: u16,
}

#[derive(Debug)]
struct RequestCells {
    _kept: Kept,
    requests: Arc<Cell>,
    seconds: Arc<Histogram>,
}

#[derive(Debug)]
struct PluginCells {
    _kept: Arc<str>,
    calls: Arc<Cell>,
    seconds: Arc<Histogram>,
}

/// The policy's name, kept since its address is the key, and the count.
type AuthorizedCell = (Arc<str>, Arc<Cell>);

#[derive(Debug, Eq, Hash, PartialEq)]
struct AuthorizedKey {
    policy: usize,
    decision: usize,
    direction: Direction,
}

#[derive(Debug, Eq, Hash, PartialEq)]
struct AttemptKey {
    texts: [usize; 2],
    status: u16,
    cause: usize,
    transport: usize,
}

/// Entries of a cache; past that (policy has changed often) it begins anew.
const MAX_CACHED: usize = 4096;

impl Recorder {
    /// A worker's recorder.
    pub fn new(hub: &Arc<Hub>) -> Self {
        let shard = hub.shard();
        let of_each = |metric| {
            [Direction::Outbound, Direction::Inbound, Direction::Ingress]
                .map(|direction| shard.counter(metric, vec![direction.as_str().into()]))
        };
        let (active, tcp_open) = (of_each(ACTIVE), of_each(TCP_OPEN));
        Self {
            hub: Arc::clone(hub),
            shard,
            active,
            tcp_open,
            requests: RefCell::default(),
            attempts: RefCell::default(),
            plugin_calls: RefCell::default(),
            authorized: RefCell::default(),
        }
    }

    /// Begins the record of a request.
    pub fn start(
        &self,
        direction: Direction,
        head: &request::Parts,
        peer: &Peer,
        generation: u64,
        now: Instant,
    ) -> Record {
        of(&self.active, direction).add(1);
        Record {
            direction,
            started: now,
            method: head.method.clone(),
            uri: head.uri.clone(),
            host: head.headers.get(header::HOST).cloned(),
            user_agent: head.headers.get(header::USER_AGENT).cloned(),
            version: head.version,
            peer: peer.clone(),
            generation,
            route: None,
            rule: 0,
            pattern: None,
            service: None,
            attempts: Vec::new(),
            gave_up: None,
            limit: None,
            panic: false,
            cause: None,
            fallback: None,
            fallback_kind: None,
            plugin: None,
            plugin_faults: Vec::new(),
            flags: Vec::new(),
            level: None,
            fault: false,
            cache: None,
            authorization: None,
            audited: Vec::new(),
            token: None,
            gateway: None,
            outcome: Outcome::Failed,
            reason: Reason::Ok,
            status: 0,
            request_bytes: 0,
            response_bytes: 0,
            trace: TraceContext::begin(&head.headers, self.hub.trace_ratio()),
            tcp: None,
        }
    }

    /// What was begun as a request turns out to be a TCP connection. Call once.
    pub fn is_tcp(&self, record: &mut Record, tcp: Tcp) {
        of(&self.active, record.direction).sub(1);
        of(&self.tcp_open, record.direction).add(1);
        record.tcp = Some(Box::new(tcp));
    }

    /// Writes a record down. Call once.
    pub fn finish(&self, record: &mut Record, now: Instant) {
        let duration = now.saturating_duration_since(record.started);
        if record.tcp.is_some() {
            of(&self.tcp_open, record.direction).sub(1);
            self.count_tcp(record, duration);
        } else {
            of(&self.active, record.direction).sub(1);
            self.count(record, duration);
        }
        for attempt in &record.attempts {
            self.count_attempt(record.service.as_ref(), attempt);
        }
        // A trace that went wrong is worth keeping, unless whoever began it said not to.
        let anomalous = record.outcome != Outcome::Served && record.trace.parent.is_none();
        if self.hub.exports() && (record.trace.sampled || anomalous) {
            self.hub.export(span::spans(record, duration, &self.hub));
        }
        if let Some(log) = self.hub.access_log() {
            log.write(access::line(record, duration, &self.hub));
        }
    }

    /// Looked up each time: a connection costs more than that.
    fn count_tcp(&self, record: &Record, duration: Duration) {
        let connected = record.attempts.last().filter(|a| a.cause.is_none());
        let text = |t: Option<&Arc<str>>| t.cloned().unwrap_or_else(|| Arc::from("-"));
        let direction = || Arc::from(record.direction.as_str());
        let service = || text(record.service.as_ref());
        let labels = vec![
            direction(),
            service(),
            text(connected.map(|a| &a.zone)),
            record.outcome.as_str().into(),
            record.reason.as_str().into(),
        ];
        self.shard.counter(TCP_CONNECTIONS, labels).add(1);
        self.shard
            .histogram(TCP_SECONDS, vec![direction(), service()])
            .observe(duration);
        for (way, bytes) in [
            ("sent", record.request_bytes),
            ("received", record.response_bytes),
        ] {
            self.shard
                .counter(TCP_BYTES, vec![direction(), service(), way.into()])
                .add(bytes);
        }
    }

    /// Counts a captured connection by what it was taken for.
    pub fn captured(&self, taken_for: &'static str) {
        self.count_words(CAPTURED, &[], &[taken_for]);
    }

    fn count(&self, record: &Record, duration: Duration) {
        let zone = record
            .attempts
            .last()
            .filter(|a| a.status.is_some())
            .map(|a| &a.zone);
        let texts = [record.route.as_ref(), record.service.as_ref(), zone];
        let key = RequestKey {
            texts: texts.map(address),
            direction: record.direction,
            outcome: record.outcome,
            reason: record.reason,
            class: record.status / 100,
        };
        let mut cache = self.requests.borrow_mut();
        if let Some(cells) = cache.get(&key) {
            cells.requests.add(1);
            cells.seconds.observe(duration);
            return;
        }
        let text = |t: Option<&Arc<str>>| t.cloned().unwrap_or_else(|| Arc::from("-"));
        let [route, service, zone] = texts;
        let class = if record.status == 0 {
            "-".into()
        } else {
            format!("{}xx", record.status / 100).into()
        };
        let labels: Labels = vec![
            record.direction.as_str().into(),
            text(route),
            text(service),
            text(zone),
            record.outcome.as_str().into(),
            class,
            record.reason.as_str().into(),
        ];
        let cells = RequestCells {
            requests: self.shard.counter(REQUESTS, labels),
            seconds: self.shard.histogram(
                REQUEST_SECONDS,
                vec![record.direction.as_str().into(), text(route)],
            ),
            _kept: texts.map(Option::<&Arc<str>>::cloned),
        };
        cells.requests.add(1);
        cells.seconds.observe(duration);
        insert(&mut cache, key, cells);
    }

    fn count_attempt(&self, service: Option<&Arc<str>>, attempt: &Attempt) {
        let texts = [service, Some(&attempt.zone)];
        let key = AttemptKey {
            texts: texts.map(address),
            status: attempt.status.unwrap_or(0),
            cause: attempt.cause.map_or(0, |c| c.as_ptr().addr()),
            transport: attempt.transport.map_or(0, |t| t.as_ptr().addr()),
        };
        let mut cache = self.attempts.borrow_mut();
        if let Some((_, cell)) = cache.get(&key) {
            cell.add(1);
            return;
        }
        let result: Arc<str> = match (attempt.cause, attempt.status) {
            (Some(cause), _) => cause.into(),
            (None, Some(status)) => status.to_string().into(),
            (None, None) => "abandoned".into(),
        };
        let text = |t: Option<&Arc<str>>| t.cloned().unwrap_or_else(|| Arc::from("-"));
        let transport = attempt.transport.unwrap_or("-").into();
        let labels = vec![text(service), Arc::clone(&attempt.zone), transport, result];
        let cell = self.shard.counter(ATTEMPTS, labels);
        cell.add(1);
        insert(
            &mut cache,
            key,
            ([service.cloned(), Some(Arc::clone(&attempt.zone)), None], cell),
        );
    }

    /// Counts an attempt beyond a request's first: `retry` or `hedge`.
    pub fn tried_again(&self, service: &Arc<str>, kind: &'static str) {
        self.count_words(RETRIES, &[service], &[kind]);
    }

    /// Counts that TCP was taken to a proxy of a zone, since QUIC did not get through.
    pub fn fell_back(&self, zone: &Arc<str>) {
        self.count_words(TRANSPORT_FALLBACKS, &[zone], &[]);
    }

    /// Counts a failed request that was not tried again.
    pub fn not_tried_again(&self, service: &Arc<str>, reason: &'static str) {
        self.count_words(RETRIES_REFUSED, &[service], &[reason]);
    }

    /// Counts a request that a limit of this proxy refused.
    pub fn refused(&self, service: &Arc<str>, limit: &'static str) {
        self.count_words(REFUSED, &[service], &[limit]);
    }

    /// Counts a request that passed only because its circuit's mode is to observe.
    pub fn would_be_refused(&self, service: &Arc<str>) {
        self.count_words(WOULD_REFUSE, &[service], &[]);
    }

    /// Counts a circuit's change: `kind` is `service`, `route` or `endpoint`.
    pub fn circuit_changed(
        &self,
        kind: &'static str,
        name: &Arc<str>,
        to: &'static str,
        reason: &'static str,
    ) {
        self.shard
            .counter(
                CIRCUIT_CHANGES,
                vec![kind.into(), Arc::clone(name), to.into(), reason.into()],
            )
            .add(1);
    }

    /// Counts a change of an endpoint's health.
    pub fn endpoint_changed(&self, service: &Arc<str>, change: &'static str, reason: &'static str) {
        self.count_words(ENDPOINT_CHANGES, &[service], &[change, reason]);
    }

    /// Counts a change of a degradation policy's level: `by` is `override`, `control` or `trigger`.
    pub fn degradation_changed(&self, policy: &Arc<str>, to: &Arc<str>, by: &'static str) {
        self.count_words(DEGRADATION_CHANGES, &[policy, to], &[by]);
    }

    /// Counts what came of asking for the next certificate.
    pub fn identity_renewed(&self, outcome: &'static str) {
        self.count_words(IDENTITY_RENEWALS, &[], &[outcome]);
    }

    /// Looked up each time: none of these is on the way of a request that is served at once.
    fn count_words(&self, metric: Metric, texts: &[&Arc<str>], words: &[&'static str]) {
        let texts = texts.iter().map(|text| Arc::clone(text));
        let labels = texts.chain(words.iter().map(|word| Arc::from(*word)));
        self.shard.counter(metric, labels.collect()).add(1);
    }

    /// Counts a plugin's fault.
    pub fn plugin_fault(&self, plugin: &Arc<str>, fault: &'static str) {
        self.shard
            .counter(PLUGIN_FAULTS, vec![Arc::clone(plugin), fault.into()])
            .add(1);
    }

    /// Counts a call of a plugin: `outcome` is `ok` or the word for a fault.
    pub fn plugin_called(
        &self,
        plugin: &Arc<str>,
        function: &'static str,
        outcome: &'static str,
        took: Duration,
    ) {
        let key = [
            address(Some(plugin)),
            function.as_ptr().addr(),
            outcome.as_ptr().addr(),
        ];
        let mut cache = self.plugin_calls.borrow_mut();
        if let Some(cells) = cache.get(&key) {
            cells.calls.add(1);
            cells.seconds.observe(took);
            return;
        }
        let labels = || vec![Arc::clone(plugin), function.into()];
        let mut with_outcome = labels();
        with_outcome.push(outcome.into());
        let cells = PluginCells {
            _kept: Arc::clone(plugin),
            calls: self.shard.counter(PLUGIN_CALLS, with_outcome),
            seconds: self.shard.histogram(PLUGIN_CALL_SECONDS, labels()),
        };
        cells.calls.add(1);
        cells.seconds.observe(took);
        insert(&mut cache, key, cells);
    }

    /// Counts what a policy said of whether a request may pass: `allow`, `deny`, `audit` or `would_deny`.
    pub fn authorized(&self, direction: Direction, policy: &Arc<str>, decision: &'static str) {
        let key = AuthorizedKey {
            policy: address(Some(policy)),
            decision: decision.as_ptr().addr(),
            direction,
        };
        let mut cache = self.authorized.borrow_mut();
        if let Some((_, cell)) = cache.get(&key) {
            cell.add(1);
            return;
        }
        let labels = vec![direction.as_str().into(), Arc::clone(policy), decision.into()];
        let cell = self.shard.counter(AUTHORIZATION, labels);
        cell.add(1);
        insert(&mut cache, key, (Arc::clone(policy), cell));
    }

    /// Adds to a counter that a plugin keeps itself. The plugin host bounds the names.
    pub fn plugin_count(&self, plugin: &Arc<str>, name: &str, by: u64) {
        self.shard
            .counter(PLUGIN_CUSTOM, vec![Arc::clone(plugin), name.into()])
            .add(by);
    }

    /// Sets a gauge that a plugin keeps itself. The plugin host bounds the names.
    pub fn plugin_gauge(&self, plugin: &Arc<str>, name: &str, value: f64) {
        self.hub.set_plugin_gauge(plugin, name, value);
    }

    /// Gives a value to a histogram that a plugin keeps itself. The plugin host bounds the names.
    pub fn plugin_observe(&self, plugin: &Arc<str>, name: &str, value: u64) {
        self.shard
            .histogram(PLUGIN_CUSTOM_VALUES, vec![Arc::clone(plugin), name.into()])
            .observe_value(value);
    }

    /// Counts a connection that was refused for want of room.
    pub fn connection_refused(&self) {
        self.shard.counter(CONNECTIONS_REFUSED, vec![]).add(1);
    }
}

fn of(cells: &[Arc<Cell>; 3], direction: Direction) -> &Cell {
    let [outbound, inbound, ingress] = cells;
    match direction {
        Direction::Outbound => outbound,
        Direction::Inbound => inbound,
        Direction::Ingress => ingress,
    }
}

fn address(text: Option<&Arc<str>>) -> usize {
    text.map_or(0, |text| text.as_ptr().addr())
}

fn insert<K: Eq + std::hash::Hash, V>(cache: &mut Cache<K, V>, key: K, value: V) {
    if cache.len() >= MAX_CACHED {
        cache.clear();
    }
    cache.insert(key, value);
}

/// A hash for keys that are addresses and small numbers, none of which a client can choose: a multiplication
/// for each word (Fibonacci hashing, Knuth vol. 3 §6.4).
#[derive(Debug, Default)]
struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    // What arrays of words come as.
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        for word in words {
            self.write_u64(u64::from_ne_bytes(*word));
        }
        for byte in rest {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }

    fn write_u16(&mut self, word: u16) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word.unsigned_abs() as u64);
    }
}
