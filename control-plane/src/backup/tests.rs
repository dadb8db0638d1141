//! Backups of a store in this process, on a directory.

use super::catalogue::{self, Listed};
use super::content;
use super::create::{self, Made};
use super::error::BackupError;
use super::into;
use super::manifest::sha256;
use super::place::Place;
use super::recover::{self, Plan, Reader, Restored, Until};
use super::retention::Retention;
use super::seal::{Opener, Sealer, tests::identity};
use super::ship::{Shipper, shipped_to};
use super::verify::{self, condemns};
use crate::kv::{Kv, Txn};
use crate::store::tests::{Scratch, key};
use crate::store::{Change, Clock, Options, Store, Stored, Write};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);

fn service(name: &str, port: u16) -> Vec<u8> {
    use prost::Message as _;
    let text = format!(
        "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{endpoints: [{{address: \"127.0.0.1:{port}\", zone: a}}]}}\n"
    );
    leeward_proto::manifest::parse("test", &text).unwrap()[0].encode_to_vec()
}

async fn put(store: &Store, name: &str, port: u16) -> u64 {
    let change = Change {
        writes: vec![Write {
            key: key(name),
            payload: Some(service(name, port)),
            expect: 0,
        }],
        ..Change::default()
    };
    store.write(change).await.unwrap()
}

struct Site {
    dir: Scratch,
    store: Store,
    place: Place,
}

impl Site {
    async fn new() -> Self {
        Self::with(Options::default()).await
    }

    async fn with(options: Options) -> Self {
        let dir = Scratch::new();
        std::fs::create_dir_all(&dir.0).unwrap();
        let place = Place::open(dir.0.join("place").to_str().unwrap()).unwrap();
        let kv = Kv::sqlite(&dir.0.join("store")).unwrap();
        let store = Store::open(kv, options).await.unwrap();
        Self { dir, store, place }
    }

    async fn backup(&self) -> Made {
        create::create(&self.store, &self.place, &Sealer::default(), None, || true)
            .await
            .unwrap()
    }

    async fn listed(&self) -> Vec<Listed> {
        catalogue::list(&self.place).await.unwrap()
    }

    async fn restored(&self, name: &str, until: Until) -> Result<(Kv, Restored), BackupError> {
        let plan = recover::plan(&self.listed().await, None, until)?;
        let kv = Kv::sqlite(&self.dir.0.join(name)).unwrap();
        let opener = Opener::default();
        let reader = Reader {
            place: &self.place,
            opener: &opener,
        };
        let restored = recover::restore(&kv, &reader, &plan, None).await?;
        Ok((kv, restored))
    }

    async fn verify(&self) -> Result<verify::Verified, BackupError> {
        let listed = self.listed().await;
        let newest = listed.last().unwrap();
        verify::verify(&self.place, &Opener::default(), newest, &self.dir.0, false).await
    }

    /// Ships until a position of the store is there.
    async fn ship_to(&self, position: u64) {
        let from = shipped_to(&self.place, self.store.id())
            .await
            .unwrap()
            .unwrap_or(0);
        let base = self
            .listed()
            .await
            .last()
            .unwrap()
            .manifest
            .as_ref()
            .unwrap()
            .position;
        let sealer = Sealer::default();
        let mut shipper = Shipper::new(&self.store, &self.place, &sealer, from.max(base));
        let shipping = async {
            while shipped_to(&self.place, self.store.id())
                .await
                .unwrap()
                .unwrap_or(0)
                < position
            {
                shipper.next(&|_| {}).await.unwrap();
            }
        };
        tokio::time::timeout(SOON, shipping).await.unwrap();
    }

    async fn position(&self) -> u64 {
        self.store
            .kv()
            .get(content::HEAD)
            .await
            .unwrap()
            .unwrap()
            .modified
    }
}

async fn contents(kv: &Kv) -> BTreeMap<String, Vec<u8>> {
    let all = kv.all("").await.unwrap().into_iter();
    all.filter(|entry| content::is_kept(&entry.key))
        .map(|entry| (entry.key, entry.value.to_vec()))
        .collect()
}

