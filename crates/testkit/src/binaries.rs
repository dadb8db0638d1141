//! The programs under test.

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The programs of the workspace that others start.
const PROGRAMS: [&str; 4] = ["leeward-proxy", "leeward-control", "leeward", "leeward-shop"];

/// Where the programs of this build are. The first call in a process builds what is missing or stale, with
/// the profile and into the target directory of the running test. With `LEEWARD_TEST_BINARIES` set to a
/// directory, the programs there are taken as they are; so are those that a benchmark was built with, beside which it is.
///
/// # Errors
///
/// If they can't be built.
pub fn dir() -> anyhow::Result<&'static Path> {
    static DIR: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match DIR.get_or_init(|| find().map_err(|error| format!("{error:#}"))) {
        Ok(dir) => Ok(dir),
        Err(error) => bail!("no programs to test: {error}"),
    }
}

/// One program: `leeward-proxy`, `leeward-control`, `leeward`, `leeward-shop`.
///
/// # Errors
///
/// If it can't be built, or there is none of that name.
pub fn path(name: &str) -> anyhow::Result<PathBuf> {
    let path = dir()?.join(name);
    if !path.is_file() {
        bail!("there is no {}", path.display());
    }
    Ok(path)
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

fn find() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("LEEWARD_TEST_BINARIES") {
        return Ok(dir.into());
    }
    // TARGET/PROFILE/deps/TEST, or TARGET/TRIPLE/PROFILE/deps/TEST.
    let test = std::env::current_exe().context("can't tell where this test is")?;
    let profile_dir = test.ancestors().find(|dir| dir.join("deps").is_dir());
    let profile_dir = profile_dir.with_context(|| format!("{} is in no target directory", test.display()))?;
    if test.parent() == Some(profile_dir) && PROGRAMS.iter().all(|name| profile_dir.join(name).is_file()) {
        return Ok(profile_dir.to_path_buf());
    }
    let target = profile_dir
        .parent()
        .context("the target directory has no parent")?;
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(other) => other,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // A triple's directory is passed as if it were the target directory: the programs land beside the test.
    let built = Command::new(cargo)
        .current_dir(workspace())
        .args([
            "build",
            "--quiet",
            "--offline",
            "--workspace",
            "--bins",
            // There are none, but asking for them takes what tests depend on into account, as the build of the running
            // test does: with other features the larger dependencies would be built twice.
            "--examples",
            "--profile",
            profile,
        ])
        .arg("--target-dir")
        .arg(target)
        // What cargo sets for this test would make it build everything anew.
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .output()
        .context("can't run cargo")?;
    if !built.status.success() {
        bail!("cargo build failed:\n{}", String::from_utf8_lossy(&built.stderr));
    }
    Ok(profile_dir.to_path_buf())
}

/// The file of an example plugin, as built.
pub fn plugin(name: &str) -> String {
    workspace()
        .join("plugins/built")
        .join(format!("{name}.wasm"))
        .display()
        .to_string()
}
