use super::*;

const ADA: &str = "spiffe://leeward.test/user/ada";
const BOB: &str = "spiffe://leeward.test/user/bob";
const POLICY: &str = "---\napiVersion: leeward.dev/v1\nkind: DegradationPolicy\nmetadata: {name: shop}\nspec: {levels: [{name: normal}, {name: reduced}, {name: core-only}]}\n";

/// Policy and who holds what, driven from write to write.
struct World {
    known: Known,
    book: Book,
    now: SystemTime,
}

impl Book {
    /// Follows what was written.
    fn take(&mut self, writes: LevelWrites) {
        for (place, judged) in writes.judged {
            match judged {
                Some(judged) => self.judged.insert(place, judged),
                None => self.judged.remove(&place),
            };
        }
        for (name, hold) in writes.holds {
            match hold {
                Some(hold) => self.holds.insert(name, hold),
                None => self.holds.remove(&name),
            };
        }
    }
}

fn resource(yaml: &str) -> Arc<Resource> {
    let wire = leeward_proto::manifest::parse("test", yaml).unwrap();
    Arc::new(leeward_proto::parse(&wire[0]).unwrap())
}

fn lines(writes: &LevelWrites) -> Vec<String> {
    let name = |by: &str| by.rsplit('/').next().unwrap_or_default().to_owned();
    let line = |c: &LevelChange| {
        format!(
            "{} {}: {}-{} {} ({})",
            c.policy,
            c.zone,
            c.from,
            c.to,
            name(&c.by),
            c.why
        )
    };
    writes.changes.iter().map(line).collect()
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            known: Known::new(),
            book: Book::default(),
            now: UNIX_EPOCH + Duration::from_secs(1_795_557_600),
        };
        for zone in ["a", "b"] {
            world.put(&resource(&format!(
                "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {zone}}}\nspec: {{}}\n"
            )));
        }
        world.put(&resource(POLICY));
        world.put(&resource(&POLICY.replace("name: shop", "name: feed")));
        world
    }

    fn put(&mut self, resource: &Arc<Resource>) {
        let entry = Entry {
            revision: 1,
            resource: Some(Arc::clone(resource)),
        };
        self.known.insert(resource.key(), entry);
    }

    fn held(&self, policy: &str, level: &str, seconds: u64, zones: &str) -> Arc<Resource> {
        let end = prost_types::Timestamp::from(self.now + Duration::from_secs(seconds));
        resource(&format!(
            "apiVersion: leeward.dev/v1\nkind: DegradationOverride\nmetadata: {{name: o}}\nspec: {{policy: {policy}, level: {level}, expireTime: \"{end}\", reason: to {level}, zones: [{zones}]}}\n"
        ))
    }

    /// Applies an override under a name, and gives what the audit says of it.
    fn apply(&mut self, name: &str, held: &Arc<Resource>, who: &str) -> Vec<String> {
        let mut held = Resource::clone(held);
        held.name = Name::parse(name).unwrap();
        let writes = applied(&self.known, &self.book, &[&held], who, self.now);
        let lines = lines(&writes);
        self.book.take(writes);
        self.put(&Arc::new(held));
        lines
    }

    fn delete(&mut self, kind: Kind, name: &str, who: &str) -> Vec<String> {
        let name = Name::parse(name).unwrap();
        let key = Key { kind, name };
        let writes = deleted(&self.known, &self.book, &key, who, self.now);
        let lines = lines(&writes);
        self.book.take(writes);
        self.known.remove(&key);
        lines
    }

    fn expire(&mut self) -> Vec<LevelChange> {
        let writes = expired(&self.known, &self.book, self.now);
        let changes = writes.changes.clone();
        self.book.take(writes);
        changes
    }

    fn judge(&mut self, zone: &str, level: &str) {
        let place = Place {
            policy: "shop".into(),
            zone: zone.into(),
        };
        let judged = Judged {
            level: level.into(),
            since_ms: ms(self.now),
            by: by_trigger(1),
            why: "circuit of pay open".into(),
        };
        self.book.judged.insert(place, judged);
    }

    /// Every zone's level of the policy `shop`, as `level by`.
    fn levels(&self, believed: bool) -> Vec<InForce> {
        let mut zones = zones(&self.known);
        zones.insert("c".to_owned());
        let zones = zones.into_iter().map(|zone| (zone, believed)).collect();
        let rows = in_force(&self.known, &self.book, &BTreeMap::new(), &zones, self.now);
        rows.into_iter().filter(|row| row.policy == "shop").collect()
    }

    fn names(&self) -> Vec<String> {
        self.levels(true).into_iter().map(|row| row.level).collect()
    }
}

#[test]
fn an_override_is_written_down_when_it_is_applied_changed_and_deleted() {
    let mut world = World::new();
    let held = world.held("shop", "core-only", 60, "");
    assert_eq!(
        world.apply("shop", &held, ADA),
        ["shop : normal-core-only ada (to core-only)"]
    );
    assert_eq!(world.names(), ["core-only"; 3]);
    let held = world.held("shop", "reduced", 60, "");
    assert_eq!(
        world.apply("shop", &held, BOB),
        ["shop : core-only-reduced bob (to reduced)"]
    );
    let row = world.levels(true).remove(0);
    assert_eq!((row.by.as_str(), row.why.as_str()), (BOB, "to reduced"));
    assert_eq!(row.since_ms, Some(ms(world.now)));
    assert_eq!(row.until_ms, Some(ms(world.now) + 60_000));
    assert_eq!(
        world.delete(Kind::DegradationOverride, "shop", ADA),
        ["shop : reduced-normal ada (to reduced)"]
    );
    assert_eq!(world.names(), ["normal"; 3]);
    world.now += Duration::from_secs(100);
    assert!(!world.book.is_due(world.now) && world.expire().is_empty());
}

