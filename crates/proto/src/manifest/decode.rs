//! From a tree of YAML to wire messages: the shape is checked here, the values by `convert`.

use super::{API_VERSION, ManifestError, Place, parse_duration, parse_size};
use crate::v1;
use crate::yaml::{Node, Value};
use leeward_policy::Kind;
use std::collections::HashMap;

/// A mapping whose fields are taken out one by one; what is left over is unknown.
struct Fields<'a> {
    path: String,
    place: Place,
    entries: Vec<(String, Place, Node)>,
    asked: Vec<&'static str>,
    errors: &'a mut Vec<ManifestError>,
}

type Errors = Vec<ManifestError>;
/// A field, and what its text becomes.
type Named<T> = (&'static str, fn(String) -> T);

/// Reads one document.
pub(super) fn resource(document: Node) -> Result<v1::Resource, Errors> {
    let mut errors = Vec::new();
    let resource = object(document, &mut errors, |f| {
        let version = f.text("apiVersion");
        if version != API_VERSION {
            f.reject(
                "apiVersion",
                format!("{version:?} is not known; want {API_VERSION}"),
            );
        }
        let kind = f.text("kind");
        let metadata = f.object("metadata", |f| v1::Metadata {
            name: f.text("name"),
            revision: f.number("revision"),
            labels: f.texts("labels"),
            create_time: None,
            update_time: None,
        });
        let spec = match Kind::ALL.into_iter().find(|k| k.as_str() == kind) {
            Some(Kind::Zone) => f.object("spec", zone).map(v1::resource::Spec::Zone),
            Some(Kind::Service) => f.object("spec", service).map(v1::resource::Spec::Service),
            Some(Kind::Route) => f.object("spec", route).map(v1::resource::Spec::Route),
            Some(Kind::FallbackPolicy) => f.object("spec", fallback).map(v1::resource::Spec::FallbackPolicy),
            Some(Kind::Plugin) => f.object("spec", plugin).map(v1::resource::Spec::Plugin),
            None => {
                let known = Kind::ALL.map(Kind::as_str);
                let meant = nearest(&kind, &known).map(|k| format!("did you mean {k}?"));
                let hint = meant.unwrap_or_else(|| format!("want one of {}", known.join(", ")));
                f.reject("kind", format!("{kind:?} is not known; {hint}"));
                f.ignore("spec");
                None
            }
        };
        // What `get` shows and `apply` has no use for.
        f.ignore("status");
        v1::Resource {
            metadata,
            status: None,
            spec,
        }
    });
    match resource {
        Some(resource) if errors.is_empty() => Ok(resource),
        Some(_) | None => Err(errors),
    }
}

fn zone(f: &mut Fields<'_>) -> v1::Zone {
    v1::Zone {
        proxies: f.list("proxies", |f| v1::ZoneProxy {
            name: f.text("name"),
            address: f.text("address"),
        }),
        failover: f.text_list("failover"),
    }
}

fn service(f: &mut Fields<'_>) -> v1::Service {
    v1::Service {
        protocol: f.choice(
            "protocol",
            &[
                ("HTTP1", v1::Protocol::Http1.into()),
                ("HTTP2", v1::Protocol::Http2.into()),
            ],
        ),
        endpoints: f.list("endpoints", |f| v1::Endpoint {
            address: f.text("address"),
            zone: f.text("zone"),
            proxy: f.text("proxy"),
        }),
        connect_timeout: f.duration("connectTimeout"),
        outlier_detection: f.object("outlierDetection", |f| v1::OutlierDetection {
            consecutive_5xx: f.small("consecutive5xx"),
            base_ejection_time: f.duration("baseEjectionTime"),
            max_ejection_time: f.duration("maxEjectionTime"),
        }),
        connection_pool: f.object("connectionPool", |f| v1::ConnectionPool {
            max_requests: f.small("maxRequests"),
            max_idle_per_endpoint: f.optional_small("maxIdlePerEndpoint"),
            idle_timeout: f.duration("idleTimeout"),
        }),
    }
}

fn route(f: &mut Fields<'_>) -> v1::Route {
    v1::Route {
        hostnames: f.text_list("hostnames"),
        rules: f.list("rules", |f| v1::RouteRule {
            matches: f.list("matches", |f| v1::RouteMatch {
                path: f.object("path", |f| v1::PathMatch {
                    kind: f.one_of([
                        ("exact", v1::path_match::Kind::Exact as fn(String) -> _),
                        ("prefix", v1::path_match::Kind::Prefix),
                    ]),
                }),
                method: f.text("method"),
                headers: f.list("headers", header_match),
            }),
            backend_refs: f.list("backendRefs", |f| v1::BackendRef {
                service: f.text("service"),
                weight: f.optional_small("weight"),
            }),
            timeouts: f.object("timeouts", |f| v1::RouteTimeouts {
                request: f.duration("request"),
            }),
            retry: f.object("retry", |f| v1::RouteRetry {
                max_attempts: f.small("maxAttempts"),
            }),
            fallback: f.text("fallback"),
        }),
    }
}

fn header_match(f: &mut Fields<'_>) -> v1::HeaderMatch {
    let name = f.text("name");
    let text = f.one_of([
        ("exact", v1::header_match::Kind::Exact as fn(String) -> _),
        ("prefix", v1::header_match::Kind::Prefix),
    ]);
    let present = f.optional_bool("present").map(v1::header_match::Kind::Present);
    if text.is_some() && present.is_some() {
        f.reject(
            "present",
            "stands beside exact or prefix; want one of them".to_owned(),
        );
    }
    v1::HeaderMatch {
        name,
        kind: text.or(present),
    }
}

fn fallback(f: &mut Fields<'_>) -> v1::FallbackPolicy {
    let causes = [
        ("ConnectFailure", v1::Cause::ConnectFailure.into()),
        ("Timeout", v1::Cause::Timeout.into()),
        ("Reset", v1::Cause::Reset.into()),
        ("NoEndpoint", v1::Cause::NoEndpoint.into()),
        ("Overflow", v1::Cause::Overflow.into()),
    ];
    v1::FallbackPolicy {
        on: f.choices("on", &causes),
        on_statuses: f.numbers("onStatuses"),
        rungs: f.list("rungs", rung),
        hide_header: f.optional_bool("hideHeader").unwrap_or_default(),
    }
}

fn rung(f: &mut Fields<'_>) -> v1::Rung {
    let plugin = f.object("plugin", |f| v1::PluginRung {
        plugin: f.text("plugin"),
        config: f.text("config"),
    });
    let answer = f.object("static", |f| v1::StaticRung {
        status: f.small("status"),
        headers: f.list("headers", |f| v1::Header {
            name: f.text("name"),
            value: f.text("value"),
        }),
        body: f.text("body"),
    });
    let service = f.object("service", |f| v1::ServiceRung {
        service: f.text("service"),
    });
    let mut kinds = [
        plugin.map(v1::rung::Kind::Plugin),
        answer.map(v1::rung::Kind::Static),
        service.map(v1::rung::Kind::Service),
    ]
    .into_iter()
    .flatten();
    let kind = kinds.next();
    if kinds.next().is_some() {
        f.reject_here("has more than one of plugin, static, service; want one".to_owned());
    }
    v1::Rung { kind }
}

fn plugin(f: &mut Fields<'_>) -> v1::Plugin {
    v1::Plugin {
        kind: f.choice("kind", &[("Fallback", v1::PluginKind::Fallback.into())]),
        source: f.object("source", |f| v1::PluginSource {
            file: f.text("file"),
            sha256: f.text("sha256"),
        }),
        limits: f.object("limits", |f| v1::PluginLimits {
            memory_bytes: f.size("memory"),
            call_timeout: f.duration("callTimeout"),
            max_instances: f.small("maxInstances"),
            max_body_bytes: f.size("maxBody"),
        }),
        on_fault: f.choice(
            "onFault",
            &[
                ("NextRung", v1::OnFault::NextRung.into()),
                ("Fail", v1::OnFault::Fail.into()),
            ],
        ),
    }
}

fn object<T>(node: Node, errors: &mut Errors, read: impl FnOnce(&mut Fields<'_>) -> T) -> Option<T> {
    let Node { path, place, value } = node;
    match value {
        Value::Map(entries) => {
            let mut fields = Fields {
                path,
                place,
                entries,
                asked: Vec::new(),
                errors,
            };
            let object = read(&mut fields);
            fields.finish();
            Some(object)
        }
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Integer(_)
        | Value::Float
        | Value::Text(_)
        | Value::List(_)) => {
            errors.push(ManifestError::new(
                place,
                &path,
                format!("is {}; want a mapping", other.what()),
            ));
            None
        }
    }
}

/// The known word that a misspelt one is closest to, if it is close at all.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let score = |k: &str| strsim::jaro_winkler(&word.to_lowercase(), &k.to_lowercase());
    known
        .iter()
        .copied()
        .map(|k| (score(k), k))
        .filter(|(s, _)| *s > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

impl Fields<'_> {
    fn take(&mut self, field: &'static str) -> Option<Node> {
        self.asked.push(field);
        let at = self.entries.iter().position(|(key, _, _)| key == field)?;
        let (_, _, node) = self.entries.remove(at);
        (!matches!(node.value, Value::Null)).then_some(node)
    }

    fn ignore(&mut self, field: &'static str) {
        drop(self.take(field));
    }

    fn reject(&mut self, field: &str, reason: String) {
        let path = if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        };
        self.errors.push(ManifestError::new(self.place, &path, reason));
    }

    fn reject_here(&mut self, reason: String) {
        self.errors
            .push(ManifestError::new(self.place, &self.path.clone(), reason));
    }

    fn wrong(&mut self, node: &Node, want: &str) {
        let reason = format!("is {}; want {want}", node.value.what());
        self.errors
            .push(ManifestError::new(node.place, &node.path, reason));
    }

    /// Names what was not asked for.
    fn finish(&mut self) {
        for (key, place, node) in std::mem::take(&mut self.entries) {
            let meant = nearest(&key, &self.asked).map(|k| format!("did you mean {k}?"));
            let hint = meant.unwrap_or_else(|| format!("want one of {}", self.asked.join(", ")));
            self.errors.push(ManifestError::new(
                place,
                &node.path,
                format!("there is no such field; {hint}"),
            ));
        }
    }

    fn as_text(&mut self, node: Node) -> Option<String> {
        match node.value {
            Value::Text(text) => Some(text),
            // What looks like a number or a boolean and stands for a text, such as a header's value.
            Value::Integer(value) => Some(value.to_string()),
            Value::Bool(value) => Some(value.to_string()),
            Value::Null | Value::Float | Value::List(_) | Value::Map(_) => {
                self.wrong(&node, "a text");
                None
            }
        }
    }

    fn text(&mut self, field: &'static str) -> String {
        self.take(field)
            .and_then(|node| self.as_text(node))
            .unwrap_or_default()
    }

    fn number(&mut self, field: &'static str) -> u64 {
        self.take(field)
            .and_then(|node| self.as_number(&node))
            .unwrap_or_default()
    }

    fn as_number(&mut self, node: &Node) -> Option<u64> {
        if let Value::Integer(value) = node.value
            && let Ok(value) = u64::try_from(value)
        {
            return Some(value);
        }
        self.wrong(node, "a whole number that is not negative");
        None
    }

    fn as_small(&mut self, node: &Node) -> Option<u32> {
        let value = self.as_number(node)?;
        let small = u32::try_from(value).ok();
        if small.is_none() {
            let reason = format!("{value} is out of range; want at most {}", u32::MAX);
            self.errors
                .push(ManifestError::new(node.place, &node.path, reason));
        }
        small
    }

    fn small(&mut self, field: &'static str) -> u32 {
        self.optional_small(field).unwrap_or_default()
    }

    fn optional_small(&mut self, field: &'static str) -> Option<u32> {
        let node = self.take(field)?;
        let value = self.as_small(&node)?;
        // On the wire 0 is "not said"; a 0 that was said must not become the default.
        if value == 0 && !matches!(field, "weight" | "maxIdlePerEndpoint") {
            self.errors.push(ManifestError::new(
                node.place,
                &node.path,
                "0 is out of range; want at least 1".to_owned(),
            ));
        }
        Some(value)
    }

    fn optional_bool(&mut self, field: &'static str) -> Option<bool> {
        let node = self.take(field)?;
        if let Value::Bool(value) = node.value {
            return Some(value);
        }
        self.wrong(&node, "true or false");
        None
    }

    fn duration(&mut self, field: &'static str) -> Option<prost_types::Duration> {
        let node = self.take(field)?;
        let parsed = match &node.value {
            Value::Text(text) => parse_duration(text),
            Value::Null
            | Value::Bool(_)
            | Value::Integer(_)
            | Value::Float
            | Value::List(_)
            | Value::Map(_) => None,
        };
        match parsed.and_then(|d| prost_types::Duration::try_from(d).ok()) {
            Some(duration) => Some(duration),
            None => {
                let got = match &node.value {
                    Value::Text(text) => format!("{text:?} is not a duration"),
                    Value::Integer(value) => format!("{value} has no unit"),
                    other
                    @ (Value::Null | Value::Bool(_) | Value::Float | Value::List(_) | Value::Map(_)) => {
                        format!("is {}", other.what())
                    }
                };
                let reason = format!("{got}; want one such as 250ms, 1.5s or 2m");
                self.errors
                    .push(ManifestError::new(node.place, &node.path, reason));
                None
            }
        }
    }

    fn size(&mut self, field: &'static str) -> u64 {
        let Some(node) = self.take(field) else { return 0 };
        let parsed = match &node.value {
            Value::Integer(value) => u64::try_from(*value).ok(),
            Value::Text(text) => parse_size(text),
            Value::Null | Value::Bool(_) | Value::Float | Value::List(_) | Value::Map(_) => None,
        };
        if parsed.is_none() {
            self.wrong(&node, "a size such as 65536, 64KiB or 16MiB");
        }
        parsed.unwrap_or_default()
    }

    fn object<T>(&mut self, field: &'static str, read: impl FnOnce(&mut Fields<'_>) -> T) -> Option<T> {
        let node = self.take(field)?;
        object(node, self.errors, read)
    }

    fn items(&mut self, field: &'static str) -> Vec<Node> {
        let Some(node) = self.take(field) else {
            return Vec::new();
        };
        match node.value {
            Value::List(items) => items,
            Value::Null
            | Value::Bool(_)
            | Value::Integer(_)
            | Value::Float
            | Value::Text(_)
            | Value::Map(_) => {
                self.wrong(&node, "a list");
                Vec::new()
            }
        }
    }

    fn list<T>(&mut self, field: &'static str, mut read: impl FnMut(&mut Fields<'_>) -> T) -> Vec<T> {
        let items = self.items(field);
        items
            .into_iter()
            .filter_map(|item| object(item, self.errors, &mut read))
            .collect()
    }

    fn text_list(&mut self, field: &'static str) -> Vec<String> {
        let items = self.items(field);
        items.into_iter().filter_map(|item| self.as_text(item)).collect()
    }

    fn numbers(&mut self, field: &'static str) -> Vec<u32> {
        let items = self.items(field);
        items.iter().filter_map(|item| self.as_small(item)).collect()
    }

    fn texts(&mut self, field: &'static str) -> HashMap<String, String> {
        let Some(node) = self.take(field) else {
            return HashMap::new();
        };
        let Value::Map(entries) = node.value else {
            self.wrong(&node, "a mapping of texts");
            return HashMap::new();
        };
        entries
            .into_iter()
            .filter_map(|(key, _, value)| Some((key, self.as_text(value)?)))
            .collect()
    }

    fn one_of<T>(&mut self, kinds: [Named<T>; 2]) -> Option<T> {
        let mut found = None;
        for (field, make) in kinds {
            if let Some(text) = self.take(field).and_then(|node| self.as_text(node)) {
                if found.is_some() {
                    self.reject(
                        field,
                        "stands beside another of its kind; want one of them".to_owned(),
                    );
                }
                found = Some(make(text));
            }
        }
        found
    }

    fn choice(&mut self, field: &'static str, known: &[(&'static str, i32)]) -> i32 {
        self.take(field)
            .and_then(|node| self.as_choice(node, known))
            .unwrap_or_default()
    }

    fn choices(&mut self, field: &'static str, known: &[(&'static str, i32)]) -> Vec<i32> {
        let items = self.items(field);
        items
            .into_iter()
            .filter_map(|item| self.as_choice(item, known))
            .collect()
    }

    fn as_choice(&mut self, node: Node, known: &[(&'static str, i32)]) -> Option<i32> {
        let (place, path) = (node.place, node.path.clone());
        let text = self.as_text(node)?;
        if let Some((_, value)) = known.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<_> = known.iter().map(|(word, _)| *word).collect();
        let meant = nearest(&text, &words).map(|k| format!("did you mean {k}?"));
        let hint = meant.unwrap_or_else(|| format!("want one of {}", words.join(", ")));
        self.errors.push(ManifestError::new(
            place,
            &path,
            format!("{text:?} is not known; {hint}"),
        ));
        None
    }
}
