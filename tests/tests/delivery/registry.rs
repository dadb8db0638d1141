//! An OCI registry: what the distribution API asks of one that is only read from.

use crate::sha256;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use leeward_testkit::Port;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A registry on 127.0.0.1, which can go down and come back with what it had.
pub(crate) struct Registry {
    port: Port,
    content: Arc<Mutex<Content>>,
    running: Option<AbortHandle>,
}

#[derive(Default)]
struct Content {
    /// By digest.
    blobs: BTreeMap<String, Bytes>,
    /// By `REPOSITORY:TAG` and `REPOSITORY@DIGEST`.
    manifests: BTreeMap<String, Bytes>,
    asked: usize,
}

/// How an image holds a module.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Layout {
    /// The CNCF's artifact for WebAssembly, as wkg pushes it.
    Wasm,
    /// What Envoy's image specification, wasm-to-oci and oras make.
    Content,
    /// A container's image, as `docker build` makes it.
    Container,
}

impl Registry {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut registry = Self {
            port: Port::reserve()?,
            content: Arc::default(),
            running: None,
        };
        registry.up()?;
        Ok(registry)
    }

    /// `HOST:PORT/REPOSITORY:TAG`.
    pub(crate) fn image(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.port.address())
    }

    /// The same by the digest of its manifest.
    pub(crate) fn pinned(&self, repository: &str, digest: &str) -> String {
        format!("{}/{repository}@{digest}", self.port.address())
    }

    /// Pushes an image. Returns its manifest's digest.
    pub(crate) fn push(
        &self,
        (repository, tag): (&str, &str),
        layout: Layout,
        module: &[u8],
        signature: Option<&str>,
    ) -> String {
        let mut content = self.content.lock().unwrap();
        let (config_type, layer_type, layer) = match layout {
            Layout::Wasm => (
                "application/vnd.wasm.config.v0+json",
                "application/wasm",
                module.to_vec(),
            ),
            Layout::Content => (
                "application/vnd.oci.empty.v1+json",
                "application/vnd.wasm.content.layer.v1+wasm",
                module.to_vec(),
            ),
            Layout::Container => (
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.oci.image.layer.v1.tar+gzip",
                tar_gzip(module),
            ),
        };
        let config = content.blob(config_type, b"{}");
        let layer = content.blob(layer_type, &layer);
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [layer],
        });
        if let Some(signature) = signature {
            manifest["annotations"] = json!({"dev.leeward.minisig": signature});
        }
        let manifest = Bytes::from(manifest.to_string());
        let digest = format!("sha256:{}", sha256(&manifest));
        content
            .manifests
            .insert(format!("{repository}@{digest}"), manifest.clone());
        content.manifests.insert(format!("{repository}:{tag}"), manifest);
        digest
    }

    /// Requests so far.
    pub(crate) fn asked(&self) -> usize {
        self.content.lock().unwrap().asked
    }

    /// Connections are refused from now on, and those that are open end.
    pub(crate) fn down(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }

    pub(crate) fn up(&mut self) -> anyhow::Result<()> {
        let listener = self.port.listen()?;
        let serving = tokio::spawn(serve(listener, Arc::clone(&self.content)));
        self.running = Some(serving.abort_handle());
        Ok(())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.down();
    }
}

impl Content {
    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = format!("sha256:{}", sha256(bytes));
        self.blobs.insert(digest.clone(), Bytes::copy_from_slice(bytes));
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    fn answer(&mut self, path: &str) -> Option<(&'static str, Bytes)> {
        self.asked += 1;
        let path = path.strip_prefix("/v2/")?;
        if path.is_empty() {
            return Some(("application/json", Bytes::from_static(b"{}")));
        }
        if let Some((_, digest)) = path.split_once("/blobs/") {
            return Some(("application/octet-stream", self.blobs.get(digest)?.clone()));
        }
        let (repository, reference) = path.split_once("/manifests/")?;
        let mark = if reference.contains(':') { '@' } else { ':' };
        let manifest = self.manifests.get(&format!("{repository}{mark}{reference}"))?;
        Some((MANIFEST, manifest.clone()))
    }
}

async fn serve(listener: TcpListener, content: Arc<Mutex<Content>>) {
    // They end with this task.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let content = Arc::clone(&content);
        let answer = service_fn(move |request: Request<Incoming>| {
            let found = content.lock().unwrap().answer(request.uri().path());
            let response = respond(&request, found);
            async move { Ok::<_, Infallible>(response) }
        });
        let serving =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
        connections.spawn(async move { drop(serving.await) });
    }
}

fn respond(request: &Request<Incoming>, found: Option<(&'static str, Bytes)>) -> Response<Full<Bytes>> {
    let (status, media_type, body) = match found {
        Some((media_type, body)) => (StatusCode::OK, media_type, body),
        None => (
            StatusCode::NOT_FOUND,
            "application/json",
            Bytes::from_static(br#"{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "not here"}]}"#),
        ),
    };
    let digest = format!("sha256:{}", sha256(&body));
    let shown = if request.method() == Method::HEAD {
        Bytes::new()
    } else {
        body
    };
    Response::builder()
        .status(status)
        .header("content-type", media_type)
        .header("docker-content-digest", digest)
        .body(Full::new(shown))
        .unwrap()
}

fn tar_gzip(module: &[u8]) -> Vec<u8> {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    for (name, bytes) in [("README", &b"a filter"[..]), ("plugin.wasm", module)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}
