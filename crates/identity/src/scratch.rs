//! Directories of tests.

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A directory that goes when the test ends.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("leeward-identity-unit-{}-{n}", std::process::id())))
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// The chain of whom a certificate was issued to in a directory.
pub(crate) fn chain_in(dir: &Path) -> Vec<CertificateDer<'static>> {
    let chain = CertificateDer::pem_file_iter(dir.join("cert.pem")).unwrap();
    chain.map(Result::unwrap).collect()
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
