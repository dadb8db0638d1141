//! Making certificates for a mesh that has no other authority.

use crate::output::{Failure, say};
use clap::{Args, Subcommand};
use leeward_identity::SpiffeId;
use leeward_identity::authority::Authority;
use std::path::PathBuf;
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

fn life(text: &str) -> Result<Duration, String> {
    leeward_proto::manifest::parse_duration(text)
        .filter(|d| !d.is_zero())
        .ok_or_else(|| "want a duration such as 1h or 24h".to_owned())
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
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
    }
    Ok(())
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
