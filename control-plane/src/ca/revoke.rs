//! Revocations: kept in the store, in force here as soon as they are written, and told to every proxy with the trust bundle.

use super::Ca;
use crate::access::{Caller, Scope};
use crate::api::{bad, status};
use crate::policy::{Refused, ms, timestamp, wall};
use crate::refusal::{Reason, refuse};
use crate::store::RevocationRow;
use leeward_identity::{PeerInfo, Revoked, Role, SpiffeId, shown};
use leeward_policy::model::AccessRole;
use leeward_proto::v1;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// How long one is kept, where nobody says: longer than any certificate lasts that a control plane issues (168 h).
const KEEP: Duration = Duration::from_secs(169 * 3600);
/// The most: ten years, as long as a root lasts.
const MAX_KEEP: Duration = Duration::from_secs(87_600 * 3600);
/// The longest id, and the longest reason, in bytes.
const MAX_ID: usize = 512;
const MAX_REASON: usize = 500;
/// Proxies that an answer names.
const MAX_NAMED: usize = 1000;
/// How often the list is read anew, since a watch can die without a word, and what has come to its end is to go.
const LOOK: Duration = Duration::from_secs(5);
/// Pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How long connections of one who is revoked stay open, so that it hears that it is.
const FAREWELL: Duration = Duration::from_secs(3);

