//! TLS for clients that are no part of the mesh: certificates from files of the node, read again when they change.
//!
//! A certificate named `shop` is `shop.pem`, the certificate and what leads to its root, and `shop.key`, its private key.
//! Whoever puts them there may do it by writing, by renaming or by changing a symbolic link (certbot, cert-manager): what is
//! looked at is what the names lead to. Between a new certificate and its new key the two don't fit each other; so a
//! pair that is bad is only bad when it was found so twice, and the last good one stays in use whatever becomes of the files.

use crate::files::open_to_others;
use crate::validity::Validity;
use arc_swap::ArcSwapOption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use x509_parser::extensions::GeneralName;

/// Certificates of one directory, by name.
#[derive(Debug)]
pub struct Certificates {
    dir: Option<PathBuf>,
    // Poison is harmless: an entry is only ever replaced whole.
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    pairs: BTreeMap<Box<str>, PairEntry>,
    roots: BTreeMap<Box<str>, RootsEntry>,
}

#[derive(Debug, Default)]
struct PairEntry {
    slot: Arc<Slot>,
    files: Watched,
    failures: u64,
}

#[derive(Debug, Default)]
struct RootsEntry {
    roots: Option<Arc<[CertificateDer<'static>]>>,
    files: Watched,
}

/// Files as they were when they were last looked at.
#[derive(Debug, Default)]
struct Watched {
    /// What was read, good or bad.
    seen: Option<Vec<Stamp>>,
    /// What was bad once.
    suspect: Option<Vec<Stamp>>,
    /// What is wrong with what was read.
    problem: Option<String>,
}

/// Tells whether a file is another, or has changed: device, inode, size, and when it was modified.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// The certificate of one name that is in use now.
#[derive(Debug, Default)]
pub struct Slot(ArcSwapOption<Pair>);

/// A certificate with its key.
#[derive(Debug)]
pub struct Pair {
    key: Arc<CertifiedKey>,
    hosts: Vec<Box<str>>,
    validity: Validity,
}

/// What there is to say of a certificate.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Its name.
    pub name: Box<str>,
    /// The hosts that it is for.
    pub hosts: Vec<Box<str>>,
    /// When it is good; `None` if there is none that can be used.
    pub validity: Option<Validity>,
    /// What is wrong with the files as they are; what is in use is what they were before.
    pub problem: Option<String>,
    /// How often files were found that can't be used.
    pub failures: u64,
}

/// Why files can't be used.
#[derive(Debug, thiserror::Error)]
enum BadFiles {
    #[error("there is no directory for certificates; see --gateway-certificates")]
    NoDirectory,
    #[error("can't read {path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{path} is larger than {MAX_FILE} bytes")]
    TooLarge { path: String },
    #[error("{path} has no certificate in PEM")]
    NoCertificate { path: String },
    #[error("{path} has no private key in PEM")]
    NoKey { path: String },
    #[error("certificate and key don't fit: {0}")]
    Misfit(rustls::Error),
    #[error("the certificate can't be read")]
    Unreadable,
    #[error("the certificate ended at {0}")]
    Ended(String),
}

/// The largest file that is read.
const MAX_FILE: u64 = 1 << 20;
/// Certificates of clients' roots in one file.
const MAX_ROOTS: usize = 256;

impl Certificates {
    /// Certificates of a directory; without one there are none.
    pub fn new(dir: Option<PathBuf>) -> Self {
        Self {
            dir,
            known: Mutex::default(),
        }
    }

