//! Changes that go out in steps, as proxies and people see them.

#![allow(clippy::unwrap_used, reason = "tests")]

mod fleet;
mod support;

use fleet::{Fleet, Proxy};
use leeward_control::push::Timing;
use leeward_identity::{SpiffeId, channel};
use leeward_proto::v1;
use std::net::SocketAddr;
use support::{Site, apply, eventually, reference, service, yaml, zone};
use tonic::Code;
use tonic::transport::Channel;
use v1::rollout_service_client::RolloutServiceClient;

type Rollouts = RolloutServiceClient<Channel>;

fn rollouts(site: &Site, address: SocketAddr) -> Rollouts {
    let user = site.identity(&SpiffeId::user("leeward.test", "ada").unwrap());
    RolloutServiceClient::new(channel::connect_lazy(user, address))
}

/// The stages in flow style.
fn policy(name: &str, stages: &str) -> String {
    format!(
        "apiVersion: leeward.dev/v1\nkind: RolloutPolicy\nmetadata: {{name: {name}}}\nspec: {{stages: [{stages}], progressDeadline: 30s}}\n---\n"
    )
}

fn held() -> String {
    zone("a")
        + &zone("b")
        + &service("cart", 80)
        + &policy("default", "{proxies: 1, hold: 1h}, {zones: [a], hold: 1h}, {}")
}

async fn status(rollouts: &mut Rollouts) -> v1::Rollout {
    rollouts
        .get_rollout(v1::GetRolloutRequest {})
        .await
        .unwrap()
        .into_inner()
}

async fn steer(rollouts: &mut Rollouts, command: v1::RolloutCommand) -> Result<v1::Rollout, tonic::Status> {
    let request = v1::SteerRequest {
        command: command.into(),
        revision: 0,
    };
    Ok(rollouts.steer(request).await?.into_inner())
}

async fn progress(rollouts: &mut Rollouts, revision: u64) -> v1::Progress {
    let request = v1::GetProgressRequest { revision };
    rollouts.get_progress(request).await.unwrap().into_inner()
}

/// The proxies whose service cart is at a port.
fn at_port(fleet: &Fleet<'_>, port: u16) -> Vec<String> {
    let at = |proxy: &&Proxy| proxy.port("cart") == Some(port);
    fleet
        .proxies()
        .iter()
        .filter(at)
        .map(|proxy| proxy.name().to_owned())
        .collect()
}

