//! Certificates: who gets one and who doesn't, and a root that is replaced while proxies come and go.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use leeward_identity::join::Joining;
use leeward_identity::{Bundle, Identity, Issued, JoinToken, NewKey, SpiffeId, channel};
use leeward_proto::v1;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use support::{Site, Stream, eventually, from_proxy, hello};
use tonic::transport::Channel;
use tonic::{Code, Status};
use v1::identity_client::IdentityClient;
use v1::policy_service_client::PolicyServiceClient;

const HOUR: Duration = Duration::from_secs(3600);

fn user() -> SpiffeId {
    SpiffeId::user("leeward.test", "ada").unwrap()
}

fn client(site: &Site, address: SocketAddr, id: &SpiffeId) -> IdentityClient<Channel> {
    IdentityClient::new(channel::connect_lazy(site.identity(id), address))
}

async fn token(site: &Site, address: SocketAddr, name: &str) -> JoinToken {
    let request = v1::CreateTokenRequest {
        path: format!("/zone/a/proxy/{name}"),
        ttl: None,
    };
    let made = client(site, address, &user())
        .create_token(request)
        .await
        .unwrap()
        .into_inner();
    made.token.parse().unwrap()
}

/// Joins as a proxy of zone a, by the root in the token or by a bundle.
async fn join(
    site: &Site,
    address: SocketAddr,
    token: &JoinToken,
    name: &str,
    bundle: Option<Bundle>,
) -> Result<Arc<Identity>, Status> {
    let id = Site::proxy_id(name);
    let (key, joining) = (
        NewKey::generate(&id).unwrap(),
        Joining::new(token, bundle).unwrap(),
    );
    let request = v1::JoinRequest {
        secret: token.secret().to_owned(),
        spiffe_id: id.to_string(),
        request: key.request().to_vec(),
    };
    let mut client = IdentityClient::new(channel::join_lazy(joining.clone(), address));
    let answer = client.join(request).await?.into_inner();
    let dir = site.dir.join(format!("joined-{name}"));
    joining.keep(&dir, &id, &key, &issued(answer)).unwrap();
    Ok(Identity::load(dir).unwrap())
}

fn issued(answer: v1::Issued) -> Issued {
    Issued::parse(answer.chain, answer.bundle.unwrap().roots).unwrap()
}

#[tokio::test]
async fn a_token_is_good_for_one_proxy_once() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let first = token(&site, control.address, "n1").await;

    let other = join(&site, control.address, &first, "n2", None)
        .await
        .unwrap_err();
    assert_eq!(other.code(), Code::PermissionDenied);
    assert!(
        other
            .message()
            .contains("for somebody else than spiffe://leeward.test/zone/a/proxy/n2"),
        "{other}"
    );
    let unknown = JoinToken::generate("leeward.test", first.root()).unwrap();
    let unknown = join(&site, control.address, &unknown, "n1", None)
        .await
        .unwrap_err();
    assert!(unknown.message().contains("not known here"), "{unknown}");

    let identity = join(&site, control.address, &first, "n1", None).await.unwrap();
    assert_eq!(*identity.id(), Site::proxy_id("n1"));
    assert_eq!(
        identity.facts().root.as_deref(),
        Some(site.authority.fingerprint())
    );
    let again = join(&site, control.address, &first, "n1", None)
        .await
        .unwrap_err();
    assert_eq!(again.code(), Code::PermissionDenied);
    assert!(again.message().contains("was used already"), "{again}");

    // A restart makes no token good again.
    control.stop().await;
    let control = site.start_authority("store", HOUR).await;
    let again = join(&site, control.address, &first, "n1", None)
        .await
        .unwrap_err();
    assert!(again.message().contains("was used already"), "{again}");
    control.stop().await;
}

#[tokio::test]
async fn a_token_that_has_ended_is_refused_and_says_so() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let late = token(&site, control.address, "n1").await;
    let db = rusqlite::Connection::open(site.dir.join("store/leeward.db")).unwrap();
    let ended = db.execute(
        "UPDATE kv SET value = CAST(json_set(CAST(value AS TEXT), '$.expiresMs',
             json_extract(CAST(value AS TEXT), '$.createdMs') - 1) AS BLOB)
         WHERE CAST(key AS TEXT) LIKE 'tokens/%'",
        [],
    );
    assert_eq!(ended.unwrap(), 1);
    let refused = join(&site, control.address, &late, "n1", None).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("has ended"), "{refused}");
    control.stop().await;
}

