//! The functions of the host: from the guest's memory to [`State`], and back.

use super::abi::{self, Buffer, Map, Status, Way, answer};
use super::fields::Change;
use super::properties::unix_nanos;
use super::state::State;
use super::wasi;
use crate::clock::now;
use tracing::Level;
use tracing::level_filters::LevelFilter;
use wasmtime::{Caller, Error, Linker};

/// Where the ABI's functions are imported from.
pub(crate) const ENV: &str = "env";
/// Where the shim's are.
pub(crate) const HOST: &str = "host";

/// The function's way to the memory of its guest, and to its state.
pub(crate) fn guest<R>(
    caller: &mut Caller<'_, State>,
    call: impl FnOnce(&mut [u8], &mut State) -> Result<R, Status>,
) -> Result<R, Status> {
    let memory = caller.data().memory.ok_or(Status::InvalidMemoryAccess)?;
    let (memory, state) = memory.data_and_store_mut(caller);
    call(memory, state)
}

/// Defines a function that answers with a status.
macro_rules! define {
    ($linker:ident, $name:literal, |$memory:ident, $state:ident $(, $arg:ident: $ty:ty)*| $body:expr) => {
        $linker.func_wrap(ENV, $name, |mut caller: Caller<'_, State> $(, $arg: $ty)*| {
            answer(guest(&mut caller, |$memory, $state| $body))
        })?;
    };
}

/// Defines a function that has data for the guest; the shim calls it.
macro_rules! hand {
    ($linker:ident, $name:literal, |$memory:ident, $state:ident $(, $arg:ident: $ty:ty)*| $body:expr) => {
        $linker.func_wrap(HOST, $name, |mut caller: Caller<'_, State> $(, $arg: $ty)*| -> i32 {
            guest(&mut caller, |$memory, $state| $body).unwrap_or_else(|status| status as i32)
        })?;
    };
}

/// Everything that a guest can import, but for what the shim has.
pub(crate) fn define(linker: &mut Linker<State>) -> Result<(), Error> {
    wasi::define(linker)?;
    define_runtime(linker)?;
    define_context(linker)?;
    define_messages(linker)?;
    define_calls(linker)?;
    define_shared(linker)?;
    define_handed(linker)
}

/// What compilers have their modules import beside the ABI.
fn define_runtime(linker: &mut Linker<State>) -> Result<(), Error> {
    linker.func_wrap(ENV, "emscripten_notify_memory_growth", |_: u32| {})?;
    linker.func_wrap(ENV, "pthread_equal", |left: u32, right: u32| {
        u32::from(left == right)
    })?;
    // AssemblyScript's way to end: message, file, line and column.
    linker.func_wrap(
        ENV,
        "abort",
        |_: u32, _: u32, line: u32, column: u32| -> Result<(), Error> {
            Err(Error::msg(format!(
                "the guest gave up in line {line}, column {column}"
            )))
        },
    )?;
    Ok(())
}

fn define_context(linker: &mut Linker<State>) -> Result<(), Error> {
    define!(linker, "proxy_log", |memory,
                                  state,
                                  level: u32,
                                  at: u32,
                                  len: u32| {
        let level = match level {
            0 => Level::TRACE,
            1 => Level::DEBUG,
            2 => Level::INFO,
            3 => Level::WARN,
            4 | 5 => Level::ERROR,
            _ => return Err(Status::BadArgument),
        };
        state.log(level, abi::read(memory, at, len)?);
        Ok(())
    });
    define!(linker, "proxy_get_log_level", |memory, _state, at: u32| {
        let level = match LevelFilter::current().into_level() {
            Some(Level::TRACE) => 0,
            Some(Level::DEBUG) => 1,
            Some(Level::INFO) => 2,
            Some(Level::WARN) => 3,
            Some(Level::ERROR) => 4,
            None => 5,
        };
        abi::write_u32(memory, at, level)
    });
    define!(
        linker,
        "proxy_get_current_time_nanoseconds",
        |memory, _state, at: u32| { abi::write_u64(memory, at, unix_nanos()) }
    );
    define!(
        linker,
        "proxy_set_tick_period_milliseconds",
        |_memory, state, milliseconds: u32| { state.set_period(milliseconds) }
    );
    define!(
        linker,
        "proxy_set_effective_context",
        |_memory, state, context: u32| { state.set_effective(context) }
    );
    define!(linker, "proxy_done", |_memory, state| state.done());
    define!(
        linker,
        "proxy_set_property",
        |memory, state, path: u32, path_len: u32, value: u32, value_len: u32| {
            let path = abi::read(memory, path, path_len)?;
            state.set_property(path, abi::read(memory, value, value_len)?)
        }
    );
    define!(
        linker,
        "proxy_call_foreign_function",
        |memory,
         _state,
         name: u32,
         len: u32,
         arguments: u32,
         arguments_len: u32,
         _result: u32,
         _result_len: u32| {
            abi::read(memory, name, len)?;
            abi::read(memory, arguments, arguments_len)?;
            // There are none. Never a success without a result: guests trust it.
            Err(Status::NotFound)
        }
    );
    Ok(())
}