#[test]
fn an_override_of_some_zones_is_written_down_for_each_of_them() {
    let mut world = World::new();
    world.judge("a", "reduced");
    let held = world.held("shop", "core-only", 60, "b, a");
    let want = [
        "shop a: reduced-core-only ada (to core-only)",
        "shop b: normal-core-only ada (to core-only)",
    ];
    assert_eq!(world.apply("x", &held, ADA), want);
    assert_eq!(world.names(), ["core-only", "core-only", "normal"]);
    // One that holds less has no effect where another holds more, and says so.
    let held = world.held("shop", "reduced", 60, "");
    let want = [
        "shop a: core-only-core-only bob (to reduced)",
        "shop b: core-only-core-only bob (to reduced)",
    ];
    assert_eq!(world.apply("y", &held, BOB), want);
    let want = [
        "shop a: core-only-reduced ada (to core-only)",
        "shop b: core-only-reduced ada (to core-only)",
    ];
    assert_eq!(world.delete(Kind::DegradationOverride, "x", ADA), want);
    // What holds the normal level holds it against the triggers.
    let held = world.held("shop", "normal", 60, "");
    assert_eq!(
        world.apply("y", &held, BOB),
        ["shop : reduced-normal bob (to normal)"]
    );
    let want = [
        "shop a: normal-reduced bob (to normal)",
        "shop b: normal-normal bob (to normal)",
    ];
    assert_eq!(world.delete(Kind::DegradationOverride, "y", BOB), want);
}

#[test]
fn an_override_that_moves_to_another_policy_ends_in_the_first() {
    let mut world = World::new();
    let held = world.held("shop", "reduced", 60, "");
    world.apply("o", &held, ADA);
    let held = world.held("feed", "core-only", 60, "");
    let want = [
        "feed : normal-core-only bob (to core-only)",
        "shop : reduced-normal bob (to core-only)",
    ];
    assert_eq!(world.apply("o", &held, BOB), want);
}

#[test]
fn the_end_of_an_override_is_written_down_once_with_the_time_when_it_was() {
    let mut world = World::new();
    let first = world.held("shop", "reduced", 10, "");
    let second = world.held("shop", "core-only", 20, "");
    world.apply("first", &first, ADA);
    world.apply("second", &second, BOB);
    let begun = ms(world.now);
    world.now += Duration::from_millis(9_999);
    assert!(!world.book.is_due(world.now) && world.expire().is_empty());
    // As after a control plane that was down.
    world.now += Duration::from_secs(3600);
    assert!(world.book.is_due(world.now));
    let ended: Vec<_> = world
        .expire()
        .into_iter()
        .map(|c| (c.time_ms - begun, c.from, c.to, c.by, c.why))
        .collect();
    let line = |at, from: &str, to: &str, why: &str| {
        (
            at,
            from.to_owned(),
            to.to_owned(),
            EXPIRY.to_owned(),
            why.to_owned(),
        )
    };
    assert_eq!(
        ended,
        [
            line(10_000, "core-only", "core-only", "to reduced"),
            line(20_000, "core-only", "normal", "to core-only")
        ]
    );
    assert!(!world.book.is_due(world.now) && world.expire().is_empty());
    assert_eq!(world.names(), ["normal"; 3]);
    // Nothing is left to end by hand.
    assert!(world.delete(Kind::DegradationOverride, "first", ADA).is_empty());
}

#[test]
fn what_has_ended_unnoticed_is_written_down_before_what_is_done_about_it() {
    let mut world = World::new();
    let held = world.held("shop", "reduced", 1, "");
    world.apply("shop", &held, ADA);
    world.now += Duration::from_secs(2);
    let held = world.held("shop", "core-only", 60, "");
    let want = [
        "shop : reduced-normal expiry (to reduced)",
        "shop : normal-core-only bob (to core-only)",
    ];
    assert_eq!(world.apply("shop", &held, BOB), want);
    world.now += Duration::from_secs(59);
    assert!(
        !world.book.is_due(world.now),
        "it is the new one's end that counts"
    );
}

#[test]
fn what_triggers_ask_for_is_shown_where_they_are_believed() {
    let mut world = World::new();
    world.judge("a", "core-only");
    world.judge("", "reduced");
    assert_eq!(world.names(), ["core-only", "reduced", "reduced"]);
    let row = world.levels(true).remove(0);
    assert_eq!((row.by.as_str(), row.until_ms), ("trigger 1", None));
    let unbelieved: Vec<_> = world.levels(false).into_iter().map(|row| row.level).collect();
    assert_eq!(unbelieved, ["reduced"; 3], "the mesh's own is");
}

#[test]
fn a_policy_that_is_deleted_takes_its_levels_along() {
    let mut world = World::new();
    world.judge("a", "core-only");
    world.judge("", "reduced");
    let want = [
        "shop : reduced-normal ada (the policy was deleted)",
        "shop a: core-only-normal ada (the policy was deleted)",
    ];
    assert_eq!(world.delete(Kind::DegradationPolicy, "shop", ADA), want);
    assert!(world.book.judged.is_empty());
}
