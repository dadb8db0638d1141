//! The API over mutual TLS: what it takes, what it refuses and how it says so.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use leeward_control::push::Timing;
use leeward_proto::v1;
use support::{SOON, Site, Stream, apply, eventually, hello, reference, service, yaml, zone};
use tonic::Code;
use tonic_types::StatusExt;
use v1::watch_event::Event;

fn delete(kind: v1::Kind, name: &str, revision: u64) -> v1::DeleteRequest {
    v1::DeleteRequest {
        r#ref: Some(reference(kind, name)),
        revision,
    }
}

fn get(kind: v1::Kind, name: &str) -> v1::GetRequest {
    v1::GetRequest {
        r#ref: Some(reference(kind, name)),
    }
}

fn revision_of(resource: &v1::Resource) -> u64 {
    resource.metadata.as_ref().unwrap().revision
}

#[tokio::test]
async fn what_is_applied_is_there_and_what_is_unchanged_keeps_its_revision() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let policy = zone("a") + &service("cart", 80) + &service("pay", 81);
    let first = api.apply(apply(&policy)).await.unwrap().into_inner();
    assert_eq!((first.revision, first.changed), (1, vec![true; 3]));
    let again = api.apply(apply(&policy)).await.unwrap().into_inner();
    assert_eq!((again.revision, again.changed), (1, vec![false; 3]));
    let changed = api
        .apply(apply(&(service("cart", 80) + &service("pay", 82))))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((changed.revision, changed.changed), (2, vec![false, true]));
    let revisions: Vec<_> = changed.resources.iter().map(revision_of).collect();
    assert_eq!(revisions, [1, 2]);
    let pay = api.get(get(v1::Kind::Service, "pay")).await.unwrap().into_inner();
    assert_eq!(revision_of(&pay), 2);
    let metadata = pay.metadata.unwrap();
    assert!(metadata.create_time.is_some() && metadata.update_time.is_some());
    control.stop().await;
}

#[tokio::test]
async fn a_dry_run_checks_and_writes_nothing() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let dry = |text: &str| v1::ApplyRequest {
        resources: yaml(text),
        dry_run: true,
        ..v1::ApplyRequest::default()
    };
    let answer = api.apply(dry(&zone("a"))).await.unwrap().into_inner();
    assert_eq!((answer.revision, answer.changed), (1, vec![true]));
    let missing = api.get(get(v1::Kind::Zone, "a")).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    let refused = api.apply(dry(&service("cart", 80))).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    control.stop().await;
}

#[tokio::test]
async fn a_refusal_names_every_bad_field_and_nothing_is_written() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let mut request = apply(&(zone("a") + &service("cart", 80) + &service("pay", 81)));
    if let Some(v1::resource::Spec::Service(service)) = &mut request.resources[1].spec {
        service.endpoints[0].zone = "nowhere".into();
        service.endpoints[0].address = "here".into();
    }
    if let Some(v1::resource::Spec::Service(service)) = &mut request.resources[2].spec {
        service.endpoints[0].zone = "B A D".into();
    }
    let refused = api.apply(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = refused.get_details_bad_request().unwrap();
    let fields: Vec<_> = details
        .field_violations
        .iter()
        .map(|v| v.field.as_str())
        .collect();
    assert_eq!(
        fields,
        [
            "resources[1].spec.endpoints[0].address",
            "resources[2].spec.endpoints[0].zone"
        ]
    );
    assert!(refused.message().contains("\"here\""), "{}", refused.message());
    // A reference is bad only beside resources that are good in themselves.
    let dangling = api.apply(apply(&service("cart", 80))).await.unwrap_err();
    let details = dangling.get_details_bad_request().unwrap();
    assert_eq!(
        details.field_violations[0].field,
        "resources[0].spec.endpoints[0].zone"
    );
    assert!(
        dangling.message().contains("there is no Zone/a; apply it first"),
        "{}",
        dangling.message()
    );
    let all = api.list(v1::ListRequest::default()).await.unwrap().into_inner();
    assert_eq!((all.resources.len(), all.revision), (0, 0));
    control.stop().await;
}

