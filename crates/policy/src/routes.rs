//! From a request's head to a rule, in time that depends on the head and not on the number of rules.

use crate::model::{HeaderMatch, HostMatch, PathMatch, RouteMatch, ValueMatch};
use crate::path;
use crate::snapshot::RuleIdx;
use std::cmp::Reverse;
use std::collections::HashMap;

/// What matching needs to see of a request.
pub trait Head {
    /// The host, lower case, without a port.
    fn host(&self) -> &str;
    /// The path, without the query, as [`path::for_matching`] makes it.
    fn path(&self) -> &str;
    /// The method.
    fn method(&self) -> &str;
    /// Whether any value of the header `name` (lower case) passes `test`.
    fn any_value(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool;
    /// Whether the condition of a rule that has one holds.
    fn allows(&self, rule: RuleIdx) -> bool;
}

/// All routes' matches, indexed by host and path.
#[derive(Debug, Default)]
pub struct RouteTable {
    exact: HashMap<Box<str>, Paths>,
    suffix: HashMap<Box<str>, Paths>,
    any: Paths,
}

/// The matches of one host.
#[derive(Debug, Default)]
struct Paths {
    exact: HashMap<Box<str>, Vec<Entry>>,
    prefix: HashMap<Box<str>, Vec<Entry>>,
}

/// What must hold beside host and path.
#[derive(Debug)]
struct Entry {
    method: Option<Box<str>>,
    headers: Vec<HeaderMatch>,
    rule: RuleIdx,
    /// The rule has a condition.
    conditional: bool,
}

impl RouteTable {
    /// Adds a match. Call in order of route name and rule, then [`Self::finish`]: among equals, the first
    /// one added wins.
    pub(crate) fn add(&mut self, host: &HostMatch, on: &RouteMatch, rule: RuleIdx, conditional: bool) {
        let paths = match host {
            HostMatch::Any => &mut self.any,
            HostMatch::Exact(host) => self.exact.entry(host.clone()).or_default(),
            HostMatch::Suffix(suffix) => self.suffix.entry(suffix.clone()).or_default(),
        };
        let entries = match &on.path {
            PathMatch::Exact(path) => paths.exact.entry(path::of_policy(path).into()).or_default(),
            PathMatch::Prefix(prefix) => paths.prefix.entry(path::of_policy(prefix).into()).or_default(),
        };
        entries.push(Entry {
            method: on.method.clone(),
            headers: on.headers.clone(),
            rule,
            conditional,
        });
    }

    /// Puts the most specific entry of each path first.
    pub(crate) fn finish(&mut self) {
        let every = self
            .exact
            .values_mut()
            .chain(self.suffix.values_mut())
            .chain(std::iter::once(&mut self.any));
        for paths in every {
            for entries in paths.exact.values_mut().chain(paths.prefix.values_mut()) {
                // Stable, so that route name and rule order decide between equals.
                entries.sort_by_key(|e| Reverse((e.method.is_some(), e.headers.len())));
            }
        }
    }

