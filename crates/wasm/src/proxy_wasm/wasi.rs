//! WASI, preview 1: what a language's runtime wants to find, with nothing behind it that reaches the node. The clocks run,
//! random numbers are random, standard output and error are the log; there are no files, sockets, arguments or environment.

use super::abi::{self, Status};
use super::imports::guest;
use super::properties::unix_nanos;
use super::state::State;
use crate::clock::now;
use std::time::Duration;
use tracing::Level;
use wasmtime::{Caller, Error, FuncType, Linker, Val, ValType};
use wasmtime_wasi::p2::bindings::random::random::Host as _;

/// By their numbers in WASI.
const SUCCESS: i32 = 0;
const BADF: i32 = 8;
const FAULT: i32 = 21;
const INVAL: i32 = 28;
const NOSYS: i32 = 52;
const NOTSUP: i32 = 58;

/// Modules that the functions are imported from.
const MODULES: [&str; 2] = ["wasi_snapshot_preview1", "wasi_unstable"];
/// Random bytes at once.
const MAX_RANDOM: u32 = 64 << 10;
/// Pieces of one write.
const MAX_PIECES: u32 = 64;
/// Bytes of one write.
const MAX_WRITE: usize = 64 << 10;
/// What a guest may wait for at once.
const MAX_EVENTS: u32 = 64;
/// Bytes of what it waits for, and of what has happened.
const SUBSCRIPTION: u32 = 48;
const EVENT: usize = 32;

/// Functions that only answer, by name, parameters ("i" has 32 bits, "l" 64) and answer.
const DEAD: [(&str, &str, i32); 37] = [
    ("args_get", "ii", SUCCESS),
    ("environ_get", "ii", SUCCESS),
    ("fd_advise", "illi", BADF),
    ("fd_allocate", "ill", BADF),
    ("fd_close", "i", SUCCESS),
    ("fd_datasync", "i", BADF),
    ("fd_fdstat_set_rights", "ill", BADF),
    ("fd_filestat_get", "ii", BADF),
    ("fd_filestat_set_size", "il", BADF),
    ("fd_filestat_set_times", "illi", BADF),
    ("fd_pread", "iiili", BADF),
    ("fd_prestat_dir_name", "iii", BADF),
    ("fd_prestat_get", "ii", BADF),
    ("fd_pwrite", "iiili", BADF),
    ("fd_read", "iiii", BADF),
    ("fd_readdir", "iiili", BADF),
    ("fd_renumber", "ii", BADF),
    ("fd_seek", "ilii", BADF),
    ("fd_sync", "i", BADF),
    ("fd_tell", "ii", BADF),
    ("path_create_directory", "iii", BADF),
    ("path_filestat_get", "iiiii", BADF),
    ("path_filestat_set_times", "iiiilli", BADF),
    ("path_link", "iiiiiii", BADF),
    ("path_open", "iiiiillii", BADF),
    ("path_readlink", "iiiiii", BADF),
    ("path_remove_directory", "iii", BADF),
    ("path_rename", "iiiiii", BADF),
    ("path_symlink", "iiiii", BADF),
    ("path_unlink_file", "iii", BADF),
    ("sched_yield", "", SUCCESS),
    ("sock_accept", "iii", NOSYS),
    ("sock_open", "iii", NOSYS),
    ("sock_recv", "iiiiii", NOSYS),
    ("sock_send", "iiiii", NOSYS),
    ("sock_shutdown", "ii", NOSYS),
    ("fd_fdstat_set_flags", "ii", SUCCESS),
];

/// A guest ended itself.
#[derive(Debug, thiserror::Error)]
#[error("the guest ended itself with code {code}")]
struct Ended {
    code: i32,
}

/// What the start of a guest came to: commands of some languages say that they end.
pub(crate) fn ended_well(started: Result<(), Error>) -> Result<(), Error> {
    match started {
        Err(error) if matches!(error.downcast_ref(), Some(Ended { code: 0 })) => Ok(()),
        started => started,
    }
}

/// Defines all of it.
pub(crate) fn define(linker: &mut Linker<State>) -> Result<(), Error> {
    for module in MODULES {
        define_in(linker, module)?;
    }
    Ok(())
}

