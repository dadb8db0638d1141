//! Which call a request over HTTP stands for.
//!
//! Every method is at `POST /v1/SERVICE/METHOD`. Beside that, what people do most has paths of its own, below.

use super::descriptors;
use crate::access::{Need, need};
use http::Method;
use leeward_policy::Kind;
use leeward_proto::render_kind;
use percent_encoding::percent_decode_str;
use prost_reflect::MethodDescriptor;
use std::sync::LazyLock;

/// A path of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Friendly {
    pub(super) http: &'static str,
    /// With a name in braces in place of a segment.
    pub(super) path: &'static str,
    /// As `SERVICE/METHOD`.
    pub(super) rpc: &'static str,
    /// Fields that segments stand for, by their names in braces.
    pub(super) fields: &'static [(&'static str, &'static str)],
    pub(super) body: BodyIs,
    /// Only if the query has this parameter, which is no field.
    pub(super) only_with: Option<&'static str>,
    /// In a few words.
    pub(super) summary: &'static str,
}

/// What a request's body is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum BodyIs {
    /// There is none: fields are in the path and in the query.
    Nothing,
    /// The message.
    Message,
    /// A resource, as protobuf has it in JSON, or as `leeward apply` takes it, in YAML or JSON.
    Resource,
    /// Resources, as `leeward apply` takes them.
    Resources,
}

const fn get(path: &'static str, rpc: &'static str, summary: &'static str) -> Friendly {
    Friendly {
        http: "GET",
        path,
        rpc,
        fields: &[],
        body: BodyIs::Nothing,
        only_with: None,
        summary,
    }
}

const NAMED: &[(&str, &str)] = &[("kind", "ref.kind"), ("name", "ref.name")];
const KIND: &[(&str, &str)] = &[("kind", "kind")];

/// Paths of their own. Parameters of the query are fields of the request, by their names in JSON.
pub(super) const FRIENDLY: &[Friendly] = &[
    Friendly {
        only_with: Some("watch"),
        ..get(
            "/v1/policy",
            "PolicyService/Watch",
            "Watch resources of every kind.",
        )
    },
    get(
        "/v1/policy",
        "PolicyService/List",
        "List resources of every kind.",
    ),
    Friendly {
        http: "POST",
        body: BodyIs::Resources,
        ..get(
            "/v1/policy",
            "PolicyService/Apply",
            "Apply resources, all or none.",
        )
    },
    Friendly {
        fields: KIND,
        only_with: Some("watch"),
        ..get(
            "/v1/policy/{kind}",
            "PolicyService/Watch",
            "Watch resources of a kind.",
        )
    },
    Friendly {
        fields: KIND,
        ..get(
            "/v1/policy/{kind}",
            "PolicyService/List",
            "List resources of a kind.",
        )
    },
    Friendly {
        fields: NAMED,
        ..get("/v1/policy/{kind}/{name}", "PolicyService/Get", "Get a resource.")
    },
    Friendly {
        http: "PUT",
        body: BodyIs::Resource,
        ..get(
            "/v1/policy/{kind}/{name}",
            "PolicyService/Apply",
            "Apply a resource.",
        )
    },
    Friendly {
        http: "DELETE",
        fields: NAMED,
        ..get(
            "/v1/policy/{kind}/{name}",
            "PolicyService/Delete",
            "Delete a resource.",
        )
    },
    get("/v1/proxies", "PolicyService/ListProxies", "List the proxies."),
    get(
        "/v1/levels",
        "DegradationService/ListLevels",
        "List the levels of degradation.",
    ),
    get(
        "/v1/audit",
        "AuditService/ListAudit",
        "List what was done and what was refused.",
    ),
];

/// A call that was found.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub(super) method: MethodDescriptor,
    /// Fields, by dotted paths of their names in the proto, and what the path says of them.
    pub(super) fields: Vec<(&'static str, String)>,
    /// The kind and the name that the path says, of a resource that stands in the body.
    pub(super) named: Option<(String, String)>,
    pub(super) body: BodyIs,
    /// The parameter of the query that is no field.
    pub(super) only_with: Option<&'static str>,
}

pub(super) enum Found {
    Route(Box<Route>),
    /// There is something, but not for this HTTP method.
    OtherMethods(String),
    Nothing,
}

/// The methods that are served this way.
pub(super) fn served() -> &'static [MethodDescriptor] {
    static SERVED: LazyLock<Vec<MethodDescriptor>> = LazyLock::new(|| {
        let services = descriptors()
            .services()
            .filter(|s| s.package_name() == "leeward.v1");
        let methods = services.flat_map(|service| service.methods().collect::<Vec<_>>());
        methods.filter(is_for_users).collect()
    });
    &SERVED
}

fn is_for_users(method: &MethodDescriptor) -> bool {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    need(&path).is_some_and(|(_, need)| need != Need::Peer)
}

/// The name of a method in paths.
pub(super) fn short(method: &MethodDescriptor) -> String {
    format!("{}/{}", method.parent_service().name(), method.name())
}

pub(super) fn method(rpc: &str) -> Option<&'static MethodDescriptor> {
    served().iter().find(|method| short(method) == rpc)
}

