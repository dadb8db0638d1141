//! What a virtual machine holds beside its memory, and what its guest may do that needs no more than that.

use super::abi::{self, Buffer, Map, Pair, Status, Version, Way};
use super::calls::Calls;
use super::context::{Context, Http};
use super::fields::{self, Change, Fields};
use super::shared::{Mark, Marked, MetricKind, Reader, Ready};
use crate::call::Reply;
use crate::component::{Memory as Limits, Waits};
use crate::log;
use crate::mesh::MeshSender;
use crate::version::Shared;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use leeward_policy::model::Plugin;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tracing::Level;
use wasmtime::Memory;
use wasmtime_wasi::random::WasiRandomCtx;

/// The state of a virtual machine.
pub(crate) struct State {
    pub(crate) plugin: Arc<str>,
    pub(crate) spec: Arc<Plugin>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) abi: Version,
    /// The guest's memory, once it is there.
    pub(crate) memory: Option<Memory>,
    pub(crate) limits: Limits,
    /// When the machine was started.
    pub(crate) began: Instant,
    /// The time of the call under way.
    pub(crate) waits: Arc<Waits>,
    pub(crate) contexts: HashMap<u32, Context, BuildHasherDefault<Numbers>>,
    /// Contexts that linger, and that their guest is done with since it was last looked.
    pub(crate) done: Vec<u32>,
    /// A root context wants to be called at other times.
    pub(crate) periods_changed: bool,
    pub(crate) calls: Calls,
    /// What a function has for the guest, on its way.
    pub(crate) handed: Handed,
    /// What is to be exported of metrics.
    pub(crate) marks: Vec<Mark>,
    /// Where a call is made that the guest is to be told of.
    pub(crate) ready: mpsc::Sender<Ready>,
    pub(crate) random: WasiRandomCtx,
    /// The context of the call under way.
    current: u32,
    /// The context that the guest acts for.
    effective: u32,
    /// The call under way starts the machine or a root context.
    pub(crate) starting: Starting,
    /// Log lines left in this call.
    lines: u32,
}

/// Which configuration can be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Starting {
    No,
    Machine,
    Root,
}

/// What a function has for the guest: it is asked for so much memory, and gets it there.
#[derive(Default)]
pub(crate) struct Handed {
    data: Bytes,
    /// What is short is copied to here, time and again, instead.
    short: Vec<u8>,
    /// Where to write the address.
    address_at: u32,
    /// Where to write the length.
    len_at: u32,
}

/// Hashes the numbers of contexts, which nobody but the host chooses.
#[derive(Default)]
pub(crate) struct Numbers(u64);

impl Hasher for Numbers {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u32(&mut self, number: u32) {
        // Fibonacci hashing: the table looks at the highest bits and at the lowest.
        self.0 = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Bytes of a body that a plugin may hold up where policy names no bound.
const DEFAULT_BODY: usize = 64 << 10;
/// Observations of histograms in one call; more are not exported.
const MAX_MARKS: usize = 256;
/// The shortest time between two ticks.
const MIN_PERIOD: Duration = Duration::from_millis(10);
/// Bytes of the body of a local reply.
const MAX_REPLY: usize = 1 << 20;

impl State {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is another thing that a machine has"
    )]
    pub(crate) fn new(
        plugin: &Arc<str>,
        spec: &Arc<Plugin>,
        shared: &Arc<Shared>,
        abi: Version,
        mesh: MeshSender,
        ready: mpsc::Sender<Ready>,
        limits: Limits,
        now: Instant,
    ) -> Self {
        Self {
            plugin: Arc::clone(plugin),
            spec: Arc::clone(spec),
            shared: Arc::clone(shared),
            abi,
            memory: None,
            limits,
            began: now,
            waits: Arc::new(Waits::new(now)),
            contexts: HashMap::default(),
            done: Vec::new(),
            periods_changed: false,
            calls: Calls::new(mesh),
            handed: Handed::default(),
            marks: Vec::new(),
            ready,
            random: WasiRandomCtx::default(),
            current: 0,
            effective: 0,
            starting: Starting::No,
            lines: 0,
        }
    }

