//! What draining a zone would do, judged by what a control plane knows: weights, and which proxies are connected.

use leeward_policy::Name;
use leeward_policy::model::{Endpoint, Service, Zone, ZoneMode};
use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

/// What a control plane knows.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) zones: BTreeMap<Name, Zone>,
    pub(super) services: BTreeMap<Name, Service>,
    /// Zone and name of each proxy that is connected.
    pub(super) connected: BTreeSet<(String, String)>,
}

/// What becomes of a service's requests that go to the zone now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Move {
    pub(super) service: Name,
    /// The zones whose callers it is about.
    pub(super) callers: Vec<Name>,
    /// Where the requests would go.
    pub(super) to: Vec<Name>,
    /// What part of them those could carry, in percent.
    pub(super) carried: u32,
    /// The load of the endpoints there afterwards, in percent of what it is now; `None` where there are none.
    pub(super) load: Option<u32>,
    /// Why it isn't everything, and what stands in the way.
    pub(super) why: Vec<String>,
}

impl Move {
    /// In percent: what would be lost if the zone went away, and what stays there while it is drained.
    pub(super) const fn lost(&self) -> u32 {
        100u32.saturating_sub(self.carried)
    }
}

/// The endpoints of a service in one zone.
#[derive(Clone, Copy, Debug, Default)]
struct Side {
    /// Sum of the weights of those that can be reached.
    able: f64,
    /// How many can be, and how many there are.
    healthy: u32,
    total: u32,
}

impl Known {
    /// What draining a zone would do, service by service.
    pub(super) fn plan(&self, zone: &Name, now: SystemTime) -> Vec<Move> {
        let services = self.services.iter();
        services
            .flat_map(|(name, service)| self.plan_service(zone, name, service, now))
            .collect()
    }

    fn plan_service(&self, zone: &Name, name: &Name, service: &Service, now: SystemTime) -> Vec<Move> {
        let mut moves: Vec<Move> = Vec::new();
        for caller in self.zones.keys() {
            let Some(found) = self.plan_callers(zone, (name, service), caller, now) else {
                continue;
            };
            let alike = moves.iter_mut().find(|known| {
                (&known.to, known.carried, known.load, &known.why)
                    == (&found.to, found.carried, found.load, &found.why)
            });
            match alike {
                Some(known) => known.callers.push(caller.clone()),
                None => moves.push(found),
            }
        }
        moves
    }

    /// The same for the callers in one zone; `None` if their requests don't go to the zone.
    fn plan_callers(
        &self,
        zone: &Name,
        (name, service): (&Name, &Service),
        caller: &Name,
        now: SystemTime,
    ) -> Option<Move> {
        let (mut to, mut forbidden, mut drained, mut down) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut able = Vec::new();
        for other in self.order(caller, service) {
            let side = self.side(service, other);
            if side.total == 0 {
                continue;
            }
            let is_out = self.zones.get(other).and_then(|other| other.drain.as_ref());
            if !self.may_go(service, caller, other) {
                forbidden.push(other);
            } else if side.healthy == 0 {
                down.push(other);
            } else if other != zone && is_out.is_some_and(|drain| drain.kept(now) <= 0.0) {
                drained.push(other);
            } else {
                able.push(other);
                if other != zone {
                    to.push(other);
                }
            }
        }
        let serves = |zone: &Name| match &service.balance.mode {
            ZoneMode::ActiveActive(zones) => zones.iter().any(|(of, weight)| of == zone && *weight > 0),
            ZoneMode::Nearest | ZoneMode::ActivePassive(_) => false,
        };
        let turned_to = if able.iter().any(|zone| serves(zone)) {
            serves(zone) && able.contains(&zone)
        } else {
            able.first() == Some(&zone)
        };
        if !turned_to {
            return None;
        }
        let factor = f64::from(service.balance.zones.overprovisioning_factor) / 100.0;
        let here = self.side(service, zone).able;
        let sides = to.iter().map(|other| self.side(service, other));
        let (mut able, mut room) = (0.0, 0.0);
        for side in sides {
            able += side.able;
            // As proxies reckon it: by the part of the zone's endpoints that are well.
            room += (f64::from(side.healthy) / f64::from(side.total.max(1)) * factor).min(1.0);
        }
        let spare = able * (factor - 1.0).max(0.0);
        let carried = (spare / here).min(room).clamp(0.0, 1.0);
        let mut why = Vec::new();
        let mut because = |text: &str, zones: &[&Name]| {
            if !zones.is_empty() {
                let zones: Vec<&str> = zones.iter().map(|zone| zone.as_str()).collect();
                why.push(format!("{text}: {}", zones.join(", ")));
            }
        };
        let key = service.balance.within.as_deref().unwrap_or_default();
        because(&format!("another {key}"), &forbidden);
        because("out of use", &drained);
        because("no proxy is connected", &down);
        if to.is_empty() {
            why.push("no other zone has an endpoint that they may use".to_owned());
        } else if spare < here * (1.0 - 1e-9) {
            let most = service.balance.zones.overprovisioning_factor;
            why.push(format!("an endpoint can take {most} % of its share"));
        }
        Some(Move {
            service: name.clone(),
            callers: vec![caller.clone()],
            to: to.into_iter().cloned().collect(),
            carried: percent(carried, f64::floor),
            load: (able > 0.0).then(|| percent((able + here) / able, f64::ceil)),
            why,
        })
    }

