//! The list of what a backup is made of, and the names of objects. Pure.
//!
//! A manifest is stored last, under a name that has its own hash: a backup has one, or it is none. It is not encrypted,
//! so that retention needs no secret; it says nothing of what the store holds but how much it is.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;

/// The version of the layout.
pub(crate) const FORMAT: u32 = 1;
/// Objects of one backup at most.
const MAX_PIECES: usize = 1_000_000;
/// Largest manifest, in bytes.
pub(crate) const MAX_MANIFEST: u64 = 256 << 20;

/// Where manifests are.
pub(crate) const MANIFESTS: &str = "manifests";
/// Where chunks are.
pub(crate) const CHUNKS: &str = "chunks";
/// Where segments of the log are, for each store in a directory of its own.
pub(crate) const LOG: &str = "log";
/// Where it stands which backups were verified.
pub(crate) const VERIFIED: &str = "verified";
/// Where it stands which backups are being made.
pub(crate) const PENDING: &str = "pending";
/// Where the epochs of leaders are.
pub(crate) const EPOCHS: &str = "epochs";

/// What a backup is made of.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// When it was begun, in milliseconds since 1970.
    pub(crate) begun_ms: i64,
    /// When all of it was there.
    pub(crate) ended_ms: i64,
    /// The store that it is of.
    pub(crate) store_id: String,
    /// The revision of policy that it shows.
    pub(crate) revision: u64,
    /// The position of the store that it shows; the log goes on from there.
    pub(crate) position: u64,
    /// The version of the store's own layout.
    pub(crate) schema: u64,
    /// The build that made it.
    pub(crate) tool: String,
    /// Whom it is encrypted to; empty: to nobody.
    pub(crate) recipients: Vec<String>,
    /// Keys in the chunks.
    pub(crate) entries: u64,
    /// Bytes of keys and values in the chunks.
    pub(crate) bytes: u64,
    /// SHA-256 of the chunks' entries, one after the other.
    pub(crate) content_sha256: String,
    /// The entries.
    pub(crate) chunks: Vec<Piece>,
    /// What changed while the entries were read, as segments; to be put on top of them.
    pub(crate) tail: Vec<Piece>,
    /// The certificate authority, where it was asked for.
    pub(crate) authority: Option<Piece>,
}

/// One object.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Piece {
    /// Its name.
    pub(crate) name: String,
    /// Its bytes as they are stored.
    pub(crate) size: u64,
    /// SHA-256 of these.
    pub(crate) sha256: String,
}

/// What a manifest's bytes or name are not.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("its bytes don't have the hash in its name")]
    Hash,
    #[error("is not named as manifests are")]
    Name,
    #[error("can't be read: {0}")]
    Json(String),
    #[error("has format {0}, and this build knows up to {FORMAT}: use a later build")]
    Format(u32),
    #[error("names {0} objects; want at most {MAX_PIECES}")]
    Pieces(usize),
}

impl Manifest {
    /// Its bytes and the name under which they are stored.
    pub(crate) fn encode(&self) -> (String, Vec<u8>) {
        // A value of this type always has a text.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        let name = format!("{MANIFESTS}/{}-{}.json", stamp(self.begun_ms), sha256(&bytes));
        (name, bytes)
    }

    /// A manifest from what is stored under a name.
    pub(crate) fn decode(name: &str, bytes: &[u8]) -> Result<Self, ManifestError> {
        let (_, hash) = split(name).ok_or(ManifestError::Name)?;
        if sha256(bytes) != hash {
            return Err(ManifestError::Hash);
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| ManifestError::Json(e.to_string()))?;
        if manifest.format != FORMAT {
            return Err(ManifestError::Format(manifest.format));
        }
        let count = manifest.chunks.len() + manifest.tail.len();
        if count > MAX_PIECES {
            return Err(ManifestError::Pieces(count));
        }
        Ok(manifest)
    }

    /// Every object that it names.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.chunks.iter().chain(&self.tail).chain(&self.authority)
    }

    /// The bytes of its objects as they are stored.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.pieces().map(|piece| piece.size).sum()
    }
}

/// The short name by which people call a backup: its time, and the beginning of its hash.
pub(crate) fn short(name: &str) -> Option<String> {
    let (stamp, hash) = split(name)?;
    Some(format!("{stamp}-{}", hash.get(..8)?))
}

