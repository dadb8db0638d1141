//! The mesh's certificate authority: made here, at work in the control plane, and replaced step by step.

use crate::Connection;
use crate::api::call;
use crate::connect::{Link, link};
use crate::identity::life;
use crate::output::{Failure, Format, say, table};
use clap::{Args, Subcommand};
use leeward_identity::Identity;
use leeward_identity::authority::Authority;
use leeward_proto::v1;
use leeward_proto::v1::identity_client::IdentityClient;
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a root: ca.pem and ca-key.pem. Its key is needed only to make intermediates: keep it away from the network.
    Init {
        /// Where.
        dir: PathBuf,
        /// The mesh's trust domain, such as mesh.example.
        #[arg(long)]
        trust_domain: String,
    },
    /// Make an intermediate of a root, for `leeward-control --ca`: ca.pem, ca-key.pem and roots.pem.
    Intermediate {
        /// The root's directory.
        #[arg(long, value_name = "DIR")]
        root: PathBuf,
        /// Where to write it: what --ca names, or next/ in that, to rotate.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// How long it lasts, such as 8760h.
        #[arg(long, default_value = "8760h", value_parser = life)]
        ttl: Duration,
    },
    /// Show the control plane's authority: roots, who is behind, who is on another root.
    Status {
        #[command(flatten)]
        connection: Connection,
        /// How to show it.
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Bring the mesh to the authority in next/ of the control plane's --ca directory, one step after the other.
    #[command(subcommand)]
    Rotate(Rotate),
}

/// A step of a rotation.
#[derive(Debug, Subcommand)]
pub(crate) enum Rotate {
    /// First: trust the new root, too, everywhere.
    Prepare(Step),
    /// Second: let the new authority sign, once every proxy trusts its root.
    Activate(Step),
    /// Last: trust the old root no more, once nobody has a certificate of it.
    Retire(Step),
    /// Before activate: take it back.
    Cancel(Step),
}

/// How a step is taken.
#[derive(Args, Debug)]
pub(crate) struct Step {
    #[command(flatten)]
    connection: Connection,
    /// Whoever is in the way is left behind, and can't be reached any more.
    #[arg(long)]
    force: bool,
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Init { dir, trust_domain } => {
            let root = Authority::create(&dir, &trust_domain)?;
            say(&format!(
                "root of {} in {}, SHA-256 {}\nkeep ca-key.pem offline; it is needed for leeward ca intermediate only",
                root.domain(),
                dir.display(),
                root.fingerprint()
            ));
        }
        Command::Intermediate { root, out, ttl } => {
            let ca = Authority::open(&root)?.intermediate(ttl, &out)?;
            say(&format!(
                "intermediate of {} in {}, until {}",
                ca.domain(),
                out.display(),
                leeward_identity::shown(&ca.validity().not_after)
            ));
        }
        Command::Status { connection, output } => {
            let mut client = client(&connection)?;
            let request = v1::GetAuthorityRequest {};
            let authority = call(connection.control, client.get_authority(request)).await?;
            show(&authority, output);
        }
        Command::Rotate(rotate) => {
            let (step, how) = match rotate {
                Rotate::Prepare(how) => (v1::RotationStep::Prepare, how),
                Rotate::Activate(how) => (v1::RotationStep::Activate, how),
                Rotate::Retire(how) => (v1::RotationStep::Retire, how),
                Rotate::Cancel(how) => (v1::RotationStep::Cancel, how),
            };
            if step == v1::RotationStep::Retire && !how.force {
                check_own(&how.connection).await?;
            }
            let mut client = client(&how.connection)?;
            let request = v1::RotateRequest {
                step: step.into(),
                force: how.force,
            };
            let answer = call(how.connection.control, client.rotate(request)).await?;
            show(&answer.authority.unwrap_or_default(), Format::Table);
        }
    }
    Ok(())
}

/// Whoever retires a root had better not stand on it: the control plane doesn't know of certificates from files.
async fn check_own(connection: &Connection) -> Result<(), Failure> {
    if connection.token_file.is_some() {
        // Whoever comes with a token stands on none.
        return Ok(());
    }
    let own = Identity::load(&connection.identity)?.facts().root;
    let request = v1::GetAuthorityRequest {};
    let authority = call(connection.control, client(connection)?.get_authority(request)).await?;
    if authority.phase() == v1::RotationPhase::Active
        && own.as_deref() != Some(authority.signing_root.as_str())
    {
        return Err(Failure::BadInput(
            "leeward: your own certificate leads to the root that is to go: run leeward identity renew first, or --force"
                .to_owned(),
        ));
    }
    Ok(())
}

