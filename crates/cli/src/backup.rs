//! Backups. What needs no control plane is done by `leeward-control`, which knows the store: it is run from beside this
//! program, or from where the shell would find it.

use crate::Connection;
use crate::api::{call, call_within};
use crate::connect::{Link, link};
use crate::output::{Failure, say, table};
use anyhow::Context;
use clap::{Args, Subcommand};
use leeward_proto::v1;
use leeward_proto::v1::backup::Verified;
use leeward_proto::v1::backup_service_client::BackupServiceClient;
use leeward_proto::v1::epoch_status::Role;
use leeward_proto::v1::policy_service_client::PolicyServiceClient;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Longest wait for a backup that is made.
const MAKING: Duration = Duration::from_secs(3600);

/// How long a standby may take to lead.
const PROMOTING: Duration = Duration::from_secs(360);

/// Backups of the control plane's store.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make one now.
    Create {
        #[command(flatten)]
        connection: Connection,
        /// The place, as the control plane has it from --backup-place; may be left out where there is one.
        #[arg(long, value_name = "NAME", default_value = "")]
        destination: String,
        /// The certificate authority's keys, too. Encrypted backups only.
        #[arg(long)]
        include_ca: bool,
    },
    /// Show how backups and the shipping of the log stand.
    Status {
        #[command(flatten)]
        connection: Connection,
    },
    /// Show backups: of a control plane's place, or with --from of any place, without a control plane.
    List(List),
    /// Restore into a scratch store and compare everything; see `leeward-control backup verify --help`.
    Verify(Passed),
    /// Restore a store; see `leeward-control backup restore --help`.
    Restore(Passed),
}

/// Where to look.
#[derive(Args, Debug)]
pub(crate) struct List {
    /// A directory, file:///DIR, or s3://BUCKET/PREFIX?region=...&endpoint=...&credentials=FILE.
    #[arg(long, value_name = "URL")]
    from: Option<String>,
    /// The place, as the control plane has it from --backup-place; may be left out where there is one.
    #[arg(long, value_name = "NAME", default_value = "", conflicts_with = "from")]
    destination: String,
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
        required_unless_present = "from"
    )]
    identity: Option<PathBuf>,
}

/// What `leeward-control` takes.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub(crate) struct Passed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// A control plane that follows another.
#[derive(Debug, Subcommand)]
pub(crate) enum Standby {
    /// Show who leads, and whether this control plane does.
    Status {
        #[command(flatten)]
        connection: Connection,
    },
    /// Let the standby at --control lead, and wait until it does. Whoever leads now takes no writes from then on.
    Promote {
        #[command(flatten)]
        connection: Connection,
    },
}

