//! The command against a control plane: what differs, whose it is, and who did it.

use anyhow::ensure;
use leeward_testkit::{Mesh, binaries};
use std::process::{Command, Output};

struct Cli<'a> {
    mesh: &'a Mesh,
}

impl Cli<'_> {
    fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(binaries::path("leeward")?);
        command
            .args(arguments)
            .env("LEEWARD_CONTROL", self.mesh.control_address().to_string())
            .env("LEEWARD_IDENTITY", self.mesh.identity("user"));
        Ok(command.output()?)
    }

    /// What it says, if it ends so.
    fn says(&self, ends: i32, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.run(arguments)?;
        let told = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(
            output.status.code() == Some(ends),
            "{arguments:?}: {:?}: {told}",
            output.status
        );
        Ok(told)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_tells_what_differs_whose_it_is_and_who_did_it() -> anyhow::Result<()> {
    let mesh = Mesh::two_zones().await?;
    let cli = Cli { mesh: &mesh };
    let file = mesh.dir().join("flags.yaml");
    let named = file.display().to_string();
    let write = |labels: &str| {
        let text = format!(
            "apiVersion: leeward.dev/v1\nkind: FeatureFlags\nmetadata: {{name: f, labels: {{{labels}}}}}\nspec: {{flags: {{}}}}\n"
        );
        std::fs::write(&file, text)
    };
    write("env: prod")?;
    let made = cli.says(1, &["diff", "-f", &named])?;
    ensure!(made.contains("--- /dev/null\n+++ new/FeatureFlags/f\n"), "{made}");
    cli.says(0, &["apply", "-f", &named, "--manager", "ci"])?;
    let same = cli.says(0, &["diff", "-f", &named, "--manager", "ci"])?;
    ensure!(same.is_empty(), "{same}");
    write("env: test")?;
    let changed = cli.says(1, &["diff", "-f", &named, "--manager", "ci"])?;
    ensure!(
        changed.contains("-    env: prod") && changed.contains("+    env: test"),
        "{changed}"
    );
    let other = cli.says(1, &["apply", "-f", &named])?;
    ensure!(other.contains("is managed by \"ci\""), "{other}");
    let untold = cli.says(2, &["diff", "-f", &named])?;
    ensure!(untold.contains("is managed by \"ci\""), "{untold}");
    let chosen = cli.says(0, &["get", "flags", "-l", "env=prod", "-o", "name"])?;
    ensure!(chosen == "FeatureFlags/f\n", "{chosen}");
    let wide = cli.says(0, &["get", "flags", "-o", "wide"])?;
    ensure!(wide.contains("MANAGER") && wide.contains("env=prod"), "{wide}");
    let audit = cli.says(0, &["audit", "--resource", "flags/f", "--since", "1h"])?;
    ensure!(
        audit.contains("PolicyService/Apply") && audit.contains("FeatureFlags/f made at"),
        "{audit}"
    );
    let json = cli.says(0, &["audit", "--limit", "1", "-o", "json"])?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    ensure!(
        json["entries"]
            .as_array()
            .is_some_and(|entries| entries.len() == 1),
        "{json}"
    );
    Ok(())
}
