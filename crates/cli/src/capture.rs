//! `leeward capture`: has the kernel bring a node's connections to its proxy, and undoes that.
//!
//! One table of nftables is written and taken away, each in one transaction, so that nothing is ever half done. The table
//! goes with its network namespace, and with the machine: it doesn't come back by itself after a start.

mod rules;

use crate::output::{Failure, complain, say};
use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand};
use rules::{Cidr, Family, Ports, Rules, TABLE, taken_away};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Have the kernel bring the node's outgoing TCP connections to its proxy, as these options say and whatever was
    /// so before.
    Up(Up),
    /// Undo that. It is no error if there is nothing to be undone.
    Down(Place),
    /// Show what is captured, and how often that was; it is a failure if nothing is.
    Status(Place),
    /// Show what `up` would write, and change nothing.
    Plan(Options),
}

/// Where rules are.
#[derive(Args, Clone, Debug)]
pub(crate) struct Place {
    /// The network namespace, such as /run/netns/NAME or /proc/PID/ns/net; this one if not given.
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
}

/// What is captured.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    place: Place,
    /// The port of the proxy's listener for what is captured (leeward-proxy --capture).
    #[arg(long, default_value = "15006", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    outbound_port: u16,
    /// The user that the proxy runs as: its own connections are never captured, or they would go in a circle.
    #[arg(long, required = true, value_name = "UID|NAME", value_delimiter = ',', value_parser = uid)]
    proxy_uid: Vec<u32>,
    /// Users whose connections are left alone.
    #[arg(long, value_name = "UID|NAME", value_delimiter = ',', value_parser = uid)]
    exclude_uid: Vec<u32>,
    /// Ports to which connections are left alone: 22, or 8000-9000.
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = Ports::parse)]
    exclude_port: Vec<Ports>,
    /// Networks to which connections are left alone. Loopback and IPv6's link-local addresses always are.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = Cidr::parse)]
    exclude_cidr: Vec<Cidr>,
    /// Networks to which connections are captured, and none but these; all if not given.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = Cidr::parse)]
    include_cidr: Vec<Cidr>,
    /// Which versions of IP are captured.
    #[arg(long, default_value = "both")]
    family: Family,
}

/// How it is captured.
#[derive(Args, Clone, Debug)]
pub(crate) struct Up {
    #[command(flatten)]
    options: Options,
    /// Don't look first whether anybody listens for what is captured. While nobody does, every captured connection is
    /// refused.
    #[arg(long)]
    unchecked: bool,
    /// Stay, and undo it when this process has ended, or at SIGTERM or SIGINT: what it was to take goes straight then.
    #[arg(long = "while", value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    while_pid: Option<i32>,
}

/// How long the look whether anybody listens may take; on loopback it is a moment.
const LOOK: Duration = Duration::from_secs(1);

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    let place = match &command {
        Command::Up(up) => &up.options.place,
        Command::Plan(options) => &options.place,
        Command::Down(place) | Command::Status(place) => place,
    };
    if let (Some(netns), false) = (&place.netns, matches!(command, Command::Plan(_))) {
        return enter(netns);
    }
    match command {
        Command::Plan(options) => {
            say(rules(&options).script().trim_end());
            Ok(())
        }
        Command::Up(wanted) => up(wanted).await,
        Command::Down(_) => {
            nft(&["-f", "-"], &taken_away())?;
            Ok(())
        }
        Command::Status(_) => status(),
    }
}

/// Becomes the same command in a network namespace: everything that is looked at and done is there then.
fn enter(netns: &std::path::Path) -> Result<(), Failure> {
    if let Err(error) = std::fs::metadata(netns) {
        return Err(Failure::BadInput(format!(
            "leeward: --netns {}: {error}; want a network namespace, such as /run/netns/NAME or /proc/PID/ns/net",
            netns.display()
        )));
    }
    let mut args = std::env::args_os();
    let program = std::env::current_exe().context("can't find this program")?;
    args.next();
    let mut command = Process::new("nsenter");
    let mut net = std::ffi::OsString::from("--net=");
    net.push(netns);
    command.arg(net).arg("--").arg(program);
    let mut skip = false;
    for arg in args {
        let text = arg.to_string_lossy();
        if std::mem::take(&mut skip) || text.starts_with("--netns=") {
            continue;
        }
        if text == "--netns" {
            skip = true;
            continue;
        }
        command.arg(arg);
    }
    let error = command.exec();
    if error.kind() == ErrorKind::NotFound {
        let missing =
            "there is no nsenter, which --netns needs; install util-linux, or run leeward in the namespace";
        return Err(anyhow!(missing).into());
    }
    Err(anyhow!("can't run nsenter: {error}").into())
}

fn rules(options: &Options) -> Rules {
    Rules {
        port: options.outbound_port,
        family: options.family,
        proxy_uids: options.proxy_uid.clone(),
        exclude_uids: options.exclude_uid.clone(),
        exclude_ports: options.exclude_port.clone(),
        exclude: options.exclude_cidr.clone(),
        include: options.include_cidr.clone(),
    }
}

