//! What is refused, and to whom.

use crate::{
    HOST, answered_by, answers, built, file, modules, plugin, push, refused, runs, says, sha256, variant,
};
use anyhow::{Context, ensure};
use leeward_proto::v1;
use leeward_proto::v1::push_module_request::Message;
use leeward_testkit::Mesh;
use minisign::KeyPair;
use tonic::Code;

fn sign(pair: &KeyPair, bytes: &[u8]) -> String {
    let signed = minisign::sign(Some(&pair.pk), &pair.sk, bytes, None, None);
    signed.unwrap().into_string()
}

/// Applies by the command; what it complains of.
async fn not_applied(mesh: &Mesh, policy: &str) -> anyhow::Result<String> {
    let path = file(mesh, "policy.yaml", policy.as_bytes())?
        .display()
        .to_string();
    refused(mesh, &["apply", "-f", &path], 64).await
}

async fn push_signed(mesh: &Mesh, bytes: &[u8], signature: &str) -> anyhow::Result<String> {
    let module = file(mesh, "signed.wasm", bytes)?.display().to_string();
    let signature = file(mesh, "signed.wasm.minisig", signature.as_bytes())?;
    let signature = signature.display().to_string();
    says(mesh, &["plugin", "push", &module, "--signature", &signature]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_wants_its_signature_at_the_control_plane_and_at_every_proxy() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let (pair, other) = (
        KeyPair::generate_unencrypted_keypair()?,
        KeyPair::generate_unencrypted_keypair()?,
    );
    let module = built("static-json");
    let name = sha256(&module);
    let source = |key: &str| format!("{{sha256: {name}, minisignKey: {key}}}");
    let key = pair.pk.to_base64();
    let policy = plugin("json", &source(&key), "") + &answered_by("json", HOST, "signed");

    push(&mesh, "static-json.wasm", &module).await?;
    let error = not_applied(&mesh, &policy).await?;
    ensure!(error.contains("spec.source.minisignKey"), "{error}");
    ensure!(error.contains("it came without a signature"), "{error}");
    push_signed(&mesh, &module, &sign(&other, &module)).await?;
    let error = not_applied(&mesh, &policy).await?;
    ensure!(error.contains("signed by another key"), "{error}");
    // The right key's, of another module.
    push_signed(&mesh, &module, &sign(&pair, &variant(1))).await?;
    let error = not_applied(&mesh, &policy).await?;
    ensure!(error.contains("the signature is not of this module"), "{error}");

    // Without a key it may be had. With one, proxies that have the module ask for what signatures came since.
    mesh.apply(&(plugin("json", &format!("{{sha256: {name}}}"), "") + &answered_by("json", HOST, "plain")))
        .await?;
    answers(mesh.node("a1")?, HOST, "plain").await?;
    let shown = push_signed(&mesh, &module, &sign(&pair, &module)).await?;
    ensure!(shown.contains("signatures  3"), "{shown}");
    mesh.apply(&policy).await?;
    for node in ["a1", "b1"] {
        answers(mesh.node(node)?, HOST, "signed").await?;
        let kept = mesh.data(node).join("plugins").join(format!("{name}.signatures"));
        let kept: Vec<String> = serde_json::from_str(&std::fs::read_to_string(kept)?)?;
        assert_eq!(kept.len(), 3, "{node}: {kept:?}");
    }
    let refusals = mesh.get(v1::Kind::Plugin, "json").await?;
    let refusals = refusals.status.context("no status")?.refusals;
    assert_eq!(refusals, []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_plugin_or_asks_for_too_much_gets_nowhere() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    // Beyond what policy lets it import.
    let module = built("static-json");
    let name = sha256(&module);
    push(&mesh, "static-json.wasm", &module).await?;
    let narrow = "  access: {imports: [\"wasi:clocks/*\"]}\n";
    let error = not_applied(&mesh, &plugin("json", &format!("{{sha256: {name}}}"), narrow)).await?;
    for words in [
        "resources[0].spec.source.sha256",
        &name,
        "imports \"leeward:plugin/",
    ] {
        ensure!(error.contains(words), "no {words:?} in {error}");
    }
    // Of another kind, and not there at all.
    let filter = built("header-rewrite");
    push(&mesh, "filter.wasm", &filter).await?;
    let error = not_applied(
        &mesh,
        &plugin("json", &format!("{{sha256: {}}}", sha256(&filter)), ""),
    )
    .await?;
    ensure!(error.contains("is a Filter; want a Fallback"), "{error}");
    let absent = sha256(b"absent");
    let error = not_applied(&mesh, &plugin("json", &format!("{{sha256: {absent}}}"), "")).await?;
    ensure!(
        error.contains(&absent) && error.contains("leeward plugin push"),
        "{error}"
    );

    // The command sees what can't be a module, and what isn't a signature.
    let text = file(&mesh, "text.wasm", b"text")?.display().to_string();
    let error = refused(&mesh, &["plugin", "push", &text], 64).await?;
    ensure!(error.contains("text.wasm: not a WebAssembly module"), "{error}");
    let error = refused(&mesh, &["plugin", "push", "/nowhere.wasm"], 64).await?;
    ensure!(error.contains("/nowhere.wasm: can't be read"), "{error}");
    let large = mesh.dir().join("large.wasm");
    std::fs::File::create(&large)?.set_len((64 << 20) + 1)?;
    let error = refused(&mesh, &["plugin", "push", &large.display().to_string()], 64).await?;
    ensure!(error.contains("has more than 67108864 bytes"), "{error}");
    let good = file(&mesh, "good.wasm", &module)?.display().to_string();
    let error = refused(&mesh, &["plugin", "push", &good, "--signature", &text], 64).await?;
    ensure!(error.contains("text.wasm: not a minisign signature"), "{error}");

    // So does the control plane, of whatever sends them.
    let mut api = modules(&mesh, "user")?;
    let pushing = |chunks: usize, data: &[u8]| {
        let header = Message::Header(v1::PushModuleHeader::default());
        let chunk = Message::Chunk(data.to_vec());
        let messages = std::iter::once(header).chain(std::iter::repeat_n(chunk, chunks));
        tokio_stream::iter(messages.map(|message| v1::PushModuleRequest {
            message: Some(message),
        }))
    };
    let status = api.push(pushing(1, b"text")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let status = api.push(pushing(1025, &[0; 64 << 10])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(
        status.message().contains("more than 67108864 bytes"),
        "{status:?}"
    );
    let header = Message::Header(v1::PushModuleHeader {
        signature: "text".to_owned(),
    });
    let signed = v1::PushModuleRequest {
        message: Some(header),
    };
    let status = api.push(tokio_stream::iter([signed])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().starts_with("header.signature: "), "{status:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_may_fetch_and_nothing_else_and_people_may_do_all() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let module = built("static-json");
    let name = sha256(&module);
    push(&mesh, "static-json.wasm", &module).await?;
    let request = |sha256: &str, signatures_only| v1::FetchModuleRequest {
        sha256: sha256.to_owned(),
        signatures_only,
    };
    for who in ["a1", "user"] {
        let mut api = modules(&mesh, who)?;
        let mut stream = api.fetch(request(&name, false)).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.message().await? {
            bytes.extend(chunk.data);
        }
        assert_eq!(bytes, module, "{who}");
        let mut stream = api.fetch(request(&name, true)).await?.into_inner();
        let first = stream.message().await?.context("no chunk")?;
        assert_eq!((first.data.len(), stream.message().await?), (0, None), "{who}");
        let status = api.fetch(request(&sha256(b"absent"), false)).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{who}: {status:?}");
        let status = api.fetch(request("ab", false)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{who}: {status:?}");
    }
    let mut api = modules(&mesh, "a1")?;
    let header = v1::PushModuleRequest {
        message: Some(Message::Header(v1::PushModuleHeader::default())),
    };
    let denied = [
        api.push(tokio_stream::iter([header])).await.map(drop),
        api.get(v1::GetModuleRequest { sha256: name.clone() })
            .await
            .map(drop),
        api.list(v1::ListModulesRequest {}).await.map(drop),
        api.delete(v1::DeleteModuleRequest { sha256: name.clone() })
            .await
            .map(drop),
    ];
    for denied in denied {
        let status = denied.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    }
    // It is there still.
    mesh.apply(&(plugin("json", &format!("{{sha256: {name}}}"), "") + &answered_by("json", HOST, "still")))
        .await?;
    runs(mesh.node("a1")?, "json", &name).await
}
