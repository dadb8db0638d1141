//! Who is let in at the inbound listener of a real proxy, by certificate. That proxies refuse such servers as well is shown
//! in `crates/identity/tests/handshakes.rs`.

use anyhow::{Context, ensure};
use leeward_identity::authority::Authority;
use leeward_identity::{SpiffeId, fingerprint};
use leeward_testkit::policy::service;
use leeward_testkit::{Backend, Process, TempDir, binaries};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme, SupportedProtocolVersion,
};

const DOMAIN: &str = "leeward.test";
const ANYBODY: &str = "spiffe://leeward.test/zone/a/proxy/a1";
const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);

/// A proxy, and a workload behind it.
struct Door {
    dir: TempDir,
    backend: Backend,
    inbound: SocketAddr,
    // Ends when it is dropped.
    _process: Process,
}

/// What a client shows: a chain and its key.
type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Door {
    async fn open() -> anyhow::Result<Self> {
        let dir = TempDir::new()?;
        let path = |name: &str| dir.path().join(name);
        let authority = Authority::create(&path("ca"), DOMAIN)?;
        authority.issue(&SpiffeId::proxy(DOMAIN, "b", "b1")?, HOUR, &path("b1"))?;
        let backend = Backend::start("app")?;
        std::fs::create_dir(path("policy"))?;
        let zone = "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: b}\nspec: {proxies: [{name: b1, address: \"127.0.0.1:1\"}]}\n";
        let policy = zone.to_owned() + &service("app", &[(backend.address(), "b", "b1")], &[]);
        std::fs::write(path("policy").join("policy.yaml"), policy)?;
        let (files, identity) = (
            path("policy").display().to_string(),
            path("b1").display().to_string(),
        );
        let args = [
            ["--zone", "b"],
            ["--name", "b1"],
            ["--policy", &files],
            ["--identity", &identity],
            ["--inbound", "127.0.0.1:0"],
            ["--outbound", "127.0.0.1:0"],
            ["--admin", "127.0.0.1:0"],
            ["--ofrep", "127.0.0.1:0"],
        ];
        let program = binaries::path("leeward-proxy")?;
        let process = Process::start("b1", &program, args.concat(), dir.path()).await?;
        let inbound = process.address("inbound")?;
        Ok(Self {
            dir,
            backend,
            inbound,
            _process: process,
        })
    }

    /// A certificate of the mesh's own authority, changed.
    fn issued(&self, change: impl FnOnce(&mut CertificateParams)) -> anyhow::Result<Shown> {
        by(self.authority()?, &self.authority_name()?, change)
    }

    fn authority(&self) -> anyhow::Result<KeyPair> {
        let key = std::fs::read_to_string(self.dir.path().join("ca").join("ca-key.pem"))?;
        Ok(KeyPair::from_pem(&key)?)
    }

    /// What the authority calls itself.
    fn authority_name(&self) -> anyhow::Result<String> {
        let own = fingerprint(&self.authority()?.subject_public_key_info());
        let own = own.get(..8).context("no digest")?;
        Ok(format!("Leeward root {own} of {DOMAIN}"))
    }

    /// One request, to the workload, over a connection of this version; the answer.
    ///
    /// In TLS 1.3 a client has shaken hands before it hears what the server thinks of its certificate. Who expects to be
    /// refused waits for that, since the alert may be lost if there is more to read than the server wants.
    async fn knock(
        &self,
        shown: Option<Shown>,
        version: &'static SupportedProtocolVersion,
        patience: Duration,
    ) -> anyhow::Result<String> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[version])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Credulous(provider)));
        let config = match shown {
            Some((chain, key)) => config.with_client_auth_cert(chain, key)?,
            None => config.with_no_client_auth(),
        };
        let exchange = async {
            let stream = TcpStream::connect(self.inbound).await?;
            let name = ServerName::from(self.inbound.ip());
            let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            let mut early = [0; 1];
            if let Ok(read) = tokio::time::timeout(patience, stream.read(&mut early)).await {
                ensure!(read? == 0, "an answer before there is a request");
                return Ok(String::new());
            }
            let request = format!(
                "GET / HTTP/1.1\r\nHost: app.example\r\nLeeward-Endpoint: app/{}\r\nConnection: close\r\n\r\n",
                self.backend.address()
            );
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            anyhow::Ok(answer)
        };
        tokio::time::timeout(2 * SOON, exchange).await.context("no end")?
    }

    /// A good proxy is let in, or what others are refused for would prove nothing.
    async fn lets_proxies_in(&self) -> anyhow::Result<()> {
        let before = self.backend.requests();
        let answer = self
            .knock(Some(self.issued(|_| {})?), &TLS13, Duration::ZERO)
            .await?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        ensure!(
            self.backend.requests() == before + 1,
            "it didn't come to the workload"
        );
        Ok(())
    }

    /// Whoever shows this gets no answer at all, and nothing of it comes to the workload. The alert is what the proxy said.
    async fn refuses(&self, shown: Option<Shown>, alert: &str) -> anyhow::Result<()> {
        self.lets_proxies_in().await?;
        let before = self.backend.requests();
        match self.knock(shown, &TLS13, SOON).await {
            Ok(answer) => ensure!(answer.is_empty() && alert.is_empty(), "{answer}"),
            Err(error) => {
                let error = format!("{error:#}").to_lowercase();
                ensure!(error.contains(alert), "{error}; want {alert}");
            }
        }
        ensure!(self.backend.requests() == before, "it came to the workload");
        Ok(())
    }
}

