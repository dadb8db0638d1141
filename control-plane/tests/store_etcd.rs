//! Several control planes on a cluster of three, whose members are killed and frozen.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use leeward_control::kv::{EtcdSettings, Kv, KvError};
use leeward_control::store::{Author, Change, Options, Store, StoreError, Write};
use leeward_policy::{Key, Kind, Name};
use leeward_testkit::{EtcdCluster, EtcdVersion, TempDir, eventually};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes on a busy machine.
const SOON: Duration = Duration::from_secs(90);

async fn store(etcd: &EtcdCluster) -> Store {
    let kv = Kv::etcd(EtcdSettings {
        endpoints: etcd.endpoints(),
        prefix: "/t/".to_owned(),
        ..EtcdSettings::default()
    })
    .unwrap();
    Store::open(kv, Options::default()).await.unwrap()
}

fn put(name: &str) -> Change {
    Change {
        writes: vec![Write {
            key: Key {
                kind: Kind::Service,
                name: Name::parse(name).unwrap(),
            },
            payload: Some(name.as_bytes().to_vec()),
            expect: 0,
        }],
        author: Author::of(name),
        ..Change::default()
    }
}

fn not_there(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Kv(KvError::Unavailable { .. } | KvError::Unknown { .. } | KvError::Contended(_))
    )
}

