//! LW91x: plugins that have more than they should, or less than they need.

use super::mesh::{Mesh, key};
use super::text::{duration, list};
use super::{Rule, Severity, Sink};
use crate::Kind;
use crate::model::{PluginFrom, PluginLimits};

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW911",
        severity: Severity::Info,
        title: "a plugin whose limits nobody has said",
        why: "It has the defaults of its kind. They are a guess; what a plugin takes is in the metrics of plugins.",
        check: unlimited,
    },
    Rule {
        code: "LW912",
        severity: Severity::Warning,
        title: "a plugin may call services, and make no calls",
        why: "`access.services` names services, and `limits.maxCalls` is 0.",
        check: no_calls,
    },
    Rule {
        code: "LW913",
        severity: Severity::Warning,
        title: "a canary that nobody gets, or everybody",
        why: "With `percent: 0` and no `when` no request gets it; with 100 every one does, and the plugin's own module is never run.",
        check: canaries,
    },
    Rule {
        code: "LW914",
        severity: Severity::Info,
        title: "a module that could be any",
        why: "A file on every node without `sha256` or a `minisignKey` runs whatever is there, on each node maybe something else.",
        check: unpinned,
    },
];

fn unlimited(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, plugin) in &mesh.plugins {
        let default = PluginLimits::of(plugin.kind);
        if plugin.limits == default {
            sink.add(
                &key(Kind::Plugin, name),
                "spec.limits",
                format!(
                    "are those of every {}: {} MiB, {} for a call, {} calls",
                    plugin.kind.as_str(),
                    default.memory_bytes >> 20,
                    duration(default.call_timeout),
                    default.max_calls
                ),
                "say what this one needs",
            );
        }
    }
}

fn no_calls(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, plugin) in &mesh.plugins {
        if plugin.limits.max_calls == 0 && !plugin.access.services.is_empty() {
            sink.add(
                &key(Kind::Plugin, name),
                "spec.limits.maxCalls",
                format!("is 0, and the plugin may call {}", list(&plugin.access.services)),
                "want 1 at least, or no services",
            );
        }
    }
}

fn canaries(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, plugin) in &mesh.plugins {
        let Some(canary) = &plugin.canary else { continue };
        let problem = match (canary.percent, &canary.when) {
            (0, None) => "is 0 without a condition, so that no request gets the canary",
            (100, _) => "is 100, so that no request gets the plugin's own module",
            (_, _) => continue,
        };
        sink.add(
            &key(Kind::Plugin, name),
            "spec.canary.percent",
            problem.to_owned(),
            "want a share between, or only one module",
        );
    }
}

fn unpinned(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, plugin) in &mesh.plugins {
        for (path, source) in plugin.sources() {
            if let PluginFrom::File(file) = &source.from
                && source.sha256.is_none()
                && source.minisign_key.is_none()
            {
                sink.add(
                    &key(Kind::Plugin, name),
                    path,
                    format!("{file} may be anything"),
                    "add its sha256, or push it (leeward plugin push)",
                );
            }
        }
    }
}
