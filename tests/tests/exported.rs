//! Services that zones give to each other, by name: who isn't given one neither sees it, nor gets it, nor hears of it.

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use leeward_identity::{Identity, SpiffeId};
use leeward_testkit::policy::{route, service};
use leeward_testkit::{Backend, Mesh, Protocol, eventually};
use leeward_zone::{Client, Congestion, Link};
use std::fmt::Write as _;
use std::time::Duration;
use tokio::task::LocalSet;

const SOON: Duration = Duration::from_secs(30);

/// Zones a and c with a proxy each, and b with the proxies g1 and b1. Behind b1 is `app`, which b gives to zone a only,
/// `all`, which it gives to everybody, and `own`, which stays in b; c takes `app` and `own` only.
struct Rig {
    mesh: Mesh,
    backend: Backend,
}

/// How zone b is reached.
const GATEWAY: &str = ", gateways: [{name: g1}]";

impl Rig {
    async fn start(gateways: &str) -> anyhow::Result<Self> {
        let mesh = Mesh::builder()
            .node("a", "a1")
            .node("b", "g1")
            .node("b", "b1")
            .node("c", "c1")
            .start()
            .await?;
        let backend = Backend::start("b")?;
        let at = [(backend.address(), "b", "b1")];
        let proxy = |name: &str| -> anyhow::Result<String> {
            Ok(format!(
                "{{name: {name}, address: \"{}\"}}",
                mesh.node(name)?.inbound
            ))
        };
        let mut policy = String::new();
        for (zone, spec) in [
            (
                "b",
                format!("proxies: [{}, {}]{gateways}", proxy("g1")?, proxy("b1")?),
            ),
            ("c", format!("proxies: [{}], imports: [app, own]", proxy("c1")?)),
        ] {
            // A String takes whatever is written to it.
            let _ = write!(
                policy,
                "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {zone}}}\nspec: {{{spec}}}\n"
            );
        }
        for (name, more) in [
            ("app", "exportTo: [a]"),
            ("all", "exportTo: [\"*\"]"),
            ("own", "exportTo: [\".\"]"),
        ] {
            policy += &service(name, &at, &[more]);
            policy += &route(name, &format!("{name}.example"), name, &[]);
        }
        mesh.apply(&policy).await?;
        Ok(Self { mesh, backend })
    }

    /// What a workload of a node gets for each of the three: an answer, or the reason why there is none.
    async fn gets(&self, node: &str) -> anyhow::Result<[String; 3]> {
        let client = self.mesh.workload(node, Protocol::Http1)?;
        let mut got = [const { String::new() }; 3];
        for (name, got) in ["app", "all", "own"].into_iter().zip(&mut got) {
            let reply = client.get(&format!("{name}.example"), "/").await?;
            *got = match reply.backend() {
                "" => reply.header("leeward-reason").to_owned(),
                backend => backend.to_owned(),
            };
        }
        Ok(got)
    }

    /// A link to a proxy of zone b, made by hand as another proxy. The client is what keeps it.
    async fn link(&self, who: &str, to: &str) -> anyhow::Result<(Client, Link)> {
        let identity = Identity::load(self.mesh.identity(who))?;
        let client = Client::new(identity, Congestion::default());
        let expect = SpiffeId::proxy("leeward.test", "b", to)?;
        let connecting = client.connect(self.mesh.node(to)?.inbound, &expect);
        let link = tokio::time::timeout(SOON, connecting).await??;
        Ok((client, link))
    }

    /// What a proxy of zone b answers who asks it for a service by such a link.
    async fn asked(&self, link: &Link, service: &str) -> anyhow::Result<(u16, String)> {
        let request = Request::get(format!("http://{service}.example/"))
            .header(
                "leeward-endpoint",
                format!("{service}/{}@b1", self.backend.address()),
            )
            .body(Empty::<Bytes>::new())?;
        let sent = tokio::time::timeout(SOON, link.send(request.into())).await?;
        let (head, body): (_, _) = sent
            .map_err(|error| anyhow::anyhow!("{error:?}"))
            .map(Response::into_parts)?;
        body.collect().await?;
        let reason = head.headers.get("leeward-reason");
        let reason = reason.map_or(Ok(""), |reason| reason.to_str())?;
        Ok((head.status.as_u16(), reason.to_owned()))
    }

