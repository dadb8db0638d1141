//! Several control planes on one etcd: proxies are connected to any of them, and a rollout is one.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod fleet;
mod support;

use fleet::Fleet;
use leeward_control::backup::{BackupSettings, Backups};
use leeward_control::kv::{EtcdSettings, Kv};
use leeward_control::push::Timing;
use leeward_control::store::{Options, Store};
use leeward_control::{Policy, Server, serve};
use leeward_identity::{SpiffeId, channel};
use leeward_proto::v1;
use std::net::{SocketAddr, TcpListener as Std};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use support::{SOON, Site, apply, eventually, service, zone};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use v1::rollout_service_client::RolloutServiceClient;

/// With this set, a machine without etcd fails the test instead of leaving it out.
const REQUIRED: &str = "LEEWARD_TEST_ETCD";

struct Etcd {
    child: Child,
    endpoint: String,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("etcd"))
        .find(|file| file.is_file())
}

fn free_port() -> u16 {
    Std::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn start_etcd(dir: &Path) -> Option<Etcd> {
    let Some(program) = program() else {
        assert!(std::env::var_os(REQUIRED).is_none(), "there is no etcd");
        eprintln!("left out: there is no etcd");
        return None;
    };
    let (clients, peers) = (free_port(), free_port());
    let (client, peer) = (
        format!("http://127.0.0.1:{clients}"),
        format!("http://127.0.0.1:{peers}"),
    );
    let child = Command::new(program)
        .args(["--name", "n", "--data-dir"])
        .arg(dir.join("etcd"))
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("n={peer}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Some(Etcd {
        child,
        endpoint: client,
    })
}

struct Plane {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

async fn start(site: &Site, etcd: &Etcd) -> Plane {
    let settings = EtcdSettings {
        endpoints: vec![etcd.endpoint.clone()],
        prefix: "/test/".to_owned(),
        ca: None,
        identity: None,
        allow_plaintext: false,
    };
    let until = tokio::time::Instant::now() + SOON;
    let store = loop {
        let kv = Kv::etcd(settings.clone()).unwrap();
        match Store::open(kv, Options::default()).await {
            Err(_) if tokio::time::Instant::now() < until => {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            opened => break opened.unwrap(),
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    store.register(address.to_string());
    let stop = CancellationToken::new();
    let policy = Policy::open(store).await.unwrap();
    let server = Server {
        listener,
        admin: None,
        identity: site.identity(&Site::control_id()),
        ca: None,
        backups: Backups::open(policy.clone(), BackupSettings::default()).unwrap(),
        policy,
        oidc: None,
        registry_auth: None,
        timing: Timing::DEFAULT,
    };
    let task = tokio::spawn(serve(server, stop.clone()));
    Plane { address, stop, task }
}

impl Plane {
    async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(SOON, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    fn rollouts(&self, site: &Site) -> RolloutServiceClient<Channel> {
        let user = site.identity(&SpiffeId::user("leeward.test", "ada").unwrap());
        RolloutServiceClient::new(channel::connect_lazy(user, self.address))
    }
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
    let Some(etcd) = start_etcd(&site.dir) else { return };
    let (one, two) = (start(&site, &etcd).await, start(&site, &etcd).await);
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
    let (mut people_one, mut people_two) = (one.rollouts(&site), two.rollouts(&site));
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
