//! Flags: what a request is, for flags to look at, and whether a condition on one holds.

use crate::admit::Received;
use crate::cached::wall;
use crate::exchange::Exchange;
use crate::worker::Worker;
use http::{HeaderMap, Method, request};
use leeward_flags::{Attributes, Reason};
use leeward_policy::model::{Cause, FlagCondition};
use leeward_policy::{FlagsInForce, Snapshot, Viewer};
use leeward_telemetry::{FlagSeen, Peer};
use std::borrow::Cow;
use std::sync::Arc;

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

/// Every attribute of a request but its headers.
const ATTRIBUTES: &[&str] = &[
    "targetingKey",
    "method",
    "path",
    "host",
    "peer",
    "address",
    "zone",
    "proxy",
    "route",
    "cause",
];

/// The attributes for one condition, which says what the targeting key is.
pub(crate) struct Targeted<'a> {
    pub(crate) viewer: &'a Viewer,
    pub(crate) method: &'a Method,
    /// Without the query.
    pub(crate) path: &'a str,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) peer: &'a Peer,
    pub(crate) host: &'a str,
    pub(crate) route: Option<&'a str>,
    pub(crate) cause: Option<Cause>,
    pub(crate) key_header: Option<&'a str>,
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
            viewer: &self.snapshot.viewer,
            method: &self.parts.method,
            path: self.parts.uri.path(),
            headers: &self.parts.headers,
            peer: self.peer,
            host: self.host,
            route: self.route,
            cause: self.cause,
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
}

impl Targeted<'_> {
    fn header(&self, name: &str) -> Option<&str> {
        str::from_utf8(self.headers.get(name)?.as_bytes()).ok()
    }
}

impl Attributes for Targeted<'_> {
    fn attribute(&self, path: &str) -> Option<Cow<'_, str>> {
        if let Some(name) = path.strip_prefix("headers.") {
            return self.header(name).map(Cow::Borrowed);
        }
        let peer = || self.peer.identity.as_deref();
        let address = || Cow::Owned(self.peer.address.ip().to_string());
        match path {
            "targetingKey" => match self.key_header {
                Some(name) => self.header(name).map(Cow::Borrowed),
                None => Some(peer().map_or_else(address, Cow::Borrowed)),
            },
            "method" => Some(Cow::Borrowed(self.method.as_str())),
            "path" => Some(Cow::Borrowed(self.path)),
            "host" => Some(Cow::Borrowed(self.host)),
            "peer" => peer().map(Cow::Borrowed),
            "address" => Some(address()),
            "zone" => Some(Cow::Borrowed(self.viewer.zone.as_str())),
            "proxy" => Some(Cow::Borrowed(self.viewer.proxy.as_str())),
            "route" => self.route.map(Cow::Borrowed),
            "cause" => self.cause.map(|cause| Cow::Borrowed(cause.as_str())),
            _ => None,
        }
    }

    fn all(&self) -> Vec<(String, String)> {
        let pair = |path: String| {
            let text = self.attribute(&path)?.into_owned();
            Some((path, text))
        };
        let named = ATTRIBUTES.iter().map(|path| (*path).to_owned());
        let headers = self.headers.keys();
        let headers = headers.map(|name| format!("headers.{name}"));
        named.chain(headers).filter_map(pair).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use leeward_flags::FlagSet;
    use leeward_policy::Name;
    use std::time::SystemTime;

    /// What a flag with this targeting is for a request.
    fn variant(targeting: &str) -> String {
        let document = format!(
            r#"{{"flags": {{"f": {{"state": "ENABLED", "variants": {{"on": true, "off": false}},
                "defaultVariant": "off", "targeting": {targeting}}}}}}}"#
        );
        let set = FlagSet::parse(&document).unwrap();
        let request = Request::get("http://shop.example/cart?full=1")
            .header("x-user", "ada")
            .header("x-user", "grace")
            .header("x-city", "Zürich".as_bytes())
            .header("x-junk", &b"\xff"[..]);
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let about = Targeted {
            viewer: &Viewer {
                zone: Name::parse("a").unwrap(),
                proxy: Name::parse("a1").unwrap(),
            },
            method: &parts.method,
            path: parts.uri.path(),
            headers: &parts.headers,
            peer: &Peer {
                address: ([10, 0, 0, 1], 80).into(),
                identity: Some("spiffe://mesh/shop".into()),
            },
            host: "shop.example",
            route: Some("buy"),
            cause: Some(Cause::Timeout),
            key_header: Some("x-user"),
        };
        let evaluation = set.get("f").unwrap().evaluate(&about, SystemTime::UNIX_EPOCH);
        assert_eq!(evaluation.error, None, "{targeting}");
        evaluation.variant.unwrap().to_owned()
    }

    #[test]
    fn targeting_that_computes_a_path_sees_what_one_that_names_it_sees() {
        for (path, value) in [
            ("targetingKey", "ada"),
            ("method", "GET"),
            ("path", "/cart"),
            ("host", "shop.example"),
            ("peer", "spiffe://mesh/shop"),
            ("address", "10.0.0.1"),
            ("zone", "a"),
            ("proxy", "a1"),
            ("route", "buy"),
            ("cause", Cause::Timeout.as_str()),
            ("headers.x-user", "ada"),
            ("headers.x-city", "Zürich"),
        ] {
            let named = format!(r#"{{"var": "{path}"}}"#);
            let computed = format!(r#"{{"var": {{"cat": ["", "{path}"]}}}}"#);
            for var in [named, computed] {
                let targeting = format!(r#"{{"if": [{{"==": [{var}, "{value}"]}}, "on", "off"]}}"#);
                assert_eq!(variant(&targeting), "on", "{var} is to be {value}");
            }
        }
        // A value that is no text is as if it weren't there.
        for var in [
            r#"{"var": "headers.x-junk"}"#,
            r#"{"var": {"cat": ["headers.x-", "junk"]}}"#,
        ] {
            let targeting = format!(r#"{{"if": [{{"==": [{var}, null]}}, "on", "off"]}}"#);
            assert_eq!(variant(&targeting), "on", "{var}");
        }
    }
}
