//! Plugins, and where rules name them, on the wire.

use super::degradation::condition;
use super::{duration, names, text};
use crate::v1;
use leeward_policy::model::{
    FilterRef, OnFault, Plugin, PluginAccess, PluginCanary, PluginFrom, PluginKind, PluginLimits,
    PluginSource, Quarantine, RouterRef,
};

pub(super) fn plugin(plugin: &Plugin) -> v1::Plugin {
    v1::Plugin {
        kind: kind(plugin.kind).into(),
        source: Some(source(&plugin.source)),
        limits: Some(limits(&plugin.limits)),
        on_fault: on_fault(plugin.on_fault).into(),
        when: plugin.when.as_ref().map(condition),
        access: (plugin.access != PluginAccess::default()).then(|| access(&plugin.access)),
        quarantine: Some(quarantine(&plugin.quarantine)),
        fresh_instance: plugin.fresh_instance,
        canary: plugin.canary.as_ref().map(canary),
        config: plugin.config.to_string(),
    }
}

const fn kind(kind: PluginKind) -> v1::PluginKind {
    match kind {
        PluginKind::Fallback => v1::PluginKind::Fallback,
        PluginKind::Filter => v1::PluginKind::Filter,
        PluginKind::Router => v1::PluginKind::Router,
        PluginKind::WasiHttp => v1::PluginKind::WasiHttp,
        PluginKind::ProxyWasm => v1::PluginKind::ProxyWasm,
    }
}

const fn on_fault(on_fault: OnFault) -> v1::OnFault {
    match on_fault {
        OnFault::NextRung => v1::OnFault::NextRung,
        OnFault::Fail => v1::OnFault::Fail,
        OnFault::FailOpen => v1::OnFault::FailOpen,
        OnFault::FailClosed => v1::OnFault::FailClosed,
    }
}

fn source(source: &PluginSource) -> v1::PluginSource {
    let hex = |digest: [u8; 32]| digest.iter().map(|b| format!("{b:02x}")).collect();
    let (file, oci, resolved) = match &source.from {
        PluginFrom::File(file) => (file.to_string(), None, None),
        PluginFrom::Store => (String::new(), None, None),
        PluginFrom::Oci {
            image,
            refresh,
            insecure,
            resolved,
        } => {
            let oci = v1::OciSource {
                image: image.to_string(),
                refresh: refresh.and_then(duration),
                insecure: *insecure,
            };
            (String::new(), Some(oci), *resolved)
        }
    };
    v1::PluginSource {
        file,
        sha256: source.sha256.map(hex).unwrap_or_default(),
        oci,
        minisign_key: text(source.minisign_key.as_deref()),
        resolved_sha256: resolved.map(hex).unwrap_or_default(),
    }
}

fn limits(limits: &PluginLimits) -> v1::PluginLimits {
    v1::PluginLimits {
        memory_bytes: limits.memory_bytes,
        call_timeout: duration(limits.call_timeout),
        max_instances: limits.max_instances,
        max_body_bytes: limits.max_body_bytes,
        table_elements: limits.table_elements,
        max_calls: Some(limits.max_calls),
        log_lines: Some(limits.log_lines),
        store_bytes: Some(limits.store_bytes),
        store_entries: Some(limits.store_entries),
    }
}

fn access(access: &PluginAccess) -> v1::PluginAccess {
    v1::PluginAccess {
        services: names(&access.services),
        imports: access.imports.iter().map(|pattern| pattern.to_string()).collect(),
    }
}

fn quarantine(quarantine: &Quarantine) -> v1::PluginQuarantine {
    v1::PluginQuarantine {
        faults: quarantine.faults,
        window: duration(quarantine.window),
        duration: duration(quarantine.duration),
    }
}

fn canary(canary: &PluginCanary) -> v1::PluginCanary {
    v1::PluginCanary {
        source: Some(source(&canary.source)),
        percent: canary.percent,
        when: canary.when.as_ref().map(condition),
    }
}

pub(super) fn filter(filter: &FilterRef) -> v1::FilterRef {
    v1::FilterRef {
        plugin: filter.plugin.to_string(),
        config: filter.config.to_string(),
        when: filter.when.as_ref().map(condition),
    }
}

pub(super) fn router(router: &RouterRef) -> v1::RouterRef {
    v1::RouterRef {
        plugin: router.plugin.to_string(),
        config: router.config.to_string(),
    }
}
