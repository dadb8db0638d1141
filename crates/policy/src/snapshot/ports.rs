//! Listeners for clients from outside, as one proxy has them.

use super::{ActView, RuleIdx, RuleView, Snapshot, Viewer};
use crate::model::{Gateway, GatewayLimits, GatewayListener, HostMatch, Parent, RouteMatch, Spec};
use crate::routes::{Head, RouteTable};
use crate::{Name, Resource};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// An address that this proxy listens on for clients from outside.
#[derive(Debug)]
pub struct PortView {
    /// Where it listens.
    pub address: SocketAddr,
    /// At least one, in order of gateway and position.
    pub listeners: Vec<ListenerView>,
}

/// One listener of a gateway.
#[derive(Debug)]
pub struct ListenerView {
    /// The gateway's name.
    pub gateway: Arc<str>,
    /// The gateway's revision.
    pub revision: u64,
    /// Its position among the gateway's listeners.
    pub position: usize,
    /// Names it across snapshots: `GATEWAY/LISTENER`.
    pub id: Arc<str>,
    /// Its settings.
    pub spec: Arc<GatewayListener>,
    /// Proxies in front of this one that are believed.
    pub trusted_hops: u32,
    /// The rules of the routes that hang on it.
    rules: Vec<RuleIdx>,
    table: RouteTable,
}

/// The ports of a proxy while its snapshot is made.
#[derive(Default)]
pub(super) struct Ports {
    views: Vec<PortView>,
}

impl PortView {
    /// The listener for a host (lower case, without a port): the one whose hostname fits it best.
    pub fn listener(&self, host: &str) -> Option<&ListenerView> {
        let all = self
            .listeners
            .iter()
            .map(|listener| (&listener.spec.hostname, listener));
        HostMatch::closest(all, host)
    }

    /// Connections at once.
    pub fn max_connections(&self) -> u32 {
        let all = self.limits().map(|limits| limits.max_connections);
        all.max().unwrap_or(0)
    }

    /// Longest TLS handshake.
    pub fn handshake_timeout(&self) -> Duration {
        let all = self.limits().map(|limits| limits.handshake_timeout);
        all.max().unwrap_or_default()
    }

    /// The largest head of a request, in bytes.
    pub fn max_header_bytes(&self) -> u32 {
        let all = self.limits().map(|limits| limits.max_header_bytes);
        all.max().unwrap_or(8 << 10)
    }

    /// Longest time of a connection without a request.
    pub fn idle_timeout(&self) -> Duration {
        let all = self.limits().map(|limits| limits.idle_timeout);
        all.max().unwrap_or_default()
    }

    fn limits(&self) -> impl Iterator<Item = &GatewayLimits> {
        self.listeners.iter().map(|listener| &listener.spec.limits)
    }
}

impl Ports {
    /// The ports of one proxy. Of listeners that clash the first is kept; a [`crate::World`] lets none such pass.
    pub(super) fn new<'a>(gateways: impl Iterator<Item = (&'a Name, &'a Resource)>, viewer: &Viewer) -> Self {
        let mut views: BTreeMap<SocketAddr, PortView> = BTreeMap::new();
        for (name, resource) in gateways {
            let Spec::Gateway(gateway) = &resource.spec else {
                continue;
            };
            if gateway.is_on(&viewer.zone, &viewer.proxy) {
                for (position, listener) in gateway.listeners.iter().enumerate() {
                    let view = ListenerView::new(name, resource.revision, gateway, (position, listener));
                    let port = views.entry(listener.address).or_insert_with(|| PortView {
                        address: listener.address,
                        listeners: Vec::new(),
                    });
                    if port
                        .listeners
                        .iter()
                        .all(|other| other.spec.clash(listener).is_none())
                    {
                        port.listeners.push(view);
                    }
                }
            }
        }
        Self {
            views: views.into_values().collect(),
        }
    }

    /// Adds a match of a rule to every listener that its route hangs on. Call in order of route name and rule.
    pub(super) fn add(
        &mut self,
        parents: &[Parent],
        (host, on): (&HostMatch, &RouteMatch),
        rule: RuleIdx,
        conditional: bool,
    ) {
        if parents.is_empty() {
            return;
        }
        for listener in self.views.iter_mut().flat_map(|port| &mut port.listeners) {
            if parents.iter().any(|parent| listener.is_named_by(parent)) {
                listener.table.add(host, on, rule, conditional);
                // Its matches come one after the other.
                if listener.rules.last() != Some(&rule) {
                    listener.rules.push(rule);
                }
            }
        }
    }

    pub(super) fn finish(mut self) -> Vec<PortView> {
        for listener in self.views.iter_mut().flat_map(|port| &mut port.listeners) {
            listener.table.finish();
        }
        self.views
    }
}

impl ListenerView {
    fn new(
        name: &Name,
        revision: u64,
        gateway: &Gateway,
        (position, listener): (usize, &GatewayListener),
    ) -> Self {
        Self {
            gateway: name.to_shared(),
            revision,
            position,
            id: format!("{name}/{}", listener.name).into(),
            spec: Arc::new(listener.clone()),
            trusted_hops: gateway.trusted_hops,
            rules: Vec::new(),
            table: RouteTable::default(),
        }
    }