    /// The rule for a request. The most specific host that has a matching rule decides, then the path:
    /// exact, then the longest prefix, then a method match, then the most header matches.
    ///
    /// O(labels of the host × segments of the path) look-ups.
    pub fn find(&self, head: &impl Head) -> Option<RuleIdx> {
        let host = head.host();
        if !self.exact.is_empty()
            && let Some(rule) = self.exact.get(host).and_then(|paths| paths.find(head))
        {
            return Some(rule);
        }
        if !self.suffix.is_empty() {
            // From the longest suffix to the shortest; at least one byte stands before the dot.
            for (at, _) in host.match_indices('.').filter(|&(at, _)| at > 0) {
                let suffix = host.get(at..).unwrap_or_default();
                if let Some(rule) = self.suffix.get(suffix).and_then(|paths| paths.find(head)) {
                    return Some(rule);
                }
            }
        }
        self.any.find(head)
    }
}

impl Paths {
    fn find(&self, head: &impl Head) -> Option<RuleIdx> {
        let path = head.path();
        if !self.exact.is_empty()
            && let Some(rule) = self.exact.get(path).and_then(|entries| first(entries, head))
        {
            return Some(rule);
        }
        if self.prefix.is_empty() {
            return None;
        }
        let mut prefix = path;
        loop {
            if let Some(rule) = self.prefix.get(prefix).and_then(|entries| first(entries, head)) {
                return Some(rule);
            }
            prefix = prefix.rsplit_once('/')?.0;
        }
    }
}

fn first(entries: &[Entry], head: &impl Head) -> Option<RuleIdx> {
    entries
        .iter()
        .find(|entry| entry.holds(head))
        .map(|entry| entry.rule)
}

impl Entry {
    fn holds(&self, head: &impl Head) -> bool {
        self.method
            .as_deref()
            .is_none_or(|method| method == head.method())
            && self.headers.iter().all(|on| header_holds(on, head))
            && (!self.conditional || head.allows(self.rule))
    }
}

/// Whether one header match holds.
fn header_holds(on: &HeaderMatch, head: &impl Head) -> bool {
    match &on.value {
        ValueMatch::Exact(want) => head.any_value(&on.name, &mut |got| got == want.as_bytes()),
        ValueMatch::Prefix(want) => head.any_value(&on.name, &mut |got| got.starts_with(want.as_bytes())),
        ValueMatch::Present => head.any_value(&on.name, &mut |_| true),
        ValueMatch::Absent => !head.any_value(&on.name, &mut |_| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Request {
        host: String,
        path: String,
        method: String,
        headers: Vec<(String, String)>,
        /// A bit for each rule whose condition holds.
        allowed: u32,
    }

    impl Head for Request {
        fn host(&self) -> &str {
            &self.host
        }
        fn path(&self) -> &str {
            &self.path
        }
        fn method(&self) -> &str {
            &self.method
        }
        fn any_value(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
            self.headers.iter().any(|(n, v)| n == name && test(v.as_bytes()))
        }
        fn allows(&self, rule: RuleIdx) -> bool {
            self.allowed & (1 << rule.position().min(31)) != 0
        }
    }

    /// The rules as documented, without an index: score every match and take the best.
    fn naive(matches: &[(HostMatch, RouteMatch)], req: &Request) -> Option<RuleIdx> {
        let host_score = |host: &HostMatch| match host {
            HostMatch::Any => Some(0),
            HostMatch::Exact(h) => (**h == *req.host).then_some(usize::MAX),
            HostMatch::Suffix(s) => (req.host.ends_with(&**s) && req.host.len() > s.len()).then_some(s.len()),
        };
        let path_score = |path: &PathMatch| match path {
            PathMatch::Exact(p) => (**p == *req.path).then_some(usize::MAX),
            PathMatch::Prefix(p) => req
                .path
                .strip_prefix(&**p)
                .filter(|rest| rest.is_empty() || rest.starts_with('/'))
                .map(|_| p.len()),
        };
        matches
            .iter()
            .enumerate()
            .filter_map(|(i, (host, on))| {
                let host = host_score(host)?;
                let path = path_score(&on.path)?;
                let method = on.method.as_deref().is_none_or(|m| m == req.method);
                let headers = on.headers.iter().all(|h| header_holds(h, req));
                let allowed = req.allows(RuleIdx::new(i));
                (method && headers && allowed)
                    .then_some(((host, path, on.method.is_some(), on.headers.len(), Reverse(i)), i))
            })
            .max_by_key(|(score, _)| *score)
            .map(|(_, i)| RuleIdx::new(i))
    }

    fn host() -> impl Strategy<Value = HostMatch> {
        prop_oneof![
            Just(HostMatch::Any),
            "[ab](\\.[ab]){0,2}".prop_map(|h| HostMatch::Exact(h.into())),
            "(\\.[ab]){1,2}".prop_map(|h| HostMatch::Suffix(h.into())),
        ]
    }

    fn route_match() -> impl Strategy<Value = RouteMatch> {
        let path = prop_oneof![
            "(/[xy]){1,3}/?".prop_map(|p| PathMatch::Exact(p.into())),
            "(/[xy]){0,3}".prop_map(|p| PathMatch::Prefix(p.into())),
        ];
        let method = prop::option::of(prop_oneof![Just("GET"), Just("PUT")]);
        let value = prop_oneof![
            Just(ValueMatch::Present),
            Just(ValueMatch::Absent),
            "[12]".prop_map(|v| ValueMatch::Exact(v.into())),
            "[12]".prop_map(|v| ValueMatch::Prefix(v.into())),
        ];
        let header = ("[hk]", value).prop_map(|(name, value)| HeaderMatch {
            name: name.into(),
            value,
        });
        (path, method, prop::collection::vec(header, 0..3)).prop_map(|(path, method, headers)| RouteMatch {
            path,
            method: method.map(Into::into),
            headers,
        })
    }

    proptest! {
        #[test]
        fn finds_what_the_documented_rules_say(
            matches in prop::collection::vec((host(), route_match()), 0..12),
            host in "[ab](\\.[ab]){0,3}",
            path in "(/[xy]){1,4}/?",
            method in prop_oneof![Just("GET"), Just("PUT")],
            headers in prop::collection::vec(("[hk]", "[12]{1,2}"), 0..3),
            allowed in prop_oneof![Just(u32::MAX), any::<u32>()],
        ) {
            let mut table = RouteTable::default();
            for (i, (host, on)) in matches.iter().enumerate() {
                table.add(host, on, RuleIdx::new(i), true);
            }
            table.finish();
            let req = Request { host, path, method: method.into(), headers, allowed };
            prop_assert_eq!(table.find(&req), naive(&matches, &req));
        }
    }
}
