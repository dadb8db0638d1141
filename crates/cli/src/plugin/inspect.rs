//! `leeward plugin inspect`: what a module is, and what it may do.

use super::check::size;
use super::project;
use super::test::Format;
use crate::output::{Failure, say};
use clap::Args;
use leeward_module::{
    Kind, MAX_SIGNATURE, Memory, Module, Refused, audit, hex, memories, signature_path, verify,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Which module.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The module: a component, or a proxy-wasm module.
    file: PathBuf,
    /// The minisign public key that must have signed it: the line of base64 that begins with RW.
    #[arg(long, value_name = "KEY")]
    minisign_key: Option<String>,
    /// How to show it.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

/// What imports let a module do, in the order in which they are told.
const POWERS: [(&str, &str); 12] = [
    (
        "leeward:plugin/mesh",
        "call services through the mesh, of those that access.services names",
    ),
    (
        "wasi:http/outgoing-handler",
        "call services through the mesh, of those that access.services names",
    ),
    (
        "leeward:plugin/store",
        "keep things in its key-value store on the node",
    ),
    (
        "leeward:plugin/host",
        "write log lines, count, and ask for flags and the time that is left",
    ),
    ("wasi:clocks/", "read clocks"),
    ("wasi:random/", "have random numbers"),
    ("wasi:cli/stdout", "write log lines (standard output)"),
    ("wasi:cli/stderr", "write log lines (standard error)"),
    (
        "wasi:cli/environment",
        "ask for environment and arguments, which are empty",
    ),
    ("wasi:cli/stdin", "read standard input, which is empty"),
    ("wasi:filesystem/", "ask for files, of which there are none"),
    ("wasi:sockets/", "ask for sockets, which are refused"),
];

/// The same of functions of proxy-wasm.
const FUNCTIONS: [(&str, &str); 11] = [
    (
        "env.proxy_http_call",
        "call services through the mesh, of those that access.services names",
    ),
    (
        "env.proxy_grpc_",
        "call services with gRPC through the mesh, of those that access.services names",
    ),
    (
        "env.proxy_set_shared_data",
        "keep things in its key-value store on the node",
    ),
    (
        "env.proxy_enqueue_shared_queue",
        "hand things from one of its machines to another by queues",
    ),
    ("env.proxy_define_metric", "count"),
    ("env.proxy_log", "write log lines"),
    ("env.proxy_set_tick_period_milliseconds", "run on a timer"),
    ("env.proxy_send_local_response", "answer requests itself"),
    (
        "env.proxy_get_property",
        "read properties of requests and of the proxy",
    ),
    ("env.proxy_set_buffer_bytes", "change bodies"),
    (
        "wasi_snapshot_preview1.",
        "use WASI preview 1, behind which are clocks, random numbers and the log",
    ),
];

/// How a module is signed.
enum Signed {
    /// There is no signature beside it.
    No,
    /// There is one, and no key was given to check it with.
    Unchecked(PathBuf),
    /// It is the key's.
    Valid,
    /// It isn't, and why.
    Invalid(String),
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let bytes = project::read(&options.file)?;
    let bad = |why: &str| Failure::BadInput(format!("{}: {why}", options.file.display()));
    let module = leeward_module::inspect(&bytes).map_err(|error| bad(&error.to_string()))?;
    let memories = memories(&bytes).map_err(|error| bad(&error.to_string()))?;
    let refused = audit(&module, &[""; 0]).err().unwrap_or_default();
    let signed = signed(&options.file, &bytes, options.minisign_key.as_deref())?;
    match options.output {
        Format::Text => say(&text(&options.file, &module, &memories, &refused, &signed)),
        Format::Json => say(&format!("{:#}", as_json(&module, &memories, &refused, &signed))),
    }
    match signed {
        Signed::Invalid(why) => Err(bad(&why)),
        Signed::No if options.minisign_key.is_some() => Err(bad(&format!(
            "is not signed; want {}",
            signature_path(&options.file).display()
        ))),
        Signed::No | Signed::Unchecked(_) | Signed::Valid => Ok(()),
    }
}

/// What a module may do, in words; each once.
fn powers(module: &Module) -> Vec<&'static str> {
    let table: &[(&str, &str)] = match module.kind {
        Kind::ProxyWasm => &FUNCTIONS,
        Kind::Fallback | Kind::Filter | Kind::Router | Kind::WasiHttp => &POWERS,
    };
    let mut powers = Vec::new();
    for (import, power) in table {
        let imports = module.imports.iter().any(|known| known.starts_with(import));
        if imports && !powers.contains(power) {
            powers.push(*power);
        }
    }
    powers
}