fn define_messages(linker: &mut Linker<State>) -> Result<(), Error> {
    define!(linker, "proxy_continue_stream", |_memory, state, stream: u32| {
        state.go_on(Way::of_stream(stream)?)
    });
    define!(linker, "proxy_continue_request", |_memory, state| state
        .go_on(Way::Request));
    define!(linker, "proxy_continue_response", |_memory, state| state
        .go_on(Way::Response));
    define!(linker, "proxy_close_stream", |_memory, state, stream: u32| {
        // Either way it is the client that is told.
        Way::of_stream(stream)?;
        state.close()
    });
    // Routes are chosen before plugins are asked.
    define!(linker, "proxy_clear_route_cache", |_memory, _state| Ok(()));
    linker.func_wrap(ENV, "proxy_send_local_response", send_local_response)?;
    define!(
        linker,
        "proxy_get_header_map_size",
        |memory, state, map: u32, at: u32| {
            let fields = state.map(Map::of(map)?).ok_or(Status::BadArgument)?;
            let size = abi::serialized_size(fields.pairs().into_iter());
            abi::write_u32(memory, at, u32::try_from(size).unwrap_or(u32::MAX))
        }
    );
    define!(
        linker,
        "proxy_set_header_map_pairs",
        |memory, state, map: u32, at: u32, len: u32| {
            let pairs = abi::parse(abi::read(memory, at, len)?)?;
            state.set_fields(Map::of(map)?, &pairs)
        }
    );
    define!(
        linker,
        "proxy_add_header_map_value",
        |memory, state, map: u32, name: u32, name_len: u32, value: u32, value_len: u32| {
            let (name, value) = (
                abi::read(memory, name, name_len)?,
                abi::read(memory, value, value_len)?,
            );
            state.change_field(Map::of(map)?, name, Change::Add(value))
        }
    );
    define!(
        linker,
        "proxy_replace_header_map_value",
        |memory, state, map: u32, name: u32, name_len: u32, value: u32, value_len: u32| {
            let (name, value) = (
                abi::read(memory, name, name_len)?,
                abi::read(memory, value, value_len)?,
            );
            state.change_field(Map::of(map)?, name, Change::Replace(value))
        }
    );
    define!(
        linker,
        "proxy_remove_header_map_value",
        |memory, state, map: u32, name: u32, name_len: u32| {
            let name = abi::read(memory, name, name_len)?;
            state.change_field(Map::of(map)?, name, Change::Remove)
        }
    );
    define!(
        linker,
        "proxy_get_buffer_status",
        |memory, state, buffer: u32, len_at: u32, flags_at: u32| {
            let len = state.buffer_len(Buffer::of(buffer)?)?;
            abi::write_u32(memory, len_at, u32::try_from(len).unwrap_or(u32::MAX))?;
            abi::write_u32(memory, flags_at, 0)
        }
    );
    define!(
        linker,
        "proxy_set_buffer_bytes",
        |memory, state, buffer: u32, start: u32, len: u32, value: u32, value_len: u32| {
            let value = abi::read(memory, value, value_len)?;
            state.change_buffer(Buffer::of(buffer)?, start as usize, len as usize, value)
        }
    );
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "it is the ABI's")]
fn send_local_response(
    mut caller: Caller<'_, State>,
    status: u32,
    details: u32,
    details_len: u32,
    body: u32,
    body_len: u32,
    headers: u32,
    headers_len: u32,
    grpc_status: i32,
) -> i32 {
    answer(guest(&mut caller, |memory, state| {
        abi::read(memory, details, details_len)?;
        let body = abi::read(memory, body, body_len)?;
        let headers = abi::parse(abi::read(memory, headers, headers_len)?)?;
        state.reply(status, body, &headers, grpc_status)
    }))
}

