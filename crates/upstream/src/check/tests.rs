//! Checks over real sockets. No test waits for a time to pass, only for what must happen.

mod server;

use super::*;
use ask::{Finding, ask};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use leeward_identity::SpiffeId;
use leeward_identity::authority::Authority;
use leeward_policy::Via;
use leeward_policy::model::CheckKind;
use server::{Reply, Server, status};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// Longer than anything here takes: a test that waits this long has failed.
const LONG: Duration = Duration::from_secs(20);

/// What a [`Recorder`] was told, with the service's name.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Told {
    Passed(String),
    Failed(String, String),
    Healthy(String),
    Unhealthy(String, String),
}

struct Recorder(mpsc::UnboundedSender<Told>);

impl Verdicts for Recorder {
    fn checked(&self, key: &EndpointKey, passed: Result<(), &CheckFailure>) {
        let service = key.service.to_string();
        let _ = self.0.send(match passed {
            Ok(()) => Told::Passed(service),
            Err(failure) => Told::Failed(service, failure.to_string()),
        });
    }

    fn verdict(&self, key: &EndpointKey, healthy: bool, why: Option<&CheckFailure>) {
        let service = key.service.to_string();
        assert_eq!(healthy, why.is_none());
        let _ = self.0.send(match why {
            None => Told::Healthy(service),
            Some(why) => Told::Unhealthy(service, why.to_string()),
        });
    }
}

struct Ear(mpsc::UnboundedReceiver<Told>);

impl Ear {
    async fn next(&mut self) -> Told {
        let told = tokio::time::timeout(LONG, self.0.recv()).await;
        told.expect("nothing was told").expect("the checker has ended")
    }

    async fn until(&mut self, wanted: impl Fn(&Told) -> bool) {
        while !wanted(&self.next().await) {}
    }
}

fn checker(max_under_way: usize) -> (Checker, Ear) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let checker = Checker::bounded(None, Arc::new(Recorder(sender)), max_under_way);
    (checker, Ear(receiver))
}

fn http(path: &str) -> CheckKind {
    CheckKind::Http {
        path: path.into(),
        host: None,
        expected_statuses: Vec::new(),
    }
}

fn grpc_about(service: &str) -> CheckKind {
    CheckKind::Grpc {
        service: service.into(),
    }
}

fn subject(service: &str, address: SocketAddr, kind: CheckKind) -> Subject {
    Subject {
        key: EndpointKey {
            service: service.into(),
            address,
            via: Via::Direct,
        },
        address_text: address.to_string().into(),
        protocol: Protocol::Http1,
        gateways: Arc::default(),
        check: HealthCheck {
            kind,
            interval: Duration::from_millis(10),
            timeout: LONG,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
            interval_jitter: 0,
        },
    }
}

async fn asked(subject: &Subject) -> Result<Finding, CheckFailure> {
    ask(subject, None).await
}

/// A port that nobody listens on.
async fn refusing() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn an_endpoint_goes_and_comes_back_after_as_many_checks_as_the_policy_says() {
    let script = [200, 200, 500, 500, 500, 500, 200, 500, 200, 200];
    let server = Server::start(Protocol::Http1, move |n, _| {
        status(script.get(n).copied().unwrap_or(200))
    })
    .await;
    let (checker, mut ear) = checker(1);
    checker.update(vec![subject("a", server.address, http("/"))]);
    let passed = || Told::Passed("a".into());
    let failed = || Told::Failed("a".into(), "the status is 500".into());
    let healthy = || Told::Healthy("a".into());
    let unhealthy = || Told::Unhealthy("a".into(), "the status is 500".into());
    let wanted = [
        passed(),
        healthy(),
        passed(),
        failed(),
        failed(),
        failed(),
        unhealthy(),
        failed(),
        passed(),
        failed(),
        passed(),
        passed(),
        healthy(),
        passed(),
    ];
    for (at, wanted) in wanted.into_iter().enumerate() {
        assert_eq!(ear.next().await, wanted, "{at}");
    }
}

#[tokio::test]
async fn each_check_makes_a_connection_of_its_own() {
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let server = Server::start(protocol, |_, _| status(200)).await;
        let mut subject = subject("a", server.address, http("/"));
        subject.protocol = protocol;
        for n in 1..=3 {
            assert_eq!(asked(&subject).await.unwrap(), Finding::Pass);
            assert_eq!((server.connections(), server.requests()), (n, n));
        }
    }
}

