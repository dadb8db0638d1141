//! One child: started, watched, replaced, ended.

use super::file::{Livez, Spec};
use super::liveness::{Liveness, Verdict};
use super::restarts::{LOOP, Limit, Next, Restarts};
use super::{Level, tell};
use rustix::process::{Pid, Signal, kill_process};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child as Process, Command};
use tokio::sync::watch;
use tokio::time::Instant;

/// What every child is to do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Orders {
    /// How often an upgrade was asked for.
    pub(crate) upgrades: u64,
    /// Whether to end.
    pub(crate) stop: bool,
}

/// How keeping a child ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// As ordered.
    Stopped,
    /// The child of this name does not stay up.
    GaveUp(String),
}

/// A child that is kept.
#[derive(Debug)]
pub(crate) struct Child {
    spec: Arc<Spec>,
    stop_timeout: Duration,
    restarts: Restarts,
    liveness: Liveness,
    current: Option<Running>,
    /// Beside it, on the way to take its place.
    next: Option<Running>,
    /// When to start again; only while none runs.
    again: Instant,
}

#[derive(Debug)]
struct Running {
    process: Process,
    id: u32,
    began: Instant,
}

/// What has happened.
enum Event {
    Ended(io::Result<ExitStatus>),
    NextEnded(io::Result<ExitStatus>),
    Due,
    Heard(Result<(), String>),
    Orders,
}

/// An answer to whether it is alive, when it comes.
type Probe = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

impl Child {
    pub(crate) fn new(spec: Arc<Spec>, limit: Option<Limit>, stop_timeout: Duration) -> Self {
        let liveness = Liveness::new(spec.patience);
        Self {
            spec,
            stop_timeout,
            restarts: Restarts::new(limit),
            liveness,
            current: None,
            next: None,
            again: Instant::now(),
        }
    }

    /// Keeps it until it is ordered to stop.
    pub(crate) async fn keep(mut self, mut orders: watch::Receiver<Orders>) -> Ended {
        let mut upgrades = orders.borrow_and_update().upgrades;
        let mut probe = probe(&self.spec);
        loop {
            let event = tokio::select! {
                biased;
                changed = orders.changed() => match changed {
                    Ok(()) => Event::Orders,
                    // Nobody is left to give orders.
                    Err(_) => return self.stop().await,
                },
                status = wait(&mut self.current) => Event::Ended(status),
                status = wait(&mut self.next) => Event::NextEnded(status),
                () = tokio::time::sleep_until(self.again), if self.current.is_none() => Event::Due,
                heard = &mut probe, if self.current.is_some() => Event::Heard(heard),
            };
            match event {
                Event::Orders => {
                    let now = *orders.borrow_and_update();
                    if now.stop {
                        return self.stop().await;
                    }
                    if now.upgrades != upgrades {
                        upgrades = now.upgrades;
                        self.upgrade();
                    }
                }
                Event::Due => {
                    if let Some(error) = self.start().err() {
                        if let Some(ended) = self.ended(None, &format!("can't be started: {error}")) {
                            return ended;
                        }
                    } else {
                        probe = self::probe(&self.spec);
                    }
                }
                Event::Ended(status) => {
                    let how = how(&status);
                    let ended = self.current.take();
                    if let Some(next) = self.next.take() {
                        self.tell(
                            Level::Info,
                            &format!(
                                "the old process{} {how}; pid {} has its place",
                                pid(ended.as_ref()),
                                next.id
                            ),
                        );
                        self.liveness = Liveness::new(self.spec.patience);
                        self.current = Some(next);
                    } else if let Some(given_up) = self.ended(ended, &how) {
                        return given_up;
                    }
                }
                Event::NextEnded(status) => {
                    let ended = self.next.take();
                    let how = how(&status);
                    self.tell(
                        Level::Warn,
                        &format!(
                            "the new process{} {how} before the old one; the old one goes on",
                            pid(ended.as_ref())
                        ),
                    );
                }
                Event::Heard(heard) => {
                    self.heard(heard);
                    probe = self::probe(&self.spec);
                }
            }
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let running = spawn(&self.spec)?;
        self.tell(Level::Info, &format!("started, pid {}", running.id));
        self.liveness = Liveness::new(self.spec.patience);
        self.current = Some(running);
        Ok(())
    }

    /// Decides what becomes of it now that none runs; returns if that is nothing.
    fn ended(&mut self, ended: Option<Running>, how: &str) -> Option<Ended> {
        let now = Instant::now();
        let ran = ended.as_ref().map_or(Duration::ZERO, |e| now - e.began);
        let pid = pid(ended.as_ref());
        match self.restarts.ended(ran, now.into_std(), fastrand::f64()) {
            Next::Again { after, in_a_row } => {
                self.again = now + after;
                let story = format!("{pid} {how} after {ran:.1?}; it is started again in {after:.1?}");
                let story = story.trim_start();
                if in_a_row >= LOOP {
                    self.tell(
                        Level::Warn,
                        &format!("in a crash loop, with {in_a_row} ends in a row: {story}"),
                    );
                } else {
                    self.tell(Level::Warn, story);
                }
                None
            }
            Next::GiveUp => {
                let story = format!("{pid} {how} after {ran:.1?}; it was started again too often");
                self.tell(Level::Error, story.trim_start());
                Some(Ended::GaveUp(self.spec.name.clone()))
            }
        }
    }

    fn upgrade(&mut self) {
        if !self.spec.hands_over {
            self.tell(Level::Info, "has no handover socket, and is left as it is");
            return;
        }
        let Some(current) = &self.current else {
            self.tell(
                Level::Info,
                "does not run; when it is started again that is the upgrade",
            );
            return;
        };
        if self.next.is_some() {
            self.tell(Level::Warn, "an upgrade is under way already");
            return;
        }
        match spawn(&self.spec) {
            Ok(next) => {
                let story = format!(
                    "pid {} is started to take the place of pid {}",
                    next.id, current.id
                );
                self.tell(Level::Info, &story);
                self.next = Some(next);
            }
            Err(error) => {
                self.tell(
                    Level::Warn,
                    &format!("the new process can't be started: {error}; the old one goes on"),
                );
            }
        }
    }

    /// Takes in an answer, or that there was none. While two processes run, whichever has the admin port
    /// answers; if it hangs, the old one is ended for the new one to stand alone, and is asked next.
    fn heard(&mut self, heard: Result<(), String>) {
        let Some(current) = &mut self.current else { return };
        let verdict = self.liveness.heard(current.began.elapsed(), heard.is_ok());
        let why = heard.err().unwrap_or_default();
        match verdict {
            Verdict::Alive => {}
            Verdict::Failing(times) => {
                self.tell(
                    Level::Warn,
                    &format!("does not say that it is alive ({times} times): {why}"),
                );
            }
            Verdict::Hung => {
                // It has shown that it doesn't listen to anybody. That it is gone already is as good.
                drop(current.process.start_kill());
                let story = format!("pid {} hangs, and is killed: {why}", current.id);
                self.tell(Level::Warn, &story);
            }
        }
    }

    /// Tells every process to end, and sees to it.
    async fn stop(mut self) -> Ended {
        let mut running: Vec<_> = [self.current.take(), self.next.take()]
            .into_iter()
            .flatten()
            .collect();
        for running in &running {
            running.signal(Signal::TERM);
        }
        let until = Instant::now() + self.stop_timeout;
        for running in &mut running {
            match tokio::time::timeout_at(until, running.process.wait()).await {
                Ok(status) => self.tell(Level::Info, &format!("pid {} {}", running.id, how(&status))),
                Err(_) => {
                    let story = format!(
                        "pid {} did not end within {:?}, and is killed",
                        running.id, self.stop_timeout
                    );
                    self.tell(Level::Warn, &story);
                    drop(running.process.kill().await);
                }
            }
        }
        Ended::Stopped
    }

    fn tell(&self, level: Level, text: &str) {
        tell(level, Some(&self.spec.name), text);
    }
}

impl Running {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.id.cast_signed()) {
            // Until it is waited for, the id is its own; one that has ended doesn't mind.
            let _ = kill_process(pid, signal);
        }
    }
}

