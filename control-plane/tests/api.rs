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
        ..v1::DeleteRequest::default()
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

#[tokio::test]
async fn two_managers_do_not_undo_each_other() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let by = |manager: &str, text: &str| v1::ApplyRequest {
        manager: manager.into(),
        ..apply(text)
    };
    let both = zone("a") + &service("cart", 80);
    api.apply(by("ci", &both)).await.unwrap();
    let refused = api.apply(by("cd", &service("cart", 81))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(
        (
            info.reason.as_str(),
            info.metadata["manager"].as_str(),
            info.metadata["asked"].as_str()
        ),
        ("MANAGER_CONFLICT", "ci", "cd")
    );
    // What is as asked already is nobody's conflict.
    assert_eq!(
        api.apply(by("cd", &both)).await.unwrap().into_inner().changed,
        [false, false]
    );
    // Who reads, changes and writes back writes for the one whose it is.
    let mut cart = api
        .get(get(v1::Kind::Service, "cart"))
        .await
        .unwrap()
        .into_inner();
    if let Some(v1::resource::Spec::Service(service)) = &mut cart.spec {
        service.endpoints[0].address = "127.0.0.1:82".into();
    }
    let request = v1::ApplyRequest {
        resources: vec![cart],
        manager: "ada".into(),
        ..v1::ApplyRequest::default()
    };
    let applied = api.apply(request).await.unwrap().into_inner();
    assert_eq!(applied.resources[0].metadata.as_ref().unwrap().manager, "ci");
    // A zone's drain is operation, whoever's the zone is.
    let mut zone_a = api.get(get(v1::Kind::Zone, "a")).await.unwrap().into_inner();
    zone_a.metadata.as_mut().unwrap().manager.clear();
    #[expect(clippy::disallowed_methods, reason = "a drain ends by the wall clock")]
    let now = std::time::SystemTime::now();
    if let Some(v1::resource::Spec::Zone(zone)) = &mut zone_a.spec {
        zone.drain = Some(v1::ZoneDrain {
            start_time: Some(now.into()),
            step: 100,
            interval: None,
            expire_time: Some((now + std::time::Duration::from_secs(600)).into()),
            reason: "power".into(),
        });
    }
    let request = v1::ApplyRequest {
        resources: vec![zone_a],
        ..v1::ApplyRequest::default()
    };
    let applied = api.apply(request).await.unwrap().into_inner();
    assert_eq!(applied.resources[0].metadata.as_ref().unwrap().manager, "ci");
    let taken = v1::ApplyRequest {
        force: true,
        ..by("cd", &service("cart", 81))
    };
    let taken = api.apply(taken).await.unwrap().into_inner();
    assert_eq!(taken.resources[0].metadata.as_ref().unwrap().manager, "cd");
    control.stop().await;
}

#[tokio::test]
async fn a_prune_deletes_what_its_manager_has_left_out_within_bounds() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let labelled = |name: &str| service(name, 80).replace("metadata: {", "metadata: {labels: {app: shop}, ");
    let of_shop = |names: &[&str]| names.iter().map(|name| labelled(name)).collect::<String>();
    let by = |manager: &str, text: &str| v1::ApplyRequest {
        manager: manager.into(),
        ..apply(text)
    };
    api.apply(by("infra", &zone("a"))).await.unwrap();
    api.apply(by("ci", &(of_shop(&["s1", "s2", "s3"]) + &service("other", 1))))
        .await
        .unwrap();
    api.apply(by("cd", &of_shop(&["theirs"]))).await.unwrap();
    let prune = |text: &str, max_deletes| v1::ApplyRequest {
        prune: Some(v1::Prune {
            selector: "app=shop".into(),
            max_deletes,
        }),
        ..by("ci", text)
    };
    let refused = api.apply(prune(&of_shop(&["s1"]), 1)).await.unwrap_err();
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "TOO_MANY_DELETES"
    );
    let names = |refs: Vec<v1::ResourceRef>| refs.into_iter().map(|r| r.name).collect::<Vec<_>>();
    let tried = v1::ApplyRequest {
        dry_run: true,
        ..prune(&of_shop(&["s1"]), 2)
    };
    assert_eq!(
        names(api.apply(tried.clone()).await.unwrap().into_inner().pruned),
        ["s2", "s3"]
    );
    let differs = api.diff(tried).await.unwrap().into_inner();
    assert!(
        differs
            .changes
            .iter()
            .all(|change| change.before.is_some() && change.after.is_none()),
        "{differs:?}"
    );
    let done = api.apply(prune(&of_shop(&["s1"]), 2)).await.unwrap().into_inner();
    assert_eq!(
        (names(done.pruned), done.revision),
        (vec!["s2".to_owned(), "s3".to_owned()], 4),
        "in one revision"
    );
    let left = api.list(v1::ListRequest::default()).await.unwrap().into_inner();
    let left: Vec<_> = left
        .resources
        .into_iter()
        .map(|r| r.metadata.unwrap().name)
        .collect();
    assert_eq!(left, ["a", "other", "s1", "theirs"]);
    // What is in use stays, and so does everything else then.
    let mut all = prune(&service("other", 2), 0);
    all.manager = "infra".into();
    all.prune.as_mut().unwrap().selector.clear();
    all.force = true;
    let refused = api.apply(all).await.unwrap_err();
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "RESOURCE_IN_USE"
    );
    control.stop().await;
}

