//! The door that every call goes through.

use super::Access;
use super::caller::{Caller, Notes, Shared};
use super::methods::{Need, is_read, need};
use super::rules::{Rules, Scope, Subject};
use crate::audit::{Outcome, Place, Written, entry};
use crate::policy::wall;
use crate::refusal::{Reason, refuse};
use http::header::{AUTHORIZATION, USER_AGENT};
use http::request::Parts;
use http::{HeaderMap, Request, Response};
use leeward_identity::tls::GuestInfo;
use leeward_identity::{PeerInfo, Role};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::SystemTime;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

/// Why a call is made, as the caller says.
const REASON: &str = "leeward-reason";
/// The longest reason, and the longest name of a client that is kept, in bytes.
const MAX_REASON: usize = 500;
const MAX_AGENT: usize = 200;

/// Puts the door before services.
#[derive(Clone, Debug)]
pub(crate) struct GateLayer {
    access: Access,
}

/// What [`GateLayer`] makes of a service.
#[derive(Clone, Debug)]
pub(crate) struct Gate<S> {
    access: Access,
    inner: S,
}

impl GateLayer {
    pub(crate) const fn new(access: Access) -> Self {
        Self { access }
    }
}

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        let access = self.access.clone();
        Gate { access, inner }
    }
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The one that was asked whether it is ready.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let access = self.access.clone();
        Box::pin(async move {
            let (mut parts, body) = request.into_parts();
            match access.admit(&mut parts).await {
                Ok(Admitted::Peer) => inner.call(Request::from_parts(parts, body)).await,
                Ok(Admitted::Caller { caller, breakglass }) => {
                    let leaves_a_trace = breakglass || !is_read(caller.method());
                    let calls = access.clone();
                    let settled = async move {
                        let response = inner.call(Request::from_parts(parts, body)).await?;
                        let failed = Status::from_header_map(response.headers());
                        let failed = failed.filter(|status| status.code() != Code::Ok);
                        access.settle(&caller, breakglass, failed.as_ref()).await;
                        Ok(with_reason(response, failed))
                    };
                    if !leaves_a_trace {
                        return settled.await;
                    }
                    // What was done is put down also where nobody waits for the answer any more.
                    let settled = calls.shared.calls.spawn(settled).await;
                    settled.unwrap_or_else(|_| Ok(Status::internal("the call broke down").into_http()))
                }
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

/// A refusal of which the method gives no reason for programs gets that of its code.
fn with_reason(response: Response<Body>, failed: Option<Status>) -> Response<Body> {
    match failed {
        Some(status) if status.details().is_empty() => {
            refuse(status.code(), Reason::Other, status.message()).into_http()
        }
        Some(_) | None => response,
    }
}

/// Who was let in.
enum Admitted {
    /// A part of the mesh, at which the method itself looks.
    Peer,
    /// A user.
    Caller { caller: Caller, breakglass: bool },
}

impl Access {
    async fn admit(&self, request: &mut Parts) -> Result<Admitted, Status> {
        let Some((method, need)) = need(request.uri.path()) else {
            let path: String = request.uri.path().chars().take(200).collect();
            let why = format!("there is no method {path}");
            return Err(refuse(Code::Unimplemented, Reason::UnknownMethod, why));
        };
        let peer = request.extensions.get::<PeerInfo>().cloned();
        if let Some(peer) = &peer
            && let Some(at) = self.shared.identity.refuses(&peer.id, peer.not_before)
        {
            self.count_refused();
            return Err(crate::ca::revoked(&peer.id, at));
        }
        let guest = request.extensions.get::<GuestInfo>().cloned();
        let is_proxy = |peer: &PeerInfo| matches!(peer.id.role(), Role::Proxy { .. });
        match (need, &peer) {
            (Need::Peer, Some(_)) => return Ok(Admitted::Peer),
            (Need::ProxyOr(_), Some(peer)) if is_proxy(peer) => return Ok(Admitted::Peer),
            _ => {}
        }
        let caller = match self.caller(method, &request.headers, peer, guest).await {
            Ok(caller) => caller,
            Err(status) => {
                self.count_refused();
                return Err(status);
            }
        };
        let rules = self.rules();
        let breakglass = caller.uses_breakglass(&rules);
        if let Err(status) = check(&caller, &rules, need) {
            self.count_refused();
            self.refused(&caller, &status).await;
            return Err(status);
        }
        if breakglass {
            self.counts().breakglass.fetch_add(1, Ordering::Relaxed);
            let (who, from, reason) = (caller.who(), caller.from(), caller.reason());
            tracing::warn!(who, from, method, reason, "breakglass is used");
        }
        request.extensions.insert(caller.clone());
        Ok(Admitted::Caller { caller, breakglass })
    }

    async fn caller(
        &self,
        method: &'static str,
        headers: &HeaderMap,
        peer: Option<PeerInfo>,
        guest: Option<GuestInfo>,
    ) -> Result<Caller, Status> {
        let denied = |reason, why: String| Err(refuse(Code::Unauthenticated, reason, why));
        let token = bearer(headers)?;
        let (who, subject, from, until) = match (peer, guest, token) {
            // Who shows a certificate is who it says; a token beside it is not looked at.
            (Some(peer), _, _) => by_certificate(&peer)?,
            (None, Some(guest), Some(token)) => match &self.shared.oidc {
                Some(oidc) => {
                    let known = oidc.check(token).await?;
                    let who = format!("oidc:{}", known.user);
                    let subject = Subject::Token {
                        user: known.user,
                        groups: known.groups,
                    };
                    (who, subject, guest.address.to_string(), known.until)
                }
                None => return denied(Reason::NotAuthenticated, "tokens are not taken here".to_owned()),
            },
            (None, _, _) => {
                let why = "want a user's certificate of the mesh, or a token (authorization: Bearer TOKEN)";
                return denied(Reason::NotAuthenticated, why.to_owned());
            }
        };
        let agent = headers
            .get(USER_AGENT)
            .map(|value| value.as_bytes())
            .unwrap_or_default();
        let shared = Shared {
            who,
            subject,
            from,
            agent: cut(agent, MAX_AGENT),
            reason: reason(headers)?,
            until,
            method,
            notes: Mutex::new(Notes::default()),
        };
        Ok(Caller {
            access: self.clone(),
            shared: Arc::new(shared),
        })
    }

    /// Puts down what was done, or was not.
    async fn settle(&self, caller: &Caller, breakglass: bool, failed: Option<&Status>) {
        match failed {
            Some(status) if status.code() == Code::PermissionDenied => {
                self.count_refused();
                self.refused(caller, status).await;
            }
            failed => {
                let notes =
                    std::mem::take(&mut *caller.shared.notes.lock().unwrap_or_else(PoisonError::into_inner));
                // Reads that were allowed and dry runs are not worth an entry, unless they took breakglass.
                if (is_read(caller.method()) || notes.is_dry) && !breakglass {
                    return;
                }
                let (place, outcome) = match failed {
                    Some(status) => (Place::Refused, Outcome::of(status)),
                    None if notes.written.is_some() => (Place::Policy, Outcome::Done),
                    None => (Place::Done, Outcome::Done),
                };
                let written = notes.written.unwrap_or_default();
                let now = self.audit().now_ms();
                let entry = entry(caller, breakglass, &outcome, written, now);
                self.audit().put(place, entry).await;
            }
        }
    }

    async fn refused(&self, caller: &Caller, status: &Status) {
        let now = self.audit().now_ms();
        let entry = entry(caller, false, &Outcome::of(status), Written::default(), now);
        self.audit().put(Place::Refused, entry).await;
    }
}

fn check(caller: &Caller, rules: &Rules, need: Need) -> Result<(), Status> {
    let (role, scope) = match need {
        Need::Anyone => return Ok(()),
        Need::Each(role) => (role, Scope::Some),
        Need::Whole(role) | Need::ProxyOr(role) => (role, Scope::Whole),
        Need::Peer => {
            let why = format!("{} is not for users", caller.method());
            return Err(refuse(Code::PermissionDenied, Reason::NotAUser, why));
        }
    };
    if caller.grants_by(rules).has(role, scope) {
        return Ok(());
    }
    let by_breakglass = caller.with_reason(rules).has(role, scope);
    Err(caller.lacks(role, by_breakglass, &format_args!("call {}", caller.method())))
}

fn by_certificate(peer: &PeerInfo) -> Result<(String, Subject, String, SystemTime), Status> {
    let id = &peer.id;
    if wall() > peer.not_after {
        // The connection has outlived it.
        let why = format!("the certificate of {id} has ended; connect again with another");
        return Err(refuse(Code::Unauthenticated, Reason::CertificateEnded, why));
    }
    let subject = match id.role() {
        Role::User { name } => Subject::Certificate(name.to_owned()),
        Role::Control => Subject::Control,
        Role::Proxy { .. } | Role::Workload { .. } | Role::Other => {
            let why = format!("{id} is not a user; the API is for users");
            return Err(refuse(Code::PermissionDenied, Reason::NotAUser, why));
        }
    };
    Ok((id.to_string(), subject, peer.address.to_string(), peer.not_after))
}

/// The token that a call shows. One that could be read in two ways is none.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Status> {
    let bad = |why: &str| Err(refuse(Code::Unauthenticated, Reason::InvalidToken, why));
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return bad("there is more than one authorization");
    }
    let Some((scheme, token)) = value.to_str().ok().and_then(|text| text.split_once(' ')) else {
        return bad("the authorization can't be read; want Bearer TOKEN");
    };
    if scheme.eq_ignore_ascii_case("bearer") {
        Ok(Some(token.trim()))
    } else {
        bad("the authorization is of another scheme; want Bearer TOKEN")
    }
}

/// Why a call is made. Texts beyond ASCII are percent-encoded, as gRPC's own are.
fn reason(headers: &HeaderMap) -> Result<Option<String>, Status> {
    let Some(value) = headers.get(REASON) else {
        return Ok(None);
    };
    let text = percent_encoding::percent_decode(value.as_bytes()).decode_utf8_lossy();
    let text = text.trim();
    if text.is_empty() || text.len() > MAX_REASON || text.contains(char::is_control) {
        let reason = format!(
            "has {} bytes; want 1 to {MAX_REASON} without control characters",
            text.len()
        );
        return Err(crate::refusal::bad(REASON, reason));
    }
    Ok(Some(text.to_owned()))
}

fn cut(bytes: &[u8], most: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    text.get(..text.floor_char_boundary(most))
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Audit;
    use crate::policy::Policy;
    use crate::store::tests::Scratch;
    use leeward_identity::authority::Authority;
    use leeward_identity::{Identity, SpiffeId};
    use std::convert::Infallible;
    use std::time::Duration;
    use tokio::sync::Notify;

    fn identity(scratch: &Scratch) -> Arc<Identity> {
        let authority = Authority::create(&scratch.0.join("ca"), "leeward.test").unwrap();
        let (id, dir) = (SpiffeId::control("leeward.test").unwrap(), scratch.0.join("own"));
        authority.issue(&id, Duration::from_secs(60), &dir).unwrap();
        Identity::load(dir).unwrap()
    }

    #[tokio::test]
    async fn what_is_done_is_put_down_also_where_nobody_waits_for_the_answer() {
        let scratch = Scratch::new();
        let policy = Policy::open(scratch.store().await).await.unwrap();
        let kv = policy.store().kv().clone();
        let audit = Audit::new(policy.store().clone());
        let access = Access::new(policy.clone(), identity(&scratch), None, audit);
        let (begun, end) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let method = {
            let (begun, end) = (Arc::clone(&begun), Arc::clone(&end));
            move |_: Request<Body>| {
                let (begun, end) = (Arc::clone(&begun), Arc::clone(&end));
                async move {
                    begun.notify_one();
                    end.notified().await;
                    Ok::<_, Infallible>(Response::new(Body::empty()))
                }
            }
        };
        let mut gate = GateLayer::new(access).layer(tower::service_fn(method));
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = "/leeward.v1.RolloutService/Steer".parse().unwrap();
        request.extensions_mut().insert(PeerInfo {
            id: SpiffeId::user("leeward.test", "ada").unwrap(),
            address: "127.0.0.1:1".parse().unwrap(),
            not_before: wall(),
            not_after: wall() + Duration::from_secs(60),
            chain: Arc::new([]),
        });
        let mut call = gate.call(request);
        tokio::select! {
            answer = &mut call => panic!("answered {answer:?}"),
            () = begun.notified() => {}
        }
        // As when a client resets its stream.
        drop(call);
        end.notify_one();
        let kept = async || kv.keys("audit/done/", None, 10).await.unwrap().entries.len();
        let until = tokio::time::Instant::now() + Duration::from_secs(30);
        while kept().await == 0 && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(kept().await, 1);
    }
}
