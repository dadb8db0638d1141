//! One part's certificate, key and trust anchors, and the TLS configurations made of them.

mod material;

pub use material::{Given, Issued};

use crate::bundle::{Bundle, BundleError};
use crate::leaves::Leaves;
use crate::proven::Proven;
use crate::request::NewKey;
use crate::revoked::{RevocationCounts, Revocations, Revoked, Tie};
use crate::spiffe::SpiffeId;
use crate::tls::JOIN_ALPN;
use crate::validity::{Validity, wall};
use crate::verify::{Clients, Expect, PeerError, Roots, Servers};
use arc_swap::ArcSwap;
use material::Material;
pub(crate) use material::install;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::CertificateDer;
use rustls::server::NoServerSessionStorage;
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, ClientConfig, ServerConfig};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// Why an identity can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file can't be read.
    #[error("can't read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file isn't what it should be.
    #[error("{path} is not {want}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        want: &'static str,
        /// What the parser said.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Others can get at the key.
    #[error("{path} has mode {mode:o}, which lets others at the key: run chmod 600 {path}")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The certificate doesn't say who this is.
    #[error("{path} is not an X509-SVID")]
    Id {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: PeerError,
    },
    /// Key, certificate and anchors don't go together, or TLS can't use them.
    #[error("the identity in {dir} can't be used")]
    Tls {
        /// The directory.
        dir: PathBuf,
        /// What the TLS library said.
        #[source]
        source: rustls::Error,
    },
    /// The trust anchors can't be used.
    #[error("the trust anchors in {dir} can't be used")]
    Anchors {
        /// The directory.
        dir: PathBuf,
        /// What the TLS library said.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// The trust bundle can't be used.
    #[error("{path} can't be used: {source}")]
    Bundle {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: BundleError,
    },
    /// A certificate that was given is not for the key that it was asked for with, or doesn't lead to a root.
    #[error("the certificate that was issued can't be used")]
    Issued(#[source] rustls::Error),
    /// There is no randomness.
    #[error("can't make a key: {0}")]
    Key(String),
    /// New files can't be written.
    #[error("can't write to {dir}")]
    Write {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// What it is asked to keep in files comes from somewhere else.
    #[error("the identity comes from {0}, not from files")]
    NotFiles(PathBuf),
    /// A reload brought the certificate of somebody else.
    #[error("the certificate in {dir} is now {now}, but this is {was}: restart to become another")]
    Changed {
        /// The directory.
        dir: PathBuf,
        /// Who it was.
        was: SpiffeId,
        /// Who it says it is now.
        now: SpiffeId,
    },
}

/// Who this part of the mesh is. Shared; [`Identity::reload`] takes effect at the next handshake.
#[derive(Debug)]
pub struct Identity {
    /// The directory; or the socket that it comes from.
    place: PathBuf,
    is_files: bool,
    id: SpiffeId,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<Material>,
    /// Whose certificates are refused though they are good otherwise.
    revocations: Arc<Revocations>,
    /// What the certificates of peers say that were shown.
    leaves: Leaves,
    /// Counts what was in use so far.
    changes: watch::Sender<u64>,
    /// Held while files are written and read, so that they are not read half-way. Poison is harmless: nothing is changed.
    writing: Mutex<()>,
}

/// What there is to say of what is in use.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Facts {
    /// From when to when the certificate is good.
    pub validity: Validity,
    /// SHA-256 of the certificate, in hexadecimal digits.
    pub certificate: String,
    /// The hash of the trust bundle.
    pub bundle: String,
    /// The fingerprint of the root that the certificate leads to; `None` if it isn't in the bundle.
    pub root: Option<String>,
    /// The hash of the list of revocations; `None` until there is one.
    pub revoked: Option<String>,
}

/// Why this part can't show who it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NotReady {
    /// The certificate has ended.
    #[error("this proxy's own certificate has ended at {}", crate::validity::shown(.0))]
    Ended(SystemTime),
    /// The certificate begins later.
    #[error("this proxy's own certificate is good only from {} on", crate::validity::shown(.0))]
    Early(SystemTime),
    /// The certificate was revoked.
    #[error("this proxy's own certificate was revoked at {}", crate::validity::shown(.0))]
    Revoked(SystemTime),
}

/// Protocols by their ALPN names, in order of preference.
pub(crate) type Alpn = Vec<Vec<u8>>;