impl Ca {
    /// Reads the list for the first time. Nobody is served before: who knows nothing of it would let everybody in. `false` if it
    /// is stopped meanwhile.
    pub(crate) async fn open_revocations(&self, stop: &CancellationToken) -> bool {
        loop {
            match self.bring_revocations().await {
                Ok(_) => return true,
                Err(error) => tracing::error!(%error, "can't read what is revoked; trying again"),
            }
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Keeps the list up to date, whichever control plane writes it, until stopped.
    pub(crate) async fn keep_revocations(self, stop: CancellationToken) {
        loop {
            let mut watch = match self.shared.policy.watch_revocations().await {
                Ok(watch) => watch,
                Err(error) => {
                    tracing::warn!(%error, "can't watch what is revoked; what is known stays in force");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(PAUSE) => continue,
                    }
                }
            };
            loop {
                let brought = self.bring_revocations().await;
                if let Err(error) = &brought {
                    tracing::warn!(%error, "can't read what is revoked; what is known stays in force");
                }
                let pause = if brought.is_ok() { LOOK } else { PAUSE };
                tokio::select! {
                    () = stop.cancelled() => return,
                    // Whatever it says, everything is read anew.
                    events = watch.next() => if let Err(error) = events {
                        tracing::debug!(%error, "a watch was lost");
                        tokio::time::sleep(PAUSE.mul_f64(fastrand::f64())).await;
                        break;
                    },
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }

    /// Reads the list and puts it in force: for handshakes and calls at once, at the proxies as soon as they hear of it, and
    /// for connections that are open here a moment after that. Answers what was read.
    async fn bring_revocations(&self) -> Result<Vec<RevocationRow>, Refused> {
        // Of two that read at once the later has the newer list.
        let _turn = self.shared.listing.lock().await;
        let rows = self.shared.policy.revocations(ms(wall())).await?;
        let all = rows.iter().filter_map(|row| {
            // Only ids that can be read are written.
            let id = SpiffeId::parse(&row.id).ok()?;
            Some((id, time(row.at_ms)))
        });
        match Revoked::new(all) {
            Ok(revoked) => {
                if self.shared.identity.revoke(revoked) {
                    self.tell();
                    let identity = Arc::clone(&self.shared.identity);
                    // It ends by itself, soon.
                    tokio::spawn(async move {
                        tokio::time::sleep(FAREWELL).await;
                        let connections = identity.cut_revoked();
                        if connections > 0 {
                            tracing::info!(
                                connections,
                                "connections closed: their peers' certificates were revoked"
                            );
                        }
                    });
                }
            }
            Err(error) => {
                tracing::error!(%error, "the list of revocations can't be used; what is known stays in force");
            }
        }
        Ok(rows)
    }

    /// When a peer's certificate was revoked, if it was, by the list that is in force here.
    pub(crate) fn refuses(&self, peer: &PeerInfo) -> Option<SystemTime> {
        self.shared.identity.refuses(&peer.id, peer.not_before)
    }

    /// The time before which certificates of an id may not begin, by the store itself: another control plane may have written
    /// it a moment ago.
    pub(super) async fn revoked_since(&self, id: &SpiffeId) -> Result<Option<RevocationRow>, Status> {
        let row = self.shared.policy.revocation(id.as_str()).await;
        let row = row.map_err(status)?;
        Ok(row.filter(|row| row.until_ms >= ms(wall())))
    }

    pub(super) async fn revoke(
        &self,
        request: v1::RevokeRequest,
        caller: &Caller,
    ) -> Result<v1::Revocation, Status> {
        let id = self.revocable(&request.spiffe_id, caller)?;
        let reason = request.reason;
        if reason.len() > MAX_REASON || reason.contains(char::is_control) {
            let has = reason.len();
            let why = format!("has {has} bytes; want at most {MAX_REASON}, without control characters");
            return Err(bad("reason", why));
        }
        let keep = match request.keep {
            None => KEEP,
            Some(keep) => Duration::try_from(keep)
                .ok()
                .filter(|keep| (KEEP..=MAX_KEEP).contains(keep))
                .ok_or_else(|| bad("keep", "is out of range; want 169h to 87600h".to_owned()))?,
        };
        let now = wall();
        // Certificates are of whole seconds: one that was issued in this very second is to be refused.
        let at_ms = ms(now).div_euclid(1000).saturating_add(1).saturating_mul(1000);
        let row = RevocationRow {
            id: id.to_string(),
            at_ms,
            until_ms: ms(now + keep),
            reason,
            who: caller.who().to_owned(),
        };
        let kept = self.shared.policy.put_revocation(row, ms(now)).await;
        let kept = kept.map_err(status)?;
        self.bring_revocations().await.map_err(status)?;
        // It holds up no rotation.
        let forgotten = self.shared.policy.forget_certificates(id.to_string()).await;
        forgotten.map_err(status)?;
        // What is made once this is answered, tokens and certificates, is made after that time.
        let rest = time(kept.at_ms).duration_since(wall()).unwrap_or_default();
        tokio::time::sleep(rest.min(PAUSE)).await;
        Ok(wire(kept))
    }

    pub(super) async fn restore(&self, id: &str, caller: &Caller) -> Result<v1::Revocation, Status> {
        let id = self.revocable(id, caller)?;
        let taken = self.shared.policy.take_revocation(id.to_string()).await;
        let Some(taken) = taken.map_err(status)? else {
            let why = format!("there is no revocation of {id}");
            return Err(refuse(Code::NotFound, Reason::RevocationNotFound, why));
        };
        self.bring_revocations().await.map_err(status)?;
        Ok(wire(taken))
    }

    pub(super) async fn list_revocations(&self) -> Result<v1::ListRevocationsResponse, Status> {
        let rows = self.bring_revocations().await.map_err(status)?;
        let revoked = self.shared.identity.revoked().unwrap_or_default();
        let (mut behind, connected) = self.shared.holders.unaware(revoked.hash());
        behind.truncate(MAX_NAMED);
        Ok(v1::ListRevocationsResponse {
            revocations: rows.into_iter().map(wire).collect(),
            hash: revoked.hash().to_owned(),
            behind,
            connected: u32::try_from(connected).unwrap_or(u32::MAX),
        })
    }

    /// The id that a request names, if its certificates can be revoked, by this caller.
    fn revocable(&self, text: &str, caller: &Caller) -> Result<SpiffeId, Status> {
        let bad = |why: String| bad("spiffe_id", why);
        let domain = self.authorities().current().domain().to_owned();
        if text.len() > MAX_ID {
            return Err(bad(format!("has {} bytes; want at most {MAX_ID}", text.len())));
        }
        let whole = if text.starts_with('/') {
            format!("spiffe://{domain}{text}")
        } else {
            text.to_owned()
        };
        let id = SpiffeId::parse(&whole).map_err(|error| bad(error.to_string()))?;
        if id.trust_domain() != domain {
            return Err(bad(format!("{id} is of another trust domain; want {domain:?}")));
        }
        if id.role() == Role::Control {
            let why = format!(
                "{id} is every control plane's, by whom proxies are told; replace the root with leeward ca rotate"
            );
            return Err(bad(why));
        }
        if matches!(id.role(), Role::User { .. }) {
            // As for their join tokens: it may be one who may do more than the caller.
            caller.require(
                AccessRole::Breakglass,
                Scope::Whole,
                "revoke certificates of users, or restore them",
            )?;
        }
        Ok(id)
    }
}

/// What one is told whose certificate was revoked.
pub(crate) fn refused(id: &SpiffeId, at: SystemTime) -> Status {
    let why = format!(
        "the certificate of {id} was revoked at {}; it needs a join token that was made since to get another",
        shown(&at)
    );
    refuse(Code::Unauthenticated, Reason::CertificateRevoked, why)
}

/// A list as it goes on the wire.
pub(super) fn list(revoked: &Revoked) -> v1::RevocationList {
    let mut ids: Vec<_> = revoked
        .iter()
        .map(|(id, at)| v1::RevokedId {
            spiffe_id: id.to_string(),
            at: Some(timestamp(ms(at))),
        })
        .collect();
    // The same bytes for the same list.
    ids.sort_unstable_by(|a, b| a.spiffe_id.cmp(&b.spiffe_id));
    v1::RevocationList { ids }
}

/// A time in milliseconds since 1970.
pub(super) fn time(at_ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(at_ms).unwrap_or(0))
}

fn wire(row: RevocationRow) -> v1::Revocation {
    v1::Revocation {
        spiffe_id: row.id,
        at: Some(timestamp(row.at_ms)),
        until: Some(timestamp(row.until_ms)),
        reason: row.reason,
        who: row.who,
    }
}
