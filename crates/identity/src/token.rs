//! What a node that has no certificate yet brings along: a secret that is good once, and the hash of a root by which it
//! knows the control plane.

use crate::authority::random_hex;
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

/// A join token: `leeward-join-v1:DOMAIN:SECRET:ROOT`. It is shown where it is made and nowhere else: its `Debug` has no
/// secret.
#[derive(Clone, Eq, PartialEq)]
pub struct JoinToken {
    /// The trust domain.
    domain: String,
    /// 64 hexadecimal digits.
    secret: String,
    /// The fingerprint of a root that the control plane's certificate leads to.
    root: String,
}

/// Why a text is no token.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "this is not a join token: want leeward-join-v1:DOMAIN:SECRET:ROOT, as `leeward token create` prints it"
)]
pub struct InvalidToken;

const SCHEME: &str = "leeward-join-v1";
/// Bytes of a secret.
const SECRET: usize = 32;
/// Digits of a secret, and of a fingerprint.
const DIGITS: usize = 64;

impl JoinToken {
    /// Makes a token for a trust domain whose control plane has a certificate that leads to `root`, a fingerprint.
    ///
    /// # Errors
    ///
    /// If the system has no randomness.
    pub fn generate(domain: &str, root: &str) -> Result<Self, rcgen::Error> {
        Ok(Self {
            domain: domain.to_owned(),
            secret: random_hex::<SECRET>()?,
            root: root.to_owned(),
        })
    }

    /// The trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The secret.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The fingerprint of the root by which the control plane is known.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// What is kept of a secret: enough to know it again, too little to use it. It has 256 random bits, so that a plain hash
    /// can't be turned round.
    pub fn hash(secret: &str) -> [u8; 32] {
        Sha256::digest(secret.as_bytes()).into()
    }

    /// The whole token.
    pub fn reveal(&self) -> String {
        format!("{SCHEME}:{}:{}:{}", self.domain, self.secret, self.root)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("domain", &self.domain)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let parts: Vec<&str> = text.trim().split(':').collect();
        let [SCHEME, domain, secret, root] = parts.as_slice() else {
            return Err(InvalidToken);
        };
        let digits =
            |text: &str| text.len() == DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let is_domain = crate::SpiffeId::control(domain).is_ok_and(|id| id.trust_domain() == *domain);
        if !is_domain || !digits(secret) || !digits(root) {
            return Err(InvalidToken);
        }
        Ok(Self {
            domain: (*domain).to_owned(),
            secret: (*secret).to_owned(),
            root: (*root).to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_token_is_read_as_it_was_made_and_keeps_its_secret() {
        let token = JoinToken::generate("mesh.example", &"ab".repeat(32)).unwrap();
        assert_eq!(token.reveal().parse(), Ok(token.clone()));
        assert_eq!(format!("{}\n", token.reveal()).parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains(token.secret()));
        let other = JoinToken::generate("mesh.example", &"ab".repeat(32)).unwrap();
        assert_ne!(token.secret(), other.secret());
        assert_ne!(JoinToken::hash(token.secret()), JoinToken::hash(other.secret()));
    }

    proptest! {
        #[test]
        fn whatever_is_cut_off_or_changed_is_no_token(at in any::<prop::sample::Index>()) {
            let whole = JoinToken::generate("mesh.example", &"ab".repeat(32)).unwrap().reveal();
            let at = at.index(whole.len());
            prop_assert_eq!(whole[..at].parse::<JoinToken>(), Err(InvalidToken));
            let mut bytes = whole.into_bytes();
            bytes[at] = b'/';
            prop_assert_eq!(String::from_utf8(bytes).unwrap().parse::<JoinToken>(), Err(InvalidToken));
        }

        #[test]
        fn nothing_makes_it_panic(text in ".*") {
            prop_assert_eq!(text.parse::<JoinToken>(), Err(InvalidToken));
        }
    }
}
