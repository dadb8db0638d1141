use super::*;
use crate::policy::Applied;
use crate::store::Bounds;
use crate::store::tests::Scratch;
use minisign::KeyPair;

struct Site {
    policy: Policy,
    _dir: Scratch,
}

impl Site {
    async fn new() -> Self {
        let dir = Scratch::new();
        let policy = Policy::open(dir.store().await).await.unwrap();
        Self { policy, _dir: dir }
    }

    /// With room for so many bytes of modules.
    async fn with_room(room: u64) -> Self {
        let dir = Scratch::new();
        let bounds = Bounds {
            modules: room,
            ..Bounds::DEFAULT
        };
        let policy = Policy::open(dir.store_with(bounds).await).await.unwrap();
        Self { policy, _dir: dir }
    }

    async fn resolve(
        &self,
        image: Image,
        bytes: Vec<u8>,
        signature: Option<String>,
    ) -> Result<Option<(u64, [u8; 32])>, Refused> {
        let leadership = self.policy.store().lead("images", Duration::from_secs(60)).await;
        let fence = leadership.fence();
        self.policy.resolve(image, bytes, signature, fence).await
    }

    async fn push(&self, bytes: &[u8], signature: Option<String>) -> String {
        let stored = self
            .policy
            .put_module(bytes.to_vec(), signature, "ada".into())
            .await;
        hex(&stored.unwrap().module.sha256)
    }

    async fn apply(&self, text: &str) -> Result<Applied, Refused> {
        let resources = leeward_proto::manifest::parse("test", text).unwrap();
        self.policy.apply(resources, false, "ada").await
    }

    async fn refused(&self, text: &str, why: &[&str]) {
        let error = self.apply(text).await.unwrap_err().to_string();
        for why in why {
            assert!(error.contains(why), "{error}");
        }
    }

    async fn source(&self) -> PluginSource {
        let resource = self.policy.get(key_of(&Name::parse("p").unwrap())).await.unwrap();
        let Spec::Plugin(plugin) = parse(&resource).unwrap().spec else {
            panic!("{resource:?} is no plugin");
        };
        plugin.source
    }

    async fn image(&self) -> Image {
        self.policy.images().await.unwrap().pop().unwrap()
    }
}

/// A module of proxy-wasm; `n` tells it from others.
fn module(n: usize) -> Vec<u8> {
    let text = format!(
        r#"(module (import "env" "proxy_log" (func (param i32 i32 i32) (result i32)))
            (memory {n}) (func (export "proxy_abi_version_0_2_1")))"#
    );
    wat::parse_str(text).unwrap()
}

fn plugin(spec: &str) -> String {
    format!(
        "apiVersion: leeward.dev/v1\nkind: Plugin\nmetadata: {{name: p}}\nspec: {{kind: ProxyWasm, onFault: FailOpen, {spec}}}\n"
    )
}

fn of_store(sha256: &str) -> String {
    plugin(&format!("source: {{sha256: \"{sha256}\"}}"))
}

const OCI: &str = "source: {oci: {image: \"r.example/p:1\"}}";

fn sign(pair: &KeyPair, bytes: &[u8]) -> String {
    minisign::sign(Some(&pair.pk), &pair.sk, bytes, None, None)
        .unwrap()
        .into_string()
}

#[tokio::test]
async fn a_plugin_names_a_module_that_is_there_and_of_its_kind() {
    let site = Site::new().await;
    let absent = "0".repeat(64);
    site.refused(
        &of_store(&absent),
        &[
            "resources[0].spec.source.sha256: there is no module 000",
            "leeward plugin push",
        ],
    )
    .await;
    let sha256 = site.push(&module(1), None).await;
    site.apply(&of_store(&sha256)).await.unwrap();
    let filter = of_store(&sha256).replace("ProxyWasm", "Filter");
    site.refused(
        &filter,
        &["spec.source.sha256: module", "is a ProxyWasm; want a Filter"],
    )
    .await;
    let canary = format!("source: {{sha256: \"{sha256}\"}}, canary: {{source: {{sha256: \"{absent}\"}}}}");
    site.refused(
        &plugin(&canary),
        &["spec.canary.source.sha256: there is no module"],
    )
    .await;
    let canary = format!("source: {{sha256: \"{sha256}\"}}, canary: {{source: {{sha256: \"{sha256}\"}}}}");
    site.apply(&plugin(&canary)).await.unwrap();
}