    async fn refusals(&self, node: &str) -> anyhow::Result<f64> {
        let labels = ["direction=\"inbound\"", "reason=\"not_exported\""];
        self.mesh
            .node(node)?
            .metric("leeward_requests_total", &labels)
            .await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zones_get_what_they_are_given_and_take() -> anyhow::Result<()> {
    for gateways in ["", GATEWAY] {
        let rig = Rig::start(gateways).await?;
        let own = |list: [&str; 3]| list.map(str::to_owned);
        assert_eq!(
            rig.gets("a1").await?,
            own(["b", "b", "no_endpoint"]),
            "{gateways}"
        );
        assert_eq!(
            rig.gets("c1").await?,
            own(["no_endpoint", "no_endpoint", "no_endpoint"]),
            "{gateways}"
        );
        assert_eq!(rig.gets("b1").await?, own(["b", "b", "b"]), "{gateways}");
        assert_eq!(rig.gets("g1").await?, own(["b", "b", "b"]), "{gateways}");
    }
    Ok(())
}

#[tokio::test]
async fn who_asks_all_the_same_is_refused_by_certificate() -> anyhow::Result<()> {
    let rig = Rig::start("").await?;
    LocalSet::new()
        .run_until(async {
            let (_client, link) = rig.link("c1", "b1").await?;
            for service in ["app", "all", "own"] {
                assert_eq!(
                    rig.asked(&link, service).await?,
                    (403, "not_exported".to_owned()),
                    "{service}"
                );
            }
            assert_eq!(rig.backend.requests(), 0);
            assert!(rig.refusals("b1").await? > 2.5);
            let (_client, link) = rig.link("a1", "b1").await?;
            assert_eq!(rig.asked(&link, "app").await?.0, 200);
            assert_eq!(rig.asked(&link, "own").await?, (403, "not_exported".to_owned()));
            anyhow::Ok(())
        })
        .await
}

#[tokio::test]
async fn so_it_is_at_a_gateway_and_behind_it() -> anyhow::Result<()> {
    let rig = Rig::start(GATEWAY).await?;
    LocalSet::new()
        .run_until(async {
            let (_client, link) = rig.link("c1", "g1").await?;
            for service in ["app", "all", "own"] {
                assert_eq!(rig.asked(&link, service).await?, (403, "not_exported".to_owned()));
            }
            assert!(rig.refusals("g1").await? > 2.5);
            assert!(
                rig.refusals("b1").await? < 0.5,
                "it doesn't come to the last proxy"
            );
            assert_eq!(rig.backend.requests(), 0);
            let (_client, link) = rig.link("a1", "g1").await?;
            assert_eq!(rig.asked(&link, "app").await?.0, 200);
            // A gateway with older policy would pass it on: the last proxy goes by whom it speaks for.
            let (_client, link) = rig.link("g1", "b1").await?;
            let request = Request::get("http://app.example/")
                .header("leeward-endpoint", format!("app/{}@b1", rig.backend.address()))
                .header("leeward-caller", "spiffe://leeward.test/zone/c/proxy/c1")
                .body(Empty::<Bytes>::new())?;
            let answer = link
                .send(request.into())
                .await
                .map_err(|error| anyhow::anyhow!("{error:?}"))?;
            let reason = answer.headers().get("leeward-reason").context("no reason")?;
            assert_eq!(
                (answer.status().as_u16(), reason.as_bytes()),
                (403, &b"not_exported"[..])
            );
            assert_eq!(rig.backend.requests(), 1);
            anyhow::Ok(())
        })
        .await
}

#[tokio::test]
async fn zones_hear_of_what_they_may_have() -> anyhow::Result<()> {
    for (gateways, to) in [("", "b1"), (GATEWAY, "g1")] {
        let rig = Rig::start(gateways).await?;
        LocalSet::new()
            .run_until(async {
                // Zone c takes nothing that is given to it: of another service it would hear.
                let told = format!(
                    "{}{}",
                    service("for-c", &[(rig.backend.address(), "b", "b1")], &["exportTo: [c]"]),
                    "---\napiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: c}\nspec: {imports: [for-c, own]}\n"
                );
                rig.mesh.apply(&told).await?;
                for (who, wanted) in [("a1", &["all", "app"][..]), ("c1", &["for-c"])] {
                    let (_client, link) = rig.link(who, to).await?;
                    eventually("what is for this zone", SOON, || async {
                        let health = link.health().context("nothing yet")?;
                        let names: Vec<_> = health.iter().map(|(name, _)| name.to_owned()).collect();
                        ensure!(names == wanted, "{who} hears of {names:?}");
                        Ok(())
                    })
                    .await?;
                }
                anyhow::Ok(())
            })
            .await?;
    }
    Ok(())
}
