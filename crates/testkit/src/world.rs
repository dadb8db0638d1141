//! Policy of any size, as it goes on the wire.

use leeward_proto::v1;
use std::net::Ipv4Addr;
use std::time::Duration;
use v1::resource::Spec;

/// How large a mesh's policy is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct World {
    /// Zones, `z0` and so on; at least 1.
    pub zones: u32,
    /// Services, `s0` and so on; at least 1.
    pub services: u32,
    /// Endpoints of all services together, spread evenly over them, and each service's over the zones.
    pub endpoints: u32,
    /// Routes, `r0` and so on; the host of `r7` is `h7.example`, and it goes to a service.
    pub routes: u32,
}

impl World {
    /// All of it: zones first, then services, then routes, so that any part of it can be applied after what stands before it.
    pub fn resources(&self) -> Vec<v1::Resource> {
        let zones = (0..self.zones).map(|i| resource(format!("z{i}"), Spec::Zone(v1::Zone::default())));
        let services = (0..self.services).map(|i| self.service(i));
        let routes = (0..self.routes).map(|i| self.route(i, Duration::from_secs(15)));
        zones.chain(services).chain(routes).collect()
    }

    fn service(&self, i: u32) -> v1::Resource {
        let services = self.services.max(1);
        let more = u32::from(i < self.endpoints % services);
        let endpoint = |j: u32| {
            // 10.0.0.0/8 has room for any world here.
            let place = (i.wrapping_add(j.wrapping_mul(services))) % (1 << 24);
            let address = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 0, 0, 0)) | place);
            v1::Endpoint {
                address: format!("{address}:8080"),
                zone: format!("z{}", i.wrapping_add(j) % self.zones.max(1)),
                ..v1::Endpoint::default()
            }
        };
        let service = v1::Service {
            endpoints: (0..self.endpoints / services + more).map(endpoint).collect(),
            ..v1::Service::default()
        };
        resource(format!("s{i}"), Spec::Service(service))
    }

    /// One of its routes, with a timeout that tells versions of it apart.
    pub fn route(&self, i: u32, timeout: Duration) -> v1::Resource {
        let path = v1::PathMatch {
            kind: Some(v1::path_match::Kind::Prefix("/".to_owned())),
        };
        let rule = v1::RouteRule {
            matches: vec![v1::RouteMatch {
                path: Some(path),
                ..v1::RouteMatch::default()
            }],
            backend_refs: vec![v1::BackendRef {
                service: format!("s{}", i % self.services.max(1)),
                ..v1::BackendRef::default()
            }],
            timeouts: Some(v1::RouteTimeouts {
                request: timeout.try_into().ok(),
                ..v1::RouteTimeouts::default()
            }),
            ..v1::RouteRule::default()
        };
        let route = v1::Route {
            hostnames: vec![format!("h{i}.example")],
            rules: vec![rule],
            ..v1::Route::default()
        };
        resource(format!("r{i}"), Spec::Route(route))
    }
}

fn resource(name: String, spec: Spec) -> v1::Resource {
    v1::Resource {
        metadata: Some(v1::Metadata {
            name,
            ..v1::Metadata::default()
        }),
        status: None,
        spec: Some(spec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_resource_of_a_world_is_good_and_endpoints_are_spread() {
        let world = World {
            zones: 3,
            services: 4,
            endpoints: 10,
            routes: 5,
        };
        let resources = world.resources();
        let bad = resources.iter().filter(|r| leeward_proto::parse(r).is_err());
        assert_eq!((resources.len(), bad.count()), (12, 0));
        let counts: Vec<_> = resources
            .iter()
            .filter_map(|r| match &r.spec {
                Some(Spec::Service(service)) => Some(service.endpoints.len()),
                _ => None,
            })
            .collect();
        assert_eq!(counts, [3, 3, 2, 2]);
        let mut addresses: Vec<_> = resources
            .iter()
            .filter_map(|r| match &r.spec {
                Some(Spec::Service(service)) => Some(service.endpoints.iter().map(|e| &e.address)),
                _ => None,
            })
            .flatten()
            .collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 10);
    }
}
