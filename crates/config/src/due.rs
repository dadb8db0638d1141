//! When it is time for the next certificate. Time and chance are arguments.

use leeward_identity::Validity;
use std::time::{Duration, SystemTime};

/// Over how long those spread that want a certificate of another root at once; a tenth of a certificate's life if that is less.
pub(crate) const SPREAD: Duration = Duration::from_secs(60);

/// What decides when the next of one certificate is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Due {
    /// When within the time of renewal it is this one's turn, 0 to 1; drawn anew for each certificate.
    draw: f64,
    /// The root that certificates are to lead to, where this one leads to another.
    hurry: Option<Hurry>,
}

/// A certificate of another root is wanted, before half life.
#[derive(Clone, Debug)]
struct Hurry {
    root: String,
    /// When it is this one's turn.
    at: SystemTime,
    /// Asked for once: another of several control planes may go on with the old root for a while.
    is_done: bool,
}

impl Due {
    pub(crate) const fn new(draw: f64) -> Self {
        Self { draw, hurry: None }
    }

    /// When to ask, of a certificate that leads to `root`, where certificates are to lead to `wanted` (empty: to any). `draw` is
    /// from 0 to 1.
    pub(crate) fn at(
        &mut self,
        validity: Validity,
        root: Option<&str>,
        wanted: &str,
        now: SystemTime,
        draw: f64,
    ) -> SystemTime {
        let due = validity.renew_at(self.draw);
        if wanted.is_empty() || root == Some(wanted) {
            return due;
        }
        let known = self.hurry.take().filter(|hurry| hurry.root == wanted);
        let hurry = self.hurry.insert(known.unwrap_or_else(|| Hurry {
            root: wanted.to_owned(),
            at: now + SPREAD.min(validity.life() / 10).mul_f64(draw.clamp(0.0, 1.0)),
            is_done: false,
        }));
        if hurry.is_done { due } else { due.min(hurry.at) }
    }

    /// There is another certificate, which was asked for at a time.
    pub(crate) fn renewed(&mut self, now: SystemTime, draw: f64) {
        self.draw = draw;
        if let Some(hurry) = self.hurry.as_mut().filter(|hurry| now >= hurry.at) {
            hurry.is_done = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn it_is_time_at_half_life_and_another_root_is_asked_for_soon_and_once() {
        let validity = Validity {
            not_before: at(0),
            not_after: at(3600),
        };
        let mut due = Due::new(0.5);
        let (now, half) = (at(100), at(1800));
        assert_eq!(due.at(validity, Some("old"), "", now, 0.5), half);
        assert_eq!(due.at(validity, Some("old"), "old", now, 0.5), half);
        let soon = due.at(validity, Some("old"), "new", now, 0.5);
        assert_eq!(soon, at(130));
        assert_eq!(
            due.at(validity, Some("old"), "new", at(110), 1.0),
            soon,
            "its turn stays"
        );
        // One that was asked for before its turn says nothing of that.
        due.renewed(at(120), 0.5);
        assert_eq!(due.at(validity, Some("old"), "new", at(120), 0.5), soon);
        due.renewed(at(130), 0.5);
        assert_eq!(due.at(validity, Some("old"), "new", at(130), 0.5), half);
        assert_eq!(due.at(validity, Some("old"), "third", at(130), 0.0), at(130));
        // Those whose certificates last for less don't wait for a minute.
        let short = Validity {
            not_before: at(0),
            not_after: at(100),
        };
        assert_eq!(Due::new(0.5).at(short, None, "new", at(1), 1.0), at(11));
    }
}
