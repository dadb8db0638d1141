//! What an identity is made of: one certificate with its key, and the roots.

use super::{Alpn, Facts, IdentityError};
use crate::authority::{write_files, write_identity};
use crate::bundle::{Bundle, MAX_ROOTS, encoded, fingerprint};
use crate::files::{JOINING_KEY, forget, open_to_others, recover};
use crate::request::NewKey;
use crate::spiffe::SpiffeId;
use crate::validity::{Validity, wall};
use crate::verify::{PeerError, peer_id};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// One generation of it, and the configurations made of it. A reload replaces it whole, so that no session of an old
/// generation is resumed under a new one.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) key: Arc<CertifiedKey>,
    pub(super) roots: Arc<RootCertStore>,
    pub(super) bundle: Bundle,
    pub(super) validity: Validity,
    /// The root that the certificate leads to.
    root: Option<String>,
    /// By protocols, and whether somebody without a certificate is let in.
    pub(super) servers: Mutex<HashMap<(Alpn, bool), Arc<ServerConfig>>>,
    pub(super) clients: Mutex<HashMap<(Alpn, SpiffeId), Arc<ClientConfig>>>,
}

/// What an agent gives.
#[derive(Debug)]
pub struct Given {
    /// The certificate and what is above it.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// The roots.
    pub bundle: Bundle,
}

impl Given {
    /// What an agent says: a chain and roots, each a number of certificates in DER one after the other, and a key in PKCS
    /// #8.
    ///
    /// # Errors
    ///
    /// If the certificates can't be read; `place` is named.
    pub fn parse(place: &Path, chain: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, IdentityError> {
        let unreadable = || IdentityError::Id {
            path: place.into(),
            source: PeerError::Unreadable,
        };
        let bundle = Bundle::new(one_by_one(roots).ok_or_else(unreadable)?);
        Ok(Self {
            chain: one_by_one(chain).ok_or_else(unreadable)?,
            key: PrivateKeyDer::Pkcs8(key.to_vec().into()),
            bundle: bundle.map_err(|source| IdentityError::Bundle {
                path: place.into(),
                source,
            })?,
        })
    }

    /// Writes it as `cert.pem`, `key.pem` (mode 0600) and `bundle.pem`, all or none, into a directory, which is made if need
    /// be. Blocks.
    ///
    /// # Errors
    ///
    /// If the key isn't in PKCS #8, or they can't be written.
    pub fn write(&self, dir: &Path) -> Result<(), IdentityError> {
        let PrivateKeyDer::Pkcs8(key) = &self.key else {
            let source = rustls::Error::General("the key is not in PKCS #8".to_owned());
            let dir = dir.into();
            return Err(IdentityError::Tls { dir, source });
        };
        let key = encoded("PRIVATE KEY", key.secret_pkcs8_der());
        write_files(dir, &key, &self.chain, &self.bundle).map_err(|source| IdentityError::Write {
            dir: dir.into(),
            source,
        })
    }
}

fn one_by_one(mut der: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let mut certs = Vec::new();
    while !der.is_empty() {
        let (rest, _) = x509_parser::parse_x509_certificate(der).ok()?;
        let (cert, _) = der.split_at_checked(der.len() - rest.len())?;
        certs.push(CertificateDer::from(cert.to_vec()));
        if certs.len() > MAX_ROOTS {
            return None;
        }
        der = rest;
    }
    Some(certs)
}

/// What a control plane answers to a request.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate and what is above it, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots.
    pub bundle: Bundle,
}

/// Certificates of a chain at most.
const MAX_CHAIN: usize = 8;

impl Issued {
    /// What came over the network, as DER.
    ///
    /// # Errors
    ///
    /// If the roots are none, or the chain is longer than any is.
    pub fn parse(chain: Vec<Vec<u8>>, roots: Vec<Vec<u8>>) -> Result<Self, IdentityError> {
        let bad = |text: &str| IdentityError::Issued(rustls::Error::General(text.to_owned()));
        if chain.is_empty() || chain.len() > MAX_CHAIN {
            return Err(bad(&format!(
                "a chain of {} certificates; want 1 to {MAX_CHAIN}",
                chain.len()
            )));
        }
        let bundle = Bundle::new(roots.into_iter().map(CertificateDer::from))
            .map_err(|error| bad(&format!("its trust bundle: {error}")))?;
        Ok(Self {
            chain: chain.into_iter().map(CertificateDer::from).collect(),
            bundle,
        })
    }

