//! One connection as both sides have it: who is there, what they said, whether they still answer.

use crate::congestion;
use crate::control::{Health, Reports, Settings, put_go_away, put_no_news, put_probe};
use crate::error::{Close, Lost};
use crate::frame::{Deframer, Kind, Piece, Violation};
use crate::head::Limits;
use crate::losses::Losses;
use crate::path::Path;
use crate::twice::{Count, Twice};
use bytes::{Buf, BytesMut};
use leeward_identity::Tie;
use quinn::{Connection, RecvStream};
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// How often a connection with requests under way is looked at. One from which nothing came since the last look is
/// probed; one that was silent for [`SILENT_LOOKS`] is dead. So a dead path is found within two seconds (1.8 at most),
/// and a connection without requests costs nothing.
const LOOK_EVERY: Duration = Duration::from_millis(450);
const SILENT_LOOKS: u32 = 3;
/// Looks without an answer after which new requests go elsewhere: one probe has been out for as long as a look.
const SUSPECT_LOOKS: u32 = 2;
/// A client closes a connection that was not used for this long. Sooner than the transport would (see `IDLE`): were that
/// left to both sides, a request could meet a server that has just forgotten the connection.
const UNUSED: Duration = Duration::from_secs(45);
/// Least time between two reports of health.
const HEALTH_EVERY: Duration = Duration::from_secs(1);
/// Longest time between two: without a change, the last is confirmed.
const HEALTH_AGAIN: Duration = Duration::from_secs(5);
/// On a path that is shorter nothing is sent twice: to wait for what was lost costs little there, and a second packet that comes
/// by `twice::HOLD` later, and a timer's tick, might come when the first is taken for lost (after 9/8 of a round trip, RFC 9002,
/// section 6.1.2).
const LONG: Duration = Duration::from_millis(16);
/// Bytes that heads are encoded in, and then shared with the transport.
const SCRATCH: usize = 16 << 10;

/// What the handles of a connection share. When the last is dropped the connection is closed.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) quic: Connection,
    /// For how long from its making it is to be used.
    lasts: Duration,
    scratch: RefCell<BytesMut>,
    under_way: Cell<usize>,
    /// A request began since the last look.
    used: Cell<bool>,
    /// It is looked at. A connection that nobody used for a while is not, until somebody does.
    watched: Cell<bool>,
    /// Something turned that [`tend`] has to know at once.
    turned: Rc<Notify>,
    /// The peer takes no more requests.
    peer_leaves: Cell<bool>,
    /// This side takes no more.
    leaving: Cell<bool>,
    suspect: Cell<bool>,
    /// It was closed since the peer did not answer.
    found_dead: Cell<bool>,
    settings: Cell<Option<Settings>>,
    health: RefCell<Option<Report>>,
    /// The socket's.
    twice: Arc<Twice>,
    /// Packets that were sent twice.
    copied: Arc<Count>,
    /// Where they are sent twice now.
    copied_to: Cell<Option<SocketAddr>>,
    losses: Cell<Losses>,
}

/// What the peer reported of its services.
#[derive(Clone, Debug)]
pub struct Report {
    /// How they are.
    pub health: Arc<Health>,
    /// When this was said, or confirmed.
    pub heard: std::time::Instant,
}

/// Which side this is.
#[derive(Debug)]
pub(crate) enum Side {
    /// It sends requests.
    Client,
    /// It answers them, and says how its services are.
    Server(Option<News>),
}

/// What there is to say of this side's services, to a peer of a zone.
#[derive(Debug)]
pub(crate) struct News {
    pub(crate) reports: watch::Receiver<Arc<Reports>>,
    pub(crate) zone: String,
}

/// Counts a request under way until dropped, and keeps its connection.
#[derive(Debug)]
pub(crate) struct UnderWay(Rc<Core>);

