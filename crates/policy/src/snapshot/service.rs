//! What is made of a service, which is the most of a large mesh's policy; so what has not changed is shared by snapshots.

use super::authorization::AuthorizationView;
use super::tier::{ExportedTo, Tier};
use super::way::{EndpointKey, EndpointView, Ways, transport, via};
use super::{Held, Snapshot};
use crate::model::{Protocol, ResiliencePolicy, Service, Zone};
use crate::{Name, Viewer};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A service, ready to choose from.
#[derive(Debug)]
pub struct ServiceView {
    /// Its name.
    pub name: Arc<str>,
    /// Its settings.
    pub spec: Arc<Service>,
    /// Every endpoint that can be reached, in zones that requests may go to.
    pub endpoints: Arc<[EndpointView]>,
    /// The endpoints by zone, in the order in which this proxy turns to the zones: its own first, unless policy names
    /// another order for the service.
    pub tiers: Arc<[Tier]>,
    /// The same for the subsets that routes name.
    pub subsets: Vec<Subset>,
    /// What protects it.
    pub resilience: Arc<ResiliencePolicy>,
    /// Its circuit is held for a while.
    pub held: Option<Held>,
    /// Who may do what with it; `None` is everybody everything.
    pub authorization: Option<Arc<AuthorizationView>>,
    /// Which other zones may have it from this proxy's.
    pub exported_to: ExportedTo,
}

impl ServiceView {
    /// The zones and endpoints that a target may go to.
    pub fn tiers_of(&self, subset: Option<usize>) -> &[Tier] {
        match subset {
            None => &self.tiers,
            Some(subset) => self.subsets.get(subset).map_or(&[], |subset| &subset.tiers),
        }
    }

    /// What names a subset's state across snapshots; empty for every endpoint.
    pub fn subset_id(&self, subset: Option<usize>) -> Arc<str> {
        let subset = subset.and_then(|subset| self.subsets.get(subset));
        subset.map_or_else(|| Arc::from(""), |subset| Arc::clone(&subset.id))
    }
}

/// The endpoints that have the labels that a route asks for.
#[derive(Debug)]
pub struct Subset {
    /// The labels, as `key=value,key=value`.
    pub id: Arc<str>,
    /// As [`ServiceView::tiers`].
    pub tiers: Vec<Tier>,
}

impl Snapshot {
    /// Whether it was made with just these zones.
    pub(super) fn has_seen(&self, zones: &BTreeMap<&Name, &Zone>) -> bool {
        let seen = self.zones_seen.iter();
        self.zones_seen.len() == zones.len()
            && seen
                .zip(zones)
                .all(|((name, zone), (now, zone_now))| name == *now && zone == *zone_now)
    }

    /// What was made of a service, if it was as it is now.
    pub(super) fn made_of(&self, name: &Name, service: &Service) -> Option<&ServiceView> {
        let view = self.service(self.service_named(name.as_str())?)?;
        // That of TCP was made another one.
        let same = match service.protocol {
            Protocol::Tcp => *view.spec == at_work(service),
            Protocol::Http1 | Protocol::Http2 => *view.spec == *service,
        };
        same.then_some(view)
    }
}

impl ServiceView {
    pub(super) fn new(name: &Name, service: &Service, viewer: &Viewer, ways: &Ways<'_>) -> Self {
        let shared = name.to_shared();
        let zones = ways.zones;
        let endpoints: Vec<_> = service
            .endpoints
            .iter()
            .filter(|endpoint| service.may_go(name, &viewer.zone, &endpoint.zone, zones))
            .filter_map(|endpoint| {
                let via = via(endpoint, viewer, zones)?;
                Some(EndpointView {
                    gateways: ways.gateways_to(&via, endpoint),
                    key: EndpointKey {
                        service: Arc::clone(&shared),
                        address: endpoint.address,
                        via,
                    },
                    zone: endpoint.zone.to_shared(),
                    id: match &endpoint.proxy {
                        Some(proxy) => format!("{}@{proxy}", endpoint.address).into(),
                        None => endpoint.address.to_string().into(),
                    },
                    transport: transport(endpoint, viewer, zones),
                    address_text: endpoint.address.to_string().into(),
                    weight: endpoint.weight,
                    labels: endpoint.labels.clone(),
                })
            })
            .collect();
        let tiers = Tier::all(&ways.order, &service.balance.mode, &endpoints, zones);
        Self {
            name: shared,
            spec: Arc::new(at_work(service)),
            endpoints: endpoints.into(),
            tiers: tiers.into(),
            subsets: Vec::new(),
            resilience: Arc::new(ResiliencePolicy::DEFAULT),
            held: None,
            authorization: None,
            exported_to: ExportedTo::new(name, service, zones),
        }
    }

    /// The same service in another snapshot, without what other resources say of it.
    pub(super) fn again(&self) -> Self {
        Self {
            name: Arc::clone(&self.name),
            spec: Arc::clone(&self.spec),
            endpoints: Arc::clone(&self.endpoints),
            tiers: Arc::clone(&self.tiers),
            subsets: Vec::new(),
            resilience: Arc::clone(&self.resilience),
            held: None,
            authorization: None,
            exported_to: self.exported_to.clone(),
        }
    }

    /// The position of a subset, which is made if it is new.
    pub(super) fn subset(&mut self, labels: &BTreeMap<Box<str>, Box<str>>) -> Option<usize> {
        if labels.is_empty() {
            return None;
        }
        let id = labels.iter().map(|(key, value)| format!("{key}={value}"));
        let id = id.collect::<Vec<_>>().join(",");
        if let Some(known) = self.subsets.iter().position(|known| *known.id == *id) {
            return Some(known);
        }
        let within = |&i: &usize| {
            let has = self.endpoints.get(i).map(|e| &e.labels);
            has.is_some_and(|has| labels.iter().all(|(k, v)| has.get(k) == Some(v)))
        };
        let tiers = self.tiers.iter().filter_map(|tier| tier.subset(within)).collect();
        self.subsets.push(Subset { id: id.into(), tiers });
        Some(self.subsets.len() - 1)
    }
}

/// A service's settings as they count.
fn at_work(service: &Service) -> Service {
    let mut spec = service.clone();
    if spec.protocol == Protocol::Tcp {
        // A connection is what a request is elsewhere, so that either bounds it.
        spec.pool.max_requests = spec.pool.max_requests.min(spec.pool.max_connections);
    }
    spec
}
