//! For the node that it runs on: is it alive, is it ready, what does it do and why.

use crate::degrade::Degradation;
use crate::drain::Phase;
use crate::is_ready;
use crate::{caches, queues, resilience};
use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use leeward_cache::Caches;
use leeward_config::Live;
use leeward_http::Node;
use leeward_queue::Queues;
use leeward_telemetry::{Gauge, Hub};
use leeward_upstream::Registry;
use serde_json::json;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// The admin listener.
pub(crate) struct Admin(TcpListener);

/// Connections at once; more wait.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Clone)]
struct View {
    hub: Arc<Hub>,
    live: Live,
    registry: Arc<Registry>,
    queues: Arc<Queues>,
    caches: Arc<Caches>,
    degradation: Degradation,
    phases: watch::Receiver<Phase>,
}

impl Admin {
    pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await;
        Ok(Self(
            listener.with_context(|| format!("can't listen on {address}"))?,
        ))
    }

    /// The listener that a predecessor had.
    pub(crate) fn handed(listener: StdListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Self)
    }

    /// The same listener once more, for a successor.
    pub(crate) fn try_clone(&self) -> std::io::Result<StdListener> {
        self.0.as_fd().try_clone_to_owned().map(StdListener::from)
    }

    pub(crate) fn address(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Answers until dropped, or until a successor has the listener: who asks then is to hear how that one is.
    /// Everything is read-only but `/queues`.
    pub(crate) async fn serve(
        self,
        node: &Node,
        live: Live,
        degradation: Degradation,
        phases: watch::Receiver<Phase>,
    ) {
        let view = View {
            hub: Arc::clone(&node.hub),
            live,
            registry: Arc::clone(&node.registry),
            queues: Arc::clone(&node.queues),
            caches: Arc::clone(&node.caches),
            degradation,
            phases,
        };
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut phases = view.phases.clone();
        let mut gone = pin!(left(&mut phases));
        loop {
            let slot = tokio::select! {
                () = gone.as_mut() => return,
                slot = Arc::clone(&slots).acquire_owned() => slot,
            };
            let Ok(slot) = slot else { return };
            let accepted = tokio::select! {
                biased;
                () = gone.as_mut() => return,
                accepted = self.0.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "can't accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let view = view.clone();
            tokio::spawn(async move {
                let mut phases = view.phases.clone();
                let service = service_fn(|request| async { Ok::<_, Infallible>(view.answer(request).await) });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                let mut connection = pin!(connection);
                let served = tokio::select! {
                    served = connection.as_mut() => served,
                    () = left(&mut phases) => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = served {
                    tracing::debug!(%error, "admin connection ended");
                }
                drop(slot);
            });
        }
    }
}

impl View {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.headers().contains_key(header::ORIGIN) {
            // A page in a browser on this node must not act for whoever looks at it.
            return text(StatusCode::FORBIDDEN, "not for pages\n".to_owned());
        }
        if request.uri().path().starts_with("/queues") {
            return queues::answer(&self.queues, &request).await;
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "want GET\n".to_owned());
        }
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => match is_ready(&self.live.status(), *self.phases.borrow()) {
                Ok(()) => text(StatusCode::OK, "ok\n".to_owned()),
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            },
            "/metrics" => {
                self.set_gauges();
                let snapshot = self.live.snapshot().load();
                let mut readings = resilience::readings(&self.registry, &snapshot, now());
                readings.extend(queues::readings(&self.queues));
                readings.extend(caches::readings(&self.caches));
                readings.extend(self.degradation.readings());
                text(StatusCode::OK, self.hub.render_prometheus(readings))
            }
            "/config" => json(&self.config()),
            "/circuits" => {
                let snapshot = self.live.snapshot().load();
                json(&resilience::circuits(&self.registry, &snapshot, now()))
            }
            "/degradation" => json(&self.degradation.report(now())),
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /livez, /readyz, /metrics, /circuits, /degradation, /queues and /config\n"
                    .to_owned(),
            ),
        }
    }

    fn set_gauges(&self) {
        let status = self.live.status();
        self.hub.set(Gauge::Generation, status.generation.unwrap_or(0));
        self.hub.set(Gauge::Quarantined, status.quarantined.len() as u64);
        self.hub.set(Gauge::Connected, status.connected.into());
        self.hub.set(Gauge::ConfigAge, age(status.heard).unwrap_or(0));
    }

    fn config(&self) -> serde_json::Value {
        let status = self.live.status();
        let quarantined: Vec<_> = status
            .quarantined
            .iter()
            .map(|(key, q)| json!({"resource": key.to_string(), "revision": q.revision, "running": q.running, "reason": q.reason}))
            .collect();
        let snapshot = self.live.snapshot().load();
        json!({
            "pid": std::process::id(),
            "proxy": snapshot.viewer.proxy.as_str(),
            "zone": snapshot.viewer.zone.as_str(),
            "generation": status.generation,
            "connected": status.connected,
            "heard_seconds_ago": age(status.heard),
            "orphans": status.orphans,
            "quarantined": quarantined,
            "services": snapshot.services().len(),
            "rules": snapshot.rules().len(),
            "plugins": snapshot.plugins().iter().map(|p| &*p.name).collect::<Vec<_>>(),
        })
    }
}

/// Waits until a successor has the listener. A proxy that ends without one answers to the last.
async fn left(phases: &mut watch::Receiver<Phase>) {
    let left = |phase: &Phase| match phase {
        Phase::Leaving => true,
        Phase::Serving | Phase::Asking | Phase::Closing => false,
    };
    if phases.wait_for(left).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn age(heard: Option<std::time::Instant>) -> Option<u64> {
    heard.map(|at| {
        tokio::time::Instant::now()
            .into_std()
            .saturating_duration_since(at)
            .as_secs()
    })
}

fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

fn json(value: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, format!("{value:#}\n"));
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