    /// Looks at the files of these names, and reads what has changed. Others are forgotten. It reads from disk. True if the
    /// roots of clients are others than before; certificates are taken up by themselves.
    pub fn look(
        &self,
        certificates: &BTreeSet<Box<str>>,
        roots: &BTreeSet<Box<str>>,
        now: SystemTime,
    ) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.pairs.retain(|name, _| certificates.contains(name));
        for name in certificates {
            let entry = known.pairs.entry(name.clone()).or_default();
            self.look_at_pair(name, entry, now);
        }
        let before = known.roots.len();
        known.roots.retain(|name, _| roots.contains(name));
        let mut changed = known.roots.len() != before;
        for name in roots {
            let entry = known.roots.entry(name.clone()).or_default();
            changed |= self.look_at_roots(name, entry);
        }
        changed
    }

    /// Where the certificate of a name is found, now and later.
    pub fn slot(&self, name: &str) -> Arc<Slot> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&known.pairs.entry(name.into()).or_default().slot)
    }

    /// The roots of clients of these names, together.
    ///
    /// # Errors
    ///
    /// If one can't be had, in words: a listener that asks for certificates of these must not go on with fewer.
    pub fn roots<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<Arc<RootCertStore>, String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut store = RootCertStore::empty();
        for name in names {
            let entry = known.roots.get(name);
            let Some(roots) = entry.and_then(|entry| entry.roots.as_ref()) else {
                let why = entry.and_then(|entry| entry.files.problem.as_deref());
                return Err(format!("{name}: {}", why.unwrap_or("not read yet")));
            };
            let (_, bad) = store.add_parsable_certificates(roots.iter().cloned());
            if bad > 0 {
                return Err(format!("{name}: {bad} of its certificates can't be read"));
            }
        }
        Ok(Arc::new(store))
    }

    /// What there is to say of each certificate.
    pub fn standings(&self) -> Vec<Standing> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut standings = Vec::with_capacity(known.pairs.len());
        for (name, entry) in &known.pairs {
            let pair = entry.slot.pair();
            standings.push(Standing {
                name: name.clone(),
                hosts: pair.as_ref().map(|pair| pair.hosts.clone()).unwrap_or_default(),
                validity: pair.map(|pair| pair.validity),
                problem: entry.files.problem.clone(),
                failures: entry.failures,
            });
        }
        standings
    }

    fn path(&self, name: &str, extension: &str) -> Option<PathBuf> {
        self.dir
            .as_ref()
            .map(|dir| dir.join(format!("{name}.{extension}")))
    }

    fn look_at_pair(&self, name: &str, entry: &mut PairEntry, now: SystemTime) {
        let (certificate, key) = (self.path(name, "pem"), self.path(name, "key"));
        let stamps = vec![stamp(certificate.as_deref()), stamp(key.as_deref())];
        if !entry.files.are_new(&stamps) {
            return;
        }
        let read = match (&certificate, &key) {
            (Some(certificate), Some(key)) => Pair::read(certificate, key),
            _ => Err(BadFiles::NoDirectory),
        };
        let before = entry.slot.pair();
        let read = read.and_then(|pair| match &before {
            // Whoever puts it there has made a mistake, or has the wrong time.
            Some(before) if pair.validity.not_after < now && before.validity.holds(now) => {
                Err(BadFiles::Ended(crate::validity::shown(&pair.validity.not_after)))
            }
            Some(_) | None => Ok(pair),
        });
        match read {
            Ok(pair) => {
                if let Some(key) = &key
                    && let Ok(Some(mode)) = open_to_others(key)
                {
                    tracing::warn!(
                        certificate = name,
                        mode = format!("{mode:o}"),
                        "others than its owner can read the key"
                    );
                }
                tracing::info!(
                    certificate = name,
                    hosts = pair.hosts.join(" "),
                    not_after = crate::validity::shown(&pair.validity.not_after),
                    "a certificate for clients from outside is in use"
                );
                entry.slot.0.store(Some(Arc::new(pair)));
                entry.files.good(stamps);
            }
            Err(error) => {
                if entry.files.bad(stamps, &error, before.is_none()) {
                    entry.failures += 1;
                    tracing::warn!(
                        certificate = name,
                        %error,
                        kept = before.is_some(),
                        "a certificate for clients from outside can't be used"
                    );
                }
            }
        }
    }

    /// True if they are others now.
    fn look_at_roots(&self, name: &str, entry: &mut RootsEntry) -> bool {
        let path = self.path(name, "pem");
        let stamps = vec![stamp(path.as_deref())];
        if !entry.files.are_new(&stamps) {
            return false;
        }
        let read = match &path {
            Some(path) => read_chain(path),
            None => Err(BadFiles::NoDirectory),
        };
        match read {
            Ok(roots) => {
                let roots: Arc<[_]> = roots.into_iter().take(MAX_ROOTS).collect();
                let changed = entry.roots.as_ref() != Some(&roots);
                entry.roots = Some(roots);
                entry.files.good(stamps);
                changed
            }
            Err(error) => {
                if entry.files.bad(stamps, &error, entry.roots.is_none()) {
                    tracing::warn!(roots = name, %error, kept = entry.roots.is_some(), "roots of clients can't be used");
                }
                false
            }
        }
    }
}

impl Watched {
    fn are_new(&self, stamps: &[Stamp]) -> bool {
        self.seen.as_deref() != Some(stamps)
    }

    fn good(&mut self, stamps: Vec<Stamp>) {
        *self = Self {
            seen: Some(stamps),
            ..Self::default()
        };
    }

    /// Notes that files are bad. True if that is so for sure: they are as they were the last time, or there was nothing
    /// before that could go on.
    fn bad(&mut self, stamps: Vec<Stamp>, error: &BadFiles, at_once: bool) -> bool {
        let sure = at_once || self.suspect.as_ref() == Some(&stamps);
        if sure {
            self.problem = Some(error.to_string());
            self.seen = Some(stamps);
            self.suspect = None;
        } else {
            self.suspect = Some(stamps);
        }
        sure
    }
}

