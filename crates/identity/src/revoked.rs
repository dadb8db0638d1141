//! Certificates that are refused before they end, and the open connections that are cut for that.
//!
//! A revocation names an id and a time: certificates of the id that begin before the time are refused, others are not. So
//! whoever has a key that was stolen is out, and the node itself is in again with the next certificate that it is given. An
//! authority of ours begins certificates a little before it issues them ([`crate::authority`]), but never before a revocation
//! of their id.

use crate::bundle::hex;
use crate::spiffe::SpiffeId;
use crate::validity::Validity;
use arc_swap::ArcSwap;
use rustls::AlertDescription;
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Revocations that a list may have: what a control plane keeps, 10,000, and what several may write at once beyond that.
pub const MAX_REVOKED: usize = 12_000;

/// A list of revocations. The same ones have the same hash everywhere.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Revoked {
    /// By id, the time before which certificates of it may not begin.
    since: HashMap<SpiffeId, SystemTime>,
    hash: String,
}

/// A list has more revocations than may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("there are {0} revocations in it; want at most {MAX_REVOKED}")]
pub struct TooManyRevoked(pub usize);

impl Default for Revoked {
    fn default() -> Self {
        Self::of(HashMap::new())
    }
}

impl Revoked {
    /// A list of ids, each with the time before which its certificates may not begin; of an id that stands there twice, the
    /// later. Times are whole seconds, as those of certificates are; a part of one counts as the whole.
    ///
    /// # Errors
    ///
    /// If there are too many.
    pub fn new(all: impl IntoIterator<Item = (SpiffeId, SystemTime)>) -> Result<Self, TooManyRevoked> {
        let mut since: HashMap<SpiffeId, SystemTime> = HashMap::new();
        for (id, at) in all {
            let at = whole(at);
            let known = since.entry(id).or_insert(at);
            *known = at.max(*known);
        }
        if since.len() > MAX_REVOKED {
            return Err(TooManyRevoked(since.len()));
        }
        Ok(Self::of(since))
    }

    fn of(since: HashMap<SpiffeId, SystemTime>) -> Self {
        let mut lines: Vec<String> = since
            .iter()
            .map(|(id, at)| format!("{id} {}\n", seconds(*at)))
            .collect();
        lines.sort_unstable();
        let mut digest = Sha256::new();
        for line in &lines {
            digest.update(line.as_bytes());
        }
        let hash = hex(&digest.finalize());
        Self { since, hash }
    }

    /// The time before which certificates of an id may not begin, if there is one.
    pub fn since(&self, id: &SpiffeId) -> Option<SystemTime> {
        self.since.get(id).copied()
    }

    /// What distinguishes this list from others, in hexadecimal digits.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// How many revocations there are.
    pub fn len(&self) -> usize {
        self.since.len()
    }

    /// Whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.since.is_empty()
    }

    /// The ids and times, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&SpiffeId, SystemTime)> {
        self.since.iter().map(|(id, at)| (id, *at))
    }

    /// When the certificate of an id was revoked that begins at a time, if it was.
    pub fn refuses(&self, id: &SpiffeId, begins: SystemTime) -> Option<SystemTime> {
        self.since(id).filter(|since| begins < *since)
    }
}

/// A time in whole seconds, rounded up: a certificate that was issued in the same second as its id was revoked is refused.
fn whole(at: SystemTime) -> SystemTime {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let up = u64::from(since.subsec_nanos() > 0);
    UNIX_EPOCH + Duration::from_secs(since.as_secs().saturating_add(up))
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What has been done about revocations so far.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RevocationCounts {
    /// Revocations in force.
    pub listed: usize,
    /// Handshakes in which a certificate was refused for one.
    pub refused: u64,
    /// Open connections that were cut for one.
    pub cut: u64,
}

/// What verifiers and open connections of one identity share: the list in force.
#[derive(Debug, Default)]
pub(crate) struct Revocations {
    listed: ArcSwap<Listed>,
    // Poison is harmless: ties are added and removed whole.
    ties: Mutex<Ties>,
    refused: AtomicU64,
    cut: AtomicU64,
}

/// One list that is or was in force.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    /// Which one, counted from the start. What was verified by another is to be verified anew.
    pub(crate) generation: u64,
    /// `None` until somebody has said it.
    revoked: Option<Arc<Revoked>>,
}

