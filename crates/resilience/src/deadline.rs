//! A request's time, told from hop to hop in the header `grpc-timeout`.
//!
//! The format is gRPC's ("gRPC over HTTP2", Timeout): one to eight digits and a unit, one of `H`, `M`, `S`,
//! `m`, `u` and `n` for hours, minutes, seconds, milliseconds, microseconds and nanoseconds.

use std::time::Duration;

/// Units, finest first, in nanoseconds.
const UNITS: [(u8, u64); 6] = [
    (b'n', 1),
    (b'u', 1_000),
    (b'm', 1_000_000),
    (b'S', 1_000_000_000),
    (b'M', 60_000_000_000),
    (b'H', 3_600_000_000_000),
];
/// The most that eight digits say.
const MOST: u64 = 99_999_999;

/// Reads a `grpc-timeout`. `None`: it isn't one. It may be zero, and it may be as long as 11,000 years, so
/// add it to a time with `checked_add`.
pub fn parse(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let (_, nanos) = UNITS.into_iter().find(|(letter, _)| letter == unit)?;
    let count = digits
        .iter()
        .fold(0, |count, digit| count * 10 + u64::from(digit - b'0'));
    // In two parts, as the nanoseconds of 99999999H don't fit a u64.
    let whole = (nanos / 1_000_000_000).saturating_mul(count);
    let part = (nanos % 1_000_000_000).saturating_mul(count);
    Some(Duration::from_secs(whole) + Duration::from_nanos(part))
}

/// A `grpc-timeout`, written: ASCII, 2 to 9 bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Text {
    /// Aligned to the right.
    bytes: [u8; LONGEST],
    start: usize,
}

impl Text {
    /// What stands in the header.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }
}

/// Eight digits and a unit.
const LONGEST: usize = 9;

/// Writes a `grpc-timeout` in the finest unit that eight digits have room for, and never longer than `time`. Zero
/// is `0n`; more than 99999999 hours are that.
pub fn format(time: Duration) -> Text {
    let (letter, mut count) = UNITS
        .into_iter()
        .filter_map(|(letter, nanos)| Some((letter, count(time, nanos)?)))
        .find(|(_, count)| *count <= MOST)
        .unwrap_or((b'H', MOST));
    let mut text = Text {
        bytes: [letter; LONGEST],
        start: LONGEST - 1,
    };
    for byte in text.bytes.iter_mut().rev().skip(1) {
        // A digit is below 10.
        *byte = b'0' + u8::try_from(count % 10).unwrap_or_default();
        text.start -= 1;
        count /= 10;
        if count == 0 {
            break;
        }
    }
    text
}

/// How many whole units there are in a time; `None` if that is far too many. The nanoseconds of long times don't
/// fit a u64, and dividing wider numbers takes long.
fn count(time: Duration, unit_nanos: u64) -> Option<u64> {
    const SECOND: u64 = 1_000_000_000;
    if unit_nanos >= SECOND {
        return Some(time.as_secs() / (unit_nanos / SECOND));
    }
    let whole = time.as_secs().checked_mul(SECOND / unit_nanos)?;
    whole.checked_add(u64::from(time.subsec_nanos()) / unit_nanos)
}

/// The shorter of a request's own time limit and what its caller still waits for; `None` is no limit.
pub fn cut(own: Option<Duration>, caller: Option<Duration>) -> Option<Duration> {
    match (own, caller) {
        (Some(own), Some(caller)) => Some(own.min(caller)),
        (own, None) => own,
        (None, caller) => caller,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_the_format_allows_is_read() {
        let check =
            |value: &str, time: Option<Duration>| assert_eq!(parse(value.as_bytes()), time, "{value}");
        check("1H", Some(Duration::from_secs(3600)));
        check("2M", Some(Duration::from_secs(120)));
        check("30S", Some(Duration::from_secs(30)));
        check("250m", Some(Duration::from_millis(250)));
        check("7u", Some(Duration::from_micros(7)));
        check("00000009n", Some(Duration::from_nanos(9)));
        check("0S", Some(Duration::ZERO));
        check("99999999H", Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in [
            "",
            "S",
            "1",
            "1s",
            "1h",
            "123456789n",
            "-1S",
            "+1S",
            "1.5S",
            " 1S",
            "1S ",
            "1 S",
            "١S",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn the_finest_unit_with_room_is_written() {
        let check = |time: Duration, text: &str| assert_eq!(format(time).as_bytes(), text.as_bytes());
        check(Duration::ZERO, "0n");
        check(Duration::from_nanos(99_999_999), "99999999n");
        check(Duration::from_nanos(100_000_999), "100000u");
        check(Duration::from_secs(15), "15000000u");
        check(Duration::from_secs(3600), "3600000m");
        check(Duration::from_secs(100_000_000), "1666666M");
        check(Duration::MAX, "99999999H");
    }

    #[test]
    fn the_shorter_limit_holds() {
        let (long, short) = (Some(Duration::from_secs(2)), Some(Duration::from_secs(1)));
        assert_eq!(cut(long, short), short);
        assert_eq!(cut(short, long), short);
        assert_eq!(cut(None, long), long);
        assert_eq!(cut(long, None), long);
        assert_eq!(cut(None, None), None);
    }

    proptest! {
        #[test]
        fn what_is_written_reads_as_the_same_but_for_rounding_down(
            secs in prop_oneof![Just(0u64), 0..100u64, 0..100_000_000_000u64], nanos in 0..1_000_000_000u32,
        ) {
            let time = Duration::new(secs, nanos);
            let text = format(time);
            prop_assert!(text.as_bytes().len() <= 9);
            let read = parse(text.as_bytes()).unwrap();
            prop_assert!(read <= time);
            // The worst case is just past what a unit holds, where the next is a thousand times coarser.
            prop_assert!(time - read <= time / 99_999, "{time:?} became {read:?}");
            prop_assert_eq!(format(read), text, "and then nothing is lost");
        }

        #[test]
        fn any_bytes_can_be_read(value: Vec<u8>) {
            parse(&value);
        }
    }
}
