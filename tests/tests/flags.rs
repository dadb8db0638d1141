//! Feature flags as the node's workloads read them: from policy, and from a file of the node's own.

use anyhow::{Context, bail, ensure};
use http::Method;
use leeward_testkit::{
    Client, Mesh, Node, Port, Process, Protocol, Reply, TempDir, binaries, bytes_body, eventually, request,
    with_header,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How soon a change must be seen.
const SOON: Duration = Duration::from_secs(1);
const BULK: &str = "/ofrep/v1/evaluate/flags";

/// A flag `colour` that is red, or blue for whom the context says so; and one each of other kinds.
fn document(default: &str) -> String {
    json!({
        "flags": {
            "colour": {
                "state": "ENABLED", "variants": {"red": "#f00", "blue": "#00f"}, "defaultVariant": default,
                "targeting": {"if": [{"==": [{"var": "user.likes"}, "blue"]}, "blue", null]},
                "metadata": {"owner": "shop"},
            },
            "limit": {"state": "ENABLED", "variants": {"low": 5, "high": 50}, "defaultVariant": "low"},
            "old": {"state": "DISABLED", "variants": {"on": true}, "defaultVariant": "on"},
            "a b/ü": {"state": "ENABLED", "variants": {"on": true}, "defaultVariant": "on"},
            "wrong": {"state": "ENABLED", "variants": {"on": true}, "targeting": {"cat": ["of", "f"]}},
        },
        "metadata": {"flagSetId": "colours"},
    })
    .to_string()
}

/// The same as a resource.
fn resource(name: &str, document: &str) -> String {
    format!(
        "---\napiVersion: leeward.dev/v1\nkind: FeatureFlags\nmetadata: {{name: {name}}}\nspec: {document}\n"
    )
}

/// Writes a file as it should be done: whole or not at all.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)?;
    Ok(std::fs::rename(beside, path)?)
}

/// A mesh of one node, with this for a flags file.
async fn with_file(text: &str) -> anyhow::Result<(Mesh, PathBuf, TempDir)> {
    let dir = TempDir::new()?;
    let path = dir.path().join("flags.json");
    write(&path, text)?;
    let mesh = Mesh::builder()
        .node("a", "a1")
        .flag("--flags", &path.display().to_string())
        .start()
        .await?;
    Ok((mesh, path, dir))
}

async fn post(node: &Node, path: &str, body: impl Into<bytes::Bytes>) -> anyhow::Result<Reply> {
    let client = Client::new(node.ofrep, Protocol::Http1);
    client
        .call(request(Method::POST, "ofrep", path, bytes_body(body)))
        .await
}

/// Evaluates one flag.
async fn flag(node: &Node, key: &str, context: &Value) -> anyhow::Result<(u16, Value)> {
    let body = json!({"context": context}).to_string();
    let reply = post(node, &format!("{BULK}/{key}"), body).await?;
    ensure!(reply.header("content-type") == "application/json");
    Ok((reply.status.as_u16(), serde_json::from_slice(&reply.body)?))
}

