use super::*;
use leeward_proto::manifest;

fn resource(text: &str, revision: u64) -> v1::Resource {
    let mut wire = manifest::parse("test", text).unwrap().remove(0);
    wire.metadata.as_mut().unwrap().revision = revision;
    wire
}

fn zone(name: &str, revision: u64) -> v1::Resource {
    resource(
        &format!(
            "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}, labels: {{a: b, c: d, e: f}}}}\nspec: {{}}"
        ),
        revision,
    )
}

fn guard(name: &str, revision: u64) -> v1::Resource {
    resource(
        &format!(
            "apiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\nspec: {{action: Allow, services: [cart], rules: [{{}}]}}"
        ),
        revision,
    )
}

fn put_good(change: &mut Change, wire: v1::Resource) {
    let key = key_of(&wire).unwrap();
    change.puts.insert((key, Slot::Good), Some(Entry::good(wire)));
}

fn commit(generation: u64) -> v1::StateCommit {
    v1::StateCommit {
        proxy: "a1".into(),
        zone: "a".into(),
        store_id: "s".into(),
        generation,
        heard_ms: 1,
        ..v1::StateCommit::default()
    }
}

/// What is live of each: name and revision.
fn live(image: &Image) -> Vec<(String, u64)> {
    let names = image.entries.iter().map(|((key, slot), entry)| {
        let mark = if *slot == Slot::Refused { "!" } else { "" };
        (format!("{mark}{key}"), entry.revision)
    });
    names.collect()
}

/// What was live after a generation.
type Then = (u64, Vec<(String, u64)>);

/// Changes, and what was live after each of them.
fn history() -> (Vec<u8>, Vec<u8>, Vec<Then>) {
    let mut image = Image::default();
    let mut first = Change {
        commit: commit(1),
        ..Change::default()
    };
    for wire in [zone("a", 1), zone("b", 1), zone("c", 1), guard("g", 1)] {
        put_good(&mut first, wire);
    }
    let refused = v1::StateRefused {
        r#ref: Some(leeward_proto::render_key(&key_of(&zone("r", 1)).unwrap())),
        revision: 1,
        reason: "no".into(),
        ..v1::StateRefused::default()
    };
    first.puts.insert(
        (key_of(&zone("r", 1)).unwrap(), Slot::Refused),
        Some(Entry::refused(refused)),
    );
    image.take(first);
    let base = image.base(7).unwrap();
    let mut log = log_head(7).unwrap();
    let mut states = vec![(1, live(&image))];
    for generation in 2..=4 {
        let mut change = Change {
            commit: commit(generation),
            ..Change::default()
        };
        put_good(&mut change, zone("a", generation));
        put_good(&mut change, zone(&format!("n{generation}"), generation));
        if generation == 3 {
            change
                .puts
                .insert((key_of(&zone("b", 1)).unwrap(), Slot::Good), None);
        }
        let new = image.take(change);
        log.extend(group(&new).unwrap());
        states.push((generation, live(&image)));
    }
    (base, log, states)
}

fn read(base: &[u8], log: &[u8]) -> Result<(Base, Log), Unusable> {
    let mut base = read_base(base)?;
    let log = read_log(log, &mut base);
    Ok((base, log))
}

#[test]
fn what_is_written_is_read() {
    let (base, log, states) = history();
    let (read, end) = read(&base, &log).unwrap();
    assert_eq!(
        (&read.damage, &read.lost[..], end),
        (&None, &[][..], Log::Whole(log.len()))
    );
    let (generation, want) = states.last().unwrap();
    assert_eq!(
        (read.image.commit.generation, live(&read.image)),
        (*generation, want.clone())
    );
    let restored = read.image.restored();
    assert_eq!((restored.good.len(), restored.refused.len()), (6, 1));
    assert!(restored.good.iter().any(|wire| *wire == zone("a", 4)));
}

#[test]
fn what_says_the_same_is_not_written_again() {
    let (base, _, _) = history();
    let mut image = read_base(&base).unwrap().image;
    let mut change = Change {
        commit: commit(1),
        ..Change::default()
    };
    for wire in [zone("a", 1), guard("g", 1), zone("b", 2)] {
        put_good(&mut change, wire);
    }
    change
        .puts
        .insert((key_of(&zone("x", 1)).unwrap(), Slot::Good), None);
    let new = image.take(change);
    let keys: Vec<String> = new.puts.keys().map(|(key, _)| key.to_string()).collect();
    assert_eq!(keys, ["Zone/b"]);
}

#[test]
fn a_log_that_breaks_off_anywhere_is_what_was_live_before() {
    let (base, log, states) = history();
    let head = log_head(7).unwrap().len();
    let mut seen = std::collections::BTreeSet::new();
    for end in head..=log.len() {
        let (read, found) = read(&base, &log[..end]).unwrap();
        assert!(
            matches!(found, Log::Whole(whole) if whole <= end),
            "{end}: {found:?}"
        );
        let now = (read.image.commit.generation, live(&read.image));
        assert!(states.contains(&now), "{end}: {now:?}");
        seen.insert(now.0);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4]);
}

