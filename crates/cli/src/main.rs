//! `leeward`: the command for people.

mod api;
mod audit;
mod backup;
mod ca;
mod capture;
mod check;
mod circuit;
mod connect;
mod degrade;
mod demo;
mod diff;
mod explain;
mod history;
mod identity;
mod lint;
mod output;
mod plugin;
mod proxy;
mod queue;
mod revoke;
mod rollout;
mod supervise;
mod token;
mod workload;
mod yaml;
mod zone;

use clap::{Args, Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Leeward: a service mesh that stays useful while parts fail.
#[derive(Debug, Parser)]
#[command(name = "leeward", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// How to reach a control plane.
#[derive(Args, Clone, Debug)]
struct Connection {
    /// The control plane.
    #[arg(
        long,
        env = "LEEWARD_CONTROL",
        default_value = "127.0.0.1:15010",
        value_name = "IP:PORT"
    )]
    control: SocketAddr,
    /// The directory with your cert.pem, key.pem and bundle.pem.
    #[arg(
        long,
        env = "LEEWARD_IDENTITY",
        value_name = "DIR",
        required = false,
        required_unless_present = "token_file",
        default_value_if("token_file", clap::builder::ArgPredicate::IsPresent, "")
    )]
    identity: PathBuf,
    /// A file with a token of the control plane's OIDC issuer, in place of a certificate; it goes with --bundle.
    #[arg(long, env = "LEEWARD_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The mesh's roots (bundle.pem), by which the control plane is known to one who comes with a token.
    #[arg(long, env = "LEEWARD_BUNDLE", value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// Use the role breakglass, for this reason: it is kept in the audit log.
    #[arg(long, value_name = "REASON")]
    breakglass: Option<String>,
}

