//! What callers are told: the one table from what was refused to the status that they see.
//!
//! Every refusal has an `ErrorInfo` with a [`Reason`], which never changes and which programs go by; beside it what there is
//! to say of it: `BadRequest`, `ResourceInfo`, `PreconditionFailure`, `QuotaFailure`, `RetryInfo`. Texts are for people.

use crate::kv::KvError;
use crate::policy::Refused;
use crate::store::StoreError;
use leeward_policy::Key;
use std::collections::HashMap;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, PreconditionViolation, StatusExt};

/// The domain of every reason.
pub const DOMAIN: &str = "leeward.dev";

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident => $text:literal,)+) => {
        /// Why something was refused, for programs.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Every one.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// How it is called in `ErrorInfo.reason`.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

reasons! {
    /// Fields of the request are bad; `BadRequest` names them.
    InvalidField => "INVALID_FIELD",
    /// The request shows neither a user's certificate nor a token.
    NotAuthenticated => "NOT_AUTHENTICATED",
    /// The caller's certificate has ended.
    CertificateEnded => "CERTIFICATE_ENDED",
    /// The caller's certificate was revoked.
    CertificateRevoked => "CERTIFICATE_REVOKED",
    /// The token isn't valid; `metadata.token` says why.
    InvalidToken => "INVALID_TOKEN",
    /// The keys that tokens are checked with can't be had.
    NoTokenKeys => "NO_TOKEN_KEYS",
    /// The caller is no user, but a proxy or something else of the mesh.
    NotAUser => "NOT_A_USER",
    /// The caller lacks a role; `metadata.role` names it.
    RoleRequired => "ROLE_REQUIRED",
    /// The caller holds breakglass and gives no reason.
    ReasonRequired => "REASON_REQUIRED",
    /// What the caller may see has changed while it watched.
    AccessChanged => "ACCESS_CHANGED",
    /// Nobody would be left who holds breakglass.
    Lockout => "LOCKOUT",
    /// There is no such resource.
    ResourceNotFound => "RESOURCE_NOT_FOUND",
    /// There is such a resource already, and only new ones were to be made.
    ResourceExists => "RESOURCE_EXISTS",
    /// There is no such module.
    ModuleNotFound => "MODULE_NOT_FOUND",
    /// The resource is at another revision than the one expected.
    RevisionConflict => "REVISION_CONFLICT",
    /// The resource is another manager's; `metadata.manager` names it.
    ManagerConflict => "MANAGER_CONFLICT",
    /// Other resources refer to it.
    ResourceInUse => "RESOURCE_IN_USE",
    /// Plugins name the module.
    ModuleInUse => "MODULE_IN_USE",
    /// More would be pruned than may be.
    TooManyDeletes => "TOO_MANY_DELETES",
    /// Changes that old are no longer known.
    RevisionCompacted => "REVISION_COMPACTED",
    /// There is no such revision any more.
    RevisionNotFound => "REVISION_NOT_FOUND",
    /// Another change is on its way to proxies; `metadata.revision` says which.
    RolloutUnderWay => "ROLLOUT_UNDER_WAY",
    /// No rollout is under way, or it is of another revision, or what is asked for can't be done with it now.
    NoSuchRollout => "NO_SUCH_ROLLOUT",
    /// The control plane was not given a place for backups of that name.
    BackupPlaceNotFound => "BACKUP_PLACE_NOT_FOUND",
    /// A backup could not be made or read.
    BackupFailed => "BACKUP_FAILED",
    /// Another control plane does this, or leads.
    NotLeading => "NOT_LEADING",
    /// More resources in one call than may be.
    TooManyResources => "TOO_MANY_RESOURCES",
    /// The request is too large.
    TooLarge => "TOO_LARGE",
    /// There is no room for the module.
    ModuleStoreFull => "MODULE_STORE_FULL",
    /// The module has as many signatures as may be.
    TooManySignatures => "TOO_MANY_SIGNATURES",
    /// There are as many join tokens as may be.
    TooManyTokens => "TOO_MANY_TOKENS",
    /// There are as many revocations as may be.
    TooManyRevocations => "TOO_MANY_REVOCATIONS",
    /// The id is not revoked.
    RevocationNotFound => "REVOCATION_NOT_FOUND",
    /// The method is not known here.
    UnknownMethod => "UNKNOWN_METHOD",
    /// A step of the authority's rotation that can't be done now.
    RotationBlocked => "ROTATION_BLOCKED",
    /// The authority can't sign.
    AuthorityFailed => "AUTHORITY_FAILED",
    /// As many of it are under way as may be.
    Busy => "BUSY",
    /// The request did not come in time.
    TooSlow => "TOO_SLOW",
    /// Somebody else has written at the same time, again and again.
    Contended => "CONTENDED",
    /// The store can't be reached now.
    StoreUnavailable => "STORE_UNAVAILABLE",
    /// The store was written by a later build, and can only be read.
    StoreReadOnly => "STORE_READ_ONLY",
    /// There is no room in the store.
    StoreFull => "STORE_FULL",
    /// What the code says; there is nothing else that programs could go by.
    Other => "OTHER",
    /// The store has failed; nobody knows more than the message says.
    StoreFailed => "STORE_FAILED",
}

/// How soon to try again what lost a race.
const AGAIN_SOON: Duration = Duration::from_millis(100);
/// How soon to try again what waits for room, or for keys.
const AGAIN_LATER: Duration = Duration::from_secs(5);

/// The longest message of a status, in bytes, and the most of details. Both travel in headers, of which
/// clients take 16 KiB, the message twice and once with up to three bytes for one.
const MAX_SHOWN: usize = 1500;
const MAX_DETAILS: usize = 3000;
/// The longest of any other text in details, in bytes.
const MAX_TEXT: usize = 300;
/// Preconditions that are named.
const MAX_VIOLATIONS: usize = 8;

fn cut(text: &str, bytes: usize) -> String {
    let end = text.floor_char_boundary(bytes);
    text.get(..end).unwrap_or_default().to_owned()
}

fn details(reason: Reason, metadata: &[(&str, &str)]) -> ErrorDetails {
    let metadata: HashMap<String, String> = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), cut(value, MAX_TEXT)))
        .collect();
    ErrorDetails::with_error_info(reason.as_str(), DOMAIN, metadata)
}

