//! Revocations: who is cut off by one, who is not, and how one who was comes back.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use leeward_control::kv::Kv;
use leeward_identity::join::Joining;
use leeward_identity::{Identity, Issued, JoinToken, NewKey, SpiffeId, channel};
use leeward_proto::v1;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use support::{DOMAIN, Site, Stream, eventually, from_proxy, hello};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use v1::identity_client::IdentityClient;
use v1::push_service_client::PushServiceClient;

const HOUR: Duration = Duration::from_secs(3600);

fn of(identity: &Arc<Identity>, address: SocketAddr) -> IdentityClient<Channel> {
    IdentityClient::new(channel::connect_lazy(Arc::clone(identity), address))
}

fn user(site: &Site, address: SocketAddr) -> IdentityClient<Channel> {
    of(&site.identity(&Site::user_id("ada")), address)
}

async fn token(site: &Site, address: SocketAddr, name: &str) -> JoinToken {
    let request = v1::CreateTokenRequest {
        path: format!("/zone/a/proxy/{name}"),
        ttl: None,
    };
    let made = user(site, address).create_token(request).await.unwrap();
    made.into_inner().token.parse().unwrap()
}

/// Joins as a proxy of zone a, with a new key.
async fn join(
    site: &Site,
    address: SocketAddr,
    token: &JoinToken,
    name: &str,
) -> Result<Arc<Identity>, Status> {
    let id = Site::proxy_id(name);
    let (key, joining) = (NewKey::generate(&id).unwrap(), Joining::new(token, None).unwrap());
    let request = v1::JoinRequest {
        secret: token.secret().to_owned(),
        spiffe_id: id.to_string(),
        request: key.request().to_vec(),
    };
    let mut client = IdentityClient::new(channel::join_lazy(joining.clone(), address));
    let answer = client.join(request).await?.into_inner();
    let issued = Issued::parse(answer.chain, answer.bundle.unwrap().roots).unwrap();
    let dir = site.dir.join(format!("joined-{name}-{}", fastrand::u64(..)));
    joining.keep(&dir, &id, &key, &issued).unwrap();
    Ok(Identity::load(dir).unwrap())
}

async fn renew(client: &mut IdentityClient<Channel>, id: &SpiffeId) -> Result<(), Status> {
    let request = v1::IssueRequest {
        request: NewKey::generate(id).unwrap().request().to_vec(),
    };
    client.issue(request).await.map(|_| ())
}

async fn revoke(client: &mut IdentityClient<Channel>, id: &str) -> Result<v1::Revocation, Status> {
    let request = v1::RevokeRequest {
        spiffe_id: id.to_owned(),
        reason: "stolen".to_owned(),
        keep: None,
    };
    let answer = client.revoke(request).await?;
    Ok(answer.into_inner().revocation.unwrap())
}

async fn open(identity: &Arc<Identity>, address: SocketAddr, name: &str) -> Result<Stream, Status> {
    let channel = channel::connect_lazy(Arc::clone(identity), address);
    Stream::open(&PushServiceClient::new(channel), hello(name)).await
}

/// The next list that a stream tells, or how it ends.
async fn told(stream: &mut Stream) -> Result<Vec<String>, Status> {
    loop {
        let message = tokio::time::timeout(support::SOON, stream.messages.message()).await;
        let Some(message) = message.unwrap()? else {
            return Err(Status::cancelled("the stream has ended"));
        };
        if let Some(v1::control_message::Message::Trust(bundle)) = message.message {
            let ids = bundle.revoked.unwrap().ids.into_iter();
            return Ok(ids.map(|revoked| revoked.spiffe_id).collect());
        }
    }
}

#[track_caller]
fn is_refused(status: &Status) {
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    assert!(status.message().contains("was revoked at"), "{status}");
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "CERTIFICATE_REVOKED");
}

