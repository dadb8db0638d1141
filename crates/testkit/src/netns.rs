//! Network namespaces: hosts of their own on one machine.

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Namespaces with a prefix in common. Whoever made them deletes them on drop, and ends what still runs in them.
#[derive(Debug)]
pub struct Namespaces {
    prefix: String,
    /// Those that this has made, by their whole names.
    made: Vec<String>,
}

/// Where programs for administrators are, which is not in everyone's PATH.
const PLACES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// A program in PATH, or where those for administrators are.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(PLACES.map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

impl Namespaces {
    /// Makes a namespace for each of these names.
    ///
    /// # Errors
    ///
    /// If there is no `ip`, or it may not; nothing is left behind.
    pub fn make(names: &[&str]) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        ensure!(geteuid().is_root(), "namespaces are for root to make");
        // Relaxed: only uniqueness counts.
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut made = Self::of(&format!("leeward-{}-{n}", std::process::id()));
        for name in names {
            let whole = made.name(name);
            run(ip()?.args(["netns", "add", &whole]), "")?;
            made.made.push(whole);
        }
        Ok(made)
    }

    /// Those with this prefix, which somebody else has made and will delete.
    pub fn of(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            made: Vec::new(),
        }
    }

    /// What all of their names begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The name that a namespace has for the system.
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// What stands before a program's path and arguments, so that it runs in a namespace. It has the process id that
    /// was started.
    ///
    /// # Errors
    ///
    /// If there is no `ip`.
    pub fn enter(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let ip = find("ip")?.display().to_string();
        Ok(vec![ip, "netns".to_owned(), "exec".to_owned(), self.name(name)])
    }

    /// A program in a namespace.
    ///
    /// # Errors
    ///
    /// If there is no `ip`.
    pub fn command(&self, name: &str, program: &Path) -> anyhow::Result<Command> {
        let mut command = ip()?;
        command.args(["netns", "exec", &self.name(name)]).arg(program);
        Ok(command)
    }

    /// Does in a namespace what these lines say, each without the word `ip`.
    ///
    /// # Errors
    ///
    /// What `ip` says of the first line that it doesn't take.
    pub fn ip(&self, name: &str, lines: &str) -> anyhow::Result<()> {
        run(ip()?.args(["-n", &self.name(name), "-batch", "-"]), lines).map(drop)
    }

    /// Gives a namespace these rules of nftables, beside those that it has.
    ///
    /// # Errors
    ///
    /// What `nft` says.
    pub fn nft(&self, name: &str, rules: &str) -> anyhow::Result<()> {
        run(self.command(name, &find("nft")?)?.args(["-f", "-"]), rules).map(drop)
    }

    /// A namespace's table of nftables, with what its counters say.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn nft_table(&self, name: &str, table: &str) -> anyhow::Result<String> {
        let list = ["list", "table", "inet", table];
        run(self.command(name, &find("nft")?)?.args(list), "")
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let Ok(program) = find("ip") else { return };
        for name in &self.made {
            // What is still there has been started in here, and would keep the namespace.
            let left = Command::new(&program).args(["netns", "pids", name]).output();
            let left = left.map(|output| output.stdout).unwrap_or_default();
            let left = String::from_utf8_lossy(&left);
            for pid in left.split_whitespace().filter_map(|pid| pid.parse().ok()) {
                if let Some(pid) = Pid::from_raw(pid) {
                    // It may have just ended.
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            // A namespace that stays does no harm; its name is of a process that is gone.
            drop(Command::new(&program).args(["netns", "del", name]).output());
        }
    }
}

fn find(name: &str) -> anyhow::Result<PathBuf> {
    program(name).with_context(|| format!("there is no {name}: apt-get install iproute2 nftables"))
}

fn ip() -> anyhow::Result<Command> {
    Ok(Command::new(find("ip")?))
}

/// Runs a command to its end, with this for its input; returns what it printed.
fn run(command: &mut Command, input: &str) -> anyhow::Result<String> {
    let what = format!("{command:?}");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| what.clone())?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that has ended without reading says why.
        drop(stdin.write_all(input.as_bytes()));
    }
    let output = child.wait_with_output().with_context(|| what.clone())?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} says {}: {input}", told.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
