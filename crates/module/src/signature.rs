//! Who signed a module.

use minisign_verify::{Error, PublicKey, Signature};
use std::path::{Path, PathBuf};

/// The longest signature, in bytes. One of minisign's has about 300, and a comment.
pub const MAX_SIGNATURE: usize = 4096;

/// Why a signature doesn't hold.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SignatureError {
    /// Policy's key is none.
    #[error("{0:?} is not a minisign public key; want the second line of its file, which begins with RW")]
    Key(String),
    /// What should be a signature is none.
    #[error("not a minisign signature; want the four lines of a .minisig file")]
    Malformed,
    /// Another key's.
    #[error("the module is signed by another key")]
    OtherKey,
    /// Of another module, or made up.
    #[error("the signature is not of this module")]
    Wrong,
    /// The old way to sign, which holds the whole module in memory and which minisign no longer does by itself.
    #[error("the signature is of the old kind, without a hash; sign again with minisign 0.11 or later")]
    Legacy,
}

/// Whether `signature`, the text of a `.minisig` file, is `key`'s of these bytes. The key is the line of base64 in the
/// file of the public key.
///
/// # Errors
///
/// [`SignatureError`]: it is not.
pub fn verify(bytes: &[u8], signature: &str, key: &str) -> Result<(), SignatureError> {
    let public = PublicKey::from_base64(key).map_err(|_| SignatureError::Key(key.to_owned()))?;
    if signature.len() > MAX_SIGNATURE {
        return Err(SignatureError::Malformed);
    }
    let signature = Signature::decode(signature).map_err(|_| SignatureError::Malformed)?;
    public
        .verify(bytes, &signature, false)
        .map_err(|error| match error {
            Error::UnexpectedKeyId => SignatureError::OtherKey,
            Error::UnexpectedAlgorithm | Error::UnsupportedLegacyMode => SignatureError::Legacy,
            Error::InvalidEncoding
            | Error::InvalidSignature
            | Error::IoError(_)
            | Error::UnsupportedAlgorithm => SignatureError::Wrong,
        })
}

/// Whether one of the signatures is the key's of these bytes.
///
/// # Errors
///
/// Why not; of several the one that says most: what is wrong with the key's own rather than that others are other keys'.
/// `None`: there is no signature.
pub fn verify_any(bytes: &[u8], signatures: &[String], key: &str) -> Result<(), Option<SignatureError>> {
    let mut why = None;
    for signature in signatures {
        match verify(bytes, signature, key) {
            Ok(()) => return Ok(()),
            Err(error) if why.is_none() || error != SignatureError::OtherKey => why = Some(error),
            Err(_) => {}
        }
    }
    Err(why)
}

/// Whether a text is a signature, whosever and of whatever.
///
/// # Errors
///
/// [`SignatureError::Malformed`]: it is none.
pub fn check_signature(text: &str) -> Result<(), SignatureError> {
    if text.len() > MAX_SIGNATURE {
        return Err(SignatureError::Malformed);
    }
    Signature::decode(text).map_or(Err(SignatureError::Malformed), |_| Ok(()))
}

/// Where the signature of a module in a file is: beside it, with `.minisig` after the whole name.
pub fn signature_path(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".minisig");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use minisign::KeyPair;
    use proptest::prelude::*;

    fn sign(pair: &KeyPair, bytes: &[u8]) -> String {
        minisign::sign(Some(&pair.pk), &pair.sk, bytes, None, None)
            .unwrap()
            .into_string()
    }

    #[test]
    fn only_the_keys_signature_of_these_bytes_holds() {
        let pair = KeyPair::generate_unencrypted_keypair().unwrap();
        let other = KeyPair::generate_unencrypted_keypair().unwrap();
        let key = pair.pk.to_base64();
        let signature = sign(&pair, b"module");
        assert_eq!(verify(b"module", &signature, &key), Ok(()));
        assert_eq!(verify(b"modul3", &signature, &key), Err(SignatureError::Wrong));
        let forged = sign(&other, b"module");
        assert_eq!(verify(b"module", &forged, &key), Err(SignatureError::OtherKey));
        assert_eq!(verify(b"module", "signed", &key), Err(SignatureError::Malformed));
        let error = verify(b"module", &signature, "key").unwrap_err();
        assert_eq!(error, SignatureError::Key("key".to_owned()));
        assert!(error.to_string().contains("begins with RW"));
    }

    #[test]
    fn a_comment_that_was_changed_is_no_longer_signed() {
        let pair = KeyPair::generate_unencrypted_keypair().unwrap();
        let signature = sign(&pair, b"module").replace("trusted comment: ", "trusted comment: 1");
        let error = verify(b"module", &signature, &pair.pk.to_base64()).unwrap_err();
        assert_eq!(error, SignatureError::Wrong);
    }

    #[test]
    fn of_several_signatures_one_is_enough() {
        let (pair, other) = (
            KeyPair::generate_unencrypted_keypair().unwrap(),
            KeyPair::generate_unencrypted_keypair().unwrap(),
        );
        let key = pair.pk.to_base64();
        let (good, stale, foreign) = (
            sign(&pair, b"module"),
            sign(&pair, b"before"),
            sign(&other, b"module"),
        );
        assert_eq!(verify_any(b"module", &[], &key), Err(None));
        for both in [[&stale, &foreign], [&foreign, &stale]] {
            let both = both.map(Clone::clone);
            assert_eq!(
                verify_any(b"module", &both, &key),
                Err(Some(SignatureError::Wrong))
            );
        }
        assert_eq!(verify_any(b"module", &[foreign, stale, good], &key), Ok(()));
    }

    #[test]
    fn a_text_is_a_signature_or_isnt() {
        let pair = KeyPair::generate_unencrypted_keypair().unwrap();
        let signature = sign(&pair, b"module");
        assert_eq!(check_signature(&signature), Ok(()));
        for bad in ["", "signed", &signature[..60], &pair.pk.to_base64()] {
            assert_eq!(check_signature(bad), Err(SignatureError::Malformed), "{bad:?}");
        }
    }

    #[test]
    fn a_signature_stands_beside_its_file() {
        assert_eq!(
            signature_path(Path::new("/p/a.wasm")),
            Path::new("/p/a.wasm.minisig")
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,400}", key in "(RW)?[A-Za-z0-9+/=]{0,60}") {
            assert!(verify(b"module", &text, &key).is_err());
            assert!(check_signature(&text).is_err());
        }
    }
}
