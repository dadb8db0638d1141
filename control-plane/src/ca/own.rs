//! The control plane's own certificate, which it issues itself and keeps good.

use super::Ca;
use crate::policy::wall;
use leeward_identity::authority::{Authority, AuthorityError};
use leeward_identity::rotation::{Authorities, RotationError};
use leeward_identity::{
    BadRequest, Bundle, CheckedRequest, Identity, IdentityError, InvalidSpiffeId, Issued, NewKey, SpiffeId,
    peer_id,
};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The authority of a directory, before anything is served.
#[derive(Debug)]
pub struct Files {
    pub(super) authorities: Authorities,
    pub(super) life: Duration,
}

/// Why the control plane has no certificate of its own.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// The authority can't be used.
    #[error(transparent)]
    Rotation(#[from] RotationError),
    /// It doesn't sign.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// What was signed can't be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The trust domain is no name.
    #[error(transparent)]
    Domain(#[from] InvalidSpiffeId),
    /// There is no randomness for a key.
    #[error("can't make a key: {0}")]
    Key(String),
    /// Its own request is no good.
    #[error(transparent)]
    Request(#[from] BadRequest),
}

/// Which authority signs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Signer {
    /// The one whose root everybody knows: while a rotation is under way, the old one.
    Known,
    /// The one that signs for everybody.
    Current,
}

/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How often people are told that an authority ends soon.
const REMIND: Duration = Duration::from_secs(3600);

impl Files {
    /// Opens the authority in a directory, that issues certificates for `life`.
    ///
    /// # Errors
    ///
    /// If there is none, or it can't be used.
    pub fn open(dir: &Path, life: Duration) -> Result<Self, RotationError> {
        let authorities = Authorities::open(dir)?;
        if authorities.current().is_root() {
            tracing::warn!(
                dir = %dir.display(),
                "the key of a root is online here; `leeward ca intermediate` makes an authority whose root can be kept away"
            );
        }
        Ok(Self { authorities, life })
    }

    /// The control plane's own identity, in a directory: the one that is there if it is good, or else a new one. Roots
    /// that it trusts already are trusted by the whole mesh from then on.
    ///
    /// # Errors
    ///
    /// If it can't be issued or written.
    pub fn identity(&mut self, dir: &Path) -> Result<Arc<Identity>, OwnError> {
        let domain = self.authorities.current().domain().to_owned();
        let id = SpiffeId::control(&domain)?;
        self.adopt(dir, &domain)?;
        let usable = Identity::load(dir).ok().filter(|known| {
            let facts = known.facts();
            let has_root = facts
                .root
                .is_some_and(|root| self.authorities.bundle().has(&root));
            *known.id() == id && known.ready_now().is_ok() && has_root
        });
        let identity = match usable {
            Some(identity) => identity,
            None => {
                known(&self.authorities).issue(&id, self.life, dir)?;
                tracing::info!(%id, dir = %dir.display(), "the control plane has issued its own certificate");
                Identity::load(dir)?
            }
        };
        identity.install_bundle(self.authorities.bundle())?;
        Ok(identity)
    }

    /// A mesh that had certificates in files, of another root, goes on while it moves to this one. Where the identity there
    /// is one of this authority's already, its bundle says nothing new: a root that is in it and not in the authority's has
    /// been retired.
    fn adopt(&mut self, dir: &Path, domain: &str) -> Result<(), RotationError> {
        let moves = Identity::load(dir).is_ok_and(|known| {
            let root = known.facts().root;
            known.ready_now().is_ok() && !root.is_some_and(|root| self.authorities.bundle().has(&root))
        });
        if !moves {
            return Ok(());
        }
        let Some(bundle) = std::fs::read(dir.join("bundle.pem"))
            .ok()
            .and_then(|text| Bundle::from_pem(&text).ok())
        else {
            return Ok(());
        };
        let known = self.authorities.bundle();
        let new = bundle.filtered(|root| {
            let id = peer_id(std::slice::from_ref(&root.cert));
            !known.has(&root.fingerprint) && id.is_ok_and(|id| id.trust_domain() == domain)
        });
        let Ok(new) = new else { return Ok(()) };
        for root in new.roots() {
            tracing::info!(
                root = root.fingerprint,
                "a root that the control plane trusted already is in the mesh's bundle now"
            );
        }
        self.authorities.trust(&new)
    }
}

/// Whose certificates everybody can check.
fn known(authorities: &Authorities) -> &Authority {
    let now = wall();
    authorities
        .previous()
        .filter(|previous| previous.validity().holds(now))
        .unwrap_or_else(|| authorities.current())
}

impl Ca {
    /// Keeps the control plane's own certificate good until stopped.
    pub(crate) async fn keep_own(self, stop: CancellationToken) {
        let (mut draw, mut reminded) = (fastrand::f64(), None);
        loop {
            let now = wall();
            let facts = self.shared.identity.facts();
            let (root, ends, is_late) = {
                let authorities = self.authorities();
                let validity = authorities.current().validity();
                (
                    known(&authorities).root().to_owned(),
                    validity.not_after,
                    now > validity.worry_at(),
                )
            };
            let clock = tokio::time::Instant::now();
            if is_late && reminded.is_none_or(|at: tokio::time::Instant| clock - at >= REMIND) {
                let left = ends.duration_since(now).unwrap_or_default();
                tracing::warn!(
                    ?left,
                    "the authority's own certificate ends; put another in next/ and rotate"
                );
                reminded = Some(clock);
            }
            if now >= facts.validity.renew_at(draw) || facts.root.as_deref() != Some(root.as_str()) {
                let ca = self.clone();
                match tokio::task::spawn_blocking(move || ca.issue_own(Signer::Known)).await {
                    Ok(Ok(())) => draw = fastrand::f64(),
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "the control plane's own certificate is not renewed; it is tried again");
                    }
                    Err(_) => return,
                }
            }
            let due = self.shared.identity.facts().validity.renew_at(draw);
            let pause = due
                .duration_since(wall())
                .unwrap_or_default()
                .clamp(LOOK / 10, LOOK);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Issues the next certificate of the control plane's own. Blocks.
    pub(super) fn issue_own(&self, signer: Signer) -> Result<(), OwnError> {
        let identity = &self.shared.identity;
        let key = NewKey::generate(identity.id()).map_err(|error| OwnError::Key(error.to_string()))?;
        let request = CheckedRequest::parse(key.request(), identity.id())?;
        let issued = {
            let authorities = self.authorities();
            let signer = match signer {
                Signer::Known => known(&authorities),
                Signer::Current => authorities.current(),
            };
            Issued {
                chain: signer.sign(&request, identity.id(), self.shared.life)?.chain,
                bundle: authorities.bundle().clone(),
            }
        };
        identity.install(&key, &issued)?;
        tracing::info!(id = %identity.id(), not_after = ?identity.not_after(), "the control plane has renewed its own certificate");
        Ok(())
    }
}
