//! From wire messages to a published snapshot.

use crate::live::{Live, Trouble, add_troubles};
use crate::warming::{PATIENCE, START, Warmed, Warming};
use leeward_policy::model::{Plugin, PluginPlace};
use leeward_policy::{Key, Kind, Name, Refusal, Spec, Staged, Viewer, World};
use leeward_proto::{BadField, guards, kind_of, parse, parse_key, v1};
use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// Makes plugins ready.
pub trait Warm: Send + Sync + 'static {
    /// Makes a plugin ready; ends when it is, or when it is clear that this revision of it can't be. An error quarantines the
    /// revision and is shown to people.
    ///
    /// Policy waits for it for a moment only. After that a plugin's first revision is live before it is ready, and what
    /// requests get is the plugin host's to say; of a later one, the last good revision stays live until this one is ready.
    /// Dropped when policy names another revision, or none.
    fn warm(&self, name: &Name, plugin: &Plugin) -> impl Future<Output = Result<(), String>> + Send;

    /// Forgets every plugin that isn't among `names`.
    fn retain(&self, names: &[&str]);
}

/// A push on its way in: updates up to the one that completes it.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    upserts: Vec<v1::Resource>,
    deletes: Vec<v1::ResourceRef>,
    full: bool,
    store_id: String,
    generation: u64,
}

/// Everything that is known, across connections.
pub(crate) struct State<W> {
    world: World,
    viewer: Viewer,
    warm: Arc<W>,
    live: Live,
    pub(crate) store_id: String,
    pub(crate) generation: u64,
    /// What runs here and the last full push did not mention.
    orphans: BTreeSet<Key>,
    warming: Warming,
    start: Start,
    troubles: watch::Receiver<Arc<[Trouble]>>,
}

/// How far a proxy that starts is.
#[derive(Clone, Copy, Debug)]
enum Start {
    /// It has no policy.
    Empty,
    /// It has, and until then it may wait for plugins.
    Waits(tokio::time::Instant),
    /// That is over.
    Over,
}

/// Resources and tombstones of one change, at most. A store holds far less; more is a fault that must not
/// cost the proxy its memory.
const MAX_BATCH: usize = 1 << 20;

impl Batch {
    /// Takes an update in. Returns the whole batch if that completes it.
    ///
    /// # Errors
    ///
    /// How many resources there are, if that is more than any store has.
    pub(crate) fn add(&mut self, update: v1::Update) -> Result<Option<Self>, usize> {
        if update.full {
            // A full push stands for itself.
            *self = Self::default();
        }
        self.full |= update.full;
        self.upserts.extend(update.upserts);
        self.deletes.extend(update.deletes);
        self.store_id = update.store_id;
        self.generation = update.generation;
        let size = self.upserts.len() + self.deletes.len();
        if size > MAX_BATCH {
            return Err(size);
        }
        Ok(update.complete.then(|| std::mem::take(self)))
    }

    fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.deletes.is_empty()
    }
}

impl<W: Warm> State<W> {
    pub(crate) fn new(viewer: Viewer, warm: Arc<W>, live: Live) -> Self {
        Self {
            world: World::default(),
            viewer,
            warm,
            troubles: live.troubles(),
            live,
            store_id: String::new(),
            generation: 0,
            orphans: BTreeSet::new(),
            warming: Warming::default(),
            start: Start::Empty,
        }
    }

    /// Makes a whole batch live, but for what is bad in it. Not cancel-safe in that a batch may be lost:
    /// nothing of it is live then, and the generation is as before.
    pub(crate) async fn apply(&mut self, batch: Batch, now: Instant) {
        let nothing_new = batch.is_empty() && !batch.full && self.live.status().generation.is_some();
        let (store_id, generation, full) = (batch.store_id, batch.generation, batch.full);
        let mut staged = stage(&batch.upserts, &batch.deletes);
        let mentioned = mentioned(&staged);
        if full {
            self.orphans = orphans(&self.world, &mentioned);
            staged.deletes.extend(stale_refusals(&self.world, &mentioned));
            if !self.orphans.is_empty() {
                tracing::warn!(
                    orphans = self.orphans.len(),
                    "the store has no record of resources that run here; they stay until it deletes them by name"
                );
            }
        } else {
            self.orphans.retain(|key| !mentioned.contains(key));
        }
        if !nothing_new {
            self.warm_plugins(&mut staged).await;
            self.world.commit(staged);
        }
        if !nothing_new || generation != self.generation {
            self.publish(generation);
        }
        self.store_id = store_id;
        self.generation = generation;
        let waits_for = self.waits_for();
        self.live.say(|status| {
            status.waits_for = waits_for;
            status.generation = Some(generation);
            status.store_id.clone_from(&self.store_id);
            status.heard = Some(now);
            status.orphans = self.orphans.len();
        });
        self.say_quarantined();
        tracing::info!(
            generation,
            quarantined = self.world.quarantined().len(),
            "policy is live"
        );
    }