async fn opened(kv: Kv) -> Store {
    Store::open(kv, Options::default()).await.unwrap()
}

fn payloads(stored: Vec<Stored>) -> BTreeMap<String, (u64, Vec<u8>)> {
    let stored = stored.into_iter();
    stored
        .map(|s| (s.key.to_string(), (s.revision, s.payload.to_vec())))
        .collect()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn everything_comes_back_key_by_key() {
    let site = Site::new().await;
    for n in 0..30 {
        put(&site.store, &format!("s{n}"), 80 + n).await;
    }
    let kv = site.store.kv();
    // Whatever else is in the store, by whichever part of the control plane.
    for n in 0..40u8 {
        let txn = Txn::default().put(format!("chunks/aa/{n:04}"), vec![n; 60_000]);
        kv.txn(txn).await.unwrap();
        kv.txn(Txn::default().put(format!("tokens/{n}"), "{}"))
            .await
            .unwrap();
    }
    let made = site.backup().await;
    assert!(made.manifest.chunks.len() >= 3, "{}", made.manifest.chunks.len());
    let (restored, told) = site.restored("new", Until::Latest).await.unwrap();
    assert_eq!(contents(&restored).await, contents(kv).await);
    assert_eq!((told.head.revision, &*told.store_id), (30, site.store.id()));
    assert_eq!(told.entries, contents(kv).await.len() as u64);
    let store = opened(restored).await;
    assert_eq!(
        payloads(store.everything().upserts),
        payloads(site.store.everything().upserts)
    );
    assert_eq!(put(&store, "next", 1).await, 31);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_made_while_others_write_is_of_one_moment() {
    let site = Site::new().await;
    for n in 0..400 {
        put(&site.store, &format!("s{n}"), 1).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (writer, stopping) = (site.store.clone(), Arc::clone(&stop));
    let writing = tokio::spawn(async move {
        let mut n = 0;
        while !stopping.load(Ordering::Relaxed) {
            put(&writer, &format!("s{}", n % 400), 2 + n).await;
            n = (n + 1) % 60_000;
        }
    });
    for round in 0..3 {
        let before = site.store.revision();
        let made = site.backup().await;
        assert!(made.manifest.revision >= before);
        assert!(
            !made.manifest.tail.is_empty(),
            "nothing was written meanwhile: round {round}"
        );
        let until = Until::Backup(catalogue::list(&site.place).await.unwrap().pop().unwrap().short);
        let (kv, told) = site.restored(&format!("new{round}"), until).await.unwrap();
        assert_eq!(told.head.revision, made.manifest.revision);
        let then = site.store.at(told.head.revision).await.unwrap().unwrap();
        let store = opened(kv).await;
        assert_eq!(payloads(store.everything().upserts), payloads(then));
    }
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
}

#[tokio::test]
async fn what_has_not_changed_is_stored_once() {
    let site = Site::new().await;
    for n in 0..40u8 {
        let txn = Txn::default().put(format!("chunks/aa/{n:04}"), vec![n; 60_000]);
        site.store.kv().txn(txn).await.unwrap();
    }
    let first = site.backup().await;
    put(&site.store, "a", 1).await;
    let second = site.backup().await;
    assert!(second.reused >= 2, "{second:?}");
    assert!(
        second.written < 4000,
        "{} bytes were stored again",
        second.written
    );
    let keep = Retention {
        last: 1,
        daily: 0,
        weekly: 0,
        max_age: None,
    };
    // Old enough for what nothing names to go.
    let later = Clock::System.now_ms() + 3 * 3_600_000;
    let swept = catalogue::sweep(&site.place, &keep, later).await.unwrap();
    assert_eq!(swept.backups, 1);
    assert!(swept.chunks >= 1);
    let left = site.listed().await;
    assert_eq!(left.len(), 1);
    assert_ne!(left[0].name, first.name);
    site.verify().await.unwrap();
}

#[tokio::test]
async fn a_sign_of_a_backup_under_way_keeps_chunks_that_nothing_names() {
    let site = Site::new().await;
    site.backup().await;
    let orphan = "chunks/00-11";
    site.place.put(orphan, vec![1]).await.unwrap();
    site.place.put("pending/x", Vec::new()).await.unwrap();
    let keep = Retention {
        last: 1,
        daily: 0,
        weekly: 0,
        max_age: None,
    };
    let later = Clock::System.now_ms() + 3 * 3_600_000;
    assert_eq!(
        catalogue::sweep(&site.place, &keep, later).await.unwrap().chunks,
        0
    );
    let much_later = later + 48 * 3_600_000;
    assert_eq!(
        catalogue::sweep(&site.place, &keep, much_later)
            .await
            .unwrap()
            .chunks,
        1
    );
}

#[tokio::test]
async fn a_backup_that_lost_its_leader_has_no_manifest() {
    let site = Site::new().await;
    put(&site.store, "a", 1).await;
    let refused = create::create(&site.store, &site.place, &Sealer::default(), None, || false).await;
    assert!(matches!(refused, Err(BackupError::Lost)));
    assert!(site.listed().await.is_empty());
}

#[tokio::test]
async fn one_byte_that_differs_anywhere_is_refused_by_its_objects_name() {
    let site = Site::new().await;
    for n in 0..20 {
        put(&site.store, &format!("s{n}"), 1).await;
    }
    site.backup().await;
    put(&site.store, "later", 1).await;
    site.ship_to(site.position().await).await;
    site.verify().await.unwrap();
    let dir = site.dir.0.join("place");
    let mut tried = 0;
    for path in files(&dir) {
        let name = path.strip_prefix(&dir).unwrap().to_str().unwrap().to_owned();
        let good = std::fs::read(&path).unwrap();
        let every = if name.starts_with("manifests/") {
            1
        } else {
            good.len() / 25 + 1
        };
        for at in (0..good.len()).step_by(every) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bad).unwrap();
            let error = site.verify().await.unwrap_err();
            assert!(condemns(&error), "{name} byte {at}: {error:?}");
            assert!(
                error.chain().contains(&name),
                "{name} byte {at}: {}",
                error.chain()
            );
            tried += 1;
        }
        std::fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(site.verify().await.is_err(), "{name} cut");
        std::fs::remove_file(&path).unwrap();
        if !name.starts_with("manifests/") && !name.starts_with("log/") {
            let error = site.verify().await.unwrap_err().chain();
            assert!(error.contains(&format!("{name} is not there")), "{error}");
        }
        std::fs::write(&path, &good).unwrap();
    }
    assert!(tried > 500, "{tried}");
    site.verify().await.unwrap();
}

#[tokio::test]
async fn a_manifest_that_was_made_up_to_fit_is_found_out() {
    let site = Site::new().await;
    for n in 0..20 {
        put(&site.store, &format!("s{n}"), 1).await;
    }
    let made = site.backup().await;
    // Whole by every hash, but of another content.
    let mut manifest = made.manifest.clone();
    manifest.content_sha256 = sha256(b"else");
    manifest.begun_ms += 1;
    let (name, bytes) = manifest.encode();
    site.place.put(&name, bytes).await.unwrap();
    let error = site.verify().await.unwrap_err().chain();
    assert!(error.contains("the manifest says"), "{error}");
    let mut manifest = made.manifest;
    manifest.revision += 1;
    manifest.begun_ms += 2;
    let (name, bytes) = manifest.encode();
    site.place.put(&name, bytes).await.unwrap();
    let error = site.verify().await.unwrap_err().chain();
    assert!(error.contains("says revision 21"), "{error}");
}

#[tokio::test]
async fn a_store_is_restored_to_any_revision_and_time() {
    let clock = Arc::new(AtomicU64::new(1_000_000));
    let options = Options {
        clock: Clock::Set(Arc::clone(&clock)),
        ..Options::default()
    };
    let site = Site::with(options).await;
    put(&site.store, "s0", 1).await;
    site.backup().await;
    let mut worlds = vec![(0, BTreeMap::new())];
    for n in 1..=12u16 {
        clock.fetch_add(1000, Ordering::Relaxed);
        let revision = put(&site.store, &format!("s{}", n % 3), n).await;
        worlds.push((revision, payloads(site.store.everything().upserts)));
        if n % 4 == 0 {
            site.ship_to(site.position().await).await;
        }
    }
    for (n, (revision, world)) in worlds.iter().enumerate().skip(1) {
        let (kv, told) = site
            .restored(&format!("r{n}"), Until::Revision(*revision))
            .await
            .unwrap();
        assert_eq!(told.head.revision, *revision);
        assert_eq!(&payloads(opened(kv).await.everything().upserts), world);
    }
    let refused = site.restored("none", Until::Revision(99)).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "revision 99 is in no backup and not in the log: the last before it is 13"
    );
    // A backup's own time is the system's; times of the set clock are all before it.
    let refused = site
        .restored("early", Until::Time(5))
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.starts_with("there is no backup of store"), "{refused}");
}

