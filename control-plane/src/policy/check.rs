//! What resources say of each other, checked against the world as a write would leave it.

use super::{Known, Refused};
use leeward_policy::model::{Gateway, Parent, Service, ZoneDrain};
use leeward_policy::{Key, Kind, Name, Resource, Spec};
use leeward_proto::BadField;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

mod tcp;

/// Referrers that a refused delete names.
const MAX_NAMED: usize = 20;
/// How far ahead a circuit may be held.
const LONGEST_OVERRIDE: Duration = Duration::from_secs(24 * 3600);

/// How far ahead a level of degradation may be held.
const LONGEST_DEGRADATION: Duration = Duration::from_secs(7 * 24 * 3600);

/// The world as a write would leave it.
struct After<'a> {
    known: &'a Known,
    coming: BTreeMap<Key, (usize, &'a Resource)>,
}

/// Everything that a resource of the write names must be there afterwards.
pub(super) fn references(known: &Known, parsed: &[Arc<Resource>]) -> Result<(), Refused> {
    let coming = parsed.iter().enumerate().map(|(i, r)| (r.key(), (i, &**r)));
    let after = After {
        known,
        coming: coming.collect(),
    };
    let mut bad = Vec::new();
    for (i, resource) in parsed.iter().enumerate() {
        for (path, to) in resource.spec.references() {
            if !after.has(&to) {
                let reason = format!("there is no {to}; apply it first or in the same call");
                bad.push(BadField {
                    path: format!("resources[{i}].{path}"),
                    reason,
                });
            }
        }
    }
    after.check_hops(&mut bad);
    after.check_residency(&mut bad);
    after.check_plugins(&mut bad);
    after.check_tcp(&mut bad);
    after.check_destinations(&mut bad);
    after.check_gateways(&mut bad);
    after.check_levels(&mut bad);
    after.check_flags(&mut bad);
    if bad.is_empty() {
        Ok(())
    } else {
        Err(Refused::Bad(bad))
    }
}

/// What people hold must end, and soon: somebody will forget it. `now` is the wall clock's.
pub(super) fn overrides(parsed: &[Arc<Resource>], now: SystemTime) -> Result<(), Refused> {
    let mut bad = Vec::new();
    for (i, resource) in parsed.iter().enumerate() {
        let (path, expire_time, longest, within) = match &resource.spec {
            Spec::CircuitOverride(held) => ("spec.expireTime", held.expire_time, LONGEST_OVERRIDE, "24h"),
            Spec::DegradationOverride(held) => {
                ("spec.expireTime", held.expire_time, LONGEST_DEGRADATION, "7d")
            }
            Spec::Zone(zone) => match &zone.drain {
                // One that has ended is how traffic comes back step by step.
                Some(drain) if drain.expire_time > now => (
                    "spec.drain.expireTime",
                    drain.expire_time,
                    ZoneDrain::LONGEST,
                    "7d",
                ),
                Some(_) | None => continue,
            },
            Spec::Service(_)
            | Spec::Route(_)
            | Spec::FallbackPolicy(_)
            | Spec::Plugin(_)
            | Spec::ResiliencePolicy(_)
            | Spec::FeatureFlags(_)
            | Spec::DegradationPolicy(_)
            | Spec::Queue(_)
            | Spec::AuthorizationPolicy(_)
            | Spec::Gateway(_)
            | Spec::Workload(_)
            | Spec::RolloutPolicy(_)
            | Spec::AccessPolicy(_)
            | Spec::BackupPolicy(_)
            | Spec::RecoveryObjective(_) => continue,
        };
        let end = prost_types::Timestamp::from(expire_time);
        let clock = prost_types::Timestamp::from(now);
        let wrong = match expire_time.duration_since(now) {
            Ok(ahead) if ahead > longest => format!("more than {within} ahead"),
            Ok(ahead) if !ahead.is_zero() => continue,
            Ok(_) | Err(_) => "not ahead".to_owned(),
        };
        bad.push(BadField {
            path: format!("resources[{i}].{path}"),
            reason: format!("{end} is {wrong}; want a time within {within} of {clock}, which it is now"),
        });
    }
    if bad.is_empty() {
        Ok(())
    } else {
        Err(Refused::Bad(bad))
    }
}

