//! TLS to servers that are no part of the mesh, by the certificates that the system trusts.

mod get;

pub use get::{GetError, get};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use std::io;
use std::sync::{Arc, OnceLock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Speaks TLS on a connection to a host: HTTP/1.1 in it.
///
/// # Errors
///
/// If the host is none, or its certificate isn't one that the system trusts for it.
pub async fn secure<T: AsyncRead + AsyncWrite + Unpin>(io: T, host: &str) -> io::Result<TlsStream<T>> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    TlsConnector::from(config().await?).connect(name, io).await
}

/// Read once: nobody expects a process to take up other roots while it runs.
async fn config() -> io::Result<Arc<ClientConfig>> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(Arc::clone(config));
    }
    let made = tokio::task::spawn_blocking(make)
        .await
        .map_err(io::Error::other)??;
    Ok(Arc::clone(CONFIG.get_or_init(|| made)))
}

fn make() -> io::Result<Arc<ClientConfig>> {
    crate::tls::install_provider();
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the system has no trusted certificates",
        ));
    }
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
