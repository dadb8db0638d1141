//! Three zones on hosts of their own, real processes, and a network that breaks: what becomes of the requests that are
//! under way all the while. Each prints a row of the table in docs/zones.md.

mod field;
mod traffic;

use anyhow::{Context, ensure};
use field::{Field, Make, SOON};
use leeward_identity::{Identity, SpiffeId};
use leeward_proto::v1;
use leeward_testkit::policy::route;
use leeward_testkit::{Client, Protocol, ZONES, eventually, leeward, on_hosts};
use std::time::Duration;

/// How long a dead path may stay unnoticed (docs/zone-protocol.md).
const DEAD_PATH: Duration = Duration::from_secs(2);
/// Lines of a service to which the proxies keep no connection: each request shows certificates anew.
const EACH_A_HANDSHAKE: &[&str] = &["connectionPool: {maxIdlePerEndpoint: 0}"];
const DOMAIN: &str = "leeward.test";
const DAY: Duration = Duration::from_secs(24 * 3600);

#[test]
fn a_zone_whose_cable_is_cut() -> anyhow::Result<()> {
    on_hosts("a_zone_whose_cable_is_cut", async |hosts| {
        // Alpha is in the zones that a can't get to.
        let lost = Make {
            lost: |flow| flow.from == "a" && flow.to == "alpha",
            ..Make::USUAL
        };
        let mut field = Field::start(hosts, lost).await?;
        field.begin("before detection");
        field.hosts.cut("a")?;
        field.is_out("b", "beta").await?;
        field.is_out("c", "gamma").await?;
        field.begin("after");
        field.enough().await?;
        field.begin("mended");
        field.hosts.mend("a")?;
        field.is_back("b", "beta").await?;
        field.is_back("c", "gamma").await?;
        field.is_served("a", "alpha").await?;
        field.enough().await?;
        field.end("a zone's cable is cut").await
    })
}

#[test]
fn a_zone_that_is_cut_off_from_the_control_plane() -> anyhow::Result<()> {
    on_hosts("a_zone_that_is_cut_off_from_the_control_plane", async |hosts| {
        let mut field = Field::start(hosts, Make::USUAL).await?;
        field.begin("before");
        field.enough().await?;
        field.begin("cut off");
        field.hosts.cut_from_control("a")?;
        // What is applied meanwhile reaches the others only.
        let revision = field
            .mesh
            .apply_only(&route("later", "later.example", "beta", &[]))
            .await?;
        eventually("the others to have the policy", SOON, || async {
            let known = field.mesh.proxies().await?.proxies;
            let has = |zone: &str| known.iter().any(|p| p.zone == zone && p.generation >= revision);
            ensure!(has("b") && has("c"), "{known:?}");
            ensure!(!has("a"), "a is not cut off");
            Ok(())
        })
        .await?;
        field.enough().await?;
        field.begin("mended");
        field.hosts.heal("a")?;
        field.mesh.converge(revision).await?;
        field.enough().await?;
        field.end("a zone is cut off from the control plane").await
    })
}

#[test]
fn one_packet_in_twenty_is_lost() -> anyhow::Result<()> {
    on_hosts("one_packet_in_twenty_is_lost", async |hosts| {
        let mut field = Field::start(hosts, Make::USUAL).await?;
        field.begin("before");
        field.enough().await?;
        field.begin("5 % lost");
        for zone in ZONES {
            field.hosts.lose(zone, 5)?;
        }
        field.enough().await?;
        for zone in ZONES {
            ensure!(
                field.hosts.dropped(zone)? > 0,
                "nothing was dropped on its way to {zone}"
            );
        }
        field.end("5 % of all packets are dropped").await
    })
}

#[test]
fn udp_is_blocked() -> anyhow::Result<()> {
    on_hosts("udp_is_blocked", async |hosts| {
        let mut field = Field::start(hosts, Make::USUAL).await?;
        field.begin("before detection");
        for zone in ZONES {
            field.hosts.block_udp(zone)?;
        }
        tokio::time::sleep(DEAD_PATH).await;
        for zone in ZONES {
            let node = field.node(zone)?;
            eventually("requests to go by TCP", SOON, || async {
                let by_tcp = node.metric("leeward_zone_transport_fallbacks_total", &[]).await?;
                ensure!(by_tcp > 0.5, "none of {zone} does");
                Ok(())
            })
            .await?;
        }
        field.begin("after");
        field.enough().await?;
        for zone in ZONES {
            ensure!(
                field.hosts.dropped(zone)? > 0,
                "nothing was dropped on its way to {zone}"
            );
        }
        field.end("UDP is blocked").await
    })
}

#[test]
fn a_proxy_that_is_killed() -> anyhow::Result<()> {
    on_hosts("a_proxy_that_is_killed", async |hosts| {
        // Its own workloads have lost the proxy that they speak to.
        let lost = Make {
            lost: |flow| flow.from == "a",
            ..Make::USUAL
        };
        let mut field = Field::start(hosts, lost).await?;
        field.begin("before detection");
        field.traffic.silence("a");
        field.mesh.node_mut("a1")?.process.kill9()?;
        field.is_out("b", "beta").await?;
        field.is_out("c", "gamma").await?;
        field.begin("after");
        field.enough().await?;
        field.begin("started again");
        let inbound = field.node("a")?.inbound.to_string();
        let again = field
            .mesh
            .start_again_with("a1", &[("--inbound", &inbound)])
            .await?;
        field.is_back("b", "beta").await?;
        field.is_back("c", "gamma").await?;
        field.enough().await?;
        field.end("a zone's proxy is killed").await?;
        drop(again);
        Ok(())
    })
}

