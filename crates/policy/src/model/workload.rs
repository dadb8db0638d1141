//! Which processes of a node get a certificate of their own.

use crate::Name;
use std::fmt;

/// Processes that are one workload: the proxies of a zone attest them, and give them certificates with its id.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Workload {
    /// The zone whose proxies attest it.
    pub zone: Name,
    /// Only these of its proxies; none: every one.
    pub proxies: Vec<Name>,
    /// The user is one of these; none: whoever it is. Where there are none, there are control groups.
    pub uids: Vec<u32>,
    /// The control group is one of these; none: whichever it is.
    pub cgroups: Vec<CgroupPattern>,
}

/// Which control groups are meant. Components of paths are compared whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CgroupPattern {
    /// The group of this path, and none below it.
    Exact(Box<str>),
    /// Every group below the one of this path, however deep, and not that one itself.
    Below(Box<str>),
}

/// What is known of a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Process<'a> {
    /// Its user.
    pub uid: u32,
    /// The path of its control group (version 2); `None` where it isn't known, which fits no pattern.
    pub cgroup: Option<&'a str>,
}

/// Why a text names no control group.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidCgroup {
    /// It is no path from the root on.
    #[error("doesn't begin with /; want the path of a control group, as /proc/PID/cgroup has it after 0::")]
    Relative,
    /// It is too long.
    #[error("has more than {MAX_PATH} bytes")]
    Long,
    /// A component is no name.
    #[error("has a component that is empty, . or .., or a control character in it")]
    Component,
    /// A star stands elsewhere than for a whole component at the end.
    #[error("has a * that isn't its whole last component; want none, or /* at the end for every group below")]
    Star,
    /// It selects everything.
    #[error("is every group but the root; want one that says something")]
    Everything,
}

/// Longest path, in bytes, with what stands for groups below.
const MAX_PATH: usize = 1024;

impl Workload {
    /// Whether a proxy attests it.
    pub fn is_for(&self, zone: &Name, proxy: &Name) -> bool {
        self.zone == *zone && (self.proxies.is_empty() || self.proxies.contains(proxy))
    }

    /// Whether a process is it. One that says nothing of processes is nobody.
    pub fn matches(&self, process: &Process<'_>) -> bool {
        let says_something = !self.uids.is_empty() || !self.cgroups.is_empty();
        let by_uid = self.uids.is_empty() || self.uids.contains(&process.uid);
        let fits = |group| self.cgroups.iter().any(|pattern| pattern.matches(group));
        let by_group = self.cgroups.is_empty() || process.cgroup.is_some_and(fits);
        says_something && by_uid && by_group
    }
}

impl CgroupPattern {
    /// Reads a path, or a path with `/*` at its end.
    ///
    /// # Errors
    ///
    /// [`InvalidCgroup`] says what it should be.
    pub fn parse(text: &str) -> Result<Self, InvalidCgroup> {
        if text.len() > MAX_PATH {
            return Err(InvalidCgroup::Long);
        }
        let rest = text.strip_prefix('/').ok_or(InvalidCgroup::Relative)?;
        if rest == "*" {
            return Err(InvalidCgroup::Everything);
        }
        let below = text.strip_suffix("/*");
        let path = below.unwrap_or(text);
        if path.contains('*') {
            return Err(InvalidCgroup::Star);
        }
        let is_name = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(char::is_control);
        // The root alone has no component.
        if text != "/" && !path.split('/').skip(1).all(is_name) {
            return Err(InvalidCgroup::Component);
        }
        Ok(match below {
            Some(path) => Self::Below(path.into()),
            None => Self::Exact(path.into()),
        })
    }

    /// Whether a group is meant.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *path,
            Self::Below(above) => path
                .strip_prefix(&**above)
                .and_then(|rest| rest.strip_prefix('/'))
                .is_some_and(|below| !below.is_empty()),
        }
    }
}

