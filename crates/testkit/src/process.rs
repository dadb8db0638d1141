//! Child processes: started, watched, ended by their ids.

use crate::wait::eventually;
use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A running program. Dropping it ends it: SIGTERM, and SIGKILL shortly after.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    addresses: BTreeMap<String, SocketAddr>,
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Resident now.
    pub resident: u64,
    /// The most that was resident since the start, or since [`Process::reset_peak`].
    pub peak: u64,
}

/// How long a program may take to bind its listeners. Debug builds on a busy machine are slow.
const START: Duration = Duration::from_secs(30);
/// How long a program that is dropped may take to end.
const LAST_WORDS: u32 = 20;
/// Lines of a program's log shown when its test fails.
const TAIL: usize = 60;

impl Process {
    /// Starts `program` and waits until it has written its addresses file (the flag is added here). Its
    /// output goes to `DIR/NAME.log`.
    ///
    /// # Errors
    ///
    /// If it can't be started, or ends, or binds nothing in time.
    pub async fn start<S: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        args: impl IntoIterator<Item = S>,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let file = dir.join(format!("{name}.addresses"));
        if file.exists() {
            std::fs::remove_file(&file).with_context(|| format!("can't delete {}", file.display()))?;
        }
        let mut command = Command::new(program);
        command.args(args).arg("--addresses-file").arg(&file);
        let mut process = Self::spawn(name, command, dir)?;
        let until = tokio::time::Instant::now() + START;
        process.addresses = loop {
            if let Ok(text) = std::fs::read_to_string(&file) {
                let named: BTreeMap<String, Option<SocketAddr>> =
                    serde_json::from_str(&text).with_context(|| format!("{name} wrote {text:?}"))?;
                break named
                    .into_iter()
                    .filter_map(|(name, address)| Some((name, address?)))
                    .collect();
            }
            if let Some(status) = process.child.try_wait()? {
                bail!("{name} ended with {status}:\n{}", process.tail());
            }
            if tokio::time::Instant::now() > until {
                bail!("{name} wrote no addresses within {START:?}:\n{}", process.tail());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        Ok(process)
    }

    /// Starts any program, with its output in `DIR/NAME.log`.
    ///
    /// # Errors
    ///
    /// If it can't be started.
    pub fn spawn(name: &str, mut command: Command, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let out = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command
            .spawn()
            .with_context(|| format!("can't start {:?}", command.get_program()))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
            addresses: BTreeMap::new(),
        })
    }

    /// Where one of its listeners is: `outbound`, `inbound`, `admin`, `listen`.
    ///
    /// # Errors
    ///
    /// If the program named no such listener.
    pub fn address(&self, listener: &str) -> anyhow::Result<SocketAddr> {
        let found = self.addresses.get(listener).copied();
        found.with_context(|| format!("{} has no {listener:?}, only {:?}", self.name, self.addresses))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal; a process that has ended doesn't mind.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // Until `wait` the id is ours, so the only error is that it has just ended.
            let _ = kill_process(pid, signal);
        }
    }

    /// `kill -9`, and waits for the end.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::KILL);
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, then waits for the end.
    ///
    /// # Errors
    ///
    /// If it goes on for longer than `within`.
    pub async fn term_and_wait(&mut self, within: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::TERM);
        self.wait(within).await
    }

    /// Waits for the end.
    ///
    /// # Errors
    ///
    /// If it goes on for longer than `within`.
    pub async fn wait(&mut self, within: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let child = &mut self.child;
        let ended = eventually(&what, within, || {
            let ended = child.try_wait();
            async move { ended?.context("it goes on") }
        });
        ended.await
    }

    /// Everything it has written.
    ///
    /// # Errors
    ///
    /// If the log can't be read.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.log)?).into_owned())
    }

    /// The last line of its access log with `wanted` in it, which is waited for.
    ///
    /// # Errors
    ///
    /// The log, if there is none in that time.
    pub async fn logged(&self, wanted: &str, within: Duration) -> anyhow::Result<serde_json::Value> {
        eventually("a line in the log", within, || async {
            let log = self.log()?;
            let line = log
                .lines()
                .rev()
                .find(|line| line.starts_with('{') && line.contains(wanted));
            Ok(serde_json::from_str(line.with_context(|| log.clone())?)?)
        })
        .await
    }

    /// What it holds in memory.
    ///
    /// # Errors
    ///
    /// If the process has ended.
    pub fn memory(&self) -> anyhow::Result<Memory> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line
                .and_then(|line| line.trim().strip_suffix("kB"))
                .map(str::trim);
            let kib: u64 = kib.with_context(|| format!("{path} has no {name}"))?.parse()?;
            anyhow::Ok(kib * 1024)
        };
        Ok(Memory {
            resident: field("VmRSS:")?,
            peak: field("VmHWM:")?,
        })
    }

    /// Lets the peak of its memory begin anew.
    ///
    /// # Errors
    ///
    /// If the process has ended.
    pub fn reset_peak(&self) -> anyhow::Result<()> {
        // proc_pid_clear_refs(5): 5 resets the peak resident set size.
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?;
        Ok(())
    }

    fn tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines
            .get(lines.len().saturating_sub(TAIL)..)
            .unwrap_or_default()
            .join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let tail = self.tail();
            // There is nobody to tell that the terminal is gone.
            drop(writeln!(
                std::io::stderr(),
                "--- the end of the log of {} ---\n{tail}",
                self.name
            ));
        }
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal(Signal::TERM);
        for _ in 0..LAST_WORDS {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            #[expect(clippy::disallowed_methods, reason = "drop can't await; the test is over")]
            std::thread::sleep(Duration::from_millis(10));
        }
        self.signal(Signal::KILL);
        // Reaped, or gone: either way there is nothing left of it.
        drop(self.child.wait());
    }
}
