//! The API over HTTP and JSON, and what tools find out of it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests"
)]

#[path = "support/http.rs"]
mod http_client;
mod support;

use http_body_util::BodyExt;
use http_client::Http;
use leeward_control::push::Timing;
use leeward_identity::SpiffeId;
use leeward_proto::v1;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::process::Stdio;
use support::{Control, SOON, Site, apply, service, zone};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const YAML: (&str, &str) = ("content-type", "application/yaml");
const JSON: (&str, &str) = ("content-type", "application/json");

fn ada(site: &Site, control: &Control) -> Http {
    Http {
        identity: site.identity(&SpiffeId::user("leeward.test", "ada").unwrap()),
        address: control.address,
    }
}

#[tokio::test]
async fn resources_are_written_and_read_as_over_grpc() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let http = ada(&site, &control);
    let both = zone("a") + &service("cart", 80);
    let applied = http.send("POST", "/v1/policy", &[YAML], &both).await;
    assert_eq!(applied.status, 200, "{applied:?}");
    assert_eq!(applied.json()["revision"], "1", "64-bit numbers are texts");
    assert_eq!(applied.json()["changed"], json!([true, true]));
    let cart = http.get("/v1/policy/services/cart").await.json();
    assert_eq!(cart["service"]["endpoints"][0]["address"], "127.0.0.1:80");
    assert_eq!(cart["metadata"]["manager"], "spiffe://leeward.test/user/ada");
    // What was read is written back changed, with its revision as the precondition.
    let mut changed = cart.clone();
    changed["service"]["endpoints"][0]["address"] = "127.0.0.1:81".into();
    let path = "/v1/policy/Service/cart";
    let put = http.send("PUT", path, &[JSON], &changed.to_string()).await;
    assert_eq!(
        (put.status.as_u16(), put.json()["revision"].clone()),
        (200, json!("2")),
        "{put:?}"
    );
    let again = http.send("PUT", path, &[JSON], &changed.to_string()).await;
    assert_eq!(
        (again.status.as_u16(), again.reason().as_str()),
        (409, "REVISION_CONFLICT"),
        "{again:?}"
    );
    let new = http
        .send(
            "PUT",
            "/v1/policy/service/cart?ifAbsent&dryRun=true",
            &[YAML],
            &service("cart", 99),
        )
        .await;
    assert_eq!(
        (new.status.as_u16(), new.reason().as_str()),
        (409, "RESOURCE_EXISTS"),
        "{new:?}"
    );
    let manifest = json!({"apiVersion": "leeward.dev/v1", "kind": "Service", "metadata": {"name": "pay", "labels": {"team": "x"}},
        "spec": {"endpoints": [{"address": "127.0.0.1:82", "zone": "a"}]}});
    let put = http
        .send("PUT", "/v1/policy/service/pay", &[JSON], &manifest.to_string())
        .await;
    assert_eq!(put.status, 200, "{put:?}");
    let listed = http
        .get("/v1/policy?selector=team%20in%20(x,y)&pageSize=1")
        .await
        .json();
    assert_eq!(listed["resources"][0]["metadata"]["name"], "pay");
    assert!(listed.get("nextPageToken").is_none(), "{listed}");
    let gone = http
        .send("DELETE", "/v1/policy/service/pay?revision=3", &[], "")
        .await;
    assert_eq!(
        (gone.status.as_u16(), gone.json()["revision"].clone()),
        (200, json!("4"))
    );
    let uniform = http
        .post(
            "/v1/PolicyService/Get",
            r#"{"ref": {"kind": "KIND_ZONE", "name": "a"}}"#,
        )
        .await;
    assert_eq!(uniform.json()["metadata"]["revision"], "1");
    control.stop().await;
}