#[tokio::test]
async fn tokens_are_made_by_users_for_proxies_and_users_within_bounds() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let ask = |path: &str, seconds: i64| v1::CreateTokenRequest {
        path: path.into(),
        ttl: Some(prost_types::Duration { seconds, nanos: 0 }),
    };
    let mut proxy = client(&site, control.address, &Site::proxy_id("n1"));
    let refused = proxy.create_token(ask("/zone/a/proxy/n2", 60)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let mut user = client(&site, control.address, &user());
    for (path, seconds, field) in [
        ("/control", 60, "path"),
        ("/zone/a", 60, "path"),
        ("", 60, "path"),
        ("other/zone/a/proxy/n1", 60, "path"),
        ("/zone/a/proxy/n1", 59, "ttl"),
        ("/zone/a/proxy/n1", 7 * 24 * 3600 + 1, "ttl"),
        ("/zone/a/proxy/n1", -1, "ttl"),
    ] {
        let refused = user.create_token(ask(path, seconds)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{path} {seconds}");
        assert!(refused.message().starts_with(field), "{refused}");
    }
    user.create_token(ask("/user/bob", 60)).await.unwrap();
    control.stop().await;
}

#[tokio::test]
async fn whoever_joins_knows_the_control_plane_by_its_root_and_gets_no_further() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let token = token(&site, control.address, "n1").await;

    // Somebody else's root, by hash and by file: the secret is not even sent.
    let other =
        leeward_identity::authority::Authority::create(&site.dir.join("other"), "leeward.test").unwrap();
    let text = token.reveal().replace(token.root(), other.fingerprint());
    let mistaken: JoinToken = text.parse().unwrap();
    let refused = join(&site, control.address, &mistaken, "n1", None)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let refused = join(&site, control.address, &token, "n1", Some(other.roots().clone())).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);

    // The connection is for joining only.
    let stranger = channel::join_lazy(Joining::new(&token, None).unwrap(), control.address);
    let refused = PolicyServiceClient::new(stranger.clone())
        .list_proxies(v1::ListProxiesRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    let mut identity = IdentityClient::new(stranger);
    let refused = identity
        .get_authority(v1::GetAuthorityRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = identity.issue(v1::IssueRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);

    // The token is still good, by the file as well.
    let roots = site.authority.roots().clone();
    join(&site, control.address, &token, "n1", Some(roots))
        .await
        .unwrap();
    control.stop().await;
}

#[tokio::test]
async fn a_certificate_is_renewed_for_its_holder_and_nobody_else() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let id = Site::proxy_id("n1");
    let mut n1 = client(&site, control.address, &id);
    let ask = |key: &NewKey| v1::IssueRequest {
        request: key.request().to_vec(),
    };
    let other = NewKey::generate(&Site::proxy_id("n2")).unwrap();
    let refused = n1.issue(ask(&other)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused
            .message()
            .contains("want the URI spiffe://leeward.test/zone/a/proxy/n1 alone"),
        "{refused}"
    );

    let key = NewKey::generate(&id).unwrap();
    let answer = issued(n1.issue(ask(&key)).await.unwrap().into_inner());
    let (identity, before) = (site.identity(&id), site.identity(&id).facts());
    assert!(
        identity.install(&other, &answer).is_err(),
        "a certificate goes with its key only"
    );
    assert_eq!(identity.facts(), before);
    identity.install(&key, &answer).unwrap();
    let after = identity.facts();
    assert_ne!(after.certificate, before.certificate);
    assert_eq!(answer.chain.len(), 2, "the intermediate comes along");
    // What is on disk is what is in use, and works.
    assert_eq!(Identity::load(site.identity_dir(&id)).unwrap().facts(), after);
    client(&site, control.address, &id)
        .issue(ask(&key))
        .await
        .unwrap();
    control.stop().await;
}

