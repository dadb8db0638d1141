//! The API for plugins' modules: people push, list and delete them, proxies fetch them.

use crate::api::{authorize, bad, status};
use crate::images::Images;
use crate::policy::{Policy, timestamp};
use crate::refusal::{Reason, refuse, refuse_for_now};
use crate::store::{CHUNK, StoredModule};
use leeward_identity::{PeerInfo, Role};
use leeward_module::{MAX_BYTES, MAX_SIGNATURE, check_signature, hex, parse_hex};
use leeward_proto::v1;
use leeward_proto::v1::plugin_service_server::PluginService;
use leeward_proto::v1::push_module_request::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

/// Modules that come in at once, each whole in memory; more wait.
const PUSHES: usize = 4;
/// How long a push may be silent, and how long it may wait for its turn.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a push may take in all: 64 MiB at 110 KiB/s.
const PUSH_LIMIT: Duration = Duration::from_secs(600);
/// Pieces of a module that are read at once.
const READ: u32 = 8;
/// Pieces that wait for a slow proxy, beside those that were read with them.
const OUTBOX: usize = 4;

/// Serves modules.
#[derive(Clone, Debug)]
pub(crate) struct Modules {
    policy: Policy,
    images: Images,
    pushes: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Modules {
    /// Fetches end when `stop` is cancelled.
    pub(crate) fn new(policy: Policy, images: Images, stop: CancellationToken) -> Self {
        Self {
            policy,
            images,
            pushes: Arc::new(Semaphore::new(PUSHES)),
            stop,
        }
    }
}

#[tonic::async_trait]
impl PluginService for Modules {
    async fn push(
        &self,
        request: Request<Streaming<v1::PushModuleRequest>>,
    ) -> Result<Response<v1::Module>, Status> {
        let who = authorize(&request)?;
        let turn = tokio::time::timeout(SILENCE, self.pushes.acquire());
        let Ok(Ok(_turn)) = turn.await else {
            let why = format!("{PUSHES} modules are being pushed already; push again later");
            return Err(refuse_for_now(Code::ResourceExhausted, Reason::Busy, why));
        };
        let received = tokio::time::timeout(PUSH_LIMIT, receive(request.into_inner())).await;
        let Ok(received) = received else {
            let why = format!("the push took more than {PUSH_LIMIT:?}");
            return Err(refuse(Code::Aborted, Reason::TooSlow, why));
        };
        let (bytes, signature) = received?;
        let pushed = self.policy.put_module(bytes, signature, who.clone()).await;
        let stored = pushed.map_err(status)?;
        let sha256 = hex(&stored.module.sha256);
        tracing::info!(who, sha256, size = stored.module.size, "push a module");
        let signatures = stored.signatures.len();
        Ok(Response::new(wire(stored, signatures, Vec::new())))
    }

    async fn get(&self, request: Request<v1::GetModuleRequest>) -> Result<Response<v1::Module>, Status> {
        authorize(&request)?;
        let sha256 = digest(&request.into_inner().sha256)?;
        let (stored, used_by) = self.policy.module(sha256).await.map_err(status)?;
        let signatures = stored.signatures.len();
        Ok(Response::new(wire(stored, signatures, used_by)))
    }

    async fn list(
        &self,
        request: Request<v1::ListModulesRequest>,
    ) -> Result<Response<v1::ListModulesResponse>, Status> {
        authorize(&request)?;
        let inventory = self.policy.inventory().await.map_err(status)?;
        let modules = inventory.modules.into_iter();
        Ok(Response::new(v1::ListModulesResponse {
            modules: modules
                .map(|(stored, signatures, used_by)| wire(stored, signatures, used_by))
                .collect(),
            images: self.images.list(),
            size: inventory.size,
            max_size: inventory.max_size,
        }))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteModuleRequest>,
    ) -> Result<Response<v1::DeleteModuleResponse>, Status> {
        let who = authorize(&request)?;
        let sha256 = digest(&request.into_inner().sha256)?;
        self.policy.delete_module(sha256).await.map_err(status)?;
        tracing::info!(who, sha256 = hex(&sha256), "delete a module");
        Ok(Response::new(v1::DeleteModuleResponse {}))
    }

    type FetchStream = ReceiverStream<Result<v1::ModuleChunk, Status>>;

