//! The workloads that one proxy attests.

use super::Viewer;
use crate::model::{Process, Spec, Workload};
use crate::{Name, Resource};
use std::collections::BTreeMap;

/// Those of a proxy's zone that are for it, by name.
#[derive(Clone, Debug, Default)]
pub struct Workloads {
    by_name: BTreeMap<Name, Workload>,
}

impl Workloads {
    pub(super) fn new<'a>(
        viewer: &Viewer,
        resources: impl Iterator<Item = (&'a Name, &'a Resource)>,
    ) -> Self {
        let ours = resources.filter_map(|(name, resource)| {
            if let Spec::Workload(workload) = &resource.spec
                && workload.is_for(&viewer.zone, &viewer.proxy)
            {
                Some((name.clone(), workload.clone()))
            } else {
                None
            }
        });
        Self {
            by_name: ours.collect(),
        }
    }

    /// What a process is, in order of the names; it may be several, or none.
    pub fn of(&self, process: &Process<'_>) -> Vec<Name> {
        let is_it = |(_, workload): &(&Name, &Workload)| workload.matches(process);
        let all = self.by_name.iter().filter(is_it);
        all.map(|(name, _)| name.clone()).collect()
    }

    /// Whether there is one of this name.
    pub fn has(&self, name: &Name) -> bool {
        self.by_name.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Snapshot;
    use crate::model::CgroupPattern;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn resource(text: &str, zone: &str, proxies: &[&str], uids: &[u32], cgroups: &[&str]) -> Resource {
        let patterns = cgroups.iter().map(|text| CgroupPattern::parse(text).unwrap());
        Resource {
            name: name(text),
            revision: 1,
            labels: BTreeMap::new(),
            spec: Spec::Workload(Workload {
                zone: name(zone),
                proxies: proxies.iter().map(|text| name(text)).collect(),
                uids: uids.to_vec(),
                cgroups: patterns.collect(),
            }),
        }
    }

    #[test]
    fn a_process_is_all_that_fits_in_order_of_names() {
        let world = [
            resource("shop", "a", &[], &[1000], &[]),
            resource("pay", "a", &["a1"], &[1000], &["/pay"]),
            resource("elsewhere", "b", &[], &[1000], &[]),
            resource("neighbour", "a", &["a2"], &[1000], &[]),
        ];
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        let snapshot = Snapshot::compile(viewer, 1, &world);
        let of = |uid, cgroup| snapshot.workloads().of(&Process { uid, cgroup });
        assert_eq!(of(1000, Some("/pay")), [name("pay"), name("shop")]);
        assert_eq!(of(1000, None), [name("shop")]);
        assert_eq!(of(1001, Some("/pay")), []);
        assert!(snapshot.workloads().has(&name("pay")));
        assert!(!snapshot.workloads().has(&name("elsewhere")));
    }
}