fn define_calls(linker: &mut Linker<State>) -> Result<(), Error> {
    linker.func_wrap(ENV, "proxy_http_call", http_call)?;
    linker.func_wrap(ENV, "proxy_grpc_call", grpc_call)?;
    linker.func_wrap(ENV, "proxy_grpc_stream", grpc_stream)?;
    define!(
        linker,
        "proxy_grpc_send",
        |memory, state, number: u32, at: u32, len: u32, end: u32| {
            state.send_message(number, abi::read(memory, at, len)?, end != 0)
        }
    );
    define!(linker, "proxy_grpc_cancel", |_memory, state, number: u32| state
        .cancel(number));
    define!(linker, "proxy_grpc_close", |_memory, state, number: u32| state
        .close_call(number));
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "it is the ABI's")]
fn http_call(
    mut caller: Caller<'_, State>,
    upstream: u32,
    upstream_len: u32,
    headers: u32,
    headers_len: u32,
    body: u32,
    body_len: u32,
    trailers: u32,
    trailers_len: u32,
    timeout_ms: u32,
    number_at: u32,
) -> i32 {
    answer(guest(&mut caller, |memory, state| {
        // Before anything is sent: it can be written to.
        abi::write_u32(memory, number_at, 0)?;
        // Read for what the ABI asks; the mesh sends none.
        abi::parse(abi::read(memory, trailers, trailers_len)?)?;
        let headers = abi::parse(abi::read(memory, headers, headers_len)?)?;
        let upstream = abi::read(memory, upstream, upstream_len)?;
        let body = abi::read(memory, body, body_len)?;
        let number = state.call_http(upstream, &headers, body, timeout_ms, now())?;
        abi::write_u32(memory, number_at, number)
    }))
}

#[expect(clippy::too_many_arguments, reason = "it is the ABI's")]
fn grpc_call(
    mut caller: Caller<'_, State>,
    upstream: u32,
    upstream_len: u32,
    service: u32,
    service_len: u32,
    method: u32,
    method_len: u32,
    metadata: u32,
    metadata_len: u32,
    message: u32,
    message_len: u32,
    timeout_ms: u32,
    number_at: u32,
) -> i32 {
    answer(guest(&mut caller, |memory, state| {
        abi::write_u32(memory, number_at, 0)?;
        let metadata = abi::parse(abi::read(memory, metadata, metadata_len)?)?;
        let upstream = abi::read(memory, upstream, upstream_len)?;
        let called = (
            abi::read(memory, service, service_len)?,
            abi::read(memory, method, method_len)?,
        );
        let message = abi::read(memory, message, message_len)?;
        let number = state.call_grpc(upstream, called, &metadata, message, timeout_ms, now())?;
        abi::write_u32(memory, number_at, number)
    }))
}

#[expect(clippy::too_many_arguments, reason = "it is the ABI's")]
fn grpc_stream(
    mut caller: Caller<'_, State>,
    upstream: u32,
    upstream_len: u32,
    service: u32,
    service_len: u32,
    method: u32,
    method_len: u32,
    metadata: u32,
    metadata_len: u32,
    number_at: u32,
) -> i32 {
    answer(guest(&mut caller, |memory, state| {
        abi::write_u32(memory, number_at, 0)?;
        let metadata = abi::parse(abi::read(memory, metadata, metadata_len)?)?;
        let upstream = abi::read(memory, upstream, upstream_len)?;
        let called = (
            abi::read(memory, service, service_len)?,
            abi::read(memory, method, method_len)?,
        );
        let number = state.open_stream(upstream, called, &metadata, now())?;
        abi::write_u32(memory, number_at, number)
    }))
}