/// Who refers to a resource, as `Kind/name (field)`.
pub(super) fn referrers(known: &Known, key: &Key) -> Vec<String> {
    let others = known.iter().filter(|(other, _)| *other != key);
    let named = others.flat_map(|(other, entry)| {
        let references = entry.resource.iter().flat_map(|r| r.spec.references());
        let to_it = references.filter(|(_, to)| to == key);
        to_it
            .map(|(path, _)| format!("{other} ({path})"))
            .collect::<Vec<_>>()
    });
    named.take(MAX_NAMED).collect()
}

fn gateway_key(name: &Name) -> Key {
    Key {
        kind: Kind::Gateway,
        name: name.clone(),
    }
}

impl<'a> After<'a> {
    /// Everything that there is then.
    fn all(&self) -> impl Iterator<Item = (&Key, &Resource)> {
        let coming = self.coming.iter().map(|(key, (_, resource))| (key, *resource));
        coming.chain(self.stays())
    }

    /// What is there, and isn't written anew.
    fn stays(&self) -> impl Iterator<Item = (&'a Key, &'a Resource)> {
        let others = self
            .known
            .iter()
            .filter(|(key, _)| !self.coming.contains_key(*key));
        others.filter_map(|(key, entry)| Some((key, entry.resource.as_deref()?)))
    }

    fn has(&self, key: &Key) -> bool {
        self.known.contains_key(key) || self.coming.contains_key(key)
    }

