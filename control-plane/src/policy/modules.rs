//! Modules of plugins: which are kept, who names them, and whether a Plugin may have the one that it names.

use super::{Known, MAX_TRIES, Policy, Refused, Way, World, bare, blocking, detached, rollout, wire};
use crate::kv::Compare;
use crate::rollout::course;
use crate::store::{Author, Change, Fence, Store, StoreError, StoredModule, Write};
use bytes::Bytes;
use leeward_module::{Kind as ModuleKind, Module, ModuleError, audit, hex, inspect, verify_any};
use leeward_policy::model::{Plugin, PluginFrom, PluginKind, PluginSource};
use leeward_policy::{Key, Kind, Name, Resource, Spec};
use leeward_proto::{BadField, parse, v1};
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Refused imports that an answer names.
const MAX_REFUSED: usize = 20;
/// Who writes what was fetched.
const IMAGES: &str = "images";
/// Modules that the message of a full store names.
const MAX_NAMED: usize = 8;

/// A source of a Plugin that is an image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Image {
    /// The Plugin.
    pub(crate) plugin: Name,
    /// The field of it, such as `spec.source`.
    pub(crate) field: &'static str,
    /// The Plugin's revision.
    pub(crate) revision: u64,
    /// Where it is.
    pub(crate) image: Box<str>,
    /// How often to look what the tag means.
    pub(crate) refresh: Option<Duration>,
    /// Without TLS.
    pub(crate) insecure: bool,
    /// What it must hash to.
    pub(crate) sha256: Option<[u8; 32]>,
    /// What was fetched last.
    pub(crate) resolved: Option<[u8; 32]>,
}

impl Image {
    /// Its place, for people.
    pub(crate) fn place(&self) -> String {
        format!("Plugin/{} ({})", self.plugin, self.field)
    }

    fn is_of(&self, source: &PluginSource) -> bool {
        matches!(&source.from, PluginFrom::Oci { image, insecure, .. }
            if *image == self.image && *insecure == self.insecure)
            && source.sha256 == self.sha256
    }
}

/// Everything kept, for people.
#[derive(Debug)]
pub(crate) struct Inventory {
    /// Newest first, each with the number of its signatures and the fields that name it.
    pub(crate) modules: Vec<(StoredModule, u64, Vec<String>)>,
    /// What they take, in bytes.
    pub(crate) size: u64,
    /// What they may take.
    pub(crate) max_size: u64,
}

impl Policy {
    /// Keeps a module.
    ///
    /// # Errors
    ///
    /// [`Refused::Bad`] if it is none, [`Refused::Full`] if there is no room.
    pub(crate) async fn put_module(
        &self,
        bytes: Vec<u8>,
        signature: Option<String>,
        by: String,
    ) -> Result<StoredModule, Refused> {
        let (module, bytes) = inspected(bytes).await?;
        let policy = self.clone();
        detached(async move {
            // So that what a full store names as unused is.
            let world = policy.world().await?;
            let used = policy.used(&world).await?;
            put(&policy.store, &used, &module, &bytes, signature.as_deref(), &by).await?;
            there(&policy.store, &module.sha256).await
        })
        .await
    }

    /// A module, and the fields that name it.
    pub(crate) async fn module(&self, sha256: [u8; 32]) -> Result<(StoredModule, Vec<String>), Refused> {
        let found = there(&self.store, &sha256).await?;
        let world = self.world().await?;
        let used = self.used(&world).await?.remove(&sha256);
        Ok((found, used.unwrap_or_default()))
    }

    /// Every module.
    pub(crate) async fn inventory(&self) -> Result<Inventory, Refused> {
        self.store.settle().await?;
        let (size, max_size) = self.store.modules_size().await?;
        let modules = self.store.modules().await?;
        let world = self.world().await?;
        let mut used = self.used(&world).await?;
        let modules = modules.into_iter().map(|(module, signatures)| {
            let by = used.remove(&module.module.sha256).unwrap_or_default();
            (module, signatures, by)
        });
        Ok(Inventory {
            modules: modules.collect(),
            size,
            max_size,
        })
    }

