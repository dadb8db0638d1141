//! A service's endpoints by zone, and which zones may be turned to.

use super::EndpointView;
use crate::Name;
use crate::model::{Selection, Service, Zone, ZoneDrain, ZoneMode};
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

/// The zones whose callers may have a service from another zone.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ExportedTo {
    /// These, sorted; `None`: all but those below.
    only: Option<Box<[Arc<str>]>>,
    /// Zones that don't take it, sorted.
    not: Box<[Arc<str>]>,
}

impl ExportedTo {
    pub(super) fn new(name: &Name, service: &Service, zones: &BTreeMap<&Name, &Zone>) -> Self {
        let sorted = |mut names: Vec<Arc<str>>| {
            names.sort_unstable();
            names.into_boxed_slice()
        };
        let only = match &service.export_to {
            Selection::All => None,
            Selection::Only(names) => Some(sorted(names.iter().map(Name::to_shared).collect())),
        };
        let refuse = zones.iter().filter(|(_, zone)| !zone.imports.has(name.as_str()));
        Self {
            only,
            not: sorted(refuse.map(|(zone, _)| zone.to_shared()).collect()),
        }
    }

    /// Whether it is everybody.
    pub const fn is_all(&self) -> bool {
        self.only.is_none() && self.not.is_empty()
    }

    /// Whether a zone other than that of the endpoints is among them. O(log zones).
    pub fn has(&self, zone: &str) -> bool {
        let among = |names: &[Arc<str>]| names.binary_search_by(|name| (**name).cmp(zone)).is_ok();
        self.only.as_deref().is_none_or(among) && !among(&self.not)
    }
}
