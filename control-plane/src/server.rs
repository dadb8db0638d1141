//! Everything together: listeners, services, an orderly end.

use crate::access::{Access, GateLayer, Oidc, OidcSettings};
use crate::admin::About;
use crate::api::Api;
use crate::audit::{self, Audit};
use crate::backup::{self, Backups};
use crate::ca::{Ca, Files, Issuer, JoinDesk};
use crate::degradation::{Degradation, Levels};
use crate::explain::Explain;
use crate::http::{JsonLayer, document};
use crate::images::Images;
use crate::modules::Modules;
use crate::policy::Policy;
use crate::proxies::Proxies;
use crate::push::{Push, Timing};
use crate::rollout::{Peer, Rollouts, Service};
use leeward_identity::MAX_REQUEST;
use leeward_identity::tls::{Guest, Incoming, Others, Stranger};
use leeward_identity::{Identity, tls};
use leeward_proto::v1::audit_service_server::AuditServiceServer;
use leeward_proto::v1::backup_service_server::BackupServiceServer;
use leeward_proto::v1::degradation_service_server::DegradationServiceServer;
use leeward_proto::v1::explain_service_server::ExplainServiceServer;
use leeward_proto::v1::identity_server::IdentityServer;
use leeward_proto::v1::peer_service_server::PeerServiceServer;
use leeward_proto::v1::plugin_service_server::PluginServiceServer;
use leeward_proto::v1::policy_service_server::PolicyServiceServer;
use leeward_proto::v1::rollout_service_server::RolloutServiceServer;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport;
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer};

/// What a control plane serves with.
#[derive(Debug)]
pub struct Server {
    /// Where it listens: mutual TLS, gRPC and HTTP.
    pub listener: TcpListener,
    /// Where it answers probes, if anywhere.
    pub admin: Option<TcpListener>,
    /// Who it is.
    pub identity: Arc<Identity>,
    /// The authority, where it is one; [`Files::identity`] gives who it is.
    pub ca: Option<Files>,
    /// What it serves.
    pub policy: Policy,
    /// Whose tokens are taken of users, if any's.
    pub oidc: Option<OidcSettings>,
    /// A file as Docker has it, with the passwords of OCI registries, if there is one.
    pub registry_auth: Option<PathBuf>,
    /// Where its backups go.
    pub backups: Backups,
    /// How long things may take.
    pub timing: Timing,
}

/// Largest message of the API, in bytes.
const MAX_MESSAGE: usize = 16 << 20;
/// Largest message of a module that comes in, in bytes: a piece of 64 KiB.
const MAX_PIECE: usize = 128 << 10;
/// Largest message about certificates that comes in, in bytes.
const MAX_IDENTITY: usize = MAX_REQUEST + (4 << 10);
/// Longest connection of one that joins, which takes one call.
const JOINING: Duration = Duration::from_secs(30);
/// Calls at once on it.
const JOIN_CALLS: usize = 2;
/// Calls at once on a connection of one who shows tokens.
const GUEST_CALLS: u32 = 32;
/// How long such a connection lasts: watches begin anew then, from where they were.
const GUEST_AGE: Duration = Duration::from_secs(3600);
/// How often proxies that are long gone are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(60);
/// Pause between two tries to read where rollouts are.
const AGAIN: Duration = Duration::from_secs(1);
/// How long calls under way may take to end once it is stopped.
const GRACE: Duration = Duration::from_secs(5);

