//! The decision record: all that is known of one request.

use crate::reason::{Outcome, Reason};
use crate::trace::{TraceContext, span_id};
use http::{HeaderValue, Method, Uri, Version};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which way a request goes.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Direction {
    /// From the node's workloads.
    Outbound,
    /// To the node's workloads.
    Inbound,
    /// From clients outside of the mesh, to anywhere.
    Ingress,
}

impl Direction {
    /// The word used in logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Ingress => "ingress",
        }
    }
}

/// Who sent a request.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where from.
    pub address: SocketAddr,
    /// The SPIFFE id of its certificate, if it showed one.
    pub identity: Option<Arc<str>>,
}

/// One request, from its head to the end of its answer. The stages fill it in as they decide.
#[derive(Debug)]
pub struct Record {
    /// Which way it goes.
    pub direction: Direction,
    /// When its head was read.
    pub started: Instant,
    /// Its method.
    pub method: Method,
    /// Its target as the client wrote it.
    pub uri: Uri,
    /// Its Host field.
    pub host: Option<HeaderValue>,
    /// Its User-Agent field.
    pub user_agent: Option<HeaderValue>,
    /// Its version of HTTP.
    pub version: Version,
    /// Who sent it.
    pub peer: Peer,
    /// The policy revision that it was served under.
    pub generation: u64,
    /// The route that matched.
    pub route: Option<Arc<str>>,
    /// The rule's position in the route.
    pub rule: u32,
    /// The path pattern that matched.
    pub pattern: Option<Arc<str>>,
    /// The service called.
    pub service: Option<Arc<str>>,
    /// Every try, in order.
    pub attempts: Vec<Attempt>,
    /// Why no further try was made.
    pub gave_up: Option<&'static str>,
    /// The limit of this proxy that refused it, by its name in policy.
    pub limit: Option<&'static str>,
    /// Health was disregarded, since so few endpoints were healthy.
    pub panic: bool,
    /// The failure that led to the fallback.
    pub cause: Option<&'static str>,
    /// The fallback that answered, as `POLICY/RUNG`.
    pub fallback: Option<Arc<str>>,
    /// What kind of fallback that is.
    pub fallback_kind: Option<&'static str>,
    /// The plugin that answered in the service's place as a filter, or that made the request.
    pub plugin: Option<Arc<str>>,
    /// Faults of plugins, in order.
    pub plugin_faults: Vec<PluginFault>,
    /// The flags that were evaluated, each result once, in order.
    pub flags: Vec<FlagSeen>,
    /// The level of degradation that refused it, as `POLICY/LEVEL`.
    pub level: Option<Arc<str>>,
    /// A fault was injected.
    pub fault: bool,
    /// What the cache had to do with it.
    pub cache: Option<&'static str>,
    /// What policy said of whether it may pass.
    pub authorization: Option<Authorized>,
    /// Policies that were to tell of it, as `POLICY/RULE`, in order.
    pub audited: Vec<Arc<str>>,
    /// Why its token is not valid, if it showed one that isn't.
    pub token: Option<&'static str>,
    /// The gateway of this zone that passed it on, and speaks for the caller.
    pub gateway: Option<Arc<str>>,
    /// What the request came to.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// The status of the answer; 0 if there was none.
    pub status: u16,
    /// Bytes of the request's body that passed.
    pub request_bytes: u64,
    /// Bytes of the answer's body that passed.
    pub response_bytes: u64,
    /// Its place in a trace.
    pub trace: TraceContext,
    /// It is no request, but a TCP connection.
    pub tcp: Option<Box<Tcp>>,
}

/// A TCP connection, where no request is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tcp {
    /// Where its client meant it to go.
    pub destination: Option<SocketAddr>,
    /// The name by which its client called the server, in TLS.
    pub server_name: Option<Arc<str>>,
}

/// What a policy said of whether a request may pass.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Authorized {
    /// The policy.
    pub policy: Arc<str>,
    /// The position of the rule that matched; `None`: none of them did.
    pub rule: Option<u32>,
    /// `allow`, `deny` or `would_deny`.
    pub decision: &'static str,
}

