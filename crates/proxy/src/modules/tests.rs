use super::*;
use leeward_config::{Control, Timing};
use leeward_testkit::TempDir;
use minisign::KeyPair;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

const SECOND: Duration = Duration::from_secs(1);

fn sha(bytes: &[u8]) -> Sha {
    Sha256::digest(bytes).into()
}

fn sign(pair: &KeyPair, bytes: &[u8]) -> String {
    let signed = minisign::sign(Some(&pair.pk), &pair.sk, bytes, None, None);
    signed.unwrap().into_string()
}

fn files(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What a control plane does with one try.
#[derive(Clone)]
enum Try {
    Away,
    Gives(Vec<u8>),
    Breaks(Vec<u8>),
}

/// Control planes that do what is said, one try after another; the last thing again and again.
struct Fake {
    control: Control,
    tries: Vec<Try>,
    signatures: Vec<String>,
    asked: Mutex<Vec<(SocketAddr, Want)>>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
}

impl Fake {
    fn new(tries: &[Try]) -> Arc<Self> {
        Self::signed(tries, Vec::new())
    }

    fn signed(tries: &[Try], signatures: Vec<String>) -> Arc<Self> {
        Arc::new(Self {
            control: Control::from(
                ["127.0.0.1:1", "127.0.0.1:2"]
                    .map(|a| a.parse().unwrap())
                    .as_slice(),
            ),
            tries: tries.to_vec(),
            signatures,
            asked: Mutex::default(),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
        })
    }

    fn asked(&self) -> usize {
        locked(&self.asked).len()
    }
}

impl Origin for Arc<Fake> {
    fn rota(&self) -> Rota<'_> {
        Rota::new(&self.control, Timing::DEFAULT)
    }

    async fn fetch(
        &self,
        control: SocketAddr,
        _: &Sha,
        want: Want,
        mut take: impl FnMut(Piece) -> io::Result<()> + Send,
    ) -> Result<(), String> {
        let number = {
            let mut asked = locked(&self.asked);
            asked.push((control, want));
            asked.len() - 1
        };
        let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_at_once.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(SECOND).await;
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        let failed = |error: io::Error| error.to_string();
        let (bytes, breaks) = match &self.tries[number.min(self.tries.len() - 1)] {
            Try::Away => return Err("it is away".to_owned()),
            Try::Gives(bytes) => (bytes, false),
            Try::Breaks(bytes) => (bytes, true),
        };
        take(Piece::Signatures(self.signatures.clone())).map_err(failed)?;
        if want == Want::All {
            for piece in bytes.chunks(3) {
                take(Piece::Bytes(piece.to_vec())).map_err(failed)?;
            }
        }
        if breaks {
            Err("it broke off".to_owned())
        } else {
            Ok(())
        }
    }
}

fn modules(dir: &TempDir, origin: &Arc<Fake>) -> Arc<Modules<Arc<Fake>>> {
    Modules::open(
        Some(dir.path().join("plugins")),
        1 << 20,
        Some(Arc::clone(origin)),
    )
}

fn want(bytes: &[u8]) -> Wanted<'static> {
    Wanted {
        at: "spec.source",
        sha256: sha(bytes),
        key: None,
    }
}

async fn ready(modules: &Modules<Arc<Fake>>, wanted: Wanted<'_>) -> Result<PathBuf, String> {
    modules.ready(wanted, |_| {}).await
}

