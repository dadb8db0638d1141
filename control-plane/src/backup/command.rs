//! `leeward-control backup` and `leeward-control drill`: what is done with backups where no control plane may run.

use super::catalogue::{self, Listed};
use super::drill::{self, Live};
use super::error::BackupError;
use super::into;
use super::keeper::shown;
use super::manifest::{parse_time, rfc3339, short, stamp};
use super::place::Place;
use super::recover::{self, Plan, Reader, Restored, Until};
use super::seal::Opener;
use super::verify;
use crate::kv::Kv;
use crate::store::Clock;
use clap::{Args, Subcommand};
use leeward_policy::Name;
use leeward_policy::model::RecoveryObjective;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

/// Works with backups where they are. No control plane is needed.
#[derive(Debug, Subcommand)]
pub enum Backup {
    /// Show the backups of a place.
    List {
        /// From where.
        #[command(flatten)]
        source: Source,
    },
    /// Restore a backup into a scratch store, and compare everything.
    Verify {
        /// From where.
        #[command(flatten)]
        source: Source,
        /// The backup, or the beginning of its name; the newest if not given.
        name: Option<String>,
        /// Only compare hashes: needs no identity.
        #[arg(long)]
        hashes_only: bool,
    },
    /// Restore a store.
    Restore(Restore),
}

/// From where.
#[derive(Args, Clone, Debug)]
pub struct Source {
    /// Where backups are: a directory, file:///DIR, or s3://BUCKET/PREFIX?region=…&endpoint=…&credentials=FILE.
    #[arg(long, env = "LEEWARD_BACKUP_FROM", value_name = "URL")]
    from: String,
    /// A file with the age identities that open encrypted backups.
    #[arg(long, env = "LEEWARD_BACKUP_IDENTITY", value_name = "FILE")]
    identity_file: Option<PathBuf>,
}

/// Restores a store.
#[derive(Args, Clone, Debug)]
pub struct Restore {
    #[command(flatten)]
    source: Source,
    /// The directory that the control plane will have as --data.
    #[arg(long, value_name = "DIR", required_unless_present = "etcd")]
    data: Option<PathBuf>,
    /// Into etcd, as the flags --etcd-... of leeward-control say.
    #[arg(long, conflicts_with_all = ["data", "replace"])]
    etcd: bool,
    /// This backup and nothing after it.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["to_revision", "to_time"])]
    backup: Option<String>,
    /// Up to this revision of policy.
    #[arg(long, value_name = "N", conflicts_with = "to_time")]
    to_revision: Option<u64>,
    /// Up to this time, such as 2026-11-30T06:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = time)]
    to_time: Option<i64>,
    /// Of the store of this id, where a place has backups of several.
    #[arg(long, value_name = "ID")]
    store_id: Option<String>,
    /// Let the restored store have the id that it had. Only if nothing was written after what is restored: proxies that have
    /// later revisions take no notice of others with the same numbers.
    #[arg(long)]
    keep_id: bool,
    /// Put a store that is there aside, into replaced-TIME beside it.
    #[arg(long)]
    replace: bool,
    /// Say what would be restored, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Write the certificate authority's files here, where the backup has them.
    #[arg(long, value_name = "DIR")]
    ca_to: Option<PathBuf>,
}

/// Practises.
#[derive(Debug, Subcommand)]
pub enum Drill {
    /// Restore into a scratch control plane, and measure what is lost and how long it takes.
    Restore(DrillRestore),
}

/// A drill of a restore.
#[derive(Args, Clone, Debug)]
pub struct DrillRestore {
    #[command(flatten)]
    source: Source,
    /// The most that may be lost.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    rpo: Duration,
    /// The longest that it may take.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    rto: Duration,
    /// The mesh's revision now; without it, how many revisions are lost is not known.
    #[arg(long, value_name = "N", requires = "live_time")]
    live_revision: Option<u64>,
    /// When that was written.
    #[arg(long, value_name = "TIME", value_parser = time, requires = "live_revision")]
    live_time: Option<i64>,
    /// Where the report is written.
    #[arg(long, value_name = "DIR", default_value = ".")]
    report: PathBuf,
}

