//! Compiles proto/leeward/store and proto/etcd with a compiler written in Rust: no system protoc is needed.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    let files = ["leeward/store/v1/store.proto", "etcd/kv.proto", "etcd/rpc.proto"].map(|file| root.join(file));
    for file in &files {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    let descriptors = protox::compile(files, [&root])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .build_server(false)
        .bytes(".etcdserverpb")
        .bytes(".mvccpb")
        .bytes(".leeward.store.v1.Value")
        .compile_fds(descriptors)?;
    Ok(())
}
