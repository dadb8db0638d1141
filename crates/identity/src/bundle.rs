//! The roots that a trust domain's certificates are checked against.

use crate::validity::Validity;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, crypto};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::sync::Arc;
use std::time::SystemTime;

/// Roots that a bundle may have. During a rotation there are two.
pub const MAX_ROOTS: usize = 64;

/// The roots of a trust domain. Their order doesn't matter; the same roots have the same hash everywhere.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bundle {
    /// Sorted by fingerprint, none twice.
    roots: Vec<Root>,
    hash: String,
}

/// One root.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Root {
    /// The certificate.
    pub cert: CertificateDer<'static>,
    /// SHA-256 of it, in hexadecimal digits.
    pub fingerprint: String,
    /// From when to when it is good.
    pub validity: Validity,
}

/// Why roots make no bundle.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BundleError {
    /// There are none.
    #[error("there is no certificate in it; want at least one root")]
    Empty,
    /// There are too many.
    #[error("there are {0} roots in it; want at most {MAX_ROOTS}")]
    TooMany(usize),
    /// One can't be read.
    #[error("certificate {0} of it can't be read")]
    Unreadable(usize),
}

impl Bundle {
    /// A bundle of these roots.
    ///
    /// # Errors
    ///
    /// If there are none or too many, or one is no certificate.
    pub fn new(certs: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, BundleError> {
        let mut roots = Vec::new();
        for (i, cert) in certs.into_iter().enumerate() {
            let validity = Validity::read(&cert).ok_or(BundleError::Unreadable(i + 1))?;
            let fingerprint = fingerprint(&cert);
            roots.push(Root {
                cert,
                fingerprint,
                validity,
            });
        }
        roots.sort_by(|a, b| a.fingerprint.cmp(&b.fingerprint));
        roots.dedup_by(|a, b| a.fingerprint == b.fingerprint);
        match roots.len() {
            0 => return Err(BundleError::Empty),
            n if n > MAX_ROOTS => return Err(BundleError::TooMany(n)),
            _ => {}
        }
        let mut digest = Sha256::new();
        for root in &roots {
            digest.update(root.fingerprint.as_bytes());
        }
        let hash = hex(&digest.finalize());
        Ok(Self { roots, hash })
    }

    /// The roots in a PEM text.
    ///
    /// # Errors
    ///
    /// What [`Self::new`] says; what is in the text and no certificate counts as one that can't be read.
    pub fn from_pem(text: &[u8]) -> Result<Self, BundleError> {
        let mut certs = Vec::new();
        for (i, cert) in CertificateDer::pem_slice_iter(text).enumerate() {
            certs.push(cert.map_err(|_| BundleError::Unreadable(i + 1))?);
        }
        Self::new(certs)
    }

    /// The roots as PEM.
    pub fn to_pem(&self) -> String {
        self.roots.iter().map(|root| pem(&root.cert)).collect()
    }

    /// The roots.
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// What distinguishes these roots from others, in hexadecimal digits.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Whether a root is among them.
    pub fn has(&self, fingerprint: &str) -> bool {
        self.roots.iter().any(|root| root.fingerprint == fingerprint)
    }

    /// These roots and others.
    ///
    /// # Errors
    ///
    /// If there are too many then.
    pub fn with(&self, others: &Self) -> Result<Self, BundleError> {
        let all = self.roots.iter().chain(&others.roots);
        Self::new(all.map(|root| root.cert.clone()))
    }

    /// These roots but those that `keep` refuses.
    ///
    /// # Errors
    ///
    /// If none is left.
    pub fn filtered(&self, keep: impl Fn(&Root) -> bool) -> Result<Self, BundleError> {
        let kept = self.roots.iter().filter(|root| keep(root));
        Self::new(kept.map(|root| root.cert.clone()))
    }

    /// The root that a chain ends at: the one whose key signed the chain's last certificate.
    pub fn root_of(&self, chain: &[CertificateDer<'_>]) -> Option<&Root> {
        let (_, last) = x509_parser::parse_x509_certificate(chain.last()?).ok()?;
        self.roots.iter().find(|root| {
            x509_parser::parse_x509_certificate(&root.cert).is_ok_and(|(_, parsed)| {
                parsed.subject() == last.issuer() && last.verify_signature(Some(parsed.public_key())).is_ok()
            })
        })
    }

    /// Checks that a chain is good at a time, for both sides of a connection.
    ///
    /// # Errors
    ///
    /// What the TLS library says.
    pub fn verify(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<(), rustls::Error> {
        let refused = |text: &str| rustls::Error::General(text.to_owned());
        let (leaf, above) = chain
            .split_first()
            .ok_or_else(|| refused("there is no certificate"))?;
        let provider: Arc<CryptoProvider> = Arc::new(crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.store()?), provider)
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        verifier.verify_client_cert(leaf, above, UnixTime::since_unix_epoch(since))?;
        Ok(())
    }

    /// The roots as the TLS library wants them.
    pub(crate) fn store(&self) -> Result<RootCertStore, rustls::Error> {
        let mut store = RootCertStore::empty();
        for root in &self.roots {
            store.add(root.cert.clone())?;
        }
        Ok(store)
    }
}

/// SHA-256 of a certificate, in hexadecimal digits.
pub fn fingerprint(cert: &[u8]) -> String {
    hex(&Sha256::digest(cert))
}

/// Hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // A String takes whatever is written to it.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// A certificate as PEM.
pub(crate) fn pem(cert: &[u8]) -> String {
    encoded("CERTIFICATE", cert)
}

/// What a label says, as PEM.
pub(crate) fn encoded(label: &str, der: &[u8]) -> String {
    let unix = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), unix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::scratch::Scratch;

    #[test]
    fn the_same_roots_have_the_same_hash_in_any_order() {
        let scratch = Scratch::new();
        let roots: Vec<Bundle> = ["one", "two"]
            .iter()
            .map(|name| {
                Authority::create(&scratch.dir(name), "td")
                    .unwrap()
                    .roots()
                    .clone()
            })
            .collect();
        let both = roots[0].with(&roots[1]).unwrap();
        assert_eq!(both, roots[1].with(&roots[0]).unwrap());
        assert_eq!(both.with(&roots[0]).unwrap().hash(), both.hash());
        assert_ne!(both.hash(), roots[0].hash());
        assert_eq!(Bundle::from_pem(both.to_pem().as_bytes()).unwrap(), both);
        let first = roots[0].roots()[0].fingerprint.clone();
        assert_eq!(both.filtered(|root| root.fingerprint == first).unwrap(), roots[0]);
        assert_eq!(both.filtered(|_| false), Err(BundleError::Empty));
        assert_eq!(Bundle::from_pem(b""), Err(BundleError::Empty));
        let bad = pem(b"no certificate");
        assert_eq!(Bundle::from_pem(bad.as_bytes()), Err(BundleError::Unreadable(1)));
    }
}
