//! Everything together: listeners, services, an orderly end.

use crate::api::Api;
use crate::backup::{Backups, Service};
use crate::ca::{Ca, Files, Issuer, JoinDesk};
use crate::degradation::{Degradation, Levels};
use crate::images::Images;
use crate::modules::Modules;
use crate::policy::Policy;
use crate::proxies::Proxies;
use crate::push::{Push, Timing};
use leeward_identity::MAX_REQUEST;
use leeward_identity::tls::{Incoming, Stranger};
use leeward_identity::{Identity, tls};
use leeward_proto::v1::backup_service_server::BackupServiceServer;
use leeward_proto::v1::degradation_service_server::DegradationServiceServer;
use leeward_proto::v1::identity_server::IdentityServer;
use leeward_proto::v1::plugin_service_server::PluginServiceServer;
use leeward_proto::v1::policy_service_server::PolicyServiceServer;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport;

/// What a control plane serves with.
#[derive(Debug)]
pub struct Server {
    /// Where it listens: mutual TLS, gRPC.
    pub listener: TcpListener,
    /// Where it answers probes, if anywhere.
    pub admin: Option<TcpListener>,
    /// Who it is.
    pub identity: Arc<Identity>,
    /// The authority, where it is one; [`Files::identity`] gives who it is.
    pub ca: Option<Files>,
    /// What it serves.
    pub policy: Policy,
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
/// Largest message about certificates, in bytes.
const MAX_IDENTITY: usize = MAX_REQUEST + (4 << 10);
/// Longest connection of one that joins, which takes one call.
const JOINING: Duration = Duration::from_secs(30);
/// Calls at once on it.
const JOIN_CALLS: usize = 2;
/// How often proxies that are long gone are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(60);
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
        registry_auth,
        backups,
        timing,
    } = server;
    let proxies = Arc::new(Proxies::default());
    let ca = ca.map(|files| Ca::new(files, policy.clone(), Arc::clone(&identity)));
    if let Some(admin) = admin {
        // Its owner is `stop`.
        tokio::spawn(crate::admin::serve(
            admin,
            policy.clone(),
            Arc::clone(&proxies),
            ca.clone(),
            backups.clone(),
            stop.clone(),
        ));
    }
    let api = PolicyServiceServer::new(Api::new(policy.clone(), Arc::clone(&proxies), stop.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    tokio::spawn(forget(Arc::clone(&proxies), stop.clone()));
    let degradation = Degradation::new(policy.clone(), Arc::clone(&proxies));
    tokio::spawn(degradation.clone().run(stop.clone()));
    let levels = DegradationServiceServer::new(Levels::new(degradation.clone()))
        .max_encoding_message_size(MAX_MESSAGE);
    let images = Images::new(policy.clone(), registry_auth);
    tokio::spawn(images.clone().run(stop.clone()));
    let modules = PluginServiceServer::new(Modules::new(policy.clone(), images, stop.clone()))
        .max_decoding_message_size(MAX_PIECE)
        .max_encoding_message_size(MAX_MESSAGE);
    let push = Push::new(policy, proxies, degradation, ca.clone(), timing, stop.clone());
    // They end with this function, at the latest.
    let mut beside = JoinSet::new();
    let backup =
        BackupServiceServer::new(Service::new(backups.clone())).max_encoding_message_size(MAX_MESSAGE);
    beside.spawn(backups.run(stop.clone()));
    let (peers, issuer) = match ca {
        None => (tls::incoming(listener, identity, &[b"h2"]), None),
        Some(ca) => {
            let Incoming { peers, strangers } = tls::incoming_with_join(listener, identity, &[b"h2"]);
            beside.spawn(ca.clone().keep_own(stop.clone()));
            beside.spawn(join_desk(
                ReceiverStream::new(strangers),
                ca.clone(),
                stop.clone(),
            ));
            let issuer = IdentityServer::new(Issuer::new(ca)).max_decoding_message_size(MAX_IDENTITY);
            (peers, Some(issuer))
        }
    };
    let serving = transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(api)
        .add_service(levels)
        .add_service(modules)
        .add_service(push)
        .add_service(backup)
        .add_optional_service(issuer)
        .serve_with_incoming_shutdown(ReceiverStream::new(peers), stop.clone().cancelled_owned());
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return ended,
        () = stop.cancelled() => {}
    }
    // Whoever has not ended by then is cut off.
    let ended = tokio::time::timeout(GRACE, serving).await.unwrap_or(Ok(()));
    beside.shutdown().await;
    ended
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

async fn forget(proxies: Arc<Proxies>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(FORGET_EVERY) => {}
        }
        proxies.forget(tokio::time::Instant::now().into_std());
    }
}
