//! `leeward plugin build`: from a project to a module, by the tools of its language.

use super::inspect::summary;
use super::project::{self, Language, Project};
use super::wit;
use crate::output::{Failure, complain, say};
use clap::Args;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::process::Command;

/// Which project.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The project's directory.
    #[arg(default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// What Rust is compiled for; wasm32-wasip1 for proxy-wasm modules.
    #[arg(long, default_value = RUST_TARGET, value_name = "TRIPLE")]
    target: String,
}

/// The target of Rust's that makes components.
pub(crate) const RUST_TARGET: &str = "wasm32-wasip2";

pub(crate) async fn run(options: &Options) -> Result<(), Failure> {
    let project = Project::open(&options.dir)?;
    say(&build(&project, &options.target).await?);
    Ok(())
}

/// Builds a project's module, looks whether it is one, and says what it is.
pub(crate) async fn build(project: &Project, target: &str) -> Result<String, Failure> {
    let out = project.module();
    let made = |error: std::io::Error| Failure::BadInput(format!("{}: {error}", out.display()));
    std::fs::create_dir_all(project.dir.join("build")).map_err(made)?;
    match project.language {
        Language::Rust => rust(project, target, &out).await?,
        Language::Js => js(project, &out).await?,
        Language::Python => python(project, &out).await?,
        Language::C => c(project, &out).await?,
    }
    let module = project::module(&out)?;
    Ok(summary(&out, &module))
}

/// Runs a tool in the project, its output shown. `missing` says how to get it.
async fn tool(mut command: Command, project: &Project, missing: &str) -> Result<Vec<u8>, Failure> {
    let shown = command.as_std().get_program().to_string_lossy().into_owned();
    command
        .current_dir(&project.dir)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let child = command.spawn().map_err(|error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            Failure::BadInput(format!("{shown} is not installed: {missing}"))
        } else {
            Failure::Failed(anyhow::anyhow!("can't run {shown}: {error}"))
        }
    })?;
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Failure::Failed(anyhow::anyhow!(
        "{shown} failed ({})",
        output.status
    )))
}

/// A tool of the project's own, or of the user's.
fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    // Results are this command's to tell; what a tool says beside them is for people.
    command.stdout(std::io::stderr()).stderr(Stdio::inherit());
    command
}

async fn rust(project: &Project, target: &str, out: &Path) -> Result<(), Failure> {
    let get_rust = "install Rust from https://rustup.rs";
    let mut rustc = command("rustc");
    rustc
        .args(["--print", "target-libdir", "--target", target])
        .stdout(Stdio::piped());
    let dir = tool(rustc, project, get_rust).await?;
    let dir = String::from_utf8_lossy(&dir);
    if !Path::new(dir.trim()).is_dir() {
        return Err(Failure::BadInput(format!(
            "Rust's target {target} is not installed; want `rustup target add {target}`"
        )));
    }
    let mut cargo = command("cargo");
    cargo
        .args(["build", "--release", "--target", target])
        .args(["--message-format", "json-render-diagnostics"])
        .stdout(Stdio::piped());
    let messages = tool(cargo, project, get_rust).await?;
    let built = artifact(&messages, &project.dir).ok_or_else(|| {
        Failure::BadInput(format!(
            "{}: the package makes no module; want crate-type = [\"cdylib\"] in [lib]",
            project.dir.join("Cargo.toml").display()
        ))
    })?;
    copy(&built, out)
}

/// The module among what cargo says that it made, of the package in a directory.
fn artifact(messages: &[u8], dir: &Path) -> Option<PathBuf> {
    let manifest = dir.join("Cargo.toml");
    let lines = messages.split(|byte| *byte == b'\n');
    let made = lines.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let of_package = |message: &Value| {
        message.get("reason").and_then(Value::as_str) == Some("compiler-artifact")
            && message
                .get("manifest_path")
                .and_then(Value::as_str)
                .map(Path::new)
                == Some(&manifest)
    };
    let mut files = made.filter(of_package).filter_map(|message| {
        let files = message.get("filenames")?.as_array()?;
        let mut files = files.iter().filter_map(Value::as_str);
        files.find(|file| file.ends_with(".wasm")).map(PathBuf::from)
    });
    files.next_back()
}

fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    let failed = |error| {
        Failure::Failed(anyhow::anyhow!(
            "can't copy {} to {}: {error}",
            from.display(),
            to.display()
        ))
    };
    std::fs::copy(from, to).map(drop).map_err(failed)
}

async fn js(project: &Project, out: &Path) -> Result<(), Failure> {
    let file = project.dir.join("package.json");
    let bad = |why: &str| Failure::BadInput(format!("{}: {why}", file.display()));
    let package = std::fs::read(&file).map_err(|error| bad(&error.to_string()))?;
    let package: Value = serde_json::from_slice(&package).map_err(|error| bad(&error.to_string()))?;
    let world = package.pointer("/leeward/world").and_then(Value::as_str);
    let world = wit::world(world).ok_or_else(|| bad(&format!("leeward.world: {}", wit::WANT_WORLD)))?;
    let main = package.get("main").and_then(Value::as_str);
    let main = main.ok_or_else(|| bad("main: want the plugin's source, such as \"src/plugin.js\""))?;
    if !project
        .dir
        .join("node_modules/@bytecodealliance/componentize-js")
        .is_dir()
    {
        complain("componentize-js is not in node_modules: running npm install");
        let mut npm = command("npm");
        npm.args(["install", "--no-audit", "--no-fund"]);
        tool(npm, project, "install Node.js 20 or later, with npm").await?;
    }
    let mut node = command("node");
    node.args(["--input-type=module", "--eval", COMPONENTIZE, "--"])
        .args([main, wit::DIR, world])
        .arg(out);
    tool(node, project, "install Node.js 20 or later").await?;
    Ok(())
}