fn stamp(path: Option<&Path>) -> Stamp {
    let file = std::fs::metadata(path?).ok()?;
    Some((
        file.dev(),
        file.ino(),
        file.size(),
        file.mtime(),
        file.mtime_nsec(),
    ))
}

fn read(path: &Path) -> Result<Vec<u8>, BadFiles> {
    let shown = || path.display().to_string();
    let failed = |source| BadFiles::Read {
        path: shown(),
        source,
    };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
        return Err(BadFiles::TooLarge { path: shown() });
    }
    std::fs::read(path).map_err(failed)
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, BadFiles> {
    let text = read(path)?;
    let none = || BadFiles::NoCertificate {
        path: path.display().to_string(),
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let chain = chain.map_err(|_| none())?;
    if chain.is_empty() { Err(none()) } else { Ok(chain) }
}

impl Pair {
    fn read(certificate: &Path, key: &Path) -> Result<Self, BadFiles> {
        let chain = read_chain(certificate)?;
        let key_der = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|_| BadFiles::NoKey {
            path: key.display().to_string(),
        })?;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let first = chain.first().cloned().ok_or(BadFiles::Unreadable)?;
        let key = CertifiedKey::from_der(chain, key_der, &provider).map_err(BadFiles::Misfit)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&first).map_err(|_| BadFiles::Unreadable)?;
        let validity = Validity::of(&parsed).ok_or(BadFiles::Unreadable)?;
        let names = parsed.subject_alternative_name().ok().flatten();
        let hosts = names.into_iter().flat_map(|names| &names.value.general_names);
        let hosts = hosts.filter_map(|name| {
            let GeneralName::DNSName(host) = name else {
                return None;
            };
            Some(host.to_ascii_lowercase().into())
        });
        Ok(Self {
            key: Arc::new(key),
            hosts: hosts.collect(),
            validity,
        })
    }

    /// Whether it is for a host (lower case, without a port), as clients see it (RFC 9525 §6.3): a wildcard stands for one
    /// label.
    pub fn covers(&self, host: &str) -> bool {
        self.fit(host) > 0
    }

    /// 2 for the host itself, 1 for a wildcard, 0 for neither.
    fn fit(&self, host: &str) -> u8 {
        let fit = |name: &str| match name.strip_prefix("*.") {
            None => 2 * u8::from(*name == *host),
            Some(parent) => u8::from(host.split_once('.').is_some_and(|(_, rest)| *rest == *parent)),
        };
        self.hosts.iter().map(|name| fit(name)).max().unwrap_or(0)
    }

    /// For the handshake.
    pub fn key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.key)
    }
}

impl Slot {
    /// The certificate that is in use, if there is one.
    pub fn pair(&self) -> Option<Arc<Pair>> {
        self.0.load_full()
    }
}

/// The certificate for a client that asks for `host`: one for the host itself, or by a wildcard, or the first that there is.
pub fn choose(slots: &[Arc<Slot>], host: Option<&str>) -> Option<Arc<Pair>> {
    let pairs = || slots.iter().filter_map(|slot| slot.pair());
    let first = || pairs().next();
    let Some(host) = host else { return first() };
    let mut best: Option<(u8, Arc<Pair>)> = None;
    for pair in pairs() {
        let fit = pair.fit(host);
        if best.as_ref().is_none_or(|(known, _)| fit > *known) {
            best = Some((fit, pair));
        }
    }
    best.map(|(_, pair)| pair)
}

/// The oldest version that is spoken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Oldest {
    /// TLS 1.2.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

