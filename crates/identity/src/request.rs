//! Asking for a certificate: the key pair that never leaves the node, and the request that goes.

use crate::bundle::fingerprint;
use crate::spiffe::SpiffeId;
use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SubjectPublicKeyInfo,
};
use rustls::pki_types::PrivateKeyDer;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256};
use x509_parser::prelude::FromDer;

/// Largest request that is looked at, in bytes. Ours have about 300.
pub const MAX_REQUEST: usize = 4 << 10;

/// A new key pair, and a request for a certificate of it (PKCS #10).
pub struct NewKey {
    pair: KeyPair,
    request: Vec<u8>,
}

impl NewKey {
    /// Makes a key pair, and a request in the name of `id`.
    ///
    /// # Errors
    ///
    /// If the system has no randomness.
    pub fn generate(id: &SpiffeId) -> Result<Self, rcgen::Error> {
        Self::of(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?, id)
    }

    /// A key pair that was kept, and a request in the name of `id`.
    pub(crate) fn from_pem(pem: &str, id: &SpiffeId) -> Result<Self, rcgen::Error> {
        Self::of(KeyPair::from_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256)?, id)
    }

    fn of(pair: KeyPair, id: &SpiffeId) -> Result<Self, rcgen::Error> {
        let mut params = CertificateParams::default();
        // Who it is stands in the SPIFFE id alone.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        let request = params.serialize_request(&pair)?.der().to_vec();
        Ok(Self { pair, request })
    }

    /// The request, as DER.
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    pub(crate) fn pem(&self) -> String {
        self.pair.serialize_pem()
    }

    pub(crate) fn der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.pair.serialize_der().into())
    }
}

impl std::fmt::Debug for NewKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewKey").finish_non_exhaustive()
    }
}

/// Why a request is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BadRequest {
    /// It is too long.
    #[error("the request has {0} bytes; want at most {MAX_REQUEST}")]
    TooLong(usize),
    /// It is not one.
    #[error("the request is not a PKCS #10 request in DER")]
    Unreadable,
    /// Its key is of another kind.
    #[error("the request's key is not an ECDSA key on P-256, signing with SHA-256; want one")]
    Key,
    /// It isn't signed with the key that it names.
    #[error("the request is not signed with its own key")]
    Signature,
    /// It names something else.
    #[error("the request names {got}; want the URI {want} alone")]
    Names {
        /// What it names.
        got: String,
        /// What it should name.
        want: SpiffeId,
    },
}

/// A request that was checked: the key that is to be certified. Nothing else is taken from it.
#[derive(Clone, Debug)]
pub struct CheckedRequest {
    pub(crate) key: SubjectPublicKeyInfo,
}

impl CheckedRequest {
    /// Checks a request for a certificate of `want`: a P-256 key, signed with it, and this one name. What else it asks for is
    /// not looked at, and never in a certificate.
    ///
    /// # Errors
    ///
    /// [`BadRequest`] says what is wrong.
    pub fn parse(der: &[u8], want: &SpiffeId) -> Result<Self, BadRequest> {
        if der.len() > MAX_REQUEST {
            return Err(BadRequest::TooLong(der.len()));
        }
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(|_| BadRequest::Unreadable)?;
        if !rest.is_empty() {
            return Err(BadRequest::Unreadable);
        }
        let key = &request.certification_request_info.subject_pki;
        let curve = key.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
        if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY
            || curve != Some(OID_EC_P256)
            || request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256
        {
            return Err(BadRequest::Key);
        }
        request.verify_signature().map_err(|_| BadRequest::Signature)?;
        let names: Vec<&GeneralName<'_>> = request
            .requested_extensions()
            .into_iter()
            .flatten()
            .filter_map(|extension| {
                if let ParsedExtension::SubjectAlternativeName(names) = extension {
                    Some(&names.general_names)
                } else {
                    None
                }
            })
            .flatten()
            .collect();
        if !matches!(names.as_slice(), [GeneralName::URI(uri)] if *uri == want.as_str()) {
            return Err(BadRequest::Names {
                got: shown(&names),
                want: want.clone(),
            });
        }
        let key = SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| BadRequest::Key)?;
        Ok(Self { key })
    }

    /// SHA-256 of the public key, in hexadecimal digits: by it the holder of a key is known again.
    pub fn fingerprint(&self) -> String {
        fingerprint(self.key.der_bytes())
    }
}

