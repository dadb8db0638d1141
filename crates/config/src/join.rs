//! The first certificate, by a token.

use crate::address::Control;
use crate::certificates::{chain, last, parse};
use crate::rota::{Rota, Timing};
use leeward_identity::join::Joining;
use leeward_identity::{Bundle, IdentityError, InvalidSpiffeId, JoinToken, SpiffeId, channel};
use leeward_proto::v1;
use leeward_proto::v1::identity_client::IdentityClient;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;

/// What it takes to join.
#[derive(Clone, Debug)]
pub struct Join {
    /// Who it is to be.
    pub id: SpiffeId,
    /// The token.
    pub token: JoinToken,
    /// Roots by which the control plane is known, in place of the token's.
    pub bundle: Option<Bundle>,
    /// The control planes.
    pub control: Control,
    /// Where certificate, key and roots are to be kept.
    pub dir: PathBuf,
    /// How long things may take.
    pub timing: Timing,
    /// How long it may take altogether.
    pub limit: Duration,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The control plane said no, and would again.
    #[error("the control plane at {control} refused {id}: {reason}")]
    Refused {
        /// Who said so.
        control: String,
        /// Who asked.
        id: SpiffeId,
        /// What it said.
        reason: String,
    },
    /// None was reached in time.
    #[error("{id} has not joined within {limit:?}: {reason}")]
    Late {
        /// Who asked.
        id: SpiffeId,
        /// The time that there was.
        limit: Duration,
        /// What went wrong last.
        reason: String,
    },
    /// There are no control planes.
    #[error("there is no control plane to ask; name one")]
    Nobody,
    /// A key can't be made, or not be kept.
    #[error(transparent)]
    Key(IdentityError),
    /// The token's trust domain is no name.
    #[error(transparent)]
    Domain(#[from] InvalidSpiffeId),
    /// What came can't be used, or not be written.
    #[error(
        "{0}; the key is kept, and for an hour the token, while it lasts, is good for it and nothing else"
    )]
    Unusable(String),
    /// A task of this process broke down.
    #[error("the task that was to {0} broke down")]
    Broken(&'static str),
}

impl JoinError {
    /// Whether another try with the same token would end the same, whoever answers and whatever is mended here.
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Nobody | Self::Domain(_) => true,
            Self::Late { .. } | Self::Key(_) | Self::Unusable(_) | Self::Broken(_) => false,
        }
    }
}

/// Joins: makes a key, asks one control plane after the other, and keeps what came.
///
/// # Errors
///
/// [`JoinError`]; certificate, key and roots are as they were then. The key that was asked with is kept beside them, in
/// `joining-key.pem`, for the next try.
pub async fn join(join: Join) -> Result<(), JoinError> {
    let joining = Joining::new(&join.token, join.bundle.clone())?;
    // One key for all tries, those after a restart included: once one was answered, the token is good for its key alone. And
    // what can't be written had better be known before that.
    let (dir, id) = (join.dir.clone(), join.id.clone());
    let key = tokio::task::spawn_blocking(move || Joining::key(&dir, &id)).await;
    let key = key
        .map_err(|_| JoinError::Broken("make the key"))?
        .map_err(JoinError::Key)?;
    let key = Arc::new(key);
    let until = tokio::time::Instant::now() + join.limit;
    let mut rota = Rota::new(&join.control, join.timing);
    loop {
        let turn = rota.turn().ok_or(JoinError::Nobody)?;
        let request = v1::JoinRequest {
            secret: join.token.secret().to_owned(),
            spiffe_id: join.id.to_string(),
            request: key.request().to_vec(),
        };
        let within = until.min(tokio::time::Instant::now() + join.timing.silence);
        let asking = async {
            let control = turn
                .resolve()
                .await
                .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
            let mut client = IdentityClient::new(channel::join_lazy(joining.clone(), control));
            client.join(request).await
        };
        let reason = match tokio::time::timeout_at(within, asking).await {
            Ok(Ok(answer)) => {
                let unusable = |error: &IdentityError| JoinError::Unusable(chain(error));
                let issued = parse(answer.into_inner()).map_err(|error| unusable(&error))?;
                let (dir, id, key) = (join.dir.clone(), join.id.clone(), Arc::clone(&key));
                let kept = tokio::task::spawn_blocking(move || joining.keep(&dir, &id, &key, &issued)).await;
                return match kept {
                    Ok(kept) => kept.map_err(|error| unusable(&error)),
                    Err(_) => Err(JoinError::Broken("keep the certificate")),
                };
            }
            Ok(Err(status)) if is_final(status.code()) => {
                let (control, id, reason) = (turn.to_string(), join.id, last(&status));
                return Err(JoinError::Refused { control, id, reason });
            }
            Ok(Err(status)) => last(&status),
            Err(_) => "it did not answer".to_owned(),
        };
        tracing::warn!(control = %turn, reason, "not joined yet");
        let pause = rota.failed(fastrand::f64());
        if tokio::time::Instant::now() + pause >= until {
            let (id, limit) = (join.id, join.limit);
            return Err(JoinError::Late { id, limit, reason });
        }
        tokio::time::sleep(pause).await;
    }
}

/// What would be answered the same the next time.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::PermissionDenied | Code::InvalidArgument | Code::Unauthenticated | Code::Unimplemented
    )
}
