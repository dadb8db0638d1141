//! Plugins, and where rules name them.

use super::super::words;
use super::degradation::condition;
use super::fields::Fields;
use crate::v1;

pub(super) fn plugin(f: &mut Fields<'_>) -> v1::Plugin {
    v1::Plugin {
        kind: f.choice("kind", words::PLUGIN_KIND),
        source: f.object("source", source),
        limits: f.object("limits", limits),
        on_fault: f.choice("onFault", words::ON_FAULT),
        when: f.object("when", condition),
        access: f.object("access", |f| v1::PluginAccess {
            services: f.text_list("services"),
            imports: f.text_list("imports"),
        }),
        quarantine: f.object("quarantine", |f| v1::PluginQuarantine {
            faults: f.small("faults"),
            window: f.duration("window"),
            duration: f.duration("duration"),
        }),
        fresh_instance: f.optional_bool("freshInstance").unwrap_or_default(),
        canary: f.object("canary", |f| v1::PluginCanary {
            source: f.object("source", source),
            percent: f.or_zero("percent"),
            when: f.object("when", condition),
        }),
        config: f.text("config"),
    }
}

fn source(f: &mut Fields<'_>) -> v1::PluginSource {
    v1::PluginSource {
        file: f.text("file"),
        sha256: f.text("sha256"),
        oci: f.object("oci", |f| v1::OciSource {
            image: f.text("image"),
            refresh: f.duration("refresh"),
            insecure: f.optional_bool("insecure").unwrap_or_default(),
        }),
        minisign_key: f.text("minisignKey"),
        resolved_sha256: f.text("resolvedSha256"),
    }
}

fn limits(f: &mut Fields<'_>) -> v1::PluginLimits {
    v1::PluginLimits {
        memory_bytes: f.size("memory"),
        call_timeout: f.duration("callTimeout"),
        max_instances: f.small("maxInstances"),
        max_body_bytes: f.size("maxBody"),
        table_elements: f.small("tableElements"),
        max_calls: f.optional_small("maxCalls"),
        log_lines: f.optional_small("logLines"),
        store_bytes: f.optional_size("storeBytes"),
        store_entries: f.optional_small("storeEntries"),
    }
}

pub(super) fn filter(f: &mut Fields<'_>) -> v1::FilterRef {
    v1::FilterRef {
        plugin: f.text("plugin"),
        config: f.text("config"),
        when: f.object("when", condition),
    }
}
