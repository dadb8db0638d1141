//! What the runbooks say to do is done: every block that is marked `sh drill` runs, in order, against a control plane that
//! has lost what the runbook is about.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use leeward_testkit::{TempDir, binaries};
use std::path::Path;
use std::process::{Command, Output};

/// What every drill begins with: an authority, a control plane that backs up into a directory, and its policy. `systemctl` is
/// what starts and stops it here.
const SETUP: &str = r#"
leeward ca init "$ROOT" --trust-domain leeward.test >/dev/null
leeward ca intermediate --root "$ROOT" --out "$CA" >/dev/null
leeward identity issue --authority "$ROOT" --user ada --out "$LEEWARD_IDENTITY" >/dev/null
mkdir -p "$SCRATCH"
cat > "$HERE/policy.yaml" <<EOF
apiVersion: leeward.dev/v1
kind: Zone
metadata: {name: a}
spec: {}
---
apiVersion: leeward.dev/v1
kind: Zone
metadata: {name: b}
spec: {}
---
apiVersion: leeward.dev/v1
kind: Service
metadata: {name: shop}
spec: {endpoints: [{address: "127.0.0.1:8080", zone: a}]}
---
apiVersion: leeward.dev/v1
kind: BackupPolicy
metadata: {name: main}
spec: {destination: main, every: 1h, encryption: {recipients: [$RECIPIENTS]}}
EOF
systemctl start leeward-control
leeward apply -f "$HERE/policy.yaml" >/dev/null
until leeward backup status | grep -q 'all, up to'; do sleep 0.2; done
"#;

/// Starts and stops the control plane by its files, and waits until it is so.
const SYSTEMCTL: &str = r#"#!/bin/bash
set -euo pipefail
[ "$2" = leeward-control ]
case "$1" in
  start)
    rm -f "$HERE/addresses"
    leeward-control --listen "$LEEWARD_CONTROL" --data "$DATA" --ca "$CA" --identity "$HERE/own" \
      --backup-place "main=$BACKUPS" --addresses-file "$HERE/addresses" >>"$HERE/control.log" 2>&1 &
    echo $! > "$HERE/pid"
    for _ in $(seq 600); do
      if [ -e "$HERE/addresses" ]; then exit 0; fi
      kill -0 "$(cat "$HERE/pid")" || { cat "$HERE/control.log" >&2; exit 1; }
      sleep 0.1
    done
    exit 1 ;;
  stop)
    pid=$(cat "$HERE/pid" 2>/dev/null || true)
    if [ -n "$pid" ]; then
      kill -TERM "$pid" 2>/dev/null || true
      while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
    fi
    rm -f "$HERE/pid" ;;
  *) exit 2 ;;
esac
"#;

/// The marked blocks of a runbook, in order.
fn blocks(name: &str) -> Vec<String> {
    let path = binaries::workspace().join("docs/runbooks").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    let blocks = text.split("```sh drill\n").skip(1);
    blocks
        .map(|block| block.split("```").next().unwrap().to_owned())
        .collect()
}

