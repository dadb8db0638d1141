//! Makes, ships, verifies and drops backups by policy, wherever this control plane leads the job.

use super::catalogue::{self, Listed, put_note, sweep};
use super::create::{self, Made, pack_authority};
use super::drill;
use super::error::BackupError;
use super::fence::{Lead, Role};
use super::manifest::rfc3339;
use super::place::Place;
use super::retention::Retention;
use super::seal::{Opener, Sealer};
use super::ship::{Shipper, Shipping, shipped_to};
use super::verify::{self, condemns, note};
use crate::policy::Policy;
use crate::store::Leadership;
use leeward_policy::model::{BackupPolicy, RecoveryObjective};
use leeward_policy::{Kind, Spec};
use leeward_proto::parse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The job that one control plane leads.
const JOB: &str = "backup";
/// How long its lease lasts without a word.
const LEASE: Duration = Duration::from_secs(15);
/// How often it is looked whether something is due.
const LOOK: Duration = Duration::from_secs(1);
/// The pause after the first failure; each further one doubles it.
const PAUSE: Duration = Duration::from_secs(2);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// What a control plane needs for backups.
#[derive(Debug, Default)]
pub struct BackupSettings {
    /// Names and where they are, as `--backup-place` has them.
    pub places: BTreeMap<String, String>,
    /// With whose secrets backups are opened when they are verified, if there are any.
    pub identity: Option<PathBuf>,
    /// The directory of the certificate authority, if there is one.
    pub authority: Option<PathBuf>,
    /// Where scratch stores are made.
    pub scratch: PathBuf,
    /// Whether this control plane leads, where several have stores of their own.
    pub lead: Option<Lead>,
}

/// How a place stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct Standing {
    pub(crate) last_good_ms: i64,
    pub(crate) last_verified_ms: i64,
    pub(crate) failures: u32,
    pub(crate) error: String,
    pub(crate) continuous: bool,
    pub(crate) shipping: Shipping,
    /// When it was last tried to verify one.
    tried_ms: i64,
    /// The last verification condemned the newest backup.
    pub(crate) bad: bool,
}

/// Backups of one control plane. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Backups {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    policy: Policy,
    places: BTreeMap<String, Place>,
    opener: Opener,
    has_secret: bool,
    authority: Option<PathBuf>,
    scratch: PathBuf,
    lead: Option<Lead>,
    /// Held while a backup is made: one at a time.
    making: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    leads: bool,
    places: BTreeMap<String, Standing>,
    drill: Option<drill::Report>,
}

/// What is due next for one policy.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    /// When the last backup was begun; `None`: there is none.
    last_ms: Option<i64>,
    /// By how much the next is later, as a share of the jitter.
    draw: f64,
    /// Not before this time, after a failure.
    not_before: Option<tokio::time::Instant>,
    failures: u32,
}

impl Due {
    fn is_now(&self, policy: &BackupPolicy, now_ms: i64) -> bool {
        if self.not_before.is_some_and(|at| tokio::time::Instant::now() < at) {
            return false;
        }
        let Some(last) = self.last_ms else { return true };
        let wait = policy.every + policy.jitter.mul_f64(self.draw.clamp(0.0, 1.0));
        let wait = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        // A clock that was set back must not put it off for as long.
        now_ms >= last.saturating_add(wait) || now_ms < last.saturating_sub(60_000)
    }

    fn failed(&mut self) {
        self.not_before = Some(tokio::time::Instant::now() + pause(self.failures));
        self.failures = self.failures.saturating_add(1);
    }
}

/// The pause after so many failures in a row before this one.
fn pause(failures: u32) -> Duration {
    let longest = PAUSE.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE);
    longest.mul_f64(0.5 + 0.5 * fastrand::f64())
}

