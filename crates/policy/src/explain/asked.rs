//! A question as matchers, rules and flags look at it.

use super::{BadQuestion, Question, bad};
use crate::model::{Cause, FlagCondition};
use crate::{Asking, FlagsInForce, Head, Levels, Resolved, RuleIdx, Snapshot, path, zone_of};
use leeward_flags::Attributes;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::time::SystemTime;

/// A request that nobody has sent.
pub(super) struct Asked<'a> {
    snapshot: &'a Snapshot,
    levels: &'a Levels,
    pub(super) question: &'a Question,
    method: &'a str,
    /// Lower case, without a port.
    host: String,
    /// Without the query, as it was asked.
    raw: &'a str,
    /// As matchers read it.
    path: String,
    /// Names in lower case.
    headers: Vec<(String, &'a str)>,
    now: SystemTime,
}

impl<'a> Asked<'a> {
    pub(super) fn new(
        snapshot: &'a Snapshot,
        levels: &'a Levels,
        question: &'a Question,
        now: SystemTime,
    ) -> Result<Self, BadQuestion> {
        let method = match question.method.as_str() {
            "" => "GET",
            method
                if method
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)) =>
            {
                method
            }
            method => {
                return Err(bad(
                    "method",
                    format!("{method:?} is no method; want one such as GET"),
                ));
            }
        };
        let whole = match question.path.as_str() {
            "" => "/",
            path => path,
        };
        let raw = whole.split(['?', '#']).next().unwrap_or(whole);
        if !raw.starts_with('/') {
            return Err(bad(
                "path",
                format!("{whole:?} has no slash at its beginning; want one such as /items"),
            ));
        }
        let port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let host = match question.host.rsplit_once(':') {
            Some((host, after)) if port(after) => host,
            _ => question.host.as_str(),
        };
        if host.is_empty() {
            return Err(bad(
                "host",
                "is missing; want the host that the request is for".to_owned(),
            ));
        }
        for (flag, variant) in &question.flags {
            let Some(known) = snapshot.flags().get(flag) else {
                return Err(bad("flags", format!("no FeatureFlags has {flag:?}")));
            };
            if known.forced(variant).is_none() {
                let variants: Vec<&str> = known.variants().collect();
                return Err(bad(
                    "flags",
                    format!(
                        "{flag:?} has no variant {variant:?}; want one of {}",
                        variants.join(", ")
                    ),
                ));
            }
        }
        let path = path::normalise(raw).map_or_else(
            |_| raw.to_owned(),
            |normal| path::for_matching(&normal).into_owned(),
        );
        Ok(Self {
            snapshot,
            levels,
            question,
            method,
            host: host.to_ascii_lowercase(),
            raw,
            path,
            headers: question
                .headers
                .iter()
                .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
                .collect(),
            now,
        })
    }

    pub(super) const fn raw_path(&self) -> &'a str {
        self.raw
    }

    /// The request in a few words.
    pub(super) fn told(&self) -> String {
        format!("{} {}{}", self.method, self.host, self.raw)
    }

    pub(super) fn method(&self) -> &'a str {
        self.method
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn header(&self, name: &str) -> Option<&'a str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| *value)
    }

    pub(super) fn has(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.headers
            .iter()
            .any(|(known, value)| known == name && test(value.as_bytes()))
    }

    /// What a flag is for this request.
    pub(super) fn evaluate(
        &self,
        condition: &FlagCondition,
        route: Option<&str>,
        cause: Option<Cause>,
    ) -> Resolved<'a> {
        let flags = FlagsInForce {
            levels: self.levels,
            file: None,
            policy: self.snapshot.flags(),
        };
        let forced = self.question.flags.get(&*condition.flag);
        if let Some(evaluation) = forced.and_then(|variant| flags.get(&condition.flag)?.forced(variant)) {
            return Resolved { evaluation, by: None };
        }
        let about = Targeted {
            asked: self,
            route,
            cause,
            key_header: condition.targeting_key_header.as_deref(),
        };
        flags.evaluate(&condition.flag, &about, self.now)
    }

    /// Whether a condition holds.
    pub(super) fn holds(&self, condition: &FlagCondition, route: Option<&str>, cause: Option<Cause>) -> bool {
        condition.holds(&self.evaluate(condition, route, cause).evaluation)
    }
}

