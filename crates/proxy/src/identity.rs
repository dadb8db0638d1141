//! Who this proxy is: where its certificate comes from at the start, and who keeps it good.

use crate::settings::{IdentityAt, Settings, Source};
use anyhow::Context;
use leeward_config::{Agent, Control, Join, Keeper, Live, Timing, from_agent, join, recall_revoked};
use leeward_identity::{Bundle, Identity, IdentityError, JoinToken, NotReady, SpiffeId, watch};
use leeward_telemetry::catalogue::{IDENTITY_EXPIRY, IDENTITY_REVOCATIONS, IDENTITY_REVOKED};
use leeward_telemetry::{Hub, Reading, Recorder};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How often the identity's files are looked at.
const WATCH: Duration = Duration::from_secs(5);

/// The least pause between tries to join of a proxy that goes on without.
const AGAIN: Duration = Duration::from_secs(5);
/// How much longer it may be: proxies that were started together spread.
const AGAIN_SPREAD: Duration = Duration::from_secs(25);

/// The identity that the settings name, if they name one: nothing is served before it is there, so that nobody is told
/// of a missing right where a certificate is missing.
pub(crate) async fn open(settings: &Settings, source: &Source) -> anyhow::Result<Option<Arc<Identity>>> {
    match &settings.identity {
        None => Ok(None),
        Some(IdentityAt::Dir(dir)) => from_files(settings, source.control(), dir).await.map(Some),
        Some(IdentityAt::Socket(socket)) => {
            let agent = Agent {
                socket: socket.clone(),
                zone: settings.zone.to_string(),
                name: settings.name.to_string(),
                limit: settings.identity_timeout,
            };
            let identity = from_agent(agent).await.context("identity_not_ready")?;
            recall(settings, &identity);
            Ok(Some(identity))
        }
    }
}

/// Refuses from the start on whose certificates were revoked when this proxy last heard of it, its own among them.
fn recall(settings: &Settings, identity: &Identity) {
    if let Some(state) = settings.state() {
        recall_revoked(identity, &state);
    }
}

async fn from_files(settings: &Settings, control: Control, dir: &Path) -> anyhow::Result<Arc<Identity>> {
    let load = || Identity::load(dir).inspect(|identity| recall(settings, identity));
    let Some(token) = token(settings)? else {
        return no_token(load());
    };
    let ended = match load() {
        Ok(identity) if identity.ready_now().is_ok() => {
            tracing::info!(id = %identity.id(), "there is a certificate that is good; the join token is not used");
            return Ok(identity);
        }
        // What is there and can't be used is for people to look at, not to be overwritten.
        Err(error) if !is_missing(&error) => return Err(error.into()),
        Ok(identity) => Some(identity),
        Err(_) => None,
    };
    let bundle = match &settings.trust_bundle {
        None => None,
        Some(file) => {
            let text = std::fs::read(file).with_context(|| format!("can't read {}", file.display()))?;
            Some(Bundle::from_pem(&text).with_context(|| format!("{} can't be used", file.display()))?)
        }
    };
    let id = SpiffeId::proxy(token.domain(), settings.zone.as_str(), settings.name.as_str())?;
    let joining = Join {
        id: id.clone(),
        token,
        bundle,
        control,
        dir: dir.to_owned(),
        timing: Timing::DEFAULT,
        limit: settings.identity_timeout,
    };
    match (join(joining.clone()).await, ended) {
        (Ok(()), _) => {}
        // It has been a part of the mesh: what needs no certificate goes on, by what is known.
        (Err(error), Some(ended)) => {
            let is_final = error.is_final();
            let error = anyhow::Error::from(error);
            let how = match ended.ready_now() {
                Err(NotReady::Revoked(_)) => "was revoked",
                Ok(()) | Err(NotReady::Ended(_) | NotReady::Early(_)) => "has ended",
            };
            tracing::error!("identity_not_ready: {error:#}; going on with a certificate that {how}");
            if !is_final {
                tokio::spawn(join_later(joining, Arc::clone(&ended)));
            }
            return Ok(ended);
        }
        (Err(error), None) => return Err(error).context("identity_not_ready"),
    }
    tracing::info!(%id, "joined");
    Ok(load()?)
}