    fn is_named_by(&self, parent: &Parent) -> bool {
        match parent {
            Parent::Mesh => false,
            Parent::Gateway { gateway, listener } => {
                *self.gateway == *gateway.as_str()
                    && listener
                        .as_ref()
                        .is_none_or(|listener| *listener == self.spec.name)
            }
        }
    }
}

impl Snapshot {
    /// Where this proxy listens for clients from outside, by address.
    pub fn ports(&self) -> &[PortView] {
        &self.ports
    }

    /// The listeners of an address.
    pub fn port(&self, address: SocketAddr) -> Option<&PortView> {
        let at = self.ports.binary_search_by_key(&address, |port| port.address);
        self.ports.get(at.ok()?)
    }

    /// The rule for a request that came to a listener of this snapshot.
    pub fn route_at(&self, listener: &ListenerView, head: &impl Head) -> Option<(RuleIdx, &RuleView)> {
        let idx = listener.table.find(head)?;
        Some((idx, self.rules.get(idx.position())?))
    }

    /// Whether what comes to a listener of this snapshot may come to be queued: in the queue of this name, or in any.
    pub fn queues_at(&self, listener: &ListenerView, queue: Option<&str>) -> bool {
        let ladders = listener.rules.iter().filter_map(|idx| {
            let rule = self.rules.get(idx.position())?;
            self.fallback(rule.fallback?)
        });
        ladders
            .flat_map(|ladder| &ladder.rungs)
            .any(|rung| match rung.act {
                ActView::Queue(idx) => {
                    queue.is_none_or(|name| self.queue(idx).is_some_and(|view| *view.name == *name))
                }
                // It names the queue itself.
                ActView::Plugin { .. } => true,
                ActView::Static(_)
                | ActView::Service(_)
                | ActView::Zone { .. }
                | ActView::Stale { .. }
                | ActView::Redirect(_)
                | ActView::Fail { .. } => false,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Act, Backend, FallbackPolicy, GatewayProtocol, PathMatch, Queue, Route, RouteRule, Rung, Service,
        Zone,
    };
    use crate::{Key, Kind, Staged, World};

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn resource(text: &str, revision: u64, spec: Spec) -> Arc<Resource> {
        Arc::new(Resource {
            name: name(text),
            revision,
            labels: BTreeMap::new(),
            spec,
        })
    }

    /// A gateway of zone a with listeners, given by name, port and host.
    fn gateway(text: &str, revision: u64, listeners: &[(&str, u16, &str)]) -> Arc<Resource> {
        let listeners = listeners.iter().map(|(listener, port, host)| GatewayListener {
            name: name(listener),
            address: ([127, 0, 0, 1], *port).into(),
            hostname: match *host {
                "" => HostMatch::Any,
                host => host.strip_prefix('*').map_or_else(
                    || HostMatch::Exact(host.into()),
                    |suffix| HostMatch::Suffix(suffix.into()),
                ),
            },
            protocol: GatewayProtocol::Http { redirect: None },
            limits: GatewayLimits::DEFAULT,
        });
        let spec = Gateway {
            zones: vec![name("a")],
            proxies: vec![],
            listeners: listeners.collect(),
            trusted_hops: 0,
        };
        resource(text, revision, Spec::Gateway(spec))
    }

    fn route(text: &str, parents: &[Parent]) -> Arc<Resource> {
        let any = RouteMatch {
            path: PathMatch::Prefix("".into()),
            method: None,
            headers: vec![],
        };
        let spec = Route {
            hostnames: vec![HostMatch::Any],
            rules: vec![RouteRule::new(vec![any], vec![Backend::new(name("s"), 1)])],
            parents: parents.to_vec(),
        };
        resource(text, 1, Spec::Route(spec))
    }

    fn parent(gateway: &str, listener: Option<&str>) -> Parent {
        Parent::Gateway {
            gateway: name(gateway),
            listener: listener.map(name),
        }
    }

    fn world(more: Vec<Arc<Resource>>) -> World {
        let mut upserts = vec![
            resource("a", 1, Spec::Zone(Zone::new(vec![], vec![]))),
            resource("s", 1, Spec::Service(Service::new(vec![]))),
        ];
        upserts.extend(more);
        let mut world = World::default();
        world.commit(Staged {
            upserts,
            ..Staged::default()
        });
        world
    }

    fn snapshot(world: &World, zone: &str) -> Snapshot {
        let viewer = Viewer {
            zone: name(zone),
            proxy: name("p"),
        };
        world.snapshot(viewer, 1)
    }

    struct Request;

    impl Head for Request {
        fn host(&self) -> &'static str {
            "x.example"
        }
        fn path(&self) -> &'static str {
            "/"
        }
        fn method(&self) -> &'static str {
            "GET"
        }
        fn any_value(&self, _: &str, _: &mut dyn FnMut(&[u8]) -> bool) -> bool {
            false
        }
        fn allows(&self, _: RuleIdx) -> bool {
            true
        }
    }

    #[test]
    fn a_listener_sees_the_routes_that_name_it_and_the_mesh_those_that_name_none() {
        let world = world(vec![
            gateway("g", 1, &[("one", 80, ""), ("two", 80, "*.two.example")]),
            route("inner", &[]),
            route("outer", &[parent("g", None)]),
            route("second", &[parent("g", Some("two")), Parent::Mesh]),
        ]);
        assert!(world.quarantined().is_empty(), "{:?}", world.quarantined());
        let here = snapshot(&world, "a");
        let port = here.port(([127, 0, 0, 1], 80).into()).unwrap();
        let at = |host: &str| port.listener(host).map(|listener| &*listener.id);
        assert_eq!(
            (at("x.two.example"), at("two.example")),
            (Some("g/two"), Some("g/one"))
        );
        let hostnames = port.listeners.iter().map(|listener| &listener.spec.hostname);
        assert_eq!(HostMatch::default_of(hostnames.zip(0..)), Some(0));
        let routes = |listener: usize| {
            let found = here.route_at(&port.listeners[listener], &Request);
            found.map(|(_, rule)| (&*rule.route, rule.for_mesh))
        };
        assert_eq!(routes(0), Some(("outer", false)));
        assert_eq!(
            routes(1),
            Some(("outer", false)),
            "by name, the first of those that fit"
        );
        assert_eq!(here.route(&Request).map(|(_, rule)| &*rule.route), Some("inner"));
        let open = here.rules().iter().map(|rule| (rule.for_mesh, rule.for_gateways));
        assert_eq!(
            open.collect::<Vec<_>>(),
            [(true, false), (false, true), (true, true)]
        );
        assert!(
            snapshot(&world, "b").ports().is_empty(),
            "another zone's proxies don't listen"
        );
    }

    #[test]
    fn requests_are_queued_where_a_rule_hangs_that_may() {
        let fallback = FallbackPolicy {
            on: vec![],
            on_statuses: vec![503],
            rungs: vec![Rung::new(Act::Queue {
                queue: name("orders"),
            })],
            hide_header: false,
            reserve_percent: 30,
        };
        let queueing = |text: &str, parents: &[Parent]| {
            let mut resource = Resource::clone(&route(text, parents));
            if let Spec::Route(route) = &mut resource.spec {
                route.rules[0].fallback = Some(name("later"));
            }
            Arc::new(resource)
        };
        let world = world(vec![
            gateway("g", 1, &[("one", 80, ""), ("two", 80, "*.two.example")]),
            resource("later", 1, Spec::FallbackPolicy(fallback)),
            resource("orders", 1, Spec::Queue(Queue::DEFAULT)),
            resource("other", 1, Spec::Queue(Queue::DEFAULT)),
            queueing("inner", &[]),
            queueing("second", &[parent("g", Some("two"))]),
            route("first", &[parent("g", None)]),
        ]);
        assert!(world.quarantined().is_empty(), "{:?}", world.quarantined());
        let here = snapshot(&world, "a");
        let port = here.port(([127, 0, 0, 1], 80).into()).unwrap();
        let queues = |host: &str, queue| here.queues_at(port.listener(host).unwrap(), queue);
        assert!(
            !queues("x.example", None),
            "only the mesh's rule and another listener's queue"
        );
        assert!(queues("x.two.example", None) && queues("x.two.example", Some("orders")));
        assert!(!queues("x.two.example", Some("other")));
    }

    #[test]
    fn of_two_that_clash_the_one_that_is_live_stays() {
        let mut world = world(vec![
            gateway("b", 1, &[("l", 80, "")]),
            gateway("c", 1, &[("l", 80, "")]),
        ]);
        let refused = |world: &World| {
            let quarantined = world.quarantined().iter();
            quarantined
                .map(|(key, _)| key.name.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            refused(&world),
            ["c"],
            "of two that come together the lesser name stays"
        );
        let reason = world.quarantined().values().next().unwrap().reason.clone();
        assert!(
            reason.starts_with("spec.listeners[0]: is for the same address"),
            "{reason}"
        );
        let commit = |world: &mut World, upserts, deletes| {
            world.commit(Staged {
                upserts,
                deletes,
                ..Staged::default()
            });
        };
        commit(&mut world, vec![gateway("a", 2, &[("l", 80, "")])], vec![]);
        assert_eq!(refused(&world), ["a", "c"]);
        let gone = Key {
            kind: Kind::Gateway,
            name: name("b"),
        };
        commit(&mut world, vec![], vec![gone]);
        assert_eq!(refused(&world), ["c"]);
        // A route that names what isn't there any more is told, and keeps the rest.
        commit(&mut world, vec![route("r", &[parent("a", Some("l"))])], vec![]);
        assert_eq!(refused(&world), ["c"]);
        commit(&mut world, vec![gateway("a", 3, &[("m", 80, "")])], vec![]);
        assert_eq!(refused(&world), ["c", "r"]);
    }
}