    /// Drops a module that nothing names.
    ///
    /// # Errors
    ///
    /// [`Refused::NoModule`], [`Refused::ModuleInUse`].
    pub(crate) async fn delete_module(&self, sha256: [u8; 32]) -> Result<(), Refused> {
        let policy = self.clone();
        detached(async move {
            let mut tries = 0..MAX_TRIES;
            loop {
                policy.store.settle().await?;
                let world = policy.world().await?;
                let by = policy.used(&world).await?.remove(&sha256).unwrap_or_default();
                let sha256_text = hex(&sha256);
                if !by.is_empty() {
                    return Err(Refused::ModuleInUse {
                        sha256: sha256_text,
                        by,
                    });
                }
                match policy.store.delete_module(&sha256, world.at).await {
                    Ok(true) => return Ok(()),
                    Ok(false) => return Err(Refused::NoModule(sha256_text)),
                    Err(StoreError::Moved { .. }) if tries.next().is_some() => {}
                    Err(error) => return Err(error.into()),
                }
            }
        })
        .await
    }

    /// The next pieces of a module.
    pub(crate) async fn module_chunks(
        &self,
        sha256: [u8; 32],
        from: u32,
        count: u32,
    ) -> Result<Vec<Bytes>, Refused> {
        Ok(self.store.module_chunks(&sha256, from, count).await?)
    }

    /// Every source that is an image, and whether what was fetched for it is kept still.
    pub(crate) async fn images(&self) -> Result<Vec<Image>, Refused> {
        let world = self.world().await?;
        let plugins = world.known.values().filter_map(|entry| {
            let resource = entry.resource.as_deref()?;
            let Spec::Plugin(plugin) = &resource.spec else {
                return None;
            };
            Some((&resource.name, plugin, entry.revision))
        });
        let images = plugins.flat_map(|(name, plugin, revision)| {
            plugin
                .sources()
                .filter_map(move |(field, source)| image_of(name, field, source, revision))
        });
        Ok(images.collect())
    }

    /// What was fetched for an image becomes what its Plugin runs. Returns the Plugin's revision and the module's
    /// SHA-256; `None` if the Plugin has meanwhile become another one.
    ///
    /// # Errors
    ///
    /// [`Refused`] if the Plugin may not have it, or it can't be kept; all stays as it is then.
    pub(crate) async fn resolve(
        &self,
        image: Image,
        bytes: Vec<u8>,
        signature: Option<String>,
        fence: Fence,
    ) -> Result<Option<(u64, [u8; 32])>, Refused> {
        let (module, bytes) = inspected(bytes).await?;
        let policy = self.clone();
        detached(async move {
            let fetched = Fetched {
                module: &module,
                bytes: &bytes,
                signature: signature.as_deref(),
            };
            let mut tries = 0..MAX_TRIES;
            loop {
                match Box::pin(resolve(&policy, &image, &fetched, &fence)).await {
                    Err(Refused::Store(StoreError::Moved { .. })) if tries.next().is_some() => {
                        policy.store.settle().await?;
                    }
                    resolved => return resolved,
                }
            }
        })
        .await
    }
}

/// What a module is. Large ones take a while, in which policy can be written.
async fn inspected(bytes: Vec<u8>) -> Result<(Module, Vec<u8>), Refused> {
    blocking(move || {
        let module = inspect(&bytes).map_err(|error| bad_module(&error))?;
        Ok((module, bytes))
    })
    .await
}

/// What came for an image.
struct Fetched<'a> {
    module: &'a Module,
    bytes: &'a [u8],
    signature: Option<&'a str>,
}

fn bad_module(error: &ModuleError) -> Refused {
    let because = std::error::Error::source(error)
        .map(|source| format!(": {source}"))
        .unwrap_or_default();
    Refused::Bad(vec![BadField {
        path: "module".to_owned(),
        reason: format!("{error}{because}"),
    }])
}

async fn there(store: &Store, sha256: &[u8; 32]) -> Result<StoredModule, Refused> {
    store
        .module(sha256)
        .await?
        .ok_or_else(|| Refused::NoModule(hex(sha256)))
}

async fn put(
    store: &Store,
    used: &Used,
    module: &Module,
    bytes: &[u8],
    signature: Option<&str>,
    by: &str,
) -> Result<(), Refused> {
    match store.put_module(module, bytes, signature, by).await {
        Err(full @ StoreError::Full { .. }) => {
            let modules = store.modules().await?.into_iter();
            let unused = modules.filter(|(module, _)| !used.contains_key(&module.module.sha256));
            // The oldest first: they are the least likely to be wanted again.
            let mut unused: Vec<String> = unused
                .map(|(module, _)| format!("{} ({} bytes)", hex(&module.module.sha256), module.module.size))
                .collect();
            unused.reverse();
            unused.truncate(MAX_NAMED);
            Err(Refused::Full {
                why: full.to_string(),
                unused: match unused.as_slice() {
                    [] => "every one is in use".to_owned(),
                    some => format!("not in use: {}", some.join(", ")),
                },
            })
        }
        put => Ok(put?),
    }
}

