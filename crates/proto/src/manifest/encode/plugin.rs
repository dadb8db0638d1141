//! Plugins, and where rules name them.

use super::super::words::{self, word};
use super::degradation::condition;
use super::{duration, fields, said};
use crate::v1;
use serde_json::{Value, json};

pub(super) fn plugin(plugin: &v1::Plugin) -> Value {
    fields([
        ("kind", json!(word(words::PLUGIN_KIND, plugin.kind))),
        ("source", json!(plugin.source.as_ref().map(source))),
        ("config", json!(plugin.config)),
        ("limits", json!(plugin.limits.as_ref().map(limits))),
        ("access", json!(plugin.access.as_ref().map(access))),
        ("onFault", json!(word(words::ON_FAULT, plugin.on_fault))),
        ("quarantine", json!(plugin.quarantine.as_ref().map(quarantine))),
        ("freshInstance", json!(plugin.fresh_instance)),
        ("when", condition(plugin.when.as_ref())),
        ("canary", json!(plugin.canary.as_ref().map(canary))),
    ])
}

fn source(source: &v1::PluginSource) -> Value {
    let oci = source.oci.as_ref().map(|oci| {
        fields([
            ("image", json!(oci.image)),
            ("refresh", duration(oci.refresh.as_ref())),
            ("insecure", json!(oci.insecure)),
        ])
    });
    fields([
        ("file", json!(source.file)),
        ("oci", json!(oci)),
        ("sha256", json!(source.sha256)),
        ("minisignKey", json!(source.minisign_key)),
        ("resolvedSha256", json!(source.resolved_sha256)),
    ])
}

fn limits(limits: &v1::PluginLimits) -> Value {
    let mut object = fields([
        ("memory", json!(limits.memory_bytes)),
        ("callTimeout", duration(limits.call_timeout.as_ref())),
        ("maxInstances", json!(limits.max_instances)),
        ("maxBody", json!(limits.max_body_bytes)),
        ("tableElements", json!(limits.table_elements)),
    ]);
    said(&mut object, "maxCalls", limits.max_calls);
    said(&mut object, "logLines", limits.log_lines);
    said(&mut object, "storeBytes", limits.store_bytes);
    said(&mut object, "storeEntries", limits.store_entries);
    object
}

fn access(access: &v1::PluginAccess) -> Value {
    fields([
        ("services", json!(access.services)),
        ("imports", json!(access.imports)),
    ])
}

fn quarantine(quarantine: &v1::PluginQuarantine) -> Value {
    fields([
        ("faults", json!(quarantine.faults)),
        ("window", duration(quarantine.window.as_ref())),
        ("duration", duration(quarantine.duration.as_ref())),
    ])
}

fn canary(canary: &v1::PluginCanary) -> Value {
    fields([
        ("source", json!(canary.source.as_ref().map(source))),
        ("percent", json!(canary.percent)),
        ("when", condition(canary.when.as_ref())),
    ])
}

pub(super) fn filter(filter: &v1::FilterRef) -> Value {
    fields([
        ("plugin", json!(filter.plugin)),
        ("config", json!(filter.config)),
        ("when", condition(filter.when.as_ref())),
    ])
}

pub(super) fn router(router: &v1::RouterRef) -> Value {
    fields([("plugin", json!(router.plugin)), ("config", json!(router.config))])
}