/// Names that a message has room for.
const SHOWN: usize = 4;
/// Characters of each.
const SHOWN_CHARS: usize = 100;

fn shown(names: &[&GeneralName<'_>]) -> String {
    if names.is_empty() {
        return "nobody".to_owned();
    }
    let each = names.iter().take(SHOWN).map(|name| {
        let text = name.to_string();
        text.chars()
            .take(SHOWN_CHARS)
            .flat_map(char::escape_debug)
            .collect::<String>()
    });
    let mut text = each.collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(", …");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, PublicKeyData};

    fn id(name: &str) -> SpiffeId {
        SpiffeId::proxy("td", "a", name).unwrap()
    }

    fn made(
        algorithm: &'static rcgen::SignatureAlgorithm,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id("a1").as_str().try_into().unwrap())];
        change(&mut params);
        let pair = KeyPair::generate_for(algorithm).unwrap();
        params.serialize_request(&pair).unwrap().der().to_vec()
    }

    #[test]
    fn our_own_requests_pass_for_their_name_and_no_other() {
        let key = NewKey::generate(&id("a1")).unwrap();
        assert!(CheckedRequest::parse(key.request(), &id("a1")).is_ok());
        let error = CheckedRequest::parse(key.request(), &id("a2"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("zone/a/proxy/a1")
                && error.contains("want the URI spiffe://td/zone/a/proxy/a2 alone"),
            "{error}"
        );
    }

    #[test]
    fn bad_requests_are_refused_by_name() {
        let want = id("a1");
        let refused = |der: &[u8]| CheckedRequest::parse(der, &want).unwrap_err();
        assert_eq!(
            refused(&made(&rcgen::PKCS_ECDSA_P384_SHA384, |_| {})),
            BadRequest::Key
        );
        assert_eq!(refused(&made(&rcgen::PKCS_ED25519, |_| {})), BadRequest::Key);
        assert_eq!(refused(b""), BadRequest::Unreadable);
        assert_eq!(
            refused(&vec![0x30; MAX_REQUEST + 1]),
            BadRequest::TooLong(MAX_REQUEST + 1)
        );
        let no_name = made(&PKCS_ECDSA_P256_SHA256, |p| p.subject_alt_names.clear());
        assert!(refused(&no_name).to_string().contains("names nobody"));
        for more in [
            SanType::URI(id("a2").as_str().try_into().unwrap()),
            SanType::URI(want.as_str().try_into().unwrap()),
            SanType::DnsName("a.example".try_into().unwrap()),
        ] {
            let two = made(&PKCS_ECDSA_P256_SHA256, |p| p.subject_alt_names.push(more));
            assert!(matches!(refused(&two), BadRequest::Names { .. }));
        }
        let mut forged = NewKey::generate(&want).unwrap().request().to_vec();
        *forged.last_mut().unwrap() ^= 1;
        assert_eq!(refused(&forged), BadRequest::Signature);
        let mut longer = NewKey::generate(&want).unwrap().request().to_vec();
        longer.push(0);
        assert_eq!(refused(&longer), BadRequest::Unreadable);
    }

    #[test]
    fn what_else_is_asked_for_does_no_harm() {
        let greedy = made(&PKCS_ECDSA_P256_SHA256, |p| {
            p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            p.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
        });
        assert!(CheckedRequest::parse(&greedy, &id("a1")).is_ok());
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(CheckedRequest::parse(&bytes, &id("a1")).is_err());
        }

        /// What is signed can't be changed. The frame round it can, in tags that the reader doesn't look at; of that nothing is
        /// taken.
        #[test]
        fn a_changed_byte_makes_a_request_bad_or_changes_nothing(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let key = NewKey::generate(&id("a1")).unwrap();
            let mut request = key.request().to_vec();
            let at = at.index(request.len());
            request[at] ^= flip;
            if let Ok(checked) = CheckedRequest::parse(&request, &id("a1")) {
                prop_assert_eq!(checked.key.der_bytes(), key.pair.der_bytes(), "{}", at);
            }
        }
    }
}