#[tokio::test]
async fn a_plugin_names_a_module_that_imports_what_it_may() {
    let site = Site::new().await;
    let sha256 = site.push(&module(1), None).await;
    let narrow = |imports: &str| {
        plugin(&format!(
            "source: {{sha256: \"{sha256}\"}}, access: {{imports: [{imports}]}}"
        ))
    };
    site.refused(
        &narrow("env.proxy_http_call"),
        &["imports \"env.proxy_log\", which access.imports doesn't name"],
    )
    .await;
    site.apply(&narrow("env.*")).await.unwrap();
    let text = r#"(module (import "env" "system" (func)) (func (export "proxy_abi_version_0_2_1")))"#;
    let sha256 = site.push(&wat::parse_str(text).unwrap(), None).await;
    site.refused(
        &of_store(&sha256),
        &["imports \"env.system\", which no proxy has"],
    )
    .await;
}

#[tokio::test]
async fn where_a_key_is_named_it_has_signed_the_module() {
    let site = Site::new().await;
    let pair = KeyPair::generate_unencrypted_keypair().unwrap();
    let other = KeyPair::generate_unencrypted_keypair().unwrap();
    let key = pair.pk.to_base64();
    let signed = |sha256: &str| {
        plugin(&format!(
            "source: {{sha256: \"{sha256}\", minisignKey: \"{key}\"}}"
        ))
    };
    let sha256 = site.push(&module(1), None).await;
    site.refused(
        &signed(&sha256),
        &[
            "spec.source.minisignKey: module",
            "without a signature; push it with --signature",
        ],
    )
    .await;
    site.push(&module(1), Some(sign(&other, &module(1)))).await;
    site.refused(&signed(&sha256), &["signed by another key"]).await;
    site.push(&module(1), Some(sign(&pair, &module(2)))).await;
    site.refused(&signed(&sha256), &["spec.source.minisignKey: module"])
        .await;
    site.push(&module(1), Some(sign(&pair, &module(1)))).await;
    site.apply(&signed(&sha256)).await.unwrap();
}

#[tokio::test]
async fn what_is_named_stays_and_the_rest_can_go() {
    let site = Site::new().await;
    let sha256 = site.push(&module(1), None).await;
    site.apply(&of_store(&sha256)).await.unwrap();
    let digest = leeward_module::parse_hex(&sha256).unwrap();
    let error = site.policy.delete_module(digest).await.unwrap_err().to_string();
    assert_eq!(
        error,
        format!("module {sha256} is in use by Plugin/p (spec.source)")
    );
    let other = site.push(&module(2), None).await;
    site.apply(&of_store(&other)).await.unwrap();
    site.policy.delete_module(digest).await.unwrap();
    let error = site.policy.delete_module(digest).await.unwrap_err();
    assert!(matches!(error, Refused::NoModule(_)), "{error}");
}

#[tokio::test]
async fn a_full_store_names_what_could_go() {
    let site = Site::with_room(module(1).len() as u64).await;
    let sha256 = site.push(&module(1), None).await;
    let full = || site.policy.put_module(module(2), None, "ada".into());
    let error = full().await.unwrap_err().to_string();
    assert!(error.contains(&format!("not in use: {sha256} (")), "{error}");
    assert!(error.contains("raise --plugin-store"), "{error}");
    site.apply(&of_store(&sha256)).await.unwrap();
    let error = full().await.unwrap_err().to_string();
    assert!(error.ends_with("every one is in use"), "{error}");
}

