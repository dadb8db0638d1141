//! Issuers' keys: fetched as policy says, and when a token names one that isn't there.

use arc_swap::ArcSwap;
use leeward_http::{Keyring, Source};
use leeward_identity::jwt::MAX_JWKS;
use leeward_identity::web::get;
use leeward_policy::Snapshot;
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::JWKS_AVAILABLE;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    let fetched = match tokio::time::timeout(FETCH, get(&uri, MAX_JWKS)).await {
        Ok(fetched) => fetched.map_err(anyhow::Error::from),
        Err(_) => Err(anyhow::anyhow!("no answer within {} s", FETCH.as_secs())),
    };
    if let Err(error) = &fetched {
        tracing::warn!(%uri, "can't get an issuer's keys; the last good ones stay: {error:#}");
    }
    if let Err(error) = source.done(fetched.as_deref().ok(), refresh, now()) {
        tracing::warn!(%uri, "what is to be an issuer's keys is none; the last good ones stay: {error}");
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
