//! What an apply would change.

use crate::Connection;
use crate::api::{ManagerOptions, call, client, shown};
use crate::output::{Failure, say};
use leeward_proto::manifest::to_yaml;
use leeward_proto::v1;
use std::path::PathBuf;

/// Lines around a change.
const CONTEXT: usize = 3;
/// Longest texts, in lines, that are compared line by line; longer ones are told as replaced whole.
const MAX_LINES: usize = 4000;

pub(crate) async fn diff(
    connection: &Connection,
    files: &[PathBuf],
    options: ManagerOptions,
) -> Result<(), Failure> {
    // 1 says that something differs, so that nothing else may end with it.
    let untold = |failure: Failure| match failure {
        Failure::Failed(error) => Failure::Untold(format!("leeward: {error:#}")),
        other @ (Failure::BadInput(_) | Failure::Told | Failure::Status(_) | Failure::Untold(_)) => other,
    };
    let answer = async {
        let request = options.request(files)?;
        call(connection.control, client(connection)?.diff(request)).await
    };
    let answer = Box::pin(answer).await.map_err(untold)?;
    for change in &answer.changes {
        let name = change.r#ref.as_ref().map(shown).unwrap_or_default();
        let text = |side: &Option<v1::Resource>| side.as_ref().map(to_yaml).unwrap_or_default();
        let side = |is: bool, place: &str| {
            if is {
                format!("{place}/{name}")
            } else {
                "/dev/null".to_owned()
            }
        };
        say(&format!("--- {}", side(change.before.is_some(), "live")));
        say(&format!("+++ {}", side(change.after.is_some(), "new")));
        say(unified(&text(&change.before), &text(&change.after)).trim_end());
    }
    if answer.changes.is_empty() {
        Ok(())
    } else {
        Err(Failure::Told)
    }
}

/// A line, and which side has it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Line<'a> {
    Both(&'a str),
    Before(&'a str),
    After(&'a str),
}

/// The hunks of a unified diff.
fn unified(before: &str, after: &str) -> String {
    let lines = compare(
        &before.lines().collect::<Vec<_>>(),
        &after.lines().collect::<Vec<_>>(),
    );
    let is_near = |at: usize| {
        let from = at.saturating_sub(CONTEXT);
        let around = lines
            .get(from..lines.len().min(at + CONTEXT + 1))
            .unwrap_or_default();
        around.iter().any(|line| !matches!(line, Line::Both(_)))
    };
    let mut out = String::new();
    let (mut old, mut new) = (1, 1);
    let mut hunk: Vec<String> = Vec::new();
    let (mut start, mut counts) = ((1, 1), (0, 0));
    let end = |hunk: &mut Vec<String>, start: (usize, usize), counts: (usize, usize), out: &mut String| {
        if !hunk.is_empty() {
            // A side without lines begins before its first.
            let at = |from: usize, count: usize| if count == 0 { from - 1 } else { from };
            out.push_str(&format!(
                "@@ -{},{} +{},{} @@\n{}\n",
                at(start.0, counts.0),
                counts.0,
                at(start.1, counts.1),
                counts.1,
                hunk.join("\n")
            ));
            hunk.clear();
        }
    };
    for (i, line) in lines.iter().enumerate() {
        if is_near(i) {
            if hunk.is_empty() {
                (start, counts) = ((old, new), (0, 0));
            }
            let (sign, text) = match line {
                Line::Both(text) => (' ', text),
                Line::Before(text) => ('-', text),
                Line::After(text) => ('+', text),
            };
            hunk.push(format!("{sign}{text}"));
            counts.0 += usize::from(!matches!(line, Line::After(_)));
            counts.1 += usize::from(!matches!(line, Line::Before(_)));
        } else {
            end(&mut hunk, start, counts, &mut out);
        }
        old += usize::from(!matches!(line, Line::After(_)));
        new += usize::from(!matches!(line, Line::Before(_)));
    }
    end(&mut hunk, start, counts, &mut out);
    out
}

/// The lines of both, by their longest common subsequence.
fn compare<'a>(before: &[&'a str], after: &[&'a str]) -> Vec<Line<'a>> {
    let same = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    let (head, before, after) = (
        before.get(..same).unwrap_or_default(),
        before.get(same..).unwrap_or_default(),
        after.get(same..).unwrap_or_default(),
    );
    let mut lines: Vec<_> = head.iter().map(|line| Line::Both(line)).collect();
    if before.len() > MAX_LINES || after.len() > MAX_LINES {
        lines.extend(before.iter().map(|line| Line::Before(line)));
        lines.extend(after.iter().map(|line| Line::After(line)));
        return lines;
    }
    // common[i][j]: how long what is common of before[i..] and after[j..] is.
    let width = after.len() + 1;
    let mut common = vec![0_u16; (before.len() + 1) * width];
    let at = |common: &[u16], i: usize, j: usize| common.get(i * width + j).copied().unwrap_or(0);
    for (i, old) in before.iter().enumerate().rev() {
        for (j, new) in after.iter().enumerate().rev() {
            let longest = if old == new {
                at(&common, i + 1, j + 1) + 1
            } else {
                at(&common, i + 1, j).max(at(&common, i, j + 1))
            };
            if let Some(cell) = common.get_mut(i * width + j) {
                *cell = longest;
            }
        }
    }
    let (mut i, mut j) = (0, 0);
    loop {
        match (before.get(i), after.get(j)) {
            (Some(old), Some(new)) if old == new => {
                lines.push(Line::Both(old));
                (i, j) = (i + 1, j + 1);
            }
            (Some(old), new) if new.is_none() || at(&common, i + 1, j) >= at(&common, i, j + 1) => {
                lines.push(Line::Before(old));
                i += 1;
            }
            (_, Some(new)) => {
                lines.push(Line::After(new));
                j += 1;
            }
            (_, None) => return lines,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn hunks_are_as_elsewhere() {
        let before = "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n";
        let after = "a\nb\nX\nd\ne\nf\ng\nh\ni\nj\nk\n";
        let want = "@@ -1,6 +1,6 @@\n a\n b\n-c\n+X\n d\n e\n f\n@@ -8,3 +8,4 @@\n h\n i\n j\n+k\n";
        assert_eq!(unified(before, after), want);
        assert_eq!(unified("", "a\n"), "@@ -0,0 +1,1 @@\n+a\n");
        assert_eq!(unified("a\n", ""), "@@ -1,1 +0,0 @@\n-a\n");
        assert_eq!(unified("a\n", "a\n"), "");
    }

    proptest! {
        #[test]
        fn both_sides_are_in_what_is_shown(before in vec("[abc]", 0..12), after in vec("[abc]", 0..12)) {
            let (before, after): (Vec<&str>, Vec<&str>) =
                (before.iter().map(String::as_str).collect(), after.iter().map(String::as_str).collect());
            let lines = compare(&before, &after);
            let side = |of: fn(&Line<'_>) -> bool| -> Vec<String> {
                lines.iter().filter(|line| of(line)).map(|line| match line {
                    Line::Both(text) | Line::Before(text) | Line::After(text) => (*text).to_owned(),
                }).collect()
            };
            prop_assert_eq!(side(|line| !matches!(line, Line::After(_))), before);
            prop_assert_eq!(side(|line| !matches!(line, Line::Before(_))), after);
        }
    }
}
