//! `leeward lint` and `leeward explain` on files, as people and CI run them.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const GOOD: &str = "apiVersion: leeward.dev/v1
kind: Zone
metadata: {name: a}
spec: {}
---
apiVersion: leeward.dev/v1
kind: Service
metadata: {name: cart}
spec: {}
---
apiVersion: leeward.dev/v1
kind: Route
metadata: {name: shop}
spec:
  hostnames: [shop.example]
  rules:
    - backendRefs: [{service: cart}]
";

/// A rule that is never reached, in line 18.
const SHADOWED: &str = "    - backendRefs: [{service: cart}]
      timeouts: {request: 5s}
";

fn dir(name: &str, policy: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("policy.yaml"), policy).unwrap();
    dir
}

fn leeward(words: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_leeward"))
        .args(words)
        .arg(dir)
        .env_remove("LEEWARD_IDENTITY")
        .output()
        .unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_exit_status_says_what_was_found() {
    let status = |name: &str, policy: &str, words: &[&str]| {
        let mut all = vec!["lint"];
        all.extend(words);
        leeward(&all, &dir(name, policy)).status.code()
    };
    let warned = GOOD.to_owned() + SHADOWED;
    assert_eq!(status("good", GOOD, &["--strict"]), Some(0));
    assert_eq!(status("warned", &warned, &[]), Some(0));
    assert_eq!(status("warned", &warned, &["--strict"]), Some(1));
    assert_eq!(
        status("warned", &warned, &["--strict", "--allow", "LW202"]),
        Some(0)
    );
    assert_eq!(status("warned", &warned, &["--allow", "LW999"]), Some(2));
    assert_eq!(
        status("dangling", &GOOD.replace("service: cart", "service: crat"), &[]),
        Some(1)
    );
    assert_eq!(status("twice", &format!("{GOOD}---\n{GOOD}"), &[]), Some(1));
    assert_eq!(
        status("misspelt", &GOOD.replace("hostnames", "hostname"), &[]),
        Some(2)
    );
    let missing = leeward(&["lint"], Path::new("/nowhere/at/all"));
    assert_eq!(missing.status.code(), Some(2));
}

#[test]
fn each_format_has_the_place() {
    let dir = dir("formats", &(GOOD.to_owned() + SHADOWED));
    let file = dir.join("policy.yaml");
    let file = file.to_str().unwrap();
    let text = told(&leeward(&["lint"], &dir));
    let first = text.lines().next().unwrap();
    assert!(first.starts_with(&format!("{file}:18:")), "{text}");
    assert!(
        first.contains("warning LW202: Route/shop: spec.rules[1].matches[0]: is never reached"),
        "{text}"
    );
    assert!(
        text.ends_with("3 resources: 0 errors, 1 warnings, 0 notes\n"),
        "{text}"
    );

    let json: Value = serde_json::from_str(&told(&leeward(&["lint", "-o", "json"], &dir))).unwrap();
    let found = &json["findings"][0];
    assert_eq!((&found["code"], &found["line"]), (&"LW202".into(), &18.into()));
    assert_eq!((&json["warnings"], &json["resources"]), (&1.into(), &3.into()));

    let sarif: Value = serde_json::from_str(&told(&leeward(&["lint", "-o", "sarif"], &dir))).unwrap();
    assert_eq!(sarif["version"], "2.1.0");
    let result = &sarif["runs"][0]["results"][0];
    assert_eq!(
        (&result["ruleId"], &result["level"]),
        (&"LW202".into(), &"warning".into())
    );
    let place = &result["locations"][0]["physicalLocation"];
    assert_eq!(
        (&place["artifactLocation"]["uri"], &place["region"]["startLine"]),
        (&file.into(), &18.into())
    );
    assert_eq!(sarif["runs"][0]["tool"]["driver"]["rules"][0]["id"], "LW202");

    let github = told(&leeward(&["lint", "-o", "github"], &dir));
    assert!(
        github.starts_with(&format!("::warning file={file},line=18,col=")),
        "{github}"
    );

    // What can't be read has the same formats.
    std::fs::write(dir.join("policy.yaml"), GOOD.replace("hostnames", "hostname")).unwrap();
    let json: Value = serde_json::from_str(&told(&leeward(&["lint", "-o", "json"], &dir))).unwrap();
    let found = &json["findings"][0];
    assert_eq!((&found["code"], &found["line"]), (&"LW001".into(), &15.into()));
}

#[test]
fn a_request_is_explained_from_files_alone() {
    let dir = dir("explain", &(GOOD.to_owned() + SHADOWED));
    let words = ["explain", "--request", "GET /x", "--host", "shop.example", "-f"];
    let text = told(&leeward(&words, &dir));
    assert!(
        text.starts_with("GET shop.example/x goes to cart, by Route/shop rules[0]"),
        "{text}"
    );
    assert!(text.contains("warning LW202"), "{text}");
    let words = [
        "explain",
        "--request",
        "GET /x",
        "--host",
        "shop.example",
        "-o",
        "json",
        "-f",
    ];
    let json: Value = serde_json::from_str(&told(&leeward(&words, &dir))).unwrap();
    let steps = json["steps"].as_array().unwrap();
    let route = steps.iter().find(|step| step["stage"] == "route").unwrap();
    assert_eq!(route["path"], "spec.rules[0]");
    let bad = leeward(
        &["explain", "--host", "shop.example", "--flags", "no=on", "-f"],
        &dir,
    );
    assert_eq!(bad.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&bad.stderr).contains("flags: no FeatureFlags has \"no\""));
}
