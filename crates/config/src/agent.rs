//! Certificates from an agent on the node, by the SPIFFE Workload API: what it says replaces what it said before.

use crate::certificates::{chain, last};
use leeward_identity::{Given, Identity, Role, SpiffeId, channel};
use leeward_proto::spiffe;
use leeward_proto::spiffe::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request};

/// Which agent, and which of its identities.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Its Unix socket.
    pub socket: PathBuf,
    /// The proxy's zone.
    pub zone: String,
    /// The proxy's name.
    pub name: String,
    /// How long the first answer may take.
    pub limit: Duration,
}

/// Why there is no identity.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AgentError {
    /// The agent gave none in time.
    #[error("the agent at {socket} gave no certificate within {limit:?}: {reason}")]
    Late {
        /// Its socket.
        socket: PathBuf,
        /// The time that there was.
        limit: Duration,
        /// What went wrong last.
        reason: String,
    },
}

/// Pauses between tries, which double, with jitter.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Largest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// What is known from the agent so far.
#[derive(Clone, Debug)]
enum Known {
    /// Nothing yet, and why.
    Nothing(String),
    /// Who this is.
    Identity(Arc<Identity>),
}

/// The identity that an agent gives to this proxy. It is kept up to date from then on, for as long as the process lives.
///
/// # Errors
///
/// If the agent gives none in time.
pub async fn from_agent(agent: Agent) -> Result<Arc<Identity>, AgentError> {
    let (said, mut known) = watch::channel(Known::Nothing("it did not answer".to_owned()));
    let (socket, limit) = (agent.socket.clone(), agent.limit);
    // It ends with the process, or when nobody has come to know of an identity.
    tokio::spawn(follow(agent, said));
    let first = known.wait_for(|known| matches!(known, Known::Identity(_)));
    let in_time = tokio::time::timeout(limit, first).await;
    if let Ok(Ok(known)) = &in_time
        && let Known::Identity(identity) = &**known
    {
        return Ok(Arc::clone(identity));
    }
    drop(in_time);
    let reason = match &*known.borrow() {
        Known::Nothing(reason) => reason.clone(),
        Known::Identity(identity) => format!("{} came too late", identity.id()),
    };
    Err(AgentError::Late {
        socket,
        limit,
        reason,
    })
}

async fn follow(agent: Agent, said: watch::Sender<Known>) {
    let mut pause = PAUSES.0;
    loop {
        let began = tokio::time::Instant::now();
        let reason = session(&agent, &said).await;
        tracing::warn!(socket = %agent.socket.display(), reason, "no stream from the agent; the identity stays as it is");
        let is_known = matches!(&*said.borrow(), Known::Identity(_));
        if !is_known {
            said.send_replace(Known::Nothing(reason));
            if said.is_closed() {
                return;
            }
        }
        // What lasted was good.
        if began.elapsed() > PAUSES.1 {
            pause = PAUSES.0;
        }
        tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Takes what an agent says until it says no more, and returns why that is.
async fn session(agent: &Agent, said: &watch::Sender<Known>) -> String {
    let mut client = SpiffeWorkloadApiClient::new(channel::agent_lazy(agent.socket.clone()))
        .max_decoding_message_size(MAX_ANSWER);
    let mut request = Request::new(spiffe::X509svidRequest {});
    // What a page in a browser can't send (SPIFFE Workload Endpoint standard).
    request
        .metadata_mut()
        .insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let mut stream = match client.fetch_x509svid(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) if status.code() == Code::PermissionDenied => {
            return format!("it has no identity for this process: {}", last(&status));
        }
        Err(status) => return last(&status),
    };
    loop {
        let answer = match stream.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => return "it ended the stream".to_owned(),
            Err(status) => return last(&status),
        };
        let identity = match &*said.borrow() {
            Known::Identity(identity) => Some(Arc::clone(identity)),
            Known::Nothing(_) => None,
        };
        match take(agent, &answer, identity) {
            Ok(Some(identity)) => drop(said.send_replace(Known::Identity(identity))),
            Ok(None) => {}
            Err(reason) => {
                tracing::warn!(socket = %agent.socket.display(), reason, "what the agent says can't be used");
                said.send_if_modified(|known| match known {
                    Known::Nothing(why) => {
                        *why = reason;
                        true
                    }
                    Known::Identity(_) => false,
                });
            }
        }
    }
}

/// A new identity, or `None` if the one that was there has what was said now.
fn take(
    agent: &Agent,
    answer: &spiffe::X509svidResponse,
    known: Option<Arc<Identity>>,
) -> Result<Option<Arc<Identity>>, String> {
    let is_ours = |svid: &&spiffe::X509svid| {
        SpiffeId::parse(&svid.spiffe_id).is_ok_and(|id| match id.role() {
            Role::Proxy { zone, name } => zone == agent.zone && name == agent.name,
            Role::Control | Role::User { .. } | Role::Workload { .. } | Role::Other => false,
        })
    };
    let svid = answer.svids.iter().find(is_ours).ok_or_else(|| {
        let got: Vec<&str> = answer
            .svids
            .iter()
            .map(|svid| svid.spiffe_id.as_str())
            .take(8)
            .collect();
        format!(
            "it gives {got:?}; want an id with the path /zone/{}/proxy/{}",
            agent.zone, agent.name
        )
    })?;
    let given = Given::parse(&agent.socket, &svid.x509_svid, &svid.x509_svid_key, &svid.bundle)
        .map_err(|error| chain(&error))?;
    match known {
        Some(identity) => {
            if identity.replace(given).map_err(|error| chain(&error))? {
                let not_after = leeward_identity::shown(&identity.not_after());
                tracing::info!(id = %identity.id(), not_after, "certificate renewed by the agent");
            }
            Ok(None)
        }
        None => Identity::given(&agent.socket, given)
            .map(Some)
            .map_err(|error| chain(&error)),
    }
}
