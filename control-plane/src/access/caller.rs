//! Who called, and what they may do.

use super::Access;
use super::rules::{Before, Grants, Rules, Scope, Subject};
use crate::audit::Written;
use crate::policy::Refused;
use crate::refusal::{Reason, refuse, refuse_with, status};
use crate::store::Author;
use leeward_policy::model::AccessRole;
use leeward_policy::{Key, Resource};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use tonic::{Code, Request, Status};

/// Who called. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(super) access: Access,
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    /// As the audit log has it.
    pub(super) who: String,
    pub(super) subject: Subject,
    /// Where from.
    pub(super) from: String,
    /// What the client says that it is.
    pub(super) agent: String,
    /// Why, as the caller says.
    pub(super) reason: Option<String>,
    /// When the certificate or the token ends.
    pub(super) until: SystemTime,
    pub(super) method: &'static str,
    // Poison is harmless: notes are put in whole.
    pub(super) notes: Mutex<Notes>,
}

/// What a method says of itself for the audit log.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes {
    /// Nothing was to be done.
    pub(super) is_dry: bool,
    /// What was written to policy's log, which says whose call it was.
    pub(super) written: Option<Written>,
}

/// Who called a method.
///
/// # Errors
///
/// `UNAUTHENTICATED` if nobody has looked: a method that no table lists must not be served.
pub(crate) fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| {
        let why = "nobody has found out who calls";
        refuse(Code::Unauthenticated, Reason::NotAuthenticated, why)
    })
}

impl Caller {
    /// As the audit log has it: a SPIFFE id, or `oidc:` and a name.
    pub(crate) fn who(&self) -> &str {
        &self.shared.who
    }

    /// Where the call came from.
    pub(crate) fn from(&self) -> &str {
        &self.shared.from
    }

    /// What the client says that it is.
    pub(crate) fn agent(&self) -> &str {
        &self.shared.agent
    }

    /// Why, as the caller says.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.shared.reason.as_deref()
    }

    /// The method that was called.
    pub(crate) fn method(&self) -> &'static str {
        self.shared.method
    }

    /// When the certificate or the token ends.
    pub(crate) fn until(&self) -> SystemTime {
        self.shared.until
    }

    /// That nothing is to be done, so that the audit log has nothing to say of the call.
    pub(crate) fn is_dry(&self) {
        self.shared
            .notes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_dry = true;
    }

    /// What the call has written to policy's log.
    pub(crate) fn has_written(&self, written: Written) {
        self.shared
            .notes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .written = Some(written);
    }

    /// The author of what the call writes to policy's log.
    pub(crate) fn author(&self) -> Author {
        let rules = self.access.rules();
        crate::audit::author(self, self.uses_breakglass(&rules))
    }

    /// What they may do now.
    pub(crate) fn grants(&self) -> Grants {
        let rules = self.access.rules();
        self.grants_by(&rules)
    }

    /// What they may do by these rules.
    pub(crate) fn grants_by(&self, rules: &Rules) -> Grants {
        rules.grants(&self.shared.subject, self.shared.reason.is_some())
    }

    /// What they may do by these rules in a call that says why.
    pub(super) fn with_reason(&self, rules: &Rules) -> Grants {
        rules.grants(&self.shared.subject, true)
    }

    /// Whether these rules give breakglass for everything to the caller, in calls that say why.
    pub(crate) fn holds_breakglass(&self, rules: &Rules) -> bool {
        self.with_reason(rules).has(AccessRole::Breakglass, Scope::Whole)
    }

    /// Whether the call is by the role breakglass, which was given a reason.
    pub(super) fn uses_breakglass(&self, rules: &Rules) -> bool {
        let without = rules.grants(&self.shared.subject, false);
        let has = |grants: &Grants| grants.has(AccessRole::Breakglass, Scope::Some);
        self.shared.reason.is_some() && has(&self.with_reason(rules)) && !has(&without)
    }

    /// Refuses who lacks a role for something.
    pub(crate) fn require(&self, role: AccessRole, scope: Scope<'_>, what: &str) -> Result<(), Status> {
        self.check(&self.access.rules(), role, scope, &what)
    }

    fn check(
        &self,
        rules: &Rules,
        role: AccessRole,
        scope: Scope<'_>,
        what: &dyn Display,
    ) -> Result<(), Status> {
        if self.grants_by(rules).has(role, scope) {
            return Ok(());
        }
        Err(self.lacks(role, self.with_reason(rules).has(role, scope), what))
    }

    /// Refuses who may not make one of another.
    pub(crate) fn check_write(
        &self,
        rules: &Rules,
        key: &Key,
        before: Before<'_>,
        after: Option<&Resource>,
    ) -> Result<(), Status> {
        match self.grants_by(rules).lacks(before, after) {
            None => Ok(()),
            Some(role) => {
                let by_breakglass = self.with_reason(rules).lacks(before, after).is_none();
                Err(self.lacks(role, by_breakglass, &format_args!("write {key}")))
            }
        }
    }

    /// Refuses who may not be shown what would become of a resource.
    pub(crate) fn check_diff(&self, rules: &Rules, key: &Key, before: Before<'_>) -> Result<(), Status> {
        let scope = match before {
            Before::Nothing => Scope::Kind(key.kind),
            Before::Unread(kind) => Scope::Resource(kind, None),
            Before::Known(resource) => Scope::Resource(key.kind, Some(&resource.labels)),
        };
        self.check(rules, AccessRole::Reader, scope, &format_args!("read {key}"))
    }

    /// Refuses who may not see a resource. One that others may see is as if it weren't there; of a kind that they see nothing
    /// of, they are told so.
    pub(crate) fn check_read(
        &self,
        key: &Key,
        labels: Option<&BTreeMap<String, String>>,
    ) -> Result<(), Status> {
        let rules = self.access.rules();
        let of_kind = Scope::Kind(key.kind);
        self.check(&rules, AccessRole::Reader, of_kind, &format_args!("read {key}"))?;
        match labels {
            Some(labels) if !self.grants_by(&rules).sees(key.kind, labels) => {
                Err(status(Refused::NotFound(key.clone())))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// What one is told who lacks a role for something, which it may do by the role breakglass or not.
    pub(super) fn lacks(&self, role: AccessRole, by_breakglass: bool, what: &dyn Display) -> Status {
        let who = self.who();
        if by_breakglass && self.shared.reason.is_none() {
            let why = format!(
                "{who} may {what} by the role breakglass only; say why (--breakglass REASON, or the header leeward-reason)"
            );
            return refuse(Code::PermissionDenied, Reason::ReasonRequired, why);
        }
        let role = role.as_str();
        let why = format!("{who} may not {what}; it takes the role {role} for that by an AccessPolicy");
        refuse_with(
            Code::PermissionDenied,
            Reason::RoleRequired,
            why,
            &[("role", role)],
        )
    }
}
