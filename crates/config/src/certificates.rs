//! Keeps a proxy's certificate and roots good: asks for the next certificate at half life, trusts the roots that the control
//! plane says, and tells it what is in use.

use crate::address::Control;
use crate::due::Due;
use crate::live::Live;
use crate::rota::{Rota, Timing, Turn};
use leeward_identity::{Bundle, Facts, Identity, IdentityError, Issued, NewKey, NotReady, channel};
use leeward_proto::v1;
use leeward_proto::v1::identity_client::IdentityClient;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tonic::Code;

/// Keeps one identity.
#[derive(Clone, Debug)]
pub struct Keeper {
    /// The identity.
    pub identity: Arc<Identity>,
    /// The control planes. Without any the certificate is only looked at.
    pub control: Control,
    /// How long things may take.
    pub timing: Timing,
    /// Whether certificate and roots are got from the control planes. Otherwise they are somebody else's to replace.
    pub renew: bool,
}

/// What came of asking for the next certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Renewal {
    /// It is in use.
    Renewed,
    /// No control plane was reached.
    Unreachable,
    /// The control plane gives none to this proxy.
    Refused,
    /// What came can't be used, or not be written.
    Unusable,
    /// The control plane is no authority.
    Unsupported,
}

impl Renewal {
    /// All that can come of it, in order.
    pub const ALL: [Self; 5] = [
        Self::Renewed,
        Self::Unreachable,
        Self::Refused,
        Self::Unusable,
        Self::Unsupported,
    ];

    /// The word used in metrics and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Renewed => "renewed",
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::Unusable => "unusable",
            Self::Unsupported => "unsupported",
        }
    }
}

/// Pauses between tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long a control plane that is no authority is left alone.
const UNSUPPORTED_PAUSE: Duration = Duration::from_secs(300);
/// The time of day jumps, so that it is looked at this often.
const LOOK: Duration = Duration::from_secs(5);
/// How often people are told that there is no next certificate yet.
const REMIND: Duration = Duration::from_secs(60);

/// What is known between two looks.
struct Look {
    due: Due,
    /// Not to be tried before.
    pause_until: tokio::time::Instant,
    reminded: Option<tokio::time::Instant>,
    /// When it was last told that the control plane's roots are not in use.
    distrust_told: Option<tokio::time::Instant>,
}

