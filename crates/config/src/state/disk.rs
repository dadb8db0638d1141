//! The files: `policy`, its log `policy.log`, and beside them `levels`, `flags` and `revoked`. What can't be read is set aside as
//! `NAME.corrupt-N`.

use super::frame::{Found, framed, next};
use super::image::{Base, Change, Image, Log, Restored, Unusable, group, log_head, read_base, read_log};
use rustix::process::geteuid;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const POLICY: &str = "policy";
const LOG: &str = "policy.log";
const LOCK: &str = "lock";
const CORRUPT: &str = "corrupt-";
const TEMPORARY: &str = "tmp-";

/// What all records may take together, in bytes. A store holds far less; more is a fault that must not fill the disk.
const MAX_BYTES: usize = 256 << 20;
/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 2 * MAX_BYTES as u64;
/// A log is made into a base when it would be longer than this, and than half of its base. In a base damage costs one record, in
/// a log everything after it.
const MIN_LOG: u64 = 4 << 10;
/// Files of one name that were set aside, at most; the oldest go.
const MAX_ASIDE: usize = 4;
/// How often reading is tried again while the process before this one writes.
const READS: usize = 5;

/// What writes, and has everything in memory: nothing of it is read again.
#[derive(Debug)]
pub(super) struct Disk {
    dir: PathBuf,
    /// Held by the one process that writes.
    lock: Option<File>,
    image: Image,
    log: Option<OpenLog>,
    base_length: u64,
    /// The files are a later build's.
    is_later: bool,
}

#[derive(Debug)]
struct OpenLog {
    file: File,
    length: u64,
}

/// A file that can't be used as it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Damage {
    pub(super) file: &'static str,
    pub(super) why: String,
    /// Where it is now; `None` if it was left, since another process has the directory.
    pub(super) aside: Option<PathBuf>,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Written {
    /// It is on disk.
    Done,
    /// There was nothing new.
    Nothing,
    /// Another process has the directory, or a later build.
    NotOurs,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) disk: Disk,
    pub(super) restored: Option<Restored>,
    pub(super) damaged: Vec<Damage>,
}

/// What a look at the files gave.
struct Look {
    base: Option<Base>,
    /// Where the log goes on, if it goes on.
    log: Option<u64>,
    base_length: u64,
    damaged: Vec<Bad>,
    is_later: bool,
    is_stale: bool,
}

/// A file that can't be used as it is.
struct Bad {
    file: &'static str,
    why: String,
    use_of: Use,
}

/// Whether something of a file can be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Use {
    Some,
    None,
}

