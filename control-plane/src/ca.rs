//! The control plane as the mesh's certificate authority: signs, keeps its own certificate good, and brings the mesh from one
//! root to another.
//!
//! The directory of `--ca` has the authority and the trust bundle (`leeward_identity::rotation`); the store has tokens,
//! what was issued, and what is revoked; what proxies run is known from them (`holders`). While a rotation is under way the control plane's own
//! certificate stays with the old root, so that whoever doesn't know the new one yet can still come and learn of it.

mod holders;
mod own;
mod revoke;
mod service;
mod workload;

pub use own::{Files, OwnError};
pub(crate) use revoke::refused as revoked;
pub(crate) use service::{Issuer, JoinDesk};

use crate::api::status;
use crate::policy::{Policy, Refused, ms, timestamp, wall};
use crate::push::trust_frame;
use crate::refusal::{Reason, refuse};
use crate::store::IssuedRow;
use bytes::Bytes;
use holders::Holders;
use leeward_identity::authority::AuthorityError;
use leeward_identity::rotation::{Authorities, Phase, RotationError};
use leeward_identity::{CheckedRequest, Identity, Issued, PeerInfo, RevocationCounts, SpiffeId};
use leeward_proto::v1;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tonic::{Code, Status};

/// The authority at work. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Ca {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    policy: Policy,
    /// Its own.
    identity: Arc<Identity>,
    /// How long certificates last.
    life: Duration,
    // Poison is harmless: a step is taken whole or not at all.
    authorities: Mutex<Authorities>,
    /// One step at a time.
    turn: tokio::sync::Mutex<()>,
    /// Held while what is revoked is read.
    listing: tokio::sync::Mutex<()>,
    holders: Holders,
    /// The bundle as it is pushed, with what is revoked.
    trust: watch::Sender<Bytes>,
    issued: AtomicU64,
    refused: AtomicU64,
}

/// What metrics tell of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) authority_left: Duration,
    pub(crate) root_left: Duration,
    pub(crate) own_left: Duration,
    pub(crate) issued: u64,
    pub(crate) refused: u64,
    pub(crate) behind: usize,
    pub(crate) revocations: RevocationCounts,
}

/// Holders that an answer names.
const MAX_NAMED: usize = 1000;
/// Those that a refusal names.
const MAX_TOLD: usize = 10;