impl Core {
    /// Begins to look after a connection, which is closed when its tie is cut.
    pub(crate) fn begin(quic: Connection, twice: Arc<Twice>, side: Side, tie: Tie) -> Rc<Self> {
        let core = Rc::new(Self {
            quic: quic.clone(),
            lasts: tie.lasts(),
            scratch: RefCell::default(),
            under_way: Cell::new(0),
            used: Cell::new(false),
            watched: Cell::new(false),
            turned: Rc::default(),
            peer_leaves: Cell::new(false),
            leaving: Cell::new(false),
            suspect: Cell::new(false),
            found_dead: Cell::new(false),
            settings: Cell::new(None),
            health: RefCell::new(None),
            twice,
            copied: Arc::default(),
            copied_to: Cell::new(None),
            losses: Cell::default(),
        });
        // Their owner is the connection: they end with it, and it ends when the last handle is dropped.
        tokio::task::spawn_local(tend(quic.clone(), Rc::downgrade(&core), side, tie));
        tokio::task::spawn_local(listen(quic, Rc::downgrade(&core)));
        core
    }

    /// What may be sent to the peer.
    pub(crate) fn limits(&self) -> Limits {
        self.settings.get().unwrap_or(Settings::OURS).limits()
    }

    pub(crate) fn settings(&self) -> Option<Settings> {
        self.settings.get()
    }

    pub(crate) fn report(&self) -> Option<Report> {
        self.health.borrow().clone()
    }

    /// Something to encode in; what is split off it is sent without a copy.
    pub(crate) fn scratch<T>(&self, encode: impl FnOnce(&mut BytesMut) -> T) -> T {
        let mut scratch = self.scratch.borrow_mut();
        if scratch.capacity() < 1024 {
            // Takes the same memory again, if all that was split off has been acknowledged.
            scratch.reserve(SCRATCH);
        }
        encode(&mut scratch)
    }

    pub(crate) const fn lasts(&self) -> Duration {
        self.lasts
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way.get()
    }

    pub(crate) fn enter(self: &Rc<Self>) -> UnderWay {
        self.under_way.set(self.under_way.get() + 1);
        self.used.set(true);
        if !self.watched.replace(true) {
            self.turned.notify_one();
        }
        UnderWay(Rc::clone(self))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.quic.close_reason().is_none()
    }

    pub(crate) fn is_usable(&self) -> bool {
        !self.peer_leaves.get() && !self.leaving.get() && !self.suspect.get() && self.is_open()
    }

    pub(crate) fn found_dead(&self) -> bool {
        self.found_dead.get()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.peer_leaves.get() || self.leaving.get()
    }

    /// Tells the peer to send no more requests.
    pub(crate) fn leave(&self) {
        if !self.leaving.replace(true) {
            self.turned.notify_one();
        }
    }

    pub(crate) fn close(&self, why: Close) {
        self.quic.close(why.var(), b"");
    }

    /// Packets that were sent but for those that were sent twice, and those that were lost.
    pub(crate) fn losses(&self) -> (u64, u64) {
        let path = self.quic.stats().path;
        let once = path.sent_packets.saturating_sub(self.copied.packets());
        (once, path.lost_packets)
    }

    /// Looks at what the path loses, and has packets sent twice or once from now on.
    fn look_at_losses(&self) {
        let (once, lost) = self.losses();
        let losses = self.losses.get().observe(once, lost);
        self.losses.set(losses);
        let may_take_more = |path: Path| path.round_trip() >= Some(LONG) && !path.is_full();
        let twice = losses.is_high()
            && !losses.is_extreme()
            && congestion::path(&self.quic).is_some_and(may_take_more);
        // It may have moved.
        let to = twice.then(|| self.quic.remote_address());
        if to == self.copied_to.get() {
            return;
        }
        self.send_once();
        if let Some(to) = to
            && self.twice.begin(to, &self.copied)
        {
            tracing::debug!(peer = %to, "the path to a proxy loses packets; they are sent twice");
            self.copied_to.set(Some(to));
        }
    }

    /// How long a round trip takes where nothing queues.
    pub(crate) fn least_round_trip(&self) -> Duration {
        let known = congestion::path(&self.quic).and_then(|path| path.round_trip());
        known.unwrap_or_else(|| self.quic.stats().path.min_rtt)
    }

