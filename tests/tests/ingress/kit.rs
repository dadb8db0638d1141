//! A mesh with a gateway, certificates for it, and clients.

use anyhow::{Context, ensure};
use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, StatusCode, Version};
use http_body_util::BodyExt;
use hyper_util::rt::{TokioExecutor, TokioIo};
use leeward_testkit::policy::service;
use leeward_testkit::{Backend, Body, Client, Mesh, MeshBuilder, Port, Protocol, Reply, eventually, get};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, crypto};

pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Whoever signs the certificates of a test.
pub(crate) struct Ca {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "A test's own CA");
        let pem = params.self_signed(&key)?.pem();
        Ok(Self {
            pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// A certificate and its key, as PEM. Without hosts it is a client's.
    pub(crate) fn issue(&self, hosts: &[&str]) -> anyhow::Result<(String, String)> {
        let key = KeyPair::generate()?;
        let names: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(names)?;
        params.use_authority_key_identifier_extension = true;
        params
            .distinguished_name
            .push(DnType::CommonName, "A server or a client");
        if hosts.is_empty() {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()))
    }
}

/// A mesh of one zone with a backend behind its proxy, and a directory of certificates.
pub(crate) struct Rig {
    pub(crate) mesh: Mesh,
    pub(crate) ca: Ca,
    pub(crate) backend: Backend,
    pub(crate) port: Port,
    pub(crate) certificates: PathBuf,
    _dir: leeward_testkit::TempDir,
}

/// What a client says in the handshake.
#[derive(Clone, Default)]
pub(crate) struct Hello<'a> {
    /// The host that it asks for; none if empty.
    pub(crate) sni: &'a str,
    pub(crate) alpn: &'a [&'a str],
    /// Certificate and key of its own.
    pub(crate) own: Option<&'a (String, String)>,
    pub(crate) tls12: bool,
}