    /// A call begins that is about a context.
    pub(crate) fn begin(&mut self, context: u32, began: Instant, until: Instant) {
        (self.current, self.effective) = (context, context);
        self.waits.begin(began, until, None);
        self.limits.begin();
        self.lines = self.spec.limits.log_lines;
    }

    /// It has ended well: what it changed holds.
    pub(crate) fn commit(&mut self) {
        for context in [self.current, self.effective] {
            if let Some(Context::Http(http)) = self.contexts.get_mut(&context) {
                http.commit();
            }
        }
    }

    /// Bytes of a body that can be held up.
    pub(crate) fn body_bound(&self) -> usize {
        match self.spec.limits.max_body_bytes {
            0 => DEFAULT_BODY,
            bytes => usize::try_from(bytes).unwrap_or(usize::MAX),
        }
    }

    /// The request that the guest acts for.
    pub(crate) fn http(&self) -> Option<&Http> {
        match self.contexts.get(&self.effective) {
            Some(Context::Http(http)) => Some(http),
            Some(Context::Root(_)) | None => None,
        }
    }

    /// The same, to be changed.
    pub(crate) fn http_mut(&mut self) -> Option<&mut Http> {
        match self.contexts.get_mut(&self.effective) {
            Some(Context::Http(http)) => Some(http),
            Some(Context::Root(_)) | None => None,
        }
    }

    /// The context that the guest acts for.
    pub(crate) const fn effective(&self) -> u32 {
        self.effective
    }

    /// The root context of what the guest acts for.
    pub(crate) fn root(&self) -> Option<u32> {
        match self.contexts.get(&self.effective) {
            Some(Context::Http(http)) => Some(http.root),
            Some(Context::Root(_)) => Some(self.effective),
            None => None,
        }
    }

    /// Has `data` for the guest: what the shim is to be answered.
    pub(crate) fn hand(
        &mut self,
        memory: &mut [u8],
        data: Bytes,
        address_at: u32,
        len_at: u32,
    ) -> Result<i32, Status> {
        self.handed.short.clear();
        self.handed.data = data;
        self.announce(memory, self.handed.data.len(), address_at, len_at)
    }

    /// Has the value of a field for the guest.
    pub(crate) fn hand_field(
        &mut self,
        memory: &mut [u8],
        field: (Map, u32, u32),
        address_at: u32,
        len_at: u32,
    ) -> Result<i32, Status> {
        let (map, name, name_len) = field;
        let mut short = std::mem::take(&mut self.handed.short);
        short.clear();
        let value = match self
            .map(map)
            .and_then(|fields| fields.value(abi::read(memory, name, name_len).ok()?))
        {
            Some(value) => Ok(value),
            None if self.abi == Version::V0_1_0 => Ok(&[][..]),
            None => Err(Status::NotFound),
        };
        let found = value.map(|value| short.extend_from_slice(value));
        self.handed.short = short;
        found?;
        self.announce(memory, self.handed.short.len(), address_at, len_at)
    }

    fn announce(
        &mut self,
        memory: &mut [u8],
        len: usize,
        address_at: u32,
        len_at: u32,
    ) -> Result<i32, Status> {
        if len == 0 {
            abi::write_u32(memory, address_at, 0)?;
            abi::write_u32(memory, len_at, 0)?;
            return Ok(0);
        }
        (self.handed.address_at, self.handed.len_at) = (address_at, len_at);
        let len = i32::try_from(len).map_err(|_| Status::InternalFailure)?;
        Ok(-len)
    }

    /// The guest has memory for it.
    pub(crate) fn deliver(&mut self, memory: &mut [u8], address: u32) -> Result<(), Status> {
        if address == 0 {
            return Err(Status::InvalidMemoryAccess);
        }
        let data = std::mem::take(&mut self.handed.data);
        let bytes = if self.handed.short.is_empty() {
            &data[..]
        } else {
            &self.handed.short
        };
        abi::write(memory, address, bytes)?;
        abi::write_u32(memory, self.handed.address_at, address)?;
        let len = u32::try_from(bytes.len()).map_err(|_| Status::InternalFailure)?;
        abi::write_u32(memory, self.handed.len_at, len)
    }

