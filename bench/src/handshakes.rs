//! What a connection costs the proxy that takes it: full handshakes of TLS 1.3 with certificates on both sides, each with
//! one request.

use crate::measure::{Bench, cpu_seconds, pause, pinned_to_load};
use crate::zones::{By, DOMAIN, Way};
use anyhow::{Context, ensure};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use leeward_identity::{Identity, SpiffeId};
use leeward_zone::{Client, Congestion};
use std::io::{Write, stdout};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::client::Resumption;

/// Connects again and again, with a request on each connection.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Shaking {
    /// Where to.
    #[arg(long)]
    to: SocketAddr,
    /// The directory of the certificates to show.
    #[arg(long)]
    identity: PathBuf,
    /// The backend's port.
    #[arg(long)]
    backend: u16,
    /// By QUIC, in place of TLS over TCP.
    #[arg(long)]
    quic: bool,
    /// How long, in seconds.
    #[arg(long)]
    seconds: u32,
}

/// Connections that are made at once.
const AT_ONCE: usize = 8;
/// Longest wait for one.
const PATIENCE: Duration = Duration::from_secs(10);
/// Who is at the other end.
const ZONE: &str = "b";
const NAME: &str = "b1";

impl Bench<'_> {
    pub(crate) fn handshakes(&self) -> anyhow::Result<()> {
        self.issue()?;
        let all: Vec<_> = By::here()
            .into_iter()
            .filter(|by| matches!(by, By::Quic | By::Http1 | By::Envoy))
            .collect();
        let mut costs: Vec<Vec<f64>> = vec![Vec::new(); all.len()];
        for _ in 0..self.rounds {
            for (by, costs) in all.iter().zip(&mut costs) {
                costs.push(self.cost(*by).with_context(|| by.name())?);
            }
        }
        let mut out = stdout();
        writeln!(
            out,
            "\nFull handshakes, TLS 1.3 with certificates on both sides, each with one request of 1 KiB ({} rounds)",
            self.rounds
        )?;
        writeln!(out, "  {:<28} {:>12}", "", "CPU us each")?;
        for (by, mut costs) in all.iter().zip(costs) {
            costs.sort_by(f64::total_cmp);
            let median = costs.get(costs.len() / 2).copied().unwrap_or(f64::NAN);
            // By TCP the requests here are HTTP/1.1's, also Envoy's.
            let name = match by {
                By::Quic => "leeward, QUIC",
                By::Envoy => "envoy, TLS over TCP",
                By::Auto | By::Http2 | By::Http1 | By::EnvoyHttp3 => "leeward, TLS over TCP",
            };
            writeln!(out, "  {name:<28} {median:>12.1}")?;
        }
        Ok(())
    }

    /// CPU time of the far proxy for each connection, in microseconds.
    fn cost(&self, by: By) -> anyhow::Result<f64> {
        let pair = self.pair(by, &Way::HERE)?;
        pair.wait(by)?;
        pause(Duration::from_millis(700));
        let shake = |seconds: u32| -> anyhow::Result<f64> {
            let mut command = pinned_to_load(&[], &std::env::current_exe()?);
            command.args(["shake", "--to", &pair.between.to_string()]);
            command.arg("--identity").arg(self.dir.join("a1"));
            command.args(["--backend", &self.backend.port(by.protocol()).to_string()]);
            command.args(["--seconds", &seconds.to_string()]);
            if by == By::Quic {
                command.arg("--quic");
            }
            let output = command.output()?;
            let told = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{told}");
            Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
        };
        shake(1)?;
        let before = cpu_seconds(pair.far())?;
        let made = shake(self.seconds)?;
        Ok((cpu_seconds(pair.far())? - before) * 1e6 / made)
    }
}

/// Does it, and prints how many connections were made.
pub(crate) fn shake(how: &Shaking) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let made = LocalSet::new().block_on(&runtime, shake_all(how.clone()))?;
    writeln!(stdout(), "{made}")?;
    Ok(())
}

async fn shake_all(how: Shaking) -> anyhow::Result<u64> {
    let identity = Identity::load(&how.identity)?;
    let peer = SpiffeId::proxy(DOMAIN, ZONE, NAME)?;
    let mut config = ClientConfig::clone(&*identity.client_config(&[b"http/1.1"], &peer)?);
    // Whole ones, also towards a server that would resume.
    config.resumption = Resumption::disabled();
    let connector = TlsConnector::from(Arc::new(config));
    let client = Rc::new(Client::new(identity, Congestion::default()));
    let how = Rc::new(how);
    let until = Instant::now() + Duration::from_secs(how.seconds.into());
    let mut clients = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (how, connector, client, peer) = (
            Rc::clone(&how),
            connector.clone(),
            Rc::clone(&client),
            peer.clone(),
        );
        clients.spawn_local(async move {
            let mut made = 0u64;
            while Instant::now() < until {
                let one = async {
                    if how.quic {
                        by_quic(&how, &client, &peer).await
                    } else {
                        by_tcp(&how, &connector).await
                    }
                };
                tokio::time::timeout(PATIENCE, one).await.context("no answer")??;
                made += 1;
            }
            anyhow::Ok(made)
        });
    }
    let mut made = 0;
    while let Some(one) = clients.join_next().await {
        made += one??;
    }
    Ok(made)
}

/// The header in which the calling proxy names the endpoint. Other proxies don't mind it.
fn endpoint(how: &Shaking) -> String {
    format!("backend/127.0.0.1:{}", how.backend)
}

async fn by_tcp(how: &Shaking, connector: &TlsConnector) -> anyhow::Result<()> {
    let tcp = TcpStream::connect(how.to).await?;
    tcp.set_nodelay(true)?;
    let mut tls = connector.connect(how.to.ip().into(), tcp).await?;
    let request = format!(
        "GET /1k HTTP/1.1\r\nhost: backend\r\nleeward-endpoint: {}\r\nconnection: close\r\n\r\n",
        endpoint(how)
    );
    tls.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    // Some close without the TLS alert for it, after the whole answer.
    let ended = tls.read_to_end(&mut answer).await;
    ensure!(
        answer.starts_with(b"HTTP/1.1 200") && answer.len() > 1024,
        "{ended:?} {:?}",
        String::from_utf8_lossy(&answer)
    );
    Ok(())
}

async fn by_quic(how: &Shaking, client: &Client, peer: &SpiffeId) -> anyhow::Result<()> {
    let link = client.connect(how.to, peer).await?;
    let request = Request::get("http://backend/1k")
        .header("leeward-endpoint", endpoint(how))
        .body(Empty::<Bytes>::new())?;
    let Ok(response) = link.send(request.into()).await else {
        anyhow::bail!("no answer by QUIC");
    };
    ensure!(response.status() == 200, "{}", response.status());
    let body = response.into_body().collect().await?;
    ensure!(body.to_bytes().len() == 1024, "not the whole answer");
    Ok(())
}