/// Client configurations kept; one for each peer and protocol. Past that they are made anew.
const MAX_CONFIGS: usize = 16_384;

/// The cryptography between parts of the mesh: what rustls has, AES-128-GCM with SHA-256 first. Certificates and key exchanges
/// here are on curves of 128 bits of security, which a longer key for what follows adds nothing to; and processors compute
/// SHA-256 by themselves, but not SHA-384, which took 8 % of a handshake.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    let first = CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != first);
    Arc::new(provider)
}

impl Identity {
    /// Reads `cert.pem`, `key.pem` and `bundle.pem` of a directory.
    ///
    /// # Errors
    ///
    /// [`IdentityError`] names the file and what is wrong with it.
    pub fn load(dir: impl Into<PathBuf>) -> Result<Arc<Self>, IdentityError> {
        let dir = dir.into();
        let provider = provider();
        let (id, material) = Material::load(&dir, &provider)?;
        Ok(Self::of(dir, true, id, provider, material))
    }

    /// An identity that comes from `place`, such as the socket of an agent: a chain, its key in PKCS #8, and the roots.
    /// [`Self::replace`] brings the next.
    ///
    /// # Errors
    ///
    /// [`IdentityError`] says what is wrong with it.
    pub fn given(place: impl Into<PathBuf>, given: Given) -> Result<Arc<Self>, IdentityError> {
        let place = place.into();
        let provider = provider();
        let (id, material) = Material::given(&place, given, &provider)?;
        Ok(Self::of(place, false, id, provider, material))
    }

    fn of(
        place: PathBuf,
        is_files: bool,
        id: SpiffeId,
        provider: Arc<CryptoProvider>,
        material: Material,
    ) -> Arc<Self> {
        Arc::new(Self {
            place,
            is_files,
            id,
            provider,
            current: ArcSwap::from_pointee(material),
            revocations: Arc::default(),
            leaves: Leaves::default(),
            changes: watch::Sender::new(0),
            writing: Mutex::default(),
        })
    }

    /// Who this is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// When the certificate in use ends.
    pub fn not_after(&self) -> SystemTime {
        self.current.load().validity.not_after
    }

    /// What there is to say of what is in use.
    pub fn facts(&self) -> Facts {
        let revoked = self.revocations.revoked();
        Facts {
            revoked: revoked.map(|revoked| revoked.hash().to_owned()),
            ..self.current.load().facts()
        }
    }

    /// The roots in use.
    pub fn bundle(&self) -> Bundle {
        self.current.load().bundle.clone()
    }

    /// Tells whenever something else is in use.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether peers can take this part for who it is, at a time.
    ///
    /// # Errors
    ///
    /// [`NotReady`] says why not: to call that a peer's failure would send people to the wrong place.
    pub fn ready(&self, now: SystemTime) -> Result<(), NotReady> {
        let validity = self.current.load().validity;
        if now > validity.not_after {
            return Err(NotReady::Ended(validity.not_after));
        }
        if let Some(since) = self.refuses(&self.id, validity.not_before) {
            return Err(NotReady::Revoked(since));
        }
        if now < validity.not_before {
            return Err(NotReady::Early(validity.not_before));
        }
        Ok(())
    }

    /// The same, now.
    ///
    /// # Errors
    ///
    /// As for [`Self::ready`].
    pub fn ready_now(&self) -> Result<(), NotReady> {
        self.ready(wall())
    }

