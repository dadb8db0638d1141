//! What was changed when, and taking it back.

use crate::Connection;
use crate::api::{call, reference};
use crate::output::{Failure, Format, Kinds, say, table};
use crate::rollout::client;
use clap::Args;
use leeward_policy::Kind;
use leeward_proto::manifest::{to_json, to_yaml};
use leeward_proto::{kind_of, v1};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// See what was changed, by whom and when: `history` lists revisions, `history show REVISION` shows one as a diff.
#[derive(Args, Debug)]
pub(crate) struct History {
    #[command(flatten)]
    connection: Connection,
    /// `show` and a revision; the last revisions if not given.
    #[arg(value_name = "show REVISION", num_args = 0..=2)]
    what: Vec<String>,
    /// Revisions to show, 1 to 1000.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Only those before this one.
    #[arg(long, default_value_t = 0)]
    before: u64,
    /// Only those that changed this resource.
    #[arg(long, value_name = "KIND/NAME", value_parser = resource)]
    resource: Option<v1::ResourceRef>,
    /// How to show them: table or json.
    #[arg(short, long, default_value = "table")]
    output: Format,
}

/// Write a new revision with the content of an old one.
#[derive(Args, Debug)]
pub(crate) struct Rollback {
    #[command(flatten)]
    connection: Connection,
    /// The revision to go back to.
    revision: u64,
    /// Check everything, write nothing; show what would change.
    #[arg(long)]
    dry_run: bool,
    /// Take it to proxies in steps, by this RolloutPolicy; to all at once if not given.
    #[arg(long, value_name = "NAME")]
    rollout: Option<String>,
    /// Take a rollout back first that is under way.
    #[arg(long)]
    supersede: bool,
    /// Why, for the history.
    #[arg(short, long, default_value = "")]
    message: String,
}

fn resource(text: &str) -> Result<v1::ResourceRef, String> {
    let want = || "want KIND/NAME, such as route/shop".to_owned();
    let (kind, name) = text.split_once('/').ok_or_else(want)?;
    match crate::output::kind(kind)? {
        Kinds::One(kind) if !name.is_empty() => Ok(reference(kind, name.to_owned())),
        Kinds::One(_) | Kinds::All => Err(want()),
    }
}

pub(crate) async fn history(wanted: History) -> Result<(), Failure> {
    let what: Vec<&str> = wanted.what.iter().map(String::as_str).collect();
    match what.as_slice() {
        [] => list(wanted).await,
        ["show", revision] => match revision.parse() {
            Ok(revision) => show(&wanted, revision).await,
            Err(_) => Err(Failure::BadInput(format!(
                "leeward: {revision:?} is no revision; want a number"
            ))),
        },
        other => Err(Failure::BadInput(format!(
            "leeward: {:?} is not known; want nothing, or show REVISION",
            other.join(" ")
        ))),
    }
}

async fn show(wanted: &History, revision: u64) -> Result<(), Failure> {
    let mut client = client(&wanted.connection)?;
    let request = v1::GetRevisionRequest { revision };
    let shown = call(wanted.connection.control, client.get_revision(request)).await?;
    if wanted.output == Format::Table {
        say(&format!("{}\n{}", headline(&shown), diffs(&shown.changes)));
    } else {
        say(&format!("{:#}", revision_json(&shown)));
    }
    Ok(())
}

async fn list(wanted: History) -> Result<(), Failure> {
    let mut client = client(&wanted.connection)?;
    let request = v1::ListRevisionsRequest {
        before: wanted.before,
        limit: wanted.limit,
        resource: wanted.resource,
    };
    let answer = call(wanted.connection.control, client.list_revisions(request)).await?;
    if wanted.output != Format::Table {
        let all: Vec<Value> = answer.revisions.iter().map(revision_json).collect();
        say(&format!("{:#}", json!({"revisions": all})));
        return Ok(());
    }
    let rows: Vec<[String; 5]> = answer
        .revisions
        .iter()
        .map(|revision| {
            let time = revision.time.map(|time| time.to_string());
            [
                revision.revision.to_string(),
                time.unwrap_or_default(),
                revision.by.clone(),
                summary(&revision.changes),
                remark(revision),
            ]
        })
        .collect();
    say(&table(["REVISION", "TIME", "BY", "CHANGED", "REMARK"], &rows));
    Ok(())
}

