//! For the node that it runs on: is it alive, is it ready, what does it do.

use crate::access::Access;
use crate::backup::{Backups, Lead};
use crate::ca::Ca;
use crate::policy::Policy;
use crate::proxies::Proxies;
use crate::rollout::Rollouts;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Longest exchange with a client.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the store.
const SETTLE: Duration = Duration::from_secs(2);
/// Largest request head that is read, in bytes.
const MAX_HEAD: usize = 8 << 10;

/// Exchanges at once. A client beyond that waits, five seconds at most.
const CLIENTS: usize = 16;

/// What there is to ask about.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) policy: Policy,
    pub(crate) proxies: Arc<Proxies>,
    pub(crate) rollouts: Rollouts,
    pub(crate) ca: Option<Ca>,
    pub(crate) access: Access,
    pub(crate) backups: Backups,
}

/// Answers `GET /livez`, `/readyz` and `/metrics` until stopped, one request on each connection, which is
/// what probes and scrapers need.
pub(crate) async fn serve(listener: TcpListener, about: About, stop: CancellationToken) {
    let clients = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(slot) = Arc::clone(&clients).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let about = about.clone();
                tokio::spawn(async move {
                    // What goes wrong with one probe is the prober's to report.
                    drop(tokio::time::timeout(TIMEOUT, answer(stream, &about)).await);
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, about: &About) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|w| w == b"\r\n\r\n") && head.len() < MAX_HEAD {
        if stream.read_buf(&mut head).await? == 0 {
            break;
        }
    }
    let text = String::from_utf8_lossy(&head);
    let path = text
        .strip_prefix("GET ")
        .and_then(|rest| rest.split(' ').next())
        .unwrap_or_default();
    let (status, body) = match path {
        "/livez" => ("200 OK", "ok\n".to_owned()),
        "/readyz" => ready(about).await,
        "/metrics" => {
            let now_ms = about.policy.store().now_ms();
            let all = metrics(about) + &about.rollouts.metrics() + &about.backups.metrics(now_ms);
            ("200 OK", all)
        }
        _ => (
            "404 Not Found",
            "there are /livez, /readyz and /metrics\n".to_owned(),
        ),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// Whether it is of use.
async fn ready(about: &About) -> (&'static str, String) {
    if about.backups.lead().is_some_and(Lead::is_fenced) {
        return (
            "503 Service Unavailable",
            "another control plane has taken its place\n".to_owned(),
        );
    }
    let store = about.policy.store();
    let trouble = match tokio::time::timeout(SETTLE, store.settle()).await {
        Ok(Ok(_)) => return ("200 OK", "ok\n".to_owned()),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the store has not answered within {SETTLE:?}"),
    };
    if store.kv().is_shared() {
        // Proxies are served from memory, and no other control plane has a better way to the cluster.
        return ("200 OK", format!("ok, but policy can't be written: {trouble}\n"));
    }
    // A file that can't be read makes it no use to anyone, but a restart would not mend it.
    ("503 Service Unavailable", format!("{trouble}\n"))
}

fn metrics(about: &About) -> String {
    let About {
        policy,
        proxies,
        ca,
        access,
        ..
    } = about;
    let (connected, lowest) = proxies.summary();
    let mut rows = vec![
        (
            "leeward_control_revision",
            "gauge",
            "The store's revision.",
            policy.revision(),
        ),
        (
            "leeward_control_proxies_connected",
            "gauge",
            "Proxies connected.",
            connected as u64,
        ),
        (
            "leeward_control_lowest_generation",
            "gauge",
            "The lowest generation that a connected proxy runs.",
            lowest.unwrap_or_default(),
        ),
    ];
    let counts = access.counts();
    rows.extend([
        (
            "leeward_control_breakglass_total",
            "counter",
            "Calls that used the role breakglass.",
            counts.breakglass.load(Ordering::Relaxed),
        ),
        (
            "leeward_control_calls_denied_total",
            "counter",
            "Calls that were refused for who called.",
            counts.refused.load(Ordering::Relaxed),
        ),
        (
            "leeward_control_audit_lost_total",
            "counter",
            "Entries of the audit log that could not be kept in time.",
            access.audit().lost(),
        ),
    ]);
    if let Some(standing) = ca.as_ref().map(Ca::standing) {
        rows.extend([
            (
                "leeward_control_identity_expiry_seconds",
                "gauge",
                "Time until the control plane's own certificate ends; 0 when it has.",
                standing.own_left.as_secs(),
            ),
            (
                "leeward_control_authority_expiry_seconds",
                "gauge",
                "Time until the certificate that signs the mesh's certificates ends; 0 when it has.",
                standing.authority_left.as_secs(),
            ),
            (
                "leeward_control_root_expiry_seconds",
                "gauge",
                "Time until the root that it leads to ends; 0 when it has.",
                standing.root_left.as_secs(),
            ),
            (
                "leeward_control_trust_behind",
                "gauge",
                "Connected proxies that don't run the trust bundle of now, or haven't said so.",
                standing.behind as u64,
            ),
            (
                "leeward_control_certificates_issued_total",
                "counter",
                "Certificates issued to proxies and users.",
                standing.issued,
            ),
            (
                "leeward_control_certificates_refused_total",
                "counter",
                "Requests for certificates that were refused.",
                standing.refused,
            ),
            (
                "leeward_control_revocations",
                "gauge",
                "Ids whose older certificates are refused.",
                standing.revocations.listed as u64,
            ),
            (
                "leeward_control_revoked_refused_total",
                "counter",
                "Handshakes that were refused since the peer's certificate was revoked.",
                standing.revocations.refused,
            ),
        ]);
    }
    let mut out = String::new();
    for (name, kind, help, value) in rows {
        // Writing to a String does not fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    }
    out
}
