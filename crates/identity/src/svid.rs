//! A certificate with its key, of a workload of this node: kept in memory, and handed to the process that it is for.

use crate::bundle::Bundle;
use crate::identity::{IdentityError, Issued};
use crate::request::NewKey;
use crate::spiffe::SpiffeId;
use crate::validity::{Validity, wall};
use crate::verify::PeerError;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A certificate with its key. What it shows of itself is never the key.
#[derive(Debug)]
pub struct Svid {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    validity: Validity,
    root: Option<String>,
}

impl Svid {
    /// What was issued to `id` for a key, once it has been checked: that it goes with the key, is for this id, and leads to one
    /// of the roots that this node trusts.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Issued`] if it doesn't.
    pub fn new(id: &SpiffeId, key: &NewKey, issued: &Issued, roots: &Bundle) -> Result<Self, IdentityError> {
        issued.check(id, key).map_err(IdentityError::Issued)?;
        roots
            .verify(&issued.chain, wall())
            .map_err(IdentityError::Issued)?;
        let validity = issued.chain.first().and_then(Validity::read);
        let unreadable = || IdentityError::Id {
            path: id.as_str().into(),
            source: PeerError::Unreadable,
        };
        Ok(Self {
            id: id.clone(),
            chain: issued.chain.clone(),
            key: key.der(),
            validity: validity.ok_or_else(unreadable)?,
            root: roots.root_of(&issued.chain).map(|root| root.fingerprint.clone()),
        })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The certificate and what is above it, without the root: DER, one after the other.
    pub fn chain(&self) -> Vec<u8> {
        self.chain.iter().flat_map(|cert| cert.iter().copied()).collect()
    }

    /// The key: PKCS #8, DER.
    pub fn key(&self) -> &[u8] {
        self.key.secret_der()
    }

    /// From when to when it is good.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// The fingerprint of the root that it leads to.
    pub fn root(&self) -> Option<&str> {
        self.root.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::identity::{Given, Identity};
    use crate::request::CheckedRequest;
    use crate::scratch::Scratch;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::time::Duration;

    const HOUR: Duration = Duration::from_secs(3600);

    fn issued(authority: &Authority, id: &SpiffeId) -> (NewKey, Issued) {
        let key = NewKey::generate(id).unwrap();
        let request = CheckedRequest::parse(key.request(), id).unwrap();
        let signed = authority.sign(&request, id, HOUR).unwrap();
        let bundle = authority.roots().clone();
        let chain = signed.chain;
        (key, Issued { chain, bundle })
    }

    #[test]
    fn what_was_issued_is_checked_before_anybody_gets_it() {
        let scratch = Scratch::new();
        let root = Authority::create(&scratch.dir("root"), "td").unwrap();
        let ca = root.intermediate(24 * HOUR, &scratch.dir("ca")).unwrap();
        let id = SpiffeId::workload("td", "a", "pay").unwrap();
        let (key, good) = issued(&ca, &id);
        let svid = Svid::new(&id, &key, &good, root.roots()).unwrap();
        assert_eq!((svid.id(), svid.root()), (&id, Some(root.fingerprint())));
        assert!(svid.validity().holds(wall()));
        let shown = format!("{svid:?}");
        assert!(shown.contains("elided"), "{shown}");

        // Another key, another id, a root that this node doesn't trust.
        let (other_key, _) = issued(&ca, &id);
        assert!(Svid::new(&id, &other_key, &good, root.roots()).is_err());
        let other_id = SpiffeId::workload("td", "a", "shop").unwrap();
        let error = Svid::new(&other_id, &key, &good, root.roots()).unwrap_err();
        assert!(matches!(error, IdentityError::Issued(_)), "{error:?}");
        let stranger = Authority::create(&scratch.dir("stranger"), "td").unwrap();
        assert!(Svid::new(&id, &key, &good, stranger.roots()).is_err());
        let (key, strange) = issued(&stranger, &id);
        assert!(Svid::new(&id, &key, &strange, root.roots()).is_err());
    }

    #[test]
    fn what_goes_over_the_socket_can_be_read_and_written_to_files() {
        let scratch = Scratch::new();
        let root = Authority::create(&scratch.dir("root"), "td").unwrap();
        let ca = root.intermediate(24 * HOUR, &scratch.dir("ca")).unwrap();
        let id = SpiffeId::workload("td", "a", "pay").unwrap();
        let (key, good) = issued(&ca, &id);
        let svid = Svid::new(&id, &key, &good, root.roots()).unwrap();
        let roots: Vec<u8> = root
            .roots()
            .roots()
            .iter()
            .flat_map(|r| r.cert.to_vec())
            .collect();
        let given = Given::parse(Path::new("socket"), &svid.chain(), svid.key(), &roots).unwrap();
        assert_eq!(given.chain.len(), 2);
        let dir = scratch.dir("out");
        given.write(&dir).unwrap();
        let identity = Identity::load(&dir).unwrap();
        assert_eq!(*identity.id(), id);
        assert_eq!(identity.facts().validity, svid.validity());
        let mode = std::fs::metadata(dir.join("key.pem"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