fn spawn(spec: &Spec) -> io::Result<Running> {
    let (program, args) = spec.command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = if spec.hands_over {
        Command::new(program)
    } else {
        // This very program, even if there is another at its path by now.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["exec-child", "--parent"])
            .arg(std::process::id().to_string())
            .arg("--")
            .arg(program);
        command
    };
    let process = command
        .args(args)
        .envs(&spec.env)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()?;
    // It was not waited for, so it has one.
    let id = process.id().ok_or(io::ErrorKind::NotFound)?;
    Ok(Running {
        process,
        id,
        began: Instant::now(),
    })
}

/// Waits for the end of a process; for ever if there is none. Cancel-safe.
async fn wait(running: &mut Option<Running>) -> io::Result<ExitStatus> {
    match running {
        Some(running) => running.process.wait().await,
        None => std::future::pending().await,
    }
}

fn pid(running: Option<&Running>) -> String {
    running.map_or_else(String::new, |r| format!(" pid {}", r.id))
}

fn how(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("ended with status {code}"),
            (None, Some(signal)) => format!("was ended by signal {signal}"),
            (None, None) => "ended".to_owned(),
        },
        Err(error) => format!("can't be waited for ({error})"),
    }
}

/// Asks once, after a pause. For a child that isn't asked, never comes.
fn probe(spec: &Spec) -> Probe {
    let Some(livez) = spec.livez.clone() else {
        return Box::pin(std::future::pending());
    };
    let patience = spec.patience;
    Box::pin(async move {
        tokio::time::sleep(patience.every).await;
        match tokio::time::timeout(patience.timeout, ask(&livez)).await {
            Ok(answer) => answer,
            Err(_) => Err(format!(
                "{} does not answer within {:?}",
                livez.address, patience.timeout
            )),
        }
    })
}

/// Longest status line of an answer, in bytes.
const STATUS_LINE: u64 = 256;

/// Alive is who answers GET with a status from 200 to 299.
async fn ask(livez: &Livez) -> Result<(), String> {
    let (address, path) = (livez.address, &livez.path);
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        stream.take(STATUS_LINE).read_to_end(&mut head).await?;
        io::Result::Ok(head)
    };
    let head = exchange.await.map_err(|error| format!("{address}: {error}"))?;
    let text = String::from_utf8_lossy(&head);
    let status = text.strip_prefix("HTTP/1.").and_then(|t| t.split(' ').nth(1));
    match status.and_then(|s| s.parse::<u16>().ok()) {
        Some(200..=299) => Ok(()),
        Some(status) => Err(format!("{address} answers {status}")),
        None => Err(format!("{address} answers something else than HTTP")),
    }
}