fn image_of(plugin: &Name, field: &'static str, source: &PluginSource, revision: u64) -> Option<Image> {
    let PluginFrom::Oci {
        image,
        refresh,
        insecure,
        resolved,
    } = &source.from
    else {
        return None;
    };
    Some(Image {
        plugin: plugin.clone(),
        field,
        revision,
        image: image.clone(),
        refresh: *refresh,
        insecure: *insecure,
        sha256: source.sha256,
        resolved: *resolved,
    })
}

/// Modules that Plugins name, and the fields that do, as `Plugin/NAME (FIELD)`.
type Used = BTreeMap<[u8; 32], Vec<String>>;

impl Policy {
    /// The modules that Plugins name, or named before a change that still goes out: whom it hasn't reached runs them, and
    /// everybody does if it is taken back.
    async fn used(&self, world: &World) -> Result<Used, Refused> {
        let page = self.ledger.read().await?;
        let mut used = Used::new();
        for resource in world.known.values().filter_map(|entry| entry.resource.as_deref()) {
            note(&mut used, resource, "");
        }
        if let Some(last) = page.open() {
            let before = course::before(&last.change, &last.later);
            for stored in before.values().flatten() {
                if let Ok(resource) = parse(&wire(stored)) {
                    note(&mut used, &resource, ", before the rollout that is under way");
                }
            }
        }
        Ok(used)
    }
}

/// Puts down what a resource names, if it is a Plugin.
fn note(used: &mut Used, resource: &Resource, when: &str) {
    let Spec::Plugin(plugin) = &resource.spec else {
        return;
    };
    for (field, source) in plugin.sources() {
        if let Some(sha256) = source.stored() {
            let by = format!("Plugin/{} ({field}{when})", resource.name);
            used.entry(sha256).or_default().push(by);
        }
    }
}

/// What the control plane says of Plugins is not taken from whoever applies them: it is what was fetched for the same
/// image, if that was.
pub(super) fn carry(known: &Known, resources: &mut [v1::Resource]) {
    for wire in resources {
        let name = wire.metadata.as_ref().and_then(|m| Name::parse(&m.name).ok());
        let Some(v1::resource::Spec::Plugin(plugin)) = &mut wire.spec else {
            continue;
        };
        let there = name.and_then(|name| plugin_of(known, &name));
        let canary = plugin.canary.as_mut().and_then(|canary| canary.source.as_mut());
        let places = [
            ("spec.source", plugin.source.as_mut()),
            ("spec.canary.source", canary),
        ];
        for (field, source) in places {
            let Some(source) = source else { continue };
            let before = there.and_then(|(there, _)| there.sources().find(|(at, _)| *at == field));
            source.resolved_sha256 = before
                .and_then(|(_, before)| kept(before, source))
                .unwrap_or_default();
        }
    }
}

/// What stays resolved where a source takes another's place.
fn kept(before: &PluginSource, now: &v1::PluginSource) -> Option<String> {
    let image = &now.oci.as_ref()?.image;
    let PluginFrom::Oci {
        image: before_image,
        resolved,
        ..
    } = &before.from
    else {
        return None;
    };
    let same = *image == **before_image
        && before.sha256.map(|digest| hex(&digest)).unwrap_or_default() == now.sha256.to_lowercase()
        && before.minisign_key.as_deref().unwrap_or_default() == now.minisign_key;
    resolved.filter(|_| same).map(|digest| hex(&digest))
}

fn plugin_of<'a>(known: &'a Known, name: &Name) -> Option<(&'a Plugin, u64)> {
    let entry = known.get(&key_of(name))?;
    let Spec::Plugin(plugin) = &entry.resource.as_deref()?.spec else {
        return None;
    };
    Some((plugin, entry.revision))
}

fn key_of(name: &Name) -> Key {
    Key {
        kind: Kind::Plugin,
        name: name.clone(),
    }
}

