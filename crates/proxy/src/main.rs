//! `leeward-proxy`: the data plane of one node.
//!
//! Nothing is decided here. This binary reads settings, binds every listener before anything is served, wires
//! the crates together, and ends in order:
//!
//! - one thread with a current-thread runtime for each worker, which own their connections;
//! - one runtime beside them for everything that is not a request: policy, plugin compilation, admin, export.
//!
//! It can also begin where another process ends, see `handover`.

mod admin;
mod allocator;
mod caches;
mod degrade;
mod drain;
mod exported;
mod flags_file;
mod gateways;
mod handover;
mod identity;
mod jwks;
mod modules;
mod observed;
mod ofrep;
mod plugins;
mod queues;
mod resilience;
mod settings;
mod side;
mod state;
mod tend;
mod udp;
mod workloads;

use crate::degrade::Degradation;
use crate::drain::{Heir, Phase, Workers};
use crate::flags_file::FlagsFile;
use crate::gateways::{Doorman, Gateways};
use crate::handover::{Estate, Inheritance, Place, Start, Succession};
use crate::modules::Modules;
use crate::plugins::Plugins;
use crate::settings::{Addresses, Log, OfrepAt, Settings, Source};
use crate::side::Side;
use crate::tend::{Wards, tend};
use crate::workloads::Socket;
use anyhow::Context;
use clap::Parser;
use leeward_config::{Live, StateDir, Status, Subscription};
use leeward_http::{Courier, Doors, Keyring, Listeners, Node, Port, Rates, Role, bind};
use leeward_identity::{Identity, NotReady};
use leeward_policy::Viewer;
use leeward_queue::{Deliver, Queues};
use leeward_telemetry::{AccessLog, Hub};
use leeward_upstream::{Registry, Reports};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::LocalSet;

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

