//! The modules that a control plane keeps.

use crate::Connection;
use crate::api::{MAX_MESSAGE, call, call_within};
use crate::connect::{Link, link};
use crate::output::{Failure, Format, say, table};
use bytes::Bytes;
use clap::Args;
use leeward_module::{MAX_BYTES, MAX_SIGNATURE, check_signature, inspect, parse_hex};
use leeward_proto::manifest::duration_text;
use leeward_proto::v1;
use leeward_proto::v1::image_state::State;
use leeward_proto::v1::plugin_service_client::PluginServiceClient;
use leeward_proto::v1::push_module_request::Message;
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A module travels in pieces of so many bytes.
const CHUNK: usize = 64 << 10;
/// How long a push may take: 64 MiB at 2 Mbit/s.
const PUSH_TIMEOUT: Duration = Duration::from_secs(300);
/// The digits that tell a module from others, at least; fewer are too easily another's.
const MIN_DIGITS: usize = 8;

/// What to push.
#[derive(Args, Debug)]
pub(crate) struct Push {
    #[command(flatten)]
    connection: Connection,
    /// The module: a component, or a proxy-wasm module, of at most 64 MiB.
    file: PathBuf,
    /// Its minisign signature, which a Plugin with a minisignKey asks for.
    #[arg(long, value_name = "FILE.minisig")]
    signature: Option<PathBuf>,
    /// How to show what became of it.
    #[arg(short, long, default_value = "table")]
    output: Format,
}

/// How to list.
#[derive(Args, Debug)]
pub(crate) struct List {
    #[command(flatten)]
    connection: Connection,
    /// How to show them.
    #[arg(short, long, default_value = "table")]
    output: Format,
}

/// What to delete.
#[derive(Args, Debug)]
pub(crate) struct Delete {
    #[command(flatten)]
    connection: Connection,
    /// The module's SHA-256, or so many of its first digits, at least 8, that no other begins with them.
    #[arg(value_name = "SHA256")]
    sha256: String,
}

type Client = PluginServiceClient<Link>;

fn client(connection: &Connection) -> Result<Client, Failure> {
    Ok(PluginServiceClient::new(link(connection)?).max_decoding_message_size(MAX_MESSAGE))
}

pub(crate) async fn push(push: Push) -> Result<(), Failure> {
    let bytes = read(&push.file, MAX_BYTES, "a module")?;
    // What can't be a plugin needn't travel to be told so.
    if let Err(error) = inspect(&bytes) {
        return Err(bad_file(&push.file, &chain(&error)));
    }
    let signature = push.signature.as_deref().map(signature).transpose()?;
    let mut client = client(&push.connection)?;
    let pushing = client.push(tokio_stream::iter(messages(
        bytes.into(),
        signature.unwrap_or_default(),
    )));
    let module = call_within(push.connection.control, PUSH_TIMEOUT, pushing).await?;
    match push.output {
        Format::Table => say(&pushed(&module)),
        // JSON is YAML.
        Format::Json | Format::Yaml => say(&format!("{:#}", module_json(&module))),
    }
    Ok(())
}

pub(crate) async fn list(list: List) -> Result<(), Failure> {
    let mut client = client(&list.connection)?;
    let answer = call(list.connection.control, client.list(v1::ListModulesRequest {})).await?;
    match list.output {
        Format::Table => say(&list_table(&answer)),
        Format::Json | Format::Yaml => say(&format!("{:#}", list_json(&answer))),
    }
    Ok(())
}

pub(crate) async fn delete(delete: Delete) -> Result<(), Failure> {
    let digits = digits(&delete.sha256)?;
    let mut client = client(&delete.connection)?;
    let control = delete.connection.control;
    let sha256 = if parse_hex(&digits).is_some() {
        digits
    } else {
        let known = call(control, client.list(v1::ListModulesRequest {})).await?;
        one(&digits, known.modules.iter().map(|module| &*module.sha256))?
    };
    let request = v1::DeleteModuleRequest {
        sha256: sha256.clone(),
    };
    call(control, client.delete(request)).await?;
    say(&format!("module {sha256} deleted"));
    Ok(())
}

/// A file, if it isn't larger than it may be; a pipe will do, too.
fn read(path: &Path, max: usize, what: &str) -> Result<Vec<u8>, Failure> {
    let unreadable = |error: std::io::Error| bad_file(path, &format!("can't be read: {error}"));
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    let limit = (max as u64).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > max {
        return Err(bad_file(
            path,
            &format!("has more than {max} bytes, which is all that {what} may have"),
        ));
    }
    Ok(bytes)
}