/// Every Plugin must name modules that are there and that it may have. Files are on nodes; proxies look at them. Returns what
/// must still be so when it is written.
pub(super) async fn check(
    store: &Store,
    known: &Known,
    parsed: &[Arc<Resource>],
) -> Result<Vec<Compare>, Refused> {
    let (mut bad, mut requires) = (Vec::new(), Vec::new());
    for (i, resource) in parsed.iter().enumerate() {
        let Spec::Plugin(plugin) = &resource.spec else {
            continue;
        };
        // What is as it was has been looked at, and its modules can't have gone.
        if plugin_of(known, &resource.name).is_some_and(|(there, _)| there == plugin) {
            continue;
        }
        for (field, source) in plugin.sources() {
            let Some(sha256) = source.stored() else {
                continue;
            };
            if requires.is_empty() {
                // Before the first is looked at.
                requires.push(store.modules_stay().await?);
            }
            let Some(stored) = store.module(&sha256).await? else {
                bad.push(BadField {
                    path: format!("resources[{i}].{field}.sha256"),
                    reason: format!(
                        "there is no module {}; push it first, with leeward plugin push",
                        hex(&sha256)
                    ),
                });
                continue;
            };
            let bytes = match &source.minisign_key {
                Some(_) => store.module_chunks(&sha256, 0, u32::MAX).await?.concat(),
                None => Vec::new(),
            };
            let wrong = wrong(plugin, field, source, &stored.module, |key| {
                signed(&bytes, &stored.signatures, key)
            });
            bad.extend(wrong.into_iter().map(|f| BadField {
                path: format!("resources[{i}].{}", f.path),
                reason: f.reason,
            }));
        }
    }
    if bad.is_empty() {
        Ok(requires)
    } else {
        Err(Refused::Bad(bad))
    }
}

/// Whether a Plugin may have a module at a field; `signed` says whether it is signed by a key, or why not.
fn wrong(
    plugin: &Plugin,
    field: &str,
    source: &PluginSource,
    module: &Module,
    signed: impl FnOnce(&str) -> Result<(), String>,
) -> Vec<BadField> {
    let bad = |at: &str, reason: String| BadField {
        path: format!("{field}{at}"),
        reason,
    };
    // Of an image it is not the user who said the hash.
    let at = if matches!(source.from, PluginFrom::Oci { .. }) {
        ".oci.image"
    } else {
        ".sha256"
    };
    let name = hex(&module.sha256);
    let mut wrong = Vec::new();
    if kind_of(module.kind) != plugin.kind {
        let (is, want) = (module.kind.as_str(), plugin.kind.as_str());
        wrong.push(bad(
            at,
            format!("module {name} is a {is}; want a {want}, as spec.kind says, or another kind"),
        ));
    }
    if let Err(refused) = audit(module, &plugin.access.imports) {
        let shown = refused.iter().take(MAX_REFUSED);
        wrong.extend(shown.map(|refused| bad(at, format!("module {name} {refused}"))));
    }
    if let Some(key) = &source.minisign_key
        && let Err(why) = signed(key)
    {
        wrong.push(bad(".minisignKey", format!("module {name}: {why}")));
    }
    wrong
}

fn signed(bytes: &[u8], signatures: &[String], key: &str) -> Result<(), String> {
    verify_any(bytes, signatures, key).map_err(|why| {
        why.map_or_else(
            || "it came without a signature; push it with --signature".to_owned(),
            |error| error.to_string(),
        )
    })
}

const fn kind_of(kind: ModuleKind) -> PluginKind {
    match kind {
        ModuleKind::Fallback => PluginKind::Fallback,
        ModuleKind::Filter => PluginKind::Filter,
        ModuleKind::Router => PluginKind::Router,
        ModuleKind::WasiHttp => PluginKind::WasiHttp,
        ModuleKind::ProxyWasm => PluginKind::ProxyWasm,
    }
}

