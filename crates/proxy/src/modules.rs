//! Plugins' modules on the node: fetched by hash from a control plane, kept on disk, and used from there, whether a control
//! plane is reachable or not.
//!
//! [`dir`] is the disk, `leeward_config::Modules` the way to the control planes; here is what is asked for when.

mod dir;

use dir::{Dir, Found};
use leeward_config::{Rota, Want};
use leeward_module::hex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Mutex as Turn, Semaphore};

pub(crate) use dir::Sha;

/// Modules that are fetched at once; more wait.
const AT_ONCE: usize = 4;
/// How long one may take all in all: 64 MiB at 1 Mbit/s.
const WHOLE: Duration = Duration::from_secs(600);

/// Who has modules.
pub(crate) trait Origin: Send + Sync + 'static {
    /// Whom to ask, in turn.
    fn rota(&self) -> Rota<'_>;

    /// Asks one of them, once. Signatures first, then bytes, are handed to `take`.
    fn fetch(
        &self,
        control: SocketAddr,
        sha256: &Sha,
        want: Want,
        take: impl FnMut(Piece) -> io::Result<()> + Send,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

/// What comes of a module.
pub(crate) enum Piece {
    /// Its signatures.
    Signatures(Vec<String>),
    /// Its next bytes.
    Bytes(Vec<u8>),
}

/// The modules of a node.
pub(crate) struct Modules<O> {
    /// Or why there is none.
    dir: Result<Arc<Dir>, String>,
    /// `None` without a control plane.
    origin: Option<O>,
    /// What Plugins name, by their names. Held while files are deleted, so that none goes that was just named.
    // Poison is harmless here and below: what is changed is changed in one call.
    named: Mutex<BTreeMap<Box<str>, Vec<Sha>>>,
    /// Who is at a module: one at a time for each.
    turns: Mutex<HashMap<Sha, Weak<Turn<()>>>>,
    at_once: Semaphore,
}

/// A module that is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// The field that names it, such as `spec.source`.
    pub(crate) at: &'static str,
    /// Its hash.
    pub(crate) sha256: Sha,
    /// Who must have signed it.
    pub(crate) key: Option<&'a str>,
}

impl<O: Origin> Modules<O> {
    /// Modules in a directory, which is made if it isn't there. Those that no Plugin names may take `limit` bytes of it. Without
    /// a directory only Plugins from files can be had; the rest goes on.
    pub(crate) fn open(dir: Option<PathBuf>, limit: u64, origin: Option<O>) -> Arc<Self> {
        let opened = match dir {
            None => Err("start it with --data".to_owned()),
            Some(path) => {
                let shown = path.display().to_string();
                Dir::open(path, limit).map_err(|error| format!("{shown} can't be used: {error}"))
            }
        };
        Arc::new(Self {
            dir: opened.map(Arc::new),
            origin,
            named: Mutex::default(),
            turns: Mutex::default(),
            at_once: Semaphore::new(AT_ONCE),
        })
    }

    /// Whether there is someone to fetch from.
    pub(crate) const fn has_origin(&self) -> bool {
        self.origin.is_some()
    }

    /// A Plugin names these from now on, and nothing else.
    pub(crate) fn name(&self, plugin: &str, modules: Vec<Sha>) {
        locked(&self.named).insert(plugin.into(), modules);
    }

    /// There are no other Plugins than these. Deletes, beside the caller, what is too much of what nobody names and `in_use`
    /// doesn't have.
    pub(crate) fn retain(self: &Arc<Self>, plugins: &[&str], in_use: Vec<Sha>) {
        locked(&self.named).retain(|name, _| plugins.contains(&&**name));
        let modules = Arc::clone(self);
        // Its owner is this call; it ends by itself.
        tokio::task::spawn_blocking(move || modules.prune(in_use));
    }

    fn prune(&self, in_use: Vec<Sha>) {
        let Ok(dir) = &self.dir else { return };
        let named = locked(&self.named);
        let all: HashSet<Sha> = named.values().flatten().copied().chain(in_use).collect();
        if let Err(error) = dir.prune(&all) {
            tracing::warn!(%error, "modules that no Plugin names can't be deleted");
        }
    }