#[tokio::test]
async fn what_was_fetched_is_a_write_that_users_neither_make_nor_undo() {
    let site = Site::new().await;
    site.apply(&plugin(OCI)).await.unwrap();
    let image = site.image().await;
    assert_eq!(
        (image.resolved, image.place().as_str()),
        (None, "Plugin/p (spec.source)")
    );
    let before = site.policy.revision();
    let (revision, sha256) = site.resolve(image, module(1), None).await.unwrap().unwrap();
    assert_eq!((revision, site.policy.revision()), (before + 1, before + 1));
    assert_eq!(site.source().await.stored(), Some(sha256));
    // The same again writes nothing; nor does what the user has said already.
    let again = site.resolve(site.image().await, module(1), None).await.unwrap();
    assert_eq!(again, Some((revision, sha256)));
    let lie = OCI.replace("}}", &format!("}}, resolvedSha256: \"{}\"}}", "0".repeat(64)));
    for spec in [OCI, lie.as_str()] {
        assert_eq!(site.apply(&plugin(spec)).await.unwrap().changed, [false]);
    }
    // Another thing changes, and it stays; another image, and it goes.
    site.apply(&plugin(&format!("{OCI}, config: x"))).await.unwrap();
    assert_eq!(site.source().await.stored(), Some(sha256));
    let error = site.policy.delete_module(sha256).await.unwrap_err();
    assert!(matches!(error, Refused::ModuleInUse { .. }), "{error}");
    site.apply(&plugin(&OCI.replace(":1", ":2"))).await.unwrap();
    assert_eq!(site.source().await.stored(), None);
}

#[tokio::test]
async fn what_was_fetched_for_a_plugin_that_is_another_now_is_dropped() {
    let site = Site::new().await;
    site.apply(&plugin(OCI)).await.unwrap();
    let image = site.image().await;
    site.apply(&plugin(&OCI.replace(":1", ":2"))).await.unwrap();
    assert_eq!(site.resolve(image, module(1), None).await.unwrap(), None);
    assert_eq!(site.source().await.stored(), None);
    assert!(site.policy.inventory().await.unwrap().modules.is_empty());
}

#[tokio::test]
async fn an_image_is_held_to_the_same_as_what_is_pushed() {
    let site = Site::new().await;
    let pair = KeyPair::generate_unencrypted_keypair().unwrap();
    let resolve = |bytes: Vec<u8>, signature: Option<String>| async {
        let image = site.image().await;
        match site.resolve(image, bytes, signature).await {
            Ok(resolved) => format!("{}", resolved.is_some()),
            Err(error) => error.to_string(),
        }
    };
    let key = pair.pk.to_base64();
    site.apply(&plugin(
        &OCI.replace("source: {", &format!("source: {{minisignKey: \"{key}\", ")),
    ))
    .await
    .unwrap();
    let unsigned = resolve(module(1), None).await;
    assert!(
        unsigned.contains("has no annotation dev.leeward.minisig"),
        "{unsigned}"
    );
    let forged = resolve(module(1), Some(sign(&pair, &module(2)))).await;
    assert!(forged.contains("spec.source.minisignKey"), "{forged}");
    assert_eq!(resolve(module(1), Some(sign(&pair, &module(1)))).await, "true");

    let pinned = format!("source: {{sha256: \"{}\", ", "0".repeat(64));
    site.apply(&plugin(&OCI.replace("source: {", &pinned)))
        .await
        .unwrap();
    let other = resolve(module(1), None).await;
    assert!(other.contains("spec.source.sha256: is 0000"), "{other}");

    let filter = plugin(OCI).replace("ProxyWasm", "Filter");
    site.apply(&filter).await.unwrap();
    let kind = resolve(module(1), None).await;
    assert!(kind.contains("spec.source.oci.image: module"), "{kind}");
    let broken = resolve(b"#!/bin/sh".to_vec(), None).await;
    assert!(broken.starts_with("module: not a WebAssembly module"), "{broken}");
    assert_eq!(site.source().await.stored(), None);
}