pub(crate) async fn rollback(wanted: Rollback) -> Result<(), Failure> {
    let mut client = client(&wanted.connection)?;
    let request = v1::RollbackRequest {
        revision: wanted.revision,
        dry_run: wanted.dry_run,
        rollout: wanted.rollout.unwrap_or_default(),
        supersede: wanted.supersede,
        message: wanted.message,
    };
    let done = call(wanted.connection.control, client.rollback(request)).await?;
    if done.changes.is_empty() {
        say(&format!(
            "everything is as it was at revision {}\nrevision {}",
            wanted.revision, done.revision
        ));
        return Ok(());
    }
    if wanted.dry_run {
        say(&diffs(&done.changes));
    } else {
        for change in &done.changes {
            say(&format!(
                "{} {}",
                name(change.r#ref.as_ref()),
                verb(change.kind())
            ));
        }
    }
    say(&format!("revision {}", done.revision));
    Ok(())
}

const fn verb(kind: v1::ChangeKind) -> &'static str {
    match kind {
        v1::ChangeKind::Created => "created",
        v1::ChangeKind::Changed => "changed",
        v1::ChangeKind::Deleted => "deleted",
        v1::ChangeKind::Unspecified => "unknown",
    }
}

fn name(key: Option<&v1::ResourceRef>) -> String {
    let Some(key) = key else { return "-".to_owned() };
    let kind = kind_of(key.kind()).map_or("-", Kind::as_str);
    format!("{kind}/{}", key.name)
}

