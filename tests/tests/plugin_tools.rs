//! The tools for those who write plugins: `leeward plugin`, as a process, with modules as they are built.

use anyhow::{Context, ensure};
use leeward_testkit::policy::{fallback, plugin, route, service};
use leeward_testkit::{Backend, Mesh, Protocol, TempDir, binaries};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// How long a command may take; a debug build compiles a module of Python's for a minute, on a busy machine longer.
const PATIENCE: Duration = Duration::from_secs(600);

/// The plugins that have cases beside them.
const EXAMPLES: [&str; 10] = [
    "static-json",
    "recommendations-fallback",
    "order-receipt",
    "partner-hedge",
    "header-rewrite",
    "json-redactor",
    "canary-router",
    "wasi-http-app",
    "headers",
    "pw-headers",
];

fn plugins() -> PathBuf {
    binaries::workspace().join("plugins")
}

fn command(dir: &Path, args: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(binaries::path("leeward")?);
    command
        .arg("plugin")
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    Ok(command)
}

async fn run(dir: &Path, args: &[&str]) -> anyhow::Result<Output> {
    let ended = tokio::time::timeout(PATIENCE, command(dir, args)?.output()).await;
    Ok(ended.with_context(|| format!("leeward plugin {args:?} doesn't end"))??)
}

/// What a command says; it must do well.
async fn well(dir: &Path, args: &[&str]) -> anyhow::Result<String> {
    let output = run(dir, args).await?;
    let said = String::from_utf8(output.stdout)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{args:?}: {said}{errors}");
    Ok(said)
}

/// With what a command ends, and what it complains of.
async fn badly(dir: &Path, args: &[&str]) -> anyhow::Result<(i32, String)> {
    let output = run(dir, args).await?;
    let code = output.status.code().context("killed")?;
    Ok((code, String::from_utf8(output.stderr)?))
}