impl Backups {
    /// Opens the places.
    ///
    /// # Errors
    ///
    /// If one can't be used, or the file of identities can't be read.
    pub fn open(policy: Policy, settings: BackupSettings) -> anyhow::Result<Self> {
        let places = settings.places.into_iter();
        let places = places.map(|(name, url)| Place::open(&url).map(|place| (name, place)));
        let opener = settings.identity.as_deref().map(Opener::from_file).transpose()?;
        let places = places.collect::<Result<_, _>>()?;
        Ok(Self {
            inner: Arc::new(Inner {
                policy,
                places,
                has_secret: opener.is_some(),
                opener: opener.unwrap_or_default(),
                authority: settings.authority,
                scratch: settings.scratch,
                lead: settings.lead,
                making: tokio::sync::Mutex::default(),
                state: Mutex::default(),
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Poison is harmless: it is for people.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, place: &str, change: impl FnOnce(&mut Standing)) {
        change(self.state().places.entry(place.to_owned()).or_default());
    }

    pub(crate) fn leads(&self) -> bool {
        self.state().leads
    }

    pub(crate) fn standings(&self) -> BTreeMap<String, Standing> {
        self.state().places.clone()
    }

    pub(crate) fn drill(&self) -> Option<drill::Report> {
        self.state().drill.clone()
    }

    /// Whether its store is the one of the mesh, where there are several.
    fn is_ahead(&self) -> bool {
        let lead = self.inner.lead.as_ref();
        lead.is_none_or(|lead| lead.0.role() == Role::Leader)
    }

    pub(crate) fn lead(&self) -> Option<&Lead> {
        self.inner.lead.as_ref()
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.inner.policy
    }

    /// A place by its name; without one, the one that there is.
    pub(crate) fn place(&self, name: &str) -> Result<(&str, &Place), String> {
        let places = &self.inner.places;
        let known = places.keys().cloned().collect::<Vec<_>>().join(", ");
        let found = if name.is_empty() && places.len() == 1 {
            places.first_key_value()
        } else {
            places.get_key_value(name)
        };
        match found {
            Some((name, place)) => Ok((name, place)),
            None if places.is_empty() => {
                Err("this control plane was started with no --backup-place".to_owned())
            }
            None if name.is_empty() => Err(format!("say which place: {known}")),
            None => Err(format!("there is no place {name}; there are {known}")),
        }
    }

    /// The policies that say something of places, by their place; of two for one, the first by name counts.
    fn policies(&self) -> BTreeMap<String, BackupPolicy> {
        let (stored, _) = self
            .inner
            .policy
            .store()
            .list(Some(Kind::BackupPolicy), None, 1000);
        let mut policies = BTreeMap::new();
        for stored in stored {
            if let Ok(resource) = parse(&crate::policy::wire(&stored))
                && let Spec::BackupPolicy(policy) = resource.spec
            {
                policies.entry(policy.destination.to_string()).or_insert(policy);
            }
        }
        policies
    }

    fn objective(&self) -> Option<RecoveryObjective> {
        let (stored, _) = self
            .inner
            .policy
            .store()
            .list(Some(Kind::RecoveryObjective), None, 1);
        let resource = parse(&crate::policy::wire(stored.first()?)).ok()?;
        let Spec::RecoveryObjective(objective) = resource.spec else {
            return None;
        };
        Some(objective)
    }

    /// Makes a backup now, by whatever the policy for the place says of encryption.
    pub(crate) async fn make(&self, name: &str, include_ca: bool) -> Result<Made, BackupError> {
        let made = self.try_make(name, include_ca).await;
        match &made {
            Ok(made) => {
                let at = made.manifest.ended_ms;
                self.with(name, |standing| {
                    standing.last_good_ms = at;
                    (standing.failures, standing.error) = (0, String::new());
                });
                let (revision, written) = (made.manifest.revision, made.written);
                tracing::info!(
                    place = name,
                    backup = made.name,
                    revision,
                    written,
                    reused = made.reused,
                    "a backup is made"
                );
            }
            Err(error) => self.failed(name, "a backup failed", error),
        }
        made
    }

    fn failed(&self, name: &str, what: &str, error: &BackupError) {
        let why = error.chain();
        tracing::error!(place = name, error = why, "{what}");
        self.with(name, |standing| {
            standing.failures = standing.failures.saturating_add(1);
            standing.error = why;
        });
    }

    async fn try_make(&self, name: &str, include_ca: bool) -> Result<Made, BackupError> {
        let _making = self.inner.making.lock().await;
        let (_, place) = self.place(name).map_err(BackupError::Nothing)?;
        let policies = self.policies();
        let recipients = policies.get(name).map_or(&[][..], |policy| &policy.recipients);
        let sealer = Sealer::new(recipients)?;
        let authority = match (&self.inner.authority, include_ca) {
            (_, false) => None,
            (None, true) => {
                return Err(BackupError::Nothing(
                    "this control plane is no certificate authority: there are no keys to include".to_owned(),
                ));
            }
            (Some(_), true) if !sealer.encrypts() => {
                return Err(BackupError::Nothing(format!(
                    "keys are included in encrypted backups only: give the BackupPolicy of {name} encryption.recipients"
                )));
            }
            (Some(dir), true) => Some(pack_authority(dir)?),
        };
        let held = || self.leads() && self.is_ahead();
        create::create(self.inner.policy.store(), place, &sealer, authority, held).await
    }

    /// Does what policy says until it is stopped.
    pub(crate) async fn run(self, stop: CancellationToken) {
        if self.inner.places.is_empty() {
            return;
        }
        loop {
            let leadership = tokio::select! {
                () = stop.cancelled() => return,
                leadership = self.inner.policy.store().lead(JOB, LEASE) => leadership,
            };
            if !self.is_ahead() {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(LOOK) => continue,
                }
            }
            self.state().leads = true;
            tokio::select! {
                () = stop.cancelled() => return,
                () = leadership.lost() => {}
                () = self.tend(&leadership) => {}
            }
            self.state().leads = false;
        }
    }

    async fn tend(&self, leadership: &Leadership) {
        let mut due: BTreeMap<String, Due> = BTreeMap::new();
        let mut shippers = JoinSet::new();
        let mut shipped: BTreeMap<String, (BackupPolicy, tokio::task::AbortHandle)> = BTreeMap::new();
        let mut drilled = tokio::time::Instant::now();
        while leadership.is_held() && self.is_ahead() {
            let policies = self.policies();
            shipped.retain(|name, (policy, task)| {
                let stays = policies.get(name) == Some(policy) && !task.is_finished();
                if !stays {
                    task.abort();
                    self.with(name, |standing| standing.continuous = false);
                }
                stays
            });
            // Those that have ended have nothing more to say.
            while shippers.try_join_next().is_some() {}
            for (name, policy) in &policies {
                let Ok((_, place)) = self.place(name) else {
                    let error = self.place(name).err().unwrap_or_default();
                    self.with(name, |standing| standing.error = error);
                    continue;
                };
                if !due.contains_key(name) {
                    match self.known(name, place).await {
                        Ok(known) => drop(due.insert(name.clone(), known)),
                        Err(error) => {
                            self.failed(name, "a place of backups can't be read", &error);
                            continue;
                        }
                    }
                }
                if let Some(due) = due.get_mut(name) {
                    self.backup(name, policy, due).await;
                }
                self.check(name, place, policy).await;
                if policy.continuous && !shipped.contains_key(name) {
                    let (this, place, called) = (self.clone(), place.clone(), name.clone());
                    let recipients = policy.recipients.clone();
                    let task = shippers.spawn(async move { this.ship(&called, &place, &recipients).await });
                    shipped.insert(name.clone(), (policy.clone(), task));
                }
            }
            if let Some(objective) = self.objective()
                && let Some(every) = objective.drill_every
                && tokio::time::Instant::now() >= drilled + every
            {
                drilled = tokio::time::Instant::now();
                self.drill_now(&objective).await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What is known of a place when this control plane begins to lead.
    async fn known(&self, name: &str, place: &Place) -> Result<Due, BackupError> {
        let own = self.inner.policy.store().id();
        let listed = catalogue::list(place).await?;
        let mut last = None;
        for listed in &listed {
            let Ok(manifest) = &listed.manifest else { continue };
            if manifest.store_id == own {
                last = last.max(Some(manifest.begun_ms));
                self.with(name, |standing| {
                    standing.last_good_ms = standing.last_good_ms.max(manifest.ended_ms);
                });
            }
        }
        let verified = listed.iter().filter_map(|listed| listed.note.as_ref());
        let verified = verified.filter(|note| note.good).map(|note| note.time_ms).max();
        self.with(name, |standing| standing.last_verified_ms = verified.unwrap_or(0));
        Ok(Due {
            last_ms: last,
            draw: fastrand::f64(),
            ..Due::default()
        })
    }

    async fn backup(&self, name: &str, policy: &BackupPolicy, due: &mut Due) {
        let store = self.inner.policy.store();
        let made_ms = self.state().places.get(name).map_or(0, |s| s.last_good_ms);
        // One that was made by command, or for the log, counts.
        if due.last_ms.is_some_and(|last| made_ms > last) {
            due.last_ms = Some(made_ms);
        }
        if !due.is_now(policy, store.now_ms()) {
            return;
        }
        match self.make(name, false).await {
            Ok(made) => {
                *due = Due {
                    last_ms: Some(made.manifest.begun_ms),
                    draw: fastrand::f64(),
                    ..Due::default()
                };
                self.drop_old(name, policy).await;
            }
            Err(_) => due.failed(),
        }
    }

    async fn drop_old(&self, name: &str, policy: &BackupPolicy) {
        let Ok((_, place)) = self.place(name) else { return };
        let keep = Retention {
            last: policy.retention.last,
            daily: policy.retention.daily,
            weekly: policy.retention.weekly,
            max_age: policy.retention.max_age,
        };
        let _making = self.inner.making.lock().await;
        match sweep(place, &keep, self.inner.policy.store().now_ms()).await {
            Ok(swept) if swept != catalogue::Swept::default() => {
                tracing::info!(
                    place = name,
                    backups = swept.backups,
                    chunks = swept.chunks,
                    segments = swept.segments,
                    "old backups are gone"
                );
            }
            Ok(_) => {}
            Err(error) => self.failed(name, "old backups can't be dropped", &error),
        }
    }

    /// Verifies the newest backup when it is time.
    async fn check(&self, name: &str, place: &Place, policy: &BackupPolicy) {
        let now_ms = self.inner.policy.store().now_ms();
        let last = self
            .state()
            .places
            .get(name)
            .map_or(0, |s| s.last_verified_ms.max(s.tried_ms));
        let wait = i64::try_from(policy.verify_every.as_millis()).unwrap_or(i64::MAX);
        if now_ms < last.saturating_add(wait) && now_ms >= last.saturating_sub(60_000) {
            return;
        }
        let newest = match catalogue::list(place).await {
            Ok(listed) => listed.into_iter().next_back(),
            Err(error) => return self.failed(name, "a place of backups can't be read", &error),
        };
        let Some(newest) = newest else { return };
        // Whatever comes of it, the next is a period later: one that fails is told of, and not made again each second.
        self.with(name, |standing| standing.tried_ms = now_ms);
        if let Err(error) = self.verify(name, place, &newest).await {
            self.failed(name, "a backup can't be verified", &error);
        }
    }

    /// Verifies one backup, and writes down what was found.
    pub(crate) async fn verify(&self, name: &str, place: &Place, listed: &Listed) -> Result<(), BackupError> {
        let encrypted = listed.manifest.as_ref().is_ok_and(|m| !m.recipients.is_empty());
        let hashes_only = encrypted && !self.inner.has_secret;
        let (opener, scratch) = (&self.inner.opener, &self.inner.scratch);
        let verified = verify::verify(place, opener, listed, scratch, hashes_only).await;
        if verified.as_ref().err().is_none_or(condemns) {
            let note = note(&verified);
            let good = note.good;
            self.with(name, |standing| {
                standing.bad = !good;
                if good {
                    standing.last_verified_ms = note.time_ms;
                }
            });
            put_note(place, &listed.short, &note).await?;
            tracing::info!(
                place = name,
                backup = listed.short,
                good,
                why = note.why,
                "a backup is verified"
            );
        }
        verified.map(drop)
    }

    /// Ships the log for as long as this control plane leads.
    async fn ship(&self, name: &str, place: &Place, recipients: &[Box<str>]) {
        let mut failures = 0;
        loop {
            match self.try_ship(name, place, recipients, &mut failures).await {
                Ok(()) => {}
                Err(error) => {
                    self.failed(name, "the log can't be shipped", &error);
                    tokio::time::sleep(pause(failures)).await;
                    failures += 1;
                }
            }
        }
    }

    /// Ships until a new backup is needed to go on from.
    async fn try_ship(
        &self,
        name: &str,
        place: &Place,
        recipients: &[Box<str>],
        failures: &mut u32,
    ) -> Result<(), BackupError> {
        let store = self.inner.policy.store();
        let sealer = Sealer::new(recipients)?;
        let listed = catalogue::list(place).await?;
        let bases = listed.iter().filter_map(|listed| listed.manifest.as_ref().ok());
        let base = bases
            .filter(|manifest| manifest.store_id == store.id())
            .map(|manifest| manifest.position)
            .max();
        let from = match base {
            None => self.make(name, false).await?.manifest.position,
            Some(base) => shipped_to(place, store.id()).await?.unwrap_or(0).max(base),
        };
        let mut shipper = Shipper::new(store, place, &sealer, from);
        let tell = |shipping: Shipping| {
            self.with(name, |standing| {
                (standing.continuous, standing.shipping) = (true, shipping);
            });
        };
        tell(Shipping {
            position: from,
            waiting_since_ms: None,
        });
        loop {
            match shipper.next(&tell).await {
                Ok(()) => *failures = 0,
                Err(BackupError::Gap(position)) => {
                    tracing::info!(
                        place = name,
                        position,
                        "the log went by unseen; a new backup is made to go on from"
                    );
                    self.make(name, false).await?;
                    return Ok(());
                }
                Err(BackupError::Kv(error)) => return Err(error.into()),
                Err(error) => {
                    self.failed(
                        name,
                        "a segment of the log can't be shipped; it is tried again",
                        &error,
                    );
                    tokio::time::sleep(pause(*failures)).await;
                    *failures += 1;
                }
            }
        }
    }

    async fn drill_now(&self, objective: &RecoveryObjective) {
        let name = objective.destination.as_str();
        let Ok((_, place)) = self.place(name) else { return };
        let live = drill::live(self.inner.policy.store()).await;
        let (opener, scratch) = (&self.inner.opener, &self.inner.scratch);
        let report = Box::pin(drill::run(place, opener, scratch, live, objective)).await;
        tracing::info!(
            place = name,
            met = report.met,
            lost_revisions = report.lost_revisions,
            lost_ms = report.lost_ms,
            recovery_ms = report.recovery_ms,
            error = report.error,
            "a drill is made"
        );
        self.state().drill = Some(report);
    }

    /// For Prometheus.
    pub(crate) fn metrics(&self, now_ms: i64) -> String {
        type Row = (&'static str, &'static str, fn(&Standing, i64) -> Option<f64>);
        const ROWS: [Row; 5] = [
            (
                "leeward_control_backup_age_seconds",
                "Time since the last good backup was whole.",
                |s, now| (s.last_good_ms > 0).then(|| seconds(now - s.last_good_ms)),
            ),
            (
                "leeward_control_backup_verified_age_seconds",
                "Time since the newest backup was verified.",
                |s, now| (s.last_verified_ms > 0).then(|| seconds(now - s.last_verified_ms)),
            ),
            (
                "leeward_control_backup_bad",
                "1 if the last backup that was verified is bad.",
                |s, _| Some(f64::from(u8::from(s.bad))),
            ),
            (
                "leeward_control_backup_failures",
                "Failures since the last backup that was made.",
                |s, _| Some(f64::from(s.failures)),
            ),
            (
                "leeward_control_backup_shipping_lag_seconds",
                "How long the oldest change waits that is not shipped; 0 if none does.",
                |s, now| {
                    s.continuous.then(|| {
                        s.shipping
                            .waiting_since_ms
                            .map_or(0.0, |since| seconds(now - since))
                    })
                },
            ),
        ];
        let standings = self.standings();
        let mut out = String::new();
        for (name, help, value) in ROWS {
            let lines = standings.iter().filter_map(|(place, standing)| {
                let value = value(standing, now_ms)?;
                Some(format!("{name}{{destination=\"{place}\"}} {value}\n"))
            });
            let lines: String = lines.collect();
            if !lines.is_empty() {
                // Writing to a String does not fail.
                let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{lines}");
            }
        }
        out
    }
}

#[expect(clippy::cast_precision_loss, reason = "ages are far below 2^53 ms")]
fn seconds(ms: i64) -> f64 {
    ms.max(0) as f64 / 1000.0
}

/// A backup's times, for people.
pub(crate) fn shown(ms: i64) -> String {
    if ms == 0 { "never".to_owned() } else { rfc3339(ms) }
}