    /// A line of the guest's.
    pub(crate) fn log(&mut self, level: Level, text: &[u8]) {
        if let Some(left) = self.lines.checked_sub(1) {
            self.lines = left;
            // A character may be cut in two at the end: that is a replacement character.
            let text = text.get(..log::MAX_LINE).unwrap_or(text);
            log::line(&self.plugin, level, &String::from_utf8_lossy(text));
        }
    }

    pub(crate) fn set_effective(&mut self, context: u32) -> Result<(), Status> {
        if !self.contexts.contains_key(&context) {
            return Err(Status::BadArgument);
        }
        if let Some(http) = self.http_mut() {
            http.commit();
        }
        self.effective = context;
        Ok(())
    }

    pub(crate) fn set_period(&mut self, milliseconds: u32) -> Result<(), Status> {
        let root = self.root().ok_or(Status::BadArgument)?;
        if let Some(Context::Root(root)) = self.contexts.get_mut(&root) {
            let period = Duration::from_millis(milliseconds.into()).max(MIN_PERIOD);
            root.period = (milliseconds > 0).then_some(period);
            root.period_changed = true;
            self.periods_changed = true;
        }
        Ok(())
    }

    /// The guest is done with a request that is over.
    pub(crate) fn done(&mut self) -> Result<(), Status> {
        let context = self.effective;
        let http = self.http_mut().filter(|http| http.lingers);
        http.ok_or(Status::NotFound)?.lingers = false;
        self.done.push(context);
        Ok(())
    }

    /// The guest lets a message go.
    pub(crate) fn go_on(&mut self, way: Way) -> Result<(), Status> {
        let http = self.http_mut().ok_or(Status::BadArgument)?;
        http.way(way).go = true;
        http.wake();
        Ok(())
    }

    /// The guest has an answer of its own.
    pub(crate) fn reply(
        &mut self,
        status: u32,
        body: &[u8],
        headers: &[Pair<'_>],
        grpc_status: i32,
    ) -> Result<(), Status> {
        let mut reply = Reply {
            status: fields::status(status).ok_or(Status::BadArgument)?,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            grpc_status: None,
        };
        if body.len() > MAX_REPLY {
            return Err(Status::BadArgument);
        }
        let mut map = fields::FieldsMut::Plain(&mut reply.headers);
        map.set_all(headers, &mut Vec::new())?;
        let http = self.http_mut().ok_or(Status::BadArgument)?;
        if http.request.as_ref().is_some_and(super::grpc::is_call) {
            super::grpc::reply(&mut reply, body, u32::try_from(grpc_status).ok());
        } else {
            reply.body = Bytes::copy_from_slice(body);
        }
        // Of several the first is given.
        http.reply.get_or_insert_with(|| Box::new(reply));
        http.wake();
        Ok(())
    }

    /// The guest wants a request broken off.
    pub(crate) fn close(&mut self) -> Result<(), Status> {
        let http = self.http_mut().ok_or(Status::BadArgument)?;
        http.reply = Some(Box::new(Reply {
            status: StatusCode::BAD_GATEWAY,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            grpc_status: None,
        }));
        http.wake();
        Ok(())
    }

    /// A map that can be read; `None` if there is none now.
    pub(crate) fn map(&self, map: Map) -> Option<Fields<'_>> {
        let heard = &self.calls.heard;
        match map {
            Map::Headers(Way::Request) => self.http()?.request.as_ref().map(Fields::Request),
            Map::Headers(Way::Response) => self.http()?.response.as_ref().map(Into::into),
            Map::Trailers(way) => self.http()?.passing(way).trailers.as_ref().map(Fields::Plain),
            Map::GrpcInitial => heard.initial.as_ref().map(Fields::Plain),
            Map::GrpcTrailing => heard.trailing.as_ref().map(Fields::Plain),
            Map::CallHeaders => {
                let head = heard.head.as_ref();
                head.map(|(status, headers)| Fields::Response(status, headers))
            }
            Map::CallTrailers => heard.trailers.as_ref().map(Fields::Plain),
        }
    }

