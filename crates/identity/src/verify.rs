//! Checking a peer: chain, time and usage by webpki; the name by SPIFFE id (X509-SVID standard, §5).

use crate::bundle::{Bundle, fingerprint};
use crate::proven::{Chain, Proven};
use crate::revoked::Revocations;
use crate::spiffe::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

/// Why a peer's certificate doesn't say who it is.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PeerError {
    /// There is no certificate.
    #[error("the peer showed no certificate")]
    None,
    /// It can't be read.
    #[error("the peer's certificate can't be read")]
    Unreadable,
    /// It doesn't have exactly one URI name.
    #[error("the peer's certificate has {0} URI names, want exactly one SPIFFE id")]
    Names(usize),
    /// Its key is for something else.
    #[error(
        "the key usage of the peer's certificate is not that of an X509-SVID: want digitalSignature, and neither keyCertSign nor cRLSign"
    )]
    Usage,
    /// The URI name is not a SPIFFE id.
    #[error(transparent)]
    Id(#[from] crate::spiffe::InvalidSpiffeId),
    /// It belongs to another trust domain.
    #[error("{got} is not of the trust domain {want:?}")]
    Domain {
        /// The peer's id.
        got: SpiffeId,
        /// This side's trust domain.
        want: Arc<str>,
    },
    /// It is somebody else.
    #[error("the peer is {got}, want {want}")]
    Other {
        /// The peer's id.
        got: SpiffeId,
        /// Who should be there.
        want: SpiffeId,
    },
    /// The root that was to be sent along was not.
    #[error(
        "the peer's certificate does not lead to the root with the SHA-256 {want}, by which it was to be known"
    )]
    Pin {
        /// The root's fingerprint.
        want: String,
    },
}

/// The SPIFFE id in a chain's first certificate. The chain must have been verified: this only reads.
///
/// # Errors
///
/// If there isn't exactly one.
pub fn peer_id(certs: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    id_of(&parse(certs.first().ok_or(PeerError::None)?)?)
}

/// A certificate that can be read.
pub(crate) fn parse<'a>(leaf: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PeerError> {
    let parsed = x509_parser::parse_x509_certificate(leaf);
    parsed.map(|(_, cert)| cert).map_err(|_| PeerError::Unreadable)
}

/// The SPIFFE id in a certificate.
pub(crate) fn id_of(cert: &X509Certificate<'_>) -> Result<SpiffeId, PeerError> {
    let names = cert
        .subject_alternative_name()
        .map_err(|_| PeerError::Unreadable)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| {
            if let GeneralName::URI(uri) = name {
                Some(*uri)
            } else {
                None
            }
        })
        .collect();
    match uris.as_slice() {
        [uri] => Ok(SpiffeId::parse(uri)?),
        others => Err(PeerError::Names(others.len())),
    }
}

/// Whether a certificate is for who signs with it, and issues none (X509-SVID §4.3 and §5.2). Webpki looks at the extended
/// key usage only.
fn check_usage(cert: &X509Certificate<'_>) -> Result<(), PeerError> {
    let usage = cert.key_usage().map_err(|_| PeerError::Unreadable)?;
    let usage = usage.ok_or(PeerError::Usage)?.value;
    let good = usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign();
    good.then_some(()).ok_or(PeerError::Usage)
}

/// Who is accepted.
#[derive(Clone, Debug)]
pub(crate) enum Expect {
    /// Anyone of this trust domain.
    Domain(Arc<str>),
    /// This one only.
    Exactly(SpiffeId),
}

impl Expect {
    /// Who it is, if that is who is accepted.
    fn check(&self, leaf: &CertificateDer<'_>) -> Result<SpiffeId, Error> {
        let cert = parse(leaf).map_err(refused)?;
        check_usage(&cert).map_err(refused)?;
        let got = id_of(&cert).map_err(refused)?;
        match self {
            Self::Domain(want) if got.trust_domain() == &**want => Ok(got),
            Self::Domain(want) => Err(refused(PeerError::Domain {
                got,
                want: Arc::clone(want),
            })),
            Self::Exactly(want) if got == *want => Ok(got),
            Self::Exactly(want) => Err(refused(PeerError::Other {
                got,
                want: want.clone(),
            })),
        }
    }
}

