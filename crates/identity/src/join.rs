//! The first certificate of one that has none: how it knows the control plane, and where what it gets is kept.

use crate::bundle::Bundle;
use crate::identity::{IdentityError, Issued, install};
use crate::request::NewKey;
use crate::spiffe::{InvalidSpiffeId, SpiffeId};
use crate::tls::JOIN_ALPN;
use crate::token::JoinToken;
use crate::verify::{Anchor, Expect, Roots, Servers};
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs;
use std::path::Path;
use std::sync::Arc;

/// For one that shows no certificate, and knows the control plane by these roots.
pub(crate) fn guest_config(
    roots: Bundle,
    control: SpiffeId,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, rustls::Error> {
    config(Anchor::Bundle(roots), control, alpn)
}

fn config(anchor: Anchor, control: SpiffeId, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let servers = Servers {
        roots: Roots::Joining(anchor),
        expect: Expect::Exactly(control),
        provider: Arc::clone(&provider),
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(servers))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// How the control plane is known by one that joins: by roots that it has in a file, or else by the root in its token.
#[derive(Clone, Debug)]
pub struct Joining {
    anchor: Anchor,
    control: SpiffeId,
}

impl Joining {
    /// With a token, and a trust bundle if there is one, which goes before the token's root.
    ///
    /// # Errors
    ///
    /// If the token's trust domain can't stand in an id.
    pub fn new(token: &JoinToken, bundle: Option<Bundle>) -> Result<Self, InvalidSpiffeId> {
        Ok(Self {
            anchor: bundle.map_or_else(|| Anchor::Pin(token.root().to_owned()), Anchor::Bundle),
            control: SpiffeId::control(token.domain())?,
        })
    }

    pub(crate) fn client_config(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        config(self.anchor.clone(), self.control.clone(), &[JOIN_ALPN])
    }

    /// Keeps what was issued to `id` in a directory, all of it or nothing, once it has been checked: that it goes with the
    /// key, and that the roots that came with it are those of the one who was asked. Blocks.
    ///
    /// # Errors
    ///
    /// If it can't be used, or not be written.
    pub fn keep(
        &self,
        dir: &Path,
        id: &SpiffeId,
        key: &NewKey,
        issued: &Issued,
    ) -> Result<(), IdentityError> {
        let is_known = match &self.anchor {
            Anchor::Bundle(bundle) => bundle
                .roots()
                .iter()
                .any(|root| issued.bundle.has(&root.fingerprint)),
            Anchor::Pin(pin) => issued.bundle.has(pin),
        };
        if !is_known {
            let text = "the roots that came with it are not those by which the control plane is known";
            return Err(IdentityError::Issued(rustls::Error::General(text.to_owned())));
        }
        install(dir, id, key, issued)
    }
}
