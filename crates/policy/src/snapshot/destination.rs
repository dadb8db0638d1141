//! From where a connection goes to the service that it is for.

use super::{ServiceIdx, ServiceView};
use crate::model::HostMatch;
use std::collections::HashMap;
use std::net::SocketAddr;

/// By what services are called that isn't in a request. Of several that claim the same, which the control plane lets
/// nobody do, the first by name has it.
#[derive(Debug, Default)]
pub(super) struct Destinations {
    addresses: HashMap<SocketAddr, ServiceIdx>,
    exact: HashMap<Box<str>, ServiceIdx>,
    /// With the dot before them.
    suffix: HashMap<Box<str>, ServiceIdx>,
}

impl Destinations {
    /// Of services in the order of their names.
    pub(super) fn of(services: &[ServiceView]) -> Self {
        let mut found = Self::default();
        for (position, view) in services.iter().enumerate() {
            let idx = ServiceIdx::new(position);
            for address in &view.spec.addresses {
                found.addresses.entry(*address).or_insert(idx);
            }
            for name in &view.spec.server_names {
                match name {
                    HostMatch::Exact(name) => {
                        found.exact.entry(name.clone()).or_insert(idx);
                    }
                    HostMatch::Suffix(suffix) => {
                        found.suffix.entry(suffix.clone()).or_insert(idx);
                    }
                    HostMatch::Any => {}
                }
            }
        }
        found
    }

    pub(super) fn at(&self, address: SocketAddr) -> Option<ServiceIdx> {
        self.addresses.get(&canonical(address)).copied()
    }

    /// The exact name counts first, then the longest suffix. O(labels of the name).
    pub(super) fn called(&self, name: &str) -> Option<ServiceIdx> {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if let Some(idx) = self.exact.get(&*name) {
            return Some(*idx);
        }
        let mut dots = name.match_indices('.').filter(|&(at, _)| at > 0);
        dots.find_map(|(at, _)| self.suffix.get(name.get(at..)?).copied())
    }
}

/// An IPv4 address in its own form: a socket for both has it in IPv6's.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use crate::model::{HostMatch, Protocol, Service, Spec};
    use crate::{Name, Resource, Snapshot, Viewer};
    use std::collections::BTreeMap;

    fn snapshot() -> Snapshot {
        let name = |text: &str| Name::parse(text).unwrap();
        let service = |text: &str, addresses: &[&str], names: &[HostMatch]| Resource {
            name: name(text),
            revision: 1,
            labels: BTreeMap::new(),
            spec: Spec::Service(Service {
                protocol: Protocol::Tcp,
                addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
                server_names: names.to_vec(),
                ..Service::new(vec![])
            }),
        };
        let exact = |text: &str| HostMatch::Exact(text.into());
        let suffix = |text: &str| HostMatch::Suffix(text.into());
        let services = [
            service("a", &["10.0.0.1:5432", "[fd00::1]:5432"], &[exact("db.example")]),
            service("b", &["10.0.0.1:5432", "10.0.0.1:5433"], &[suffix(".example")]),
            service("c", &[], &[suffix(".eu.example")]),
        ];
        let viewer = Viewer {
            zone: name("z"),
            proxy: name("p"),
        };
        Snapshot::compile(viewer, 1, &services)
    }

    #[test]
    fn a_service_is_found_by_its_addresses() {
        let snapshot = snapshot();
        let at = |text: &str| {
            let idx = snapshot.service_at(text.parse().unwrap())?;
            Some(&*snapshot.service(idx)?.name)
        };
        assert_eq!(at("10.0.0.1:5432"), Some("a"), "the first by name has it");
        assert_eq!(at("10.0.0.1:5433"), Some("b"));
        assert_eq!(at("[fd00::1]:5432"), Some("a"));
        assert_eq!(at("[::ffff:10.0.0.1]:5433"), Some("b"));
        assert_eq!(at("10.0.0.2:5432"), None);
    }

    #[test]
    fn a_service_is_found_by_its_most_specific_name() {
        let snapshot = snapshot();
        let called = |text: &str| Some(&*snapshot.service(snapshot.service_called(text)?)?.name);
        assert_eq!(called("DB.example."), Some("a"));
        assert_eq!(called("x.example"), Some("b"));
        assert_eq!(called("x.y.eu.example"), Some("c"));
        assert_eq!(called("eu.example"), Some("b"));
        assert_eq!(called("example"), None);
        assert_eq!(called(".example"), None);
        assert_eq!(called(""), None);
    }
}
