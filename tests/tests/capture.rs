//! Workloads that know nothing of the mesh, in network namespaces of their own: the kernel brings their connections to the
//! proxy.
//!
//! Each test runs itself once more in a new network namespace, which is the world, and makes another in it, which is the
//! node; both end with their processes. That needs root, and programs; where they are missing the test leaves itself out,
//! unless `LEEWARD_TEST_CAPTURE` is `required`.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use anyhow::{Context, bail, ensure};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Process, TempDir, binaries, eventually};
use rustix::process::Signal;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto};

const SOON: Duration = Duration::from_secs(30);
/// Set for a test that runs in a namespace already.
const INSIDE: &str = "LEEWARD_TEST_CAPTURE_INSIDE";
/// The world's address, the node's, and those by which services are called, which nobody has.
const WORLD: &str = "10.77.0.1";
const WORLD6: &str = "fd77::1";
/// Where the proxy listens on the node.
const PORT: u16 = 15006;
/// The user of workloads; the proxy is root.
const WORKLOAD: &str = "1501";

/// Runs a test where nothing that it does is seen by others.
fn in_a_world<F: Future<Output = anyhow::Result<()>>>(
    name: &str,
    test: impl FnOnce() -> F,
) -> anyhow::Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        run("ip", &["link", "set", "lo", "up"])?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        return runtime.block_on(test());
    }
    if let Some(missing) = missing() {
        let wanted = std::env::var("LEEWARD_TEST_CAPTURE").is_ok_and(|value| value == "required");
        ensure!(!wanted, "{missing}");
        #[expect(clippy::print_stderr, reason = "a test that leaves itself out says so")]
        {
            eprintln!("{name} leaves itself out: {missing}");
        }
        return Ok(());
    }
    // Built here, where cargo has what it needs.
    let programs = binaries::dir()?;
    let output = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe()?)
        .args(["--exact", name, "--nocapture", "--test-threads", "1"])
        .env(INSIDE, "1")
        .env("LEEWARD_TEST_BINARIES", programs)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains("1 passed"), "it did not run: {said}");
    Ok(())
}

/// What there is not.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it needs root".to_owned());
    }
    for program in ["ip", "nft", "unshare", "nsenter", "setpriv", "curl", "bash"] {
        let has = |dir: &str| Path::new(dir).join(program).exists();
        let path = std::env::var("PATH").unwrap_or_default();
        if !path.split(':').any(has) {
            return Some(format!("there is no {program}"));
        }
    }
    let rules =
        "table inet t { chain c { type nat hook output priority -110; meta l4proto tcp redirect to :1; }; }";
    let tried = Command::new("unshare").args(["--net", "nft", rules]).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!(
            "namespaces or nftables don't work here: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => Some(error.to_string()),
    }
}

