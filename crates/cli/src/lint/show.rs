//! Findings as people and tools read them.

use super::Format;
use leeward_policy::Key;
use leeward_policy::lint::{Rule, Severity, rule, rules as all_rules};
use leeward_proto::manifest::{ManifestError, Place};
use leeward_proto::{parse_key, v1};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// The code of what can't be read, which is no rule.
const UNREAD: &str = "LW001";
/// The code of a resource that stands twice.
const TWICE: &str = "LW002";
/// What these two are called, and why they are wrong.
const OTHERS: [(&str, &str, &str); 2] = [
    (
        UNREAD,
        "a file can't be read",
        "It is no YAML, or a field of it is bad; nothing else is looked at then.",
    ),
    (
        TWICE,
        "a resource stands twice",
        "Applied in one call they are refused, and one after the other the last one counts.",
    ),
];

/// A finding, and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(crate) code: String,
    pub(crate) severity: Severity,
    at: Option<(String, Place)>,
    /// Kind and name; empty for a file.
    resource: String,
    path: String,
    problem: String,
    fix: String,
    related: Vec<String>,
}

/// What was looked at, and what was found.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) shown: Vec<Shown>,
    pub(crate) resources: usize,
    pub(crate) left_out: usize,
    pub(crate) ignored: usize,
}

impl Shown {
    /// What is wrong with a file.
    pub(crate) fn unread(error: &ManifestError) -> Self {
        Self {
            code: UNREAD.to_owned(),
            severity: Severity::Error,
            at: Some((error.file.clone(), error.place)),
            resource: String::new(),
            path: error.path.clone(),
            problem: error.reason.clone(),
            fix: String::new(),
            related: Vec::new(),
        }
    }

    /// A resource that stands a second time.
    pub(crate) fn twice(key: &Key, (file, place): (&str, Place), (first, before): (&str, Place)) -> Self {
        Self {
            code: TWICE.to_owned(),
            severity: Severity::Error,
            at: Some((file.to_owned(), place)),
            resource: key.to_string(),
            path: "metadata.name".to_owned(),
            problem: format!("stands at {first}:{} already", before.line),
            fix: "each resource must stand once".to_owned(),
            related: Vec::new(),
        }
    }

    pub(crate) fn of(found: &v1::Finding, at: Option<(&str, Place)>) -> Self {
        let name = |key: Option<&v1::ResourceRef>| {
            let key = key.and_then(|key| parse_key(key).ok());
            key.map_or_else(String::new, |key| key.to_string())
        };
        let related = found.related.iter().map(|related| {
            let key = name(related.r#ref.as_ref());
            match related.path.as_str() {
                "" => key,
                path => format!("{key} {path}"),
            }
        });
        Self {
            code: found.code.clone(),
            severity: match found.severity() {
                v1::Severity::Error => Severity::Error,
                v1::Severity::Warning => Severity::Warning,
                v1::Severity::Info | v1::Severity::Unspecified => Severity::Info,
            },
            at: at.map(|(file, place)| (file.to_owned(), place)),
            resource: name(found.r#ref.as_ref()),
            path: found.path.clone(),
            problem: found.problem.clone(),
            fix: found.fix.clone(),
            related: related.collect(),
        }
    }

    /// The same without its place and severity: what is wrong with which field.
    pub(crate) fn sentence(&self) -> String {
        let parts = [&self.resource, &self.path, &self.problem];
        let parts: Vec<&str> = parts
            .iter()
            .map(|part| part.as_str())
            .filter(|part| !part.is_empty())
            .collect();
        parts.join(": ")
    }

    /// A few lines for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        if let Some((file, place)) = &self.at {
            let _ = write!(text, "{file}:{}:{}: ", place.line, place.column);
        }
        let _ = write!(text, "{} {}: {}", self.severity, self.code, self.sentence());
        if !self.fix.is_empty() {
            let _ = write!(text, "\n    fix: {}", self.fix);
        }
        if !self.related.is_empty() {
            let _ = write!(text, "\n    see: {}", self.related.join(", "));
        }
        text
    }

    /// The same as JSON.
    pub(crate) fn json(&self) -> Value {
        let mut value = json!({
            "code": self.code, "severity": self.severity.as_str(), "resource": self.resource, "path": self.path,
            "problem": self.problem, "fix": self.fix, "related": self.related,
        });
        if let (Some((file, place)), Some(map)) = (&self.at, value.as_object_mut()) {
            map.insert("file".to_owned(), json!(file));
            map.insert("line".to_owned(), json!(place.line));
            map.insert("column".to_owned(), json!(place.column));
        }
        value
    }