/// A certificate that this key signs in the name of the mesh's authority; a proxy's, but for what is changed.
fn by(authority: KeyPair, name: &str, change: impl FnOnce(&mut CertificateParams)) -> anyhow::Result<Shown> {
    let mut issuer = CertificateParams::default();
    issuer.distinguished_name = DistinguishedName::new();
    issuer.distinguished_name.push(DnType::CommonName, name);
    issuer.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let issuer = Issuer::new(issuer, authority);
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = proxys()?;
    change(&mut params);
    let cert = params.signed_by(&pair, &issuer)?;
    shown(cert.der().clone(), &pair)
}

fn shown(cert: CertificateDer<'static>, pair: &KeyPair) -> anyhow::Result<Shown> {
    let key = PrivateKeyDer::from_pem_slice(pair.serialize_pem().as_bytes())?;
    Ok((vec![cert], key))
}

fn proxys() -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(ANYBODY.try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.not_before = (now() - HOUR).into();
    params.not_after = (now() + HOUR).into();
    Ok(params)
}

fn now() -> SystemTime {
    #[expect(clippy::disallowed_methods, reason = "certificates live by the wall clock")]
    SystemTime::now()
}

fn named(uri: &str) -> anyhow::Result<SanType> {
    Ok(SanType::URI(uri.try_into()?))
}

#[tokio::test]
async fn another_trust_domain_is_refused() -> anyhow::Result<()> {
    let door = Door::open().await?;
    for uri in [
        "spiffe://other.test/zone/a/proxy/a1",
        "spiffe://leeward.test.other/zone/a/proxy/a1",
        "spiffe://sub.leeward.test/zone/a/proxy/a1",
    ] {
        let name = named(uri)?;
        let shown = door.issued(|cert| cert.subject_alt_names = vec![name])?;
        door.refuses(Some(shown), "certificate").await.context(uri)?;
    }
    Ok(())
}

#[tokio::test]
async fn an_expired_certificate_is_refused() -> anyhow::Result<()> {
    let door = Door::open().await?;
    let shown = door.issued(|cert| cert.not_after = (now() - Duration::from_secs(5)).into())?;
    door.refuses(Some(shown), "expired").await
}

#[tokio::test]
async fn a_certificate_that_is_not_valid_yet_is_refused() -> anyhow::Result<()> {
    let door = Door::open().await?;
    let shown = door.issued(|cert| cert.not_before = (now() + HOUR / 2).into())?;
    door.refuses(Some(shown), "certificate").await
}

