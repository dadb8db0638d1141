//! Which processes of a node get a certificate of their own.

use super::fields::Fields;
use crate::v1;

pub(super) fn workload(f: &mut Fields<'_>) -> v1::Workload {
    v1::Workload {
        zone: f.text("zone"),
        // Lists that name nothing would mean whatever there is.
        proxies: f.some_texts("proxies"),
        uids: f.some_numbers("uids"),
        cgroups: f.some_texts("cgroups"),
    }
}
