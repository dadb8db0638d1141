//! Certificates for workloads: which proxies get them for what, for how long, and what they are not good for.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use leeward_identity::authority::Authority;
use leeward_identity::{Identity, Issued, NewKey, SpiffeId, Svid, channel};
use leeward_proto::{manifest, v1};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};
use support::{Control, DOMAIN, Site, Stream, eventually, hello};
use tonic::transport::Channel;
use tonic::{Code, Status};
use v1::identity_client::IdentityClient;
use v1::plugin_service_client::PluginServiceClient;
use v1::policy_service_client::PolicyServiceClient;
use v1::push_service_client::PushServiceClient;

const HOUR: Duration = Duration::from_secs(3600);

const POLICY: &str = r#"
apiVersion: leeward.dev/v1
kind: Zone
metadata: {name: a}
spec: {proxies: [{name: n1, address: "127.0.0.1:1"}, {name: n2, address: "127.0.0.1:2"}]}
---
apiVersion: leeward.dev/v1
kind: Zone
metadata: {name: b}
spec: {}
---
apiVersion: leeward.dev/v1
kind: Workload
metadata: {name: pay}
spec: {zone: a, uids: [1000]}
---
apiVersion: leeward.dev/v1
kind: Workload
metadata: {name: picky}
spec: {zone: a, proxies: [n2], uids: [1000]}
---
apiVersion: leeward.dev/v1
kind: Workload
metadata: {name: away}
spec: {zone: b, uids: [1000]}
"#;

fn id(name: &str) -> SpiffeId {
    SpiffeId::workload(DOMAIN, "a", name).unwrap()
}

fn channel_of(site: &Site, address: SocketAddr, who: &SpiffeId) -> Channel {
    channel::connect_lazy(site.identity(who), address)
}

async fn apply(site: &Site, address: SocketAddr, text: &str) {
    let request = v1::ApplyRequest {
        resources: manifest::parse("test", text).unwrap(),
        ..v1::ApplyRequest::default()
    };
    site.api(address).apply(request).await.unwrap();
}

async fn start(site: &Site) -> Control {
    let control = site.start_authority("store", HOUR).await;
    apply(site, control.address, POLICY).await;
    control
}

/// Asks for a workload's certificate as somebody, with a request that names an id.
async fn ask(
    site: &Site,
    address: SocketAddr,
    who: &SpiffeId,
    workload: &str,
    named: &SpiffeId,
) -> Result<(NewKey, Issued), Status> {
    let key = NewKey::generate(named).unwrap();
    let request = v1::IssueWorkloadRequest {
        workload: workload.to_owned(),
        request: key.request().to_vec(),
    };
    let mut client = IdentityClient::new(channel_of(site, address, who));
    let answer = client.issue_workload(request).await?.into_inner();
    let roots = answer.bundle.unwrap().roots;
    Ok((key, Issued::parse(answer.chain, roots).unwrap()))
}

#[tokio::test]
async fn a_proxy_gets_what_policy_has_for_it_and_nothing_else() {
    let site = Site::new();
    let control = start(&site).await;
    let (n1, n2) = (Site::proxy_id("n1"), Site::proxy_id("n2"));
    let (key, issued) = ask(&site, control.address, &n1, "pay", &id("pay")).await.unwrap();
    let svid = Svid::new(&id("pay"), &key, &issued, site.authority.roots()).unwrap();
    assert_eq!(svid.id().as_str(), "spiffe://leeward.test/zone/a/workload/pay");
    let (key, issued) = ask(&site, control.address, &n2, "picky", &id("picky"))
        .await
        .unwrap();
    Svid::new(&id("picky"), &key, &issued, site.authority.roots()).unwrap();

    let user = Site::user_id("ada");
    for (who, workload, named, code, why) in [
        (
            &n1,
            "picky",
            id("picky"),
            Code::PermissionDenied,
            "n1 is none of them",
        ),
        (&n1, "away", id("away"), Code::PermissionDenied, "of the zone b"),
        (
            &n1,
            "nothing",
            id("nothing"),
            Code::PermissionDenied,
            "no Workload/nothing",
        ),
        (&n1, "Pay", id("pay"), Code::InvalidArgument, "workload: "),
        (&n1, "", id("pay"), Code::InvalidArgument, "workload: "),
        // A request that names somebody else, such as a proxy.
        (
            &n1,
            "pay",
            n2.clone(),
            Code::InvalidArgument,
            "workload/pay alone",
        ),
        (
            &n1,
            "pay",
            id("picky"),
            Code::InvalidArgument,
            "workload/pay alone",
        ),
        (&user, "pay", id("pay"), Code::PermissionDenied, "only proxies"),
    ] {
        let refused = ask(&site, control.address, who, workload, &named)
            .await
            .err()
            .unwrap();
        assert_eq!(refused.code(), code, "{workload:?} {refused}");
        assert!(refused.message().contains(why), "{workload:?} {refused}");
    }

    // What is taken away is not issued from then on.
    let delete = v1::DeleteRequest {
        r#ref: Some(v1::ResourceRef {
            kind: v1::Kind::Workload.into(),
            name: "pay".into(),
        }),
        ..v1::DeleteRequest::default()
    };
    site.api(control.address).delete(delete).await.unwrap();
    let refused = ask(&site, control.address, &n1, "pay", &id("pay"))
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    control.stop().await;
}