fn json(text: &str) -> anyhow::Result<Value> {
    serde_json::from_str(text).with_context(|| text.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cases_of_every_example_pass() -> anyhow::Result<()> {
    for example in EXAMPLES {
        let said = well(&plugins(), &["test", example]).await?;
        ensure!(said.ends_with(" passed, 0 failed\n"), "{said}");
        let result = json(&well(&plugins(), &["test", example, "-o", "json"]).await?)?;
        let cases = result["cases"].as_array().context("no cases")?;
        ensure!(result["passed"] == cases.len() && !cases.is_empty(), "{result}");
        for case in cases {
            ensure!(case["memory_bytes"].as_u64() > Some(0), "{case}");
            ensure!(case["time_us"].as_f64() > Some(0.0), "{case}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_case_that_fails_shows_what_is_different() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let module = plugins().join("built/static-json.wasm");
    let module = module.to_str().context("not UTF-8")?;
    let cases = r#"
cases:
  - name: fine
    config: {body: {items: []}}
    expect: {respond: {json: {items: []}}}
  - name: another body
    config: {status: 201, body: {items: [a]}}
    expect:
      respond: {status: 200, headers: {x-none: there}, json: {items: [b]}}
      maxMemory: 1B
      log: never
  - name: no answer
    config: no JSON
    expect: {respond: {status: 200}}
"#;
    std::fs::write(dir.path().join("cases.yaml"), cases)?;
    let output = run(dir.path(), &["test", module, "--cases", "cases.yaml"]).await?;
    let said = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(1), "{said}");
    for line in [
        "ok    fine",
        "FAIL  another body  (respond 201, ",
        "respond.status (- wanted, + got):\n        - 200\n        + 201",
        "respond.headers.x-none (- wanted, + got):\n        - there\n        + not there",
        "-     \"b\"\n        +     \"a\"",
        "maxMemory (- wanted, + got):\n        - at most 1B",
        "a line with \"never\"",
        "FAIL  no answer  (decline, ",
        "- respond\n        + decline",
        // What a plugin said helps to see why.
        "the rung's config is wrong",
        "1 passed, 2 failed",
    ] {
        ensure!(said.contains(line), "{line}\n{said}");
    }
    let output = run(
        dir.path(),
        &["test", module, "--cases", "cases.yaml", "-o", "json"],
    )
    .await?;
    assert_eq!(output.status.code(), Some(1));
    let result = json(&String::from_utf8(output.stdout)?)?;
    assert_eq!(result["failed"], 2, "{result}");
    assert_eq!(result["cases"][1]["differences"][0]["field"], "respond.status");
    let one = well(
        dir.path(),
        &["test", module, "--cases", "cases.yaml", "--only", "fine"],
    )
    .await?;
    ensure!(one.contains("1 passed, 0 failed"), "{one}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_cases_is_told_with_its_place() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let (module, filter) = (
        plugins().join("built/static-json.wasm"),
        plugins().join("built/header-rewrite.wasm"),
    );
    let (module, filter) = (
        module.to_str().context("not UTF-8")?,
        filter.to_str().context("not UTF-8")?,
    );
    for (module, cases, why) in [
        (module, "cases: [", "cases.yaml:2: is not YAML"),
        (
            module,
            "cases:\n  - name: a\n    expect: {respond: {stauts: 200}}",
            "cases.yaml:3: case \"a\": expect.respond.stauts: is no field; want status",
        ),
        (
            filter,
            "cases:\n  - name: a\n    expect: {decline: true}",
            "cases.yaml:3: case \"a\": expect.decline: is for fallbacks; this module is of kind Filter",
        ),
    ] {
        std::fs::write(dir.path().join("cases.yaml"), cases)?;
        let (code, said) = badly(dir.path(), &["test", module, "--cases", "cases.yaml"]).await?;
        ensure!(code == 64 && said.contains(why), "{cases}: {code} {said}");
    }
    std::fs::write(dir.path().join("no.wasm"), "no module")?;
    let (code, said) = badly(dir.path(), &["test", "no.wasm"]).await?;
    ensure!(
        code == 64 && said.contains("no.wasm: not a WebAssembly module"),
        "{said}"
    );
    let (code, said) = badly(dir.path(), &["test", "none.wasm"]).await?;
    ensure!(code == 64 && said.contains("none.wasm: no such file"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_is_told_with_its_reason() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let module = plugins().join("built/misbehave.wasm");
    let module = module.to_str().context("not UTF-8")?;
    let cases = "
limits: {callTimeout: 100ms}
cases:
  - {name: loops, config: loop, expect: {fault: time}}
  - {name: grows, config: memory, expect: {fault: memory}}
  - {name: splits, config: split, expect: {respond: {}}}
";
    std::fs::write(dir.path().join("cases.yaml"), cases)?;
    let output = run(dir.path(), &["test", module, "--cases", "cases.yaml"]).await?;
    let said = String::from_utf8(output.stdout)?;
    for line in [
        "ok    loops  (fault time, ",
        "ok    grows  (fault memory, ",
        "FAIL  splits  (fault bad_response, ",
        "- respond\n        + fault bad_response\n        +   ",
    ] {
        ensure!(said.contains(line), "{line}\n{said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_is_shown_with_what_it_may_do() -> anyhow::Result<()> {
    let built = plugins().join("built");
    for (module, kind, may) in [
        ("static-json.wasm", "Fallback", "write log lines, count"),
        (
            "compat/static-json-0.1.wasm",
            "Fallback",
            "write log lines, count",
        ),
        (
            "recommendations-fallback.wasm",
            "Fallback",
            "call services through the mesh",
        ),
        ("order-receipt.wasm", "Fallback", "have random numbers"),
        ("header-rewrite.wasm", "Filter", "write log lines, count"),
        ("canary-router.wasm", "Router", "write log lines, count"),
        ("wasi-http-app.wasm", "WasiHttp", "call services through the mesh"),
        ("pw-demo.wasm", "ProxyWasm", "call services through the mesh"),
    ] {
        let said = well(&built, &["inspect", module]).await?;
        ensure!(said.contains(&format!("kind       {kind}: ")), "{said}");
        ensure!(said.contains(may), "{module}: {may}\n{said}");
        let shown = json(&well(&built, &["inspect", module, "-o", "json"]).await?)?;
        assert_eq!(shown["kind"], kind, "{shown}");
        assert_eq!(shown["size_bytes"], std::fs::metadata(built.join(module))?.len());
        assert_eq!(shown["signature"], "none");
        ensure!(shown["memories"][0]["min_bytes"].as_u64() > Some(0), "{shown}");
        ensure!(
            shown["sha256"].as_str().is_some_and(|digest| digest.len() == 64),
            "{shown}"
        );
    }
    let old = json(&well(&built, &["inspect", "compat/static-json-0.1.wasm", "-o", "json"]).await?)?;
    assert_eq!(old["version"], "0.1.0");
    let (code, said) = badly(&built, &["inspect", "MANIFEST"]).await?;
    ensure!(code == 64 && said.contains("not a WebAssembly module"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_call_costs_is_measured() -> anyhow::Result<()> {
    for (example, fresh) in [
        ("static-json", false),
        ("header-rewrite", true),
        ("headers", false),
        ("pw-headers", false),
    ] {
        let mut args = vec!["bench", example, "--seconds", "0.05", "-o", "json"];
        if fresh {
            args.push("--fresh");
        }
        let result = json(&well(&plugins(), &args).await?)?;
        for case in result["cases"].as_array().context("no cases")? {
            ensure!(case["calls_per_second"].as_f64() > Some(0.0), "{case}");
            ensure!(
                case["cpu_p99_us"].as_f64() >= case["cpu_p50_us"].as_f64(),
                "{case}"
            );
            ensure!(case["memory_bytes"].as_u64() > Some(0), "{case}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_project_is_only_made_where_there_is_none() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    well(dir.path(), &["new", "one", "--lang", "js"]).await?;
    let written = std::fs::read_to_string(dir.path().join("one/package.json"))?;
    for (args, why) in [
        (["new", "one", "--lang", "c"], "is there already"),
        (["new", "One", "--lang", "c"], "NAME: "),
        (["new", "../one", "--lang", "c"], "NAME: "),
        (["new", "1", "--lang", "c"], "NAME: "),
        (["new", "two", "--lang", "cobol"], "invalid value 'cobol'"),
    ] {
        let (code, said) = badly(dir.path(), &args).await?;
        ensure!(code == 64 && said.contains(why), "{args:?}: {code} {said}");
    }
    assert_eq!(
        std::fs::read_to_string(dir.path().join("one/package.json"))?,
        written
    );
    let (code, said) = badly(dir.path(), &["build", "."]).await?;
    ensure!(
        code == 64 && said.contains("no plugin's project; want Cargo.toml"),
        "{said}"
    );
    Ok(())
}

/// Makes a project of each kind in a language, builds it, and runs its cases.
async fn made(lang: &str, path: Option<&Path>) -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    for kind in ["fallback", "filter", "router"] {
        let name = format!("{kind}-in-{lang}");
        well(dir.path(), &["new", &name, "--lang", lang, "--kind", kind]).await?;
        let mut build = command(dir.path(), &["build", &name])?;
        if let Some(path) = path {
            let inherited = std::env::var("PATH")?;
            build.env("PATH", format!("{}:{inherited}", path.display()));
        }
        // One target directory, so that what all three need is built once.
        build.env("CARGO_TARGET_DIR", dir.path().join("target"));
        let output = tokio::time::timeout(PATIENCE, build.output()).await??;
        let (said, errors) = (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        );
        ensure!(output.status.success(), "{name}: {said}{errors}");
        ensure!(
            said.contains(&format!("{name}.wasm: ")) && said.contains("sha256 "),
            "{said}"
        );
        let said = well(dir.path(), &["test", &name]).await?;
        ensure!(said.contains(", 0 failed"), "{name}: {said}");
    }
    Ok(())
}

/// Whether a program can be run so.
async fn there(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    command.output().await.is_ok_and(|output| output.status.success())
}

/// A tool isn't here: what would be tested with it isn't, and says so.
fn skipped(what: &str) -> anyhow::Result<()> {
    writeln!(std::io::stderr(), "SKIPPED: want {what}")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_project_in_rust_builds_and_its_cases_pass() -> anyhow::Result<()> {
    let args = ["--print", "target-libdir", "--target", "wasm32-wasip2"];
    let dir = Command::new("rustc").args(args).output().await?;
    if !Path::new(String::from_utf8(dir.stdout)?.trim()).is_dir() {
        let dir = TempDir::new()?;
        well(dir.path(), &["new", "one", "--lang", "rust"]).await?;
        let (code, said) = badly(dir.path(), &["build", "one"]).await?;
        ensure!(
            code == 64 && said.contains("want `rustup target add wasm32-wasip2`"),
            "{said}"
        );
        return skipped("Rust's target wasm32-wasip2");
    }
    made("rust", None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_project_in_javascript_builds_and_its_cases_pass() -> anyhow::Result<()> {
    // npm would fetch some 100 MB, which nobody is to find in a test run unasked.
    if std::env::var_os("LEEWARD_TEST_NPM").is_none() || !there("npm", &["--version"]).await {
        return skipped("npm, and LEEWARD_TEST_NPM to say that it may fetch componentize-js");
    }
    made("js", None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_project_in_python_builds_and_its_cases_pass() -> anyhow::Result<()> {
    let tools = std::env::var_os("LEEWARD_TEST_COMPONENTIZE_PY").map(PathBuf::from);
    if tools.is_none() && !there("componentize-py", &["--version"]).await {
        return skipped("componentize-py (LEEWARD_TEST_COMPONENTIZE_PY names its directory)");
    }
    made("python", tools.as_deref()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_project_in_c_builds_and_its_cases_pass() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    std::fs::write(
        dir.path().join("a.c"),
        "#include <stdlib.h>\nvoid *f(void) { return malloc(1); }\n",
    )?;
    let source = dir.path().join("a.c").display().to_string();
    let out = dir.path().join("a.wasm").display().to_string();
    let args = [
        "-target",
        "wasm32-wasi",
        "-mexec-model=reactor",
        "-o",
        &out,
        &source,
    ];
    let zig = [&["-m", "ziglang", "cc"], args.as_slice()].concat();
    if !there("make", &["--version"]).await || !there("clang", &args).await && !there("python3", &zig).await {
        return skipped("make with clang and wasi-libc, or ziglang");
    }
    made("c", None).await
}

/// The lines that a process writes, as they come.
struct Lines {
    child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Lines {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().context("no standard output")?;
        Ok(Self {
            child,
            lines: BufReader::new(out).lines(),
        })
    }

    /// Waits for a line with this in it.
    async fn until(&mut self, text: &str) -> anyhow::Result<String> {
        let found = async {
            let mut before = String::new();
            while let Some(line) = self.lines.next_line().await? {
                if line.contains(text) {
                    return Ok(line);
                }
                before.push_str(&line);
                before.push('\n');
            }
            anyhow::bail!("it ended without {text:?}:\n{before}")
        };
        tokio::time::timeout(PATIENCE, found)
            .await
            .with_context(|| format!("no line with {text:?}"))?
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_plugins_write_comes_from_the_proxies_as_it_is_written() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let dead = Backend::refusing("dead")?;
    let module = plugins().join("built/static-json.wasm").display().to_string();
    let policy = service("dead", &[(dead.address(), "a", "")], &[])
        + &plugin("json", &module, "NextRung", "")
        + &fallback("wrong", &["plugin: {plugin: json, config: no JSON}"], &[])
        + &route("dead", "dead.example", "dead", &["fallback: wrong"]);
    mesh.apply(&policy).await?;
    let nodes = ["a1", "b1"];
    let mut admins = Vec::new();
    for node in nodes {
        admins.push(mesh.node(node)?.admin.to_string());
    }
    let proxies = admins.join(",");
    let args = ["logs", "json", "--proxy", &proxies, "--follow"];
    let mut following = Lines::start(command(mesh.dir(), &args)?)?;
    for (node, admin) in nodes.iter().zip(&admins) {
        let client = mesh.workload(node, Protocol::Http1)?;
        client.get("dead.example", "/").await?;
        let line = following.until(admin).await?;
        ensure!(line.contains(" ERROR json: the rung's config is wrong"), "{line}");
    }
    following.child.kill().await?;
    let both = well(mesh.dir(), &["logs", "json", "--proxy", &proxies]).await?;
    assert_eq!(both.lines().count(), 2, "each line comes once: {both}");
    let none = well(mesh.dir(), &["logs", "other", "--proxy", &proxies]).await?;
    assert_eq!(none, "");
    let (code, said) = badly(mesh.dir(), &["logs", "--proxy", "127.0.0.1:1"]).await?;
    ensure!(code == 1 && said.contains("no proxy at 127.0.0.1:1"), "{said}");
    Ok(())
}

/// A project whose module is another's: what a tool does is no concern here.
fn borrowed(dir: &Path, module: &str) -> anyhow::Result<()> {
    let module = plugins().join("built").join(module);
    let makefile = format!("all:\n\tcp {} $(OUT)\n", module.display());
    // A file that is half written is no project.
    std::fs::write(dir.join("Makefile.new"), makefile)?;
    Ok(std::fs::rename(dir.join("Makefile.new"), dir.join("Makefile"))?)
}

async fn ask(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    use http_body_util::{BodyExt, Empty};
    let stream = tokio::net::TcpStream::connect(address).await?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    tokio::spawn(connection);
    let request = http::Request::get(path)
        .header("host", "shop.example")
        .body(Empty::<bytes::Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8(body.to_vec())?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_is_built_tried_and_swapped_when_a_source_is_saved() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let project = dir.path();
    borrowed(project, "static-json.wasm")?;
    let cases = "
config: {status: 203, body: one}
cases:
  - {name: answers, expect: {respond: {status: 203, body: '\"one\"'}}}
";
    std::fs::write(project.join("cases.yaml"), cases)?;
    std::fs::write(
        project.join("recorded.jsonl"),
        "{\"method\": \"GET\", \"path\": \"/a\"}\n",
    )?;
    let args = [
        "dev",
        "--listen",
        "127.0.0.1:0",
        "--replay",
        "recorded.jsonl",
        "--record",
        "seen.log",
    ];
    let mut dev = Lines::start(command(project, &args)?)?;
    let line = dev.until("listening on http://").await?;
    let address = line.trim_start_matches("listening on http://").to_owned();
    dev.until("replay: 1 requests asked").await?;
    dev.until("ok    answers  (respond 203, ").await?;
    dev.until("1 passed, 0 failed").await?;
    assert_eq!(ask(&address, "/a").await?, (203, "\"one\"".to_owned()));
    // Other cases have another configuration, and another answer to what was recorded.
    std::fs::write(project.join("cases.new"), cases.replace("body: one", "body: two"))?;
    std::fs::rename(project.join("cases.new"), project.join("cases.yaml"))?;
    dev.until("replay 1: GET /a (- before, + now):").await?;
    dev.until("+ \"two\"").await?;
    dev.until("replay: 1 of 1 answered otherwise than before").await?;
    dev.until("0 passed, 1 failed").await?;
    assert_eq!(ask(&address, "/b").await?, (203, "\"two\"".to_owned()));
    // Another module, of another kind: a filter is before an echo.
    std::fs::write(
        project.join("cases.yaml"),
        "
config: {request: {set: {x-by: dev}}, response: {set: {x-shop: dev}}}
cases:
  - {name: passes, expect: {request: {headers: {x-by: dev}}}}
",
    )?;
    borrowed(project, "header-rewrite.wasm")?;
    dev.until("ok    passes  (pass, ").await?;
    let (status, body) = ask(&address, "/c").await?;
    ensure!(
        status == 200 && json(&body)?["headers"]["x-by"] == "dev",
        "{body}"
    );
    // What doesn't build leaves what was there.
    borrowed(project, "MANIFEST")?;
    dev.until("a source has changed").await?;
    assert_eq!(ask(&address, "/d").await?.0, 200);
    let seen = std::fs::read_to_string(project.join("seen.log"))?;
    assert_eq!(seen.lines().count(), 4, "{seen}");
    dev.child.kill().await?;
    let (code, said) = badly(project, &["dev", "--once"]).await?;
    ensure!(code == 64, "{code} {said}");
    Ok(())
}