impl Disk {
    /// Opens a directory, which is made if it isn't there, and reads what it has.
    pub(super) fn open(dir: PathBuf) -> io::Result<Opened> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let metadata = fs::metadata(&dir)?;
        if metadata.uid() != geteuid().as_raw() {
            return Err(io::Error::other("it is another user's"));
        }
        if metadata.mode() & 0o077 != 0 {
            fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
        }
        let mut disk = Self {
            dir,
            lock: None,
            image: Image::default(),
            log: None,
            base_length: 0,
            is_later: false,
        };
        disk.try_lock()?;
        if disk.lock.is_some() {
            disk.tidy()?;
        }
        let mut look = disk.look();
        // The process before this one may write a base between the two reads.
        for _ in 1..READS {
            if disk.lock.is_some() || !look.is_stale {
                break;
            }
            look = disk.look();
        }
        let damaged = look.damaged.into_iter().map(|bad| disk.damage(bad));
        let damaged: Vec<_> = damaged.collect();
        disk.is_later = look.is_later;
        disk.base_length = look.base_length;
        let restored = look.base.map(|base| {
            disk.image = base.image;
            disk.image.lose(base.lost);
            disk.image.restored()
        });
        if disk.lock.is_some()
            && damaged.is_empty()
            && let Some(length) = look.log
        {
            disk.log = Some(disk.reopen(length)?);
        }
        Ok(Opened {
            disk,
            restored,
            damaged,
        })
    }

    fn look(&self) -> Look {
        let mut look = Look {
            base: None,
            log: None,
            base_length: 0,
            damaged: Vec::new(),
            is_later: false,
            is_stale: false,
        };
        let bytes = match self.read(POLICY) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return look,
            Err(why) => {
                look.bad(POLICY, why, Use::None);
                return look;
            }
        };
        let mut base = match read_base(&bytes) {
            Ok(base) => base,
            Err(Unusable::Later(version)) => {
                tracing::error!(
                    file = %self.dir.join(POLICY).display(),
                    version,
                    "the state on disk is a later build's; it is neither read nor written"
                );
                look.is_later = true;
                return look;
            }
            Err(why @ (Unusable::Empty | Unusable::NoHead)) => {
                look.bad(POLICY, why.to_string(), Use::None);
                return look;
            }
        };
        look.base_length = bytes.len() as u64;
        if let Some(damage) = base.damage.take() {
            look.bad(POLICY, damage, Use::Some);
        }
        match self.read(LOG) {
            // A base may be newer than its log, or have none yet.
            Ok(None) => look.is_stale = true,
            Ok(Some(log)) => match read_log(&log, &mut base) {
                Log::Whole(end) => look.log = Some(end as u64),
                Log::Other => look.is_stale = true,
                Log::Later(_) => look.is_later = true,
                Log::Damaged(why) => look.bad(LOG, why, Use::Some),
            },
            Err(why) => look.bad(LOG, why, Use::None),
        }
        look.base = Some(base);
        look
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, String> {
        read(&self.dir, name)
    }

    /// Takes a change in, and brings to disk what isn't there yet.
    pub(super) fn write(&mut self, change: Option<Change>) -> io::Result<Written> {
        let commit = change.as_ref().map(|change| change.commit.clone());
        let before = self.image.commit.clone();
        let news = change.map(|change| self.image.take(change));
        if !self.is_ours()? {
            return Ok(Written::NotOurs);
        }
        if self.image.bytes() > MAX_BYTES {
            // What is not in the log now must not be missing from it later.
            self.log = None;
            return Err(io::Error::other(format!(
                "{} bytes of policy are more than the {MAX_BYTES} that are kept",
                self.image.bytes()
            )));
        }
        let is_news = news
            .as_ref()
            .is_some_and(|news| !news.puts.is_empty() || commit.is_some_and(|commit| commit != before));
        let log = self.log.take();
        let group = match news.filter(|_| is_news) {
            Some(news) => Some(group(&news).ok_or_else(|| io::Error::other("a record is too long"))?),
            None => None,
        };
        let longest = MIN_LOG.max(self.base_length / 2);
        match (log, group) {
            (Some(mut log), Some(group)) if log.length + group.len() as u64 <= longest => {
                // A log that could not be written is not gone on with: what is in memory becomes a base.
                log.file.write_all(&group)?;
                log.file.sync_data()?;
                log.length += group.len() as u64;
                self.log = Some(log);
                Ok(Written::Done)
            }
            (Some(log), None) => {
                self.log = Some(log);
                Ok(Written::Nothing)
            }
            // Nothing was there, and nothing is to be.
            (None, _) if self.image.is_empty() => Ok(Written::Nothing),
            (Some(_) | None, _) => {
                self.write_base()?;
                Ok(Written::Done)
            }
        }
    }

    /// Everything that is in memory, and a log that is empty.
    fn write_base(&mut self) -> io::Result<()> {
        let id = fastrand::u64(1..);
        let too_long = || io::Error::other("a record is too long");
        let base = self.image.base(id).ok_or_else(too_long)?;
        let head = log_head(id).ok_or_else(too_long)?;
        self.put(POLICY, &base)?;
        // Until this is there, the old log is another base's.
        let file = self.put(LOG, &head)?;
        self.base_length = base.len() as u64;
        self.log = Some(OpenLog {
            file,
            length: head.len() as u64,
        });
        Ok(())
    }

    /// A file of its own with one record.
    pub(super) fn write_blob(&mut self, name: &'static str, bytes: &[u8]) -> io::Result<Written> {
        if !self.is_ours()? {
            return Ok(Written::NotOurs);
        }
        let frame = framed(bytes).ok_or_else(|| io::Error::other("it is too long"))?;
        self.put(name, &frame).map(|_| Written::Done)
    }

    /// What was last written there. What can't be used is set aside.
    pub(super) fn read_blob(&self, name: &'static str) -> Result<Option<Vec<u8>>, Damage> {
        peek(&self.dir, name).map_err(|why| {
            self.damage(Bad {
                file: name,
                why,
                use_of: Use::None,
            })
        })
    }

    fn damage(&self, bad: Bad) -> Damage {
        Damage {
            file: bad.file,
            why: bad.why,
            aside: self
                .lock
                .is_some()
                .then(|| self.set_aside(bad.file, bad.use_of))
                .flatten(),
        }
    }

    /// Whether this process is the one that writes; it tries to become that.
    fn is_ours(&mut self) -> io::Result<bool> {
        if self.is_later {
            return Ok(false);
        }
        if self.lock.is_none() {
            self.try_lock()?;
        }
        Ok(self.lock.is_some())
    }

    fn try_lock(&mut self) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(self.dir.join(LOCK))?;
        match file.try_lock() {
            Ok(()) => self.lock = Some(file),
            Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        Ok(())
    }

    /// What writers left that were ended goes.
    fn tidy(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if suffix(&path).is_some_and(|suffix| suffix.starts_with(TEMPORARY)) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Whole or not at all, whenever the process or the machine ends.
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<File> {
        let beside = self.dir.join(format!("{name}.{TEMPORARY}{}", std::process::id()));
        let written = (|| {
            let mut options = OpenOptions::new();
            let options = options.append(true).create_new(true).mode(0o600);
            let mut file = match options.open(&beside) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_file(&beside)?;
                    options.open(&beside)?
                }
                opened => opened?,
            };
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&beside, self.dir.join(name))?;
            File::open(&self.dir)?.sync_all()?;
            Ok(file)
        })();
        if written.is_err() {
            // It takes room that there may be none of.
            let _ = fs::remove_file(&beside);
        }
        written
    }

    /// The log, cut off where it was being written.
    fn reopen(&self, length: u64) -> io::Result<OpenLog> {
        let file = OpenOptions::new().append(true).open(self.dir.join(LOG))?;
        if file.metadata()?.len() != length {
            file.set_len(length)?;
            file.sync_all()?;
        }
        Ok(OpenLog { file, length })
    }

    /// Gives a file another name, for people to look at; says which. `None` if that can't be done, which is no reason not to go
    /// on: it is replaced soon.
    fn set_aside(&self, name: &str, use_of: Use) -> Option<PathBuf> {
        let mut older: Vec<(u64, PathBuf)> = fs::read_dir(&self.dir)
            .ok()?
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let of = path.file_name()?.to_str()?.strip_prefix(name)?;
                let number = of.strip_prefix('.')?.strip_prefix(CORRUPT)?.parse().ok()?;
                Some((number, path))
            })
            .collect();
        older.sort();
        let number = older.last().map_or(1, |(last, _)| last.saturating_add(1));
        let surplus = (older.len() + 1).saturating_sub(MAX_ASIDE);
        for (_, path) in older.into_iter().take(surplus) {
            let _ = fs::remove_file(path);
        }
        let (path, aside) = (
            self.dir.join(name),
            self.dir.join(format!("{name}.{CORRUPT}{number}")),
        );
        let linked = match use_of {
            // It is needed until it is written anew: a crash before that must not cost what is good of it.
            Use::Some => fs::hard_link(&path, &aside),
            Use::None => Err(io::ErrorKind::Unsupported.into()),
        };
        linked.or_else(|_| fs::rename(&path, &aside)).ok()?;
        Some(aside)
    }
}

