//! Resources as people write them.
//!
//! ```yaml
//! apiVersion: leeward.dev/v1
//! kind: Service
//! metadata: {name: cart}
//! spec:
//!   endpoints:
//!     - {address: "10.0.0.7:8080", zone: a}
//! ```
//!
//! Fields are named as in `resources.proto`, in camelCase. Durations are texts such as `250ms`, `1.5s`, `2m`,
//! sizes are bytes or texts such as `64KiB`, `16MiB`, times are as in RFC 3339 (`2026-11-24T22:00:00Z`). Words
//! of enums are in UpperCamelCase, such as `PeakEwma`. Several documents in a file are set apart by `---`.

mod decode;
mod encode;
mod words;

use crate::convert::parse as check;
use crate::v1;
use crate::yaml::{Node, Value, read};
use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

pub use encode::{to_json, to_yaml};

/// The version that every document names.
pub const API_VERSION: &str = "leeward.dev/v1";

/// Where something stands in a file; both count from 1.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The column, in characters.
    pub column: usize,
}

/// One thing that is wrong with a file. Displays as `FILE:LINE:COLUMN: PATH: REASON`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ManifestError {
    /// The file, as it was named.
    pub file: String,
    /// Where.
    pub place: Place,
    /// The field's path in its document; empty for the document itself.
    pub path: String,
    /// What is wrong, the value, and what would be right.
    pub reason: String,
}

impl ManifestError {
    pub(crate) fn new(place: Place, path: &str, reason: String) -> Self {
        Self {
            file: String::new(),
            place,
            path: path.to_owned(),
            reason,
        }
    }
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            place,
            path,
            reason,
        } = self;
        write!(f, "{file}:{}:{}: ", place.line, place.column)?;
        if path.is_empty() {
            write!(f, "{reason}")
        } else {
            write!(f, "{path}: {reason}")
        }
    }
}

impl std::error::Error for ManifestError {}

/// A resource of a file, and where its fields stand there.
#[derive(Clone, Debug)]
pub struct Located {
    /// The resource.
    pub resource: v1::Resource,
    places: HashMap<String, Place>,
}

impl Located {
    /// Where a field stands, by its path as errors have it; if it isn't there, what is nearest around it.
    pub fn place(&self, path: &str) -> Place {
        place_of(path, &self.places)
    }
}

/// Reads the resources of a file and checks each, as the control plane will. `file` is for the errors.
/// Documents that are empty are passed over.
///
/// # Errors
///
/// Everything that is wrong, in the order of the file.
pub fn parse(file: &str, text: &str) -> Result<Vec<v1::Resource>, Vec<ManifestError>> {
    let located = locate(file, text)?;
    Ok(located.into_iter().map(|located| located.resource).collect())
}

/// The same, with the places of all fields.
///
/// # Errors
///
/// Likewise.
pub fn locate(file: &str, text: &str) -> Result<Vec<Located>, Vec<ManifestError>> {
    let mut errors = Vec::new();
    let mut resources = Vec::new();
    match read(text) {
        Err(error) => errors.push(error),
        Ok(documents) => {
            for document in documents {
                if matches!(document.value, Value::Null) {
                    continue;
                }
                let mut places = HashMap::new();
                remember(&document, &mut places);
                match decode::resource(document) {
                    Err(bad) => errors.extend(bad),
                    Ok(resource) => match check(&resource) {
                        Ok(_) => resources.push(Located { resource, places }),
                        Err(bad) => errors.extend(
                            bad.into_iter()
                                .map(|b| ManifestError::new(place_of(&b.path, &places), &b.path, b.reason)),
                        ),
                    },
                }
            }
        }
    }
    if errors.is_empty() {
        return Ok(resources);
    }
    errors.sort_by_key(|e| (e.place.line, e.place.column));
    for error in &mut errors {
        file.clone_into(&mut error.file);
    }
    Err(errors)
}

fn remember(node: &Node, places: &mut HashMap<String, Place>) {
    places.insert(node.path.clone(), node.place);
    match &node.value {
        Value::List(items) => items.iter().for_each(|item| remember(item, places)),
        Value::Map(entries) => {
            for (_, at, value) in entries {
                remember(value, places);
                // A field is where its key is.
                places.insert(value.path.clone(), *at);
            }
        }
        Value::Null | Value::Bool(_) | Value::Integer(_) | Value::Float(_) | Value::Text(_) => {}
    }
}

/// The place of a path, or of the nearest thing around it that is there.
fn place_of(path: &str, places: &HashMap<String, Place>) -> Place {
    let mut path = path;
    loop {
        if let Some(place) = places.get(path) {
            return *place;
        }
        match path.rfind(['.', '[']) {
            Some(at) => path = path.get(..at).unwrap_or_default(),
            None if path.is_empty() => return Place { line: 1, column: 1 },
            None => path = "",
        }
    }
}

/// The word for a cause on the wire; empty for one that isn't known.
pub(crate) fn cause_word(cause: i32) -> &'static str {
    words::word(words::CAUSE, cause)
}

/// The word for what a fault means on the wire; empty for one that isn't known.
pub(crate) fn on_fault_word(on_fault: i32) -> &'static str {
    words::word(words::ON_FAULT, on_fault)
}

/// A duration as it is written: `250ms`, `1.5s`, `2m`.
pub fn duration_text(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    if nanos == 0 {
        return match seconds {
            0 => "0s".to_owned(),
            s if s % 3600 == 0 => format!("{}h", s / 3600),
            s if s % 60 == 0 => format!("{}m", s / 60),
            s => format!("{s}s"),
        };
    }
    if seconds == 0 && nanos % 1_000_000 == 0 {
        return format!("{}ms", nanos / 1_000_000);
    }
    let fraction = format!("{nanos:09}");
    format!("{seconds}.{}s", fraction.trim_end_matches('0'))
}

/// Reads a duration: a decimal number and one of the units ns, us, ms, s, m, h.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let nanos: u128 = match unit {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || whole.len() > 12 || fraction.len() > 9 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let total = whole.parse::<u128>().ok()? * nanos + fraction * nanos / scale;
    let seconds = u64::try_from(total / 1_000_000_000).ok()?;
    Some(Duration::new(seconds, u32::try_from(total % 1_000_000_000).ok()?))
}

/// Reads a size: a whole number of bytes, or of KiB, MiB, GiB, TiB.
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let scale: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(scale)
}

#[cfg(test)]
mod tests;