#[tokio::test]
async fn a_new_build_of_an_image_takes_the_room_of_an_old_one() {
    // Room for two, and some.
    let site = Site::with_room(module(1).len() as u64 * 5 / 2).await;
    let pushed = site.push(&module(9), None).await;
    site.apply(&plugin(OCI)).await.unwrap();
    for build in 1..5 {
        let resolved = site.resolve(site.image().await, module(build), None).await;
        // The one in use is still named when the next one comes, so there is never room for both beside what was pushed.
        match build {
            1 => assert!(resolved.unwrap().is_some()),
            _ => assert!(matches!(resolved, Err(Refused::Full { .. }))),
        }
    }
    policy_delete(&site, &pushed).await;
    for build in 2..5 {
        let resolved = site.resolve(site.image().await, module(build), None).await;
        assert!(resolved.unwrap().is_some(), "build {build}");
    }
    let kept = site.policy.inventory().await.unwrap().modules;
    assert_eq!(kept.len(), 2);
    assert_eq!(
        kept.iter().filter(|(_, _, by)| !by.is_empty()).count(),
        1,
        "{kept:?}"
    );
}

async fn policy_delete(site: &Site, sha256: &str) {
    let sha256 = leeward_module::parse_hex(sha256).unwrap();
    site.policy.delete_module(sha256).await.unwrap();
}

#[tokio::test]
async fn a_module_that_is_signed_anew_with_each_build_keeps_one_signature() {
    let site = Site::new().await;
    let pair = KeyPair::generate_unencrypted_keypair().unwrap();
    let key = pair.pk.to_base64();
    site.apply(&plugin(
        &OCI.replace("source: {", &format!("source: {{minisignKey: \"{key}\", ")),
    ))
    .await
    .unwrap();
    for build in 0..20 {
        let comment = format!("build {build}");
        let signature = minisign::sign(Some(&pair.pk), &pair.sk, &module(1)[..], Some(&comment), None);
        let signature = signature.unwrap().into_string();
        let resolved = site.resolve(site.image().await, module(1), Some(signature)).await;
        assert!(resolved.unwrap().is_some(), "build {build}");
    }
    let kept = site.policy.inventory().await.unwrap().modules;
    assert_eq!(
        kept.iter()
            .map(|(_, signatures, _)| *signatures)
            .collect::<Vec<_>>(),
        [1]
    );
}

#[test]
fn an_image_is_of_a_repository() {
    for (image, of) in [
        ("r.example/p:1", "r.example/p"),
        ("r.example:5000/p", "r.example:5000/p"),
        ("r.example:5000/p:1@sha256:00", "r.example:5000/p"),
        ("p", "p"),
    ] {
        assert_eq!(repository(image), of);
    }
}

#[tokio::test]
async fn what_a_rollout_may_go_back_to_stays() {
    let site = Site::new().await;
    let (old, new) = (
        site.push(&module(1), None).await,
        site.push(&module(2), None).await,
    );
    let digest = leeward_module::parse_hex(&old).unwrap();
    site.apply(&of_store(&old)).await.unwrap();
    let steps = "apiVersion: leeward.dev/v1\nkind: RolloutPolicy\nmetadata: {name: default}\nspec: {stages: [{proxies: 1, hold: 1h}, {}]}\n";
    site.apply(steps).await.unwrap();
    let revision = site.apply(&of_store(&new)).await.unwrap().revision;
    // Whom the new one hasn't reached runs the old one.
    let error = site.policy.delete_module(digest).await.unwrap_err().to_string();
    assert!(
        error.contains("Plugin/p (spec.source, before the rollout"),
        "{error}"
    );
    site.policy.take_back(revision, "test", None).await.unwrap();
    let digest = leeward_module::parse_hex(&new).unwrap();
    site.policy.delete_module(digest).await.unwrap();
    assert_eq!(hex(&site.source().await.stored().unwrap()), old);
}
