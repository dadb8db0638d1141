use super::*;
use proptest::prelude::*;

/// Sorts of component exports, as the binary format numbers them.
const FUNC: u8 = 1;
const INSTANCE: u8 = 5;

fn leb(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = u8::try_from(n & 0x7f).unwrap();
        n >>= 7;
        bytes.push(if n == 0 { low } else { low | 0x80 });
        if n == 0 {
            return bytes;
        }
    }
}

fn section(id: u8, items: &[Vec<u8>]) -> Vec<u8> {
    let body = [leb(items.len()), items.concat()].concat();
    [vec![id], leb(body.len()), body].concat()
}

fn name(text: &str) -> Vec<u8> {
    [leb(text.len()), text.as_bytes().to_vec()].concat()
}

/// A component that has these names and nothing else.
fn component_of(imports: &[&str], exports: &[(&str, u8)]) -> Vec<u8> {
    let import = |text: &&str| [vec![0], name(text), vec![INSTANCE, 0]].concat();
    let export = |(text, sort): &(&str, u8)| [vec![0], name(text), vec![*sort, 0, 0]].concat();
    [
        b"\0asm\x0d\0\x01\0".to_vec(),
        section(7, &[vec![0x42, 0]]),
        section(10, &imports.iter().map(import).collect::<Vec<_>>()),
        section(11, &exports.iter().map(export).collect::<Vec<_>>()),
    ]
    .concat()
}

fn core_of(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap()
}

#[track_caller]
fn is(bytes: &[u8], kind: Kind, version: &str) -> Module {
    let module = inspect(bytes).unwrap();
    assert_eq!((module.kind, &*module.version), (kind, version));
    module
}

#[track_caller]
fn refused(bytes: &[u8], why: &str) {
    let error = inspect(bytes).unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
}

const TYPES: &str = "leeward:plugin/types@0.2.0";

#[test]
fn a_components_exports_say_what_it_is_for() {
    is(
        &component_of(&[TYPES], &[("on-failure", FUNC)]),
        Kind::Fallback,
        "0.2.0",
    );
    let filter = [("on-request", FUNC), ("on-response", FUNC)];
    is(&component_of(&[TYPES], &filter), Kind::Filter, "0.2.0");
    is(
        &component_of(&[TYPES], &[("choose", FUNC)]),
        Kind::Router,
        "0.2.0",
    );
    let http = [("wasi:http/incoming-handler@0.2.6", INSTANCE)];
    let imports = ["wasi:http/types@0.2.6", "wasi:io/streams@0.2.6"];
    let module = is(&component_of(&imports, &http), Kind::WasiHttp, "0.2.6");
    assert_eq!(module.imports, imports.map(Box::from));
    assert_eq!(&*module.exports[0], http[0].0);
}

#[test]
fn a_plugin_that_a_compiler_has_built_is_known() {
    let built = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../plugins/built/static-json.wasm"
    );
    let bytes = std::fs::read(built).unwrap();
    let module = inspect(&bytes).unwrap();
    assert_eq!((module.kind, module.size), (Kind::Fallback, bytes.len()));
    assert!(
        module
            .imports
            .iter()
            .any(|import| import.starts_with("leeward:plugin/types@"))
    );
    assert_eq!(module.sha256, <[u8; 32]>::from(Sha256::digest(&bytes)));
}

#[test]
fn every_example_imports_only_what_its_kind_may_have() {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/built");
    let mut looked_at = 0;
    for entry in std::fs::read_dir(built).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "wasm") {
            let module = inspect(&std::fs::read(&path).unwrap()).unwrap();
            let refused = crate::audit(&module, &[""; 0]);
            assert!(refused.is_ok(), "{}: {refused:?}", path.display());
            looked_at += 1;
        }
    }
    assert!(looked_at > 5, "{looked_at} examples");
}

#[test]
fn another_name_for_a_type_is_no_import_and_a_resource_is_one() {
    // What comes after a name: an instance of type 0, a type that equals type 0, a resource of any kind, a function of type 0.
    let things: [(&str, &[u8]); 4] = [
        ("leeward:plugin/types@0.2.0", &[INSTANCE, 0]),
        ("number", &[3, 0, 0]),
        ("handle", &[3, 1]),
        ("ask", &[FUNC, 0]),
    ];
    let things = things.map(|(text, what)| [vec![0], name(text), what.to_vec()].concat());
    let mut bytes = component_of(&[], &[("on-failure", FUNC)]);
    bytes.extend(section(10, &things));
    let module = inspect(&bytes).unwrap();
    let imports = ["leeward:plugin/types@0.2.0", "handle", "ask"];
    assert_eq!(module.imports, imports.map(Box::from));
}