/// How long the last spans may take to be sent at the end.
const FLUSH: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let settings = Settings::parse();
    leeward_telemetry::init_logs(leeward_telemetry::Format::Text, &settings.log);
    leeward_telemetry::watch_panics();
    let control = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        // More than names that are looked up without an answer can take: what is kept on disk needs one.
        .max_blocking_threads(32)
        .thread_name("control")
        .enable_all()
        .build();
    let ended = control.map_err(anyhow::Error::from).and_then(|control| {
        // What belongs to this thread alone is the links that other zones' reports come by.
        let ended = control.block_on(LocalSet::new().run_until(run(settings)));
        control.shutdown_timeout(Duration::from_secs(1));
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    let source = settings.source()?;
    let viewer = Viewer {
        zone: settings.zone.clone(),
        proxy: settings.name.clone(),
    };
    let identity = identity::open(&settings, &source).await?;
    let live = Live::new(viewer.clone());
    let hub = hub(&settings)?;

    // First of all, since of two proxies that start at once only one may bind anew.
    let (place, mut inheritance) = match &settings.handover {
        None => (None, None),
        Some(path) => match Place::ask(path, settings.handover_timeout).await? {
            Start::First(place) => (Some(place), None),
            Start::After(inheritance) => (None, Some(inheritance)),
        },
    };
    // Only now: the process before this one has brought to disk what it has.
    let state = state::open(&settings, &viewer).await;
    if let Some(path) = &settings.flags {
        let file = FlagsFile::open(path.clone(), live.file_flags(), state.clone(), &hub).await?;
        tokio::spawn(file.watch(Arc::clone(live.file_flags()), Arc::clone(&hub)));
    }
    let data = settings
        .data
        .clone()
        .or_else(|| state.as_ref().map(|state| state.path().to_owned()));
    let plugins = leeward_wasm::Host::with(leeward_wasm::Settings {
        memory: settings.plugin_memory,
        compiled: data.as_ref().map(|data| data.join("compiled")),
    })?;
    // Everything is bound before anything is served: what can't start says so now.
    let Bound {
        ports,
        admin,
        ofrep,
        socket,
    } = listen(&settings, &source, inheritance.as_deref_mut()).await?;
    let heirlooms = Heirlooms {
        ports: ports.iter().map(Port::try_clone).collect::<Result<_, _>>()?,
        admin: admin.try_clone()?,
        ofrep: ofrep.as_ref().map(Side::try_clone).transpose()?,
        socket: socket.as_ref().map(Socket::try_clone).transpose()?,
    };
    let addresses = Addresses::of(&ports, &admin, ofrep.as_ref())?;

    let courier = Arc::<Courier>::default();
    let queues = Queues::new(
        leeward_queue::Settings {
            data: settings.data.clone(),
            proxy: settings.name.to_shared(),
            zone: settings.zone.to_shared(),
        },
        Arc::clone(&courier) as Arc<dyn Deliver>,
    );
    tokio::spawn(queues::follow(Arc::clone(&queues), live.clone()));
    tokio::spawn(Arc::clone(&queues).run());
    let now = tokio::time::Instant::now().into_std();
    let node = Node {
        live: Arc::clone(live.snapshot()),
        levels: Arc::clone(live.levels()),
        file_flags: Arc::clone(live.file_flags()),
        registry: Arc::new(Registry::new(now)),
        identity: identity.clone(),
        plugins: Arc::clone(&plugins),
        hub: Arc::clone(&hub),
        rates: Arc::new(Rates::new(now)),
        pressure: Arc::default(),
        caches: Arc::default(),
        queues: Arc::clone(&queues),
        courier,
        keyring: Arc::new(Keyring::new(now)),
    };
    tokio::spawn(jwks::follow(Arc::clone(&node.keyring), Arc::clone(&node.live)));
    let (exported, health) = watch::channel(Arc::default());
    tokio::spawn(tend(Wards {
        exported,
        live: Arc::clone(&node.live),
        registry: Arc::clone(&node.registry),
        rates: Arc::clone(&node.rates),
        pressure: Arc::clone(&node.pressure),
        caches: Arc::clone(&node.caches),
        hub: Arc::clone(&hub),
        identity: identity.clone(),
        plugins: Arc::clone(&plugins),
        memory_limit: settings.memory_limit,
    }));
    let degradation = Degradation::default();
    match (&inheritance, &state) {
        (Some(inheritance), _) => degradation.inherit(inheritance.levels(), now),
        (None, Some(state)) => state::restore_levels(state, &degradation, now),
        (None, None) => {}
    }
    tokio::spawn(observed::tell(live.clone(), Arc::clone(&hub)));
    tokio::spawn(degrade::judge(
        live.clone(),
        Arc::clone(&node.registry),
        Arc::clone(&hub),
        degradation.clone(),
    ));
    if let Some(identity) = &identity {
        let reports = Reports::new(Arc::clone(identity), Arc::clone(&node.registry));
        let policy = Arc::clone(&node.live);
        tokio::task::spawn_local(reports.run(move || policy.load_full()));
        identity::keep(&settings, &source, identity, &live, &hub);
    }
    let attested = identity.as_ref().filter(|_| socket.is_some());
    let attested = attested.map(|identity| workloads::keep(&source, identity, &live));
    let (phase, phases) = watch::channel(Phase::Serving);
    let gateways = Gateways::new(settings.gateway_certificates.clone());
    let (doors, told) = Doors::new(settings.workers());
    let mut doorman = Doorman::new(
        &gateways,
        live.clone(),
        doors,
        addresses.all(),
        inheritance
            .as_mut()
            .map(|inheritance| inheritance.gateways())
            .unwrap_or_default(),
    );
    let inbound = ports.iter().find(|port| port.role == Role::Inbound);
    let (udp, links) = udp::ways(inbound.map(|port| port.address), settings.workers(), &health);
    let open = || {
        let mut listeners =
            Listeners::deal(&ports, settings.workers()).context("can't share listening sockets")?;
        for (listeners, told) in listeners.iter_mut().zip(told) {
            listeners.attend(told);
        }
        drop(ports);
        let workers = Workers::start(&node, listeners, links, &phases)?;
        tokio::spawn(udp.send());
        if let Some(ofrep) = ofrep {
            tokio::spawn(ofrep::serve(ofrep, live.clone(), phases.clone()));
        }
        if let (Some(workloads), Some(socket)) = (&attested, socket) {
            tokio::spawn(workloads::serve(workloads.clone(), socket, phases.clone()));
        }
        tokio::spawn(admin::serve(
            admin,
            node.clone(),
            live.clone(),
            degradation.clone(),
            (Arc::clone(&gateways), state.clone(), attested),
            phases,
        ));
        anyhow::Ok(workers)
    };
    let modules = Modules::open(
        data.map(|data| data.join("plugins")),
        settings.plugin_disk,
        origin(&source, identity.as_ref()),
    );
    let warm = Plugins {
        host: plugins,
        modules,
    };
    let follow = Follow {
        viewer,
        identity,
        warm: Arc::new(warm),
        live: live.clone(),
        state: state.clone(),
    };
    // Policy from disk is live before anything is served.
    let follow = follow.begin(source).await?;
    if let Some(state) = &state {
        tokio::spawn(state.clone().run());
        tokio::spawn(state::keep_levels(state.clone(), degradation.clone()));
    }
    tokio::spawn(state::warn_of_age(live.clone(), settings.state_warn_age));
    let (workers, place, mut signals) = match inheritance {
        None => {
            addresses.write(settings.addresses_file.as_deref())?;
            let workers = open()?;
            follow.go_on().await?;
            tokio::spawn(doorman.run());
            (workers, place, Signals::install()?)
        }
        // Until it is ready a signal ends it as the system does, and its predecessor goes on.
        Some(mut inheritance) => {
            follow.go_on().await?;
            inheritance
                .until_ready(&live, &degradation, settings.handover_timeout)
                .await?;
            let mut signals = Signals::install()?;
            let workers = open()?;
            // The old one is to go on until these are accepted from, too.
            doorman.settle().await;
            tokio::spawn(doorman.run());
            let taken = tokio::select! {
                taken = inheritance.take_over() => taken,
                how = signals.told() => Err(anyhow::anyhow!("{how} before the old process let go")),
            };
            match taken {
                Ok(place) => {
                    if let Err(error) = addresses.write(settings.addresses_file.as_deref()) {
                        // No reason to end: nobody else serves any more.
                        tracing::warn!("{error:#}");
                    }
                    (workers, Some(place), signals)
                }
                Err(error) => {
                    // Whoever has come in already is served to the end.
                    gateways.let_go();
                    drain::drain(&phase, workers, Heir::Successor, settings.drain_timeout).await;
                    return Err(error);
                }
            }
        }
    };

    let Heirlooms {
        ports,
        admin,
        ofrep,
        socket,
    } = heirlooms;
    let limit = settings.handover_timeout;
    let mut succession = place.map(|place| {
        Estate {
            place,
            ports,
            admin,
            ofrep,
            workloads: socket,
            gateways: Arc::clone(&gateways),
            live,
            degradation,
            state: state.clone(),
            limit,
        }
        .wait()
    });
    let heir = tokio::select! {
        how = signals.told() => {
            tracing::info!("{how}; draining");
            match succession.take() {
                Some(succession) => succession.close(settings.drain_timeout).await,
                None => Heir::Nobody,
            }
        }
        () = taken_over(succession.as_mut()) => Heir::Successor,
        () = workers.any_ended() => anyhow::bail!("a worker broke down"),
    };
    gateways.let_go();
    // What is queued stays on disk for a successor, which may go on with it as soon as nothing is under way here. A
    // delivery to a service that doesn't answer ends with this process, and is made once more by the next.
    let delivering = tokio::time::timeout(settings.drain_timeout, queues.close());
    let ((), closed) = tokio::join!(
        drain::drain(&phase, workers, heir, settings.drain_timeout),
        delivering
    );
    if closed.is_err() {
        tracing::warn!("queued requests are still being delivered; they are cut off");
    }
    if let Some(state) = state {
        state.flush(FLUSH).await;
    }
    tokio::task::spawn_blocking(move || hub.flush(FLUSH)).await?;
    tracing::info!("done");
    Ok(())
}

/// What is listened on.
struct Bound {
    ports: Vec<Port>,
    admin: Side,
    ofrep: Option<Side>,
    /// For the node's workloads.
    socket: Option<Socket>,
}

/// The listening sockets for requests, and the listeners beside them: a predecessor's where it has them, and others.
async fn listen(
    settings: &Settings,
    source: &Source,
    mut inheritance: Option<&mut Inheritance>,
) -> anyhow::Result<Bound> {
    let mut wanted = vec![(Role::Outbound, settings.outbound)];
    if settings.identity.is_some() {
        wanted.push((Role::Inbound, settings.inbound));
    }
    wanted.extend(settings.capture.iter().map(|address| (Role::Capture, *address)));
    wanted.extend(settings.tcp.iter().map(|address| (Role::Tcp, *address)));
    let mut ports = Vec::new();
    for (role, address) in wanted {
        let handed = inheritance.as_mut().and_then(|i| i.port(role, address));
        let how = if handed.is_some() {
            "listening, with the old process's sockets"
        } else {
            "listening"
        };
        let port = match handed {
            Some(port) => port,
            None => bind(role, address, settings.workers())
                .with_context(|| format!("can't listen on {address}"))?,
        };
        tracing::info!(role = ?port.role, address = %port.address, "{how}");
        ports.push(port);
    }
    let admin = match inheritance.as_mut().and_then(|i| i.admin(settings.admin)) {
        Some(listener) => Side::handed(listener)?,
        None => Side::bind(settings.admin).await?,
    };
    let ofrep = match settings.ofrep {
        OfrepAt::Off => None,
        OfrepAt::Address(address) => Some(match inheritance.as_mut().and_then(|i| i.ofrep(address)) {
            Some(listener) => Side::handed(listener)?,
            None => Side::bind(address)
                .await
                .context("for feature flags; see --ofrep")?,
        }),
    };
    let socket = match workloads::wanted(settings, source)? {
        None => None,
        Some(path) => Some(match inheritance.as_mut().and_then(|i| i.workloads(path)) {
            Some(listener) => Socket::handed(listener)?,
            None => Socket::bind(path).await?,
        }),
    };
    if let Some(inheritance) = inheritance {
        inheritance.drop_unwanted();
    }
    Ok(Bound {
        ports,
        admin,
        ofrep,
        socket,
    })
}

/// Where modules of plugins are fetched.
fn origin(source: &Source, identity: Option<&Arc<Identity>>) -> Option<leeward_config::Modules> {
    let (Source::Control(control), Some(identity)) = (source, identity) else {
        return None;
    };
    let timing = leeward_config::Timing::DEFAULT;
    Some(leeward_config::Modules::new(
        Arc::clone(identity),
        control.clone(),
        timing,
    ))
}

/// Makes policy live.
struct Follow {
    viewer: Viewer,
    identity: Option<Arc<Identity>>,
    warm: Arc<Plugins>,
    live: Live,
    state: Option<StateDir>,
}

/// What has policy from disk, if there was any, and gets newer from here on.
enum Following {
    Files(PathBuf, Follow),
    Control(Box<Subscription<Plugins>>),
}

impl Follow {
    async fn begin(self, source: Source) -> anyhow::Result<Following> {
        let control = match source {
            Source::Files(dir) => return Ok(Following::Files(dir, self)),
            Source::Control(control) => control,
        };
        let identity = self.identity.context("--control needs --identity")?;
        let settings = leeward_config::Settings {
            viewer: self.viewer,
            control,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            timing: leeward_config::Timing::DEFAULT,
        };
        let mut subscription = Box::new(Subscription::new(settings, identity, self.warm, self.live));
        if let Some(state) = self.state {
            subscription.keep_in(state).await;
        }
        Ok(Following::Control(subscription))
    }
}

impl Following {
    /// All of it, from files; or from now on, from a control plane.
    async fn go_on(self) -> anyhow::Result<()> {
        match self {
            Self::Files(dir, follow) => {
                leeward_config::load_dir(&dir, follow.viewer, follow.warm, &follow.live)
                    .await
                    .with_context(|| format!("the policy in {} can't be used", dir.display()))
            }
            Self::Control(subscription) => {
                tokio::spawn(subscription.run());
                Ok(())
            }
        }
    }
}

/// What a successor gets beside the place. Without one it must not be kept: a socket that is held is not closed.
struct Heirlooms {
    ports: Vec<Port>,
    admin: std::net::TcpListener,
    ofrep: Option<std::net::TcpListener>,
    socket: Option<std::os::unix::net::UnixListener>,
}

/// Returns when a successor has taken over; never without a place for one.
async fn taken_over(succession: Option<&mut Succession>) {
    match succession {
        Some(succession) => succession.taken_over().await,
        None => std::future::pending().await,
    }
}

/// The signals that ask this process to end in order.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for one, and says which it was.
    async fn told(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "terminated",
            _ = self.interrupt.recv() => "interrupted",
        }
    }
}

