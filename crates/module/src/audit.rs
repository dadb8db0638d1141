//! Whether a module may have what it imports.

use crate::inspect::{Kind, Module, versioned};

/// The host functions of proxy-wasm that a proxy has, of all three versions of the ABI, and what compilers add.
pub const PROXY_WASM_FUNCTIONS: [&str; 44] = [
    "emscripten_notify_memory_growth",
    "proxy_add_header_map_value",
    "proxy_call_foreign_function",
    "proxy_clear_route_cache",
    "proxy_close_stream",
    "proxy_continue_request",
    "proxy_continue_response",
    "proxy_continue_stream",
    "proxy_define_metric",
    "proxy_dequeue_shared_queue",
    "proxy_done",
    "proxy_enqueue_shared_queue",
    "proxy_get_buffer_bytes",
    "proxy_get_buffer_status",
    "proxy_get_configuration",
    "proxy_get_current_time_nanoseconds",
    "proxy_get_header_map_pairs",
    "proxy_get_header_map_size",
    "proxy_get_header_map_value",
    "proxy_get_log_level",
    "proxy_get_metric",
    "proxy_get_property",
    "proxy_get_shared_data",
    "proxy_get_status",
    "proxy_grpc_call",
    "proxy_grpc_cancel",
    "proxy_grpc_close",
    "proxy_grpc_send",
    "proxy_grpc_stream",
    "proxy_http_call",
    "proxy_increment_metric",
    "proxy_log",
    "proxy_record_metric",
    "proxy_register_shared_queue",
    "proxy_remove_header_map_value",
    "proxy_replace_header_map_value",
    "proxy_resolve_shared_queue",
    "proxy_send_local_response",
    "proxy_set_buffer_bytes",
    "proxy_set_effective_context",
    "proxy_set_header_map_pairs",
    "proxy_set_property",
    "proxy_set_shared_data",
    "proxy_set_tick_period_milliseconds",
];

/// The interfaces of WASI 0.2 that a component may import whatever it is for. Files, sockets, environment and standard
/// input are empty there, and requests through `wasi:http` go to services that policy names.
const WASI: [&str; 7] = [
    "wasi:cli/",
    "wasi:clocks/",
    "wasi:random/",
    "wasi:io/",
    "wasi:filesystem/",
    "wasi:sockets/",
    "wasi:http/",
];

/// What the functions of every world are made of: types, and no function that does anything.
const ARGUMENTS: [&str; 3] = [
    "leeward:plugin/types",
    "leeward:plugin/failure",
    "leeward:plugin/passing",
];

/// An import that a module may not have.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("imports {import:?}, {why}")]
pub struct Refused {
    /// The import.
    pub import: Box<str>,
    /// Why not, and what may be.
    pub why: Box<str>,
}

/// Whether a module imports only what its kind may have; and of that, where there are `patterns`
/// (`Plugin.access.imports`), only what one of them names.
///
/// # Errors
///
/// Every import that is refused, in the module's order.
pub fn audit(module: &Module, patterns: &[impl AsRef<str>]) -> Result<(), Vec<Refused>> {
    let refusals = module.imports.iter().filter_map(|import| {
        let why = match module.kind {
            Kind::ProxyWasm => core(import),
            Kind::Fallback | Kind::Filter | Kind::Router | Kind::WasiHttp => component(import),
        };
        let why = why.or_else(|| unnamed(import, patterns))?;
        Some(Refused {
            import: import.clone(),
            why,
        })
    });
    let refused: Vec<Refused> = refusals.collect();
    if refused.is_empty() { Ok(()) } else { Err(refused) }
}

/// Why a component may not have an import, if so.
fn component(import: &str) -> Option<Box<str>> {
    let (name, version) = versioned(import);
    if name.starts_with("leeward:plugin/") {
        let known = version.is_some_and(|v| v.starts_with("0.1.") || v.starts_with("0.2."));
        return (!known).then(|| "want leeward:plugin of version 0.1 or 0.2".into());
    }
    if WASI.iter().any(|package| name.starts_with(package)) {
        let known = version.is_some_and(|v| v.starts_with("0.2."));
        return (!known).then(|| "want WASI of version 0.2".into());
    }
    Some("which no proxy has; want leeward:plugin, and of WASI cli, clocks, random, io, filesystem, sockets and http".into())
}

/// Why a proxy-wasm module may not have an import, if so.
fn core(import: &str) -> Option<Box<str>> {
    match import.split_once('.') {
        Some(("env", function)) if PROXY_WASM_FUNCTIONS.contains(&function) => None,
        Some(("wasi_snapshot_preview1", _)) => None,
        Some(_) | None => Some(
            "which no proxy has; want the functions of proxy-wasm in env, and wasi_snapshot_preview1".into(),
        ),
    }
}

