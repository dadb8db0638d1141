//! What TCP services can't be named for, and what one service only can be called by.

use super::After;
use leeward_policy::model::{HostMatch, Protocol, Service};
use leeward_policy::{Key, Kind, Name, Resource, Spec};
use leeward_proto::BadField;
use std::collections::HashMap;

impl<'a> After<'a> {
    fn protocol_of(&self, name: &Name) -> Option<Protocol> {
        let key = Key {
            kind: Kind::Service,
            name: name.clone(),
        };
        let Spec::Service(service) = &self.get(&key)?.spec else {
            return None;
        };
        Some(service.protocol)
    }

    /// No request can be sent to a TCP service, and no rule about requests match its connections. Both ends are looked
    /// at: what comes and names services, and what names services that come.
    pub(super) fn check_tcp(&self, bad: &mut Vec<BadField>) {
        let misfits = |resource: &Resource| resource.spec.tcp_misfits(|name| self.protocol_of(name));
        for (i, resource) in self.coming.values() {
            for (path, to, why) in misfits(resource) {
                bad.push(BadField {
                    path: format!("resources[{i}].{path}"),
                    reason: format!("{to} {why}"),
                });
            }
        }
        if !self.coming.keys().any(|key| key.kind == Kind::Service) {
            return;
        }
        for (key, resource) in self.stays() {
            for (path, to, why) in misfits(resource) {
                // Only what this write makes of it is held against it.
                if let Some((i, _)) = self.coming.get(&to) {
                    bad.push(BadField {
                        path: format!("resources[{i}].spec.protocol"),
                        reason: format!(
                            "{key} ({path}) names this service, which {why}; or change that in the same call"
                        ),
                    });
                }
            }
        }
    }

    /// Of two services that are called by the same address or name, which gets a connection would be for their names to
    /// decide.
    pub(super) fn check_destinations(&self, bad: &mut Vec<BadField>) {
        if !self.coming.keys().any(|key| key.kind == Kind::Service) {
            return;
        }
        let mut owners: HashMap<String, &Key> = HashMap::new();
        for (key, resource) in self.stays() {
            if let Spec::Service(service) = &resource.spec {
                owners.extend(called_by(service).map(|(_, text)| (text, key)));
            }
        }
        for (key, (i, resource)) in &self.coming {
            let Spec::Service(service) = &resource.spec else {
                continue;
            };
            for (path, text) in called_by(service) {
                match owners.get(&text) {
                    Some(owner) => bad.push(BadField {
                        path: format!("resources[{i}].{path}"),
                        reason: format!("{text} is {owner}'s already; want each for one Service only"),
                    }),
                    None => {
                        owners.insert(text, key);
                    }
                }
            }
        }
    }
}

/// What a service is called by, with the field that says so.
fn called_by(service: &Service) -> impl Iterator<Item = (String, String)> {
    let addresses = service.addresses.iter().enumerate();
    let addresses = addresses.map(|(j, address)| (format!("spec.addresses[{j}]"), address.to_string()));
    let names = service.server_names.iter().enumerate();
    let names = names.map(|(j, name)| {
        let text = match name {
            HostMatch::Any => "*".to_owned(),
            HostMatch::Exact(name) => name.to_string(),
            HostMatch::Suffix(suffix) => format!("*{suffix}"),
        };
        (format!("spec.serverNames[{j}]"), text)
    });
    addresses.chain(names)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, known, resources};
    use crate::policy::Known;

    fn service(name: &str, spec: &str) -> String {
        format!("apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
    }

    const ROUTE: &str = "apiVersion: leeward.dev/v1\nkind: Route\nmetadata: {name: r}\nspec: {hostnames: [a], rules: [{backendRefs: [{service: s}]}]}\n";

    #[test]
    fn no_request_is_sent_to_a_tcp_service() {
        let (http, tcp) = (service("s", ""), service("s", "protocol: TCP"));
        check(&known(resources(&http)), ROUTE, "");
        let want = "resources[0].spec.rules[0].backendRefs[0].service: Service/s is of protocol TCP, to which no request can be sent; want one of HTTP1 or HTTP2";
        check(&known(resources(&tcp)), ROUTE, want);
        let routed = known(resources(&format!("{http}---\n{ROUTE}")));
        let want = "resources[0].spec.protocol: Route/r (spec.rules[0].backendRefs[0].service) names this service, which is of protocol TCP, to which no request can be sent; want one of HTTP1 or HTTP2; or change that in the same call";
        check(&routed, &tcp, want);
    }

    #[test]
    fn rules_about_requests_are_not_for_connections() {
        let policy = |rule: &str| {
            format!(
                "apiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {{services: [s], action: Allow, rules: [{rule}]}}\n"
            )
        };
        let tcp = known(resources(&service("s", "protocol: TCP")));
        check(
            &tcp,
            &policy("{from: [{identities: [\"spiffe://x/zone/a/proxy/b\"]}]}"),
            "",
        );
        let want = "resources[0].spec.services[0]: Service/s is of protocol TCP, whose connections never match a rule that looks at requests (to, when); leave it out, or leave those out";
        check(&tcp, &policy("{to: [{methods: [GET]}]}"), want);
        // For everything that is there, it is no contradiction.
        let all = policy("{to: [{methods: [GET]}]}").replace("services: [s], ", "");
        check(&tcp, &all, "");
    }

    #[test]
    fn each_address_and_name_is_one_services() {
        let first = service(
            "s",
            "protocol: TCP, addresses: [\"10.0.0.1:1\"], serverNames: [\"*.x\"]",
        );
        let there = known(resources(&first));
        check(&there, &first, "");
        let second = service("t", "protocol: TCP, addresses: [\"10.0.0.1:1\"]");
        let want = "resources[0].spec.addresses[0]: 10.0.0.1:1 is Service/s's already; want each for one Service only";
        check(&there, &second, want);
        let third = service("t", "protocol: TCP, serverNames: [\"a.x\", \"*.x\"]");
        let want =
            "resources[0].spec.serverNames[1]: *.x is Service/s's already; want each for one Service only";
        check(&there, &third, want);
        // It moves in one call.
        let moved = format!("{second}---\n{}", service("s", "protocol: TCP"));
        check(&there, &moved, "");
        check(
            &Known::new(),
            &format!("{first}---\n{}", second.replace(":1\"", ":2\"")),
            "",
        );
    }
}