    /// Waits until it is.
    ///
    /// Cancel-safe.
    pub async fn wait_ready(&self) {
        let mut changes = self.changes();
        while self.ready_now().is_err() {
            // The sender is this identity's own.
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Refuses certificates by this list from the next handshake on, in place of the one that was. True if it is another.
    /// Connections that are open go on until [`Self::cut_revoked`].
    pub fn revoke(&self, revoked: Revoked) -> bool {
        let is_other = self.revocations.replace(revoked);
        if is_other {
            self.changes.send_modify(|count| *count += 1);
        }
        is_other
    }

    /// Cuts the open connections of those whose certificates are refused now, and says how many they were.
    pub fn cut_revoked(&self) -> usize {
        self.revocations.cut()
    }

    /// The list of revocations in force; `None` until there is one.
    pub fn revoked(&self) -> Option<Arc<Revoked>> {
        self.revocations.revoked()
    }

    /// When the certificate of an id was revoked that begins at a time, if it was.
    pub fn refuses(&self, id: &SpiffeId, begins: SystemTime) -> Option<SystemTime> {
        self.revocations.listed().refuses(id, begins)
    }

    /// What has been done about revocations so far.
    pub fn revocation_counts(&self) -> RevocationCounts {
        self.revocations.counts()
    }

    /// Ties a connection that has just been made to the certificates that its peer has shown in the handshake.
    ///
    /// # Errors
    ///
    /// If they don't say who it is.
    pub fn tie(&self, certs: &[CertificateDer<'_>]) -> Result<Tie, PeerError> {
        let (id, validity) = self.leaves.who(certs)?;
        let first_to_end = validity.not_after.min(self.not_after());
        let lasts = first_to_end.duration_since(wall()).unwrap_or_default();
        Ok(self.revocations.tie(id, validity, lasts))
    }

    /// Reads the files again. True if they had changed; the next handshake uses them.
    ///
    /// # Errors
    ///
    /// What [`Self::load`] says; what was in use stays in use.
    pub fn reload(&self) -> Result<bool, IdentityError> {
        if !self.is_files {
            return Ok(false);
        }
        let _whole = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.read_files()
    }

    fn read_files(&self) -> Result<bool, IdentityError> {
        let (id, material) = Material::load(&self.place, &self.provider)?;
        self.take(id, material)
    }

    /// Uses what was given in place of what is in use. True if it is something else.
    ///
    /// # Errors
    ///
    /// What [`Self::given`] says; what was in use stays in use.
    pub fn replace(&self, given: Given) -> Result<bool, IdentityError> {
        let (id, material) = Material::given(&self.place, given, &self.provider)?;
        self.take(id, material)
    }

    fn take(&self, id: SpiffeId, material: Material) -> Result<bool, IdentityError> {
        if id != self.id {
            return Err(IdentityError::Changed {
                dir: self.place.clone(),
                was: self.id.clone(),
                now: id,
            });
        }
        if material.same_as(&self.current.load()) {
            return Ok(false);
        }
        self.current.store(Arc::new(material));
        self.changes.send_modify(|count| *count += 1);
        Ok(true)
    }

    /// Takes a certificate that was issued for a new key, with the roots that came with it: checks that they go together,
    /// writes the files, all or none, and uses them from the next handshake on. Blocks.
    ///
    /// # Errors
    ///
    /// If they don't go together, or can't be written; what was in use stays in use.
    pub fn install(&self, key: &NewKey, issued: &Issued) -> Result<(), IdentityError> {
        if !self.is_files {
            return Err(IdentityError::NotFiles(self.place.clone()));
        }
        let _whole = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        install(&self.place, &self.id, key, issued)?;
        self.read_files().map(|_| ())
    }

    /// Trusts other roots from the next handshake on, and keeps them in `bundle.pem`. True if they are others. Blocks.
    ///
    /// # Errors
    ///
    /// If they can't be written; what was in use stays in use.
    pub fn install_bundle(&self, bundle: &Bundle) -> Result<bool, IdentityError> {
        if !self.is_files {
            return Err(IdentityError::NotFiles(self.place.clone()));
        }
        let _whole = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.current.load().bundle == *bundle {
            return Ok(false);
        }
        let pem = bundle.to_pem();
        crate::files::install(&self.place, &[("bundle.pem", pem.as_bytes(), 0o644)]).map_err(|source| {
            IdentityError::Write {
                dir: self.place.clone(),
                source,
            }
        })?;
        self.read_files()
    }

    /// How to accept connections: TLS 1.3, any peer of the trust domain, nobody without a certificate. Ask
    /// for each connection; it is cheap, and a reload changes the answer.
    ///
    /// # Errors
    ///
    /// If the trust anchors can't be used.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        self.server_config_for(alpn, false)
    }

    /// The same, but that somebody without a certificate is let in, too. Whoever asks for it has to keep them apart.
    pub(crate) fn open_server_config(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        self.server_config_for(alpn, true)
    }

    fn server_config_for(&self, alpn: &[&[u8]], guests: bool) -> Result<Arc<ServerConfig>, IdentityError> {
        let current = self.current.load();
        let key = (alpn.iter().map(|p| p.to_vec()).collect::<Alpn>(), guests);
        let mut known = current.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = known.get(&key) {
            return Ok(Arc::clone(config));
        }
        let expect = Expect::Domain(self.id.trust_domain().into());
        let anchors = |source| IdentityError::Anchors {
            dir: self.place.clone(),
            source,
        };
        let (roots, revocations) = (Arc::clone(&current.roots), Arc::clone(&self.revocations));
        let clients =
            Clients::new(roots, expect, revocations, Arc::clone(&self.provider)).map_err(anchors)?;
        let clients = if guests { clients.or_none() } else { clients };
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| self.tls(source))?
            .with_client_cert_verifier(Arc::new(clients))
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(
                &current.key,
            ))));
        config.alpn_protocols.clone_from(&key.0);
        // A session that is resumed isn't checked again: a certificate that has ended, or whose root has gone, would go on.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        // They would be made, and thrown away.
        config.send_tls13_tickets = 0;
        let config = Arc::new(config);
        known.insert(key, Arc::clone(&config));
        Ok(config)
    }

    /// How to connect: TLS 1.3, and the server must be exactly `expect`. Sessions are resumed only towards
    /// the same peer.
    ///
    /// # Errors
    ///
    /// If TLS can't use this identity.
    pub fn client_config(
        &self,
        alpn: &[&[u8]],
        expect: &SpiffeId,
    ) -> Result<Arc<ClientConfig>, IdentityError> {
        let current = self.current.load();
        let key = (alpn.iter().map(|p| p.to_vec()).collect::<Alpn>(), expect.clone());
        let mut known = current.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = known.get(&key) {
            return Ok(Arc::clone(config));
        }
        let servers = Servers {
            roots: Roots::Known(
                Arc::clone(&current.roots),
                Proven::default(),
                Arc::clone(&self.revocations),
            ),
            expect: Expect::Exactly(expect.clone()),
            provider: Arc::clone(&self.provider),
        };
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| self.tls(source))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(
                &current.key,
            ))));
        config.alpn_protocols.clone_from(&key.0);
        config.enable_sni = false;
        config.resumption = Resumption::in_memory_sessions(8);
        let config = Arc::new(config);
        if known.len() >= MAX_CONFIGS {
            known.clear();
        }
        known.insert(key, Arc::clone(&config));
        Ok(config)
    }

    /// How to accept those who have no certificate yet, by [`JOIN_ALPN`] and for nothing but to join: the root goes along,
    /// since they may know it by its hash only.
    ///
    /// # Errors
    ///
    /// If TLS can't use this identity.
    pub(crate) fn join_config(&self) -> Result<Arc<ServerConfig>, IdentityError> {
        let current = self.current.load();
        let mut chain = current.key.cert.clone();
        if let Some(root) = current.bundle.root_of(&chain) {
            chain.push(root.cert.clone());
        }
        let key = CertifiedKey::new(chain, Arc::clone(&current.key.key));
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| self.tls(source))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
        config.alpn_protocols = vec![JOIN_ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    fn tls(&self, source: rustls::Error) -> IdentityError {
        IdentityError::Tls {
            dir: self.place.clone(),
            source,
        }
    }
}

/// Reloads an identity when its files change, until cancelled (drop the future). Files that can't be used
/// are named in the log and what was in use stays in use.
pub async fn watch(identity: Arc<Identity>, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    loop {
        ticks.tick().await;
        let reloading = Arc::clone(&identity);
        // Three small files, but files all the same: not on a runtime's own thread.
        match tokio::task::spawn_blocking(move || reloading.reload()).await {
            Ok(Ok(true)) => tracing::info!(id = %identity.id(), "identity reloaded"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(error = %error, "identity not reloaded; the old one stays"),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fast_comes_first_and_nothing_is_left_out() {
        let names = |provider: &CryptoProvider| -> Vec<_> {
            let suites = provider.cipher_suites.iter();
            suites.map(|suite| suite.suite()).collect()
        };
        let (ours, theirs) = (names(&provider()), names(&aws_lc_rs::default_provider()));
        assert_eq!(ours.first(), Some(&CipherSuite::TLS13_AES_128_GCM_SHA256));
        assert_eq!(ours.len(), theirs.len());
        assert!(theirs.iter().all(|suite| ours.contains(suite)));
    }
}
