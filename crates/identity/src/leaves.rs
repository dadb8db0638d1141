//! What the peers' own certificates say. One that is shown again is not read again.

use crate::spiffe::SpiffeId;
use crate::validity::Validity;
use crate::verify::{PeerError, id_of, parse};
use rustls::pki_types::CertificateDer;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Whose certificates are, and from when to when they are good, by their bytes, on which alone that depends. A peer shows one
/// certificate for all of the connections that it makes in its life, and to read it costs more than to look it up.
///
/// This says what stands there, not that it is true: whoever asks has verified it.
#[derive(Debug, Default)]
pub(crate) struct Leaves {
    // Poison is harmless: an entry is there as a whole, or not at all.
    read: Mutex<HashMap<Vec<u8>, (SpiffeId, Validity)>>,
}

/// Certificates that are kept; when there are as many, all are forgotten, and read once more.
const MAX_LEAVES: usize = 4096;

impl Leaves {
    /// Whose certificates a peer has shown, and from when to when the first of them is good.
    pub(crate) fn who(&self, certs: &[CertificateDer<'_>]) -> Result<(SpiffeId, Validity), PeerError> {
        let leaf = certs.first().ok_or(PeerError::None)?;
        if let Some(known) = self.read().get(&leaf[..]) {
            return Ok(known.clone());
        }
        let cert = parse(leaf)?;
        let who = (id_of(&cert)?, Validity::of(&cert).ok_or(PeerError::Unreadable)?);
        let mut read = self.read();
        if read.len() >= MAX_LEAVES {
            read.clear();
        }
        read.insert(leaf.to_vec(), who.clone());
        Ok(who)
    }

    fn read(&self) -> MutexGuard<'_, HashMap<Vec<u8>, (SpiffeId, Validity)>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::scratch::{Scratch, chain_in};
    use std::time::Duration;

    #[test]
    fn a_certificate_is_read_once_and_says_the_same_ever_after() {
        let scratch = Scratch::new();
        let authority = Authority::create(&scratch.dir("ca"), "td").unwrap();
        let leaves = Leaves::default();
        let mut shown = Vec::new();
        for (name, life) in [("a1", 600), ("a1", 7200), ("a2", 600)] {
            let (id, life) = (
                SpiffeId::proxy("td", "a", name).unwrap(),
                Duration::from_secs(life),
            );
            let dir = scratch.dir(&format!("{name}-{}", life.as_secs()));
            authority.issue(&id, life, &dir).unwrap();
            let chain = chain_in(&dir);
            let says = Validity::read(&chain[0]).unwrap();
            shown.push((chain, id, says));
        }
        for _ in 0..2 {
            for (chain, id, says) in &shown {
                assert_eq!(leaves.who(chain), Ok((id.clone(), *says)));
            }
            assert_eq!(leaves.read().len(), shown.len());
        }
        assert_eq!(leaves.who(&[]), Err(PeerError::None));
        let garbled = CertificateDer::from(vec![0x30; 9]);
        assert_eq!(leaves.who(&[garbled]), Err(PeerError::Unreadable));
        assert_eq!(leaves.read().len(), shown.len());
    }

    #[test]
    fn no_more_are_kept_than_may_be() {
        let scratch = Scratch::new();
        let authority = Authority::create(&scratch.dir("ca"), "td").unwrap();
        let (id, dir) = (SpiffeId::proxy("td", "a", "a1").unwrap(), scratch.dir("a1"));
        authority.issue(&id, Duration::from_secs(600), &dir).unwrap();
        let chain = chain_in(&dir);
        let leaves = Leaves::default();
        let who = leaves.who(&chain).unwrap();
        leaves.read().clear();
        for n in 0..MAX_LEAVES {
            leaves.read().insert(n.to_be_bytes().to_vec(), who.clone());
        }
        assert_eq!(leaves.who(&chain).as_ref(), Ok(&who));
        assert_eq!(leaves.read().len(), 1);
    }
}
