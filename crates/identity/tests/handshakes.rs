//! Who is let in: real sockets, real TLS.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "tests"
)]

use leeward_identity::authority::Authority;
use leeward_identity::{Identity, IdentityError, SpiffeId, peer_id};
use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    SanType,
};
use rustls::pki_types::ServerName;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const HOUR: Duration = Duration::from_secs(3600);
const ALPN: &[&[u8]] = &[b"h2"];

/// A directory that goes when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("leeward-identity-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn proxy(domain: &str, name: &str) -> SpiffeId {
    SpiffeId::proxy(domain, "a", name).unwrap()
}

fn issued(authority: &Authority, dir: &Path, id: &SpiffeId) -> Arc<Identity> {
    authority.issue(id, HOUR, dir).unwrap();
    Identity::load(dir).unwrap()
}

/// One connection with a byte each way; what the client and the server say of it.
async fn shake(
    client: &Identity,
    server: &Identity,
    expect: &SpiffeId,
) -> (Result<(), String>, Result<String, String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(server.server_config(ALPN).unwrap());
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut tls = acceptor.accept(stream).await.map_err(|e| e.to_string())?;
        let byte = tls.read_u8().await.map_err(|e| e.to_string())?;
        tls.write_u8(byte).await.map_err(|e| e.to_string())?;
        tls.flush().await.map_err(|e| e.to_string())?;
        let id = peer_id(tls.get_ref().1.peer_certificates().unwrap()).map_err(|e| e.to_string())?;
        Ok(id.to_string())
    };
    let connector = TlsConnector::from(client.client_config(ALPN, expect).unwrap());
    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut tls = connector
            .connect(ServerName::from(address.ip()), stream)
            .await
            .map_err(|e| e.to_string())?;
        tls.write_u8(7).await.map_err(|e| e.to_string())?;
        // In TLS 1.3 a client hears that it was refused when it first reads.
        tls.read_u8().await.map(|_| ()).map_err(|e| e.to_string())
    };
    tokio::join!(connect, accept)
}

#[tokio::test]
async fn peers_of_one_domain_know_each_other() {
    let scratch = Scratch::new();
    let authority = Authority::create(&scratch.dir("ca"), "one").unwrap();
    let a = issued(&authority, &scratch.dir("a"), &proxy("one", "a"));
    let b = issued(&authority, &scratch.dir("b"), &proxy("one", "b"));
    assert_eq!(shake(&a, &b, b.id()).await, (Ok(()), Ok(a.id().to_string())));
    assert!(b.not_after() > SystemTime::now());
}

#[tokio::test]
async fn a_server_must_be_the_one_that_is_meant() {
    let scratch = Scratch::new();
    let authority = Authority::create(&scratch.dir("ca"), "one").unwrap();
    let a = issued(&authority, &scratch.dir("a"), &proxy("one", "a"));
    let b = issued(&authority, &scratch.dir("b"), &proxy("one", "b"));
    // That it is known as itself makes it nobody else.
    assert_eq!(shake(&a, &b, b.id()).await.0, Ok(()));
    let (client, _) = shake(&a, &b, &proxy("one", "c")).await;
    let error = client.unwrap_err();
    assert!(
        error.contains("spiffe://one/zone/a/proxy/b") && error.contains("spiffe://one/zone/a/proxy/c"),
        "{error}"
    );
}

#[tokio::test]
async fn another_domain_is_refused_even_with_the_same_names() {
    let scratch = Scratch::new();
    let one = Authority::create(&scratch.dir("ca1"), "one").unwrap();
    let two = Authority::create(&scratch.dir("ca2"), "one").unwrap();
    let server = issued(&one, &scratch.dir("s"), &proxy("one", "s"));
    let stranger = issued(&two, &scratch.dir("x"), &proxy("one", "x"));
    let (_, server_side) = shake(&stranger, &server, server.id()).await;
    assert!(server_side.is_err());
    let (client_side, _) = shake(&server, &stranger, stranger.id()).await;
    let error = client_side.unwrap_err();
    assert!(
        error.contains("UnknownIssuer") || error.contains("BadSignature"),
        "{error}"
    );
}

/// Certificates that no authority of ours would issue, from one that is trusted.
fn forged(authority_dir: &Path, out: &Path, change: impl FnOnce(&mut CertificateParams)) -> Arc<Identity> {
    let ca = std::fs::read_to_string(authority_dir.join("ca.pem")).unwrap();
    let key = KeyPair::from_pem(&std::fs::read_to_string(authority_dir.join("ca-key.pem")).unwrap()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&ca, key).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://one/zone/a/proxy/x".try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let now = SystemTime::now();
    params.not_before = (now - HOUR).into();
    params.not_after = (now + HOUR).into();
    change(&mut params);
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let cert = params.signed_by(&pair, &issuer).unwrap();
    std::fs::create_dir_all(out).unwrap();
    std::fs::write(out.join("bundle.pem"), ca).unwrap();
    std::fs::write(out.join("cert.pem"), cert.pem()).unwrap();
    std::fs::write(out.join("key.pem"), pair.serialize_pem()).unwrap();
    std::fs::set_permissions(out.join("key.pem"), std::fs::Permissions::from_mode(0o600)).unwrap();
    Identity::load(out).unwrap()
}

