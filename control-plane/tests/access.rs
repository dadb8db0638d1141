//! Who may do what with the control plane, and what is put down of it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

#[path = "support/http.rs"]
mod http_client;
mod support;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http_client::Http;
use leeward_control::OidcSettings;
use leeward_control::push::Timing;
use leeward_proto::v1;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};
use support::{SOON, Site, Stream, apply, eventually, hello, reference, service, zone};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tonic::Code;
use tonic_types::StatusExt;
use v1::audit_service_client::AuditServiceClient;
use v1::watch_event::Event;

/// Ada holds breakglass and reads; Eve edits services of team a; Rob reads everything; Olga operates.
const TEAMS: &str = r#"
apiVersion: leeward.dev/v1
kind: AccessPolicy
metadata: {name: teams}
spec:
  bindings:
    - {role: Breakglass, subjects: [{user: ada}]}
    - {role: Reader, subjects: [{user: "rob*"}, {user: ada}]}
    - {role: Editor, subjects: [{user: eve}, {oidcUser: "eve@example.com"}], kinds: [Service], selector: "team=a"}
    - {role: Operator, subjects: [{user: olga}, {group: sre}]}
"#;

fn of_team(name: &str, port: u16, team: &str) -> String {
    service(name, port).replace("metadata: {", &format!("metadata: {{labels: {{team: {team}}}, "))
}

#[track_caller]
fn check<T: std::fmt::Debug>(answer: Result<T, tonic::Status>, code: Code, reason: &str) {
    let status = answer.unwrap_err();
    let details = status
        .get_details_error_info()
        .unwrap_or_else(|| panic!("{status:?}"));
    assert_eq!(
        (status.code(), details.reason.as_str()),
        (code, reason),
        "{status:?}"
    );
    assert_eq!(details.domain, "leeward.dev");
}

fn get(kind: v1::Kind, name: &str) -> v1::GetRequest {
    v1::GetRequest {
        r#ref: Some(reference(kind, name)),
    }
}

fn delete(kind: v1::Kind, name: &str) -> v1::DeleteRequest {
    v1::DeleteRequest {
        r#ref: Some(reference(kind, name)),
        ..v1::DeleteRequest::default()
    }
}

fn dry(text: &str) -> v1::ApplyRequest {
    v1::ApplyRequest {
        dry_run: true,
        ..apply(text)
    }
}