#[tokio::test]
async fn thousands_of_bad_fields_still_arrive_as_a_refusal() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let many: String = (0..3000).map(|i| service(&format!("s{i}"), 80)).collect();
    let refused = api.apply(apply(&many)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert!(
        refused.message().ends_with("(3000 bad fields in all)"),
        "{}",
        refused.message()
    );
    assert!(
        !refused
            .get_details_bad_request()
            .unwrap()
            .field_violations
            .is_empty()
    );
    control.stop().await;
}

#[tokio::test]
async fn a_delete_is_refused_while_others_refer_to_it() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&(zone("a") + &service("cart", 80))))
        .await
        .unwrap();
    let used = api.delete(delete(v1::Kind::Zone, "a", 0)).await.unwrap_err();
    assert_eq!(used.code(), Code::FailedPrecondition);
    assert_eq!(
        used.message(),
        "Zone/a is in use by Service/cart (spec.endpoints[0].zone)"
    );
    let other = api
        .delete(delete(v1::Kind::Service, "cart", 7))
        .await
        .unwrap_err();
    assert_eq!(other.code(), Code::Aborted);
    let gone = api.delete(delete(v1::Kind::Service, "cart", 1)).await.unwrap();
    assert_eq!(gone.into_inner().revision, 2);
    let again = api
        .delete(delete(v1::Kind::Service, "cart", 0))
        .await
        .unwrap_err();
    assert_eq!(again.code(), Code::NotFound);
    api.delete(delete(v1::Kind::Zone, "a", 0)).await.unwrap();
    control.stop().await;
}

#[tokio::test]
async fn pages_cover_everything_once() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let services: String = (0..5).map(|i| service(&format!("s{i}"), 80)).collect();
    api.apply(apply(&(zone("a") + &services))).await.unwrap();
    let (mut seen, mut sizes, mut page_token) = (Vec::new(), Vec::new(), String::new());
    loop {
        let page = v1::ListRequest {
            page_size: 4,
            page_token,
            ..v1::ListRequest::default()
        };
        let page = api.list(page).await.unwrap().into_inner();
        sizes.push(page.resources.len());
        seen.extend(page.resources.into_iter().map(|r| r.metadata.unwrap().name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(sizes, [4, 2]);
    assert_eq!(seen, ["a", "s0", "s1", "s2", "s3", "s4"]);
    let odd = v1::ListRequest {
        page_token: "elsewhere".into(),
        ..v1::ListRequest::default()
    };
    assert_eq!(api.list(odd).await.unwrap_err().code(), Code::InvalidArgument);
    control.stop().await;
}

/// Ten writers each add one to a shared number, ten times, with the revision that they read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_lost_between_concurrent_writers() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&(zone("a") + &service("n", 1)))).await.unwrap();
    let writers: Vec<_> = (0..10)
        .map(|_| {
            let mut api = api.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    loop {
                        let mut now = api.get(get(v1::Kind::Service, "n")).await.unwrap().into_inner();
                        if let Some(v1::resource::Spec::Service(service)) = &mut now.spec {
                            let (_, port) = service.endpoints[0].address.split_once(':').unwrap();
                            let next: u16 = port.parse::<u16>().unwrap() + 1;
                            service.endpoints[0].address = format!("127.0.0.1:{next}");
                        }
                        let request = v1::ApplyRequest {
                            resources: vec![now],
                            dry_run: false,
                            ..v1::ApplyRequest::default()
                        };
                        match api.apply(request).await {
                            Ok(_) => break,
                            Err(status) => assert_eq!(status.code(), Code::Aborted, "{status:?}"),
                        }
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let end = api.get(get(v1::Kind::Service, "n")).await.unwrap().into_inner();
    let Some(v1::resource::Spec::Service(service)) = end.spec else {
        panic!()
    };
    assert_eq!(service.endpoints[0].address, "127.0.0.1:101");
    control.stop().await;
}

/// A caller that goes away in the middle must not leave the checks with another view than the store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_goes_away_leaves_a_consistent_store() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&zone("a"))).await.unwrap();
    for i in 0..60u16 {
        let name = format!("s{i}");
        let mut caller = api.clone();
        let patience = std::time::Duration::from_micros(u64::from(i) * 150);
        let _ = tokio::time::timeout(patience, caller.apply(apply(&service(&name, 80)))).await;
    }
    // One more goes through after all of them.
    api.apply(apply(&service("last", 80))).await.unwrap();
    let all = api.list(v1::ListRequest::default()).await.unwrap().into_inner();
    for resource in &all.resources {
        let name = &resource.metadata.as_ref().unwrap().name;
        if name.starts_with('s') {
            let request = delete(v1::Kind::Service, name, revision_of(resource));
            api.delete(request)
                .await
                .unwrap_or_else(|status| panic!("{name}: {status:?}"));
        }
    }
    control.stop().await;
}

#[tokio::test]
async fn a_watch_tells_of_what_is_there_and_of_every_change() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&(zone("a") + &service("cart", 80))))
        .await
        .unwrap();
    let watch = v1::WatchRequest {
        after_revision: 0,
        kind: v1::Kind::Service.into(),
        ..v1::WatchRequest::default()
    };
    let mut events = api.watch(watch).await.unwrap().into_inner();
    let mut told = Vec::new();
    api.apply(apply(&service("cart", 81))).await.unwrap();
    api.delete(delete(v1::Kind::Service, "cart", 0)).await.unwrap();
    while told.last().is_none_or(|last| last != "deleted cart") {
        let event = tokio::time::timeout(SOON, events.message()).await.unwrap();
        match event.unwrap().unwrap().event.unwrap() {
            Event::Put(resource) => {
                let metadata = resource.metadata.unwrap();
                assert_eq!(metadata.name, "cart", "the zone is of another kind");
                told.push(format!("put cart at {}", metadata.revision));
            }
            Event::Deleted(reference) => told.push(format!("deleted {}", reference.name)),
            Event::Synced(_) => {}
        }
    }
    // Versions that were overtaken before they were told are left out, never the last word.
    assert_eq!(told.last().unwrap(), "deleted cart");
    let ahead = v1::WatchRequest {
        after_revision: 99,
        kind: 0,
        ..v1::WatchRequest::default()
    };
    let refused = api.watch(ahead).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(
        refused.message(),
        "after_revision: 99 has not been reached; the store is at 3"
    );
    // An open watch does not hold up the end.
    control.stop().await;
}

