//! How long requests from zone to zone take where packets are lost: the same pairs of proxies as in `zones`, on two hosts
//! with a link between them that delays packets and drops some.

mod plot;

use crate::measure::{Backend, Bench, Load, pause, pinned_to_load, shoot, wait_until};
use crate::zones::{By, Way};
use anyhow::{Context, ensure};
use leeward_testkit::netns::Namespaces;
use std::fmt::Write as _;
use std::io::{Write as _, stdout};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

/// What the link does to packets, each way the same.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Link {
    /// Delay of a packet in milliseconds, 0 to 1000.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=1000))]
    delay: u32,
    /// What the delay may be shorter or longer by, in milliseconds, 0 to 1000.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1000))]
    jitter: u32,
    /// Packets in a hundred that are lost, 0 to 50.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=50))]
    loss: u32,
}

/// Two hosts, and what carries packets between them.
pub(crate) struct Hosts {
    relay: Child,
    spaces: Namespaces,
}

/// How long each of one contender's requests took, in microseconds, the shortest first.
struct Times {
    name: &'static str,
    sorted: Vec<u32>,
}

/// The link's device on both hosts, and their addresses.
const DEVICE: &str = "lossy0";
const NEAR: &str = "10.97.0.1";
const FAR: &str = "10.97.0.2";
/// Seconds of load before the first figure, in which connections are made and find how fast they may send.
const WARM: u32 = 3;

/// How long what was given up may take to be over.
const GIVEN_UP: Duration = Duration::from_secs(1);

const LOAD: Load = Load {
    name: "1 KiB, 64 at once",
    ..Load::FLAT_OUT
};

impl Hosts {
    pub(crate) fn start(link: Link, dir: &Path) -> anyhow::Result<Self> {
        let spaces = Namespaces::make(&["near", "far"])?;
        let log = dir.join("link.log");
        let out = std::fs::File::create(&log)?;
        let share = f64::from(link.loss) / 100.0;
        let relay = pinned_to_load(&spaces.enter("near")?, Path::new("python3"))
            .args(["-c", include_str!("lossy_link.py"), DEVICE, &spaces.name("far")])
            .args([link.delay.to_string(), link.jitter.to_string(), share.to_string()])
            // The same packets are lost in each run, as far as the same are sent.
            .arg("1")
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .context("can't start python3, which carries packets")?;
        let hosts = Self { relay, spaces };
        let ready = wait_until(|| {
            let told = std::fs::read_to_string(&log).ok()?;
            told.contains("ready").then_some(())
        });
        ready.with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
        for (host, address) in [("near", NEAR), ("far", FAR)] {
            let lines = format!("link set lo up\naddr add {address}/24 dev {DEVICE}\n");
            hosts.spaces.ip(host, &lines)?;
        }
        Ok(hosts)
    }

    /// The backend of the far host.
    pub(crate) fn backend(&self, dir: &Path) -> anyhow::Result<Backend> {
        Backend::start_at(&self.spaces.enter("far")?, dir)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // It goes on until it is ended; the hosts go after it.
        drop(self.relay.kill());
        drop(self.relay.wait());
    }
}

impl Times {
    /// What so many requests in a thousand took at most, in milliseconds.
    fn at(&self, thousandths: u32) -> f64 {
        // It has 32 bits at least, wherever this runs.
        let of = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
        let last = self.sorted.len().saturating_sub(1);
        let place = (self.sorted.len() * of(thousandths) / 1000).min(last);
        let micros = self.sorted.get(place).copied().unwrap_or_default();
        f64::from(micros) / 1000.0
    }
}

impl Bench<'_> {
    /// Prints the table; writes the picture into `write`, if there is one.
    pub(crate) fn loss(&self, hosts: &Hosts, link: Link, write: Option<&Path>) -> anyhow::Result<()> {
        self.issue()?;
        let way = Way {
            near: hosts.spaces.enter("near")?,
            far: hosts.spaces.enter("far")?,
            between: FAR.parse()?,
        };
        let mut all: Vec<_> = By::here()
            .into_iter()
            .filter(|by| !matches!(by, By::Http1 | By::Auto))
            .map(|by| {
                let name = by.name();
                (
                    by,
                    Times {
                        name,
                        sorted: Vec::new(),
                    },
                )
            })
            .collect();
        for _ in 0..self.rounds {
            for (by, times) in &mut all {
                let took = self.times(*by, &way);
                times.sorted.extend(took.with_context(|| by.name())?);
            }
        }
        let mut out = stdout();
        let Link { delay, jitter, loss } = link;
        let what = format!(
            "{}, {delay} ms (+- {jitter} ms) and {loss} % lost each way",
            LOAD.name
        );
        writeln!(
            out,
            "\nTwo proxies in a row on two hosts, {what}, in ms ({} rounds)",
            self.rounds
        )?;
        let mut table =
            "| between the proxies | requests | p50 | p90 | p99 | p99.9 |\n|---|---|---|---|---|---|\n"
                .to_owned();
        let mut sorted = Vec::new();
        for (_, mut times) in all {
            times.sorted.sort_unstable();
            // A String takes whatever is written to it.
            let _ = write!(table, "| {} | {} |", times.name, times.sorted.len());
            for share in [500, 900, 990, 999] {
                let _ = write!(table, " {:.1} |", times.at(share));
            }
            table.push('\n');
            sorted.push(times);
        }
        out.write_all(table.as_bytes())?;
        if let Some(dir) = write {
            std::fs::write(dir.join("loss.svg"), plot::svg(&sorted, &what))?;
        }
        Ok(())
    }

    /// How long requests took in one run.
    fn times(&self, by: By, way: &Way) -> anyhow::Result<Vec<u32>> {
        let pair = self.pair(by, way)?;
        // Until both listen there is no answer; there may be none for that either.
        wait_until(|| shoot(&way.near, LOAD, pair.port, 1, None).ok())?;
        // What the clients of one run gave up at its end may still be on its way: it must not meet the next.
        pause(GIVEN_UP);
        shoot(&way.near, LOAD, pair.port, WARM, None)?;
        pause(GIVEN_UP);
        let log = self.dir.join("times");
        drop(std::fs::remove_file(&log));
        shoot(&way.near, LOAD, pair.port, self.seconds, Some(&log))?;
        let mut times = Vec::new();
        for line in std::fs::read_to_string(&log)?.lines() {
            let took = line.split('\t').nth(2).and_then(|took| took.parse().ok());
            times.push(took.with_context(|| format!("h2load wrote {line:?}"))?);
        }
        ensure!(
            times.len() > 1000,
            "only {} requests, too few for p99.9",
            times.len()
        );
        Ok(times)
    }
}