    /// Packets are sent once from now on.
    fn send_once(&self) {
        if let Some(to) = self.copied_to.take() {
            self.twice.end(to, &self.copied);
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.send_once();
        self.close(Close::Done);
    }
}

impl UnderWay {
    pub(crate) fn core(&self) -> &Rc<Core> {
        &self.0
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let left = self.0.under_way.get().saturating_sub(1);
        self.0.under_way.set(left);
        if left == 0 && self.0.is_draining() {
            self.0.turned.notify_one();
        }
    }
}

/// Opens this side's control stream, and says on it what there is to say, until the connection ends.
async fn tend(quic: Connection, core: Weak<Core>, side: Side, tie: Tie) {
    let mut closed = pin!(quic.closed());
    let mut cut = pin!(tie.cut());
    let talk = async {
        let mut control = quic.open_uni().await.map_err(Lost)?;
        // Requests must not wait for it, nor it for them.
        let _ = control.set_priority(1);
        let mut buf = BytesMut::new();
        Settings::OURS.put(&mut buf);
        let (is_client, mut reports) = match side {
            Side::Client => (true, None),
            Side::Server(reports) => (false, reports),
        };
        if let Some(reports) = &mut reports {
            // What is known already is news to this peer.
            reports.reports.mark_changed();
        }
        let mut told = Arc::<Health>::default();
        let mut may_report = tokio::time::Instant::now();
        let mut said_leaving = false;
        let mut pulse = Pulse::default();
        let Some(turned) = core.upgrade().map(|core| Rc::clone(&core.turned)) else {
            return Ok(());
        };
        loop {
            let Some(alive) = core.upgrade() else {
                return Ok::<_, Lost>(());
            };
            if alive.leaving.get() && !said_leaving {
                said_leaving = true;
                put_go_away(&mut buf);
            }
            if alive.peer_leaves.get() && alive.under_way.get() == 0 {
                alive.close(Close::Done);
                return Ok(());
            }
            let watched = alive.watched.get();
            drop(alive);
            tokio::select! {
                // Not waited for alone: where the path is dead nothing goes out, and that has to be found.
                written = control.write(&buf), if !buf.is_empty() => match written {
                    Ok(count) => buf.advance(count),
                    // It ends the connection, which others notice.
                    Err(_) => buf.clear(),
                },
                () = turned.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY), if watched => {
                    let Some(alive) = core.upgrade() else { return Ok(()) };
                    let used = alive.used.replace(false);
                    alive.look_at_losses();
                    if alive.under_way.get() == 0 {
                        alive.watched.set(used);
                        // Nobody looks any more whether it answers. The next request finds out.
                        alive.suspect.set(false);
                        pulse = Pulse::default();
                        continue;
                    }
                    let look = pulse.look(quic.stats().udp_rx.datagrams);
                    alive.suspect.set(look == Look::Suspect);
                    match look {
                        Look::Alive => {}
                        // What is not out yet is a probe as well, once it is.
                        Look::Silent | Look::Suspect if !buf.is_empty() => {}
                        Look::Silent | Look::Suspect => put_probe(&mut buf),
                        Look::Dead => {
                            tracing::info!(peer = %quic.remote_address(), "a proxy does not answer; its connection is given up");
                            alive.found_dead.set(true);
                            alive.close(Close::Silent);
                            return Ok(());
                        }
                    }
                }
                () = tokio::time::sleep(UNUSED), if is_client && !watched => {
                    let Some(alive) = core.upgrade() else { return Ok(()) };
                    if alive.under_way.get() == 0 && !alive.used.get() {
                        alive.close(Close::Done);
                        return Ok(());
                    }
                }
                // Not while the last is not out yet, or there would be no end to what is gathered.
                health = changed(&mut reports, may_report), if buf.is_empty() => {
                    health.put_changes(&told, &mut buf);
                    if buf.is_empty() {
                        put_no_news(&mut buf);
                    }
                    told = health;
                    may_report = tokio::time::Instant::now() + HEALTH_EVERY;
                }
            }
        }
    };
    tokio::select! {
        _ = &mut closed => return,
        () = &mut cut => {}
        ended = talk => {
            if let Err(error) = ended {
                tracing::debug!(%error, "control stream not opened");
            }
            // The stream must not end before the connection does.
            tokio::select! {
                _ = &mut closed => return,
                () = &mut cut => {}
            }
        }
    }
    tracing::warn!(id = %tie.id(), peer = %quic.remote_address(), "a link is closed, since the peer's certificate was revoked");
    quic.close(Close::Unwelcome.var(), b"certificate revoked");
}

/// The next report, no earlier than `from`; without a change, the last once more after a while.
async fn changed(news: &mut Option<News>, from: tokio::time::Instant) -> Arc<Health> {
    if let Some(News { reports, zone }) = news {
        tokio::time::sleep_until(from).await;
        let until = from + (HEALTH_AGAIN - HEALTH_EVERY);
        if !matches!(
            tokio::time::timeout_at(until, reports.changed()).await,
            Ok(Err(_))
        ) {
            return Arc::clone(reports.borrow_and_update().to(zone));
        }
    }
    *news = None;
    std::future::pending().await
}

