//! The service: certificates for those who have one, for those who bring a token, and the rotation for people.

use super::revoke::time;
use super::{Ca, revoked};
use crate::access::{Scope, caller};
use crate::api::{authorize, bad, status};
use crate::policy::{Refused, ms, timestamp, wall};
use crate::refusal::{Reason, refuse};
use crate::store::{NewToken, TokenUse};
use leeward_identity::authority::AuthorityError;
use leeward_identity::tls::StrangerInfo;
use leeward_identity::{CheckedRequest, JoinToken, PeerInfo, Role, SpiffeId};
use leeward_policy::model::AccessRole;
use leeward_proto::v1;
use leeward_proto::v1::identity_server::Identity;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tonic::{Code, Request, Response, Status};

/// How long a token may wait to be used, where its maker doesn't say.
const TTL: Duration = Duration::from_secs(3600);
/// The least, and the most.
const TTLS: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(7 * 24 * 3600));

/// Serves peers. Whoever has no certificate is served by [`JoinDesk`], on connections of its own.
#[derive(Clone, Debug)]
pub(crate) struct Issuer {
    ca: Ca,
}

impl Issuer {
    pub(crate) const fn new(ca: Ca) -> Self {
        Self { ca }
    }
}

/// Serves those who have no certificate: they can join, and nothing else.
#[derive(Clone, Debug)]
pub(crate) struct JoinDesk {
    ca: Ca,
}

impl JoinDesk {
    pub(crate) const fn new(ca: Ca) -> Self {
        Self { ca }
    }
}

pub(super) fn failed(error: &AuthorityError) -> Status {
    tracing::error!(%error, "the authority can't sign");
    refuse(
        Code::FailedPrecondition,
        Reason::AuthorityFailed,
        error.to_string(),
    )
}

#[tonic::async_trait]
impl Identity for Issuer {
    async fn issue(&self, request: Request<v1::IssueRequest>) -> Result<Response<v1::Issued>, Status> {
        let peer = request.extensions().get::<PeerInfo>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("no peer certificate"))?;
        let id = &peer.id;
        let renewed = self.ca.renew(&peer, &request.into_inner().request).await;
        match &renewed {
            Ok(_) => {
                tracing::info!(%id, address = %peer.address, "audit: certificate issued to one that had one");
            }
            Err(refused) => {
                self.ca.shared.refused.fetch_add(1, Ordering::Relaxed);
                let reason = refused.message();
                tracing::warn!(%id, address = %peer.address, reason, "audit: certificate refused");
            }
        }
        renewed.map(Response::new)
    }

    async fn issue_workload(
        &self,
        request: Request<v1::IssueWorkloadRequest>,
    ) -> Result<Response<v1::Issued>, Status> {
        let peer = request.extensions().get::<PeerInfo>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("no peer certificate"))?;
        let request = request.into_inner();
        let issued = self.ca.issue_workload(&peer, &request).await;
        // Whatever a peer sends may be in it.
        let workload: String = request.workload.chars().take(63).collect();
        let (id, address) = (&peer.id, peer.address);
        match &issued {
            Ok(_) => tracing::info!(workload, by = %id, %address, "audit: certificate issued for a workload"),
            Err(refused) => {
                self.ca.shared.refused.fetch_add(1, Ordering::Relaxed);
                let reason = refused.message();
                tracing::warn!(?workload, by = %id, %address, reason, "audit: certificate for a workload refused");
            }
        }
        issued.map(Response::new)
    }

    async fn join(&self, _: Request<v1::JoinRequest>) -> Result<Response<v1::Issued>, Status> {
        Err(Status::failed_precondition(
            "whoever has a certificate asks for the next by Issue; Join is for those who have none",
        ))
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let caller = caller(&request)?;
        let who = caller.who().to_owned();
        let v1::CreateTokenRequest { path, ttl } = request.into_inner();
        if path.starts_with("/user/") {
            // Whoever makes users could make one who may do more.
            let what = "make tokens for users";
            caller.require(AccessRole::Breakglass, Scope::Whole, what)?;
        }
        let answer = self.ca.create_token(&path, ttl, &who).await?;
        tracing::info!(who, id = answer.spiffe_id, "audit: join token made");
        Ok(Response::new(answer))
    }

    async fn get_authority(
        &self,
        request: Request<v1::GetAuthorityRequest>,
    ) -> Result<Response<v1::Authority>, Status> {
        authorize(&request)?;
        Ok(Response::new(self.ca.status().await?))
    }

    async fn rotate(
        &self,
        request: Request<v1::RotateRequest>,
    ) -> Result<Response<v1::RotateResponse>, Status> {
        let who = authorize(&request)?;
        let request = request.into_inner();
        let authority = self.ca.rotate(request.step(), request.force, &who).await?;
        let authority = Some(authority);
        Ok(Response::new(v1::RotateResponse { authority }))
    }

    async fn revoke(
        &self,
        request: Request<v1::RevokeRequest>,
    ) -> Result<Response<v1::RevokeResponse>, Status> {
        let caller = caller(&request)?;
        let revocation = self.ca.revoke(request.into_inner(), &caller).await?;
        let (id, reason) = (&revocation.spiffe_id, &revocation.reason);
        tracing::warn!(who = caller.who(), id, reason, "audit: certificates revoked");
        let revocation = Some(revocation);
        Ok(Response::new(v1::RevokeResponse { revocation }))
    }

    async fn list_revocations(
        &self,
        request: Request<v1::ListRevocationsRequest>,
    ) -> Result<Response<v1::ListRevocationsResponse>, Status> {
        authorize(&request)?;
        Ok(Response::new(self.ca.list_revocations().await?))
    }

    async fn restore(
        &self,
        request: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        let caller = caller(&request)?;
        let taken = self.ca.restore(&request.into_inner().spiffe_id, &caller).await?;
        let id = &taken.spiffe_id;
        tracing::warn!(who = caller.who(), id, "audit: revocation taken back");
        let revocation = Some(taken);
        Ok(Response::new(v1::RestoreResponse { revocation }))
    }
}

