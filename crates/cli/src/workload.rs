//! The certificates of the process that runs this, from the proxy of its node.

use crate::output::{Failure, say};
use anyhow::{Context, anyhow};
use clap::Args;
use leeward_identity::{Given, Identity, SpiffeId, channel, shown};
use leeward_proto::spiffe;
use leeward_proto::spiffe::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};

/// Where from, which, and where to.
#[derive(Args, Debug)]
pub(crate) struct Fetch {
    /// The socket of the SPIFFE Workload API: what the proxy's --workload-api says, or an agent's.
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", value_name = "unix:PATH", value_parser = socket)]
    socket: PathBuf,
    /// The one that is wanted, where this process is several workloads. If not given, all are shown, and the first is written.
    #[arg(long, value_name = "SPIFFE-ID", value_parser = id)]
    id: Option<SpiffeId>,
    /// Where to write cert.pem, key.pem (mode 0600) and bundle.pem. Run it again before half of the certificate's life is over.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// How long the answer may take, such as 10s.
    #[arg(long, default_value = "10s", value_name = "DURATION", value_parser = crate::identity::life)]
    timeout: Duration,
}

/// Largest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;

fn socket(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix:");
    let path = path.ok_or_else(|| "want unix:PATH, such as unix:/run/leeward/workload.sock".to_owned())?;
    // unix:///PATH is how the standard writes it.
    Ok(path.strip_prefix("//").unwrap_or(path).into())
}

fn id(text: &str) -> Result<SpiffeId, String> {
    SpiffeId::parse(text).map_err(|error| error.to_string())
}

/// Takes what the process is told first, and shows or writes it.
pub(crate) async fn fetch(fetch: Fetch) -> Result<(), Failure> {
    let at = fetch.socket.display();
    let answer = tokio::time::timeout(fetch.timeout, first(&fetch.socket)).await;
    let answer = answer.map_err(|_| anyhow!("{at} did not answer within {:?}", fetch.timeout))?;
    let answer = answer.map_err(|status| anyhow!("{at}: {}", last(&status)))?;
    let mut given = Vec::new();
    for svid in &answer.svids {
        let parse = || Given::parse(&fetch.socket, &svid.x509_svid, &svid.x509_svid_key, &svid.bundle);
        // It looks whether they go together.
        let identity = Identity::given(&fetch.socket, parse()?)?;
        if fetch.id.as_ref().is_none_or(|id| id == identity.id()) {
            given.push((identity, parse()?));
        }
    }
    if given.is_empty() {
        let got: Vec<&str> = answer.svids.iter().map(|svid| svid.spiffe_id.as_str()).collect();
        let wanted = fetch.id.as_ref().map_or("any", SpiffeId::as_str);
        return Err(anyhow!("{at} gives {got:?} to this process; want {wanted}").into());
    }
    match &fetch.out {
        Some(dir) => {
            for (identity, given) in given.iter().take(1) {
                given
                    .write(dir)
                    .with_context(|| format!("can't keep it in {}", dir.display()))?;
                let until = shown(&identity.not_after());
                say(&format!("{} in {}, until {until}", identity.id(), dir.display()));
            }
        }
        None => {
            for (identity, _) in &given {
                say(&format!(
                    "{}, until {}",
                    identity.id(),
                    shown(&identity.not_after())
                ));
            }
        }
    }
    Ok(())
}

/// The first that is said of this process.
async fn first(socket: &Path) -> Result<spiffe::X509svidResponse, Status> {
    let mut client = SpiffeWorkloadApiClient::new(channel::agent_lazy(socket.to_owned()))
        .max_decoding_message_size(MAX_ANSWER);
    let mut request = Request::new(spiffe::X509svidRequest {});
    request
        .metadata_mut()
        .insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let mut stream = client.fetch_x509svid(request).await?.into_inner();
    let first = stream.message().await?;
    first.ok_or_else(|| Status::unavailable("the stream has ended without an answer"))
}

/// What went wrong: of a way that can't be made, the last link says what it was.
fn last(status: &Status) -> String {
    let mut reason = format!("{:?}: {}", status.code(), status.message());
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        reason = cause.to_string();
        source = cause.source();
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_read_as_the_standard_has_them() {
        for text in ["unix:/run/x.sock", "unix:///run/x.sock"] {
            assert_eq!(socket(text).unwrap(), Path::new("/run/x.sock"));
        }
        assert!(socket("/run/x.sock").unwrap_err().contains("want unix:PATH"));
        assert!(socket("tcp://127.0.0.1:1").is_err());
        assert!(id("spiffe://td/zone/a/workload/pay").is_ok() && id("pay").is_err());
    }
}
