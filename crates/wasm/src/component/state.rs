//! What an instance holds beside its memory.

use super::bindings::fallback::leeward::plugin::{host, mesh, store, types};
use super::bindings::first::leeward::plugin::host as first;
use super::calls::Calls;
use super::names::Names;
use super::passing::Passing;
use super::pool::Brief;
use super::shelf::Shelves;
use super::stdio::{Output, Stream};
use super::waits::Waits;
use crate::call::{FailedCall, FlagValue};
use crate::clock::now;
use crate::log;
use crate::memory::Lease;
use crate::mesh::{CallError, MeshSender};
use crate::store::{Store, StoreError};
use crate::version::Shared;
use leeward_policy::model::Plugin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::Level;
use wasmtime::{Error, ResourceLimiter};
use wasmtime_wasi::{ResourceTable, WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{FieldMap, WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

/// The state of one instance.
pub(crate) struct State {
    pub(crate) plugin: Arc<str>,
    shared: Arc<Shared>,
    pub(crate) memory: Memory,
    pub(crate) waits: Arc<Waits>,
    pub(crate) calls: Calls,
    /// What the call under way is about.
    pub(crate) subject: Subject,
    pub(crate) names: Names,
    /// What the guest counted in this call.
    pub(crate) counts: Vec<(Box<str>, u64)>,
    output: Arc<Output>,
    table: ResourceTable,
    /// Made when the guest first asks for it; few do.
    wasi: Option<Box<WasiCtx>>,
    http: WasiHttpCtx,
}

/// What a call is about.
#[derive(Default)]
pub(crate) enum Subject {
    /// Nothing yet, or not this crate's to show.
    #[default]
    None,
    Failure(Box<FailedCall>),
    Passing(Box<Passing>),
}

/// Where counts go that found no room.
const OVERFLOW: &str = "overflow";
/// Core instances and tables that a component is made of. One from a linker has a handful to tie its parts together; what
/// Python is built as has some twenty.
const MAX_PARTS: usize = 64;
/// Bytes of an element of a table.
const ELEMENT: usize = 8;
/// Memories of a component.
const MAX_MEMORIES: usize = 8;
/// Handles that a guest may hold of what WASI has.
const MAX_HANDLES: usize = 512;
/// Those that it may keep from one call to the next, to be called once more.
const MAX_KEPT: usize = 16;
/// Random bytes that a guest gets at once.
const MAX_RANDOM: u64 = 64 << 10;
/// Bytes of the fields of one of `wasi:http`'s heads, as they are held.
const MAX_WASI_FIELDS: usize = 128 << 10;
/// Keys that are listed at once.
const MAX_KEYS: u32 = 1000;

impl State {
    pub(crate) fn new(
        plugin: &Arc<str>,
        spec: &Arc<Plugin>,
        shared: &Arc<Shared>,
        memory: Memory,
        mesh: MeshSender,
        now: Instant,
    ) -> Self {
        let waits = Arc::new(Waits::new(now));
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_HANDLES);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(MAX_WASI_FIELDS);
        Self {
            plugin: Arc::clone(plugin),
            shared: Arc::clone(shared),
            memory,
            calls: Calls::new(plugin, spec, mesh, &waits),
            waits,
            subject: Subject::None,
            names: Names::default(),
            counts: Vec::new(),
            output: Arc::new(Output::new(plugin)),
            table,
            wasi: None,
            http,
        }
    }

    /// A call begins.
    pub(crate) fn begin(&mut self, spec: &Plugin, brief: &Brief, began: Instant, until: Instant) {
        self.waits.begin(began, until, brief.deadline);
        self.calls.begin(brief);
        self.memory.begin();
        self.output.begin(spec.limits.log_lines);
    }

    /// It has ended: whatever it left of a line is one, and what it began is not gone on with.
    pub(crate) fn end(&mut self) {
        self.output.end();
        self.calls.end();
    }

    /// Whether the instance holds little beside its memory, so that it can be kept. A language's runtime keeps its standard
    /// streams.
    pub(crate) fn is_tidy(&mut self) -> bool {
        self.table.is_empty()
            || self.table.iter_mut().count() <= MAX_KEPT
                && !self.table.iter_mut().any(|entry| entry.is::<FieldMap>())
    }

    fn log(&self, level: Level, message: &str) {
        if self.output.take_line() {
            log::line(&self.plugin, level, message);
        }
    }

    fn count(&mut self, name: &str, by: u64) {
        let known = self.counts.iter().any(|(counted, _)| **counted == *name);
        let name = if known || self.shared.counters.admit(name) {
            name
        } else {
            OVERFLOW
        };
        match self.counts.iter_mut().find(|(counted, _)| **counted == *name) {
            Some((_, count)) => *count = count.saturating_add(by),
            None => self.counts.push((name.into(), by)),
        }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.shared.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Linear memory and tables of one instance.
pub(crate) struct Memory {
    limit: usize,
    used: usize,
    /// Elements that all tables together may have, and have.
    table_elements: usize,
    elements: usize,
    /// Its part of the process's memory; also held by who drops the instance, until after its store. Poison is
    /// harmless: what is counted is counted at once.
    lease: Arc<Mutex<Lease>>,
    /// Others' instances, which make room if nobody uses them.
    shelves: Arc<Shelves>,
    /// What was allowed last, of memory and of tables.
    last: usize,
    last_elements: usize,
    /// Growth was refused during this call: for the plugin's own limit...
    pub(crate) denied: bool,
    /// ...or for the process's.
    pub(crate) starved: bool,
}

impl Memory {
    pub(crate) fn new(spec: &Plugin, lease: Arc<Mutex<Lease>>, shelves: &Arc<Shelves>) -> Self {
        Self {
            limit: usize::try_from(spec.limits.memory_bytes).unwrap_or(usize::MAX),
            used: 0,
            table_elements: usize::try_from(spec.limits.table_elements).unwrap_or(usize::MAX),
            elements: 0,
            lease,
            shelves: Arc::clone(shelves),
            last: 0,
            last_elements: 0,
            denied: false,
            starved: false,
        }
    }

    pub(crate) const fn begin(&mut self) {
        (self.denied, self.starved) = (false, false);
    }

    /// What is held of the guest's outside of its memory counts as that; whoever holds it gives it back. `None` if the process
    /// has no more, nor anybody who could make room.
    pub(crate) fn extend(&self, bytes: usize) -> Option<Arc<Mutex<Lease>>> {
        while !self.lease().grow(bytes) {
            if !self.shelves.make_room() {
                return None;
            }
        }
        Some(Arc::clone(&self.lease))
    }

    fn lease(&self) -> MutexGuard<'_, Lease> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool, Error> {
        let more = desired.saturating_sub(current);
        let total = self.used.saturating_add(more);
        self.last = 0;
        if total > self.limit {
            self.denied = true;
            return Ok(false);
        }
        if self.extend(more).is_none() {
            self.starved = true;
            return Ok(false);
        }
        (self.used, self.last) = (total, more);
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _: Error) -> Result<(), Error> {
        // Refused further down: by the module's own maximum, the pool's, or the system. After a refusal of ours there is
        // nothing to take back.
        if self.last > 0 {
            self.lease().give_back(self.last);
            self.used = self.used.saturating_sub(self.last);
            self.denied = true;
        }
        self.last = 0;
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool, Error> {
        let more = desired.saturating_sub(current);
        let total = self.elements.saturating_add(more);
        self.last_elements = 0;
        if total > self.table_elements {
            self.denied = true;
            return Ok(false);
        }
        if self.extend(more.saturating_mul(ELEMENT)).is_none() {
            self.starved = true;
            return Ok(false);
        }
        (self.elements, self.last_elements) = (total, more);
        Ok(true)
    }

    fn table_grow_failed(&mut self, _: Error) -> Result<(), Error> {
        // As for memory.
        if self.last_elements > 0 {
            self.lease().give_back(self.last_elements.saturating_mul(ELEMENT));
            self.elements = self.elements.saturating_sub(self.last_elements);
            self.denied = true;
        }
        self.last_elements = 0;
        Ok(())
    }

    fn instances(&self) -> usize {
        MAX_PARTS
    }

    fn memories(&self) -> usize {
        MAX_MEMORIES
    }

    fn tables(&self) -> usize {
        MAX_PARTS
    }
}

/// Clocks and random numbers are real; of the rest there is nothing, and no socket can be made.
fn wasi(output: &Arc<Output>) -> WasiCtx {
    WasiCtx::builder()
        .stdout(Stream(Arc::clone(output)))
        .stderr(Stream(Arc::clone(output)))
        .max_random_size(MAX_RANDOM)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .build()
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let output = &self.output;
        WasiCtxView {
            ctx: self.wasi.get_or_insert_with(|| Box::new(wasi(output))),
            table: &mut self.table,
        }
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView {
            hooks: &mut self.calls,
            table: &mut self.table,
            ctx: &mut self.http,
        }
    }
}

impl types::Host for State {}

impl host::Host for State {
    fn log(&mut self, level: host::Level, message: String) -> Result<(), Error> {
        let level = match level {
            host::Level::Debug => Level::DEBUG,
            host::Level::Info => Level::INFO,
            host::Level::Warn => Level::WARN,
            host::Level::Error => Level::ERROR,
        };
        Self::log(self, level, &message);
        Ok(())
    }

    fn count(&mut self, name: String, by: u64) -> Result<(), Error> {
        Self::count(self, &name, by);
        Ok(())
    }

    fn time_left_us(&mut self) -> Result<u64, Error> {
        Ok(micros(self.waits.until().saturating_duration_since(now())))
    }

    fn flag(&mut self, key: String) -> Result<Option<host::FlagValue>, Error> {
        let value = match &self.subject {
            Subject::None => None,
            Subject::Failure(call) => {
                let (facts, cause) = (&call.facts, Some(call.cause));
                facts.flags.value(&key, facts, &call.head, cause)
            }
            Subject::Passing(passing) => {
                let facts = &passing.facts;
                facts.flags.value(&key, facts, &passing.request.head, None)
            }
        };
        Ok(value.map(|value| match value {
            FlagValue::Boolean(value) => host::FlagValue::Boolean(value),
            FlagValue::Text(value) => host::FlagValue::Text(value),
            FlagValue::Number(value) => host::FlagValue::Number(value),
            FlagValue::Structure(value) => host::FlagValue::Structure(value),
        }))
    }
}

impl first::Host for State {
    fn log(&mut self, level: first::Level, message: String) -> Result<(), Error> {
        let level = match level {
            first::Level::Debug => Level::DEBUG,
            first::Level::Info => Level::INFO,
            first::Level::Warn => Level::WARN,
            first::Level::Error => Level::ERROR,
        };
        Self::log(self, level, &message);
        Ok(())
    }

    fn count(&mut self, name: String, by: u64) -> Result<(), Error> {
        Self::count(self, &name, by);
        Ok(())
    }
}

impl store::Host for State {
    fn get(&mut self, key: String) -> Result<Option<Vec<u8>>, Error> {
        let kept = self.store().get(&key, now());
        Ok(kept.map(|(value, _)| value.to_vec()))
    }

    fn set(
        &mut self,
        key: String,
        value: Vec<u8>,
        ttl_ms: Option<u64>,
    ) -> Result<Result<(), store::StoreError>, Error> {
        let now = now();
        let kept = self
            .store()
            .set(&key, value.into(), expiry(ttl_ms, now), None, now);
        Ok(kept.map_err(Into::into))
    }

    fn delete(&mut self, key: String) -> Result<(), Error> {
        self.store().delete(&key);
        Ok(())
    }

    fn increment(
        &mut self,
        key: String,
        by: i64,
        ttl_ms: Option<u64>,
    ) -> Result<Result<i64, store::StoreError>, Error> {
        let now = now();
        let sum = self.store().increment(&key, by, expiry(ttl_ms, now), now);
        Ok(sum.map_err(Into::into))
    }

    fn keys(&mut self, prefix: String, limit: u32) -> Result<Vec<String>, Error> {
        let limit = usize::try_from(limit.min(MAX_KEYS)).unwrap_or_default();
        let keys = self.store().keys(&prefix, limit, now());
        Ok(keys.iter().map(ToString::to_string).collect())
    }
}

/// When what is kept so long goes; never, if that is further off than time goes.
fn expiry(ttl_ms: Option<u64>, now: Instant) -> Option<Instant> {
    now.checked_add(Duration::from_millis(ttl_ms?))
}

impl From<StoreError> for store::StoreError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotANumber => Self::NotANumber,
            // Components have no way to ask for an unchanged entry.
            StoreError::TooLarge | StoreError::Changed => Self::TooLarge,
        }
    }
}