#[tokio::test]
async fn whoever_is_revoked_is_cut_off_and_comes_back_with_a_new_token() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let address = control.address;
    let (first, unused) = (
        token(&site, address, "n1").await,
        token(&site, address, "n1").await,
    );
    let stolen = join(&site, address, &first, "n1").await.unwrap();
    let id = stolen.id().clone();
    let mut stream = open(&stolen, address, "n1").await.unwrap();
    let mut bystander = open(&site.identity(&Site::proxy_id("n2")), address, "n2")
        .await
        .unwrap();
    assert_eq!(told(&mut stream).await.unwrap(), [""; 0]);
    assert_eq!(told(&mut bystander).await.unwrap(), [""; 0]);
    let mut client = of(&stolen, address);
    renew(&mut client, &id).await.unwrap();

    let revocation = revoke(&mut user(&site, address), "/zone/a/proxy/n1")
        .await
        .unwrap();
    assert_eq!(revocation.spiffe_id, id.as_str());
    assert_eq!(
        (revocation.reason.as_str(), revocation.who.as_str()),
        ("stolen", Site::user_id("ada").as_str())
    );

    // It hears of it, and its stream ends; the other's goes on.
    assert_eq!(told(&mut stream).await.unwrap(), [id.as_str()]);
    is_refused(&told(&mut stream).await.unwrap_err());
    assert_eq!(told(&mut bystander).await.unwrap(), [id.as_str()]);
    // On the connection that is open it gets nothing more, and soon there is none; another is not made.
    is_refused(&renew(&mut client, &id).await.unwrap_err());
    eventually("the connection to be closed", async || {
        renew(&mut client, &id).await.unwrap_err().code() != Code::Unauthenticated
    })
    .await;
    assert!(renew(&mut of(&stolen, address), &id).await.is_err());
    assert!(open(&stolen, address, "n1").await.is_err());
    // Tokens of before are no way in, used or not.
    for old in [&first, &unused] {
        let refused = join(&site, address, old, "n1").await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(
            refused.message().contains("was revoked; it needs another"),
            "{refused}"
        );
    }

    // With a new one it is in again, at once, and stays.
    let fresh = token(&site, address, "n1").await;
    let back = join(&site, address, &fresh, "n1").await.unwrap();
    renew(&mut of(&back, address), &id).await.unwrap();
    let mut stream = open(&back, address, "n1").await.unwrap();
    assert_eq!(told(&mut stream).await.unwrap(), [id.as_str()]);
    stream.ack(0, vec![]).await;

    // A restart of the control plane changes nothing of it.
    control.stop().await;
    let control = site.start_authority("store", HOUR).await;
    let address = control.address;
    assert!(renew(&mut of(&stolen, address), &id).await.is_err());
    renew(&mut of(&back, address), &id).await.unwrap();

    // What was taken back is as if it had not been.
    let mut ada = user(&site, address);
    let mut stream = open(&back, address, "n1").await.unwrap();
    assert_eq!(told(&mut stream).await.unwrap(), [id.as_str()]);
    let request = v1::RestoreRequest {
        spiffe_id: id.to_string(),
    };
    ada.restore(request.clone()).await.unwrap();
    assert_eq!(told(&mut stream).await.unwrap(), [""; 0]);
    renew(&mut of(&stolen, address), &id).await.unwrap();
    let refused = ada.restore(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    control.stop().await;
}

#[tokio::test]
async fn what_one_control_plane_revokes_the_others_on_its_store_refuse_too() {
    let site = Site::new();
    let kv = Kv::sqlite(&site.dir.join("store")).unwrap();
    let one = site.start_authority_on(kv.clone(), "own-1", HOUR).await;
    let other = site.start_authority_on(kv, "own-2", HOUR).await;
    let fresh = token(&site, one.address, "n1").await;
    let stolen = join(&site, one.address, &fresh, "n1").await.unwrap();
    let id = stolen.id().clone();
    let mut stream = open(&stolen, other.address, "n1").await.unwrap();
    assert_eq!(told(&mut stream).await.unwrap(), [""; 0]);
    let mut client = of(&stolen, other.address);
    renew(&mut client, &id).await.unwrap();

    revoke(&mut user(&site, one.address), id.as_str()).await.unwrap();
    // By the store itself, whether the list has been read there or not.
    is_refused(&renew(&mut client, &id).await.unwrap_err());
    assert_eq!(told(&mut stream).await.unwrap(), [id.as_str()]);
    is_refused(&told(&mut stream).await.unwrap_err());
    let request = v1::RestoreRequest {
        spiffe_id: id.to_string(),
    };
    user(&site, one.address).restore(request).await.unwrap();
    eventually("the other to let it in", async || {
        renew(&mut of(&stolen, other.address), &id).await.is_ok()
    })
    .await;
    one.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn a_user_who_is_revoked_calls_no_more_on_a_connection_that_is_open() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let eve = site.identity(&Site::user_id("eve"));
    let mut eves = of(&eve, control.address);
    eves.get_authority(v1::GetAuthorityRequest {}).await.unwrap();
    let id = Site::user_id("eve").to_string();
    revoke(&mut user(&site, control.address), &id).await.unwrap();
    let refused = eves.get_authority(v1::GetAuthorityRequest {}).await.unwrap_err();
    is_refused(&refused);
    // It is twice revoked: the later counts.
    let again = revoke(&mut user(&site, control.address), &id).await.unwrap();
    let list = v1::ListRevocationsRequest {};
    let known = user(&site, control.address).list_revocations(list).await.unwrap();
    assert_eq!(known.into_inner().revocations, [again]);
    control.stop().await;
}