fn with(code: Code, message: &str, details: ErrorDetails) -> Status {
    Status::with_error_details(code, cut(message, MAX_SHOWN), details)
}

/// A refusal for a reason of which there is nothing else to say.
pub(crate) fn refuse(code: Code, reason: Reason, message: impl AsRef<str>) -> Status {
    with(code, message.as_ref(), details(reason, &[]))
}

/// The same, with what programs may want to know.
pub(crate) fn refuse_with(
    code: Code,
    reason: Reason,
    message: impl AsRef<str>,
    metadata: &[(&str, &str)],
) -> Status {
    with(code, message.as_ref(), details(reason, metadata))
}

/// The same, of what may be tried again.
pub(crate) fn refuse_for_now(code: Code, reason: Reason, message: impl AsRef<str>) -> Status {
    let mut details = details(reason, &[]);
    details.set_retry_info(Some(AGAIN_LATER));
    with(code, message.as_ref(), details)
}

/// A refusal for one bad field.
pub(crate) fn bad(path: &str, reason: String) -> Status {
    let mut details = details(Reason::InvalidField, &[]);
    details.add_bad_request_violation(cut(path, MAX_TEXT), cut(&reason, MAX_DETAILS));
    with(Code::InvalidArgument, &format!("{path}: {reason}"), details)
}

/// A refusal of what a revision that is no longer known was asked for.
pub(crate) fn compacted(after: u64) -> Status {
    let message =
        format!("changes after revision {after} are no longer known; list again and watch from there");
    let revision = after.to_string();
    refuse_with(
        Code::OutOfRange,
        Reason::RevisionCompacted,
        message,
        &[("revision", &revision)],
    )
}

