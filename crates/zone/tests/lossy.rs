//! Links by a long path that loses packets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[allow(dead_code, reason = "each test uses its part")]
mod common;

use bytes::Bytes;
use common::{Answers, Domain, Served, run, server, wait_for};
use http::Request;
use http_body_util::{BodyExt, Full};
use leeward_zone::Link;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::UdpSocket;

/// How long a packet is on its way.
const DELAY: Duration = Duration::from_millis(10);

/// What a path has seen of one direction.
#[derive(Debug, Default)]
struct Seen {
    packets: Cell<u64>,
    /// Those that were there before, with the same bytes.
    again: Cell<u64>,
    known: RefCell<HashMap<u64, u32>>,
    /// Packets that came more than twice.
    thrice: Cell<u64>,
}

/// A path between one client and a server.
struct Path {
    address: SocketAddr,
    there: Rc<Seen>,
    back: Rc<Seen>,
}

impl Seen {
    /// A packet has come. Whether it gets through, where one in so many is lost (0: none).
    fn passes(&self, packet: &[u8], lose_one_in: u64) -> bool {
        let mut hasher = DefaultHasher::new();
        packet.hash(&mut hasher);
        let mut known = self.known.borrow_mut();
        let times = known.entry(hasher.finish()).or_default();
        *times += 1;
        match times {
            1 => {}
            2 => self.again.set(self.again.get() + 1),
            _ => self.thrice.set(self.thrice.get() + 1),
        }
        self.packets.set(self.packets.get() + 1);
        // Packets are encrypted: as good as random, and the second with the same bytes shares not the first one's fate.
        (*times).hash(&mut hasher);
        lose_one_in == 0 || !hasher.finish().is_multiple_of(lose_one_in)
    }
}

impl Path {
    async fn to(server: SocketAddr, lose_one_in: u64) -> Self {
        let front = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let back = Rc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        back.connect(server).await.unwrap();
        let path = Self {
            address: front.local_addr().unwrap(),
            there: Rc::default(),
            back: Rc::default(),
        };
        let (seen_there, seen_back) = (Rc::clone(&path.there), Rc::clone(&path.back));
        tokio::task::spawn_local(async move {
            let mut client = None;
            let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
            loop {
                tokio::select! {
                    Ok((n, from)) = front.recv_from(&mut there) => {
                        client = Some(from);
                        if seen_there.passes(&there[..n], lose_one_in) {
                            let (back, packet) = (Rc::clone(&back), there[..n].to_vec());
                            tokio::task::spawn_local(async move {
                                tokio::time::sleep(DELAY).await;
                                let _ = back.send(&packet).await;
                            });
                        }
                    }
                    Ok(n) = back.recv(&mut here) => {
                        if let Some(client) = client && seen_back.passes(&here[..n], lose_one_in) {
                            let (front, packet) = (Rc::clone(&front), here[..n].to_vec());
                            tokio::task::spawn_local(async move {
                                tokio::time::sleep(DELAY).await;
                                let _ = front.send_to(&packet, client).await;
                            });
                        }
                    }
                }
            }
        });
        path
    }
}

/// A server that echoes, and a link to it by a path that loses one packet in so many.
async fn linked(domain: &Domain, lose_one_in: u64) -> (Served, Path, Link) {
    let served = server(domain, "b1", Answers::Echo).await;
    let path = Path::to(served.address, lose_one_in).await;
    let link = served.link_at(domain, "a1", path.address).await;
    (served, path, link)
}

/// Sends requests of a size, 32 at once, for as long as they are wanted; how many were answered.
async fn load(link: &Link, size: usize, mut more: impl FnMut() -> bool) -> u64 {
    let mut answered = 0;
    while more() {
        let round = (0..32).map(|n| {
            let link = link.clone();
            tokio::task::spawn_local(async move {
                let body = format!("{n:0>size$}");
                let request = Request::post("http://shop/").body(Full::new(Bytes::from(body.clone())));
                let response = link.send(request.unwrap().into()).await.unwrap();
                assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), body);
            })
        });
        for one in round.collect::<Vec<_>>() {
            one.await.unwrap();
            answered += 1;
        }
    }
    answered
}

#[test]
fn packets_go_twice_where_some_are_lost_and_requests_once() {
    run(async {
        let domain = Domain::new();
        let (served, path, link) = linked(&domain, 33).await;
        let enough = |seen: &Seen| seen.again.get() >= 200;
        let answered = load(&link, 2, || !(enough(&path.there) && enough(&path.back))).await;
        // The last may not be told of yet. None is acted upon twice.
        wait_for(|| served.answered.get() == answered).await;
        // What goes twice isn't counted with what was sent and lost.
        let (once, lost) = link.losses();
        let there = &path.there;
        assert!(
            once < there.packets.get() - there.again.get(),
            "{once} of {there:?}"
        );
        assert!(
            lost * 100 >= once,
            "the path still shows what it loses: {lost} of {once}"
        );
        assert_eq!(path.there.thrice.get() + path.back.thrice.get(), 0);
    });
}

#[test]
fn large_batches_go_twice_as_well() {
    run(async {
        let domain = Domain::new();
        let (_served, path, link) = linked(&domain, 33).await;
        // Of three kilobytes each, 32 are some ten packets at once even of jumbo frames.
        let (mut packets, mut again) = (0, 0);
        let mut nearly_all = |seen: &Seen| {
            let (came, second) = (seen.packets.get() - packets, seen.again.get() - again);
            if came < 1000 {
                return false;
            }
            (packets, again) = (seen.packets.get(), seen.again.get());
            second * 10 >= (came - second) * 8
        };
        load(&link, 3000, || !nearly_all(&path.there)).await;
        assert_eq!(path.there.thrice.get() + path.back.thrice.get(), 0);
    });
}

#[test]
fn where_none_is_lost_packets_go_once() {
    run(async {
        let domain = Domain::new();
        let (_served, path, link) = linked(&domain, 0).await;
        let until = tokio::time::Instant::now() + Duration::from_secs(2);
        load(&link, 2, || tokio::time::Instant::now() < until).await;
        assert_eq!((path.there.again.get(), path.back.again.get()), (0, 0));
    });
}
