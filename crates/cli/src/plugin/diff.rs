//! Two texts beside each other, line by line.

/// Lines of either text that are compared; of longer ones the first.
const MAX_LINES: usize = 200;

/// What is wanted with `-`, what is there with `+`, what is the same with neither.
pub(crate) fn lines(want: &str, got: &str) -> Vec<String> {
    let (want, got): (Vec<&str>, Vec<&str>) = (split(want), split(got));
    // The longest common subsequence from each pair of places on.
    let width = got.len() + 1;
    let mut common = vec![0usize; (want.len() + 1) * width];
    let at = |common: &[usize], i: usize, j: usize| common.get(i * width + j).copied().unwrap_or_default();
    for (i, line) in want.iter().enumerate().rev() {
        for (j, other) in got.iter().enumerate().rev() {
            let longest = if line == other {
                at(&common, i + 1, j + 1) + 1
            } else {
                at(&common, i + 1, j).max(at(&common, i, j + 1))
            };
            if let Some(cell) = common.get_mut(i * width + j) {
                *cell = longest;
            }
        }
    }
    let (mut i, mut j, mut out) = (0, 0, Vec::new());
    loop {
        match (want.get(i), got.get(j)) {
            (None, None) => return out,
            (Some(line), Some(other)) if line == other => {
                out.push(format!("  {line}"));
                (i, j) = (i + 1, j + 1);
            }
            (Some(line), other) if other.is_none() || at(&common, i + 1, j) >= at(&common, i, j + 1) => {
                out.push(format!("- {line}"));
                i += 1;
            }
            (_, Some(other)) => {
                out.push(format!("+ {other}"));
                j += 1;
            }
            (Some(_), None) => i += 1,
        }
    }
}

fn split(text: &str) -> Vec<&str> {
    if text.is_empty() {
        return vec!["(empty)"];
    }
    text.lines().take(MAX_LINES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_that_are_the_same_stand_once() {
        assert_eq!(lines("a\nb\nc", "a\nx\nc"), ["  a", "- b", "+ x", "  c"]);
        assert_eq!(lines("", "a"), ["- (empty)", "+ a"]);
    }

    proptest! {
        #[test]
        fn both_texts_can_be_read_from_it(want in "([ab]\n){1,8}", got in "([ab]\n){1,8}") {
            let diff = lines(&want, &got);
            let of = |mark: char| -> String {
                let kept = diff.iter().filter(|line| line.starts_with([mark, ' ']));
                kept.map(|line| format!("{}\n", &line[2..])).collect()
            };
            prop_assert_eq!(of('-'), want);
            prop_assert_eq!(of('+'), got);
        }
    }
}