fn run(program: &str, args: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(args).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {args:?}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The node: a network namespace with a way to the world.
struct Node {
    dir: TempDir,
    /// Its namespace lasts as long as this.
    holder: Process,
    proxy: Option<Process>,
}

impl Node {
    fn new() -> anyhow::Result<Self> {
        let dir = TempDir::new()?;
        let mut command = Command::new("unshare");
        command.args(["--net", "sleep", "3600"]);
        let holder = Process::spawn("holder", command, dir.path())?;
        let node = Self {
            dir,
            holder,
            proxy: None,
        };
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let until = Duration::from_secs(20);
        let namespace = node.namespace();
        let began = tokio::time::Instant::now();
        // `unshare` has made it once it is another than this one.
        while std::fs::read_link(&namespace).is_ok_and(|there| there == own) {
            ensure!(began.elapsed() < until, "no namespace");
            std::thread::yield_now();
        }
        let pid = node.holder.id().to_string();
        for args in [
            vec![
                "link", "add", "world", "type", "veth", "peer", "name", "node", "netns", &pid,
            ],
            vec!["address", "add", "10.77.0.1/24", "dev", "world"],
            vec!["address", "add", "fd77::1/64", "dev", "world", "nodad"],
            vec!["link", "set", "world", "up"],
        ] {
            run("ip", &args)?;
        }
        for args in [
            "ip link set lo up",
            "ip address add 10.77.0.2/24 dev node",
            "ip address add fd77::2/64 dev node nodad",
            "ip link set node up",
            "ip route add default via 10.77.0.1",
            "ip -6 route add default via fd77::1",
        ] {
            let output = node.command("sh").args(["-c", args]).output()?;
            ensure!(
                output.status.success(),
                "{args}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(node)
    }

    fn namespace(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }

    /// A program on the node, as root.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.namespace()))
            .arg("--")
            .arg(program);
        command
    }

    /// A program of a workload's, which has 20 s.
    async fn workload(&self, user: &str, program: &str, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = tokio::process::Command::from(self.command("setpriv"));
        command
            .args([
                "--reuid",
                user,
                "--regid",
                user,
                "--clear-groups",
                "timeout",
                "20",
                program,
            ])
            .args(args)
            .kill_on_drop(true);
        Ok(command.output().await?)
    }

    /// What a workload gets by curl.
    async fn curl(&self, args: &[&str]) -> anyhow::Result<String> {
        let args = [&["--silent", "--show-error", "--noproxy", "*"], args].concat();
        let output = self.workload(WORKLOAD, "curl", &args).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "curl {args:?}: {} {said}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What a workload hears that connects, says something, and ends.
    async fn say(&self, host: &str, port: u16, text: &str) -> anyhow::Result<String> {
        // Bash has no way to end one half of a connection, so that the server ends at the end of a line.
        let script = format!("exec 3<>/dev/tcp/{host}/{port}; printf '{text}' >&3; cat <&3");
        let output = self.workload(WORKLOAD, "bash", &["-c", &script]).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script}: {} {said}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts the proxy on the node, with policy from files.
    async fn start_proxy(&mut self, policy: &str) -> anyhow::Result<()> {
        let dir = self.dir.path().join("policy");
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("policy.yaml"), policy)?;
        let program = binaries::path("leeward-proxy")?;
        let capture = format!("127.0.0.1:{PORT},[::1]:{PORT}");
        let net = format!("--net={}", self.namespace());
        let args = [
            &net,
            "--",
            &program.display().to_string(),
            "--zone=a",
            "--name=a1",
            "--policy",
            &dir.display().to_string(),
            "--capture",
            &capture,
            "--outbound=127.0.0.1:0",
            "--admin=127.0.0.1:15020",
            "--ofrep=off",
            "--workers=2",
        ];
        let proxy = Process::start("a1", Path::new("nsenter"), args, self.dir.path()).await?;
        self.proxy = Some(proxy);
        Ok(())
    }

    fn leeward(&self, args: &[&str]) -> anyhow::Result<Output> {
        let netns = self.namespace();
        let program = binaries::path("leeward")?;
        let output = Command::new(program)
            .arg("capture")
            .args(args)
            .args(["--netns", &netns])
            .output();
        output.context("can't run leeward")
    }

    /// Captures, or doesn't any more.
    fn capture(&self, args: &[&str]) -> anyhow::Result<()> {
        let output = self.leeward(args)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "leeward capture {args:?}: {said}");
        Ok(())
    }

    /// Captures for as long as the proxy is there.
    async fn capture_while(&self, name: &str) -> anyhow::Result<Process> {
        let pid = self.proxy.as_ref().context("no proxy")?.id().to_string();
        let mut command = Command::new(binaries::path("leeward")?);
        command
            .arg("capture")
            .args(UP)
            .args(["--while", &pid, "--netns", &self.namespace()]);
        let watching = Process::spawn(name, command, self.dir.path())?;
        eventually("the rules to be there", SOON, || async {
            ensure!(self.ruleset()?.contains("redirect"));
            Ok(())
        })
        .await?;
        Ok(watching)
    }

    fn ruleset(&self) -> anyhow::Result<String> {
        let output = self.command("nft").args(["list", "ruleset"]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    async fn metric(&self, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
        let output = self
            .command("curl")
            .args(["--silent", "http://127.0.0.1:15020/metrics"])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let of = |line: &&str| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| {
                rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label))
            })
        };
        let values = text
            .lines()
            .filter(of)
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    }
}

/// A server of the world, which says its name.
struct Server {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

/// How a server speaks.
#[derive(Clone)]
enum Speaks {
    Http1,
    Http2,
    Tls(Arc<ServerConfig>),
    /// A line is answered with the name and the line, and that is all.
    Line,
    /// The same, but before a line comes it says `hello`.
    Greets,
}

impl Server {
    async fn start(ip: &str, name: &'static str, speaks: Speaks) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((ip, 0)).await?;
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let speaks = speaks.clone();
                serving.spawn(async move {
                    // A client that goes away ends it.
                    drop(serve(stream, name, speaks).await);
                });
            }
        });
        Ok(Self {
            address,
            _tasks: tasks,
        })
    }
}

