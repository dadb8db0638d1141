//! Packets that are sent twice, on paths that lose many.
//!
//! Whoever waits for a packet that was lost waits for a round trip more, however soon that is noticed. A second packet with
//! the same bytes, sent a moment later, is mostly there in its place; where the first has come, QUIC passes over the second
//! (RFC 9000, section 12.3). So nothing of this is said to the peer, and each side does it by what it sees of what it sends.

use crate::incoming::Abort;
use crate::transport::JUMBO;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A second packet goes in front of the next that is sent to its peer, so that it comes before its peer could take it for lost
/// (three later packets, RFC 9002, section 6.1.1); or after this, if there is none.
const HOLD: Duration = Duration::from_millis(1);
/// Packets that are sent in one go and as a whole a second time: of more the first would be taken for lost. Where the kernel
/// segments (GSO), more go with their second ones among them.
const MAX_BATCH: usize = 3;
/// Bytes that the kernel is given in one go: less than a UDP datagram may have, which bounds what it segments. The transport counts
/// packets, and ten of jumbo frames are more.
const MAX_SENT: usize = 60 << 10;
/// One batch of so many goes once: how many packets the path loses could not be seen otherwise. A prime, so that it isn't
/// always the same kind of packet.
const ONCE_IN: u64 = 17;
/// What a socket sends for the second time in a second, at most: 67 Mbit/s.
const RATE: u64 = 8 << 20;
/// The same, in one go.
const BURST: u64 = 256 << 10;
/// What large batches leave of it to small ones.
const RESERVE: u64 = BURST / 2;
/// A peer that is sent more than that in large batches is sent them once for so long: that is bulk, which a packet that is late
/// doesn't keep waiting.
const BULK_FOR: Duration = Duration::from_secs(1);
/// Peers of a socket that packets are sent to twice. Others get each once.
const MAX_PEERS: usize = 1024;

/// A UDP socket that sends packets to some peers twice.
#[derive(Debug)]
struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    twice: Arc<Twice>,
    _sending: Abort,
}

/// Which peers of a socket those are.
#[derive(Debug, Default)]
pub(crate) struct Twice {
    /// How many there are: looked at for each packet.
    peers: AtomicUsize,
    /// One thread has all of it; the transport asks for more.
    state: Mutex<State>,
    /// There is something to be sent.
    held: Notify,
}

/// Packets of a connection that were sent twice.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

#[derive(Debug, Default)]
struct State {
    peers: HashMap<SocketAddr, Peer>,
    /// When something is to be looked for, and towards whom; each peer is here once at most.
    due: VecDeque<(Instant, SocketAddr)>,
    allowance: Allowance,
}

#[derive(Debug)]
struct Peer {
    count: Arc<Count>,
    batches: u64,
    /// What may be sent to it for the second time in large batches.
    large: Allowance,
    /// Until when those go once.
    bulk_until: Option<Instant>,
    second: Option<Second>,
    /// It stands in [`State::due`].
    is_due: bool,
}

/// How a batch goes.
#[derive(Debug, Eq, PartialEq)]
enum Plan {
    /// Once.
    Once,
    /// As it is, and again in a moment.
    Again,
    /// As this, in which each packet comes twice but the last, which goes again in a moment.
    Spread(Vec<u8>),
}

/// What is sent for the second time.
#[derive(Debug)]
struct Second {
    due: Instant,
    to: SocketAddr,
    ecn: Option<EcnCodepoint>,
    contents: Vec<u8>,
    segment_size: Option<usize>,
    from: Option<IpAddr>,
}

/// Bytes that may be sent.
#[derive(Debug, Default)]
struct Allowance {
    left: u64,
    at: Option<Instant>,
}

/// Makes a socket the transport's. Call on the thread of a `LocalSet`.
pub(crate) fn wrap(socket: UdpSocket) -> io::Result<(Arc<dyn AsyncUdpSocket>, Arc<Twice>)> {
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    let twice = Arc::<Twice>::default();
    // Its owner is the socket: it ends with it.
    let sending = tokio::task::spawn_local(send_held(Arc::clone(&inner), Arc::clone(&twice)));
    let socket = Socket {
        inner,
        twice: Arc::clone(&twice),
        _sending: Abort(sending.abort_handle()),
    };
    Ok((Arc::new(socket), twice))
}