/// Serves until `stop` is cancelled; then streams end, calls under way finish, and it returns.
///
/// # Errors
///
/// If the transport fails.
pub async fn serve(server: Server, stop: CancellationToken) -> Result<(), transport::Error> {
    let Server {
        listener,
        admin,
        identity,
        ca,
        policy,
        oidc,
        registry_auth,
        backups,
        timing,
    } = server;
    let audit = Audit::new(policy.store().clone());
    let access = Access::new(
        policy.clone(),
        Arc::clone(&identity),
        oidc.map(Oidc::new),
        audit.clone(),
    );
    access.tell();
    let proxies = Arc::new(Proxies::default());
    let Some(rollouts) = Box::pin(open_rollouts(&policy, &proxies, &identity, &stop)).await else {
        return Ok(());
    };
    tokio::spawn(rollouts.clone().keep_course(stop.clone()));
    tokio::spawn(rollouts.clone().run(stop.clone()));
    let ca = ca.map(|files| Ca::new(files, policy.clone(), Arc::clone(&identity)));
    if let Some(ca) = &ca
        && !ca.open_revocations(&stop).await
    {
        return Ok(());
    }
    if let Some(admin) = admin {
        // Its owner is `stop`.
        let about = About {
            policy: policy.clone(),
            proxies: Arc::clone(&proxies),
            rollouts: rollouts.clone(),
            ca: ca.clone(),
            access: access.clone(),
            backups: backups.clone(),
        };
        tokio::spawn(crate::admin::serve(admin, about, stop.clone()));
    }
    let api = Api::new(
        policy.clone(),
        Arc::clone(&proxies),
        rollouts.clone(),
        stop.clone(),
    );
    let api = PolicyServiceServer::new(api)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    tokio::spawn(forget(Arc::clone(&proxies), stop.clone()));
    let degradation = Degradation::new(policy.clone(), Arc::clone(&proxies));
    tokio::spawn(degradation.clone().run(stop.clone()));
    let levels = DegradationServiceServer::new(Levels::new(degradation.clone()))
        .max_encoding_message_size(MAX_MESSAGE);
    let explain = ExplainServiceServer::new(Explain::new(policy.clone(), Arc::clone(&identity)))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let images = Images::new(policy.clone(), registry_auth);
    tokio::spawn(images.clone().run(stop.clone()));
    let modules = PluginServiceServer::new(Modules::new(policy.clone(), images, stop.clone()))
        .max_decoding_message_size(MAX_PIECE)
        .max_encoding_message_size(MAX_MESSAGE);
    let changes =
        RolloutServiceServer::new(Service::new(rollouts.clone())).max_encoding_message_size(MAX_MESSAGE);
    let peer = PeerServiceServer::new(Peer::new(rollouts.clone()));
    let push = Push::new(
        proxies,
        degradation,
        rollouts,
        ca.clone(),
        backups.lead().cloned(),
        timing,
        stop.clone(),
    );
    let audit = AuditServiceServer::new(audit::Service::new(audit)).max_encoding_message_size(MAX_MESSAGE);
    // They end with this function, at the latest.
    let mut beside = JoinSet::new();
    let backup = BackupServiceServer::new(backup::Service::new(backups.clone()))
        .max_encoding_message_size(MAX_MESSAGE);
    beside.spawn(backups.run(stop.clone()));
    let others = Others {
        strangers: ca.is_some(),
        guests: access.takes_tokens(),
    };
    let Incoming {
        peers,
        strangers,
        guests,
    } = tls::incoming_with(listener, identity, &[b"h2", b"http/1.1"], others);
    let issuer = ca.map(|ca| {
        beside.spawn(ca.clone().keep_own(stop.clone()));
        beside.spawn(ca.clone().keep_revocations(stop.clone()));
        beside.spawn(join_desk(
            ReceiverStream::new(strangers),
            ca.clone(),
            stop.clone(),
        ));
        IdentityServer::new(Issuer::new(ca))
            .max_decoding_message_size(MAX_IDENTITY)
            .max_encoding_message_size(MAX_MESSAGE)
    });
    let mut routes = Routes::builder();
    routes
        .add_service(api)
        .add_service(levels)
        .add_service(explain)
        .add_service(modules)
        .add_service(changes)
        .add_service(backup)
        .add_service(audit);
    if let Some(issuer) = issuer {
        routes.add_service(issuer);
    }
    if let Some(reflection) = reflection() {
        routes.add_service(reflection);
    }
    let mut routes = routes.routes();
    let router = std::mem::take(routes.axum_router_mut());
    let routes = Routes::from(router.route_service("/openapi.json", document()));
    // Guests never come near what is for proxies, and for control planes among themselves.
    beside.spawn(guest_desk(
        ReceiverStream::new(guests),
        routes.clone(),
        access.clone(),
        stop.clone(),
    ));
    let serving = transport::Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .layer(JsonLayer)
        .layer(GateLayer::new(access.clone()))
        .add_routes(routes.add_service(push).add_service(peer))
        .serve_with_incoming_shutdown(ReceiverStream::new(peers), stop.clone().cancelled_owned());
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return ended,
        () = stop.cancelled() => {}
    }
    // Whoever has not ended by then is cut off.
    let ended = tokio::time::timeout(GRACE, serving).await.unwrap_or(Ok(()));
    // What they were cut off from is put down all the same.
    let _ = tokio::time::timeout(GRACE, access.ended()).await;
    beside.shutdown().await;
    ended
}

/// What there is to call, for tools that ask the server.
fn reflection() -> Option<ServerReflectionServer<impl ServerReflection>> {
    let built = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(leeward_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        .build_v1();
    // They were made by the compiler that made this program.
    built
        .inspect_err(|error| tracing::error!(%error, "there is no reflection"))
        .ok()
}

/// Serves those who show tokens in place of a certificate: the API, and nothing that is for proxies.
async fn guest_desk(
    guests: ReceiverStream<io::Result<Guest>>,
    routes: Routes,
    access: Access,
    stop: CancellationToken,
) {
    let serving = transport::Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .max_concurrent_streams(GUEST_CALLS)
        .max_connection_age(GUEST_AGE)
        .max_connection_age_grace(GRACE)
        .layer(JsonLayer)
        .layer(GateLayer::new(access.clone()))
        .add_routes(routes)
        .serve_with_incoming_shutdown(guests, stop.cancelled_owned());
    if let Err(error) = serving.await {
        tracing::error!(%error, "nobody can call with a token any more");
    }
}

/// Serves those who have no certificate yet, on connections that nothing else is served on.
async fn join_desk(strangers: ReceiverStream<io::Result<Stranger>>, ca: Ca, stop: CancellationToken) {
    let desk = IdentityServer::new(JoinDesk::new(ca)).max_decoding_message_size(MAX_IDENTITY);
    let serving = transport::Server::builder()
        .timeout(JOINING)
        .concurrency_limit_per_connection(JOIN_CALLS)
        .max_connection_age(JOINING)
        .max_connection_age_grace(GRACE)
        .add_service(desk)
        .serve_with_incoming_shutdown(strangers, stop.cancelled_owned());
    if let Err(error) = serving.await {
        tracing::error!(%error, "nobody can join any more");
    }
}

/// Nobody is served before it is known what is held back from proxies. `None` if it is stopped meanwhile.
async fn open_rollouts(
    policy: &Policy,
    proxies: &Arc<Proxies>,
    identity: &Arc<Identity>,
    stop: &CancellationToken,
) -> Option<Rollouts> {
    loop {
        match Rollouts::open(policy.clone(), Arc::clone(proxies), Arc::clone(identity)).await {
            Ok(rollouts) => return Some(rollouts),
            Err(error) => tracing::error!(%error, "can't read how far a rollout is; trying again"),
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(AGAIN) => {}
        }
    }
}

async fn forget(proxies: Arc<Proxies>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(FORGET_EVERY) => {}
        }
        proxies.forget(tokio::time::Instant::now().into_std());
    }
}