#[test]
fn a_module_of_proxy_wasm_has_the_newest_of_its_versions() {
    let module = r#"(module
        (import "env" "proxy_log" (func (param i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_write" (func))
        (memory (export "memory") 1)
        (func (export "proxy_abi_version_0_2_0"))
        (func (export "proxy_abi_version_0_2_1")))"#;
    let module = is(&core_of(module), Kind::ProxyWasm, "0.2.1");
    assert_eq!(
        module.imports,
        ["env.proxy_log", "wasi_snapshot_preview1.fd_write"].map(Box::from)
    );
    assert_eq!(module.exports.len(), 2, "a memory is nothing that is called");
    let old = r#"(module (func (export "proxy_abi_version_0_1_0")))"#;
    is(&core_of(old), Kind::ProxyWasm, "0.1.0");
}

#[test]
fn what_is_no_plugin_says_what_would_be() {
    refused(b"", "not a WebAssembly module");
    refused(b"#!/bin/sh", "not a WebAssembly module");
    refused(
        &core_of("(module)"),
        "the module exports nothing that a proxy calls; want a component",
    );
    refused(
        &component_of(&[], &[("run", FUNC)]),
        "the component exports nothing that a proxy calls",
    );
    let abi = r#"(module (func (export "proxy_abi_version_0_3_0")))"#;
    refused(
        &core_of(abi),
        "the proxy-wasm ABI 0.3.0; this build has 0.1.0, 0.2.0 and 0.2.1",
    );
    let three = [("wasi:http/incoming-handler@0.3.0", INSTANCE)];
    refused(&component_of(&[], &three), "made for wasi:http 0.3.0");
    let late = component_of(&["leeward:plugin/types@1.0.0"], &[("choose", FUNC)]);
    refused(&late, "made for leeward:plugin 1.0.0; this build has 0.1 and 0.2");
    refused(
        &component_of(&[], &[("choose", FUNC)]),
        "exports choose, but imports nothing",
    );
    let mixed = component_of(&[TYPES, "leeward:plugin/host@0.1.0"], &[("on-failure", FUNC)]);
    refused(&mixed, "imports leeward:plugin 0.2.0 and 0.1.0; want one version");
    let both = component_of(&[TYPES], &[("on-failure", FUNC), ("choose", FUNC)]);
    refused(&both, "a Fallback and a Router at once");
}

#[test]
fn bounds_hold() {
    refused(&vec![0; MAX_BYTES + 1], "want at most 67108864");
    let many: Vec<String> = (0..=MAX_NAMES).map(|n| format!("wasi:io/i{n}@0.2.0")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refused(
        &component_of(&many, &[("choose", FUNC)]),
        "more than 4096 imports",
    );
    refused(
        &component_of(&[&"n".repeat(MAX_NAME + 1)], &[]),
        "imports number 1 is longer than 512",
    );
    refused(&component_of(&[TYPES, "a\nb"], &[]), "imports number 2");
    let mut nested = component_of(&[], &[]);
    for _ in 0..=MAX_DEPTH {
        nested = [b"\0asm\x0d\0\x01\0".to_vec(), vec![4], leb(nested.len()), nested].concat();
    }
    refused(&nested, "nested more than 32 deep");
}

#[test]
fn what_is_inside_counts_for_nothing() {
    let inner = component_of(&["wasi:nn/graph@0.2.0"], &[("choose", FUNC)]);
    let outer = component_of(&[TYPES], &[("on-failure", FUNC)]);
    let both = [outer, vec![4], leb(inner.len()), inner].concat();
    let module = is(&both, Kind::Fallback, "0.2.0");
    assert_eq!(module.imports, [TYPES].map(Box::from));
}

#[test]
fn digests_are_written_and_read() {
    let digest: [u8; 32] = Sha256::digest(b"x").into();
    assert_eq!(parse_hex(&hex(&digest)), Some(digest));
    assert_eq!(parse_hex(&hex(&digest).to_uppercase()), Some(digest));
    for bad in [
        "",
        "00",
        &"g".repeat(64),
        &"\u{e9}".repeat(32),
        &format!("+{}", "0".repeat(63)),
    ] {
        assert_eq!(parse_hex(bad), None, "{bad}");
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let _ = inspect(&bytes);
    }

    /// Bytes that get past the first four.
    #[test]
    fn no_sections_panic(is_component: bool, bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let head: &[u8] = if is_component { b"\0asm\x0d\0\x01\0" } else { b"\0asm\x01\0\0\0" };
        let _ = inspect(&[head, &bytes].concat());
    }

    #[test]
    fn no_change_of_a_real_one_panics(at in 0usize..95_000, to: u8, cut in 0usize..95_000) {
        let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/built/static-json.wasm");
        let mut bytes = std::fs::read(built).unwrap();
        bytes[at] = to;
        let _ = inspect(&bytes);
        let _ = inspect(&bytes[..cut]);
    }
}