/// Joins once a control plane answers; whoever watches the files finds what came. Ends when there is a certificate that is
/// good, or when it is refused for good.
async fn join_later(joining: Join, identity: Arc<Identity>) {
    loop {
        tokio::time::sleep(AGAIN + AGAIN_SPREAD.mul_f64(fastrand::f64())).await;
        if identity.ready_now().is_ok() {
            // Somebody has put another in its place.
            return;
        }
        let Err(error) = join(joining.clone()).await else {
            tracing::info!(id = %joining.id, "joined");
            return;
        };
        let is_final = error.is_final();
        let error = anyhow::Error::from(error);
        if is_final {
            tracing::error!("identity_not_ready: {error:#}; it is not tried again before the next start");
            return;
        }
        tracing::warn!("identity_not_ready: {error:#}; it is tried again");
    }
}

/// Without a certificate that is good there is nothing to begin with but the hope that somebody brings one.
fn no_token(loaded: Result<Arc<Identity>, IdentityError>) -> anyhow::Result<Arc<Identity>> {
    let identity = loaded?;
    if let Err(error) = identity.ready_now() {
        tracing::error!("identity_not_ready: {error}; join with a token, or put another in its place");
    }
    Ok(identity)
}

fn token(settings: &Settings) -> anyhow::Result<Option<JoinToken>> {
    match &settings.join_token_file {
        None => Ok(settings.join_token.clone()),
        Some(file) => {
            let text =
                std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
            let token = text.parse().with_context(|| format!("in {}", file.display()))?;
            Ok(Some(token))
        }
    }
}

fn is_missing(error: &IdentityError) -> bool {
    matches!(error, IdentityError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

/// Keeps it good from now on.
pub(crate) fn keep(
    settings: &Settings,
    source: &Source,
    identity: &Arc<Identity>,
    live: &Live,
    hub: &Arc<Hub>,
) {
    let is_dir = matches!(settings.identity, Some(IdentityAt::Dir(_)));
    if is_dir {
        tokio::spawn(watch(Arc::clone(identity), WATCH));
    }
    let keeper = Keeper {
        identity: Arc::clone(identity),
        control: source.control(),
        timing: Timing::DEFAULT,
        renew: is_dir && !settings.no_renew,
    };
    let recorder = Recorder::new(hub);
    let live = live.clone();
    tokio::spawn(keeper.keep(live, move |renewal| recorder.identity_renewed(renewal.as_str())));
}

/// Gauges and counts, as of now.
#[expect(clippy::cast_precision_loss, reason = "metrics' values; exact to 2^53")]
pub(crate) fn readings(identity: Option<&Identity>) -> Vec<Reading> {
    let Some(identity) = identity else {
        return Vec::new();
    };
    let reading = |metric, labels, value| Reading {
        metric,
        labels,
        value,
    };
    let counts = identity.revocation_counts();
    let left = identity.facts().validity.left(wall());
    vec![
        reading(IDENTITY_EXPIRY, Vec::new(), left.as_secs_f64()),
        reading(IDENTITY_REVOCATIONS, Vec::new(), counts.listed as f64),
        reading(IDENTITY_REVOKED, vec!["refused".into()], counts.refused as f64),
        reading(IDENTITY_REVOKED, vec!["closed".into()], counts.cut as f64),
    ]
}

/// What is known of it, for people.
pub(crate) fn report(identity: Option<&Identity>) -> serde_json::Value {
    let Some(identity) = identity else {
        return serde_json::Value::Null;
    };
    let facts = identity.facts();
    serde_json::json!({
        "id": identity.id().as_str(),
        "not_after": leeward_identity::shown(&facts.validity.not_after),
        "seconds_left": facts.validity.left(wall()).as_secs(),
        "certificate": facts.certificate,
        "bundle": facts.bundle,
        "root": facts.root,
        "revocations": identity.revocation_counts().listed,
        "revoked": identity
            .refuses(identity.id(), facts.validity.not_before)
            .map(|since| leeward_identity::shown(&since)),
    })
}

pub(crate) fn wall() -> SystemTime {
    #[expect(clippy::disallowed_methods, reason = "certificates live by the wall clock")]
    SystemTime::now()
}
