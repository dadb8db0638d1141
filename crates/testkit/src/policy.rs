//! Manifests that tests are full of.

use std::fmt::Write;
use std::net::SocketAddr;

/// A Service with endpoints: address, zone, and the proxy in front (empty for none). `more` are further lines
/// of its spec, such as `protocol: HTTP2`.
pub fn service(name: &str, endpoints: &[(SocketAddr, &str, &str)], more: &[&str]) -> String {
    let mut text = document("Service", name);
    text += "  endpoints:\n";
    for (address, zone, proxy) in endpoints {
        let proxy = if proxy.is_empty() {
            String::new()
        } else {
            format!(", proxy: {proxy}")
        };
        // A String takes whatever is written to it.
        let _ = writeln!(text, "    - {{address: \"{address}\", zone: {zone}{proxy}}}");
    }
    if endpoints.is_empty() {
        text = document("Service", name) + "  endpoints: []\n";
    }
    lines(&mut text, "  ", more);
    text
}

/// A Route of one host with one rule: everything to one service. `more` are further lines of the rule, such
/// as `fallback: feed`.
pub fn route(name: &str, host: &str, service: &str, more: &[&str]) -> String {
    let mut text = document("Route", name);
    let _ = write!(
        text,
        "  hostnames: [\"{host}\"]\n  rules:\n    - backendRefs: [{{service: {service}}}]\n"
    );
    lines(&mut text, "      ", more);
    text
}

/// A Service whose endpoints are given as they stand in YAML, such as
/// `{address: "127.0.0.1:80", zone: a, weight: 3}`. `more` are further lines of its spec.
pub fn service_of(name: &str, endpoints: &[String], more: &[&str]) -> String {
    let mut text = document("Service", name) + "  endpoints:\n";
    for endpoint in endpoints {
        // A String takes whatever is written to it.
        let _ = writeln!(text, "    - {endpoint}");
    }
    lines(&mut text, "  ", more);
    text
}

/// A Route of one host with several rules, each given by its lines, such as `backendRefs: [{service: shop}]`.
pub fn rules(name: &str, host: &str, rules: &[&[&str]]) -> String {
    let mut text = document("Route", name);
    // A String takes whatever is written to it.
    let _ = write!(text, "  hostnames: [\"{host}\"]\n  rules:\n");
    for rule in rules {
        text += "    -\n";
        lines(&mut text, "      ", rule);
    }
    text
}

/// A ResiliencePolicy. `spec` are the lines of its spec, such as `retryBudget: {percent: 10}`.
pub fn resilience(name: &str, spec: &[&str]) -> String {
    let mut text = document("ResiliencePolicy", name);
    lines(&mut text, "  ", spec);
    text
}

/// A Plugin for fallbacks from a file. `on_fault` is `NextRung` or `Fail`; `limits` such as
/// `callTimeout: 20ms`.
pub fn plugin(name: &str, file: &str, on_fault: &str, limits: &str) -> String {
    let mut text = document("Plugin", name);
    let _ = write!(
        text,
        "  kind: Fallback\n  source: {{file: \"{file}\"}}\n  limits: {{{limits}}}\n  onFault: {on_fault}\n"
    );
    text
}

/// A Plugin of any kind from a file, with as much time for a call as a busy machine needs. `more` are further lines of its
/// spec, such as `config: x`.
pub fn plugin_of(name: &str, kind: &str, file: &str, on_fault: &str, more: &[&str]) -> String {
    let mut text = document("Plugin", name);
    let _ = write!(
        text,
        "  kind: {kind}\n  source: {{file: \"{file}\"}}\n  onFault: {on_fault}\n"
    );
    if !more.iter().any(|line| line.starts_with("limits:")) {
        text += "  limits: {callTimeout: 2s}\n";
    }
    lines(&mut text, "  ", more);
    text
}

/// A FallbackPolicy. `rungs` are one line each, such as `static: {status: 200}`; `more` are further lines of
/// its spec.
pub fn fallback(name: &str, rungs: &[&str], more: &[&str]) -> String {
    let mut text = document("FallbackPolicy", name) + "  rungs:\n";
    lines(&mut text, "    - ", rungs);
    lines(&mut text, "  ", more);
    text
}

/// A FeatureFlags. `flags` are flagd's, as JSON: an object of definitions by their keys.
pub fn flags(name: &str, flags: &str) -> String {
    document("FeatureFlags", name) + "  flags: " + flags + "\n"
}

/// A Queue. `spec` are the lines of its spec, such as `maxEntries: 3`.
pub fn queue(name: &str, spec: &[&str]) -> String {
    let mut text = document("Queue", name);
    if spec.is_empty() {
        text = text.trim_end().to_owned() + " {}\n";
    }
    lines(&mut text, "  ", spec);
    text
}

fn document(kind: &str, name: &str) -> String {
    format!("---\napiVersion: leeward.dev/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n")
}

fn lines(text: &mut String, indent: &str, more: &[&str]) {
    for line in more {
        let _ = writeln!(text, "{indent}{line}");
    }
}
