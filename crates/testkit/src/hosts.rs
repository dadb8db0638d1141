//! A host for each of three zones and one for the control plane, with a network between them that breaks on command.

use crate::binaries;
use crate::dir::TempDir;
use crate::netns::{Namespaces, program};
use anyhow::{Context, bail, ensure};
use std::fmt::Write;
use std::future::Future;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// The hosts of three zones, `a`, `b` and `c`, and one for the control plane, where the test is as well.
///
/// Two networks: one between all hosts, which can be broken; and a link from the test to each zone, over which it is the
/// zone's workloads, both those that call and those that answer. Nothing is passed on from one to the other.
#[derive(Debug)]
pub struct Hosts {
    spaces: Namespaces,
}

/// Where something in a mesh on hosts runs: in a namespace, at two addresses.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// What stands before each command.
    pub(crate) enter: Vec<String>,
    /// Its address for other hosts.
    pub(crate) between: Ipv4Addr,
    /// Its address for the workloads of its own node.
    pub(crate) within: Ipv4Addr,
}

/// The zones that have a host.
pub const ZONES: [&str; 3] = ["a", "b", "c"];
/// The control plane's.
const CONTROL: &str = "control";
/// `required` makes tests fail, and not be left out, where there can be no hosts.
const REQUIRED: &str = "LEEWARD_TEST_HOSTS";
/// Tells a test that runs again, now on the control plane's host, the prefix of the namespaces.
const INSIDE: &str = "LEEWARD_TEST_INSIDE";
/// And which file to make when it has come to its end.
const DONE: &str = "LEEWARD_TEST_DONE";
/// Longest run of a scenario.
const PATIENCE: Duration = Duration::from_secs(400);
/// The table of nftables that everything broken by rules is in.
const TABLE: &str = "leeward_test";

/// Runs a test on hosts of its own. `test` is its name, as the test program knows it: it is started again with that name
/// alone, on the control plane's host, since a process has its network from its birth. Whatever becomes of it, the hosts
/// are gone in the end, and with them all that ran there.
///
/// Where hosts can't be made the test is left out, and says so; with `LEEWARD_TEST_HOSTS=required` it fails.
///
/// # Errors
///
/// What the scenario says, or that it doesn't end.
pub fn on_hosts<F, S>(test: &str, scenario: F) -> anyhow::Result<()>
where
    F: FnOnce(Hosts) -> S,
    S: Future<Output = anyhow::Result<()>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    if let Some(prefix) = std::env::var_os(INSIDE) {
        let hosts = Hosts {
            spaces: Namespaces::of(&prefix.to_string_lossy()),
        };
        runtime.block_on(scenario(hosts))?;
        let done = std::env::var_os(DONE).context("nobody said where to say that it is done")?;
        std::fs::write(done, "")?;
        return Ok(());
    }
    let hosts = match Hosts::make() {
        Ok(hosts) => hosts,
        Err(why) => {
            let required = std::env::var_os(REQUIRED).is_some_and(|value| value == "required");
            ensure!(!required, "there can be no hosts to test on: {why:#}");
            let told = format!("LEFT OUT: {test}: there can be no hosts to test on: {why:#}\n");
            std::io::Write::write_all(&mut std::io::stderr(), told.as_bytes())?;
            return Ok(());
        }
    };
    runtime.block_on(hosts.run(test))
}

impl Hosts {
    fn make() -> anyhow::Result<Self> {
        for needed in ["ip", "nft"] {
            ensure!(
                program(needed).is_some(),
                "there is no {needed}: apt-get install iproute2 nftables"
            );
        }
        let hosts = Self {
            spaces: Namespaces::make(&[&[CONTROL][..], &ZONES].concat())?,
        };
        hosts.connect()?;
        // Whether rules can be had as well is known only when one is there.
        hosts.rules("a", "")?;
        hosts.heal("a")?;
        Ok(hosts)
    }

    /// A bridge at the control plane's host that all are on, and a link of its own to each zone.
    fn connect(&self) -> anyhow::Result<()> {
        let mut hub = format!(
            "link set lo up\nlink add br0 type bridge\naddr add {}/24 dev br0\nlink set br0 up\n",
            self.control().between
        );
        for zone in ZONES {
            let host = self.spaces.name(zone);
            let workloads = workloads(zone)?;
            // A String takes whatever is written to it.
            let _ = write!(
                hub,
                "link add {zone}-net type veth peer name net0 netns {host}\n\
                 link set {zone}-net master br0\n\
                 link set {zone}-net up\n\
                 link add {zone}-node type veth peer name node0 netns {host}\n\
                 addr add {workloads}/24 dev {zone}-node\n\
                 link set {zone}-node up\n"
            );
        }
        self.spaces.ip(CONTROL, &hub)?;
        for zone in ZONES {
            let Place { between, within, .. } = self.zone(zone)?;
            let lines = format!(
                "link set lo up\naddr add {between}/24 dev net0\nlink set net0 up\n\
                 addr add {within}/24 dev node0\nlink set node0 up\n"
            );
            self.spaces.ip(zone, &lines)?;
        }
        Ok(())
    }