#[tokio::test]
async fn requests_are_those_that_the_policy_describes() {
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let server = Server::start(protocol, |_, _| status(200)).await;
        let mut subject = subject("books", server.address, http("/ready?deep=1"));
        subject.protocol = protocol;
        asked(&subject).await.unwrap();
        let seen = server.last();
        assert_eq!(
            (seen.method.as_str(), seen.path.as_str()),
            ("GET", "/ready?deep=1")
        );
        assert_eq!(seen.host, "books");
        assert_eq!(seen.headers["user-agent"], "leeward-health-check");
        assert!(
            !seen.headers.contains_key("leeward-endpoint"),
            "workloads see nothing of the mesh's own"
        );
        let (version, closes) = match protocol {
            Protocol::Http1 | Protocol::Tcp => (Version::HTTP_11, true),
            Protocol::Http2 => (Version::HTTP_2, false),
        };
        assert_eq!(
            (seen.version, seen.headers.contains_key("connection")),
            (version, closes)
        );
        subject.check.kind = CheckKind::Http {
            path: "/".into(),
            host: Some("other.example".into()),
            expected_statuses: Vec::new(),
        };
        asked(&subject).await.unwrap();
        assert_eq!(server.last().host, "other.example");
    }
}

#[tokio::test]
async fn a_status_passes_if_the_policy_expects_it() {
    let passes = async |expected: &[u16], got: u16| {
        let server = Server::start(Protocol::Http1, move |_, _| status(got)).await;
        let kind = CheckKind::Http {
            path: "/".into(),
            host: None,
            expected_statuses: expected.to_vec(),
        };
        match asked(&subject("a", server.address, kind)).await {
            Ok(Finding::Pass) => true,
            Err(CheckFailure::Status(said)) if said == got => false,
            other => panic!("{other:?}"),
        }
    };
    assert!(passes(&[], 200).await && passes(&[], 299).await);
    assert!(!passes(&[], 301).await && !passes(&[], 503).await);
    assert!(passes(&[204, 418], 418).await);
    assert!(!passes(&[204, 418], 200).await);
}

#[tokio::test]
async fn who_does_not_answer_fails_when_its_time_is_up() {
    let limit = Duration::from_millis(30);
    for (protocol, kind) in [
        (Protocol::Http1, http("/")),
        (Protocol::Http2, http("/")),
        (Protocol::Http2, grpc_about("")),
    ] {
        let server = Server::start(protocol, |_, _| Reply::Never).await;
        let mut subject = subject("a", server.address, kind);
        subject.protocol = protocol;
        subject.check.timeout = limit;
        let failure = asked(&subject).await.unwrap_err();
        assert!(
            matches!(failure, CheckFailure::Timeout { limit: l } if l == limit),
            "{failure:?}"
        );
    }
}

#[tokio::test]
async fn a_tcp_check_wants_a_connection_and_nothing_more() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let open = subject("a", address, CheckKind::Tcp);
    assert_eq!(asked(&open).await.unwrap(), Finding::Pass);
    let shut = subject("a", refusing().await, CheckKind::Tcp);
    let failure = asked(&shut).await.unwrap_err();
    assert!(
        matches!(&failure, CheckFailure::Connect { to, source }
            if *to == shut.key.address && source.kind() == std::io::ErrorKind::ConnectionRefused),
        "{failure:?}"
    );
}

#[tokio::test]
async fn who_hangs_up_or_speaks_something_else_fails() {
    use tokio::io::AsyncWriteExt;
    for said in [&b""[..], b"220 mail.example ready\r\n"] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.write_all(said).await;
            }
        });
        for kind in [http("/"), grpc_about("")] {
            let failure = asked(&subject("a", address, kind)).await.unwrap_err();
            assert!(matches!(failure, CheckFailure::Reset { .. }), "{failure:?}");
        }
        serving.abort();
    }
}

#[tokio::test]
async fn what_makes_no_request_is_said_to() {
    let address = refusing().await;
    let failure = asked(&subject("a", address, http("no path"))).await.unwrap_err();
    assert!(matches!(failure, CheckFailure::Request { .. }), "{failure:?}");
}

/// An answer of a gRPC server: a message, and then trailers.
fn grpc_answer(message: &'static [u8], status: Option<&'static str>) -> Reply {
    let mut trailers = HeaderMap::new();
    if let Some(status) = status {
        trailers.insert("grpc-status", HeaderValue::from_static(status));
    }
    let body = Full::new(Bytes::from_static(message)).with_trailers(async { Some(Ok(trailers)) });
    Reply::now(Response::new(body.boxed()))
}

