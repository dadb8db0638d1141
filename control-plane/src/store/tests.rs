//! What the store does on a file; what it does on any kv is in tests/store.rs.

use super::*;
use crate::kv::{KvError, Txn};
use leeward_policy::Name;
use std::path::PathBuf;

/// A directory that goes when the test ends.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("leeward-store-{}-{n}", std::process::id())))
    }

    /// The store in it.
    pub(crate) async fn store(&self) -> Store {
        self.store_with(Bounds::DEFAULT).await
    }

    pub(crate) async fn store_with(&self, bounds: Bounds) -> Store {
        let options = Options {
            bounds,
            ..Options::default()
        };
        self.try_store(options).await.unwrap()
    }

    /// Tasks of one that was closed may still have it for a moment.
    pub(crate) async fn try_store(&self, options: Options) -> Result<Store, StoreError> {
        let until = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            match Kv::sqlite(&self.0) {
                Err(KvError::InUse { .. }) if tokio::time::Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                kv => return Store::open(kv?, options).await,
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn key(text: &str) -> Key {
    Key {
        kind: Kind::Service,
        name: Name::parse(text).unwrap(),
    }
}

fn put(name: &str, payload: &str) -> Change {
    Change {
        writes: vec![Write {
            key: key(name),
            payload: Some(payload.into()),
            expect: 0,
        }],
        ..Change::default()
    }
}

fn delete(names: impl IntoIterator<Item = String>) -> Change {
    let writes = names.into_iter().map(|name| Write {
        key: key(&name),
        payload: None,
        expect: 0,
    });
    Change {
        writes: writes.collect(),
        ..Change::default()
    }
}

#[tokio::test]
async fn a_store_in_a_file_has_one_control_plane() {
    let dir = Scratch::new();
    let store = dir.store().await;
    assert!(matches!(Kv::sqlite(&dir.0), Err(KvError::InUse { .. })));
    drop(store);
    dir.store().await;
}

#[tokio::test]
async fn a_file_of_a_later_build_is_left_alone() {
    let dir = Scratch::new();
    drop(dir.store().await);
    dir.store().await;
    let db = rusqlite::Connection::open(dir.0.join("leeward.db")).unwrap();
    db.execute_batch("PRAGMA user_version = 99;").unwrap();
    drop(db);
    let error = dir.try_store(Options::default()).await.unwrap_err().to_string();
    assert!(
        error.contains("has schema 99, and this build knows up to 5"),
        "{error}"
    );
}

#[tokio::test]
async fn forgotten_deletions_are_said_to_be_forgotten() {
    let dir = Scratch::new();
    let bounds = Bounds {
        tombstones: 1000,
        ..Bounds::DEFAULT
    };
    let store = dir.store_with(bounds).await;
    for round in 0..=10 {
        let names = (0..100).map(|i| format!("n{i}-{round}"));
        store.write(delete(names)).await.unwrap();
    }
    assert!(store.changes_since(0).is_none());
    assert!(store.changes_since(1).is_some());
}

#[tokio::test]
async fn resources_are_bounded_and_what_is_there_can_change() {
    let dir = Scratch::new();
    let bounds = Bounds {
        resources: 2,
        ..Bounds::DEFAULT
    };
    let store = dir.store_with(bounds).await;
    store.write(put("a", "1")).await.unwrap();
    store.write(put("b", "1")).await.unwrap();
    let error = store.write(put("c", "1")).await.unwrap_err().to_string();
    assert_eq!(error, "there would be 3 resources; want at most 2");
    store.write(put("a", "2")).await.unwrap();
    store.write(delete(["a".to_owned()])).await.unwrap();
    store.write(put("c", "1")).await.unwrap();
}

#[tokio::test]
async fn payloads_of_kinds_of_later_builds_stay() {
    let dir = Scratch::new();
    let bounds = Bounds {
        snapshot_every: (2, usize::MAX),
        ..Bounds::DEFAULT
    };
    let store = dir.store_with(bounds).await;
    store.write(put("a", "1")).await.unwrap();
    let foreign = wire::Change {
        kind: "Sundial".to_owned(),
        name: "s".to_owned(),
        after: Some(wire::Value::default()),
        before: None,
    };
    let record = Record {
        revision: 2,
        time_ms: 0,
        author: Author::default(),
        changes: Vec::new(),
    };
    store.inner.mirror_mut().apply(Arc::new(record), vec![foreign]);
    let snapshot = store.inner.mirror().snapshot();
    assert!(
        snapshot
            .resources
            .iter()
            .any(|resource| resource.kind == "Sundial")
    );
    let again = Mirror::of(snapshot, bounds).snapshot();
    assert!(again.resources.iter().any(|resource| resource.kind == "Sundial"));
    assert!(store.list(None, None, 10).0.iter().all(|s| s.key == key("a")));
}

mod tables {
    use super::*;

    const DAY_MS: i64 = 24 * 3600 * 1000;

    fn token(n: u8) -> NewToken {
        NewToken {
            hash: [n; 32],
            id: "spiffe://td/zone/a/proxy/a1".into(),
            who: "spiffe://td/user/ada".into(),
            expires_ms: 1000,
        }
    }

    #[tokio::test]
    async fn a_token_is_good_once_until_it_ends_and_for_one() {
        let dir = Scratch::new();
        let (one, two) = (token(1), token(2));
        {
            let store = dir.store().await;
            store.put_token(&one, 0).await.unwrap();
            store.put_token(&two, 0).await.unwrap();
            let other = store.use_token(&one.hash, ("spiffe://td/zone/a/proxy/a2", None), "key", 10);
            assert_eq!(other.await.unwrap(), TokenUse::Other);
            assert_eq!(
                store
                    .use_token(&one.hash, (&one.id, None), "key", 10)
                    .await
                    .unwrap(),
                TokenUse::Good
            );
            assert_eq!(
                store
                    .use_token(&[9; 32], (&one.id, None), "key", 10)
                    .await
                    .unwrap(),
                TokenUse::Unknown
            );
        }
        let store = dir.store().await;
        assert_eq!(
            store
                .use_token(&one.hash, (&one.id, None), "another", 20)
                .await
                .unwrap(),
            TokenUse::Used(10)
        );
        // The one that used it may not have heard of it; after the token's end it is too late.
        for (at, use_) in [
            (20, TokenUse::Good),
            (1000, TokenUse::Good),
            (1001, TokenUse::Used(10)),
        ] {
            let again = store.use_token(&one.hash, (&one.id, None), "key", at);
            assert_eq!(again.await.unwrap(), use_, "{at}");
        }
        assert_eq!(
            store
                .use_token(&two.hash, (&two.id, None), "key", 1001)
                .await
                .unwrap(),
            TokenUse::Ended(1000)
        );
        // They are forgotten a week after they ended.
        let late = 1000 + certificates::TOKEN_KEPT_MS + 1;
        store.put_token(&token(3), late).await.unwrap();
        assert_eq!(
            store
                .use_token(&one.hash, (&one.id, None), "key", 20)
                .await
                .unwrap(),
            TokenUse::Unknown
        );
    }

    #[tokio::test]
    async fn a_token_that_lasts_for_days_is_good_again_for_an_hour() {
        let dir = Scratch::new();
        let store = dir.store().await;
        let days = NewToken {
            expires_ms: 7 * DAY_MS,
            ..token(1)
        };
        store.put_token(&days, 0).await.unwrap();
        // The hour begins with the first use; those after it don't make it longer.
        let hour = 10 + certificates::TOKEN_AGAIN_MS;
        for (at, use_) in [
            (10, TokenUse::Good),
            (hour - 1, TokenUse::Good),
            (hour, TokenUse::Good),
            (hour + 1, TokenUse::Used(10)),
        ] {
            let used = store.use_token(&days.hash, (&days.id, None), "key", at);
            assert_eq!(used.await.unwrap(), use_, "{at}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_many_at_once_one_finds_a_token_good() {
        let dir = Scratch::new();
        let store = dir.store().await;
        store.put_token(&token(1), 0).await.unwrap();
        let tries: Vec<_> = (0..8)
            .map(|n| {
                let (store, key) = (store.clone(), format!("key {n}"));
                tokio::spawn(async move {
                    let id = token(1).id;
                    store.use_token(&[1; 32], (&id, None), &key, 5).await.unwrap()
                })
            })
            .collect();
        let mut good = 0;
        for used in tries {
            good += usize::from(used.await.unwrap() == TokenUse::Good);
        }
        assert_eq!(good, 1);
    }

    #[tokio::test]
    async fn certificates_are_remembered_until_they_end_and_a_few_of_each() {
        let dir = Scratch::new();
        let store = dir.store().await;
        let row = |id: &str, n: i64| IssuedRow {
            id: id.into(),
            by: None,
            fingerprint: format!("f{n}"),
            root: "r".into(),
            not_after_ms: n,
        };
        for n in 100..110 {
            store.put_certificate(&row("a", n), 0).await.unwrap();
        }
        store.put_certificate(&row("b", 50), 0).await.unwrap();
        let kept: Vec<i64> = store
            .certificates(0)
            .await
            .unwrap()
            .iter()
            .map(|row| row.not_after_ms)
            .collect();
        assert_eq!(kept, [106, 107, 108, 109, 50]);
        assert_eq!(store.certificates(108).await.unwrap().len(), 2);
        store.put_certificate(&row("a", 500), 200).await.unwrap();
        let of_a: Vec<_> = store.certificates(0).await.unwrap();
        assert_eq!(of_a, [row("a", 500), row("b", 50)]);
    }

    #[tokio::test]
    async fn a_workloads_certificates_are_remembered_for_each_proxy() {
        let dir = Scratch::new();
        let store = dir.store().await;
        let row = |by: Option<&str>, n: i64| IssuedRow {
            id: "spiffe://td/zone/a/workload/pay".into(),
            by: by.map(Into::into),
            fingerprint: format!("f{n}"),
            root: "r".into(),
            not_after_ms: n,
        };
        for n in 100..110 {
            for by in [Some("a1"), Some("a2")] {
                store.put_certificate(&row(by, n), 0).await.unwrap();
            }
        }
        let kept = store.certificates(0).await.unwrap();
        let of = |by| (106..110).map(move |n| row(by, n));
        assert_eq!(kept, of(Some("a1")).chain(of(Some("a2"))).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_token_of_before_a_revocation_is_no_good() {
        let dir = Scratch::new();
        let store = dir.store().await;
        store.put_token(&token(1), 10).await.unwrap();
        let id = token(1).id;
        for (since, use_) in [
            (Some(11), TokenUse::Revoked(10)),
            (Some(10), TokenUse::Good),
            // Nor is one that was used.
            (Some(11), TokenUse::Revoked(10)),
            (None, TokenUse::Good),
        ] {
            let used = store.use_token(&[1; 32], (&id, since), "key", 20);
            assert_eq!(used.await.unwrap(), use_, "{since:?}");
        }
    }

    #[tokio::test]
    async fn a_revocation_is_kept_until_its_end_and_never_made_less() {
        let dir = Scratch::new();
        let row = |id: &str, at_ms: i64, until_ms: i64| RevocationRow {
            id: id.into(),
            at_ms,
            until_ms,
            reason: format!("at {at_ms}"),
            who: "ada".into(),
        };
        {
            let store = dir.store().await;
            store.put_revocation(&row("b", 1000, 5000), 0).await.unwrap();
            store.put_revocation(&row("a", 2000, 9000), 0).await.unwrap();
            let merged = RevocationRow {
                at_ms: 2000,
                until_ms: 9000,
                ..row("a", 1000, 5000)
            };
            let kept = store.put_revocation(&row("a", 1000, 5000), 0).await.unwrap();
            assert_eq!(kept, merged);
        }
        let store = dir.store().await;
        let ids = async |now| {
            let rows = store.revocations(now).await.unwrap();
            rows.into_iter().map(|row| row.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(5000).await, ["a", "b"]);
        assert_eq!(ids(5001).await, ["a"]);
        assert_eq!(store.revocation("b").await.unwrap(), Some(row("b", 1000, 5000)));
        // What has ended makes room.
        store.put_revocation(&row("c", 6000, 9000), 6000).await.unwrap();
        assert_eq!(store.revocation("b").await.unwrap(), None);
        assert_eq!(
            store.take_revocation("c").await.unwrap(),
            Some(row("c", 6000, 9000))
        );
        assert_eq!(store.take_revocation("c").await.unwrap(), None);
        assert_eq!(ids(0).await, ["a"]);
    }

    #[tokio::test]
    async fn there_are_no_more_revocations_than_may_be() {
        let dir = Scratch::new();
        let store = dir.store().await;
        let row = |n: u64| RevocationRow {
            id: format!("spiffe://td/zone/a/proxy/p{n}"),
            at_ms: 1000,
            until_ms: 5000,
            reason: String::new(),
            who: String::new(),
        };
        let many = 10_000;
        let rows: Vec<_> = (0..many).collect();
        for rows in rows.chunks(50) {
            let txn = rows.iter().fold(Txn::default(), |txn, n| {
                txn.put(
                    format!("revoked/{}", row(*n).id),
                    r#"{"atMs":1000,"untilMs":5000}"#,
                )
            });
            store.kv().txn(txn).await.unwrap().unwrap();
        }
        let error = store.put_revocation(&row(many), 0).await.unwrap_err();
        assert!(matches!(error, StoreError::Revocations(10_000)), "{error}");
        // One that is there already may be said again.
        store.put_revocation(&row(1), 0).await.unwrap();
        assert_eq!(store.revocations(0).await.unwrap().len(), 10_000);
    }

    fn module(text: &str) -> (leeward_module::Module, Vec<u8>) {
        let module = format!("(module (func (export \"proxy_abi_version_0_2_1\")) {text})");
        let bytes = wat::parse_str(module).unwrap();
        (leeward_module::inspect(&bytes).unwrap(), bytes)
    }

    async fn bytes_of(store: &Store, module: &leeward_module::Module) -> Vec<u8> {
        let chunks = store.module_chunks(&module.sha256, 0, u32::MAX).await;
        chunks.unwrap().concat()
    }

    #[tokio::test]
    async fn a_module_is_kept_over_a_restart_in_pieces() {
        let dir = Scratch::new();
        let (module, bytes) = module(&format!("(memory 20) (data \"{}\")", "x".repeat(20 * CHUNK)));
        {
            let store = dir.store().await;
            store
                .put_module(&module, &bytes, Some("s1"), "ada")
                .await
                .unwrap();
        }
        let store = dir.store().await;
        let found = store.module(&module.sha256).await.unwrap().unwrap();
        assert_eq!((&found.module, &*found.by), (&module, "ada"));
        assert_eq!(found.signatures, ["s1"]);
        assert_eq!(bytes_of(&store, &module).await, bytes);
        let second = store.module_chunks(&module.sha256, 1, 1).await.unwrap();
        assert_eq!(second, [bytes[CHUNK..2 * CHUNK].to_vec()]);
        assert!(
            store
                .module_chunks(&module.sha256, 99, 1)
                .await
                .unwrap()
                .is_empty()
        );
        assert!(store.module(&[0; 32]).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn one_that_is_there_gets_another_signature_and_nothing_else() {
        let dir = Scratch::new();
        let store = dir.store().await;
        let (module, bytes) = module("");
        let put = |signature: Option<String>, by: &'static str| {
            let (store, module, bytes) = (store.clone(), module.clone(), bytes.clone());
            async move { store.put_module(&module, &bytes, signature.as_deref(), by).await }
        };
        put(None, "ada").await.unwrap();
        for n in 0..modules::MAX_SIGNATURES {
            put(Some(format!("s{n:02}")), "bob").await.unwrap();
        }
        // What is there counts for nothing.
        put(Some("s00".into()), "bob").await.unwrap();
        let error = put(Some("more".into()), "bob").await.unwrap_err();
        assert!(matches!(error, StoreError::Signatures(16)), "{error}");
        let found = store.module(&module.sha256).await.unwrap().unwrap();
        assert_eq!((&*found.by, found.signatures.len()), ("ada", 16));
        assert_eq!(store.modules().await.unwrap()[0].1, 16);
        assert_eq!(bytes_of(&store, &module).await, bytes);
    }

    #[tokio::test]
    async fn what_all_take_is_bounded_and_given_back() {
        let dir = Scratch::new();
        let (first, first_bytes) = module("(memory 1)");
        let (second, second_bytes) = module("(memory 2)");
        let room = (first_bytes.len() + second_bytes.len() - 1) as u64;
        let bounds = Bounds {
            modules: room,
            ..Bounds::DEFAULT
        };
        let store = dir.store_with(bounds).await;
        store.put_module(&first, &first_bytes, None, "ada").await.unwrap();
        let error = store.put_module(&second, &second_bytes, None, "ada").await;
        let error = error.unwrap_err();
        assert!(matches!(error, StoreError::Full { count: 1, .. }), "{error}");
        assert!(store.delete_module(&first.sha256, 0).await.unwrap());
        assert!(!store.delete_module(&first.sha256, 0).await.unwrap());
        assert!(bytes_of(&store, &first).await.is_empty());
        store
            .put_module(&second, &second_bytes, None, "ada")
            .await
            .unwrap();
        assert_eq!(
            store.modules_size().await.unwrap(),
            (second_bytes.len() as u64, room)
        );
        let kept = store.kv().all("chunks/").await.unwrap();
        assert_eq!(kept.len(), 1, "{kept:?}");
    }

    #[tokio::test]
    async fn a_module_goes_only_at_the_revision_at_which_nothing_names_it() {
        let dir = Scratch::new();
        let store = dir.store().await;
        let (module, bytes) = module("");
        store.put_module(&module, &bytes, None, "ada").await.unwrap();
        let stays = store.modules_stay().await.unwrap();
        store.write(put("a", "1")).await.unwrap();
        let error = store.delete_module(&module.sha256, 0).await.unwrap_err();
        assert!(
            matches!(error, StoreError::Moved { wanted: 0, found: 1 }),
            "{error}"
        );
        assert!(store.delete_module(&module.sha256, 1).await.unwrap());
        let naming = Change {
            requires: vec![stays],
            ..put("b", "names it")
        };
        let error = store.write(naming).await.unwrap_err();
        assert!(matches!(error, StoreError::Moved { .. }), "{error}");
        assert_eq!(store.settle().await.unwrap(), 1);
    }

    fn change(policy: &str, time_ms: i64) -> LevelChange {
        LevelChange {
            time_ms,
            policy: policy.into(),
            zone: "a".into(),
            from: "normal".into(),
            to: "reduced".into(),
            by: "trigger 0".into(),
            why: "error rate 62 %".into(),
        }
    }

    async fn add(store: &Store, changes: Vec<LevelChange>) {
        let levels = LevelWrites {
            changes,
            ..LevelWrites::default()
        };
        let change = Change {
            levels,
            ..Change::default()
        };
        store.write(change).await.unwrap();
    }

    fn ids(changes: &[(u64, LevelChange)]) -> Vec<u64> {
        changes.iter().map(|(id, _)| *id).collect()
    }

    #[tokio::test]
    async fn the_audit_is_bounded_by_age_and_length() {
        let dir = Scratch::new();
        let bounds = Bounds {
            lines: 1000,
            ..Bounds::DEFAULT
        };
        let store = dir.store_with(bounds).await;
        let now = store.now_ms();
        add(
            &store,
            vec![
                change("old", now - 91 * DAY_MS),
                change("young", now - 89 * DAY_MS),
            ],
        )
        .await;
        assert_eq!(ids(&store.level_changes("", 0, 10)), [2]);
        add(&store, vec![change("new", now); 999]).await;
        assert_eq!(ids(&store.level_changes("young", 0, 10)), [2]);
        add(&store, vec![change("new", now)]).await;
        assert!(store.level_changes("young", 0, 10).is_empty());
        assert_eq!(ids(&store.level_changes("", 4, 10)), [3]);
        assert_eq!(store.revision(), 0, "levels make no revision");
    }

    #[tokio::test]
    async fn levels_are_there_after_a_restart_and_those_that_ended_are_not() {
        let dir = Scratch::new();
        let place = Place {
            policy: "shop".into(),
            zone: String::new(),
        };
        let judged = Judged {
            level: "reduced".into(),
            since_ms: 7,
            by: "trigger 1".into(),
            why: "circuit of cart is open".into(),
        };
        let hold = Hold {
            since_ms: 1,
            until_ms: 2,
            by: "spiffe://leeward.test/user/ada".into(),
        };
        let write = |judged: Option<Judged>, hold: Option<Hold>| Change {
            levels: LevelWrites {
                judged: vec![(place.clone(), judged)],
                holds: vec![("shop".into(), hold)],
                ..LevelWrites::default()
            },
            ..Change::default()
        };
        {
            let store = dir.store().await;
            store
                .write(write(Some(judged.clone()), Some(hold.clone())))
                .await
                .unwrap();
        }
        let store = dir.store().await;
        assert_eq!(store.judged_levels(), [(place.clone(), judged)].into());
        assert_eq!(store.level_holds(), [("shop".to_owned(), hold)].into());
        store.write(write(None, None)).await.unwrap();
        assert!(store.judged_levels().is_empty());
        assert!(store.level_holds().is_empty());
    }
}
