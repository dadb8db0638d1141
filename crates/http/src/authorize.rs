//! Authorize: whether policy lets a request to its service, before anything is asked for it.
//!
//! A proxy decides for what its node's workloads send, with its own identity, since it is what the next proxy goes by;
//! for what other proxies send, with the identity of their certificates, or the one that a gateway of the zone has seen
//! (`inbound`); and for what clients from outside send, with none.

use crate::admit::Received;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::{CHECK, ROUTE, dropped_by_connection};
use crate::tokens::{Claims, Looked, PATIENCE};
use http::Method;
use leeward_policy::model::{Cause, CheckKind, Protocol};
use leeward_policy::{Asking, AuthorizationView, Decision, Denied, ServiceIdx, ServiceView, path, zone_of};
use leeward_telemetry::{Authorized, Direction};
use serde_json::{Map, Value};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::watch;

/// The path that a gRPC health check asks for.
const GRPC_HEALTH: &str = "/grpc.health.v1.Health/Check";

/// The claims of each issuer.
type AllClaims = SmallVec<[Option<Claims>; 2]>;

/// Whether the path of a request is one that its service's rules and its workloads read alike.
pub(crate) fn check_path(
    exchange: &Exchange,
    service: ServiceIdx,
    request: &Received,
) -> Result<(), Failure> {
    let view = exchange.snapshot.service(service);
    let looks = view.and_then(|view| view.authorization.as_ref());
    match looks.is_some_and(|policies| policies.looks_at_paths) {
        true => path::ambiguity(request.path()).map_or(Ok(()), |what| Err(Failure::BadRequest(what))),
        false => Ok(()),
    }
}

/// Decides whether a request may pass to a service, once for each.
pub(crate) async fn authorize(
    exchange: &mut Exchange,
    service: ServiceIdx,
    request: &Received,
) -> Result<(), Cause> {
    let Some(policies) = policies(exchange, service) else {
        return Ok(());
    };
    if exchange.authorized == Some(service) || is_check(exchange, service, request) {
        return Ok(());
    }
    let claims = if policies.issuers.is_empty() {
        AllClaims::new()
    } else {
        match look(exchange, &policies, request) {
            (claims, None) => claims,
            // Rare, so it doesn't belong in the size of every request's future.
            (_, Some(ended)) => Box::pin(wait_for_keys(exchange, &policies, request, ended)).await,
        }
    };
    let decided = decide(exchange, &policies, request, &claims);
    if decided.is_ok() {
        exchange.authorized = Some(service);
    }
    decided
}

/// A service's policies; for nearly all requests there are none.
fn policies(exchange: &Exchange, service: ServiceIdx) -> Option<Arc<AuthorizationView>> {
    let view = exchange.snapshot.service(service)?;
    view.authorization.as_ref().map(Arc::clone)
}

/// Whether a request is the check of another proxy that policy has it make: what keeps callers out must not make
/// everybody think that the workload is ill.
fn is_check(exchange: &Exchange, service: ServiceIdx, request: &Received) -> bool {
    if exchange.record.direction != Direction::Inbound || !request.parts.headers.contains_key(CHECK) {
        return false;
    }
    let bodiless = exchange.intake.ended();
    let check = |view: &ServiceView| {
        let (method, uri) = (&request.parts.method, &request.parts.uri);
        let path = uri.path();
        view.spec
            .health_check
            .as_ref()
            .is_some_and(|check| match &check.kind {
                CheckKind::Http { path: asked, .. } => {
                    let (asked, query) = match asked.split_once('?') {
                        Some((path, query)) => (path, Some(query)),
                        None => (&**asked, None),
                    };
                    method == Method::GET
                        && bodiless
                        && uri.query() == query
                        && path::normalise(asked).is_ok_and(|asked| asked == path)
                }
                CheckKind::Grpc { .. } => method == Method::POST && path == GRPC_HEALTH,
                CheckKind::Tcp if view.spec.protocol == Protocol::Tcp => {
                    method == Method::GET && bodiless && uri.query().is_none() && path == "/"
                }
                CheckKind::Tcp => method == Method::HEAD && bodiless && uri.query().is_none() && path == "/",
            })
    };
    exchange.snapshot.service(service).is_some_and(check)
}

/// The claims of the tokens that a request shows; and what to wait for, if there may be more.
fn look(
    exchange: &mut Exchange,
    policies: &AuthorizationView,
    request: &Received,
) -> (AllClaims, Option<watch::Receiver<u64>>) {
    let worker = Rc::clone(exchange.worker());
    let now = worker.now();
    let mut claims = AllClaims::new();
    let (mut invalid, mut waits) = (None, None);
    for issuer in &policies.issuers {
        claims.push(match worker.tokens.look(request, issuer, &worker.keyring, now) {
            Looked::None => None,
            Looked::Valid(claims) => Some(claims),
            Looked::Invalid(why) => {
                // Of several issuers, all but one say that it is another's, which says little.
                invalid = invalid.filter(|known| *known != "issuer").or(Some(why));
                None
            }
            Looked::Wait(ended) => {
                waits = Some(ended);
                None
            }
        });
    }
    exchange.record.token = invalid.filter(|_| claims.iter().all(Option::is_none));
    (claims, waits)
}

