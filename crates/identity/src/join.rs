//! The first certificate of one that has none: how it knows the control plane, and where what it gets is kept.

use crate::bundle::Bundle;
use crate::files::{JOINING_KEY, open_to_others};
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

    /// The key pair to join with: the one that an earlier try has kept in the directory, or else a new one, which is kept
    /// there. The answer to the earlier try may have got lost after it had used the token up; for the same key the control
    /// plane answers again. Blocks.
    ///
    /// # Errors
    ///
    /// If it can't be made, or not be kept.
    pub fn key(dir: &Path, id: &SpiffeId) -> Result<NewKey, IdentityError> {
        let path = dir.join(JOINING_KEY);
        let is_ours = matches!(open_to_others(&path), Ok(None));
        if let Ok(pem) = std::fs::read_to_string(&path)
            && is_ours
            // In use already: what was to remove it was cut short.
            && !std::fs::read_to_string(dir.join("key.pem")).is_ok_and(|used| used == pem)
            && let Ok(key) = NewKey::from_pem(&pem, id)
        {
            return Ok(key);
        }
        let key = NewKey::generate(id).map_err(|error| IdentityError::Key(error.to_string()))?;
        crate::files::install(dir, &[(JOINING_KEY, key.pem().as_bytes(), 0o600)]).map_err(|source| {
            let dir = dir.into();
            IdentityError::Write { dir, source }
        })?;
        Ok(key)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::identity::Identity;
    use crate::request::CheckedRequest;
    use crate::scratch::Scratch;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[test]
    fn the_key_stays_until_there_is_a_certificate_of_it() {
        let scratch = Scratch::new();
        let dir = scratch.dir("id");
        let id = SpiffeId::proxy("td", "a", "a1").unwrap();
        let first = Joining::key(&dir, &id).unwrap();
        let again = Joining::key(&dir, &id).unwrap();
        assert_eq!(first.pem(), again.pem());

        // One that others could read, or that is in use, is not asked for again.
        let path = dir.join(JOINING_KEY);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let second = Joining::key(&dir, &id).unwrap();
        assert_ne!(second.pem(), first.pem());
        assert_eq!(open_to_others(&path).unwrap(), None);
        std::fs::copy(&path, dir.join("key.pem")).unwrap();
        let third = Joining::key(&dir, &id).unwrap();
        assert_ne!(third.pem(), second.pem());
        std::fs::write(&path, "no key").unwrap();
        assert_ne!(Joining::key(&dir, &id).unwrap().pem(), third.pem());
    }

    #[test]
    fn the_key_goes_with_what_was_issued_and_does_not_hold_it_up() {
        let scratch = Scratch::new();
        let dir = scratch.dir("id");
        let id = SpiffeId::proxy("td", "a", "a1").unwrap();
        let authority = Authority::create(&scratch.dir("ca"), "td").unwrap();
        let token = JoinToken::generate("td", authority.fingerprint()).unwrap();
        let joining = Joining::new(&token, None).unwrap();
        let key = Joining::key(&dir, &id).unwrap();
        let request = CheckedRequest::parse(key.request(), &id).unwrap();
        let signed = authority.sign(&request, &id, Duration::from_secs(3600)).unwrap();
        let issued = Issued {
            chain: signed.chain,
            bundle: authority.roots().clone(),
        };
        let path = dir.join(JOINING_KEY);
        assert!(path.exists());
        joining.keep(&dir, &id, &key, &issued).unwrap();
        assert!(!path.exists());

        // One that was left behind goes with the next that is issued.
        std::fs::write(&path, "left behind").unwrap();
        let identity = Identity::load(&dir).unwrap();
        identity.install(&key, &issued).unwrap();
        assert!(!path.exists());

        // What can't be removed, as a directory can't, is no reason to do without a certificate.
        std::fs::create_dir(&path).unwrap();
        joining.keep(&dir, &id, &key, &issued).unwrap();
        assert!(path.exists());
        Identity::load(&dir).unwrap().ready_now().unwrap();
    }
}