/// How TLS is spoken with clients from outside. With `roots`, they must show a certificate that one of these stands for.
/// There is no 0-RTT, and sessions are resumed within one configuration only.
///
/// # Errors
///
/// If the roots can't be used.
pub fn server_config(
    certificates: Arc<dyn ResolvesServerCert>,
    oldest: Oldest,
    roots: Option<Arc<RootCertStore>>,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions: &[_] = match oldest {
        Oldest::Tls12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
        Oldest::Tls13 => &[&rustls::version::TLS13],
    };
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions)?;
    let builder = match roots {
        None => builder.with_no_client_auth(),
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            builder.with_client_cert_verifier(
                verifier.map_err(|error| rustls::Error::General(error.to_string()))?,
            )
        }
    };
    let mut config = builder.with_cert_resolver(certificates);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use crate::validity::wall;
    use rcgen::{CertificateParams, KeyPair};
    use std::time::Duration;

    fn issue(hosts: &[&str], end: SystemTime) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.not_before = (end - Duration::from_secs(7200)).into();
        params.not_after = end.into();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn names(names: &[&str]) -> BTreeSet<Box<str>> {
        names.iter().map(|name| (*name).into()).collect()
    }

    /// A directory that is looked at.
    struct Bench {
        scratch: Scratch,
        certificates: Certificates,
    }

    impl Bench {
        fn new() -> Self {
            let scratch = Scratch::new();
            let dir = scratch.dir("edge");
            std::fs::create_dir_all(&dir).unwrap();
            Self {
                certificates: Certificates::new(Some(dir)),
                scratch,
            }
        }

        /// As those do it who do it right: beside, then renamed.
        fn put(&self, file: &str, text: &str) {
            let path = self.scratch.dir("edge").join(file);
            std::fs::write(path.with_extension("new"), text).unwrap();
            std::fs::rename(path.with_extension("new"), path).unwrap();
        }

        fn look(&self) -> Standing {
            self.certificates.look(&names(&["a"]), &names(&[]), wall());
            self.certificates.standings().remove(0)
        }
    }

    #[test]
    fn a_pair_is_replaced_when_it_is_whole_and_a_bad_one_changes_nothing() {
        let bench = Bench::new();
        let hour = Duration::from_secs(3600);
        let (old, old_key) = issue(&["old.example"], wall() + hour);
        let (new, new_key) = issue(&["new.example"], wall() + hour);
        let standing = bench.look();
        assert!(standing.validity.is_none() && standing.problem.unwrap().contains("can't read"));
        bench.put("a.pem", &old);
        bench.put("a.key", &old_key);
        assert_eq!(bench.look().hosts, ["old.example".into()]);
        let slot = bench.certificates.slot("a");
        // The certificate comes first, and the key a moment later.
        bench.put("a.pem", &new);
        let standing = bench.look();
        assert_eq!(
            (standing.hosts, standing.problem),
            (vec!["old.example".into()], None)
        );
        bench.put("a.key", &new_key);
        assert_eq!(bench.look().hosts, ["new.example".into()]);
        assert!(
            slot.pair().unwrap().covers("new.example"),
            "it is found in the same place"
        );
        // For good.
        bench.put("a.key", &old_key);
        bench.look();
        let standing = bench.look();
        assert_eq!(
            (standing.hosts, standing.failures),
            (vec!["new.example".into()], 2)
        );
        assert!(standing.problem.unwrap().contains("don't fit"));
        bench.put("a.key", &new_key);
        assert_eq!(bench.look().problem, None);
        // Ended already.
        let (ended, ended_key) = issue(&["ended.example"], wall() - hour);
        bench.put("a.pem", &ended);
        bench.put("a.key", &ended_key);
        bench.look();
        let standing = bench.look();
        assert_eq!(standing.hosts, ["new.example".into()]);
        assert!(standing.problem.unwrap().contains("ended at"));
    }

    #[test]
    fn a_link_that_leads_elsewhere_is_another_file() {
        let bench = Bench::new();
        let dir = bench.scratch.dir("edge");
        for version in ["1", "2"] {
            let (certificate, key) = issue(
                &[&format!("v{version}.example")],
                wall() + Duration::from_secs(60),
            );
            let data = dir.join(version);
            std::fs::create_dir(&data).unwrap();
            std::fs::write(data.join("tls.crt"), certificate).unwrap();
            std::fs::write(data.join("tls.key"), key).unwrap();
        }
        std::os::unix::fs::symlink("1", dir.join("data")).unwrap();
        std::os::unix::fs::symlink("data/tls.crt", dir.join("a.pem")).unwrap();
        std::os::unix::fs::symlink("data/tls.key", dir.join("a.key")).unwrap();
        assert_eq!(bench.look().hosts, ["v1.example".into()]);
        std::os::unix::fs::symlink("2", dir.join("next")).unwrap();
        std::fs::rename(dir.join("next"), dir.join("data")).unwrap();
        assert_eq!(bench.look().hosts, ["v2.example".into()]);
    }

    #[test]
    fn the_closest_certificate_is_chosen() {
        let bench = Bench::new();
        let end = wall() + Duration::from_secs(60);
        let all = ["a", "b", "c"];
        let hosts = [
            &["first.example"][..],
            &["*.shop.example"],
            &["www.shop.example", "x.example"],
        ];
        for (name, hosts) in all.iter().zip(hosts) {
            let (certificate, key) = issue(hosts, end);
            bench.put(&format!("{name}.pem"), &certificate);
            bench.put(&format!("{name}.key"), &key);
        }
        bench.certificates.look(&names(&all), &names(&[]), wall());
        let slots = all.map(|name| bench.certificates.slot(name));
        let chosen = |host: Option<&str>| choose(&slots, host).unwrap().hosts[0].clone();
        assert_eq!(&*chosen(Some("www.shop.example")), "www.shop.example");
        assert_eq!(&*chosen(Some("a.shop.example")), "*.shop.example");
        for other in [Some("a.b.shop.example"), Some("shop.example"), None] {
            assert_eq!(&*chosen(other), "first.example", "{other:?}");
        }
        assert!(choose(&[], None).is_none());
    }
}