    /// Where a module is, as soon as it is there and has been found good. `say` is told what goes wrong meanwhile.
    ///
    /// # Errors
    ///
    /// Why it can't be had, or used, if trying again would make no difference.
    pub(crate) async fn ready(
        &self,
        wanted: Wanted<'_>,
        say: impl Fn(&str) + Send + Sync,
    ) -> Result<PathBuf, String> {
        let at = wanted.at;
        let dir = self.dir.as_ref().map_err(|why| {
            format!("{at}: this proxy has no directory for modules: {why}; or want {at}.file")
        })?;
        let turn = self.turn(&wanted.sha256);
        let _turn = turn.lock().await;
        let mut rota = self.origin.as_ref().map(Origin::rota);
        let (mut has_asked, mut last) = (false, String::new());
        loop {
            let want = match find(dir, &wanted).await {
                Ok(Found::Good(path)) => return Ok(path),
                Ok(Found::Unsigned(why)) if has_asked => {
                    return Err(format!("{at}.minisignKey: module {}: {why}", hex(&wanted.sha256)));
                }
                Ok(Found::Unsigned(_)) => Ok(Want::Signatures),
                Ok(Found::Absent) if has_asked => Err("it was deleted as soon as it was there".to_owned()),
                Ok(Found::Absent) => Ok(Want::All),
                Err(error) => Err(format!("can't use the directory of modules: {error}")),
            };
            let (Some(origin), Some(rota)) = (&self.origin, rota.as_mut()) else {
                let why = match want {
                    Ok(Want::All) => "is not in the directory of modules",
                    Ok(Want::Signatures) => "is here without a signature by the key",
                    Err(why) => return Err(format!("{at}: module {}: {why}", hex(&wanted.sha256))),
                };
                return Err(format!(
                    "{at}: module {} {why}, and there is no control plane to take it from",
                    hex(&wanted.sha256)
                ));
            };
            let fetched = match (want, rota.turn()) {
                (Ok(want), Some(turn)) => match turn.resolve().await {
                    Ok(control) => self.fetch(dir, origin, control, &wanted.sha256, want).await,
                    Err(error) => Err(format!("{turn} can't be found: {error}")),
                },
                (Err(why), _) => Err(why),
                (Ok(_), None) => Err("no control plane is known".to_owned()),
            };
            has_asked = fetched.is_ok();
            if let Err(why) = fetched {
                let why = format!("{at}: module {} can't be had: {why}", hex(&wanted.sha256));
                say(&why);
                if why == last {
                    tracing::debug!(why, "still");
                } else {
                    tracing::warn!(why, "trying again; the last good version stays in use");
                    last = why;
                }
                tokio::time::sleep(rota.failed(fastrand::f64())).await;
            }
        }
    }

    async fn fetch(
        &self,
        dir: &Arc<Dir>,
        origin: &O,
        control: SocketAddr,
        sha256: &Sha,
        want: Want,
    ) -> Result<(), String> {
        // The semaphore is never closed.
        let _slot = self.at_once.acquire().await;
        let failed = |error: io::Error| error.to_string();
        let mut draft = match want {
            Want::All => Some(dir.draft(sha256).map_err(failed)?),
            Want::Signatures => None,
        };
        let mut signatures = Vec::new();
        let fetching = origin.fetch(control, sha256, want, |piece| match (piece, &mut draft) {
            (Piece::Signatures(all), _) => {
                signatures = all;
                Ok(())
            }
            (Piece::Bytes(data), Some(draft)) => draft.write(&data),
            (Piece::Bytes(_), None) => Ok(()),
        });
        match tokio::time::timeout(WHOLE, fetching).await {
            Ok(fetched) => fetched?,
            Err(_) => return Err(format!("it took more than {WHOLE:?}")),
        }
        let (dir, key) = (Arc::clone(dir), *sha256);
        blocking(move || match draft {
            Some(draft) => draft.keep(&key, &signatures),
            None => dir.put_signatures(&key, &signatures),
        })
        .await
        .map_err(failed)?;
        let module = hex(sha256);
        tracing::info!(%control, module, "a module, or its signatures, came");
        Ok(())
    }

    fn turn(&self, sha256: &Sha) -> Arc<Turn<()>> {
        let mut turns = locked(&self.turns);
        if let Some(turn) = turns.get(sha256).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        turns.insert(*sha256, Arc::downgrade(&turn));
        turn
    }
}

/// Looks on disk, off the caller's thread.
async fn find(dir: &Arc<Dir>, wanted: &Wanted<'_>) -> io::Result<Found> {
    let (dir, sha256, key) = (Arc::clone(dir), wanted.sha256, wanted.key.map(str::to_owned));
    blocking(move || dir.find(&sha256, key.as_deref())).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Origin for leeward_config::Modules {
    fn rota(&self) -> Rota<'_> {
        Self::rota(self)
    }

    async fn fetch(
        &self,
        control: SocketAddr,
        sha256: &Sha,
        want: Want,
        mut take: impl FnMut(Piece) -> io::Result<()> + Send,
    ) -> Result<(), String> {
        let incoming = Self::fetch(self, control, &hex(sha256), want).await;
        let mut incoming = incoming.map_err(|error| error.to_string())?;
        let signatures = std::mem::take(&mut incoming.signatures);
        take(Piece::Signatures(signatures)).map_err(|error| error.to_string())?;
        while let Some(bytes) = incoming.next().await.map_err(|error| error.to_string())? {
            take(Piece::Bytes(bytes)).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