impl Keeper {
    /// Keeps it until dropped. `tell` hears of every try.
    pub async fn keep(self, live: Live, tell: impl Fn(Renewal) + Send) {
        let timing = Timing {
            first_pause: PAUSES.0,
            max_pause: PAUSES.1,
            ..self.timing
        };
        let mut rota = Rota::new(&self.control, timing);
        let (mut trust, mut changes) = (live.trust(), self.identity.changes());
        let mut look = Look {
            due: Due::new(fastrand::f64()),
            pause_until: tokio::time::Instant::now(),
            reminded: None,
            distrust_told: None,
        };
        loop {
            changes.mark_unchanged();
            let trusted = trust.borrow_and_update().clone();
            if let Some(trusted) = trusted.as_deref().filter(|_| self.renew) {
                self.trust(trusted, &mut look).await;
            }
            let facts = self.identity.facts();
            live.say_identity(report(&facts));
            let now = wall();
            self.remind(&facts, &mut look, now);
            let due = self.due(&facts, trusted.as_deref(), &mut look, now);
            let clock = tokio::time::Instant::now();
            if let Some(due) = due
                && now >= due
                && clock >= look.pause_until
                && let Some(control) = rota.turn()
            {
                let renewal = self.renew(control).await;
                tell(renewal);
                let pause = match renewal {
                    Renewal::Renewed => {
                        look.due.renewed(now, fastrand::f64());
                        rota = Rota::new(&self.control, timing);
                        Duration::ZERO
                    }
                    Renewal::Unsupported => UNSUPPORTED_PAUSE,
                    Renewal::Unreachable | Renewal::Refused | Renewal::Unusable => {
                        rota.failed(fastrand::f64())
                    }
                };
                look.pause_until = tokio::time::Instant::now() + pause;
                continue;
            }
            let wait = due.map_or(LOOK, |due| due.duration_since(now).unwrap_or_default());
            let paused = look.pause_until.saturating_duration_since(clock);
            tokio::select! {
                changed = trust.changed() => if changed.is_err() { return },
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait.max(paused).min(LOOK)) => {}
            }
        }
    }

    /// When to ask for the next certificate; never where somebody else sees to it.
    fn due(
        &self,
        facts: &Facts,
        trusted: Option<&v1::TrustBundle>,
        look: &mut Look,
        now: SystemTime,
    ) -> Option<SystemTime> {
        if !self.renew || self.control.is_empty() {
            return None;
        }
        let wanted = trusted.map_or("", |trusted| trusted.signing_root.as_str());
        let root = facts.root.as_deref();
        Some(look.due.at(facts.validity, root, wanted, now, fastrand::f64()))
    }

    /// Trusts what the control plane says. What fails is tried again at the next look, and told once a minute.
    async fn trust(&self, trusted: &v1::TrustBundle, look: &mut Look) {
        if trusted.hash == self.identity.facts().bundle {
            look.distrust_told = None;
            return;
        }
        let Err(error) = self.take_bundle(trusted).await else {
            return;
        };
        let clock = tokio::time::Instant::now();
        if look.distrust_told.is_none_or(|at| clock - at >= REMIND) {
            look.distrust_told = Some(clock);
            tracing::warn!(
                error,
                "the control plane's trust bundle is not in use; the old one stays"
            );
        }
    }

    async fn take_bundle(&self, trusted: &v1::TrustBundle) -> Result<(), String> {
        let certs = trusted.roots.iter().map(|root| root.clone().into());
        let bundle = Bundle::new(certs).map_err(|error| chain(&error))?;
        let (hash, roots) = (bundle.hash().to_owned(), bundle.roots().len());
        if hash != trusted.hash {
            return Err(format!(
                "it says that its hash is {:?}, and it is {hash}",
                trusted.hash
            ));
        }
        let identity = Arc::clone(&self.identity);
        let installed = tokio::task::spawn_blocking(move || identity.install_bundle(&bundle)).await;
        let is_new = installed
            .map_err(|_| "the task that kept it broke down".to_owned())?
            .map_err(|error| chain(&error))?;
        if is_new {
            tracing::info!(hash, roots, "trust bundle replaced");
        }
        Ok(())
    }

    /// Asks one control plane for the next certificate, of a new key, and uses it.
    async fn renew(&self, control: Turn<'_>) -> Renewal {
        match self.ask(control).await {
            Ok(()) => {
                let not_after = leeward_identity::shown(&self.identity.not_after());
                tracing::info!(id = %self.identity.id(), not_after, "certificate renewed");
                Renewal::Renewed
            }
            Err((Renewal::Unsupported, _)) => {
                tracing::info!(%control, "the control plane issues no certificates; they are somebody else's to renew");
                Renewal::Unsupported
            }
            Err((renewal, reason)) => {
                tracing::warn!(%control, outcome = renewal.as_str(), reason, "certificate not renewed; the old one stays");
                renewal
            }
        }
    }

    async fn ask(&self, control: Turn<'_>) -> Result<(), (Renewal, String)> {
        let unusable = |error: &dyn std::error::Error| (Renewal::Unusable, chain(error));
        let key = NewKey::generate(self.identity.id()).map_err(|error| unusable(&error))?;
        let request = v1::IssueRequest {
            request: key.request().to_vec(),
        };
        let asking = async {
            let control = control
                .resolve()
                .await
                .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
            // On a connection of its own: one that is there may be older than what it shows.
            let mut client = IdentityClient::new(channel::connect_lazy(Arc::clone(&self.identity), control));
            client.issue(request).await
        };
        let answer = tokio::time::timeout(self.timing.silence, asking).await;
        let answer = match answer {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Err((outcome(&status), last(&status))),
            Err(_) => return Err((Renewal::Unreachable, "it did not answer".to_owned())),
        };
        let issued = parse(answer).map_err(|error| unusable(&error))?;
        let identity = Arc::clone(&self.identity);
        match tokio::task::spawn_blocking(move || identity.install(&key, &issued)).await {
            Ok(installed) => installed.map_err(|error| unusable(&error)),
            Err(_) => Err((Renewal::Unusable, "the task that kept it broke down".to_owned())),
        }
    }

    /// Tells people when it is late.
    fn remind(&self, facts: &Facts, look: &mut Look, now: SystemTime) {
        let ready = self.identity.ready(now);
        let is_revoked = matches!(ready, Err(NotReady::Revoked(_)));
        if now < facts.validity.worry_at() && !is_revoked {
            look.reminded = None;
            return;
        }
        let clock = tokio::time::Instant::now();
        if look.reminded.is_some_and(|at| clock - at < REMIND) {
            return;
        }
        look.reminded = Some(clock);
        let (id, not_after) = (
            self.identity.id(),
            leeward_identity::shown(&facts.validity.not_after),
        );
        match ready {
            Ok(()) => tracing::warn!(%id, not_after, "the certificate ends soon and is not renewed"),
            Err(error) => tracing::error!(
                %id,
                "{error}: other proxies and the control plane refuse it; join again with a token, or put another in its place"
            ),
        }
    }
}

/// The certificate and roots that came.
pub(crate) fn parse(answer: v1::Issued) -> Result<Issued, IdentityError> {
    let bundle = answer.bundle.unwrap_or_default();
    Issued::parse(answer.chain, bundle.roots)
}