pub(crate) fn client(connection: &Connection) -> Result<IdentityClient<Link>, Failure> {
    Ok(IdentityClient::new(link(connection)?))
}

const fn phase(phase: v1::RotationPhase) -> &'static str {
    match phase {
        v1::RotationPhase::Unspecified => "unknown",
        v1::RotationPhase::Steady => "steady",
        v1::RotationPhase::Prepared => "prepared",
        v1::RotationPhase::Active => "active",
    }
}

/// What comes next, for people.
fn next(authority: &v1::Authority) -> String {
    match authority.phase() {
        v1::RotationPhase::Unspecified => String::new(),
        v1::RotationPhase::Steady if authority.roots.len() > 1 => {
            "more than one root is trusted; leeward ca rotate retire takes those away that don't sign"
                .to_owned()
        }
        v1::RotationPhase::Steady => "no rotation is under way".to_owned(),
        v1::RotationPhase::Prepared if authority.behind.is_empty() => {
            "every proxy trusts the new root; next: leeward ca rotate activate".to_owned()
        }
        v1::RotationPhase::Prepared => {
            format!("{} proxies don't trust the new root yet", authority.behind.len())
        }
        v1::RotationPhase::Active if authority.on_other_roots.is_empty() => {
            "nobody is known to have a certificate of the old root; next: leeward ca rotate retire".to_owned()
        }
        v1::RotationPhase::Active => {
            format!(
                "{} have certificates of the old root",
                authority.on_other_roots.len()
            )
        }
    }
}

fn when(at: Option<&prost_types::Timestamp>) -> String {
    let at = at.and_then(|at| SystemTime::try_from(*at).ok());
    at.map_or_else(|| "-".to_owned(), |at| leeward_identity::shown(&at))
}

fn show(authority: &v1::Authority, format: Format) {
    let bundle = authority.bundle.clone().unwrap_or_default();
    if format != Format::Table {
        let holders = |holders: &[v1::Holder]| -> Vec<serde_json::Value> {
            let shown = |h: &v1::Holder| {
                json!({
                    "id": h.spiffe_id, "connected": h.connected, "why": h.why, "notAfter": when(h.not_after.as_ref()),
                })
            };
            holders.iter().map(shown).collect()
        };
        let roots: Vec<_> = authority
            .roots
            .iter()
            .map(|root| {
                json!({
                    "sha256": root.fingerprint, "notAfter": when(root.not_after.as_ref()), "signing": root.signing,
                })
            })
            .collect();
        let value = json!({
            "trustDomain": authority.trust_domain, "phase": phase(authority.phase()), "bundle": bundle.hash,
            "signing": authority.signing, "notAfter": when(authority.not_after.as_ref()), "roots": roots,
            "behind": holders(&authority.behind), "onOtherRoots": holders(&authority.on_other_roots),
        });
        say(&format!("{value:#}"));
        return;
    }
    say(&format!(
        "trust domain {}, {}, bundle {}, the authority's certificate until {}\n{}\n",
        authority.trust_domain,
        phase(authority.phase()),
        short(&bundle.hash),
        when(authority.not_after.as_ref()),
        next(authority)
    ));
    let roots: Vec<[String; 3]> = authority
        .roots
        .iter()
        .map(|root| {
            let signs = if root.signing { "yes" } else { "no" };
            [
                short(&root.fingerprint).to_owned(),
                signs.to_owned(),
                when(root.not_after.as_ref()),
            ]
        })
        .collect();
    say(&table(["ROOT", "SIGNS", "UNTIL"], &roots));
    for (title, holders) in [
        ("BEHIND", &authority.behind),
        ("ON ANOTHER ROOT", &authority.on_other_roots),
    ] {
        if holders.is_empty() {
            continue;
        }
        let rows: Vec<[String; 4]> = holders
            .iter()
            .map(|holder| {
                let connected = if holder.connected { "yes" } else { "no" };
                [
                    holder.spiffe_id.clone(),
                    connected.to_owned(),
                    holder.why.clone(),
                    when(holder.not_after.as_ref()),
                ]
            })
            .collect();
        say(&format!(
            "\n{}",
            table([title, "CONNECTED", "WHY", "UNTIL"], &rows)
        ));
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
