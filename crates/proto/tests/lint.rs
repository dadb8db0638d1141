//! Each rule of the linter finds what it is for, and not what is nearly the same.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod examples;

use examples::EXAMPLES;
use leeward_policy::Resource;
use leeward_policy::lint::{Finding, lint, rule, rules};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The time of the examples: 2026-12-01.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_796_083_200)
}

/// A resource in one line: `Kind name [labels] spec`, as the examples have it.
fn resources(text: &str) -> Vec<Resource> {
    let mut yaml = String::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (kind, rest) = line.split_once(' ').unwrap();
        let (name, spec) = rest.split_once(' ').unwrap();
        let (name, labels) = name.split_once('!').unwrap_or((name, ""));
        yaml += &format!(
            "---\napiVersion: leeward.dev/v1\nkind: {kind}\nmetadata: {{name: {name}, labels: {{{labels}}}}}\nspec: {spec}\n"
        );
    }
    let parsed = leeward_proto::manifest::parse("example", &yaml);
    let wire = parsed.unwrap_or_else(|bad| panic!("{}\n{yaml}", bad[0]));
    wire.iter()
        .map(|wire| leeward_proto::parse(wire).unwrap())
        .collect()
}

fn found(text: &str) -> Vec<Finding> {
    lint(&resources(text), now()).findings
}

#[test]
fn each_rule_finds_what_it_is_for_and_not_what_is_nearly_the_same() {
    for (code, path, bad, good) in EXAMPLES.iter() {
        let in_bad = found(bad);
        let hits: Vec<&Finding> = in_bad.iter().filter(|found| found.rule.code == *code).collect();
        let shown: Vec<String> = in_bad.iter().map(ToString::to_string).collect();
        assert!(
            hits.iter().any(|found| found.path == *path),
            "{code} at {path} is not found, but {shown:#?}\n{bad}"
        );
        let in_good = found(good);
        let stray = in_good.iter().find(|found| found.rule.code == *code);
        assert!(stray.is_none(), "{}\n{good}", stray.unwrap());
    }
}

#[test]
fn each_rule_has_an_example() {
    let shown: BTreeSet<&str> = EXAMPLES.iter().map(|(code, ..)| *code).collect();
    let all: BTreeSet<&str> = rules().map(|rule| rule.code).collect();
    assert_eq!(shown, all);
}

#[test]
fn codes_are_unique_and_in_order() {
    let codes: Vec<&str> = rules().map(|rule| rule.code).collect();
    let mut sorted = codes.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(codes, sorted);
    assert_eq!(rule("LW101").map(|rule| rule.code), Some("LW101"));
    assert!(rule("LW000").is_none());
}

#[test]
fn a_label_says_what_is_not_to_be_found() {
    let text = "Service s!\"lint.leeward.dev/ignore\":\"LW503,LW111\" {}";
    let report = lint(&resources(text), now());
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!(report.ignored, 1);
    let other = text.replace("LW111", "LW112");
    assert_eq!(found(&other).len(), 1);
}

#[test]
fn what_is_ignored_by_the_one_who_asks_is_counted() {
    let mut report = lint(&resources("Service s {}\nService t {}"), now());
    report.allow(&["LW111"]);
    assert_eq!((report.findings.len(), report.ignored), (0, 2));
}

#[test]
fn docs_have_every_rule() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/lint.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    for rule in rules() {
        let row = format!(
            "| {} | {} | {} | {} |",
            rule.code, rule.severity, rule.title, rule.why
        );
        assert!(
            docs.contains(&row),
            "docs/lint.md wants this row (leeward lint --rules):\n{row}"
        );
    }
    let rows = docs.lines().filter(|line| line.starts_with("| LW")).count();
    assert_eq!(
        rows,
        rules().count() + 2,
        "rows of docs/lint.md that are no rules (two are of the command)"
    );
}

#[test]
fn the_examples_of_the_repository_are_clean() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let files = [
        "degradation/policy.yaml",
        "plugins/policy.yaml",
        "resilience/policy.yaml",
        "shop/policy/shop.yaml",
    ];
    for file in files {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        // What the demo fills in.
        let mut filled = String::new();
        for (i, part) in text.split("${").enumerate() {
            match part.split_once('}').filter(|(name, _)| {
                i > 0
                    && name
                        .bytes()
                        .all(|b| b.is_ascii_uppercase() || b == b'_' || b.is_ascii_digit())
            }) {
                Some(("PLUGIN", rest)) => filled += &format!("/plugin.wasm{rest}"),
                Some(("PLUGIN_SHA256", rest)) => filled += &format!("{}{rest}", "ab".repeat(32)),
                Some((_, rest)) => filled += &format!("10.0.0.1:{}{rest}", 1000 + i),
                None if i > 0 => filled += &format!("${{{part}"),
                None => filled += part,
            }
        }
        let wire = leeward_proto::manifest::parse(file, &filled).unwrap_or_else(|bad| panic!("{}", bad[0]));
        let parsed: Vec<Resource> = wire
            .iter()
            .map(|wire| leeward_proto::parse(wire).unwrap())
            .collect();
        let report = lint(&parsed, now());
        let bad: Vec<String> = report
            .findings
            .iter()
            .filter(|found| found.rule.severity > leeward_policy::lint::Severity::Info)
            .map(ToString::to_string)
            .collect();
        assert!(bad.is_empty(), "{file}: {bad:#?}");
    }
}