fn no_certificate() -> Status {
    Status::unauthenticated(
        "this connection is for joining only; the rest is for those who have a certificate",
    )
}

#[tonic::async_trait]
impl Identity for JoinDesk {
    async fn issue(&self, _: Request<v1::IssueRequest>) -> Result<Response<v1::Issued>, Status> {
        Err(no_certificate())
    }

    async fn issue_workload(
        &self,
        _: Request<v1::IssueWorkloadRequest>,
    ) -> Result<Response<v1::Issued>, Status> {
        Err(no_certificate())
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::Issued>, Status> {
        let address = request
            .extensions()
            .get::<StrangerInfo>()
            .map(|stranger| stranger.address.to_string());
        let address = address.unwrap_or_default();
        let request = request.into_inner();
        let joined = self.ca.join(&request).await;
        // Whatever a stranger sends may be in it.
        let id: String = request.spiffe_id.chars().take(200).collect();
        match &joined {
            Ok(_) => tracing::info!(id, address, "audit: joined with a token"),
            Err(refused) => {
                self.ca.shared.refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(?id, address, reason = refused.message(), "audit: join refused");
            }
        }
        joined.map(Response::new)
    }

    async fn create_token(
        &self,
        _: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        Err(no_certificate())
    }

    async fn get_authority(
        &self,
        _: Request<v1::GetAuthorityRequest>,
    ) -> Result<Response<v1::Authority>, Status> {
        Err(no_certificate())
    }

    async fn rotate(&self, _: Request<v1::RotateRequest>) -> Result<Response<v1::RotateResponse>, Status> {
        Err(no_certificate())
    }

    async fn revoke(&self, _: Request<v1::RevokeRequest>) -> Result<Response<v1::RevokeResponse>, Status> {
        Err(no_certificate())
    }

    async fn list_revocations(
        &self,
        _: Request<v1::ListRevocationsRequest>,
    ) -> Result<Response<v1::ListRevocationsResponse>, Status> {
        Err(no_certificate())
    }

    async fn restore(&self, _: Request<v1::RestoreRequest>) -> Result<Response<v1::RestoreResponse>, Status> {
        Err(no_certificate())
    }
}

impl Ca {
    /// Refuses one whose certificate, of a connection that may be old, is none any more. Answers the time of a revocation of its
    /// id, before which no certificate of it may begin.
    pub(super) async fn check_peer(
        &self,
        peer: &PeerInfo,
        now: SystemTime,
    ) -> Result<Option<SystemTime>, Status> {
        if now > peer.not_after {
            // The connection has outlived it.
            return Err(Status::unauthenticated(format!(
                "the certificate of {} has ended; it needs a join token to get another",
                peer.id
            )));
        }
        if let Err(error) = self.authorities().bundle().verify(&peer.chain, now) {
            // It has outlived the root, which may have been taken away for what its keys were used for.
            tracing::warn!(id = %peer.id, %error, "audit: renewal refused");
            return Err(Status::unauthenticated(format!(
                "the certificate of {} leads to no root of now; it needs a join token to get another",
                peer.id
            )));
        }
        let since = self.revoked_since(&peer.id).await?.map(|row| time(row.at_ms));
        if let Some(at) = since.filter(|since| peer.not_before < *since) {
            return Err(revoked(&peer.id, at));
        }
        Ok(since)
    }