#[tokio::test]
async fn what_can_be_revoked_is_bounded() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let ask = |id: &str, reason: &str, keep: Option<i64>| v1::RevokeRequest {
        spiffe_id: id.to_owned(),
        reason: reason.to_owned(),
        keep: keep.map(|hours| prost_types::Duration {
            seconds: hours * 3600,
            nanos: 0,
        }),
    };
    let mut ada = user(&site, control.address);
    let good = "/zone/a/proxy/n1";
    let (long, text) = (format!("/zone/a/proxy/{}", "x".repeat(512)), "x".repeat(501));
    for (request, field) in [
        (ask("", "", None), "spiffe_id"),
        (ask("n1", "", None), "spiffe_id"),
        (ask("/zone//proxy/n1", "", None), "spiffe_id"),
        (ask("spiffe://elsewhere/zone/a/proxy/n1", "", None), "spiffe_id"),
        (ask("/control", "", None), "spiffe_id"),
        (ask(&long, "", None), "spiffe_id"),
        (ask(good, &text, None), "reason"),
        (ask(good, "a\nb", None), "reason"),
        (ask(good, "", Some(168)), "keep"),
        (ask(good, "", Some(-1)), "keep"),
        (ask(good, "", Some(87_601)), "keep"),
    ] {
        let refused = ada.revoke(request.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{request:?}");
        assert!(refused.message().starts_with(field), "{refused}");
    }
    let kept = ada
        .revoke(ask(good, "", Some(87_600)))
        .await
        .unwrap()
        .into_inner();
    let kept = kept.revocation.unwrap();
    let hours = (kept.until.unwrap().seconds - kept.at.unwrap().seconds) / 3600;
    assert!((87_599..=87_600).contains(&hours), "{hours}");
    // It is not for proxies to say.
    let proxy = site.identity(&Site::proxy_id("n2"));
    let refused = of(&proxy, control.address)
        .revoke(ask(good, "", None))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    control.stop().await;
}

#[tokio::test]
async fn proxies_that_do_not_refuse_yet_are_named() {
    let site = Site::new();
    let control = site.start_authority("store", HOUR).await;
    let n2 = Site::proxy_id("n2");
    let mut stream = open(&site.identity(&n2), control.address, "n2").await.unwrap();
    told(&mut stream).await.unwrap();
    let mut ada = user(&site, control.address);
    revoke(&mut ada, "/zone/a/proxy/n1").await.unwrap();
    let mut list = async || {
        let request = v1::ListRevocationsRequest {};
        ada.list_revocations(request).await.unwrap().into_inner()
    };
    let known = list().await;
    assert_eq!(
        (
            known.behind.len(),
            known.behind[0].spiffe_id.as_str(),
            known.connected
        ),
        (1, n2.as_str(), 1)
    );
    let report = v1::IdentityReport {
        revoked: known.hash,
        ..v1::IdentityReport::default()
    };
    let message = from_proxy(v1::proxy_message::Message::Identity(report));
    stream.out.send(message).await.unwrap();
    eventually("the report", async || list().await.behind.is_empty()).await;
    assert_eq!(n2.trust_domain(), DOMAIN);
    control.stop().await;
}