impl fmt::Display for CgroupPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => f.write_str(path),
            Self::Below(path) => write!(f, "{path}/*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn workload(uids: &[u32], cgroups: &[&str]) -> Workload {
        Workload {
            zone: name("a"),
            proxies: Vec::new(),
            uids: uids.to_vec(),
            cgroups: cgroups
                .iter()
                .map(|text| CgroupPattern::parse(text).unwrap())
                .collect(),
        }
    }

    fn process(uid: u32, cgroup: Option<&str>) -> Process<'_> {
        Process { uid, cgroup }
    }

    #[test]
    fn all_that_is_said_must_hold_and_one_of_a_list_is_enough() {
        let both = workload(&[1, 2], &["/a", "/b/*"]);
        assert!(both.matches(&process(1, Some("/a"))) && both.matches(&process(2, Some("/b/c/d"))));
        assert!(!both.matches(&process(3, Some("/a"))) && !both.matches(&process(1, Some("/b"))));
        assert!(
            !both.matches(&process(1, None)),
            "a group that isn't known is none"
        );
        assert!(workload(&[1], &[]).matches(&process(1, None)));
        assert!(workload(&[], &["/"]).matches(&process(7, Some("/"))));
        assert!(!workload(&[], &["/"]).matches(&process(7, Some("/a"))));
        assert!(!workload(&[], &[]).matches(&process(0, Some("/"))));
    }

    #[test]
    fn components_are_whole() {
        let below = CgroupPattern::parse("/system.slice/pay.service/*").unwrap();
        for (path, fits) in [
            ("/system.slice/pay.service/worker", true),
            ("/system.slice/pay.service/a/b", true),
            ("/system.slice/pay.service", false),
            ("/system.slice/pay.service/", false),
            ("/system.slice/pay.service.evil/worker", false),
            ("/system.slice/pay.servic", false),
            ("system.slice/pay.service/worker", false),
            ("/x/system.slice/pay.service/worker", false),
        ] {
            assert_eq!(below.matches(path), fits, "{path}");
        }
        let exact = CgroupPattern::parse("/system.slice/pay.service").unwrap();
        assert!(exact.matches("/system.slice/pay.service"));
        assert!(!exact.matches("/system.slice/pay.service/worker"));
        assert!(!exact.matches("/system.slice/pay.service (deleted)"));
    }

    #[test]
    fn what_is_no_path_is_refused() {
        use InvalidCgroup::{Component, Everything, Long, Relative, Star};
        let long = format!("/{}", "a".repeat(MAX_PATH));
        for (text, why) in [
            ("", Relative),
            ("a/b", Relative),
            ("*", Relative),
            ("/*", Everything),
            ("/a*", Star),
            ("/a/*/b", Star),
            ("/*/*", Star),
            ("//", Component),
            ("//*", Component),
            ("/a/", Component),
            ("/a//b", Component),
            ("/./a", Component),
            ("/../a/*", Component),
            ("/a\n", Component),
            (long.as_str(), Long),
        ] {
            assert_eq!(CgroupPattern::parse(text), Err(why), "{text:?}");
        }
    }

    #[test]
    fn it_is_for_its_zone_and_those_that_it_names() {
        let mut one = workload(&[1], &[]);
        assert!(one.is_for(&name("a"), &name("a1")) && !one.is_for(&name("b"), &name("a1")));
        one.proxies = vec![name("a2")];
        assert!(one.is_for(&name("a"), &name("a2")) && !one.is_for(&name("a"), &name("a1")));
        assert!(!one.is_for(&name("b"), &name("a2")));
    }

    proptest! {
        /// A pattern fits what its components say, found out in another way.
        #[test]
        fn patterns_go_by_components(
            want in prop::collection::vec("[a-c.]{1,3}", 0..4),
            got in prop::collection::vec("[a-c.]{1,3}", 0..5),
            below in any::<bool>(),
        ) {
            let path = |parts: &[String]| format!("/{}", parts.join("/"));
            let text = if below { format!("{}/*", path(&want)) } else { path(&want) };
            if let Ok(pattern) = CgroupPattern::parse(&text) {
                let expected = if below { got.len() > want.len() && got.starts_with(&want) } else { got == want };
                prop_assert_eq!(pattern.matches(&path(&got)), expected, "{} {}", text, path(&got));
                prop_assert_eq!(pattern.to_string(), text);
            }
        }

        #[test]
        fn nothing_makes_it_panic(text in ".{0,40}", path in ".{0,40}") {
            if let Ok(pattern) = CgroupPattern::parse(&text) {
                pattern.matches(&path);
            }
        }
    }
}
