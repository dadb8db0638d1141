//! What is large goes to another zone by TCP, where policy leaves the choice and the way is good; the rest by QUIC.

use anyhow::ensure;
use http::Method;
use leeward_testkit::policy::{route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Client, Content, Mesh, Node, Protocol, Way, empty_body, eventually, request,
    zeros_body,
};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;

const SOON: Duration = Duration::from_secs(20);

const LARGE: u64 = 1 << 20;
/// Requests of which all, or none, are to go one way.
const SOME: u32 = 10;
/// More answers than it takes to forget large ones.
const FORGET: u32 = 200;

fn zeros(bytes: u64) -> Behave {
    Behave::Answer(Answer {
        status: 200,
        headers: Vec::new(),
        content: Content::Zeros(bytes),
    })
}

/// Two services in zone b behind one proxy, each with a route: `large`, whose answers are, and `small`.
struct World {
    mesh: Mesh,
    client: Client,
    large: Backend,
    small: Backend,
}

impl World {
    async fn start(more: &[&str]) -> anyhow::Result<Self> {
        let (large, small) = (Backend::start("large")?, Backend::start("small")?);
        large.behave(zeros(LARGE));
        let mesh = Mesh::two_zones().await?;
        let mut policy = String::new();
        for (name, backend) in [("large", &large), ("small", &small)] {
            policy += &service(name, &[(backend.address(), "b", "b1")], more);
            policy += &route(name, &format!("{name}.example"), name, &[]);
        }
        mesh.apply(&policy).await?;
        let client = mesh.workload("a1", Protocol::Http1)?;
        let world = Self {
            mesh,
            client,
            large,
            small,
        };
        world.linked().await?;
        Ok(world)
    }

    /// Waits until the far proxy has its UDP sockets: it may be asked to serve before.
    async fn linked(&self) -> anyhow::Result<()> {
        eventually("requests to go by QUIC", SOON, || async {
            self.client.get("small.example", "/").await?;
            let by_quic = self.went_by("small", "quic").await?;
            ensure!(by_quic > 0.5, "none has");
            Ok(())
        })
        .await
    }

    fn a1(&self) -> anyhow::Result<&Node> {
        self.mesh.node("a1")
    }

    async fn went_by(&self, service: &str, transport: &str) -> anyhow::Result<f64> {
        let (service, transport) = (
            format!("service=\"{service}\""),
            format!("transport=\"{transport}\""),
        );
        let labels = ["zone=\"b\"", &service, &transport];
        self.a1()?.metric("leeward_attempts_total", &labels).await
    }

    async fn get(&self, service: &str) -> anyhow::Result<()> {
        let reply = self.client.get(&format!("{service}.example"), "/").await?;
        ensure!(reply.status == 200, "{}", reply.status);
        Ok(())
    }

    /// Of so many requests, one after the other, how many went by QUIC.
    async fn by_quic(&self, service: &str, requests: u32) -> anyhow::Result<f64> {
        let before = self.went_by(service, "quic").await?;
        for _ in 0..requests {
            self.get(service).await?;
        }
        Ok(self.went_by(service, "quic").await? - before)
    }

    /// Waits until a service's requests go by TCP, all of them.
    async fn until_by_tcp(&self, service: &str) -> anyhow::Result<()> {
        eventually("requests to go by TCP", SOON, || async {
            let by_quic = self.by_quic(service, SOME).await?;
            ensure!(by_quic < 0.5, "{by_quic} went by QUIC");
            Ok(())
        })
        .await
    }

    /// More than 0.5 while a route's answers are held to be large.
    async fn is_large(&self, route: &str) -> anyhow::Result<f64> {
        let name = format!("name=\"{route}/0\"");
        let labels = ["kind=\"route\"", &name];
        self.a1()?.metric("leeward_zone_answers_large", &labels).await
    }

