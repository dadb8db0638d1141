//! Modules in OCI registries: the control plane takes them from there, and proxies take them from it, so that a registry
//! that is down keeps nothing from starting.
//!
//! [`board`] says what is to be fetched when and how that went, [`layout`] and [`auth`] read what others have written;
//! all three are pure. [`registry`] asks, and what it got becomes what a Plugin runs in one write ([`Policy::resolve`]).

mod auth;
mod board;
mod layout;
mod registry;

use crate::policy::{Image, Policy, wall};
use crate::store::Fence;
use board::{Board, Landed};
use leeward_proto::v1;
use registry::{Fetched, Registries};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Images that are fetched at once. Each takes twice the memory of its module while it is unpacked.
const AT_ONCE: usize = 4;
/// What is led.
const JOB: &str = "images";
/// How long the one that led is waited for, once it is gone.
const TTL: Duration = Duration::from_secs(15);
/// How long one may take, all in all.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Where it is known how it stands with images. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    policy: Policy,
    registries: Arc<Registries>,
    /// No other lock is taken while this is held.
    // Poison is harmless: what it says is for people, or is tried again.
    board: Arc<Mutex<Board>>,
}

/// A fetch that has ended.
type Flight = (Image, Result<Landed, String>);

impl Images {
    /// Nothing is fetched before [`Images::run`]. `auth` is a file as Docker has it, with the registries' passwords.
    pub(crate) fn new(policy: Policy, auth: Option<PathBuf>) -> Self {
        Self {
            policy,
            registries: Arc::new(Registries::new(auth)),
            board: Arc::default(),
        }
    }

    /// How it stands with each.
    pub(crate) fn list(&self) -> Vec<v1::ImageState> {
        self.board().list(now())
    }

    /// Fetches what is due, while this control plane is the one that does, until stopped.
    pub(crate) async fn run(self, stop: CancellationToken) {
        loop {
            let leadership = tokio::select! {
                () = stop.cancelled() => return,
                leadership = self.policy.store().lead(JOB, TTL) => leadership,
                () = self.look_on() => return,
            };
            let fence = leadership.fence();
            tokio::select! {
                () = stop.cancelled() => return,
                () = leadership.lost() => tracing::warn!("another control plane may fetch images now"),
                () = self.fetch_all(&fence) => return,
            }
        }
    }

    /// Follows policy, for people who ask here how it stands, while another control plane fetches. Ends when the store does.
    async fn look_on(&self) {
        let mut revisions = self.policy.watch();
        loop {
            revisions.borrow_and_update();
            self.reconcile().await;
            if revisions.changed().await.is_err() {
                return;
            }
        }
    }

    async fn reconcile(&self) {
        match self.policy.images().await {
            Ok(wanted) => self.board().reconcile(wanted, now(), wall(), fastrand::f64),
            Err(error) => tracing::error!(%error, "can't read which images there are"),
        }
    }

    /// Ends when the store does.
    async fn fetch_all(&self, fence: &Fence) {
        // What was in flight when this one led before has ended with that.
        *self.board() = Board::default();
        let mut revisions = self.policy.watch();
        let mut flights: JoinSet<Flight> = JoinSet::new();
        loop {
            // Marked as seen before reading, so that a write in between is not missed.
            revisions.borrow_and_update();
            self.reconcile().await;
            for (image, manifest) in self.board().take_due(now(), AT_ONCE - flights.len().min(AT_ONCE)) {
                flights.spawn(self.clone().fetch(image, manifest, fence.clone()));
            }
            let wake = self.board().next_wake().filter(|_| flights.len() < AT_ONCE);
            tokio::select! {
                changed = revisions.changed() => if changed.is_err() { return },
                Some(landed) = flights.join_next() => match landed {
                    Ok((image, landed)) => self.landed(&image, landed),
                    Err(error) => tracing::error!(%error, "fetching an image broke down"),
                },
                () = until(wake) => {}
            }
        }
    }

    async fn fetch(self, image: Image, manifest: Option<String>, fence: Fence) -> Flight {
        let fetched = tokio::time::timeout(TIMEOUT, self.registries.fetch(&image, manifest.as_deref()));
        let landed = match fetched.await {
            Err(_) => Err(format!("the registry took more than {TIMEOUT:?}")),
            Ok(Err(error)) => Err(chain(&error)),
            Ok(Ok(Fetched::Same)) => Ok(Landed::Same),
            Ok(Ok(Fetched::Module {
                bytes,
                signature,
                manifest,
            })) => match Box::pin(self.policy.resolve(image.clone(), bytes, signature, fence)).await {
                Ok(Some((revision, sha256))) => Ok(Landed::Resolved {
                    revision,
                    sha256,
                    manifest,
                }),
                Ok(None) => Ok(Landed::Superseded),
                Err(refused) => Err(refused.to_string()),
            },
        };
        (image, landed)
    }

    fn landed(&self, image: &Image, landed: Result<Landed, String>) {
        let place = image.place();
        match &landed {
            Ok(Landed::Resolved { revision, .. }) => {
                tracing::info!(place, image = image.image, revision, "an image was fetched");
            }
            Ok(Landed::Same | Landed::Superseded) => {}
            Err(error) => {
                tracing::warn!(
                    place,
                    image = image.image,
                    error,
                    "can't fetch an image; what was fetched last stays"
                );
            }
        }
        self.board().landed(image, landed, now(), wall(), fastrand::f64);
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake.into()).await,
        None => std::future::pending().await,
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// An error with all that is below it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors say what is below them themselves.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