#[tokio::test]
async fn roles_hold_for_kinds_and_labels() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let api = |user: &str, reason| site.api_of(control.address, user, reason);
    let (mut ada, mut eve, mut rob) = (api("ada", None), api("eve", None), api("rob-1", None));
    let mesh = zone("a") + &of_team("cart", 80, "a") + &of_team("pay", 81, "b");
    // Without a policy everybody may.
    eve.apply(apply(&mesh)).await.unwrap();
    // The first can't lock out everybody, nor whoever writes it.
    let nobody = TEAMS.replace(
        "{role: Breakglass, subjects: [{user: ada}]}",
        "{role: Operator, subjects: [{user: ada}]}",
    );
    check(
        ada.apply(apply(&nobody)).await,
        Code::FailedPrecondition,
        "LOCKOUT",
    );
    check(eve.apply(apply(TEAMS)).await, Code::FailedPrecondition, "LOCKOUT");
    ada.apply(apply(TEAMS)).await.unwrap();

    // Breakglass takes a reason.
    check(
        ada.apply(apply(&zone("b"))).await,
        Code::PermissionDenied,
        "REASON_REQUIRED",
    );
    let mut loud = api("ada", Some("zone b is on fire"));
    loud.apply(apply(&zone("b"))).await.unwrap();
    check(
        loud.delete(delete(v1::Kind::AccessPolicy, "nothing")).await,
        Code::NotFound,
        "RESOURCE_NOT_FOUND",
    );
    check(
        loud.apply(apply(&nobody)).await,
        Code::FailedPrecondition,
        "LOCKOUT",
    );

    // Who is not named may do nothing.
    check(
        api("bob", Some("please")).get(get(v1::Kind::Zone, "a")).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );

    // An editor stays within labels, before and after.
    let manager = |text: &str| v1::ApplyRequest {
        force: true,
        ..apply(text)
    };
    eve.apply(manager(&of_team("cart", 82, "a"))).await.unwrap();
    eve.apply(apply(&of_team("new", 1, "a"))).await.unwrap();
    check(
        eve.apply(manager(&of_team("cart", 82, "b"))).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    check(
        eve.apply(manager(&of_team("pay", 82, "a"))).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    check(
        eve.apply(apply(&zone("c"))).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    check(
        eve.delete(delete(v1::Kind::Service, "pay")).await,
        Code::NotFound,
        "RESOURCE_NOT_FOUND",
    );
    eve.delete(delete(v1::Kind::Service, "new")).await.unwrap();
    // And sees no more than that.
    check(
        eve.get(get(v1::Kind::Service, "pay")).await,
        Code::NotFound,
        "RESOURCE_NOT_FOUND",
    );
    check(
        eve.get(get(v1::Kind::Zone, "a")).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    let seen = eve
        .list(v1::ListRequest::default())
        .await
        .unwrap()
        .into_inner()
        .resources;
    let seen: Vec<_> = seen.into_iter().map(|r| r.metadata.unwrap().name).collect();
    assert_eq!(seen, ["cart"]);
    check(
        eve.diff(dry(&of_team("pay", 9, "a"))).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );

    // A reader tries everything and does nothing.
    let tried = v1::ApplyRequest {
        dry_run: true,
        ..manager(&of_team("pay", 9, "a"))
    };
    rob.apply(tried.clone()).await.unwrap();
    assert_eq!(rob.diff(tried).await.unwrap().into_inner().changes.len(), 1);
    check(
        rob.apply(apply(&of_team("pay", 9, "a"))).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    check(
        rob.delete(delete(v1::Kind::Service, "pay")).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );

    // Who operates holds levels and does not write who may do what.
    let mut olga = api("olga", Some("because"));
    olga.apply(apply(&zone("d"))).await.unwrap();
    check(
        olga.apply(apply(&TEAMS.replace("olga", "olga*"))).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );

    // Proxies know nothing of it.
    let mut stream = Stream::open(&site.push(control.address, "p1"), hello("p1"))
        .await
        .unwrap();
    let updates = stream.change().await;
    assert!(!support::names(&updates).contains(&"teams"), "{updates:?}");
    control.stop().await;
}

/// One who sees a part is told of that part: what comes into it, and what leaves it.
#[tokio::test]
async fn a_watch_shows_what_may_be_seen() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut ada = site.api_of(control.address, "ada", Some("setting up"));
    ada.apply(apply(
        &(zone("a") + &of_team("cart", 80, "a") + &of_team("pay", 81, "b")),
    ))
    .await
    .unwrap();
    ada.apply(apply(TEAMS)).await.unwrap();
    let mut eve = site.api_of(control.address, "eve", None);
    let watch = |after_revision| v1::WatchRequest {
        after_revision,
        ..v1::WatchRequest::default()
    };
    let mut begun = eve.watch(watch(0)).await.unwrap().into_inner();
    let mut resumed = eve.watch(watch(2)).await.unwrap().into_inner();
    let until = async |events: &mut tonic::Streaming<v1::WatchEvent>, revision: u64| {
        let mut told = Vec::new();
        loop {
            let event = tokio::time::timeout(SOON, events.message())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            match event.event.unwrap() {
                Event::Put(resource) => told.push(format!("put {}", resource.metadata.unwrap().name)),
                Event::Deleted(named) => told.push(format!("deleted {}", named.name)),
                Event::Synced(to) if to >= revision => return told,
                Event::Synced(_) => {}
            }
        }
    };
    assert_eq!(until(&mut begun, 2).await, ["put cart"]);
    assert!(until(&mut resumed, 2).await.is_empty());
    ada.apply(apply(&of_team("pay", 82, "a"))).await.unwrap();
    assert_eq!(until(&mut begun, 3).await, ["put pay"]);
    assert_eq!(until(&mut resumed, 3).await, ["put pay"]);
    ada.apply(apply(&of_team("cart", 80, "c"))).await.unwrap();
    assert_eq!(
        until(&mut resumed, 4).await,
        ["deleted cart"],
        "it was in view when the watch was resumed"
    );
    ada.delete(delete(v1::Kind::Service, "cart")).await.unwrap();
    assert!(
        until(&mut resumed, 5).await.is_empty(),
        "what is out of view is not told of"
    );
    // When what may be seen changes, the watch ends.
    ada.apply(apply(&TEAMS.replace("team=a", "team=b")))
        .await
        .unwrap();
    let ended = loop {
        match tokio::time::timeout(SOON, resumed.message()).await.unwrap() {
            Ok(Some(_)) => {}
            ended => break ended,
        }
    };
    check(ended, Code::Aborted, "ACCESS_CHANGED");
    control.stop().await;
}

#[tokio::test]
async fn what_was_done_and_what_was_refused_is_put_down() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut ada = site.api_of(control.address, "ada", Some("INC-7"));
    ada.apply(apply(&(zone("a") + &of_team("cart", 80, "a"))))
        .await
        .unwrap();
    ada.apply(apply(TEAMS)).await.unwrap();
    ada.apply(apply(&of_team("cart", 81, "a"))).await.unwrap();
    ada.apply(dry(&of_team("cart", 82, "a"))).await.unwrap();
    let mut rob = site.api_of(control.address, "rob", None);
    rob.get(get(v1::Kind::Zone, "a")).await.unwrap();
    check(
        rob.delete(delete(v1::Kind::Zone, "a")).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    let mut eve = site.api_of(control.address, "eve", None);
    check(
        eve.get(get(v1::Kind::Zone, "a")).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    eve.delete(delete(v1::Kind::Service, "cart")).await.unwrap();

    let mut audit = AuditServiceClient::new(site.channel(control.address, "rob"));
    let mut list =
        async |request: v1::ListAuditRequest| audit.list_audit(request).await.unwrap().into_inner();
    let all = v1::ListAuditRequest::default();
    eventually("both refusals are kept", async || {
        list(all.clone()).await.entries.len() == 7
    })
    .await;
    let entries = list(all.clone()).await.entries;
    let shown = |entry: &v1::AuditEntry| {
        let who = entry.who.rsplit('/').next().unwrap_or_default().to_owned();
        let changes: Vec<_> = entry
            .changes
            .iter()
            .map(|c| (c.r#ref.clone().unwrap().name, c.before, c.after))
            .collect();
        (
            who,
            entry.method.rsplit('/').next().unwrap_or_default().to_owned(),
            entry.outcome.clone(),
            changes,
        )
    };
    let mut told: Vec<_> = entries.iter().map(shown).collect();
    // What happens in one millisecond has no order.
    told.sort();
    let change = |name: &str, before, after| (name.to_owned(), before, after);
    let mut want = vec![
        (
            "ada",
            "Apply",
            "OK",
            vec![change("a", 0, 1), change("cart", 0, 1)],
        ),
        ("ada", "Apply", "OK", vec![change("teams", 0, 2)]),
        ("ada", "Apply", "OK", vec![change("cart", 1, 3)]),
        // A dry run by breakglass is put down; it was loud.
        ("ada", "Apply", "OK", vec![]),
        ("rob", "Delete", "PERMISSION_DENIED", vec![]),
        ("eve", "Get", "PERMISSION_DENIED", vec![]),
        ("eve", "Delete", "OK", vec![change("cart", 3, 0)]),
    ];
    want.sort();
    let want: Vec<_> = want
        .into_iter()
        .map(|(a, b, c, d)| (a.to_owned(), b.to_owned(), c.to_owned(), d))
        .collect();
    assert_eq!(told, want);
    let loud: Vec<_> = entries.iter().filter(|entry| entry.breakglass).collect();
    assert_eq!(loud.len(), 2, "before the policy nobody held it: {entries:?}");
    for entry in &entries {
        assert!(
            entry.from.starts_with("127.0.0.1:") && entry.user_agent.contains("tonic"),
            "{entry:?}"
        );
        assert_eq!(
            entry.reason,
            if entry.who.ends_with("ada") { "INC-7" } else { "" }
        );
    }
    // Filters and pages.
    let cart = v1::ListAuditRequest {
        resource: Some(reference(v1::Kind::Service, "cart")),
        page_size: 2,
        ..all.clone()
    };
    let first = list(cart.clone()).await;
    let second = list(v1::ListAuditRequest {
        page_token: first.next_page_token.clone(),
        ..cart
    })
    .await;
    let revisions: Vec<_> = first
        .entries
        .iter()
        .chain(&second.entries)
        .map(|entry| entry.revision)
        .collect();
    assert_eq!(revisions, [4, 3, 1], "newest first");
    let eves = list(v1::ListAuditRequest {
        who: "spiffe://leeward.test/user/e*".into(),
        ..all.clone()
    })
    .await;
    assert_eq!(eves.entries.len(), 2);
    // One who sees a part sees what they did, and what changed that part.
    let mut audit = AuditServiceClient::new(site.channel(control.address, "eve"));
    let part = audit.list_audit(all.clone()).await.unwrap().into_inner().entries;
    let mut part: Vec<_> = part
        .iter()
        .map(|entry| (entry.revision, entry.changes.len()))
        .collect();
    part.sort_unstable();
    assert_eq!(part, [(0, 0), (1, 1), (3, 1), (4, 1)]);
    // It is there after a restart.
    control.stop().await;
    let control = site.start("store", Timing::DEFAULT).await;
    let mut audit = AuditServiceClient::new(site.channel(control.address, "rob"));
    assert_eq!(audit.list_audit(all).await.unwrap().into_inner().entries.len(), 7);
    control.stop().await;
}

/// An issuer on this machine.
struct Issuer {
    url: String,
    keys: Arc<Mutex<Value>>,
}

impl Issuer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let keys = Arc::new(Mutex::new(json!({"keys": []})));
        let (issuer, served) = (url.clone(), Arc::clone(&keys));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.windows(4).any(|w| w == b"\r\n\r\n")
                    && stream.read_buf(&mut head).await.unwrap() > 0
                {}
                let body =
                    if String::from_utf8_lossy(&head).starts_with("GET /.well-known/openid-configuration ") {
                        json!({"issuer": issuer, "jwks_uri": format!("{issuer}/keys")}).to_string()
                    } else {
                        served.lock().unwrap().to_string()
                    };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { url, keys }
    }

    fn publish(&self, kid: &str) -> Ed25519KeyPair {
        let pair = Ed25519KeyPair::generate().unwrap();
        let x = URL_SAFE_NO_PAD.encode(pair.public_key());
        *self.keys.lock().unwrap() =
            json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": kid, "alg": "EdDSA", "x": x}]});
        pair
    }

    fn token(&self, pair: &Ed25519KeyPair, kid: &str, changes: &Value) -> String {
        #[expect(clippy::disallowed_methods, reason = "tokens end by the wall clock")]
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut claims = json!({"iss": self.url, "aud": "leeward", "sub": "1", "email": "eve@example.com", "exp": now + 600});
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        let text = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", text(json!({"alg": "EdDSA", "kid": kid})), text(claims));
        let signature = URL_SAFE_NO_PAD.encode(pair.sign(message.as_bytes()));
        format!("{message}.{signature}")
    }
}

#[tokio::test]
async fn tokens_let_users_in_to_the_api_alone() {
    let site = Site::new();
    let issuer = Issuer::start().await;
    let pair = issuer.publish("one");
    let oidc = OidcSettings {
        issuer: issuer.url.clone(),
        audience: "leeward".into(),
        user_claim: "email".into(),
        groups_claim: "groups".into(),
    };
    let control = site.start_with_tokens("store", oidc).await;
    let bundle = site.identity(&Site::control_id()).bundle();
    let channel = leeward_identity::channel::guest_lazy(bundle, control.address).unwrap();
    let with = |token: String| {
        let channel = channel.clone();
        let value: tonic::metadata::MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
        v1::policy_service_client::PolicyServiceClient::with_interceptor(
            channel,
            move |mut request: tonic::Request<()>| {
                request.metadata_mut().insert("authorization", value.clone());
                Ok(request)
            },
        )
    };
    let list = v1::ListRequest::default;
    let token = |changes: Value| issuer.token(&pair, "one", &changes);
    // Without a policy a token is good for nothing: whoever issued it doesn't know the mesh.
    check(
        with(token(json!({}))).list(list()).await,
        Code::PermissionDenied,
        "ROLE_REQUIRED",
    );
    let mut ada = site.api_of(control.address, "ada", Some("setting up"));
    ada.apply(apply(
        &(zone("a") + &of_team("cart", 80, "a") + &of_team("pay", 81, "b")),
    ))
    .await
    .unwrap();
    ada.apply(apply(TEAMS)).await.unwrap();
    let seen = with(token(json!({})))
        .list(list())
        .await
        .unwrap()
        .into_inner()
        .resources;
    assert_eq!(seen.len(), 1, "as eve@example.com");
    let everything = with(token(
        json!({"email": "olga@example.com", "groups": ["sre", "x"]}),
    ));
    assert_eq!(
        { everything }
            .list(list())
            .await
            .unwrap()
            .into_inner()
            .resources
            .len(),
        4
    );
    for (changes, why) in [
        (json!({"aud": "other"}), "audience"),
        (json!({"iss": "https://other.example"}), "issuer"),
        (json!({"exp": 1}), "expired"),
        (json!({"email": null}), "no_user"),
        (json!({"email": "a\nb"}), "no_user"),
    ] {
        let status = with(token(changes.clone())).list(list()).await.unwrap_err();
        let info = status.get_details_error_info().unwrap();
        assert_eq!(
            (status.code(), info.reason.as_str()),
            (Code::Unauthenticated, "INVALID_TOKEN"),
            "{changes}"
        );
        assert!(info.metadata["token"].contains(why), "{changes}: {info:?}");
    }
    let other = Ed25519KeyPair::generate().unwrap();
    check(
        with(issuer.token(&other, "one", &json!({}))).list(list()).await,
        Code::Unauthenticated,
        "INVALID_TOKEN",
    );
    // Without a token, and towards what is for proxies, there is nothing.
    let mut bare = v1::policy_service_client::PolicyServiceClient::new(channel.clone());
    check(
        bare.list(list()).await,
        Code::Unauthenticated,
        "NOT_AUTHENTICATED",
    );
    let push = v1::push_service_client::PushServiceClient::new(channel.clone());
    let refused = Stream::open(&push, hello("p1")).await.map(|_| ()).unwrap_err();
    assert_ne!(refused.code(), Code::Ok);
    check(Err::<(), _>(refused), Code::Unauthenticated, "NOT_AUTHENTICATED");
    // Who it was is put down.
    let mut eve = with(token(json!({})));
    let wanted = v1::ApplyRequest {
        force: true,
        ..apply(&of_team("cart", 99, "a"))
    };
    eve.apply(wanted).await.unwrap();
    let mut audit = AuditServiceClient::new(site.channel(control.address, "rob"));
    let last = audit
        .list_audit(v1::ListAuditRequest {
            page_size: 1,
            ..v1::ListAuditRequest::default()
        })
        .await
        .unwrap();
    assert_eq!(last.into_inner().entries[0].who, "oidc:eve@example.com");
    // A certificate goes before a token, over HTTP as well.
    let http = Http {
        identity: site.identity(&Site::user_id("rob")),
        address: control.address,
    };
    let bearer = format!("Bearer {}", token(json!({})));
    let answer = http
        .send("GET", "/v1/policy", &[("authorization", &bearer)], "")
        .await;
    assert_eq!(answer.json()["resources"].as_array().unwrap().len(), 4, "as rob");
    control.stop().await;
}

/// Who has no certificate is let in nowhere, where there is no issuer.
#[tokio::test]
async fn without_an_issuer_nobody_comes_without_a_certificate() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let bundle = site.identity(&Site::control_id()).bundle();
    let channel = leeward_identity::channel::guest_lazy(bundle, control.address).unwrap();
    let mut bare = v1::policy_service_client::PolicyServiceClient::new(channel);
    let refused = bare.list(v1::ListRequest::default()).await.unwrap_err();
    assert!(
        refused.get_details_error_info().is_none(),
        "the handshake fails: {refused:?}"
    );
    control.stop().await;
}