    fn sarif(&self) -> Value {
        let level = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Info => "note",
        };
        let mut location =
            json!({"logicalLocations": [{"fullyQualifiedName": format!("{}/{}", self.resource, self.path)}]});
        if let (Some((file, place)), Some(map)) = (&self.at, location.as_object_mut()) {
            let physical = json!({
                "artifactLocation": {"uri": file.replace('\\', "/")},
                "region": {"startLine": place.line.max(1), "startColumn": place.column.max(1)},
            });
            map.insert("physicalLocation".to_owned(), physical);
        }
        let fix = if self.fix.is_empty() {
            String::new()
        } else {
            format!("; {}", self.fix)
        };
        json!({
            "ruleId": self.code, "level": level,
            "message": {"text": format!("{}{fix}", self.sentence())},
            "locations": [location],
        })
    }

    fn github(&self) -> String {
        let command = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Info => "notice",
        };
        // As GitHub's toolkit escapes what would end a property or the command.
        let data = |text: &str| text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
        let property = |text: &str| data(text).replace(':', "%3A").replace(',', "%2C");
        let mut properties = Vec::new();
        if let Some((file, place)) = &self.at {
            properties.push(format!("file={}", property(file)));
            properties.push(format!("line={}", place.line));
            properties.push(format!("col={}", place.column));
        }
        properties.push(format!("title={}", property(&self.code)));
        let fix = if self.fix.is_empty() {
            String::new()
        } else {
            format!("; {}", self.fix)
        };
        format!(
            "::{command} {}::{}",
            properties.join(","),
            data(&format!("{}{fix}", self.sentence()))
        )
    }
}

/// All that was found.
pub(crate) fn all(seen: &Seen, format: Format) -> String {
    let count = |severity| {
        seen.shown
            .iter()
            .filter(|shown| shown.severity == severity)
            .count()
    };
    let (errors, warnings, infos) = (
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Info),
    );
    match format {
        Format::Text => {
            let mut lines: Vec<String> = seen.shown.iter().map(Shown::text).collect();
            let mut last = format!(
                "{} resources: {errors} errors, {warnings} warnings, {infos} notes",
                seen.resources
            );
            if seen.ignored > 0 {
                let _ = write!(last, "; {} ignored", seen.ignored);
            }
            if seen.left_out > 0 {
                let _ = write!(last, "; {} more left out", seen.left_out);
            }
            lines.push(last);
            lines.join("\n")
        }
        Format::Json => {
            let findings: Vec<Value> = seen.shown.iter().map(Shown::json).collect();
            let value = json!({
                "findings": findings, "resources": seen.resources, "ignored": seen.ignored, "leftOut": seen.left_out,
                "errors": errors, "warnings": warnings, "infos": infos,
            });
            format!("{value:#}")
        }
        Format::Sarif => {
            let used: BTreeSet<&str> = seen.shown.iter().map(|shown| shown.code.as_str()).collect();
            let described = used.into_iter().map(|code| {
                let (title, why) = title(code);
                json!({"id": code, "shortDescription": {"text": title}, "fullDescription": {"text": why}})
            });
            let value = json!({
                "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
                "version": "2.1.0",
                "runs": [{
                    "tool": {"driver": {
                        "name": "leeward lint", "version": env!("CARGO_PKG_VERSION"),
                        "rules": described.collect::<Vec<_>>(),
                    }},
                    "results": seen.shown.iter().map(Shown::sarif).collect::<Vec<_>>(),
                }],
            });
            format!("{value:#}")
        }
        Format::Github => {
            let lines: Vec<String> = seen.shown.iter().map(Shown::github).collect();
            lines.join("\n")
        }
    }
}

fn title(code: &str) -> (&'static str, &'static str) {
    let others = OTHERS.iter().find(|(known, ..)| *known == code);
    let others = others.map(|(_, title, why)| (*title, *why));
    rule(code)
        .map(|rule| (rule.title, rule.why))
        .or(others)
        .unwrap_or_default()
}

/// The rules as `docs/lint.md` has them.
pub(crate) fn rules() -> String {
    let mut text = String::from("| code | severity | finds | why |\n|---|---|---|---|\n");
    for (code, title, why) in OTHERS {
        let _ = writeln!(text, "| {code} | error | {title} | {why} |");
    }
    for Rule {
        code,
        severity,
        title,
        why,
        ..
    } in all_rules()
    {
        let _ = writeln!(text, "| {code} | {severity} | {title} | {why} |");
    }
    text.truncate(text.trim_end().len());
    text
}