#[tokio::test]
async fn a_resource_shows_where_it_is_live_and_who_refuses_it() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&zone("a"))).await.unwrap();
    let mut streams = Vec::new();
    for name in ["p1", "p2"] {
        let mut stream = Stream::open(&site.push(control.address, name), hello(name))
            .await
            .unwrap();
        stream.change().await;
        streams.push(stream);
    }
    let standing = async || {
        let zone = site
            .api(control.address)
            .get(get(v1::Kind::Zone, "a"))
            .await
            .unwrap();
        zone.into_inner().status.unwrap()
    };
    eventually("both run it", async || standing().await.live == 2).await;
    let quarantined = v1::Quarantined {
        r#ref: Some(reference(v1::Kind::Zone, "a")),
        revision: 1,
        reason: "spec.failover[0]: is odd".into(),
        running_revision: 0,
    };
    streams[1].ack(1, vec![quarantined]).await;
    eventually("one refuses it", async || standing().await.refusals.len() == 1).await;
    let status = standing().await;
    assert_eq!((status.live, status.proxies), (1, 2));
    assert_eq!(
        (
            status.refusals[0].proxy.as_str(),
            status.refusals[0].reason.as_str()
        ),
        ("p2", "spec.failover[0]: is odd")
    );
    control.stop().await;
}

#[tokio::test]
async fn a_proxy_is_not_a_user() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let identity = site.identity(&Site::proxy_id("p1"));
    let channel = leeward_identity::channel::connect_lazy(identity, control.address);
    let mut api = v1::policy_service_client::PolicyServiceClient::new(channel);
    let refused = api.apply(apply(&zone("a"))).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    control.stop().await;
}
