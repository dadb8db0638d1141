//! How a proxy gets to endpoints: in which order of zones, through which proxies, by which transport.

use super::Via;
use crate::Viewer;
use crate::model::{Endpoint, Zone, ZoneTransport};
use crate::name::Name;
use std::collections::BTreeMap;

/// The caller's zone, then where it turns to, then the rest by name.
pub(super) fn zone_order<'a>(local: &'a Name, zones: &BTreeMap<&'a Name, &'a Zone>) -> Vec<&'a Name> {
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
    let Some(proxy) = &endpoint.proxy else {
        return Some(Via::Direct);
    };
    if *proxy == viewer.proxy && endpoint.zone == viewer.zone {
        return Some(Via::Direct);
    }
    let known = zones
        .get(&endpoint.zone)?
        .proxies
        .iter()
        .find(|p| p.name == *proxy)?;
    Some(Via::Proxy {
        address: known.address,
        zone: endpoint.zone.to_shared(),
        name: proxy.to_shared(),
    })
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