/// A file's bytes, if it is there and nobody else may have written it.
fn read(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, String> {
    let path = dir.join(name);
    // A link could lead to what is somebody else's.
    let found = match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
        Ok(found) => found,
    };
    if !found.is_file() {
        return Err("it is no file".to_owned());
    }
    if found.uid() != geteuid().as_raw() {
        return Err("it is another user's".to_owned());
    }
    if found.mode() & 0o022 != 0 {
        return Err(format!(
            "others may write it: its mode is {:04o}, want 0600",
            found.mode() & 0o7777
        ));
    }
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("it has more than {MAX_FILE} bytes"));
    }
    Ok(Some(bytes))
}

/// What was last written to a file of one record, whoever has the directory; nothing is set aside.
pub(super) fn peek(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, String> {
    match read(dir, name)? {
        None => Ok(None),
        Some(bytes) => record(&bytes),
    }
}

/// The one record of a file; `None` if it is a later build's.
fn record(bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
    match next(bytes, 0) {
        Some(Found::Record(record, end)) if end == bytes.len() => Ok(Some(record.to_vec())),
        Some(Found::Later(_)) => Ok(None),
        None => Err(Unusable::Empty.to_string()),
        Some(Found::Record(..) | Found::Damage(_)) => Err("it is damaged".to_owned()),
    }
}

impl Look {
    fn bad(&mut self, file: &'static str, why: String, use_of: Use) {
        self.damaged.push(Bad { file, why, use_of });
    }
}

fn suffix(path: &Path) -> Option<&str> {
    path.extension()?.to_str()
}

#[cfg(test)]
mod tests;