fn report(facts: &Facts) -> v1::IdentityReport {
    v1::IdentityReport {
        bundle: facts.bundle.clone(),
        certificate: facts.certificate.clone(),
        root: facts.root.clone().unwrap_or_default(),
        not_after: Some(facts.validity.not_after.into()),
        revoked: facts.revoked.clone().unwrap_or_default(),
    }
}

pub(crate) fn outcome(status: &tonic::Status) -> Renewal {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the rest of gRPC's list says that it was refused"
    )]
    match status.code() {
        Code::Unimplemented => Renewal::Unsupported,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => Renewal::Unreachable,
        _ => Renewal::Refused,
    }
}

/// Of what went wrong on the way the last link says what it was.
pub(crate) fn last(status: &tonic::Status) -> String {
    let mut reason = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        reason = cause.to_string();
        source = cause.source();
    }
    reason
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

pub(crate) fn wall() -> SystemTime {
    #[expect(clippy::disallowed_methods, reason = "certificates live by the wall clock")]
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::due::SPREAD;
    use leeward_identity::SpiffeId;
    use leeward_identity::authority::Authority;

    /// A keeper of an identity in a directory, which goes when this is dropped.
    struct Scratch(std::path::PathBuf, Keeper);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("leeward-keeper-{name}-{}", std::process::id()));
            let authority = Authority::create(&dir.join("ca"), "td").unwrap();
            let id = SpiffeId::proxy("td", "a", "a1").unwrap();
            authority
                .issue(&id, Duration::from_secs(3600), &dir.join("id"))
                .unwrap();
            let keeper = Keeper {
                identity: Identity::load(dir.join("id")).unwrap(),
                control: [([127, 0, 0, 1], 1).into()].as_slice().into(),
                timing: Timing::DEFAULT,
                renew: true,
            };
            Self(dir, keeper)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn look() -> Look {
        Look {
            due: Due::new(0.5),
            pause_until: tokio::time::Instant::now(),
            reminded: None,
            distrust_told: None,
        }
    }

    #[tokio::test]
    async fn another_root_is_asked_for_soon_and_once() {
        let scratch = Scratch::new("hurry");
        let (keeper, facts, now) = (&scratch.1, scratch.1.identity.facts(), wall());
        let half = facts.validity.renew_at(0.5);
        let mut look = look();
        assert_eq!(keeper.due(&facts, None, &mut look, now), Some(half));
        let mut trusted = v1::TrustBundle {
            signing_root: facts.root.clone().unwrap(),
            ..v1::TrustBundle::default()
        };
        assert_eq!(keeper.due(&facts, Some(&trusted), &mut look, now), Some(half));
        trusted.signing_root = "another".into();
        let soon = keeper.due(&facts, Some(&trusted), &mut look, now).unwrap();
        assert!(soon <= now + SPREAD && soon < half);
        let again = keeper.due(&facts, Some(&trusted), &mut look, now + LOOK);
        assert_eq!(again, Some(soon), "its turn stays");
        look.due.renewed(soon, 0.5);
        assert_eq!(keeper.due(&facts, Some(&trusted), &mut look, now), Some(half));
        trusted.signing_root = "a third".into();
        assert!(keeper.due(&facts, Some(&trusted), &mut look, now).unwrap() < half);
        let others = Keeper {
            renew: false,
            ..keeper.clone()
        };
        assert_eq!(others.due(&facts, Some(&trusted), &mut look, now), None);
    }

    #[tokio::test]
    async fn roots_that_make_no_sense_are_not_trusted() {
        let scratch = Scratch::new("bundle");
        let (keeper, mut look) = (&scratch.1, look());
        let before = keeper.identity.bundle();
        let root = before.roots()[0].cert.to_vec();
        let other = Authority::create(&scratch.0.join("other"), "td").unwrap();
        let both = before.with(other.roots()).unwrap();
        let roots = |bundle: &Bundle| bundle.roots().iter().map(|root| root.cert.to_vec()).collect();
        for (roots, hash) in [
            (vec![], "nothing".to_owned()),
            (vec![b"no certificate".to_vec()], "x".to_owned()),
            (vec![root.clone(); 2], "another hash".to_owned()),
        ] {
            let bundle = v1::TrustBundle {
                roots,
                hash,
                ..v1::TrustBundle::default()
            };
            keeper.trust(&bundle, &mut look).await;
            assert_eq!(keeper.identity.bundle(), before);
            assert!(look.distrust_told.is_some());
        }
        let good = v1::TrustBundle {
            roots: roots(&both),
            hash: both.hash().to_owned(),
            ..v1::TrustBundle::default()
        };
        keeper.trust(&good, &mut look).await;
        assert_eq!(keeper.identity.bundle(), both);
        // And after a restart.
        assert_eq!(Identity::load(scratch.0.join("id")).unwrap().bundle(), both);
    }
}
