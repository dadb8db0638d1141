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
        .map(|name| (strsim::osa_distance(wrong, name), name))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name)
}

/// The same as the end of a fix.
pub(super) fn did_you_mean<'k>(wrong: &str, known: impl Iterator<Item = &'k str>) -> String {
    nearest(wrong, known).map_or_else(String::new, |name| format!("; did you mean {name:?}?"))
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