#[tokio::test]
async fn a_time_between_two_writes_is_the_state_between_them() {
    let site = Site::new().await;
    put(&site.store, "s0", 1).await;
    site.backup().await;
    let mut times = Vec::new();
    for n in 1..=5u16 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        put(&site.store, "s0", n).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        times.push((Clock::System.now_ms(), u64::from(n) + 1));
        site.ship_to(site.position().await).await;
    }
    for (ms, revision) in times {
        let (_, told) = site
            .restored(&format!("t{revision}"), Until::Time(ms))
            .await
            .unwrap();
        assert_eq!(told.head.revision, revision);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_ship_at_once_the_log_is_whole() {
    let site = Site::new().await;
    put(&site.store, "s0", 1).await;
    let from = site.backup().await.manifest.position;
    let mut shippers = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (store, place) = (site.store.clone(), site.place.clone());
        shippers.spawn(async move {
            let sealer = Sealer::default();
            let mut shipper = Shipper::new(&store, &place, &sealer, from);
            loop {
                shipper.next(&|_| {}).await.unwrap();
            }
        });
    }
    for n in 1..=40 {
        put(&site.store, &format!("s{}", n % 7), n).await;
        if n % 10 == 0 {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
    let end = site.position().await;
    let there = async {
        while shipped_to(&site.place, site.store.id())
            .await
            .unwrap()
            .unwrap_or(0)
            < end
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, there).await.unwrap();
    shippers.shutdown().await;
    let (kv, told) = site.restored("new", Until::Latest).await.unwrap();
    assert_eq!(told.head.revision, 41);
    let store = opened(kv).await;
    assert_eq!(
        payloads(store.everything().upserts),
        payloads(site.store.everything().upserts)
    );
}

#[tokio::test]
async fn changes_that_went_by_unseen_are_said_to_be_missing() {
    let site = Site::new().await;
    put(&site.store, "s0", 1).await;
    let from = site.backup().await.manifest.position;
    put(&site.store, "s0", 2).await;
    site.store.kv().compact(site.position().await).await.unwrap();
    let sealer = Sealer::default();
    let mut shipper = Shipper::new(&site.store, &site.place, &sealer, from);
    let error = shipper.next(&|_| {}).await.unwrap_err();
    assert!(matches!(error, BackupError::Gap(_)), "{error:?}");
}

#[tokio::test]
async fn an_encrypted_backup_says_nothing_and_opens_with_its_identity() {
    let site = Site::new().await;
    put(&site.store, "secretname", 1).await;
    let (path, recipient) = identity(&site.dir.0);
    let sealer = Sealer::new(&[recipient]).unwrap();
    let ca = site.dir.0.join("ca");
    leeward_identity::authority::Authority::create(&ca, "leeward.test").unwrap();
    let packed = create::pack_authority(&ca).unwrap();
    create::create(&site.store, &site.place, &sealer, Some(packed), || true)
        .await
        .unwrap();
    for file in files(&site.dir.0.join("place")) {
        let bytes = std::fs::read(&file).unwrap();
        for word in [&b"secretname"[..], b"PRIVATE KEY", b"leeward.test"] {
            assert!(
                !bytes.windows(word.len()).any(|w| w == word),
                "{}",
                file.display()
            );
        }
    }
    let listed = site.listed().await;
    let closed = Opener::default();
    let refused = verify::verify(&site.place, &closed, &listed[0], &site.dir.0, false).await;
    let refused = refused.unwrap_err().chain();
    assert!(
        refused.contains("is encrypted: give an age identity"),
        "{refused}"
    );
    let hashes = verify::verify(&site.place, &closed, &listed[0], &site.dir.0, true)
        .await
        .unwrap();
    assert!(hashes.restored.is_none());
    let opener = Opener::from_file(&path).unwrap();
    let found = verify::verify(&site.place, &opener, &listed[0], &site.dir.0, false)
        .await
        .unwrap();
    assert_eq!(found.restored.unwrap().head.revision, 1);
    // The authority comes back as it was, for its owner only, and not over another.
    let reader = Reader {
        place: &site.place,
        opener: &opener,
    };
    let to = site.dir.0.join("ca-again");
    let manifest = listed[0].manifest.as_ref().unwrap();
    recover::restore_authority(&reader, manifest, &to).await.unwrap();
    for file in ["ca.pem", "ca-key.pem"] {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(
            std::fs::read(to.join(file)).unwrap(),
            std::fs::read(ca.join(file)).unwrap()
        );
        let mode = std::fs::metadata(to.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    assert!(recover::restore_authority(&reader, manifest, &to).await.is_err());
}

#[tokio::test]
async fn a_directory_that_has_a_store_is_left_alone_or_put_aside() {
    let site = Site::new().await;
    put(&site.store, "a", 1).await;
    site.backup().await;
    let listed = site.listed().await;
    let plan: Plan = recover::plan(&listed, None, Until::Latest).unwrap();
    let opener = Opener::default();
    let reader = Reader {
        place: &site.place,
        opener: &opener,
    };
    let dir = site.dir.0.join("new");
    let (told, aside) = into::directory(&dir, &reader, &plan, Some("fresh"), None)
        .await
        .unwrap();
    assert_eq!((&*told.store_id, aside), ("fresh", None));
    let refused = into::directory(&dir, &reader, &plan, None, None)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("is a store already"), "{refused}");
    let (_, aside) = into::directory(&dir, &reader, &plan, Some("newer"), Some("T"))
        .await
        .unwrap();
    let aside = aside.unwrap();
    assert_eq!(opened(Kv::sqlite(&aside).unwrap()).await.id(), "fresh");
    assert_eq!(opened(Kv::sqlite(&dir).unwrap()).await.id(), "newer");
    // One that is in use is nobody's to replace.
    let used = site.dir.0.join("store");
    let refused = into::directory(&used, &reader, &plan, None, Some("T"))
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("is in use by a control plane"),
        "{refused}"
    );
}

#[tokio::test]
async fn what_a_restore_that_was_cut_short_has_left_is_no_store() {
    let site = Site::new().await;
    put(&site.store, "a", 1).await;
    site.backup().await;
    let kv = Kv::sqlite(&site.dir.0.join("half")).unwrap();
    let txn = Txn::default()
        .put(content::RESTORING, "begun")
        .put("rev/x", "half");
    kv.txn(txn).await.unwrap();
    assert!(recover::refuse_unfinished(&kv).await.is_err());
    drop(kv);
    // Again, over what it has left.
    let (kv, told) = site.restored("half", Until::Latest).await.unwrap();
    assert_eq!(told.head.revision, 1);
    recover::refuse_unfinished(&kv).await.unwrap();
    assert!(!contents(&kv).await.contains_key("rev/x"));
    let refused = recover::Writer::begin(&kv).await.err().unwrap();
    assert!(refused.to_string().contains("has something already"), "{refused}");
}