async fn up(wanted: Up) -> Result<(), Failure> {
    let rules = rules(&wanted.options);
    if rules.proxy_uids.contains(&0) {
        complain(
            "leeward: the proxy runs as root, so that nothing of root's is captured; let it have a user of its own",
        );
    }
    // Before anything is changed: who is to be watched must be there.
    let watched = wanted.while_pid.map(watch).transpose()?;
    if !wanted.unchecked {
        check_listeners(&rules)?;
    }
    let signals = match &watched {
        None => None,
        // From here on they undo it first.
        Some(_) => Some((
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            // Of a terminal that is closed.
            hangup()?,
        )),
    };
    nft(&["-f", "-"], &rules.script())?;
    let (Some(watched), Some((mut terminate, mut interrupt, mut hangup))) = (watched, signals) else {
        return Ok(());
    };
    let (tell, ended) = oneshot::channel();
    // It ends with the process that is watched, or with this one.
    std::thread::spawn(move || {
        // It is readable once the process has ended (pidfd_open(2)).
        while poll(&mut [PollFd::new(&watched, PollFlags::IN)], None) == Err(Errno::INTR) {}
        // Nobody listens any more once there was a signal.
        let _ = tell.send(());
    });
    tokio::select! {
        _ = ended => complain("leeward: the process has ended; nothing is captured any more"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Some(()) = async { hangup.as_mut()?.recv().await } => {}
    }
    nft(&["-f", "-"], &taken_away())?;
    Ok(())
}

/// SIGHUP, unless whoever started this has it ignored, as nohup does: to wait for a signal is to heed it.
fn hangup() -> std::io::Result<Option<Signal>> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if ignores_hangup(&status) {
        return Ok(None);
    }
    signal(SignalKind::hangup()).map(Some)
}

/// Whether SIGHUP is ignored, by what proc_pid_status(5) says: in the mask of signals that are, the first bit is its own.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

fn watch(pid: i32) -> Result<OwnedFd, Failure> {
    let opened = Pid::from_raw(pid).map(|found| pidfd_open(found, PidfdFlags::empty()));
    match opened {
        Some(Ok(opened)) => Ok(opened),
        Some(Err(error)) => Err(Failure::BadInput(format!("leeward: --while {pid}: {error}"))),
        None => Err(Failure::BadInput(format!(
            "leeward: --while {pid}: want a process id"
        ))),
    }
}

/// Rules without anybody who takes what they bring would cut the node off.
fn check_listeners(rules: &Rules) -> Result<(), Failure> {
    let wanted = [
        (rules.family.has_v4(), IpAddr::V4(Ipv4Addr::LOCALHOST)),
        (rules.family.has_v6(), IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ];
    for (_, ip) in wanted.iter().filter(|(wanted, _)| *wanted) {
        let address = SocketAddr::new(*ip, rules.port);
        let Err(error) = TcpStream::connect_timeout(&address, LOOK) else {
            continue;
        };
        // Whoever resets it was there to do so.
        if error.kind() == ErrorKind::ConnectionReset {
            continue;
        }
        // Where there is no IPv6 at all there is nothing to be captured.
        let is_absent = matches!(
            error.kind(),
            ErrorKind::AddrNotAvailable | ErrorKind::NetworkUnreachable
        ) || error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error());
        if ip.is_ipv6() && rules.family.has_v4() && is_absent {
            continue;
        }
        let other = if ip.is_ipv6() { "ipv4" } else { "ipv6" };
        return Err(anyhow!(
            "nobody listens at {address} ({error}), so that captured connections would be refused; start leeward-proxy with --capture {address} first, or leave it at --family {other}, or say --unchecked. Nothing was changed"
        )
        .into());
    }
    Ok(())
}

fn status() -> Result<(), Failure> {
    let (family, name) = TABLE.split_once(' ').unwrap_or_default();
    let tables = nft(&["list", "tables"], "")?;
    if !tables
        .lines()
        .any(|line| line.trim() == format!("table {family} {name}"))
    {
        complain("leeward: nothing is captured here");
        return Err(Failure::Told);
    }
    say(nft(&["list", "table", family, name], "")?.trim_end());
    Ok(())
}

/// Runs nft; what it has to say goes into the error.
fn nft(args: &[&str], input: &str) -> anyhow::Result<String> {
    let spawned = Process::new("nft")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("there is no nft on the PATH; install nftables")
        }
        Err(error) => return Err(error).context("can't run nft"),
    };
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends before it has read everything says why.
        drop(stdin.write_all(input.as_bytes()));
    }
    let output = child.wait_with_output().context("can't wait for nft")?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    if said.contains("Operation not permitted") || said.contains("you must be root") {
        bail!(
            "changing what is captured needs root, or CAP_NET_ADMIN in the network namespace; nothing was changed"
        );
    }
    bail!("nft refuses, and nothing was changed: {said}")
}

/// A user by number or name.
fn uid(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    users
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(text) && !text.is_empty()).then(|| fields.nth(1)?.parse().ok())?
        })
        .ok_or_else(|| "want a user's number, or the name of one in /etc/passwd".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nohup_is_seen() {
        let with = |mask| format!("Name:\tleeward\nSigBlk:\t0000000000000001\nSigIgn:\t{mask}\n");
        assert!(ignores_hangup(&with("0000000000001001")));
        assert!(!ignores_hangup(&with("0000000000001000")));
        assert!(!ignores_hangup(""));
    }
}
