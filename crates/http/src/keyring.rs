//! The keys of the issuers of tokens, shared by the workers and filled beside them.

use arc_swap::ArcSwapOption;
use leeward_identity::jwt::{InvalidKeySet, KeySet};
use leeward_policy::model::JwksSource;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// The least time between two fetches that tokens ask for.
const ASKED_EVERY: Duration = Duration::from_secs(30);
/// How soon a fetch that has failed is tried again, while there are no keys at all.
const FIRST_AGAIN: Duration = Duration::from_secs(2);
/// The same, while older keys are in use.
const AGAIN: Duration = Duration::from_secs(30);
/// Sources that are kept; policy can name no more that are of any use.
const MAX_SOURCES: usize = 1024;

/// The keys of every issuer that policy names.
#[derive(Debug)]
pub struct Keyring {
    // Poison is harmless: entries are put in and taken out whole.
    sources: RwLock<HashMap<JwksSource, Arc<Source>>>,
    /// Told when a token names a key that isn't there.
    wanted: Notify,
    began: Instant,
}

/// Where keys are from, and what was had from there.
#[derive(Debug)]
pub struct Source {
    keys: ArcSwapOption<Keys>,
    /// Counts fetches that have ended.
    fetched: watch::Sender<u64>,
    /// A token has asked for one that isn't done yet.
    asked: AtomicBool,
    /// When a token has last asked, in ms since `began`, and one more.
    last_asked: AtomicU64,
    /// When the next fetch is due, in ms since `began`.
    due: AtomicU64,
    fetching: AtomicBool,
    failing: AtomicBool,
    began: Instant,
}

/// A set of keys; another set is another value.
#[derive(Debug)]
pub(crate) struct Keys {
    pub(crate) set: KeySet,
}

impl Keyring {
    /// An empty one.
    pub fn new(now: Instant) -> Self {
        Self {
            sources: RwLock::default(),
            wanted: Notify::new(),
            began: now,
        }
    }

    /// The keys from a place; it is remembered from now on.
    pub(crate) fn source(&self, of: &JwksSource) -> Arc<Source> {
        let known = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = known.get(of) {
            return Arc::clone(source);
        }
        drop(known);
        let made = Arc::new(Source::new(of, self.began));
        let mut known = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_SOURCES {
            // Without keys, no token is valid.
            return made;
        }
        Arc::clone(known.entry(of.clone()).or_insert(made))
    }

    /// Keeps what policy names, and forgets what it doesn't name any more.
    pub fn update<'a>(&self, named: impl Iterator<Item = &'a JwksSource>) {
        let named: Vec<_> = named.collect();
        for of in &named {
            drop(self.source(of));
        }
        let mut known = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|of, _| named.contains(&of));
    }

    /// Sources from which keys are to be fetched now; each is given out once until [`Source::done`].
    pub fn due(&self, now: Instant) -> Vec<(Box<str>, Duration, Arc<Source>)> {
        let known = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let remote = known.iter().filter_map(|(of, source)| match of {
            JwksSource::Remote { uri, refresh } => Some((uri.clone(), *refresh, Arc::clone(source))),
            JwksSource::Inline(_) => None,
        });
        remote.filter(|(_, _, source)| source.take(now)).collect()
    }

    /// Waits until a token names a key that isn't there.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Whether the last fetch from each place succeeded.
    pub fn standing(&self) -> Vec<(Box<str>, bool)> {
        let known = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let remote = known.iter().filter_map(|(of, source)| match of {
            JwksSource::Remote { uri, .. } => {
                let there = source.keys.load().is_some() && !source.failing.load(Ordering::Relaxed);
                Some((uri.clone(), there))
            }
            JwksSource::Inline(_) => None,
        });
        remote.collect()
    }

    /// Asks for another fetch, as a token names a key that isn't there. `None`: it was asked for not long ago, or can't
    /// help.
    pub(crate) fn ask(&self, source: &Source, now: Instant) -> Option<watch::Receiver<u64>> {
        let ended = source.fetched.subscribe();
        if !source.ask(now) {
            return None;
        }
        self.wanted.notify_one();
        Some(ended)
    }
}

impl Source {
    fn new(of: &JwksSource, began: Instant) -> Self {
        let keys = match of {
            // Policy has been read, so this never fails but for a key that only cryptography finds to be none.
            JwksSource::Inline(text) => KeySet::parse(text.as_bytes()).ok(),
            JwksSource::Remote { .. } => None,
        };
        let fixed = matches!(of, JwksSource::Inline(_));
        Self {
            keys: ArcSwapOption::from_pointee(keys.map(|set| Keys { set })),
            fetched: watch::Sender::new(0),
            asked: AtomicBool::new(false),
            last_asked: AtomicU64::new(0),
            due: AtomicU64::new(if fixed { u64::MAX } else { 0 }),
            fetching: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            began,
        }
    }

