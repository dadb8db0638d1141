//! Several control planes on one etcd: proxies are connected to any of them, and a rollout is one.

#![allow(clippy::unwrap_used, reason = "tests")]

mod fleet;
mod support;

use fleet::Fleet;
use leeward_control::kv::{EtcdSettings, Kv};
use leeward_identity::{SpiffeId, channel};
use leeward_proto::v1;
use leeward_testkit::{EtcdCluster, EtcdVersion};
use support::{Control, Site, apply, eventually, service, zone};
use tonic::transport::Channel;
use v1::rollout_service_client::RolloutServiceClient;

fn rollouts(site: &Site, control: &Control) -> RolloutServiceClient<Channel> {
    let user = site.identity(&SpiffeId::user("leeward.test", "ada").unwrap());
    RolloutServiceClient::new(channel::connect_lazy(user, control.address))
}

fn at_port(fleets: &[&Fleet<'_>], port: u16) -> usize {
    let proxies = fleets.iter().flat_map(|fleet| fleet.proxies());
    proxies.filter(|proxy| proxy.port("cart") == Some(port)).count()
}

async fn status(rollouts: &mut RolloutServiceClient<Channel>) -> v1::Rollout {
    let request = v1::GetRolloutRequest {};
    rollouts.get_rollout(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_is_one_whichever_control_plane_proxies_are_connected_to() {
    let site = Site::new();
    let Some(etcd) = EtcdCluster::start(EtcdVersion::V3_4, 1).await.unwrap() else {
        return;
    };
    let kv = || {
        Kv::etcd(EtcdSettings {
            endpoints: etcd.endpoints(),
            prefix: "/test/".into(),
            ..EtcdSettings::default()
        })
        .unwrap()
    };
    let (one, two) = (site.start_on(kv()).await, site.start_on(kv()).await);
    let policy = "apiVersion: leeward.dev/v1\nkind: RolloutPolicy\nmetadata: {name: default}\nspec: {stages: [{proxies: 1, hold: 1h}, {}]}\n---\n";
    let first = zone("a") + &service("cart", 80) + policy;
    site.api(one.address).apply(apply(&first)).await.unwrap();
    let (mut here, mut there) = (Fleet::new(&site, one.address), Fleet::new(&site, two.address));
    // What is bad is bad wherever it is.
    (here.failing_port, there.failing_port) = (Some(82), Some(82));
    for i in 0..3 {
        here.start("a", &format!("h{i}"));
        there.start("a", &format!("t{i}"));
    }
    eventually("all have the first", async || at_port(&[&here, &there], 80) == 6).await;

    site.api(two.address)
        .apply(apply(&service("cart", 81)))
        .await
        .unwrap();
    let (mut people_one, mut people_two) = (rollouts(&site, &one), rollouts(&site, &two));
    for people in [&mut people_one, &mut people_two] {
        eventually("both see the same", async || {
            let sight = status(people).await.sight.unwrap_or_default();
            (sight.proxies, sight.members, sight.running) == (6, 1, 1) && sight.missing.is_empty()
        })
        .await;
    }
    assert_eq!(at_port(&[&here, &there], 81), 1);
    let progress = v1::GetProgressRequest { revision: 2 };
    let found = people_one.get_progress(progress).await.unwrap().into_inner();
    assert_eq!((found.proxies, found.running, found.laggards.len()), (6, 1, 5));
    let listed = site
        .api(one.address)
        .list_proxies(v1::ListProxiesRequest {})
        .await
        .unwrap();
    assert_eq!(listed.into_inner().proxies.len(), 6);
    // Whoever moves to another is the same one.
    here.move_to(two.address);
    eventually("they have moved", async || {
        let sight = status(&mut people_one).await.sight.unwrap_or_default();
        (sight.proxies, sight.members, sight.running) == (6, 1, 1)
    })
    .await;
    let progress = v1::GetProgressRequest { revision: 2 };
    let found = people_one.get_progress(progress).await.unwrap().into_inner();
    assert_eq!((found.proxies, found.running), (6, 1), "nobody is counted twice");
    let steer = v1::SteerRequest {
        command: v1::RolloutCommand::PromoteFull.into(),
        revision: 2,
    };
    people_one.steer(steer).await.unwrap();
    eventually("all have the second", async || at_port(&[&here, &there], 81) == 6).await;

    // What fails at the proxies of any of them stops it, also once there is only one left to decide.
    one.stop().await;
    site.api(two.address)
        .apply(apply(&service("cart", 82)))
        .await
        .unwrap();
    eventually("it goes back", async || {
        status(&mut people_two).await.phase() == v1::RolloutPhase::RolledBack
    })
    .await;
    eventually("all are as before", async || at_port(&[&here, &there], 81) == 6).await;
    assert_eq!(here.ever_failed().len() + there.ever_failed().len(), 1);
    here.stop().await;
    there.stop().await;
    two.stop().await;
}