#[tokio::test]
async fn a_connection_that_outlives_its_certificate_gets_no_other() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let id = Site::proxy_id("n1");
    let dir = site.dir.join("short");
    site.authority.issue(&id, Duration::from_secs(3), &dir).unwrap();
    let identity = Identity::load(&dir).unwrap();
    let mut n1 = IdentityClient::new(channel::connect_lazy(Arc::clone(&identity), control.address));
    let request = v1::IssueRequest {
        request: NewKey::generate(&id).unwrap().request().to_vec(),
    };
    n1.issue(request.clone()).await.unwrap();
    eventually("the end of the certificate", async || {
        identity.ready_now().is_err()
    })
    .await;
    let refused = n1.issue(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(
        refused
            .message()
            .contains("certificate of spiffe://leeward.test/zone/a/proxy/n1 has ended"),
        "{refused}"
    );
    // A new connection is not even made.
    let mut anew = IdentityClient::new(channel::connect_lazy(identity, control.address));
    assert!(anew.issue(request).await.is_err());
    control.stop().await;
}

#[tokio::test]
async fn the_control_plane_keeps_its_own_certificate_good() {
    let site = Site::new();
    let control = site.start_authority("store", Duration::from_secs(8)).await;
    let own = site.dir.join("own");
    let first = Identity::load(&own).unwrap().facts();
    eventually("the next certificate", async || {
        Identity::load(&own).unwrap().facts().certificate != first.certificate
    })
    .await;
    let next = Identity::load(&own).unwrap();
    assert!(
        first.validity.not_after > next.facts().validity.not_before,
        "they overlap"
    );
    // It is the one that is shown now.
    let id = user();
    client(&site, control.address, &id)
        .get_authority(v1::GetAuthorityRequest {})
        .await
        .unwrap();
    control.stop().await;
}

/// A proxy's stream that knows its trust bundle.
struct Proxy {
    id: SpiffeId,
    stream: Stream,
}

impl Proxy {
    async fn open(site: &Site, address: SocketAddr, name: &str) -> Self {
        Self {
            id: Site::proxy_id(name),
            stream: Stream::open(&site.push(address, name), hello(name))
                .await
                .unwrap(),
        }
    }

    async fn trust(&mut self) -> v1::TrustBundle {
        loop {
            let message = tokio::time::timeout(support::SOON, self.stream.messages.message()).await;
            let message = message.unwrap().unwrap().unwrap().message;
            if let Some(v1::control_message::Message::Trust(bundle)) = message {
                return bundle;
            }
        }
    }

    async fn says(&self, bundle: &str, root: &str) {
        let report = v1::IdentityReport {
            bundle: bundle.into(),
            root: root.into(),
            // In the year 2106.
            not_after: Some(prost_types::Timestamp {
                seconds: u32::MAX.into(),
                nanos: 0,
            }),
            ..v1::IdentityReport::default()
        };
        let message = from_proxy(v1::proxy_message::Message::Identity(report));
        self.stream.out.send(message).await.unwrap();
    }
}