/// The call that a request stands for; `path` with its query is what the query's parameters are looked for in.
pub(super) fn find(http: &Method, uri: &http::Uri) -> Found {
    let path = uri.path();
    let mut others: Vec<&str> = Vec::new();
    let has = |parameter: &str| {
        let query = uri.query().unwrap_or_default();
        query
            .split('&')
            .any(|pair| pair.split('=').next() == Some(parameter))
    };
    for friendly in FRIENDLY {
        let Some(said) = matched(friendly.path, path) else {
            continue;
        };
        if friendly.only_with.is_some_and(|parameter| !has(parameter)) {
            continue;
        }
        if friendly.http != http.as_str() {
            others.push(friendly.http);
            continue;
        }
        return match (fill(friendly, said), method(friendly.rpc)) {
            (Some((fields, named)), Some(method)) => Found::Route(Box::new(Route {
                method: method.clone(),
                fields,
                named,
                body: friendly.body,
                only_with: friendly.only_with,
            })),
            _ => Found::Nothing,
        };
    }
    if let Some(method) = path.strip_prefix("/v1/").and_then(method) {
        if http == Method::POST {
            return Found::Route(Box::new(Route {
                method: method.clone(),
                fields: Vec::new(),
                named: None,
                body: BodyIs::Message,
                only_with: None,
            }));
        }
        others.push("POST");
    }
    others.dedup();
    if others.is_empty() {
        Found::Nothing
    } else {
        Found::OtherMethods(others.join(", "))
    }
}

/// What a path says in place of the names in braces.
fn matched(template: &'static str, path: &str) -> Option<Vec<(&'static str, String)>> {
    let mut said = Vec::new();
    let (mut wanted, mut there) = (template.split('/'), path.split('/'));
    loop {
        match (wanted.next(), there.next()) {
            (None, None) => return Some(said),
            (Some(wanted), Some(there)) => {
                let name = wanted.strip_prefix('{').and_then(|name| name.strip_suffix('}'));
                match name {
                    Some(_) if there.is_empty() => return None,
                    Some(name) => {
                        said.push((name, percent_decode_str(there).decode_utf8().ok()?.into_owned()));
                    }
                    None if wanted == there => {}
                    None => return None,
                }
            }
            _ => return None,
        }
    }
}

type Filled = (Vec<(&'static str, String)>, Option<(String, String)>);

/// The fields that a path fills. `None` if it names a kind that there isn't.
fn fill(friendly: &Friendly, said: Vec<(&'static str, String)>) -> Option<Filled> {
    let mut fields = Vec::new();
    let mut named = (String::new(), String::new());
    for (name, value) in said {
        let field = friendly
            .fields
            .iter()
            .find(|(of, _)| *of == name)
            .map(|(_, field)| *field);
        let value = if name == "kind" {
            let kind = Kind::named(&value)?;
            kind.as_str().clone_into(&mut named.0);
            render_kind(kind).as_str_name().to_owned()
        } else {
            value.clone_into(&mut named.1);
            value
        };
        fields.extend(field.map(|field| (field, value)));
    }
    let named = (friendly.body == BodyIs::Resource).then_some(named);
    Some((fields, named))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(http: &str, uri: &str) -> String {
        match find(&http.parse().unwrap(), &uri.parse().unwrap()) {
            Found::Route(route) => format!("{} {:?}", short(&route.method), route.fields),
            Found::OtherMethods(allowed) => format!("want {allowed}"),
            Found::Nothing => "nothing".to_owned(),
        }
    }

    #[test]
    fn requests_stand_for_calls() {
        for (http, uri, want) in [
            ("POST", "/v1/PolicyService/Apply", "PolicyService/Apply []"),
            ("GET", "/v1/PolicyService/Apply", "want POST"),
            ("POST", "/v1/PushService/Subscribe", "nothing"),
            ("POST", "/v1/Identity/Issue", "nothing"),
            ("GET", "/v1/policy", "PolicyService/List []"),
            ("GET", "/v1/policy?watch=true", "PolicyService/Watch []"),
            (
                "GET",
                "/v1/policy/routes",
                "PolicyService/List [(\"kind\", \"KIND_ROUTE\")]",
            ),
            (
                "GET",
                "/v1/policy/fallbackpolicies?x=1&watch",
                "PolicyService/Watch [(\"kind\", \"KIND_FALLBACK_POLICY\")]",
            ),
            (
                "GET",
                "/v1/policy/Route/sh%6fp",
                "PolicyService/Get [(\"ref.kind\", \"KIND_ROUTE\"), (\"ref.name\", \"shop\")]",
            ),
            (
                "DELETE",
                "/v1/policy/route/shop",
                "PolicyService/Delete [(\"ref.kind\", \"KIND_ROUTE\"), (\"ref.name\", \"shop\")]",
            ),
            ("PUT", "/v1/policy/route/shop", "PolicyService/Apply []"),
            ("PATCH", "/v1/policy/route/shop", "want GET, PUT, DELETE"),
            ("GET", "/v1/policy/pods", "nothing"),
            ("GET", "/v1/policy/", "nothing"),
            ("GET", "/v1/policy/route/a/b", "nothing"),
            ("GET", "/", "nothing"),
        ] {
            assert_eq!(found(http, uri), want, "{http} {uri}");
        }
    }

    #[test]
    fn every_path_of_its_own_leads_to_a_method_that_has_its_fields() {
        for friendly in FRIENDLY {
            let method = method(friendly.rpc).unwrap_or_else(|| panic!("{} is served", friendly.rpc));
            for (_, field) in friendly.fields {
                let mut message = Some(method.input());
                for part in field.split('.') {
                    let found = message.and_then(|m| m.get_field_by_name(part));
                    let field = found.unwrap_or_else(|| panic!("{} {field}", friendly.path));

                    message = field.kind().as_message().cloned();
                }
            }
        }
    }
}
