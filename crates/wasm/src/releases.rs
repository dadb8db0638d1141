//! The versions of a plugin by the policy that they are for.
//!
//! A request has one policy from its beginning to its end, and gets the versions that go with it: new code is not run under
//! the settings of the code before, nor that under new ones. So what a new policy names is loaded before it is live, and goes
//! live with the first request that has that policy; those that have an older one end with what they had.

use crate::version::{Loaded, TRIAL, Version};
use leeward_policy::model::Plugin;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What a plugin is under one policy.
pub(crate) struct Release {
    spec: Plugin,
    pub(crate) loaded: Arc<Loaded>,
    /// When the first request came that has this policy.
    live: OnceLock<Instant>,
}

/// What a plugin is under the policies that requests may have, the oldest first.
#[derive(Default)]
pub(crate) struct Releases(Vec<Release>);

/// Policies of a plugin whose versions are kept: the live one, one that is about to be, and one between for a plugin that is
/// changed twice while nobody asks for it.
const MAX: usize = 3;

impl Release {
    /// A request has come that has this policy; whether it is the first.
    pub(crate) fn begin(&self, now: impl FnOnce() -> Instant) -> bool {
        self.live.get().is_none() && self.live.set(now()).is_ok()
    }
}

impl Releases {
    /// What the newest policy names, live or not.
    pub(crate) fn newest(&self) -> Option<&Release> {
        self.0.last()
    }

    /// What is live; before any is, the newest.
    pub(crate) fn current(&self) -> Option<&Release> {
        self.0.get(self.at()?)
    }

    fn at(&self) -> Option<usize> {
        let live = self.0.iter().rposition(|release| release.live.get().is_some());
        live.or_else(|| self.0.len().checked_sub(1))
    }

    /// What a request gets that has this policy. One that has a policy from long ago gets what is live.
    pub(crate) fn of(&self, spec: &Plugin) -> Option<&Release> {
        let own = self.0.iter().rev().find(|release| release.spec == *spec);
        own.or_else(|| self.current().filter(|release| release.live.get().is_some()))
    }

    /// The one with these versions, to have others.
    pub(crate) fn with(&mut self, loaded: &Arc<Loaded>) -> Option<&mut Release> {
        let mut releases = self.0.iter_mut();
        releases.find(|release| Arc::ptr_eq(&release.loaded, loaded))
    }

    /// A policy is loaded. Of one that is the same the new versions hold for every request.
    pub(crate) fn add(&mut self, spec: &Plugin, loaded: Loaded) {
        let mut live = OnceLock::new();
        self.0.retain_mut(|release| {
            let other = release.spec != *spec;
            if !other && release.live.get().is_some() {
                live = std::mem::take(&mut release.live);
            }
            other
        });
        self.0.push(Release {
            spec: spec.clone(),
            loaded: Arc::new(loaded),
            live,
        });
        if self.0.len() > MAX {
            let oldest = usize::from(self.at() == Some(0));
            self.0.remove(oldest);
        }
    }

    /// Whether requests get this version, or will.
    pub(crate) fn serve(&self, version: &Arc<Version>) -> bool {
        let from = self.at().unwrap_or_default();
        let mut versions = self.0.iter().skip(from).flat_map(|release| {
            let loaded = &release.loaded;
            loaded.canary.iter().chain([&loaded.stable])
        });
        versions.any(|known| Arc::ptr_eq(known, version))
    }

    /// Whether there is something that has stood by for long enough.
    pub(crate) fn has_old(&self, now: Instant) -> bool {
        self.outlived(now) > 0 || self.0.iter().any(|release| is_over(&release.loaded, now))
    }

    /// Lets go of that.
    pub(crate) fn drop_old(&mut self, now: Instant) {
        self.0.drain(..self.outlived(now));
        for release in &mut self.0 {
            if is_over(&release.loaded, now) {
                Arc::make_mut(&mut release.loaded).trial = None;
            }
        }
    }

    /// Policies that no request can have any more, from the oldest on.
    fn outlived(&self, now: Instant) -> usize {
        let live = self.current().and_then(|release| release.live.get());
        let long = live.is_some_and(|live| now.saturating_duration_since(*live) >= TRIAL);
        self.at().filter(|_| long).unwrap_or_default()
    }
}

fn is_over(loaded: &Loaded, now: Instant) -> bool {
    loaded.trial.as_ref().is_some_and(|trial| trial.until <= now)
}