fn time(text: &str) -> Result<i64, String> {
    parse_time(text).ok_or_else(|| "want a time such as 2026-11-30T06:00:00Z".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "want a duration such as 30s or 5m".to_owned())
}

/// What a command came to.
#[derive(Debug)]
pub struct Told {
    /// For people.
    pub text: String,
    /// Whether it is what was hoped for.
    pub good: bool,
}

fn told(text: String) -> Told {
    Told { text, good: true }
}

impl Source {
    fn open(&self) -> Result<(Place, Opener), BackupError> {
        let place = Place::open(&self.from)?;
        let opener = self.identity_file.as_deref().map(Opener::from_file).transpose()?;
        Ok((place, opener.unwrap_or_default()))
    }
}

/// Does a command of `backup`. `etcd` opens the cluster that the flags name.
///
/// # Errors
///
/// What went wrong, for people.
pub async fn backup(command: Backup, etcd: impl FnOnce() -> anyhow::Result<Kv>) -> anyhow::Result<Told> {
    match command {
        Backup::List { source } => list(&source).await.map_err(plain),
        Backup::Verify {
            source,
            name,
            hashes_only,
        } => check(&source, name.as_deref(), hashes_only).await.map_err(plain),
        Backup::Restore(options) => {
            let etcd = options.etcd.then(etcd).transpose()?;
            restore(&options, etcd).await.map_err(plain)
        }
    }
}

fn plain(error: BackupError) -> anyhow::Error {
    anyhow::Error::new(error)
}

async fn list(source: &Source) -> Result<Told, BackupError> {
    let (place, _) = source.open()?;
    let listed = catalogue::list(&place).await?;
    let mut text = format!(
        "{:<29}  {:<24}  {:>9}  {:>12}  {:<9}  VERIFIED\n",
        "NAME", "MADE", "REVISION", "BYTES", "ENCRYPTED"
    );
    for listed in listed.iter().rev() {
        // Writing to a String does not fail.
        let _ = match &listed.manifest {
            Ok(manifest) => writeln!(
                text,
                "{:<29}  {:<24}  {:>9}  {:>12}  {:<9}  {}",
                listed.short,
                rfc3339(manifest.ended_ms),
                manifest.revision,
                manifest.stored_bytes(),
                if manifest.recipients.is_empty() {
                    "no"
                } else {
                    "yes"
                },
                verified(listed)
            ),
            Err(error) => writeln!(text, "{:<29}  {}", listed.short, error.chain()),
        };
    }
    Ok(told(text))
}

fn verified(listed: &Listed) -> String {
    match &listed.note {
        None => "no".to_owned(),
        Some(note) if !note.good => format!("BAD: {}", note.why),
        Some(note) if note.restored => shown(note.time_ms),
        Some(note) => format!("{} (hashes only)", shown(note.time_ms)),
    }
}

async fn check(source: &Source, name: Option<&str>, hashes_only: bool) -> Result<Told, BackupError> {
    let (place, opener) = source.open()?;
    let listed = catalogue::list(&place).await?;
    let found: Vec<&Listed> = match name {
        None => listed.iter().next_back().into_iter().collect(),
        Some(name) => listed.iter().filter(|l| l.short.starts_with(name)).collect(),
    };
    let [one] = found.as_slice() else {
        return Err(BackupError::Nothing(match name {
            None => format!("there is no backup in {}", place.url()),
            Some(name) => format!("{} backups begin with {name}; want one", found.len()),
        }));
    };
    let result = verify::verify(&place, &opener, one, &std::env::temp_dir(), hashes_only).await;
    if result.as_ref().err().is_none_or(verify::condemns) {
        let noted = catalogue::put_note(&place, &one.short, &verify::note(&result)).await;
        if let Err(error) = noted {
            // Whoever may only read can verify, too.
            tracing::warn!(error = error.chain(), "can't write down what was found");
        }
    }
    let found = result?;
    Ok(told(match found.restored {
        Some(restored) => format!(
            "{} is good: {} objects, {} keys, revision {} of {}\n",
            one.short,
            found.objects,
            restored.entries,
            restored.head.revision,
            shown(restored.head.time_ms)
        ),
        None => format!(
            "{}: the hashes of {} objects are right; nothing was restored\n",
            one.short, found.objects
        ),
    }))
}

