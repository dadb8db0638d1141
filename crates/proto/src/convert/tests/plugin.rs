//! What is refused of plugins and of where they are named, and what it means where nothing is said.

use super::{check, check_rule};
use crate::manifest::parse as read;
use crate::parse;
use leeward_policy::Spec;
use leeward_policy::model::{
    OnFault, Plugin, PluginAccess, PluginFrom, PluginKind, PluginLimits, Quarantine, Route,
};
use std::time::Duration;

const WANT_KIND: &str = "want Fallback, Filter, Router, WasiHttp or ProxyWasm";
const NOWHERE: &str =
    "doesn't say where the module is; want file, oci, or the sha256 of what was pushed to the control plane";
const WANT_IMAGE: &str =
    "want HOST[:PORT]/REPOSITORY[:TAG|@sha256:DIGEST], such as registry.example/shop/sorry:1.2";
const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";

/// What is said of a Plugin of some kind with these further fields.
#[track_caller]
fn check_plugin(kind: &str, more: &str, want: &[&str]) {
    let want: Vec<_> = want.iter().map(|line| format!("spec.{line}")).collect();
    let want: Vec<_> = want.iter().map(String::as_str).collect();
    let on_fault = match kind {
        "Fallback" | "WasiHttp" => "Fail",
        _ => "FailOpen",
    };
    check(
        "Plugin",
        &format!("{{kind: {kind}, onFault: {on_fault}, {more}}}"),
        &want,
    );
}

#[track_caller]
fn check_source(source: &str, want: &[&str]) {
    let want: Vec<_> = want.iter().map(|line| format!("source{line}")).collect();
    let want: Vec<_> = want.iter().map(String::as_str).collect();
    check_plugin("Fallback", &format!("source: {source}"), &want);
}

#[track_caller]
fn plugin(spec: &str) -> Plugin {
    let text = format!("apiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: a}}\nspec: {spec}\n");
    let Spec::Plugin(plugin) = parse(&read("f", &text).unwrap()[0]).unwrap().spec else {
        unreachable!()
    };
    plugin
}

#[test]
fn a_plugin_says_what_it_is_where_it_is_and_what_a_fault_means() {
    check(
        "Plugin",
        "{}",
        &[
            &format!("spec.kind: is missing; {WANT_KIND}"),
            "spec.onFault: is missing; say whether a fault of the plugin means NextRung or Fail of a rung, FailOpen or FailClosed of a filter or router",
            &format!("spec.source: {NOWHERE}"),
        ],
    );
    for (kind, right, wrong, want) in [
        (
            "Fallback",
            ["NextRung", "Fail"],
            ["FailOpen", "FailClosed"],
            "NextRung or Fail",
        ),
        (
            "WasiHttp",
            ["NextRung", "Fail"],
            ["FailOpen", "FailClosed"],
            "NextRung or Fail",
        ),
        (
            "Filter",
            ["FailOpen", "FailClosed"],
            ["NextRung", "Fail"],
            "FailOpen or FailClosed",
        ),
        (
            "Router",
            ["FailOpen", "FailClosed"],
            ["NextRung", "Fail"],
            "FailOpen or FailClosed",
        ),
        (
            "ProxyWasm",
            ["FailOpen", "FailClosed"],
            ["NextRung", "Fail"],
            "FailOpen or FailClosed",
        ),
    ] {
        let of = |on_fault: &str| format!("{{kind: {kind}, source: {{file: /p}}, onFault: {on_fault}}}");
        for on_fault in right {
            check("Plugin", &of(on_fault), &[]);
        }
        for on_fault in wrong {
            let line = format!("spec.onFault: {on_fault} is not for a plugin of kind {kind}; want {want}");
            check("Plugin", &of(on_fault), &[&line]);
        }
        let line = format!("spec.onFault: is missing; say whether a fault of the plugin means {want}");
        check(
            "Plugin",
            &format!("{{kind: {kind}, source: {{file: /p}}}}"),
            &[&line],
        );
    }
}

