//! How guests are compiled and where their instances live.

use crate::host::HostError;
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

/// Instances alive at once in the process, with or without a pool. Each slot of the pool takes 4 GiB of address
/// space (4 TiB in all, so that guests' accesses need no bounds checks), and memory only as it is used.
pub(crate) const MAX_INSTANCES: u32 = 1024;
/// Core instances and tables for each of those, on average: a component from a linker has a handful, one of Python some
/// twenty. What the pool keeps for each is small, or, for a table, address space only.
const PARTS: u32 = 16;
/// Linear memory that one instance can have at most; policy's own limit is 256 MiB too.
const MAX_MEMORY: usize = 256 << 20;
/// Address space that a memory takes at first, and when it grows past that, where there is no pool.
const SMALL_RESERVATION: u64 = 2 << 20;
/// Elements that a table can have at most; policy's own limit is the same. In the pool a table takes 8 MB of address space,
/// and memory only as it is used.
const MAX_TABLE: usize = 1_000_000;
/// Tables of a core module; compilers make one, or two with reference types.
const TABLES: u32 = 4;
/// A guest's stack, in bytes.
const STACK: usize = 512 << 10;
/// Of an instance's memory and of its tables, what stays resident when it ends, in bytes: it is set to zero, which costs
/// less than to have the kernel find new pages for the next one. There are at most a hundred such (wasmtime's
/// `max_unused_warm_slots`).
const KEEP_MEMORY: usize = 256 << 10;
const KEEP_TABLE: usize = 64 << 10;

/// Makes the engine.
///
/// # Errors
///
/// If this machine can't run it.
pub(crate) fn engine() -> Result<Engine, HostError> {
    // Where address space is limited the pool can't be had; instances are then made one by one.
    match Engine::new(&pooled()) {
        Ok(engine) => Ok(engine),
        Err(error) => {
            tracing::warn!(error = %format!("{error:#}"), "no instance pool; plugin instances will cost more");
            Engine::new(&on_demand()).map_err(|e| HostError::new(format!("{e:#}")))
        }
    }
}

fn config() -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(STACK)
        .async_stack_size(STACK * 2)
        .memory_init_cow(true)
        // One thread compiles; the others are for requests.
        .parallel_compilation(false);
    config
}

fn pooled() -> Config {
    let mut pool = PoolingAllocationConfig::default();
    pool.total_component_instances(MAX_INSTANCES)
        .total_core_instances(MAX_INSTANCES * PARTS)
        .total_memories(MAX_INSTANCES)
        .total_tables(MAX_INSTANCES * PARTS)
        .total_stacks(MAX_INSTANCES)
        .max_tables_per_module(TABLES)
        .table_elements(MAX_TABLE)
        .max_memory_size(MAX_MEMORY)
        .linear_memory_keep_resident(KEEP_MEMORY)
        .table_keep_resident(KEEP_TABLE)
        // Where the kernel can tell which pages were written, only those are.
        .pagemap_scan(Enabled::Auto);
    let mut config = config();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

/// For where address space is scarce: little of it for each memory, which may move when it grows.
fn on_demand() -> Config {
    let mut config = config();
    config
        .memory_reservation(SMALL_RESERVATION)
        .memory_reservation_for_growth(SMALL_RESERVATION)
        .memory_guard_size(64 << 10);
    config
}
