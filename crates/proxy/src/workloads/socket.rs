//! The Unix socket of the Workload API.

use crate::handover::lock;
use anyhow::{Context, bail, ensure};
use std::fs::Permissions;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use tokio::net::UnixListener;

/// It, bound.
#[derive(Debug)]
pub(crate) struct Socket(UnixListener);

/// Everybody on the node may connect: who it is, and so what it gets, the kernel says.
const MODE: u32 = 0o666;
/// The bit of a directory in which everybody may put another socket in this one's place.
const WRITABLE: u32 = 0o002;

impl Socket {
    /// Listens at a path, in a directory that only some may write. A socket file that nobody listens on was left by a process
    /// that is dead, and is replaced.
    ///
    /// # Errors
    ///
    /// If the path can't be used, or somebody else listens there.
    pub(crate) async fn bind(path: &Path) -> anyhow::Result<Self> {
        let bound = async {
            check_directory(path)?;
            // Of two processes that start at once the second finds the first. Released when it is dropped.
            let _lock = lock(path).await?;
            clear(path)?;
            let listener = StdUnixListener::bind(path)?;
            std::fs::set_permissions(path, Permissions::from_mode(MODE))?;
            Self::handed(listener)
        };
        let bound: anyhow::Result<Self> = bound.await;
        bound.with_context(|| format!("can't serve workloads at {}; see --workload-api", path.display()))
    }

    /// The one that a predecessor had.
    pub(crate) fn handed(listener: StdUnixListener) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self(UnixListener::from_std(listener)?))
    }

    /// The same once more, for a successor.
    pub(crate) fn try_clone(&self) -> std::io::Result<StdUnixListener> {
        self.0.as_fd().try_clone_to_owned().map(StdUnixListener::from)
    }

    pub(super) fn into_listener(self) -> UnixListener {
        self.0
    }
}

fn check_directory(path: &Path) -> anyhow::Result<()> {
    ensure!(path.is_absolute(), "it is not an absolute path");
    let dir = path.parent().context("it has no directory")?;
    let is = std::fs::metadata(dir).with_context(|| format!("can't look at {}", dir.display()))?;
    ensure!(is.is_dir(), "{} is not a directory", dir.display());
    let mode = is.permissions().mode() & 0o7777;
    ensure!(
        mode & WRITABLE == 0,
        "{} has mode {mode:o}, in which anybody can put a socket in this one's place: run chmod o-w {0}",
        dir.display()
    );
    Ok(())
}

/// Takes away what a process that is dead has left.
fn clear(path: &Path) -> anyhow::Result<()> {
    match StdUnixStream::connect(path) {
        Ok(_) => bail!("another process listens there"),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            ensure!(is_socket, "there is something else than a socket, which stays");
            std::fs::remove_file(path)?;
            tracing::info!(path = %path.display(), "nobody listens at the socket for workloads; it is replaced");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_testkit::TempDir;

    async fn refused(path: &Path) -> String {
        format!("{:#}", Socket::bind(path).await.unwrap_err())
    }

    #[tokio::test]
    async fn everybody_may_connect_and_the_dead_leave_it_free() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("workload.sock");
        for _ in 0..2 {
            let socket = Socket::bind(&path).await.unwrap();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o666);
            let error = refused(&path).await;
            assert!(error.contains("another process listens there"), "{error}");
            // As a process that dies: the file stays.
            drop(socket);
            assert!(path.exists());
        }
    }

    #[tokio::test]
    async fn what_is_no_socket_stays_and_directories_of_everybody_are_refused() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "precious").unwrap();
        let error = refused(&path).await;
        assert!(error.contains("something else than a socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        let error = refused(&dir.path().join("no/such")).await;
        assert!(error.contains("can't look at"), "{error}");
        let error = refused(Path::new("workload.sock")).await;
        assert!(error.contains("not an absolute path"), "{error}");
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).unwrap();
        let error = refused(&dir.path().join("workload.sock")).await;
        assert!(
            error.contains("has mode 1777") && error.contains("chmod o-w"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_successor_has_the_same_socket() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("workload.sock");
        let old = Socket::bind(&path).await.unwrap();
        let new = Socket::handed(old.try_clone().unwrap()).unwrap();
        drop(old);
        let client = tokio::net::UnixStream::connect(&path).await.unwrap();
        new.into_listener().accept().await.unwrap();
        drop(client);
    }
}
