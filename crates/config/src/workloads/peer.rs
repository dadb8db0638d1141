//! Which process is at the other end of a Unix socket.
//!
//! When a process connects the kernel notes its id, user and group (SO_PEERCRED). The user is what it was then, whatever comes
//! later. Its control group isn't noted: it is looked up by the process's id, which may be another process's by the time. So
//! the process is held by a descriptor (pidfd) from the moment that its connection is accepted: while that says that it is
//! alive, its id is nobody else's, and what was read by the id before that was said is about it.
//!
//! What is left is the moment between its connecting and that descriptor. Connections are accepted at once, so a process would
//! have to end, and all ids to be used up, within it; and as the user is compared too, what it could become is another process
//! of the same user. (SO_PEERPIDFD, of Linux 6.5, would leave nothing, but can't be had without unsafe code.)
//!
//! A connection that a process hands on, or leaves to its children, stays that of the process that has made it, and is good for
//! nothing once that one has ended.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::OwnedFd;
use tokio::net::UnixStream;

/// A process that has connected.
#[derive(Debug)]
pub(super) struct Peer {
    /// The user that it was when it connected.
    uid: u32,
    pid: Pid,
    process: OwnedFd,
}

/// What a process is found to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Found {
    pub(super) pid: i32,
    pub(super) uid: u32,
    /// The path of its control group (version 2), if the kernel tells it.
    pub(super) cgroup: Option<String>,
}

/// Why it isn't known which process it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unattested {
    /// It is in a pid namespace that this process doesn't see into.
    #[error(
        "the kernel names no process: it is in another pid namespace than the proxy, which must be in one above it"
    )]
    Unseen,
    /// It has ended; the connection is somebody else's now.
    #[error("the process {0} that has connected has ended")]
    Ended(i32),
    /// It has become another user's.
    #[error("the process {pid} has connected as the user {was} and is the user {is} now; connect again")]
    User {
        /// Its id.
        pid: i32,
        /// The user that it was.
        was: u32,
        /// The user that it is.
        is: u32,
    },
    /// The kernel doesn't tell.
    #[error("can't look at the process {pid}: {source}")]
    Look {
        /// Its id.
        pid: i32,
        /// What the system said.
        source: io::Error,
    },
}

impl Peer {
    /// The process at the other end. To be asked for as soon as the connection is accepted.
    pub(super) fn of(stream: &UnixStream) -> Result<Self, Unattested> {
        let look = |pid: i32| move |source: io::Error| Unattested::Look { pid, source };
        let credentials = stream.peer_cred().map_err(look(0))?;
        let pid = credentials.pid().and_then(Pid::from_raw);
        let pid = pid.ok_or(Unattested::Unseen)?;
        let raw = pid.as_raw_nonzero().get();
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => process,
            Err(Errno::SRCH) => return Err(Unattested::Ended(raw)),
            Err(error) => return Err(look(raw)(error.into())),
        };
        Ok(Self {
            uid: credentials.uid(),
            pid,
            process,
        })
    }

    /// The user that it was when it connected.
    pub(super) const fn uid(&self) -> u32 {
        self.uid
    }

    /// What it is now.
    pub(super) fn look(&self) -> Result<Found, Unattested> {
        let pid = self.pid.as_raw_nonzero().get();
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
        let (status, cgroup) = (read("status"), read("cgroup"));
        // Only now is it known whose the id was when they were read.
        if !self.is_alive() {
            return Err(Unattested::Ended(pid));
        }
        let failed = |source| Unattested::Look { pid, source };
        let status = status.map_err(failed)?;
        let is = effective_uid(&status).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        if is != self.uid {
            let was = self.uid;
            return Err(Unattested::User { pid, was, is });
        }
        Ok(Found {
            pid,
            uid: self.uid,
            cgroup: unified(&cgroup.map_err(failed)?).map(str::to_owned),
        })
    }

    fn is_alive(&self) -> bool {
        // A pidfd can be read once its process has ended.
        let mut looked_at = [PollFd::new(&self.process, PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut looked_at, Some(&at_once)), Ok(0))
    }
}

/// The effective user in /proc/PID/status: the second of four.
fn effective_uid(status: &str) -> Option<u32> {
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The path of the group of version 2, of what /proc/PID/cgroup has. Those of version 1 that may stand beside it aren't looked at:
/// there is one for each controller, and they can differ.
fn unified(cgroup: &str) -> Option<&str> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use tokio::net::UnixListener;

    #[test]
    fn what_the_kernel_tells_is_read() {
        assert_eq!(
            effective_uid("Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n"),
            Some(2)
        );
        assert_eq!(effective_uid("Name:\tUid: 7\n"), None);
        assert_eq!(
            unified("0::/system.slice/pay.service\n"),
            Some("/system.slice/pay.service")
        );
        assert_eq!(unified("4:memory:/a\n1:name=systemd:/b\n0::/\n"), Some("/"));
        assert_eq!(unified("10::/x\n4:memory:/0::/y\n"), None);
        assert_eq!(unified(""), None);
    }

    #[tokio::test]
    async fn this_process_is_found_to_be_what_it_is() {
        let (here, _there) = UnixStream::pair().unwrap();
        let peer = Peer::of(&here).unwrap();
        let found = peer.look().unwrap();
        assert_eq!(found.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(found.uid, rustix::process::geteuid().as_raw());
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        assert_eq!(found.cgroup.as_deref(), unified(&own));
    }

    #[tokio::test]
    async fn one_that_has_ended_is_nobody_whoever_has_its_connection() {
        let path = std::env::temp_dir().join(format!("leeward-peer-{}", std::process::id()));
        drop(std::fs::remove_file(&path));
        let listener = UnixListener::bind(&path).unwrap();
        // It connects, leaves the connection to a child, which ends with that, and ends when its input does.
        let connect = "import os, socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
                       if os.fork() == 0:\n    os._exit(len(s.recv(1)))\nsys.stdin.read()\n";
        let started = Command::new("python3")
            .args(["-c", connect])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn();
        let Ok(mut process) = started else {
            eprintln!("skipped: there is no python3 here");
            return;
        };
        let (stream, _) = listener.accept().await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let peer = Peer::of(&stream).unwrap();
        let found = peer.look().unwrap();
        assert_eq!(found.pid, i32::try_from(process.id()).unwrap());
        drop(process.stdin.take());
        process.wait().unwrap();
        let error = peer.look().unwrap_err();
        assert!(
            matches!(error, Unattested::Ended(pid) if pid == found.pid),
            "{error}"
        );
        let mut rest = [0; 1];
        let open = stream.try_read(&mut rest).unwrap_err();
        assert_eq!(open.kind(), io::ErrorKind::WouldBlock, "the child has it");
    }
}