async fn serve(mut stream: tokio::net::TcpStream, name: &'static str, speaks: Speaks) -> anyhow::Result<()> {
    let answer = service_fn(move |request: http::Request<Incoming>| async move {
        let text = format!("{name} {:?} {}", request.version(), request.uri().path());
        Ok::<_, Infallible>(http::Response::new(Full::new(bytes::Bytes::from(text))))
    });
    match speaks {
        Speaks::Http1 => {
            let io = TokioIo::new(stream);
            hyper::server::conn::http1::Builder::new()
                .serve_connection(io, answer)
                .await?;
        }
        Speaks::Http2 => {
            let io = TokioIo::new(stream);
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            http.serve_connection(io, answer).await?;
        }
        Speaks::Tls(config) => {
            let stream = TlsAcceptor::from(config).accept(stream).await?;
            let io = TokioIo::new(stream);
            hyper::server::conn::http1::Builder::new()
                .serve_connection(io, answer)
                .await?;
        }
        Speaks::Line | Speaks::Greets => {
            if matches!(speaks, Speaks::Greets) {
                stream.write_all(b"hello ").await?;
            }
            let mut line = Vec::new();
            loop {
                match stream.read_u8().await? {
                    b'\n' => break,
                    byte => line.push(byte),
                }
            }
            stream
                .write_all(format!("{name}: {}\n", String::from_utf8_lossy(&line)).as_bytes())
                .await?;
            stream.shutdown().await?;
            // Until its client has heard it.
            stream.read_to_end(&mut line).await?;
        }
    }
    Ok(())
}

fn tls() -> anyhow::Result<Arc<ServerConfig>> {
    let made = rcgen::generate_simple_self_signed(vec!["db.example".to_owned()])?;
    let key = made.signing_key.serialize_der();
    let key = tokio_rustls::rustls::pki_types::PrivateKeyDer::try_from(key).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.into()], key)?;
    Ok(Arc::new(config))
}

const ZONE: &str = "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {capture: {unknown: UNKNOWN, detectTimeout: 5s}}\n";

fn zone(unknown: &str) -> String {
    ZONE.replace("UNKNOWN", unknown)
}

/// A service that is called by addresses that nobody has.
fn called(name: &str, at: &[&str], to: SocketAddr, more: &[&str]) -> String {
    let at = format!("addresses: {at:?}");
    // A busy machine may take its time.
    let spec = [&*at, "connectTimeout: 20s"];
    service(name, &[(to, "a", "")], &[&spec[..], more].concat())
}

const UP: [&str; 3] = ["up", "--proxy-uid", "0"];