const fn purpose(kind: Kind) -> &'static str {
    match kind {
        Kind::Fallback => "answers when a call failed: a rung of a FallbackPolicy",
        Kind::Filter => "sees requests and answers on their way: filters of a rule",
        Kind::Router => "chooses among a rule's backends: router of a rule",
        Kind::WasiHttp => "answers when a call failed, by wasi:http: a rung of a FallbackPolicy",
        Kind::ProxyWasm => "sees requests and answers on their way, by the proxy-wasm ABI: filters of a rule",
    }
}

fn signed(file: &Path, bytes: &[u8], key: Option<&str>) -> Result<Signed, Failure> {
    let beside = signature_path(file);
    let bad = |why: String| Failure::BadInput(format!("{}: {why}", beside.display()));
    let len = match std::fs::metadata(&beside) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Signed::No),
        Err(error) => return Err(bad(error.to_string())),
    };
    if len > MAX_SIGNATURE as u64 {
        return Err(bad(format!("has {len} bytes; want at most {MAX_SIGNATURE}")));
    }
    let Some(key) = key else {
        return Ok(Signed::Unchecked(beside));
    };
    let signature = std::fs::read_to_string(&beside).map_err(|error| bad(error.to_string()))?;
    Ok(match verify(bytes, &signature, key) {
        Ok(()) => Signed::Valid,
        Err(error) => Signed::Invalid(error.to_string()),
    })
}

impl Signed {
    fn text(&self) -> String {
        match self {
            Self::No => "not signed".to_owned(),
            Self::Unchecked(file) => format!("{}, not checked; give --minisign-key", file.display()),
            Self::Valid => "valid".to_owned(),
            Self::Invalid(why) => format!("invalid: {why}"),
        }
    }

    const fn word(&self) -> &'static str {
        match self {
            Self::No => "none",
            Self::Unchecked(_) => "unchecked",
            Self::Valid => "valid",
            Self::Invalid(_) => "invalid",
        }
    }
}

/// A module in a few lines: for `build`, too.
pub(crate) fn summary(file: &Path, module: &Module) -> String {
    format!(
        "{}: {}, {} {}, {}, sha256 {}",
        file.display(),
        module.kind.as_str(),
        contract(module.kind),
        module.version,
        size(module.size as u64),
        hex(&module.sha256)
    )
}

const fn contract(kind: Kind) -> &'static str {
    match kind {
        Kind::Fallback | Kind::Filter | Kind::Router => "leeward:plugin",
        Kind::WasiHttp => "wasi:http",
        Kind::ProxyWasm => "proxy-wasm ABI",
    }
}

fn text(file: &Path, module: &Module, memories: &[Memory], refused: &[Refused], signed: &Signed) -> String {
    let mut lines = vec![
        format!("file       {}", file.display()),
        format!("kind       {}: {}", module.kind.as_str(), purpose(module.kind)),
        format!("contract   {} {}", contract(module.kind), module.version),
        format!("size       {} ({} bytes)", size(module.size as u64), module.size),
        format!("sha256     {}", hex(&module.sha256)),
        format!("signature  {}", signed.text()),
    ];
    for memory in memories {
        let max = memory.max.map_or_else(
            || "no maximum of its own; limits.memory bounds it".to_owned(),
            |max| format!("at most {}", size(max)),
        );
        lines.push(format!("memory     from {}, {max}", size(memory.min)));
    }
    let mut list = |head: &str, items: &[String]| {
        if !items.is_empty() {
            lines.push(head.to_owned());
            lines.extend(items.iter().map(|item| format!("  {item}")));
        }
    };
    let owned = |names: &[Box<str>]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let may: Vec<String> = powers(module).into_iter().map(str::to_owned).collect();
    list("may", &may);
    list("imports", &owned(&module.imports));
    list("exports", &owned(&module.exports));
    let refused: Vec<String> = refused.iter().map(ToString::to_string).collect();
    list("no proxy takes it, since it", &refused);
    lines.join("\n")
}

fn as_json(module: &Module, memories: &[Memory], refused: &[Refused], signed: &Signed) -> Value {
    let memories = memories.iter();
    let memories: Vec<Value> = memories
        .map(|memory| json!({"min_bytes": memory.min, "max_bytes": memory.max}))
        .collect();
    let refused: Vec<Value> = refused
        .iter()
        .map(|refused| json!({"import": &*refused.import, "why": &*refused.why}))
        .collect();
    json!({
        "kind": module.kind.as_str(),
        "contract": contract(module.kind),
        "version": &*module.version,
        "size_bytes": module.size,
        "sha256": hex(&module.sha256),
        "signature": signed.word(),
        "memories": memories,
        "may": powers(module),
        "imports": module.imports.iter().map(|name| &**name).collect::<Vec<_>>(),
        "exports": module.exports.iter().map(|name| &**name).collect::<Vec<_>>(),
        "refused": refused,
    })
}