fn signature(path: &Path) -> Result<String, Failure> {
    let bytes = read(path, MAX_SIGNATURE, "a signature")?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    check_signature(&text).map_err(|error| bad_file(path, &error.to_string()))?;
    Ok(text)
}

fn bad_file(path: &Path, why: &str) -> Failure {
    Failure::BadInput(format!("leeward: {}: {why}", path.display()))
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// A module as it is sent.
fn messages(mut bytes: Bytes, signature: String) -> impl Iterator<Item = v1::PushModuleRequest> + Send {
    let header = Message::Header(v1::PushModuleHeader { signature });
    let chunks = std::iter::from_fn(move || {
        let chunk = bytes.split_to(CHUNK.min(bytes.len()));
        (!chunk.is_empty()).then(|| Message::Chunk(chunk.to_vec()))
    });
    std::iter::once(header)
        .chain(chunks)
        .map(|message| v1::PushModuleRequest {
            message: Some(message),
        })
}

/// Digits as the control plane writes them.
fn digits(text: &str) -> Result<String, Failure> {
    let is_hex = text.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hex && (MIN_DIGITS..=64).contains(&text.len()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(Failure::BadInput(format!(
        "leeward: {text:?} is no SHA-256; want its 64 hex digits, or at least the first {MIN_DIGITS}"
    )))
}

/// The one that begins so.
fn one<'a>(digits: &str, known: impl Iterator<Item = &'a str>) -> Result<String, Failure> {
    let found: Vec<&str> = known.filter(|sha256| sha256.starts_with(digits)).collect();
    match found.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => Err(Failure::Failed(anyhow::anyhow!(
            "there is no module whose SHA-256 begins with {digits}"
        ))),
        many => Err(Failure::BadInput(format!(
            "leeward: {} modules begin with {digits}; want one of them:\n{}",
            many.len(),
            many.join("\n")
        ))),
    }
}

fn pushed(module: &v1::Module) -> String {
    let kind = format!("{} {}", kind_text(module), module.version);
    let imports = match module.imports.as_slice() {
        [] => "none".to_owned(),
        some => some.join(&format!("\n{:12}", "")),
    };
    [
        ("sha256", module.sha256.clone()),
        ("kind", kind),
        ("size", size_text(module.size)),
        ("signatures", module.signatures.to_string()),
        ("imports", imports),
    ]
    .map(|(name, value)| format!("{name:<12}{value}"))
    .join("\n")
}

fn list_table(answer: &v1::ListModulesResponse) -> String {
    let rows: Vec<[String; 8]> = answer
        .modules
        .iter()
        .map(|module| {
            [
                module.sha256.clone(),
                kind_text(module).to_owned(),
                module.version.clone(),
                size_text(module.size),
                module.signatures.to_string(),
                time(module.create_time.as_ref()),
                module.by.clone(),
                dash(&module.used_by.join(", ")),
            ]
        })
        .collect();
    let mut parts = Vec::new();
    if rows.is_empty() {
        parts.push("the control plane has no modules".to_owned());
    } else {
        parts.push(table(
            [
                "SHA256", "KIND", "VERSION", "SIZE", "SIGNED", "SINCE", "BY", "USED BY",
            ],
            &rows,
        ));
    }
    let images: Vec<[String; 7]> = answer
        .images
        .iter()
        .map(|image| {
            [
                image.field.clone(),
                image.image.clone(),
                state_text(image.state()).to_owned(),
                dash(&image.sha256),
                time(image.since.as_ref()),
                next_text(image),
                dash(&image.error),
            ]
        })
        .collect();
    if !images.is_empty() {
        parts.push(table(
            ["FIELD", "IMAGE", "STATE", "SHA256", "SINCE", "AGAIN IN", "ERROR"],
            &images,
        ));
    }
    parts.push(format!(
        "{} of {} used",
        size_text(answer.size),
        size_text(answer.max_size)
    ));
    parts.join("\n\n")
}

fn list_json(answer: &v1::ListModulesResponse) -> Value {
    let modules: Vec<Value> = answer
        .modules
        .iter()
        .map(|module| {
            let mut shown = module_json(module);
            // The listing has neither; empty they would say that there are none.
            if let Some(fields) = shown.as_object_mut() {
                fields.remove("imports");
                fields.remove("exports");
            }
            shown
        })
        .collect();
    let images: Vec<Value> = answer
        .images
        .iter()
        .map(|image| {
            json!({
                "field": image.field,
                "image": image.image,
                "state": state_text(image.state()),
                "sha256": some(&image.sha256),
                "error": some(&image.error),
                "since": image.since.map(|since| since.to_string()),
                "next_seconds": image.next.as_ref().map(|next| next.seconds),
            })
        })
        .collect();
    json!({"modules": modules, "images": images, "size": answer.size, "max_size": answer.max_size})
}

