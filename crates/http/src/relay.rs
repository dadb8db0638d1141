//! Relay: bytes both ways between two connections, each way to its own end.

use crate::idle::{Parked, Side, Stall};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes of one way that may be on their way through; more stay with whoever sends them. As much as one TLS record has.
const BUFFER: usize = 16 << 10;

/// What came of a relay.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Relayed {
    /// Bytes from the client.
    pub(crate) sent: u64,
    /// Bytes to the client.
    pub(crate) received: u64,
    /// Why it is over.
    pub(crate) end: End,
}

/// Why a relay is over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum End {
    /// Both sides have said all that they had to say.
    Whole,
    /// The client's connection broke.
    Client,
    /// The other one did.
    Far,
    /// Neither way has moved for as long as they may.
    Still,
}

/// Carries bytes until both ways have ended, each when its sender has ended it: whoever has said all may still listen.
pub(crate) async fn relay<A, B>(client: &mut A, far: &mut B, stall: &Rc<Stall>) -> Relayed
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut out, mut back) = (Way::new(), Way::new());
    let end = poll_fn(|cx| {
        let before = (out.bytes, back.bytes);
        let there = out.poll(cx, client, far);
        let here = back.poll(cx, far, client);
        if before != (out.bytes, back.bytes) {
            stall.touch();
        }
        match (there, here) {
            (Poll::Ready(Err(Broke::Source)), _) | (_, Poll::Ready(Err(Broke::Sink))) => {
                Poll::Ready(End::Client)
            }
            (Poll::Ready(Err(Broke::Sink)), _) | (_, Poll::Ready(Err(Broke::Source))) => {
                Poll::Ready(End::Far)
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(End::Whole),
            (Poll::Pending, _) | (_, Poll::Pending) => match stall.park(Side::Request, cx) {
                Parked::Waiting => Poll::Pending,
                Parked::Expired => Poll::Ready(End::Still),
            },
        }
    })
    .await;
    Relayed {
        sent: out.bytes,
        received: back.bytes,
        end,
    }
}

/// Which connection of a way broke.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Broke {
    Source,
    Sink,
}

/// How far one way has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Open,
    /// The source has ended; the sink is to be told.
    Ending,
    Over,
}

/// One way.
struct Way {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Something was written that the sink may hold back.
    unflushed: bool,
    bytes: u64,
    state: State,
}

impl Way {
    fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            unflushed: false,
            bytes: 0,
            state: State::Open,
        }
    }

    fn poll<S, T>(&mut self, cx: &mut Context<'_>, from: &mut S, to: &mut T) -> Poll<Result<(), Broke>>
    where
        S: AsyncRead + Unpin,
        T: AsyncWrite + Unpin,
    {
        loop {
            match self.state {
                State::Open if self.start < self.end => {
                    let waiting = self.buffer.get(self.start..self.end).unwrap_or_default();
                    match ready!(Pin::new(&mut *to).poll_write(cx, waiting)) {
                        Ok(0) | Err(_) => return Poll::Ready(Err(Broke::Sink)),
                        Ok(n) => {
                            self.start += n;
                            self.bytes = self.bytes.saturating_add(n as u64);
                            self.unflushed = true;
                        }
                    }
                }
                State::Open => {
                    let mut into = ReadBuf::new(&mut self.buffer);
                    match Pin::new(&mut *from).poll_read(cx, &mut into) {
                        Poll::Ready(Ok(())) => {
                            (self.start, self.end) = (0, into.filled().len());
                            if self.end == 0 {
                                self.state = State::Ending;
                            }
                        }
                        Poll::Ready(Err(_)) => return Poll::Ready(Err(Broke::Source)),
                        Poll::Pending => {
                            if self.unflushed {
                                if ready!(Pin::new(&mut *to).poll_flush(cx)).is_err() {
                                    return Poll::Ready(Err(Broke::Sink));
                                }
                                self.unflushed = false;
                            }
                            return Poll::Pending;
                        }
                    }
                }
                State::Ending => {
                    if ready!(Pin::new(&mut *to).poll_shutdown(cx)).is_err() {
                        return Poll::Ready(Err(Broke::Sink));
                    }
                    self.state = State::Over;
                }
                State::Over => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idle::{House, TICK};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    /// Both outer ends, and the relay between the inner ones.
    fn between(house: &Rc<House>) -> (DuplexStream, DuplexStream, impl Future<Output = Relayed> + use<>) {
        let (client, mut near) = duplex(100);
        let (server, mut far) = duplex(100);
        let stall = Stall::new(house);
        stall.limit(Some(TICK));
        let relaying = async move { relay(&mut near, &mut far, &stall).await };
        (client, server, relaying)
    }

    #[tokio::test]
    async fn each_way_ends_by_itself() {
        let (mut client, mut server, relaying) = between(&Rc::default());
        let talking = async {
            client.write_all(&[1; 50_000]).await.unwrap();
            client.shutdown().await.unwrap();
            // All that was to be said is; the answer comes all the same.
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).await.unwrap();
            heard.len()
        };
        let serving = async {
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).await.unwrap();
            server.write_all(&[2; 70_000]).await.unwrap();
            server.shutdown().await.unwrap();
            heard.len()
        };
        let (relayed, said, heard) = tokio::join!(relaying, talking, serving);
        assert_eq!((said, heard), (70_000, 50_000));
        let want = Relayed {
            sent: 50_000,
            received: 70_000,
            end: End::Whole,
        };
        assert_eq!(relayed, want);
    }

    #[tokio::test]
    async fn whose_connection_broke_is_told() {
        let (client, mut server, relaying) = between(&Rc::default());
        drop(client);
        server.write_all(b"late").await.unwrap();
        assert_eq!(relaying.await.end, End::Client);
        let (mut client, server, relaying) = between(&Rc::default());
        drop(server);
        client.write_all(b"late").await.unwrap();
        assert_eq!(relaying.await.end, End::Far);
    }

    #[tokio::test]
    async fn silence_ends_it_and_either_way_counts() {
        let house = Rc::<House>::default();
        let (mut client, mut server, relaying) = between(&house);
        let mut relaying = std::pin::pin!(relaying);
        let mut one = [0];
        for _ in 0..3 {
            let spoken = async {
                server.write_all(b"x").await.unwrap();
                client.read_exact(&mut one).await.unwrap();
            };
            tokio::select! {
                ended = relaying.as_mut() => panic!("{ended:?}"),
                () = spoken => {}
            }
            house.tick();
        }
        house.tick();
        assert_eq!(relaying.await.end, End::Still);
    }
}
