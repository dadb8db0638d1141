//! Compressing, encrypting and hashing of what is stored, and the way back.
//!
//! A sealed object is `LWB1`, a byte that says what was done, the length of a head in two bytes, the head, the payload,
//! and the SHA-256 of all before it. The head is not encrypted. One byte that differs anywhere is noticed before anything
//! is made of the rest.

use age::x25519;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 4] = b"LWB1";
const GZIP: u8 = 1;
const AGE: u8 = 2;
const HASH: usize = 32;
/// Largest content of an object, in bytes.
const MAX_CONTENT: u64 = 64 << 20;
/// Largest file of identities, in bytes.
const MAX_IDENTITIES: u64 = 1 << 20;

/// Why an object can't be opened, or not sealed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    #[error("its bytes don't have the hash that they end with")]
    Hash,
    #[error("does not begin with LWB1: it is nothing that Leeward stored")]
    Magic,
    #[error("is sealed in a way that this build doesn't know ({0:#04x}): use a later build")]
    Flags(u8),
    #[error("is encrypted: give an age identity with --identity-file")]
    NoIdentity,
    #[error("can't be decrypted with the age identities given")]
    Decrypt(#[source] age::DecryptError),
    #[error("can't be encrypted")]
    Encrypt(#[source] age::EncryptError),
    #[error("can't be unpacked")]
    Unpack(#[source] io::Error),
    #[error("has more than {MAX_CONTENT} bytes unpacked")]
    Large,
    #[error("{0:?} is not an age recipient; want one such as age1..., as age-keygen prints it")]
    Recipient(String),
    #[error("can't read {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("{0} has no age identity; want lines that begin with AGE-SECRET-KEY-1")]
    Identities(PathBuf),
}

/// Seals. Cheap to make; recipients are checked when it is made.
#[derive(Clone, Default)]
pub(crate) struct Sealer {
    recipients: Vec<x25519::Recipient>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = self.recipients.len();
        f.debug_struct("Sealer").field("recipients", &count).finish()
    }
}

impl Sealer {
    /// One that encrypts to recipients, if there are any.
    pub(crate) fn new<S: AsRef<str>>(recipients: &[S]) -> Result<Self, SealError> {
        let parse = |text: &S| {
            let text = text.as_ref();
            text.parse().map_err(|_| SealError::Recipient(text.to_owned()))
        };
        let recipients = recipients.iter().map(parse).collect::<Result<_, _>>()?;
        Ok(Self { recipients })
    }

    pub(crate) const fn encrypts(&self) -> bool {
        !self.recipients.is_empty()
    }

    /// The recipients as text, in order: whoever seals to others seals something else.
    pub(crate) fn recipients(&self) -> Vec<String> {
        let mut names: Vec<String> = self.recipients.iter().map(ToString::to_string).collect();
        names.sort();
        names
    }

    /// Content as it is stored, under a head of less than 64 KiB that everybody can read. What is as large as a chunk takes
    /// milliseconds.
    pub(crate) fn seal(&self, head: &[u8], content: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut packed = Vec::with_capacity(content.len() / 2 + 64);
        let mut encoder = GzEncoder::new(&mut packed, Compression::fast());
        encoder
            .write_all(content)
            .and_then(|()| encoder.finish().map(drop))
            .map_err(SealError::Unpack)?;
        let mut out = MAGIC.to_vec();
        out.push(if self.encrypts() { GZIP | AGE } else { GZIP });
        let length = u16::try_from(head.len()).map_err(|_| SealError::Large)?;
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(head);
        if self.encrypts() {
            let recipients = self.recipients.iter().map(|r| r as &dyn age::Recipient);
            let encryptor = age::Encryptor::with_recipients(recipients).map_err(SealError::Encrypt)?;
            let written = encryptor.wrap_output(&mut out).and_then(|mut writer| {
                writer.write_all(&packed)?;
                writer.finish().map(drop)
            });
            written.map_err(|e| SealError::Encrypt(e.into()))?;
        } else {
            out.extend_from_slice(&packed);
        }
        let hash = Sha256::digest(&out);
        out.extend_from_slice(&hash);
        Ok(out)
    }
}

/// Opens what was sealed.
#[derive(Clone, Default)]
pub(crate) struct Opener {
    identities: Vec<x25519::Identity>,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = self.identities.len();
        f.debug_struct("Opener").field("identities", &count).finish()
    }
}

