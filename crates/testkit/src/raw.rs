//! Bytes to a listener, and the bytes that come back.

use anyhow::{Context, bail};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What came back.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Every byte.
    pub bytes: Vec<u8>,
    /// Whether the peer closed the connection.
    pub closed: bool,
}

/// One connection.
#[derive(Debug)]
pub struct Raw {
    stream: TcpStream,
    heard: Vec<u8>,
}

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// Sends `bytes` on a connection of its own, then listens until the peer closes it or says nothing more for
/// `quiet` after its last byte.
///
/// # Errors
///
/// If it can't connect. A peer that closes before it has read everything is no error.
pub async fn exchange(to: SocketAddr, bytes: &[u8], quiet: Duration) -> anyhow::Result<Heard> {
    let mut raw = Raw::connect(to).await?;
    // A server may refuse and close early; what it said still counts.
    drop(raw.write(bytes).await);
    Ok(raw.listen(quiet).await)
}

impl Raw {
    /// Connects.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub async fn connect(to: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(to)
            .await
            .with_context(|| format!("can't connect to {to}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            heard: Vec::new(),
        })
    }

    /// Sends.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub async fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes).await?;
        Ok(())
    }

    /// Says that nothing more will be sent.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        self.stream.shutdown().await?;
        Ok(())
    }

    /// Everything heard so far.
    pub fn heard(&self) -> &[u8] {
        &self.heard
    }

    /// Listens until `pattern` has come.
    ///
    /// # Errors
    ///
    /// If the peer closes before, or it doesn't come in time.
    pub async fn until(&mut self, pattern: &[u8]) -> anyhow::Result<()> {
        let listening = async {
            while !self.heard.windows(pattern.len()).any(|window| window == pattern) {
                if !self.more().await? {
                    bail!("closed");
                }
            }
            Ok(())
        };
        let ended = match tokio::time::timeout(PATIENCE, listening).await {
            Ok(ended) => ended,
            Err(_) => Err(anyhow::anyhow!("nothing more within {PATIENCE:?}")),
        };
        ended.with_context(|| {
            let (want, got) = (
                String::from_utf8_lossy(pattern),
                String::from_utf8_lossy(&self.heard),
            );
            format!("waited for {want:?}, heard {got:?}")
        })
    }

    /// Listens until the peer closes, or says nothing for `quiet` after its last byte. It may take its time
    /// before the first one.
    pub async fn listen(mut self, quiet: Duration) -> Heard {
        loop {
            let patience = if self.heard.is_empty() { PATIENCE } else { quiet };
            match tokio::time::timeout(patience, self.more()).await {
                Ok(Ok(true)) => {}
                // A reset ends the connection as well as a FIN.
                Ok(Ok(false) | Err(_)) => {
                    return Heard {
                        bytes: self.heard,
                        closed: true,
                    };
                }
                Err(_) => {
                    return Heard {
                        bytes: self.heard,
                        closed: false,
                    };
                }
            }
        }
    }

    async fn more(&mut self) -> anyhow::Result<bool> {
        let mut buffer = vec![0; 16 << 10];
        let n = self.stream.read(&mut buffer).await?;
        self.heard.extend_from_slice(buffer.get(..n).unwrap_or_default());
        Ok(n > 0)
    }
}

impl Heard {
    /// As text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// The statuses of all answers, in order; an interim one too.
    pub fn statuses(&self) -> Vec<u16> {
        // Bodies of the tests' backends never contain a status line.
        let text = self.text();
        text.match_indices("HTTP/1.")
            .filter_map(|(at, _)| text.get(at + 9..at + 12)?.parse().ok())
            .collect()
    }
}