/// Waits until keys that are on their way have come, or not.
async fn wait_for_keys(
    exchange: &mut Exchange,
    policies: &AuthorizationView,
    request: &Received,
    mut ended: watch::Receiver<u64>,
) -> AllClaims {
    let now = exchange.worker().now();
    let until = now + PATIENCE;
    let until = exchange.deadline.map_or(until, |deadline| deadline.min(until));
    // Each issuer's keys may be on their way.
    let mut found = AllClaims::new();
    for _ in 0..=policies.issuers.len() {
        let waited = tokio::time::timeout_at(until.into(), ended.changed()).await;
        let (claims, again) = look(exchange, policies, request);
        found = claims;
        match again {
            None => return found,
            Some(again) => ended = again,
        }
        if !matches!(waited, Ok(Ok(()))) {
            break;
        }
    }
    if found.iter().all(Option::is_none) {
        exchange.record.token = Some("no_keys");
    }
    found
}

fn decide(
    exchange: &mut Exchange,
    policies: &AuthorizationView,
    request: &Received,
    claims: &AllClaims,
) -> Result<(), Cause> {
    // Whoever changed it since it came in: what can't be told apart is not let pass.
    if policies.looks_at_paths && (!request.path_is_settled() || path::ambiguity(request.path()).is_some()) {
        exchange.record.limit = Some("path");
        return Err(Cause::AuthorizationDenied);
    }
    let worker = Rc::clone(exchange.worker());
    let direction = exchange.record.direction;
    let peer = exchange.record.peer.identity.clone();
    let route = match direction {
        Direction::Outbound | Direction::Ingress => exchange.record.route.clone(),
        Direction::Inbound => None,
    };
    let said = request.parts.headers.get(ROUTE);
    let asked = Asked {
        identity: match direction {
            // Whoever that is, it isn't one of the mesh, and this proxy's identity isn't his.
            Direction::Outbound | Direction::Ingress if exchange.from_outside => None,
            Direction::Outbound | Direction::Ingress => worker.identity.as_ref().map(|own| own.id().as_str()),
            Direction::Inbound => peer.as_deref(),
        },
        host: request.host(),
        request,
        route: match direction {
            Direction::Outbound | Direction::Ingress => route.as_deref(),
            // Only proxies come in here, and they let no workload say so.
            Direction::Inbound => said.and_then(|route| route.to_str().ok()),
        },
        claims,
    };
    let record = &mut exchange.record;
    let mut note = |policy: &Arc<str>, rule: Option<u32>, decision: Decision| {
        worker.recorder.authorized(direction, policy, decision.as_str());
        match decision {
            Decision::Audit => {
                let rule = rule.unwrap_or_default();
                record.audited.push(format!("{policy}/{rule}").into());
            }
            // What a dry run would do is more than that another policy lets it pass.
            Decision::Allow | Decision::Deny | Decision::WouldDeny => {
                record.authorization = Some(Authorized {
                    policy: Arc::clone(policy),
                    rule,
                    decision: decision.as_str(),
                });
            }
        }
    };
    policies.decide(&asked, &mut note).map_err(|denied| match denied {
        Denied::ByPolicy => Cause::AuthorizationDenied,
        Denied::NoIdentity => Cause::IdentityMissing,
        Denied::NoPolicy => Cause::AuthorizationUnknown,
    })
}

/// A request as rules look at it.
struct Asked<'a> {
    identity: Option<&'a str>,
    host: Cow<'a, str>,
    request: &'a Received,
    route: Option<&'a str>,
    claims: &'a AllClaims,
}

impl Asking for Asked<'_> {
    fn identity(&self) -> Option<&str> {
        self.identity
    }

    fn zone(&self) -> Option<&str> {
        zone_of(self.identity?)
    }

    fn host(&self) -> &str {
        &self.host
    }

    fn path(&self) -> &str {
        self.request.path()
    }

    fn method(&self) -> &str {
        self.request.parts.method.as_str()
    }

    fn route(&self) -> Option<&str> {
        self.route
    }

    fn values(&self, header: &str, show: &mut dyn FnMut(&[u8])) {
        let headers = &self.request.parts.headers;
        // What doesn't get to the workload is nothing to go by.
        if dropped_by_connection(headers, header) {
            return;
        }
        for value in headers.get_all(header) {
            show(value.as_bytes());
        }
    }

    fn claims(&self, issuer: usize) -> Option<&Map<String, Value>> {
        self.claims.get(issuer)?.as_deref()
    }
}
