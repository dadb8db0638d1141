//! The boundary under modules that nobody wrote: code at random between the imports and exports of a real proxy-wasm
//! module calls the host with arguments at random. Whatever it does, the host answers with a step or a fault.
//!
//! `LEEWARD_FUZZ=N` tries N modules instead of a few; the seed of each is printed where one fails.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::await_holding_refcell_ref,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test fails by panicking; the rig is other tests', too"
)]

#[path = "proxy_wasm/rig.rs"]
mod rig;

use arbitrary::Unstructured;
use bytes::Bytes;
use leeward_wasm::Host;
use rig::{Rig, answer, facts, fields, head, load, run, spec};
use std::path::Path;
use std::time::Duration;
use wasm_smith::{Config, Module};

/// Modules of one run.
const FEW: u64 = 60;

fn config(shape: &[u8]) -> Config {
    Config {
        available_imports: Some(shape.to_vec()),
        exports: Some(shape.to_vec()),
        min_imports: 20,
        max_imports: 60,
        max_instructions: 400,
        max_memories: 1,
        max_tables: 1,
        max_table_elements: 100,
        memory64_enabled: false,
        threads_enabled: false,
        reference_types_enabled: false,
        gc_enabled: false,
        tail_call_enabled: false,
        exceptions_enabled: false,
        relaxed_simd_enabled: false,
        disallow_traps: false,
        allow_start_export: false,
        ..Config::default()
    }
}

fn module(shape: &[u8], seed: u64) -> Option<Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; 16 << 10];
    random.fill(&mut bytes);
    let module = Module::new(config(shape), &mut Unstructured::new(&bytes)).ok()?;
    Some(module.to_bytes())
}

#[test]
fn code_at_random_gets_a_step_or_a_fault() {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/built/pw-misbehave.wasm");
    let shape = std::fs::read(built).unwrap();
    let tries = std::env::var("LEEWARD_FUZZ").map_or(FEW, |n| n.parse().expect("LEEWARD_FUZZ is a number"));
    let began = std::env::var("LEEWARD_FUZZ_SEED").map_or(1, |n| n.parse().expect("a number"));
    let (mut ran, mut faulted) = (0, 0);
    for seed in began..began + tries {
        let Some(module) = module(&shape, seed) else {
            continue;
        };
        let spec = spec(|spec| {
            spec.limits.call_timeout = Duration::from_millis(20);
            spec.limits.memory_bytes = 4 << 20;
        });
        run(async {
            let host = Host::new().unwrap();
            // What can't be loaded is refused, which is an answer, too.
            if load(&host, &spec, &module).await.is_err() {
                return;
            }
            ran += 1;
            let rig = Rig::of(host, spec);
            let chosen = rig.worker.choose(&rig.name, &rig.spec, false).unwrap();
            let short = Duration::from_millis(200);
            let passed = tokio::time::timeout(short, async {
                let mut filter = rig.worker.filter(&chosen, facts("x")).await?;
                filter
                    .request(head(&[("a", "b"), ("cookie", "c=d")]), false)
                    .await?;
                filter.request_body(Bytes::from_static(b"body"), false).await?;
                filter.request_trailers(fields(&[("t", "u")])).await?;
                filter.take_request();
                filter.take_request_body();
                filter.response(answer(&[("e", "f")]), false).await?;
                filter.response_body(Bytes::from_static(b"answer"), true).await?;
                filter.take_response();
                filter.take_response_body();
                Ok::<_, leeward_wasm::Fault>(())
            });
            // It may hold the message up for ever.
            if let Ok(Err(_)) = passed.await {
                faulted += 1;
            }
        });
    }
    eprintln!("{ran} of {tries} modules ran, {faulted} faulted");
    assert!(ran > tries / 10, "only {ran} of {tries} modules could be loaded");
    assert!(faulted > 0, "none of {ran} modules faulted");
}