#[tokio::test]
async fn a_change_goes_from_stage_to_stage_and_others_wait_or_pass() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let (mut api, mut people) = (site.api(control.address), rollouts(&site, control.address));
    // The policy isn't there before it is, so that this goes to all.
    let first = api.apply(apply(&held())).await.unwrap().into_inner();
    assert_eq!((first.revision, first.rollout.as_str()), (1, ""));
    let mut fleet = Fleet::new(&site, control.address);
    for (zone, name) in [
        ("a", "a1"),
        ("a", "a2"),
        ("a", "a3"),
        ("b", "b1"),
        ("b", "b2"),
        ("b", "b3"),
    ] {
        fleet.start(zone, name);
    }
    eventually("all have the first", async || at_port(&fleet, 80).len() == 6).await;

    let second = api.apply(apply(&service("cart", 81))).await.unwrap().into_inner();
    assert_eq!((second.revision, second.rollout.as_str()), (2, "default"));
    eventually("one has the second", async || at_port(&fleet, 81).len() == 1).await;
    eventually("it is seen", async || {
        let sight = status(&mut people).await.sight.unwrap();
        (sight.proxies, sight.members, sight.running) == (6, 1, 1)
    })
    .await;
    let chosen = at_port(&fleet, 81);
    let found = progress(&mut people, 2).await;
    assert_eq!((found.proxies, found.running, found.laggards.len()), (6, 1, 5));

    // Another change has to wait, and is told for what.
    let refused = api.apply(apply(&service("pay", 90))).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("revision 2"), "{refused}");
    // So has a delete; a dry run says so, too.
    let delete = v1::DeleteRequest {
        r#ref: Some(reference(v1::Kind::Service, "cart")),
        ..v1::DeleteRequest::default()
    };
    assert_eq!(
        api.delete(delete).await.unwrap_err().code(),
        Code::FailedPrecondition
    );

    // What somebody holds in an emergency goes to all at once.
    let circuit = "apiVersion: leeward.dev/v1\nkind: CircuitOverride\nmetadata: {name: stop}\nspec: {service: cart, mode: ForceOpen, expireTime: \"EXPIRE\", reason: fire}\n";
    let expire = time_ahead();
    let passes = api
        .apply(apply(&circuit.replace("EXPIRE", &expire)))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(passes.rollout, "");
    eventually("all have it", async || {
        fleet
            .proxies()
            .iter()
            .all(|proxy| proxy.has(v1::Kind::CircuitOverride, "stop"))
    })
    .await;
    assert_eq!(at_port(&fleet, 81), chosen, "and what is held back still is");
    eventually("it is seen that all run it", async || {
        progress(&mut people, 3).await.running == 6
    })
    .await;

    // So does a drain, and nothing else of the zone.
    let drained = zone("b").replace(
        "spec: {}",
        &format!(
            "spec: {{drain: {{expireTime: \"{expire}\", startTime: \"2026-01-01T00:00:00Z\", reason: x}}}}"
        ),
    );
    api.apply(apply(&drained)).await.unwrap();
    eventually("all have the drain", async || {
        fleet.proxies().iter().all(|proxy| proxy.is_drained("b"))
    })
    .await;

    // Whoever comes now, or comes back, gets what is stable.
    fleet.start("b", "b4");
    fleet.restart("a1");
    eventually("the new one has something", async || {
        at_port(&fleet, 80).contains(&"b4".to_owned())
    })
    .await;
    eventually("the old one is back", async || {
        fleet.proxies().iter().all(Proxy::is_connected)
    })
    .await;
    assert_eq!(at_port(&fleet, 81), chosen);
    assert!(
        fleet
            .proxies()
            .iter()
            .all(|proxy| proxy.has(v1::Kind::CircuitOverride, "stop"))
    );

    // On by hand, and to all.
    steer(&mut people, v1::RolloutCommand::Promote).await.unwrap();
    eventually("zone a has it", async || {
        let at = at_port(&fleet, 81);
        ["a1", "a2", "a3"]
            .iter()
            .all(|name| at.iter().any(|at| at == name))
            && at.len() <= 4
    })
    .await;
    steer(&mut people, v1::RolloutCommand::PromoteFull).await.unwrap();
    eventually("all have it", async || at_port(&fleet, 81).len() == 7).await;
    let over = status(&mut people).await;
    assert_eq!(over.phase(), v1::RolloutPhase::Promoted);
    let again = steer(&mut people, v1::RolloutCommand::Abort).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    eventually("it is seen that all run everything", async || {
        let found = progress(&mut people, 0).await;
        (found.proxies, found.running) == (7, 7)
    })
    .await;
    fleet.stop().await;
    control.stop().await;
}

/// An hour from now.
fn time_ahead() -> String {
    #[expect(clippy::disallowed_methods, reason = "overrides end at a time")]
    let ahead = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    prost_types::Timestamp::from(ahead).to_string()
}

