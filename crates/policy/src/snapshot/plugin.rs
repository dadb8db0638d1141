//! Plugins, and the places in rules where they are named.

use super::{PluginIdx, RuleView};
use crate::model::{FlagCondition, Plugin, PluginPlace, RouteRule, Spec};
use crate::{Name, Resource};
use std::collections::HashMap;
use std::sync::Arc;

/// A plugin as policy has it; the code is the plugin host's.
#[derive(Debug)]
pub struct PluginView {
    /// Its name.
    pub name: Arc<str>,
    /// Its settings.
    pub spec: Arc<Plugin>,
}

/// A plugin in a rule's way.
#[derive(Clone, Debug)]
pub struct FilterView {
    /// Its name.
    pub name: Arc<str>,
    /// Which. `None`: policy has none of this name that can be here, nor what is to be done without it.
    pub plugin: Option<PluginIdx>,
    /// Handed to it as it stands: the rule's, or else the plugin's own.
    pub config: Arc<str>,
    /// The requests that it is for.
    pub when: Option<FlagCondition>,
}

/// The plugin that chooses among a rule's backends.
#[derive(Clone, Debug)]
pub struct RouterView {
    /// Its name.
    pub name: Arc<str>,
    /// Which. `None`: policy has none of this name that can be here, nor what is to be done without it.
    pub plugin: Option<PluginIdx>,
    /// Handed to it as it stands: the rule's, or else the plugin's own.
    pub config: Arc<str>,
}

/// The plugins of a snapshot while it is built.
pub(super) struct Plugins<'a> {
    pub(super) views: Vec<PluginView>,
    by_name: HashMap<&'a Name, PluginIdx>,
}

impl<'a> Plugins<'a> {
    pub(super) fn new<'r>(resources: impl Iterator<Item = (&'r &'a Name, &'r &'a Resource)>) -> Self
    where
        'a: 'r,
    {
        let mut plugins = Self {
            views: Vec::new(),
            by_name: HashMap::new(),
        };
        for (name, resource) in resources {
            if let Spec::Plugin(plugin) = &resource.spec {
                plugins.by_name.insert(*name, PluginIdx::new(plugins.views.len()));
                plugins.views.push(PluginView {
                    name: name.to_shared(),
                    spec: Arc::new(plugin.clone()),
                });
            }
        }
        plugins
    }

    /// The plugin of a name, with what is to be handed to it. `None` for one that can't be in such a place.
    pub(super) fn find(
        &self,
        place: PluginPlace,
        name: &Name,
        config: &Arc<str>,
    ) -> Option<(PluginIdx, Arc<str>)> {
        let idx = *self.by_name.get(name)?;
        let spec = &self.views.get(idx.position())?.spec;
        let config = if config.is_empty() { &spec.config } else { config };
        (spec.kind.place() == place).then(|| (idx, Arc::clone(config)))
    }
}

impl RuleView {
    pub(super) fn take_plugins(&mut self, rule: &RouteRule, plugins: &Plugins<'_>) {
        // One that isn't there is not left out: what it keeps out must not pass.
        let find = |place, name: &Name, config| match plugins.find(place, name, config) {
            Some((plugin, config)) => (name.to_shared(), Some(plugin), config),
            None => (name.to_shared(), None, Arc::clone(config)),
        };
        let filters = rule.filters.iter().map(|filter| {
            let (name, plugin, config) = find(PluginPlace::Filter, &filter.plugin, &filter.config);
            FilterView {
                name,
                plugin,
                config,
                when: filter.when.clone(),
            }
        });
        self.filters = filters.collect();
        self.router = rule.router.as_ref().map(|router| {
            let (name, plugin, config) = find(PluginPlace::Router, &router.plugin, &router.config);
            RouterView { name, plugin, config }
        });
        self.has_plugins = !self.filters.is_empty() || self.router.is_some();
    }
}
