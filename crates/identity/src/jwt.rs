//! Tokens: JSON Web Tokens (RFC 7519) with signatures by public keys (RFC 7515, RFC 7517, RFC 8725).
//!
//! RS256, ES256 and EdDSA with Ed25519. Which of them counts is the key's to say and not the token's: what a token says
//! must be the same. Time is an argument.

use aws_lc_rs::digest;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

/// The longest token, in bytes.
const MAX_TOKEN: usize = 16 << 10;
/// How far clocks may be apart, in seconds.
const LEEWAY: u64 = 60;
/// The largest set of keys, in bytes.
pub const MAX_JWKS: usize = 64 << 10;
/// Keys of a set.
const MAX_KEYS: usize = 64;

/// The public keys of an issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    id: Option<Box<str>>,
    material: Material,
}

#[derive(Debug)]
enum Material {
    Rsa { modulus: Vec<u8>, exponent: Vec<u8> },
    P256 { point: Vec<u8> },
    Ed25519 { point: Vec<u8> },
}

/// Why a text is no set of keys.
#[derive(Debug, thiserror::Error)]
pub enum InvalidKeySet {
    /// It is longer than [`MAX_JWKS`].
    #[error("it has more than {MAX_JWKS} bytes")]
    TooLong,
    /// It is no JSON.
    #[error("it is not JSON")]
    Json(#[source] serde_json::Error),
    /// It has no list of keys, or one that is too long.
    #[error("it has no list of at most {MAX_KEYS} keys")]
    NoKeys,
    /// It has none that can be used.
    #[error("it has no key for RS256, ES256 or EdDSA")]
    NoneUsable,
}

/// What a token must say.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Who has issued it.
    pub issuer: &'a str,
    /// Whom it may be for.
    pub audiences: &'a [Box<str>],
}

/// A token that is valid.
#[derive(Debug)]
pub struct Valid {
    /// What it says.
    pub claims: Map<String, Value>,
    /// Until when, in seconds since 1970, the leeway counted in.
    pub until: u64,
}

/// Why a token isn't valid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rejected {
    /// It is none.
    Malformed,
    /// It is too long.
    TooLong,
    /// It says an algorithm that is not taken, such as none, or one by a shared secret.
    Algorithm,
    /// Another issuer's.
    Issuer,
    /// Its key isn't in the set.
    UnknownKey,
    /// Not signed by its key.
    Signature,
    /// No longer valid, or without an end.
    Expired,
    /// Not valid yet.
    NotYetValid,
    /// For somebody else.
    Audience,
}

impl Rejected {
    /// The word used in traces and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TooLong => "too_long",
            Self::Algorithm => "algorithm",
            Self::Issuer => "issuer",
            Self::UnknownKey => "unknown_key",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Audience => "audience",
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Algorithm {
    Rs256,
    Es256,
    EdDsa,
}

impl KeySet {
    /// Reads a JWK set. Keys of kinds that aren't taken, for encryption, or too weak are left out.
    ///
    /// # Errors
    ///
    /// [`InvalidKeySet`], also if no key is left.
    pub fn parse(text: &[u8]) -> Result<Self, InvalidKeySet> {
        if text.len() > MAX_JWKS {
            return Err(InvalidKeySet::TooLong);
        }
        let set: Value = serde_json::from_slice(text).map_err(InvalidKeySet::Json)?;
        let keys = set
            .get("keys")
            .and_then(Value::as_array)
            .filter(|keys| keys.len() <= MAX_KEYS)
            .ok_or(InvalidKeySet::NoKeys)?;
        let keys: Vec<Key> = keys.iter().filter_map(Key::read).collect();
        if keys.is_empty() {
            return Err(InvalidKeySet::NoneUsable);
        }
        Ok(Self { keys })
    }
}

impl Key {
    fn read(wire: &Value) -> Option<Self> {
        let text = |field| wire.get(field).and_then(Value::as_str);
        let bytes = |field| text(field).and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
        if text("use").is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        let material = match (text("kty")?, text("crv")) {
            ("RSA", _) => Material::Rsa {
                modulus: unpadded(bytes("n")?),
                exponent: unpadded(bytes("e")?),
            },
            ("EC", Some("P-256")) => {
                let (x, y) = (bytes("x")?, bytes("y")?);
                if x.len() != 32 || y.len() != 32 {
                    return None;
                }
                // Uncompressed (SEC 1 §2.3.3).
                Material::P256 {
                    point: [&[4][..], &x, &y].concat(),
                }
            }
            ("OKP", Some("Ed25519")) => Material::Ed25519 {
                point: bytes("x").filter(|point| point.len() == 32)?,
            },
            _ => return None,
        };
        let key = Self {
            id: text("kid").map(Box::from),
            material,
        };
        let weak =
            matches!(&key.material, Material::Rsa { modulus, .. } if !(256..=1024).contains(&modulus.len()));
        let other = text("alg").is_some_and(|alg| Algorithm::named(alg) != Some(key.algorithm()));
        (!weak && !other).then_some(key)
    }