pub(crate) async fn standby(command: Standby) -> Result<(), Failure> {
    let (connection, promote) = match command {
        Standby::Status { connection } => (connection, false),
        Standby::Promote { connection } => (connection, true),
    };
    if promote {
        let mut client = client(&connection)?;
        call(connection.control, client.promote(v1::PromoteRequest {})).await?;
    }
    let deadline = tokio::time::Instant::now() + PROMOTING;
    loop {
        // It is another server after it has taken over.
        let mut client = client(&connection)?;
        let status = call(
            connection.control,
            client.get_backup_status(v1::GetBackupStatusRequest {}),
        )
        .await;
        let status = match status {
            Err(_) if promote && tokio::time::Instant::now() < deadline => None,
            status => Some(status?),
        };
        if let Some(status) = status {
            let epoch = status.epoch.unwrap_or_default();
            let role = epoch.role();
            if !promote || role == Role::Leader {
                say(&match role {
                    Role::Unspecified => "it leads: its store is its own fence".to_owned(),
                    Role::Leader => format!(
                        "it leads, in epoch {}, at revision {}",
                        epoch.epoch, status.revision
                    ),
                    Role::Standby => format!(
                        "a standby at revision {} of {}; epoch {} is led by {}",
                        status.revision,
                        time(status.revision_ms),
                        epoch.epoch,
                        epoch.leader
                    ),
                    Role::Fenced => format!(
                        "fenced: {} leads in epoch {}; make this one a standby of it",
                        epoch.leader, epoch.epoch
                    ),
                });
                return Ok(());
            }
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(Failure::Failed(anyhow::anyhow!(
                "it does not lead after {PROMOTING:?}"
            )));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Drills.
#[derive(Debug, Subcommand)]
pub(crate) enum Drill {
    /// Restore into a scratch control plane, and measure what is lost and how long it takes. Exits with 1 if the objective
    /// is not met.
    Restore(DrillRestore),
}

/// A drill of a restore.
#[derive(Args, Debug)]
pub(crate) struct DrillRestore {
    /// Where backups are.
    #[arg(long, value_name = "URL")]
    from: String,
    /// A file with the age identities that open encrypted backups.
    #[arg(long, value_name = "FILE")]
    identity_file: Option<PathBuf>,
    /// The most that may be lost; what the RecoveryObjective says if not given.
    #[arg(long, value_name = "DURATION", requires = "rto")]
    rpo: Option<String>,
    /// The longest that it may take.
    #[arg(long, value_name = "DURATION", requires = "rpo")]
    rto: Option<String>,
    /// Where the report is written.
    #[arg(long, value_name = "DIR", default_value = ".")]
    report: PathBuf,
    /// The control plane, which says what there is to lose.
    #[arg(
        long,
        env = "LEEWARD_CONTROL",
        default_value = "127.0.0.1:15010",
        value_name = "IP:PORT"
    )]
    control: SocketAddr,
    /// The directory with your cert.pem, key.pem and bundle.pem. Without it no control plane is asked.
    #[arg(
        long,
        env = "LEEWARD_IDENTITY",
        value_name = "DIR",
        required_unless_present = "rpo"
    )]
    identity: Option<PathBuf>,
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create {
            connection,
            destination,
            include_ca,
        } => create(&connection, destination, include_ca).await,
        Command::Status { connection } => status(&connection).await,
        Command::List(List { from: Some(from), .. }) => {
            beside(vec!["backup".into(), "list".into(), "--from".into(), from.into()]).await
        }
        Command::List(list) => {
            let identity = list.identity.context("say who you are: --identity DIR")?;
            let connection = Connection::of(list.control, identity);
            listed(&connection, list.destination).await
        }
        Command::Verify(passed) => passed.run("verify").await,
        Command::Restore(passed) => passed.run("restore").await,
    }
}

impl Passed {
    async fn run(self, word: &str) -> Result<(), Failure> {
        let mut arguments: Vec<OsString> = vec!["backup".into(), word.into()];
        arguments.extend(self.arguments);
        beside(arguments).await
    }
}

/// Runs `leeward-control`; how it ends is how this ends.
async fn beside(arguments: Vec<OsString>) -> Result<(), Failure> {
    let name = "leeward-control";
    let here = std::env::current_exe().context("can't find this program")?;
    let beside = here.with_file_name(name);
    let program = if beside.exists() { beside } else { name.into() };
    let mut command = tokio::process::Command::new(&program);
    let ended = command
        .args(arguments)
        .kill_on_drop(true)
        .status()
        .await
        .with_context(|| format!("can't run {}", program.display()))?;
    if ended.success() {
        Ok(())
    } else {
        Err(Failure::Told)
    }
}

fn client(connection: &Connection) -> Result<BackupServiceClient<Link>, Failure> {
    Ok(BackupServiceClient::new(link(connection)?).max_decoding_message_size(crate::api::MAX_MESSAGE))
}

async fn create(connection: &Connection, destination: String, include_ca: bool) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let request = v1::CreateBackupRequest {
        destination,
        include_ca,
    };
    let made = call_within(connection.control, MAKING, client.create_backup(request)).await?;
    say(&format!(
        "{} made: revision {}, {} bytes, {} of them new",
        made.name, made.revision, made.bytes, made.new_bytes
    ));
    Ok(())
}

async fn listed(connection: &Connection, destination: String) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let request = v1::ListBackupsRequest { destination };
    let answer = call(connection.control, client.list_backups(request)).await?;
    let rows: Vec<_> = answer.backups.iter().map(row).collect();
    say(&table(
        ["NAME", "MADE", "REVISION", "BYTES", "ENCRYPTED", "VERIFIED"],
        &rows,
    ));
    Ok(())
}

fn row(backup: &v1::Backup) -> [String; 6] {
    if !backup.error.is_empty() {
        let none = String::new;
        return [
            backup.name.clone(),
            backup.error.clone(),
            none(),
            none(),
            none(),
            none(),
        ];
    }
    let verified = match backup.verified() {
        Verified::Unspecified => "no",
        Verified::Restored => "yes",
        Verified::Hashes => "hashes only",
        Verified::Bad => "BAD",
    };
    [
        backup.name.clone(),
        time(backup.ended_ms),
        backup.revision.to_string(),
        backup.bytes.to_string(),
        if backup.encrypted { "yes" } else { "no" }.to_owned(),
        verified.to_owned(),
    ]
}

