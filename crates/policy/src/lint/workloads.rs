//! LW92x: workloads that nobody attests, or that are taken for who sends requests.

use super::mesh::{Mesh, key, related};
use super::similar::did_you_mean;
use super::{Rule, Severity, Sink};
use crate::Kind;

pub(super) const RULES: &[Rule] = &[
    Rule {
        code: "LW921",
        severity: Severity::Warning,
        title: "a workload is to be attested by proxies that aren't there",
        why: "Its zone has no proxy of this name, so that no process there gets a certificate. (Proxies that are no hop for others need not be listed in a Zone.)",
        check: nowhere,
    },
    Rule {
        code: "LW922",
        severity: Severity::Warning,
        title: "an authorization rule goes by the identity of a workload",
        why: "A request has the identity of its node's proxy, whichever process has sent it: the rule never matches, and what it was to deny passes.",
        check: unseen,
    },
];

fn nowhere(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, workload) in &mesh.workloads {
        let zone = mesh.zones.get(&workload.zone);
        // A zone that lists none says nothing of who is there.
        let Some(zone) = zone.filter(|zone| !zone.proxies.is_empty()) else {
            continue;
        };
        for (i, proxy) in workload.proxies.iter().enumerate() {
            if zone.proxy(proxy).is_none() {
                let known = zone.proxies.iter().map(|known| known.name.as_str());
                let near = did_you_mean(proxy.as_str(), known);
                sink.add_with(
                    &key(Kind::Workload, name),
                    format!("spec.proxies[{i}]"),
                    format!("{:?} is not a proxy of Zone/{}", proxy.as_str(), workload.zone),
                    format!("name one that is there{near}"),
                    vec![related(Kind::Zone, &workload.zone, "spec.proxies")],
                );
            }
        }
    }
}

fn unseen(mesh: &Mesh<'_>, sink: &mut Sink<'_>) {
    for (name, policy) in &mesh.authorizations {
        for (path, source) in policy.sources() {
            let lists = [
                ("identities", &source.identities),
                ("notIdentities", &source.not_identities),
            ];
            for (field, patterns) in lists {
                for (i, pattern) in patterns.iter().enumerate().filter(|(_, p)| is_workload(p)) {
                    sink.add(
                        &key(Kind::AuthorizationPolicy, name),
                        format!("{path}.{field}[{i}]"),
                        format!("{pattern:?} is a workload's, and requests have the identity of their node's proxy"),
                        "go by the proxy, or by a token of the workload's (claim)",
                    );
                }
            }
        }
    }
}

fn is_workload(pattern: &str) -> bool {
    let segments = pattern.strip_prefix("spiffe://").unwrap_or_default().split('/');
    matches!(
        segments.skip(1).collect::<Vec<_>>().as_slice(),
        ["zone", _, "workload", ..]
    )
}
