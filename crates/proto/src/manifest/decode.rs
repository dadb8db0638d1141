//! From a tree of YAML to wire messages: the shape is checked here, the values by `convert`.

mod fields;
mod resilience;

use super::{API_VERSION, words};
use crate::v1;
use crate::yaml::Node;
use fields::{Errors, Fields, nearest, object};
use leeward_policy::Kind;

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
            Some(Kind::ResiliencePolicy) => f
                .object("spec", resilience::resilience_policy)
                .map(v1::resource::Spec::ResiliencePolicy),
            Some(Kind::CircuitOverride) => f
                .object("spec", resilience::circuit_override)
                .map(v1::resource::Spec::CircuitOverride),
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
        protocol: f.choice("protocol", words::PROTOCOL),
        endpoints: f.list("endpoints", |f| v1::Endpoint {
            address: f.text("address"),
            zone: f.text("zone"),
            proxy: f.text("proxy"),
            weight: f.small("weight"),
            labels: f.texts("labels"),
        }),
        connect_timeout: f.duration("connectTimeout"),
        outlier_detection: f.object("outlierDetection", resilience::outlier),
        connection_pool: f.object("connectionPool", resilience::pool),
        load_balancer: f.object("loadBalancer", resilience::load_balancer),
        health_check: f.object("healthCheck", resilience::health_check),
        resilience: f.text("resilience"),
        hold: f.object("hold", |f| v1::Hold {
            max_requests: f.optional_small("maxRequests"),
            max_wait: f.duration("maxWait"),
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
                subset: f.texts("subset"),
            }),
            timeouts: f.object("timeouts", |f| v1::RouteTimeouts {
                request: f.duration("request"),
                backend_request: f.duration("backendRequest"),
                idle: f.duration("idle"),
            }),
            retry: f.object("retry", resilience::retry),
            fallback: f.text("fallback"),
            circuit_breaker: f.object("circuitBreaker", resilience::circuit_breaker),
            rate_limits: f.list("rateLimits", resilience::rate_limit),
            priority: f.object("priority", |f| v1::RequestPriority {
                default: f.choice("default", words::PRIORITY),
                header: f.text("header"),
            }),
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
    v1::FallbackPolicy {
        on: f.choices("on", words::CAUSE),
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
    let kinds = [
        plugin.map(v1::rung::Kind::Plugin),
        answer.map(v1::rung::Kind::Static),
        service.map(v1::rung::Kind::Service),
    ];
    let kind = f.exclusive("plugin, static, service", kinds);
    v1::Rung { kind }
}

fn plugin(f: &mut Fields<'_>) -> v1::Plugin {
    v1::Plugin {
        kind: f.choice("kind", words::PLUGIN_KIND),
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
        on_fault: f.choice("onFault", words::ON_FAULT),
    }
}