/// The open connections.
#[derive(Debug, Default)]
struct Ties {
    all: Vec<Weak<Held>>,
    /// How many there may be before those that are gone are forgotten.
    tidy_at: usize,
}

/// Least number of connections from which on those that are gone are looked for.
const TIDY: usize = 64;

impl Listed {
    /// When a certificate of an id was revoked that begins at a time, if it was.
    pub(crate) fn refuses(&self, id: &SpiffeId, begins: SystemTime) -> Option<SystemTime> {
        self.revoked.as_ref()?.refuses(id, begins)
    }

    /// The same, of the certificate itself, which has this id. One that can't be read is refused.
    pub(crate) fn check(&self, id: &SpiffeId, leaf: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        // Nearly always nobody's certificate is revoked, and no other need be read again.
        let Some(since) = self.revoked.as_ref().and_then(|revoked| revoked.since(id)) else {
            return Ok(());
        };
        if Validity::read(leaf).is_some_and(|validity| validity.not_before >= since) {
            return Ok(());
        }
        // The peer hears of it as the alert certificate_revoked.
        Err(rustls::CertificateError::Revoked.into())
    }
}

impl Revocations {
    pub(crate) fn listed(&self) -> Arc<Listed> {
        self.listed.load_full()
    }

    pub(crate) fn revoked(&self) -> Option<Arc<Revoked>> {
        self.listed.load().revoked.clone()
    }

    /// Puts a list in force, in place of the one that was. True if it is another.
    pub(crate) fn replace(&self, revoked: Revoked) -> bool {
        // Held so that of two lists that come at once none gets the other's number.
        let _turn = self.ties();
        let known = self.listed.load();
        if known.revoked.as_deref() == Some(&revoked) {
            return false;
        }
        self.listed.store(Arc::new(Listed {
            generation: known.generation + 1,
            revoked: Some(Arc::new(revoked)),
        }));
        true
    }

    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Cuts the open connections of those who are refused now, and says how many they were.
    pub(crate) fn cut(&self) -> usize {
        let ties = self.ties();
        let listed = self.listed();
        let refused = |held: &Arc<Held>| listed.refuses(&held.id, held.validity.not_before).is_some();
        let held = ties.all.iter().filter_map(Weak::upgrade);
        let cut = held.filter(refused).filter(|held| held.cut()).count();
        self.cut.fetch_add(cut as u64, Ordering::Relaxed);
        cut
    }

    /// Ties a connection that has just been made to its peer's certificate. It is to be used for so long.
    pub(crate) fn tie(&self, id: SpiffeId, validity: Validity, lasts: Duration) -> Tie {
        let held = Arc::new(Held {
            id,
            validity,
            lasts,
            is_cut: AtomicBool::new(false),
            waker: Mutex::default(),
        });
        let mut ties = self.ties();
        if ties.all.len() >= ties.tidy_at {
            ties.all.retain(|held| held.strong_count() > 0);
            ties.tidy_at = TIDY.max(2 * ties.all.len());
        }
        ties.all.push(Arc::downgrade(&held));
        drop(ties);
        // A list that came since its handshake has not seen it.
        if self
            .listed
            .load()
            .refuses(&held.id, held.validity.not_before)
            .is_some()
            && held.cut()
        {
            self.cut.fetch_add(1, Ordering::Relaxed);
        }
        Tie(held)
    }

    pub(crate) fn counts(&self) -> RevocationCounts {
        RevocationCounts {
            listed: self.revoked().map_or(0, |revoked| revoked.len()),
            refused: self.refused.load(Ordering::Relaxed),
            cut: self.cut.load(Ordering::Relaxed),
        }
    }

