//! Which processes of a node get a certificate of their own, at random.

use super::name;
use leeward_policy::Spec;
use leeward_policy::model::{CgroupPattern, Workload};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

fn cgroup() -> impl Strategy<Value = String> {
    let path = vec("[a-z@:_-][a-z.@:_ -]{0,8}", 1..4).prop_map(|parts| format!("/{}", parts.join("/")));
    (path, any::<bool>()).prop_map(|(path, below)| if below { format!("{path}/*") } else { path })
}

pub(super) fn workload() -> impl Strategy<Value = Spec> {
    (
        name(),
        btree_set(name(), 0..3),
        btree_set(0..u32::MAX, 0..4),
        btree_set(cgroup(), 1..4),
    )
        .prop_map(|(zone, proxies, uids, cgroups)| {
            Spec::Workload(Workload {
                zone,
                proxies: proxies.into_iter().collect(),
                uids: uids.into_iter().collect(),
                cgroups: cgroups
                    .iter()
                    .map(|text| CgroupPattern::parse(text).unwrap())
                    .collect(),
            })
        })
}