#[tokio::test]
async fn a_root_is_replaced_only_when_everybody_is_ready_for_it() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let mut user = client(&site, control.address, &user());
    let mut rotate = async |step: v1::RotationStep, force: bool| {
        let request = v1::RotateRequest {
            step: step.into(),
            force,
        };
        user.rotate(request)
            .await
            .map(|answer| answer.into_inner().authority.unwrap())
    };
    let (prepare, activate, retire) = (
        v1::RotationStep::Prepare,
        v1::RotationStep::Activate,
        v1::RotationStep::Retire,
    );
    let old = site.authority.fingerprint().to_owned();
    let mut here = Proxy::open(&site, control.address, "here").await;
    let first = here.trust().await;
    assert_eq!((first.roots.len(), &first.signing_root), (1, &old));
    here.says(&first.hash, &old).await;
    // One that got a certificate and is away.
    let away = Site::proxy_id("away");
    let key = NewKey::generate(&away).unwrap();
    let request = v1::IssueRequest {
        request: key.request().to_vec(),
    };
    client(&site, control.address, &away)
        .issue(request.clone())
        .await
        .unwrap();

    // In order, and with something to go to.
    let refused = rotate(activate, false).await.unwrap_err();
    assert!(refused.message().contains("prepare first"), "{refused}");
    let refused = rotate(prepare, false).await.unwrap_err();
    assert!(refused.message().contains("leeward ca intermediate"), "{refused}");
    let new = leeward_identity::authority::Authority::create(&site.dir.join("new"), "leeward.test").unwrap();
    new.intermediate(HOUR, &site.dir.join("authority/next")).unwrap();
    let prepared = rotate(prepare, false).await.unwrap();
    assert_eq!(prepared.phase(), v1::RotationPhase::Prepared);
    let both = here.trust().await;
    assert_eq!((both.roots.len(), &both.signing_root), (2, &old));

    // The gate names who is behind, connected or not; force goes without them.
    let refused = rotate(activate, false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for part in [
        "proxy/here (connected; runs bundle",
        "proxy/away (not connected; has not been heard of",
    ] {
        assert!(refused.message().contains(part), "{refused}");
    }
    here.says(&both.hash, &old).await;
    eventually("the report", async || {
        let refused = rotate(activate, false).await.unwrap_err();
        !refused.message().contains("proxy/here")
    })
    .await;
    let mut back = Proxy::open(&site, control.address, "away").await;
    assert_eq!(back.trust().await, both);
    back.says(&both.hash, &old).await;
    eventually("everybody to be ready", async || {
        rotate(activate, false).await.is_ok()
    })
    .await;
    let active = here.trust().await;
    assert_eq!(
        (&active.hash, active.signing_root.as_str()),
        (&both.hash, new.fingerprint())
    );

    // From now on certificates lead to the new root; the control plane's own to the old one still, for those who don't
    // know the new one.
    let issued = issued(
        client(&site, control.address, &away)
            .issue(request)
            .await
            .unwrap()
            .into_inner(),
    );
    assert_eq!(
        new.roots().root_of(&issued.chain).unwrap().fingerprint,
        new.fingerprint()
    );
    let own = || {
        Identity::load(site.dir.join("own"))
            .unwrap()
            .facts()
            .root
            .unwrap()
    };
    assert_eq!(own(), old);

    let refused = rotate(retire, false).await.unwrap_err();
    for (proxy, is_told) in [(&here, true), (&back, true)] {
        assert_eq!(
            refused.message().contains(proxy.id.as_str()),
            is_told,
            "{refused}"
        );
    }
    here.says(&both.hash, new.fingerprint()).await;
    back.says(&both.hash, new.fingerprint()).await;
    eventually("the old root to be out of use", async || {
        rotate(retire, false).await.is_ok()
    })
    .await;
    let last = here.trust().await;
    assert_eq!(last.roots.len(), 1);
    assert_eq!(leeward_identity::fingerprint(&last.roots[0]), new.fingerprint());
    assert_eq!(own(), new.fingerprint());

    // A restart finds it so; whoever has a certificate of the old root is a stranger.
    control.stop().await;
    let control = site.start_authority("store", HOUR).await;
    let stranger = client(&site, control.address, &Site::proxy_id("stranger"))
        .issue(v1::IssueRequest::default())
        .await;
    assert!(stranger.is_err());
    control.stop().await;
}

#[tokio::test]
async fn a_step_is_forced_past_those_in_the_way() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let mut user = client(&site, control.address, &user());
    let mut here = Proxy::open(&site, control.address, "here").await;
    here.trust().await;
    let new = leeward_identity::authority::Authority::create(&site.dir.join("new"), "leeward.test").unwrap();
    new.intermediate(HOUR, &site.dir.join("authority/next")).unwrap();
    for (step, force) in [
        (v1::RotationStep::Prepare, false),
        (v1::RotationStep::Activate, true),
        (v1::RotationStep::Retire, true),
    ] {
        let request = v1::RotateRequest {
            step: step.into(),
            force,
        };
        user.rotate(request).await.unwrap();
    }
    let id = Site::proxy_id("x");
    let refused = client(&site, control.address, &id)
        .issue(v1::IssueRequest::default())
        .await;
    assert!(refused.is_err(), "the old root is gone");
    control.stop().await;
}