    /// Checks that it is what was asked for.
    pub(crate) fn check(&self, id: &SpiffeId, key: &NewKey) -> Result<(), rustls::Error> {
        let general = |text: String| rustls::Error::General(text);
        CertifiedKey::from_der(self.chain.clone(), key.der(), &aws_lc_rs::default_provider())?;
        let got = peer_id(&self.chain).map_err(|error| general(error.to_string()))?;
        if got != *id {
            return Err(general(format!("it is for {got}, not for {id}")));
        }
        self.bundle.verify(&self.chain, wall())
    }
}

/// Writes what was issued, all of it or nothing, once it has been checked. A key to join with that is still there has had its
/// use: it goes, at a renewal too, since what was to remove it may have been cut short.
pub(crate) fn install(dir: &Path, id: &SpiffeId, key: &NewKey, issued: &Issued) -> Result<(), IdentityError> {
    issued.check(id, key).map_err(IdentityError::Issued)?;
    write_identity(dir, key, &issued.chain, &issued.bundle).map_err(|source| IdentityError::Write {
        dir: dir.into(),
        source,
    })?;
    let joining = dir.join(JOINING_KEY);
    if let Err(error) = forget(&joining) {
        // What was issued is in place.
        tracing::warn!(path = %joining.display(), %error, "a key that has had its use can't be removed");
    }
    Ok(())
}

impl Material {
    pub(super) fn load(dir: &Path, provider: &CryptoProvider) -> Result<(SpiffeId, Self), IdentityError> {
        recover(dir).map_err(|source| IdentityError::Write {
            dir: dir.into(),
            source,
        })?;
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|source| IdentityError::Read { path, source })
        };
        let (cert_path, key_path, bundle_path) =
            (dir.join("cert.pem"), dir.join("key.pem"), dir.join("bundle.pem"));
        let [cert, key, bundle] = [read("cert.pem")?, read("key.pem")?, read("bundle.pem")?];
        match open_to_others(&key_path) {
            Ok(None) => {}
            Ok(Some(mode)) => return Err(IdentityError::Mode { path: key_path, mode }),
            Err(source) => {
                return Err(IdentityError::Read {
                    path: key_path,
                    source,
                });
            }
        }
        let parsed: Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(&cert).collect();
        let chain = parsed
            .and_then(|certs| match certs.len() {
                0 => Err(rustls::pki_types::pem::Error::NoItemsFound),
                _ => Ok(certs),
            })
            .map_err(|source| IdentityError::Pem {
                path: cert_path.clone(),
                want: "PEM certificates",
                source,
            })?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|source| IdentityError::Pem {
            path: key_path,
            want: "a PEM private key",
            source,
        })?;
        let bundle = Bundle::from_pem(&bundle).map_err(|source| IdentityError::Bundle {
            path: bundle_path,
            source,
        })?;
        Self::of(dir, &cert_path, Given { chain, key, bundle }, provider)
    }

    pub(super) fn given(
        place: &Path,
        given: Given,
        provider: &CryptoProvider,
    ) -> Result<(SpiffeId, Self), IdentityError> {
        Self::of(place, place, given, provider)
    }

    fn of(
        place: &Path,
        cert_path: &Path,
        given: Given,
        provider: &CryptoProvider,
    ) -> Result<(SpiffeId, Self), IdentityError> {
        let Given { chain, key, bundle } = given;
        let no_id = |source| IdentityError::Id {
            path: cert_path.into(),
            source,
        };
        let id = peer_id(&chain).map_err(no_id)?;
        let tls = |source| IdentityError::Tls {
            dir: place.into(),
            source,
        };
        let roots = bundle.store().map_err(tls)?;
        let validity = chain
            .first()
            .and_then(Validity::read)
            .ok_or_else(|| no_id(PeerError::Unreadable))?;
        let root = bundle.root_of(&chain).map(|root| root.fingerprint.clone());
        let key = CertifiedKey::from_der(chain, key, provider).map_err(tls)?;
        let material = Self {
            key: Arc::new(key),
            roots: Arc::new(roots),
            bundle,
            validity,
            root,
            servers: Mutex::default(),
            clients: Mutex::default(),
        };
        Ok((id, material))
    }

    /// Whether it is the same certificate and the same roots.
    pub(super) fn same_as(&self, other: &Self) -> bool {
        self.key.cert == other.key.cert && self.bundle == other.bundle
    }

    pub(super) fn facts(&self) -> Facts {
        Facts {
            validity: self.validity,
            certificate: self
                .key
                .cert
                .first()
                .map(|cert| fingerprint(cert))
                .unwrap_or_default(),
            bundle: self.bundle.hash().to_owned(),
            root: self.root.clone(),
            revoked: None,
        }
    }
}