impl Opener {
    /// With the identities of a file as age-keygen writes it.
    pub(crate) fn from_file(path: &Path) -> Result<Self, SealError> {
        let failed = |source| SealError::File {
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_IDENTITIES).read_to_string(&mut text))
            .map_err(failed)?;
        let lines = text.lines().map(str::trim);
        let identities: Vec<x25519::Identity> = lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| line.parse().map_err(|_| SealError::Identities(path.to_owned())))
            .collect::<Result<_, _>>()?;
        if identities.is_empty() {
            return Err(SealError::Identities(path.to_owned()));
        }
        Ok(Self { identities })
    }

    /// Whether an object is whole, which needs no identity.
    pub(crate) fn check(sealed: &[u8]) -> Result<(), SealError> {
        let at = sealed.len().checked_sub(HASH).ok_or(SealError::Hash)?;
        let (all, hash) = sealed.split_at_checked(at).ok_or(SealError::Hash)?;
        if Sha256::digest(all).as_slice() == hash {
            Ok(())
        } else {
            Err(SealError::Hash)
        }
    }

    /// The head of an object, which needs no identity.
    pub(crate) fn head(sealed: &[u8]) -> Result<&[u8], SealError> {
        Self::check(sealed)?;
        parts(sealed).map(|(_, head, _)| head)
    }

    /// The content of a sealed object.
    pub(crate) fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        Self::check(sealed)?;
        let (flags, _, payload) = parts(sealed)?;
        let decrypted;
        let packed = match flags {
            GZIP => payload,
            flags if flags == GZIP | AGE => {
                decrypted = self.decrypt(payload)?;
                &decrypted
            }
            flags => return Err(SealError::Flags(flags)),
        };
        let mut content = Vec::new();
        GzDecoder::new(packed)
            .take(MAX_CONTENT + 1)
            .read_to_end(&mut content)
            .map_err(SealError::Unpack)?;
        if content.len() as u64 > MAX_CONTENT {
            return Err(SealError::Large);
        }
        Ok(content)
    }

    fn decrypt(&self, payload: &[u8]) -> Result<Vec<u8>, SealError> {
        if self.identities.is_empty() {
            return Err(SealError::NoIdentity);
        }
        let identities = self.identities.iter().map(|i| i as &dyn age::Identity);
        let decryptor = age::Decryptor::new_buffered(payload).map_err(SealError::Decrypt)?;
        let mut out = Vec::new();
        decryptor
            .decrypt(identities)
            .map_err(SealError::Decrypt)?
            .read_to_end(&mut out)
            .map_err(SealError::Unpack)?;
        Ok(out)
    }
}

/// What was done, the head, and the payload of an object that is whole.
fn parts(sealed: &[u8]) -> Result<(u8, &[u8], &[u8]), SealError> {
    let rest = sealed.strip_prefix(MAGIC).ok_or(SealError::Magic)?;
    let (first, rest) = rest.split_at_checked(3).ok_or(SealError::Magic)?;
    let &[flags, high, low] = first else {
        return Err(SealError::Magic);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let (head, rest) = rest.split_at_checked(length).ok_or(SealError::Magic)?;
    let end = rest.len().checked_sub(HASH).ok_or(SealError::Magic)?;
    let payload = rest.get(..end).ok_or(SealError::Magic)?;
    Ok((flags, head, payload))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use age::secrecy::ExposeSecret;

    /// An identity, and its recipient.
    pub(crate) fn identity(dir: &Path) -> (PathBuf, String) {
        let identity = x25519::Identity::generate();
        let path = dir.join("identity.txt");
        let text = format!("# made for a test\n{}\n", identity.to_string().expose_secret());
        std::fs::write(&path, text).unwrap();
        (path, identity.to_public().to_string())
    }

    #[test]
    fn every_byte_counts() {
        let content: Vec<u8> = (0..2000u32).map(|n| (n % 251) as u8).collect();
        let sealed = Sealer::default().seal(b"head", &content).unwrap();
        assert_eq!(Opener::default().open(&sealed).unwrap(), content);
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(
                matches!(Opener::default().open(&bad), Err(SealError::Hash)),
                "byte {at}"
            );
            assert!(Opener::default().open(&sealed[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_encrypted_opens_with_the_identity_only() {
        let dir = crate::store::tests::Scratch::new();
        std::fs::create_dir_all(&dir.0).unwrap();
        let (path, recipient) = identity(&dir.0);
        let sealer = Sealer::new(&[recipient]).unwrap();
        let sealed = sealer.seal(b"head", b"a secret, a secret, a secret").unwrap();
        assert!(!sealed.windows(8).any(|w| w == b"a secret"));
        assert_eq!(Opener::head(&sealed).unwrap(), b"head");
        assert!(matches!(
            Opener::default().open(&sealed),
            Err(SealError::NoIdentity)
        ));
        let opened = Opener::from_file(&path).unwrap().open(&sealed).unwrap();
        assert_eq!(opened, b"a secret, a secret, a secret");
        let other = dir.0.join("other");
        std::fs::create_dir_all(&other).unwrap();
        let (path, _) = identity(&other);
        let refused = Opener::from_file(&path).unwrap().open(&sealed);
        assert!(matches!(refused, Err(SealError::Decrypt(_))));
        assert!(Sealer::new(&["age1nope"]).is_err());
    }
}
