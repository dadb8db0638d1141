//! Compiles proto/leeward/v1 and proto/spiffe with a compiler written in Rust: no system protoc is needed.

use prost::Message;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let files = [
        "resources",
        "ingress",
        "rollout_policy",
        "rollout",
        "policy",
        "push",
        "degradation",
        "plugin",
        "identity",
        "explain",
        "state",
        "access",
        "audit",
        "backup",
        "backup_policy",
        "workload",
    ]
    .map(|f| root.join(format!("leeward/v1/{f}.proto")));
    let files = files.into_iter().chain([root.join("spiffe/workload.proto")]);
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(files, [&root])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // With the comments, which become the descriptions of the HTTP API's document.
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