#[tokio::test]
async fn bad_certificates_are_refused_both_ways() {
    let scratch = Scratch::new();
    let ca = scratch.dir("ca");
    let authority = Authority::create(&ca, "one").unwrap();
    let good = issued(&authority, &scratch.dir("good"), &proxy("one", "good"));
    let now = SystemTime::now();
    type Change = Box<dyn FnOnce(&mut CertificateParams)>;
    let cases: [(&str, &str, Change); 8] = [
        (
            "expired",
            "certificate expired",
            Box::new(move |p| p.not_after = (now - HOUR / 2).into()),
        ),
        (
            "early",
            "not valid yet",
            Box::new(move |p| p.not_before = (now + HOUR / 2).into()),
        ),
        (
            "purpose",
            "extended key usage",
            Box::new(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
        ),
        (
            "usage",
            "Usage",
            Box::new(|p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment]),
        ),
        ("no-usage", "Usage", Box::new(|p| p.key_usages = vec![])),
        (
            "issuer",
            "Usage",
            Box::new(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        ),
        (
            "domain",
            "want: \"one\"",
            Box::new(|p| {
                p.subject_alt_names = vec![SanType::URI("spiffe://two/zone/a/proxy/x".try_into().unwrap())];
            }),
        ),
        ("control", "", Box::new(|_| {})),
    ];
    for (name, want, change) in cases {
        let bad = forged(&ca, &scratch.dir(name), change);
        let (_, server_side) = shake(&bad, &good, good.id()).await;
        let (client_side, _) = shake(&good, &bad, bad.id()).await;
        if want.is_empty() {
            // The forge itself makes good ones, or the others would prove nothing.
            assert!(
                server_side.is_ok() && client_side.is_ok(),
                "{name}: {server_side:?} {client_side:?}"
            );
            continue;
        }
        let error = server_side.unwrap_err();
        assert!(error.contains(want), "{name}, as a client: {error}");
        if name != "domain" {
            let error = client_side.unwrap_err();
            assert!(error.contains(want), "{name}, as a server: {error}");
        }
    }
}

#[tokio::test]
async fn a_certificate_has_exactly_one_name() {
    let scratch = Scratch::new();
    let ca = scratch.dir("ca");
    Authority::create(&ca, "one").unwrap();
    let dir = scratch.dir("two-names");
    let load = std::panic::catch_unwind(|| {
        forged(&ca, &dir, |p| {
            p.subject_alt_names
                .push(SanType::URI("spiffe://one/control".try_into().unwrap()));
        })
    });
    assert!(load.is_err());
    let error = Identity::load(&dir).unwrap_err();
    assert!(matches!(&error, IdentityError::Id { .. }), "{error}");
}

#[tokio::test]
async fn nobody_comes_in_without_a_certificate() {
    let scratch = Scratch::new();
    let authority = Authority::create(&scratch.dir("ca"), "one").unwrap();
    let server = issued(&authority, &scratch.dir("s"), &proxy("one", "s"));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(scratch.dir("ca").join("ca.pem")).unwrap();
    use rustls::pki_types::pem::PemObject;
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(&pem).unwrap())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(server.server_config(ALPN).unwrap());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        acceptor
            .accept(stream)
            .await
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        drop(
            TlsConnector::from(Arc::new(config))
                .connect(ServerName::from(address.ip()), stream)
                .await,
        );
    };
    let (accepted, ()) = tokio::join!(accept, connect);
    assert!(accepted.is_err());
}

#[tokio::test]
async fn a_reload_is_in_force_at_the_next_handshake() {
    let scratch = Scratch::new();
    let old = Authority::create(&scratch.dir("old"), "one").unwrap();
    let new = Authority::create(&scratch.dir("new"), "one").unwrap();
    let server = issued(&old, &scratch.dir("s"), &proxy("one", "s"));
    let client = issued(&new, &scratch.dir("c"), &proxy("one", "c"));
    assert!(shake(&client, &server, server.id()).await.1.is_err());
    assert!(!server.reload().unwrap(), "nothing has changed");
    new.issue(server.id(), HOUR, &scratch.dir("s")).unwrap();
    assert!(server.reload().unwrap());
    assert_eq!(
        shake(&client, &server, server.id()).await,
        (Ok(()), Ok(client.id().to_string()))
    );
    new.issue(&proxy("one", "other"), HOUR, &scratch.dir("s"))
        .unwrap();
    assert!(
        matches!(server.reload(), Err(IdentityError::Changed { .. })),
        "nobody becomes another in flight"
    );
    assert!(shake(&client, &server, server.id()).await.0.is_ok());
}

#[test]
fn a_key_that_others_can_read_is_not_used() {
    let scratch = Scratch::new();
    let authority = Authority::create(&scratch.dir("ca"), "one").unwrap();
    let dir = scratch.dir("a");
    authority.issue(&proxy("one", "a"), HOUR, &dir).unwrap();
    std::fs::set_permissions(dir.join("key.pem"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = Identity::load(&dir).unwrap_err().to_string();
    assert!(
        error.contains("mode 644") && error.contains("chmod 600"),
        "{error}"
    );
}

#[test]
fn an_authority_issues_for_its_own_domain_and_survives_a_restart() {
    let scratch = Scratch::new();
    let dir = scratch.dir("ca");
    Authority::create(&dir, "one").unwrap();
    assert!(Authority::create(&dir, "one").is_err(), "never over an old one");
    let key = std::fs::metadata(dir.join("ca-key.pem"))
        .unwrap()
        .permissions()
        .mode()
        & 0o777;
    assert_eq!(key, 0o600);
    let again = Authority::open(&dir).unwrap();
    assert_eq!(again.domain(), "one");
    let foreign = again
        .issue(&proxy("two", "a"), HOUR, &scratch.dir("x"))
        .unwrap_err();
    assert!(
        foreign
            .to_string()
            .contains("is not of this authority's trust domain"),
        "{foreign}"
    );
    again.issue(&proxy("one", "a"), HOUR, &scratch.dir("a")).unwrap();
    assert!(Identity::load(scratch.dir("a")).is_ok());
}
