//! Asks control planes for the certificates that are wanted, each with a new key.

use super::Shared;
use super::stock::Failed;
use crate::certificates::{Renewal, chain, last, outcome, parse, wall};
use crate::rota::{Rota, Timing, Turn};
use leeward_identity::{NewKey, Svid, channel};
use leeward_policy::Name;
use leeward_proto::v1;
use leeward_proto::v1::identity_client::IdentityClient;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::Channel;

/// Pauses between tries when no control plane does what is asked.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// How long one may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The time of day jumps, so that it is looked at this often.
const LOOK: Duration = Duration::from_secs(5);

impl Shared {
    /// Keeps what is wanted good, until dropped.
    pub(super) async fn keep(&self) {
        let timing = Timing {
            first_pause: PAUSES.0,
            max_pause: PAUSES.1,
            ..self.timing
        };
        let mut rota = Rota::new(&self.control, timing);
        let (mut trust, mut policy) = (self.live.trust(), self.live.watch());
        let mut roots = self.identity.changes();
        let mut pause_until = Instant::now();
        loop {
            policy.mark_unchanged();
            roots.mark_unchanged();
            let signs = trust.borrow_and_update().clone();
            let signs = signs
                .as_deref()
                .map_or("", |trusted| trusted.signing_root.as_str());
            let now = wall();
            {
                let (snapshot, bundle) = (self.live.snapshot().load(), self.identity.bundle());
                let workloads = snapshot.workloads();
                let is_trusted = |root: &str| bundle.has(root);
                self.stock.tidy(|name| workloads.has(name), is_trusted, now);
            }
            let clock = Instant::now();
            let (due, wait) = self.stock.due(signs, now, clock, fastrand::f64);
            let paused = pause_until.saturating_duration_since(clock);
            if !due.is_empty()
                && paused.is_zero()
                && let Some(turn) = rota.turn()
            {
                let pause = match self.ask_for_all(turn, &due).await {
                    Ok(()) => {
                        rota = Rota::new(&self.control, timing);
                        Duration::ZERO
                    }
                    Err(_) => rota.failed(fastrand::f64()),
                };
                pause_until = Instant::now() + pause;
                continue;
            }
            let wait = if due.is_empty() {
                wait.unwrap_or(LOOK)
            } else {
                paused.max(PAUSES.0)
            };
            tokio::select! {
                () = self.stock.wanted.notified() => {}
                changed = trust.changed() => if changed.is_err() { return },
                changed = policy.changed() => if changed.is_err() { return },
                changed = roots.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait.min(LOOK)) => {}
            }
        }
    }

    /// Asks one control plane for each, on one connection, which is new: an older one may be older than what it shows. An error
    /// is one that asking for the others would come to as well.
    async fn ask_for_all(&self, turn: Turn<'_>, due: &[Name]) -> Result<(), Renewal> {
        let mut client = match turn.resolve().await {
            Ok(control) => Ok(IdentityClient::new(channel::connect_lazy(
                self.identity.clone(),
                control,
            ))),
            Err(error) => Err(error.to_string()),
        };
        let mut due = due.iter();
        while let Some(name) = due.next() {
            let asked = wall();
            let came = match &mut client {
                Ok(client) => self.ask(client, name).await,
                Err(reason) => Err(Failed {
                    renewal: Renewal::Unreachable,
                    reason: reason.clone(),
                }),
            };
            let failed = match came {
                Ok(svid) => {
                    let not_after = leeward_identity::shown(&svid.validity().not_after);
                    tracing::info!(id = %svid.id(), not_after, "certificate of a workload issued");
                    self.counts.asked(Renewal::Renewed);
                    self.stock.issued(name, svid, asked, fastrand::f64());
                    continue;
                }
                Err(failed) => failed,
            };
            let (renewal, reason) = (failed.renewal, &failed.reason);
            tracing::warn!(workload = %name, control = %turn, outcome = renewal.as_str(), reason, "no certificate for a workload");
            self.counts.asked(renewal);
            let clock = Instant::now();
            self.stock.failed(name, failed.clone(), clock, fastrand::f64());
            match renewal {
                Renewal::Unreachable | Renewal::Unsupported => {
                    for name in due {
                        self.stock.failed(name, failed.clone(), clock, fastrand::f64());
                    }
                    return Err(renewal);
                }
                Renewal::Renewed | Renewal::Refused | Renewal::Unusable => {}
            }
        }
        Ok(())
    }

    async fn ask(&self, client: &mut IdentityClient<Channel>, name: &Name) -> Result<Svid, Failed> {
        let unusable = |reason: String| Failed {
            renewal: Renewal::Unusable,
            reason,
        };
        let id = self.id(name).map_err(|error| unusable(error.to_string()))?;
        let key = NewKey::generate(&id).map_err(|error| unusable(chain(&error)))?;
        let request = v1::IssueWorkloadRequest {
            workload: name.to_string(),
            request: key.request().to_vec(),
        };
        let answer = match tokio::time::timeout(ANSWER, client.issue_workload(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Err(told(&status)),
            Err(_) => {
                return Err(Failed {
                    renewal: Renewal::Unreachable,
                    reason: format!("it did not answer within {ANSWER:?}"),
                });
            }
        };
        let issued = parse(answer).map_err(|error| unusable(chain(&error)))?;
        Svid::new(&id, &key, &issued, &self.identity.bundle()).map_err(|error| unusable(chain(&error)))
    }
}

fn told(status: &Status) -> Failed {
    let renewal = outcome(status);
    let reason = match renewal {
        Renewal::Unsupported => {
            "it issues no certificates for workloads: it has no authority (--ca), or is older than this proxy"
                .to_owned()
        }
        Renewal::Renewed | Renewal::Unreachable | Renewal::Refused | Renewal::Unusable => last(status),
    };
    Failed { renewal, reason }
}