#[tokio::test]
async fn refusals_are_statuses_in_json() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let http = ada(&site, &control);
    for (method, path, headers, body, status, reason) in [
        (
            "GET",
            "/v1/policy/zone/nowhere",
            &[][..],
            "",
            404,
            "RESOURCE_NOT_FOUND",
        ),
        ("GET", "/v1/policy/pods", &[], "", 404, ""),
        ("GET", "/", &[], "", 404, ""),
        ("PATCH", "/v1/policy/zone/a", &[JSON], "{}", 405, ""),
        ("GET", "/v1/PolicyService/List", &[], "", 405, ""),
        ("POST", "/v1/PushService/Subscribe", &[JSON], "{}", 404, ""),
        ("POST", "/v1/PolicyService/List", &[], "{}", 415, ""),
        (
            "POST",
            "/v1/PolicyService/List",
            &[("content-type", "text/plain")],
            "{}",
            415,
            "",
        ),
        (
            "POST",
            "/v1/PolicyService/List",
            &[JSON],
            "{",
            400,
            "INVALID_FIELD",
        ),
        (
            "POST",
            "/v1/PolicyService/List",
            &[JSON],
            "{} {}",
            400,
            "INVALID_FIELD",
        ),
        (
            "POST",
            "/v1/PolicyService/List",
            &[JSON],
            r#"{"nothing": 1}"#,
            400,
            "INVALID_FIELD",
        ),
        (
            "POST",
            "/v1/PolicyService/List",
            &[JSON],
            r#"{"pageSize": 99999}"#,
            400,
            "INVALID_FIELD",
        ),
        ("GET", "/v1/policy?selector=a%20b", &[], "", 400, "INVALID_FIELD"),
        ("GET", "/v1/policy?nothing=1", &[], "", 400, "INVALID_FIELD"),
        ("GET", "/v1/policy?pageSize=many", &[], "", 400, "INVALID_FIELD"),
        (
            "GET",
            "/v1/policy?watch&afterRevision=99",
            &[],
            "",
            400,
            "INVALID_FIELD",
        ),
        (
            "PUT",
            "/v1/policy/zone/b",
            &[YAML],
            "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {}\n",
            400,
            "INVALID_FIELD",
        ),
        (
            "PUT",
            "/v1/policy/route/a",
            &[YAML],
            "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {}\n",
            400,
            "INVALID_FIELD",
        ),
        (
            "PUT",
            "/v1/policy/zone/a",
            &[YAML],
            "apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {name: a}\nspec: {fail: [b]}\n",
            400,
            "INVALID_FIELD",
        ),
    ] {
        let answer = http.send(method, path, headers, body).await;
        assert_eq!(answer.status, status, "{method} {path} {body}: {answer:?}");
        let json = answer.json();
        assert!(json["code"].is_i64() && json["message"].is_string(), "{json}");
        if !reason.is_empty() {
            assert_eq!(answer.reason(), reason, "{method} {path} {body}: {answer:?}");
        }
    }
    // The same in both, to the letter.
    let over_http = http.get("/v1/policy/zone/nowhere").await.json();
    let request = v1::GetRequest {
        r#ref: Some(support::reference(v1::Kind::Zone, "nowhere")),
    };
    let over_grpc = site.api(control.address).get(request).await.unwrap_err();
    assert_eq!(over_http["message"], over_grpc.message());
    // A proxy is not a user, here either.
    let proxy = Http {
        identity: site.identity(&Site::proxy_id("p1")),
        address: control.address,
    };
    let answer = proxy.get("/v1/policy").await;
    assert_eq!(
        (answer.status.as_u16(), answer.reason().as_str()),
        (403, "NOT_A_USER")
    );
    assert_eq!(proxy.get("/openapi.json").await.status, 403);
    control.stop().await;
}

#[tokio::test]
async fn a_watch_is_lines_as_they_happen() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let http = ada(&site, &control);
    let mut api = site.api(control.address);
    api.apply(apply(&zone("a"))).await.unwrap();
    let response = http
        .open("GET", "/v1/policy/zones?watch&afterRevision=0", &[], "")
        .await;
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let mut body = response.into_body();
    let mut text = String::new();
    let mut until = async |want: &str| {
        while !text.contains(want) {
            let frame = tokio::time::timeout(SOON, body.frame())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
        }
    };
    until("\"synced\":\"1\"").await;
    api.apply(apply(&zone("b"))).await.unwrap();
    until("\"synced\":\"2\"").await;
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["result"]["revision"].is_string(), "{line}");
    }
    assert!(text.contains("\"name\":\"b\""), "{text}");
    control.stop().await;
}

/// A module comes in as lines, too.
#[tokio::test]
async fn a_stream_of_messages_is_lines() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let http = ada(&site, &control);
    let lines = "{\"header\": {}}\n\n{\"chunk\": \"AGFzbQEAAAA=\"}\n";
    let pushed = http
        .send(
            "POST",
            "/v1/PluginService/Push",
            &[("content-type", "application/x-ndjson")],
            lines,
        )
        .await;
    // It is read whole, and is no plugin's.
    assert_eq!(
        (pushed.status.as_u16(), pushed.reason().as_str()),
        (400, "INVALID_FIELD"),
        "{pushed:?}"
    );
    assert!(
        pushed.json()["message"].as_str().unwrap().starts_with("module"),
        "{pushed:?}"
    );
    let torn = http
        .send(
            "POST",
            "/v1/PluginService/Push",
            &[JSON],
            "{\"header\": {}}\n{\"chunk\":",
        )
        .await;
    assert!(
        torn.json()["message"]
            .as_str()
            .unwrap()
            .contains("is not PushModuleRequest in JSON"),
        "{torn:?}"
    );
    control.stop().await;
}