impl Head for Asked<'_> {
    fn host(&self) -> &str {
        &self.host
    }

    fn path(&self) -> &str {
        &self.path
    }

    fn method(&self) -> &str {
        self.method
    }

    fn any_value(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.has(name, test)
    }

    fn allows(&self, rule: RuleIdx) -> bool {
        let Some(rule) = self.snapshot.rule(rule) else {
            return false;
        };
        let condition = rule.when.as_ref();
        condition.is_none_or(|condition| self.holds(condition, Some(&rule.route), None))
    }
}

/// What flags see of it: the attributes that a proxy gives them.
struct Targeted<'a> {
    asked: &'a Asked<'a>,
    route: Option<&'a str>,
    cause: Option<Cause>,
    key_header: Option<&'a str>,
}

impl Attributes for Targeted<'_> {
    fn attribute(&self, path: &str) -> Option<Cow<'_, str>> {
        let asked = self.asked;
        if let Some(name) = path.strip_prefix("headers.") {
            return asked.header(name).map(Cow::Borrowed);
        }
        let viewer = &asked.snapshot.viewer;
        let peer = asked.question.identity.as_deref();
        match path {
            "targetingKey" => match self.key_header {
                Some(name) => asked.header(name).map(Cow::Borrowed),
                None => peer.map(Cow::Borrowed),
            },
            "method" => Some(Cow::Borrowed(asked.method)),
            "path" => Some(Cow::Borrowed(asked.raw)),
            "host" => Some(Cow::Borrowed(&asked.host)),
            "peer" => peer.map(Cow::Borrowed),
            "zone" => Some(Cow::Borrowed(viewer.zone.as_str())),
            "proxy" => Some(Cow::Borrowed(viewer.proxy.as_str())),
            "route" => self.route.map(Cow::Borrowed),
            "cause" => self.cause.map(|cause| Cow::Borrowed(cause.as_str())),
            _ => None,
        }
    }

    fn all(&self) -> Vec<(String, String)> {
        let named = [
            "targetingKey",
            "method",
            "path",
            "host",
            "peer",
            "zone",
            "proxy",
            "route",
            "cause",
        ];
        let named = named.into_iter().map(str::to_owned);
        let headers = self
            .asked
            .headers
            .iter()
            .map(|(name, _)| format!("headers.{name}"));
        named
            .chain(headers)
            .filter_map(|path| {
                let text = self.attribute(&path)?.into_owned();
                Some((path, text))
            })
            .collect()
    }
}

/// It as authorization rules look at it, once its route is known.
pub(super) struct ByRoute<'a> {
    pub(super) asked: &'a Asked<'a>,
    pub(super) route: &'a str,
}

impl Asking for ByRoute<'_> {
    fn identity(&self) -> Option<&str> {
        self.asked.question.identity.as_deref()
    }

    fn zone(&self) -> Option<&str> {
        zone_of(self.identity()?)
    }

    fn host(&self) -> &str {
        &self.asked.host
    }

    fn path(&self) -> &str {
        &self.asked.path
    }

    fn method(&self) -> &str {
        self.asked.method
    }

    fn route(&self) -> Option<&str> {
        Some(self.route)
    }

    fn values(&self, header: &str, show: &mut dyn FnMut(&[u8])) {
        for (_, value) in self.asked.headers.iter().filter(|(name, _)| name == header) {
            show(value.as_bytes());
        }
    }

    fn claims(&self, _: usize) -> Option<&Map<String, Value>> {
        self.asked.question.claims.as_ref()
    }
}