    const fn algorithm(&self) -> Algorithm {
        match self.material {
            Material::Rsa { .. } => Algorithm::Rs256,
            Material::P256 { .. } => Algorithm::Es256,
            Material::Ed25519 { .. } => Algorithm::EdDsa,
        }
    }

    fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let checked = match &self.material {
            Material::Rsa { modulus, exponent } => RsaPublicKeyComponents {
                n: modulus,
                e: exponent,
            }
            .verify(&RSA_PKCS1_2048_8192_SHA256, message, signature),
            Material::P256 { point } => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            Material::Ed25519 { point } => UnparsedPublicKey::new(&ED25519, point).verify(message, signature),
        };
        checked.is_ok()
    }
}

/// A number without zeros before it, as some write them.
fn unpadded(bytes: Vec<u8>) -> Vec<u8> {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    bytes.get(zeros..).map(<[u8]>::to_vec).unwrap_or_default()
}

impl Algorithm {
    fn named(name: &str) -> Option<Self> {
        match name {
            "RS256" => Some(Self::Rs256),
            "ES256" => Some(Self::Es256),
            "EdDSA" => Some(Self::EdDsa),
            _ => None,
        }
    }
}

/// A token's parts, none of which is to be believed yet.
struct Parts<'a> {
    header: Map<String, Value>,
    claims: Map<String, Value>,
    message: &'a str,
    signature: Vec<u8>,
}

impl<'a> Parts<'a> {
    fn of(token: &'a str) -> Result<Self, Rejected> {
        if token.len() > MAX_TOKEN {
            return Err(Rejected::TooLong);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(Rejected::Malformed)?;
        let (header, claims) = message.split_once('.').ok_or(Rejected::Malformed)?;
        let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| Rejected::Malformed);
        let object = |text: &str| match serde_json::from_slice(&bytes(text)?) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) | Err(_) => Err(Rejected::Malformed),
        };
        Ok(Self {
            header: object(header)?,
            claims: object(claims)?,
            message,
            signature: bytes(signature)?,
        })
    }
}

/// Checks a token. `now` is in seconds since 1970.
///
/// # Errors
///
/// Why it isn't valid. [`Rejected::UnknownKey`] says that everything else is unknown still: another set of keys may have
/// the one that it names.
pub fn verify(token: &str, keys: &KeySet, wanted: &Wanted<'_>, now: u64) -> Result<Valid, Rejected> {
    let parts = Parts::of(token)?;
    let text = |of: &'_ Map<String, Value>, field| of.get(field).and_then(Value::as_str).map(str::to_owned);
    let algorithm = text(&parts.header, "alg")
        .and_then(|name| Algorithm::named(&name))
        .ok_or(Rejected::Algorithm)?;
    // What it says must be understood (RFC 7515 §4.1.11) we don't understand.
    if parts.header.contains_key("crit") {
        return Err(Rejected::Malformed);
    }
    // Before keys are looked for: another issuer's are not among these, however often they are asked for.
    if text(&parts.claims, "iss").as_deref() != Some(wanted.issuer) {
        return Err(Rejected::Issuer);
    }
    let id = text(&parts.header, "kid");
    let named = |key: &&Key| id.is_none() || key.id.as_deref() == id.as_deref();
    let mut candidates = keys.keys.iter().filter(named).peekable();
    if candidates.peek().is_none() {
        return Err(Rejected::UnknownKey);
    }
    let message = parts.message.as_bytes();
    if !candidates.any(|key| key.algorithm() == algorithm && key.has_signed(message, &parts.signature)) {
        return Err(Rejected::Signature);
    }
    let until = until(&parts.claims, now)?;
    let is_for = |audience: &Value| {
        audience
            .as_str()
            .is_some_and(|a| wanted.audiences.iter().any(|w| **w == *a))
    };
    let audience = match parts.claims.get("aud") {
        Some(Value::Array(audiences)) => audiences.iter().any(is_for),
        Some(audience) => is_for(audience),
        None => false,
    };
    if !audience {
        return Err(Rejected::Audience);
    }
    Ok(Valid {
        claims: parts.claims,
        until,
    })
}

/// When it ends. What isn't a time ends it at once.
fn until(claims: &Map<String, Value>, now: u64) -> Result<u64, Rejected> {
    // NumericDate may have a fraction (RFC 7519 §2), which doesn't matter beside the leeway.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a conversion of floats saturates, and times before 1970 are long past"
    )]
    let time = |value: &Value| value.as_u64().or_else(|| value.as_f64().map(|time| time as u64));
    let until = claims
        .get("exp")
        .and_then(time)
        .ok_or(Rejected::Expired)?
        .saturating_add(LEEWAY);
    if now >= until {
        return Err(Rejected::Expired);
    }
    match claims.get("nbf").map(time) {
        Some(Some(from)) if from > now.saturating_add(LEEWAY) => Err(Rejected::NotYetValid),
        Some(None) => Err(Rejected::Malformed),
        Some(Some(_)) | None => Ok(until),
    }
}

/// What stands for a token where it isn't to be kept itself.
pub fn fingerprint(token: &str) -> [u8; 32] {
    let mut out = [0; 32];
    let digest = digest::digest(&digest::SHA256, token.as_bytes());
    for (to, from) in out.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    out
}
