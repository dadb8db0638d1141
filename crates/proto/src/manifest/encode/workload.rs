//! Which processes of a node get a certificate of their own.

use super::fields;
use crate::v1;
use serde_json::{Value, json};

pub(super) fn workload(workload: &v1::Workload) -> Value {
    fields([
        ("zone", json!(workload.zone)),
        ("proxies", json!(workload.proxies)),
        ("uids", json!(workload.uids)),
        ("cgroups", json!(workload.cgroups)),
    ])
}