    /// The zones in the order in which callers of one turn to them for a service.
    fn order<'a>(&'a self, caller: &'a Name, service: &Service) -> Vec<&'a Name> {
        let mut order = vec![caller];
        let listed = self.zones.get(caller).into_iter().flat_map(|zone| &zone.failover);
        for zone in listed.chain(self.zones.keys()) {
            if !order.contains(&zone) {
                order.push(zone);
            }
        }
        if let ZoneMode::ActivePassive(listed) = &service.balance.mode {
            // Stable, so that the others follow as they are.
            order.sort_by_key(|zone| {
                listed
                    .iter()
                    .position(|listed| listed == *zone)
                    .unwrap_or(usize::MAX)
            });
        }
        order
    }

    fn may_go(&self, service: &Service, from: &Name, to: &Name) -> bool {
        service.balance.within.as_ref().is_none_or(|key| {
            let both = self.zones.get(from).zip(self.zones.get(to));
            from == to || both.is_some_and(|(from, to)| from.is_like(to, key))
        })
    }

    fn side(&self, service: &Service, zone: &Name) -> Side {
        let mut side = Side::default();
        for endpoint in service.endpoints.iter().filter(|endpoint| endpoint.zone == *zone) {
            side.total = side.total.saturating_add(1);
            if self.is_up(endpoint) {
                side.healthy = side.healthy.saturating_add(1);
                side.able += f64::from(endpoint.weight);
            }
        }
        side
    }

