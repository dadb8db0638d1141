//! From a tree of YAML to wire messages: the shape is checked here, the values by `convert`.

mod access;
mod authorization;
mod backup;
mod degradation;
mod fallback;
mod fields;
mod gateway;
mod plugin;
mod resilience;
mod rollout;
mod workload;

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
            manager: f.text("manager"),
        });
        let spec = match Kind::ALL.into_iter().find(|k| k.as_str() == kind) {
            Some(Kind::Zone) => f.object("spec", zone).map(v1::resource::Spec::Zone),
            Some(Kind::Service) => f.object("spec", service).map(v1::resource::Spec::Service),
            Some(Kind::Route) => f.object("spec", route).map(v1::resource::Spec::Route),
            Some(Kind::FallbackPolicy) => f
                .object("spec", fallback::policy)
                .map(v1::resource::Spec::FallbackPolicy),
            Some(Kind::Plugin) => f.object("spec", plugin::plugin).map(v1::resource::Spec::Plugin),
            Some(Kind::ResiliencePolicy) => f
                .object("spec", resilience::resilience_policy)
                .map(v1::resource::Spec::ResiliencePolicy),
            Some(Kind::CircuitOverride) => f
                .object("spec", resilience::circuit_override)
                .map(v1::resource::Spec::CircuitOverride),
            // The fields of flagd's document are its own; what is wrong with them is found when it is parsed.
            Some(Kind::FeatureFlags) => f
                .json("spec")
                .map(|document| v1::resource::Spec::FeatureFlags(v1::FeatureFlags { document })),
            Some(Kind::DegradationPolicy) => f
                .object("spec", degradation::policy)
                .map(v1::resource::Spec::DegradationPolicy),
            Some(Kind::DegradationOverride) => f
                .object("spec", degradation::held)
                .map(v1::resource::Spec::DegradationOverride),
            Some(Kind::Queue) => f
                .object("spec", degradation::queue)
                .map(v1::resource::Spec::Queue),
            Some(Kind::AuthorizationPolicy) => f
                .object("spec", authorization::policy)
                .map(v1::resource::Spec::AuthorizationPolicy),
            Some(Kind::Gateway) => f
                .object("spec", gateway::gateway)
                .map(v1::resource::Spec::Gateway),
            Some(Kind::RolloutPolicy) => f
                .object("spec", rollout::policy)
                .map(v1::resource::Spec::RolloutPolicy),
            Some(Kind::AccessPolicy) => f
                .object("spec", access::policy)
                .map(v1::resource::Spec::AccessPolicy),
            Some(Kind::BackupPolicy) => f
                .object("spec", backup::policy)
                .map(v1::resource::Spec::BackupPolicy),
            Some(Kind::RecoveryObjective) => f
                .object("spec", backup::objective)
                .map(v1::resource::Spec::RecoveryObjective),
            Some(Kind::Workload) => f
                .object("spec", workload::workload)
                .map(v1::resource::Spec::Workload),
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
        transport: f.choice("transport", words::TRANSPORT),
        transport_within: f.choice("transportWithin", words::TRANSPORT),
        labels: f.texts("labels"),
        drain: f.object("drain", |f| v1::ZoneDrain {
            start_time: f.time("startTime"),
            step: f.small("step"),
            interval: f.duration("interval"),
            expire_time: f.time("expireTime"),
            reason: f.text("reason"),
        }),
        gateways: f.list("gateways", |f| v1::ZoneGateway {
            name: f.text("name"),
            address: f.text("address"),
        }),
        direct_callers: f.choice("directCallers", words::DIRECT_CALLERS),
        imports: f.text_list("imports"),
        capture: f.object("capture", |f| v1::Capture {
            unknown: f.choice("unknown", words::UNKNOWN_DESTINATION),
            detect_timeout: f.duration("detectTimeout"),
            idle_timeout: f.duration("idleTimeout"),
        }),
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
        export_to: f.text_list("exportTo"),
        addresses: f.text_list("addresses"),
        server_names: f.text_list("serverNames"),
        tcp: f.object("tcp", |f| v1::TcpSettings {
            idle_timeout: f.duration("idleTimeout"),
            max_connect_attempts: f.small("maxConnectAttempts"),
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
                when: f.object("when", degradation::condition),
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
            when: f.object("when", degradation::condition),
            enabled: f.object("enabled", degradation::condition),
            cache: f.object("cache", degradation::cache),
            fault: f.object("fault", degradation::fault),
            filters: f.list("filters", plugin::filter),
            router: f.object("router", |f| v1::RouterRef {
                plugin: f.text("plugin"),
                config: f.text("config"),
            }),
        }),
        // A list that names nobody would open the route to the mesh.
        parent_refs: f.some_list("parentRefs", gateway::parent),
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
