//! Which processes of a node get a certificate of their own, on the wire.

use super::names;
use crate::v1;
use leeward_policy::model::Workload;

pub(super) fn workload(workload: &Workload) -> v1::Workload {
    v1::Workload {
        zone: workload.zone.to_string(),
        proxies: names(&workload.proxies),
        uids: workload.uids.clone(),
        cgroups: workload.cgroups.iter().map(ToString::to_string).collect(),
    }
}