    fn publish(&self, generation: u64) {
        let snapshot = self.world.snapshot(self.viewer.clone(), generation);
        self.live.publish(snapshot);
        let plugins = self.plugins();
        let plugins: Vec<&str> = plugins.iter().map(Name::as_str).collect();
        self.warm.retain(&plugins);
    }

    fn say_quarantined(&self) {
        let quarantined = self.world.quarantined().iter();
        let quarantined = quarantined.map(|(k, q)| (k.clone(), q.clone())).collect();
        self.live.say(|status| status.quarantined = quarantined);
    }

    /// The plugins that a proxy which has just started waits for before it is ready.
    fn waits_for(&mut self) -> Vec<Name> {
        let now = tokio::time::Instant::now();
        let until = match self.start {
            Start::Empty => now + START,
            Start::Waits(until) => until,
            Start::Over => return Vec::new(),
        };
        let named = self
            .world
            .resources()
            .flat_map(|resource| resource.spec.plugins());
        let named: BTreeSet<&Name> = named
            .filter(|(_, _, place)| *place != PluginPlace::Rung)
            .map(|(_, name, _)| name)
            .collect();
        let vital = self.warming.vital(&named);
        let over = vital.is_empty() || now >= until;
        if !vital.is_empty() && over {
            let plugins = vital.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
            tracing::warn!(
                plugins,
                "ready without plugins that aren't loaded yet; requests in whose way they are get 503 until they are"
            );
        }
        self.start = if over { Start::Over } else { Start::Waits(until) };
        if over { Vec::new() } else { vital }
    }

    /// Waits until there is news of a plugin that wasn't ready in time, and makes it live, or until it is no longer waited for,
    /// or until something else can't be done of what is live, or can again. Never ends while there are none. Cancel-safe.
    pub(crate) async fn settle(&mut self) {
        let start = self.start;
        let waited = async {
            match start {
                Start::Waits(until) => tokio::time::sleep_until(until).await,
                Start::Empty | Start::Over => std::future::pending().await,
            }
        };
        let warmed = tokio::select! {
            biased;
            warmed = self.warming.next() => Some(warmed),
            () = waited => None,
            // It is told with the next ack.
            changed = self.troubles.changed() => match changed {
                Ok(()) => return,
                Err(_) => std::future::pending().await,
            },
        };
        if let Some(warmed) = warmed {
            let mut staged = Staged::default();
            self.take_in(warmed, &mut staged);
            self.world.commit(staged);
            self.publish(self.generation);
            self.say_quarantined();
        }
        let waits_for = self.waits_for();
        self.live.say(|status| status.waits_for = waits_for);
    }

    /// Waits for something else, and meanwhile makes plugins live that become ready.
    pub(crate) async fn settle_until<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        loop {
            tokio::select! {
                biased;
                done = other.as_mut() => return done,
                () = self.settle() => {}
            }
        }
    }

    /// Whether there are plugins that aren't ready yet.
    pub(crate) fn is_warming(&self) -> bool {
        !self.warming.pending().is_empty()
    }

    /// The same state, published elsewhere from now on.
    pub(crate) fn publishing_to(self, live: Live) -> Self {
        Self {
            troubles: live.troubles(),
            live,
            ..self
        }
    }

    /// Every plugin that there is something to say of.
    fn plugins(&self) -> Vec<Name> {
        let resources = self.world.resources();
        let good = resources.filter(|r| matches!(r.spec, Spec::Plugin(_)));
        let refused = self
            .world
            .quarantined()
            .keys()
            .filter(|key| key.kind == Kind::Plugin);
        let good = good.map(|r| r.name.clone());
        good.chain(refused.map(|key| key.name.clone())).collect()
    }

    /// Plugins that can't be made ready are refused; those that take longer go live later, if there is a good revision to
    /// stay until then. The rest of the batch goes on.
    async fn warm_plugins(&mut self, staged: &mut Staged) {
        self.warming.forget(staged.deletes.iter());
        self.warming
            .forget(staged.refused.iter().map(|refusal| &refusal.key));
        let begun = self.warming.begin(&self.warm, staged.upserts.iter());
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let news = self.warming.until(deadline, &begun).await;
        let pending = self.warming.pending();
        let known: BTreeSet<Key> = news.iter().map(|news| news.resource.key()).collect();
        staged.upserts.retain(|resource| {
            let key = resource.key();
            let later = pending.contains(&key);
            if later {
                tracing::info!(resource = %key, "a plugin isn't ready yet; policy goes live without it");
            }
            let stays = later && self.world.get(&key).is_some();
            !(stays || known.contains(&key))
        });
        for warmed in news {
            self.take_in(warmed, staged);
        }
    }

    fn take_in(&self, warmed: Warmed, staged: &mut Staged) {
        let Warmed { resource, result } = warmed;
        match result {
            Ok(()) => staged.upserts.push(resource),
            Err(reason) => {
                tracing::warn!(resource = %resource.key(), reason, "plugin refused; its last good version stays");
                staged.refused.push(Refusal {
                    key: resource.key(),
                    revision: resource.revision,
                    reason,
                    guards: None,
                });
            }
        }
    }

    /// What is live, for the control plane.
    pub(crate) fn ack(&self) -> v1::Ack {
        let refused = self.world.quarantined().iter();
        let mut quarantined: Vec<_> = refused.map(|(key, q)| (key.clone(), q.clone())).collect();
        add_troubles(&mut quarantined, &self.troubles.borrow());
        let quarantined = quarantined
            .iter()
            .take(MAX_NAMED)
            .map(|(key, q)| v1::Quarantined {
                r#ref: Some(leeward_proto::render_key(key)),
                revision: q.revision,
                reason: cut(&q.reason, MAX_REASON).to_owned(),
                running_revision: q.running.unwrap_or(0),
            });
        v1::Ack {
            generation: self.generation,
            quarantined: quarantined.collect(),
            orphans: u32::try_from(self.orphans.len()).unwrap_or(u32::MAX),
        }
    }
}

