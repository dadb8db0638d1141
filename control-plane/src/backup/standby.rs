//! Follows another control plane's store by what it ships, and takes its place when it is told to, or may.

use super::catalogue;
use super::content::{self, CURSOR, META};
use super::error::BackupError;
use super::fence::{Epochs, Lead, Role};
use super::into;
use super::manifest::Manifest;
use super::place::Place;
use super::recover::{self, Reader, Until, Writer};
use super::seal::Opener;
use crate::kv::{Kv, KvError, Txn};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often it is looked for more.
const LOOK: Duration = Duration::from_millis(500);
/// Further looks once it leads, before it goes on with what it has: some ten seconds.
const LAST_TRIES: u32 = 20;
/// How long what it has may lead nowhere until it begins anew from a backup.
const STUCK: Duration = Duration::from_secs(10);
/// How long the store may be held by what ends just now.
const HANDOVER: Duration = Duration::from_secs(30);
/// Keys on a page.
const PAGE: usize = 500;

/// What a standby is started with.
#[derive(Clone, Debug)]
pub struct StandbySettings {
    /// Where the other's backups and its log are, and the epochs.
    pub place: String,
    /// A file of age identities, where these are encrypted.
    pub identity: Option<PathBuf>,
    /// Where the API of this control plane is, for others.
    pub address: String,
    /// How long an epoch holds without a word.
    pub ttl: Duration,
    /// Take over once nobody has led for so long.
    pub promote_after: Option<Duration>,
}

/// A control plane that follows another.
#[derive(Clone, Debug)]
pub struct Standby {
    place: Place,
    opener: Opener,
    data: PathBuf,
    epochs: Arc<Epochs>,
}

impl Standby {
    /// Prepares to follow into a directory: restores the newest backup there if there is no store yet.
    ///
    /// # Errors
    ///
    /// If there is no backup, or it can't be restored.
    pub async fn prepare(settings: StandbySettings, data: &Path) -> anyhow::Result<Self> {
        let place = Place::open(&settings.place)?;
        let opener = settings.identity.as_deref().map(Opener::from_file).transpose()?;
        let opener = opener.unwrap_or_default();
        if !data.join(into::FILE).exists() {
            let reader = Reader {
                place: &place,
                opener: &opener,
            };
            let plan = recover::plan(&catalogue::list(&place).await?, None, Until::Latest)?;
            let (restored, _) = into::directory(data, &reader, &plan, None, None).await?;
            tracing::info!(revision = restored.head.revision, "a standby has its first copy");
        }
        let epochs = Epochs::standby(
            place.clone(),
            &settings.address,
            settings.ttl,
            settings.promote_after,
        );
        Ok(Self {
            place,
            opener,
            data: data.to_owned(),
            epochs,
        })
    }

    /// Whether the store in a directory is one with which a standby has taken over, and still is what leads: then it has nobody
    /// to follow, and goes on as one that has a standby.
    ///
    /// # Errors
    ///
    /// If the store can't be opened.
    pub async fn has_taken_over(place: &str, data: &Path) -> anyhow::Result<bool> {
        if !data.join(into::FILE).exists() {
            return Ok(false);
        }
        let kv = handed_over(data).await?;
        if kv.get(CURSOR).await?.is_some() {
            return Ok(false);
        }
        let meta = kv.get(META).await?.map(|entry| entry.value).unwrap_or_default();
        let leader = Epochs::standby(Place::open(place)?, "", Duration::ZERO, None);
        let led = match leader.last_store().await {
            Ok(led) => led,
            Err(error) => {
                // Whoever goes on as one that leads takes no write before it sees that it does.
                tracing::warn!(error = error.chain(), "can't see who leads");
                return Ok(true);
            }
        };
        Ok(content::meta(&meta).is_some_and(|(id, _)| led == Some(id)))
    }

    /// Opens the copy, which takes no writes but those that it follows.
    ///
    /// # Errors
    ///
    /// If it can't be opened, or is no copy.
    pub async fn open(&self) -> anyhow::Result<Kv> {
        let kv = handed_over(&self.data).await?;
        if kv.get(CURSOR).await?.is_none() {
            anyhow::bail!(
                "{} has a store that follows no other: it was not restored from a backup, or led itself until another took over; a standby needs a directory of its own",
                self.data.display()
            );
        }
        kv.guard(self.epochs.gate_closed());
        Ok(kv)
    }

    /// Whether it leads.
    pub fn lead(&self) -> Lead {
        Lead(Arc::clone(&self.epochs))
    }

