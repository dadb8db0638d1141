//! A certificate authority in a directory: a root whose key can stay offline, or an intermediate that signs.

use crate::bundle::{Bundle, BundleError, fingerprint, hex, pem};
use crate::files::{install, open_to_others, recover};
use crate::identity::Given;
use crate::request::{CheckedRequest, NewKey};
use crate::spiffe::{InvalidSpiffeId, Role, SpiffeId};
use crate::validity::{Validity, wall};
use crate::verify::{PeerError, peer_id};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::crypto::aws_lc_rs;
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
    /// Others can get at the key.
    #[error("{path} has mode {mode:o}, which lets others at the key: run chmod 600 {path}")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
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
    /// Certificate and key don't go together.
    #[error("the key in {dir} is not that of ca.pem")]
    Key {
        /// The directory.
        dir: PathBuf,
    },
    /// The roots can't be used.
    #[error("{path} can't be used: {source}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: BundleError,
    },
    /// The authority's certificate leads to none of its roots.
    #[error("{dir}: ca.pem is signed by no root of roots.pem")]
    Rootless {
        /// The directory.
        dir: PathBuf,
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
    /// It may not make other authorities.
    #[error(
        "the authority in {dir} may not make intermediates (path length 0); a root of `leeward ca init` may"
    )]
    NoIntermediates {
        /// The directory.
        dir: PathBuf,
    },
    /// Its own certificate has ended, or is about to.
    #[error("the authority's own certificate ends at {}, so none can be issued that lasts", crate::validity::shown(.0))]
    Ended(SystemTime),
    /// A certificate for so long, or so short, is not issued.
    #[error("{0:?} is no life for a certificate; want at least {MIN_LIFE:?}")]
    Life(Duration),
}

/// An authority and its key.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    domain: String,
    /// What follows a certificate in its chain: the signing certificate and those above it, without the root.
    above: Vec<CertificateDer<'static>>,
    /// The signing certificate's own.
    fingerprint: String,
    validity: Validity,
    /// Whether it may sign authorities.
    path_len: u8,
    roots: Bundle,
    /// The one of them that the signing certificate leads to, or is.
    root: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate that was just signed.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The certificate and what is above it, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// SHA-256 of the certificate, in hexadecimal digits.
    pub fingerprint: String,
    /// From when to when it is good.
    pub validity: Validity,
    /// The root that it leads to.
    pub root: String,
}

/// How long a new root lasts.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far back validity begins at most, for clocks that differ; a fifth of a certificate's life if that is less.
const BACKDATE: Duration = Duration::from_secs(60);
/// Shortest life of a certificate. What an operator can ask for has a higher bound.
pub const MIN_LIFE: Duration = Duration::from_secs(2);
/// Bytes of a serial number (RFC 5280 allows 20).
const SERIAL: usize = 16;

impl Authority {
    /// Makes a root for a trust domain: `ca.pem` and `ca-key.pem` (mode 0600) in `dir`, which is made if need be. It
    /// may sign intermediates, and certificates too.
    ///
    /// # Errors
    ///
    /// If there is an authority already, or the files can't be written.
    pub fn create(dir: &Path, domain: &str) -> Result<Self, AuthorityError> {
        let id = SpiffeId::parse(&format!("spiffe://{domain}"))?;
        refuse_existing(dir)?;
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let params = ca_params("root", &id, 1, &pair, validity(ROOT_LIFE, None)?)?;
        let cert = params.self_signed(&pair)?.pem();
        let key = pair.serialize_pem();
        let files = [
            ("ca-key.pem", key.as_bytes(), 0o600),
            ("ca.pem", cert.as_bytes(), 0o644),
        ];
        install(dir, &files).map_err(|source| file("write", dir, source))?;
        Self::open(dir)
    }