/// How one that has no certificate yet knows the control plane.
#[derive(Clone, Debug)]
pub(crate) enum Anchor {
    /// By these roots.
    Bundle(Bundle),
    /// By the fingerprint of a root that it sends along.
    Pin(String),
}

impl Anchor {
    /// The roots that a chain may lead to.
    fn roots(&self, sent: &[CertificateDer<'_>]) -> Result<RootCertStore, Error> {
        match self {
            Self::Bundle(bundle) => bundle.store(),
            Self::Pin(pin) => {
                let mut store = RootCertStore::empty();
                let pinned = sent.iter().find(|cert| fingerprint(cert) == *pin);
                let pinned = pinned.ok_or_else(|| refused(PeerError::Pin { want: pin.clone() }))?;
                store.add(pinned.clone().into_owned())?;
                Ok(store)
            }
        }
    }
}

fn refused(error: PeerError) -> Error {
    Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(
        error,
    ))))
}

/// Where a server's chain must lead.
#[derive(Debug)]
pub(crate) enum Roots {
    /// To one of these roots; and chains that do, and what is revoked all the same.
    Known(Arc<RootCertStore>, Proven, Arc<Revocations>),
    /// As one that has no certificate yet knows it.
    Joining(Anchor),
}

/// Checks servers.
#[derive(Debug)]
pub(crate) struct Servers {
    pub(crate) roots: Roots,
    pub(crate) expect: Expect,
    pub(crate) provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verify = |roots: &RootCertStore| {
            let cert = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&cert, roots, intermediates, now, algorithms)
        };
        match &self.roots {
            Roots::Known(roots, proven, revocations) => {
                let chain = Chain::new(end_entity, intermediates);
                let listed = revocations.listed();
                if !proven.has(&chain, now, listed.generation) {
                    verify(roots)?;
                    let id = self.expect.check(end_entity)?;
                    listed.check(&id, end_entity).inspect_err(|error| {
                        revocations.count_refused();
                        tell_refused(end_entity, now, error);
                    })?;
                    proven.add(&chain, listed.generation);
                }
            }
            Roots::Joining(anchor) => {
                verify(&anchor.roots(intermediates)?)?;
                self.expect.check(end_entity)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Says whose certificate was refused, as far as it can be read: the error alone names nobody. Once a second at most, since
/// anybody can be refused as often as he likes.
fn tell_refused(leaf: &CertificateDer<'_>, now: UnixTime, error: &Error) {
    static TOLD: AtomicU64 = AtomicU64::new(0);
    if TOLD.swap(now.as_secs(), Ordering::Relaxed) == now.as_secs() {
        return;
    }
    match peer_id(std::slice::from_ref(leaf)) {
        Ok(id) => tracing::warn!(claims = %id, %error, "a peer's certificate is refused"),
        Err(no_id) => tracing::warn!(%no_id, %error, "a peer's certificate is refused"),
    }
}

/// Checks clients.
#[derive(Debug)]
pub(crate) struct Clients {
    chain: Arc<dyn ClientCertVerifier>,
    expect: Expect,
    proven: Proven,
    revocations: Arc<Revocations>,
    /// Somebody without a certificate is refused.
    mandatory: bool,
}

impl Clients {
    pub(crate) fn new(
        roots: Arc<RootCertStore>,
        expect: Expect,
        revocations: Arc<Revocations>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, rustls::server::VerifierBuilderError> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider).build()?;
        Ok(Self {
            chain,
            expect,
            proven: Proven::default(),
            revocations,
            mandatory: true,
        })
    }

    #[cfg(test)]
    pub(crate) const fn proven(&self) -> &Proven {
        &self.proven
    }

    /// Those who show a certificate are checked, and those who show none are let in.
    pub(crate) fn or_none(self) -> Self {
        Self {
            mandatory: false,
            ..self
        }
    }
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = Chain::new(end_entity, intermediates);
        let listed = self.revocations.listed();
        if self.proven.has(&chain, now, listed.generation) {
            return Ok(ClientCertVerified::assertion());
        }
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)
            .inspect_err(|error| tell_refused(end_entity, now, error))?;
        let id = self.expect.check(end_entity)?;
        listed.check(&id, end_entity).inspect_err(|error| {
            self.revocations.count_refused();
            tell_refused(end_entity, now, error);
        })?;
        self.proven.add(&chain, listed.generation);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
