//! Backups over gRPC.

use super::catalogue::{self, Listed};
use super::error::BackupError;
use super::fence::{Lead, Role};
use super::keeper::Backups;
use super::manifest::short;
use crate::access::{Scope, caller};
use crate::api::authorize;
use crate::refusal::{Reason, refuse};
use leeward_policy::model::AccessRole;
use leeward_proto::v1;
use leeward_proto::v1::backup::Verified;
use leeward_proto::v1::backup_service_server::BackupService;
use tonic::{Code, Request, Response, Status};

/// Serves backups.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    backups: Backups,
}

impl Service {
    pub(crate) const fn new(backups: Backups) -> Self {
        Self { backups }
    }

    /// Who makes backups, for one who asked the wrong one.
    async fn elsewhere(&self) -> Status {
        let store = self.backups.policy().store();
        let leader = store.leader("backup").await.ok().flatten();
        let members = store.members().await.unwrap_or_default();
        let member = members.iter().find(|member| Some(&member.id) == leader.as_ref());
        let message = match member {
            Some(member) => format!("the control plane at {} makes backups: ask that one", member.api),
            None => "no control plane makes backups just now: try again".to_owned(),
        };
        refuse(Code::FailedPrecondition, Reason::NotLeading, message)
    }
}

#[tonic::async_trait]
impl BackupService for Service {
    async fn create_backup(
        &self,
        request: Request<v1::CreateBackupRequest>,
    ) -> Result<Response<v1::Backup>, Status> {
        let caller = caller(&request)?;
        let who = caller.who().to_owned();
        let request = request.into_inner();
        if request.include_ca {
            // Whoever has the authority's keys is anybody.
            caller.require(AccessRole::Breakglass, Scope::Whole, "have the authority's keys")?;
        }
        let (name, _) = self
            .backups
            .place(&request.destination)
            .map_err(|why| refuse(Code::NotFound, Reason::BackupPlaceNotFound, why))?;
        if !self.backups.leads() {
            return Err(self.elsewhere().await);
        }
        tracing::info!(
            who,
            place = name,
            include_ca = request.include_ca,
            "a backup is asked for"
        );
        // To the end, even if the caller goes away.
        let (backups, name) = (self.backups.clone(), name.to_owned());
        let making = tokio::spawn(async move { backups.make(&name, request.include_ca).await });
        let made = making
            .await
            .map_err(|_| Status::internal("the backup's task broke down"))?
            .map_err(|error| status(&error))?;
        let listed = Listed {
            short: short(&made.name).unwrap_or_default(),
            name: made.name,
            manifest: Ok(made.manifest),
            note: None,
        };
        Ok(Response::new(v1::Backup {
            new_bytes: made.written,
            ..backup(&listed)
        }))
    }

    async fn list_backups(
        &self,
        request: Request<v1::ListBackupsRequest>,
    ) -> Result<Response<v1::ListBackupsResponse>, Status> {
        authorize(&request)?;
        let request = request.into_inner();
        let (_, place) = self
            .backups
            .place(&request.destination)
            .map_err(|why| refuse(Code::NotFound, Reason::BackupPlaceNotFound, why))?;
        let listed = catalogue::list(place).await.map_err(|error| status(&error))?;
        let backups = listed.iter().rev().map(backup).collect();
        Ok(Response::new(v1::ListBackupsResponse { backups }))
    }

    async fn get_backup_status(
        &self,
        request: Request<v1::GetBackupStatusRequest>,
    ) -> Result<Response<v1::BackupStatus>, Status> {
        authorize(&request)?;
        let standings = self.backups.standings().into_iter();
        let places = standings.map(|(destination, standing)| v1::PlaceStatus {
            destination,
            last_good_ms: standing.last_good_ms,
            last_verified_ms: standing.last_verified_ms,
            failures: standing.failures,
            error: standing.error,
            continuous: standing.continuous,
            shipped_position: standing.shipping.position,
            waiting_since_ms: standing.shipping.waiting_since_ms.unwrap_or(0),
        });
        let drill = self.backups.drill().map(|report| v1::DrillStatus {
            time_ms: report.time_ms,
            met: report.met,
            lost_revisions: report.lost_revisions,
            lost_ms: report.lost_ms,
            recovery_ms: report.recovery_ms,
            error: report.error,
        });
        let live = super::drill::live(self.backups.policy().store()).await;
        Ok(Response::new(v1::BackupStatus {
            leads: self.backups.leads(),
            places: places.collect(),
            drill,
            revision: live.map_or(0, |live| live.revision),
            revision_ms: live.map_or(0, |live| live.time_ms),
            epoch: self.backups.lead().map(epoch),
        }))
    }

    async fn promote(
        &self,
        request: Request<v1::PromoteRequest>,
    ) -> Result<Response<v1::PromoteResponse>, Status> {
        let who = authorize(&request)?;
        let Some(Lead(epochs)) = self.backups.lead() else {
            return Err(refuse(
                Code::FailedPrecondition,
                Reason::NotLeading,
                "this control plane is no standby: it was started without --standby-of",
            ));
        };
        match epochs.role() {
            Role::Standby | Role::Leader => {}
            Role::Fenced => {
                return Err(refuse(
                    Code::FailedPrecondition,
                    Reason::NotLeading,
                    "another store leads, and this one is behind: make it a standby of that one first",
                ));
            }
        }
        tracing::warn!(who, "this control plane is to lead");
        epochs.promote();
        Ok(Response::new(v1::PromoteResponse {}))
    }
}

fn epoch(Lead(epochs): &Lead) -> v1::EpochStatus {
    use v1::epoch_status::Role as Shown;
    let (epoch, leader) = epochs.shown();
    let role = match epochs.role() {
        Role::Leader => Shown::Leader,
        Role::Standby => Shown::Standby,
        Role::Fenced => Shown::Fenced,
    };
    v1::EpochStatus {
        role: role.into(),
        epoch,
        leader,
    }
}

fn status(error: &BackupError) -> Status {
    let code = match error {
        BackupError::Nothing(_) | BackupError::NotEmpty(_) => Code::FailedPrecondition,
        BackupError::Lost | BackupError::Gap(_) => Code::Aborted,
        BackupError::Place(_) | BackupError::Kv(_) => Code::Unavailable,
        BackupError::Store(_)
        | BackupError::Manifest { .. }
        | BackupError::Seal { .. }
        | BackupError::Format { .. }
        | BackupError::Sealer(_)
        | BackupError::Piece { .. }
        | BackupError::Content { .. }
        | BackupError::File { .. }
        | BackupError::Broken => Code::Internal,
    };
    refuse(code, Reason::BackupFailed, error.chain())
}

fn backup(listed: &Listed) -> v1::Backup {
    let verified = match &listed.note {
        None => Verified::Unspecified,
        Some(note) if !note.good => Verified::Bad,
        Some(note) if note.restored => Verified::Restored,
        Some(_) => Verified::Hashes,
    };
    let name = listed.short.clone();
    match &listed.manifest {
        Ok(manifest) => v1::Backup {
            name,
            begun_ms: manifest.begun_ms,
            ended_ms: manifest.ended_ms,
            store_id: manifest.store_id.clone(),
            revision: manifest.revision,
            bytes: manifest.stored_bytes(),
            new_bytes: 0,
            encrypted: !manifest.recipients.is_empty(),
            with_ca: manifest.authority.is_some(),
            verified: verified.into(),
            error: String::new(),
        },
        Err(error) => v1::Backup {
            name,
            error: error.chain(),
            verified: verified.into(),
            ..v1::Backup::default()
        },
    }
}
