use super::*;
use crate::apply::Batch;
use crate::live::Live;
use leeward_policy::model::{Plugin, PluginFrom};
use leeward_policy::{Kind, Name};
use std::path::PathBuf;
use std::sync::Mutex;

/// Notes what it is asked to make ready; refuses what is called bad, and never ends with what is called slow.
#[derive(Default)]
struct Noting(Mutex<Vec<String>>);

impl Warm for Noting {
    async fn warm(&self, _: &Name, plugin: &Plugin) -> Result<(), String> {
        let PluginFrom::File(file) = &plugin.source.from else {
            return Err("want a file".to_owned());
        };
        self.0.lock().unwrap().push(file.to_string());
        if file.contains("slow") {
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        if file.contains("bad") {
            return Err("it is bad".to_owned());
        }
        Ok(())
    }

    fn retain(&self, _: &[&str]) {}
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("leeward-keep-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        Self(dir)
    }

    fn open(&self) -> StateDir {
        StateDir::open(self.0.clone(), &viewer()).unwrap()
    }

    /// A process that starts with what is there.
    async fn start(&self) -> Process {
        self.start_as("1").await
    }

    async fn start_as(&self, version: &str) -> Process {
        let live = Live::new(viewer());
        let warm = Arc::new(Noting::default());
        let mut state = State::new(viewer(), Arc::clone(&warm), live.clone());
        let dir = self.open();
        state.keep_in(dir.clone(), version.to_owned(), now()).await;
        Process {
            state,
            live,
            dir,
            warm,
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Process {
    state: State<Noting>,
    live: Live,
    dir: StateDir,
    warm: Arc<Noting>,
}

impl Process {
    async fn push(&mut self, text: &str, generation: u64) {
        self.apply(text, generation, |_| {}).await;
    }

    async fn apply(&mut self, text: &str, generation: u64, change: impl FnOnce(&mut v1::Update)) {
        let mut upserts = leeward_proto::manifest::parse("test", text).unwrap();
        for resource in &mut upserts {
            resource.metadata.as_mut().unwrap().revision = generation;
        }
        let mut update = v1::Update {
            upserts,
            generation,
            store_id: "s".into(),
            complete: true,
            ..v1::Update::default()
        };
        change(&mut update);
        let batch = Batch::default().add(update).unwrap().unwrap();
        self.state.apply(batch, now()).await;
        self.dir.write().unwrap();
    }

    fn resources(&self) -> Vec<(String, u64)> {
        let resources = self.state.world.resources();
        resources.map(|r| (r.key().to_string(), r.revision)).collect()
    }

    fn quarantined(&self) -> Vec<(String, u64, Option<u64>)> {
        let quarantined = self.state.world.quarantined().iter();
        quarantined
            .map(|(key, q)| (key.to_string(), q.revision, q.running))
            .collect()
    }
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn viewer() -> Viewer {
    Viewer {
        zone: name("a"),
        proxy: name("a1"),
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn zone(name: &str) -> String {
    format!("---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}}}\nspec: {{}}\n")
}

fn service(name: &str, zone: &str) -> String {
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{endpoints: [{{address: \"127.0.0.1:80\", zone: {zone}}}]}}\n"
    )
}

fn plugin(file: &str) -> String {
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: p}}\nspec: {{kind: Fallback, source: {{file: {file}}}, onFault: Fail}}\n"
    )
}

fn guard(service: &str) -> String {
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {{name: g}}\nspec: {{services: [{service}], action: Allow}}\n"
    )
}

fn deletes(kind: v1::Kind, name: &str) -> impl FnOnce(&mut v1::Update) {
    let wire = v1::ResourceRef {
        kind: kind.into(),
        name: name.to_owned(),
    };
    move |update| update.deletes.push(wire)
}

#[tokio::test]
async fn what_was_live_is_live_again_and_nothing_more() {
    let scratch = Scratch::new("again");
    let mut first = scratch.start().await;
    assert_eq!(first.live.status().source, PolicySource::Nowhere);
    first
        .push(&(zone("a") + &zone("b") + &service("cart", "a")), 1)
        .await;
    // A version that names nothing is refused, and a delete leaves a reference that names nothing any more.
    first.push(&service("cart", "nowhere"), 2).await;
    first.push(&(service("till", "b")), 3).await;
    first.apply("", 4, deletes(v1::Kind::Zone, "b")).await;
    let (resources, quarantined) = (first.resources(), first.quarantined());
    assert_eq!(quarantined.len(), 2, "{quarantined:?}");
    drop(first);
    let mut second = scratch.start().await;
    assert_eq!(
        (second.resources(), second.quarantined()),
        (resources, quarantined)
    );
    let status = second.live.status();
    assert_eq!(
        (status.generation, status.store_id.as_str(), status.source),
        (Some(4), "s", PolicySource::Disk)
    );
    assert_eq!(second.live.snapshot().load().generation, 4);
    assert_eq!(second.state.has(), ("s".to_owned(), 4));
    assert!(
        !second.state.asks_again(),
        "a control plane has nothing to say again"
    );
    // What was refused goes live by itself when what it names is there.
    second.push(&zone("nowhere"), 5).await;
    assert!(second.resources().contains(&("Service/cart".to_owned(), 2)));
    assert_eq!(second.live.status().source, PolicySource::Control);
    let (resources, quarantined) = (second.resources(), second.quarantined());
    drop(second);
    let third = scratch.start().await;
    assert_eq!((third.resources(), third.quarantined()), (resources, quarantined));
}

#[tokio::test(start_paused = true)]
async fn the_version_of_a_plugin_that_ran_is_ready_before_a_newer_one_is_tried() {
    let scratch = Scratch::new("plugins");
    let mut first = scratch.start().await;
    first.push(&plugin("/slow-1"), 1).await;
    first.state.settle().await;
    first.push(&plugin("/bad-2"), 2).await;
    assert_eq!(first.quarantined(), [("Plugin/p".to_owned(), 2, Some(1))]);
    drop(first);
    let mut second = scratch.start().await;
    assert_eq!(second.resources(), [("Plugin/p".to_owned(), 1)]);
    assert_eq!(*second.warm.0.lock().unwrap(), ["/slow-1"]);
    second.state.settle().await;
    second.state.settle().await;
    assert_eq!(*second.warm.0.lock().unwrap(), ["/slow-1", "/bad-2"]);
    assert_eq!(second.resources(), [("Plugin/p".to_owned(), 1)]);
    assert_eq!(second.quarantined(), [("Plugin/p".to_owned(), 2, Some(1))]);
}

#[tokio::test]
async fn a_guard_that_is_lost_leaves_nothing_open_and_is_asked_for() {
    let scratch = Scratch::new("guard");
    let key = Key {
        kind: Kind::AuthorizationPolicy,
        name: name("g"),
    };
    let mut first = scratch.start().await;
    first
        .push(&(zone("a") + &service("cart", "a") + &guard("cart")), 1)
        .await;
    drop(first);
    let file = scratch.0.join("policy");
    let good = std::fs::read(&file).unwrap();
    let (mut lost, mut tries) = (0, 0);
    for at in (0..good.len()).step_by(17) {
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        std::fs::write(&file, &bad).unwrap();
        let mut process = scratch.start().await;
        assert_eq!(process.live.status().generation, Some(1), "byte {at}");
        if process.state.world.get(&key).is_none() {
            lost += 1;
            assert!(
                process.state.world.closed(&key).is_some(),
                "byte {at}: it is open"
            );
        }
        if !process.quarantined().is_empty() {
            tries += 1;
            assert_eq!(
                process.state.has().1,
                1,
                "what was deleted meanwhile is asked for first"
            );
            assert!(process.state.asks_again());
            assert_eq!(process.state.has(), (String::new(), 0), "and then everything");
        }
        // It is the same for the next one, which finds files that are whole.
        process.dir.write().unwrap();
        let quarantined = process.quarantined();
        drop(process);
        let mut again = scratch.start().await;
        assert_eq!(again.quarantined(), quarantined, "byte {at}");
        assert_eq!(again.dir.report().corrupt.len(), 0, "byte {at}");
        // Everything is there again once it was said.
        let all = zone("a") + &service("cart", "a") + &guard("cart");
        again.apply(&all, 1, |update| update.full = true).await;
        assert!(again.quarantined().is_empty() && !again.state.asks_again());
    }
    assert!(lost > 0 && tries > lost, "{lost} {tries}");
}

#[tokio::test]
async fn another_build_asks_for_what_it_could_not_have_kept() {
    let scratch = Scratch::new("build");
    let mut first = scratch.start_as("1").await;
    first.push(&zone("a"), 1).await;
    drop(first);
    let mut second = scratch.start_as("2").await;
    assert_eq!(second.resources().len(), 1);
    assert_eq!(second.state.has(), ("s".to_owned(), 1));
    assert!(second.state.asks_again());
    assert_eq!(second.state.has(), (String::new(), 0));
}

#[tokio::test]
async fn an_empty_answer_deletes_nothing_and_another_store_s_makes_orphans() {
    let scratch = Scratch::new("orphans");
    let mut first = scratch.start().await;
    first.push(&(zone("a") + &zone("b")), 1).await;
    drop(first);
    let mut second = scratch.start().await;
    second.push("", 1).await;
    assert_eq!((second.resources().len(), second.state.ack().orphans), (2, 0));
    second
        .apply("", 9, |update| {
            update.full = true;
            update.store_id = "restored".into();
        })
        .await;
    assert_eq!((second.resources().len(), second.state.ack().orphans), (2, 2));
    drop(second);
    // They are orphans still, and go by name.
    let mut third = scratch.start().await;
    assert_eq!((third.resources().len(), third.state.ack().orphans), (2, 2));
    assert_eq!(third.state.has(), ("restored".to_owned(), 9));
    third
        .apply("", 10, |update| {
            update.store_id = "restored".into();
            deletes(v1::Kind::Zone, "b")(update);
        })
        .await;
    assert_eq!((third.resources().len(), third.state.ack().orphans), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn nothing_expires_while_no_control_plane_answers() {
    let scratch = Scratch::new("years");
    let mut first = scratch.start().await;
    first
        .push(&(zone("a") + &service("cart", "a") + &guard("cart")), 1)
        .await;
    drop(first);
    let mut second = scratch.start().await;
    let (resources, age) = (second.resources(), second.live.status().heard.unwrap());
    let years = Duration::from_secs(10 * 365 * 24 * 3600);
    second.state.settle_until(tokio::time::sleep(years)).await;
    let status = second.live.status();
    assert_eq!(
        (second.resources(), status.generation, status.quarantined),
        (resources, Some(1), Vec::new())
    );
    assert_eq!(second.live.snapshot().load().services().len(), 1);
    assert!(age.age(now()) >= years && status.waits_for.is_empty());
}

#[test]
fn the_age_of_policy_is_told_whatever_the_time_of_day_does() {
    let at = tokio::time::Instant::now().into_std();
    let contact = Contact::ago(at, Duration::from_secs(90));
    assert_eq!(
        contact.age(at + Duration::from_secs(10)),
        Duration::from_secs(100)
    );
    assert_eq!(Contact::now(at).age(at), Duration::ZERO);
}

#[tokio::test]
async fn policy_from_tomorrow_is_new_and_not_refused() {
    let scratch = Scratch::new("tomorrow");
    let mut first = scratch.start().await;
    first.push(&zone("a"), 1).await;
    // The time of day went back by a day after this was written.
    first.dir.heard(wall_ms() + 24 * 3600 * 1000);
    first.dir.write().unwrap();
    drop(first);
    let second = scratch.start().await;
    let status = second.live.status();
    assert_eq!((status.generation, status.source), (Some(1), PolicySource::Disk));
    assert!(status.heard.unwrap().age(now()) < Duration::from_secs(60));
}

#[tokio::test]
async fn each_proxy_has_a_directory_of_its_own() {
    let scratch = Scratch::new("other");
    let mut first = scratch.start().await;
    first.push(&zone("a"), 1).await;
    drop(first);
    let other = Viewer {
        proxy: name("a2"),
        ..viewer()
    };
    let error = StateDir::open(scratch.0.clone(), &other).unwrap_err();
    assert!(error.to_string().contains("proxy a1 in zone a"), "{error}");
    assert_eq!(scratch.start().await.resources().len(), 1, "it is left as it is");
}
