//! The `leeward` command.

use crate::binaries;
use crate::mesh::Mesh;
use anyhow::Context;
use std::process::Output;
use std::time::Duration;

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the command as the user of a mesh.
pub async fn leeward(mesh: &Mesh, args: &[&str]) -> anyhow::Result<Output> {
    let mut command = tokio::process::Command::new(binaries::path("leeward")?);
    command
        .args(args)
        .env("LEEWARD_CONTROL", mesh.control_address().to_string())
        .env("LEEWARD_IDENTITY", mesh.identity("user"))
        .kill_on_drop(true);
    let ended = tokio::time::timeout(PATIENCE, command.output()).await;
    Ok(ended.with_context(|| format!("leeward {args:?} doesn't end"))??)
}
