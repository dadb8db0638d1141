//! Plugins on their way to being ready.

use crate::apply::Warm;
use leeward_policy::model::{OnFault, Plugin};
use leeward_policy::{Key, Name, Resource, Spec};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

/// How long a change of policy waits for its plugins. What isn't ready by then is made ready beside it: a registry that
/// is down, or code that takes long to compile, holds up nothing else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// How long a proxy that starts isn't ready for want of plugins without which requests are refused. As long as Envoy waits
/// for what it has to begin with (`initial_fetch_timeout`).
pub(crate) const START: Duration = Duration::from_secs(15);

/// At most one task for each plugin.
#[derive(Default)]
pub(crate) struct Warming {
    tasks: JoinSet<Result<(), String>>,
    by_key: BTreeMap<Key, Task>,
}

struct Task {
    handle: AbortHandle,
    resource: Arc<Resource>,
}

/// What became of a plugin.
pub(crate) struct Warmed {
    pub(crate) resource: Arc<Resource>,
    pub(crate) result: Result<(), String>,
}

impl Warming {
    /// Begins to make every plugin among these ready, and names those that weren't under way already. An older revision
    /// of one that isn't ready yet will not be.
    pub(crate) fn begin<'a, W: Warm>(
        &mut self,
        warm: &Arc<W>,
        resources: impl Iterator<Item = &'a Arc<Resource>>,
    ) -> BTreeSet<Key> {
        let mut begun = BTreeSet::new();
        for resource in resources {
            let Spec::Plugin(plugin) = &resource.spec else {
                continue;
            };
            // It is under way: a control plane that is connected again says everything again.
            let known = self.by_key.get(&resource.key());
            if known.is_some_and(|task| task.resource == *resource) {
                continue;
            }
            let (warm, name, plugin) = (Arc::clone(warm), resource.name.clone(), Plugin::clone(plugin));
            let handle = self.tasks.spawn(async move { warm.warm(&name, &plugin).await });
            let resource = Arc::clone(resource);
            let task = Task { handle, resource };
            let key = task.resource.key();
            begun.insert(key.clone());
            if let Some(older) = self.by_key.insert(key, task) {
                older.handle.abort();
            }
        }
        begun
    }

    /// Policy has forgotten these.
    pub(crate) fn forget<'a>(&mut self, keys: impl Iterator<Item = &'a Key>) {
        for key in keys {
            if let Some(task) = self.by_key.remove(key) {
                task.handle.abort();
            }
        }
    }

    /// What became of the plugins that there is news of until `deadline`; ends as soon as these are ready. Others may take
    /// as long as they want.
    pub(crate) async fn until(&mut self, deadline: Instant, these: &BTreeSet<Key>) -> Vec<Warmed> {
        let mut warmed = Vec::new();
        while these.iter().any(|key| self.by_key.contains_key(key)) {
            match tokio::time::timeout_at(deadline, self.next()).await {
                Ok(news) => warmed.push(news),
                Err(_) => break,
            }
        }
        warmed
    }

    /// Waits until there is news of a plugin; never ends while there are none. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Warmed {
        while let Some(joined) = self.tasks.join_next_with_id().await {
            let (id, result) = match joined {
                Ok((id, result)) => (id, result),
                Err(error) => (error.id(), Err("making it ready broke down".to_owned())),
            };
            // One that was replaced or forgotten is no news.
            let key = self.by_key.iter().find(|(_, task)| task.handle.id() == id);
            if let Some(key) = key.map(|(key, _)| key.clone())
                && let Some(task) = self.by_key.remove(&key)
            {
                let resource = task.resource;
                return Warmed { resource, result };
            }
        }
        std::future::pending().await
    }

    /// Those among `named` that aren't ready yet and without which requests are refused.
    pub(crate) fn vital(&self, named: &BTreeSet<&Name>) -> Vec<Name> {
        let resources = self.by_key.values().map(|task| &task.resource);
        let vital = resources.filter(|resource| {
            matches!(&resource.spec, Spec::Plugin(plugin) if plugin.on_fault == OnFault::FailClosed)
                && named.contains(&resource.name)
        });
        vital.map(|resource| resource.name.clone()).collect()
    }

    /// Those that aren't ready yet.
    pub(crate) fn pending(&self) -> BTreeSet<Key> {
        self.by_key.keys().cloned().collect()
    }
}