async fn restore(options: &Restore, etcd: Option<Kv>) -> Result<Told, BackupError> {
    let (place, opener) = options.source.open()?;
    let until = match (&options.backup, options.to_revision, options.to_time) {
        (Some(name), _, _) => Until::Backup(name.clone()),
        (None, Some(revision), _) => Until::Revision(revision),
        (None, None, Some(ms)) => Until::Time(ms),
        (None, None, None) => Until::Latest,
    };
    let listed = catalogue::list(&place).await?;
    let plan = recover::plan(&listed, options.store_id.as_deref(), until)?;
    let reader = Reader {
        place: &place,
        opener: &opener,
    };
    if options.dry_run {
        return Ok(told(planned(&plan)));
    }
    let fresh = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
    let id = (!options.keep_id).then_some(fresh.as_str());
    let (restored, aside) = match (&options.data, etcd) {
        (Some(dir), _) => {
            let stamp = stamp(Clock::System.now_ms());
            let replace = options.replace.then_some(stamp.as_str());
            into::directory(dir, &reader, &plan, id, replace).await?
        }
        (None, Some(kv)) => (recover::restore(&kv, &reader, &plan, id).await?, None),
        (None, None) => {
            return Err(BackupError::Nothing(
                "say where to: --data DIR or --etcd".to_owned(),
            ));
        }
    };
    let mut text = done(&plan, &restored);
    if let Some(aside) = aside {
        let _ = writeln!(text, "the store that was there is in {}", aside.display());
    }
    if let Some(dir) = &options.ca_to {
        recover::restore_authority(&reader, &plan.manifest, dir).await?;
        let _ = writeln!(text, "the certificate authority is in {}", dir.display());
    }
    Ok(told(text))
}

fn planned(plan: &Plan) -> String {
    let after = match &plan.until {
        Until::Latest => "and everything that was shipped after it".to_owned(),
        Until::Backup(_) => "and nothing after it".to_owned(),
        Until::Revision(revision) => format!("and what was shipped after it, up to revision {revision}"),
        Until::Time(ms) => format!("and what was shipped after it, up to {}", rfc3339(*ms)),
    };
    format!(
        "would restore {} of store {} (revision {}, made {}), {after}\n",
        short(&plan.name).unwrap_or_default(),
        plan.manifest.store_id,
        plan.manifest.revision,
        rfc3339(plan.manifest.ended_ms)
    )
}

fn done(plan: &Plan, restored: &Restored) -> String {
    format!(
        "restored {} and {} segments after it: revision {} of {}, {} keys\nthe store is {}\n",
        short(&plan.name).unwrap_or_default(),
        restored.segments,
        restored.head.revision,
        shown(restored.head.time_ms),
        restored.entries,
        restored.store_id
    )
}

/// Does a drill.
///
/// # Errors
///
/// If it can't be begun, or the report can't be written.
pub async fn drill(command: Drill) -> anyhow::Result<Told> {
    let Drill::Restore(options) = command;
    let (place, opener) = options.source.open()?;
    let live = options
        .live_revision
        .zip(options.live_time)
        .map(|(revision, time_ms)| Live { revision, time_ms });
    let objective = RecoveryObjective {
        rpo: options.rpo,
        rto: options.rto,
        destination: Name::parse("drill").map_err(|error| anyhow::anyhow!("{error}"))?,
        drill_every: None,
    };
    let report = Box::pin(drill::run(
        &place,
        &opener,
        &std::env::temp_dir(),
        live,
        &objective,
    ))
    .await;
    let path = report.write(&options.report)?;
    let mut text = report.markdown("see the file");
    let _ = writeln!(text, "\nwritten to {} and .md", path.display());
    Ok(Told {
        good: report.met,
        text,
    })
}