impl Ca {
    pub(crate) fn new(files: Files, policy: Policy, identity: Arc<Identity>) -> Self {
        let Files { authorities, life } = files;
        let shared = Shared {
            policy,
            identity,
            life,
            trust: watch::Sender::new(trust_frame(&bundle(&authorities))),
            authorities: Mutex::new(authorities),
            turn: tokio::sync::Mutex::default(),
            listing: tokio::sync::Mutex::default(),
            holders: Holders::default(),
            issued: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The bundle as it is pushed.
    pub(crate) fn trust(&self) -> watch::Sender<Bytes> {
        self.shared.trust.clone()
    }

    /// A proxy has opened a stream.
    pub(crate) fn connected(&self, id: &SpiffeId, stream: u64, not_after: SystemTime) {
        self.shared.holders.connected(id, stream, not_after);
    }

    /// A proxy has said what it runs.
    pub(crate) fn heard(&self, id: &SpiffeId, stream: u64, report: &v1::IdentityReport) {
        self.shared.holders.heard(id, stream, report);
    }

    /// A proxy's stream has ended.
    pub(crate) fn gone(&self, peer: &PeerInfo, stream: u64) {
        match self.refuses(peer) {
            // Its certificate counts no more, however long it lasts.
            Some(_) => self.shared.holders.forget(&peer.id, stream),
            None => self.shared.holders.gone(&peer.id, stream, wall()),
        }
    }

    /// What metrics tell.
    pub(crate) fn standing(&self) -> Standing {
        let now = wall();
        let authorities = self.authorities();
        let bundle = authorities.bundle().clone();
        let authority_left = authorities.current().validity().left(now);
        let signs = authorities.current().root().to_owned();
        drop(authorities);
        let root = bundle.roots().iter().find(|root| root.fingerprint == signs);
        Standing {
            authority_left,
            root_left: root.map_or(Duration::ZERO, |root| root.validity.left(now)),
            own_left: self.shared.identity.facts().validity.left(now),
            issued: self.shared.issued.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
            behind: self.shared.holders.connected_behind(bundle.hash()),
            revocations: self.shared.identity.revocation_counts(),
        }
    }

    /// Signs for a checked request. `since`: the time of a revocation of the id, before which the certificate must not begin.
    fn sign(
        &self,
        request: &CheckedRequest,
        id: &SpiffeId,
        since: Option<SystemTime>,
    ) -> Result<(Issued, IssuedRow), AuthorityError> {
        self.sign_for(request, id, self.shared.life, since)
    }

    /// The same, of a certificate that lasts for `life`.
    fn sign_for(
        &self,
        request: &CheckedRequest,
        id: &SpiffeId,
        life: Duration,
        since: Option<SystemTime>,
    ) -> Result<(Issued, IssuedRow), AuthorityError> {
        let authorities = self.authorities();
        let signed = authorities.current().sign_since(request, id, life, since)?;
        let issued = Issued {
            chain: signed.chain,
            bundle: authorities.bundle().clone(),
        };
        let row = IssuedRow {
            id: id.to_string(),
            by: None,
            fingerprint: signed.fingerprint,
            root: signed.root,
            not_after_ms: ms(signed.validity.not_after),
        };
        Ok((issued, row))
    }

    /// Remembers what was signed. Only then may it be given.
    async fn remember(&self, row: IssuedRow) -> Result<(), Refused> {
        self.shared.policy.put_certificate(row, ms(wall())).await?;
        self.shared.issued.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn wire(&self, issued: &Issued) -> v1::Issued {
        v1::Issued {
            chain: issued.chain.iter().map(|cert| cert.to_vec()).collect(),
            bundle: Some(bundle(&self.authorities())),
        }
    }

    /// Where it stands.
    async fn status(&self) -> Result<v1::Authority, Status> {
        let now = wall();
        let rows = self.shared.policy.certificates(ms(now)).await.map_err(status)?;
        let authorities = self.authorities();
        let phase = match authorities.phase().map_err(refused)? {
            Phase::Steady => v1::RotationPhase::Steady,
            Phase::Prepared => v1::RotationPhase::Prepared,
            Phase::Active => v1::RotationPhase::Active,
        };
        let current = authorities.current();
        let wire = bundle(&authorities);
        let mut behind = self.shared.holders.behind(&rows, &wire.hash, now);
        let mut others = self.shared.holders.on_other_roots(&rows, current.root(), now);
        behind.truncate(MAX_NAMED);
        others.truncate(MAX_NAMED);
        let roots = authorities.bundle().roots().iter();
        Ok(v1::Authority {
            trust_domain: current.domain().to_owned(),
            signing: current.fingerprint().to_owned(),
            not_after: Some(timestamp(ms(current.validity().not_after))),
            signing_root: current.root().to_owned(),
            certificate_life: prost_types::Duration::try_from(self.shared.life).ok(),
            phase: phase.into(),
            behind,
            on_other_roots: others,
            roots: roots
                .map(|root| v1::RootInfo {
                    fingerprint: root.fingerprint.clone(),
                    not_after: Some(timestamp(ms(root.validity.not_after))),
                    signing: root.fingerprint == current.root(),
                })
                .collect(),
            bundle: Some(wire),
        })
    }

    /// Takes one step of a rotation, for `who`.
    async fn rotate(&self, step: v1::RotationStep, force: bool, who: &str) -> Result<v1::Authority, Status> {
        let _turn = self.shared.turn.lock().await;
        let before = self.status().await?;
        let gate = match step {
            v1::RotationStep::Activate => Some((
                &before.behind,
                "would not know certificates of the new root: they don't run the trust bundle of now",
            )),
            v1::RotationStep::Retire => Some((
                &before.on_other_roots,
                "would be refused by everybody: their certificates lead to a root that is to go",
            )),
            v1::RotationStep::Prepare | v1::RotationStep::Cancel | v1::RotationStep::Unspecified => None,
        };
        // What is out of order is told as that, whoever is in the way.
        let in_turn = match step {
            v1::RotationStep::Activate => before.phase() == v1::RotationPhase::Prepared,
            v1::RotationStep::Retire => before.phase() != v1::RotationPhase::Prepared,
            v1::RotationStep::Prepare | v1::RotationStep::Cancel | v1::RotationStep::Unspecified => true,
        };
        if let Some((holders, why)) = gate.filter(|(holders, _)| in_turn && !holders.is_empty()) {
            let told = told(holders, why);
            if !force {
                let why = format!("{told}; wait for them, or --force");
                return Err(refuse(Code::FailedPrecondition, Reason::RotationBlocked, why));
            }
            tracing::warn!(who, step = step.as_str_name(), "forced: {told}");
        }
        let ca = self.clone();
        let task = tokio::task::spawn_blocking(move || ca.step(step));
        task.await
            .map_err(|_| Status::internal("the step broke down"))??;
        tracing::info!(who, step = step.as_str_name(), force, "audit: rotation step");
        self.status().await
    }

    /// Blocks.
    fn step(&self, step: v1::RotationStep) -> Result<(), Status> {
        match step {
            v1::RotationStep::Unspecified => {
                return Err(crate::api::bad(
                    "step",
                    "is missing; want prepare, activate, retire or cancel".into(),
                ));
            }
            v1::RotationStep::Prepare => self.authorities().prepare().map_err(refused)?,
            v1::RotationStep::Cancel => self.authorities().cancel().map_err(refused)?,
            v1::RotationStep::Activate => self.authorities().activate().map_err(refused)?,
            v1::RotationStep::Retire => {
                // Everybody knows the new root by now; once the old one is gone, nobody would take the old certificate.
                if self.authorities().phase().map_err(refused)? != Phase::Prepared {
                    self.issue_own(own::Signer::Current).map_err(|error| {
                        Status::internal(format!(
                            "the control plane's own certificate can't be replaced: {error}"
                        ))
                    })?;
                }
                self.authorities().retire().map_err(refused)?;
            }
        }
        self.publish().map_err(|error| {
            Status::internal(format!(
                "the step is taken, but the control plane's own bundle is not written: {error}"
            ))
        })
    }

    /// Lets the bundle of now be known: first here, then to the proxies.
    fn publish(&self) -> Result<(), leeward_identity::IdentityError> {
        let roots = self.authorities().bundle().clone();
        let written = self.shared.identity.install_bundle(&roots);
        self.tell();
        written.map(|_| ())
    }

    /// Tells proxies the bundle of now, and what is revoked.
    fn tell(&self) {
        let authorities = self.authorities();
        let revoked = self.shared.identity.revoked();
        let wire = v1::TrustBundle {
            revoked: revoked.as_deref().map(revoke::list),
            ..bundle(&authorities)
        };
        // While the authorities are held: of two that tell at once, the one that tells last knows all.
        self.shared.trust.send_replace(trust_frame(&wire));
    }

    fn authorities(&self) -> MutexGuard<'_, Authorities> {
        self.shared
            .authorities
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn bundle(authorities: &Authorities) -> v1::TrustBundle {
    let bundle = authorities.bundle();
    v1::TrustBundle {
        roots: bundle.roots().iter().map(|root| root.cert.to_vec()).collect(),
        hash: bundle.hash().to_owned(),
        signing_root: authorities.current().root().to_owned(),
        revoked: None,
    }
}

fn refused(error: RotationError) -> Status {
    match error {
        RotationError::Order { .. } | RotationError::Domain { .. } => refuse(
            Code::FailedPrecondition,
            Reason::RotationBlocked,
            error.to_string(),
        ),
        RotationError::Authority(_) | RotationError::Bundle(_) | RotationError::Files { .. } => {
            let mut text = error.to_string();
            if let Some(source) = std::error::Error::source(&error) {
                text.push_str(&format!(": {source}"));
            }
            refuse(Code::FailedPrecondition, Reason::AuthorityFailed, text)
        }
    }
}

fn told(holders: &[v1::Holder], why: &str) -> String {
    let named = holders.iter().take(MAX_TOLD).map(|holder| {
        let place = if holder.connected {
            "connected"
        } else {
            "not connected"
        };
        format!("{} ({place}; {})", holder.spiffe_id, holder.why)
    });
    let mut text = format!(
        "{} {why}: {}",
        holders.len(),
        named.collect::<Vec<_>>().join(", ")
    );
    if holders.len() > MAX_TOLD {
        text.push_str(", …");
    }
    text
}
