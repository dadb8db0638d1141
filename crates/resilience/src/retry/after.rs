//! What an answer says about when to come back.

use std::time::Duration;

/// Reads a `Retry-After` (RFC 9110 §10.2.3): seconds, or a date in the preferred form of §5.6.7, of which
/// `now_unix` (seconds since 1970) is taken off; zero if it is past. `None`: it is neither.
pub fn retry_after(value: &str, now_unix: u64) -> Option<Duration> {
    if let Some(seconds) = number(value) {
        return Some(Duration::from_secs(seconds));
    }
    imf_fixdate(value).map(|at| Duration::from_secs(at.saturating_sub(now_unix)))
}

/// Reads a `grpc-retry-pushback-ms` (gRPC proposal A6). A value that is negative, or no number, is the
/// server's way to say that there should be no retry at all: [`Duration::MAX`].
pub fn grpc_retry_pushback(value: &str) -> Duration {
    number(value).map_or(Duration::MAX, Duration::from_millis)
}

/// Digits and nothing else; as much as fits if that is too little.
fn number(value: &str) -> Option<u64> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| value.parse().unwrap_or(u64::MAX))
}

/// Seconds since 1970 of a date such as `Sun, 06 Nov 1994 08:49:37 GMT`. The name of the day isn't compared
/// with the date; years before 1970 are none.
fn imf_fixdate(value: &str) -> Option<u64> {
    const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (name, rest) = value.split_once(", ")?;
    let mut parts = rest.split(' ');
    let mut fixed = |length: usize| parts.next().filter(|part| part.len() == length);
    let day = number(fixed(2)?)?;
    let month = fixed(3)?;
    let year = number(fixed(4)?)?;
    let mut clock = fixed(8)?.split(':');
    let zone = fixed(3)?;
    if !DAYS.contains(&name) || zone != "GMT" || parts.next().is_some() {
        return None;
    }
    let mut two = || number(clock.next().filter(|part| part.len() == 2)?);
    let (hour, minute, second) = (two()?, two()?, two()?);
    let month = (1..).zip(MONTHS).find(|(_, name)| *name == month)?.0;
    // 60 is a leap second.
    if clock.next().is_some() || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some(days_since_1970(year, month, day)? * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, from 1970 on.
fn days_since_1970(year: u64, month: u64, day: u64) -> Option<u64> {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let length = |month| match month {
        2 => 28 + u64::from(leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    if year < 1970 || day < 1 || day > length(month) {
        return None;
    }
    let leaps_before = |year: u64| {
        let past = year - 1;
        past / 4 - past / 100 + past / 400
    };
    let years = (year - 1970) * 365 + leaps_before(year) - leaps_before(1970);
    Some(years + (1..month).map(length).sum::<u64>() + day - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn seconds_and_dates_are_read() {
        let check = |value: &str, now, seconds: Option<u64>| {
            assert_eq!(
                retry_after(value, now),
                seconds.map(Duration::from_secs),
                "{value}"
            );
        };
        check("120", 0, Some(120));
        check("0", 0, Some(0));
        check("99999999999999999999999", 0, Some(u64::MAX));
        check("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_700, Some(77));
        check("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_778, Some(0));
        check("Thu, 01 Jan 1970 00:00:00 GMT", 0, Some(0));
        check("Thu, 29 Feb 2024 23:59:60 GMT", 0, Some(1_709_251_200));
        check("Fri, 31 Dec 9999 23:59:59 GMT", 0, Some(253_402_300_799));
        for bad in [
            "",
            "-1",
            "+1",
            "1.5",
            " 1",
            "soon",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 06 Nov 1994 08:49:37 GMT ",
            "Sun, 6 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 94 08:49:37 GMT",
            "Sun, 06 Nox 1994 08:49:37 GMT",
            "Xxx, 06 Nov 1994 08:49:37 GMT",
            "Sun, 00 Nov 1994 08:49:37 GMT",
            "Sun, 31 Nov 1994 08:49:37 GMT",
            "Wed, 29 Feb 2023 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:49:37 GMT",
            "Sun, 06 Nov 1994 08:60:37 GMT",
            "Sun, 06 Nov 1994 08:49:61 GMT",
            "Sun, 06 Nov 1994 8:49:370 GMT",
            "Sun, 06 Nov 1969 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
        ] {
            check(bad, 0, None);
        }
    }

    #[test]
    fn a_server_can_push_back_or_ask_for_no_retry() {
        assert_eq!(grpc_retry_pushback("1500"), Duration::from_millis(1500));
        for never in ["-1", "", "soon", "1s"] {
            assert_eq!(grpc_retry_pushback(never), Duration::MAX);
        }
    }

    proptest! {
        #[test]
        fn any_text_can_be_read(value: String, now: u64) {
            retry_after(&value, now);
            grpc_retry_pushback(&value);
        }

        #[test]
        fn each_day_is_one_after_the_other(year in 1970u64..3000, month in 1u64..=12, day in 1u64..=31) {
            if let Some(days) = days_since_1970(year, month, day) {
                let next = days_since_1970(year, month, day + 1)
                    .or_else(|| days_since_1970(year, month + 1, 1).filter(|_| month < 12))
                    .or_else(|| days_since_1970(year + 1, 1, 1));
                prop_assert_eq!(next, Some(days + 1));
            }
        }
    }
}