fn define_in(linker: &mut Linker<State>, module: &str) -> Result<(), Error> {
    for (name, params, answer) in DEAD {
        let params = params
            .chars()
            .map(|c| if c == 'l' { ValType::I64 } else { ValType::I32 });
        let ty = FuncType::new(linker.engine(), params, [ValType::I32]);
        linker.func_new(module, name, ty, move |_, _, results| {
            if let [result] = results {
                *result = Val::I32(answer);
            }
            Ok(())
        })?;
    }
    for name in ["proc_exit", "proc_raise"] {
        let results = if name == "proc_raise" {
            vec![ValType::I32]
        } else {
            vec![]
        };
        let ty = FuncType::new(linker.engine(), [ValType::I32], results);
        linker.func_new(module, name, ty, |_, params, _| {
            let code = params.first().and_then(Val::i32).unwrap_or_default();
            Err(Ended { code }.into())
        })?;
    }
    for name in ["args_sizes_get", "environ_sizes_get"] {
        linker.func_wrap(
            module,
            name,
            |mut caller: Caller<'_, State>, count: u32, size: u32| {
                errno(guest(&mut caller, |memory, _| {
                    abi::write_u32(memory, count, 0)?;
                    abi::write_u32(memory, size, 0)
                }))
            },
        )?;
    }
    linker.func_wrap(
        module,
        "clock_res_get",
        |mut caller: Caller<'_, State>, _: u32, at: u32| {
            errno(guest(&mut caller, |memory, _| abi::write_u64(memory, at, 1000)))
        },
    )?;
    linker.func_wrap(module, "clock_time_get", clock_time_get)?;
    linker.func_wrap(module, "fd_fdstat_get", fd_fdstat_get)?;
    linker.func_wrap(module, "fd_write", fd_write)?;
    linker.func_wrap(module, "poll_oneoff", poll_oneoff)?;
    linker.func_wrap(module, "random_get", random_get)?;
    Ok(())
}

fn errno(result: Result<(), Status>) -> i32 {
    match result {
        Ok(()) => SUCCESS,
        Err(Status::BadArgument) => INVAL,
        Err(_) => FAULT,
    }
}

fn clock_time_get(mut caller: Caller<'_, State>, clock: u32, _precision: u64, at: u32) -> i32 {
    const REALTIME: u32 = 0;
    const MONOTONIC: u32 = 1;
    if clock > MONOTONIC {
        return NOTSUP;
    }
    errno(guest(&mut caller, |memory, state| {
        let nanos = if clock == REALTIME {
            unix_nanos()
        } else {
            let running = now().saturating_duration_since(state.began) + Duration::from_nanos(1);
            u64::try_from(running.as_nanos()).unwrap_or(u64::MAX)
        };
        abi::write_u64(memory, at, nanos)
    }))
}

/// Standard input, output and error are there: a device for characters that can be written to.
fn fd_fdstat_get(mut caller: Caller<'_, State>, fd: u32, at: u32) -> i32 {
    const CHARACTER_DEVICE: u8 = 2;
    const MAY_WRITE: u8 = 1 << 6;
    if fd > 2 {
        return BADF;
    }
    let mut stat = [0; 24];
    stat[0] = CHARACTER_DEVICE;
    stat[8] = MAY_WRITE;
    errno(guest(&mut caller, |memory, _| abi::write(memory, at, &stat)))
}

fn fd_write(mut caller: Caller<'_, State>, fd: u32, pieces: u32, count: u32, written_at: u32) -> i32 {
    let level = match fd {
        1 => Level::INFO,
        2 => Level::ERROR,
        _ => return BADF,
    };
    errno(guest(&mut caller, |memory, state| {
        if count > MAX_PIECES {
            return Err(Status::BadArgument);
        }
        let mut text = Vec::new();
        let list = abi::read(memory, pieces, count * 8)?;
        for piece in list.chunks_exact(8) {
            let &[a, b, c, d, e, f, g, h] = piece else {
                continue;
            };
            let (at, len) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            let bytes = abi::read(memory, at, len)?;
            let room = MAX_WRITE.saturating_sub(text.len());
            text.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        }
        // What is cut off is told to be written, too: a guest would try again and again.
        let lens = list
            .chunks_exact(8)
            .filter_map(|piece| piece.get(4..)?.try_into().ok());
        let written = lens.map(u32::from_le_bytes).fold(0, u32::saturating_add);
        for line in text.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            state.log(level, line);
        }
        abi::write_u32(memory, written_at, written)
    }))
}

/// A guest that waits for anything is told that it has happened: nothing may hold a worker up, and its time is measured.
fn poll_oneoff(
    mut caller: Caller<'_, State>,
    subscriptions: u32,
    events: u32,
    count: u32,
    happened_at: u32,
) -> i32 {
    errno(guest(&mut caller, |memory, _| {
        if count == 0 || count > MAX_EVENTS {
            return Err(Status::BadArgument);
        }
        let mut told = Vec::with_capacity(EVENT * count as usize);
        let list = abi::read(memory, subscriptions, count * SUBSCRIPTION)?;
        for subscription in list.chunks_exact(SUBSCRIPTION as usize) {
            let mut event = [0; EVENT];
            let user_data = subscription.get(..8).unwrap_or_default();
            for (to, from) in event.iter_mut().zip(user_data) {
                *to = *from;
            }
            event[10] = subscription.get(8).copied().unwrap_or_default();
            told.extend_from_slice(&event);
        }
        abi::write(memory, events, &told)?;
        abi::write_u32(memory, happened_at, count)
    }))
}

fn random_get(mut caller: Caller<'_, State>, at: u32, len: u32) -> i32 {
    errno(guest(&mut caller, |memory, state| {
        if len > MAX_RANDOM {
            return Err(Status::BadArgument);
        }
        let bytes = state.random.get_random_bytes(len.into());
        abi::write(memory, at, &bytes.map_err(|_| Status::InternalFailure)?)
    }))
}
