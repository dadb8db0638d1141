//! What zones let through to each other.

use super::check;
use crate::manifest::parse as read;
use crate::parse;
use leeward_policy::Spec;
use leeward_policy::model::Selection;

/// Whom a service is exported to.
fn exported_to(spec: &str) -> Selection {
    let text = format!("apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: a}}\nspec: {spec}\n");
    let wire = read("f", &text).unwrap().remove(0);
    let Spec::Service(service) = parse(&wire).unwrap().spec else {
        panic!("it is no service");
    };
    service.export_to
}

#[test]
fn gateways_are_proxies_of_the_zone() {
    let proxies =
        "proxies: [{name: a1, address: \"10.0.0.1:15008\"}, {name: a2, address: \"10.0.0.2:15008\"}]";
    check(
        "Zone",
        &format!(
            "{{{proxies}, directCallers: Allow, gateways: [{{name: a1}}, {{name: a2, address: \"192.0.2.1:443\"}}]}}"
        ),
        &[],
    );
    check(
        "Zone",
        &format!(
            "{{{proxies}, gateways: [{{name: a3}}, {{name: a1, address: here}}, {{name: a1}}, {{name: A}}]}}"
        ),
        &[
            "spec.gateways[0].name: \"a3\" is none of spec.proxies; want one of them",
            "spec.gateways[1].address: \"here\" is not IP:PORT, such as 10.0.0.7:8080",
            "spec.gateways[2].name: a1 stands at spec.gateways[1] already; each must stand once",
            "spec.gateways[3].name: \"A\" has 'A' at byte 0; a name is a-z, 0-9 and '-', with no '-' at either end",
        ],
    );
    check(
        "Zone",
        "{directCallers: Refuse}",
        &["spec.directCallers: is only for a zone with gateways; leave it out"],
    );
}

#[test]
fn what_zones_give_and_take_is_named() {
    for all in ["", "exportTo: []", "exportTo: [\"*\"]"] {
        assert_eq!(exported_to(&format!("{{{all}}}")), Selection::All, "{all}");
    }
    assert_eq!(exported_to("{exportTo: [\".\"]}"), Selection::Only(Vec::new()));
    check("Service", "{exportTo: [b, c]}", &[]);
    check("Zone", "{imports: [shop, pay]}", &[]);
    check(
        "Service",
        "{exportTo: [b, \"*\", b, \".\"]}",
        &[
            "spec.exportTo[1]: is \"*\" beside others; want it alone, or names of zones",
            "spec.exportTo[2]: b stands at spec.exportTo[0] already; each must stand once",
            "spec.exportTo[3]: is \".\" beside others; want it alone, or names of zones",
        ],
    );
    check(
        "Zone",
        "{imports: [Shop]}",
        &[
            "spec.imports[0]: \"Shop\" has 'S' at byte 0; a name is a-z, 0-9 and '-', with no '-' at either end",
        ],
    );
}