#[tokio::test(start_paused = true)]
async fn one_is_fetched_once_however_many_ask_and_kept_over_a_restart() {
    let dir = TempDir::new().unwrap();
    let origin = Fake::new(&[Try::Gives(b"module".to_vec())]);
    let here = modules(&dir, &origin);
    let asking = (0..10).map(|_| {
        let here = Arc::clone(&here);
        tokio::spawn(async move { ready(&here, want(b"module")).await })
    });
    let asking: Vec<_> = asking.collect();
    for asked in asking {
        let path = asked.await.unwrap().unwrap();
        assert_eq!(fs::read(path).unwrap(), b"module");
    }
    assert_eq!(origin.asked(), 1);
    // Another process, and nobody to ask.
    let alone: Arc<Modules<Arc<Fake>>> = Modules::open(Some(dir.path().join("plugins")), 1 << 20, None);
    let path = ready(&alone, want(b"module")).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), b"module");
    let error = ready(&alone, want(b"another")).await.unwrap_err();
    assert!(error.contains(&hex(&sha(b"another"))), "{error}");
    assert!(error.contains("no control plane to take it from"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_next_control_plane_is_asked_until_one_gives_the_right_bytes() {
    let dir = TempDir::new().unwrap();
    let tries = [
        Try::Away,
        Try::Gives(b"forged".to_vec()),
        Try::Breaks(b"mod".to_vec()),
        Try::Gives(b"module".to_vec()),
    ];
    let origin = Fake::new(&tries);
    let here = modules(&dir, &origin);
    let said = Mutex::new(Vec::new());
    let say = |why: &str| locked(&said).push(why.to_owned());
    let path = here.ready(want(b"module"), say).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), b"module");
    let said = locked(&said);
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(
        said.iter().all(|why| why.starts_with("spec.source: module ")),
        "{said:?}"
    );
    assert!(said[0].contains("it is away"), "{said:?}");
    assert!(said[1].contains(&hex(&sha(b"forged"))), "{said:?}");
    assert!(said[2].contains("it broke off"), "{said:?}");
    let asked: Vec<_> = locked(&origin.asked)
        .iter()
        .map(|(control, _)| control.port())
        .collect();
    assert_eq!(asked, [1, 2, 1, 2]);
    // Nothing is left of what went wrong.
    let module = hex(&sha(b"module"));
    let left = files(&dir.path().join("plugins"));
    assert_eq!(left, [format!("{module}.signatures"), format!("{module}.wasm")]);
}

