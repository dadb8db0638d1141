//! What plugins cost: a filter beside Envoy's, a fallback call, many plugins in memory, and swaps under load.

use crate::measure::{Bench, Contender, Load, Run, Running, in_turns, now, pause};
use crate::peers::{Peer, Protocol, Setup};
use anyhow::{Context, ensure};
use leeward_testkit::policy::{fallback, plugin, route, service};
use leeward_testkit::{Backend as Service, Mesh, binaries, eventually};
use std::fmt::Write as _;
use std::io::{Stdout, Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// With the field that the filters read.
const FLAT_OUT: Load = Load {
    field: Some("x-bench-in: 12345678"),
    ..Load::FLAT_OUT
};

impl Bench<'_> {
    pub(crate) fn plugins(&self, loaded: u32, swaps: u32) -> anyhow::Result<()> {
        let mut out = stdout();
        self.filters(&mut out)?;
        self.fallbacks(&mut out)?;
        self.loaded(&mut out, loaded)?;
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?
            .block_on(swapped(&mut out, self.dir, swaps))
    }

    /// A filter that reads one field and sets another, as a component and as a proxy-wasm module.
    fn filters(&self, out: &mut Stdout) -> anyhow::Result<()> {
        let module = built("pw-headers");
        let rules = "{backendRefs: [{service: backend}], filters: [{plugin: bench}]}".to_owned();
        let leeward = |name, documents: String, rules: String| Contender {
            name,
            peer: Peer::Leeward(self.proxy.to_owned()),
            setup: Setup {
                documents,
                rules,
                wasm: None,
            },
        };
        let envoy = |name, wasm| Contender {
            name,
            peer: Peer::Envoy,
            setup: Setup {
                wasm,
                ..Setup::default()
            },
        };
        let component = filter("Filter", &built("headers"));
        let mut contenders = vec![
            leeward("leeward", String::new(), String::new()),
            leeward("leeward, component", component, rules.clone()),
            leeward("leeward, proxy-wasm", filter("ProxyWasm", &module), rules),
        ];
        if Peer::Envoy.is_here() {
            contenders.push(envoy("envoy", None));
            contenders.push(envoy("envoy, proxy-wasm", Some(module)));
        }
        self.compare(
            out,
            "A filter that reads a field and sets another",
            &contenders,
            &["leeward", "envoy"],
        )
    }

    /// A rung that is a plugin, beside one that is policy's own answer.
    fn fallbacks(&self, out: &mut Stdout) -> anyhow::Result<()> {
        let body = "x".repeat(64);
        let own = format!("static: {{status: 200, body: \"{body}\"}}");
        let asked = format!("plugin: {{plugin: bench, config: '{{\"status\": 200, \"body\": \"{body}\"}}'}}");
        let contender = |name, rung: &str, more: &str| Contender {
            name,
            peer: Peer::Leeward(self.proxy.to_owned()),
            setup: Setup {
                documents: service("nobody", &[], &["hold: {maxRequests: 0}"])
                    + &plugin(
                        "bench",
                        &built("static-json").display().to_string(),
                        "NextRung",
                        "",
                    )
                    + more
                    + &fallback("bench", &[rung], &[]),
                rules: "{backendRefs: [{service: nobody}], fallback: bench}".to_owned(),
                wasm: None,
            },
        };
        let contenders = [
            contender("policy's own answer", &own, ""),
            contender("plugin", &asked, ""),
            contender("plugin, fresh instance", &asked, "  freshInstance: true\n"),
        ];
        self.compare(
            out,
            "A fallback for a call that failed",
            &contenders,
            &["policy's own answer"],
        )
    }

    /// CPU time for each request of all, and what each has more than the one of `bases` before it.
    fn compare(
        &self,
        out: &mut Stdout,
        title: &str,
        contenders: &[Contender],
        bases: &[&str],
    ) -> anyhow::Result<()> {
        let place = (self.dir, self.backend);
        let runs = in_turns(contenders, FLAT_OUT, self.rounds, self.seconds, place)?;
        writeln!(out, "\n{title} ({}, {} rounds)", FLAT_OUT.name, self.rounds)?;
        writeln!(
            out,
            "  {:<24} {:>12} {:>12} {:>12}",
            "", "CPU us/req", "requests/s", "more us"
        )?;
        let mut base = 0.0;
        for (contender, Run { cpu_us, rate }) in contenders.iter().zip(runs) {
            let name = contender.name;
            let more = if bases.contains(&name) {
                base = cpu_us;
                "-".to_owned()
            } else {
                format!("{:.2}", cpu_us - base)
            };
            writeln!(out, "  {name:<24} {cpu_us:>12.2} {rate:>12.0} {more:>12}")?;
        }
        Ok(())
    }

    /// Many plugins, each of another module; then each called once.
    fn loaded(&self, out: &mut Stdout, count: u32) -> anyhow::Result<()> {
        let modules = self.dir.join("modules");
        std::fs::create_dir_all(&modules)?;
        let data = self.dir.join("data");
        let original = std::fs::read(built("static-json"))?;
        let mut documents = service("nobody", &[], &["hold: {maxRequests: 0}"]);
        for index in 0..count {
            let file = modules.join(format!("{index}.wasm"));
            std::fs::write(&file, another(&original, index))?;
            documents += &plugin(
                &format!("p{index}"),
                &file.display().to_string(),
                "NextRung",
                "maxInstances: 1",
            );
            let rung = format!("plugin: {{plugin: p{index}, config: '{{\"body\": {index}}}'}}");
            documents += &fallback(&format!("f{index}"), &[&rung], &[]);
            // Each has a route, since one has at most 128 rules.
            documents += &route(
                &format!("r{index}"),
                &host(index),
                "nobody",
                &[&format!("fallback: f{index}")],
            );
        }
        let none = Contender {
            name: "none",
            peer: Peer::Leeward(self.proxy.to_owned()),
            setup: Setup::default(),
        };
        let many = Contender {
            name: "many",
            peer: Peer::Leeward(self.proxy.to_owned()),
            setup: Setup {
                documents,
                ..Setup::default()
            },
        };
        let flags = ["--data".to_owned(), data.display().to_string()];
        let start =
            |contender| Running::start_with(contender, Protocol::Http1, self.dir, self.backend, &flags);
        let empty = start(&none)?;
        pause(Duration::from_secs(1));
        let before = empty.resident()?;
        drop(empty);
        writeln!(
            out,
            "\n{count} plugins loaded, {} KiB of module each",
            original.len() / 1024
        )?;
        for compiled in ["compiled anew", "compiled before"] {
            let began = now();
            let running = start(&many)?;
            wait_loaded(&running, count)?;
            let took = began.elapsed().as_secs_f64();
            let idle = running.resident()?;
            for index in 0..count {
                let answer = running.get(running.port(), &host(index), "/")?;
                ensure!(
                    answer.ends_with(&format!("\r\n\r\n{index}")),
                    "plugin {index} answered {answer}"
                );
            }
            let called = running.resident()?;
            let each = |now: u64| now.saturating_sub(before) / 1024 / u64::from(count.max(1));
            writeln!(
                out,
                "  {compiled}: {took:.1} s, {} KiB of memory each, {} KiB after a call of each",
                each(idle),
                each(called)
            )?;
        }
        Ok(())
    }
}

