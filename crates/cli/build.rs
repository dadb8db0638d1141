//! Writes down the digest of the plugin that the demo carries, so that its policy can name it.

use sha2::{Digest, Sha256};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let plugin =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/built/recommendations-fallback.wasm");
    println!("cargo:rerun-if-changed={}", plugin.display());
    let digest = Sha256::digest(std::fs::read(&plugin)?);
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("plugin.sha256"), hex)?;
    Ok(())
}