/// An address that nobody listens at.
fn free() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Does a runbook. `loses` is the loss; `holds` is what must be so afterwards.
fn drill(name: &str, encrypted: bool, loses: &str, between: &str, holds: &str) {
    let here = TempDir::new().unwrap();
    let dir = here.path();
    std::fs::create_dir_all(dir.join("bin")).unwrap();
    let systemctl = dir.join("bin/systemctl");
    std::fs::write(&systemctl, SYSTEMCTL).unwrap();
    Command::new("chmod").arg("+x").arg(&systemctl).status().unwrap();
    let (secret, recipient) = (
        "AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33",
        "age1t7rxyev2z3rw82stdlrrepyc39nvn86l5078zqkf5uasdy86jp6svpy7pa",
    );
    std::fs::write(dir.join("key.txt"), format!("{secret}\n")).unwrap();
    let blocks = blocks(name);
    assert!(!blocks.is_empty(), "{name} has no block that is marked");
    let script = format!(
        "set -euo pipefail\ntrap 'systemctl stop leeward-control' EXIT\n{SETUP}\n{loses}\n{}\n{holds}\n",
        blocks.join(&format!("\n{between}\n"))
    );
    let path = format!(
        "{}:{}:{}",
        dir.join("bin").display(),
        binaries::dir().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let at = |part: &str| dir.join(part);
    let done: Output = Command::new("timeout")
        .args(["-k", "5", "240", "bash", "-c", &script])
        .env("PATH", path)
        .env("HERE", dir)
        .env("ROOT", at("root"))
        .env("CA", at("ca"))
        .env("DATA", at("data"))
        .env("SCRATCH", at("scratch"))
        .env("BACKUPS", at("backups"))
        .env("KEY", at("key.txt"))
        .env("RECIPIENTS", if encrypted { recipient } else { "" })
        .env("LEEWARD_IDENTITY", at("user"))
        .env("LEEWARD_CONTROL", free())
        .output()
        .unwrap();
    end(dir);
    assert!(
        done.status.success(),
        "{name}: {}\n{}\n{}\nthe control plane said:\n{}",
        done.status,
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
        std::fs::read_to_string(dir.join("control.log")).unwrap_or_default()
    );
}

/// Whatever became of the script, the control plane ends.
fn end(dir: &Path) {
    if let Ok(pid) = std::fs::read_to_string(dir.join("pid")) {
        let _ = Command::new("kill").args(["-KILL", pid.trim()]).status();
    }
}

#[test]
fn the_store_comes_back() {
    drill(
        "store.md",
        false,
        // Damaged, under a control plane that is killed.
        r#"kill -KILL "$(cat "$HERE/pid")"; printf damaged > "$DATA/leeward.db"; rm -f "$DATA"/leeward.db-*"#,
        "",
        r#"leeward get service shop; ls "$DATA"/replaced-*/leeward.db"#,
    );
}

#[test]
fn the_authority_comes_back_from_a_backup_and_from_its_root() {
    drill(
        "ca.md",
        true,
        r#"leeward backup create --include-ca; cp "$CA/ca-key.pem" "$HERE/kept"; rm -r "$CA""#,
        r#"cmp "$CA/ca-key.pem" "$HERE/kept"; [ "$(stat -c %a "$CA/ca-key.pem")" = 600 ]"#,
        r#"leeward token create --user eve >/dev/null; leeward get service shop"#,
    );
}

#[test]
fn a_bad_policy_is_taken_back() {
    drill(
        "bad-policy.md",
        false,
        r#"export GOOD=1 GOOD_FILES="$HERE/policy.yaml"
           sed 's/8080/9999/' "$HERE/policy.yaml" | leeward apply -f -
           until leeward backup restore --from "$BACKUPS" --to-revision 2 --data "$HERE/seen" >/dev/null 2>&1; do rm -rf "$HERE/seen"; sleep 0.2; done"#,
        "",
        r#"leeward get service shop -o yaml | grep -q 8080; [ -e "$SCRATCH/then/leeward.db" ]; grep -q 9999 "$SCRATCH/bad.yaml""#,
    );
}

#[test]
fn a_bad_plugin_is_taken_back() {
    let plugin = binaries::plugin("static-json");
    assert!(Path::new(&plugin).exists(), "{plugin}");
    drill(
        "bad-plugin.md",
        false,
        &format!(
            r#"export GOOD_PLUGIN="$HERE/good.yaml"
               cat > "$GOOD_PLUGIN" <<EOF
apiVersion: leeward.dev/v1
kind: Plugin
metadata: {{name: rescue}}
spec: {{kind: Fallback, source: {{file: {plugin}}}, onFault: NextRung}}
EOF
               sed 's/{plugin_name}/none.wasm/' "$GOOD_PLUGIN" | leeward apply -f -"#,
            plugin_name = "static-json.wasm"
        ),
        "",
        r#"leeward get plugin rescue -o yaml | grep -q static-json"#,
    );
}

#[test]
fn a_node_is_replaced() {
    drill("node.md", false, "", "", "");
}

#[test]
fn a_zone_is_taken_out_and_comes_back() {
    drill("zone.md", false, "", "", "leeward zone list");
}

#[test]
fn every_runbook_has_its_drill() {
    let dir = binaries::workspace().join("docs/runbooks");
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "bad-plugin.md",
            "bad-policy.md",
            "ca.md",
            "node.md",
            "store.md",
            "zone.md"
        ]
    );
    let here = include_str!("runbooks.rs");
    for name in names {
        assert!(here.contains(&format!("\"{name}\",")), "no drill does {name}");
    }
}