impl Connection {
    /// With a certificate, and nothing else to say.
    const fn of(control: SocketAddr, identity: PathBuf) -> Self {
        Self {
            control,
            identity,
            token_file: None,
            bundle: None,
            breakglass: None,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a whole mesh on this machine, break it, and see what its users get.
    Demo(demo::Options),
    /// Write resources from files: all of them or none.
    Apply {
        #[command(flatten)]
        connection: Connection,
        /// A file, a directory of .yaml files, or - for standard input.
        #[arg(short, long, value_name = "FILE|DIR|-", required = true)]
        file: Vec<PathBuf>,
        #[command(flatten)]
        options: api::ApplyOptions,
    },
    /// Show what apply would change. Ends with 0 if nothing, 1 if something, 2 or more if that can't be told.
    Diff {
        #[command(flatten)]
        connection: Connection,
        /// A file, a directory of .yaml files, or - for standard input.
        #[arg(short, long, value_name = "FILE|DIR|-", required = true)]
        file: Vec<PathBuf>,
        #[command(flatten)]
        options: api::ManagerOptions,
    },
    /// Show who did what with the control plane, and what was refused.
    Audit(audit::Options),
    /// Show resources.
    Get {
        #[command(flatten)]
        connection: Connection,
        /// zone, service, route, fallbackpolicy, plugin, resiliencepolicy, circuitoverride, featureflags,
        /// degradationpolicy, degradationoverride, queue, authorizationpolicy, or all.
        #[arg(value_parser = output::kind)]
        kind: output::Kinds,
        /// One resource; all of the kind if not given.
        name: Option<String>,
        /// Only those with these labels, such as env=prod,tier!=db,'team in (a,b)',!legacy.
        #[arg(short = 'l', long, default_value = "", conflicts_with = "name")]
        selector: String,
        /// How to show them.
        #[arg(short, long, default_value = "table")]
        output: output::GetFormat,
    },
    /// Delete a resource.
    Delete {
        #[command(flatten)]
        connection: Connection,
        /// zone, service, route, fallbackpolicy, plugin, resiliencepolicy, circuitoverride, featureflags,
        /// degradationpolicy, degradationoverride, queue or authorizationpolicy.
        #[arg(value_parser = output::kind)]
        kind: output::Kinds,
        /// Its name.
        name: String,
        /// Only if it is at this revision.
        #[arg(long, default_value_t = 0)]
        revision: u64,
        #[command(flatten)]
        way: api::Way,
    },
    /// Show changes as they happen.
    Watch {
        #[command(flatten)]
        connection: Connection,
        /// Changes after this revision; from the beginning if not given.
        #[arg(long, default_value_t = 0)]
        after: u64,
        /// Only resources with these labels, such as env=prod.
        #[arg(short = 'l', long, default_value = "")]
        selector: String,
    },
    /// Show the proxies: what runs on them, and what they refuse.
    Proxies {
        #[command(flatten)]
        connection: Connection,
        /// How to show them.
        #[arg(short, long, default_value = "table")]
        output: output::Format,
    },
    Lint(lint::Options),
    Explain(explain::Options),
    History(history::History),
    Rollback(history::Rollback),
    /// See how far a change is on its way to proxies, and steer it.
    #[command(subcommand)]
    Rollout(rollout::Command),
    Wait(rollout::Wait),
    /// See circuits, and hold one open or closed for a while.
    #[command(subcommand)]
    Circuit(circuit::Command),
    /// See queued requests at a proxy, and send dead letters again or drop them.
    #[command(subcommand)]
    Queue(queue::Command),
    Degrade(degrade::Options),
    /// Take a zone out of use for a while, and see how zones stand.
    #[command(subcommand)]
    Zone(zone::Command),
    /// Plugins: bring their modules to the control plane, and see which are there.
    #[command(subcommand)]
    Plugin(plugin::Command),
    /// Have the kernel bring this node's connections to its proxy, and undo that. Linux, with nftables.
    #[command(subcommand)]
    Capture(capture::Command),
    /// Keep processes alive, and replace them without a lost request: SIGHUP upgrades, SIGTERM ends.
    Supervise(supervise::Options),
    /// Become a child that ends with its supervisor.
    #[command(hide = true)]
    ExecChild(supervise::Exec),
    /// Make certificates, get your own from the control plane, or have those of others refused.
    #[command(subcommand)]
    Identity(identity::Command),
    /// The certificate authority: make it, see it, replace it.
    #[command(subcommand)]
    Ca(ca::Command),
    /// Make, see, verify and restore backups of the control plane's store.
    #[command(subcommand)]
    Backup(backup::Command),
    /// A control plane that follows another: see how it stands, let it lead.
    #[command(subcommand)]
    Standby(backup::Standby),
    /// Practise what is to be done when something is lost, and measure it.
    #[command(subcommand)]
    Drill(backup::Drill),
    /// Make tokens with which nodes and people join.
    #[command(subcommand)]
    Token(token::Command),
}

/// Bad usage or bad input, as sysexits has it.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; to whom they can't be shown they don't matter.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(cli.command)),
        Err(error) => Err(output::Failure::Failed(error.into())),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(output::Failure::BadInput(lines)) => {
            output::complain(&lines);
            ExitCode::from(USAGE)
        }
        Err(output::Failure::Told) => ExitCode::FAILURE,
        Err(output::Failure::Status(status)) => ExitCode::from(status),
        Err(output::Failure::Untold(why)) => {
            output::complain(&why);
            ExitCode::from(2)
        }
        Err(output::Failure::Failed(error)) => {
            output::complain(&format!("leeward: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<(), output::Failure> {
    match command {
        Command::Demo(options) => demo::run(options).await,
        Command::Apply {
            connection,
            file,
            options,
        } => Box::pin(api::apply(&connection, &file, options)).await,
        Command::Diff {
            connection,
            file,
            options,
        } => Box::pin(diff::diff(&connection, &file, options)).await,
        Command::Audit(options) => audit::run(options).await,
        Command::Get {
            connection,
            kind,
            name,
            selector,
            output,
        } => Box::pin(api::get(&connection, kind, name, selector, output)).await,
        Command::Delete {
            connection,
            kind,
            name,
            revision,
            way,
        } => api::delete(&connection, kind, name, (revision, way)).await,
        Command::Watch {
            connection,
            after,
            selector,
        } => api::watch(&connection, after, selector).await,
        Command::Proxies { connection, output } => api::proxies(&connection, output).await,
        Command::Capture(command) => capture::run(command).await,
        Command::Supervise(options) => supervise::run(options).await,
        Command::ExecChild(exec) => supervise::exec(&exec),
        Command::Lint(options) => Box::pin(lint::run(options)).await,
        Command::Explain(options) => Box::pin(explain::run(options)).await,
        Command::History(history) => history::history(history).await,
        Command::Rollback(rollback) => Box::pin(history::rollback(rollback)).await,
        Command::Rollout(command) => rollout::run(command).await,
        Command::Wait(wait) => rollout::wait(wait).await,
        Command::Circuit(command) => Box::pin(circuit::run(command)).await,
        Command::Queue(command) => queue::run(command).await,
        Command::Degrade(options) => Box::pin(degrade::run(options)).await,
        Command::Zone(command) => Box::pin(zone::run(command)).await,
        Command::Plugin(command) => plugin::run(command).await,
        Command::Identity(command) => identity::run(command).await,
        Command::Ca(command) => ca::run(command).await,
        Command::Backup(command) => Box::pin(backup::run(command)).await,
        Command::Standby(command) => Box::pin(backup::standby(command)).await,
        Command::Drill(command) => Box::pin(backup::drill(command)).await,
        Command::Token(command) => token::run(command).await,
    }
}