#[test]
fn a_workload_calls_services_by_addresses_that_nobody_has() -> anyhow::Result<()> {
    in_a_world(
        "a_workload_calls_services_by_addresses_that_nobody_has",
        async || {
            let mut node = Node::new()?;
            let web = Server::start(WORLD, "web", Speaks::Http1).await?;
            let grpc = Server::start(WORLD, "grpc", Speaks::Http2).await?;
            let line = Server::start(WORLD, "line", Speaks::Line).await?;
            let greets = Server::start(WORLD, "greets", Speaks::Greets).await?;
            let secret = Server::start(WORLD, "secret", Speaks::Tls(tls()?)).await?;
            let web6 = Server::start(WORLD6, "web6", Speaks::Http1).await?;
            let policy = [
                zone("Refuse"),
                called("web", &["10.96.0.10:80"], web.address, &[]),
                called("web6", &["[fd96::10]:80"], web6.address, &[]),
                called("grpc", &["10.96.0.11:80"], grpc.address, &["protocol: HTTP2"]),
                called(
                    "line",
                    &["10.96.0.12:1000", "[fd96::12]:1000"],
                    line.address,
                    &["protocol: TCP"],
                ),
                called("greets", &["10.96.0.13:3306"], greets.address, &["protocol: TCP"]),
                called(
                    "secret",
                    &[],
                    secret.address,
                    &["protocol: TCP", "serverNames: [db.example]"],
                ),
                route("shop", "shop.example", "web", &[]),
            ];
            node.start_proxy(&policy.concat()).await?;
            let other =
                "table inet other { chain c { type filter hook output priority 0; tcp dport 7 drop; }; }";
            let made = node.command("nft").arg(other).output()?;
            ensure!(made.status.success());
            let before = node.ruleset()?;
            node.capture(&UP)?;
            // Again is the same.
            node.capture(&UP)?;
            ensure!(
                node.ruleset()?.matches("redirect").count() == 1,
                "{}",
                node.ruleset()?
            );

            assert_eq!(node.curl(&["http://10.96.0.10/a"]).await?, "web HTTP/1.1 /a");
            assert_eq!(node.curl(&["http://[fd96::10]/b"]).await?, "web6 HTTP/1.1 /b");
            let prior = "--http2-prior-knowledge";
            assert_eq!(
                node.curl(&[prior, "http://10.96.0.11/c"]).await?,
                "grpc HTTP/2.0 /c"
            );
            assert_eq!(node.say("10.96.0.12", 1000, "x\\n").await?, "line: x\n");
            assert_eq!(node.say("fd96::12", 1000, "six\\n").await?, "line: six\n");
            // Its server speaks first, and isn't waited for.
            assert_eq!(node.say("10.96.0.13", 3306, "y\\n").await?, "hello greets: y\n");
            // By the name in TLS, wherever it was to go; the server's own certificate comes through.
            let resolve = ["--insecure", "--resolve", "db.example:443:10.96.0.99"];
            let got = node
                .curl(&[&resolve[..], &["https://db.example/d"]].concat())
                .await?;
            assert_eq!(got, "secret HTTP/1.1 /d");
            // By a route, wherever it was to go.
            let resolve = ["--resolve", "shop.example:8080:10.96.0.98"];
            let got = node
                .curl(&[&resolve[..], &["http://shop.example:8080/e"]].concat())
                .await?;
            assert_eq!(got, "web HTTP/1.1 /e");
            // What policy doesn't know is refused, as it says here.
            let resolve = [
                "--resolve",
                "other.example:8080:10.96.0.98",
                "--write-out",
                " %{http_code}",
            ];
            let got = node
                .curl(&[&resolve[..], &["http://other.example:8080/"]].concat())
                .await?;
            ensure!(got.ends_with(" 404"), "{got}");
            ensure!(node.say("10.96.0.97", 99, "z\\n").await.is_err());

            for (taken_for, least) in [("http1", 4.0), ("h2", 1.0), ("tls", 1.0), ("tcp", 4.0)] {
                let label = format!("as=\"{taken_for}\"");
                let counted = node
                    .metric("leeward_captured_connections_total", &[&label])
                    .await?;
                ensure!(counted >= least, "{taken_for}: {counted}");
            }
            let refused = ["outcome=\"failed\"", "reason=\"no_route\""];
            ensure!(node.metric("leeward_tcp_connections_total", &refused).await? >= 1.0);
            let status = node.leeward(&["status"])?;
            ensure!(String::from_utf8_lossy(&status.stdout).contains("redirect to :15006"));
            node.capture(&["down"])?;
            assert_eq!(node.ruleset()?, before, "to the byte");
            node.capture(&["down"])?;
            assert_eq!(node.ruleset()?, before);
            ensure!(!node.leeward(&["status"])?.status.success());
            Ok(())
        },
    )
}

