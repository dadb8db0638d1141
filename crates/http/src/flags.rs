//! Flags: what a request is, for flags to look at, and whether a condition on one holds.

use crate::admit::Received;
use crate::exchange::Exchange;
use crate::worker::Worker;
use http::request;
use leeward_flags::{Attributes, Reason};
use leeward_policy::model::{Cause, FlagCondition};
use leeward_policy::{FlagsInForce, Snapshot};
use leeward_telemetry::{FlagSeen, Peer};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

/// What flags can see of a request.
#[derive(Clone, Copy)]
pub(crate) struct About<'a> {
    pub(crate) worker: &'a Worker,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) parts: &'a request::Parts,
    pub(crate) peer: &'a Peer,
    /// Lower case, without a port.
    pub(crate) host: &'a str,
    pub(crate) route: Option<&'a str>,
    /// Why the call failed, on a rung.
    pub(crate) cause: Option<Cause>,
}

/// The attributes for one condition, which says what the targeting key is.
struct Targeted<'a> {
    about: &'a About<'a>,
    key_header: Option<&'a str>,
}

impl About<'_> {
    /// Whether a condition holds, and what is to be written down about that.
    pub(crate) fn holds(&self, condition: &FlagCondition) -> (bool, FlagSeen) {
        let levels = self.worker.levels();
        let file = self.worker.file_flags();
        let flags = FlagsInForce {
            levels: &levels,
            file: file.as_deref(),
            policy: self.snapshot.flags(),
        };
        let targeted = Targeted {
            about: self,
            key_header: condition.targeting_key_header.as_deref(),
        };
        let resolved = flags.evaluate(&condition.flag, &targeted, wall());
        let holds = condition.holds(&resolved.evaluation);
        let seen = FlagSeen {
            key: Arc::clone(&condition.flag),
            variant: resolved.evaluation.variant.map(Into::into),
            reason: word(resolved.evaluation.reason),
            by: resolved.by.cloned(),
        };
        (holds, seen)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.parts.headers.get(name)?.to_str().ok()
    }
}

impl Attributes for Targeted<'_> {
    fn attribute(&self, path: &str) -> Option<Cow<'_, str>> {
        let about = self.about;
        if let Some(name) = path.strip_prefix("headers.") {
            return about.header(name).map(Cow::Borrowed);
        }
        let viewer = &about.snapshot.viewer;
        let peer = || about.peer.identity.as_deref();
        let address = || Cow::Owned(about.peer.address.ip().to_string());
        match path {
            "targetingKey" => match self.key_header {
                Some(name) => about.header(name).map(Cow::Borrowed),
                None => Some(peer().map_or_else(address, Cow::Borrowed)),
            },
            "method" => Some(Cow::Borrowed(about.parts.method.as_str())),
            "path" => Some(Cow::Borrowed(about.parts.uri.path())),
            "host" => Some(Cow::Borrowed(about.host)),
            "peer" => peer().map(Cow::Borrowed),
            "address" => Some(address()),
            "zone" => Some(Cow::Borrowed(viewer.zone.as_str())),
            "proxy" => Some(Cow::Borrowed(viewer.proxy.as_str())),
            "route" => about.route.map(Cow::Borrowed),
            "cause" => about.cause.map(|cause| Cow::Borrowed(cause.as_str())),
            _ => None,
        }
    }
}

/// Whether a condition holds for a request whose route is known; writes the evaluation down.
pub(crate) fn holds(
    exchange: &mut Exchange,
    request: &Received,
    condition: &FlagCondition,
    cause: Option<Cause>,
) -> bool {
    let host = request.host();
    let about = About {
        worker: exchange.worker(),
        snapshot: &exchange.snapshot,
        parts: &request.parts,
        peer: &exchange.record.peer,
        host: &host,
        route: exchange.record.route.as_deref(),
        cause,
    };
    let (holds, seen) = about.holds(condition);
    exchange.record.saw(seen);
    holds
}

/// The reason as OpenTelemetry's conventions for feature flags have it.
const fn word(reason: Reason) -> &'static str {
    match reason {
        Reason::Static => "static",
        Reason::TargetingMatch => "targeting_match",
        Reason::Default => "default",
        Reason::Disabled => "disabled",
        Reason::Error => "error",
    }
}

#[expect(clippy::disallowed_methods, reason = "targeting may ask for the time of day")]
fn wall() -> SystemTime {
    SystemTime::now()
}
