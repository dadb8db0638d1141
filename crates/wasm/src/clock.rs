//! Time as guests notice it: a tick each millisecond, while there is a guest to notice it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use wasmtime::Engine;

/// How often a running guest looks whether its time is up.
const TICK: Duration = Duration::from_millis(1);
/// Ticks without a call until the clock rests. To wake it costs more than a short call does.
const PATIENCE: u32 = 200;

/// What the time is.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Ticks an engine while calls are under way. A proxy whose plugins have nothing to do pays nothing.
#[derive(Debug)]
pub(crate) struct Clock {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Calls under way.
    calls: AtomicUsize,
    /// The clock rests, and wants to be told of a call.
    rests: AtomicBool,
    // Poison is harmless: it is one word.
    ended: Mutex<bool>,
    wake: Condvar,
}

/// A call under way.
#[derive(Debug)]
pub(crate) struct Running<'a>(&'a Shared);

impl Clock {
    /// Starts the thread; it ends when the clock is dropped.
    pub(crate) fn start(engine: Engine) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            calls: AtomicUsize::new(0),
            rests: AtomicBool::new(false),
            ended: Mutex::new(false),
            wake: Condvar::new(),
        });
        let ticking = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("wasm-epoch".to_owned())
            .spawn(move || ticking.run(&engine))?;
        Ok(Self { shared })
    }

    /// The clock runs at least until what this returns is dropped.
    pub(crate) fn enter(&self) -> Running<'_> {
        // In one order with what the clock does before it rests: one of the two sees the other.
        self.shared.calls.fetch_add(1, Ordering::SeqCst);
        if self.shared.rests.load(Ordering::SeqCst) {
            let _ended = self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_one();
        }
        Running(&self.shared)
    }
}

impl Shared {
    fn run(&self, engine: &Engine) {
        let mut idle = 0;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ended {
            if self.calls.load(Ordering::Relaxed) > 0 {
                engine.increment_epoch();
                idle = 0;
            } else {
                idle += 1;
            }
            ended = if idle < PATIENCE {
                let waited = self.wake.wait_timeout(ended, TICK);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                idle = 0;
                self.rest(ended)
            };
        }
    }

    /// Waits for a call.
    fn rest<'a>(&'a self, ended: MutexGuard<'a, bool>) -> MutexGuard<'a, bool> {
        self.rests.store(true, Ordering::SeqCst);
        let nothing = |ended: &mut bool| !*ended && self.calls.load(Ordering::SeqCst) == 0;
        let waited = self.wake.wait_while(ended, nothing);
        self.rests.store(false, Ordering::SeqCst);
        waited.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        *self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.wake.notify_one();
    }
}
