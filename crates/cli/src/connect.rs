//! The way to a control plane, and what every call on it says of who calls.

use crate::Connection;
use crate::output::Failure;
use leeward_identity::{Bundle, Identity, channel};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// A connection to a control plane.
pub(crate) type Link = InterceptedService<Channel, Headers>;

/// What calls carry beside their messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Headers {
    token: Option<MetadataValue<Ascii>>,
    reason: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        if let Some(token) = &self.token {
            metadata.insert("authorization", token.clone());
        }
        if let Some(reason) = &self.reason {
            metadata.insert("leeward-reason", reason.clone());
        }
        Ok(request)
    }
}

/// What is sent otherwise than it is written.
const ENCODED: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS.add(b'%');
/// Largest token, in bytes.
const MAX_TOKEN: usize = 16 << 10;

/// Connects when it is first used.
pub(crate) fn link(connection: &Connection) -> Result<Link, Failure> {
    let bad = |why: String| Failure::BadInput(format!("leeward: {why}"));
    let mut headers = Headers::default();
    if let Some(reason) = &connection.breakglass {
        // As gRPC encodes its own messages: what isn't ASCII would not get through.
        let text = percent_encoding::utf8_percent_encode(reason, ENCODED).to_string();
        headers.reason = Some(
            text.parse()
                .map_err(|_| bad(format!("--breakglass {reason:?} can't be sent")))?,
        );
    }
    let channel = match &connection.token_file {
        None => channel::connect_lazy(Identity::load(&connection.identity)?, connection.control),
        Some(file) => {
            let shown = file.display();
            let token =
                std::fs::read_to_string(file).map_err(|error| bad(format!("can't read {shown}: {error}")))?;
            let token = token.trim();
            if token.is_empty() || token.len() > MAX_TOKEN {
                return Err(bad(format!("{shown} has no token of up to {MAX_TOKEN} bytes")));
            }
            let mut value: MetadataValue<Ascii> = format!("Bearer {token}").parse().map_err(|_| {
                bad(format!(
                    "{shown} has no token: it has characters that no token has"
                ))
            })?;
            value.set_sensitive(true);
            headers.token = Some(value);
            let path = connection.bundle.as_ref();
            let path = path.ok_or_else(|| {
                bad("--token-file goes with --bundle, by which the control plane is known".to_owned())
            })?;
            let shown = path.display();
            let text = std::fs::read(path).map_err(|error| bad(format!("can't read {shown}: {error}")))?;
            let bundle =
                Bundle::from_pem(&text).map_err(|error| bad(format!("{shown} can't be used: {error}")))?;
            channel::guest_lazy(bundle, connection.control)
                .map_err(|error| bad(format!("{shown} can't be used: {error}")))?
        }
    };
    Ok(InterceptedService::new(channel, headers))
}