async fn resolve(
    policy: &Policy,
    image: &Image,
    fetched: &Fetched<'_>,
    fence: &Fence,
) -> Result<Option<(u64, [u8; 32])>, Refused> {
    let Fetched {
        module,
        bytes,
        signature,
    } = *fetched;
    let store = &policy.store;
    let mut world = policy.world().await?;
    let used = policy.used(&world).await?;
    let Some((plugin, revision)) = plugin_of(&world.known, &image.plugin) else {
        return Ok(None);
    };
    let Some((_, source)) = plugin
        .sources()
        .find(|(field, source)| *field == image.field && image.is_of(source))
    else {
        return Ok(None);
    };
    if let Some(pinned) = source.sha256.filter(|pinned| *pinned != module.sha256) {
        return Err(Refused::Bad(vec![BadField {
            path: format!("{}.sha256", image.field),
            reason: format!(
                "is {}, but the image has module {}; want that, or another image",
                hex(&pinned),
                hex(&module.sha256)
            ),
        }]));
    }
    let signatures: Vec<String> = signature.into_iter().map(str::to_owned).collect();
    let wrong = wrong(plugin, image.field, source, module, |key| {
        signed(bytes, &signatures, key).map_err(|why| match signatures.as_slice() {
            [] => "the image's manifest has no annotation dev.leeward.minisig".to_owned(),
            _ => why,
        })
    });
    if !wrong.is_empty() {
        return Err(Refused::Bad(wrong));
    }
    keep(
        store,
        (&used, world.at),
        source.minisign_key.as_deref(),
        fetched,
        &image.image,
    )
    .await?;
    if source.stored() == Some(module.sha256) {
        return Ok(Some((revision, module.sha256)));
    }
    let key = key_of(&image.plugin);
    let Some(stored) = store.get(&key) else {
        return Ok(None);
    };
    let mut resource = bare(wire(&stored));
    set_resolved(&mut resource, image.field, hex(&module.sha256));
    let parsed = parse(&resource).map_err(Refused::Bad)?;
    let requires = vec![store.modules_stay().await?];
    // It may have gone between the two.
    there(store, &module.sha256).await?;
    let writes = vec![Write {
        key: key.clone(),
        payload: Some(resource.encode_to_vec()),
        expect: revision,
    }];
    let page = policy.ledger.read().await?;
    let is_part = page
        .open()
        .is_some_and(|last| last.change.changes.iter().any(|change| change.key == key));
    // What a change that goes out has asked for goes where that goes; anything else goes out as any change does.
    let by = if is_part {
        None
    } else {
        rollout::plan(policy, &world, &writes, &Way::default(), false).await?
    };
    let author = Author {
        message: format!("fetched {}", image.image),
        ..Author::of(IMAGES)
    };
    let change = Change {
        writes,
        author: rollout::label(&author, by.as_ref()),
        fence: Some(fence.clone()),
        at: Some(world.at),
        requires,
        ..Change::default()
    };
    let revision = store.write(change).await?;
    world.wrote(revision, [(key, Some(Arc::new(parsed)))]);
    Ok(Some((revision, module.sha256)))
}

/// Keeps what came for an image; where there is no room, in place of what came for the same repository before and
/// nothing names any more.
async fn keep(
    store: &Store,
    (used, at): (&Used, u64),
    key: Option<&str>,
    fetched: &Fetched<'_>,
    image: &str,
) -> Result<(), Refused> {
    let Fetched { module, bytes, .. } = *fetched;
    // One that is signed anew with each build would soon have as many signatures as a module may.
    let stored = store.module(&module.sha256).await?;
    let enough = stored.is_some_and(|stored| match key {
        Some(key) => signed(bytes, &stored.signatures, key).is_ok(),
        None => true,
    });
    let signature = fetched.signature.filter(|_| !enough);
    loop {
        match put(store, used, module, bytes, signature, image).await {
            Err(full @ Refused::Full { .. }) => {
                let mut modules = store.modules().await?.into_iter().map(|(module, _)| module).rev();
                let oldest = modules.find(|old| {
                    repository(&old.by) == repository(image) && !used.contains_key(&old.module.sha256)
                });
                let Some(oldest) = oldest else {
                    return Err(full);
                };
                store.delete_module(&oldest.module.sha256, at).await?;
            }
            put => return put,
        }
    }
}

/// An image without its tag and digest.
fn repository(image: &str) -> &str {
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    match image.rsplit_once(':') {
        // A port has a path after it.
        Some((name, tag)) if !tag.contains('/') => name,
        _ => image,
    }
}

fn set_resolved(resource: &mut v1::Resource, field: &str, sha256: String) {
    let Some(v1::resource::Spec::Plugin(plugin)) = &mut resource.spec else {
        return;
    };
    let source = match field {
        "spec.source" => plugin.source.as_mut(),
        _ => plugin.canary.as_mut().and_then(|canary| canary.source.as_mut()),
    };
    if let Some(source) = source {
        source.resolved_sha256 = sha256;
    }
}

#[cfg(test)]
mod tests;
