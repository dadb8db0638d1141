//! Who may do what with a service, on real proxies: by certificate, by path in every spelling, by token; what is refused
//! is refused once, and told.

use anyhow::{Context, ensure};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Method, Request};
use leeward_identity::{Identity, SpiffeId};
use leeward_proto::v1;
use leeward_testkit::policy::{fallback, route, rules, service};
use leeward_testkit::raw::exchange;
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Mesh, Node, Process, Protocol, Receiver, Reply, TempDir, binaries,
    bytes_body, empty_body, eventually, get, request, with_header,
};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const QUIET: Duration = Duration::from_millis(150);
const SOON: Duration = Duration::from_secs(30);

/// A policy; `spec` are the lines of its spec.
fn policy(name: &str, spec: &[&str]) -> String {
    let mut text = format!(
        "---\napiVersion: leeward.dev/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\nspec:\n"
    );
    for line in spec {
        text += &format!("  {line}\n");
    }
    text
}

/// Two zones, and the service `pay` at two places: behind b1 (pay.example), and at a1's own node (near.example).
struct Rig {
    mesh: Mesh,
    far: Backend,
    near: Backend,
    spans: Receiver,
}

const HOSTS: [&str; 2] = ["pay.example", "near.example"];

impl Rig {
    async fn start() -> anyhow::Result<Self> {
        let spans = Receiver::start()?;
        let mesh = Mesh::builder()
            .node("a", "a1")
            .node("b", "b1")
            .flag("--access-log", "stdout")
            .flag("--otlp-endpoint", &spans.grpc_endpoint())
            .flag("--trace-ratio", "1")
            .start()
            .await?;
        let (far, near) = (Backend::start("far")?, Backend::start("near")?);
        let services = service("pay", &[(far.address(), "b", "b1")], &[])
            + &service("near", &[(near.address(), "a", "a1")], &[])
            + &route("pay", "pay.example", "pay", &[])
            + &route("near", "near.example", "near", &[]);
        mesh.apply(&services).await?;
        Ok(Self {
            mesh,
            far,
            near,
            spans,
        })
    }

    fn workload(&self, node: &str, protocol: Protocol) -> anyhow::Result<Client> {
        self.mesh.workload(node, protocol)
    }

    fn requests(&self) -> u64 {
        self.far.requests() + self.near.requests()
    }