    /// Opens the authority in a directory.
    ///
    /// # Errors
    ///
    /// If there is none, or it can't be used.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        recover(dir).map_err(|source| file("write", dir, source))?;
        let (ca, key) = (dir.join("ca.pem"), dir.join("ca-key.pem"));
        let read = |path: &PathBuf| std::fs::read(path).map_err(|source| file("read", path, source));
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&read(&ca)?)
            .collect::<Result<_, _>>()
            .map_err(|_| AuthorityError::Unreadable { path: ca.clone() })?;
        let key_text = read(&key)?;
        if let Some(mode) = open_to_others(&key).map_err(|source| file("read", &key, source))? {
            return Err(AuthorityError::Mode { path: key, mode });
        }
        let unreadable = || AuthorityError::Unreadable { path: ca.clone() };
        let pair = KeyPair::from_pem(&String::from_utf8_lossy(&key_text))?;
        let first = chain.first().ok_or_else(unreadable)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(first).map_err(|_| unreadable())?;
        let limits = parsed.basic_constraints().ok().flatten().map(|c| c.value);
        let limits = limits.filter(|limits| limits.ca).ok_or_else(unreadable)?;
        if parsed.public_key().raw != pair.subject_public_key_info() {
            return Err(AuthorityError::Key { dir: dir.into() });
        }
        let validity = Validity::of(&parsed).ok_or_else(unreadable)?;
        let path_len = limits
            .path_len_constraint
            .map_or(u8::MAX, |n| u8::try_from(n).unwrap_or(u8::MAX));
        let is_root = parsed.verify_signature(None).is_ok();
        let domain = peer_id(&chain)?.trust_domain().to_owned();
        let roots_path = dir.join("roots.pem");
        let roots = match std::fs::read(&roots_path) {
            Ok(text) => Bundle::from_pem(&text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && is_root => {
                Bundle::new([first.clone()])
            }
            Err(source) => return Err(file("read", &roots_path, source)),
        };
        let roots = roots.map_err(|source| AuthorityError::Roots {
            path: roots_path,
            source,
        })?;
        let root = roots.root_of(&chain).map(|root| root.fingerprint.clone());
        let root = root.ok_or_else(|| AuthorityError::Rootless { dir: dir.into() })?;
        let issuer = Issuer::from_ca_cert_der(first, pair)?;
        let fingerprint = fingerprint(first);
        Ok(Self {
            dir: dir.into(),
            domain,
            above: if is_root { Vec::new() } else { chain },
            fingerprint,
            validity,
            path_len,
            roots,
            root,
            issuer,
        })
    }

    /// The trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The roots that the trust domain's certificates are checked against.
    pub fn roots(&self) -> &Bundle {
        &self.roots
    }

    /// The fingerprint of the root that certificates signed here lead to.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The fingerprint of the certificate that signs.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// From when to when the certificate that signs is good.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// Whether the key here is a root's, which had better be offline.
    pub fn is_root(&self) -> bool {
        self.above.is_empty()
    }

    /// Makes an intermediate that signs certificates and no authorities: `ca.pem`, `ca-key.pem` (mode 0600) and
    /// `roots.pem` in `out`, which is made if need be.
    ///
    /// # Errors
    ///
    /// If there is an authority there already, this one may not make others, or the files can't be written.
    pub fn intermediate(&self, life: Duration, out: &Path) -> Result<Self, AuthorityError> {
        if self.path_len == 0 {
            return Err(AuthorityError::NoIntermediates {
                dir: self.dir.clone(),
            });
        }
        refuse_existing(out)?;
        let id = SpiffeId::parse(&format!("spiffe://{}", self.domain))?;
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = ca_params(
            "intermediate",
            &id,
            0,
            &pair,
            validity(life, Some(self.validity))?,
        )?;
        params.use_authority_key_identifier_extension = true;
        let cert = params.signed_by(&pair, &self.issuer)?;
        let above = self.above.iter().map(|cert| pem(cert));
        let chain: String = std::iter::once(cert.pem()).chain(above).collect();
        let (key, roots) = (pair.serialize_pem(), self.roots.to_pem());
        let files = [
            ("roots.pem", roots.as_bytes(), 0o644),
            ("ca-key.pem", key.as_bytes(), 0o600),
            ("ca.pem", chain.as_bytes(), 0o644),
        ];
        install(out, &files).map_err(|source| file("write", out, source))?;
        Self::open(out)
    }

    /// Signs a certificate for the key of a request. It lasts for `life`, or as long as the authority does if that is
    /// shorter.
    ///
    /// # Errors
    ///
    /// If the id is of another trust domain, or the authority's own certificate has ended.
    pub fn sign(
        &self,
        request: &CheckedRequest,
        id: &SpiffeId,
        life: Duration,
    ) -> Result<Signed, AuthorityError> {
        self.sign_since(request, id, life, None)
    }

    /// The same, of one that doesn't begin before a time: that of a revocation of the id, before which its certificates are
    /// refused.
    ///
    /// # Errors
    ///
    /// As for [`Self::sign`].
    pub fn sign_since(
        &self,
        request: &CheckedRequest,
        id: &SpiffeId,
        life: Duration,
        since: Option<SystemTime>,
    ) -> Result<Signed, AuthorityError> {
        self.check_domain(id)?;
        let mut validity = validity(life, Some(self.validity))?;
        validity.not_before = since.map_or(validity.not_before, |since| since.max(validity.not_before));
        let params = leaf_params(id, validity)?;
        let cert = params.signed_by(&request.key, &self.issuer)?.der().clone();
        Ok(Signed {
            fingerprint: fingerprint(&cert),
            chain: std::iter::once(cert).chain(self.above.iter().cloned()).collect(),
            validity,
            root: self.root.clone(),
        })
    }

    /// Makes a key and a certificate for `id` that lasts for `life`, and keeps them nowhere: for simulated parts of a mesh.
    ///
    /// # Errors
    ///
    /// If the id is of another trust domain.
    pub fn give(&self, id: &SpiffeId, life: Duration) -> Result<Given, AuthorityError> {
        let key = NewKey::generate(id)?;
        let unreadable = |_| AuthorityError::Unreadable {
            path: self.dir.clone(),
        };
        let request = CheckedRequest::parse(key.request(), id).map_err(unreadable)?;
        Ok(Given {
            chain: self.sign(&request, id, life)?.chain,
            key: key.der(),
            bundle: self.roots.clone(),
        })
    }

    /// Makes a key and a certificate for `id` that lasts for `life`, and writes `cert.pem`, `key.pem` (mode 0600) and
    /// `bundle.pem` to `out`, which is made if need be.
    ///
    /// # Errors
    ///
    /// If the id is of another trust domain, or the files can't be written.
    pub fn issue(&self, id: &SpiffeId, life: Duration, out: &Path) -> Result<(), AuthorityError> {
        self.check_domain(id)?;
        let key = NewKey::generate(id)?;
        let unreadable = |_| AuthorityError::Unreadable { path: out.into() };
        let request = CheckedRequest::parse(key.request(), id).map_err(unreadable)?;
        let signed = self.sign(&request, id, life)?;
        write_identity(out, &key, &signed.chain, &self.roots).map_err(|source| file("write", out, source))
    }

    fn check_domain(&self, id: &SpiffeId) -> Result<(), AuthorityError> {
        if id.trust_domain() == self.domain {
            return Ok(());
        }
        Err(AuthorityError::Foreign {
            id: id.clone(),
            domain: self.domain.clone(),
        })
    }
}

