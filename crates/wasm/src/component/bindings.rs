//! What wasmtime makes of `plugins/wit`.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]

wasmtime::component::bindgen!({
    path: "../../plugins/wit-0.1",
    world: "fallback",
    imports: { default: trappable },
    exports: { default: async },
    with: { "leeward:plugin/types.failed-request": crate::guest::FailedRequest },
});
