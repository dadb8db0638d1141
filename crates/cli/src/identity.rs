//! Certificates: from an authority in a directory, or from the control plane.

use crate::Connection;
use crate::api::call;
use crate::output::{Failure, say};
use crate::revoke;
use crate::workload::{Fetch, fetch};
use anyhow::Context;
use clap::{Args, Subcommand};
use leeward_identity::authority::Authority;
use leeward_identity::join::Joining;
use leeward_identity::{Bundle, Identity, Issued, JoinToken, NewKey, SpiffeId, channel};
use leeward_proto::v1;
use leeward_proto::v1::identity_client::IdentityClient;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What to make.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an authority: ca.pem and ca-key.pem.
    Init {
        /// Where.
        dir: PathBuf,
        /// The mesh's trust domain, such as mesh.example.
        #[arg(long)]
        trust_domain: String,
    },
    /// Issue a certificate: cert.pem, key.pem and bundle.pem.
    Issue {
        /// The authority's directory.
        #[arg(long, value_name = "DIR")]
        authority: PathBuf,
        /// For whom.
        #[command(flatten)]
        holder: Holder,
        /// Where to write it.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// How long it lasts, such as 1h or 24h.
        #[arg(long, default_value = "24h", value_parser = life)]
        ttl: Duration,
    },
    Revoke(revoke::Revoke),
    Revoked(revoke::Revoked),
    Restore(revoke::Restore),
    /// Get your next certificate from the control plane, and the roots of now.
    Renew {
        #[command(flatten)]
        connection: Connection,
    },
    /// Get the certificate of the workload that runs this, from its node's proxy (leeward-proxy --workload-api).
    Workload(Fetch),
    /// Get your first certificate from the control plane, with a token of `leeward token create --user`.
    Join {
        /// The control plane.
        #[arg(
            long,
            env = "LEEWARD_CONTROL",
            default_value = "127.0.0.1:15010",
            value_name = "IP:PORT"
        )]
        control: SocketAddr,
        /// The token.
        #[arg(
            long,
            env = "LEEWARD_JOIN_TOKEN",
            value_name = "TOKEN",
            hide_env_values = true
        )]
        token: JoinToken,
        /// Your name, as in the token.
        #[arg(long, value_name = "NAME")]
        user: String,
        /// A file of roots by which the control plane is known, in place of the one that the token names.
        #[arg(long, env = "LEEWARD_TRUST_BUNDLE", value_name = "FILE")]
        trust_bundle: Option<PathBuf>,
        /// Where to write cert.pem, key.pem and bundle.pem.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// For whom a certificate is; one of these.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Holder {
    /// A proxy.
    #[arg(long, value_name = "ZONE/NAME")]
    proxy: Option<String>,
    /// A control plane.
    #[arg(long)]
    control: bool,
    /// A person or a tool.
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
}

pub(crate) fn life(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .filter(|d| !d.is_zero())
        .ok_or_else(|| "want a duration such as 1h or 24h".to_owned())
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Init { dir, trust_domain } => {
            let authority = Authority::create(&dir, &trust_domain)?;
            say(&format!(
                "authority of {} in {}; keep ca-key.pem to yourself",
                authority.domain(),
                dir.display()
            ));
        }
        Command::Issue {
            authority,
            holder,
            out,
            ttl,
        } => {
            let authority = Authority::open(&authority)?;
            let id = holder.id(authority.domain())?;
            authority.issue(&id, ttl, &out)?;
            say(&format!(
                "{id} in {}, for {}",
                out.display(),
                leeward_proto::manifest::duration_text(ttl)
            ));
        }
        Command::Revoke(revoke) => revoke::revoke(revoke).await?,
        Command::Revoked(revoked) => revoke::revoked(revoked).await?,
        Command::Restore(restore) => revoke::restore(restore).await?,
        Command::Renew { connection } => {
            let identity = Identity::load(&connection.identity)?;
            let key = NewKey::generate(identity.id())?;
            let request = v1::IssueRequest {
                request: key.request().to_vec(),
            };
            let mut client =
                IdentityClient::new(channel::connect_lazy(Arc::clone(&identity), connection.control));
            let answer = call(connection.control, client.issue(request)).await?;
            identity.install(&key, &issued(answer)?)?;
            say(&format!(
                "{} in {}, until {}",
                identity.id(),
                connection.identity.display(),
                leeward_identity::shown(&identity.not_after())
            ));
        }
        Command::Workload(what) => fetch(what).await?,
        Command::Join {
            control,
            token,
            user,
            trust_bundle,
            out,
        } => {
            let bundle = match &trust_bundle {
                None => None,
                Some(file) => {
                    let text =
                        std::fs::read(file).with_context(|| format!("can't read {}", file.display()))?;
                    Some(
                        Bundle::from_pem(&text)
                            .with_context(|| format!("{} can't be used", file.display()))?,
                    )
                }
            };
            let id = SpiffeId::user(token.domain(), &user)
                .map_err(|error| Failure::BadInput(format!("leeward: {error}")))?;
            let joining = Joining::new(&token, bundle)?;
            // The same for all tries: when an answer gets lost, the token is good for its key alone.
            let key = Joining::key(&out, &id)?;
            let request = v1::JoinRequest {
                secret: token.secret().to_owned(),
                spiffe_id: id.to_string(),
                request: key.request().to_vec(),
            };
            let mut client = IdentityClient::new(channel::join_lazy(joining.clone(), control));
            let answer = call(control, client.join(request)).await?;
            joining.keep(&out, &id, &key, &issued(answer)?)?;
            say(&format!("{id} in {}", out.display()));
        }
    }
    Ok(())
}

fn issued(answer: v1::Issued) -> Result<Issued, Failure> {
    Ok(Issued::parse(
        answer.chain,
        answer.bundle.unwrap_or_default().roots,
    )?)
}

impl Holder {
    fn id(&self, domain: &str) -> Result<SpiffeId, Failure> {
        let bad = |e: leeward_identity::InvalidSpiffeId| Failure::BadInput(format!("leeward: {e}"));
        match (&self.proxy, &self.user) {
            (Some(proxy), _) => {
                let (zone, name) = proxy.split_once('/').ok_or_else(|| {
                    Failure::BadInput(format!("leeward: --proxy {proxy:?}: want ZONE/NAME"))
                })?;
                SpiffeId::proxy(domain, zone, name).map_err(bad)
            }
            (None, Some(user)) => SpiffeId::user(domain, user).map_err(bad),
            (None, None) => SpiffeId::control(domain).map_err(bad),
        }
    }
}
