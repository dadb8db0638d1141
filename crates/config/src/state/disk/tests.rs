use super::*;
use crate::apply::key_of;
use crate::state::{Entry, Slot};
use leeward_proto::{manifest, v1};

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("leeward-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Self(dir)
    }

    fn open(&self) -> Opened {
        Disk::open(self.0.clone()).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn change(names: &[&str], generation: u64) -> Change {
    let mut change = Change::default();
    change.commit.generation = generation;
    for name in names {
        let text = format!("apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}}}\nspec: {{}}");
        let mut wire = manifest::parse("test", &text).unwrap().remove(0);
        wire.metadata.as_mut().unwrap().revision = generation;
        let key = key_of(&wire).unwrap();
        change.puts.insert((key, Slot::Good), Some(Entry::good(wire)));
    }
    change
}

fn names(restored: Option<Restored>) -> (u64, Vec<String>) {
    let restored = restored.unwrap();
    let name = |wire: &v1::Resource| wire.metadata.as_ref().unwrap().name.clone();
    (
        restored.commit.generation,
        restored.good.iter().map(name).collect(),
    )
}

#[test]
fn what_one_process_writes_the_next_one_reads() {
    let scratch = Scratch::new("next");
    let Opened {
        mut disk,
        restored,
        damaged,
    } = scratch.open();
    assert!(restored.is_none() && damaged.is_empty());
    assert_eq!(disk.write(None).unwrap(), Written::Nothing);
    assert_eq!(disk.write(Some(change(&["a", "b"], 1))).unwrap(), Written::Done);
    let base = fs::read(scratch.0.join(POLICY)).unwrap();
    assert_eq!(disk.write(Some(change(&["c"], 2))).unwrap(), Written::Done);
    assert_eq!(disk.write(Some(change(&["c"], 2))).unwrap(), Written::Nothing);
    assert_eq!(
        fs::read(scratch.0.join(POLICY)).unwrap(),
        base,
        "a change is added to the log"
    );
    drop(disk);
    let mut opened = scratch.open();
    assert_eq!(
        names(opened.restored.take()),
        (2, vec!["a".into(), "b".into(), "c".into()])
    );
    assert!(opened.damaged.is_empty());
    // It goes on where that was.
    let log = fs::metadata(scratch.0.join(LOG)).unwrap().len();
    assert_eq!(opened.disk.write(Some(change(&["d"], 3))).unwrap(), Written::Done);
    assert!(fs::metadata(scratch.0.join(LOG)).unwrap().len() > log);
    assert_eq!(fs::read(scratch.0.join(POLICY)).unwrap(), base);
    assert_eq!(scratch.files(), ["lock", "policy", "policy.log"]);
    for file in scratch.files() {
        assert_eq!(
            fs::metadata(scratch.0.join(&file)).unwrap().mode() & 0o777,
            0o600,
            "{file}"
        );
    }
    assert_eq!(fs::metadata(&scratch.0).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn a_long_log_becomes_a_base() {
    let scratch = Scratch::new("long");
    let mut disk = scratch.open().disk;
    let many: Vec<String> = (0..3000).map(|i| format!("zone-with-a-long-name-{i}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    disk.write(Some(change(&many, 1))).unwrap();
    let base = fs::metadata(scratch.0.join(POLICY)).unwrap().len();
    let (mut longest, mut bases) = (0, std::collections::BTreeSet::new());
    for generation in 2..30 {
        disk.write(Some(change(&many[..400], generation))).unwrap();
        longest = longest.max(fs::metadata(scratch.0.join(LOG)).unwrap().len());
        bases.insert(fs::read(scratch.0.join(POLICY)).unwrap());
    }
    assert!(longest > base / 4 && longest <= base, "{longest} {base}");
    assert!((2..10).contains(&bases.len()), "{}", bases.len());
    drop(disk);
    let (generation, found) = names(scratch.open().restored);
    assert_eq!((generation, found.len()), (29, 3000));
}

#[test]
fn a_log_that_broke_off_is_cut_and_gone_on_with() {
    let scratch = Scratch::new("torn");
    let mut disk = scratch.open().disk;
    for (i, name) in ["a", "b", "c"].iter().enumerate() {
        disk.write(Some(change(&[name], i as u64 + 1))).unwrap();
    }
    drop(disk);
    let log = fs::read(scratch.0.join(LOG)).unwrap();
    fs::write(scratch.0.join(LOG), &log[..log.len() - 5]).unwrap();
    let Opened {
        mut disk,
        restored,
        damaged,
    } = scratch.open();
    assert!(damaged.is_empty(), "{damaged:?}");
    assert_eq!(names(restored), (2, vec!["a".into(), "b".into()]));
    disk.write(Some(change(&["d"], 4))).unwrap();
    drop(disk);
    assert_eq!(
        names(scratch.open().restored),
        (4, vec!["a".into(), "b".into(), "d".into()])
    );
}

#[test]
fn what_is_damaged_is_set_aside_and_written_anew() {
    let scratch = Scratch::new("damaged");
    let mut disk = scratch.open().disk;
    disk.write(Some(change(&["a", "b", "c"], 1))).unwrap();
    drop(disk);
    for round in 1..=6_u64 {
        let mut base = fs::read(scratch.0.join(POLICY)).unwrap();
        // The last of the records, before the head is there once more.
        let at = base.windows(4).rposition(|window| window == b"LWST").unwrap() - 3;
        base[at] ^= 1;
        fs::write(scratch.0.join(POLICY), &base).unwrap();
        let Opened {
            mut disk,
            restored,
            damaged,
        } = scratch.open();
        let [damage] = &damaged[..] else {
            panic!("{damaged:?}")
        };
        assert_eq!(
            damage.aside,
            Some(scratch.0.join(format!("policy.corrupt-{round}")))
        );
        assert_eq!(fs::read(damage.aside.as_ref().unwrap()).unwrap(), base);
        // What the log says anew is no loss.
        let left = if round == 1 { 2 } else { 3 };
        assert_eq!(names(restored).1.len(), left, "{round}");
        // Without anything new it is as good as can be.
        assert_eq!(disk.write(None).unwrap(), Written::Done);
        disk.write(Some(change(&["a", "b", "c"], 1 + round))).unwrap();
        drop(disk);
        let opened = scratch.open();
        assert!(opened.damaged.is_empty());
        assert_eq!(names(opened.restored).1.len(), 3);
    }
    let aside = scratch.files().into_iter().filter(|name| name.contains(CORRUPT));
    assert_eq!(
        aside.collect::<Vec<_>>(),
        [
            "policy.corrupt-3",
            "policy.corrupt-4",
            "policy.corrupt-5",
            "policy.corrupt-6"
        ]
    );
}

#[test]
fn files_that_nothing_can_be_taken_from_are_no_reason_not_to_start() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil); 5] = [
        ("empty", |path| fs::write(path, b"").unwrap()),
        ("other", |path| fs::write(path, b"kind: Route").unwrap()),
        ("writable", |path| {
            fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
        }),
        ("directory", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("link", |path| {
            fs::rename(path, path.with_extension("other")).unwrap();
            std::os::unix::fs::symlink(path.with_extension("other"), path).unwrap();
        }),
    ];
    for (name, spoil) in spoils {
        let scratch = Scratch::new(&format!("spoilt-{name}"));
        let mut disk = scratch.open().disk;
        disk.write(Some(change(&["a"], 1))).unwrap();
        drop(disk);
        spoil(&scratch.0.join(POLICY));
        let Opened {
            mut disk,
            restored,
            damaged,
        } = scratch.open();
        assert!(restored.is_none(), "{name}");
        let [damage] = &damaged[..] else {
            panic!("{name}: {damaged:?}")
        };
        assert_eq!(damage.aside, Some(scratch.0.join("policy.corrupt-1")), "{name}");
        assert!(!scratch.0.join(POLICY).exists(), "{name}");
        disk.write(Some(change(&["b"], 2))).unwrap();
        drop(disk);
        assert_eq!(names(scratch.open().restored), (2, vec!["b".into()]), "{name}");
    }
}

#[test]
fn a_later_build_s_files_are_neither_read_nor_destroyed() {
    let scratch = Scratch::new("later");
    let mut disk = scratch.open().disk;
    disk.write(Some(change(&["a"], 1))).unwrap();
    drop(disk);
    // A frame of version 2, with its checksum.
    let later = super::super::frame::framed_as(2, b"something else").unwrap();
    fs::write(scratch.0.join(POLICY), &later).unwrap();
    let Opened {
        mut disk,
        restored,
        damaged,
    } = scratch.open();
    assert!(restored.is_none() && damaged.is_empty());
    assert_eq!(disk.write(Some(change(&["b"], 2))).unwrap(), Written::NotOurs);
    assert_eq!(disk.write_blob("levels", b"x").unwrap(), Written::NotOurs);
    assert_eq!(fs::read(scratch.0.join(POLICY)).unwrap(), later);
}

#[test]
fn one_process_writes_and_the_next_one_takes_over() {
    let scratch = Scratch::new("two");
    let mut old = scratch.open().disk;
    old.write(Some(change(&["a"], 1))).unwrap();
    old.write(Some(change(&["b"], 2))).unwrap();
    let Opened {
        disk: mut new,
        restored,
        damaged,
    } = scratch.open();
    assert!(damaged.is_empty());
    assert_eq!(names(restored), (2, vec!["a".into(), "b".into()]));
    assert_eq!(new.write(Some(change(&["c"], 3))).unwrap(), Written::NotOurs);
    // The old one has heard of something that the new one hasn't, and of what it has.
    old.write(Some(change(&["x"], 3))).unwrap();
    drop(old);
    assert_eq!(new.write(None).unwrap(), Written::Done);
    drop(new);
    assert_eq!(
        names(scratch.open().restored),
        (3, vec!["a".into(), "b".into(), "c".into()])
    );
}

#[test]
fn what_is_kept_beside_policy_is_whole_or_not_there() {
    let scratch = Scratch::new("blobs");
    let mut disk = scratch.open().disk;
    assert_eq!(disk.read_blob("levels"), Ok(None));
    disk.write_blob("levels", b"one").unwrap();
    disk.write_blob("levels", b"two").unwrap();
    assert_eq!(disk.read_blob("levels"), Ok(Some(b"two".to_vec())));
    let path = scratch.0.join("levels");
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 4;
        fs::write(&path, &bad).unwrap();
        let damage = disk.read_blob("levels").unwrap_err();
        assert!(damage.aside.is_some_and(|aside| aside.exists()), "byte {at}");
        assert_eq!(disk.read_blob("levels"), Ok(None));
    }
}