/// The one table from what was refused to what the caller sees.
pub(crate) fn status(refused: Refused) -> Status {
    let message = refused.to_string();
    match refused {
        Refused::Bad(fields) => bad_fields(&message, fields),
        Refused::InUse { key, by } => {
            let mut details = of(Reason::ResourceInUse, &key, &message);
            details.set_precondition_failure(violations("REFERENCE", &by));
            with(Code::FailedPrecondition, &message, details)
        }
        Refused::ModuleInUse { sha256, by } => {
            let mut details = details(Reason::ModuleInUse, &[]);
            details.set_resource_info("Module", sha256, "", cut(&message, MAX_TEXT));
            details.set_precondition_failure(violations("REFERENCE", &by));
            with(Code::FailedPrecondition, &message, details)
        }
        Refused::NotFound(key) => with(
            Code::NotFound,
            &message,
            of(Reason::ResourceNotFound, &key, &message),
        ),
        Refused::NoModule(sha256) => {
            let mut details = details(Reason::ModuleNotFound, &[]);
            details.set_resource_info("Module", cut(&sha256, MAX_TEXT), "", cut(&message, MAX_TEXT));
            with(Code::NotFound, &message, details)
        }
        Refused::NoRevision(revision) => {
            let revision = revision.to_string();
            let named = [("revision", revision.as_str())];
            refuse_with(Code::NotFound, Reason::RevisionNotFound, message, &named)
        }
        Refused::UnderWay { revision, .. } | Refused::Supersedes(revision) => {
            let revision = revision.to_string();
            let named = [("revision", revision.as_str())];
            refuse_with(Code::FailedPrecondition, Reason::RolloutUnderWay, message, &named)
        }
        Refused::Full { .. } => quota(Reason::ModuleStoreFull, "modules", &message),
        Refused::TooMany(_) => quota(Reason::TooManyResources, "resources of a call", &message),
        Refused::Store(StoreError::Signatures(_)) => {
            quota(Reason::TooManySignatures, "signatures of a module", &message)
        }
        Refused::Store(StoreError::Tokens(_)) => quota(Reason::TooManyTokens, "join tokens", &message),
        Refused::Store(StoreError::Revocations(_)) => {
            quota(Reason::TooManyRevocations, "revocations", &message)
        }
        Refused::Store(StoreError::Conflict { key, wanted, found }) => {
            let (wanted, found) = (wanted.to_string(), found.to_string());
            let mut details = details(
                Reason::RevisionConflict,
                &[("expected", &wanted), ("found", &found)],
            );
            set_resource(&mut details, &key, &message);
            details.set_precondition_failure(violations("REVISION", std::slice::from_ref(&message)));
            details.set_retry_info(Some(AGAIN_SOON));
            with(Code::Aborted, &message, details)
        }
        Refused::Store(StoreError::Resources { .. } | StoreError::TooLarge { .. }) => {
            quota(Reason::TooManyResources, "resources", &message)
        }
        Refused::Store(StoreError::Kv(KvError::TooLarge { .. })) => {
            quota(Reason::TooLarge, "a value of the store", &message)
        }
        Refused::Store(StoreError::Kv(KvError::Full { .. })) => {
            quota(Reason::StoreFull, "the store", &message)
        }
        Refused::Store(StoreError::Kv(KvError::Unavailable { .. } | KvError::Unknown { .. })) => {
            refuse_for_now(Code::Unavailable, Reason::StoreUnavailable, message)
        }
        Refused::Store(StoreError::Kv(KvError::Contended(_))) => {
            refuse_for_now(Code::Unavailable, Reason::Contended, message)
        }
        Refused::Store(StoreError::ReadOnly(_)) => {
            refuse(Code::FailedPrecondition, Reason::StoreReadOnly, message)
        }
        Refused::Store(StoreError::Moved { .. } | StoreError::Fenced(_)) => {
            refuse_for_now(Code::Aborted, Reason::Contended, message)
        }
        Refused::Denied(status) => *status,
        Refused::Lockout => refuse(Code::FailedPrecondition, Reason::Lockout, message),
        Refused::Exists(key) => with(
            Code::AlreadyExists,
            &message,
            of(Reason::ResourceExists, &key, &message),
        ),
        Refused::Manager { key, owner, manager } => {
            let named = [("manager", owner.as_str()), ("asked", manager.as_str())];
            let mut details = details(Reason::ManagerConflict, &named);
            set_resource(&mut details, &key, &message);
            details.set_precondition_failure(violations("MANAGER", std::slice::from_ref(&message)));
            with(Code::Aborted, &message, details)
        }
        Refused::Prune { count, limit, .. } => {
            let (count, limit) = (count.to_string(), limit.to_string());
            refuse_with(
                Code::FailedPrecondition,
                Reason::TooManyDeletes,
                message,
                &[("count", &count), ("limit", &limit)],
            )
        }
        Refused::Store(_) | Refused::Broken => {
            tracing::error!(error = message, "the store failed");
            refuse(Code::Internal, Reason::StoreFailed, message)
        }
    }
}

