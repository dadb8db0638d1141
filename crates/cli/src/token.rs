//! Tokens with which nodes and people join.

use crate::Connection;
use crate::api::call;
use crate::ca::client;
use crate::identity::life;
use crate::output::{Failure, complain, say};
use clap::Subcommand;
use leeward_proto::v1;
use std::time::Duration;

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a token with which one proxy, or one person, gets a first certificate, once. It is printed, and kept nowhere.
    Create {
        #[command(flatten)]
        connection: Connection,
        /// The proxy's zone.
        #[arg(
            long,
            requires = "name",
            required_unless_present = "user",
            conflicts_with = "user"
        )]
        zone: Option<String>,
        /// The proxy's name.
        #[arg(long, requires = "zone")]
        name: Option<String>,
        /// A person or a tool, in place of a proxy.
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
        /// How long it may wait to be used, 1m to 168h.
        #[arg(long, default_value = "1h", value_parser = life)]
        ttl: Duration,
    },
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    let Command::Create {
        connection,
        zone,
        name,
        user,
        ttl,
    } = command;
    let path = match (zone, name, user) {
        (Some(zone), Some(name), _) => format!("/zone/{zone}/proxy/{name}"),
        (_, _, Some(user)) => format!("/user/{user}"),
        _ => {
            return Err(Failure::BadInput(
                "leeward: want --zone and --name, or --user".to_owned(),
            ));
        }
    };
    let mut client = client(&connection)?;
    let request = v1::CreateTokenRequest {
        path,
        ttl: prost_types::Duration::try_from(ttl).ok(),
    };
    let made = call(connection.control, client.create_token(request)).await?;
    // The token alone, for scripts; what it is for beside it.
    complain(&format!("for {}, once", made.spiffe_id));
    say(&made.token);
    Ok(())
}