#[test]
fn a_module_is_in_one_place() {
    let digest = "0123456789abcdefABCDEF".repeat(3)[..64].to_owned();
    check_source("{}", &[&format!(": {NOWHERE}")]);
    check_source(&format!("{{minisignKey: {KEY}}}"), &[&format!(": {NOWHERE}")]);
    check_source(&format!("{{sha256: {digest}}}"), &[]);
    check_source(
        &format!("{{file: /p, sha256: {digest}, minisignKey: {KEY}}}"),
        &[],
    );
    check_source(&format!("{{oci: {{image: r.example/p}}, sha256: {digest}}}"), &[]);
    check_source(
        "{file: /p, oci: {image: r.example/p}}",
        &[".oci: stands beside file; want one of them"],
    );
    check_source(
        "{file: p.wasm}",
        &[".file: \"p.wasm\" is not an absolute path, such as /etc/leeward/p.wasm"],
    );
    for bad in ["abc", &"g".repeat(64), &format!("+{}", "0".repeat(63))] {
        let line = format!(".sha256: {bad:?} is not a SHA-256; want 64 hex digits");
        check_source(&format!("{{sha256: '{bad}'}}"), &[&line]);
    }
    assert_eq!(
        plugin(&format!(
            "{{kind: Fallback, source: {{sha256: {digest}}}, onFault: Fail}}"
        ))
        .source
        .from,
        PluginFrom::Store
    );
}

#[test]
fn a_key_is_minisigns() {
    for bad in [
        "untrusted comment",
        &KEY[1..],
        &KEY.replacen("RWQ", "RWU", 1),
        &KEY.replacen("RW", "Rw", 1),
        &KEY.replacen('6', "=", 1),
        &format!("{KEY}="),
    ] {
        let line = format!(
            ".minisignKey: {bad:?} is not a minisign public key; want the line of base64 from its file, 56 characters that begin with RW"
        );
        check_source(&format!("{{file: /p, minisignKey: '{bad}'}}"), &[&line]);
    }
}

#[test]
fn an_image_has_a_registry_a_repository_and_one_version_at_most() {
    let digest = "0".repeat(64);
    let good = [
        "registry.example/p",
        "registry.example:5000/shop/sorry:1.2-beta_3",
        "localhost/p:latest",
        "host:80/a__b/c.d/e--f/0",
        "10.0.0.1/p",
        "[fd00::1]:443/p",
    ];
    for image in good {
        check_source(&format!("{{oci: {{image: '{image}'}}}}"), &[]);
    }
    check_source(&format!("{{oci: {{image: 'r.example/p@sha256:{digest}'}}}}"), &[]);
    check_source("{oci: {}}", &[&format!(".oci.image: is missing; {WANT_IMAGE}")]);
    let (long, both, short) = (
        format!("r.example/{}", "a".repeat(512)),
        format!("r.example/p:1@sha256:{digest}"),
        format!("r.example/p@sha256:{}", &digest[1..]),
    );
    let bad = [
        "p",
        "shop/p",
        "https://r.example/p",
        "r.example/",
        "r.example/P",
        "r.example/a//b",
        "r.example/a/",
        "r.example/-a",
        "r.example/a_",
        "r.example/a___b",
        "r.example/a..b",
        "r.example/a.-b",
        "r.example/p:",
        "r.example/p:.1",
        "r.example/p:a b",
        "r.example/p@md5:0",
        "r.example:0/p",
        "r.example:x/p",
        "user@r.example/p",
        "r.example/é",
        &long,
        &both,
        &short,
    ];
    for image in bad {
        let shown = image.chars().take(80).collect::<String>();
        let line = format!(
            ".oci.image: {shown:?} is not an image; {WANT_IMAGE}, where the host has a dot or a port or is localhost, and the repository is in lower case"
        );
        check_source(&format!("{{oci: {{image: '{image}'}}}}"), &[&line]);
    }
    check_source(
        "{oci: {image: r.example/p, refresh: 9s}}",
        &[".oci.refresh: 9s is out of range; want 10s to 24h"],
    );
}

#[test]
fn only_a_registry_of_this_node_speaks_without_tls() {
    for host in [
        "localhost",
        "localhost:5000",
        "127.0.0.1:5000",
        "127.9.9.9",
        "[::1]:5000",
    ] {
        check_source(&format!("{{oci: {{image: '{host}/p', insecure: true}}}}"), &[]);
    }
    for (host, shown) in [
        ("r.example", "r.example"),
        ("128.0.0.1:80", "128.0.0.1"),
        ("[::2]:80", "::2"),
        ("localhost.example", "localhost.example"),
        ("127.0.0.1.example", "127.0.0.1.example"),
    ] {
        let line = format!(
            ".oci.insecure: is true, but {shown} is not a loopback address; want TLS, or a registry at localhost, 127.0.0.0/8 or ::1"
        );
        check_source(
            &format!("{{oci: {{image: '{host}/p', insecure: true}}}}"),
            &[&line],
        );
    }
}