fn bad_fields(message: &str, fields: Vec<leeward_proto::BadField>) -> Status {
    let all = fields.len();
    let mut budget = MAX_DETAILS;
    let fit = fields.into_iter().take_while(|f| {
        let size = f.path.len() + f.reason.len() + 16;
        let fits = size <= budget;
        budget = budget.saturating_sub(size);
        fits
    });
    let violations: Vec<_> = fit.map(|f| FieldViolation::new(f.path, f.reason)).collect();
    let mut shown = cut(message, MAX_SHOWN);
    if violations.len() < all || shown.len() < message.len() {
        shown.push_str(&format!(" … ({all} bad fields in all)"));
    }
    let mut details = details(Reason::InvalidField, &[]);
    details.set_bad_request(violations);
    Status::with_error_details(Code::InvalidArgument, shown, details)
}

fn of(reason: Reason, key: &Key, message: &str) -> ErrorDetails {
    let mut details = details(reason, &[]);
    set_resource(&mut details, key, message);
    details
}

fn set_resource(details: &mut ErrorDetails, key: &Key, message: &str) {
    details.set_resource_info(key.kind.as_str(), key.name.as_str(), "", cut(message, MAX_TEXT));
}

fn violations(kind: &str, of: &[String]) -> Vec<PreconditionViolation> {
    let violation = |text: &String| PreconditionViolation::new(kind, cut(text, MAX_TEXT), "");
    of.iter().take(MAX_VIOLATIONS).map(violation).collect()
}

fn quota(reason: Reason, subject: &str, message: &str) -> Status {
    let mut details = details(reason, &[]);
    details.add_quota_failure_violation(subject, cut(message, MAX_TEXT));
    with(Code::ResourceExhausted, message, details)
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::{Kind, Name};

    fn key() -> Key {
        Key {
            kind: Kind::Zone,
            name: Name::parse("a").unwrap(),
        }
    }

    #[track_caller]
    fn check(refused: Refused, code: Code, reason: Reason) -> ErrorDetails {
        let status = status(refused);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((status.code(), info.reason.as_str()), (code, reason.as_str()));
        assert_eq!(info.domain, DOMAIN);
        // Whatever the message, both fit into the headers that clients take.
        assert!(status.message().len() < 2 * MAX_SHOWN && status.details().len() < 8000);
        details
    }

    #[test]
    fn refusals_say_what_programs_go_by() {
        let by = (0..1000)
            .map(|i| format!("Service/s{i} (spec.endpoints[0].zone)"))
            .collect();
        let details = check(
            Refused::InUse { key: key(), by },
            Code::FailedPrecondition,
            Reason::ResourceInUse,
        );
        assert_eq!(details.resource_info().unwrap().resource_type, "Zone");
        assert_eq!(
            details.precondition_failure().unwrap().violations.len(),
            MAX_VIOLATIONS
        );
        let conflict = StoreError::Conflict {
            key: key(),
            wanted: 3,
            found: 4,
        };
        let details = check(conflict.into(), Code::Aborted, Reason::RevisionConflict);
        assert_eq!(details.error_info().unwrap().metadata["found"], "4");
        assert!(details.retry_info().is_some());
        check(Refused::NotFound(key()), Code::NotFound, Reason::ResourceNotFound);
        let details = check(
            Refused::TooMany(20_000),
            Code::ResourceExhausted,
            Reason::TooManyResources,
        );
        assert!(details.has_quota_failure_violations());
        check(Refused::Broken, Code::Internal, Reason::StoreFailed);
        let bad = (0..5000).map(|i| leeward_proto::BadField {
            path: format!("resources[{i}].spec"),
            reason: "é".repeat(100),
        });
        check(
            Refused::Bad(bad.collect()),
            Code::InvalidArgument,
            Reason::InvalidField,
        );
    }

    #[test]
    fn every_reason_is_documented() {
        let docs = include_str!("../../docs/api.md");
        for reason in Reason::ALL {
            assert!(
                docs.contains(&format!("| `{}` |", reason.as_str())),
                "{}",
                reason.as_str()
            );
        }
    }
}
