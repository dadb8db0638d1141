//! Names of fields that a guest uses: at each call mostly the same, and to make one of its text takes longer than to compare
//! it.

use http::{HeaderName, header};

/// Names that an instance's are remembered of.
const MAX: usize = 16;
/// Bytes of one that is remembered; few have more.
const MAX_BYTES: usize = 64;

/// The names that an instance has used of late.
#[derive(Debug, Default)]
pub(crate) struct Names {
    known: Vec<Name>,
    /// Whose place is taken next when there are [`MAX`].
    next: usize,
}

/// The name of a field.
#[derive(Clone, Debug)]
pub(crate) struct Name {
    pub(crate) name: HeaderName,
    /// Whether a plugin may change such a field.
    pub(crate) may_change: bool,
}

impl Names {
    /// The name that a text is; `None` if it is none.
    pub(crate) fn of(&mut self, text: &str) -> Option<Name> {
        if let Some(known) = self.known.iter().find(|known| known.name.as_str() == text) {
            return Some(known.clone());
        }
        let name = Name::parse(text)?;
        // What isn't in lower case would be another text each time.
        if text.len() <= MAX_BYTES && name.name.as_str() == text {
            self.remember(name.clone());
        }
        Some(name)
    }

    fn remember(&mut self, name: Name) {
        if self.known.len() < MAX {
            self.known.push(name);
        } else if let Some(known) = self.known.get_mut(self.next) {
            *known = name;
            self.next = (self.next + 1) % MAX;
        }
    }
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let name = HeaderName::from_bytes(text.as_bytes()).ok()?;
        let may_change = name != header::HOST && leeward_policy::may_be_in_an_answer(name.as_str());
        Some(Self { name, may_change })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_same_however_often_it_is_asked_for_and_few_are_remembered() {
        let mut names = Names::default();
        let long = "x".repeat(MAX_BYTES + 1);
        for _ in 0..2 {
            for (text, may_change) in [
                ("x-a", true),
                ("X-B", true),
                ("host", false),
                ("te", false),
                (&long, true),
            ] {
                let name = names.of(text).unwrap();
                assert_eq!(
                    (name.name.as_str(), name.may_change),
                    (&*text.to_lowercase(), may_change)
                );
            }
            for text in ["", ":path", "a b", "x\r"] {
                assert!(names.of(text).is_none(), "{text:?}");
            }
            assert_eq!(names.known.len(), 3);
        }
        for n in 0..100 {
            let text = format!("x-{n}");
            assert_eq!(names.of(&text).unwrap().name.as_str(), text);
            assert_eq!(names.of("x-a").unwrap().name, "x-a");
        }
        assert_eq!(names.known.len(), MAX);
    }
}
