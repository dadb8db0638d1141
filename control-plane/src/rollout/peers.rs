//! The other control planes: each knows its own proxies only, and tells the others what they need.

use crate::store::{Member, Store};
use leeward_identity::{Identity, PeerInfo, Role, channel};
use leeward_proto::v1;
use leeward_proto::v1::peer_service_client::PeerServiceClient;
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// How long one is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest answer, in bytes: ten thousand proxies with what they refuse, or two thousand routes.
const MAX_ANSWER: usize = 32 << 20;

type Client = PeerServiceClient<Channel>;
/// A control plane's name and address.
type Way = (String, String);

/// The way to the others. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    store: Store,
    identity: Arc<Identity>,
    // Poison is harmless: a channel that is not kept is made anew.
    channels: Arc<Mutex<HashMap<Way, Channel>>>,
}

/// What others said, and who said nothing, with the reason.
#[derive(Debug)]
pub(crate) struct Heard<T> {
    pub(crate) answers: Vec<T>,
    pub(crate) missing: Vec<String>,
}

impl Peers {
    pub(crate) fn new(store: Store, identity: Arc<Identity>) -> Self {
        Self {
            store,
            identity,
            channels: Arc::default(),
        }
    }

    pub(crate) async fn standing(&self, request: &v1::GetStandingRequest) -> Heard<v1::Standing> {
        self.ask(|mut client: Client| {
            let request = request.clone();
            async move { client.get_standing(request).await }
        })
        .await
    }

    pub(crate) async fn proxies(&self) -> Heard<v1::ListOwnProxiesResponse> {
        self.ask(
            |mut client: Client| async move { client.list_own_proxies(v1::ListOwnProxiesRequest {}).await },
        )
        .await
    }

    /// Asks all others at once.
    async fn ask<T, F>(&self, call: impl Fn(Client) -> F) -> Heard<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        let mut heard = Heard {
            answers: Vec::new(),
            missing: Vec::new(),
        };
        if !self.store.kv().is_shared() {
            return heard;
        }
        let members = match tokio::time::timeout(PATIENCE, self.store.members()).await {
            Ok(Ok(members)) => members,
            Ok(Err(error)) => {
                heard.missing.push(format!("the list of control planes: {error}"));
                return heard;
            }
            Err(_) => {
                let missing = format!("the list of control planes: no answer within {PATIENCE:?}");
                heard.missing.push(missing);
                return heard;
            }
        };
        let others: Vec<Member> = members
            .into_iter()
            .filter(|member| member.id != self.store.member())
            .collect();
        self.keep(&others);
        let mut asked = JoinSet::new();
        for member in others {
            match self.channel(&member).await {
                Ok(channel) => {
                    let client = PeerServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
                    let answer = call(client);
                    asked.spawn(async move { (member.api, tokio::time::timeout(PATIENCE, answer).await) });
                }
                Err(why) => heard.missing.push(format!("{}: {why}", member.api)),
            }
        }
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok((_, Ok(Ok(answer)))) => heard.answers.push(answer.into_inner()),
                Ok((api, Ok(Err(status)))) => heard.missing.push(format!("{api}: {}", status.message())),
                Ok((api, Err(_))) => heard
                    .missing
                    .push(format!("{api}: no answer within {PATIENCE:?}")),
                Err(_) => heard
                    .missing
                    .push("a control plane: the question broke down".to_owned()),
            }
        }
        heard.missing.sort();
        heard
    }

    /// Forgets the ways to those that are gone.
    fn keep(&self, members: &[Member]) {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|way, _| members.iter().any(|member| way_to(member) == *way));
    }

    fn known(&self, way: &Way) -> Option<Channel> {
        let channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.get(way).cloned()
    }

    async fn channel(&self, member: &Member) -> Result<Channel, String> {
        if let Some(channel) = self.known(&way_to(member)) {
            return Ok(channel);
        }
        let found = tokio::time::timeout(PATIENCE, tokio::net::lookup_host(&member.api)).await;
        let mut found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("its name was not found within {PATIENCE:?}")),
        };
        let address = found.next().ok_or_else(|| "its name has no address".to_owned())?;
        let channel = channel::connect_lazy(Arc::clone(&self.identity), address);
        let mut known = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known.entry(way_to(member)).or_insert(channel).clone())
    }
}

fn way_to(member: &Member) -> Way {
    (member.id.clone(), member.api.clone())
}

/// Lets control planes in, and nobody else.
pub(super) fn authorize<T>(request: &Request<T>) -> Result<(), Status> {
    let peer = request.extensions().get::<PeerInfo>();
    let peer = peer.ok_or_else(|| Status::unauthenticated("no peer certificate"))?;
    if crate::policy::wall() > peer.not_after {
        return Err(Status::unauthenticated(format!(
            "the certificate of {} has ended; connect again with another",
            peer.id
        )));
    }
    match peer.id.role() {
        Role::Control => Ok(()),
        Role::User { .. } | Role::Proxy { .. } | Role::Workload { .. } | Role::Other => {
            Err(Status::permission_denied(format!(
                "{} is not a control plane; this is for control planes",
                peer.id
            )))
        }
    }
}