fn define_shared(linker: &mut Linker<State>) -> Result<(), Error> {
    define!(
        linker,
        "proxy_set_shared_data",
        |memory, state, key: u32, key_len: u32, value: u32, value_len: u32, change: u32| {
            let (key, value) = (
                abi::read(memory, key, key_len)?,
                abi::read(memory, value, value_len)?,
            );
            state.keep(key, value, change, now())
        }
    );
    define!(
        linker,
        "proxy_register_shared_queue",
        |memory, state, name: u32, len: u32, at: u32| {
            abi::write_u32(memory, at, 0)?;
            let queue = state.register_queue(abi::read(memory, name, len)?)?;
            abi::write_u32(memory, at, queue)
        }
    );
    define!(
        linker,
        "proxy_resolve_shared_queue",
        |memory, state, vm: u32, vm_len: u32, name: u32, len: u32, at: u32| {
            // A plugin has its queues to itself, so that it doesn't matter what it calls its machine.
            abi::read(memory, vm, vm_len)?;
            let queue = state.resolve_queue(abi::read(memory, name, len)?)?;
            abi::write_u32(memory, at, queue)
        }
    );
    define!(
        linker,
        "proxy_enqueue_shared_queue",
        |memory, state, queue: u32, at: u32, len: u32| { state.enqueue(queue, abi::read(memory, at, len)?) }
    );
    define!(
        linker,
        "proxy_define_metric",
        |memory, state, kind: u32, name: u32, len: u32, at: u32| {
            let metric = state.define_metric(kind, abi::read(memory, name, len)?)?;
            abi::write_u32(memory, at, metric)
        }
    );
    define!(
        linker,
        "proxy_increment_metric",
        |_memory, state, metric: u32, by: i64| { state.increment_metric(metric, by) }
    );
    define!(
        linker,
        "proxy_record_metric",
        |_memory, state, metric: u32, value: u64| { state.record_metric(metric, value) }
    );
    define!(
        linker,
        "proxy_get_metric",
        |memory, state, metric: u32, at: u32| { abi::write_u64(memory, at, state.metric(metric)?) }
    );
    Ok(())
}

fn define_handed(linker: &mut Linker<State>) -> Result<(), Error> {
    hand!(linker, "deliver", |memory, state, address: u32| {
        state.deliver(memory, address).map(|()| 0)
    });
    hand!(
        linker,
        "proxy_get_configuration",
        |memory, state, at: u32, len_at: u32| {
            let config = state.configuration();
            state.hand(memory, config, at, len_at)
        }
    );
    hand!(
        linker,
        "proxy_get_header_map_pairs",
        |memory, state, map: u32, at: u32, len_at: u32| {
            let fields = state.map(Map::of(map)?);
            let pairs = fields.map(|fields| abi::serialize(fields.pairs().into_iter()));
            state.hand(memory, pairs.unwrap_or_default().into(), at, len_at)
        }
    );
    hand!(
        linker,
        "proxy_dequeue_shared_queue",
        |memory, state, queue: u32, at: u32, len_at: u32| {
            let item = state.dequeue(queue)?;
            state.hand(memory, item, at, len_at)
        }
    );
    hand!(
        linker,
        "proxy_get_status",
        |memory, state, status_at: u32, at: u32, len_at: u32| {
            abi::write_u32(memory, status_at, state.calls.heard.status)?;
            let message = state.calls.heard.status_message.clone();
            state.hand(memory, message, at, len_at)
        }
    );
    hand!(
        linker,
        "proxy_get_property",
        |memory, state, path: u32, len: u32, at: u32, len_at: u32| {
            let value = state.property(abi::read(memory, path, len)?, now())?;
            state.hand(memory, value, at, len_at)
        }
    );
    hand!(
        linker,
        "proxy_get_header_map_value",
        |memory, state, map: u32, name: u32, len: u32, at: u32, len_at: u32| {
            abi::read(memory, name, len)?;
            state.hand_field(memory, (Map::of(map)?, name, len), at, len_at)
        }
    );
    hand!(
        linker,
        "proxy_get_buffer_bytes",
        |memory, state, buffer: u32, start: u32, max: u32, at: u32, len_at: u32| {
            let buffer = Buffer::of(buffer)?;
            // Where a buffer is nothing, its end is said to be nowhere.
            start.checked_add(max).ok_or(Status::BadArgument)?;
            let bytes = state.buffer(buffer, start as usize, max as usize)?;
            state.hand(memory, bytes, at, len_at)
        }
    );
    hand!(
        linker,
        "proxy_get_shared_data",
        |memory, state, key: u32, len: u32, at: u32, len_at: u32, change_at: u32| {
            let (value, change) = state.kept(abi::read(memory, key, len)?, now())?;
            abi::write_u32(memory, change_at, change)?;
            state.hand(memory, value, at, len_at)
        }
    );
    Ok(())
}