/// A plugin is changed for another module again and again, while requests pass it.
async fn swapped(out: &mut Stdout, dir: &Path, swaps: u32) -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let app = Service::start("app")?;
    let original = std::fs::read(built("pw-headers"))?;
    let file = |index: u32| dir.join(format!("swap{index}.wasm"));
    for index in 0..=swaps {
        std::fs::write(file(index), another(&original, index))?;
    }
    let version = |index: u32| filter("ProxyWasm", &file(index));
    let policy = service("app", &[(app.address(), "a", "")], &[])
        + &version(0)
        + &route("app", "app.example", "app", &["filters: [{plugin: bench}]"]);
    mesh.apply(&policy).await?;
    let node = mesh.node("a1")?;
    let load = |protocol| {
        let to = ("app.example", "/");
        leeward_testkit::Load::start(node.outbound, protocol, to, 16, Duration::ZERO)
    };
    let loads = [
        load(leeward_testkit::Protocol::Http1),
        load(leeward_testkit::Protocol::Http2),
    ];
    let mut seen = std::collections::BTreeSet::new();
    for index in 0..=swaps {
        if index > 0 {
            mesh.apply(&version(index)).await?;
        }
        let seen = &mut seen;
        let now = eventually("the version to be in use", Duration::from_secs(30), || async {
            let report = node.plugins().await?;
            let digest = report
                .first()
                .and_then(|plugin| plugin.pointer("/stable/sha256")?.as_str());
            let digest = digest.context("no plugin")?.to_owned();
            ensure!(!seen.contains(&digest), "still {digest}");
            Ok(digest)
        });
        let now = now.await?;
        seen.insert(now);
    }
    let (mut sent, mut failed) = (0, 0);
    for load in loads {
        let tally = load.stop().await;
        sent += tally.sent;
        failed += tally.failed;
    }
    writeln!(
        out,
        "\n{swaps} swaps under load, HTTP/1.1 and HTTP/2: {sent} requests, {failed} failed"
    )?;
    Ok(())
}

/// The host of a plugin's route.
fn host(index: u32) -> String {
    format!("p{index}.example")
}

fn wait_loaded(running: &Running, count: u32) -> anyhow::Result<()> {
    for _ in 0..3000 {
        let report = running.get(running.admin, "admin", "/plugins")?;
        if report.matches("\"compiled_before\"").count() >= usize::try_from(count)? {
            return Ok(());
        }
        pause(Duration::from_millis(200));
    }
    anyhow::bail!("not all plugins are loaded after 10 min")
}

/// The same module with another hash: a section that means nothing is added.
fn another(module: &[u8], index: u32) -> Vec<u8> {
    let mut bytes = module.to_vec();
    // A custom section of 6 bytes: the length of its name, "v", and the index.
    bytes.extend([0, 6, 1, b'v']);
    bytes.extend(index.to_le_bytes());
    bytes
}

/// A Plugin that is a filter.
fn filter(kind: &str, file: &Path) -> String {
    let mut text =
        String::from("---\napiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {name: bench}\nspec:\n");
    let file = file.display();
    // A String takes whatever is written to it.
    let _ = write!(
        text,
        "  kind: {kind}\n  source: {{file: \"{file}\"}}\n  onFault: FailOpen\n"
    );
    text
}

fn built(name: &str) -> PathBuf {
    binaries::workspace()
        .join("plugins/built")
        .join(format!("{name}.wasm"))
}
