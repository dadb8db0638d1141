//! The files of a queue: where they are, how one is opened, and what is done with one that is corrupt.

use super::tables::{CREATE, SCHEMA};
use crate::store::Why;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Larger files are not read through when they are opened: what is corrupt in them is met later.
const MAX_CHECKED: u64 = 4 << 30;
/// Corrupt files that are kept. With as many, no fresh one is begun: a disk that goes on corrupting would be filled.
const MAX_SET_ASIDE: usize = 8;

/// Where a queue's files are: `DATA/queues/NAME.db`, and `NAME.lock` beside it.
#[derive(Debug)]
pub(super) struct Place {
    dir: PathBuf,
    name: String,
}

/// Tells one file from another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    /// A deleted file's inode is soon another's. Where the file system doesn't say, that is all there is.
    created: Option<SystemTime>,
}

/// Why a file could not be opened.
#[derive(Debug)]
pub(super) enum OpenError {
    /// It is no database, or not a whole one.
    Corrupt(Why),
    /// Anything else.
    Other(Why),
}

impl Place {
    pub(super) fn new(data: &Path, queue: &str) -> Self {
        Self {
            dir: data.join("queues"),
            name: queue.to_owned(),
        }
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.dir.join(format!("{}.lock", self.name))
    }

    fn database(&self) -> PathBuf {
        self.dir.join(format!("{}.db", self.name))
    }

    pub(super) fn open_lock(&self) -> io::Result<File> {
        self.make_dir()?;
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.lock())
    }

    /// Only the proxy's user may read what requests carry.
    fn make_dir(&self) -> io::Result<()> {
        if self.dir.is_dir() {
            return Ok(());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        if let Some(data) = self.dir.parent() {
            File::open(data)?.sync_all()?;
        }
        Ok(())
    }

    /// Which file is there: another after one was set aside.
    pub(super) fn identity(&self) -> Option<Identity> {
        let meta = self.database().metadata().ok()?;
        Some(Identity {
            device: meta.dev(),
            inode: meta.ino(),
            created: meta.created().ok(),
        })
    }

    /// Opens the database for writing, checks it, and makes its tables if it is new.
    pub(super) fn open_writer(&self) -> Result<Connection, OpenError> {
        self.make_dir().map_err(|error| {
            OpenError::Other(format!("can't make {}: {error}", self.dir.display()).into())
        })?;
        self.try_open_writer()
    }

    fn try_open_writer(&self) -> Result<Connection, OpenError> {
        let failed = |error: rusqlite::Error| {
            let why = format!("{}: {}", self.database().display(), explain(&error)).into();
            if is_corrupt(&error) {
                OpenError::Corrupt(why)
            } else {
                OpenError::Other(why)
            }
        };
        let mut db = Connection::open(self.database()).map_err(failed)?;
        // WAL with synchronous=FULL: readers don't wait for the writer, and a commit that returned survives kill -9
        // and a power cut.
        db.execute_batch(
            "PRAGMA busy_timeout=5000; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
             PRAGMA journal_size_limit=67108864; PRAGMA temp_store=MEMORY; PRAGMA cell_size_check=ON;",
        )
        .map_err(failed)?;
        let pages: i64 = db
            .query_row(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size",
                [],
                |row| row.get(0),
            )
            .map_err(failed)?;
        if u64::try_from(pages).is_ok_and(|bytes| bytes <= MAX_CHECKED) {
            let verdict: String = db
                .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
                .map_err(failed)?;
            if verdict != "ok" {
                let why = format!("{}: {verdict}", self.database().display());
                return Err(OpenError::Corrupt(why.into()));
            }
        }
        self.migrate(&mut db, failed)?;
        Ok(db)
    }

    fn migrate(
        &self,
        db: &mut Connection,
        failed: impl Fn(rusqlite::Error) -> OpenError,
    ) -> Result<(), OpenError> {
        // Two processes may be here at once.
        let tx = db
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(&failed)?;
        let found: i64 = tx
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(&failed)?;
        match found {
            0 => tx.execute_batch(CREATE).map_err(&failed)?,
            SCHEMA => {}
            _ => {
                let why = format!(
                    "{} has schema {found}, and this build knows up to {SCHEMA}: use a later build",
                    self.database().display()
                );
                return Err(OpenError::Other(why.into()));
            }
        }
        tx.commit().map_err(failed)
    }

    pub(super) fn open_reader(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let reader = Connection::open_with_flags(self.database(), flags)?;
        reader.execute_batch("PRAGMA busy_timeout=5000;")?;
        Ok(reader)
    }

    /// Renames a corrupt database, with what belongs to it, so that a fresh one can be begun. Where it is now.
    pub(super) fn set_aside(&self, now_ms: u64) -> Result<PathBuf, Why> {
        let explain =
            |error: io::Error| Why::from(format!("can't set {} aside: {error}", self.database().display()));
        let prefix = format!("{}.db.corrupt-", self.name);
        let mut others = 0;
        for file in std::fs::read_dir(&self.dir).map_err(explain)? {
            let name = file.map_err(explain)?.file_name();
            let name = name.to_string_lossy();
            others +=
                usize::from(name.starts_with(&prefix) && !name.ends_with("-wal") && !name.ends_with("-shm"));
        }
        if others >= MAX_SET_ASIDE {
            let dir = self.dir.display();
            return Err(
                format!("it is corrupt, and {dir} has {others} corrupt files of it: remove some").into(),
            );
        }
        let to = self.dir.join(format!("{prefix}{now_ms}"));
        // The database first: whatever is lost of the others then, a fresh one is never given an old log.
        std::fs::rename(self.database(), &to).map_err(explain)?;
        for suffix in ["-wal", "-shm"] {
            let with = |path: &Path| {
                let mut path = path.as_os_str().to_owned();
                path.push(suffix);
                PathBuf::from(path)
            };
            match std::fs::rename(with(&self.database()), with(&to)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(explain(error)),
                Ok(()) | Err(_) => {}
            }
        }
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(explain)?;
        Ok(to)
    }
}

/// Whether it says that the file is no whole database.
pub(super) fn is_corrupt(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
    )
}

/// Whether the connection can be used on, and the same may succeed later.
pub(super) fn is_passing(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DiskFull | ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
    )
}

/// What an operator is told.
pub(super) fn explain(error: &rusqlite::Error) -> Why {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "the disk is full".into(),
        _ => error.to_string().into(),
    }
}