    fn ties(&self) -> MutexGuard<'_, Ties> {
        self.ties.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What ties an open connection to its peer's certificate: cut when that is revoked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tie(Arc<Held>);

#[derive(Debug)]
struct Held {
    id: SpiffeId,
    validity: Validity,
    lasts: Duration,
    is_cut: AtomicBool,
    // Poison is harmless: it is replaced whole.
    waker: Mutex<Option<Waker>>,
}

impl Held {
    /// True for the first who does.
    fn cut(&self) -> bool {
        let is_first = !self.is_cut.swap(true, Ordering::AcqRel);
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
        is_first
    }
}

impl Tie {
    /// The peer's verified id.
    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// From when to when the peer's certificate is good.
    pub fn validity(&self) -> Validity {
        self.0.validity
    }

    /// For how long from when the connection was made the certificates of both sides are good: it is to be used for no longer.
    /// The end of a certificate itself doesn't cut it.
    pub fn lasts(&self) -> Duration {
        self.0.lasts
    }

    /// Whether it is cut.
    pub fn is_cut(&self) -> bool {
        self.0.is_cut.load(Ordering::Acquire)
    }

    /// Waits until it is cut. One task at a time is told.
    ///
    /// Cancel-safe.
    pub async fn cut(&self) {
        poll_fn(|cx| self.poll_cut(cx)).await;
    }

    fn poll_cut(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_cut() {
            return Poll::Ready(());
        }
        let mut waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner);
        // The task of a connection stays the same for nearly all of its life.
        if !waker.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        drop(waker);
        // Whoever has cut it meanwhile may have found nobody to wake.
        if self.is_cut() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

/// A connection that breaks off when its tie is cut, whatever is under way on it.
#[derive(Debug)]
pub struct Tied<T> {
    io: T,
    tie: Tie,
    /// Something has come from the peer.
    heard: bool,
}

impl<T> Tied<T> {
    /// Ties a connection.
    pub const fn new(io: T, tie: Tie) -> Self {
        Self {
            io,
            tie,
            heard: false,
        }
    }