impl Rig {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::with(|builder| builder).await
    }

    pub(crate) async fn with(more: impl FnOnce(MeshBuilder) -> MeshBuilder) -> anyhow::Result<Self> {
        let dir = leeward_testkit::TempDir::new()?;
        let certificates = dir.path().join("certificates");
        std::fs::create_dir_all(&certificates)?;
        let builder = Mesh::builder()
            .node("a", "a1")
            .flag("--workers", "2")
            .flag("--access-log", "stdout")
            .flag("--gateway-certificates", &certificates.display().to_string());
        let mesh = more(builder).start().await?;
        let backend = Backend::start("shop")?;
        mesh.apply(&service("shop", &[(backend.address(), "a", "a1")], &[]))
            .await?;
        Ok(Self {
            mesh,
            ca: Ca::new()?,
            backend,
            port: Port::reserve()?,
            certificates,
            _dir: dir,
        })
    }

    /// Puts a certificate for these hosts into the directory, as certbot does: beside it, then renamed.
    pub(crate) fn certify(&self, name: &str, hosts: &[&str]) -> anyhow::Result<()> {
        let (certificate, key) = self.ca.issue(hosts)?;
        self.put(&format!("{name}.pem"), &certificate)?;
        self.put(&format!("{name}.key"), &key)
    }

    pub(crate) fn put(&self, file: &str, text: &str) -> anyhow::Result<()> {
        let path = self.certificates.join(file);
        let beside = self.certificates.join(format!("{file}.new"));
        std::fs::write(&beside, text)?;
        Ok(std::fs::rename(beside, path)?)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// A listener at the rig's port; `more` are further fields, such as `hostname: a.example`.
    pub(crate) fn https(&self, name: &str, certificates: &str, more: &str) -> String {
        let port = self.address().port();
        let more = if more.is_empty() {
            String::new()
        } else {
            format!(", {more}")
        };
        let tls = if more.contains("tls:") {
            String::new()
        } else {
            format!(", tls: {{certificateRefs: [{certificates}]}}")
        };
        format!("{{name: {name}, address: 127.0.0.1, port: {port}, protocol: HTTPS{tls}{more}}}")
    }

    /// Applies a gateway with these listeners, and a route of it for each host, and waits until the port is listened on.
    pub(crate) async fn open(&self, listeners: &[String], hosts: &[&str]) -> anyhow::Result<()> {
        let mut text = gateway("public", listeners, "");
        for (i, host) in hosts.iter().enumerate() {
            text += &route_of(&format!("r{i}"), host, "shop", "{name: public}");
        }
        self.mesh.apply(&text).await?;
        self.wait_listening(true).await
    }

    /// Waits until every listener of the rig's port works, HTTP/3 too where `http3`.
    pub(crate) async fn wait_listening(&self, all: bool) -> anyhow::Result<()> {
        eventually("the gateway to listen", SOON, || async {
            let shown = self.gateways().await?;
            let port = self.shown_port(&shown)?;
            ensure!(port["listening"] == true, "{shown}");
            let problems = port["listeners"].as_array().into_iter().flatten();
            let none = port["problem"].is_null() && problems.into_iter().all(|l| l["problem"].is_null());
            ensure!(!all || none, "{shown}");
            Ok(())
        })
        .await
    }

    pub(crate) fn shown_port<'v>(&self, shown: &'v Value) -> anyhow::Result<&'v Value> {
        let mut ports = shown["ports"].as_array().into_iter().flatten();
        let address = self.address().to_string();
        ports
            .find(|port| port["address"] == address.as_str())
            .with_context(|| format!("{shown}"))
    }

    /// What the proxy says of its gateways.
    pub(crate) async fn gateways(&self) -> anyhow::Result<Value> {
        let admin = Client::new(self.mesh.node("a1")?.admin, Protocol::Http1);
        Ok(serde_json::from_slice(
            &admin.get("admin", "/gateways").await?.body,
        )?)
    }

    fn config(&self, hello: &Hello<'_>) -> anyhow::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca.pem.as_bytes())?)?;
        let versions: &[&SupportedProtocolVersion] = if hello.tls12 { &[&TLS12] } else { &[&TLS13] };
        let provider = Arc::new(crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_root_certificates(roots);
        let mut config = match hello.own {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder.with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes())?],
                PrivateKeyDer::from_pem_slice(key.as_bytes())?,
            )?,
        };
        config.alpn_protocols = hello.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// A TLS connection. Its certificate must be one of the rig's for the host that is asked for.
    pub(crate) async fn tls(&self, hello: &Hello<'_>) -> anyhow::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address()).await?;
        let connector = TlsConnector::from(self.config(hello)?);
        // An address is no host to ask for: nothing is said then, and the certificate must be for the address.
        let name = match hello.sni {
            "" => ServerName::from(self.address().ip()),
            host => ServerName::try_from(host.to_owned())?,
        };
        let connecting = connector.connect(name, stream);
        Ok(tokio::time::timeout(SOON, connecting).await??)
    }

    /// One request on a connection of its own by HTTP/1.1 or HTTP/2, whichever is agreed on.
    pub(crate) async fn ask(&self, hello: &Hello<'_>, request: Request<Body>) -> anyhow::Result<Reply> {
        let stream = self.tls(hello).await?;
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        one_request(stream, http2, request).await
    }

    /// GET by HTTP/2, asking for the host in the handshake, too.
    pub(crate) async fn get(&self, host: &str, path: &str) -> anyhow::Result<Reply> {
        let hello = Hello {
            sni: host,
            alpn: &["h2", "http/1.1"],
            ..Hello::default()
        };
        self.ask(&hello, get(host, path)).await
    }

    /// A connection by HTTP/3.
    pub(crate) async fn http3(&self, hello: &Hello<'_>) -> anyhow::Result<Http3> {
        let hello = Hello {
            alpn: &["h3"],
            ..hello.clone()
        };
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(self.config(&hello)?)?;
        let mut endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
        let connecting = endpoint.connect(self.address(), hello.sni)?;
        let quic = tokio::time::timeout(SOON, connecting).await??;
        let (mut driver, sender) = h3::client::new(h3_quinn::Connection::new(quic.clone())).await?;
        let driving =
            tokio::spawn(async move { std::future::poll_fn(|cx| driver.poll_close(cx)).await.to_string() });
        Ok(Http3 {
            quic,
            sender,
            driving,
            _endpoint: endpoint,
        })
    }
}