fn module_json(module: &v1::Module) -> Value {
    json!({
        "sha256": module.sha256,
        "kind": kind_text(module),
        "version": module.version,
        "imports": module.imports,
        "exports": module.exports,
        "size": module.size,
        "create_time": module.create_time.map(|at| at.to_string()),
        "by": module.by,
        "signatures": module.signatures,
        "used_by": module.used_by,
    })
}

/// The word of policy.
fn kind_text(module: &v1::Module) -> &'static str {
    match module.kind() {
        v1::PluginKind::Unspecified => "-",
        v1::PluginKind::Fallback => "Fallback",
        v1::PluginKind::Filter => "Filter",
        v1::PluginKind::Router => "Router",
        v1::PluginKind::WasiHttp => "WasiHttp",
        v1::PluginKind::ProxyWasm => "ProxyWasm",
    }
}

const fn state_text(state: State) -> &'static str {
    match state {
        State::Unspecified => "-",
        State::Pending => "pending",
        State::Current => "current",
        State::Failed => "failed",
    }
}

fn next_text(image: &v1::ImageState) -> String {
    let next = image
        .next
        .as_ref()
        .map(|next| u64::try_from(next.seconds).unwrap_or(0));
    next.map_or_else(
        || "-".to_owned(),
        |seconds| duration_text(Duration::from_secs(seconds)),
    )
}

fn time(time: Option<&prost_types::Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), ToString::to_string)
}

fn some(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn dash(text: &str) -> String {
    some(text).unwrap_or("-").to_owned()
}

/// A size with a digit after the point, in the largest unit that it fills.
fn size_text(bytes: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| bytes >= *unit) {
        // Rounded down, so that 1023.99 KiB isn't 1024.0 KiB.
        Some((unit, name)) => format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_at_a_glance() {
        for (bytes, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (5 << 19, "2.5 MiB"),
            (2 << 30, "2.0 GiB"),
        ] {
            assert_eq!(size_text(bytes), want);
        }
    }

    #[test]
    fn a_module_is_sent_whole_in_pieces() {
        let bytes: Vec<u8> = (0..=255).cycle().take(2 * CHUNK + 1).collect();
        let mut sent = messages(bytes.clone().into(), "signed".to_owned()).map(|m| m.message.unwrap());
        let Some(Message::Header(header)) = sent.next() else {
            panic!("no header first");
        };
        assert_eq!(header.signature, "signed");
        let chunks: Vec<Vec<u8>> = sent
            .map(|message| match message {
                Message::Chunk(chunk) => chunk,
                Message::Header(_) => panic!("two headers"),
            })
            .collect();
        assert_eq!(chunks.iter().map(Vec::len).collect::<Vec<_>>(), [CHUNK, CHUNK, 1]);
        assert_eq!(chunks.concat(), bytes);
    }

    #[test]
    fn so_many_digits_name_a_module_that_no_other_begins_with_them() {
        let known = ["0123456789ab", "0123456780cd", "ffff0000ffff"];
        assert_eq!(one("ffff0000", known.into_iter()).unwrap(), "ffff0000ffff");
        let Err(Failure::BadInput(many)) = one("01234567", known.into_iter()) else {
            panic!("one of two was taken");
        };
        assert!(many.contains("2 modules begin with 01234567"), "{many}");
        assert!(many.contains(known[0]) && many.contains(known[1]), "{many}");
        assert!(matches!(
            one("aaaaaaaa", known.into_iter()),
            Err(Failure::Failed(_))
        ));
        assert_eq!(digits("ABCDEF01").unwrap(), "abcdef01");
        for bad in ["abcdef0", "abcdefg1", "", &"a".repeat(65)] {
            assert!(matches!(digits(bad), Err(Failure::BadInput(_))), "{bad}");
        }
    }

    #[test]
    fn what_was_pushed_is_told() {
        let module = v1::Module {
            sha256: "ab".repeat(32),
            kind: v1::PluginKind::ProxyWasm.into(),
            version: "0.2.1".to_owned(),
            imports: vec!["env.proxy_log".to_owned(), "env.proxy_done".to_owned()],
            size: 2048,
            ..v1::Module::default()
        };
        let want = format!(
            "sha256      {}\nkind        ProxyWasm 0.2.1\nsize        2.0 KiB\nsignatures  0\nimports     env.proxy_log\n            env.proxy_done",
            "ab".repeat(32)
        );
        assert_eq!(pushed(&module), want);
    }
}
