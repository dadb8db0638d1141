//! Backends do as they are told, or tests with them prove nothing.

use super::*;
use crate::client::{get, request};
use http::Method;

async fn statuses(backend: &Backend, count: usize) -> Vec<u16> {
    let client = Client::new(backend.address(), Protocol::Http1);
    let mut statuses = Vec::new();
    for _ in 0..count {
        statuses.push(client.get("a.example", "/").await.unwrap().status.as_u16());
    }
    statuses
}

#[tokio::test]
async fn a_share_of_requests_fails_and_the_same_ones_each_time() {
    let backend = Backend::start("a").unwrap();
    let mut runs = Vec::new();
    for seed in [7, 7, 8] {
        backend.behave(Behave::failing(0.3, 500, seed));
        runs.push(statuses(&backend, 100).await);
    }
    let failed = runs[0].iter().filter(|&&status| status == 500).count();
    assert!((15..45).contains(&failed), "{failed}");
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0], runs[2]);
    for (share, status) in [(0.0, 200), (1.0, 500)] {
        backend.behave(Behave::failing(share, 500, 1));
        assert_eq!(statuses(&backend, 20).await, [status; 20]);
    }
}

#[tokio::test]
async fn a_flapping_backend_goes_and_comes_back() {
    let backend = Backend::start("a").unwrap();
    backend.behave(Behave::flapping(Duration::from_secs(3600), 503));
    assert_eq!(statuses(&backend, 3).await, [200; 3], "it begins well");
    backend.behave(Behave::flapping(Duration::from_millis(20), 503));
    let ends = tokio::time::timeout(Duration::from_secs(20), async {
        for wanted in [200, 503, 200, 503] {
            while statuses(&backend, 1).await != [wanted] {}
        }
    });
    ends.await.unwrap();
}

#[tokio::test]
async fn what_is_done_depends_on_the_path() {
    let backend = Backend::start("a").unwrap();
    let slow = Behave::LateBetween {
        least: Duration::from_millis(1),
        most: Duration::from_millis(3),
        seed: 1,
        answer: Answer::text("late"),
    };
    backend.behave(Behave::ByPath {
        paths: vec![
            ("/slow".into(), slow),
            ("/bad".into(), Behave::failing(1.0, 500, 1)),
        ],
        other: Box::new(Behave::Answer(Answer::status(204))),
    });
    let client = Client::new(backend.address(), Protocol::Http2);
    let status = async |path| client.get("a.example", path).await.unwrap().status.as_u16();
    assert_eq!(client.get("a.example", "/slow?a=b").await.unwrap().body, "late");
    assert_eq!(status("/bad").await, 500);
    assert_eq!(status("/bad/not").await, 204);
}

#[tokio::test]
async fn health_is_told_whatever_is_done_with_requests() {
    let backend = Backend::start("a").unwrap();
    backend.behave(Behave::Hang);
    let http = Client::new(backend.address(), Protocol::Http1);
    let grpc = Client::new(backend.address(), Protocol::Http2);
    for (healthy, status, serving) in [(true, 200, 1), (false, 503, 2), (true, 200, 1)] {
        backend.set_health(healthy);
        let reply = http.get("a.example", "/healthz").await.unwrap();
        assert_eq!(reply.status, status);
        let check = request(
            Method::POST,
            "a.example",
            "/grpc.health.v1.Health/Check",
            bytes_body(vec![0; 5]),
        );
        let reply = grpc.call(check).await.unwrap();
        assert_eq!(&reply.body[..], [0, 0, 0, 0, 2, 8, serving]);
        assert_eq!(reply.trailers.unwrap()["grpc-status"], "0");
    }
    assert_eq!((backend.requests(), backend.health_checks()), (0, 6));
    assert!(backend.take_seen().is_empty());
}

#[tokio::test]
async fn requests_are_counted_by_a_header() {
    let backend = Backend::start("a").unwrap();
    let client = Client::new(backend.address(), Protocol::Http1);
    let send = async |caller: Option<&'static str>| {
        let mut request = get("a.example", "/");
        if let Some(caller) = caller {
            let caller = HeaderValue::from_static(caller);
            request.headers_mut().insert("x-caller", caller);
        }
        client.call(request).await.unwrap();
    };
    send(Some("ann")).await;
    assert!(backend.counts().is_empty(), "not before it is asked to");
    backend.count_by("X-Caller");
    for caller in [Some("ann"), Some("bob"), None, Some("ann")] {
        send(caller).await;
    }
    let counts = [("", 1), ("ann", 2), ("bob", 1)].map(|(value, n)| (value.to_owned(), n));
    assert_eq!(backend.counts(), BTreeMap::from(counts));
    backend.count_by("x-caller");
    assert!(backend.counts().is_empty(), "it begins anew");
    assert_eq!(backend.requests(), 5);
}