/// Writes an identity's three files, all or none.
pub(crate) fn write_identity(
    dir: &Path,
    key: &NewKey,
    chain: &[CertificateDer<'_>],
    bundle: &Bundle,
) -> std::io::Result<()> {
    write_files(dir, &key.pem(), chain, bundle)
}

/// The same, of a key in PEM.
pub(crate) fn write_files(
    dir: &Path,
    key: &str,
    chain: &[CertificateDer<'_>],
    bundle: &Bundle,
) -> std::io::Result<()> {
    let chain: String = chain.iter().map(|cert| pem(cert)).collect();
    let bundle = bundle.to_pem();
    install(
        dir,
        &[
            ("bundle.pem", bundle.as_bytes(), 0o644),
            ("key.pem", key.as_bytes(), 0o600),
            ("cert.pem", chain.as_bytes(), 0o644),
        ],
    )
}

fn file(act: &'static str, path: &Path, source: std::io::Error) -> AuthorityError {
    let path = path.into();
    AuthorityError::File { act, path, source }
}

fn refuse_existing(dir: &Path) -> Result<(), AuthorityError> {
    let path = dir.join("ca.pem");
    if path.exists() {
        return Err(AuthorityError::Exists { path });
    }
    Ok(())
}

fn ca_params(
    what: &str,
    id: &SpiffeId,
    path_len: u8,
    pair: &KeyPair,
    validity: Validity,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    // Each has a name of its own, or two would be taken for one while one replaces the other.
    let own = fingerprint(&pair.subject_public_key_info());
    let own = own.get(..8).unwrap_or_default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(
        DnType::CommonName,
        format!("Leeward {what} {own} of {}", id.trust_domain()),
    );
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, validity)?;
    Ok(params)
}

/// The name by which clients that go by names of hosts, such as curl, know a control plane.
pub const CONTROL_HOST: &str = "leeward-control";

fn leaf_params(id: &SpiffeId, validity: Validity) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "leeward");
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    if matches!(id.role(), Role::Control) {
        // Beside the one SPIFFE id, which alone the mesh goes by (X509-SVID §2 allows it).
        params
            .subject_alt_names
            .push(SanType::DnsName(CONTROL_HOST.try_into()?));
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, validity)?;
    Ok(params)
}