    /// One without a proxy in front is taken to be well: nobody tells the control plane of it.
    fn is_up(&self, endpoint: &Endpoint) -> bool {
        endpoint.proxy.as_ref().is_none_or(|proxy| {
            let place = (endpoint.zone.to_string(), proxy.to_string());
            self.connected.contains(&place)
        })
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast from float saturates, and it is no less than 0"
)]
fn percent(part: f64, round: fn(f64) -> f64) -> u32 {
    // What is whole but for inexact sums is whole.
    let percent = part * 100.0;
    let near = percent.round();
    let whole = (percent - near).abs() < 1e-6;
    (if whole { near } else { round(percent) }) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::Spec;
    use leeward_proto::manifest;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn known(text: &str, connected: &[&str]) -> Known {
        let mut known = Known::default();
        for wire in manifest::parse("test", text).unwrap() {
            let resource = leeward_proto::parse(&wire).unwrap();
            if let Spec::Zone(zone) = resource.spec {
                known.zones.insert(resource.name, zone);
            } else if let Spec::Service(service) = resource.spec {
                known.services.insert(resource.name, service);
            }
        }
        let places = connected
            .iter()
            .map(|name| (name[..1].to_owned(), (*name).to_owned()));
        known.connected.extend(places);
        known
    }

    fn zone(name: &str, spec: &str) -> String {
        format!("---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
    }

    /// A service with an endpoint of this weight in each of these zones, behind the zone's proxy.
    fn service(weights: &[(&str, u32)], more: &str) -> String {
        let endpoints: Vec<String> = (1..)
            .zip(weights)
            .map(|(port, (zone, weight))| {
                format!("{{address: \"127.0.0.1:{port}\", zone: {zone}, proxy: {zone}1, weight: {weight}}}")
            })
            .collect();
        let endpoints = endpoints.join(", ");
        format!(
            "---\napiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: app}}\nspec: {{endpoints: [{endpoints}]{more}}}\n"
        )
    }

    fn of(known: &Known) -> Vec<String> {
        let names = |names: &[Name]| names.iter().map(Name::as_str).collect::<Vec<_>>().join("+");
        let zone = Name::parse("a").unwrap();
        known
            .plan(&zone, NOW)
            .iter()
            .map(|m| {
                let (callers, to) = (names(&m.callers), names(&m.to));
                format!("{callers}>{to} {} {:?} {}", m.carried, m.load, m.why.join("; "))
            })
            .collect()
    }

    #[test]
    fn the_others_can_carry_what_their_weights_leave_room_for() {
        let zones = zone("a", "") + &zone("b", "") + &zone("c", "");
        let up = ["a1", "b1", "c1"];
        let roomy = service(&[("a", 2), ("b", 3), ("c", 3)], "");
        assert_eq!(
            of(&known(&(zones.clone() + &roomy), &up)),
            ["a>b+c 100 Some(134) "]
        );
        let tight = service(&[("a", 4), ("b", 3), ("c", 2)], "");
        let want = "a>b+c 50 Some(180) an endpoint can take 140 % of its share";
        assert_eq!(of(&known(&(zones.clone() + &tight), &up)), [want]);
        let doubled = service(
            &[("a", 4), ("b", 3), ("c", 2)],
            ", loadBalancer: {zoneFailover: {overprovisioningFactor: 200}}",
        );
        assert_eq!(
            of(&known(&(zones.clone() + &doubled), &up)),
            ["a>b+c 100 Some(180) "]
        );
        let elsewhere = service(&[("b", 1)], "");
        assert!(of(&known(&(zones + &elsewhere), &up)).is_empty());
    }

    #[test]
    fn callers_whose_own_zone_has_none_are_moved_too() {
        let zones = zone("a", "") + &zone("b", "") + &zone("c", "") + &zone("d", "failover: [b]");
        let app = service(&[("a", 1), ("b", 9)], "");
        // Those of d turn to b already.
        assert_eq!(
            of(&known(&(zones + &app), &["a1", "b1"])),
            ["a+c>b 100 Some(112) "]
        );
    }

    #[test]
    fn the_mode_of_a_service_says_whose_requests_go_there() {
        let zones = zone("a", "") + &zone("b", "") + &zone("c", "");
        let up = ["a1", "b1", "c1"];
        let of_mode = |mode: &str| {
            let more = format!(", loadBalancer: {{zoneFailover: {{{mode}}}}}");
            let app = service(&[("a", 1), ("b", 9), ("c", 9)], &more);
            of(&known(&(zones.clone() + &app), &up))
        };
        assert_eq!(of_mode(""), ["a>b+c 100 Some(106) "]);
        assert_eq!(
            of_mode("activePassive: {zones: [a, c]}"),
            ["a+b+c>c+b 100 Some(106) "]
        );
        assert!(of_mode("activePassive: {zones: [c]}").is_empty());
        assert_eq!(
            of_mode("activeActive: {zones: [{zone: a}, {zone: c}]}"),
            ["a+b>b+c 100 Some(106) ", "c>c+b 100 Some(106) "]
        );
        assert!(of_mode("activeActive: {zones: [{zone: a, weight: 0}, {zone: c}]}").is_empty());
    }

    #[test]
    fn what_may_not_go_and_who_is_not_there_is_told() {
        let eu = "labels: {region: eu}";
        let zones = zone("a", eu) + &zone("b", "labels: {region: us}") + &zone("c", eu);
        let within = ", loadBalancer: {zoneFailover: {within: region}}";
        let app = service(&[("a", 1), ("b", 9), ("c", 9)], within);
        let all = zones.clone() + &app;
        assert_eq!(
            of(&known(&all, &["a1", "b1", "c1"])),
            ["a>c 100 Some(112) another region: b"]
        );
        assert_eq!(
            of(&known(&all, &["a1", "b1"])),
            [
                "a+c> 0 None another region: b; no proxy is connected: c; no other zone has an endpoint that they may use"
            ]
        );
        assert!(of(&known(&all, &["b1", "c1"])).is_empty(), "nothing is there now");
        let out = "drain: {startTime: \"1970-01-01T00:00:00Z\", expireTime: \"1971-01-01T00:00:00Z\"}";
        let zones = zone("a", "") + &zone("b", out);
        let known = known(&(zones + &service(&[("a", 1), ("b", 1)], "")), &["a1", "b1"]);
        let later = NOW + std::time::Duration::from_secs(3600);
        let [only] = &known.plan(&Name::parse("a").unwrap(), later)[..] else {
            panic!("{known:?}");
        };
        assert_eq!((only.carried, only.why[0].as_str()), (0, "out of use: b"));
        assert_eq!(only.lost(), 100);
    }
}