#[tokio::test]
async fn what_makes_requests_fail_stops_at_one_proxy_and_goes_back_by_itself() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let (mut api, mut people) = (site.api(control.address), rollouts(&site, control.address));
    api.apply(apply(&held())).await.unwrap();
    let mut fleet = Fleet::new(&site, control.address);
    // Requests to port 81 fail.
    fleet.failing_port = Some(81);
    for i in 0..8 {
        fleet.start(if i % 2 == 0 { "a" } else { "b" }, &format!("p{i}"));
    }
    eventually("all have the first", async || at_port(&fleet, 80).len() == 8).await;
    api.apply(apply(&(service("cart", 81) + &service("new", 82))))
        .await
        .unwrap();
    eventually("it goes back", async || {
        status(&mut people).await.phase() == v1::RolloutPhase::RolledBack
    })
    .await;
    let over = status(&mut people).await;
    assert!(over.why.contains("fail with the change"), "{}", over.why);
    assert_eq!(over.rolled_back_by, 3);
    eventually("all are as before", async || at_port(&fleet, 80).len() == 8).await;
    assert_eq!(fleet.ever_failed().len(), 1, "users of no other proxy saw it");
    eventually("and what was new has gone", async || {
        fleet
            .proxies()
            .iter()
            .all(|proxy| !proxy.has(v1::Kind::Service, "new"))
    })
    .await;
    // The log tells of it.
    let request = v1::GetRevisionRequest { revision: 3 };
    let record = people.get_revision(request).await.unwrap().into_inner();
    assert_eq!((record.takes_back, record.changes.len()), (2, 2));
    // And the next change is free to go.
    fleet.failing_port = None;
    let next = api.apply(apply(&service("cart", 83))).await.unwrap().into_inner();
    assert_eq!((next.revision, next.rollout.as_str()), (4, "default"));
    fleet.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn what_a_proxy_refuses_spreads_no_further() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let (mut api, mut people) = (site.api(control.address), rollouts(&site, control.address));
    api.apply(apply(&held())).await.unwrap();
    let mut fleet = Fleet::new(&site, control.address);
    fleet.refused_port = Some(81);
    for i in 0..5 {
        fleet.start("a", &format!("p{i}"));
    }
    eventually("all have the first", async || at_port(&fleet, 80).len() == 5).await;
    api.apply(apply(&service("cart", 81))).await.unwrap();
    eventually("it goes back", async || {
        status(&mut people).await.phase() == v1::RolloutPhase::RolledBack
    })
    .await;
    let over = status(&mut people).await;
    assert!(
        over.why.contains("refused by p") && over.why.contains("Service/cart"),
        "{}",
        over.why
    );
    assert_eq!(fleet.ever_refused().len(), 1);
    fleet.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn a_control_plane_that_starts_again_goes_on_where_it_was() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&held())).await.unwrap();
    let mut fleet = Fleet::new(&site, control.address);
    for i in 0..6 {
        fleet.start("a", &format!("p{i}"));
    }
    eventually("all have the first", async || at_port(&fleet, 80).len() == 6).await;
    api.apply(apply(&service("cart", 81))).await.unwrap();
    eventually("one has the second", async || at_port(&fleet, 81).len() == 1).await;
    let chosen = at_port(&fleet, 81);
    drop(api);
    control.stop().await;

    let control = site.start("store", Timing::DEFAULT).await;
    fleet.move_to(control.address);
    let mut people = rollouts(&site, control.address);
    eventually("all are back", async || {
        let shown = status(&mut people).await;
        shown
            .sight
            .is_some_and(|sight| (sight.proxies, sight.members, sight.running) == (6, 1, 1))
    })
    .await;
    assert_eq!(at_port(&fleet, 81), chosen);
    steer(&mut people, v1::RolloutCommand::Abort).await.unwrap();
    eventually("all are as before", async || at_port(&fleet, 80).len() == 6).await;
    eventually("it is written down", async || {
        status(&mut people).await.phase() == v1::RolloutPhase::RolledBack
    })
    .await;
    fleet.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn another_change_takes_its_place_if_somebody_says_so() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let (mut api, mut people) = (site.api(control.address), rollouts(&site, control.address));
    api.apply(apply(&held())).await.unwrap();
    let mut fleet = Fleet::new(&site, control.address);
    for i in 0..4 {
        fleet.start("a", &format!("p{i}"));
    }
    eventually("all have the first", async || at_port(&fleet, 80).len() == 4).await;
    api.apply(apply(&(service("cart", 81) + &service("old", 1))))
        .await
        .unwrap();
    eventually("one has the second", async || at_port(&fleet, 81).len() == 1).await;
    let supersede = v1::ApplyRequest {
        supersede: true,
        ..apply(&service("cart", 82))
    };
    let third = api.apply(supersede).await.unwrap().into_inner();
    assert_eq!((third.revision, third.rollout.as_str()), (4, "default"));
    eventually("one has the third", async || {
        at_port(&fleet, 82).len() == 1 && at_port(&fleet, 80).len() == 3
    })
    .await;
    assert!(
        fleet
            .proxies()
            .iter()
            .all(|proxy| !proxy.has(v1::Kind::Service, "old"))
    );
    assert_eq!(status(&mut people).await.revision, 4);
    // At once, whatever the default is.
    steer(&mut people, v1::RolloutCommand::Abort).await.unwrap();
    eventually("it is over", async || {
        status(&mut people).await.phase() == v1::RolloutPhase::RolledBack
    })
    .await;
    let at_once = v1::ApplyRequest {
        at_once: true,
        ..apply(&service("cart", 83))
    };
    assert_eq!(api.apply(at_once).await.unwrap().into_inner().rollout, "");
    eventually("all have it", async || at_port(&fleet, 83).len() == 4).await;
    // By a policy that there isn't.
    let by = v1::ApplyRequest {
        rollout: "careful".into(),
        ..apply(&service("cart", 84))
    };
    assert_eq!(api.apply(by).await.unwrap_err().code(), Code::NotFound);
    fleet.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn everything_can_be_as_it_was_once() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let (mut api, mut people) = (site.api(control.address), rollouts(&site, control.address));
    api.apply(apply(&(zone("a") + &service("cart", 80) + &service("pay", 90))))
        .await
        .unwrap();
    api.apply(apply(&(service("cart", 81) + &service("new", 1))))
        .await
        .unwrap();
    let delete = v1::DeleteRequest {
        r#ref: Some(reference(v1::Kind::Service, "pay")),
        ..v1::DeleteRequest::default()
    };
    api.delete(delete).await.unwrap();

    let list = v1::ListRevisionsRequest::default();
    let listed = people.list_revisions(list).await.unwrap().into_inner().revisions;
    let shape = |revision: &v1::Revision| (revision.revision, revision.changes.len());
    assert_eq!(
        listed.iter().map(shape).collect::<Vec<_>>(),
        [(3, 1), (2, 2), (1, 3)]
    );
    assert!(
        listed
            .iter()
            .all(|revision| revision.by.ends_with("ada") && revision.time.is_some())
    );
    let of_pay = v1::ListRevisionsRequest {
        resource: Some(reference(v1::Kind::Service, "pay")),
        ..v1::ListRevisionsRequest::default()
    };
    let listed = people
        .list_revisions(of_pay)
        .await
        .unwrap()
        .into_inner()
        .revisions;
    assert_eq!(listed.iter().map(|r| r.revision).collect::<Vec<_>>(), [3, 1]);

    let back = |dry_run| v1::RollbackRequest {
        revision: 1,
        dry_run,
        ..v1::RollbackRequest::default()
    };
    let dry = people.rollback(back(true)).await.unwrap().into_inner();
    let names = |changes: &[v1::RevisionChange]| {
        let mut names: Vec<_> = changes
            .iter()
            .map(|change| (change.r#ref.clone().unwrap().name, change.kind()))
            .collect();
        names.sort();
        names
    };
    let want = [
        ("cart".to_owned(), v1::ChangeKind::Changed),
        ("new".to_owned(), v1::ChangeKind::Deleted),
        ("pay".to_owned(), v1::ChangeKind::Created),
    ];
    assert_eq!((names(&dry.changes).as_slice(), dry.revision), (&want[..], 4));
    let done = people.rollback(back(false)).await.unwrap().into_inner();
    assert_eq!((names(&done.changes).as_slice(), done.revision), (&want[..], 4));
    let all = api.list(v1::ListRequest::default()).await.unwrap().into_inner();
    let all: Vec<_> = all
        .resources
        .into_iter()
        .map(|r| (r.metadata.unwrap().name, r.spec))
        .collect();
    let wanted = yaml(&(zone("a") + &service("cart", 80) + &service("pay", 90)));
    let wanted: Vec<_> = wanted
        .into_iter()
        .map(|r| (r.metadata.unwrap().name, r.spec))
        .collect();
    assert_eq!(all, wanted);
    // Once more changes nothing.
    let again = people.rollback(back(false)).await.unwrap().into_inner();
    assert_eq!((again.changes.len(), again.revision), (0, 4));
    let never = v1::RollbackRequest {
        revision: 99,
        ..v1::RollbackRequest::default()
    };
    assert_eq!(people.rollback(never).await.unwrap_err().code(), Code::NotFound);
    control.stop().await;
}

#[tokio::test]
async fn control_planes_alone_ask_each_other() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let ask = |id: &SpiffeId| {
        let channel = channel::connect_lazy(site.identity(id), control.address);
        v1::peer_service_client::PeerServiceClient::new(channel)
    };
    let request = v1::GetStandingRequest::default();
    for id in [
        SpiffeId::user("leeward.test", "ada").unwrap(),
        Site::proxy_id("p1"),
    ] {
        let refused = ask(&id).get_standing(request.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        let refused = ask(&id)
            .list_own_proxies(v1::ListOwnProxiesRequest {})
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
    }
    ask(&Site::control_id()).get_standing(request).await.unwrap();
    // And a proxy has no business with rollouts.
    let channel = channel::connect_lazy(site.identity(&Site::proxy_id("p1")), control.address);
    let refused = steer(&mut RolloutServiceClient::new(channel), v1::RolloutCommand::Abort)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    control.stop().await;
}
