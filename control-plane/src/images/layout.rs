//! How images hold a module: three layouts are in use, and an image of any tool that makes one of them is taken.

use flate2::read::GzDecoder;
use leeward_module::MAX_BYTES;
use oci_client::manifest::OciImageManifest;
use std::io::{self, Read};
use std::path::{Component, Path};

/// Layers that are the module: of the CNCF's artifact guidance, of wkg and wasm-to-oci, of Envoy's image specification.
const WASM: [&str; 3] = [
    "application/wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
    "application/vnd.module.wasm.content.layer.v1+wasm",
];
/// Layers of a container's image, as `docker build` makes them, with the module in a file.
const TAR: [&str; 2] = [
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
];
/// That file, at the image's root.
const FILE: &str = "plugin.wasm";
/// Where the signature of a module stands in its manifest.
const SIGNATURE: &str = "dev.leeward.minisig";
/// What a layer may unpack to, in bytes: the module and its tar.
const MAX_UNPACKED: usize = MAX_BYTES + (1 << 20);

/// Where in an image its module is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Layer {
    /// The blob's digest, as `sha256:…`.
    pub(super) digest: String,
    /// How the module is in it.
    pub(super) packing: Packing,
}

/// How a module is in its layer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Packing {
    /// It is the layer.
    Bare,
    /// It is `plugin.wasm` in a tar, compressed by gzip.
    Tar,
}

/// Why an image has no module.
#[derive(Debug, thiserror::Error)]
pub(super) enum LayoutError {
    /// No layer, or several, could be it.
    #[error(
        "the image has {found} layers with a module, of layers {types:?}; want one of {}, or else one of {} with {FILE} in it",
        WASM.join(", "), TAR.join(", ")
    )]
    Layers {
        /// How many.
        found: usize,
        /// The types of all.
        types: Vec<String>,
    },
    /// Larger than a module may be.
    #[error("the layer has {0} bytes; want at most {MAX_BYTES} (64 MiB)")]
    TooLarge(i64),
    /// Not what its type says.
    #[error("can't unpack the layer")]
    Unpack(#[source] io::Error),
    /// It unpacks to more than a module may be.
    #[error("the layer unpacks to more than {MAX_UNPACKED} bytes")]
    Bomb,
    /// The file isn't there.
    #[error("the layer has no file {FILE}")]
    NoFile,
}

/// Where the module of an image is.
pub(super) fn layer(manifest: &OciImageManifest) -> Result<Layer, LayoutError> {
    let of = |types: &'static [&str], packing| {
        let layers = manifest.layers.iter();
        let layers = layers.filter(move |layer| types.contains(&layer.media_type.as_str()));
        layers.map(move |layer| (layer, packing))
    };
    let mut found: Vec<_> = of(&WASM, Packing::Bare).collect();
    if found.is_empty() {
        found = of(&TAR, Packing::Tar).collect();
    }
    let [(layer, packing)] = found.as_slice() else {
        let types = manifest.layers.iter().take(16);
        return Err(LayoutError::Layers {
            found: found.len(),
            types: types.map(|layer| layer.media_type.clone()).collect(),
        });
    };
    if usize::try_from(layer.size).unwrap_or(usize::MAX) > MAX_BYTES {
        return Err(LayoutError::TooLarge(layer.size));
    }
    Ok(Layer {
        digest: layer.digest.clone(),
        packing: *packing,
    })
}

/// The signature that stands in a manifest.
pub(super) fn signature(manifest: &OciImageManifest) -> Option<String> {
    manifest.annotations.as_ref()?.get(SIGNATURE).cloned()
}

/// The module in a layer's bytes.
pub(super) fn unpack(bytes: Vec<u8>, packing: Packing) -> Result<Vec<u8>, LayoutError> {
    match packing {
        Packing::Bare => Ok(bytes),
        Packing::Tar => untar(&bytes),
    }
}

fn untar(bytes: &[u8]) -> Result<Vec<u8>, LayoutError> {
    let bound = u64::try_from(MAX_UNPACKED).unwrap_or(u64::MAX);
    let mut archive = tar::Archive::new(GzDecoder::new(bytes).take(bound));
    let module = file_in(&mut archive);
    // What was cut off looks like a tar that ends early.
    if archive.into_inner().limit() == 0 {
        return Err(LayoutError::Bomb);
    }
    module?.ok_or(LayoutError::NoFile)
}