#[tokio::test]
async fn a_diff_shows_what_was_meant_and_nothing_else() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    api.apply(apply(&(zone("a") + &service("cart", 80))))
        .await
        .unwrap();
    // The same, said with a default written out, is the same.
    let same = service("cart", 80).replace("spec: {", "spec: {protocol: HTTP1, ");
    assert!(
        api.diff(apply(&same))
            .await
            .unwrap()
            .into_inner()
            .changes
            .is_empty()
    );
    let changed = same.replace("HTTP1", "HTTP2") + &zone("b");
    let answer = api.diff(apply(&changed)).await.unwrap().into_inner();
    assert_eq!((answer.changes.len(), answer.revision), (2, 1));
    let (before, after) = (
        answer.changes[0].before.clone().unwrap(),
        answer.changes[0].after.clone().unwrap(),
    );
    assert_eq!(before.metadata, after.metadata);
    let texts = [&before, &after].map(leeward_proto::manifest::to_yaml);
    let differ: Vec<_> = texts[0]
        .lines()
        .zip(texts[1].lines())
        .filter(|(a, b)| a != b)
        .collect();
    assert_eq!(differ, [("  protocol: HTTP1", "  protocol: HTTP2")]);
    assert!(answer.changes[1].before.is_none());
    assert_eq!(
        api.list(v1::ListRequest::default())
            .await
            .unwrap()
            .into_inner()
            .revision,
        1,
        "nothing is written"
    );
    let refused = api
        .diff(apply(&service("x", 1).replace("zone: a", "zone: c")))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    control.stop().await;
}

/// Pages go on while others write: what is there throughout is told once.
#[tokio::test]
async fn pages_are_consistent_while_others_write() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let services: String = (10..60).map(|i| service(&format!("s{i}"), 80)).collect();
    api.apply(apply(&(zone("a") + &services))).await.unwrap();
    let (mut seen, mut page_token) = (Vec::new(), String::new());
    for round in 0.. {
        let page = v1::ListRequest {
            page_size: 5,
            page_token,
            kind: v1::Kind::Service.into(),
            selector: "!hidden".into(),
        };
        let page = api.list(page).await.unwrap().into_inner();
        seen.extend(page.resources.into_iter().map(|r| r.metadata.unwrap().name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        // Before, at and after where the pages are.
        api.apply(apply(
            &(service(&format!("a{round}"), 1)
                + &service("s30", 1000 + round)
                + &service(&format!("z{round}"), 1)),
        ))
        .await
        .unwrap();
        if round == 2 {
            let last = seen.last().unwrap().clone();
            api.delete(delete(v1::Kind::Service, &last, 0)).await.unwrap();
        }
    }
    let of_old: Vec<_> = seen
        .iter()
        .filter(|name| name.starts_with('s'))
        .cloned()
        .collect();
    let want: Vec<_> = (10..60).map(|i| format!("s{i}")).collect();
    assert_eq!(of_old, want);
    control.stop().await;
}
