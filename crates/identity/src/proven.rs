//! Chains that were verified: a peer that comes again with the same ones is known.

use crate::validity::Validity;
use aws_lc_rs::digest::{Context, SHA256, SHA256_OUTPUT_LEN};
use rustls::pki_types::{CertificateDer, UnixTime};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

/// Chains that one verifier has found to be good, and when each of their certificates is.
///
/// Whether a chain leads to a root, and is of whom it should be, depends on its bytes, on the roots, on the time, and on what
/// is revoked. The roots are those of the verifier, which ends when there are others; what was found by one list of
/// revocations is forgotten when there is another. So for as long as all of its certificates are good, a chain that was
/// verified needs no other look at its signatures, which are most of what a handshake costs. That the peer has the key is
/// still to be shown in each.
#[derive(Debug, Default)]
pub(crate) struct Proven {
    // Poison is harmless: an entry is there as a whole, or not at all.
    chains: Mutex<Chains>,
}

#[derive(Debug, Default)]
struct Chains {
    /// The list of revocations by which all of them were found to be good.
    generation: u64,
    good: HashMap<[u8; SHA256_OUTPUT_LEN], Validity>,
}

/// What stands for a chain: the digest of its certificates, one after the other, each with its length.
pub(crate) struct Chain<'a> {
    leaf: &'a CertificateDer<'a>,
    above: &'a [CertificateDer<'a>],
    digest: [u8; SHA256_OUTPUT_LEN],
}

/// Chains that are kept; when there are as many, all are forgotten, and verified once more. Peers have one or two each at
/// a time.
const MAX_CHAINS: usize = 4096;

impl Proven {
    /// Whether this chain was found to be good by this list of revocations, and no certificate of it has ended.
    pub(crate) fn has(&self, chain: &Chain<'_>, now: UnixTime, generation: u64) -> bool {
        let now = UNIX_EPOCH.checked_add(Duration::from_secs(now.as_secs()));
        let chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        if chains.generation != generation {
            return false;
        }
        let known = chains.good.get(&chain.digest);
        known.zip(now).is_some_and(|(known, now)| known.holds(now))
    }

    /// It is good by this list.
    pub(crate) fn add(&self, chain: &Chain<'_>, generation: u64) {
        let Some(validity) = chain.validity() else {
            return;
        };
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        if chains.generation > generation {
            // A newer list has come meanwhile, which has not seen it.
            return;
        }
        if chains.generation < generation || chains.good.len() >= MAX_CHAINS {
            chains.good.clear();
        }
        chains.generation = generation;
        chains.good.insert(chain.digest, validity);
    }
}