#[test]
fn a_byte_that_flips_in_the_log_costs_what_came_after_it_and_no_more() {
    let (base, log, states) = history();
    let mut damaged = 0;
    for at in 0..log.len() {
        for bit in [0x01, 0x80] {
            let mut bad = log.clone();
            bad[at] ^= bit;
            let (read, found) = read(&base, &bad).unwrap();
            let now = (read.image.commit.generation, live(&read.image));
            assert!(states.contains(&now), "byte {at}: {now:?}");
            // In the last change it can't be told from one that was being written.
            assert!(now.0 < 4, "byte {at}");
            damaged += usize::from(matches!(found, Log::Damaged(_)));
        }
    }
    assert!(damaged > log.len(), "most of them are told: {damaged}");
}

#[test]
fn a_byte_that_flips_in_the_base_costs_one_resource_which_is_named() {
    let (base, log, states) = history();
    let (_, want) = states.last().unwrap();
    let mut lost_guard = false;
    for at in 0..base.len() {
        let mut bad = base.clone();
        bad[at] ^= 0x10;
        let (mut read, _) = read(&bad, &log).unwrap_or_else(|why| panic!("byte {at}: {why}"));
        assert!(read.damage.is_some(), "byte {at}");
        assert!(read.lost.len() <= 1, "byte {at}: {:?}", read.lost);
        for is in live(&read.image) {
            assert!(want.contains(&is), "byte {at}: {is:?} was not live");
        }
        assert_eq!(read.image.commit.generation, 4);
        let lost = std::mem::take(&mut read.lost);
        let missing = want.len() - live(&read.image).len();
        // What the log says anew is no loss.
        assert_eq!(lost.len(), missing, "byte {at}");
        if let Some(lost) = lost.iter().find(|lost| lost.guards.is_some()) {
            assert_eq!(lost.guards.as_ref().unwrap().services, ["cart"]);
            lost_guard = true;
        }
        read.image.lose(lost);
        // What was lost is known to the next start, too.
        let again = read_base(&read.image.base(9).unwrap()).unwrap();
        assert_eq!(live(&again.image), live(&read.image));
    }
    assert!(
        lost_guard,
        "what an AuthorizationPolicy guarded is known when it is lost"
    );
}

#[test]
fn a_base_that_is_cut_off_names_what_is_missing() {
    let (base, _, states) = history();
    let (_, want) = &states[0];
    let (mut usable, mut least) = (0, usize::MAX);
    for end in 0..base.len() {
        match read_base(&base[..end]) {
            Ok(read) => {
                usable += 1;
                assert!(read.damage.is_some(), "{end}");
                least = least.min(live(&read.image).len());
                assert_eq!(live(&read.image).len() + read.lost.len(), want.len(), "{end}");
            }
            Err(why) => assert_eq!(
                why,
                if end == 0 {
                    Unusable::Empty
                } else {
                    Unusable::NoHead
                },
                "{end}"
            ),
        }
    }
    assert!(usable > 0 && least == 0);
}

#[test]
fn files_that_do_not_belong_together_are_told_apart() {
    let (base, log, _) = history();
    let mut other = read_base(&base).unwrap();
    other.id = 8;
    assert_eq!(read_log(&log, &mut other), Log::Other);
    let mut read = read_base(&base).unwrap();
    assert!(matches!(read_log(&[], &mut read), Log::Damaged(_)));
    assert!(
        matches!(read_log(&base, &mut read), Log::Damaged(_)),
        "a base is no log"
    );
    assert!(
        matches!(read_base(&log), Err(Unusable::NoHead)),
        "a log is no base"
    );
    assert!(matches!(read_base(b"what is this"), Err(Unusable::NoHead)));
}

#[test]
fn what_an_older_build_does_not_know_is_passed_over() {
    let (base, log, _) = history();
    // A record of a kind of its own (field 15), and one with a field that is not known (field 99).
    let unknown = framed(&[0x7a, 0x02, b'h', b'i']).unwrap();
    let mut newer = encoded(Record::Good(zone("z", 9)));
    newer.extend([0x9a, 0x06, 0x01, b'x']);
    let mut more = log.clone();
    more.extend(&unknown);
    more.extend(framed(&newer).unwrap());
    let last = v1::StateCommit {
        records: 2,
        ..commit(9)
    };
    more.extend(framed(&encoded(Record::Commit(last))).unwrap());
    let (read, found) = read(&base, &more).unwrap();
    assert_eq!((found, read.image.commit.generation), (Log::Whole(more.len()), 9));
    assert!(live(&read.image).contains(&("Zone/z".to_owned(), 9)));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    /// Whatever happens to the files: no panic, and nothing is live that never was.
    #[test]
    fn nothing_is_made_up(edits in proptest::collection::vec((0_usize..4000, 0_u8..=255, 0_u8..3), 1..12)) {
        let (mut base, mut log, states) = history();
        for (at, byte, how) in edits {
            let file = if how == 0 { &mut log } else { &mut base };
            let at = at % file.len().max(1);
            match byte {
                0..8 => file.truncate(at),
                8..16 => { let copy = file[at..].to_vec(); file.extend(copy); }
                _ => if let Some(old) = file.get_mut(at) { *old ^= byte },
            }
        }
        if let Ok((read, _)) = read(&base, &log) {
            let known: Vec<_> = states.iter().flat_map(|(_, live)| live.clone()).collect();
            for is in live(&read.image) {
                proptest::prop_assert!(known.contains(&is), "{:?}", is);
            }
        }
    }
}