async fn status(connection: &Connection) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let request = v1::GetBackupStatusRequest {};
    let status = call(connection.control, client.get_backup_status(request)).await?;
    say(if status.leads {
        "this control plane makes the backups"
    } else {
        "another control plane makes the backups, or none has a place for them"
    });
    let rows: Vec<_> = status
        .places
        .iter()
        .map(|place| {
            let shipped = match (place.continuous, place.waiting_since_ms) {
                (false, _) => "no".to_owned(),
                (true, 0) => format!("all, up to {}", place.shipped_position),
                (true, since) => format!("up to {}; waits since {}", place.shipped_position, time(since)),
            };
            let failures = match place.failures {
                0 => String::new(),
                count => format!("{count}: {}", place.error),
            };
            [
                place.destination.clone(),
                time(place.last_good_ms),
                time(place.last_verified_ms),
                shipped,
                failures,
            ]
        })
        .collect();
    say(&table(
        [
            "DESTINATION",
            "LAST GOOD",
            "LAST VERIFIED",
            "LOG SHIPPED",
            "FAILURES",
        ],
        &rows,
    ));
    if let Some(drill) = status.drill {
        say(&format!(
            "last drill {}: {}, lost {} revisions and {} ms, back after {} ms{}",
            time(drill.time_ms),
            if drill.met {
                "objective met"
            } else {
                "objective NOT met"
            },
            drill.lost_revisions,
            drill.lost_ms,
            drill.recovery_ms,
            match drill.error.as_str() {
                "" => String::new(),
                error => format!(": {error}"),
            }
        ));
    }
    Ok(())
}

/// A time for people.
fn time(ms: i64) -> String {
    if ms == 0 {
        return "never".to_owned();
    }
    let nanos = i32::try_from(ms.rem_euclid(1000)).unwrap_or(0) * 1_000_000;
    let seconds = ms.div_euclid(1000);
    prost_types::Timestamp { seconds, nanos }.to_string()
}

pub(crate) async fn drill(command: Drill) -> Result<(), Failure> {
    let Drill::Restore(options) = command;
    let mut arguments: Vec<OsString> = vec!["drill".into(), "restore".into()];
    let mut pass = |flag: &str, value: OsString| {
        arguments.push(flag.into());
        arguments.push(value);
    };
    pass("--from", options.from.into());
    if let Some(file) = options.identity_file {
        pass("--identity-file", file.into());
    }
    pass("--report", options.report.into());
    let mut objective = options.rpo.zip(options.rto);
    if let Some(identity) = options.identity {
        let connection = Connection::of(options.control, identity);
        let mut asked = client(&connection)?;
        let request = v1::GetBackupStatusRequest {};
        let status = call(connection.control, asked.get_backup_status(request)).await?;
        let (revision, when) = (status.revision.to_string(), time(status.revision_ms));
        if status.revision > 0 {
            pass("--live-revision", revision.into());
            pass("--live-time", when.into());
        }
        if objective.is_none() {
            objective = Some(declared(&connection).await?);
        }
    }
    let (rpo, rto) = objective.context("say what is wanted: --rpo and --rto")?;
    pass("--rpo", rpo.into());
    pass("--rto", rto.into());
    beside(arguments).await
}

/// What the mesh's RecoveryObjective says.
async fn declared(connection: &Connection) -> Result<(String, String), Failure> {
    let mut client = PolicyServiceClient::new(link(connection)?);
    let request = v1::ListRequest {
        kind: v1::Kind::RecoveryObjective.into(),
        page_size: 1,
        ..v1::ListRequest::default()
    };
    let listed = call(connection.control, client.list(request)).await?;
    let spec = listed
        .resources
        .into_iter()
        .next()
        .and_then(|resource| resource.spec);
    let Some(v1::resource::Spec::RecoveryObjective(objective)) = spec else {
        return Err(Failure::BadInput(
            "leeward: there is no RecoveryObjective: apply one, or give --rpo and --rto".to_owned(),
        ));
    };
    let text = |duration: Option<prost_types::Duration>| {
        let duration = duration
            .and_then(|d| Duration::try_from(d).ok())
            .unwrap_or_default();
        format!("{}ms", duration.as_millis())
    };
    Ok((text(objective.rpo), text(objective.rto)))
}
