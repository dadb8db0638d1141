//! What wasmtime makes of `plugins/wit`, a module for each world. What worlds share is generated once.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]

pub(crate) mod fallback {
    wasmtime::component::bindgen!({
        path: "../../plugins/wit",
        world: "fallback",
        imports: { "leeward:plugin/mesh.send": async | trappable, default: trappable },
        exports: { default: async },
        require_store_data_send: true,
        with: { "leeward:plugin/failure.failed-request": crate::component::failure::FailedRequest },
    });
}

pub(crate) mod filter {
    wasmtime::component::bindgen!({
        path: "../../plugins/wit",
        world: "filter",
        imports: { default: trappable },
        exports: { default: async },
        require_store_data_send: true,
        with: {
            "leeward:plugin/types": super::fallback::leeward::plugin::types,
            "leeward:plugin/host": super::fallback::leeward::plugin::host,
            "leeward:plugin/store": super::fallback::leeward::plugin::store,
            "leeward:plugin/mesh": super::fallback::leeward::plugin::mesh,
            "leeward:plugin/passing.request-head": crate::component::passing::RequestPassing,
            "leeward:plugin/passing.response-head": crate::component::passing::ResponsePassing,
        },
    });
}

pub(crate) mod router {
    wasmtime::component::bindgen!({
        path: "../../plugins/wit",
        world: "router",
        imports: { default: trappable },
        exports: { default: async },
        require_store_data_send: true,
        with: {
            "leeward:plugin/types": super::fallback::leeward::plugin::types,
            "leeward:plugin/host": super::fallback::leeward::plugin::host,
            "leeward:plugin/store": super::fallback::leeward::plugin::store,
            "leeward:plugin/mesh": super::fallback::leeward::plugin::mesh,
            "leeward:plugin/passing": super::filter::leeward::plugin::passing,
        },
    });
}

/// The version 0.1 of the contract.
pub(crate) mod first {
    wasmtime::component::bindgen!({
        path: "../../plugins/wit-0.1",
        world: "fallback",
        imports: { default: trappable },
        exports: { default: async },
        require_store_data_send: true,
        with: { "leeward:plugin/types.failed-request": crate::component::failure::FailedRequest },
    });
}