impl<'a> Chain<'a> {
    /// What a peer has shown.
    pub(crate) fn new(leaf: &'a CertificateDer<'a>, above: &'a [CertificateDer<'a>]) -> Self {
        let mut context = Context::new(&SHA256);
        for cert in std::iter::once(leaf).chain(above) {
            context.update(&(cert.len() as u64).to_be_bytes());
            context.update(cert);
        }
        let mut digest = [0; SHA256_OUTPUT_LEN];
        digest.copy_from_slice(context.finish().as_ref());
        Self { leaf, above, digest }
    }

    /// When all certificates are good that were shown, those too that lead nowhere.
    fn validity(&self) -> Option<Validity> {
        let first = Validity::read(self.leaf)?;
        self.above.iter().try_fold(first, |so_far, cert| {
            let next = Validity::read(cert)?;
            Some(Validity {
                not_before: so_far.not_before.max(next.not_before),
                not_after: so_far.not_after.min(next.not_after),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::identity::Identity;
    use crate::scratch::{Scratch, chain_in};
    use crate::spiffe::SpiffeId;
    use crate::validity::wall;
    use crate::verify::{Clients, Expect, Roots, Servers};
    use rustls::client::danger::ServerCertVerifier;
    use rustls::crypto::aws_lc_rs;
    use rustls::pki_types::ServerName;
    use rustls::server::danger::ClientCertVerifier;
    use std::time::SystemTime;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A chain of a proxy, an intermediate above it, and who verifies it by its root.
    fn issued(scratch: &Scratch, root: &str) -> (Vec<CertificateDer<'static>>, Clients) {
        let dir = |name: &str| scratch.dir(&format!("{root}-{name}"));
        let authority = Authority::create(&dir("root"), "one").unwrap();
        let intermediate = authority.intermediate(24 * HOUR, &dir("ca")).unwrap();
        let id = SpiffeId::proxy("one", "a", "a1").unwrap();
        intermediate.issue(&id, HOUR, &dir("a1")).unwrap();
        let chain = chain_in(&dir("a1"));
        assert_eq!(chain.len(), 2);
        let roots = Identity::load(dir("a1")).unwrap().bundle().store().unwrap();
        let provider = std::sync::Arc::new(aws_lc_rs::default_provider());
        let domain = Expect::Domain("one".into());
        let clients = Clients::new(roots.into(), domain, std::sync::Arc::default(), provider).unwrap();
        (chain, clients)
    }

    fn unix(at: SystemTime) -> UnixTime {
        UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap())
    }

    fn verify(clients: &Clients, chain: &[CertificateDer<'_>], at: SystemTime) -> Result<(), String> {
        let verified = clients.verify_client_cert(&chain[0], &chain[1..], unix(at));
        verified.map(|_| ()).map_err(|error| error.to_string())
    }

    fn knows(clients: &Clients, chain: &[CertificateDer<'_>], at: SystemTime) -> bool {
        clients
            .proven()
            .has(&Chain::new(&chain[0], &chain[1..]), unix(at), 0)
    }

    #[test]
    fn a_chain_that_was_verified_is_good_for_no_longer_than_its_certificates() {
        let scratch = Scratch::new();
        let (chain, clients) = issued(&scratch, "one");
        let now = wall();
        assert!(!knows(&clients, &chain, now));
        assert_eq!(verify(&clients, &chain, now), Ok(()));
        assert!(knows(&clients, &chain, now), "it is known from then on");
        assert_eq!(verify(&clients, &chain, now), Ok(()));
        let error = verify(&clients, &chain, now + 2 * HOUR).unwrap_err();
        assert!(error.contains("expired"), "{error}");
        let error = verify(&clients, &chain, now - 2 * HOUR).unwrap_err();
        assert!(error.contains("not valid yet"), "{error}");
    }

    #[test]
    fn the_first_of_a_chain_to_end_ends_it() {
        let scratch = Scratch::new();
        let (chain, _) = issued(&scratch, "one");
        let of = |cert| Chain::new(cert, &[]).validity().unwrap();
        let (leaf, above) = (of(&chain[0]), of(&chain[1]));
        assert!(leaf.not_after < above.not_after);
        for (first, rest) in [(0, 1), (1, 0)] {
            let both = Chain::new(&chain[first], std::slice::from_ref(&chain[rest]));
            let both = both.validity().unwrap();
            assert_eq!(both.not_after, leaf.not_after);
            assert_eq!(both.not_before, leaf.not_before.max(above.not_before));
        }
    }

    #[test]
    fn what_was_never_verified_is_not_known() {
        let scratch = Scratch::new();
        let (chain, clients) = issued(&scratch, "one");
        let (others, of_others) = issued(&scratch, "two");
        let now = wall();
        verify(&clients, &chain, now).unwrap();
        // Another root, the same names.
        assert!(verify(&clients, &others, now).is_err() && !knows(&clients, &others, now));
        assert!(verify(&of_others, &chain, now).is_err() && !knows(&of_others, &chain, now));
        // Any other byte, any other order, more or fewer of them.
        for at in (0..chain[0].len()).step_by(7) {
            let mut bytes = chain[0].to_vec();
            bytes[at] ^= 1;
            let forged = [CertificateDer::from(bytes), chain[1].clone()];
            assert!(!knows(&clients, &forged, now), "byte {at}");
            assert!(verify(&clients, &forged, now).is_err(), "byte {at}");
        }
        let swapped = [chain[1].clone(), chain[0].clone()];
        assert!(!knows(&clients, &swapped, now) && verify(&clients, &swapped, now).is_err());
        assert!(!knows(&clients, &chain[..1], now) && verify(&clients, &chain[..1], now).is_err());
        let joined = CertificateDer::from([&chain[0][..], &chain[1][..]].concat());
        assert!(!knows(&clients, &[joined], now));
        assert_eq!(clients.proven().chains.lock().unwrap().good.len(), 1);
    }

    #[test]
    fn what_was_found_to_be_good_is_not_looked_at_again() {
        let scratch = Scratch::new();
        let (_, clients) = issued(&scratch, "one");
        let (others, _) = issued(&scratch, "two");
        let now = wall();
        assert!(
            verify(&clients, &others, now).is_err(),
            "it is refused if it is looked at"
        );
        clients.proven().add(&Chain::new(&others[0], &others[1..]), 0);
        assert_eq!(verify(&clients, &others, now), Ok(()));
    }

    #[test]
    fn who_is_known_as_one_is_not_known_as_another() {
        let scratch = Scratch::new();
        let (chain, _) = issued(&scratch, "one");
        let roots = Identity::load(scratch.dir("one-a1")).unwrap().bundle();
        let expecting = |name: &str| Servers {
            roots: Roots::Known(
                roots.store().unwrap().into(),
                Proven::default(),
                std::sync::Arc::default(),
            ),
            expect: Expect::Exactly(SpiffeId::proxy("one", "a", name).unwrap()),
            provider: std::sync::Arc::new(aws_lc_rs::default_provider()),
        };
        let verify = |servers: &Servers| {
            let name = ServerName::try_from("any").unwrap();
            let verified = servers.verify_server_cert(&chain[0], &chain[1..], &name, &[], unix(wall()));
            verified.map(|_| ()).map_err(|error| error.to_string())
        };
        let (a1, a2) = (expecting("a1"), expecting("a2"));
        for _ in 0..2 {
            assert_eq!(verify(&a1), Ok(()));
            let error = verify(&a2).unwrap_err();
            assert!(error.contains("spiffe://one/zone/a/proxy/a2"), "{error}");
        }
    }

    #[test]
    fn no_more_chains_are_kept_than_there_is_room_for() {
        let scratch = Scratch::new();
        let (chain, _) = issued(&scratch, "one");
        let proven = Proven::default();
        for n in 0..=MAX_CHAINS {
            let mut chain = Chain::new(&chain[0], &chain[1..]);
            chain.digest[..8].copy_from_slice(&(n as u64).to_be_bytes());
            proven.add(&chain, 0);
            assert!(proven.has(&chain, unix(wall()), 0));
        }
        assert_eq!(proven.chains.lock().unwrap().good.len(), 1);
    }

    #[test]
    fn what_was_found_by_another_list_of_revocations_is_not_known() {
        let scratch = Scratch::new();
        let (chain, _) = issued(&scratch, "one");
        let chain = Chain::new(&chain[0], &chain[1..]);
        let (proven, now) = (Proven::default(), unix(wall()));
        proven.add(&chain, 1);
        assert!(proven.has(&chain, now, 1));
        assert!(!proven.has(&chain, now, 0) && !proven.has(&chain, now, 2));
        proven.add(&chain, 2);
        assert!(proven.has(&chain, now, 2) && !proven.has(&chain, now, 1));
        // Whoever was slow says nothing of the newer list, and takes nothing away.
        proven.add(&chain, 1);
        assert!(proven.has(&chain, now, 2) && !proven.has(&chain, now, 1));
    }
}
