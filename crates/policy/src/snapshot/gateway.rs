//! The proxies by which zones are reached from others.

use std::net::SocketAddr;
use std::sync::Arc;

/// A gateway of another zone, as this proxy reaches it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct GatewayView {
    /// The zone in its certificate.
    pub zone: Arc<str>,
    /// The name in its certificate.
    pub name: Arc<str>,
    /// Where it listens for other zones.
    pub address: SocketAddr,
}

/// The gateways of a proxy's own zone.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Gateways {
    /// Their names in certificates; none, if other zones reach the zone's proxies themselves.
    pub names: Vec<Arc<str>>,
    /// Whether this proxy is one.
    pub is_one: bool,
    /// Whether this proxy refuses what comes from other zones by no gateway.
    pub required: bool,
}

impl Gateways {
    /// Whether the proxy of this name is one. O(gateways), which are at most 64.
    pub fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| **known == *name)
    }
}
