//! Who may do what with the API: who asks, what they hold, and the door that every call goes through.
//!
//! [`Gate`] stands before every service. It finds out who calls, looks the method up in the table of [`methods`], refuses who
//! lacks what it takes, and hands the [`Caller`] on to the method, which looks at the resources that the call is about. What
//! was refused, and what was done that is no read, goes to the audit log from here.

mod caller;
mod gate;
mod methods;
mod oidc;
mod rules;

pub(crate) use caller::{Caller, caller};
pub(crate) use gate::GateLayer;
pub(crate) use methods::{Need, need};
pub(crate) use oidc::Oidc;
pub use oidc::OidcSettings;
pub(crate) use rules::{Before, Grants, Rules, Scope, is_operation};

use crate::audit::Audit;
use crate::policy::{Policy, wire};
use leeward_identity::Identity;
use leeward_policy::{Key, Spec};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::task::TaskTracker;

/// What calls are let in by. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    shared: Arc<Shared>,
}

/// Resources at revisions.
type Revisions = Vec<(Key, u64)>;

#[derive(Debug)]
struct Shared {
    policy: Policy,
    /// By whose list of revocations peers are refused, also on connections that are open already.
    identity: Arc<Identity>,
    oidc: Option<Oidc>,
    audit: Audit,
    /// The rules that AccessPolicies at these revisions make; made anew when there are others.
    // Poison is harmless: it is replaced whole.
    rules: Mutex<Option<(Revisions, Arc<Rules>)>>,
    counts: Counts,
    /// Calls that go on without whoever made them.
    calls: TaskTracker,
}

/// What is counted for operators.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Calls by the role breakglass.
    pub(crate) breakglass: AtomicU64,
    /// Calls that were refused for who called.
    pub(crate) refused: AtomicU64,
}

impl Access {
    pub(crate) fn new(policy: Policy, identity: Arc<Identity>, oidc: Option<Oidc>, audit: Audit) -> Self {
        Self {
            shared: Arc::new(Shared {
                policy,
                identity,
                oidc,
                audit,
                rules: Mutex::default(),
                counts: Counts::default(),
                calls: TaskTracker::new(),
            }),
        }
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Waits for calls that are under way, once no others come.
    pub(crate) async fn ended(&self) {
        self.shared.calls.close();
        self.shared.calls.wait().await;
    }

    pub(crate) fn audit(&self) -> &Audit {
        &self.shared.audit
    }

    /// Whether anybody's tokens are taken.
    pub(crate) fn takes_tokens(&self) -> bool {
        self.shared.oidc.is_some()
    }

    /// The rules of now.
    pub(crate) fn rules(&self) -> Arc<Rules> {
        let stored = self.shared.policy.access_policies();
        let of: Vec<_> = stored
            .iter()
            .map(|stored| (stored.key.clone(), stored.revision))
            .collect();
        let mut known = self.shared.rules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, rules)) = known.as_ref().filter(|(known, _)| *known == of) {
            return Arc::clone(rules);
        }
        let parsed: Vec<_> = stored
            .iter()
            .map(|stored| leeward_proto::parse(&wire(stored)).ok())
            .collect();
        let policies = parsed
            .iter()
            .map(|parsed| match parsed.as_ref().map(|resource| &resource.spec) {
                Some(Spec::AccessPolicy(policy)) => Some(policy),
                _ => None,
            });
        let rules = Arc::new(Rules::new(policies));
        *known = Some((of, Arc::clone(&rules)));
        rules
    }

    /// Says at the start how open the door is.
    pub(crate) fn tell(&self) {
        if self.rules().is_open() {
            tracing::warn!(
                "there is no AccessPolicy: everybody with a user's certificate of the mesh may do everything"
            );
        }
    }

    fn count_refused(&self) {
        self.shared.counts.refused.fetch_add(1, Ordering::Relaxed);
    }
}