    async fn renew(&self, peer: &PeerInfo, request: &[u8]) -> Result<v1::Issued, Status> {
        if matches!(peer.id.role(), Role::Workload { .. }) {
            // It would go on being who it was found to be once, whatever became of it.
            return Err(Status::permission_denied(format!(
                "{} is a workload, whose next certificate comes from its node's proxy",
                peer.id
            )));
        }
        let since = self.check_peer(peer, wall()).await?;
        let checked =
            CheckedRequest::parse(request, &peer.id).map_err(|error| bad("request", error.to_string()))?;
        let (issued, row) = self
            .sign(&checked, &peer.id, since)
            .map_err(|error| failed(&error))?;
        self.remember(row).await.map_err(status)?;
        Ok(self.wire(&issued))
    }

    async fn join(&self, request: &v1::JoinRequest) -> Result<v1::Issued, Status> {
        let id = SpiffeId::parse(&request.spiffe_id).map_err(|error| bad("spiffe_id", error.to_string()))?;
        let checked = CheckedRequest::parse(&request.request, &id)
            .map_err(|error| bad("request", error.to_string()))?;
        let since = self.revoked_since(&id).await?.map(|row| row.at_ms);
        // Before the token is used up: what can't be signed leaves it as it was.
        let (issued, row) = self.sign(&checked, &id, since.map(time)).map_err(|error| {
            if matches!(error, AuthorityError::Foreign { .. }) {
                bad("spiffe_id", error.to_string())
            } else {
                failed(&error)
            }
        })?;
        let hash = JoinToken::hash(&request.secret);
        let used = self
            .shared
            .policy
            .use_token(hash, (id.to_string(), since), checked.fingerprint(), ms(wall()))
            .await;
        let why = match used.map_err(status)? {
            TokenUse::Good => {
                self.remember(row).await.map_err(status)?;
                return Ok(self.wire(&issued));
            }
            TokenUse::Unknown => "the join token is not known here".to_owned(),
            TokenUse::Other => format!("the join token is for somebody else than {id}"),
            TokenUse::Used(at) => format!("the join token was used already, {}", ago(at)),
            TokenUse::Ended(at) => format!("the join token has ended {}", ago(at)),
            TokenUse::Revoked(at) => format!(
                "the join token was made {}, before {id} was revoked; it needs another",
                ago(at)
            ),
        };
        Err(Status::permission_denied(why))
    }

    async fn create_token(
        &self,
        path: &str,
        ttl: Option<prost_types::Duration>,
        who: &str,
    ) -> Result<v1::CreateTokenResponse, Status> {
        let domain = self.authorities().current().domain().to_owned();
        let want = "want /zone/ZONE/proxy/NAME or /user/NAME";
        let id = SpiffeId::parse(&format!("spiffe://{domain}{path}"))
            .ok()
            .filter(|id| id.trust_domain() == domain)
            .filter(|id| matches!(id.role(), Role::Proxy { .. } | Role::User { .. }))
            .ok_or_else(|| bad("path", format!("{path:?} is no path of a proxy or user; {want}")))?;
        let ttl = match ttl {
            None => TTL,
            Some(ttl) => Duration::try_from(ttl)
                .ok()
                .filter(|ttl| (TTLS.0..=TTLS.1).contains(ttl))
                .ok_or_else(|| bad("ttl", "is out of range; want 1m to 168h".to_owned()))?,
        };
        let root = self.shared.identity.facts().root.unwrap_or_default();
        let token = JoinToken::generate(&domain, &root)
            .map_err(|error| Status::internal(format!("can't make a token: {error}")))?;
        let expires = wall() + ttl;
        let row = NewToken {
            hash: JoinToken::hash(token.secret()),
            id: id.to_string(),
            who: who.to_owned(),
            expires_ms: ms(expires),
        };
        let kept: Result<(), Refused> = self.shared.policy.put_token(row, ms(wall())).await;
        kept.map_err(status)?;
        Ok(v1::CreateTokenResponse {
            token: token.reveal(),
            spiffe_id: id.to_string(),
            expires: Some(timestamp(ms(expires))),
        })
    }
}

/// How long ago a time is, for people.
fn ago(at_ms: i64) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(at_ms).unwrap_or(0));
    let ago = wall().duration_since(at).unwrap_or_default();
    format!("{} s ago", ago.as_secs())
}
