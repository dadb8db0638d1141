//! From when to when a certificate is good, and what is to be done about it meanwhile. Time and chance are arguments.

use crate::verify::parse;
use rustls::pki_types::CertificateDer;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::certificate::X509Certificate;
use x509_parser::time::ASN1Time;

/// From when to when a certificate is good.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Validity {
    /// Not before this.
    pub not_before: SystemTime,
    /// Not after this.
    pub not_after: SystemTime,
}

/// How far before and after half of its life a certificate is renewed, as a share of that half: the nodes of a mesh that
/// started together don't ask together for ever.
const JITTER: f64 = 0.1;

impl Validity {
    /// What a certificate says.
    pub(crate) fn of(cert: &X509Certificate<'_>) -> Option<Self> {
        let at = |seconds: i64| UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).ok()?));
        Some(Self {
            not_before: at(cert.validity().not_before.timestamp())?,
            not_after: at(cert.validity().not_after.timestamp())?,
        })
    }

    /// The same of a certificate that nobody has read yet; nothing if it can't be.
    pub(crate) fn read(cert: &CertificateDer<'_>) -> Option<Self> {
        Self::of(&parse(cert).ok()?)
    }

    /// How long it is good for, all in all.
    pub fn life(&self) -> Duration {
        self.not_after.duration_since(self.not_before).unwrap_or_default()
    }

    /// When to ask for the next one: at half of its life, a tenth of that sooner or later. `draw` is from 0 to 1.
    pub fn renew_at(&self, draw: f64) -> SystemTime {
        let share = 0.5 * (1.0 + JITTER * (2.0 * draw.clamp(0.0, 1.0) - 1.0));
        self.not_before + self.life().mul_f64(share)
    }

    /// From when on it is a matter for people that there is no next one yet: at two thirds of its life.
    pub fn worry_at(&self) -> SystemTime {
        self.not_before + self.life().mul_f64(2.0 / 3.0)
    }

    /// Whether it is good at a time.
    pub fn holds(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    /// How long it is still good for; nothing once it has ended.
    pub fn left(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }
}

/// The time of day, which certificates live by.
pub(crate) fn wall() -> SystemTime {
    #[expect(clippy::disallowed_methods, reason = "certificates live by the wall clock")]
    SystemTime::now()
}

/// A time for people, to the second, in UTC.
pub fn shown(at: &SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    ASN1Time::from_timestamp(seconds)
        .map_or_else(|_| "a time that has no name".to_owned(), |at| at.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn renewal_is_around_half_of_life_and_before_anybody_worries(
            from in 0u64..2_000_000_000, life in 2u64..1_000_000, draw in -1.0f64..2.0,
        ) {
            let not_before = UNIX_EPOCH + Duration::from_secs(from);
            let validity = Validity { not_before, not_after: not_before + Duration::from_secs(life) };
            let after = validity.renew_at(draw).duration_since(not_before).unwrap();
            let share = after.as_secs_f64() / validity.life().as_secs_f64();
            prop_assert!((0.4499..=0.5501).contains(&share), "{share}");
            prop_assert!(validity.renew_at(draw) < validity.worry_at());
            prop_assert!(validity.worry_at() < validity.not_after);
            prop_assert!(validity.holds(validity.renew_at(draw)));
        }
    }

    #[test]
    fn what_has_ended_has_nothing_left() {
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        let validity = Validity {
            not_before: at(10),
            not_after: at(20),
        };
        assert!(
            !validity.holds(at(9))
                && validity.holds(at(10))
                && validity.holds(at(20))
                && !validity.holds(at(21))
        );
        assert_eq!(
            (validity.left(at(15)), validity.left(at(30))),
            (Duration::from_secs(5), Duration::ZERO)
        );
    }
}