    /// Changes a field of a map.
    pub(crate) fn change_field(&mut self, map: Map, name: &[u8], change: Change<'_>) -> Result<(), Status> {
        self.change_map(map, |fields, undo| fields.change(name, change, undo))
    }

    /// Has these fields in a map, and no others.
    pub(crate) fn set_fields(&mut self, map: Map, pairs: &[Pair<'_>]) -> Result<(), Status> {
        self.change_map(map, |fields, undo| fields.set_all(pairs, undo))
    }

    fn change_map(
        &mut self,
        map: Map,
        change: impl FnOnce(&mut fields::FieldsMut<'_>, &mut Vec<fields::Undo>) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let http = self.http_mut().ok_or(Status::BadArgument)?;
        match map {
            Map::Headers(way) => {
                let (mut head, undo) = http.head_mut(way).ok_or(Status::BadArgument)?;
                change(&mut head, undo)
            }
            Map::Trailers(way) => {
                let trailers = http.way(way).trailers.as_mut().ok_or(Status::BadArgument)?;
                // Trailers of a call that fails are lost with it.
                change(&mut fields::FieldsMut::Plain(trailers), &mut Vec::new())
            }
            Map::GrpcInitial | Map::GrpcTrailing | Map::CallHeaders | Map::CallTrailers => {
                Err(Status::BadArgument)
            }
        }
    }

    /// Bytes of a buffer that can be read, up to `max` from `start` on.
    pub(crate) fn buffer(&self, buffer: Buffer, start: usize, max: usize) -> Result<Bytes, Status> {
        let piece = |data: &Bytes| {
            let rest = data.len().checked_sub(start)?;
            Some(data.slice(start..start + max.min(rest)))
        };
        let text = |text: &str| {
            let rest = text.as_bytes().get(start..)?;
            Some(Bytes::copy_from_slice(rest.get(..max).unwrap_or(rest)))
        };
        let heard = &self.calls.heard;
        let found = match buffer {
            Buffer::Body(way) => self
                .shown_body(way)
                .map(|http| http.passing(way).body.piece(start, max)),
            Buffer::CallBody => heard.body.as_ref().map(piece),
            Buffer::GrpcMessage => heard.message.as_ref().map(piece),
            Buffer::VmConfig => Some(text(&self.spec.config)),
            Buffer::PluginConfig => self.plugin_config().map(text),
            Buffer::None => None,
        };
        found.ok_or(Status::NotFound)?.ok_or(Status::BadArgument)
    }

    /// How many bytes a buffer has.
    pub(crate) fn buffer_len(&self, buffer: Buffer) -> Result<usize, Status> {
        let heard = &self.calls.heard;
        let found = match buffer {
            Buffer::Body(way) => self.shown_body(way).map(|http| http.passing(way).body.len()),
            Buffer::CallBody => heard.body.as_ref().map(Bytes::len),
            Buffer::GrpcMessage => heard.message.as_ref().map(Bytes::len),
            Buffer::VmConfig => Some(self.spec.config.len()),
            Buffer::PluginConfig => self.plugin_config().map(str::len),
            Buffer::None => None,
        };
        found.ok_or(Status::NotFound)
    }

    /// Changes a body.
    pub(crate) fn change_buffer(
        &mut self,
        buffer: Buffer,
        start: usize,
        len: usize,
        value: &[u8],
    ) -> Result<(), Status> {
        let Buffer::Body(way) = buffer else {
            return Err(match self.buffer_len(buffer) {
                // It is there to be read.
                Ok(_) => Status::BadArgument,
                Err(status) => status,
            });
        };
        let bound = self.body_bound();
        let http = self.http_mut().filter(|http| http.passing(way).shown);
        let body = &mut http.ok_or(Status::NotFound)?.way(way).body;
        body.replace(start, len, value, bound)
    }

    fn shown_body(&self, way: Way) -> Option<&Http> {
        self.http().filter(|http| http.passing(way).shown)
    }

    /// The configuration of the root context, while that is being made.
    fn plugin_config(&self) -> Option<&str> {
        match (self.starting, self.contexts.get(&self.current)) {
            (Starting::Root, Some(Context::Root(root))) => Some(&root.config),
            (Starting::Root | Starting::Machine | Starting::No, _) => None,
        }
    }

    /// What version 0.1.0 has one function for: the configuration of what is being made.
    pub(crate) fn configuration(&self) -> Bytes {
        let config = self.plugin_config().unwrap_or(&self.spec.config);
        Bytes::copy_from_slice(config.as_bytes())
    }

    pub(crate) fn kept(&self, key: &[u8], now: Instant) -> Result<(Bytes, u32), Status> {
        let key = str::from_utf8(key).map_err(|_| Status::NotFound)?;
        let mut store = self.shared.store.lock().unwrap_or_else(PoisonError::into_inner);
        store.get(key, now).ok_or(Status::NotFound)
    }

    /// Keeps a value; an empty one is kept as such.
    pub(crate) fn keep(&self, key: &[u8], value: &[u8], change: u32, now: Instant) -> Result<(), Status> {
        let key = str::from_utf8(key).map_err(|_| Status::BadArgument)?;
        let change = (change != 0).then_some(change);
        let mut store = self.shared.store.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = store.set(key, Bytes::copy_from_slice(value), None, change, now);
        kept.map_err(|error| match error {
            crate::store::StoreError::Changed => Status::CasMismatch,
            crate::store::StoreError::TooLarge | crate::store::StoreError::NotANumber => {
                Status::InternalFailure
            }
        })
    }

    pub(crate) fn register_queue(&self, name: &[u8]) -> Result<u32, Status> {
        let name = str::from_utf8(name).map_err(|_| Status::BadArgument)?;
        let reader = Reader {
            root: self.root().ok_or(Status::BadArgument)?,
            ready: self.ready.clone(),
        };
        self.shared.proxy_wasm.queues().register(name, reader)
    }

    pub(crate) fn resolve_queue(&self, name: &[u8]) -> Result<u32, Status> {
        let name = str::from_utf8(name).map_err(|_| Status::NotFound)?;
        self.shared.proxy_wasm.queues().resolve(name)
    }

    pub(crate) fn enqueue(&mut self, queue: u32, item: &[u8]) -> Result<(), Status> {
        let limits = &self.spec.limits;
        let item = Bytes::copy_from_slice(item);
        let dropped =
            self.shared
                .proxy_wasm
                .queues()
                .enqueue(queue, item, limits.store_bytes, limits.store_entries)?;
        if dropped > 0 {
            self.mark(Mark {
                name: "queue_dropped".into(),
                what: Marked::Count(dropped),
            });
        }
        Ok(())
    }

    pub(crate) fn dequeue(&self, queue: u32) -> Result<Bytes, Status> {
        self.shared.proxy_wasm.queues().dequeue(queue)
    }

    pub(crate) fn define_metric(&self, kind: u32, name: &[u8]) -> Result<u32, Status> {
        let kind = MetricKind::of(kind)?;
        self.shared.proxy_wasm.metrics().define(kind, name)
    }

    pub(crate) fn increment_metric(&mut self, metric: u32, by: i64) -> Result<(), Status> {
        let mark = self.shared.proxy_wasm.metrics().increment(metric, by)?;
        self.mark(mark);
        Ok(())
    }

    pub(crate) fn record_metric(&mut self, metric: u32, value: u64) -> Result<(), Status> {
        let mark = self.shared.proxy_wasm.metrics().record(metric, value)?;
        self.mark(mark);
        Ok(())
    }

    pub(crate) fn metric(&self, metric: u32) -> Result<u64, Status> {
        self.shared.proxy_wasm.metrics().value(metric)
    }

    fn mark(&mut self, mark: Mark) {
        let same = |known: &&mut Mark| known.name == mark.name;
        match (
            mark.what,
            self.marks.iter_mut().find(same).map(|known| &mut known.what),
        ) {
            (Marked::Count(by), Some(Marked::Count(count))) => *count = count.saturating_add(by),
            (Marked::Gauge(value), Some(Marked::Gauge(known))) => *known = value,
            (Marked::Count(_) | Marked::Gauge(_) | Marked::Observe(_), _) => {
                if self.marks.len() < MAX_MARKS {
                    self.marks.push(mark);
                }
            }
        }
    }
}
