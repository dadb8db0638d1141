//! The Unix socket where a successor asks for what its predecessor has.

use super::successor::{Asked, Inheritance};
use super::wire::Channel;
use anyhow::{Context, bail, ensure};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixListener;

/// Successors waiting to be heard; more are told to try again.
const BACKLOG: i32 = 16;
/// How long another process may take to look at the place; it needs a millisecond.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How often a lock that another process has is tried.
const LOCK_LOOK: Duration = Duration::from_millis(10);
/// How often a predecessor may be found ending at the very moment that it is asked.
const TRIES: usize = 20;
/// Pause between such tries.
const AGAIN: Duration = Duration::from_millis(50);

/// The place, held: this process is the one that successors ask.
#[derive(Debug)]
pub(crate) struct Place(UnixListener);

/// What a proxy that starts has found at the place.
#[derive(Debug)]
pub(crate) enum Start {
    /// Nobody: it is the first, and holds the place from now on.
    First(Place),
    /// Another, which has handed over its sockets and goes on serving until this one is ready.
    After(Box<Inheritance>),
}

impl Place {
    /// Asks the process at `path` for its sockets within `limit`; if there is none, takes the place.
    ///
    /// The place is looked at and taken before anything else is bound, under a lock (`PATH.lock`): of two
    /// processes that start at once the second finds the first. A socket file that nobody listens on was left
    /// by a process that is dead, and is replaced.
    ///
    /// # Errors
    ///
    /// If the path can't be used, or if whoever is there refuses, is another user's, or doesn't answer.
    pub(crate) async fn ask(path: &Path, limit: Duration) -> anyhow::Result<Start> {
        let asking = async {
            for _ in 0..TRIES {
                match look(path).await? {
                    Found::Nobody(place) => return Ok(Start::First(place)),
                    Found::Somebody(channel) => {
                        channel.check_peer()?;
                        match Inheritance::ask(channel).await? {
                            Asked::Inherited(inheritance) => return Ok(Start::After(inheritance)),
                            // It was on its way out, and the place is free, or will be at once.
                            Asked::Gone => tokio::time::sleep(AGAIN).await,
                        }
                    }
                }
            }
            bail!("processes there close the connection without an answer");
        };
        let asked = tokio::time::timeout(limit, asking).await;
        asked
            .map_err(|_| anyhow::anyhow!("the process there does not answer within {limit:?}"))
            .flatten()
            .with_context(|| format!("can't take over at {}", path.display()))
    }

    /// The place as a predecessor had it.
    pub(super) fn handed(listener: OwnedFd) -> io::Result<Self> {
        let listener = StdUnixListener::from(listener);
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener).map(Self)
    }

    /// The next successor that asks. Cancel-safe.
    pub(super) async fn accept(&self) -> io::Result<Channel> {
        let (socket, _) = self.0.accept().await?;
        Ok(Channel::accepted(socket))
    }
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

enum Found {
    Nobody(Place),
    Somebody(Channel),
}

async fn look(path: &Path) -> anyhow::Result<Found> {
    // Released when it is dropped, and by the kernel when a process dies.
    let _lock = lock(path).await?;
    let address = SocketAddrUnix::new(path).context("the path is too long for a Unix socket")?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let asking = socket()?;
    match connect(&asking, &address) {
        Ok(()) => return Ok(Found::Somebody(Channel::new(asking)?)),
        Err(Errno::NOENT) => {}
        Err(Errno::CONNREFUSED) => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            ensure!(is_socket, "there is something else than a socket, which stays");
            std::fs::remove_file(path)?;
            tracing::info!(path = %path.display(), "nobody listens at the handover socket; it is replaced");
        }
        Err(Errno::AGAIN) => bail!("too many processes ask at once"),
        Err(Errno::PROTOTYPE) => bail!("the socket there is not for handovers"),
        Err(error) => return Err(error.into()),
    }
    let listener = socket()?;
    bind(&listener, &address)?;
    // Nobody can connect before it listens.
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    listen(&listener, BACKLOG)?;
    Ok(Found::Nobody(Place::handed(listener)?))
}

/// Holds `PATH.lock`, until what it returns is dropped.
pub(crate) async fn lock(path: &Path) -> anyhow::Result<File> {
    let mut name = OsString::from(path);
    name.push(".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&name)
        .with_context(|| format!("can't open {}", Path::new(&name).display()))?;
    let until = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                let late = tokio::time::Instant::now() > until;
                ensure!(
                    !late,
                    "another process holds {} for too long",
                    Path::new(&name).display()
                );
                tokio::time::sleep(LOCK_LOOK).await;
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_testkit::TempDir;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn the_first_takes_the_place_for_its_user_alone_and_the_dead_leave_it_free() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("place");
        for _ in 0..2 {
            let Start::First(place) = Place::ask(&path, LIMIT).await.unwrap() else {
                panic!("there is nobody")
            };
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            // As a process that dies: the file stays.
            drop(place);
            assert!(path.exists());
        }
    }

    #[tokio::test]
    async fn whoever_listens_is_asked_and_not_replaced() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("place");
        let Start::First(place) = Place::ask(&path, LIMIT).await.unwrap() else {
            panic!("there is nobody")
        };
        let again = Place::ask(&path, Duration::from_millis(200)).await.unwrap_err();
        assert!(format!("{again:#}").contains("does not answer"), "{again:#}");
        drop(place);
    }

    #[tokio::test]
    async fn what_is_no_socket_stays() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("place");
        std::fs::write(&path, "precious").unwrap();
        let error = Place::ask(&path, LIMIT).await.unwrap_err();
        assert!(
            format!("{error:#}").contains("something else than a socket"),
            "{error:#}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        let nowhere = dir.path().join("no/such/dir");
        assert!(Place::ask(&nowhere, LIMIT).await.is_err());
    }
}