    /// Follows until it leads or is stopped; says whether it leads. The store is whole then, up to what was shipped.
    ///
    /// # Errors
    ///
    /// If the copy can't be written.
    pub async fn follow(&self, kv: Kv, stop: CancellationToken) -> anyhow::Result<bool> {
        let mut stuck: Option<Instant> = None;
        let mut last_tries = 0..LAST_TRIES;
        loop {
            // What was shipped before it led is taken in after it leads: nobody ships any more then who acknowledges.
            let leads = self.epochs.role() == Role::Leader;
            match self.catch_up(&kv).await {
                Ok(true) => stuck = None,
                Ok(false) => self.unstick(&kv, &mut stuck).await?,
                Err(error) => {
                    tracing::warn!(error = error.chain(), "can't follow; trying again");
                    // What was acknowledged may be in what can't be read just now. A place that is gone must not keep it
                    // from leading with what it has, though.
                    if leads && last_tries.next().is_some() {
                        tokio::time::sleep(LOOK).await;
                        continue;
                    }
                }
            }
            if leads {
                return Ok(true);
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(false),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Takes in what is there; says whether it was anything.
    async fn catch_up(&self, kv: &Kv) -> Result<bool, BackupError> {
        let reader = Reader {
            place: &self.place,
            opener: &self.opener,
        };
        let mut cursor = content::cursor(kv.get(CURSOR).await?.as_ref().map(|e| &e.value[..]))?;
        let names = reader.segments_after(&cursor.store_id, cursor.position).await?;
        let mut writer = Writer::following(kv, &cursor.store_id);
        let mut any = false;
        while let Some((_, segment)) = reader.after(&names, &cursor.store_id, cursor.position).await? {
            for step in segment.events.chunk_by(|a, b| a.position == b.position) {
                if step.first().is_some_and(|event| event.position > cursor.position) {
                    writer.step(step).await?;
                }
            }
            writer.at(segment.to);
            writer.flush().await?;
            cursor.position = segment.to;
            any = true;
        }
        Ok(any)
    }

    /// Where the log goes on after what it has not got, and has for a while, it begins anew from the newest backup.
    async fn unstick(&self, kv: &Kv, stuck: &mut Option<Instant>) -> Result<(), BackupError> {
        let cursor = content::cursor(kv.get(CURSOR).await?.as_ref().map(|e| &e.value[..]))?;
        let newest = match catalogue::newest(&self.place, &cursor.store_id).await {
            Ok(newest) => newest,
            Err(error) => {
                tracing::warn!(error = error.chain(), "can't see whether there is more");
                return Ok(());
            }
        };
        let Some(newest) = newest.filter(|manifest| manifest.position > cursor.position) else {
            *stuck = None;
            return Ok(());
        };
        if stuck.get_or_insert_with(Instant::now).elapsed() < STUCK {
            return Ok(());
        }
        *stuck = None;
        match self.again(kv, &newest).await {
            Ok(()) => {
                tracing::info!(
                    position = newest.position,
                    "the log had a gap; the copy is that of a backup"
                );
                Ok(())
            }
            Err(BackupError::Kv(error)) => Err(error.into()),
            Err(error) => {
                tracing::warn!(error = error.chain(), "can't begin anew from a backup");
                Ok(())
            }
        }
    }

    /// Brings the copy to what a backup shows. Readers may see some of it early, never a revision without its record.
    async fn again(&self, kv: &Kv, manifest: &Manifest) -> Result<(), BackupError> {
        let reader = Reader {
            place: &self.place,
            opener: &self.opener,
        };
        let mut writer = Writer::following(kv, &manifest.store_id);
        let (mut wanted, mut head) = (BTreeSet::new(), None);
        for piece in &manifest.chunks {
            for entry in reader.chunk(piece).await? {
                if entry.key == content::HEAD {
                    head = Some(entry.value);
                    continue;
                }
                let same = kv
                    .get(&entry.key)
                    .await?
                    .is_some_and(|there| there.value == entry.value);
                if !same {
                    writer.put(&entry.key, Some(&entry.value)).await?;
                }
                wanted.insert(entry.key);
            }
        }
        for piece in &manifest.tail {
            for event in reader.tail(piece).await?.events {
                match (&*event.key, event.value) {
                    (content::HEAD, value) => head = value,
                    (key, value) => {
                        writer.put(key, value.as_ref()).await?;
                        if value.is_some() {
                            wanted.insert(event.key);
                        } else {
                            wanted.remove(&event.key);
                        }
                    }
                }
            }
        }
        writer.flush().await?;
        if let Some(head) = head {
            writer.put(content::HEAD, Some(&head)).await?;
        }
        let mut after: Option<String> = None;
        loop {
            let page = kv.keys("", after.as_deref(), PAGE).await?;
            for entry in &page.entries {
                let key = &*entry.key;
                if content::is_kept(key) && key != content::HEAD && key != META && !wanted.contains(key) {
                    writer.put(key, None).await?;
                }
            }
            after = page.entries.last().map(|entry| entry.key.clone());
            if !page.more {
                break;
            }
        }
        writer.at(manifest.position);
        writer.flush().await
    }

    /// Makes the copy a store of its own, which this control plane leads with.
    ///
    /// # Errors
    ///
    /// If it can't be written.
    pub async fn take_over(&self) -> anyhow::Result<Kv> {
        let kv = handed_over(&self.data).await?;
        let meta = kv.get(META).await?.map(|entry| entry.value).unwrap_or_default();
        let id = self.epochs.store_id();
        let meta = content::meta_with_id(&meta, id)
            .ok_or_else(|| anyhow::anyhow!("the key {META} of the copy can't be read"))?;
        kv.txn(Txn::default().put(META, meta).delete(CURSOR)).await?;
        kv.guard(self.epochs.gate());
        tracing::info!(store = id, "the standby leads");
        Ok(kv)
    }
}

/// Opens the store in a directory, which something that ends may still have for a moment.
async fn handed_over(data: &Path) -> Result<Kv, KvError> {
    let deadline = Instant::now() + HANDOVER;
    loop {
        match Kv::sqlite(data) {
            Err(KvError::InUse { .. }) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            opened => return opened,
        }
    }
}
