//! Plugins, and where rules and rungs name them.

use super::degradation::flag_condition;
use super::text::{absolute_path, authority, bounded};
use super::{DAY, HOUR, KIB, MS, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::Name;
use leeward_policy::model::{
    FilterRef, OnFault, Plugin, PluginAccess, PluginCanary, PluginFrom, PluginKind, PluginLimits,
    PluginPlace, PluginSource, Quarantine, RouterRef,
};
use std::net::IpAddr;
use std::sync::Arc;

const WANT_KIND: &str = "want Fallback, Filter, Router, WasiHttp or ProxyWasm";
/// Longest pattern for imports, and longest name of an image, in bytes.
const MAX_TEXT: usize = 512;

pub(super) fn plugin(f: &mut Fields, wire: &v1::Plugin) -> Option<Plugin> {
    let kind = kind(f, wire.kind);
    let mut s = f.section("spec");
    let source = source(&mut s.section("source"), wire.source.as_ref());
    let config = config(&mut s, &wire.config);
    let limits = limits(
        &mut s.section("limits"),
        &wire.limits.unwrap_or_default(),
        // Of an unknown kind the bounds are looked at all the same.
        kind.unwrap_or(PluginKind::Fallback),
    );
    let access = match &wire.access {
        None => PluginAccess::default(),
        Some(wire) => access(&mut s.section("access"), wire, kind),
    };
    let on_fault = on_fault(&mut s, wire.on_fault, kind);
    let quarantine = match &wire.quarantine {
        None => Quarantine::default(),
        Some(wire) => quarantine(&mut s.section("quarantine"), wire),
    };
    if wire.fresh_instance && kind == Some(PluginKind::ProxyWasm) {
        s.reject::<()>(
            "freshInstance",
            "is true, but the virtual machine of a ProxyWasm plugin lives on; leave it out",
        );
    }
    let when = flag_condition(&mut s.section("when"), wire.when.as_ref());
    let canary = wire
        .canary
        .as_ref()
        .map(|wire| canary(&mut s.section("canary"), wire));
    Some(Plugin {
        kind: kind?,
        source: source?,
        config,
        limits,
        access,
        on_fault: on_fault?,
        quarantine,
        fresh_instance: wire.fresh_instance,
        when,
        canary: match canary {
            None => None,
            Some(canary) => Some(canary?),
        },
    })
}

fn kind(f: &mut Fields, wire: i32) -> Option<PluginKind> {
    match v1::PluginKind::try_from(wire) {
        Ok(v1::PluginKind::Fallback) => Some(PluginKind::Fallback),
        Ok(v1::PluginKind::Filter) => Some(PluginKind::Filter),
        Ok(v1::PluginKind::Router) => Some(PluginKind::Router),
        Ok(v1::PluginKind::WasiHttp) => Some(PluginKind::WasiHttp),
        Ok(v1::PluginKind::ProxyWasm) => Some(PluginKind::ProxyWasm),
        Ok(v1::PluginKind::Unspecified) => f.reject("spec.kind", format!("is missing; {WANT_KIND}")),
        Err(_) => f.reject("spec.kind", format!("{wire} is not known; {WANT_KIND}")),
    }
}

fn source(s: &mut Section<'_>, wire: Option<&v1::PluginSource>) -> Option<PluginSource> {
    let empty = v1::PluginSource::default();
    let wire = wire.unwrap_or(&empty);
    let sha256 = digest(s, "sha256", &wire.sha256);
    let from = match (wire.file.as_str(), &wire.oci) {
        ("", None) if wire.sha256.is_empty() => s.reject_here(
            "doesn't say where the module is; want file, oci, or the sha256 of what was pushed to the control plane",
        ),
        ("", None) => Some(PluginFrom::Store),
        ("", Some(oci_wire)) => {
            let resolved = digest(s, "resolvedSha256", &wire.resolved_sha256);
            oci(&mut s.section("oci"), oci_wire, resolved)
        }
        (text, None) => {
            let at = s.at("file");
            let file = absolute_path(s.fields(), &at, text, "/etc/leeward/p.wasm");
            file.map(|file| PluginFrom::File(file.into()))
        }
        (_, Some(_)) => s.reject("oci", "stands beside file; want one of them"),
    };
    let minisign_key = match wire.minisign_key.as_str() {
        "" => None,
        text if is_minisign_key(text) => Some(text.into()),
        text => s.reject(
            "minisignKey",
            format!(
                "{:?} is not a minisign public key; want the line of base64 from its file, 56 characters that begin with RW",
                text.chars().take(80).collect::<String>()
            ),
        ),
    };
    Some(PluginSource {
        from: from?,
        sha256,
        minisign_key,
    })
}

fn digest(s: &mut Section<'_>, field: &str, text: &str) -> Option<[u8; 32]> {
    match from_hex(text) {
        None if !text.is_empty() => s.reject(field, format!("{text:?} is not a SHA-256; want 64 hex digits")),
        read => read,
    }
}

fn oci(s: &mut Section<'_>, wire: &v1::OciSource, resolved: Option<[u8; 32]>) -> Option<PluginFrom> {
    const WANT: &str =
        "want HOST[:PORT]/REPOSITORY[:TAG|@sha256:DIGEST], such as registry.example/shop/sorry:1.2";
    let host = match image_host(&wire.image) {
        Some(host) => Some(host),
        None if wire.image.is_empty() => s.reject("image", format!("is missing; {WANT}")),
        None => s.reject(
            "image",
            format!(
                "{:?} is not an image; {WANT}, where the host has a dot or a port or is localhost, and the repository is in lower case",
                wire.image.chars().take(80).collect::<String>()
            ),
        ),
    };
    if let Some(host) = host
        && wire.insecure
        && !is_loopback(host)
    {
        s.reject::<()>(
            "insecure",
            format!(
                "is true, but {host} is not a loopback address; want TLS, or a registry at localhost, 127.0.0.0/8 or ::1"
            ),
        );
    }
    let refresh = s.optional_duration("refresh", wire.refresh.as_ref(), 10 * SECOND..=DAY);
    host.map(|_| PluginFrom::Oci {
        image: wire.image.as_str().into(),
        refresh,
        insecure: wire.insecure,
        resolved,
    })
}

/// The host of an image whose name is right.
fn image_host(image: &str) -> Option<&str> {
    let (registry, rest) = image.split_once('/')?;
    let (host, _) = authority(registry)?;
    let (repository, version_ok) = match (rest.split_once('@'), rest.split_once(':')) {
        (Some((repository, digest)), _) => {
            let digest = digest.strip_prefix("sha256:");
            (
                repository,
                digest.is_some_and(|digest| from_hex(digest).is_some()),
            )
        }
        (None, Some((repository, tag))) => (repository, is_tag(tag)),
        (None, None) => (rest, true),
    };
    // Without any of these it would be a name at a registry that isn't said.
    let is_host = registry.contains(['.', ':']) || registry == "localhost";
    let whole = is_host && version_ok && image.len() <= MAX_TEXT && repository.split('/').all(is_component);
    whole.then_some(host)
}

/// A part of a repository's name, as the OCI distribution specification has it.
fn is_component(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut ends = text.bytes().next().into_iter().chain(text.bytes().last());
    let separator = |run: &str| matches!(run, "" | "." | "_" | "__") || run.bytes().all(|b| b == b'-');
    !text.is_empty()
        && ends.all(plain)
        && text
            .split(|c: char| c.is_ascii() && plain(c as u8))
            .all(separator)
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether this is base64 of the 42 bytes of a key, of which the first two are "Ed", the name of the algorithm.
fn is_minisign_key(text: &str) -> bool {
    let digit = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'/';
    // "Ed" is two digits and the upper four bits of a third.
    let begins = text
        .strip_prefix("RW")
        .is_some_and(|rest| rest.starts_with(['Q', 'R', 'S', 'T']));
    text.len() == 56 && begins && text.bytes().all(digit)
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0u8; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    // from_str_radix takes a sign, which hex digits don't have.
    text.bytes().all(|b| b.is_ascii_hexdigit()).then_some(out)
}

/// Handed to a plugin as it stands.
fn config(s: &mut Section<'_>, text: &str) -> Arc<str> {
    let at = s.at("config");
    bounded(s.fields(), &at, text, 64 * KIB);
    text.into()
}

fn limits(s: &mut Section<'_>, wire: &v1::PluginLimits, kind: PluginKind) -> PluginLimits {
    let default = PluginLimits::of(kind);
    PluginLimits {
        memory_bytes: s.number(
            "memory",
            wire.memory_bytes,
            default.memory_bytes,
            64 << 10..=256 << 20,
        ),
        call_timeout: s.duration(
            "callTimeout",
            wire.call_timeout.as_ref(),
            default.call_timeout,
            MS..=10 * SECOND,
        ),
        max_instances: s.small("maxInstances", wire.max_instances, default.max_instances, 1..=256),
        max_body_bytes: s.number(
            "maxBody",
            wire.max_body_bytes,
            default.max_body_bytes,
            0..=1 << 20,
        ),
        table_elements: s.small(
            "tableElements",
            wire.table_elements,
            default.table_elements,
            100..=1_000_000,
        ),
        max_calls: s.optional("maxCalls", wire.max_calls, default.max_calls, 0..=64),
        log_lines: s.optional("logLines", wire.log_lines, default.log_lines, 0..=10_000),
        store_bytes: wire.store_bytes.map_or(default.store_bytes, |bytes| {
            s.number("storeBytes", bytes, bytes, 0..=256 << 20)
        }),
        store_entries: s.optional(
            "storeEntries",
            wire.store_entries,
            default.store_entries,
            0..=1_000_000,
        ),
    }
}

fn access(s: &mut Section<'_>, wire: &v1::PluginAccess, kind: Option<PluginKind>) -> PluginAccess {
    let services = s.names("services", &wire.services, 64);
    let path = s.at("imports");
    let f = s.fields();
    f.count(&path, wire.imports.len(), 0..=256);
    f.unique(&path, "", &wire.imports);
    for (i, text) in wire.imports.iter().enumerate() {
        let (fits, want) = match kind {
            None => (
                is_interface(text) || is_function(text),
                "NAMESPACE:PACKAGE/INTERFACE or MODULE.FUNCTION",
            ),
            Some(PluginKind::ProxyWasm) => (
                is_function(text),
                "MODULE.FUNCTION or MODULE.*, such as env.proxy_http_call",
            ),
            Some(PluginKind::Fallback | PluginKind::Filter | PluginKind::Router | PluginKind::WasiHttp) => (
                is_interface(text),
                "NAMESPACE:PACKAGE/INTERFACE or NAMESPACE:PACKAGE/*, such as wasi:random/random, without a version",
            ),
        };
        if !fits {
            let text = text.chars().take(80).collect::<String>();
            f.reject::<()>(
                format!("{path}[{i}]"),
                format!("{text:?} is nothing that such a module imports; want {want}"),
            );
        }
    }
    PluginAccess {
        services,
        imports: wire.imports.iter().map(|text| text.as_str().into()).collect(),
    }
}

/// An interface of a component, or every one of a package.
fn is_interface(text: &str) -> bool {
    let word = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let parts = text
        .split_once(':')
        .and_then(|(namespace, rest)| Some((namespace, rest.split_once('/')?)));
    let fits = |(namespace, (package, interface))| {
        word(namespace) && word(package) && (interface == "*" || word(interface))
    };
    text.len() <= MAX_TEXT && parts.is_some_and(fits)
}

/// A function of a module, or every one of it.
fn is_function(text: &str) -> bool {
    let word = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    };
    let fits = |(module, function)| word(module) && (function == "*" || word(function));
    text.len() <= MAX_TEXT && text.split_once('.').is_some_and(fits)
}

fn on_fault(s: &mut Section<'_>, wire: i32, kind: Option<PluginKind>) -> Option<OnFault> {
    let want = match kind.map(PluginKind::place) {
        Some(PluginPlace::Rung) => "NextRung or Fail",
        Some(PluginPlace::Filter | PluginPlace::Router) => "FailOpen or FailClosed",
        None => "NextRung or Fail of a rung, FailOpen or FailClosed of a filter or router",
    };
    let (on_fault, of_rungs) = match v1::OnFault::try_from(wire) {
        Ok(v1::OnFault::NextRung) => (OnFault::NextRung, true),
        Ok(v1::OnFault::Fail) => (OnFault::Fail, true),
        Ok(v1::OnFault::FailOpen) => (OnFault::FailOpen, false),
        Ok(v1::OnFault::FailClosed) => (OnFault::FailClosed, false),
        Ok(v1::OnFault::Unspecified) | Err(_) => {
            return s.reject(
                "onFault",
                format!("is missing; say whether a fault of the plugin means {want}"),
            );
        }
    };
    match kind {
        Some(kind) if kind.is_rung() != of_rungs => s.reject(
            "onFault",
            format!(
                "{} is not for a plugin of kind {}; want {want}",
                crate::manifest::on_fault_word(wire),
                kind.as_str()
            ),
        ),
        Some(_) | None => Some(on_fault),
    }
}

fn quarantine(s: &mut Section<'_>, wire: &v1::PluginQuarantine) -> Quarantine {
    let default = Quarantine::default();
    Quarantine {
        faults: s.small("faults", wire.faults, default.faults, 1..=1000),
        window: s.duration("window", wire.window.as_ref(), default.window, SECOND..=HOUR),
        duration: s.duration(
            "duration",
            wire.duration.as_ref(),
            default.duration,
            SECOND..=HOUR,
        ),
    }
}

fn canary(s: &mut Section<'_>, wire: &v1::PluginCanary) -> Option<PluginCanary> {
    let source = source(&mut s.section("source"), wire.source.as_ref());
    let percent = s.small("percent", wire.percent, 0, 0..=100);
    let when = flag_condition(&mut s.section("when"), wire.when.as_ref());
    Some(PluginCanary {
        source: source?,
        percent,
        when,
    })
}

/// A plugin's name, and what is handed to it.
pub(super) fn named(s: &mut Section<'_>, plugin: &str, text: &str) -> Option<(Name, Arc<str>)> {
    let plugin = s.name("plugin", plugin);
    let config = config(s, text);
    plugin.map(|plugin| (plugin, config))
}

pub(super) fn filters(f: &mut Fields, path: &str, wire: &[v1::FilterRef]) -> Vec<FilterRef> {
    f.count(path, wire.len(), 0..=16);
    let filters = wire.iter().enumerate().filter_map(|(i, wire)| {
        let mut s = f.section(format!("{path}[{i}]"));
        let named = named(&mut s, &wire.plugin, &wire.config);
        let when = flag_condition(&mut s.section("when"), wire.when.as_ref());
        named.map(|(plugin, config)| FilterRef { plugin, config, when })
    });
    filters.collect()
}

pub(super) fn router(s: &mut Section<'_>, wire: &v1::RouterRef) -> Option<RouterRef> {
    let (plugin, config) = named(s, &wire.plugin, &wire.config)?;
    Some(RouterRef { plugin, config })
}