pub(crate) async fn one_request(
    stream: TlsStream<TcpStream>,
    http2: bool,
    mut request: Request<Body>,
) -> anyhow::Result<Reply> {
    let io = TokioIo::new(stream);
    let response = if http2 {
        let uri = request.uri().to_string().replacen("http://", "https://", 1);
        *request.uri_mut() = uri.parse()?;
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        sender.send_request(request).await?
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
        tokio::spawn(connection);
        let host = request.uri().authority().context("a host")?.to_string();
        request.headers_mut().insert(http::header::HOST, host.parse()?);
        let path = request
            .uri()
            .path_and_query()
            .context("a path")?
            .as_str()
            .parse()?;
        *request.uri_mut() = path;
        sender.send_request(request).await?
    };
    let (parts, body) = response.into_parts();
    let body = tokio::time::timeout(SOON, body.collect()).await??;
    Ok(Reply {
        status: parts.status,
        headers: parts.headers,
        trailers: body.trailers().cloned(),
        body: body.to_bytes(),
    })
}

/// A connection by HTTP/3.
pub(crate) struct Http3 {
    pub(crate) quic: quinn::Connection,
    pub(crate) sender: h3::client::SendRequest<h3_quinn::OpenStreams, Bytes>,
    /// Ends with the connection, and says why.
    pub(crate) driving: tokio::task::JoinHandle<String>,
    _endpoint: quinn::Endpoint,
}

impl Http3 {
    /// A request with a body in these pieces and these trailers, and the whole answer.
    pub(crate) async fn call(
        &mut self,
        request: Request<()>,
        pieces: &[&[u8]],
        trailers: Option<HeaderMap>,
    ) -> anyhow::Result<Reply> {
        let call = async {
            let mut stream = self.sender.send_request(request).await?;
            for piece in pieces {
                stream.send_data(Bytes::copy_from_slice(piece)).await?;
            }
            if let Some(trailers) = trailers {
                stream.send_trailers(trailers).await?;
            }
            stream.finish().await?;
            let (parts, ()) = stream.recv_response().await?.into_parts();
            let mut body = Vec::new();
            while let Some(mut data) = stream.recv_data().await? {
                body.extend_from_slice(&data.copy_to_bytes(data.remaining()));
            }
            anyhow::Ok(Reply {
                status: parts.status,
                headers: parts.headers,
                trailers: stream.recv_trailers().await?,
                body: body.into(),
            })
        };
        tokio::time::timeout(SOON, call).await?
    }

    pub(crate) async fn get(&mut self, host: &str, path: &str) -> anyhow::Result<Reply> {
        self.call(h3_request("GET", host, path), &[], None).await
    }
}

pub(crate) fn h3_request(method: &str, host: &str, path: &str) -> Request<()> {
    let request = Request::builder()
        .method(method)
        .uri(format!("https://{host}{path}"));
    request.version(Version::HTTP_3).body(()).unwrap()
}

/// A Gateway on the proxies of zone a; `more` are further lines of its spec.
pub(crate) fn gateway(name: &str, listeners: &[String], more: &str) -> String {
    let listeners = listeners.join(", ");
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: Gateway\nmetadata: {{name: {name}}}\nspec:\n  zones: [a]\n  listeners: [{listeners}]\n{more}"
    )
}

/// A Route of one host that hangs on these parents.
pub(crate) fn route_of(name: &str, host: &str, service: &str, parents: &str) -> String {
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: Route\nmetadata: {{name: {name}}}\nspec:\n  hostnames: [\"{host}\"]\n  parentRefs: [{parents}]\n  rules:\n    - backendRefs: [{{service: {service}}}]\n"
    )
}

#[track_caller]
pub(crate) fn is(reply: &Reply, status: StatusCode) {
    assert_eq!(reply.status, status, "{reply:?}");
}
