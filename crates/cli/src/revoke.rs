//! Revocations: an id whose certificates are refused everywhere, from now on.

use crate::Connection;
use crate::api::{MAX_MESSAGE, call};
use crate::connect::{Link, link};
use crate::identity::life;
use crate::output::{Failure, Format, say, table};
use clap::Args;
use leeward_proto::v1;
use leeward_proto::v1::identity_client::IdentityClient;
use serde_json::json;
use std::time::{Duration, SystemTime};

/// Refuse the certificates of an id that were issued before now, and its join tokens, everywhere, and close its connections.
#[derive(Args, Clone, Debug)]
pub(crate) struct Revoke {
    #[command(flatten)]
    connection: Connection,
    /// Whose: a SPIFFE id, or its path alone, such as /zone/a/proxy/a1 or /user/bob.
    id: String,
    /// Why, for people; at most 500 bytes.
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// How long it is kept, 169h to 87600h: at least as long as certificates that were issued before can last. Longer only for
    /// certificates from files.
    #[arg(long, default_value = "169h", value_parser = life)]
    keep: Duration,
    /// Wait until every proxy that is connected to the control plane refuses them.
    #[arg(long)]
    wait: bool,
    /// How long to wait at most.
    #[arg(long, default_value = "60s", value_parser = life, requires = "wait")]
    timeout: Duration,
}

/// Show whose certificates are refused, and by which proxies not yet.
#[derive(Args, Clone, Debug)]
pub(crate) struct Revoked {
    #[command(flatten)]
    connection: Connection,
    /// How to show it: table or json.
    #[arg(short, long, default_value = "table")]
    output: Format,
}

/// Take a revocation back: certificates that were refused for it are good again, until they end.
#[derive(Args, Clone, Debug)]
pub(crate) struct Restore {
    #[command(flatten)]
    connection: Connection,
    /// Whose: a SPIFFE id, or its path alone.
    id: String,
}

/// Pause between two looks at who refuses.
const LOOK: Duration = Duration::from_millis(250);
/// Proxies that are named in an error.
const MAX_TOLD: usize = 10;

fn client(connection: &Connection) -> Result<IdentityClient<Link>, Failure> {
    Ok(IdentityClient::new(link(connection)?).max_decoding_message_size(MAX_MESSAGE))
}

pub(crate) async fn revoke(revoke: Revoke) -> Result<(), Failure> {
    let connection = &revoke.connection;
    let request = v1::RevokeRequest {
        spiffe_id: revoke.id.clone(),
        reason: revoke.reason.clone(),
        keep: prost_types::Duration::try_from(revoke.keep).ok(),
    };
    let answer = call(connection.control, client(connection)?.revoke(request)).await?;
    let revocation = answer.revocation.unwrap_or_default();
    say(&format!(
        "{} is revoked: its certificates from before {} are refused, and its join tokens; kept until {}",
        revocation.spiffe_id,
        when(revocation.at.as_ref()),
        when(revocation.until.as_ref())
    ));
    if revoke.wait {
        let proxies = wait(&revoke).await?;
        say(&format!("all {proxies} proxies that are connected refuse them"));
    }
    Ok(())
}

/// Waits until all proxies refuse, and says how many they are.
async fn wait(revoke: &Revoke) -> Result<u32, Failure> {
    let connection = &revoke.connection;
    let until = tokio::time::Instant::now() + revoke.timeout;
    let mut client = client(connection)?;
    loop {
        let request = v1::ListRevocationsRequest {};
        let known = call(connection.control, client.list_revocations(request)).await?;
        if known.behind.is_empty() {
            return Ok(known.connected);
        }
        if tokio::time::Instant::now() >= until {
            let named = known.behind.iter().take(MAX_TOLD);
            let named: Vec<_> = named
                .map(|holder| format!("{} ({})", holder.spiffe_id, holder.why))
                .collect();
            return Err(Failure::Failed(anyhow::anyhow!(
                "{} of {} proxies don't refuse them after {:?}: {}",
                known.behind.len(),
                known.connected,
                revoke.timeout,
                named.join(", ")
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

pub(crate) async fn revoked(revoked: Revoked) -> Result<(), Failure> {
    let connection = &revoked.connection;
    let request = v1::ListRevocationsRequest {};
    let known = call(connection.control, client(connection)?.list_revocations(request)).await?;
    if revoked.output != Format::Table {
        say(&format!("{:#}", as_json(&known)));
        return Ok(());
    }
    let rows: Vec<[String; 5]> = known
        .revocations
        .iter()
        .map(|revocation| {
            [
                revocation.spiffe_id.clone(),
                when(revocation.at.as_ref()),
                when(revocation.until.as_ref()),
                revocation.who.clone(),
                revocation.reason.clone(),
            ]
        })
        .collect();
    say(&table(
        ["ID", "CERTIFICATES BEFORE", "KEPT UNTIL", "BY", "REASON"],
        &rows,
    ));
    if !known.behind.is_empty() {
        let rows: Vec<[String; 2]> = known
            .behind
            .iter()
            .map(|holder| [holder.spiffe_id.clone(), holder.why.clone()])
            .collect();
        say(&format!("\n{}", table(["NOT REFUSED YET BY", "WHY"], &rows)));
    }
    Ok(())
}

fn as_json(known: &v1::ListRevocationsResponse) -> serde_json::Value {
    let revocations: Vec<_> = known
        .revocations
        .iter()
        .map(|revocation| {
            json!({
                "id": revocation.spiffe_id, "at": when(revocation.at.as_ref()), "until": when(revocation.until.as_ref()),
                "who": revocation.who, "reason": revocation.reason,
            })
        })
        .collect();
    let behind: Vec<_> = known
        .behind
        .iter()
        .map(|holder| json!({"id": holder.spiffe_id, "why": holder.why}))
        .collect();
    json!({"revocations": revocations, "hash": known.hash, "connected": known.connected, "behind": behind})
}

pub(crate) async fn restore(restore: Restore) -> Result<(), Failure> {
    let connection = &restore.connection;
    let request = v1::RestoreRequest {
        spiffe_id: restore.id.clone(),
    };
    let answer = call(connection.control, client(connection)?.restore(request)).await?;
    let revocation = answer.revocation.unwrap_or_default();
    say(&format!(
        "{} is not revoked any more: its certificates from before {} are good again",
        revocation.spiffe_id,
        when(revocation.at.as_ref())
    ));
    Ok(())
}

fn when(at: Option<&prost_types::Timestamp>) -> String {
    let at = at.and_then(|at| SystemTime::try_from(*at).ok());
    at.map_or_else(|| "-".to_owned(), |at| leeward_identity::shown(&at))
}