async fn no_acknowledged_write_is_lost(version: EtcdVersion) {
    let Some(mut etcd) = EtcdCluster::start(version, 3).await.unwrap() else {
        return;
    };
    let stop = CancellationToken::new();
    let mut writers = Vec::new();
    for writer in 0..2 {
        let (store, stop) = (store(&etcd).await, stop.clone());
        writers.push(tokio::spawn(async move {
            let (mut done, mut lost) = (BTreeMap::new(), BTreeSet::new());
            for n in 0.. {
                if stop.is_cancelled() {
                    break;
                }
                let name = format!("w{writer}-{n}");
                match store.write(put(&name)).await {
                    Ok(revision) => drop(done.insert(revision, name)),
                    Err(error) => {
                        assert!(not_there(&error), "{error}");
                        lost.insert(name);
                    }
                }
            }
            (done, lost)
        }));
    }
    for round in 0..3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let leader = etcd.leader().await.unwrap_or(round);
        if round == 1 {
            etcd.freeze(leader).unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
            etcd.thaw(leader).unwrap();
        } else {
            etcd.kill9(leader).unwrap();
            tokio::time::sleep(Duration::from_secs(3)).await;
            etcd.restart(leader).unwrap();
        }
        etcd.ready(leader).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.cancel();
    let (mut done, mut lost) = (BTreeMap::new(), BTreeSet::new());
    for writer in writers {
        let (of_writer, lost_by) = writer.await.unwrap();
        for (revision, name) in of_writer {
            let twice = done.insert(revision, name);
            assert!(twice.is_none(), "{revision} was given twice");
        }
        lost.extend(lost_by);
    }
    assert!(done.len() > 20, "only {} writes", done.len());
    let store = store(&etcd).await;
    let head = store.settle().await.unwrap();
    for revision in 1..=head {
        let record = store.record(revision).await.unwrap().unwrap();
        let name = &record.author.who;
        match done.remove(&revision) {
            Some(acknowledged) => assert_eq!(name, &acknowledged),
            None => assert!(lost.contains(name), "{name} was neither acknowledged nor lost"),
        }
    }
    assert!(done.is_empty(), "acknowledged and not there: {done:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_come_and_go_and_no_write_is_lost_3_4() {
    no_acknowledged_write_is_lost(EtcdVersion::V3_4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_come_and_go_and_no_write_is_lost_3_5() {
    no_acknowledged_write_is_lost(EtcdVersion::V3_5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_reads_from_memory_go_on_and_writes_say_why() {
    let Some(mut etcd) = EtcdCluster::start(EtcdVersion::V3_4, 3).await.unwrap() else {
        return;
    };
    let store = store(&etcd).await;
    store.write(put("a")).await.unwrap();
    let led = store.lead("job", Duration::from_secs(3)).await;
    etcd.kill9(0).unwrap();
    etcd.kill9(1).unwrap();
    let error = store.write(put("b")).await.unwrap_err();
    assert!(not_there(&error), "{error}");
    let told = error.to_string();
    assert!(
        etcd.endpoints().iter().any(|endpoint| told.contains(endpoint)),
        "{told}"
    );
    assert!(not_there(&store.settle().await.unwrap_err()));
    assert_eq!(store.everything().upserts.len(), 1);
    // Whoever can't keep its lease doesn't believe for longer that it leads.
    tokio::time::timeout(SOON, led.lost()).await.unwrap();
    etcd.restart(0).unwrap();
    etcd.ready(0).await.unwrap();
    eventually("writes again", SOON, || async {
        Ok(store.write(put("c")).await.map(drop)?)
    })
    .await
    .unwrap();
    let error = store
        .write(Change {
            fence: Some(led.fence()),
            ..put("d")
        })
        .await;
    // Its lease may still be there: then nobody else has led.
    if let Err(error) = error {
        assert!(matches!(error, StoreError::Fenced(_)), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_cluster_says_so() {
    let args = ["--quota-backend-bytes", "6000000"];
    let Some(etcd) = EtcdCluster::start_with(EtcdVersion::V3_4, 1, &args)
        .await
        .unwrap()
    else {
        return;
    };
    let store = store(&etcd).await;
    let large = |n: usize| {
        let mut change = put(&format!("s{n}"));
        change.writes[0].payload = Some(vec![0; 300 << 10]);
        change
    };
    let mut written = 0;
    let error = loop {
        match store.write(large(written)).await {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 100, "it is never full");
    };
    assert!(matches!(error, StoreError::Kv(KvError::Full { .. })), "{error}");
    assert!(error.to_string().contains("database space exceeded"), "{error}");
    assert_eq!(store.settle().await.unwrap(), written as u64, "reads go on");
    assert_eq!(store.everything().upserts.len(), written);
}

/// What is in front of a member: TLS, for those whose certificate an authority has issued.
mod tls {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    };
    use std::net::SocketAddr;
    use std::path::Path;
    use std::sync::Arc;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio_rustls::rustls::server::WebPkiClientVerifier;
    use tokio_rustls::rustls::{RootCertStore, ServerConfig};

    /// Writes DIR/NAME-ca.pem, and a certificate for 127.0.0.1 as DIR/NAME.pem and DIR/NAME-key.pem.
    pub(super) fn issue(dir: &Path, name: &str) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap().pem();
        let write = |file: &str, text: String| std::fs::write(dir.join(file), text).unwrap();
        write(&format!("{name}-ca.pem"), ca);
        write(&format!("{name}.pem"), cert);
        write(&format!("{name}-key.pem"), key.serialize_pem());
    }

    /// Stands before `member`, and lets in whom `name`'s authority has issued.
    pub(super) async fn front(dir: &Path, name: &str, member: SocketAddr) -> SocketAddr {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(dir.join(format!("{name}-ca.pem"))).unwrap())
            .unwrap();
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
        let chain = vec![CertificateDer::from_pem_file(dir.join(format!("{name}.pem"))).unwrap()];
        let key = PrivateKeyDer::from_pem_file(dir.join(format!("{name}-key.pem"))).unwrap();
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let (Ok(mut from), Ok(mut to)) =
                        (acceptor.accept(stream).await, TcpStream::connect(member).await)
                    else {
                        return;
                    };
                    drop(tokio::io::copy_bidirectional(&mut from, &mut to).await);
                });
            }
        });
        address
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_known_by_their_certificates_and_know_us_by_ours() {
    let Some(etcd) = EtcdCluster::start(EtcdVersion::V3_4, 1).await.unwrap() else {
        return;
    };
    let dir = TempDir::new().unwrap();
    tls::issue(dir.path(), "ours");
    tls::issue(dir.path(), "theirs");
    let member = etcd.endpoints()[0].trim_start_matches("http://").parse().unwrap();
    let front = tls::front(dir.path(), "ours", member).await;
    let kv = |ca: &str, identity: Option<&str>| {
        let file = |name: String| dir.path().join(name);
        Kv::etcd(EtcdSettings {
            endpoints: vec![format!("https://{front}")],
            prefix: "/t/".to_owned(),
            ca: Some(file(format!("{ca}-ca.pem"))),
            identity: identity.map(|name| (file(format!("{name}.pem")), file(format!("{name}-key.pem")))),
            allow_plaintext: false,
        })
        .unwrap()
    };
    let good = kv("ours", Some("ours"));
    let store = Store::open(good, Options::default()).await.unwrap();
    store.write(put("a")).await.unwrap();
    for bad in [
        kv("theirs", Some("ours")),
        kv("ours", Some("theirs")),
        kv("ours", None),
    ] {
        let error = bad.get("head").await.unwrap_err();
        assert!(
            matches!(&error, KvError::Unavailable { place, .. } if place.contains(&front.to_string())),
            "{error}"
        );
    }
}

#[test]
fn members_on_other_hosts_need_tls() {
    let settings = |endpoint: &str| EtcdSettings {
        endpoints: vec![endpoint.to_owned()],
        ..EtcdSettings::default()
    };
    let error = Kv::etcd(settings("http://10.0.0.1:2379"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("http has no protection on the way"), "{error}");
    let error = Kv::etcd(settings("https://10.0.0.1:2379"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("--etcd-ca"), "{error}");
    for bad in ["10.0.0.1", "ftp://10.0.0.1:1", "https://10.0.0.1"] {
        assert!(Kv::etcd(settings(bad)).is_err(), "{bad}");
    }
}
