//! Many proxies at once: each has every change, a change costs the same however large the mesh is, and nobody is sent anew
//! what it has.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use leeward_control::push::Timing;
use leeward_proto::v1;
use leeward_testkit::{Fleet, Tallied, World};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use support::Site;
use tokio::time::Instant;

/// Simulated proxies.
const PROXIES: usize = 200;
/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// How much longer a message can be for the numbers in it: two times of up to 5 bytes, and revisions.
const NUMBERS: u64 = 16;

const SMALL: World = World {
    zones: 3,
    services: 5,
    endpoints: 10,
    routes: 5,
};
const LARGE: World = World {
    zones: 3,
    services: 500,
    endpoints: 5_000,
    routes: 500,
};

struct Mesh {
    site: Site,
    fleet: Fleet,
    began: Instant,
}

impl Mesh {
    async fn new() -> Self {
        let site = Site::new();
        let authority = leeward_identity::authority::Authority::open(&site.dir.join("ca")).unwrap();
        let fleet = Fleet::new(Arc::new(authority), SMALL.zones, PROXIES.try_into().unwrap()).await;
        let fleet = fleet.unwrap();
        let began = Instant::now();
        Self { site, fleet, began }
    }

    async fn apply(&self, control: SocketAddr, resources: Vec<v1::Resource>) -> u64 {
        let request = v1::ApplyRequest {
            resources,
            ..v1::ApplyRequest::default()
        };
        let applied = self.site.api(control).apply(request).await.unwrap();
        applied.into_inner().revision
    }

    async fn reached(&self, generation: u64) {
        self.reached_since(generation, self.began).await;
    }

    async fn reached_since(&self, generation: u64, since: Instant) {
        let reached = self.fleet.reached(0..PROXIES, (generation, since), LONG);
        reached.await.unwrap();
    }

    /// What each proxy got by one change of one route.
    async fn change(&self, control: SocketAddr, world: World, seconds: u64) -> Vec<Tallied> {
        let before = self.fleet.tallied(0..PROXIES);
        let route = world.route(0, Duration::from_secs(seconds));
        let revision = self.apply(control, vec![route]).await;
        self.reached(revision).await;
        let after = self.fleet.tallied(0..PROXIES);
        after
            .iter()
            .zip(&before)
            .map(|(after, before)| {
                assert_eq!(after.generation, revision);
                Tallied {
                    fulls: after.fulls - before.fulls,
                    updates: after.updates - before.updates,
                    resources: after.resources - before.resources,
                    update_bytes: after.update_bytes - before.update_bytes,
                    ..*after
                }
            })
            .collect()
    }
}

/// All got the same: the one resource, and nothing anew. Returns its size.
#[track_caller]
fn one_resource(got: &[Tallied]) -> u64 {
    for one in got {
        assert_eq!((one.fulls, one.updates, one.resources), (0, 1, 1), "{one:?}");
        assert_eq!(one.update_bytes, got[0].update_bytes, "they share one encoding");
    }
    got[0].update_bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_costs_as_much_in_a_large_world_as_in_a_small_one() {
    let mut mesh = Mesh::new().await;
    let control = mesh.site.start("store", Timing::DEFAULT).await;
    let revision = mesh.apply(control.address, SMALL.resources()).await;
    mesh.fleet.connect(control.address, 0..PROXIES);
    mesh.reached(revision).await;
    let in_small = one_resource(&mesh.change(control.address, SMALL, 20).await);

    let revision = mesh.apply(control.address, LARGE.resources()).await;
    mesh.reached(revision).await;
    let in_large = one_resource(&mesh.change(control.address, LARGE, 21).await);
    assert!(
        in_small.abs_diff(in_large) <= NUMBERS,
        "{in_small} bytes in the small world, {in_large} in the large one"
    );
    // One full push each in all this time: the first.
    let all = mesh.fleet.tallied(0..PROXIES);
    assert!(all.iter().all(|one| (one.fulls, one.sessions) == (1, 1)));
    mesh.fleet.stop(0..PROXIES);
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_that_come_back_all_at_once_are_sent_only_what_they_missed() {
    let mut mesh = Mesh::new().await;
    let control = mesh.site.start("store", Timing::DEFAULT).await;
    let revision = mesh.apply(control.address, LARGE.resources()).await;
    mesh.fleet.connect(control.address, 0..PROXIES);
    mesh.reached(revision).await;
    let before = mesh.fleet.tallied(0..PROXIES);

    // The network goes, and the control plane stays.
    let cut = Instant::now();
    mesh.fleet.cut();
    mesh.reached_since(revision, cut).await;
    for (now, then) in mesh.fleet.tallied(0..PROXIES).iter().zip(&before) {
        assert_eq!((now.fulls, now.resources), (then.fulls, then.resources));
    }

    // The control plane goes, one resource changes while they are away, and another comes up.
    mesh.fleet.stop(0..PROXIES);
    let route = LARGE.route(1, Duration::from_secs(22));
    let revision = mesh.apply(control.address, vec![route]).await;
    control.stop().await;
    let control = mesh.site.start("store", Timing::DEFAULT).await;
    mesh.fleet.connect(control.address, 0..PROXIES);
    mesh.reached(revision).await;
    for (now, then) in mesh.fleet.tallied(0..PROXIES).iter().zip(&before) {
        assert_eq!((now.fulls, now.resources), (then.fulls, then.resources + 1));
    }
    mesh.fleet.stop(0..PROXIES);
    control.stop().await;
}