/// One that is only a head.
fn trailers_only(status: &'static str) -> Reply {
    let answer = Response::builder().header("grpc-status", status);
    Reply::now(answer.body(Full::default().boxed()).unwrap())
}

#[tokio::test]
async fn a_health_service_is_asked_as_grpc_says_and_believed() {
    const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
    let serving = Server::start(Protocol::Http2, |_, _| grpc_answer(SERVING, Some("0"))).await;
    // That the service speaks HTTP/1.1 is no matter.
    let subject = subject("books", serving.address, grpc_about("a.Books"));
    assert_eq!(asked(&subject).await.unwrap(), Finding::Pass);
    let seen = serving.last();
    assert_eq!(
        (seen.method.as_str(), seen.path.as_str(), seen.host.as_str()),
        ("POST", "/grpc.health.v1.Health/Check", "books")
    );
    assert_eq!(seen.headers["content-type"], "application/grpc");
    assert_eq!(seen.headers["te"], "trailers");
    assert_eq!(seen.body, [&[0, 0, 0, 0, 9, 0x0a, 7][..], b"a.Books"].concat());
}

#[tokio::test]
async fn every_other_answer_of_a_health_service_fails_and_says_why() {
    const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
    const NOT_SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 2];
    const EMPTY: &[u8] = &[0, 0, 0, 0, 0];
    static LONG_MESSAGE: [u8; 5000] = [0; 5000];
    type Case = (fn() -> Reply, &'static str);
    let cases: [Case; 10] = [
        (
            || grpc_answer(NOT_SERVING, Some("0")),
            "the health service says NOT_SERVING",
        ),
        (
            || grpc_answer(EMPTY, Some("0")),
            "the health service says UNKNOWN",
        ),
        (|| trailers_only("12"), "unimplemented"),
        (|| trailers_only("5"), "not found"),
        (|| grpc_answer(SERVING, Some("14")), "the grpc status is 14"),
        (|| grpc_answer(SERVING, None), "no grpc-status"),
        (|| grpc_answer(&[], Some("0")), "no message"),
        (|| grpc_answer(&LONG_MESSAGE, Some("0")), "too long"),
        (|| trailers_only("ok"), "no number"),
        (|| status(404), "the status is 404"),
    ];
    for (answer, wanted) in cases {
        let server = Server::start(Protocol::Http2, move |_, _| answer()).await;
        let failure = asked(&subject("a", server.address, grpc_about("")))
            .await
            .unwrap_err();
        assert!(failure.to_string().contains(wanted), "{wanted}: {failure}");
    }
}

/// Two proxies that trust each other: the one that asks, and the one in front of the endpoint.
struct Pair {
    here: Arc<Identity>,
    there: Arc<Identity>,
    dir: PathBuf,
}

impl Pair {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("leeward-check-{}-{n}", std::process::id()));
        let authority = Authority::create(&dir.join("ca"), "mesh").unwrap();
        let issued = |zone, name| {
            let out = dir.join(name);
            let id = SpiffeId::proxy("mesh", zone, name).unwrap();
            authority.issue(&id, Duration::from_secs(3600), &out).unwrap();
            Identity::load(out).unwrap()
        };
        Self {
            here: issued("a", "here"),
            there: issued("b", "there"),
            dir,
        }
    }

    fn subject(&self, proxy: SocketAddr, protocol: Protocol, kind: CheckKind) -> Subject {
        let mut subject = subject("books", SocketAddr::from(([10, 0, 0, 1], 80)), kind);
        subject.protocol = protocol;
        subject.key.via = Via::Proxy {
            address: proxy,
            zone: "b".into(),
            name: "there".into(),
        };
        subject
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn said_by_proxy(word: &'static str) -> Reply {
    let answer = Response::builder()
        .status(StatusCode::SERVICE_UNAVAILABLE)
        .header("leeward-reason", word);
    Reply::now(answer.body(Full::default().boxed()).unwrap())
}

#[tokio::test]
async fn an_endpoint_behind_a_proxy_is_asked_through_it() {
    let pair = Pair::new();
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let proxy = Server::start_tls(&pair.there, |_, _| status(200)).await;
        for (kind, method) in [(http("/ready"), "GET"), (CheckKind::Tcp, "HEAD")] {
            let subject = pair.subject(proxy.address, protocol, kind);
            let found = ask(&subject, Some(&pair.here)).await.unwrap();
            assert_eq!(found, Finding::Pass);
            let seen = proxy.last();
            assert_eq!(seen.method, method);
            assert_eq!(seen.headers["leeward-endpoint"], "books/10.0.0.1:80");
            let version = match protocol {
                Protocol::Http1 | Protocol::Tcp => Version::HTTP_11,
                Protocol::Http2 => Version::HTTP_2,
            };
            assert_eq!(seen.version, version);
        }
    }
    let proxy = Server::start_tls(&pair.there, |_, _| grpc_answer(&[0, 0, 0, 0, 2, 8, 1], Some("0"))).await;
    let subject = pair.subject(proxy.address, Protocol::Http1, grpc_about(""));
    assert_eq!(ask(&subject, Some(&pair.here)).await.unwrap(), Finding::Pass);
}