#[test]
fn what_policy_does_not_know_goes_where_it_was_meant_to() -> anyhow::Result<()> {
    in_a_world(
        "what_policy_does_not_know_goes_where_it_was_meant_to",
        async || {
            let mut node = Node::new()?;
            let web = Server::start(WORLD, "web", Speaks::Http1).await?;
            let grpc = Server::start(WORLD, "grpc", Speaks::Http2).await?;
            let line = Server::start(WORLD, "line", Speaks::Line).await?;
            let greets = Server::start(WORLD, "greets", Speaks::Greets).await?;
            let secret = Server::start(WORLD, "secret", Speaks::Tls(tls()?)).await?;
            let web6 = Server::start(WORLD6, "web6", Speaks::Http1).await?;
            let backend = Server::start(WORLD, "backend", Speaks::Http1).await?;
            let shop = service("shop", &[(backend.address, "a", "")], &[])
                + &route("shop", "shop.example", "shop", &[]);
            node.start_proxy(&(zone("Pass") + &shop)).await?;
            node.capture(&UP)?;
            let at = |server: &Server, scheme: &str| format!("{scheme}://{}/", server.address);
            // Two requests on one connection, each to where its Host says.
            let web_url = at(&web, "http");
            let got = node.curl(&[&web_url, &web_url]).await?;
            assert_eq!(got, "web HTTP/1.1 /web HTTP/1.1 /");
            assert_eq!(
                node.curl(&["-H", "host: shop.example", &web_url]).await?,
                "backend HTTP/1.1 /"
            );
            assert_eq!(
                node.curl(&["--http2-prior-knowledge", &at(&grpc, "http")])
                    .await?,
                "grpc HTTP/2.0 /"
            );
            assert_eq!(node.curl(&[&at(&web6, "http")]).await?, "web6 HTTP/1.1 /");
            assert_eq!(
                node.curl(&["--insecure", &at(&secret, "https")]).await?,
                "secret HTTP/1.1 /"
            );
            let say = async |server: &Server, text: &str| node.say(WORLD, server.address.port(), text).await;
            assert_eq!(say(&line, "x\\n").await?, "line: x\n");
            // Nobody has said that this server speaks first: it is waited for its client, but not for long.
            assert_eq!(say(&greets, "y\\n").await?, "hello greets: y\n");
            ensure!(
                node.metric(
                    "leeward_tcp_connections_total",
                    &["outcome=\"served\"", "service=\"-\""]
                )
                .await?
                    >= 3.0
            );
            // Nobody is there.
            ensure!(node.say(WORLD, 1, "x\\n").await.is_err());
            // The listener itself has nothing to say to whoever was not captured.
            let refused = node
                .metric("leeward_captured_connections_total", &["as=\"refused\""])
                .await?;
            let url = format!("http://127.0.0.1:{PORT}/");
            ensure!(node.curl(&[&url]).await.is_err());
            let now = node
                .metric("leeward_captured_connections_total", &["as=\"refused\""])
                .await?;
            ensure!(now > refused, "{now}");
            Ok(())
        },
    )
}

#[test]
fn what_is_excluded_goes_straight() -> anyhow::Result<()> {
    in_a_world("what_is_excluded_goes_straight", async || {
        let mut node = Node::new()?;
        let straight = Server::start(WORLD, "straight", Speaks::Line).await?;
        let mesh = Server::start(WORLD, "mesh", Speaks::Line).await?;
        let at = straight.address.to_string();
        let policy = zone("Refuse") + &called("line", &[&at], mesh.address, &["protocol: TCP"]);
        node.start_proxy(&policy).await?;
        let port = straight.address.port();
        let hears = async || node.say(WORLD, port, "x\\n").await;
        assert_eq!(hears().await?, "straight: x\n");
        node.capture(&UP)?;
        assert_eq!(hears().await?, "mesh: x\n");
        let port_text = port.to_string();
        for excluded in [
            ["--exclude-port", &port_text],
            ["--exclude-uid", WORKLOAD],
            ["--exclude-cidr", "10.77.0.0/16"],
            ["--include-cidr", "10.96.0.0/16"],
            ["--family", "ipv6"],
        ] {
            node.capture(&[&UP[..], &excluded[..]].concat())?;
            assert_eq!(hears().await?, "straight: x\n", "{excluded:?}");
            // Each replaces what was before.
            node.capture(&UP)?;
            assert_eq!(hears().await?, "mesh: x\n");
        }
        node.capture(&[&UP[..], &["--include-cidr", "10.77.0.0/16", "--family", "ipv4"]].concat())?;
        assert_eq!(hears().await?, "mesh: x\n");
        // Root's own connections are the proxy's here.
        let script = format!("exec 3<>/dev/tcp/{WORLD}/{port}; printf 'x\\n' >&3; cat <&3");
        let output = node.workload("0", "bash", &["-c", &script]).await?;
        assert_eq!(String::from_utf8_lossy(&output.stdout), "straight: x\n");
        Ok(())
    })
}