#[tokio::test]
async fn a_certificate_for_another_use_is_refused() -> anyhow::Result<()> {
    type Change = fn(&mut CertificateParams);
    let door = Door::open().await?;
    let cases: [(&str, Change); 6] = [
        ("for servers", |cert| {
            cert.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        }),
        ("for code", |cert| {
            cert.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
        }),
        ("to encipher", |cert| {
            cert.key_usages = vec![KeyUsagePurpose::KeyEncipherment];
        }),
        ("for nothing that it says", |cert| cert.key_usages.clear()),
        ("to sign certificates", |cert| {
            cert.key_usages.push(KeyUsagePurpose::KeyCertSign);
        }),
        ("an authority's", |cert| {
            cert.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }),
    ];
    for (name, change) in cases {
        door.refuses(Some(door.issued(change)?), "certificate")
            .await
            .context(name)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_forged_name_is_refused() -> anyhow::Result<()> {
    let door = Door::open().await?;
    // A proxy's name, signed by somebody who calls himself what the mesh's authority is called.
    let stranger = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    door.refuses(Some(by(stranger, &door.authority_name()?, |_| {})?), "alert")
        .await
        .context("of a stranger")?;
    // Names that only look like one: of these the authority would issue none, but another that it trusts might.
    let (second, user) = (
        named("spiffe://leeward.test/zone/b/proxy/b1")?,
        named("spiffe://leeward.test/user/u")?,
    );
    let control = named("spiffe://leeward.test/control")?;
    let workload = named("spiffe://leeward.test/zone/a/workload/a1")?;
    let (root, http) = (
        named("spiffe://leeward.test")?,
        named("http://leeward.test/zone/a/proxy/a1")?,
    );
    let upper = named("spiffe://LEEWARD.test/zone/a/proxy/a1")?;
    let dots = named("spiffe://leeward.test/zone/b/../a/proxy/a1")?;
    let coded = named("spiffe://leeward.test/zone/a/proxy/%61%31")?;
    let query = named("spiffe://leeward.test/zone/a/proxy/a1?x")?;
    let host = SanType::DnsName("a1.leeward.test".try_into()?);
    for (name, alert, names) in [
        ("two names", "certificate", vec![named(ANYBODY)?, second]),
        ("no name", "certificate", vec![]),
        ("a host's name", "certificate", vec![host]),
        ("the domain alone", "", vec![root]),
        ("another scheme", "certificate", vec![http]),
        ("a domain in upper case", "certificate", vec![upper]),
        ("dot segments", "certificate", vec![dots]),
        ("percent codes", "certificate", vec![coded]),
        ("a query", "certificate", vec![query]),
        // These are good certificates, but no proxy's.
        ("a user", "", vec![user]),
        ("a control plane", "", vec![control]),
        ("a workload", "", vec![workload]),
    ] {
        let shown = door.issued(|cert| cert.subject_alt_names = names)?;
        door.refuses(Some(shown), alert).await.context(name)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_self_signed_certificate_is_refused() -> anyhow::Result<()> {
    let door = Door::open().await?;
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let cert = proxys()?.self_signed(&pair)?;
    door.refuses(Some(shown(cert.der().clone(), &pair)?), "alert")
        .await
}

#[tokio::test]
async fn nobody_without_a_certificate_is_let_in() -> anyhow::Result<()> {
    let door = Door::open().await?;
    door.refuses(None, "certificaterequired").await
}

#[tokio::test]
async fn tls_1_2_is_refused() -> anyhow::Result<()> {
    let door = Door::open().await?;
    door.lets_proxies_in().await?;
    let before = door.backend.requests();
    let refused = door
        .knock(Some(door.issued(|_| {})?), &TLS12, SOON)
        .await
        .unwrap_err();
    let refused = format!("{refused:#}");
    assert!(refused.contains("ProtocolVersion"), "{refused}");
    assert_eq!(door.backend.requests(), before);
    Ok(())
}

/// Takes any server for the right one: it is the server that is to refuse.
#[derive(Debug)]
struct Credulous(Arc<CryptoProvider>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
