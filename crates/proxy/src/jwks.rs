//! Issuers' keys: fetched as policy says, and when a token names one that isn't there.

use anyhow::{Context, bail, ensure};
use arc_swap::ArcSwap;
use bytes::Bytes;
use http::uri::{Authority, PathAndQuery};
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use leeward_http::{Keyring, Source};
use leeward_identity::jwt::MAX_JWKS;
use leeward_policy::Snapshot;
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::JWKS_AVAILABLE;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// How often it is looked whether keys are due, and whether policy names others.
const TICK: Duration = Duration::from_secs(1);
/// Longest fetch.
const FETCH: Duration = Duration::from_secs(5);

/// Keeps keys fresh until dropped.
pub(crate) async fn follow(ring: Arc<Keyring>, live: Arc<ArcSwap<Snapshot>>) {
    let mut known: Option<Arc<Snapshot>> = None;
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = ring.wanted() => {}
        }
        let snapshot = live.load_full();
        if !known.as_ref().is_some_and(|known| Arc::ptr_eq(known, &snapshot)) {
            let policies = snapshot
                .services()
                .iter()
                .filter_map(|view| view.authorization.as_ref());
            ring.update(policies.flat_map(|policies| policies.issuers.iter().map(|issuer| &issuer.keys)));
            known = Some(snapshot);
        }
        for (uri, refresh, source) in ring.due(now()) {
            // It ends by its own limit, and what comes late of it is only kept.
            tokio::spawn(fetch(uri, refresh, source));
        }
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn fetch(uri: Box<str>, refresh: Duration, source: Arc<Source>) {
    let fetched = match tokio::time::timeout(FETCH, get(&uri)).await {
        Ok(fetched) => fetched,
        Err(_) => Err(anyhow::anyhow!("no answer within {} s", FETCH.as_secs())),
    };
    if let Err(error) = &fetched {
        tracing::warn!(%uri, "can't get an issuer's keys; the last good ones stay: {error:#}");
    }
    if let Err(error) = source.done(fetched.as_deref().ok(), refresh, now()) {
        tracing::warn!(%uri, "what is to be an issuer's keys is none; the last good ones stay: {error}");
    }
}

async fn get(uri: &str) -> anyhow::Result<Bytes> {
    let uri: Uri = uri.parse().context("is not a URL")?;
    let host = uri.host().context("names no host")?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let secure = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = TcpStream::connect((bare, port)).await.context("can't connect")?;
    let target = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let request = Request::get(target)
        .header(header::HOST, uri.authority().map_or(host, Authority::as_str))
        .header(header::ACCEPT, "application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    if secure {
        ask(
            leeward_identity::web::secure(stream, bare).await.context("TLS")?,
            request,
        )
        .await
    } else {
        // The name "localhost" is the resolver's to say.
        ensure!(
            stream.peer_addr()?.ip().is_loopback(),
            "http is for loopback addresses only"
        );
        ask(stream, request).await
    }
}

async fn ask<T>(stream: T, request: Request<Empty<Bytes>>) -> anyhow::Result<Bytes>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let answer = async {
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            bail!("the answer is {}", response.status());
        }
        let body = Limited::new(response.into_body(), MAX_JWKS).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("the answer broke off, or is too long: {error}"))?;
        anyhow::Ok(body.to_bytes())
    };
    tokio::pin!(connection, answer);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        ended = &mut connection => {
            ended?;
            // It has ended with the last byte, which the answer has by now.
            answer.await
        }
    }
}

/// Whether issuers' keys can be had.
pub(crate) fn readings(ring: &Keyring) -> Vec<Reading> {
    let standing = ring.standing().into_iter();
    standing
        .map(|(uri, there)| Reading {
            metric: JWKS_AVAILABLE,
            labels: vec![uri.into()],
            value: if there { 1.0 } else { 0.0 },
        })
        .collect()
}
