//! What is wrong with Workloads.

use crate::manifest;
use crate::parse;
use leeward_policy::Spec;
use leeward_policy::model::Workload;

fn read(spec: &str) -> Result<Workload, Vec<String>> {
    let text = format!("apiVersion: leeward.dev/v1\nkind: Workload\nmetadata: {{name: pay}}\nspec: {spec}\n");
    let resources = match manifest::parse("f", &text) {
        Ok(resources) => resources,
        Err(errors) => {
            let told = errors.iter().map(|e| format!("{}: {}", e.path, e.reason));
            return Err(told.collect());
        }
    };
    match parse(&resources[0]) {
        Ok(resource) => {
            let Spec::Workload(workload) = resource.spec else {
                panic!("{:?}", resource.spec);
            };
            Ok(workload)
        }
        Err(bad) => Err(bad.iter().map(ToString::to_string).collect()),
    }
}

#[test]
fn users_or_groups_are_enough() {
    let workload = read("{zone: a, uids: [0, 1000]}").unwrap();
    assert_eq!(
        (workload.uids.as_slice(), workload.cgroups.len()),
        (&[0, 1000][..], 0)
    );
    let workload = read("{zone: a, proxies: [a1], cgroups: [/x.slice/pay.service, /y/*]}").unwrap();
    assert_eq!((workload.uids.len(), workload.cgroups.len()), (0, 2));
}

#[test]
fn what_is_wrong_is_named() {
    for (spec, path, reason) in [
        ("{zone: a}", "spec", "want uids, cgroups or both"),
        ("{zone: a, proxies: [a1]}", "spec", "want uids, cgroups or both"),
        ("{uids: [1]}", "spec.zone", ""),
        ("{zone: a, uids: []}", "spec.uids", "is empty"),
        ("{zone: a, uids: [1], cgroups: []}", "spec.cgroups", "is empty"),
        ("{zone: a, uids: [1], proxies: []}", "spec.proxies", "is empty"),
        (
            "{zone: a, uids: [4294967295]}",
            "spec.uids[0]",
            "want 0 to 4294967294",
        ),
        ("{zone: a, uids: [4294967296]}", "spec.uids[0]", "out of range"),
        ("{zone: a, uids: [root]}", "spec.uids[0]", "number"),
        ("{zone: a, uids: [7, 7]}", "spec.uids[1]", "must stand once"),
        (
            "{zone: a, cgroups: [pay]}",
            "spec.cgroups[0]",
            "doesn't begin with /",
        ),
        (
            "{zone: a, cgroups: [/a, /a*]}",
            "spec.cgroups[1]",
            "whole last component",
        ),
        (
            "{zone: a, cgroups: [\"/*\"]}",
            "spec.cgroups[0]",
            "every group but the root",
        ),
        (
            "{zone: a, uids: [1], pods: [x]}",
            "spec.pods",
            "there is no such field",
        ),
    ] {
        let bad = read(spec).unwrap_err();
        let found = bad
            .iter()
            .any(|told| told.starts_with(&format!("{path}: ")) && told.contains(reason));
        assert!(found, "{spec}: {bad:?}");
    }
    let many: Vec<String> = (0..257).map(|n: u32| n.to_string()).collect();
    let bad = read(&format!("{{zone: a, uids: [{}]}}", many.join(", "))).unwrap_err();
    assert!(bad[0].contains("has 257 entries; want 0 to 256"), "{bad:?}");
}
