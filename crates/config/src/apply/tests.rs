use super::*;
use leeward_policy::Kind;
use leeward_policy::model::PluginFrom;
use std::time::Duration;

/// Refuses plugins whose file says so, and takes its time with those whose file says that.
struct Picky;

/// Longer than policy waits.
const LONG: Duration = Duration::from_secs(20);

impl Warm for Picky {
    async fn warm(&self, _: &Name, plugin: &Plugin) -> Result<(), String> {
        let says = |word| matches!(&plugin.source.from, PluginFrom::File(file) if file.contains(word));
        if says("slow") {
            let long = if says("within-15s") { LONG / 2 } else { LONG };
            tokio::time::sleep(long).await;
        }
        if says("bad") {
            Err("spec.source.file: not a component".to_owned())
        } else {
            Ok(())
        }
    }

    fn retain(&self, _: &[&str]) {}
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn state() -> State<Picky> {
    let viewer = Viewer {
        zone: name("a"),
        proxy: name("a1"),
    };
    State::new(viewer.clone(), Arc::new(Picky), Live::new(viewer))
}

fn resources(yaml: &str, revision: u64) -> Vec<v1::Resource> {
    let mut resources = leeward_proto::manifest::parse("test", yaml).unwrap();
    for resource in &mut resources {
        resource.metadata.as_mut().unwrap().revision = revision;
    }
    resources
}

fn plugin(file: &str, revision: u64) -> Vec<v1::Resource> {
    resources(
        &format!(
            "apiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: p}}\nspec: {{kind: Fallback, source: {{file: {file}}}, onFault: Fail}}"
        ),
        revision,
    )
}

fn zone(zone: &str, revision: u64) -> Vec<v1::Resource> {
    resources(
        &format!("apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {zone}}}\nspec: {{}}"),
        revision,
    )
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn apply(state: &mut State<Picky>, update: v1::Update) {
    let whole = v1::Update {
        complete: true,
        ..update
    };
    let batch = Batch::default().add(whole).unwrap().unwrap();
    state.apply(batch, now()).await;
}

async fn push(state: &mut State<Picky>, upserts: Vec<v1::Resource>, generation: u64) {
    let update = v1::Update {
        upserts,
        generation,
        store_id: "s".into(),
        ..v1::Update::default()
    };
    apply(state, update).await;
}

fn zone_key(text: &str) -> Key {
    Key {
        kind: Kind::Zone,
        name: name(text),
    }
}

#[test]
fn a_batch_is_whole_when_the_complete_update_is_in() {
    let part = |zone_name: &str, complete| v1::Update {
        upserts: zone(zone_name, 1),
        complete,
        generation: 7,
        ..v1::Update::default()
    };
    let mut pending = Batch::default();
    assert!(pending.add(part("a", false)).unwrap().is_none());
    let whole = pending.add(part("b", true)).unwrap().unwrap();
    assert_eq!((whole.upserts.len(), whole.generation), (2, 7));
    assert!(pending.is_empty(), "the next begins empty");
    // A full push stands for itself: what was half in before it is in it as well, if it still is.
    assert!(pending.add(part("a", false)).unwrap().is_none());
    let full = v1::Update {
        full: true,
        ..part("c", true)
    };
    assert_eq!(pending.add(full).unwrap().unwrap().upserts.len(), 1);
}

#[tokio::test]
async fn a_plugin_that_cannot_be_made_ready_is_refused_alone() {
    let mut state = state();
    push(&mut state, plugin("/good", 1), 1).await;
    let mut both = plugin("/bad", 2);
    both.extend(zone("b", 2));
    push(&mut state, both, 2).await;
    let ack = state.ack();
    assert_eq!(ack.generation, 2);
    let [refused] = ack.quarantined.as_slice() else {
        panic!("{ack:?}")
    };
    assert_eq!((refused.revision, refused.running_revision), (2, 1));
    assert_eq!(refused.reason, "spec.source.file: not a component");
    assert!(
        state
            .world
            .get(&Key {
                kind: Kind::Zone,
                name: name("b")
            })
            .is_some(),
        "the rest is live"
    );
    push(&mut state, plugin("/good2", 3), 3).await;
    assert!(state.ack().quarantined.is_empty());
}

fn running(state: &State<Picky>) -> Option<u64> {
    let key = Key {
        kind: Kind::Plugin,
        name: name("p"),
    };
    state.world.get(&key).map(|resource| resource.revision)
}

#[tokio::test(start_paused = true)]
async fn a_plugin_that_takes_long_holds_up_nothing() {
    let (mut state, began) = (state(), tokio::time::Instant::now());
    let mut both = plugin("/slow", 1);
    both.extend(zone("b", 1));
    push(&mut state, both, 1).await;
    assert_eq!(began.elapsed(), PATIENCE);
    assert!(state.world.get(&zone_key("b")).is_some());
    assert_eq!(running(&state), Some(1), "what names it is live, too");
    assert!(state.ack().quarantined.is_empty());
    state.settle().await;
    assert_eq!((began.elapsed(), state.is_warming()), (LONG, false));
    assert_eq!(running(&state), Some(1));
}

/// A route with a filter, and the filter.
fn filtered(file: &str, on_fault: &str) -> Vec<v1::Resource> {
    resources(
        &format!(
            "apiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: p}}\nspec: {{kind: Filter, source: {{file: {file}}}, onFault: {on_fault}}}\n---\n\
             apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{endpoints: []}}\n---\n\
             apiVersion: leeward.dev/v1\nkind: Route\nmetadata: {{name: r}}\nspec: {{hostnames: [r.example], rules: [{{backendRefs: [{{service: s}}], filters: [{{plugin: p}}]}}]}}"
        ),
        1,
    )
}

#[tokio::test(start_paused = true)]
async fn the_first_policy_waits_for_plugins_without_which_requests_are_refused() {
    let waits = |state: &State<Picky>| state.live.status().waits_for;
    let mut closed = state();
    push(&mut closed, filtered("/slow", "FailClosed"), 1).await;
    assert_eq!(waits(&closed), [name("p")]);
    // For 15 s at most, though this one takes longer.
    let began = tokio::time::Instant::now();
    closed.settle().await;
    assert_eq!((began.elapsed(), waits(&closed)), (START, vec![]));
    assert!(closed.is_warming(), "it is still on its way");
    closed.settle().await;
    assert!(!closed.is_warming());

    let mut open = state();
    push(&mut open, filtered("/slow", "FailOpen"), 1).await;
    assert_eq!(waits(&open), [], "requests pass without it");
    let mut ready = state();
    push(&mut ready, filtered("/good", "FailClosed"), 1).await;
    assert_eq!(waits(&ready), []);
    // Later policy is for a proxy that serves already.
    push(&mut ready, filtered("/slow", "FailClosed"), 2).await;
    assert_eq!(waits(&ready), []);
    let mut unused = state();
    let mut policy = filtered("/slow", "FailClosed");
    policy.truncate(1);
    push(&mut unused, policy, 1).await;
    assert_eq!(waits(&unused), [], "no rule names it");
}

#[tokio::test(start_paused = true)]
async fn a_plugin_that_fails_is_waited_for_no_longer() {
    let mut state = state();
    push(&mut state, filtered("/slow-and-bad-within-15s", "FailClosed"), 1).await;
    assert_eq!(state.live.status().waits_for, [name("p")]);
    state.settle().await;
    assert_eq!(state.live.status().waits_for, []);
    assert_eq!(state.ack().quarantined.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_later_revision_is_live_when_it_is_ready() {
    let mut state = state();
    push(&mut state, plugin("/good", 1), 1).await;
    push(&mut state, plugin("/slow", 2), 2).await;
    assert_eq!((running(&state), state.generation), (Some(1), 2));
    let sequence = state.live.snapshot().load().sequence;
    state.settle().await;
    assert_eq!(running(&state), Some(2));
    assert!(
        state.live.snapshot().load().sequence > sequence,
        "it is published"
    );

    push(&mut state, plugin("/slow-bad", 3), 3).await;
    assert!(state.ack().quarantined.is_empty(), "nobody knows yet");
    state.settle().await;
    let ack = state.ack();
    let [refused] = ack.quarantined.as_slice() else {
        panic!("{ack:?}")
    };
    assert_eq!((refused.revision, refused.running_revision), (3, 2));
    assert_eq!(
        state.live.status().quarantined.len(),
        1,
        "it is said on the node, too"
    );
}

#[tokio::test(start_paused = true)]
async fn a_first_revision_that_proves_bad_later_is_named_and_stays() {
    let mut state = state();
    push(&mut state, plugin("/slow-bad", 1), 1).await;
    state.settle().await;
    push(&mut state, zone("b", 2), 2).await;
    let ack = state.ack();
    let [refused] = ack.quarantined.as_slice() else {
        panic!("{ack:?}")
    };
    assert_eq!((refused.revision, refused.running_revision), (1, 0));
    assert_eq!(
        running(&state),
        Some(1),
        "its onFault decides, not the lack of it"
    );
}

#[tokio::test(start_paused = true)]
async fn the_newest_revision_counts_whichever_is_ready_first() {
    let mut state = state();
    push(&mut state, plugin("/slow-bad", 1), 1).await;
    push(&mut state, plugin("/good", 2), 2).await;
    assert_eq!((running(&state), state.is_warming()), (Some(2), false));
    push(&mut state, plugin("/slow", 3), 3).await;
    let tombstone = v1::ResourceRef {
        kind: v1::Kind::Plugin.into(),
        name: "p".into(),
    };
    let delete = v1::Update {
        deletes: vec![tombstone],
        generation: 4,
        ..v1::Update::default()
    };
    apply(&mut state, delete).await;
    assert_eq!((running(&state), state.is_warming()), (None, false));
    let nothing = tokio::time::timeout(2 * LONG, state.settle()).await;
    assert!(nothing.is_err(), "what is deleted doesn't come back");
}

#[tokio::test]
async fn what_cannot_be_parsed_is_refused_alone() {
    let mut state = state();
    let mut bad = zone("a", 1);
    bad.extend(zone("b", 1));
    if let Some(v1::resource::Spec::Zone(zone)) = &mut bad[0].spec {
        zone.failover.push("NOT A NAME".into());
    }
    push(&mut state, bad, 1).await;
    let [refused] = &state.ack().quarantined[..] else {
        panic!()
    };
    assert!(
        refused.reason.starts_with("spec.failover[0]: "),
        "{}",
        refused.reason
    );
    assert_eq!(refused.running_revision, 0);
    assert!(
        state
            .world
            .get(&Key {
                kind: Kind::Zone,
                name: name("b")
            })
            .is_some()
    );
}

#[tokio::test]
async fn a_full_push_deletes_nothing_that_it_does_not_name() {
    let mut state = state();
    push(&mut state, zone("a", 1), 1).await;
    push(&mut state, zone("b", 2), 2).await;
    let full = v1::Update {
        full: true,
        upserts: zone("b", 1),
        store_id: "another".into(),
        generation: 1,
        ..v1::Update::default()
    };
    apply(&mut state, full).await;
    assert!(state.world.get(&zone_key("a")).is_some());
    assert_eq!(state.ack().orphans, 1);
    let tombstone = v1::ResourceRef {
        kind: v1::Kind::Zone.into(),
        name: "a".into(),
    };
    let delete = v1::Update {
        deletes: vec![tombstone],
        ..v1::Update::default()
    };
    apply(&mut state, delete).await;
    assert!(state.world.get(&zone_key("a")).is_none());
    assert_eq!(state.ack().orphans, 0, "what is named is no orphan");
}

#[tokio::test]
async fn an_empty_update_changes_nothing_and_is_still_acknowledged() {
    let mut state = state();
    push(&mut state, zone("a", 1), 1).await;
    let before = state.live.snapshot().load_full();
    push(&mut state, vec![], 1).await;
    let after = state.live.snapshot().load_full();
    assert!(Arc::ptr_eq(&before, &after), "nothing is published anew");
    assert!(state.world.get(&zone_key("a")).is_some());
    assert_eq!(state.ack().generation, 1);
    push(&mut state, vec![], 2).await;
    assert_eq!(
        (state.ack().generation, state.live.status().generation),
        (2, Some(2))
    );
}

#[tokio::test]
async fn a_first_update_without_a_resource_makes_a_proxy_ready() {
    let mut state = state();
    push(&mut state, vec![], 0).await;
    assert_eq!(state.live.status().generation, Some(0));
}

#[tokio::test]
async fn a_refusal_of_what_no_store_has_is_dropped_with_a_full_push() {
    let mut state = state();
    push(&mut state, plugin("/bad", 1), 1).await;
    assert_eq!(state.ack().quarantined.len(), 1);
    let full = v1::Update {
        full: true,
        upserts: zone("b", 1),
        ..v1::Update::default()
    };
    apply(&mut state, full).await;
    assert!(state.ack().quarantined.is_empty());
    assert_eq!(state.ack().orphans, 0);
}

/// A service, and an AuthorizationPolicy of which this proxy doesn't know the action.
fn guarded(revision: u64) -> Vec<v1::Resource> {
    let yaml = "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {name: pay}\nspec: {endpoints: [{address: \"127.0.0.1:1\", zone: a}]}\n---\napiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {name: g}\nspec: {services: [pay], action: Allow}\n";
    let mut resources = resources(yaml, revision);
    if let Some(v1::resource::Spec::AuthorizationPolicy(policy)) = &mut resources[1].spec {
        policy.action = 99;
    }
    resources
}

#[tokio::test]
async fn an_authorization_policy_that_was_never_read_lets_nobody_pass() {
    let mut state = state();
    push(&mut state, zone("a", 1), 1).await;
    push(&mut state, guarded(2), 2).await;
    let [refused] = &state.ack().quarantined[..] else {
        panic!()
    };
    assert_eq!(refused.running_revision, 0);
    let by = |state: &State<Picky>| {
        let snapshot = state.live.snapshot().load_full();
        let view = snapshot.services()[0].authorization.clone()?;
        view.closed_by().cloned()
    };
    assert_eq!(by(&state).as_deref(), Some("g"));
    let mut good = guarded(3);
    if let Some(v1::resource::Spec::AuthorizationPolicy(policy)) = &mut good[1].spec {
        policy.action = v1::AuthorizationAction::Allow.into();
    }
    push(&mut state, good, 3).await;
    assert_eq!(by(&state), None);
    push(&mut state, guarded(4), 4).await;
    assert_eq!(by(&state), None, "the last good version stays");
    assert_eq!(state.ack().quarantined[0].running_revision, 3);
}

/// Whoever reads a snapshot last has not the work of dropping it.
#[tokio::test(start_paused = true)]
async fn an_old_snapshot_is_kept_until_nobody_reads_it() {
    let mut state = state();
    let update = |zone_name: &str, generation| v1::Update {
        upserts: zone(zone_name, generation),
        generation,
        ..v1::Update::default()
    };
    apply(&mut state, update("a", 1)).await;
    let read = state.live.snapshot().load_full();
    let seen = Arc::downgrade(&read);
    apply(&mut state, update("b", 2)).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(Arc::strong_count(&read), 2, "the reader's and another");
    drop(read);
    assert_eq!(seen.strong_count(), 1, "the reader has not dropped it");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(seen.strong_count(), 0);
}