/// Sends what nothing else was sent after.
async fn send_held(socket: Arc<dyn AsyncUdpSocket>, twice: Arc<Twice>) {
    loop {
        let next = twice.state().due.front().map(|(due, _)| *due);
        let Some(next) = next else {
            twice.held.notified().await;
            continue;
        };
        tokio::time::sleep_until(next.into()).await;
        let now = tokio::time::Instant::now().into_std();
        while let Some(second) = twice.state().held_until(now) {
            second.send(&*socket);
        }
    }
}

impl Socket {
    /// Sends what may be more than the kernel takes in one go. Should there be no room for a later part, all are sent again, and
    /// what came is passed over.
    fn send_parts(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment) = transmit
            .segment_size
            .filter(|_| transmit.contents.len() > MAX_SENT)
        else {
            return self.inner.try_send(transmit);
        };
        let whole = (MAX_SENT / segment).max(1) * segment;
        transmit.contents.chunks(whole).try_for_each(|contents| {
            self.inner.try_send(&Transmit {
                contents,
                segment_size: (contents.len() > segment).then_some(segment),
                ..*transmit
            })
        })
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.twice.peers.load(Ordering::Relaxed) == 0 {
            return self.send_parts(transmit);
        }
        let now = tokio::time::Instant::now().into_std();
        let mut state = self.twice.state();
        let held = state.held_for(transmit.destination);
        let plan = state.plan(transmit, self.inner.max_transmit_segments(), now);
        drop(state);
        if let Some(second) = held {
            second.send(&*self.inner);
        }
        let contents = match &plan {
            Plan::Once | Plan::Again => transmit.contents,
            Plan::Spread(all) => all,
        };
        self.send_parts(&Transmit {
            contents,
            ..*transmit
        })?;
        if self.twice.state().hold(transmit, &plan, now) {
            self.twice.held.notify_one();
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    /// The transport makes room for as many of the largest packets. The kernel joins what comes (GRO) to one datagram's 64 KiB at
    /// most, whatever it is made of.
    fn max_receive_segments(&self) -> usize {
        let most = usize::from(u16::MAX).div_ceil(usize::from(JUMBO));
        self.inner.max_receive_segments().min(most)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

impl Twice {
    /// Packets to this peer are sent twice from now on, and counted. False if there are too many such peers.
    pub(crate) fn begin(&self, to: SocketAddr, count: &Arc<Count>) -> bool {
        let mut state = self.state();
        let begun = state.begin(to, count);
        self.peers.store(state.peers.len(), Ordering::Relaxed);
        begun
    }

    /// They are sent once again, unless another connection has begun it anew.
    pub(crate) fn end(&self, to: SocketAddr, count: &Arc<Count>) {
        let mut state = self.state();
        if state
            .peers
            .get(&to)
            .is_some_and(|peer| Arc::ptr_eq(&peer.count, count))
        {
            state.peers.remove(&to);
        }
        self.peers.store(state.peers.len(), Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held, and nothing in it could be half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Count {
    pub(crate) fn packets(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl State {
    fn begin(&mut self, to: SocketAddr, count: &Arc<Count>) -> bool {
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&to) {
            return false;
        }
        let peer = Peer {
            count: Arc::clone(count),
            batches: 0,
            large: Allowance::default(),
            bulk_until: None,
            second: None,
            is_due: false,
        };
        self.peers.insert(to, peer);
        self.due.retain(|(_, known)| *known != to);
        true
    }

    /// How a batch is to go, where so many packets may go at once.
    fn plan(&mut self, batch: &Transmit<'_>, most: usize, now: Instant) -> Plan {
        let Some(peer) = self.peers.get_mut(&batch.destination) else {
            return Plan::Once;
        };
        if (peer.batches + 1).is_multiple_of(ONCE_IN) {
            return Plan::Once;
        }
        let (bytes, packets) = (batch.contents.len(), packets(batch));
        if packets <= MAX_BATCH {
            let may = self.allowance.has(bytes, 0, now);
            return if may { Plan::Again } else { Plan::Once };
        }
        let fits = 2 * packets <= most;
        let bulk = peer.bulk_until.is_some_and(|until| now < until);
        let Some(size) = batch.segment_size.filter(|_| fits && !bulk) else {
            return Plan::Once;
        };
        if !peer.large.has(bytes, RESERVE, now) {
            peer.bulk_until = Some(now + BULK_FOR);
            return Plan::Once;
        }
        if !self.allowance.has(bytes, RESERVE, now) {
            return Plan::Once;
        }
        Plan::Spread(spread(batch.contents, size))
    }

    /// Keeps what was just sent, to be sent again. Whether the wait for it has to begin.
    fn hold(&mut self, sent: &Transmit<'_>, plan: &Plan, now: Instant) -> bool {
        let Some(peer) = self.peers.get_mut(&sent.destination) else {
            return false;
        };
        peer.batches += 1;
        let (contents, segment_size) = match (plan, sent.segment_size) {
            (Plan::Once, _) => return false,
            (Plan::Spread(_), Some(size)) => {
                (sent.contents.chunks(size).next_back().unwrap_or_default(), None)
            }
            (Plan::Again | Plan::Spread(_), size) => (sent.contents, size),
        };
        self.allowance.take(sent.contents.len());
        if matches!(plan, Plan::Spread(_)) {
            peer.large.take(sent.contents.len());
        }
        let counted = u64::try_from(packets(sent)).unwrap_or(u64::MAX);
        peer.count.0.fetch_add(counted, Ordering::Relaxed);
        let due = now + HOLD;
        peer.second = Some(Second {
            due,
            to: sent.destination,
            ecn: sent.ecn,
            contents: contents.to_vec(),
            segment_size,
            from: sent.src_ip,
        });
        if peer.is_due {
            return false;
        }
        peer.is_due = true;
        self.due.push_back((due, sent.destination));
        self.due.len() == 1
    }

    /// What is held for a peer that something else is sent to now.
    fn held_for(&mut self, to: SocketAddr) -> Option<Second> {
        self.peers.get_mut(&to)?.second.take()
    }

    /// Something that was held for long enough.
    fn held_until(&mut self, now: Instant) -> Option<Second> {
        while let Some((_, to)) = self.due.pop_front_if(|(due, _)| *due <= now) {
            let Some(peer) = self.peers.get_mut(&to) else {
                continue;
            };
            match &peer.second {
                // Something has been sent meanwhile, and is held since.
                Some(second) if second.due > now => self.due.push_back((second.due, to)),
                _ => {
                    peer.is_due = false;
                    if let Some(second) = peer.second.take() {
                        return Some(second);
                    }
                }
            }
        }
        None
    }
}

fn packets(batch: &Transmit<'_>) -> usize {
    let size = batch.segment_size.unwrap_or(batch.contents.len());
    batch.contents.len().div_ceil(size.max(1))
}

/// Packets of a size in their order, each but the last a second time, mostly after the one that follows it: 1 2 1 3 2 4 3 4 5. The
/// last may be shorter, and so has to be the last.
fn spread(contents: &[u8], size: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(2 * contents.len());
    let mut packets = contents.chunks(size.max(1)).peekable();
    let mut before: &[u8] = &[];
    while let Some(packet) = packets.next() {
        if packets.peek().is_some() {
            all.extend_from_slice(packet);
            all.extend_from_slice(before);
        } else {
            all.extend_from_slice(before);
            all.extend_from_slice(packet);
        }
        before = packet;
    }
    all
}

impl Second {
    fn send(&self, socket: &dyn AsyncUdpSocket) {
        // Where there is no room for it now, there is none to be made: the first is on its way.
        let _ = socket.try_send(&Transmit {
            destination: self.to,
            ecn: self.ecn,
            contents: &self.contents,
            segment_size: self.segment_size,
            src_ip: self.from,
        });
    }
}

impl Allowance {
    /// Whether there are so many and, without them, so many are left.
    fn has(&mut self, bytes: usize, left: u64, now: Instant) -> bool {
        let gained = self.at.map_or(BURST, |at| {
            let micros = now.saturating_duration_since(at).as_micros();
            let gained = micros.saturating_mul(u128::from(RATE)) / 1_000_000;
            u64::try_from(gained).unwrap_or(BURST)
        });
        // What is too little to count goes on to be waited for.
        if gained > 0 {
            self.at = Some(now);
            self.left = self.left.saturating_add(gained).min(BURST);
        }
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.left >= bytes.saturating_add(left)
    }

    fn take(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.left = self.left.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PACKET: usize = 1200;

    fn peer(n: u16) -> SocketAddr {
        ([10, 0, 0, 1], n).into()
    }

    fn transmit(to: SocketAddr, contents: &[u8]) -> Transmit<'_> {
        Transmit {
            destination: to,
            ecn: None,
            contents,
            segment_size: (contents.len() > PACKET).then_some(PACKET),
            src_ip: None,
        }
    }

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    const MOST: usize = 64;

    /// Has a batch sent by a plan of its own. Whether the wait has to begin.
    fn pass(state: &mut State, batch: &Transmit<'_>, now: Instant) -> bool {
        let plan = state.plan(batch, MOST, now);
        state.hold(batch, &plan, now)
    }

    /// So many packets, each of its own bytes, the last shorter.
    fn numbered(packets: u8) -> Vec<u8> {
        let mut all: Vec<u8> = (1..=packets).flat_map(|n| [n; PACKET]).collect();
        all.truncate(all.len() - 100);
        all
    }

    /// Keeps the lengths of what it is given.
    #[derive(Debug, Default)]
    struct Lengths(Mutex<Vec<(usize, Option<usize>)>>);

    impl AsyncUdpSocket for Lengths {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            unreachable!("nobody waits")
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let sent = (transmit.contents.len(), transmit.segment_size);
            self.0.lock().unwrap().push(sent);
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Ok(peer(1))
        }

        fn max_transmit_segments(&self) -> usize {
            MOST
        }
    }

    #[tokio::test]
    async fn what_is_more_than_one_datagram_may_have_goes_in_parts() {
        const JUMBO: usize = super::JUMBO as usize;
        let inner = Arc::<Lengths>::default();
        let socket = Socket {
            inner: Arc::clone(&inner) as Arc<dyn AsyncUdpSocket>,
            twice: Arc::default(),
            _sending: Abort(tokio::task::spawn(std::future::pending::<()>()).abort_handle()),
        };
        let sends = |contents: &[u8]| {
            let sent = socket.try_send(&Transmit {
                segment_size: (contents.len() > JUMBO).then_some(JUMBO),
                ..transmit(peer(1), contents)
            });
            sent.unwrap();
            std::mem::take(&mut *inner.0.lock().unwrap())
        };
        let six = (6 * JUMBO, Some(JUMBO));
        assert_eq!(sends(&[0; 10 * JUMBO - 1]), [six, (4 * JUMBO - 1, Some(JUMBO))]);
        assert_eq!(sends(&[0; 7 * JUMBO]), [six, (JUMBO, None)]);
        assert_eq!(sends(&[0; 6 * JUMBO]), [six]);
        assert_eq!(sends(&[0; 7]), [(7, None)]);
        // With second ones among them it is twice as much, but for the last.
        let count = Arc::default();
        assert!(socket.twice.begin(peer(1), &count));
        assert_eq!(sends(&[0; 8 * JUMBO]), [six, six, (3 * JUMBO, Some(JUMBO))]);
        assert_eq!(count.packets(), 8);
    }

    #[test]
    fn a_second_packet_goes_before_the_next_or_after_a_moment() {
        let (mut state, now, count) = (State::default(), now(), Arc::default());
        assert!(!pass(&mut state, &transmit(peer(1), b"nobody's"), now));
        assert!(state.begin(peer(1), &count));
        assert!(
            pass(&mut state, &transmit(peer(1), b"a"), now),
            "somebody has to wait"
        );
        assert!(state.held_for(peer(2)).is_none());
        assert_eq!(state.held_for(peer(1)).unwrap().contents, b"a");
        let later = now + HOLD / 2;
        assert!(
            !pass(&mut state, &transmit(peer(1), b"b"), later),
            "somebody waits"
        );
        assert!(state.held_until(now + HOLD).is_none(), "too soon for this one");
        assert_eq!(state.held_until(later + HOLD).unwrap().contents, b"b");
        assert!(state.held_until(later + HOLD).is_none());
        assert!(state.due.is_empty());
        assert_eq!(count.packets(), 2);
    }

    #[test]
    fn one_batch_of_some_goes_once() {
        let (mut state, now, count) = (State::default(), now(), Arc::default());
        state.begin(peer(1), &count);
        let mut once = 0;
        for _ in 0..ONCE_IN * 10 {
            pass(&mut state, &transmit(peer(1), b"a"), now);
            once += u64::from(state.held_for(peer(1)).is_none());
        }
        assert_eq!(once, 10);
        assert_eq!(count.packets(), 160);
    }

    #[test]
    fn of_a_large_batch_the_second_packets_go_among_the_first() {
        let (mut state, now, count) = (State::default(), now(), Arc::default());
        state.begin(peer(1), &count);
        let contents = numbered(5);
        let batch = transmit(peer(1), &contents);
        let plan = state.plan(&batch, MOST, now);
        let Plan::Spread(all) = &plan else {
            panic!("{plan:?}")
        };
        let order: Vec<u8> = all.chunks(PACKET).map(|packet| packet[0]).collect();
        assert_eq!(order, [1, 2, 1, 3, 2, 4, 3, 4, 5]);
        assert_eq!(all.len(), PACKET * 9 - 100);
        assert!(state.hold(&batch, &plan, now));
        let last = state.held_for(peer(1)).unwrap();
        assert_eq!((last.contents, last.segment_size), (vec![5; PACKET - 100], None));
        assert_eq!(count.packets(), 5);
    }

    #[test]
    fn what_the_kernel_takes_too_few_of_goes_once() {
        let (mut state, now, count) = (State::default(), now(), Arc::default());
        state.begin(peer(1), &count);
        let large = numbered(10);
        assert_eq!(state.plan(&transmit(peer(1), &large), 1, now), Plan::Once);
        assert_eq!(state.plan(&transmit(peer(1), &large), 19, now), Plan::Once);
        let larger = numbered(33);
        assert_eq!(state.plan(&transmit(peer(1), &larger), MOST, now), Plan::Once);
        let fits = state.plan(&transmit(peer(1), &large), MOST, now);
        assert!(matches!(fits, Plan::Spread(_)), "{fits:?}");
        assert_eq!(count.packets(), 0, "nothing was sent");
    }

    #[test]
    fn large_batches_leave_something_to_small_ones() {
        let (mut state, now, count) = (State::default(), now(), Arc::default());
        state.begin(peer(1), &count);
        let (large, mut twice) = (numbered(10), 0);
        let batch = transmit(peer(1), &large);
        for _ in 0..100 {
            let plan = state.plan(&batch, MOST, now);
            twice += u64::from(plan != Plan::Once);
            state.hold(&batch, &plan, now);
        }
        assert_eq!(twice, (BURST - RESERVE) / large.len() as u64);
        assert_eq!(state.plan(&transmit(peer(1), b"a"), MOST, now), Plan::Again);
        // That was bulk, and is for a while.
        let later = now + BULK_FOR / 2;
        assert_eq!(state.plan(&batch, MOST, later), Plan::Once);
        let later = now + BULK_FOR;
        assert!(matches!(state.plan(&batch, MOST, later), Plan::Spread(_)));
    }

    #[test]
    fn bulk_to_one_peer_is_not_bulk_to_another() {
        let (mut state, now, count) = (State::default(), now(), Arc::default());
        state.begin(peer(1), &count);
        state.begin(peer(2), &count);
        let large = numbered(10);
        for _ in 0..100 {
            let batch = transmit(peer(1), &large);
            let plan = state.plan(&batch, MOST, now);
            state.hold(&batch, &plan, now);
        }
        let batch = transmit(peer(2), &large);
        assert_eq!(state.plan(&batch, MOST, now), Plan::Once, "nothing is left");
        let soon = now + BULK_FOR / 10;
        assert_eq!(state.plan(&transmit(peer(1), &large), MOST, soon), Plan::Once);
        assert!(matches!(state.plan(&batch, MOST, soon), Plan::Spread(_)));
    }

    #[test]
    fn what_could_not_be_sent_costs_nothing() {
        let (mut state, now, count) = (State::default(), now(), Arc::default());
        state.begin(peer(1), &count);
        let large = numbered(10);
        for _ in 0..100 {
            let plan = state.plan(&transmit(peer(1), &large), MOST, now);
            assert!(matches!(plan, Plan::Spread(_)), "{plan:?}");
        }
        assert_eq!(count.packets(), 0);
    }

    #[test]
    fn what_is_over_leaves_nothing_behind() {
        let twice = Twice::default();
        let (count, later) = (Arc::default(), Arc::default());
        assert!(twice.begin(peer(1), &count));
        pass(&mut twice.state(), &transmit(peer(1), b"a"), now());
        assert!(twice.begin(peer(1), &later));
        twice.end(peer(1), &count);
        assert_eq!(twice.peers.load(Ordering::Relaxed), 1, "it is another's now");
        pass(&mut twice.state(), &transmit(peer(1), b"a"), now());
        twice.end(peer(1), &later);
        assert_eq!(twice.peers.load(Ordering::Relaxed), 0);
        assert!(twice.state().held_until(now() + HOLD).is_none());
        assert!(twice.state().due.is_empty());
    }

    #[test]
    fn there_is_a_bound_to_peers() {
        let mut state = State::default();
        for n in 0..1024 {
            assert!(state.begin(peer(n), &Arc::default()));
        }
        assert!(!state.begin(peer(1024), &Arc::default()));
        assert!(state.begin(peer(3), &Arc::default()), "it is one of them");
    }

    proptest! {
        /// However much is sent, and to whom: no more goes for the second time than may, nothing is held for longer than it
        /// should, and nobody is waited for twice.
        #[test]
        fn bounds_hold(steps in prop::collection::vec((0u16..4, 1usize..12 * PACKET, 0u64..3000), 1..300)) {
            let (mut state, began) = (State::default(), now());
            let count = Arc::default();
            for n in 0..3 {
                state.begin(peer(n), &count);
            }
            let (mut now, mut bytes) = (began, 0);
            for (to, len, micros) in steps {
                now += Duration::from_micros(micros);
                while let Some(second) = state.held_until(now) {
                    bytes += second.contents.len();
                }
                bytes += state.held_for(peer(to)).map_or(0, |second| second.contents.len());
                let contents = vec![0; len];
                let batch = transmit(peer(to), &contents);
                let plan = state.plan(&batch, MOST, now);
                if let Plan::Spread(all) = &plan {
                    bytes += all.len() - contents.len();
                }
                state.hold(&batch, &plan, now);
                prop_assert!(state.due.len() <= 3);
                for peer in state.peers.values() {
                    prop_assert!(peer.second.is_none() || peer.is_due);
                }
                let most = u128::from(BURST) + u128::from(RATE) * (now - began).as_micros() / 1_000_000;
                prop_assert!(u128::try_from(bytes).unwrap() <= most);
            }
            let end = now + HOLD;
            while state.held_until(end).is_some() {}
            prop_assert!(state.peers.values().all(|peer| peer.second.is_none() && !peer.is_due));
        }
    }
}