/// Waits until the colour is this one, for as long as a change may take.
async fn colour(node: &Node, wanted: &str) -> anyhow::Result<()> {
    eventually(&format!("{wanted} at {}", node.name), SOON, || async {
        let (status, answer) = flag(node, "colour", &json!({})).await?;
        ensure!(status == 200, "{status}: {answer}");
        let variant = answer.get("variant").and_then(Value::as_str);
        ensure!(variant == Some(wanted), "{answer}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_reads_flags_one_by_one() -> anyhow::Result<()> {
    let (mesh, _path, _dir) = with_file(&document("red")).await?;
    let node = mesh.node("a1")?;
    let metadata = json!({"flagSetId": "colours", "owner": "shop"});
    let set = json!({"flagSetId": "colours"});
    let cases = [
        (
            "colour",
            json!({"targetingKey": "u"}),
            200,
            json!({"key": "colour", "reason": "DEFAULT", "variant": "red", "value": "#f00", "metadata": metadata}),
        ),
        (
            "colour",
            json!({"user": {"likes": "blue"}}),
            200,
            json!({"key": "colour", "reason": "TARGETING_MATCH", "variant": "blue", "value": "#00f", "metadata": metadata}),
        ),
        (
            "limit",
            json!(null),
            200,
            json!({"key": "limit", "reason": "STATIC", "variant": "low", "value": 5, "metadata": set}),
        ),
        // Without a value, the workload's own default is meant.
        (
            "old",
            json!({}),
            200,
            json!({"key": "old", "reason": "DISABLED", "metadata": set}),
        ),
        (
            "a%20b/%C3%BC",
            json!({}),
            200,
            json!({"key": "a b/ü", "reason": "STATIC", "variant": "on", "value": true, "metadata": set}),
        ),
        (
            "wrong",
            json!({}),
            400,
            json!({"key": "wrong", "errorCode": "GENERAL", "metadata": set,
                "errorDetails": "the targeting of flag `wrong` chose what is none of its variants"}),
        ),
        (
            "absent",
            json!({}),
            404,
            json!({"key": "absent", "errorCode": "FLAG_NOT_FOUND", "errorDetails": "there is no flag `absent`", "metadata": {}}),
        ),
        (
            "colour",
            json!("blue"),
            400,
            json!({"key": "colour", "errorCode": "INVALID_CONTEXT", "errorDetails": "context: is no object", "metadata": {}}),
        ),
    ];
    for (key, context, status, expected) in cases {
        assert_eq!(
            flag(node, key, &context).await?,
            (status, expected),
            "{key} {context}"
        );
    }

    // Neither a body nor a context has to be there, but what is there has to be one.
    let path = format!("{BULK}/limit");
    for (body, status, code) in [
        ("", 200, ""),
        ("{}", 200, ""),
        ("{", 400, "PARSE_ERROR"),
        ("[]", 400, "PARSE_ERROR"),
    ] {
        let reply = post(node, &path, body).await?;
        let answer: Value = serde_json::from_slice(&reply.body)?;
        assert_eq!(reply.status, status, "{body:?}");
        assert_eq!(
            answer
                .get("errorCode")
                .and_then(Value::as_str)
                .unwrap_or_default(),
            code,
            "{body:?}"
        );
    }
    let long = format!("{{\"context\": {{\"x\": \"{}\"}}}}", "x".repeat(64 << 10));
    assert_eq!(post(node, &path, long).await?.status, 413);
    let client = Client::new(node.ofrep, Protocol::Http1);
    let got = client.get("ofrep", &path).await?;
    assert_eq!((got.status.as_u16(), got.header("allow")), (405, "POST"));
    for path in [
        "/",
        "/ofrep/v1/evaluate",
        "/ofrep/v1/evaluate/flagship",
        "/metrics",
    ] {
        assert_eq!(post(node, path, "").await?.status, 404, "{path}");
    }
    assert_eq!(post(node, &format!("{BULK}/%ff"), "").await?.status, 400);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_reads_all_flags_and_only_what_has_changed() -> anyhow::Result<()> {
    let (mesh, path, _dir) = with_file(&document("red")).await?;
    let node = mesh.node("a1")?;
    let client = Client::new(node.ofrep, Protocol::Http1);
    let ask = async |context: Value, tag: &str| {
        let body = bytes_body(json!({"context": context}).to_string());
        let asked = request(Method::POST, "ofrep", BULK, body);
        client.call(with_header(asked, "if-none-match", tag)).await
    };
    let first = ask(json!({"targetingKey": "u"}), "").await?;
    assert_eq!(first.status, 200);
    let answer: Value = serde_json::from_slice(&first.body)?;
    let flags = answer
        .get("flags")
        .and_then(Value::as_array)
        .context("no flags")?;
    let keys: Vec<_> = flags
        .iter()
        .filter_map(|flag| flag.get("key")?.as_str())
        .collect();
    assert_eq!(keys, ["a b/ü", "colour", "limit", "old", "wrong"]);
    assert_eq!(answer.get("metadata"), Some(&json!({"flagSetId": "colours"})));

    let tag = first.header("etag").to_owned();
    let again = ask(json!({"targetingKey": "u"}), &tag).await?;
    assert_eq!(
        (again.status.as_u16(), again.body.len(), again.header("etag")),
        (304, 0, &*tag)
    );
    // For another context there is another answer, if it comes to something else.
    let other = ask(json!({"targetingKey": "u", "user": {"likes": "blue"}}), &tag).await?;
    assert_eq!(other.status, 200);
    write(&path, &document("blue"))?;
    colour(node, "blue").await?;
    let changed = ask(json!({"targetingKey": "u"}), &tag).await?;
    assert_eq!(changed.status, 200);
    assert_ne!(changed.header("etag"), tag);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_breaks_leaves_what_it_was_before() -> anyhow::Result<()> {
    let (mesh, path, _dir) = with_file(&document("red")).await?;
    let node = mesh.node("a1")?;
    let broken = |wanted: f64| {
        eventually("the gauge", SOON, move || async move {
            let value = node.metric("leeward_flags_file_broken", &[]).await?;
            ensure!((value - wanted).abs() < 0.5, "{value}");
            Ok(())
        })
    };
    broken(0.0).await?;
    colour(node, "red").await?;
    write(&path, &document("purple"))?;
    broken(1.0).await?;
    colour(node, "red").await?;
    write(&path, &document("blue"))?;
    broken(0.0).await?;
    colour(node, "blue").await?;
    std::fs::remove_file(&path)?;
    broken(1.0).await?;
    colour(node, "blue").await?;
    // A file that is written in place, in two steps, is read when it is whole.
    std::fs::write(&path, "{\"flags\":")?;
    std::fs::write(&path, document("red"))?;
    broken(0.0).await?;
    colour(node, "red").await?;
    let log = node.process.log()?;
    let told = log.matches("the flags are broken").count();
    assert!((2..=3).contains(&told), "told {told} times: {log}");
    assert!(
        log.contains("flags.colour.defaultVariant: is \"purple\""),
        "{log}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flags_of_policy_reach_every_proxy_and_a_file_goes_before_them() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    for default in ["red", "blue", "red"] {
        mesh.apply_only(&resource("shop", &document(default))).await?;
        for name in ["a1", "b1"] {
            let node = mesh.node(name)?;
            colour(node, default).await?;
        }
    }
    let dir = TempDir::new()?;
    let path = dir.path().join("flags.json");
    let own = json!({"flags": {"colour": {"state": "ENABLED", "variants": {"mine": 1}, "defaultVariant": "mine"}},
        "metadata": {"flagSetId": "own"}});
    write(&path, &own.to_string())?;
    let again = mesh
        .start_again_with("a1", &[("--flags", &path.display().to_string())])
        .await?;
    colour(&again, "mine").await?;
    // What the file doesn't have is policy's.
    assert_eq!(flag(&again, "limit", &json!({})).await?.0, 200);
    let bulk: Value = serde_json::from_slice(&post(&again, BULK, "").await?.body)?;
    assert_eq!(bulk.get("metadata"), Some(&json!({"flagSetId": "own"})));

    // A level of degradation is not in this; a flag that is gone is not found any more.
    mesh.delete(leeward_proto::v1::Kind::FeatureFlags, "shop").await?;
    for name in ["a1", "b1"] {
        let node = mesh.node(name)?;
        assert_eq!(flag(node, "colour", &json!({})).await?.0, 404);
    }
    Ok(())
}

/// Starts a proxy of its own that is not expected to come up, and returns its log.
async fn refused(mesh: &Mesh, flags: &[(&str, &str)]) -> anyhow::Result<String> {
    let line = mesh.proxy_command("a1", flags)?;
    let (program, args) = line.split_first().context("no program")?;
    match Process::start("refused", Path::new(program), args.to_vec(), mesh.dir()).await {
        Ok(_) => bail!("it came up"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_at_the_start_is_said_at_the_start() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let dir = TempDir::new()?;
    let path = dir.path().join("flags.json");
    let file = path.display().to_string();
    let absent = refused(&mesh, &[("--flags", &file)]).await?;
    assert!(
        absent.contains("flags.json can't be used") && absent.contains("No such file"),
        "{absent}"
    );
    write(&path, &document("purple"))?;
    let broken = refused(&mesh, &[("--flags", &file)]).await?;
    assert!(
        broken.contains("flags.colour.defaultVariant: is \"purple\""),
        "{broken}"
    );

    let taken = Port::reserve()?;
    let _listener = std::net::TcpListener::bind(taken.address())?;
    let address = taken.address().to_string();
    let unbound = refused(&mesh, &[("--ofrep", &address)]).await?;
    assert!(
        unbound.contains(&format!("can't listen on {address}")),
        "{unbound}"
    );
    let nonsense = refused(&mesh, &[("--ofrep", "on")]).await?;
    assert!(
        nonsense.contains("want an address such as 127.0.0.1:8016, or off"),
        "{nonsense}"
    );

    let line = mesh.proxy_command("a1", &[("--ofrep", "off")])?;
    let args = line.get(1..).unwrap_or_default().to_vec();
    let off = Process::start("off", &binaries::path("leeward-proxy")?, args, mesh.dir()).await?;
    assert!(off.address("admin").is_ok() && off.address("ofrep").is_err());
    Ok(())
}
