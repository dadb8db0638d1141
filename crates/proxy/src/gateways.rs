//! Doors for clients from outside: opened and closed as policy says, with certificates from files of the node.
//!
//! What can't be done, such as listening on a port that somebody else has, is tried again once a second, and told as a
//! quarantined resource meanwhile; everything else goes on.

use crate::identity::wall;
use crate::udp;
use leeward_config::{Live, Trouble};
use leeward_http::{Door, DoorSettings, Doors, Port, PortTls, Role, bind_alone};
use leeward_identity::edge::{Certificates, Standing};
use leeward_identity::shown;
use leeward_policy::model::GatewayListener;
use leeward_policy::{Key, Kind, ListenerView, Name, PortView, Snapshot};
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::{
    GATEWAY_CERTIFICATE_EXPIRY, GATEWAY_CERTIFICATE_FAILURES, GATEWAY_CONNECTIONS, GATEWAY_LISTENING,
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often files are looked at, and what failed is tried again.
const TICK: Duration = Duration::from_secs(1);
/// Addresses of one proxy; policy for more is told as a trouble. A listener has a socket for each worker.
const MAX_DOORS: usize = 64;

/// What others see of the doors.
#[derive(Debug)]
pub(crate) struct Gateways {
    certificates: Certificates,
    // Poison is harmless: what is in it is only replaced whole.
    shown: Mutex<Shown>,
}

#[derive(Debug, Default)]
struct Shown {
    /// The sockets, for a successor; `None` once nobody is to have them any more.
    sockets: Option<BTreeMap<SocketAddr, Port>>,
    doors: Vec<ShownDoor>,
}

#[derive(Clone, Debug)]
struct ShownDoor {
    address: SocketAddr,
    door: Option<Arc<Door>>,
    http3: bool,
    listeners: Vec<ShownListener>,
    problem: Option<String>,
}

#[derive(Clone, Debug)]
struct ShownListener {
    id: Arc<str>,
    hostname: String,
    problem: Option<String>,
}

/// Opens and closes doors.
pub(crate) struct Doorman {
    gateways: Arc<Gateways>,
    live: Live,
    doors: Doors,
    /// Where the proxy listens for something else.
    own: Vec<SocketAddr>,
    inherited: BTreeMap<SocketAddr, Port>,
    open: BTreeMap<SocketAddr, Open>,
    known: Option<Arc<Snapshot>>,
    /// There is something to be done that policy doesn't tell of.
    unsettled: bool,
}

/// A door that is open.
struct Open {
    door: Arc<Door>,
    /// The listeners whose settings it has, with how many proxies in front they believe.
    made_from: Vec<(Arc<str>, u32, GatewayListener)>,
    /// HTTP/3 is taken.
    udp: bool,
    /// Its sockets were another process's, which may have the UDP port yet.
    inherited: bool,
}

impl Gateways {
    /// None yet; certificates are in this directory.
    pub(crate) fn new(certificates: Option<PathBuf>) -> Arc<Self> {
        let shown = Shown {
            sockets: Some(BTreeMap::new()),
            doors: Vec::new(),
        };
        Arc::new(Self {
            certificates: Certificates::new(certificates),
            shown: Mutex::new(shown),
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Shown) -> T) -> T {
        act(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The sockets once more, for a successor.
    ///
    /// # Errors
    ///
    /// What the system says, such as too many open files.
    pub(crate) fn sockets(&self) -> io::Result<Vec<Port>> {
        self.with(|shown| {
            let ports = shown.sockets.iter().flat_map(BTreeMap::values);
            ports.map(Port::try_clone).collect()
        })
    }

    /// Lets go of the sockets: a socket that is held is not closed. Nothing is opened any more.
    pub(crate) fn let_go(&self) {
        self.with(|shown| shown.sockets = None);
    }

    fn is_over(&self) -> bool {
        self.with(|shown| shown.sockets.is_none())
    }

    /// For people: what is listened on, and with which certificates.
    pub(crate) fn report(&self) -> Value {
        let doors = self.with(|shown| shown.doors.clone());
        let doors = doors.iter().map(|door| {
            let listeners = door.listeners.iter().map(|listener| {
                json!({
                    "name": &*listener.id,
                    "hostname": listener.hostname,
                    "problem": listener.problem,
                })
            });
            json!({
                "address": door.address.to_string(),
                "listening": door.door.is_some(),
                "http3": door.http3,
                "connections": door.door.as_ref().map_or(0, |door| door.open()),
                "problem": door.problem,
                "listeners": listeners.collect::<Vec<_>>(),
            })
        });
        let certificates = self.certificates.standings().into_iter().map(|standing| {
            let Standing {
                name,
                hosts,
                validity,
                problem,
                failures,
            } = standing;
            json!({
                "name": &*name,
                "hosts": hosts.iter().map(|host| &**host).collect::<Vec<_>>(),
                "not_after": validity.map(|validity| shown(&validity.not_after)),
                "seconds_left": validity.map(|validity| validity.left(wall()).as_secs()),
                "problem": problem,
                "failures": failures,
            })
        });
        json!({
            "ports": doors.collect::<Vec<_>>(),
            "certificates": certificates.collect::<Vec<_>>(),
        })
    }

    /// For metrics.
    pub(crate) fn readings(&self) -> Vec<Reading> {
        let mut readings = Vec::new();
        for standing in self.certificates.standings() {
            let name: Arc<str> = Arc::from(&*standing.name);
            let left = standing.validity.map(|validity| validity.left(wall()));
            readings.push(Reading {
                metric: GATEWAY_CERTIFICATE_EXPIRY,
                labels: vec![Arc::clone(&name)],
                value: left.unwrap_or_default().as_secs_f64(),
            });
            readings.push(Reading {
                metric: GATEWAY_CERTIFICATE_FAILURES,
                labels: vec![name],
                #[expect(clippy::cast_precision_loss, reason = "there are never so many")]
                value: standing.failures as f64,
            });
        }
        for door in self.with(|shown| shown.doors.clone()) {
            let address: Arc<str> = door.address.to_string().into();
            let open = door.door.as_ref().map_or(0, |door| door.open());
            readings.push(Reading {
                metric: GATEWAY_CONNECTIONS,
                labels: vec![Arc::clone(&address)],
                #[expect(clippy::cast_precision_loss, reason = "there are never so many")]
                value: open as f64,
            });
            for (transport, listening) in [("tcp", door.door.is_some()), ("udp", door.http3)] {
                readings.push(Reading {
                    metric: GATEWAY_LISTENING,
                    labels: vec![Arc::clone(&address), transport.into()],
                    value: f64::from(u8::from(listening)),
                });
            }
        }
        readings
    }
}

impl Doorman {
    /// Nothing is open yet. `own`: where the proxy listens for something else; `inherited`: what a predecessor has.
    pub(crate) fn new(
        gateways: &Arc<Gateways>,
        live: Live,
        doors: Doors,
        own: Vec<SocketAddr>,
        inherited: Vec<Port>,
    ) -> Self {
        Self {
            gateways: Arc::clone(gateways),
            live,
            doors,
            own,
            inherited: inherited.into_iter().map(|port| (port.address, port)).collect(),
            open: BTreeMap::new(),
            known: None,
            unsettled: false,
        }
    }

    /// Goes on until the sockets are let go of.
    pub(crate) async fn run(mut self) {
        let mut news = self.live.watch();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.gateways.is_over() {
            tokio::select! {
                _ = ticks.tick() => {}
                changed = news.changed() => if changed.is_err() { return },
            }
            self.settle().await;
        }
    }

    /// Does what is to be done now.
    pub(crate) async fn settle(&mut self) {
        let snapshot = self.live.snapshot().load_full();
        let changed = !self
            .known
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, &snapshot));
        let nothing_open = self.open.is_empty() && self.inherited.is_empty();
        if snapshot.ports().is_empty() && nothing_open && !self.unsettled {
            // Most proxies have no doors at all.
            self.known = Some(snapshot);
            return;
        }
        let others = self.look_at_files(&snapshot).await;
        if changed || others || self.unsettled {
            self.close_unwanted(&snapshot).await;
            self.unsettled = false;
            let mut troubles = Vec::new();
            let mut doors = Vec::new();
            for (i, port) in snapshot.ports().iter().enumerate() {
                let door = if i < MAX_DOORS {
                    self.keep(port, others, &mut troubles).await
                } else {
                    tell(
                        port,
                        &mut troubles,
                        "port",
                        &format!("this proxy has {MAX_DOORS} ports already; want fewer"),
                    );
                    show(port, None, false, Vec::new())
                };
                doors.push(door);
            }
            self.unsettled |= !troubles.is_empty();
            self.gateways.with(|shown| shown.doors = doors);
            self.live.say_troubles(troubles);
            self.known = Some(snapshot);
        }
        if self.inherited.is_empty() || self.known.as_ref().is_none_or(|known| known.generation == 0) {
            return;
        }
        for (address, _) in std::mem::take(&mut self.inherited) {
            tracing::warn!(%address, "this process doesn't listen here for clients from outside as the old one did");
        }
    }

    /// Looks at the files of certificates that policy names. True if that changes more than the certificates themselves.
    async fn look_at_files(&mut self, snapshot: &Snapshot) -> bool {
        let listeners = snapshot.ports().iter().flat_map(|port| &port.listeners);
        let tls: Vec<_> = listeners.filter_map(|listener| listener.spec.tls()).collect();
        let texts = |names: &[Name]| {
            names
                .iter()
                .map(|name| Box::from(name.as_str()))
                .collect::<Vec<Box<str>>>()
        };
        let certificates: BTreeSet<_> = tls.iter().flat_map(|tls| texts(&tls.certificates)).collect();
        let roots = tls.iter().filter_map(|tls| tls.client_roots.as_deref());
        let roots: BTreeSet<_> = roots.flat_map(texts).collect();
        let gateways = Arc::clone(&self.gateways);
        let before = problems(&gateways);
        let looked = tokio::task::spawn_blocking(move || {
            let others = gateways.certificates.look(&certificates, &roots, wall());
            others || problems(&gateways) != before
        });
        // A panic was reported, and is no reason to stop listening.
        looked.await.unwrap_or(false)
    }

    async fn close_unwanted(&mut self, snapshot: &Snapshot) {
        let gone: Vec<_> = self
            .open
            .keys()
            .copied()
            .filter(|address| snapshot.port(*address).is_none())
            .collect();
        for address in gone {
            tracing::info!(%address, "no longer listening for clients from outside");
            // Ours first: the workers' are then the last, and close the sockets in order.
            self.gateways
                .with(|shown| shown.sockets.as_mut().map(|sockets| sockets.remove(&address)));
            self.doors.close(address).await;
            self.open.remove(&address);
        }
    }

    /// Opens a door if it isn't open, and brings it to what policy says. `others`: files say something else than before.
    async fn keep(&mut self, port: &PortView, others: bool, troubles: &mut Vec<Trouble>) -> ShownDoor {
        let gateways = Arc::clone(&self.gateways);
        let certificates = &gateways.certificates;
        let has_tls = port
            .listeners
            .iter()
            .any(|listener| listener.spec.tls().is_some());
        let (tls, problems) = if has_tls {
            let (tls, problems) = PortTls::new(port, certificates);
            (Some(tls), problems)
        } else {
            (None, Vec::new())
        };
        let mut of_listeners: Vec<Option<String>> = vec![None; port.listeners.len()];
        for (i, why) in problems {
            if let Some(place) = of_listeners.get_mut(i) {
                *place = Some(why);
            }
        }
        let standings = certificates.standings();
        for (place, listener) in of_listeners.iter_mut().zip(&port.listeners) {
            *place = place.take().or_else(|| missing(listener, &standings));
        }
        for (listener, problem) in port.listeners.iter().zip(&of_listeners) {
            if let Some(problem) = problem {
                troubles.push(trouble(listener, problem));
            }
        }
        let takes_http3 = tls.as_ref().filter(|tls| tls.takes_http3()).cloned();
        let wants_http3 = port.listeners.iter().any(|listener| listener.spec.has_http3());
        let made_from: Vec<_> = port
            .listeners
            .iter()
            .map(|listener| {
                let spec = GatewayListener::clone(&listener.spec);
                (Arc::clone(&listener.id), listener.trusted_hops, spec)
            })
            .collect();
        let open = match self.open.remove(&port.address) {
            Some(open) => {
                // Other settings of TLS forget its sessions, so they are made only for a reason.
                if others || open.made_from != made_from {
                    open.door
                        .set(DoorSettings::new(port, tls, open.udp && wants_http3));
                }
                Ok(Open { made_from, ..open })
            }
            None => {
                self.open(port.address, DoorSettings::new(port, tls, false), made_from)
                    .await
            }
        };
        let open = match open {
            Ok(open) => self.open.entry(port.address).or_insert(open),
            Err(why) => {
                tell(port, troubles, "port", &why);
                return show(port, None, false, of_listeners).because(why);
            }
        };
        let mut problem = None;
        if wants_http3 && !open.udp {
            let Some(tls) = takes_http3 else {
                // What is missing was told of its listener. Without TLS nobody would serve what comes to the sockets.
                self.unsettled = true;
                return show(port, Some(&open.door), false, of_listeners);
            };
            match open_udp(&self.own, &self.doors, &open.door).await {
                Ok(()) => {
                    open.udp = true;
                    open.door.set(DoorSettings::new(port, Some(tls), true));
                }
                Err(why) => {
                    // A predecessor may have it yet, and lets go of it when its last client has gone.
                    if !open.inherited {
                        tell_http3(port, troubles, &why);
                    }
                    self.unsettled = true;
                    problem = Some(why);
                }
            }
        } else if !wants_http3 && open.udp {
            self.doors.close_udp(port.address).await;
            open.udp = false;
        }
        let shown = show(port, Some(&open.door), open.udp, of_listeners);
        match problem {
            None => shown,
            Some(why) => shown.because(why),
        }
    }

    async fn open(
        &mut self,
        address: SocketAddr,
        settings: DoorSettings,
        made_from: Vec<(Arc<str>, u32, GatewayListener)>,
    ) -> Result<Open, String> {
        let handed = self.inherited.remove(&address);
        let inherited = handed.is_some();
        let port = match handed {
            Some(port) => port,
            None => {
                free_of(&self.own, address)?;
                bind_alone(Role::Gateway, address, self.doors.workers())
                    .map_err(|error| format!("can't listen on {address}: {error}"))?
            }
        };
        let door = Arc::new(Door::new(address, settings));
        let failed = |error: io::Error| format!("can't share the sockets of {address}: {error}");
        let shared = port.try_clone().map_err(failed)?;
        // Before the workers have them: what is accepted from has an owner, who hands it over or lets go of it.
        let kept = self.gateways.with(|shown| {
            let sockets = shown.sockets.as_mut();
            sockets.map(|sockets| sockets.insert(address, port)).is_some()
        });
        if !kept {
            return Err("the proxy is ending".to_owned());
        }
        if let Err(error) = self.doors.open(&door, &shared).await {
            self.gateways
                .with(|shown| shown.sockets.as_mut().map(|sockets| sockets.remove(&address)));
            self.doors.close(address).await;
            return Err(failed(error));
        }
        tracing::info!(%address, inherited, "listening for clients from outside");
        Ok(Open {
            door,
            made_from,
            udp: false,
            inherited,
        })
    }
}

async fn open_udp(own: &[SocketAddr], doors: &Doors, door: &Arc<Door>) -> Result<(), String> {
    let address = door.address;
    free_of(own, address)?;
    let sockets = udp::bind_alone(address, doors.workers())
        .map_err(|error| format!("can't listen on UDP {address}: {error}"))?;
    doors.open_udp(door, sockets).await;
    tracing::info!(%address, "listening for HTTP/3");
    Ok(())
}

/// Whether an address isn't one where the proxy itself listens for something else: it shares its own.
fn free_of(own: &[SocketAddr], address: SocketAddr) -> Result<(), String> {
    let meets = |other: &&SocketAddr| {
        let everywhere = other.ip().is_unspecified() || address.ip().is_unspecified();
        other.port() == address.port() && (everywhere || other.ip() == address.ip())
    };
    match own.iter().find(meets) {
        Some(other) => Err(format!("the proxy itself listens on {other}; want another port")),
        None => Ok(()),
    }
}

/// What is wrong with files now.
fn problems(gateways: &Gateways) -> Vec<(bool, Option<String>)> {
    let standings = gateways.certificates.standings().into_iter();
    standings.map(|s| (s.validity.is_some(), s.problem)).collect()
}

/// What is wrong with the first certificate of a listener that isn't as its files are.
fn missing(listener: &ListenerView, standings: &[Standing]) -> Option<String> {
    let certificates = &listener.spec.tls()?.certificates;
    certificates.iter().enumerate().find_map(|(i, name)| {
        let standing = standings
            .iter()
            .find(|standing| *standing.name == *name.as_str())?;
        let problem = standing.problem.as_ref()?;
        let kept = if standing.validity.is_some() {
            "; the last good one is in use"
        } else {
            ""
        };
        Some(format!("tls.certificateRefs[{i}]: {name}: {problem}{kept}"))
    })
}

fn trouble(listener: &ListenerView, what: &str) -> Trouble {
    // What comes out of a snapshot has a name.
    let name = Name::parse(&listener.gateway).unwrap_or_else(|_| listener.spec.name.clone());
    Trouble {
        key: Key {
            kind: Kind::Gateway,
            name,
        },
        revision: listener.revision,
        reason: format!("spec.listeners[{}].{what}", listener.position),
    }
}

/// The same of every listener of a port, once for each gateway.
fn tell(port: &PortView, troubles: &mut Vec<Trouble>, field: &str, why: &str) {
    let mut told: Vec<&str> = Vec::new();
    for listener in &port.listeners {
        if !told.contains(&&*listener.gateway) {
            told.push(&listener.gateway);
            troubles.push(trouble(listener, &format!("{field}: {why}")));
        }
    }
}

fn tell_http3(port: &PortView, troubles: &mut Vec<Trouble>, why: &str) {
    let with_http3 = port.listeners.iter().filter(|listener| listener.spec.has_http3());
    troubles.extend(with_http3.map(|listener| trouble(listener, &format!("http3: {why}"))));
}

fn show(port: &PortView, door: Option<&Arc<Door>>, http3: bool, problems: Vec<Option<String>>) -> ShownDoor {
    let problems = problems.into_iter().chain(std::iter::repeat(None));
    let listeners = port
        .listeners
        .iter()
        .zip(problems)
        .map(|(listener, problem)| ShownListener {
            id: Arc::clone(&listener.id),
            hostname: listener.spec.hostname.to_string(),
            problem,
        });
    ShownDoor {
        address: port.address,
        door: door.map(Arc::clone),
        http3,
        listeners: listeners.collect(),
        problem: None,
    }
}

impl ShownDoor {
    fn because(self, why: String) -> Self {
        Self {
            problem: Some(why),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_http::{DoorNews, bind};
    use leeward_policy::model::{
        Gateway, GatewayLimits, GatewayProtocol, GatewayTls, HostMatch, Spec, TlsVersion, Zone,
    };
    use leeward_policy::{Resource, Staged, Viewer, World};
    use tokio::sync::mpsc::Receiver;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn resource(text: &str, spec: Spec) -> Arc<Resource> {
        Arc::new(Resource {
            name: name(text),
            revision: 1,
            labels: BTreeMap::new(),
            spec,
        })
    }

    /// Who opens doors at a proxy of one worker, and what the worker hears of it.
    fn doorman(listeners: Vec<GatewayListener>, inherited: Vec<Port>) -> (Doorman, Receiver<DoorNews>) {
        let viewer = Viewer {
            zone: name("a"),
            proxy: name("a1"),
        };
        let gateway = Gateway {
            zones: vec![name("a")],
            proxies: vec![],
            listeners,
            trusted_hops: 0,
        };
        let mut world = World::default();
        world.commit(Staged {
            upserts: vec![
                resource("a", Spec::Zone(Zone::new(vec![], vec![]))),
                resource("g", Spec::Gateway(gateway)),
            ],
            ..Staged::default()
        });
        let live = Live::new(viewer.clone());
        live.snapshot().store(Arc::new(world.snapshot(viewer, 1)));
        let (doors, mut workers) = Doors::new(1);
        let doorman = Doorman::new(&Gateways::new(None), live, doors, Vec::new(), inherited);
        (doorman, workers.pop().unwrap())
    }

    fn free_port() -> Port {
        bind(Role::Gateway, SocketAddr::from(([127, 0, 0, 1], 0)), 1).unwrap()
    }

    fn listener(protocol: GatewayProtocol) -> GatewayListener {
        GatewayListener {
            name: name("l"),
            address: free_port().address,
            hostname: HostMatch::Any,
            protocol,
            limits: GatewayLimits::DEFAULT,
        }
    }

    #[tokio::test]
    async fn what_is_inherited_is_let_go_of_where_policy_has_no_ports_at_all() {
        let port = free_port();
        let address = port.address;
        let (mut doorman, _worker) = doorman(Vec::new(), vec![port]);
        doorman.settle().await;
        assert!(doorman.inherited.is_empty());
        let error = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn no_udp_is_opened_for_http3_that_nobody_could_come_by() {
        let tls = GatewayTls {
            certificates: vec![name("shop")],
            min_version: TlsVersion::Tls13,
            client_roots: Some(vec![name("late")]),
        };
        let (mut doorman, mut worker) = doorman(
            vec![listener(GatewayProtocol::Https { tls, http3: true })],
            Vec::new(),
        );
        doorman.settle().await;
        assert!(matches!(worker.try_recv(), Ok(DoorNews::Open { .. })));
        assert!(worker.try_recv().is_err(), "the roots aren't there yet");
        assert!(doorman.open.values().all(|open| !open.udp));
        assert!(doorman.unsettled, "it is tried again");
    }

    #[tokio::test]
    async fn nothing_is_opened_any_more_when_the_sockets_were_let_go_of() {
        let (mut doorman, mut worker) = doorman(
            vec![listener(GatewayProtocol::Http { redirect: None })],
            Vec::new(),
        );
        doorman.gateways.let_go();
        doorman.settle().await;
        assert!(worker.try_recv().is_err());
    }

    #[test]
    fn a_door_is_not_where_the_proxy_itself_listens() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let own = [at("127.0.0.1:15001"), at("0.0.0.0:15008")];
        assert!(free_of(&own, at("127.0.0.1:443")).is_ok());
        assert!(free_of(&own, at("10.0.0.1:15001")).is_ok());
        for taken in ["127.0.0.1:15001", "0.0.0.0:15001", "10.0.0.1:15008"] {
            assert!(
                free_of(&own, at(taken))
                    .unwrap_err()
                    .contains("want another port"),
                "{taken}"
            );
        }
    }
}