/// Quarantined resources that an ack names.
const MAX_NAMED: usize = 1000;
/// The longest reason in an ack, in bytes: with [`MAX_NAMED`] of them it stays far below what gRPC takes.
const MAX_REASON: usize = 1000;

fn cut(text: &str, bytes: usize) -> &str {
    text.get(..text.floor_char_boundary(bytes)).unwrap_or_default()
}

fn mentioned(staged: &Staged) -> BTreeSet<Key> {
    let upserts = staged.upserts.iter().map(|r| r.key());
    let refused = staged.refused.iter().map(|r| r.key.clone());
    upserts
        .chain(refused)
        .chain(staged.deletes.iter().cloned())
        .collect()
}

/// What runs here and a full push says nothing of.
fn orphans(world: &World, mentioned: &BTreeSet<Key>) -> BTreeSet<Key> {
    let keys = world.resources().map(|r| r.key());
    keys.filter(|key| !mentioned.contains(key)).collect()
}

/// What never ran here, and a full push says nothing of: there is nothing to keep, and a refusal that no
/// store has would be shown forever.
fn stale_refusals(world: &World, mentioned: &BTreeSet<Key>) -> Vec<Key> {
    let refused = world.quarantined().keys();
    let stale = refused.filter(|key| world.get(key).is_none() && !mentioned.contains(key));
    stale.cloned().collect()
}

/// Parses what came; what can't be parsed is refused alone.
fn stage(upserts: &[v1::Resource], deletes: &[v1::ResourceRef]) -> Staged {
    let mut staged = Staged::default();
    for wire in upserts {
        match parse(wire) {
            Ok(resource) => staged.upserts.push(Arc::new(resource)),
            Err(bad) => match key_of(wire) {
                Some(key) => {
                    let revision = wire.metadata.as_ref().map_or(0, |m| m.revision);
                    tracing::warn!(resource = %key, revision, "resource refused; its last good version stays");
                    staged.refused.push(Refusal {
                        key,
                        revision,
                        reason: one_line(&bad),
                        guards: guards(wire),
                    });
                }
                None => tracing::warn!(
                    reason = one_line(&bad),
                    "a resource without a usable kind and name was passed over"
                ),
            },
        }
    }
    for wire in deletes {
        match parse_key(wire) {
            Ok(key) => staged.deletes.push(key),
            Err(bad) => tracing::warn!(%bad, "a tombstone without a usable kind and name was passed over"),
        }
    }
    staged
}

pub(crate) fn key_of(wire: &v1::Resource) -> Option<Key> {
    let kind = match wire.spec.as_ref()? {
        v1::resource::Spec::Zone(_) => v1::Kind::Zone,
        v1::resource::Spec::Service(_) => v1::Kind::Service,
        v1::resource::Spec::Route(_) => v1::Kind::Route,
        v1::resource::Spec::FallbackPolicy(_) => v1::Kind::FallbackPolicy,
        v1::resource::Spec::Plugin(_) => v1::Kind::Plugin,
        v1::resource::Spec::ResiliencePolicy(_) => v1::Kind::ResiliencePolicy,
        v1::resource::Spec::CircuitOverride(_) => v1::Kind::CircuitOverride,
        v1::resource::Spec::FeatureFlags(_) => v1::Kind::FeatureFlags,
        v1::resource::Spec::DegradationPolicy(_) => v1::Kind::DegradationPolicy,
        v1::resource::Spec::DegradationOverride(_) => v1::Kind::DegradationOverride,
        v1::resource::Spec::Queue(_) => v1::Kind::Queue,
        v1::resource::Spec::AuthorizationPolicy(_) => v1::Kind::AuthorizationPolicy,
        v1::resource::Spec::Gateway(_) => v1::Kind::Gateway,
        v1::resource::Spec::BackupPolicy(_) => v1::Kind::BackupPolicy,
        v1::resource::Spec::RecoveryObjective(_) => v1::Kind::RecoveryObjective,
    };
    Some(Key {
        kind: kind_of(kind)?,
        name: Name::parse(&wire.metadata.as_ref()?.name).ok()?,
    })
}

fn one_line(bad: &[BadField]) -> String {
    bad.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests;