#[tokio::test]
async fn what_a_proxy_says_of_an_endpoint_counts() {
    let pair = Pair::new();
    let ask_about = async |word: &'static str, kind: &CheckKind| {
        let proxy = Server::start_tls(&pair.there, move |_, _| said_by_proxy(word)).await;
        let subject = pair.subject(proxy.address, Protocol::Http2, kind.clone());
        ask(&subject, Some(&pair.here)).await
    };
    // That 503 is expected makes no difference: it isn't the workload's.
    let expects_503 = CheckKind::Http {
        path: "/".into(),
        host: None,
        expected_statuses: vec![503],
    };
    for kind in [expects_503, grpc_about(""), CheckKind::Tcp] {
        for word in [
            "connect_failure",
            "no_endpoint",
            "unknown_endpoint",
            "bad_request",
        ] {
            let failure = ask_about(word, &kind).await.unwrap_err();
            assert!(matches!(failure, CheckFailure::ByProxy(_)), "{word}: {failure:?}");
        }
        for word in ["timeout", "reset"] {
            // A connection was made, and a TCP check wants no more.
            match (ask_about(word, &kind).await, &kind) {
                (Ok(Finding::Pass), CheckKind::Tcp) => {}
                (Err(CheckFailure::ByProxy(reason)), CheckKind::Http { .. } | CheckKind::Grpc { .. }) => {
                    assert_eq!(reason.as_str(), word);
                }
                other => panic!("{word}: {other:?}"),
            }
        }
        for word in ["overflow", "overloaded"] {
            assert_eq!(ask_about(word, &kind).await.unwrap(), Finding::Nothing);
        }
    }
}

#[tokio::test]
async fn a_workload_that_is_asked_straight_cannot_speak_as_a_proxy() {
    let server = Server::start(Protocol::Http1, |_, _| said_by_proxy("overflow")).await;
    let failure = asked(&subject("a", server.address, http("/"))).await.unwrap_err();
    assert!(matches!(failure, CheckFailure::Status(503)), "{failure:?}");
}

#[tokio::test]
async fn nobody_is_asked_through_a_proxy_that_is_not_the_one_meant() {
    let pair = Pair::new();
    let proxy = Server::start_tls(&pair.there, |_, _| status(200)).await;
    let mut subject = pair.subject(proxy.address, Protocol::Http2, http("/"));
    let failure = ask(&subject, None).await.unwrap_err();
    assert!(
        matches!(failure, CheckFailure::Tls { .. }),
        "no identity: {failure:?}"
    );
    if let Via::Proxy { name, .. } = &mut subject.key.via {
        *name = "another".into();
    }
    let failure = ask(&subject, Some(&pair.here)).await.unwrap_err();
    assert!(matches!(failure, CheckFailure::Tls { .. }), "{failure:?}");
    assert_eq!(proxy.requests(), 0);
}

#[tokio::test]
async fn a_proxys_own_limits_count_for_nothing() {
    let pair = Pair::new();
    let proxy = Server::start_tls(&pair.there, |n, _| match n {
        0..5 => said_by_proxy("overflow"),
        _ => status(200),
    })
    .await;
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut ear = Ear(receiver);
    let checker = Checker::new(Some(Arc::clone(&pair.here)), Arc::new(Recorder(sender)));
    checker.update(vec![pair.subject(proxy.address, Protocol::Http2, http("/"))]);
    assert_eq!(ear.next().await, Told::Passed("books".into()));
    assert!(proxy.requests() > 5);
}

