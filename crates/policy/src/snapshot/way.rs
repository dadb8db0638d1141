//! How a proxy gets to endpoints: in which order of zones, through which proxies, by which transport.

use super::{GatewayView, Gateways};
use crate::Viewer;
use crate::model::{DirectCallers, Endpoint, Zone, ZoneTransport};
use crate::name::Name;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

/// What identifies an endpoint's run-time state across snapshots.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct EndpointKey {
    /// The service's name.
    pub service: Arc<str>,
    /// Where the workload listens.
    pub address: SocketAddr,
    /// How this proxy gets there.
    pub via: Via,
}

/// How a proxy gets to an endpoint.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Via {
    /// Straight to the workload.
    Direct,
    /// Through the inbound listener of the proxy in front of it, with mutual TLS.
    Proxy {
        /// The listener.
        address: SocketAddr,
        /// The zone in that proxy's certificate.
        zone: Arc<str>,
        /// The name in that proxy's certificate.
        name: Arc<str>,
    },
    /// Through a gateway of its zone; which, is chosen for each request of [`EndpointView::gateways`], so that the
    /// endpoint stays the same whichever it is.
    Gateway {
        /// The zone.
        zone: Arc<str>,
        /// The proxy in front of it, if there is one.
        proxy: Option<Arc<str>>,
    },
}

/// One endpoint, as this proxy reaches it.
#[derive(Debug)]
pub struct EndpointView {
    /// Its identity.
    pub key: EndpointKey,
    /// Its zone.
    pub zone: Arc<str>,
    /// How requests get to the proxy in front of it, or to the gateway, if there is one.
    pub transport: ZoneTransport,
    /// The gateways through which alone it is reached, if it is so. None of them is no way at all.
    pub gateways: Option<Arc<[GatewayView]>>,
    /// `key.address` as text.
    pub address_text: Arc<str>,
    /// Names it among the service's endpoints, the same at every proxy: nodes' networks may use an address
    /// twice.
    pub id: Arc<str>,
    /// Its share relative to the others, at least 1.
    pub weight: u32,
    pub(super) labels: BTreeMap<Box<str>, Box<str>>,
}

/// What is known of the ways from one zone.
pub(super) struct Ways<'a> {
    pub(super) zones: &'a BTreeMap<&'a Name, &'a Zone>,
    /// The zones in the order in which callers turn to them.
    pub(super) order: Vec<&'a Name>,
    /// The gateways of every zone that has some, as proxies of other zones see them. One that can't be resolved is left
    /// out, and if that is so of all, there is no way to the zone.
    gateways: BTreeMap<&'a Name, Arc<[GatewayView]>>,
}

impl<'a> Ways<'a> {
    pub(super) fn new(viewer: &'a Viewer, zones: &'a BTreeMap<&'a Name, &'a Zone>) -> Self {
        let with = zones.iter().filter(|(_, zone)| !zone.gateways.is_empty());
        let gateways = with.map(|(name, zone)| {
            let seen = zone.gateways.iter().filter_map(|gateway| {
                let proxy = zone.proxy(&gateway.name)?;
                Some(GatewayView {
                    zone: name.to_shared(),
                    name: gateway.name.to_shared(),
                    address: gateway.address.unwrap_or(proxy.address),
                })
            });
            (*name, seen.collect())
        });
        Self {
            zones,
            order: zone_order(&viewer.zone, zones),
            gateways: gateways.collect(),
        }
    }

    /// The gateways by which an endpoint is reached: if the proxy in front of it is one itself, that one.
    pub(super) fn gateways_to(&self, via: &Via, endpoint: &Endpoint) -> Option<Arc<[GatewayView]>> {
        let Via::Gateway { proxy, .. } = via else {
            return None;
        };
        let all = self.gateways.get(&endpoint.zone).cloned().unwrap_or_default();
        let own = all.iter().find(|gateway| Some(&gateway.name) == proxy.as_ref());
        Some(match own {
            Some(own) => Arc::from([own.clone()]),
            None => all,
        })
    }
}

/// The caller's zone, then where it turns to, then the rest by name.
fn zone_order<'a>(local: &'a Name, zones: &BTreeMap<&'a Name, &'a Zone>) -> Vec<&'a Name> {
    let mut order = vec![local];
    let listed = zones.get(local).into_iter().flat_map(|zone| &zone.failover);
    for zone in listed.chain(zones.keys().copied()) {
        if !order.contains(&zone) {
            order.push(zone);
        }
    }
    order
}

/// `None` if the proxy in front of the endpoint isn't known: a missing hop is a failure, never a bypass.
pub(super) fn via(endpoint: &Endpoint, viewer: &Viewer, zones: &BTreeMap<&Name, &Zone>) -> Option<Via> {
    let zone = zones.get(&endpoint.zone);
    let known = match &endpoint.proxy {
        Some(proxy) if *proxy == viewer.proxy && endpoint.zone == viewer.zone => return Some(Via::Direct),
        Some(proxy) => Some(zone?.proxy(proxy)?),
        None => None,
    };
    if endpoint.zone != viewer.zone && zone.is_some_and(|zone| !zone.gateways.is_empty()) {
        return Some(Via::Gateway {
            zone: endpoint.zone.to_shared(),
            proxy: known.map(|proxy| proxy.name.to_shared()),
        });
    }
    Some(match known {
        None => Via::Direct,
        Some(proxy) => Via::Proxy {
            address: proxy.address,
            zone: endpoint.zone.to_shared(),
            name: proxy.name.to_shared(),
        },
    })
}

/// What the gateways of its own zone mean to a proxy.
pub(super) fn own_gateways(viewer: &Viewer, zones: &BTreeMap<&Name, &Zone>) -> Gateways {
    let Some(zone) = zones.get(&viewer.zone) else {
        return Gateways::default();
    };
    let names: Vec<_> = zone.gateways.iter().map(|g| g.name.to_shared()).collect();
    let is_one = zone.gateways.iter().any(|gateway| gateway.name == viewer.proxy);
    Gateways {
        is_one,
        required: !names.is_empty() && !is_one && zone.direct_callers == DirectCallers::Refuse,
        names,
    }
}

/// How requests get to the proxy in front of an endpoint: that zone's word, for callers from outside or within.
pub(super) fn transport(
    endpoint: &Endpoint,
    viewer: &Viewer,
    zones: &BTreeMap<&Name, &Zone>,
) -> ZoneTransport {
    match zones.get(&endpoint.zone) {
        Some(zone) if endpoint.zone == viewer.zone => zone.transport_within,
        Some(zone) => zone.transport,
        // Without a Zone there is no proxy to get to.
        None => ZoneTransport::Tcp,
    }
}