    async fn fetch(
        &self,
        request: Request<v1::FetchModuleRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        authorize_fetch(&request)?;
        let request = request.into_inner();
        let sha256 = digest(&request.sha256)?;
        // Whether it is there is said before the stream begins.
        let (stored, _) = self.policy.module(sha256).await.map_err(status)?;
        let first = v1::ModuleChunk {
            data: Vec::new(),
            signatures: stored.signatures,
        };
        let (outbox, chunks) = mpsc::channel(OUTBOX);
        let (policy, stop) = (self.policy.clone(), self.stop.clone());
        // Its owner is the receiver: it ends when the caller is gone, or with the server.
        tokio::spawn(async move {
            let send = async {
                if outbox.send(Ok(first)).await.is_ok() && !request.signatures_only {
                    send(&policy, sha256, &outbox).await;
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = send => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(chunks)))
    }
}

/// A module and its signature, as they come in.
async fn receive(mut stream: Streaming<v1::PushModuleRequest>) -> Result<(Vec<u8>, Option<String>), Status> {
    let Some(Message::Header(header)) = next(&mut stream).await? else {
        return Err(bad("header", "is missing; want it first".to_owned()));
    };
    if header.signature.len() > MAX_SIGNATURE {
        let length = header.signature.len();
        let reason = format!("has {length} bytes; want the text of a .minisig file, at most {MAX_SIGNATURE}");
        return Err(bad("header.signature", reason));
    }
    let signature = Some(header.signature).filter(|text| !text.is_empty());
    if let Some(text) = &signature {
        check_signature(text).map_err(|error| bad("header.signature", format!("is {error}")))?;
    }
    let mut bytes = Vec::new();
    while let Some(message) = next(&mut stream).await? {
        let Message::Chunk(chunk) = message else {
            return Err(bad("header", "stands twice; want it first and once".to_owned()));
        };
        if chunk.len() > CHUNK {
            let reason = format!("has {} bytes; want at most {CHUNK}", chunk.len());
            return Err(bad("chunk", reason));
        }
        if bytes.len() + chunk.len() > MAX_BYTES {
            let reason =
                format!("has more than {MAX_BYTES} bytes (64 MiB), which is all that a plugin may have");
            return Err(bad("module", reason));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes, signature))
}

async fn next(stream: &mut Streaming<v1::PushModuleRequest>) -> Result<Option<Message>, Status> {
    match tokio::time::timeout(SILENCE, stream.message()).await {
        Ok(message) => Ok(message?.and_then(|message| message.message)),
        Err(_) => Err(refuse(
            Code::Aborted,
            Reason::TooSlow,
            format!("nothing came for {SILENCE:?}"),
        )),
    }
}

async fn send(policy: &Policy, sha256: [u8; 32], outbox: &mpsc::Sender<Result<v1::ModuleChunk, Status>>) {
    let mut from = 0;
    loop {
        let chunks = match policy.module_chunks(sha256, from, READ).await {
            Ok(chunks) => chunks,
            Err(error) => return drop(outbox.send(Err(status(error))).await),
        };
        if chunks.is_empty() {
            return;
        }
        from += READ;
        for data in chunks {
            let chunk = v1::ModuleChunk {
                data: data.into(),
                signatures: Vec::new(),
            };
            if outbox.send(Ok(chunk)).await.is_err() {
                return;
            }
        }
    }
}

/// Whoever may use the API, and proxies.
fn authorize_fetch<T>(request: &Request<T>) -> Result<(), Status> {
    let peer = request.extensions().get::<PeerInfo>();
    match peer.map(|peer| peer.id.role()) {
        Some(Role::Proxy { .. }) => Ok(()),
        Some(Role::User { .. } | Role::Control | Role::Workload { .. } | Role::Other) | None => {
            authorize(request).map(drop)
        }
    }
}

fn digest(text: &str) -> Result<[u8; 32], Status> {
    let shown: String = text.chars().take(80).collect();
    parse_hex(text).ok_or_else(|| {
        bad(
            "sha256",
            format!("{shown:?} is not a SHA-256; want 64 hex digits"),
        )
    })
}

fn wire(stored: StoredModule, signatures: impl TryInto<u32>, used_by: Vec<String>) -> v1::Module {
    use leeward_module::Kind;
    let module = stored.module;
    let kind = match module.kind {
        Kind::Fallback => v1::PluginKind::Fallback,
        Kind::Filter => v1::PluginKind::Filter,
        Kind::Router => v1::PluginKind::Router,
        Kind::WasiHttp => v1::PluginKind::WasiHttp,
        Kind::ProxyWasm => v1::PluginKind::ProxyWasm,
    };
    let texts = |names: Vec<Box<str>>| names.into_iter().map(Into::into).collect();
    v1::Module {
        sha256: hex(&module.sha256),
        kind: kind.into(),
        version: module.version.into(),
        imports: texts(module.imports),
        exports: texts(module.exports),
        size: module.size as u64,
        create_time: Some(timestamp(stored.created_ms)),
        by: stored.by,
        signatures: signatures.try_into().unwrap_or(u32::MAX),
        used_by,
    }
}
