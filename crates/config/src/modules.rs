//! Plugins' modules from control planes, over the same mutual TLS as policy.

use crate::address::Control;
use crate::rota::{Rota, Timing};
use leeward_identity::{Identity, channel};
use leeward_proto::v1;
use leeward_proto::v1::plugin_service_client::PluginServiceClient;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tonic::Streaming;

/// Largest message, in bytes: a piece of 64 KiB, or sixteen signatures of 4.
const MAX_MESSAGE: usize = 256 << 10;

/// The control planes that have modules.
#[derive(Clone, Debug)]
pub struct Modules {
    identity: Arc<Identity>,
    control: Control,
    timing: Timing,
}

/// Why there is no module.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It takes too long.
    #[error("the control plane at {0} was silent for {1:?}")]
    Silent(SocketAddr, Duration),
    /// It isn't there, or says no.
    #[error("the control plane at {control}: {reason}")]
    Refused {
        /// Which.
        control: SocketAddr,
        /// What it said, or what went wrong on the way.
        reason: String,
    },
}

/// A module on its way.
#[derive(Debug)]
pub struct Incoming {
    /// Its signatures: texts of `.minisig` files.
    pub signatures: Vec<String>,
    control: SocketAddr,
    first: Option<Vec<u8>>,
    stream: Streaming<v1::ModuleChunk>,
    silence: Duration,
}

/// What is wanted of a module.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Want {
    /// Its signatures and its bytes.
    All,
    /// Its signatures.
    Signatures,
}

impl Modules {
    /// Asks these, as `identity`.
    pub fn new(identity: Arc<Identity>, control: Control, timing: Timing) -> Self {
        Self {
            identity,
            control,
            timing,
        }
    }

    /// Whom to ask, in turn.
    pub fn rota(&self) -> Rota<'_> {
        Rota::new(&self.control, self.timing)
    }

    /// Asks one of them for the module with this SHA-256, 64 hex digits. What comes must be held against it.
    ///
    /// # Errors
    ///
    /// [`FetchError`]: it can't be reached, or has none.
    pub async fn fetch(&self, control: SocketAddr, sha256: &str, want: Want) -> Result<Incoming, FetchError> {
        let silence = self.timing.silence;
        let mut client = PluginServiceClient::new(channel::connect_lazy(Arc::clone(&self.identity), control))
            .max_decoding_message_size(MAX_MESSAGE);
        let request = v1::FetchModuleRequest {
            sha256: sha256.to_owned(),
            signatures_only: want == Want::Signatures,
        };
        let answer = tokio::time::timeout(silence, client.fetch(request)).await;
        let answer = answer.map_err(|_| FetchError::Silent(control, silence))?;
        let stream = answer.map_err(|status| refused(control, &status))?.into_inner();
        let mut incoming = Incoming {
            signatures: Vec::new(),
            control,
            first: None,
            stream,
            silence,
        };
        if let Some(chunk) = incoming.chunk().await? {
            incoming.signatures = chunk.signatures;
            incoming.first = Some(chunk.data);
        }
        Ok(incoming)
    }
}

impl Incoming {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    ///
    /// [`FetchError`]: no more will come of it.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, FetchError> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        Ok(self.chunk().await?.map(|chunk| chunk.data))
    }

    async fn chunk(&mut self) -> Result<Option<v1::ModuleChunk>, FetchError> {
        match tokio::time::timeout(self.silence, self.stream.message()).await {
            Ok(chunk) => chunk.map_err(|status| refused(self.control, &status)),
            Err(_) => Err(FetchError::Silent(self.control, self.silence)),
        }
    }
}

fn refused(control: SocketAddr, status: &tonic::Status) -> FetchError {
    // Of what went wrong on the way the last link says what it was.
    let mut reason = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        reason = cause.to_string();
        source = cause.source();
    }
    FetchError::Refused { control, reason }
}
