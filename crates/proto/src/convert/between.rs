//! What zones let through to each other: by which proxies, and which services.

use crate::field::Fields;
use crate::v1;
use leeward_policy::model::{DirectCallers, Selection, ZoneGateway};

/// Every name, where names are chosen.
const EVERY: &str = "*";
/// No name, likewise.
pub(crate) const NONE: &str = ".";

/// A zone's gateways, of its proxies.
pub(super) fn gateways(f: &mut Fields, wire: &[v1::ZoneGateway], proxies: &[&str]) -> Vec<ZoneGateway> {
    f.count("spec.gateways", wire.len(), 0..=64);
    let mut gateways = Vec::new();
    for (i, gateway) in wire.iter().enumerate() {
        let path = format!("spec.gateways[{i}].name");
        let name = f.name(&path, &gateway.name);
        if name.is_some() && !proxies.contains(&gateway.name.as_str()) {
            f.reject::<()>(
                path,
                format!("{:?} is none of spec.proxies; want one of them", gateway.name),
            );
        }
        let address = match gateway.address.as_str() {
            "" => Some(None),
            address => f
                .address(&format!("spec.gateways[{i}].address"), address)
                .map(Some),
        };
        gateways.extend(
            name.zip(address)
                .map(|(name, address)| ZoneGateway { name, address }),
        );
    }
    let names: Vec<_> = wire.iter().map(|gateway| gateway.name.as_str()).collect();
    f.unique("spec.gateways", ".name", &names);
    gateways
}

pub(super) fn direct_callers(f: &mut Fields, wire: &v1::Zone) -> Option<DirectCallers> {
    const FIELD: &str = "spec.directCallers";
    let said = v1::DirectCallers::try_from(wire.direct_callers);
    if wire.gateways.is_empty() && !matches!(said, Ok(v1::DirectCallers::Unspecified)) {
        return f.reject(FIELD, "is only for a zone with gateways; leave it out");
    }
    match said {
        Ok(v1::DirectCallers::Unspecified | v1::DirectCallers::Refuse) => Some(DirectCallers::Refuse),
        Ok(v1::DirectCallers::Allow) => Some(DirectCallers::Allow),
        Err(_) => f.reject(
            FIELD,
            format!("{} is not known; want Refuse or Allow", wire.direct_callers),
        ),
    }
}

/// Names, each once, or one of [`EVERY`] and [`NONE`] alone. No name at all means every one.
pub(super) fn selection(f: &mut Fields, path: &str, wire: &[String], what: &str) -> Selection {
    match wire {
        [] => return Selection::All,
        [every] if every == EVERY => return Selection::All,
        [none] if none == NONE => return Selection::Only(Vec::new()),
        _ => {}
    }
    f.count(path, wire.len(), 0..=4096);
    let mut names = Vec::new();
    for (i, name) in wire.iter().enumerate() {
        let path = format!("{path}[{i}]");
        if name == EVERY || name == NONE {
            f.reject::<()>(
                path,
                format!("is {name:?} beside others; want it alone, or names of {what}"),
            );
        } else {
            names.extend(f.name(&path, name));
        }
    }
    f.unique(path, "", wire);
    Selection::Only(names)
}