impl Authorized {
    /// `POLICY/RULE`, or `POLICY`.
    pub(crate) fn by(&self) -> String {
        match self.rule {
            Some(rule) => format!("{}/{rule}", self.policy),
            None => self.policy.to_string(),
        }
    }
}

/// A flag's evaluation for a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FlagSeen {
    /// The flag.
    pub key: Arc<str>,
    /// The variant, if there was one.
    pub variant: Option<Box<str>>,
    /// Why, as OpenTelemetry's conventions for feature flags have it.
    pub reason: &'static str,
    /// The level of degradation that forced it, as `POLICY/LEVEL`.
    pub by: Option<Arc<str>>,
}

/// A plugin's fault in a request's way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PluginFault {
    /// The plugin.
    pub plugin: Arc<str>,
    /// The word for the fault.
    pub fault: &'static str,
    /// When.
    pub at: Instant,
}

/// One try to reach an endpoint.
#[derive(Debug)]
pub struct Attempt {
    /// IP:PORT of the workload.
    pub endpoint: Arc<str>,
    /// The workload's zone.
    pub zone: Arc<str>,
    /// When it began.
    pub started: Instant,
    /// Until the head of the answer, or the failure.
    pub duration: Duration,
    /// The status of the answer, if there was one.
    pub status: Option<u16>,
    /// What went wrong, if anything.
    pub cause: Option<&'static str>,
    /// What it went by: `http1`, `h2`, `quic` or `tcp`; `None` if there was no connection.
    pub transport: Option<&'static str>,
    /// The gateway of the zone that it went through, if it did.
    pub gateway: Option<Arc<str>>,
    /// Sent while another was under way.
    pub hedge: bool,
    /// Its span.
    pub span_id: [u8; 8],
}

/// Flags that are written down for one request; policy can ask for more, of which nobody is told.
const MAX_FLAGS: usize = 32;
/// Plugins' faults that are written down for one request; the counters have them all.
const MAX_FAULTS: usize = 16;

impl Record {
    /// Writes down what became of a flag.
    pub fn saw(&mut self, flag: FlagSeen) {
        if self.flags.len() < MAX_FLAGS && !self.flags.contains(&flag) {
            self.flags.push(flag);
        }
    }

    /// Writes down a plugin's fault.
    pub fn faulted(&mut self, plugin: &Arc<str>, fault: &'static str, at: Instant) {
        if self.plugin_faults.len() < MAX_FAULTS {
            let plugin = Arc::clone(plugin);
            self.plugin_faults.push(PluginFault { plugin, fault, at });
        }
    }

    /// Writes down that an attempt begins; returns its position and its span.
    pub fn begin_attempt(
        &mut self,
        endpoint: &Arc<str>,
        zone: &Arc<str>,
        hedge: bool,
        now: Instant,
    ) -> (usize, [u8; 8]) {
        let span_id = span_id();
        self.attempts.push(Attempt {
            endpoint: Arc::clone(endpoint),
            zone: Arc::clone(zone),
            started: now,
            duration: Duration::ZERO,
            status: None,
            cause: None,
            transport: None,
            gateway: None,
            hedge,
            span_id,
        });
        (self.attempts.len() - 1, span_id)
    }

    /// Writes down what an attempt goes by.
    pub fn went_by(&mut self, position: usize, transport: &'static str) {
        if let Some(attempt) = self.attempts.get_mut(position) {
            attempt.transport = Some(transport);
        }
    }

    /// Writes down the gateway that an attempt goes through.
    pub fn through(&mut self, position: usize, gateway: Arc<str>) {
        if let Some(attempt) = self.attempts.get_mut(position) {
            attempt.gateway = Some(gateway);
        }
    }

    /// Writes down how an attempt ended.
    pub fn end_attempt(
        &mut self,
        position: usize,
        now: Instant,
        status: Option<u16>,
        cause: Option<&'static str>,
    ) {
        if let Some(attempt) = self.attempts.get_mut(position) {
            attempt.duration = now.saturating_duration_since(attempt.started);
            attempt.status = status;
            attempt.cause = cause;
        }
    }
}
