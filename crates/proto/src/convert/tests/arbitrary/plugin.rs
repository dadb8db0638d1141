//! Plugins, and where rules name them, at random.

use super::degradation::{condition, names};
use super::{HOUR, SECOND, name, within};
use leeward_policy::Spec;
use leeward_policy::model::{
    FilterRef, OnFault, Plugin, PluginAccess, PluginCanary, PluginFrom, PluginKind, PluginLimits,
    PluginSource, Quarantine, RouterRef,
};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use std::sync::Arc;

fn config() -> impl Strategy<Value = Arc<str>> {
    "(|true|[a-z{}: é\n]{0,20})".prop_map(Arc::from)
}

fn source() -> impl Strategy<Value = PluginSource> {
    let images = [
        ("localhost/a", true),
        ("127.0.0.9:5000/a/b:1.2", true),
        ("[::1]:5000/a", true),
        ("registry.example/shop/sorry__x.y-z:V_1", false),
    ];
    let oci = (
        select(images.to_vec()),
        option::of(within(10 * SECOND, 24 * HOUR)),
        any::<bool>(),
        option::of(any::<[u8; 32]>()),
    );
    let oci = oci.prop_map(
        |((image, loopback), refresh, insecure, resolved)| PluginFrom::Oci {
            image: image.into(),
            refresh,
            insecure: insecure && loopback,
            resolved,
        },
    );
    let from = prop_oneof![
        "/[a-z/ ]{1,9}".prop_map(|file| PluginFrom::File(file.into())),
        Just(PluginFrom::Store),
        oci,
    ];
    let key = "RW[Q-T][A-Za-z0-9+/]{53}".prop_map(Box::from);
    (from, any::<[u8; 32]>(), any::<bool>(), option::of(key)).prop_map(
        |(from, digest, checked, minisign_key)| PluginSource {
            sha256: (checked || from == PluginFrom::Store).then_some(digest),
            from,
            minisign_key,
        },
    )
}

fn limits() -> impl Strategy<Value = PluginLimits> {
    let sizes = (64u64 << 10..=256 << 20, 0..=1u64 << 20, 0..=256u64 << 20);
    let counts = (
        1..=256u32,
        100..=1_000_000u32,
        0..=64u32,
        0..=10_000u32,
        0..=1_000_000u32,
    );
    (sizes, within(1, 10 * SECOND), counts).prop_map(|(sizes, call_timeout, counts)| PluginLimits {
        memory_bytes: sizes.0,
        call_timeout,
        max_instances: counts.0,
        max_body_bytes: sizes.1,
        table_elements: counts.1,
        max_calls: counts.2,
        log_lines: counts.3,
        store_bytes: sizes.2,
        store_entries: counts.4,
    })
}

fn access(kind: PluginKind) -> impl Strategy<Value = PluginAccess> {
    let imports = match kind {
        PluginKind::ProxyWasm => ["env.proxy_log", "env.*", "wasi_snapshot_preview1.fd_write"],
        PluginKind::Fallback | PluginKind::Filter | PluginKind::Router | PluginKind::WasiHttp => {
            ["wasi:random/random", "wasi:http/*", "leeward:plugin/host"]
        }
    };
    let imports: Vec<Box<str>> = imports.map(Box::from).to_vec();
    (names(4), subsequence(imports, 0..=3)).prop_map(|(services, imports)| PluginAccess { services, imports })
}

fn quarantine() -> impl Strategy<Value = Quarantine> {
    let time = || within(SECOND, HOUR);
    (1..=1000u32, time(), time()).prop_map(|(faults, window, duration)| Quarantine {
        faults,
        window,
        duration,
    })
}

fn canary() -> impl Strategy<Value = PluginCanary> {
    (source(), 0..=100u32, option::of(condition())).prop_map(|(source, percent, when)| PluginCanary {
        source,
        percent,
        when,
    })
}

pub(super) fn plugin() -> impl Strategy<Value = Spec> {
    let of_kind = |kind: PluginKind| {
        let on_fault = if kind.is_rung() {
            [OnFault::NextRung, OnFault::Fail]
        } else {
            [OnFault::FailOpen, OnFault::FailClosed]
        };
        (Just(kind), select(on_fault.to_vec()), access(kind))
    };
    let kind = select(PluginKind::ALL.to_vec()).prop_flat_map(of_kind);
    (
        kind,
        source(),
        config(),
        limits(),
        quarantine(),
        any::<bool>(),
        option::of(condition()),
        option::of(canary()),
    )
        .prop_map(
            |((kind, on_fault, access), source, config, limits, quarantine, fresh, when, canary)| {
                Spec::Plugin(Plugin {
                    kind,
                    source,
                    config,
                    limits,
                    access,
                    on_fault,
                    quarantine,
                    fresh_instance: fresh && kind != PluginKind::ProxyWasm,
                    when,
                    canary,
                })
            },
        )
}

pub(super) fn filter() -> impl Strategy<Value = FilterRef> {
    (name(), config(), option::of(condition())).prop_map(|(plugin, config, when)| FilterRef {
        plugin,
        config,
        when,
    })
}

pub(super) fn router() -> impl Strategy<Value = RouterRef> {
    (name(), config()).prop_map(|(plugin, config)| RouterRef { plugin, config })
}