/// Hears what the peer has to say, until the connection ends.
async fn listen(quic: Connection, core: Weak<Core>) {
    let Ok(control) = quic.accept_uni().await else {
        return;
    };
    if let Err(violation) = hear(control, &core).await {
        tracing::warn!(peer = %quic.remote_address(), error = %violation, "a proxy broke the protocol");
        quic.close(Close::Protocol.var(), violation.to_string().as_bytes());
        return;
    }
    // Streams of a later revision: nothing is read from them, and so nothing is sent.
    while let Ok(mut other) = quic.accept_uni().await {
        let _ = other.stop(crate::error::Code::Enough.var());
    }
}

async fn hear(mut control: RecvStream, core: &Weak<Core>) -> Result<(), Violation> {
    let mut frames = Deframer::default();
    let mut first = true;
    loop {
        while let Some(piece) = frames.next()? {
            let Some(core) = core.upgrade() else { return Ok(()) };
            let misplaced = |kind: Kind, place| {
                Err(Violation::Misplaced {
                    number: kind.number(),
                    place,
                })
            };
            match piece {
                Piece::Whole(Kind::Settings, payload) if first => {
                    core.settings.set(Some(Settings::read(payload)?));
                }
                Piece::Whole(kind, _) if first => return misplaced(kind, "before SETTINGS"),
                Piece::Whole(Kind::Settings, _) => {
                    return misplaced(Kind::Settings, "for the second time");
                }
                Piece::Whole(Kind::Health, payload) => {
                    let known = core.health.take().map(|report| report.health).unwrap_or_default();
                    let mut health = Arc::unwrap_or_clone(known);
                    health.apply(payload)?;
                    core.health.replace(Some(Report {
                        health: Arc::new(health),
                        heard: tokio::time::Instant::now().into_std(),
                    }));
                }
                Piece::Whole(Kind::GoAway, _) => {
                    core.peer_leaves.set(true);
                    core.turned.notify_one();
                }
                Piece::Whole(Kind::Probe, _) => {}
                Piece::Whole(kind @ (Kind::Head | Kind::Trailers | Kind::Data), _) => {
                    return misplaced(kind, "on the control stream");
                }
                Piece::Data(_) => return misplaced(Kind::Data, "on the control stream"),
            }
            first = false;
        }
        match control.read_chunk(usize::MAX, true).await {
            Ok(Some(chunk)) => frames.push(chunk.bytes),
            Ok(None) | Err(quinn::ReadError::Reset(_)) => {
                return Err(Violation::Truncated {
                    place: "that control frames come on",
                });
            }
            // The connection has ended, and with it everything.
            Err(_) => return Ok(()),
        }
    }
}

/// Whether anything came from a peer lately.
#[derive(Debug, Default)]
struct Pulse {
    /// Datagrams that had come at the last look.
    seen: Option<u64>,
    silent: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Look {
    Alive,
    Silent,
    Suspect,
    Dead,
}

impl Pulse {
    fn look(&mut self, datagrams: u64) -> Look {
        if self.seen.replace(datagrams) != Some(datagrams) {
            self.silent = 0;
            return Look::Alive;
        }
        self.silent += 1;
        match self.silent {
            SILENT_LOOKS.. => Look::Dead,
            SUSPECT_LOOKS => Look::Suspect,
            _ => Look::Silent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_probed_then_suspect_then_death() {
        let mut pulse = Pulse::default();
        assert_eq!(pulse.look(5), Look::Alive);
        assert_eq!(pulse.look(6), Look::Alive);
        assert_eq!(pulse.look(6), Look::Silent);
        assert_eq!(pulse.look(7), Look::Alive, "the probe was answered");
        assert_eq!(pulse.look(7), Look::Silent);
        assert_eq!(pulse.look(7), Look::Suspect);
        assert_eq!(pulse.look(7), Look::Dead);
    }

    #[test]
    fn a_dead_path_is_found_within_two_seconds() {
        // The path may die just after the look that still saw something.
        assert!(LOOK_EVERY * (SILENT_LOOKS + 1) <= Duration::from_secs(2));
    }
}
