//! What is wrong with a whole policy, though each resource of it is valid: what can't work, what works otherwise than it
//! looks, and what has no effect.
//!
//! A rule is a function over the whole, with a code that never changes its meaning. The rules of one kind stand in one
//! module, and [`rules`] lists all of them; `docs/lint.md` is made from that list.

mod authorization;
mod calls;
mod flags;
mod gateways;
mod ladders;
mod limits;
mod mesh;
mod plugins;
mod references;
mod routes;
mod similar;
pub(crate) mod text;
pub(crate) mod time;
mod unused;
mod workloads;
mod zones;

use crate::{Key, Resource};
use mesh::Mesh;
use std::fmt;
use std::time::SystemTime;

pub use calls::CALLS_LABEL;

/// How bad it is.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// It does otherwise than it looks, or nothing.
    Warning,
    /// It can't work; a control plane refuses it.
    Error,
}

impl Severity {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A rule of the linter.
pub struct Rule {
    /// Its code, as `LW201`. The first digit is the kind of rule. A code is never used for something else.
    pub code: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it finds, in a few words.
    pub title: &'static str,
    /// Why that matters, and when it is found.
    pub why: &'static str,
    check: fn(&Mesh<'_>, &mut Sink<'_>),
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rule")
            .field("code", &self.code)
            .field("severity", &self.severity)
            .field("title", &self.title)
            .finish_non_exhaustive()
    }
}

/// The families of rules, in the order of their codes.
const FAMILIES: [&[Rule]; 11] = [
    references::RULES,
    unused::RULES,
    routes::RULES,
    ladders::RULES,
    time::RULES,
    calls::RULES,
    limits::RULES,
    zones::RULES,
    flags::RULES,
    authorization::RULES,
    gateways::RULES,
];

/// Every rule, in the order of the codes.
pub fn rules() -> impl Iterator<Item = &'static Rule> {
    let beside = plugins::RULES.iter().chain(workloads::RULES);
    FAMILIES.into_iter().flatten().chain(beside)
}

/// The rule of a code.
pub fn rule(code: &str) -> Option<&'static Rule> {
    rules().find(|rule| rule.code == code)
}

/// Another resource that has a part in a finding.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Related {
    /// Which.
    pub key: Key,
    /// The field; empty for the resource.
    pub path: String,
}

/// What a rule has found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// By which rule.
    pub rule: &'static Rule,
    /// On which resource.
    pub resource: Key,
    /// On which field of it, as it stands in YAML.
    pub path: String,
    /// What is wrong, with the values.
    pub problem: String,
    /// What would be right.
    pub fix: String,
    /// What else has a part in it.
    pub related: Vec<Related>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rule,
            resource,
            path,
            problem,
            fix,
            ..
        } = self;
        let (code, severity) = (rule.code, rule.severity);
        write!(f, "{severity} {code}: {resource}: {path}: {problem}; {fix}")
    }
}

/// What was found in a policy.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The worst first, then by resource and code.
    pub findings: Vec<Finding>,
    /// Findings that were left out since one rule had too many.
    pub left_out: usize,
    /// Findings that labels of their resources say to ignore.
    pub ignored: usize,
}

impl Report {
    /// How many findings are at least so bad.
    pub fn at_least(&self, severity: Severity) -> usize {
        let bad = self
            .findings
            .iter()
            .filter(|found| found.rule.severity >= severity);
        bad.count()
    }

    /// Takes out the findings of some rules.
    pub fn allow(&mut self, codes: &[&str]) {
        let before = self.findings.len();
        self.findings.retain(|found| !codes.contains(&found.rule.code));
        self.ignored += before - self.findings.len();
    }
}

/// The label of a resource whose value lists codes, apart by commas, that are not to be found on it.
pub const IGNORE_LABEL: &str = "lint.leeward.dev/ignore";

/// Findings of one rule.
const MAX_FINDINGS: usize = 1000;

/// Where a rule puts what it finds.
struct Sink<'a> {
    rule: &'static Rule,
    mesh: &'a Mesh<'a>,
    report: &'a mut Report,
    found: usize,
}

impl Sink<'_> {
    fn add(&mut self, resource: &Key, path: impl Into<String>, problem: String, fix: impl Into<String>) {
        self.add_with(resource, path, problem, fix, Vec::new());
    }

    fn add_with(
        &mut self,
        resource: &Key,
        path: impl Into<String>,
        problem: String,
        fix: impl Into<String>,
        related: Vec<Related>,
    ) {
        if self.mesh.ignores(resource, self.rule.code) {
            self.report.ignored += 1;
            return;
        }
        self.found += 1;
        if self.found > MAX_FINDINGS {
            self.report.left_out += 1;
            return;
        }
        self.report.findings.push(Finding {
            rule: self.rule,
            resource: resource.clone(),
            path: path.into(),
            problem,
            fix: fix.into(),
            related,
        });
    }
}

/// Looks for everything that rules know of in the resources of a mesh; `now` is the wall clock's, for what ends.
///
/// A resource may stand twice: the last one counts, as when they are applied one after the other.
pub fn lint<'a>(resources: impl IntoIterator<Item = &'a Resource>, now: SystemTime) -> Report {
    let mesh = Mesh::new(resources, now);
    let mut report = Report::default();
    for rule in rules() {
        let mut sink = Sink {
            rule,
            mesh: &mesh,
            report: &mut report,
            found: 0,
        };
        (rule.check)(&mesh, &mut sink);
    }
    report.findings.sort_by(|a, b| {
        let by = |f: &Finding| {
            (
                std::cmp::Reverse(f.rule.severity),
                f.resource.clone(),
                f.rule.code,
            )
        };
        by(a).cmp(&by(b)).then_with(|| a.path.cmp(&b.path))
    });
    report
}
