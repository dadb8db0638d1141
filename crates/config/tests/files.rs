//! Policy from a directory: all of it or none.

#![allow(clippy::unwrap_used, reason = "tests")]

use leeward_config::{Live, Warm, load_dir};
use leeward_policy::model::Plugin;
use leeward_policy::{Name, Viewer};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Takes every plugin.
struct Takes;

impl Warm for Takes {
    async fn warm(&self, _: &Name, _: &Plugin) -> Result<(), String> {
        Ok(())
    }

    fn retain(&self, _: &[&str]) {}
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn viewer() -> Viewer {
    Viewer {
        zone: Name::parse("a").unwrap(),
        proxy: Name::parse("a1").unwrap(),
    }
}

/// What loading these files says, without the directory's name; and whether anything was published.
async fn load(test: &str, files: &[(&str, String)]) -> (Result<(), String>, Option<u64>) {
    let dir = Scratch(std::env::temp_dir().join(format!("leeward-files-{}-{test}", std::process::id())));
    std::fs::create_dir_all(&dir.0).unwrap();
    for (name, text) in files {
        std::fs::write(dir.0.join(name), text).unwrap();
    }
    let live = Live::new(viewer());
    let loaded = load_dir(&dir.0, viewer(), Arc::new(Takes), &live).await;
    let prefix = format!("{}/", dir.0.display());
    let said = loaded.map_err(|error| error.to_string().replace(&prefix, ""));
    (said, live.status().generation)
}

fn zone(name: &str) -> String {
    format!("apiVersion: leeward.dev/v1\nkind: Zone\nmetadata: {{name: {name}}}\nspec: {{}}\n")
}

fn service(zone: &str) -> String {
    format!(
        "apiVersion: leeward.dev/v1\nkind: Service\nmetadata: {{name: cart}}\nspec: {{endpoints: [{{address: \"127.0.0.1:80\", zone: {zone}}}]}}\n"
    )
}

#[tokio::test]
async fn files_together_are_one_policy() {
    // The service comes before the zone that it names; other files are not looked at.
    let files = [
        ("1.yaml", service("a")),
        ("2.yml", zone("a")),
        ("notes.txt", "}{".to_owned()),
    ];
    assert_eq!(load("together", &files).await, (Ok(()), Some(1)));
}

#[tokio::test]
async fn what_is_wrong_is_named_and_nothing_is_published() {
    let dangling = load("dangling", &[("1.yaml", service("b"))]).await;
    let want = "Service/cart: spec.endpoints[0].zone: there is no Zone/b";
    assert_eq!(dangling, (Err(want.to_owned()), None));

    let (twice, published) = load("twice", &[("1.yaml", zone("a")), ("2.yaml", zone("a"))]).await;
    let error = twice.unwrap_err();
    assert!(error.starts_with("2.yaml: Zone/a stands in "), "{error}");
    assert!(error.ends_with("1.yaml already; each must stand once"), "{error}");
    assert_eq!(published, None);

    let bad = zone("a").replace("spec: {}", "spec: {failovr: []}");
    let (said, published) = load("misspelt", &[("1.yaml", bad)]).await;
    let error = said.unwrap_err();
    assert!(error.starts_with("1.yaml:4:"), "{error}");
    assert!(error.contains("failover"), "{error}");
    assert_eq!(published, None);

    let missing = load_dir(
        Path::new("/nowhere"),
        viewer(),
        Arc::new(Takes),
        &Live::new(viewer()),
    )
    .await;
    assert!(
        missing
            .unwrap_err()
            .to_string()
            .starts_with("can't read /nowhere: ")
    );
}
