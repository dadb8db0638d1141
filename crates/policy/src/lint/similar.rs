//! "Did you mean": the known name that is nearest to a wrong one.

/// Longest text that is compared, in bytes; the longest name has 63.
const LONGEST: usize = 128;
/// Names that are compared at most.
const MOST: usize = 2000;

/// The known name that is nearest, if one is near: a third of it may differ, and one character in any case.
pub(super) fn nearest<'k>(wrong: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let limit = (wrong.len() / 3).max(1);
    known
        .filter(|name| *name != wrong && name.len() <= LONGEST && wrong.len() <= LONGEST)
        .filter(|name| name.len().abs_diff(wrong.len()) <= limit)
        .take(MOST)
        .map(|name| (distance(wrong, name), name))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name)
}

/// The same as the end of a fix.
pub(super) fn did_you_mean<'k>(wrong: &str, known: impl Iterator<Item = &'k str>) -> String {
    nearest(wrong, known).map_or_else(String::new, |name| format!("; did you mean {name:?}?"))
}

/// How many characters must be put in, taken out, changed, or swapped with the next to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let at = |row: &[usize], j: usize| row.get(j).copied().unwrap_or(usize::MAX / 2);
            let mut best = (at(&last, j) + usize::from(x != y))
                .min(at(&last, j + 1) + 1)
                .min(at(&row, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(y) && b.get(j - 1) == Some(x);
            if swapped {
                best = best.min(at(&before, j - 1) + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_found_if_it_is_near() {
        let known = ["cart", "catalog", "checkout", "payments"];
        let near = |wrong: &str| nearest(wrong, known.into_iter());
        assert_eq!(near("crat"), Some("cart"));
        assert_eq!(near("chekout"), Some("checkout"));
        assert_eq!(near("payment"), Some("payments"));
        assert_eq!(near("catalogue"), Some("catalog"));
        assert_eq!(near("orders"), None);
        assert_eq!(near("cart"), None, "it is not wrong");
        assert_eq!(near(&"x".repeat(500)), None);
    }
}