/// Why policy doesn't let a module have an import, if so.
fn unnamed(import: &str, patterns: &[impl AsRef<str>]) -> Option<Box<str>> {
    let (name, _) = versioned(import);
    let named = |pattern: &str| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern,
    };
    if patterns.is_empty() || ARGUMENTS.contains(&name) || patterns.iter().any(|p| named(p.as_ref())) {
        return None;
    }
    Some("which access.imports doesn't name".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(kind: Kind, imports: &[&str]) -> Module {
        Module {
            kind,
            version: "0".into(),
            imports: imports.iter().map(|import| (*import).into()).collect(),
            exports: Vec::new(),
            size: 0,
            sha256: [0; 32],
        }
    }

    #[track_caller]
    fn check(kind: Kind, imports: &[&str], patterns: &[&str], refused: &[&str]) {
        let found = audit(&module(kind, imports), patterns).err().unwrap_or_default();
        let found: Vec<&str> = found.iter().map(|refused| &*refused.import).collect();
        assert_eq!(found, refused, "{imports:?} under {patterns:?}");
    }

    const ANY: [&str; 0] = [];

    #[test]
    fn a_component_may_have_the_contract_and_wasi_and_nothing_else() {
        let fine = [
            "leeward:plugin/mesh@0.2.0",
            "wasi:io/streams@0.2.6",
            "wasi:http/outgoing-handler@0.2.0",
            "wasi:filesystem/types@0.2.3",
        ];
        let bad = [
            "wasi:io/streams@0.3.0",
            "wasi:nn/graph@0.2.0",
            "leeward:plugin/host@1.0.0",
            "leeward:plugin/host",
            "leeward:pluginx/host@0.2.0",
            "env.proxy_log",
            "wasi:httpx/types@0.2.0",
        ];
        for kind in [Kind::Fallback, Kind::Filter, Kind::Router, Kind::WasiHttp] {
            check(kind, &fine, &ANY, &[]);
            check(kind, &bad, &ANY, &bad);
        }
    }

    #[test]
    fn a_proxy_wasm_module_may_have_the_abi_and_preview_one() {
        let fine = [
            "env.proxy_log",
            "env.proxy_set_tick_period_milliseconds",
            "wasi_snapshot_preview1.path_open",
        ];
        let bad = [
            "env.memory",
            "env.system",
            "wasi.path_open",
            "proxy_log",
            "wasi:io/streams@0.2.0",
        ];
        check(Kind::ProxyWasm, &fine, &ANY, &[]);
        check(Kind::ProxyWasm, &bad, &ANY, &bad);
    }

    #[test]
    fn policy_narrows_it_by_interface_package_and_function() {
        let imports = [
            "leeward:plugin/types@0.2.0",
            "leeward:plugin/host@0.2.0",
            "wasi:http/types@0.2.0",
            "wasi:random/random@0.2.0",
        ];
        check(Kind::Filter, &imports, &["leeward:plugin/*"], &imports[2..]);
        check(Kind::Filter, &imports, &["leeward:plugin/host", "wasi:*"], &[]);
        check(Kind::Filter, &imports, &["wasi:random/random"], &imports[1..3]);
        check(Kind::Filter, &imports, &["wasi:random/rand"], &imports[1..]);
        let functions = [
            "env.proxy_log",
            "env.proxy_http_call",
            "wasi_snapshot_preview1.fd_write",
        ];
        check(
            Kind::ProxyWasm,
            &functions,
            &["env.proxy_log", "wasi_snapshot_preview1.*"],
            &functions[1..2],
        );
        check(Kind::ProxyWasm, &functions, &["env.*"], &functions[2..]);
    }

    #[test]
    fn a_pattern_lets_nothing_in_that_the_kind_may_not_have() {
        check(
            Kind::Filter,
            &["wasi:nn/graph@0.2.0"],
            &["wasi:*"],
            &["wasi:nn/graph@0.2.0"],
        );
        let refused = audit(&module(Kind::Filter, &["wasi:nn/graph@0.2.0"]), &["wasi:*"]).unwrap_err();
        assert!(
            refused[0]
                .to_string()
                .starts_with("imports \"wasi:nn/graph@0.2.0\", which no proxy has; want ")
        );
    }

    #[test]
    fn the_functions_are_in_order_and_each_once() {
        assert!(PROXY_WASM_FUNCTIONS.is_sorted_by(|a, b| a < b));
    }
}
