//! `leeward-proxy`: the data plane of one node.
//!
//! Nothing is decided here. This binary reads settings, binds every listener before anything is served, wires
//! the crates together, and ends in order:
//!
//! - one thread with a current-thread runtime for each worker, which own their connections;
//! - one runtime beside them for everything that is not a request: policy, plugin compilation, admin, export.

mod admin;
mod drain;
mod settings;

use crate::admin::Admin;
use crate::drain::{Phase, Workers};
use crate::settings::{Log, Settings, Source};
use anyhow::Context;
use clap::Parser;
use leeward_config::{Live, Status, Warm};
use leeward_http::{Listeners, Node, Role, bind};
use leeward_identity::Identity;
use leeward_policy::model::Plugin;
use leeward_policy::{Name, Viewer};
use leeward_telemetry::{AccessLog, Hub};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long the last spans may take to be sent at the end.
const FLUSH: Duration = Duration::from_secs(3);
/// How often the identity's files are looked at.
const IDENTITY_WATCH: Duration = Duration::from_secs(5);
/// How often run-time state that nobody uses is forgotten.
const SWEEP: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let settings = Settings::parse();
    leeward_telemetry::init_logs(leeward_telemetry::Format::Text, &settings.log);
    leeward_telemetry::watch_panics();
    let control = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(4)
        .thread_name("control")
        .enable_all()
        .build();
    let ended = control.map_err(anyhow::Error::from).and_then(|control| {
        let ended = control.block_on(run(settings));
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

/// The plugin host, as `leeward-config` wants it.
struct Plugins(Arc<leeward_wasm::Host>);

impl Warm for Plugins {
    async fn warm(&self, name: &Name, plugin: &Plugin) -> Result<(), String> {
        self.0
            .load(name.as_str(), plugin)
            .await
            .map_err(|error| error.to_string())
    }

    fn retain(&self, names: &[&str]) {
        self.0.retain(names);
    }
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    let source = settings.source()?;
    let viewer = Viewer {
        zone: settings.zone.clone(),
        proxy: settings.name.clone(),
    };
    let identity = match &settings.identity {
        Some(dir) => Some(Identity::load(dir)?),
        None => None,
    };
    let live = Live::new(viewer.clone());
    let hub = hub(&settings)?;
    let plugins = leeward_wasm::Host::new()?;
    let workers = settings.workers();

    // Everything is bound before anything is served: what can't start says so now.
    let mut ports = Vec::new();
    let listen =
        |role, address| bind(role, address, workers).with_context(|| format!("can't listen on {address}"));
    ports.push(listen(Role::Outbound, settings.outbound)?);
    if identity.is_some() {
        ports.push(listen(Role::Inbound, settings.inbound)?);
    }
    let admin = Admin::bind(settings.admin).await?;
    if let Some(file) = &settings.addresses_file {
        let address = |role| ports.iter().find(|p| p.role == role).map(|p| p.address);
        settings::write_addresses(
            file,
            address(Role::Outbound),
            address(Role::Inbound),
            admin.address()?,
        )?;
    }
    for port in &ports {
        tracing::info!(role = ?port.role, address = %port.address, "listening");
    }

    let node = Node {
        live: Arc::clone(live.snapshot()),
        registry: Arc::default(),
        identity: identity.clone(),
        plugins: Arc::clone(&plugins),
        hub: Arc::clone(&hub),
    };
    let (phase, phases) = watch::channel(Phase::Serving);
    let workers = Workers::start(&node, Listeners::deal(ports, workers), &phases)?;
    let registry = Arc::clone(&node.registry);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(SWEEP);
        loop {
            ticks.tick().await;
            registry.sweep();
        }
    });
    tokio::spawn(admin.serve(Arc::clone(&hub), live.clone(), Arc::clone(&node.registry), phases));
    if let Some(identity) = &identity {
        tokio::spawn(leeward_identity::watch(Arc::clone(identity), IDENTITY_WATCH));
    }
    let warm = Arc::new(Plugins(plugins));
    match source {
        Source::Files(dir) => leeward_config::load_dir(&dir, viewer, warm, &live)
            .await
            .with_context(|| format!("the policy in {} can't be used", dir.display()))?,
        Source::Control(control) => {
            let identity = identity.context("--control needs --identity")?;
            let settings = leeward_config::Settings {
                viewer,
                control,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                timing: leeward_config::Timing::DEFAULT,
            };
            tokio::spawn(leeward_config::subscribe(settings, identity, warm, live.clone()));
        }
    }

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => tracing::info!("terminated; draining"),
        _ = interrupt.recv() => tracing::info!("interrupted; draining"),
        () = workers.any_ended() => anyhow::bail!("a worker broke down"),
    }
    drain::drain(&phase, workers, settings.drain_timeout).await;
    tokio::task::spawn_blocking(move || hub.flush(FLUSH)).await?;
    tracing::info!("done");
    Ok(())
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
fn is_ready(status: &Status, phase: Phase) -> Result<(), &'static str> {
    match (phase, status.generation) {
        (Phase::Serving, Some(_)) => Ok(()),
        (Phase::Serving, None) => Err("no policy yet"),
        (Phase::Asking | Phase::Closing, _) => Err("draining"),
    }
}
