//! A certificate authority in a directory, for meshes that have no other.

use crate::files::write;
use crate::spiffe::{InvalidSpiffeId, SpiffeId};
use crate::verify::{PeerError, peer_id};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Why the authority can't do as asked.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file can't be read or written.
    #[error("can't {act} {path}")]
    File {
        /// "read" or "write".
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// There is an authority here already.
    #[error("{path} exists: there is an authority here already")]
    Exists {
        /// Its certificate.
        path: PathBuf,
    },
    /// A certificate can't be made.
    #[error("can't make a certificate")]
    Make(#[from] rcgen::Error),
    /// The authority's own certificate can't be used.
    #[error("{path} is not the certificate of an authority of ours")]
    Unreadable {
        /// The file.
        path: PathBuf,
    },
    /// Its certificate doesn't name a trust domain.
    #[error("the authority's certificate does not name its trust domain")]
    Domain(#[from] PeerError),
    /// The name is not one.
    #[error(transparent)]
    Id(#[from] InvalidSpiffeId),
    /// An id of somebody else's.
    #[error("{id} is not of this authority's trust domain {domain:?}")]
    Foreign {
        /// The id.
        id: SpiffeId,
        /// The authority's trust domain.
        domain: String,
    },
}

/// An authority and its key.
#[derive(Debug)]
pub struct Authority {
    domain: String,
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// How long a new authority lasts.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far back validity begins, for clocks that differ.
const BACKDATE: Duration = Duration::from_secs(60);

impl Authority {
    /// Makes an authority for a trust domain: `ca.pem` and `ca-key.pem` (mode 0600) in `dir`, which is made
    /// if need be.
    ///
    /// # Errors
    ///
    /// If there is one already, or the files can't be written.
    pub fn create(dir: &Path, domain: &str) -> Result<Self, AuthorityError> {
        let root = SpiffeId::parse(&format!("spiffe://{domain}"))?;
        let (ca, key) = paths(dir);
        if ca.exists() {
            return Err(AuthorityError::Exists { path: ca });
        }
        let act = "write";
        std::fs::create_dir_all(dir).map_err(|source| AuthorityError::File {
            act,
            path: dir.into(),
            source,
        })?;
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let params = ca_params(&root)?;
        let ca_pem = params.self_signed(&pair)?.pem();
        write(&key, pair.serialize_pem().as_bytes(), 0o600).map_err(|source| AuthorityError::File {
            act,
            path: key,
            source,
        })?;
        write(&ca, ca_pem.as_bytes(), 0o644).map_err(|source| AuthorityError::File {
            act,
            path: ca,
            source,
        })?;
        Ok(Self {
            domain: domain.to_owned(),
            ca_pem,
            issuer: Issuer::new(params, pair),
        })
    }

    /// Opens the authority in a directory.
    ///
    /// # Errors
    ///
    /// If there is none, or it can't be used.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        let (ca, key) = paths(dir);
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|source| AuthorityError::File {
                act: "read",
                path: path.clone(),
                source,
            })
        };
        let ca_pem = read(&ca)?;
        let pair = KeyPair::from_pem(&read(&key)?)?;
        let der = CertificateDer::from_pem_slice(ca_pem.as_bytes())
            .map_err(|_| AuthorityError::Unreadable { path: ca })?;
        let root = peer_id(&[der])?;
        // What an issuer contributes (its name and key) is made again from the same parts.
        let issuer = Issuer::new(ca_params(&root)?, pair);
        Ok(Self {
            domain: root.trust_domain().to_owned(),
            ca_pem,
            issuer,
        })
    }

    /// The trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Issues a certificate for `id` that lasts for `life`, and writes `cert.pem`, `key.pem` (mode 0600) and
    /// `bundle.pem` to `out`, which is made if need be.
    ///
    /// # Errors
    ///
    /// If the id is of another trust domain, or the files can't be written.
    pub fn issue(&self, id: &SpiffeId, life: Duration, out: &Path) -> Result<(), AuthorityError> {
        if id.trust_domain() != self.domain {
            return Err(AuthorityError::Foreign {
                id: id.clone(),
                domain: self.domain.clone(),
            });
        }
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "leeward");
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        validity(&mut params, life);
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let cert = params.signed_by(&pair, &self.issuer)?;
        let act = "write";
        std::fs::create_dir_all(out).map_err(|source| AuthorityError::File {
            act,
            path: out.into(),
            source,
        })?;
        let files = [
            ("bundle.pem", self.ca_pem.clone(), 0o644),
            ("key.pem", pair.serialize_pem(), 0o600),
            ("cert.pem", cert.pem(), 0o644),
        ];
        for (name, text, mode) in files {
            let path = out.join(name);
            write(&path, text.as_bytes(), mode).map_err(|source| AuthorityError::File {
                act,
                path,
                source,
            })?;
        }
        Ok(())
    }
}

fn paths(dir: &Path) -> (PathBuf, PathBuf) {
    (dir.join("ca.pem"), dir.join("ca-key.pem"))
}

fn ca_params(root: &SpiffeId) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Leeward CA {}", root.trust_domain()));
    params.subject_alt_names = vec![SanType::URI(root.as_str().try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, CA_LIFE);
    Ok(params)
}

fn validity(params: &mut CertificateParams, life: Duration) {
    #[expect(clippy::disallowed_methods, reason = "certificates live by the wall clock")]
    let now = SystemTime::now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + life).into();
}
