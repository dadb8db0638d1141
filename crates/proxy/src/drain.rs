//! The workers' threads, from their start to an orderly end.

use leeward_http::{Links, Listeners, Node, Taking, Worker};
use std::io;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::LocalOptions;
use tokio::sync::{mpsc, watch};

/// How far the proxy has gone in ending.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Phase {
    /// Not at all.
    Serving,
    /// Every answer asks its client to close; new connections are still taken, since clients may not have
    /// heard yet.
    Asking,
    /// As when asking, but a successor has the listening sockets as well and serves whoever comes: none is
    /// taken here any more, and the sockets are left as they are.
    Leaving,
    /// No new connections; those without a request are closed.
    Closing,
}

/// To whom the listening sockets go when the workers end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Heir {
    /// To nobody: they are closed.
    Nobody,
    /// To a successor, which accepts from them already.
    Successor,
}

/// How long clients are given to hear that the proxy is ending. A client with anything to send hears it with
/// its next answer.
const ASKING: Duration = Duration::from_secs(2);
/// How often a draining worker looks whether it is done.
const LOOK: Duration = Duration::from_millis(20);

/// The worker threads.
pub(crate) struct Workers {
    threads: Vec<JoinHandle<()>>,
    /// Closed when a worker has ended.
    ended: mpsc::Receiver<()>,
}

impl Workers {
    /// Starts one thread for each of `listeners`.
    pub(crate) fn start(
        node: &Node,
        listeners: Vec<Listeners>,
        links: Vec<Links>,
        phases: &watch::Receiver<Phase>,
    ) -> anyhow::Result<Self> {
        let (alive, ended) = mpsc::channel(1);
        let mut threads = Vec::new();
        for (i, (listeners, links)) in listeners.into_iter().zip(links).enumerate() {
            let (node, phases, alive) = (node.clone(), phases.clone(), alive.clone());
            let thread = std::thread::Builder::new()
                .name(format!("worker-{i}"))
                .spawn(move || {
                    if let Err(error) = work(&node, listeners, links, phases) {
                        tracing::error!(%error, "a worker can't go on");
                    }
                    // Says that this worker has ended, also when it ended by a panic.
                    drop(alive);
                })?;
            threads.push(thread);
        }
        Ok(Self { threads, ended })
    }

    /// Returns when a worker has ended, which before a drain is a breakdown.
    pub(crate) async fn any_ended(&self) {
        let mut look = tokio::time::interval(Duration::from_millis(500));
        while !self.threads.iter().any(JoinHandle::is_finished) {
            look.tick().await;
        }
    }
}

/// One worker, from start to end.
fn work(
    node: &Node,
    listeners: Listeners,
    links: Links,
    mut phases: watch::Receiver<Phase>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())?;
    runtime.block_on(async {
        let worker = Worker::new(node);
        let (taking, taken) = watch::channel(Taking::Accept);
        let house = Rc::clone(&worker);
        tokio::task::spawn_local(async move { house.keep_house().await });
        tokio::task::spawn_local(Rc::clone(&worker).deliver());
        tokio::task::spawn_local(Rc::clone(&worker).call_for_plugins());
        let linking = links.run(Rc::clone(&worker), taken.clone());
        let linking = tokio::task::spawn_local(async move {
            if let Err(error) = linking.await {
                tracing::warn!(%error, "no links by QUIC; other proxies come by TCP");
            }
        });
        let accepting = tokio::task::spawn_local(listeners.run(Rc::clone(&worker), taken));
        reached(&mut phases, Phase::Asking).await;
        let end = match *phases.borrow() {
            Phase::Leaving => Taking::Leave,
            Phase::Serving | Phase::Asking | Phase::Closing => Taking::Close,
        };
        if end == Taking::Leave {
            taking.send_replace(end);
        }
        worker.begin_drain();
        // As soon as nobody is connected there is nobody to ask.
        let asked = async {
            while worker.busy() > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = asked => {}
            () = reached(&mut phases, Phase::Closing) => {}
        }
        taking.send_replace(end);
        // What it says of an error was logged where it happened.
        drop(accepting.await);
        worker.close_idle();
        while worker.busy() > 0 {
            tokio::time::sleep(LOOK).await;
            worker.close_idle();
        }
        // Other workers may have links yet, and the last packets of this one's are to be sent.
        drop(linking.await);
    });
    Ok(())
}

async fn reached(phases: &mut watch::Receiver<Phase>, phase: Phase) {
    // The sender lives until the workers have ended, so this is no error.
    drop(phases.wait_for(|now| *now >= phase).await);
}

/// Ends the workers: asks clients to go, then takes no more of them, which after a handover is so from the
/// beginning, then waits for what is under way, for `limit` in all.
pub(crate) async fn drain(phase: &watch::Sender<Phase>, workers: Workers, heir: Heir, limit: Duration) {
    let Workers { threads, mut ended } = workers;
    phase.send_replace(match heir {
        Heir::Nobody => Phase::Asking,
        Heir::Successor => Phase::Leaving,
    });
    let waiting = async {
        tokio::select! {
            _ = ended.recv() => {}
            () = tokio::time::sleep(ASKING.min(limit)) => {
                phase.send_replace(Phase::Closing);
                ended.recv().await;
            }
        }
    };
    if tokio::time::timeout(limit, waiting).await.is_err() {
        tracing::warn!(?limit, "requests are still under way; they are cut off");
        return;
    }
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a worker panicked");
        }
    }
}