#[tokio::test]
async fn a_workload_outlives_its_proxys_certificate_by_nothing() {
    let site = Site::new();
    let control = start(&site).await;
    let n1 = Site::proxy_id("n1");
    let dir = site.identity_dir(&n1);
    let short = Duration::from_secs(600);
    site.authority.issue(&n1, short, &dir).unwrap();
    let end = Identity::load(&dir).unwrap().not_after();
    let (key, issued) = ask(&site, control.address, &n1, "pay", &id("pay")).await.unwrap();
    let svid = Svid::new(&id("pay"), &key, &issued, site.authority.roots()).unwrap();
    let not_after = svid.validity().not_after;
    assert!(not_after <= end + Duration::from_secs(1), "{not_after:?} {end:?}");
    assert!(
        not_after >= end - Duration::from_secs(60),
        "{not_after:?} {end:?}"
    );
    // And of one that lasts long, as long as others.
    let n2 = Site::proxy_id("n2");
    site.authority
        .issue(&n2, 24 * HOUR, &site.identity_dir(&n2))
        .unwrap();
    let (key, issued) = ask(&site, control.address, &n2, "pay", &id("pay")).await.unwrap();
    let svid = Svid::new(&id("pay"), &key, &issued, site.authority.roots()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "certificates live by the wall clock")]
    let now = SystemTime::now();
    assert!(svid.validity().left(now) <= HOUR);
    control.stop().await;
}

#[tokio::test]
async fn a_workloads_certificate_opens_nothing_at_the_control_plane() {
    let site = Site::new();
    let control = start(&site).await;
    let pay = id("pay");
    let channel = channel_of(&site, control.address, &pay);

    // Not a proxy's push, also where it says that it is one.
    let push = PushServiceClient::new(channel.clone());
    for name in ["pay", "n1"] {
        let refused = Stream::open(&push, hello(name)).await.err().unwrap();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("is not a proxy"), "{refused}");
    }
    // Not its own next certificate, which is for whoever attests it, nor another's.
    let mut identity = IdentityClient::new(channel.clone());
    let request = NewKey::generate(&pay).unwrap().request().to_vec();
    let refused = identity.issue(v1::IssueRequest { request }).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(
        refused.message().contains("comes from its node's proxy"),
        "{refused}"
    );
    let refused = ask(&site, control.address, &pay, "pay", &pay)
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
    // Not modules of plugins, and not the API.
    let mut plugins = PluginServiceClient::new(channel.clone());
    let refused = plugins
        .fetch(v1::FetchModuleRequest::default())
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    let mut api = PolicyServiceClient::new(channel);
    let refused = api.list(v1::ListRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("is not a user"), "{refused}");
    control.stop().await;
}

#[tokio::test]
async fn a_root_goes_only_when_no_workload_stands_on_it() {
    let site = Site::new();
    let control = start(&site).await;
    let user = Site::user_id("ada");
    let mut rotate = {
        let mut client = IdentityClient::new(channel_of(&site, control.address, &user));
        async move |step: v1::RotationStep, force: bool| {
            let step = step.into();
            let answer = client.rotate(v1::RotateRequest { step, force }).await;
            answer.map(drop)
        }
    };
    let (n1, n2) = (Site::proxy_id("n1"), Site::proxy_id("n2"));
    for proxy in [&n1, &n2] {
        ask(&site, control.address, proxy, "pay", &id("pay"))
            .await
            .unwrap();
    }
    let new = Authority::create(&site.dir.join("new"), DOMAIN).unwrap();
    new.intermediate(HOUR, &site.dir.join("authority/next")).unwrap();
    rotate(v1::RotationStep::Prepare, false).await.unwrap();
    // Nobody runs proxies here.
    rotate(v1::RotationStep::Activate, true).await.unwrap();
    let refused = rotate(v1::RotationStep::Retire, false).await.unwrap_err();
    for at in ["at n1", "at n2"] {
        assert!(
            refused.message().contains("workload/pay") && refused.message().contains(at),
            "{refused}"
        );
    }
    // What is issued from now on leads to the new root, and where it is no workload is in the way.
    let both = site.authority.roots().with(new.roots()).unwrap();
    let (key, issued) = ask(&site, control.address, &n1, "pay", &id("pay")).await.unwrap();
    let svid = Svid::new(&id("pay"), &key, &issued, &both).unwrap();
    assert_eq!(svid.root(), Some(new.fingerprint()));
    eventually("n1 to be out of the way", async || {
        let refused = rotate(v1::RotationStep::Retire, false).await.unwrap_err();
        !refused.message().contains("at n1") && refused.message().contains("at n2")
    })
    .await;
    ask(&site, control.address, &n2, "pay", &id("pay")).await.unwrap();
    rotate(v1::RotationStep::Retire, false).await.unwrap();
    control.stop().await;
}
