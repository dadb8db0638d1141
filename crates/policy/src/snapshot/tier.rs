//! A service's endpoints by zone, and which zones may be turned to.

use super::EndpointView;
use crate::Name;
use crate::model::{Service, Zone, ZoneDrain, ZoneMode};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The endpoints of one zone.
#[derive(Debug)]
pub struct Tier {
    /// The zone.
    pub zone: Arc<str>,
    /// Positions in [`super::ServiceView::endpoints`].
    pub endpoints: Vec<usize>,
    /// The zone is taken out of use for a while.
    pub drain: Option<Arc<ZoneDrain>>,
    /// Its share relative to the others', where several zones serve at once; `None` in every tier where one does, and
    /// the next what that can't.
    pub weight: Option<u32>,
}

impl Tier {
    /// Those of these endpoints, in the order in which a service's requests turn to the zones. `order` is that of the
    /// caller.
    pub(super) fn all(
        order: &[&Name],
        mode: &ZoneMode,
        endpoints: &[EndpointView],
        zones: &BTreeMap<&Name, &Zone>,
    ) -> Vec<Self> {
        let mut order = order.to_vec();
        if let ZoneMode::ActivePassive(listed) = mode {
            // Stable, so that the others follow as they are.
            order.sort_by_key(|zone| {
                listed
                    .iter()
                    .position(|listed| listed == *zone)
                    .unwrap_or(usize::MAX)
            });
        }
        let tiers = order.iter().map(|zone| Self {
            zone: zone.to_shared(),
            endpoints: (0..)
                .zip(endpoints)
                .filter(|(_, endpoint)| *endpoint.zone == *zone.as_str())
                .map(|(i, _)| i)
                .collect(),
            drain: zones.get(zone).and_then(|zone| zone.drain.clone()).map(Arc::new),
            weight: weight(mode, zone),
        });
        tiers.filter(|tier| !tier.endpoints.is_empty()).collect()
    }

    /// The endpoints among these that are `within`; `None` if none is.
    pub(super) fn subset(&self, within: impl Fn(&usize) -> bool) -> Option<Self> {
        let endpoints: Vec<usize> = self.endpoints.iter().copied().filter(within).collect();
        (!endpoints.is_empty()).then(|| Self {
            zone: Arc::clone(&self.zone),
            endpoints,
            drain: self.drain.clone(),
            weight: self.weight,
        })
    }
}

fn weight(mode: &ZoneMode, zone: &Name) -> Option<u32> {
    let ZoneMode::ActiveActive(weights) = mode else {
        return None;
    };
    let listed = weights.iter().find(|(listed, _)| listed == zone);
    Some(listed.map_or(0, |(_, weight)| *weight))
}

/// Whether requests of callers in one zone may go to another. A zone that isn't known has no labels.
pub(super) fn may_go(service: &Service, from: &Name, to: &Name, zones: &BTreeMap<&Name, &Zone>) -> bool {
    let Some(key) = &service.balance.within else {
        return true;
    };
    let both = zones.get(from).zip(zones.get(to));
    from == to || both.is_some_and(|(from, to)| from.is_like(to, key))
}
