//! Compiles proto/leeward/v1 and proto/spiffe with a compiler written in Rust: no system protoc is needed.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let files = [
        "resources",
        "ingress",
        "policy",
        "push",
        "degradation",
        "plugin",
        "identity",
        "backup",
        "backup_policy",
    ]
    .map(|f| root.join(format!("leeward/v1/{f}.proto")));
    let files = files.into_iter().chain([root.join("spiffe/workload.proto")]);
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(files, [&root])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