    /// Starts the test again, on the control plane's host, and waits for it.
    async fn run(&self, test: &str) -> anyhow::Result<()> {
        let dir = TempDir::new()?;
        let done = dir.path().join("done");
        let itself = std::env::current_exe()?;
        let mut command = tokio::process::Command::from(self.spaces.command(CONTROL, &itself)?);
        command
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(INSIDE, self.spaces.prefix())
            .env(DONE, &done)
            // Found, or built, once.
            .env("LEEWARD_TEST_BINARIES", binaries::dir()?)
            .kill_on_drop(true);
        let ended = tokio::time::timeout(PATIENCE, command.status()).await;
        let ended = ended.with_context(|| format!("{test} goes on for longer than {PATIENCE:?}"))??;
        ensure!(ended.success(), "{test} has failed on its hosts: {ended}");
        ensure!(done.exists(), "there is no test {test:?} in {}", itself.display());
        Ok(())
    }

    /// The control plane's host.
    pub(crate) fn control(&self) -> Place {
        let between = Ipv4Addr::new(10, 98, 0, 254);
        Place {
            enter: Vec::new(),
            between,
            within: between,
        }
    }

    /// A zone's host.
    pub(crate) fn zone(&self, zone: &str) -> anyhow::Result<Place> {
        let n = number(zone)?;
        Ok(Place {
            enter: self.spaces.enter(zone)?,
            between: Ipv4Addr::new(10, 98, 0, n),
            within: Ipv4Addr::new(10, 99, n, 2),
        })
    }

    /// The address of a zone's workloads, for its proxies.
    ///
    /// # Errors
    ///
    /// If there is no such zone.
    pub fn workloads(&self, zone: &str) -> anyhow::Result<Ipv4Addr> {
        workloads(zone)
    }

    /// Cuts a zone's cable: nothing comes or goes, and nobody is told.
    ///
    /// # Errors
    ///
    /// If there is no such zone.
    pub fn cut(&self, zone: &str) -> anyhow::Result<()> {
        number(zone)?;
        self.spaces.ip(CONTROL, &format!("link set {zone}-net down\n"))
    }

    /// Mends what [`Self::cut`] has cut.
    ///
    /// # Errors
    ///
    /// If there is no such zone.
    pub fn mend(&self, zone: &str) -> anyhow::Result<()> {
        number(zone)?;
        self.spaces.ip(CONTROL, &format!("link set {zone}-net up\n"))
    }

    /// Cuts a zone off from the control plane, and from nothing else.
    ///
    /// # Errors
    ///
    /// If there is no such zone, or `nft` doesn't take it.
    pub fn cut_from_control(&self, zone: &str) -> anyhow::Result<()> {
        let control = self.control().between;
        self.rules(zone, &format!("ip saddr {control} counter drop"))
    }

    /// Has each packet that comes to a zone from others dropped with this probability, 0 to 100 %.
    ///
    /// # Errors
    ///
    /// If there is no such zone, or `nft` doesn't take it.
    pub fn lose(&self, zone: &str, percent: u8) -> anyhow::Result<()> {
        self.rules(zone, &format!("numgen random mod 100 < {percent} counter drop"))
    }

    /// Drops all UDP that comes to a zone from others.
    ///
    /// # Errors
    ///
    /// If there is no such zone, or `nft` doesn't take it.
    pub fn block_udp(&self, zone: &str) -> anyhow::Result<()> {
        self.rules(zone, "meta l4proto udp counter drop")
    }

    /// How many packets a zone's rules have dropped.
    ///
    /// # Errors
    ///
    /// If it has none.
    pub fn dropped(&self, zone: &str) -> anyhow::Result<u64> {
        number(zone)?;
        let table = self.spaces.nft_table(zone, TABLE)?;
        let count = table
            .split("counter packets ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        Ok(count.context("its rules count nothing")?.parse()?)
    }

    /// Takes a zone's rules away.
    ///
    /// # Errors
    ///
    /// If it has none.
    pub fn heal(&self, zone: &str) -> anyhow::Result<()> {
        number(zone)?;
        self.spaces.nft(zone, &format!("delete table inet {TABLE}\n"))
    }

    /// Gives a zone a rule for what comes from other hosts.
    fn rules(&self, zone: &str, rule: &str) -> anyhow::Result<()> {
        number(zone)?;
        let rule = if rule.is_empty() {
            String::new()
        } else {
            format!("    iifname \"net0\" {rule}\n")
        };
        let rules = format!(
            "table inet {TABLE} {{\n  chain in {{\n    type filter hook input priority 0\n{rule}  }}\n}}\n"
        );
        self.spaces.nft(zone, &rules)
    }
}

fn number(zone: &str) -> anyhow::Result<u8> {
    match ZONES.iter().zip(1..).find(|(name, _)| **name == zone) {
        Some((_, n)) => Ok(n),
        None => bail!("there is no host for zone {zone:?}, only for {ZONES:?}"),
    }
}

fn workloads(zone: &str) -> anyhow::Result<Ipv4Addr> {
    Ok(Ipv4Addr::new(10, 99, number(zone)?, 1))
}

impl Place {
    /// On this machine, as every process is.
    pub(crate) const HERE: Self = Self {
        enter: Vec::new(),
        between: Ipv4Addr::LOCALHOST,
        within: Ipv4Addr::LOCALHOST,
    };

    /// A program and its arguments, in the form in which it is started at this place.
    pub(crate) fn command(&self, program: PathBuf, args: Vec<String>) -> (PathBuf, Vec<String>) {
        let mut whole = self.enter.clone();
        whole.push(program.display().to_string());
        whole.extend(args);
        let program = whole.remove(0);
        (program.into(), whole)
    }
}