    fn check(&self) -> io::Result<()> {
        if !self.tie.is_cut() {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::ConnectionAborted,
            "the peer's certificate was revoked",
        ))
    }
}

/// Gives an error by which the peer refuses this side's certificate a kind of its own, [`io::ErrorKind::PermissionDenied`].
///
/// By TLS 1.3 a client's handshake is over before the server has looked at the client's certificate (RFC 8446, section 2), so
/// that the refusal comes when a request may be on its way, and before anything else. Libraries for HTTP keep of an error the
/// kind at most.
fn refusal(error: io::Error) -> io::Error {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let refused = matches!(
        tls,
        Some(rustls::Error::AlertReceived(
            AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::CertificateRequired
                | AlertDescription::DecryptError
        ))
    );
    if refused {
        io::Error::new(io::ErrorKind::PermissionDenied, error)
    } else {
        error
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Tied<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Whoever reads is woken, also where it stops reading for a while.
        if self.tie.poll_cut(cx).is_ready() {
            return Poll::Ready(self.check());
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        if self.heard {
            return read;
        }
        self.heard = buf.filled().len() > before;
        read.map_err(refusal)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Tied<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::identity::{Identity, NotReady};
    use crate::proven::Proven;
    use crate::scratch::{Scratch, chain_in};
    use crate::validity::wall;
    use crate::verify::{Clients, Expect, Roots, Servers};
    use proptest::prelude::*;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::crypto::aws_lc_rs;
    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::server::danger::ClientCertVerifier;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const SECOND: Duration = Duration::from_secs(1);

    fn id(name: &str) -> SpiffeId {
        SpiffeId::proxy("td", "a", name).unwrap()
    }

    fn list(all: &[(SpiffeId, SystemTime)]) -> Revoked {
        Revoked::new(all.iter().cloned()).unwrap()
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// Both verifiers of one who knows a list, and the chain of a peer.
    struct Check {
        revocations: Arc<Revocations>,
        clients: Clients,
        servers: Servers,
        chain: Vec<CertificateDer<'static>>,
        begins: SystemTime,
        _scratch: Scratch,
    }

    impl Check {
        fn of(name: &str) -> Self {
            let scratch = Scratch::new();
            let authority = Authority::create(&scratch.dir("ca"), "td").unwrap();
            let dir = scratch.dir(name);
            authority
                .issue(&id(name), Duration::from_secs(3600), &dir)
                .unwrap();
            let chain = chain_in(&dir);
            let roots = Arc::new(authority.roots().store().unwrap());
            let provider = Arc::new(aws_lc_rs::default_provider());
            let revocations = Arc::<Revocations>::default();
            let domain = Expect::Domain("td".into());
            let clients = Clients::new(
                Arc::clone(&roots),
                domain,
                Arc::clone(&revocations),
                Arc::clone(&provider),
            );
            let servers = Servers {
                roots: Roots::Known(roots, Proven::default(), Arc::clone(&revocations)),
                expect: Expect::Exactly(id(name)),
                provider,
            };
            Self {
                revocations,
                clients: clients.unwrap(),
                servers,
                begins: Validity::read(&chain[0]).unwrap().not_before,
                chain,
                _scratch: scratch,
            }
        }

        /// What both say, which is the same, twice: what was found once is not looked at again.
        fn is_let_in(&self) -> bool {
            let now = UnixTime::since_unix_epoch(wall().duration_since(UNIX_EPOCH).unwrap());
            let (leaf, above) = self.chain.split_first().unwrap();
            let name = ServerName::try_from("any").unwrap();
            let refused = rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked);
            let verdicts = [(); 2].map(|()| {
                let client = self.clients.verify_client_cert(leaf, above, now).map(|_| ());
                let server = self.servers.verify_server_cert(leaf, above, &name, &[], now);
                assert_eq!(client, server.map(|_| ()));
                client
            });
            assert_eq!(verdicts[0], verdicts[1]);
            match &verdicts[0] {
                Ok(()) => true,
                Err(error) => {
                    assert_eq!(*error, refused);
                    false
                }
            }
        }
    }

    #[test]
    fn certificates_that_begin_before_are_refused_and_no_others() {
        let check = Check::of("a1");
        assert!(check.is_let_in(), "nobody has said anything");
        for (all, is_let_in) in [
            (vec![], true),
            (vec![(id("a1"), check.begins - SECOND)], true),
            (vec![(id("a1"), check.begins)], true),
            (vec![(id("a1"), check.begins + SECOND)], false),
            (vec![(id("a2"), check.begins + SECOND)], true),
            // A part of a second counts as the whole.
            (vec![(id("a1"), check.begins + SECOND / 1000)], false),
            (
                vec![
                    (id("a1"), check.begins + SECOND),
                    (id("a1"), check.begins - SECOND),
                ],
                false,
            ),
            (vec![], true),
        ] {
            check.revocations.replace(list(&all));
            assert_eq!(check.is_let_in(), is_let_in, "{all:?}");
        }
        let counts = check.revocations.counts();
        assert_eq!(
            (counts.listed, counts.refused),
            (0, 3 * 4),
            "three times, by both, twice"
        );
    }

    #[test]
    fn who_was_let_in_before_is_not_let_in_for_that() {
        let check = Check::of("a1");
        assert!(check.is_let_in());
        let revoked = list(&[(id("a1"), check.begins + SECOND)]);
        assert!(check.revocations.replace(revoked.clone()));
        assert!(!check.revocations.replace(revoked), "it is the same");
        assert!(!check.is_let_in());
        check.revocations.replace(Revoked::default());
        assert!(check.is_let_in());
    }

    #[test]
    fn a_certificate_that_was_issued_after_the_revocation_is_good() {
        let scratch = Scratch::new();
        let authority = Authority::create(&scratch.dir("ca"), "td").unwrap();
        let (id, life) = (id("a1"), Duration::from_secs(3600));
        let key = crate::request::NewKey::generate(&id).unwrap();
        let request = crate::request::CheckedRequest::parse(key.request(), &id).unwrap();
        let revoked = list(&[(id.clone(), wall())]);
        let since = revoked.since(&id);
        let begins = |since| {
            let signed = authority.sign_since(&request, &id, life, since).unwrap();
            Validity::read(&signed.chain[0]).unwrap().not_before
        };
        assert!(
            revoked.refuses(&id, begins(None)).is_some(),
            "it begins a minute ago"
        );
        assert_eq!(revoked.refuses(&id, begins(since)), None);
        assert_eq!(Some(begins(since)), since);
    }

    proptest! {
        #[test]
        fn the_same_list_has_the_same_hash_in_any_order(
            all in prop::collection::vec(("[a-c]", 0u64..10), 0..6),
        ) {
            let all: Vec<_> = all.iter().map(|(name, s)| (id(name), at(*s))).collect();
            let one = list(&all);
            let other = Revoked::new(all.iter().rev().cloned()).unwrap();
            prop_assert_eq!(&one, &other);
            prop_assert_eq!(one.hash(), other.hash());
            let again = Revoked::new(one.iter().map(|(id, at)| (id.clone(), at))).unwrap();
            prop_assert_eq!(&again, &one);
            let more = Revoked::new(all.into_iter().chain([(id("d"), at(1))])).unwrap();
            prop_assert_ne!(more.hash(), one.hash());
        }
    }

    #[test]
    fn there_are_no_more_than_may_be() {
        let all = |count: usize| (0..count).map(|n| (id(&format!("p{n}")), at(1)));
        assert_eq!(Revoked::new(all(MAX_REVOKED)).unwrap().len(), MAX_REVOKED);
        assert_eq!(
            Revoked::new(all(MAX_REVOKED + 1)),
            Err(TooManyRevoked(MAX_REVOKED + 1))
        );
        assert!(Revoked::default().is_empty());
    }

    fn held(revocations: &Revocations, name: &str, begins: u64) -> Tie {
        let validity = Validity {
            not_before: at(begins),
            not_after: at(1000),
        };
        revocations.tie(id(name), validity, Duration::ZERO)
    }

    #[test]
    fn open_connections_of_those_who_are_refused_are_cut_once() {
        let revocations = Revocations::default();
        let ties = [("a1", 10), ("a1", 20), ("a2", 10)].map(|(name, at)| held(&revocations, name, at));
        revocations.replace(list(&[(id("a1"), at(20))]));
        let cut = |ties: &[Tie]| ties.iter().map(Tie::is_cut).collect::<Vec<_>>();
        assert_eq!(cut(&ties), [false; 3], "not before somebody asks for it");
        assert_eq!(revocations.cut(), 1);
        assert_eq!(cut(&ties), [true, false, false]);
        assert_eq!(revocations.cut(), 0);
        // One whose handshake was made by the list before.
        assert!(held(&revocations, "a1", 10).is_cut());
        assert_eq!(revocations.counts().cut, 2);
    }

    #[test]
    fn connections_that_are_gone_are_forgotten() {
        let revocations = Revocations::default();
        let stays = held(&revocations, "a1", 1);
        for _ in 0..1000 {
            drop(held(&revocations, "a1", 1));
        }
        assert!(revocations.ties().all.len() <= TIDY);
        revocations.replace(list(&[(id("a1"), at(2))]));
        assert_eq!(revocations.cut(), 1);
        assert!(stays.is_cut());
    }

    #[tokio::test]
    async fn whoever_waits_on_a_connection_hears_that_it_is_cut() {
        let revocations = Arc::<Revocations>::default();
        let (near, mut far) = tokio::io::duplex(64);
        let tie = held(&revocations, "a1", 1);
        let mut tied = Tied::new(near, tie.clone());
        far.write_all(b"x").await.unwrap();
        assert_eq!(tied.read_u8().await.unwrap(), b'x');
        let reading = tokio::spawn(async move {
            let read = tied.read_u8().await.unwrap_err();
            let written = tied.write_all(b"y").await.unwrap_err();
            (read.kind(), written.kind(), tied.flush().await.is_err())
        });
        tokio::task::yield_now().await;
        revocations.replace(list(&[(id("a1"), at(2))]));
        assert_eq!(revocations.cut(), 1);
        let aborted = io::ErrorKind::ConnectionAborted;
        assert_eq!(reading.await.unwrap(), (aborted, aborted, true));
        tie.cut().await;
    }

    #[test]
    fn who_is_revoked_itself_knows_it() {
        let scratch = Scratch::new();
        let authority = Authority::create(&scratch.dir("ca"), "td").unwrap();
        let (id, life) = (id("a1"), Duration::from_secs(3600));
        authority.issue(&id, life, &scratch.dir("a1")).unwrap();
        let identity = Identity::load(scratch.dir("a1")).unwrap();
        assert_eq!(identity.facts().revoked, None);
        let changes = identity.changes();
        let revoked = list(&[(id.clone(), wall())]);
        let since = revoked.since(&id).unwrap();
        assert!(identity.revoke(revoked.clone()));
        assert!(changes.has_changed().unwrap());
        assert_eq!(identity.ready_now(), Err(NotReady::Revoked(since)));
        assert_eq!(identity.facts().revoked.as_deref(), Some(revoked.hash()));
        assert!(identity.revoke(Revoked::default()));
        assert_eq!(identity.ready_now(), Ok(()));
    }

    #[test]
    fn a_connection_is_to_last_no_longer_than_the_first_certificate_to_end() {
        let scratch = Scratch::new();
        let authority = Authority::create(&scratch.dir("ca"), "td").unwrap();
        let chain_of = |name: &str, seconds: u64| {
            let (dir, life) = (scratch.dir(name), Duration::from_secs(seconds));
            authority.issue(&id(name), life, &dir).unwrap();
            chain_in(&dir)
        };
        let (long, short) = (chain_of("long", 7200), chain_of("short", 600));
        let lasts = |own: &str, peer: &[CertificateDer<'_>]| {
            let identity = Identity::load(scratch.dir(own)).unwrap();
            identity.tie(peer).unwrap().lasts()
        };
        let about = |seconds| Duration::from_secs(seconds - 60)..=Duration::from_secs(seconds);
        assert!(about(600).contains(&lasts("long", &short)));
        assert!(about(600).contains(&lasts("short", &long)));
        assert!(about(7200).contains(&lasts("long", &long)));
    }

    /// What is read of a peer, in turn.
    struct Script(Vec<io::Result<&'static [u8]>>);

    impl AsyncRead for Script {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(self.0.remove(0).map(|bytes| buf.put_slice(bytes)))
        }
    }

    fn alert(alert: AlertDescription) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert))
    }

    #[tokio::test]
    async fn a_refusal_before_anything_else_is_told_by_its_kind() {
        use io::ErrorKind::{ConnectionReset, InvalidData, PermissionDenied};
        let tie = held(&Revocations::default(), "a1", 1);
        for (read, kind) in [
            (vec![Err(alert(AlertDescription::UnknownCA))], PermissionDenied),
            (
                vec![Err(alert(AlertDescription::CertificateRevoked))],
                PermissionDenied,
            ),
            (vec![Err(alert(AlertDescription::InternalError))], InvalidData),
            (vec![Err(ConnectionReset.into())], ConnectionReset),
            // Whoever has answered has let it in.
            (
                vec![Ok(&b"1"[..]), Err(alert(AlertDescription::AccessDenied))],
                InvalidData,
            ),
        ] {
            let mut tied = Tied::new(Script(read), tie.clone());
            let mut all = Vec::new();
            assert_eq!(
                tied.read_to_end(&mut all).await.unwrap_err().kind(),
                kind,
                "{all:?}"
            );
        }
    }
}