#[tokio::test]
async fn an_update_leaves_alone_what_is_as_before() {
    let server = Server::start(Protocol::Http1, |_, _| status(500)).await;
    let (checker, mut ear) = checker(8);
    let same = subject("a", server.address, http("/"));
    checker.update(vec![same.clone()]);
    let watch = Arc::clone(&checker.watches().by_key[&same.key].watch);
    let failed = Told::Failed("a".into(), "the status is 500".into());
    for _ in 0..3 {
        // Were it to start anew, three failures would never come together.
        assert_eq!(ear.next().await, failed);
        checker.update(vec![same.clone()]);
        assert!(Arc::ptr_eq(&watch, &checker.watches().by_key[&same.key].watch));
    }
    assert_eq!(
        ear.next().await,
        Told::Unhealthy("a".into(), "the status is 500".into())
    );
}

#[tokio::test]
async fn what_is_gone_is_asked_no_longer_and_not_held_back() {
    let server = Server::start(Protocol::Http1, |_, seen| {
        status(if seen.host == "a" { 500 } else { 200 })
    })
    .await;
    let (checker, mut ear) = checker(8);
    let (a, b) = (
        subject("a", server.address, http("/")),
        subject("b", server.address, http("/")),
    );
    checker.update(vec![a, b.clone()]);
    ear.until(|told| matches!(told, Told::Unhealthy(..))).await;
    checker.update(vec![b]);
    ear.until(|told| *told == Told::Healthy("a".into())).await;
    for _ in 0..10 {
        assert_eq!(ear.next().await, Told::Passed("b".into()));
    }
}

#[tokio::test]
async fn a_changed_check_starts_anew_but_puts_nothing_back_by_itself() {
    let well = Arc::new(AtomicBool::new(false));
    let server = Server::start(Protocol::Http1, {
        let well = Arc::clone(&well);
        move |_, _| status(if well.load(Ordering::Relaxed) { 200 } else { 500 })
    })
    .await;
    let (checker, mut ear) = checker(8);
    let mut changing = subject("a", server.address, http("/"));
    checker.update(vec![changing.clone()]);
    ear.until(|told| matches!(told, Told::Unhealthy(..))).await;
    changing.check.kind = http("/other");
    checker.update(vec![changing.clone()]);
    let failed = Told::Failed("a".into(), "the status is 500".into());
    let unhealthy = Told::Unhealthy("a".into(), "the status is 500".into());
    // Some checks of the old one may have been told before the update.
    ear.until(|told| {
        assert!([&failed, &unhealthy].contains(&told), "{told:?}");
        *told == unhealthy
    })
    .await;
    assert_eq!(server.last().path, "/other");
    changing.check.kind = http("/third");
    checker.update(vec![changing]);
    well.store(true, Ordering::Relaxed);
    ear.until(|told| *told == Told::Passed("a".into())).await;
    assert_eq!(
        ear.next().await,
        Told::Healthy("a".into()),
        "the first pass is enough"
    );
}

#[tokio::test]
async fn a_dropped_checker_leaves_nothing_behind() {
    let hanging = Server::start(Protocol::Http2, |_, _| Reply::Never).await;
    let server = Server::start(Protocol::Http1, |_, _| status(200)).await;
    let (checker, mut ear) = checker(8);
    let mut stuck = subject("stuck", hanging.address, http("/"));
    stuck.protocol = Protocol::Http2;
    checker.update(vec![stuck, subject("a", server.address, http("/"))]);
    ear.until(|told| *told == Told::Passed("a".into())).await;
    hanging.asked(1).await;
    drop(checker);
    // What is told ends: nobody is left to tell it.
    let told_out = async { while ear.0.recv().await.is_some() {} };
    tokio::time::timeout(LONG, told_out).await.unwrap();
    // And the check under way has hung up, with all its tasks.
    hanging.left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_checks_than_allowed_are_under_way() {
    const ALLOWED: usize = 2;
    let server = Server::start(Protocol::Http1, |_, _| Reply::Slow(Duration::from_millis(5))).await;
    let (checker, mut ear) = checker(ALLOWED);
    let names: Vec<String> = (0..8).map(|n| format!("s{n}")).collect();
    checker.update(
        names
            .iter()
            .map(|name| subject(name, server.address, http("/")))
            .collect(),
    );
    let mut asked = std::collections::HashSet::new();
    while asked.len() < names.len() {
        if let Told::Passed(name) = ear.next().await {
            asked.insert(name);
        }
    }
    assert!(server.most_at_once() <= ALLOWED);
}