#[test]
fn limits_and_quarantine_are_bounded() {
    check_plugin(
        "Filter",
        "source: {file: /p}, limits: {memory: 63KiB, callTimeout: 11s, maxInstances: 257, maxBody: 2MiB, tableElements: 99, maxCalls: 65, logLines: 10001, storeBytes: 257MiB, storeEntries: 1000001}, quarantine: {faults: 1001, window: 999ms, duration: 61m}",
        &[
            "limits.callTimeout: 11s is out of range; want 1ms to 10s",
            "limits.logLines: 10001 is out of range; want 0 to 10000",
            "limits.maxBody: 2097152 is out of range; want 0 to 1048576",
            "limits.maxCalls: 65 is out of range; want 0 to 64",
            "limits.maxInstances: 257 is out of range; want 1 to 256",
            "limits.memory: 64512 is out of range; want 65536 to 268435456",
            "limits.storeBytes: 269484032 is out of range; want 0 to 268435456",
            "limits.storeEntries: 1000001 is out of range; want 0 to 1000000",
            "limits.tableElements: 99 is out of range; want 100 to 1000000",
            "quarantine.duration: 61m is out of range; want 1s to 1h",
            "quarantine.faults: 1001 is out of range; want 1 to 1000",
            "quarantine.window: 999ms is out of range; want 1s to 1h",
        ],
    );
    check_plugin(
        "Filter",
        "source: {file: /p}, limits: {maxInstances: 0, tableElements: 0}, quarantine: {faults: 0}",
        &[
            "limits.maxInstances: 0 is out of range; want at least 1",
            "limits.tableElements: 0 is out of range; want at least 1",
            "quarantine.faults: 0 is out of range; want at least 1",
        ],
    );
    let none = plugin(
        "{kind: Filter, onFault: FailOpen, source: {file: /p}, limits: {maxCalls: 0, logLines: 0, storeBytes: 0, storeEntries: 0}}",
    );
    let limits = none.limits;
    assert_eq!((limits.max_calls, limits.log_lines), (0, 0));
    assert_eq!((limits.store_bytes, limits.store_entries), (0, 0));
}

#[test]
fn where_nothing_is_said_the_bounds_are_those_of_the_kind() {
    for kind in PluginKind::ALL {
        let on_fault = if kind.is_rung() { "Fail" } else { "FailClosed" };
        let text = format!(
            "{{kind: {}, onFault: {on_fault}, source: {{file: /p}}}}",
            kind.as_str()
        );
        let read = plugin(&text);
        assert_eq!((read.kind, read.limits), (kind, PluginLimits::of(kind)));
        let sooner = read.limits.call_timeout == Duration::from_millis(5);
        assert_eq!(sooner, !kind.is_rung(), "{kind:?}");
        assert_eq!(read.access, PluginAccess::default());
        assert_eq!(read.quarantine, Quarantine::default());
        assert_eq!(&*read.config, "");
        assert!(!read.fresh_instance && read.canary.is_none());
    }
    let said = "{kind: Filter, onFault: FailOpen, source: {file: /p}, limits: {}, access: {}, quarantine: {}, canary: {source: {file: /q}}}";
    let read = plugin(said);
    assert_eq!(
        (read.limits, read.on_fault),
        (PluginLimits::of(PluginKind::Filter), OnFault::FailOpen)
    );
    assert_eq!(read.quarantine, Quarantine::default());
    let canary = read.canary.unwrap();
    assert_eq!((canary.percent, canary.when), (0, None));
}