/// The time and the hash in a manifest's name.
fn split(name: &str) -> Option<(&str, &str)> {
    let stem = name
        .strip_prefix(MANIFESTS)?
        .strip_prefix('/')?
        .strip_suffix(".json")?;
    let (stamp, hash) = stem.rsplit_once('-')?;
    let is_hash = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    is_hash.then_some((stamp, hash))
}

/// The name of a chunk or of a piece of the tail: what its content is by, and what its bytes are.
pub(crate) fn chunk_name(id: &str, sealed_sha256: &str) -> String {
    format!("{CHUNKS}/{id}-{sealed_sha256}")
}

/// The content that the name of a chunk is for.
pub(crate) fn chunk_id(name: &str) -> Option<&str> {
    let stem = name.strip_prefix(CHUNKS)?.strip_prefix('/')?;
    stem.split_once('-').map(|(id, _)| id)
}

/// The name of the segment that begins after a position. Of two that are shipped for the same position, one is.
pub(crate) fn segment_name(store_id: &str, after: u64) -> String {
    format!("{LOG}/{store_id}/{after:020}")
}

/// The position after which the segment of a name begins.
pub(crate) fn segment_after(name: &str) -> Option<u64> {
    name.rsplit('/').next()?.parse().ok()
}

/// Hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        // Writing to a String does not fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// SHA-256 as hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A time as names have it: it sorts, and has no colons.
pub(crate) fn stamp(ms: i64) -> String {
    // To the millisecond, always: names of one length sort by time.
    let text = rfc3339(ms - ms.rem_euclid(1000));
    let seconds = text.trim_end_matches('Z').replace(['-', ':'], "");
    format!("{seconds}.{:03}Z", ms.rem_euclid(1000))
}

/// A time as people write it.
pub(crate) fn rfc3339(ms: i64) -> String {
    crate::policy::timestamp(ms).to_string()
}

/// A time that people wrote, in milliseconds since 1970.
pub(crate) fn parse_time(text: &str) -> Option<i64> {
    let time: prost_types::Timestamp = text.parse().ok()?;
    time.seconds
        .checked_mul(1000)?
        .checked_add(i64::from(time.nanos) / 1_000_000)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            begun_ms: 1_796_017_860_123,
            ended_ms: 1_796_017_860_456,
            store_id: "0123abcd".into(),
            revision: 7,
            position: 21,
            schema: 5,
            tool: "leeward 0.1.0".into(),
            recipients: Vec::new(),
            entries: 2,
            bytes: 30,
            content_sha256: sha256(b"x"),
            chunks: vec![Piece {
                name: "chunks/a-b".into(),
                size: 10,
                sha256: sha256(b"y"),
            }],
            tail: Vec::new(),
            authority: None,
        }
    }

    #[test]
    fn a_manifest_comes_back_and_no_byte_of_it_can_differ() {
        let (name, bytes) = manifest().encode();
        assert!(name.starts_with("manifests/20261130T055100.123Z-"), "{name}");
        assert_eq!(Manifest::decode(&name, &bytes).unwrap(), manifest());
        assert_eq!(short(&name).unwrap().len(), "20261130T055100.123Z-".len() + 8);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            assert_eq!(
                Manifest::decode(&name, &bad),
                Err(ManifestError::Hash),
                "byte {at}"
            );
        }
        assert_eq!(
            Manifest::decode("manifests/x.json", &bytes),
            Err(ManifestError::Name)
        );
        let later = Manifest {
            format: 2,
            ..manifest()
        };
        let (name, bytes) = later.encode();
        assert_eq!(Manifest::decode(&name, &bytes), Err(ManifestError::Format(2)));
    }

    #[test]
    fn names_sort_by_time_and_times_come_back() {
        let times = [
            0,
            1,
            999,
            1000,
            1_796_017_860_120,
            1_796_017_860_123,
            1_796_017_861_000,
        ];
        let stamps = times.map(stamp);
        assert!(stamps.is_sorted_by(|a, b| a < b), "{stamps:?}");
        for ms in times {
            assert_eq!(parse_time(&rfc3339(ms)), Some(ms));
        }
        assert_eq!(parse_time("yesterday"), None);
        assert_eq!(segment_after(&segment_name("s", 42)), Some(42));
        assert_eq!(chunk_id(&chunk_name("ab", "cd")), Some("ab"));
    }
}