#[tokio::test(start_paused = true)]
async fn so_many_are_fetched_at_once_and_no_more() {
    let dir = TempDir::new().unwrap();
    let origin = Fake::new(&[Try::Away]);
    let here = modules(&dir, &origin);
    let asking: Vec<_> = (0..4 * AT_ONCE)
        .map(|n| {
            let here = Arc::clone(&here);
            tokio::spawn(async move { ready(&here, want(&[u8::try_from(n).unwrap()])).await })
        })
        .collect();
    tokio::time::sleep(60 * SECOND).await;
    assert!(origin.asked() > 4 * AT_ONCE);
    assert_eq!(origin.most_at_once.load(Ordering::SeqCst), AT_ONCE);
    for asked in asking {
        asked.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn one_who_gives_up_leaves_nothing_and_the_next_goes_on() {
    let dir = TempDir::new().unwrap();
    let origin = Fake::new(&[Try::Gives(b"module".to_vec())]);
    let here = modules(&dir, &origin);
    let first = {
        let here = Arc::clone(&here);
        tokio::spawn(async move { ready(&here, want(b"module")).await })
    };
    while origin.asked() == 0 {
        tokio::time::sleep(SECOND / 100).await;
    }
    let second = {
        let here = Arc::clone(&here);
        tokio::spawn(async move { ready(&here, want(b"module")).await })
    };
    tokio::time::sleep(SECOND / 10).await;
    first.abort();
    assert!(first.await.is_err());
    second.await.unwrap().unwrap();
    assert_eq!(origin.asked(), 2);
    let left = files(&dir.path().join("plugins"));
    assert!(!left.iter().any(|name| name.ends_with(".tmp")), "{left:?}");
}

#[tokio::test(start_paused = true)]
async fn a_broken_file_is_set_aside_and_fetched_again() {
    let dir = TempDir::new().unwrap();
    let origin = Fake::new(&[Try::Gives(b"module".to_vec())]);
    let here = modules(&dir, &origin);
    let path = ready(&here, want(b"module")).await.unwrap();
    fs::write(&path, b"tampered").unwrap();
    assert_eq!(ready(&here, want(b"module")).await.unwrap(), path);
    assert_eq!(origin.asked(), 2);
    assert_eq!(fs::read(&path).unwrap(), b"module");
    assert_eq!(fs::read(path.with_extension("corrupt")).unwrap(), b"tampered");
    // Cut short, as by a disk that was full.
    fs::write(&path, b"mod").unwrap();
    ready(&here, want(b"module")).await.unwrap();
    assert_eq!(fs::read(path.with_extension("corrupt")).unwrap(), b"mod");
    assert_eq!(fs::read(&path).unwrap(), b"module");
}

#[tokio::test(start_paused = true)]
async fn a_key_wants_its_signature_and_new_ones_are_asked_for() {
    let (pair, other) = (
        KeyPair::generate_unencrypted_keypair().unwrap(),
        KeyPair::generate_unencrypted_keypair().unwrap(),
    );
    let key = pair.pk.to_base64();
    let signed = Wanted {
        key: Some(&key),
        ..want(b"module")
    };
    let gives = [Try::Gives(b"module".to_vec())];

    let dir = TempDir::new().unwrap();
    let unsigned = Fake::new(&gives);
    let error = ready(&modules(&dir, &unsigned), signed).await.unwrap_err();
    assert!(error.starts_with("spec.source.minisignKey: "), "{error}");
    assert!(error.contains("has no signature of it"), "{error}");

    let others = Fake::signed(&gives, vec![sign(&other, b"module")]);
    let error = ready(&modules(&dir, &others), signed).await.unwrap_err();
    assert!(error.contains("signed by another key"), "{error}");

    // It is there already: only its signatures travel, of which one is enough.
    let both = vec![sign(&other, b"module"), sign(&pair, b"module")];
    let right = Fake::signed(&gives, both);
    let here = modules(&dir, &right);
    ready(&here, signed).await.unwrap();
    assert_eq!(locked(&right.asked)[0].1, Want::Signatures);
    // And stay.
    ready(&here, signed).await.unwrap();
    assert_eq!(right.asked(), 1);
    let path = ready(&here, want(b"module")).await.unwrap();
    fs::write(path.with_extension("signatures"), b"[\"half").unwrap();
    ready(&here, signed).await.unwrap();
    assert_eq!(right.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn without_a_directory_it_is_said_what_is_missing() {
    let origin = Fake::new(&[Try::Away]);
    let none = Modules::open(None, 0, Some(Arc::clone(&origin)));
    let error = ready(&none, want(b"module")).await.unwrap_err();
    assert!(error.contains("--data"), "{error}");
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("plugins"), "a file").unwrap();
    let error = ready(&modules(&dir, &origin), want(b"module")).await.unwrap_err();
    assert!(error.contains("plugins can't be used"), "{error}");
    assert_eq!(origin.asked(), 0);
}

#[tokio::test]
async fn what_nobody_names_goes_when_it_is_too_much_the_longest_unused_first() {
    let dir = TempDir::new().unwrap();
    let at = dir.path().join("plugins");
    let open = |limit| -> Arc<Modules<Arc<Fake>>> { Modules::open(Some(at.clone()), limit, None) };
    let modules = open(250);
    let all: Vec<Vec<u8>> = (0..5u8).map(|n| vec![n; 100]).collect();
    for (age, bytes) in all.iter().enumerate() {
        let path = at.join(hex(&sha(bytes))).with_extension("wasm");
        fs::write(&path, bytes).unwrap();
        #[expect(clippy::disallowed_methods, reason = "a stamp of a file")]
        let stamp = std::time::SystemTime::now() - u32::try_from(100 - age).unwrap() * SECOND;
        fs::File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .set_modified(stamp)
            .unwrap();
    }
    let there = || -> Vec<usize> {
        let left = files(&at);
        let is_there = |bytes: &[u8]| left.contains(&format!("{}.wasm", hex(&sha(bytes))));
        (0..5).filter(|n| is_there(&all[*n])).collect()
    };
    // The oldest is named, the next one runs, and this one was just used.
    modules.name("p", vec![sha(&all[0])]);
    ready(&modules, want(&all[2])).await.unwrap();
    modules.prune(vec![sha(&all[1])]);
    assert_eq!(there(), [0, 1, 2, 4]);
    // The name is another's now.
    modules.name("p", vec![sha(&all[4])]);
    modules.prune(Vec::new());
    assert_eq!(there(), [1, 2, 4]);
    let none = open(0);
    none.prune(Vec::new());
    assert_eq!(there(), [0usize; 0]);
}

#[test]
fn what_a_killed_process_left_goes_at_the_start() {
    let dir = TempDir::new().unwrap();
    let at = dir.path().join("plugins");
    fs::create_dir(&at).unwrap();
    let module = hex(&sha(b"module"));
    fs::write(at.join(format!("{module}.99-0.tmp")), b"mod").unwrap();
    fs::write(at.join(format!("{module}.wasm")), b"module").unwrap();
    fs::write(at.join(format!("{}.signatures", hex(&sha(b"gone")))), b"[]").unwrap();
    for n in 0..20u8 {
        fs::write(at.join(format!("{}.corrupt", hex(&sha(&[n])))), b"?").unwrap();
    }
    let modules: Arc<Modules<Arc<Fake>>> = Modules::open(Some(at.clone()), 1 << 20, None);
    modules.prune(Vec::new());
    let left = files(&at);
    let corrupt = left.iter().filter(|name| name.ends_with(".corrupt")).count();
    assert_eq!(corrupt, 8);
    let rest: Vec<_> = left.iter().filter(|name| !name.ends_with(".corrupt")).collect();
    assert_eq!(rest, [&format!("{module}.wasm")]);
}