#[test]
fn what_a_module_may_import_is_named_as_its_kind_names_it() {
    let of = |kind: &str, imports: &str, want: &[&str]| {
        check_plugin(
            kind,
            &format!("source: {{file: /p}}, access: {{imports: [{imports}]}}"),
            want,
        );
    };
    of(
        "Fallback",
        "'wasi:random/random', 'wasi:http/*', 'leeward:plugin/mesh'",
        &[],
    );
    of(
        "ProxyWasm",
        "env.proxy_http_call, 'env.*', wasi_snapshot_preview1.fd_write",
        &[],
    );
    let component = |i: usize, text: &str| {
        format!(
            "access.imports[{i}]: {text:?} is nothing that such a module imports; want NAMESPACE:PACKAGE/INTERFACE or NAMESPACE:PACKAGE/*, such as wasi:random/random, without a version"
        )
    };
    let bad = [
        "env.proxy_log",
        "wasi:random/random@0.2.0",
        "wasi:random",
        "wasi:*",
        "*",
        "",
        "wasi:http/",
        "wasi:-a/b",
        "wasi:a/b/c",
    ];
    let lines: Vec<_> = bad
        .iter()
        .enumerate()
        .map(|(i, text)| component(i, text))
        .collect();
    let lines: Vec<_> = lines.iter().map(String::as_str).collect();
    let quoted: Vec<_> = bad.iter().map(|text| format!("'{text}'")).collect();
    of("WasiHttp", &quoted.join(", "), &lines);
    let module = |i: usize, text: &str| {
        format!(
            "access.imports[{i}]: {text:?} is nothing that such a module imports; want MODULE.FUNCTION or MODULE.*, such as env.proxy_http_call"
        )
    };
    of(
        "ProxyWasm",
        "'wasi:random/random', env, '*.f', 'env.', 'env.a.b'",
        &[
            &module(0, "wasi:random/random"),
            &module(1, "env"),
            &module(2, "*.f"),
            &module(3, "env."),
            &module(4, "env.a.b"),
        ],
    );
    of(
        "Filter",
        "'a:b/c', 'a:b/c'",
        &["access.imports[1]: a:b/c stands at spec.access.imports[0] already; each must stand once"],
    );
    let many = |what: &str, count: usize| {
        (0..count)
            .map(|i| format!("{what}{i}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    check_plugin(
        "Router",
        &format!(
            "source: {{file: /p}}, access: {{services: [{}, X], imports: [{}]}}",
            many("s", 64),
            many("a:b/c", 257)
        ),
        &[
            "access.imports: has 257 entries; want 0 to 256",
            "access.services: has 65 entries; want 0 to 64",
            "access.services[64]: \"X\" has 'X' at byte 0; a name is a-z, 0-9 and '-', with no '-' at either end",
        ],
    );
}

#[test]
fn a_virtual_machine_that_lives_on_is_never_fresh() {
    let fresh = "source: {file: /p}, freshInstance: true";
    check_plugin("Filter", fresh, &[]);
    check_plugin(
        "ProxyWasm",
        fresh,
        &["freshInstance: is true, but the virtual machine of a ProxyWasm plugin lives on; leave it out"],
    );
}

#[test]
fn a_canary_is_another_module_for_a_share() {
    check_plugin(
        "Router",
        "source: {file: /p}, canary: {percent: 101, when: {}}",
        &[
            "canary.percent: 101 is out of range; want 0 to 100",
            &format!("canary.source: {NOWHERE}"),
            "canary.when.flag: is missing; want a flag's key, 1 to 128 bytes",
        ],
    );
    check_plugin(
        "Router",
        "source: {file: /p}, canary: {source: {file: /q}, percent: 100}",
        &[],
    );
}

#[test]
fn what_is_handed_to_a_plugin_is_bounded_everywhere() {
    let long = "x".repeat((64 << 10) + 1);
    let want = "is 65537 bytes long; want at most 65536";
    check_plugin(
        "Filter",
        &format!("source: {{file: /p}}, config: {long}"),
        &[&format!("config: {want}")],
    );
    check_rule(
        &format!("filters: [{{plugin: p, config: {long}}}], router: {{plugin: p, config: {long}}}"),
        &[
            &format!("filters[0].config: {want}"),
            &format!("router.config: {want}"),
        ],
    );
    check(
        "FallbackPolicy",
        &format!("{{rungs: [{{plugin: {{plugin: p, config: {long}}}}}]}}"),
        &[&format!("spec.rungs[0].plugin.config: {want}")],
    );
}

#[test]
fn a_rule_names_some_filters_and_a_router() {
    let missing = "is missing; a name is 1 to 63 bytes of a-z, 0-9 and '-'";
    check_rule(
        "filters: [{}, {plugin: p, when: {}}], router: {}",
        &[
            &format!("filters[0].plugin: {missing}"),
            "filters[1].when.flag: is missing; want a flag's key, 1 to 128 bytes",
            &format!("router.plugin: {missing}"),
        ],
    );
    let many = |count| vec!["{plugin: p}"; count].join(", ");
    check_rule(&format!("filters: [{}]", many(16)), &[]);
    check_rule(
        &format!("filters: [{}]", many(17)),
        &["filters: has 17 entries; want 0 to 16"],
    );
    let text = "apiVersion: leeward.dev/v1\nkind: Route\nmetadata: {name: a}\nspec: {hostnames: [a], rules: [{backendRefs: [{service: s}], filters: [{plugin: b, config: x}, {plugin: a, when: {flag: f}}], router: {plugin: c, config: y}}]}\n";
    let Spec::Route(Route { rules, .. }) = parse(&read("f", text).unwrap()[0]).unwrap().spec else {
        unreachable!()
    };
    let filters: Vec<_> = rules[0]
        .filters
        .iter()
        .map(|filter| (filter.plugin.as_str(), &*filter.config, filter.when.is_some()))
        .collect();
    assert_eq!(filters, [("b", "x", false), ("a", "", true)]);
    let router = rules[0].router.as_ref().unwrap();
    assert_eq!((router.plugin.as_str(), &*router.config), ("c", "y"));
}