impl mesh::Host for State {
    async fn send(&mut self, call: mesh::Call) -> Result<Result<types::Response, mesh::CallError>, Error> {
        let answer = self.calls.send(call).await;
        Ok(answer.map_err(Into::into))
    }
}

impl From<CallError> for mesh::CallError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::NotAllowed => Self::NotAllowed,
            CallError::Invalid => Self::Invalid,
            CallError::TooMany => Self::TooMany,
            CallError::Loop => Self::Loop,
            CallError::Timeout => Self::Timeout,
            CallError::Failed => Self::Failed,
            CallError::TooLarge => Self::TooLarge,
        }
    }
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Budget, Usage};
    use leeward_policy::model::{
        OnFault, PluginAccess, PluginFrom, PluginKind, PluginLimits, PluginSource, Quarantine,
    };

    fn spec() -> Plugin {
        Plugin {
            kind: PluginKind::Filter,
            source: PluginSource {
                from: PluginFrom::Store,
                sha256: None,
                minisign_key: None,
            },
            config: "".into(),
            limits: PluginLimits::of(PluginKind::Filter),
            access: PluginAccess::default(),
            on_fault: OnFault::FailOpen,
            quarantine: Quarantine::default(),
            fresh_instance: false,
            when: None,
            canary: None,
        }
    }

    fn memory(spec: &Plugin, budget: u64) -> (Memory, Arc<Usage>) {
        let usage = Arc::<Usage>::default();
        let lease = Lease::new(&Arc::new(Budget::new(budget)), &usage);
        let memory = Memory::new(spec, Arc::new(Mutex::new(lease)), &Arc::default());
        (memory, usage)
    }

    #[test]
    fn an_instance_that_keeps_much_is_not_kept() {
        let spec = Arc::new(spec());
        let shared = Arc::new(Shared::new("p", &spec));
        let mesh = tokio::sync::mpsc::unbounded_channel().0;
        let (memory, _) = memory(&spec, 1 << 30);
        let mut state = State::new(&"p".into(), &spec, &shared, memory, mesh, now());
        assert!(state.is_tidy());
        let mut streams = Vec::new();
        for _ in 0..MAX_KEPT {
            streams.push(state.table.push(0_u8).unwrap());
        }
        assert!(state.is_tidy());
        let more = state.table.push(0_u8).unwrap();
        assert!(!state.is_tidy());
        state.table.delete(more).unwrap();
        state.table.delete(streams.remove(0)).unwrap();
        assert!(state.is_tidy());
        state.table.push(FieldMap::new_mutable(9)).unwrap();
        assert!(!state.is_tidy(), "fields may be large");
    }

    #[test]
    fn tables_are_bounded_together_and_count_as_memory() {
        let mut spec = spec();
        spec.limits.table_elements = 100;
        let (mut memory, usage) = memory(&spec, 1 << 30);
        assert!(memory.table_growing(0, 60, None).unwrap());
        assert!(memory.table_growing(0, 30, None).unwrap());
        assert_eq!(usage.bytes(), 90 * 8);
        assert!(!memory.denied);
        assert!(!memory.table_growing(60, 71, None).unwrap());
        assert!(memory.denied);
        // Nothing was had, so that nothing is given back.
        memory.table_grow_failed(Error::msg("refused")).unwrap();
        assert_eq!(usage.bytes(), 90 * 8);
        assert!(memory.table_growing(60, 70, None).unwrap());
        memory.table_grow_failed(Error::msg("by the system")).unwrap();
        assert_eq!(usage.bytes(), 90 * 8);
        assert!(memory.table_growing(60, 70, None).unwrap());
        let (mut memory, _) = self::memory(&spec, 90 * 8);
        assert!(!memory.table_growing(0, 91, None).unwrap());
        assert!(memory.starved && !memory.denied);
    }
}