#[test]
fn a_zone_gateway_that_is_killed() -> anyhow::Result<()> {
    on_hosts("a_zone_gateway_that_is_killed", async |hosts| {
        let make = Make {
            gateways: &["g1", "g2"],
            ..Make::USUAL
        };
        let mut field = Field::start(hosts, make).await?;
        // Both have something to lose.
        for gateway in ["g1", "g2"] {
            eventually("the gateway to pass requests on", SOON, || async {
                let served = ["direction=\"inbound\"", "outcome=\"served\""];
                let passed = field
                    .mesh
                    .node(gateway)?
                    .metric("leeward_requests_total", &served)
                    .await?;
                ensure!(passed > 20.0, "{gateway}: {passed}");
                Ok(())
            })
            .await?;
        }
        field.begin("before detection");
        field.mesh.node_mut("g1")?.process.kill9()?;
        // Requests for alpha go from a to b; those of c for gamma to a, so that it doesn't come to know.
        field.uses("a", "g1", false).await?;
        field.begin("after");
        field.enough().await?;
        // One lost gateway is not a lost zone: what is behind it goes on, and is not said to be out.
        field.is_back("a", "alpha").await?;
        field.begin("started again");
        let inbound = field.mesh.node("g1")?.inbound.to_string();
        let again = field
            .mesh
            .start_again_with("g1", &[("--inbound", &inbound)])
            .await?;
        field.uses("a", "g1", true).await?;
        field.enough().await?;
        field.end("a zone's gateway is killed").await?;
        drop(again);
        Ok(())
    })
}

#[test]
fn a_certificate_that_ends() -> anyhow::Result<()> {
    on_hosts("a_certificate_that_ends", async |hosts| {
        let make = Make {
            transport: "Tcp",
            service: EACH_A_HANDSHAKE,
            // A proxy without a certificate gets to no other.
            lost: |flow| flow.from == "a" && flow.to == "alpha",
            ..Make::USUAL
        };
        let mut field = Field::start(hosts, make).await?;
        field.begin("before detection");
        let id = SpiffeId::proxy(DOMAIN, "a", "a1")?;
        let short = Duration::from_secs(10);
        field.mesh.root()?.issue(&id, short, &field.mesh.identity("a1"))?;
        let admin = Client::new(field.node("a")?.admin, Protocol::Http1);
        eventually(
            "the proxy to know that its certificate has ended",
            SOON,
            || async {
                let reply = admin.get("admin", "/readyz").await?;
                let text = reply.text();
                ensure!(
                    reply.status == 503 && text.contains("identity_not_ready"),
                    "{text}"
                );
                Ok(())
            },
        )
        .await?;
        field.is_out("b", "beta").await?;
        field.is_out("c", "gamma").await?;
        field.begin("after");
        field.enough().await?;
        field.begin("a new one");
        field.mesh.root()?.issue(&id, DAY, &field.mesh.identity("a1"))?;
        field.node("a")?.wait_ready().await?;
        field.is_back("b", "beta").await?;
        field.is_back("c", "gamma").await?;
        field.enough().await?;
        field.end("a proxy's certificate ends").await
    })
}

#[test]
fn the_root_is_replaced() -> anyhow::Result<()> {
    on_hosts("the_root_is_replaced", async |hosts| {
        let make = Make {
            authority: true,
            transport: "Tcp",
            service: EACH_A_HANDSHAKE,
            ..Make::USUAL
        };
        let mut field = Field::start(hosts, make).await?;
        field.begin("before");
        field.enough().await?;
        field.begin("meanwhile");
        let root = field.mesh.dir().join("new-root").display().to_string();
        let next = field.mesh.authority().join("next").display().to_string();
        run(&field, &["ca", "init", &root, "--trust-domain", DOMAIN]).await?;
        run(&field, &["ca", "intermediate", "--root", &root, "--out", &next]).await?;
        run(&field, &["ca", "rotate", "prepare"]).await?;
        eventually("all to trust the new root", SOON, || {
            run(&field, &["ca", "rotate", "activate"])
        })
        .await?;
        run(&field, &["identity", "renew"]).await?;
        // Proxies spread over a tenth of a certificate's life, 30 s here.
        eventually("the old root to be out of use", 2 * SOON, || {
            run(&field, &["ca", "rotate", "retire"])
        })
        .await?;
        let old = field.mesh.root()?.fingerprint().to_owned();
        eventually("all to trust the old root no more", SOON, || async {
            for zone in ZONES {
                let identity = Identity::load(field.mesh.identity(&field.node(zone)?.name))?;
                ensure!(!identity.bundle().has(&old), "{zone} does");
            }
            Ok(())
        })
        .await?;
        field.begin("after");
        field.enough().await?;
        let known = field.mesh.api().list_proxies(v1::ListProxiesRequest {}).await;
        let connected = known
            .context("the proxies")?
            .into_inner()
            .proxies
            .iter()
            .all(|p| p.connected);
        ensure!(connected, "a proxy has lost its control plane");
        field.end("the root is replaced").await
    })
}

/// Runs the command as the mesh's user; what it complains of is the error.
async fn run(field: &Field, args: &[&str]) -> anyhow::Result<()> {
    let output = leeward(&field.mesh, args).await?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "leeward {args:?}: {told}");
    Ok(())
}
