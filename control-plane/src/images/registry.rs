//! Asking a registry.

use super::auth::{AuthError, credentials};
use super::layout::{LayoutError, layer, signature, unpack};
use crate::policy::Image;
use leeward_identity::tls;
use leeward_module::{MAX_BYTES, MAX_SIGNATURE};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::ImageIndexEntry;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, ParseError, Reference};
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio_stream::StreamExt;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a registry may be silent.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest file of passwords, in bytes.
const MAX_AUTH: u64 = 1 << 20;

/// The registries, and who the control plane is to them.
#[derive(Debug)]
pub(super) struct Registries {
    auth: Option<PathBuf>,
}

/// What a registry has.
pub(super) enum Fetched {
    /// What it had when it was last asked.
    Same,
    /// A module.
    Module {
        /// It.
        bytes: Vec<u8>,
        /// Its signature.
        signature: Option<String>,
        /// The digest of the image's manifest.
        manifest: String,
    },
}

/// Why there is no module.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("{image:?} is not an image")]
    Image { image: String, source: ParseError },
    #[error("can't read {path}")]
    AuthFile { path: PathBuf, source: io::Error },
    #[error("{path}")]
    Auth { path: PathBuf, source: AuthError },
    #[error("{path} has more than {MAX_AUTH} bytes")]
    AuthSize { path: PathBuf },
    #[error("can't set up a client")]
    Client(#[source] OciDistributionError),
    #[error("can't get the manifest of {image}")]
    Manifest {
        image: String,
        source: OciDistributionError,
    },
    #[error("can't get {digest} of {image}")]
    Layer {
        image: String,
        digest: String,
        source: OciDistributionError,
    },
    #[error("lost {digest} of {image} on its way")]
    Body {
        image: String,
        digest: String,
        source: io::Error,
    },
    #[error("the signature in the manifest has {0} bytes; want at most {MAX_SIGNATURE}")]
    Signature(usize),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("the layer has more than {MAX_BYTES} bytes")]
    TooLarge,
    #[error("unpacking the layer broke down")]
    Broken,
}

impl Registries {
    pub(super) fn new(auth: Option<PathBuf>) -> Self {
        // The client's TLS takes the process' provider.
        tls::install_provider();
        Self { auth }
    }

    /// The module of an image, unless its manifest has the digest `known`. The digests of manifest and layer are held
    /// against what came.
    ///
    /// Memory: the layer, and what it unpacks to. The client reads manifests and tokens whole, within the time that
    /// the caller sets: a registry that policy names can cost that much.
    pub(super) async fn fetch(&self, image: &Image, known: Option<&str>) -> Result<Fetched, FetchError> {
        let name = image.image.to_string();
        let reference: Reference = name.parse().map_err(|source| FetchError::Image {
            image: name.clone(),
            source,
        })?;
        let auth = self.auth(reference.resolve_registry()).await?;
        // A client of its own for each: passwords may have changed, and tokens are for one repository anyway.
        let client = client(image.insecure)?;
        let (manifest, digest) = client
            .pull_image_manifest(&reference, &auth)
            .await
            .map_err(|source| FetchError::Manifest {
                image: name.clone(),
                source,
            })?;
        if known == Some(digest.as_str()) {
            return Ok(Fetched::Same);
        }
        let signature = signature(&manifest);
        if let Some(long) = signature.as_ref().filter(|text| text.len() > MAX_SIGNATURE) {
            return Err(FetchError::Signature(long.len()));
        }
        let layer = layer(&manifest)?;
        let mut stream = client
            .pull_blob_stream(&reference, layer.digest.as_str())
            .await
            .map_err(|source| FetchError::Layer {
                image: name.clone(),
                digest: layer.digest.clone(),
                source,
            })?;
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|source| FetchError::Body {
                image: name.clone(),
                digest: layer.digest.clone(),
                source,
            })?;
            if bytes.len() + chunk.len() > MAX_BYTES {
                return Err(FetchError::TooLarge);
            }
            bytes.extend_from_slice(&chunk);
        }
        let unpacking = tokio::task::spawn_blocking(move || unpack(bytes, layer.packing));
        Ok(Fetched::Module {
            bytes: unpacking.await.map_err(|_| FetchError::Broken)??,
            signature,
            manifest: digest,
        })
    }

    async fn auth(&self, registry: &str) -> Result<RegistryAuth, FetchError> {
        let Some(path) = &self.auth else {
            return Ok(RegistryAuth::Anonymous);
        };
        let path = path.clone();
        let at = path.clone();
        let unreadable = |source| FetchError::AuthFile { path, source };
        let size = tokio::fs::metadata(&at).await.map(|found| found.len());
        if *size.as_ref().unwrap_or(&0) > MAX_AUTH {
            return Err(FetchError::AuthSize { path: at });
        }
        let text = tokio::fs::read_to_string(&at).await.map_err(unreadable)?;
        credentials(&text, registry).map_err(|source| FetchError::Auth { path: at, source })
    }
}

fn client(insecure: bool) -> Result<Client, FetchError> {
    let config = ClientConfig {
        protocol: if insecure {
            ClientProtocol::Http
        } else {
            ClientProtocol::Https
        },
        connect_timeout: Some(CONNECT_TIMEOUT),
        read_timeout: Some(READ_TIMEOUT),
        user_agent: concat!("leeward-control/", env!("CARGO_PKG_VERSION")),
        platform_resolver: Some(Box::new(wasm)),
        ..ClientConfig::default()
    };
    Client::try_from(config).map_err(FetchError::Client)
}

/// Of an index, the image for WebAssembly; or the only one.
fn wasm(images: &[ImageIndexEntry]) -> Option<String> {
    let is_wasm = |entry: &&ImageIndexEntry| {
        let platform = entry.platform.as_ref();
        platform.is_some_and(|platform| platform.architecture.to_string() == "wasm")
    };
    let only = match images {
        [one] => Some(one),
        _ => None,
    };
    images
        .iter()
        .find(is_wasm)
        .or(only)
        .map(|entry| entry.digest.clone())
}