    /// One request straight to b1's inbound listener, as this proxy.
    async fn as_proxy(&self, who: &str, head: &str) -> anyhow::Result<String> {
        let inbound = self.mesh.node("b1")?.inbound;
        let identity = Identity::load(self.mesh.identity(who))?;
        let expect = SpiffeId::proxy("leeward.test", "b", "b1")?;
        let config = identity.client_config(&[b"http/1.1"], &expect)?;
        let stream = tokio::net::TcpStream::connect(inbound).await?;
        let mut stream = tokio_rustls::TlsConnector::from(config)
            .connect(inbound.ip().into(), stream)
            .await?;
        let endpoint = format!("pay/{}", self.far.address());
        let request = format!(
            "{head}\r\nHost: pay.example\r\nLeeward-Endpoint: {endpoint}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await??;
        Ok(answer)
    }
}

/// A metric that is a count.
async fn count(node: &Node, name: &str, labels: &[&str]) -> anyhow::Result<u64> {
    Ok(node.metric(name, labels).await?.to_string().parse()?)
}

/// Keys are fetched beside requests, which wait for them only for so long.
async fn passes_soon(client: &Client, host: &str, token: &str) -> anyhow::Result<()> {
    eventually("the token's key to be there", SOON, || async {
        let status = client.call(bearing(host, token)).await?.status;
        ensure!(status == 200, "{status}");
        Ok(())
    })
    .await
}

#[track_caller]
fn refused(reply: &Reply, reason: &str) {
    assert_eq!(
        (reply.status.as_u16(), reply.header("leeward-reason")),
        (403, reason),
        "{reply:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_are_known_by_certificate_and_deny_overrides() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let everywhere = policy("nobody", &["action: Allow"]);
    let allow = policy(
        "zone-a",
        &[
            "services: [pay, near]",
            "action: Allow",
            "rules: [{to: [{methods: [PUT]}]}, {from: [{zones: [a]}]}]",
        ],
    );
    let deny = policy(
        "no-admin",
        &[
            "action: Deny",
            "rules: [{from: [{identities: [\"spiffe://leeward.test/zone/a/*\"]}], to: [{paths: [\"/admin\", \"/admin/*\"]}]}]",
        ],
    );
    let audit = policy(
        "seen",
        &["action: Audit", "rules: [{to: [{paths: [\"/seen\"]}]}]"],
    );
    rig.mesh.apply(&(everywhere + &allow + &deny + &audit)).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let (a, b) = (rig.workload("a1", protocol)?, rig.workload("b1", protocol)?);
        for host in HOSTS {
            let before = rig.requests();
            assert_eq!(a.get(host, "/").await?.status, 200, "{protocol:?} {host}");
            assert_eq!(a.get(host, "/seen").await?.status, 200);
            assert_eq!(rig.requests() - before, 2);
            refused(&a.get(host, "/admin").await?, "authorization_denied");
            refused(&b.get(host, "/").await?, "authorization_denied");
            let grpc = with_header(
                request(Method::POST, host, "/x.Y/Z", bytes_body("")),
                "content-type",
                "application/grpc",
            );
            let reply = b.call(grpc).await?;
            assert_eq!(
                (reply.status.as_u16(), reply.header("grpc-status")),
                (200, "7"),
                "{reply:?}"
            );
            assert_eq!(
                rig.requests() - before,
                2,
                "{protocol:?} {host}: nothing else came to a workload"
            );
        }
    }

    // The proxy in front of the workload goes by the certificate, whatever the one before it would have said.
    let asked = rig.requests();
    let answer = rig.as_proxy("a1", "GET / HTTP/1.1").await?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for (who, head) in [
        ("b1", "GET / HTTP/1.1"),
        ("a1", "GET /admin HTTP/1.1"),
        ("a1", "GET /%61dmin HTTP/1.1"),
        ("b1", "GET / HTTP/1.1\r\nLeeward-Check: 1"),
        (
            "b1",
            "GET / HTTP/1.1\r\nX-Forwarded-Client-Cert: URI=spiffe://leeward.test/zone/a/proxy/a1",
        ),
    ] {
        let answer = rig.as_proxy(who, head).await?;
        let refused =
            answer.starts_with("HTTP/1.1 403") && answer.contains("leeward-reason: authorization_denied");
        assert!(refused, "{who} {head}: {answer}");
    }
    assert_eq!(rig.requests() - asked, 1);

    // What was said is told.
    let a1 = rig.mesh.node("a1")?;
    let line = a1.process.logged("/admin", SOON).await?;
    let told = |field: &str| line.get(field).cloned().unwrap_or_default();
    assert_eq!(
        (
            told("authorization"),
            told("authorization_policy"),
            told("reason")
        ),
        (json!("deny"), json!("no-admin/0"), json!("authorization_denied")),
        "{line:#}"
    );
    assert_eq!(told("attempts"), json!([]), "{line:#}");
    let line = a1.process.logged("/seen", SOON).await?;
    assert_eq!(line["authorization_audit"], json!(["seen/0"]), "{line:#}");
    assert_eq!(line["authorization_policy"], json!("zone-a/1"), "{line:#}");
    let line = rig.mesh.node("b1")?.process.logged("near.example", SOON).await?;
    assert_eq!(
        (&line["authorization"], &line["authorization_policy"]),
        (&json!("deny"), &json!("zone-a"))
    );
    for (policy, decision) in [("no-admin", "deny"), ("zone-a", "allow")] {
        eventually("a span that says so", SOON, || async {
            let spans = rig.spans.spans();
            let told = spans.iter().any(|span| {
                span.attribute("leeward.authorization.policy") == policy
                    && span.attribute("leeward.authorization.decision") == decision
            });
            ensure!(told, "{spans:?}");
            Ok(())
        })
        .await?;
    }
    let metric = "leeward_authorization_decisions_total";
    for (labels, want) in [
        (
            [
                "direction=\"outbound\"",
                "policy=\"no-admin\"",
                "decision=\"deny\"",
            ],
            4,
        ),
        (
            [
                "direction=\"outbound\"",
                "policy=\"zone-a\"",
                "decision=\"allow\"",
            ],
            8,
        ),
        (
            ["direction=\"outbound\"", "policy=\"seen\"", "decision=\"audit\""],
            4,
        ),
    ] {
        assert_eq!(count(a1, metric, &labels).await?, want, "{labels:?}");
    }
    Ok(())
}

/// Another spelling of `/admin`, or of a way out of `/public`, by its name.
const TRICKS: &[(&str, &str)] = &[
    ("dot segments", "/public/../admin"),
    ("encoded dots", "/public/%2e%2e/admin"),
    ("half encoded dots", "/public/.%2E/admin"),
    ("a dot segment before", "/./admin"),
    ("a dot segment at the end", "/admin/."),
    ("an encoded letter", "/%61dmin"),
    ("an empty segment before", "//admin"),
    ("an empty segment between", "/public/..//admin"),
    ("an empty segment within", "/admin//x"),
    ("a slash at the end", "/admin/"),
    ("a parameter", "/admin;x=1"),
    ("an encoded parameter", "/admin%3Bx=1"),
    ("dots with a parameter", "/public/..;/admin"),
    ("an encoded slash", "/public%2f..%2fadmin"),
    ("an encoded slash, upper case", "/public%2F..%2Fadmin"),
    ("a backslash", "/public/..\\admin"),
    ("an encoded backslash", "/public/..%5cadmin"),
    ("another case", "/ADMIN"),
    ("another case, encoded", "/%41dmin"),
    ("a zero byte", "/admin%00"),
    ("a line break", "/admin%0d%0a"),
    ("no UTF-8", "/admin%ff"),
    ("an overlong dot", "/public/%c0%ae%c0%ae/admin"),
    ("codes encoded twice", "/public/%252e%252e/admin"),
    ("an encoded question mark", "/admin%3f/public"),
    ("an encoded fragment", "/admin%23/public"),
    ("half a code", "/admin%2"),
    ("above the root", "/../admin"),
    ("a query", "/admin?/public/"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_spelling_of_a_path_passes_that_another_would_not() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    // Each alone must do: what denies must see the path in every spelling, and what allows must see none in others.
    let deny = [
        "action: Deny",
        "rules: [{to: [{paths: [\"/admin\", \"/admin/*\"]}]}]",
    ];
    let allow = ["action: Allow", "rules: [{to: [{paths: [\"/public/*\"]}]}]"];
    for spec in [deny, allow] {
        rig.mesh.apply(&policy("paths", &spec)).await?;
        let h2 = rig.workload("a1", Protocol::Http2)?;
        for host in HOSTS {
            let before = rig.requests();
            for (name, path) in TRICKS {
                let text = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
                let heard = exchange(rig.mesh.node("a1")?.outbound, text.as_bytes(), QUIET).await?;
                let status = heard.statuses();
                assert!(
                    status == [400] || status == [403],
                    "{name}: {host}{path}: {:?}",
                    heard.text()
                );
                // Where the client can be made to say it, HTTP/2 has the same answer.
                if let Ok(uri) = format!("http://{host}{path}").parse::<http::Uri>() {
                    let mut asked = Request::new(empty_body());
                    *asked.uri_mut() = uri;
                    let status = h2.call(asked).await?.status.as_u16();
                    assert!(
                        status == 400 || status == 403,
                        "{name}: {host}{path} in HTTP/2: {status}"
                    );
                }
                let answer = rig.as_proxy("a1", &format!("GET {path} HTTP/1.1")).await?;
                let held = answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 403");
                assert!(held, "{name}: {path} inbound: {answer}");
            }
            let absolute =
                format!("GET http://{host}/admin HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n");
            let heard = exchange(rig.mesh.node("a1")?.outbound, absolute.as_bytes(), QUIET).await?;
            assert_eq!(heard.statuses(), [403], "absolute form: {:?}", heard.text());
            assert_eq!(rig.requests(), before, "{host}: nothing came to a workload");
            for path in [
                "/public/a",
                "/public/%61",
                "/public/./a",
                "/x/../public/a",
                "/public//../a",
            ] {
                let text =
                    format!("GET {path}?q=/../%2e HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
                let heard = exchange(rig.mesh.node("a1")?.outbound, text.as_bytes(), QUIET).await?;
                assert_eq!(heard.statuses(), [200], "{path}: {:?}", heard.text());
            }
        }
        for backend in [&rig.far, &rig.near] {
            let seen = backend.take_seen();
            assert_eq!(seen.len(), 5);
            assert!(
                seen.iter().all(|s| s.target == "/public/a?q=/../%2e"),
                "workloads read the same: {seen:?}"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_header_of_a_workload_says_who_asks() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let claims = [
        (
            "x-forwarded-client-cert",
            "URI=spiffe://leeward.test/zone/b/proxy/b1",
        ),
        ("l5d-client-id", "b1.serviceaccount.identity.leeward.test"),
        ("client-cert", ":MIIB:"),
        ("client-cert-chain", ":MIIB:"),
        ("x-leeward-identity", "spiffe://leeward.test/zone/b/proxy/b1"),
        ("x-leeward-zone", "b"),
        ("leeward-peer", "spiffe://leeward.test/zone/b/proxy/b1"),
        ("leeward-zone", "b"),
        ("leeward-route", "admin"),
        ("leeward-check", "1"),
    ];
    let spoof = |host: &str, path: &str| {
        claims.iter().fold(get(host, path), |request, (name, value)| {
            with_header(request, name, value)
        })
    };
    let client = rig.workload("a1", Protocol::Http1)?;
    for host in HOSTS {
        assert_eq!(client.call(spoof(host, "/")).await?.status, 200);
    }
    for backend in [&rig.far, &rig.near] {
        let seen = backend.take_seen().pop().context("no request came")?;
        for (name, _) in claims {
            assert!(
                !seen.headers.contains_key(name),
                "{name} came to a workload: {:?}",
                seen.headers
            );
        }
    }
    let rules = "rules: [{from: [{zones: [b]}]}, {to: [{routes: [admin]}]}]";
    let admin = route("admin", "admin.example", "pay", &[]);
    rig.mesh
        .apply(&(admin + &policy("only-b", &["action: Allow", rules])))
        .await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = rig.workload("a1", protocol)?;
        for host in HOSTS {
            refused(&client.call(spoof(host, "/")).await?, "authorization_denied");
        }
        // The route is the proxy's to say, and it says so to the next one.
        assert_eq!(client.get("admin.example", "/").await?.status, 200);
    }
    let answer = rig.as_proxy("a1", "GET / HTTP/1.1").await?;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert_eq!(
        rig.workload("b1", Protocol::Http1)?
            .get("pay.example", "/")
            .await?
            .status,
        200
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_counts_what_it_would_refuse_and_lets_it_pass() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let spec = |mode: &str| {
        policy(
            "writes",
            &[
                "services: [pay]",
                "action: Deny",
                &format!("mode: {mode}"),
                "rules: [{to: [{notMethods: [GET, HEAD]}]}]",
            ],
        )
    };
    rig.mesh.apply(&spec("DryRun")).await?;
    let client = rig.workload("a1", Protocol::Http1)?;
    let post = || request(Method::POST, "pay.example", "/", bytes_body("x"));
    for _ in 0..3 {
        assert_eq!(client.call(post()).await?.status, 200);
        assert_eq!(client.get("pay.example", "/").await?.status, 200);
    }
    let metric = "leeward_authorization_decisions_total";
    for (node, direction) in [("a1", "direction=\"outbound\""), ("b1", "direction=\"inbound\"")] {
        let labels = ["policy=\"writes\"", "decision=\"would_deny\"", direction];
        assert_eq!(count(rig.mesh.node(node)?, metric, &labels).await?, 3, "{node}");
    }
    let line = rig.mesh.node("a1")?.process.logged("POST", SOON).await?;
    assert_eq!(
        (&line["authorization"], &line["outcome"]),
        (&json!("would_deny"), &json!("served")),
        "{line:#}"
    );
    rig.mesh.apply(&spec("Enforce")).await?;
    refused(&client.call(post()).await?, "authorization_denied");
    assert_eq!(client.get("pay.example", "/").await?.status, 200);
    rig.mesh.delete(v1::Kind::AuthorizationPolicy, "writes").await?;
    assert_eq!(client.call(post()).await?.status, 200);
    Ok(())
}

/// Signs tokens.
struct Issuer {
    pair: Ed25519KeyPair,
    kid: &'static str,
}

impl Issuer {
    fn new(kid: &'static str) -> anyhow::Result<Self> {
        let pair = Ed25519KeyPair::generate().context("no key")?;
        Ok(Self { pair, kid })
    }

    fn keys(of: &[&Self]) -> Behave {
        let keys: Vec<_> = of
            .iter()
            .map(|issuer| {
                let x = URL_SAFE_NO_PAD.encode(issuer.pair.public_key());
                json!({"kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": issuer.kid, "x": x})
            })
            .collect();
        Behave::Answer(Answer::text(&json!({"keys": keys}).to_string()))
    }

    fn token(&self, alg: &str, scope: &str, life: i64) -> String {
        #[expect(clippy::disallowed_methods, reason = "tokens end by the wall clock")]
        let now = SystemTime::now();
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let header = json!({"alg": alg, "kid": self.kid});
        let claims = json!({
            "iss": "https://issuer.example", "aud": "shop", "exp": now.saturating_add_signed(life), "scope": scope,
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&header), part(&claims));
        let signature = URL_SAFE_NO_PAD.encode(self.pair.sign(message.as_bytes()));
        format!("{message}.{signature}")
    }
}

fn bearing(host: &str, token: &str) -> Request<Body> {
    with_header(get(host, "/"), "authorization", &format!("Bearer {token}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_checked_by_keys_that_rotate_and_outlive_their_source() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let source = Backend::start("issuer")?;
    let (first, second) = (Issuer::new("first")?, Issuer::new("second")?);
    source.behave(Issuer::keys(&[&first]));
    let jwks = format!(
        "jwt: [{{issuer: \"https://issuer.example\", audiences: [shop], jwks: {{uri: \"http://{}/jwks.json\"}}}}]",
        source.address()
    );
    let spec = [
        "action: Allow",
        "rules: [{when: [{claim: scope, values: [pay]}]}]",
        &jwks,
    ];
    rig.mesh.apply(&policy("scopes", &spec)).await?;
    let client = rig.workload("a1", Protocol::Http2)?;
    let good = first.token("EdDSA", "read pay", 300);
    for host in HOSTS {
        passes_soon(&client, host, &good).await?;
        for _ in 0..3 {
            assert_eq!(client.call(bearing(host, &good)).await?.status, 200, "{host}");
        }
        let a_day_old = first.token("EdDSA", "pay", -86_400);
        let (other_scope, unsigned) = (
            first.token("EdDSA", "payments", 300),
            first.token("none", "pay", 300),
        );
        let shared = first.token("HS256", "pay", 300);
        let (head, _) = good.rsplit_once('.').context("no signature")?;
        for (token, why) in [
            (&*other_scope, None),
            (&*a_day_old, Some("expired")),
            (&*unsigned, Some("algorithm")),
            (&*shared, Some("algorithm")),
            (&*format!("{head}.AAAA"), Some("signature")),
            (head, Some("malformed")),
        ] {
            refused(&client.call(bearing(host, token)).await?, "authorization_denied");
            if let Some(why) = why {
                let told = format!("\"authorization_token\":\"{why}\"");
                rig.mesh.node("a1")?.process.logged(&told, SOON).await?;
            }
        }
        refused(&client.get(host, "/").await?, "authorization_denied");
        let twice = with_header(bearing(host, &good), "authorization", "Bearer x");
        refused(&client.call(twice).await?, "authorization_denied");
    }

    // Another key: the first token that names it has the keys fetched anew, and waits for that.
    source.behave(Issuer::keys(&[&second]));
    let fetches = source.requests();
    let new = second.token("EdDSA", "pay", 300);
    for host in HOSTS {
        passes_soon(&client, host, &new).await?;
        refused(&client.call(bearing(host, &good)).await?, "authorization_denied");
    }
    // Keys that nobody has don't have them fetched again and again.
    let nobody = Issuer::new("nobody")?;
    for _ in 0..20 {
        refused(
            &client
                .call(bearing("pay.example", &nobody.token("EdDSA", "pay", 300)))
                .await?,
            "authorization_denied",
        );
    }
    let more = source.requests() - fetches;
    assert!(
        (1..=2).contains(&more),
        "{more} fetches; each of two proxies may make one in 30 s"
    );

    // The source is gone, and the last good keys stay.
    source.stop().await;
    for host in HOSTS {
        let again = second.token("EdDSA", "pay", 600);
        assert_eq!(client.call(bearing(host, &again)).await?.status, 200, "{host}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_is_neither_retried_nor_answered_by_others() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    let ladder = |name: &str, on: &str| fallback(name, &["static: {status: 200, body: degraded}"], &[on]);
    let cached = "cache: {defaultTtl: 60s, staleIfError: 60s}";
    let retry = "retry: {maxAttempts: 3, retryOn: [5xx, RetriableStatusCodes], retriableStatusCodes: [403]}";
    let routes = ladder("others", "onStatuses: [403, 503]")
        + &ladder("named", "on: [AuthorizationDenied]")
        + &rules(
            "pay",
            "pay.example",
            &[
                &[
                    "matches: [{path: {prefix: /named}}]",
                    "backendRefs: [{service: pay}]",
                    "fallback: named",
                ],
                &[
                    "matches: [{path: {prefix: /kept}}]",
                    "backendRefs: [{service: pay}]",
                    cached,
                ],
                &["backendRefs: [{service: pay}]", "fallback: others", retry],
            ],
        );
    let allow = policy(
        "tenants",
        &[
            "services: [pay]",
            "action: Allow",
            "rules: [{when: [{header: x-tenant, values: [t1]}]}]",
        ],
    );
    rig.mesh.apply(&(routes + &allow)).await?;
    let client = rig.workload("a1", Protocol::Http1)?;
    let tenant = |path: &str, tenant: &str| with_header(get("pay.example", path), "x-tenant", tenant);
    let before = rig.requests();
    for _ in 0..20 {
        refused(&client.call(tenant("/", "t2")).await?, "authorization_denied");
    }
    assert_eq!(rig.requests(), before, "nothing was sent");
    let a1 = rig.mesh.node("a1")?;
    assert_eq!(
        count(a1, "leeward_endpoint_out", &[]).await?,
        0,
        "nothing is held against the endpoint"
    );
    assert_eq!(count(a1, "leeward_retries_total", &[]).await?, 0);
    // Two tenants at once are neither.
    let both = with_header(tenant("/", "t1"), "x-tenant", "t2");
    refused(&client.call(both).await?, "authorization_denied");
    // What a hop would take out is not there.
    let dropped = with_header(tenant("/", "t1"), "connection", "x-tenant");
    refused(&client.call(dropped).await?, "authorization_denied");
    assert_eq!(client.call(tenant("/", "t1")).await?.status, 200);
    // Policy may name it.
    assert_eq!(client.get("pay.example", "/named").await?.text(), "degraded");
    // What is kept is for those who may ask.
    rig.far.behave(Behave::Answer(
        Answer::text("kept").header("cache-control", "max-age=60"),
    ));
    assert_eq!(client.call(tenant("/kept", "t1")).await?.text(), "kept");
    assert_eq!(client.call(tenant("/kept", "t1")).await?.text(), "kept");
    refused(&client.get("pay.example", "/kept").await?, "authorization_denied");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_of_health_go_on_where_callers_are_kept_out() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let backend = Backend::start("app")?;
    let check = "healthCheck: {http: {path: \"/healthz\"}, interval: 100ms, unhealthyThreshold: 1, healthyThreshold: 1}";
    let text = service("app", &[(backend.address(), "b", "b1")], &[check])
        + &route("app", "app.example", "app", &[])
        + &policy("nobody", &["action: Allow"]);
    mesh.apply(&text).await?;
    let seen = backend.health_checks();
    eventually("checks", SOON, || async {
        ensure!(backend.health_checks() >= seen + 6, "{}", backend.health_checks());
        Ok(())
    })
    .await?;
    assert_eq!(count(mesh.node("a1")?, "leeward_endpoint_out", &[]).await?, 0);
    let client = mesh.workload("a1", Protocol::Http1)?;
    refused(&client.get("app.example", "/").await?, "authorization_denied");
    // The check's path is no way in.
    let asked = with_header(get("app.example", "/healthz"), "leeward-check", "1");
    refused(&client.call(asked).await?, "authorization_denied");
    mesh.delete(v1::Kind::AuthorizationPolicy, "nobody").await?;
    assert_eq!(client.get("app.example", "/").await?.status, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_identity_is_told_so() -> anyhow::Result<()> {
    let backend = Backend::start("app")?;
    let dir = TempDir::new()?;
    let files = dir.path().join("policy");
    std::fs::create_dir(&files)?;
    let zone = "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {}\n";
    let text = zone.to_owned()
        + &service("app", &[(backend.address(), "a", "")], &[])
        + &route("app", "app.example", "app", &[])
        + &policy(
            "zone-a",
            &[
                "action: Allow",
                "rules: [{from: [{zones: [a]}]}, {to: [{paths: [\"/open\"]}]}]",
            ],
        );
    std::fs::write(files.join("policy.yaml"), text)?;
    let args = [
        ["--zone", "a"],
        ["--name", "a1"],
        ["--policy", &files.display().to_string()],
        ["--outbound", "127.0.0.1:0"],
        ["--admin", "127.0.0.1:0"],
        ["--ofrep", "127.0.0.1:0"],
    ];
    let process = Process::start(
        "alone",
        &binaries::path("leeward-proxy")?,
        args.concat(),
        dir.path(),
    )
    .await?;
    let client = Client::new(process.address("outbound")?, Protocol::Http1);
    eventually("policy is live", SOON, || async {
        ensure!(client.get("app.example", "/open").await?.status == 200, "not yet");
        Ok(())
    })
    .await?;
    refused(&client.get("app.example", "/").await?, "identity_missing");
    let grpc = with_header(get("app.example", "/x.Y/Z"), "content-type", "application/grpc");
    assert_eq!(client.call(grpc).await?.header("grpc-status"), "16");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_at_apply() -> anyhow::Result<()> {
    let rig = Rig::start().await?;
    for (spec, want) in [
        (
            ["services: [gone]", "action: Allow"],
            "spec.services[0]: there is no Service/gone",
        ),
        (
            ["action: Deny", "rules: [{from: [{zones: [gone]}]}]"],
            "spec.rules[0].from[0].zones[0]: there is no Zone/gone",
        ),
        (
            ["action: Deny", "rules: [{to: [{routes: [gone]}]}]"],
            "spec.rules[0].to[0].routes[0]: there is no Route/gone",
        ),
        (["action: Deny", "mode: Enforce"], "spec.rules: is empty"),
    ] {
        let refusal = rig.mesh.apply_only(&policy("bad", &spec)).await.unwrap_err();
        assert!(format!("{refusal:#}").contains(want), "{refusal:#}");
    }
    // What a policy protects isn't taken away under it.
    rig.mesh
        .apply(&policy("pay", &["services: [pay]", "action: Allow"]))
        .await?;
    let refusal = rig.mesh.delete(v1::Kind::Service, "pay").await.unwrap_err();
    assert!(
        format!("{refusal:#}").contains("AuthorizationPolicy/pay (spec.services[0])"),
        "{refusal:#}"
    );
    Ok(())
}