fn set_validity(params: &mut CertificateParams, validity: Validity) -> Result<(), AuthorityError> {
    params.not_before = validity.not_before.into();
    params.not_after = validity.not_after.into();
    params.serial_number = Some(SerialNumber::from(random::<SERIAL>()?.to_vec()));
    Ok(())
}

/// From a little before now for as long as asked, within the signer's own.
fn validity(life: Duration, signer: Option<Validity>) -> Result<Validity, AuthorityError> {
    if life < MIN_LIFE {
        return Err(AuthorityError::Life(life));
    }
    let now = wall();
    let (mut from, mut to) = (now - BACKDATE.min(life / 5), now + life);
    if let Some(signer) = signer {
        from = from.max(signer.not_before);
        to = to.min(signer.not_after);
        if to < now + MIN_LIFE {
            return Err(AuthorityError::Ended(signer.not_after));
        }
    }
    Ok(Validity {
        not_before: from,
        not_after: to,
    })
}

/// Bytes that nobody can guess.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], rcgen::Error> {
    let mut bytes = [0; N];
    let random = aws_lc_rs::default_provider().secure_random;
    random
        .fill(&mut bytes)
        .map_err(|_| rcgen::Error::RingUnspecified)?;
    Ok(bytes)
}

/// Hexadecimal digits that nobody can guess, two for each byte.
pub(crate) fn random_hex<const N: usize>() -> Result<String, rcgen::Error> {
    random::<N>().map(|bytes| hex(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    const HOUR: Duration = Duration::from_secs(3600);

    fn id() -> SpiffeId {
        SpiffeId::proxy("td", "a", "a1").unwrap()
    }

    fn signed(authority: &Authority, life: Duration) -> Result<Signed, AuthorityError> {
        let key = NewKey::generate(&id()).unwrap();
        authority.sign(&CheckedRequest::parse(key.request(), &id()).unwrap(), &id(), life)
    }

    #[test]
    fn what_an_intermediate_signs_leads_to_its_root() {
        let scratch = Scratch::new();
        let root = Authority::create(&scratch.dir("root"), "td").unwrap();
        root.intermediate(24 * HOUR, &scratch.dir("ca")).unwrap();
        let ca = Authority::open(&scratch.dir("ca")).unwrap();
        assert!(root.is_root() && !ca.is_root());
        assert_eq!((ca.domain(), ca.root()), ("td", root.fingerprint()));
        let signed = signed(&ca, HOUR).unwrap();
        assert_eq!(signed.chain.len(), 2, "the root is not sent");
        root.roots().verify(&signed.chain, wall()).unwrap();
        let other = Authority::create(&scratch.dir("other"), "td").unwrap();
        assert!(other.roots().verify(&signed.chain, wall()).is_err());
        assert!(
            root.roots()
                .verify(&signed.chain, signed.validity.not_after + HOUR)
                .is_err()
        );
        let both = other.roots().with(root.roots()).unwrap();
        assert_eq!(
            both.root_of(&signed.chain).unwrap().fingerprint,
            root.fingerprint()
        );
        assert!(other.roots().root_of(&signed.chain).is_none());
    }

    #[test]
    fn an_intermediate_makes_no_others() {
        let scratch = Scratch::new();
        let root = Authority::create(&scratch.dir("root"), "td").unwrap();
        let ca = root.intermediate(HOUR, &scratch.dir("ca")).unwrap();
        let error = ca
            .intermediate(HOUR, &scratch.dir("sub"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("may not make intermediates"), "{error}");
        let again = root.intermediate(HOUR, &scratch.dir("ca")).unwrap_err();
        assert!(matches!(again, AuthorityError::Exists { .. }));
    }

    #[test]
    fn nothing_outlives_its_signer() {
        let scratch = Scratch::new();
        let root = Authority::create(&scratch.dir("root"), "td").unwrap();
        let ca = root.intermediate(HOUR, &scratch.dir("ca")).unwrap();
        let long = signed(&ca, 24 * HOUR).unwrap();
        assert!(long.validity.not_after <= ca.validity().not_after + Duration::from_secs(1));
        let gone = root.intermediate(MIN_LIFE, &scratch.dir("short")).unwrap();
        // Its end is in whole seconds, so at most two away.
        assert!(matches!(signed(&gone, HOUR), Err(AuthorityError::Ended(_))));
        assert!(matches!(
            signed(&ca, Duration::ZERO),
            Err(AuthorityError::Life(_))
        ));
    }

    #[test]
    fn only_what_is_ours_is_in_a_certificate() {
        let scratch = Scratch::new();
        let root = Authority::create(&scratch.dir("root"), "td").unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::OrganizationName, "Evil");
        params.subject_alt_names = vec![SanType::URI(id().as_str().try_into().unwrap())];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let request = params.serialize_request(&pair).unwrap();
        let request = CheckedRequest::parse(request.der(), &id()).unwrap();
        let chain = root.sign(&request, &id(), HOUR).unwrap().chain;
        let (_, cert) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
        assert_eq!(cert.subject().to_string(), "CN=leeward");
        assert!(!cert.basic_constraints().unwrap().unwrap().value.ca);
        let usage = cert.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
        assert_eq!(peer_id(&chain).unwrap(), id());
        assert_eq!(cert.public_key().raw, pair.subject_public_key_info());
    }

    #[test]
    fn a_key_that_others_can_read_or_of_another_signs_nothing() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new();
        Authority::create(&scratch.dir("one"), "td").unwrap();
        Authority::create(&scratch.dir("two"), "td").unwrap();
        let key = scratch.dir("one").join("ca-key.pem");
        std::fs::copy(scratch.dir("two").join("ca-key.pem"), &key).unwrap();
        assert!(matches!(
            Authority::open(&scratch.dir("one")),
            Err(AuthorityError::Key { .. })
        ));
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Authority::open(&scratch.dir("one")),
            Err(AuthorityError::Mode { mode: 0o640, .. })
        ));
    }
}