#[test]
fn a_proxy_that_is_gone_takes_nothing_with_it_but_what_was_captured() -> anyhow::Result<()> {
    in_a_world(
        "a_proxy_that_is_gone_takes_nothing_with_it_but_what_was_captured",
        async || {
            let mut node = Node::new()?;
            let line = Server::start(WORLD, "line", Speaks::Line).await?;
            let port = line.address.port();
            // Nobody listens yet: nothing is captured, and nothing changed.
            let early = node.leeward(&UP)?;
            let said = String::from_utf8_lossy(&early.stderr).into_owned();
            ensure!(
                !early.status.success() && said.contains("nobody listens at 127.0.0.1:15006"),
                "{said}"
            );
            assert_eq!(node.ruleset()?, "");
            node.start_proxy(&zone("Pass")).await?;
            node.capture(&UP)?;
            assert_eq!(node.say(WORLD, port, "x\\n").await?, "line: x\n");
            node.proxy.as_mut().context("no proxy")?.kill9()?;
            // Closed, until somebody opens it: what was to be guarded doesn't go unguarded.
            ensure!(node.say(WORLD, port, "x\\n").await.is_err());
            node.capture(&["down"])?;
            assert_eq!(node.say(WORLD, port, "x\\n").await?, "line: x\n");

            // Or open at once, if that is wanted.
            node.start_proxy(&zone("Pass")).await?;
            let mut watching = node.capture_while("watching").await?;
            node.proxy.as_mut().context("no proxy")?.kill9()?;
            ensure!(watching.wait(SOON).await?.success());
            assert_eq!(node.ruleset()?, "");
            assert_eq!(node.say(WORLD, port, "x\\n").await?, "line: x\n");

            // It undoes the same when it is told to end.
            node.start_proxy(&zone("Pass")).await?;
            let mut watching = node.capture_while("watching-again").await?;
            watching.signal(Signal::TERM);
            ensure!(watching.wait(SOON).await?.success());
            assert_eq!(node.ruleset()?, "");
            Ok(())
        },
    )
}

#[test]
fn a_proxy_that_captures_itself_does_not_go_in_a_circle() -> anyhow::Result<()> {
    in_a_world(
        "a_proxy_that_captures_itself_does_not_go_in_a_circle",
        async || {
            let mut node = Node::new()?;
            let line = Server::start(WORLD, "line", Speaks::Line).await?;
            let web = Server::start(WORLD, "web", Speaks::Http1).await?;
            node.start_proxy(&zone("Pass")).await?;
            // The wrong user.
            node.capture(&["up", "--proxy-uid", "4242"])?;
            ensure!(node.say(WORLD, line.address.port(), "x\\n").await.is_err());
            let url = format!("http://{}/", web.address);
            let got = node.curl(&["--write-out", " %{http_code}", &url]).await?;
            ensure!(!got.contains("web"), "{got}");
            let refused = node
                .metric("leeward_captured_connections_total", &["as=\"refused\""])
                .await?;
            ensure!((2.0..40.0).contains(&refused), "{refused}");
            Ok(())
        },
    )
}

#[test]
fn bad_values_and_missing_rights_are_told() -> anyhow::Result<()> {
    in_a_world("bad_values_and_missing_rights_are_told", async || {
        let program = binaries::path("leeward")?;
        let said = |command: &mut Command| {
            let output = command.output()?;
            let code = output.status.code().unwrap_or_default();
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            anyhow::Ok((code, text.into_owned()))
        };
        let capture = |args: &[&str]| said(Command::new(&program).arg("capture").args(args));
        for (bad, why) in [
            (vec!["up"], "--proxy-uid"),
            (vec!["up", "--proxy-uid", "no-such-user"], "want a user's number"),
            (
                vec!["up", "--proxy-uid", "0", "--exclude-port", "70000"],
                "want a port from 1 to 65535",
            ),
            (
                vec!["up", "--proxy-uid", "0", "--exclude-cidr", "10.0.0.1/8"],
                "bits after its prefix",
            ),
            (
                vec!["down", "--netns", "/no/such/file"],
                "want a network namespace",
            ),
        ] {
            let (code, text) = capture(&bad)?;
            ensure!(code == 64 && text.contains(why), "{bad:?}: {code} {text}");
        }
        let (code, text) = capture(&["plan", "--proxy-uid", "0", "--exclude-port", "22"])?;
        ensure!(code == 0 && text.contains("tcp dport { 22 } return"), "{text}");
        assert_eq!(run("nft", &["list", "ruleset"])?, "", "a plan changes nothing");
        let (code, text) = said(
            Command::new(&program)
                .args(["capture", "up", "--proxy-uid", "0", "--unchecked"])
                .env("PATH", "/nowhere"),
        )?;
        ensure!(code == 1 && text.contains("install nftables"), "{text}");
        // Who may not gets told so. The program is root's to run here, so that only its rights are taken.
        let (code, text) = said(
            Command::new("setpriv")
                .args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"])
                .arg(&program)
                .args(["capture", "up", "--proxy-uid", "0", "--unchecked"]),
        )?;
        ensure!(code == 1 && text.contains("CAP_NET_ADMIN"), "{text}");
        if !run("nft", &["list", "ruleset"])?.is_empty() {
            bail!("something was changed");
        }
        Ok(())
    })
}
