//! One part's certificate, key and trust anchors, and the TLS configurations made of them.

use crate::files::open_to_others;
use crate::spiffe::SpiffeId;
use crate::verify::{Clients, Expect, PeerError, Servers, peer_id};
use arc_swap::ArcSwap;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    dir: PathBuf,
    id: SpiffeId,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<Material>,
}

/// One generation of files, and the configurations made of it. A reload replaces it whole, so that no
/// session of an old generation is resumed under a new one.
#[derive(Debug)]
struct Material {
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    not_after: SystemTime,
    /// What the files held, to see whether they have changed.
    bytes: [Vec<u8>; 3],
    servers: Mutex<HashMap<Alpn, Arc<ServerConfig>>>,
    clients: Mutex<HashMap<(Alpn, SpiffeId), Arc<ClientConfig>>>,
}

type Alpn = Vec<Vec<u8>>;

/// Client configurations kept; one for each peer and protocol. Past that they are made anew.
const MAX_CONFIGS: usize = 16_384;

impl Identity {
    /// Reads `cert.pem`, `key.pem` and `bundle.pem` of a directory.
    ///
    /// # Errors
    ///
    /// [`IdentityError`] names the file and what is wrong with it.
    pub fn load(dir: impl Into<PathBuf>) -> Result<Arc<Self>, IdentityError> {
        let dir = dir.into();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let (id, material) = Material::load(&dir, &provider)?;
        Ok(Arc::new(Self {
            dir,
            id,
            provider,
            current: ArcSwap::from_pointee(material),
        }))
    }

    /// Who this is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// When the certificate in use ends.
    pub fn not_after(&self) -> SystemTime {
        self.current.load().not_after
    }

    /// Reads the files again. True if they had changed; the next handshake uses them.
    ///
    /// # Errors
    ///
    /// What [`Self::load`] says; what was in use stays in use.
    pub fn reload(&self) -> Result<bool, IdentityError> {
        let (id, material) = Material::load(&self.dir, &self.provider)?;
        if id != self.id {
            return Err(IdentityError::Changed {
                dir: self.dir.clone(),
                was: self.id.clone(),
                now: id,
            });
        }
        if material.bytes == self.current.load().bytes {
            return Ok(false);
        }
        self.current.store(Arc::new(material));
        Ok(true)
    }

    /// How to accept connections: TLS 1.3, any peer of the trust domain, nobody without a certificate. Ask
    /// for each connection; it is cheap, and a reload changes the answer.
    ///
    /// # Errors
    ///
    /// If the trust anchors can't be used.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        let current = self.current.load();
        let key: Alpn = alpn.iter().map(|p| p.to_vec()).collect();
        let mut known = current.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = known.get(&key) {
            return Ok(Arc::clone(config));
        }
        let expect = Expect::Domain(self.id.trust_domain().into());
        let anchors = |source| IdentityError::Anchors {
            dir: self.dir.clone(),
            source,
        };
        let clients =
            Clients::new(Arc::clone(&current.roots), expect, Arc::clone(&self.provider)).map_err(anchors)?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| self.tls(source))?
            .with_client_cert_verifier(Arc::new(clients))
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(
                &current.key,
            ))));
        config.alpn_protocols.clone_from(&key);
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
            roots: Arc::clone(&current.roots),
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

    fn tls(&self, source: rustls::Error) -> IdentityError {
        IdentityError::Tls {
            dir: self.dir.clone(),
            source,
        }
    }
}

impl Material {
    fn load(dir: &Path, provider: &CryptoProvider) -> Result<(SpiffeId, Self), IdentityError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|source| IdentityError::Read { path, source })
        };
        let (cert_path, key_path, bundle_path) =
            (dir.join("cert.pem"), dir.join("key.pem"), dir.join("bundle.pem"));
        let bytes = [read("cert.pem")?, read("key.pem")?, read("bundle.pem")?];
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
        let [cert, key, bundle] = &bytes;
        let certs = |bytes: &[u8], path: &Path| {
            let want = "PEM certificates";
            let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
            let parsed = parsed.and_then(|certs: Vec<CertificateDer<'static>>| {
                if certs.is_empty() {
                    Err(rustls::pki_types::pem::Error::NoItemsFound)
                } else {
                    Ok(certs)
                }
            });
            parsed.map_err(|source| IdentityError::Pem {
                path: path.into(),
                want,
                source,
            })
        };
        let chain = certs(cert, &cert_path)?;
        let id = peer_id(&chain).map_err(|source| IdentityError::Id {
            path: cert_path.clone(),
            source,
        })?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|source| IdentityError::Pem {
            path: key_path,
            want: "a PEM private key",
            source,
        })?;
        let tls = |source| IdentityError::Tls {
            dir: dir.into(),
            source,
        };
        let mut roots = RootCertStore::empty();
        for anchor in certs(bundle, &bundle_path)? {
            roots.add(anchor).map_err(tls)?;
        }
        let not_after = not_after(&chain).ok_or_else(|| IdentityError::Id {
            path: cert_path,
            source: PeerError::Unreadable,
        })?;
        let key = CertifiedKey::from_der(chain, key, provider).map_err(tls)?;
        let material = Self {
            key: Arc::new(key),
            roots: Arc::new(roots),
            not_after,
            bytes,
            servers: Mutex::default(),
            clients: Mutex::default(),
        };
        Ok((id, material))
    }
}

fn not_after(chain: &[CertificateDer<'_>]) -> Option<SystemTime> {
    let (_, cert) = x509_parser::parse_x509_certificate(chain.first()?).ok()?;
    let seconds = u64::try_from(cert.validity().not_after.timestamp()).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
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
