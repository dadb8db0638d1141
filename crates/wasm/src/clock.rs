//! Time as guests notice it: a tick each millisecond, while there is a guest to notice it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use wasmtime::Engine;

/// How often a running guest looks whether its time is up.
const TICK: Duration = Duration::from_millis(1);

/// Ticks an engine while calls are under way. A proxy whose plugins have nothing to do pays nothing.
#[derive(Debug)]
pub(crate) struct Clock {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    // Poison is harmless: both fields are replaced in one assignment.
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug)]
struct State {
    calls: usize,
    ended: bool,
}

/// A call under way.
#[derive(Debug)]
pub(crate) struct Running(Arc<Shared>);

impl Clock {
    /// Starts the thread; it ends when the clock is dropped.
    pub(crate) fn start(engine: Engine) -> io::Result<Self> {
        let state = Mutex::new(State {
            calls: 0,
            ended: false,
        });
        let shared = Arc::new(Shared {
            state,
            wake: Condvar::new(),
        });
        let ticking = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("wasm-epoch".to_owned())
            .spawn(move || ticking.run(&engine))?;
        Ok(Self { shared })
    }

    /// The clock runs at least until what this returns is dropped.
    pub(crate) fn enter(&self) -> Running {
        self.shared.change(|state| state.calls += 1);
        Running(Arc::clone(&self.shared))
    }
}

impl Shared {
    fn run(&self, engine: &Engine) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.ended {
            state = if state.calls == 0 {
                self.wake.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else {
                engine.increment_epoch();
                self.wake
                    .wait_timeout(state, TICK)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            };
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = state.calls == 0;
        change(&mut state);
        if idle || state.ended {
            self.wake.notify_one();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.change(|state| state.calls = state.calls.saturating_sub(1));
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.shared.change(|state| state.ended = true);
    }
}