fn file_in(archive: &mut tar::Archive<impl Read>) -> Result<Option<Vec<u8>>, LayoutError> {
    for entry in archive.entries().map_err(LayoutError::Unpack)? {
        let mut entry = entry.map_err(LayoutError::Unpack)?;
        let is_it = entry.header().entry_type().is_file() && entry.path().is_ok_and(|path| is_at_root(&path));
        if is_it {
            let mut module = Vec::new();
            entry.read_to_end(&mut module).map_err(LayoutError::Unpack)?;
            return Ok(Some(module));
        }
    }
    Ok(None)
}

/// Some tools write `./` before names.
fn is_at_root(path: &Path) -> bool {
    let mut parts = path.components().filter(|part| *part != Component::CurDir);
    parts.next() == Some(Component::Normal(FILE.as_ref())) && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use oci_client::manifest::OciDescriptor;
    use proptest::prelude::*;
    use std::io::Write;

    fn manifest(layers: &[&str]) -> OciImageManifest {
        let layers = layers.iter().enumerate().map(|(n, media_type)| OciDescriptor {
            media_type: (*media_type).to_owned(),
            digest: format!("sha256:{n}"),
            size: 9,
            ..OciDescriptor::default()
        });
        OciImageManifest {
            layers: layers.collect(),
            ..OciImageManifest::default()
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    }

    fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *bytes).unwrap();
        }
        gzip(&tar.into_inner().unwrap())
    }

    #[test]
    fn every_layout_is_known_beside_what_else_an_image_has() {
        for media_type in WASM {
            let layer = layer(&manifest(&["text/markdown", media_type, TAR[0]])).unwrap();
            assert_eq!(
                (layer.digest.as_str(), layer.packing),
                ("sha256:1", Packing::Bare)
            );
        }
        for media_type in TAR {
            let layer = layer(&manifest(&[media_type])).unwrap();
            assert_eq!((layer.digest.as_str(), layer.packing), ("sha256:0", Packing::Tar));
        }
        for (layers, found) in [(&["text/markdown"][..], 0), (&[], 0), (&WASM, 3), (&TAR, 2)] {
            let error = layer(&manifest(layers)).unwrap_err().to_string();
            assert!(error.contains(&format!("has {found} layers")), "{error}");
            assert!(error.contains("want one of application/wasm, "), "{error}");
        }
        let mut large = manifest(&[WASM[0]]);
        for size in [MAX_BYTES as i64 + 1, -1] {
            large.layers[0].size = size;
            assert!(matches!(layer(&large), Err(LayoutError::TooLarge(_))));
        }
    }

    #[test]
    fn the_file_is_found_at_the_root_of_the_tar_and_nowhere_else() {
        let unpacked = |files: &[(&str, &[u8])]| unpack(tar_of(files), Packing::Tar);
        assert_eq!(
            unpacked(&[("README", b"r"), ("plugin.wasm", b"w")]).unwrap(),
            b"w"
        );
        assert_eq!(unpacked(&[("./plugin.wasm", b"w")]).unwrap(), b"w");
        for name in ["sub/plugin.wasm", "plugin.wasm.txt"] {
            let error = unpacked(&[(name, b"w")]).unwrap_err().to_string();
            assert_eq!(error, "the layer has no file plugin.wasm", "{name}");
        }
        let error = unpack(b"no gzip".to_vec(), Packing::Tar).unwrap_err();
        assert!(matches!(error, LayoutError::Unpack(_)), "{error}");
    }

    #[test]
    fn a_layer_that_unpacks_without_end_is_refused() {
        // In the file that is wanted, and in one before it.
        for name in ["plugin.wasm", "README"] {
            let zeros = vec![0; MAX_UNPACKED];
            let error = unpack(tar_of(&[(name, &zeros)]), Packing::Tar).unwrap_err();
            assert!(matches!(error, LayoutError::Bomb), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048), packed: bool) {
            let bytes = if packed { gzip(&bytes) } else { bytes };
            let _ = unpack(bytes, Packing::Tar);
        }
    }
}