    /// How zone b is reached.
    async fn reach_b(&self, at: SocketAddr, transport: &str) -> anyhow::Result<()> {
        let zone = format!(
            "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: b}}\nspec: {{transport: {transport}, proxies: [{{name: b1, address: \"{at}\"}}]}}\n"
        );
        self.mesh.apply(&zone).await?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_whose_answers_are_large_goes_by_tcp_until_they_are_small() -> anyhow::Result<()> {
    for protocol in ["protocol: HTTP1", "protocol: HTTP2"] {
        let world = World::start(&[protocol]).await?;
        let first = world.by_quic("large", 1).await?;
        assert!(first > 0.5, "nothing is known yet");
        world.until_by_tcp("large").await?;
        assert!(world.is_large("large").await? > 0.5);
        // Another rule to the same proxy is none of its business.
        let by_quic = world.by_quic("small", 2 * SOME).await?;
        assert!(by_quic > f64::from(2 * SOME) - 0.5, "{by_quic}");
        assert!(world.is_large("small").await? < 0.5);
        // HEAD has no answer that is large, and says nothing of the others, whatever length it tells of.
        // (By HTTP/2 the backend would send the body all the same, which is an error.)
        let told = if protocol.ends_with('1') { LARGE } else { 0 };
        world.large.behave(zeros(told));
        let before = world.went_by("large", "quic").await?;
        for _ in 0..FORGET {
            let head = request(Method::HEAD, "large.example", "/", empty_body());
            let reply = world.client.call(head).await?;
            ensure!(
                reply.status == 200,
                "{protocol}, HEAD: {} {}",
                reply.status,
                reply.header("leeward-reason")
            );
        }
        let heads = world.went_by("large", "quic").await? - before;
        assert!(heads > f64::from(FORGET) - 0.5, "{heads}");
        // Nor do answers that never have a body, and failures.
        for status in [204, 304, 404] {
            world.large.behave(Behave::Answer(Answer {
                status,
                headers: Vec::new(),
                content: Content::Zeros(0),
            }));
            for _ in 0..FORGET {
                world.client.get("large.example", "/").await?;
            }
        }
        assert!(world.is_large("large").await? > 0.5);
        // Small ones do.
        world.large.behave(zeros(1 << 10));
        world.by_quic("large", FORGET).await?;
        assert!(world.is_large("large").await? < 0.5);
        let by_quic = world.by_quic("large", SOME).await?;
        assert!(by_quic > f64::from(SOME) - 0.5, "{by_quic}");
        drop(world.small);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_that_names_a_transport_has_it() -> anyhow::Result<()> {
    let world = World::start(&[]).await?;
    world.until_by_tcp("large").await?;
    let at = world.mesh.node("b1")?.inbound;
    world.reach_b(at, "Quic").await?;
    let by_quic = world.by_quic("large", SOME).await?;
    assert!(by_quic > f64::from(SOME) - 0.5, "{by_quic}");
    world.reach_b(at, "Tcp").await?;
    for service in ["large", "small"] {
        let by_quic = world.by_quic(service, SOME).await?;
        assert!(by_quic < 0.5, "{service}: {by_quic}");
    }
    // What was learnt is still known.
    world.reach_b(at, "Auto").await?;
    world.until_by_tcp("large").await?;
    let by_quic = world.by_quic("small", SOME).await?;
    assert!(by_quic > f64::from(SOME) - 0.5, "{by_quic}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_tcp_does_not_get_through_what_is_large_goes_by_quic() -> anyhow::Result<()> {
    let world = World::start(&[]).await?;
    world.until_by_tcp("large").await?;
    let far = world.mesh.node("b1")?.inbound;
    // One that refuses connections, and one that takes them and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await?;
    let refusing = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    for at in [refusing, silent.local_addr()?] {
        let way = Way::udp_at(at, far).await?;
        world.reach_b(way.at, "Auto").await?;
        eventually("a link at the new address", SOON, || async {
            let by_quic = world.by_quic("small", SOME).await?;
            ensure!(by_quic > f64::from(SOME) - 0.5, "{by_quic} went by QUIC");
            Ok(())
        })
        .await?;
        let by_quic = world.by_quic("large", 3 * SOME).await?;
        assert!(by_quic > f64::from(3 * SOME) - 0.5, "{by_quic}");
        // What is known to be large waits for TCP, but not for long.
        world.large.behave(Behave::Echo);
        let sent = request(Method::POST, "large.example", "/", zeros_body(2 << 20));
        let reply = world.client.call(sent).await?;
        assert_eq!((reply.status.as_u16(), reply.body.len()), (200, 2 << 20));
        world.large.behave(zeros(LARGE));
    }
    drop(silent);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_long_way_that_loses_packets_what_is_large_stays_with_quic() -> anyhow::Result<()> {
    let world = World::start(&[]).await?;
    world.until_by_tcp("large").await?;
    let mut way = Way::tcp_only(world.mesh.node("b1")?.inbound).await?;
    way.open_udp().await?;
    // In no step with requests and acknowledgements.
    way.disturb(47, Duration::from_millis(5));
    world.reach_b(way.at, "Auto").await?;
    // It shows in what goes by QUIC anyway.
    eventually("the losses to be known", SOON, || async {
        world.by_quic("small", 5 * SOME).await?;
        let by_quic = world.by_quic("large", 3).await?;
        ensure!(by_quic > 2.5, "{by_quic} of 3 by QUIC");
        Ok(())
    })
    .await?;
    let by_quic = world.by_quic("large", SOME).await?;
    assert!(by_quic > f64::from(SOME) - 0.5, "{by_quic}");
    // Nothing is lost any more.
    way.disturb(0, Duration::from_millis(5));
    eventually("requests to go by TCP again", 2 * SOON, || async {
        world.by_quic("small", 5 * SOME).await?;
        let by_quic = world.by_quic("large", 3).await?;
        ensure!(by_quic < 0.5, "{by_quic} of 3 by QUIC");
        Ok(())
    })
    .await?;
    Ok(())
}