/// The first changes by name, and how many more there are.
fn summary(changes: &[v1::RevisionChange]) -> String {
    const NAMED: usize = 3;
    let named = changes.iter().take(NAMED).map(|change| {
        let sign = match change.kind() {
            v1::ChangeKind::Created => "+",
            v1::ChangeKind::Deleted => "-",
            v1::ChangeKind::Changed | v1::ChangeKind::Unspecified => "",
        };
        format!("{sign}{}", name(change.r#ref.as_ref()))
    });
    let mut text = named.collect::<Vec<_>>().join(", ");
    if changes.len() > NAMED {
        let _ = write!(text, " and {} more", changes.len() - NAMED);
    }
    text
}

fn remark(revision: &v1::Revision) -> String {
    let mut remarks = Vec::new();
    if !revision.rollout.is_empty() {
        remarks.push(format!("in steps by {}", revision.rollout));
    }
    if revision.takes_back != 0 {
        remarks.push(format!("takes back {}", revision.takes_back));
    }
    if !revision.message.is_empty() {
        remarks.push(revision.message.clone());
    }
    remarks.join("; ")
}

fn headline(revision: &v1::Revision) -> String {
    let time = revision.time.map(|time| time.to_string()).unwrap_or_default();
    let mut line = format!("revision {} of {time} by {}", revision.revision, revision.by);
    let remark = remark(revision);
    if !remark.is_empty() {
        let _ = write!(line, ": {remark}");
    }
    line
}

fn revision_json(revision: &v1::Revision) -> Value {
    let changes = revision.changes.iter().map(|change| {
        let shown = |resource: &Option<v1::Resource>| resource.as_ref().map_or(Value::Null, to_json);
        json!({
            "resource": name(change.r#ref.as_ref()), "change": verb(change.kind()),
            "before": shown(&change.before), "after": shown(&change.after),
        })
    });
    json!({
        "revision": revision.revision, "time": revision.time.map(|time| time.to_string()), "by": revision.by,
        "message": revision.message, "rollout": revision.rollout, "takesBack": revision.takes_back,
        "changes": changes.collect::<Vec<_>>(),
    })
}

/// What changed, as people read it.
fn diffs(changes: &[v1::RevisionChange]) -> String {
    let mut out = Vec::new();
    for change in changes {
        let text = |resource: &Option<v1::Resource>| {
            let mut resource = resource.clone()?;
            // The store's own: it differs always.
            if let Some(metadata) = &mut resource.metadata {
                metadata.revision = 0;
            }
            Some(to_yaml(&resource))
        };
        let (before, after) = (text(&change.before), text(&change.after));
        out.push(format!("{} {}", name(change.r#ref.as_ref()), verb(change.kind())));
        out.extend(diff(
            &before.unwrap_or_default().lines().collect::<Vec<_>>(),
            &after.unwrap_or_default().lines().collect::<Vec<_>>(),
        ));
    }
    out.join("\n")
}

/// Lines around a difference that are shown.
const CONTEXT: usize = 3;
/// Pairs of lines that are compared at most; past that everything that differs is one difference.
const MAX_PAIRS: usize = 4_000_000;

/// The lines that differ, with some around them.
fn diff(before: &[&str], after: &[&str]) -> Vec<String> {
    let same = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    let ((head, old), (_, new)) = (before.split_at(same), after.split_at(same));
    let pairs = old.iter().rev().zip(new.iter().rev());
    let tail = pairs.take_while(|(a, b)| a == b).count();
    let (old, tail) = old.split_at(old.len() - tail);
    let (new, _) = new.split_at(new.len() - tail.len());
    let alike = |lines: &[&'_ str]| -> Vec<(char, String)> {
        lines.iter().map(|line| (' ', (*line).to_owned())).collect()
    };
    let mut lines = alike(head);
    lines.extend(common(old, new));
    lines.extend(alike(tail));
    let signs = lines.iter().enumerate();
    let differs: Vec<usize> = signs
        .filter(|(_, (sign, _))| *sign != ' ')
        .map(|(i, _)| i)
        .collect();
    let near = |i: usize| {
        let at = differs.partition_point(|d| d + CONTEXT < i);
        differs.get(at).is_some_and(|d| d.abs_diff(i) <= CONTEXT)
    };
    let mut shown = Vec::new();
    let mut skipped = false;
    for (i, (sign, line)) in lines.iter().enumerate() {
        if near(i) {
            if skipped && !shown.is_empty() {
                shown.push("  …".to_owned());
            }
            shown.push(format!("{sign} {line}"));
        }
        skipped = !near(i);
    }
    shown
}

/// By the longest sequence of lines that both have.
fn common(old: &[&str], new: &[&str]) -> Vec<(char, String)> {
    let signed = |sign: char, line: &str| (sign, line.to_owned());
    let mut lines = Vec::new();
    if old.len().saturating_mul(new.len()) > MAX_PAIRS {
        lines.extend(old.iter().map(|line| signed('-', line)));
        lines.extend(new.iter().map(|line| signed('+', line)));
        return lines;
    }
    // How long the sequence is from each pair of places on.
    let width = new.len() + 1;
    let mut lengths = vec![0u32; (old.len() + 1) * width];
    let from = |lengths: &[u32], i: usize, j: usize| lengths.get(i * width + j).copied().unwrap_or(0);
    for (i, one) in old.iter().enumerate().rev() {
        for (j, other) in new.iter().enumerate().rev() {
            let length = if one == other {
                from(&lengths, i + 1, j + 1) + 1
            } else {
                from(&lengths, i + 1, j).max(from(&lengths, i, j + 1))
            };
            if let Some(place) = lengths.get_mut(i * width + j) {
                *place = length;
            }
        }
    }
    let (mut i, mut j) = (0, 0);
    loop {
        match (old.get(i), new.get(j)) {
            (None, None) => return lines,
            (Some(one), Some(other)) if one == other => {
                lines.push(signed(' ', one));
                (i, j) = (i + 1, j + 1);
            }
            (Some(one), Some(_)) if from(&lengths, i + 1, j) >= from(&lengths, i, j + 1) => {
                lines.push(signed('-', one));
                i += 1;
            }
            (_, Some(other)) => {
                lines.push(signed('+', other));
                j += 1;
            }
            (Some(one), None) => {
                lines.push(signed('-', one));
                i += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_shows_what_differs_and_a_little_around_it() {
        let before = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
        let mut after = before.to_vec();
        after[5] = "F";
        after.remove(6);
        assert_eq!(
            diff(&before, &after),
            ["  c", "  d", "  e", "- f", "- g", "+ F", "  h", "  i", "  j"]
        );
        assert_eq!(diff(&[], &["x"]), ["+ x"]);
        assert_eq!(diff(&["x"], &[]), ["- x"]);
        assert!(diff(&before, &before).is_empty());
        let mut apart = before.to_vec();
        (apart[0], apart[11]) = ("A", "L");
        assert_eq!(
            diff(&before, &apart),
            [
                "- a", "+ A", "  b", "  c", "  d", "  …", "  i", "  j", "  k", "- l", "+ L"
            ]
        );
    }

    #[test]
    fn resources_are_named_as_kind_and_name() {
        assert_eq!(resource("route/shop").unwrap().name, "shop");
        for text in ["route", "route/", "all/x", "pod/x"] {
            assert!(resource(text).is_err(), "{text}");
        }
    }
}