/// Every path of the document is served, and the document is one.
#[tokio::test]
async fn the_document_is_what_is_served() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let http = ada(&site, &control);
    let answer = http.get("/openapi.json").await;
    assert_eq!(answer.headers["content-type"], "application/json");
    let document = answer.json();
    assert_eq!(document["openapi"], "3.1.0");
    let mut asked = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let at = path.replace("{kind}", "zone").replace("{name}", "nowhere");
            let has_body = operation["requestBody"].is_object();
            let (headers, body) = if has_body {
                (&[JSON][..], "{}")
            } else {
                (&[][..], "")
            };
            let response = http.open(&method.to_uppercase(), &at, headers, body).await;
            // A watch goes on and on.
            if response.headers()["content-type"] == "application/x-ndjson" {
                assert_eq!(response.status(), 200, "{method} {path}");
                continue;
            }
            let answer = http.send(&method.to_uppercase(), &at, headers, body).await;
            let reason = if answer.status.is_success() {
                String::new()
            } else {
                answer.reason()
            };
            let is_served =
                answer.status.is_success() || !["", "OTHER", "UNKNOWN_METHOD"].contains(&reason.as_str());
            // Without an authority there is no service for certificates, and it says so.
            let no_authority = path.starts_with("/v1/Identity/") && answer.status == 501;
            assert!(is_served || no_authority, "{method} {path}: {answer:?}");
            asked.insert(format!("{method} {path}"));
        }
    }
    for want in [
        "post /v1/PolicyService/Apply",
        "get /v1/policy/{kind}/{name}",
        "post /v1/AuditService/ListAudit",
        "post /v1/Identity/Rotate",
    ] {
        assert!(asked.contains(want), "{want}");
    }
    validate(&answer.body).await;
    control.stop().await;
}

/// By a validator from PyPI, where there is one.
async fn validate(document: &str) {
    let program = "import json, sys\ntry:\n import openapi_spec_validator as v\nexcept ImportError:\n sys.exit(77)\nv.validate(json.load(sys.stdin))\n";
    let mut python = Command::new("python3");
    python
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let Ok(mut python) = python.spawn() else {
        println!("there is no python3: the document is not validated");
        return;
    };
    let mut stdin = python.stdin.take().unwrap();
    // One that ends early says why itself.
    let _ = stdin.write_all(document.as_bytes()).await;
    drop(stdin);
    let output = python.wait_with_output().await.unwrap();
    if output.status.code() == Some(77) {
        println!("there is no openapi-spec-validator: the document is not validated");
        return;
    }
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn curl_gets_along_with_it() {
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let dir = site.identity_dir(&Site::user_id("ada"));
    let run = async |arguments: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args([
            "-sS",
            "--max-time",
            "20",
            "-w",
            "\n%{http_code} %{http_version}",
            "--cacert",
        ])
        .arg(dir.join("bundle.pem"));
        curl.arg("--cert")
            .arg(dir.join("cert.pem"))
            .arg("--key")
            .arg(dir.join("key.pem"));
        curl.arg("--connect-to").arg(format!("::{}", control.address));
        let output = curl.args(arguments).kill_on_drop(true).output().await.ok()?;
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Some(String::from_utf8(output.stdout).unwrap())
    };
    let file = site.dir.join("zone.yaml");
    std::fs::write(&file, zone("a")).unwrap();
    let file = format!("@{}", file.display());
    let url = "https://leeward-control/v1/policy/zone/a";
    let put = run(&[
        "--http1.1",
        "-X",
        "PUT",
        "-H",
        "content-type: application/yaml",
        "--data-binary",
        &file,
        url,
    ])
    .await;
    let Some(put) = put else {
        println!("there is no curl here");
        return;
    };
    assert!(put.ends_with("\n200 1.1"), "{put}");
    let got = run(&["--http2", url]).await.unwrap();
    assert!(
        got.ends_with("\n200 2") && got.contains("\"name\":\"a\""),
        "{got}"
    );
    let none = run(&["https://leeward-control/v1/policy/zone/b"]).await.unwrap();
    assert!(
        none.contains("RESOURCE_NOT_FOUND") && none.contains("\n404 "),
        "{none}"
    );
    control.stop().await;
}

#[tokio::test]
async fn tools_find_out_what_there_is_to_call() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let site = Site::new();
    let control = site.start("store", Timing::DEFAULT).await;
    let mut client = ServerReflectionClient::new(site.channel(control.address, "ada"));
    let ask = |what: MessageRequest| tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(what),
    };
    let asked = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol(
            "leeward.v1.PolicyService".into(),
        )),
        ask(MessageRequest::FileContainingSymbol(
            "google.rpc.ErrorInfo".into(),
        )),
    ];
    let answers = client
        .server_reflection_info(tokio_stream::iter(asked))
        .await
        .unwrap();
    let mut answers = answers.into_inner();
    let mut told = Vec::new();
    while let Some(answer) = tokio::time::timeout(SOON, answers.message())
        .await
        .unwrap()
        .unwrap()
    {
        told.push(answer.message_response.unwrap());
    }
    let MessageResponse::ListServicesResponse(services) = &told[0] else {
        panic!("{told:?}")
    };
    assert!(
        services
            .service
            .iter()
            .any(|s| s.name == "leeward.v1.PolicyService"),
        "{services:?}"
    );
    assert!(
        matches!(
            &told[1..],
            [
                MessageResponse::FileDescriptorResponse(_),
                MessageResponse::FileDescriptorResponse(_)
            ]
        ),
        "{told:?}"
    );
    // Nobody else finds out.
    let proxy = leeward_identity::channel::connect_lazy(site.identity(&Site::proxy_id("p")), control.address);
    let asked = [ask(MessageRequest::ListServices(String::new()))];
    let refused = ServerReflectionClient::new(proxy)
        .server_reflection_info(tokio_stream::iter(asked))
        .await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::PermissionDenied);
    control.stop().await;
}