fn hub(settings: &Settings) -> anyhow::Result<Arc<Hub>> {
    let access_log = match &settings.access_log {
        Log::Off => None,
        Log::Stdout => Some(AccessLog::start(std::io::stdout())?),
        Log::File(path) => {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            Some(AccessLog::start(
                file.with_context(|| format!("can't write {}", path.display()))?,
            )?)
        }
    };
    Ok(Hub::new(leeward_telemetry::Settings {
        zone: settings.zone.to_shared(),
        proxy: settings.name.to_shared(),
        version: env!("CARGO_PKG_VERSION").into(),
        trace_ratio: settings.trace_ratio,
        traces: settings.traces(),
        access_log,
    })?)
}

/// Whether requests can be served as policy wants them.
fn is_ready(
    status: &Status,
    degradation: &Degradation,
    identity: Option<&Identity>,
    phase: Phase,
) -> Result<(), &'static str> {
    if phase == Phase::Serving
        && let Some(Err(why)) = identity.map(Identity::ready_now)
    {
        return Err(match why {
            NotReady::Revoked(_) => "identity_not_ready: this proxy's certificate was revoked",
            NotReady::Ended(_) | NotReady::Early(_) => {
                "identity_not_ready: this proxy's certificate has ended, or is not good yet"
            }
        });
    }
    let now = tokio::time::Instant::now().into_std();
    if phase == Phase::Serving && status.asking_until.is_some_and(|until| now < until) {
        return Err("a control plane is asked whether there is newer policy than this proxy's own");
    }
    match (phase, status.generation) {
        (Phase::Serving, Some(_)) if !status.waits_for.is_empty() => {
            Err("plugins without which requests are refused are not loaded yet")
        }
        (Phase::Serving, Some(_)) if degradation.is_judged() => Ok(()),
        (Phase::Serving, Some(_)) => Err("levels of degradation are not judged yet"),
        (Phase::Serving, None) => Err("no policy yet"),
        (Phase::Asking | Phase::Leaving | Phase::Closing, _) => Err("draining"),
    }
}
