//! Explanations and the linter over the API: of policy as it is, as it was, and as it would be.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use leeward_control::push::Timing;
use leeward_identity::SpiffeId;
use leeward_proto::v1;
use support::{DOMAIN, Site, apply, service, yaml, zone};
use tonic::Code;

fn route(name: &str, to: &str) -> String {
    format!(
        "apiVersion: leeward.dev/v1\nkind: Route\nmetadata: {{name: {name}}}\nspec: {{hostnames: [shop.example], rules: [{{backendRefs: [{{service: {to}}}]}}]}}\n---\n"
    )
}

fn question() -> v1::Question {
    v1::Question {
        host: "shop.example".to_owned(),
        ..v1::Question::default()
    }
}

fn codes(findings: &[v1::Finding]) -> Vec<&str> {
    findings.iter().map(|found| found.code.as_str()).collect()
}

#[tokio::test]
async fn whoever_writes_is_told_what_is_found_on_it_and_is_not_refused() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let before = zone("a") + &service("cart", 80) + &route("one", "cart");
    let told = api.apply(apply(&before)).await.unwrap().into_inner();
    assert_eq!((told.revision, codes(&told.warnings)), (1, vec![]));
    // The second is never reached.
    let second = v1::ApplyRequest {
        resources: yaml(&route("two", "cart")),
        dry_run: true,
        ..v1::ApplyRequest::default()
    };
    let told = api.apply(second.clone()).await.unwrap().into_inner();
    assert_eq!(codes(&told.warnings), ["LW201"]);
    let warning = &told.warnings[0];
    assert_eq!(warning.path, "spec.rules[0].matches[0]");
    assert!(warning.problem.contains("Route/one"), "{warning:?}");
    let written = v1::ApplyRequest {
        dry_run: false,
        ..second
    };
    let told = api.apply(written).await.unwrap().into_inner();
    assert_eq!((told.revision, codes(&told.warnings)), (2, vec!["LW201"]));
    // What has nothing to do with it is told without it.
    let told = api.apply(apply(&service("pay", 81))).await.unwrap().into_inner();
    assert_eq!(codes(&told.warnings), Vec::<&str>::new());

    let ada = SpiffeId::user(DOMAIN, "ada").unwrap();
    let mut explain = site.explain_as(control.address, &ada);
    let all = explain
        .lint(v1::LintRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((all.revision, codes(&all.findings)), (3, vec!["LW201", "LW111"]));
    let over = v1::LintRequest {
        resources: yaml(&route("two", "pay").replace("shop.example", "pay.example")),
    };
    let mended = explain.lint(over).await.unwrap().into_inner();
    assert_eq!(codes(&mended.findings), Vec::<&str>::new());
    control.stop().await;
}

#[tokio::test]
async fn a_request_is_explained_by_policy_now_then_and_as_it_would_be() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut api = site.api(control.address);
    let first = zone("a") + &service("cart", 80) + &service("pay", 81) + &route("shop", "cart");
    api.apply(apply(&first)).await.unwrap();
    api.apply(apply(&route("shop", "pay"))).await.unwrap();
    let ada = SpiffeId::user(DOMAIN, "ada").unwrap();
    let mut client = site.explain_as(control.address, &ada);
    let mut ask = async |revision, over: &str| {
        let request = v1::ExplainRequest {
            question: Some(question()),
            revision,
            resources: if over.is_empty() { vec![] } else { yaml(over) },
        };
        client.explain(request).await.map(tonic::Response::into_inner)
    };
    let now = ask(0, "").await.unwrap();
    assert_eq!(now.revision, 2);
    assert!(
        now.summary.contains("goes to pay, by Route/shop"),
        "{}",
        now.summary
    );
    let then = ask(1, "").await.unwrap();
    assert_eq!(then.revision, 1);
    assert!(then.summary.contains("goes to cart"), "{}", then.summary);
    let would = ask(0, &route("shop", "cart")).await.unwrap();
    assert!(would.summary.contains("goes to cart"), "{}", would.summary);
    assert_eq!(ask(9, "").await.unwrap_err().code(), Code::NotFound);

    let nobody = v1::ExplainRequest {
        question: Some(v1::Question::default()),
        ..v1::ExplainRequest::default()
    };
    let refused = client.explain(nobody.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().starts_with("question.host: is missing"),
        "{refused}"
    );
    // It is for users.
    let mut proxy = site.explain_as(control.address, &Site::proxy_id("a1"));
    assert_eq!(
        proxy.explain(nobody).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    let lint = proxy.lint(v1::LintRequest::default()).await.unwrap_err();
    assert_eq!(lint.code(), Code::PermissionDenied);
    control.stop().await;
}