/// What a project in JavaScript is built with: the command of this tool doesn't work with a world of one's own, what it
/// stands on does.
const COMPONENTIZE: &str = r#"
import { readFile, writeFile } from "node:fs/promises";
import { basename } from "node:path";
import { componentize } from "@bytecodealliance/componentize-js";
const [source, witPath, worldName, out] = process.argv.slice(-4);
const { component } = await componentize(await readFile(source, "utf8"), {
  sourceName: basename(source),
  witPath,
  worldName,
  disableFeatures: ["http", "fetch-event"],
});
await writeFile(out, component);
"#;

async fn python(project: &Project, out: &Path) -> Result<(), Failure> {
    let file = project.dir.join("pyproject.toml");
    let bad = |why: &str| Failure::BadInput(format!("{}: {why}", file.display()));
    let text = std::fs::read_to_string(&file).map_err(|error| bad(&error.to_string()))?;
    let world = wit::world(setting(&text, "world"));
    let world = world.ok_or_else(|| bad(&format!("[tool.leeward] world: {}", wit::WANT_WORLD)))?;
    let own = project.dir.join(".venv/bin/componentize-py");
    let mut py = command(if own.is_file() {
        own
    } else {
        "componentize-py".into()
    });
    py.args(["-d", wit::DIR, "-w", world, "componentize", "app", "-o"])
        .arg(out);
    let missing =
        "want `python3 -m venv .venv && .venv/bin/pip install componentize-py==0.25.1` in the project";
    tool(py, project, missing).await?;
    Ok(())
}

/// The value of `NAME = VALUE` on a line of its own, with or without quotes.
fn setting<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let lines = text.lines().filter_map(|line| line.split_once('='));
    let mut named = lines.filter(|(key, _)| key.trim_end_matches(':').trim() == name);
    named.next().map(|(_, value)| value.trim().trim_matches('"'))
}

/// What a Makefile makes is the module, or a module of a world that is to be made a component.
async fn c(project: &Project, out: &Path) -> Result<(), Failure> {
    let core = out.with_extension("core.wasm");
    let mut make = command("make");
    make.arg(format!("OUT={}", core.display()));
    if std::env::var_os("CC").is_none()
        && let Some(compiler) = compiler(&project.dir.join("build")).await
    {
        make.arg(format!("CC={compiler}"));
    }
    tool(make, project, "install make")
        .await
        .map_err(|failure| match failure {
            Failure::Failed(error) => Failure::Failed(error.context(WANT_COMPILER)),
            other @ (Failure::BadInput(_) | Failure::Told | Failure::Status(_) | Failure::Untold(_)) => other,
        })?;
    let module = project::read(&core)?;
    if leeward_module::inspect(&module).is_ok() {
        return copy(&core, out);
    }
    let file = project.dir.join("Makefile");
    let bad = |why: &str| Failure::BadInput(format!("{}: {why}", file.display()));
    let text = std::fs::read_to_string(&file).map_err(|error| bad(&error.to_string()))?;
    let world = wit::world(setting(&text, "WORLD"));
    let world = world.ok_or_else(|| bad(&format!("WORLD: {}", wit::WANT_WORLD)))?;
    let component = wit::component(&project.dir.join(wit::DIR), world, module)?;
    std::fs::write(out, component)
        .map_err(|error| Failure::Failed(anyhow::anyhow!("can't write {}: {error}", out.display())))
}

/// What may be missing where make fails.
const WANT_COMPILER: &str = "if it is the compiler: want wasi-sdk (WASI_SDK_PATH), clang with wasi-libc (Debian: clang, lld, wasi-libc, libclang-rt-dev-wasm32), or zig (`pip install ziglang`), or one named by CC";

/// A C compiler for WebAssembly.
async fn compiler(scratch: &Path) -> Option<String> {
    let sdk = std::env::var("WASI_SDK_PATH").ok();
    let candidates = [
        sdk.map(|sdk| format!("{sdk}/bin/clang")),
        Some("clang".to_owned()),
        Some("zig cc".to_owned()),
        Some("python3 -m ziglang cc".to_owned()),
    ];
    for candidate in candidates.into_iter().flatten() {
        if can_compile(&candidate, scratch).await {
            return Some(candidate);
        }
    }
    None
}

/// Whether a compiler can make a module of a program that wants the C library.
async fn can_compile(compiler: &str, scratch: &Path) -> bool {
    let mut words = compiler.split(' ');
    let Some(program) = words.next() else { return false };
    let probe = scratch.join("probe");
    let source = probe.with_extension("c");
    if std::fs::write(
        &source,
        "#include <stdlib.h>\nvoid *f(void) { return malloc(1); }\n",
    )
    .is_err()
    {
        return false;
    }
    let mut command = Command::new(program);
    command
        .args(words)
        .args(["-target", "wasm32-wasi", "-mexec-model=reactor", "-o"])
        .arg(probe.with_extension("wasm"))
        .arg(&source)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let compiles = command.status().await.is_ok_and(|status| status.success());
    for made in [source, probe.with_extension("wasm")] {
        // Left behind, it harms nobody.
        let _ = std::fs::remove_file(made);
    }
    compiles
}