    pub(crate) fn keys(&self) -> Option<Arc<Keys>> {
        self.keys.load_full()
    }

    fn at(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.began).as_millis();
        u64::try_from(since).unwrap_or(u64::MAX - 1)
    }

    /// Whether a token that asks now is heard. Waiting for a fetch that somebody else has asked for costs nothing.
    fn ask(&self, now: Instant) -> bool {
        if self.due.load(Ordering::Acquire) == u64::MAX {
            return false;
        }
        if self.asked.load(Ordering::Acquire)
            || self.keys.load().is_none() && !self.failing.load(Ordering::Relaxed)
        {
            return true;
        }
        let now = self.at(now).saturating_add(1);
        let every = u64::try_from(ASKED_EVERY.as_millis()).unwrap_or(u64::MAX);
        let heard = self
            .last_asked
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |last| {
                (last == 0 || now.saturating_sub(last) >= every).then_some(now)
            });
        if heard.is_ok() {
            self.asked.store(true, Ordering::Release);
        }
        heard.is_ok()
    }

    /// Whether keys are to be fetched now, and nobody does.
    fn take(&self, now: Instant) -> bool {
        let due = self.due.load(Ordering::Acquire);
        let wanted = due <= self.at(now) || due != u64::MAX && self.asked.load(Ordering::Acquire);
        wanted && !self.fetching.swap(true, Ordering::AcqRel)
    }

    /// Says what a fetch came to. What can't be used changes nothing: the keys that were there stay.
    ///
    /// # Errors
    ///
    /// Why keys that were fetched can't be used.
    pub fn done(&self, fetched: Option<&[u8]>, refresh: Duration, now: Instant) -> Result<(), InvalidKeySet> {
        let read = fetched.map(KeySet::parse).transpose();
        let good = matches!(read, Ok(Some(_)));
        let pause = match (good, self.keys.load().is_some()) {
            (true, _) => refresh,
            (false, true) => AGAIN.min(refresh),
            (false, false) => FIRST_AGAIN,
        };
        let pause = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let outcome = match read {
            Ok(Some(set)) => {
                self.keys.store(Some(Arc::new(Keys { set })));
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        self.failing.store(!good, Ordering::Relaxed);
        self.due.store(
            self.at(now).saturating_add(pause).min(u64::MAX - 1),
            Ordering::Release,
        );
        self.asked.store(false, Ordering::Release);
        self.fetching.store(false, Ordering::Release);
        self.fetched.send_modify(|ended| *ended += 1);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFRESH: Duration = Duration::from_secs(300);
    const KEYS: &[u8] =
        br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    fn remote() -> JwksSource {
        JwksSource::Remote {
            uri: "http://127.0.0.1:9/jwks.json".into(),
            refresh: REFRESH,
        }
    }

    #[test]
    fn keys_are_fetched_when_they_are_due_and_asked_for_seldom() {
        let t0 = tokio::time::Instant::now().into_std();
        let at = |secs| t0 + Duration::from_secs(secs);
        let ring = Keyring::new(t0);
        ring.update([remote()].iter());
        let due = |secs| ring.due(at(secs)).len();
        let source = ring.source(&remote());
        assert!(
            ring.ask(&source, t0).is_some(),
            "whoever comes before the first keys waits for them"
        );
        assert_eq!((due(0), due(0)), (1, 0), "one fetch at a time");
        source.done(None, REFRESH, at(1)).unwrap();
        assert!(
            ring.ask(&source, at(1)).is_some() && ring.ask(&source, at(2)).is_some(),
            "the same is waited for"
        );
        assert_eq!(due(2), 1);
        source.done(Some(KEYS), REFRESH, at(2)).unwrap();
        assert!(source.keys().is_some());
        assert!(ring.ask(&source, at(3)).is_none(), "asked for not long ago");
        assert_eq!(due(3), 0);
        assert!(ring.ask(&source, at(40)).is_some());
        assert_eq!(due(40), 1);
        assert!(source.done(Some(b"{}"), REFRESH, at(41)).is_err());
        assert!(source.keys().is_some(), "the last good ones stay");
        assert!(!ring.standing()[0].1);
        assert_eq!(
            (due(60), due(71)),
            (0, 1),
            "and what failed is tried again sooner"
        );
        source.done(Some(KEYS), REFRESH, at(72)).unwrap();
        assert_eq!((due(371), due(372)), (0, 1));
        ring.update(std::iter::empty());
        assert!(ring.standing().is_empty());
    }

    #[test]
    fn keys_that_stand_in_policy_are_there_at_once_and_never_fetched() {
        let now = tokio::time::Instant::now().into_std();
        let ring = Keyring::new(now);
        let source = ring.source(&JwksSource::Inline(std::str::from_utf8(KEYS).unwrap().into()));
        assert!(source.keys().is_some());
        assert!(ring.ask(&source, now).is_none() && ring.due(now).is_empty());
    }
}