    fn get(&self, key: &Key) -> Option<&'a Resource> {
        match self.coming.get(key) {
            Some((_, resource)) => Some(resource),
            None => self.known.get(key)?.resource.as_deref(),
        }
    }

    /// A proxy leaves out an endpoint whose hop it can't find, so a hop that isn't there is an endpoint lost
    /// without a word. Both ends are looked at: services that come, and those behind zones that come.
    fn check_hops(&self, bad: &mut Vec<BadField>) {
        for (i, resource) in self.coming.values() {
            if let Spec::Service(service) = &resource.spec {
                for (j, zone, proxy) in self.missing_hops(service) {
                    let path = format!("resources[{i}].spec.endpoints[{j}].proxy");
                    let reason = format!(
                        "{proxy:?} is not a proxy of {zone}; add it to that zone's spec.proxies, before or in the same call"
                    );
                    bad.push(BadField { path, reason });
                }
            }
        }
        if !self.coming.keys().any(|key| key.kind == Kind::Zone) {
            return;
        }
        for (key, entry) in self.known {
            let Some(Spec::Service(service)) = entry.resource.as_ref().map(|r| &r.spec) else {
                continue;
            };
            if self.coming.contains_key(key) {
                continue;
            }
            for (j, zone, proxy) in self.missing_hops(service) {
                // Only what this write takes away is held against it.
                if let Some((i, _)) = self.coming.get(&zone) {
                    let path = format!("resources[{i}].spec.proxies");
                    let reason = format!(
                        "{proxy:?} is not among them, but {key} (spec.endpoints[{j}].proxy) is reached through it; keep it, or change that in the same call"
                    );
                    bad.push(BadField { path, reason });
                }
            }
        }
    }

    /// A label that no zone has binds every caller to its own zone, which a slip of the pen shouldn't do.
    fn check_residency(&self, bad: &mut Vec<BadField>) {
        for (i, resource) in self.coming.values() {
            let Spec::Service(service) = &resource.spec else {
                continue;
            };
            let Some(key) = &service.balance.within else {
                continue;
            };
            let known = self.known.keys().chain(self.coming.keys());
            let zones = known.filter(|known| known.kind == Kind::Zone);
            let has = |zone: &Key| match self.get(zone).map(|zone| &zone.spec) {
                Some(Spec::Zone(zone)) => zone.labels.contains_key(key),
                Some(_) | None => false,
            };
            for (path, zone) in service.balance.mode.zones() {
                let zone = Key {
                    kind: Kind::Zone,
                    name: zone.clone(),
                };
                // One that isn't there is told as such.
                if self.get(&zone).is_some() && !has(&zone) {
                    bad.push(BadField {
                        path: format!("resources[{i}].spec.loadBalancer.zoneFailover.{path}"),
                        reason: format!(
                            "{zone} has no label {key:?}, which spec.loadBalancer.zoneFailover.within binds requests to, so that it could serve nobody but its own callers; add the label to it, or take it out of the list"
                        ),
                    });
                }
            }
            if !zones.into_iter().any(has) {
                bad.push(BadField {
                    path: format!("resources[{i}].spec.loadBalancer.zoneFailover.within"),
                    reason: format!(
                        "{key:?} is not a label of any zone, so that none could help another; add it to spec.labels of the zones, before or in the same call"
                    ),
                });
            }
        }
    }

    /// A plugin can be named only where its kind is for. Both ends are looked at: what comes and names plugins, and what
    /// names plugins that come.
    fn check_plugins(&self, bad: &mut Vec<BadField>) {
        for (i, resource) in self.coming.values() {
            for (path, key, misfit) in self.misfits(resource) {
                bad.push(BadField {
                    path: format!("resources[{i}].{path}"),
                    reason: format!("{key} {misfit}"),
                });
            }
        }
        if !self.coming.keys().any(|key| key.kind == Kind::Plugin) {
            return;
        }
        for (key, entry) in self.known {
            let Some(resource) = entry.resource.as_ref().filter(|_| !self.coming.contains_key(key)) else {
                continue;
            };
            for (path, plugin, misfit) in self.misfits(resource) {
                // Only what this write makes of it is held against it.
                if let Some((i, _)) = self.coming.get(&plugin) {
                    bad.push(BadField {
                        path: format!("resources[{i}].spec.kind"),
                        reason: format!(
                            "{key} ({path}) names this plugin, which {misfit}; keep the kind, or change that in the same call"
                        ),
                    });
                }
            }
        }
    }

    /// Gateways that share a proxy have listeners that can stand beside each other, and routes hang on listeners that are
    /// there. Both ends are looked at: what comes, and what is there and stays.
    fn check_gateways(&self, bad: &mut Vec<BadField>) {
        for (key, (i, resource)) in &self.coming {
            if let Spec::Gateway(gateway) = &resource.spec {
                for (other, theirs) in self.gateways().filter(|(other, _)| *other != key) {
                    // Of two that come, the second is told.
                    let told = self.coming.get(other).is_some_and(|(j, _)| j > i);
                    if let Some((j, why)) = gateway.clash(theirs).filter(|_| !told) {
                        bad.push(BadField {
                            path: format!("resources[{i}].spec.listeners[{j}]"),
                            reason: format!("{why} ({other})"),
                        });
                    }
                }
            }
        }
        for (key, resource) in self.all() {
            let Spec::Route(route) = &resource.spec else {
                continue;
            };
            let gateway = |name: &Name| {
                let Spec::Gateway(gateway) = &self.get(&gateway_key(name))?.spec else {
                    return None;
                };
                Some(gateway)
            };
            let Some((at, why)) = route.missing_listener(gateway) else {
                continue;
            };
            if let Some((i, _)) = self.coming.get(key) {
                bad.push(BadField {
                    path: format!("resources[{i}].spec.parentRefs[{at}].sectionName"),
                    reason: why,
                });
            } else if let Some(Parent::Gateway { gateway, .. }) = route.parents.get(at)
                && let Some((i, _)) = self.coming.get(&gateway_key(gateway))
            {
                // Only what this write takes away is held against it.
                bad.push(BadField {
                    path: format!("resources[{i}].spec.listeners"),
                    reason: format!(
                        "{key} (spec.parentRefs[{at}].sectionName) names a listener that isn't among them; keep it, or change that in the same call"
                    ),
                });
            }
        }
    }

    fn gateways(&self) -> impl Iterator<Item = (&Key, &Gateway)> {
        self.all().filter_map(|(key, resource)| {
            let Spec::Gateway(gateway) = &resource.spec else {
                return None;
            };
            Some((key, gateway))
        })
    }

    /// Plugins that a resource names where their kind can't be: the field, the plugin, and what is wrong.
    fn misfits(&self, resource: &Resource) -> Vec<(String, Key, String)> {
        let named = resource.spec.plugins().into_iter();
        named
            .filter_map(|(path, name, place)| {
                let key = Key {
                    kind: Kind::Plugin,
                    name: name.clone(),
                };
                // A plugin that isn't there is named as a reference already.
                let Spec::Plugin(plugin) = &self.get(&key)?.spec else {
                    return None;
                };
                let misfit = place.misfit(plugin.kind)?;
                Some((path, key, misfit))
            })
            .collect()
    }

    /// A level that its policy hasn't would be held by nobody.
    fn check_levels(&self, bad: &mut Vec<BadField>) {
        for (i, resource) in self.coming.values() {
            let Spec::DegradationOverride(held) = &resource.spec else {
                continue;
            };
            let key = Key {
                kind: Kind::DegradationPolicy,
                name: held.policy.clone(),
            };
            // A policy that isn't there is named as a reference already.
            let Some(Spec::DegradationPolicy(policy)) = self.get(&key).map(|found| &found.spec) else {
                continue;
            };
            if policy.level(held.level.as_str()).is_none() {
                let levels: Vec<_> = policy.levels.iter().map(|level| level.name.as_str()).collect();
                bad.push(BadField {
                    path: format!("resources[{i}].spec.level"),
                    reason: format!(
                        "{:?} is not a level of {key}; want one of {}",
                        held.level.as_str(),
                        levels.join(", ")
                    ),
                });
            }
        }
    }

    /// Where a key stands in two sets of flags, which of them holds would be for their names to decide.
    fn check_flags(&self, bad: &mut Vec<BadField>) {
        if !self.coming.keys().any(|key| key.kind == Kind::FeatureFlags) {
            return;
        }
        let known = self
            .known
            .iter()
            .filter(|(key, _)| !self.coming.contains_key(key));
        let mut owners: HashMap<&str, &Key> = HashMap::new();
        for (key, entry) in known {
            if let Some(Spec::FeatureFlags(flags)) = entry.resource.as_ref().map(|r| &r.spec) {
                owners.extend(flags.set.keys().map(|flag| (flag, key)));
            }
        }
        for (key, (i, resource)) in &self.coming {
            let Spec::FeatureFlags(flags) = &resource.spec else {
                continue;
            };
            for flag in flags.set.keys() {
                match owners.entry(flag) {
                    Entry::Vacant(free) => {
                        free.insert(key);
                    }
                    Entry::Occupied(taken) => bad.push(BadField {
                        path: format!("resources[{i}].spec.flags.{flag}"),
                        reason: format!(
                            "stands in {} already; want each key in one FeatureFlags only",
                            taken.get()
                        ),
                    }),
                }
            }
        }
    }

    /// Endpoints whose proxy isn't in their zone: place, zone and proxy.
    fn missing_hops<'s>(&self, service: &'s Service) -> Vec<(usize, Key, &'s str)> {
        let hops = service.endpoints.iter().enumerate();
        hops.filter_map(|(j, endpoint)| {
            let proxy = endpoint.proxy.as_ref()?;
            let zone = Key {
                kind: Kind::Zone,
                name: endpoint.zone.clone(),
            };
            // A zone that isn't there is named as a reference already.
            let Spec::Zone(found) = &self.get(&zone)?.spec else {
                return None;
            };
            let there = found.proxies.iter().any(|p| p.name == *proxy);
            (!there).then_some((j, zone, proxy.as_str()))
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Entry as KnownEntry;

    const ZONE: &str = "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {proxies: [{name: NAME, address: \"127.0.0.1:1\"}]}\n";
    const SERVICE: &str = "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: s}\nspec: {endpoints: [{address: \"127.0.0.1:2\", zone: a, proxy: a1}]}\n";

    pub(super) fn resources(yaml: &str) -> Vec<Arc<Resource>> {
        let wire = leeward_proto::manifest::parse("test", yaml).unwrap();
        wire.iter()
            .map(|r| Arc::new(leeward_proto::parse(r).unwrap()))
            .collect()
    }

    pub(super) fn known(resources: Vec<Arc<Resource>>) -> Known {
        let entry = |r: Arc<Resource>| KnownEntry {
            revision: 1,
            resource: Some(r),
        };
        resources.into_iter().map(|r| (r.key(), entry(r))).collect()
    }

    #[track_caller]
    pub(super) fn check(known: &Known, coming: &str, want: &str) {
        let found = references(known, &resources(coming)).map_err(|e| e.to_string());
        assert_eq!(found.err().unwrap_or_default(), want);
    }

    #[test]
    fn every_hop_of_the_world_after_is_there() {
        let with = |name: &str| ZONE.replace("NAME", name);
        let nothing = Known::new();
        check(&nothing, &format!("{}---\n{SERVICE}", with("a1")), "");
        let want = "resources[1].spec.endpoints[0].proxy: \"a1\" is not a proxy of Zone/a; add it to that zone's spec.proxies, before or in the same call";
        check(&nothing, &format!("{}---\n{SERVICE}", with("a2")), want);
        let both = known(resources(&format!("{}---\n{SERVICE}", with("a1"))));
        let want = "resources[0].spec.proxies: \"a1\" is not among them, but Service/s (spec.endpoints[0].proxy) is reached through it; keep it, or change that in the same call";
        check(&both, &with("a2"), want);
        let moved = SERVICE.replace("proxy: a1", "proxy: a2");
        check(&both, &format!("{}---\n{moved}", with("a2")), "");
    }

    #[test]
    fn a_reference_to_nothing_is_named_with_its_field() {
        let want =
            "resources[0].spec.endpoints[0].zone: there is no Zone/a; apply it first or in the same call";
        check(&Known::new(), SERVICE, want);
    }

    #[test]
    fn a_circuit_is_held_for_a_day_at_most() {
        let text = "apiVersion: leeward.dev/v1\nkind: CircuitOverride\nmetadata: {name: o}\nspec: {service: s, mode: ForceOpen, expireTime: \"2026-11-24T22:00:00Z\"}\n";
        let held = resources(text);
        let end = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_557_600);
        let day = Duration::from_secs(24 * 3600);
        let told = |now| overrides(&held, now).err().map(|e| e.to_string());
        assert_eq!(told(end - day), None);
        assert_eq!(told(end - Duration::from_secs(1)), None);
        assert_eq!(
            told(end - day - Duration::from_secs(1)).as_deref(),
            Some(
                "resources[0].spec.expireTime: 2026-11-24T22:00:00Z is more than 24h ahead; want a time within 24h of 2026-11-23T21:59:59Z, which it is now"
            )
        );
        assert_eq!(
            told(end).as_deref(),
            Some(
                "resources[0].spec.expireTime: 2026-11-24T22:00:00Z is not ahead; want a time within 24h of 2026-11-24T22:00:00Z, which it is now"
            )
        );
    }

    #[test]
    fn a_zone_is_drained_for_a_week_at_most_and_one_that_was_drained_may_be_written_again() {
        let text = "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {drain: {startTime: \"2026-11-17T22:00:00Z\", expireTime: \"2026-11-24T22:00:00Z\"}}\n";
        let drained = resources(text);
        let end = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_557_600);
        let told = |now| overrides(&drained, now).err().map(|e| e.to_string());
        assert_eq!(told(end - ZoneDrain::LONGEST), None);
        assert_eq!(told(end), None, "it has ended, and its share comes back");
        assert_eq!(told(end + ZoneDrain::LONGEST), None);
        assert_eq!(
            told(end - ZoneDrain::LONGEST - Duration::from_secs(1)).as_deref(),
            Some(
                "resources[0].spec.drain.expireTime: 2026-11-24T22:00:00Z is more than 7d ahead; want a time within 7d of 2026-11-17T21:59:59Z, which it is now"
            )
        );
    }

    #[test]
    fn a_label_that_keeps_requests_at_home_is_one_of_a_zone() {
        let bound = "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: s}\nspec: {loadBalancer: {zoneFailover: {within: region}}}\n";
        let zone = |spec: &str| {
            format!("apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: a}}\nspec: {{{spec}}}\n")
        };
        let (plain, labelled) = (zone(""), zone("labels: {region: eu}"));
        let want = "resources[0].spec.loadBalancer.zoneFailover.within: \"region\" is not a label of any zone, so that none could help another; add it to spec.labels of the zones, before or in the same call";
        check(&known(resources(&plain)), bound, want);
        check(&known(resources(&labelled)), bound, "");
        check(&Known::new(), &format!("{bound}---\n{labelled}"), "");
        // The zone that comes with it counts, not the one before.
        check(
            &known(resources(&labelled)),
            &format!("{bound}---\n{plain}"),
            want,
        );
    }

    #[test]
    fn a_zone_that_is_to_serve_many_has_the_label_that_binds_them() {
        let zone = |name: &str, spec: &str| {
            format!(
                "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
            )
        };
        let service = |mode: &str| {
            format!(
                "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{loadBalancer: {{zoneFailover: {{within: region, {mode}}}}}}}\n"
            )
        };
        let zones = zone("a", "labels: {region: eu}") + &zone("b", "");
        let lists = [
            ("activePassive: {zones: [a, b]}", "activePassive.zones[1]"),
            (
                "activeActive: {zones: [{zone: b}, {zone: a}]}",
                "activeActive.zones[0].zone",
            ),
        ];
        for (mode, path) in lists {
            let want = format!(
                "resources[0].spec.loadBalancer.zoneFailover.{path}: Zone/b has no label \"region\", which spec.loadBalancer.zoneFailover.within binds requests to, so that it could serve nobody but its own callers; add the label to it, or take it out of the list"
            );
            check(&Known::new(), &(service(mode) + &zones), &want);
        }
        let fine = service("activePassive: {zones: [a]}");
        check(&Known::new(), &(fine + &zones), "");
        // One that isn't there at all is a reference to nothing.
        let stray = service("activePassive: {zones: [a, x]}");
        let want = "resources[0].spec.loadBalancer.zoneFailover.activePassive.zones[1]: there is no Zone/x; apply it first or in the same call";
        check(&Known::new(), &(stray + &zones), want);
    }

    #[test]
    fn a_plugin_is_named_only_where_its_kind_is_for() {
        let plugin = |kind: &str, on_fault: &str| {
            format!(
                "apiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: p}}\nspec: {{kind: {kind}, source: {{file: /p}}, onFault: {on_fault}}}\n"
            )
        };
        let (fallback, filter, router) = (
            plugin("Fallback", "Fail"),
            plugin("Filter", "FailOpen"),
            plugin("Router", "FailOpen"),
        );
        let service = "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: s}\nspec: {}\n";
        let route = |rule: &str| {
            format!(
                "apiVersion: leeward.dev/v1\nkind: Route\nmetadata: {{name: r}}\nspec: {{hostnames: [a], rules: [{{backendRefs: [{{service: s}}], {rule}}}]}}\n"
            )
        };
        let ladder = "apiVersion: leeward.dev/v1\nkind: FallbackPolicy\nmetadata: {name: f}\nspec: {rungs: [{plugin: {plugin: p}}]}\n";
        let before = |plugin: &str| known(resources(&format!("{plugin}---\n{service}")));

        let filtered = route("filters: [{plugin: p}]");
        check(&before(&filter), &filtered, "");
        let want = "resources[0].spec.rules[0].filters[0].plugin: Plugin/p is of kind Fallback; want one of kind Filter or ProxyWasm";
        check(&before(&fallback), &filtered, want);
        let routed = route("router: {plugin: p}");
        check(&before(&router), &routed, "");
        let want =
            "resources[0].spec.rules[0].router.plugin: Plugin/p is of kind Filter; want one of kind Router";
        check(&before(&filter), &routed, want);
        check(&before(&fallback), ladder, "");
        let want = "resources[0].spec.rungs[0].plugin.plugin: Plugin/p is of kind Router; want one of kind Fallback or WasiHttp";
        check(&before(&router), ladder, want);
        // What comes with it counts, not what was there before.
        check(&before(&router), &format!("{ladder}---\n{fallback}"), "");

        // A plugin that changes its kind under those who name it.
        let named = known(resources(&format!("{fallback}---\n{ladder}")));
        let want = "resources[0].spec.kind: FallbackPolicy/f (spec.rungs[0].plugin.plugin) names this plugin, which is of kind Filter; want one of kind Fallback or WasiHttp; keep the kind, or change that in the same call";
        check(&named, &filter, want);
        check(&named, &plugin("WasiHttp", "NextRung"), "");
        let other = ladder.replace("{plugin: {plugin: p}}", "{fail: {}}");
        check(&named, &format!("{filter}---\n{other}"), "");
    }

    #[test]
    fn gateways_share_no_port_and_routes_hang_on_listeners_that_are_there() {
        let zone = "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {}\n---\napiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: s}\nspec: {}\n";
        let gateway = |name: &str, listener: &str, port: u16| {
            format!(
                "apiVersion: leeward.dev/v1\nkind: Gateway\nmetadata: {{name: {name}}}\nspec: {{zones: [a], listeners: [{{name: {listener}, port: {port}, protocol: HTTP}}]}}\n"
            )
        };
        let route = |listener: &str| {
            format!(
                "apiVersion: leeward.dev/v1\nkind: Route\nmetadata: {{name: r}}\nspec: {{hostnames: [a], rules: [{{backendRefs: [{{service: s}}]}}], parentRefs: [{{name: g, sectionName: {listener}}}]}}\n"
            )
        };
        let before = known(resources(&format!("{zone}---\n{}", gateway("g", "l", 80))));
        let clash = "resources[0].spec.listeners[0]: is for the same address, port and hostname as the listener l; want another hostname or port (Gateway/g)";
        check(&before, &gateway("h", "x", 80), clash);
        check(&before, &gateway("h", "x", 81), "");
        check(
            &before,
            &format!("{}---\n{}", gateway("h", "x", 80), gateway("g", "l", 81)),
            "",
        );
        let both = format!("{}---\n{}", gateway("h", "x", 82), gateway("i", "x", 82));
        check(
            &before,
            &both,
            &clash
                .replace("[0].spec", "[1].spec")
                .replace("listener l", "listener x")
                .replace("/g)", "/h)"),
        );
        check(&before, &route("l"), "");
        let missing = "resources[0].spec.parentRefs[0].sectionName: \"m\" is not a listener of Gateway/g; want one of l";
        check(&before, &route("m"), missing);
        let hangs = known(resources(&format!(
            "{zone}---\n{}---\n{}",
            gateway("g", "l", 80),
            route("l")
        )));
        let taken = "resources[0].spec.listeners: Route/r (spec.parentRefs[0].sectionName) names a listener that isn't among them; keep it, or change that in the same call";
        check(&hangs, &gateway("g", "m", 80), taken);
        check(
            &hangs,
            &format!("{}---\n{}", gateway("g", "m", 80), route("m")),
            "",
        );
    }

    const LEVELS: &str = "apiVersion: leeward.dev/v1\nkind: DegradationPolicy\nmetadata: {name: shop}\nspec: {levels: [{name: normal}, {name: reduced}, {name: core-only}]}\n";
    const LEVEL: &str = "apiVersion: leeward.dev/v1\nkind: DegradationOverride\nmetadata: {name: o}\nspec: {policy: shop, level: LEVEL, expireTime: \"2026-11-24T22:00:00Z\"}\n";

    #[test]
    fn a_level_is_held_that_the_policy_will_have() {
        let held = |level: &str| LEVEL.replace("LEVEL", level);
        let missing = "resources[0].spec.policy: there is no DegradationPolicy/shop; apply it first or in the same call";
        check(&Known::new(), &held("reduced"), missing);
        let want = "resources[0].spec.level: \"gone\" is not a level of DegradationPolicy/shop; want one of normal, reduced, core-only";
        let before = known(resources(LEVELS));
        check(&before, &held("gone"), want);
        check(&before, &held("core-only"), "");
        // The policy that comes with it counts, not the one before.
        let renamed = LEVELS.replace("reduced", "gone");
        check(&before, &format!("{}---\n{renamed}", held("gone")), "");
        let want = want
            .replace("gone", "reduced")
            .replace("normal, reduced", "normal, gone");
        check(&before, &format!("{}---\n{renamed}", held("reduced")), &want);
    }

    #[test]
    fn a_flag_stands_in_one_set_only() {
        let flags = |name: &str, flags: &[&str]| {
            let flags: Vec<_> = flags
                .iter()
                .map(|flag| format!("{flag}: {{state: ENABLED, variants: {{on: true}}, defaultVariant: on}}"))
                .collect();
            format!(
                "apiVersion: leeward.dev/v1\nkind: FeatureFlags\nmetadata: {{name: {name}}}\nspec: {{flags: {{{}}}}}\n",
                flags.join(", ")
            )
        };
        let before = known(resources(&flags("a", &["x", "y.z"])));
        let want = "resources[0].spec.flags.y.z: stands in FeatureFlags/a already; want each key in one FeatureFlags only";
        check(&before, &flags("b", &["w", "y.z"]), want);
        check(&before, &flags("b", &["w"]), "");
        // Another version of the same set, and a flag that moves in one call.
        check(&before, &flags("a", &["x", "w"]), "");
        let moved = format!("{}---\n{}", flags("a", &["x"]), flags("b", &["y.z"]));
        check(&before, &moved, "");
        let twice = format!("{}---\n{}", flags("b", &["w"]), flags("c", &["w"]));
        let want = "resources[1].spec.flags.w: stands in FeatureFlags/b already; want each key in one FeatureFlags only";
        check(&before, &twice, want);
    }

    #[test]
    fn a_level_is_held_for_a_week_at_most() {
        let held = resources(&LEVEL.replace("LEVEL", "reduced"));
        let end = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_557_600);
        let week = Duration::from_secs(7 * 24 * 3600);
        let told = |now| overrides(&held, now).err().map(|e| e.to_string());
        assert_eq!(told(end - week), None);
        assert_eq!(
            told(end - week - Duration::from_secs(1)).as_deref(),
            Some(
                "resources[0].spec.expireTime: 2026-11-24T22:00:00Z is more than 7d ahead; want a time within 7d of 2026-11-17T21:59:59Z, which it is now"
            )
        );
        assert_eq!(
            told(end).as_deref(),
            Some(
                "resources[0].spec.expireTime: 2026-11-24T22:00:00Z is not ahead; want a time within 7d of 2026-11-24T22:00:00Z, which it is now"
            )
        );
    }
}
