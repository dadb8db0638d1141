//! What zones let through to each other: by which proxies, and which services.

use super::{Service, Zone};
use crate::Name;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// A proxy by which other zones reach a zone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ZoneGateway {
    /// One of the zone's proxies.
    pub name: Name,
    /// Where other zones reach it; `None`: where the zone's own proxies do.
    pub address: Option<SocketAddr>,
}

/// What becomes of requests from other zones that come to a proxy by no gateway, where a zone has gateways.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum DirectCallers {
    /// They are refused.
    Refuse,
    /// They are served: for while gateways are brought in, or taken out.
    Allow,
}

/// Zones, or services, that are chosen by their names.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Selection {
    /// All.
    #[default]
    All,
    /// Those; none, if it is empty. Each once.
    Only(Vec<Name>),
}

impl Selection {
    /// Whether a name is among them. O(names).
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.iter().any(|known| known.as_str() == name),
        }
    }

    /// The names, where they are few.
    pub fn names(&self) -> &[Name] {
        match self {
            Self::All => &[],
            Self::Only(names) => names,
        }
    }
}

impl Service {
    /// Whether requests for the service, which has this name, may go from callers in one zone to another: by data
    /// residency, and by what zones give to each other. A zone that isn't known has no labels, and takes everything.
    pub fn may_go(&self, name: &Name, from: &Name, to: &Name, zones: &BTreeMap<&Name, &Zone>) -> bool {
        from == to || self.is_at_home(from, to, zones) && self.is_given(name, from, zones)
    }

    /// Whether data residency lets requests of callers in one zone go to another.
    pub fn is_at_home(&self, from: &Name, to: &Name, zones: &BTreeMap<&Name, &Zone>) -> bool {
        let Some(key) = &self.balance.within else {
            return true;
        };
        let both = zones.get(from).zip(zones.get(to));
        from == to || both.is_some_and(|(from, to)| from.is_like(to, key))
    }

    /// Whether other zones give it to a zone, and that takes it.
    pub fn is_given(&self, name: &Name, to: &Name, zones: &BTreeMap<&Name, &Zone>) -> bool {
        let takes = |zone: &&Zone| zone.imports.has(name.as_str());
        self.export_to.has(to.as_str()) && zones.get(to).is_none_or(takes)
    }
}
