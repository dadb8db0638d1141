//! Circuits: what state they are in at a proxy, and holding one for a while in an emergency.

use crate::Connection;
use crate::api::{answer, call, client, reference, told};
use crate::output::{Failure, Format, say, table};
use crate::proxy::{entries, get};
use clap::{Args, Subcommand};
use leeward_policy::{Kind, Name};
use leeward_proto::manifest::{duration_text, parse_duration};
use leeward_proto::v1;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// For how long a circuit may be held.
const TTL: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Hold a circuit open: its calls fail at once and go to the fallback.
    Open(Hold),
    /// Hold a circuit closed: its calls go through, whatever its breaker says.
    Close(Hold),
    /// Leave a circuit to its breaker again.
    Auto {
        #[command(flatten)]
        connection: Connection,
        /// A route's name, or service/NAME.
        target: Target,
    },
    /// Show the circuits of a proxy, and the endpoints that it leaves out.
    List {
        /// The proxy's admin listener.
        #[arg(long, default_value = "127.0.0.1:15020", value_name = "IP:PORT")]
        admin: SocketAddr,
        /// How to show them.
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
}

/// Which circuit is held, and for how long.
#[derive(Args, Debug)]
pub(crate) struct Hold {
    #[command(flatten)]
    connection: Connection,
    /// A route's name, or service/NAME.
    target: Target,
    /// For how long, 1s to 24h. It ends by itself at every proxy.
    #[arg(long, default_value = "10m", value_parser = ttl)]
    ttl: Duration,
    /// Why, for people.
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
}

/// What a circuit is held in.
#[derive(Clone, Copy, Debug)]
enum State {
    Open,
    Closed,
}

impl State {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
        }
    }

    const fn mode(self) -> v1::BreakerMode {
        match self {
            Self::Open => v1::BreakerMode::ForceOpen,
            Self::Closed => v1::BreakerMode::ForceClosed,
        }
    }
}

/// Whose circuit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    Route(Name),
    Service(Name),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = |text: &str| Name::parse(text).map_err(|e| e.to_string());
        match text.split_once('/') {
            None => name(text).map(Self::Route),
            Some(("route", route)) => name(route).map(Self::Route),
            Some(("service", service)) => name(service).map(Self::Service),
            Some(_) => Err("want a route's name, route/NAME or service/NAME".to_owned()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Route(name) => write!(f, "route {name}"),
            Self::Service(name) => write!(f, "service {name}"),
        }
    }
}

impl Target {
    /// The name of the CircuitOverride, always the same for the same circuit: `route-NAME` or `service-NAME`.
    /// One that would be too long is cut, and told from others by a hash.
    fn override_name(&self) -> String {
        let whole = match self {
            Self::Route(name) => format!("route-{name}"),
            Self::Service(name) => format!("service-{name}"),
        };
        if whole.len() <= Name::MAX_LEN {
            return whole;
        }
        let digest = Sha256::digest(whole.as_bytes());
        let mark: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        // A name is ASCII, and can be cut anywhere.
        let kept = whole.get(..Name::MAX_LEN - 1 - mark.len()).unwrap_or_default();
        format!("{}-{mark}", kept.trim_end_matches('-'))
    }
}

fn ttl(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .filter(|ttl| TTL.contains(ttl))
        .ok_or_else(|| "want 1s to 24h, such as 10m".to_owned())
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Open(options) => hold(options, State::Open).await,
        Command::Close(options) => hold(options, State::Closed).await,
        Command::Auto { connection, target } => auto(&connection, &target).await,
        Command::List { admin, output } => list(admin, output).await,
    }
}

async fn hold(options: Hold, state: State) -> Result<(), Failure> {
    let Hold {
        connection,
        target,
        ttl,
        reason,
    } = options;
    #[expect(
        clippy::disallowed_methods,
        reason = "an override ends at a time of the wall clock"
    )]
    let end = end(SystemTime::now(), ttl);
    let request = v1::ApplyRequest {
        resources: vec![held(&target, state, end, reason)],
        dry_run: false,
        ..v1::ApplyRequest::default()
    };
    let mut client = client(&connection)?;
    let applied = call(connection.control, client.apply(request)).await?;
    say(&format!(
        "{target} is held {} until {end}\nrevision {}",
        state.as_str(),
        applied.revision
    ));
    Ok(())
}

/// When an override of this length ends, to the millisecond, which is fine enough for people.
fn end(now: SystemTime, ttl: Duration) -> prost_types::Timestamp {
    let mut end = prost_types::Timestamp::from(now + ttl);
    end.nanos -= end.nanos % 1_000_000;
    end
}

fn held(target: &Target, state: State, end: prost_types::Timestamp, reason: String) -> v1::Resource {
    let (service, route) = match target {
        Target::Service(name) => (name.to_string(), String::new()),
        Target::Route(name) => (String::new(), name.to_string()),
    };
    v1::Resource {
        metadata: Some(v1::Metadata {
            name: target.override_name(),
            ..v1::Metadata::default()
        }),
        status: None,
        spec: Some(v1::resource::Spec::CircuitOverride(v1::CircuitOverride {
            service,
            route,
            mode: state.mode().into(),
            expire_time: Some(end),
            reason,
        })),
    }
}

async fn auto(connection: &Connection, target: &Target) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let request = v1::DeleteRequest {
        r#ref: Some(reference(Kind::CircuitOverride, target.override_name())),
        revision: 0,
    };
    match answer(connection.control, client.delete(request)).await? {
        Ok(deleted) => say(&format!(
            "{target} is left to its breaker\nrevision {}",
            deleted.revision
        )),
        Err(status) if status.code() == tonic::Code::NotFound => {
            say(&format!(
                "{target} is not held, and was left to its breaker already"
            ));
        }
        Err(status) => return Err(told(connection.control, &status)),
    }
    Ok(())
}

async fn list(admin: SocketAddr, format: Format) -> Result<(), Failure> {
    let answer = get(admin, "/circuits").await?;
    match format {
        Format::Table => say(&tables(&answer)),
        // JSON is YAML.
        Format::Json | Format::Yaml => say(&format!("{answer:#}")),
    }
    Ok(())
}

/// Circuits, then endpoints that are left out. What a proxy doesn't say is a dash.
fn tables(answer: &Value) -> String {
    let circuits: Vec<[String; 9]> = entries(answer, "circuits")
        .iter()
        .map(|circuit| {
            let name = format!("{}/{}", text(circuit, "kind"), text(circuit, "name"));
            [
                name,
                text(circuit, "endpoint"),
                text(circuit, "state"),
                text(circuit, "mode"),
                text(circuit, "calls"),
                text(circuit, "failures"),
                text(circuit, "slow"),
                left(circuit),
                text(circuit, "why"),
            ]
        })
        .collect();
    let ejections: Vec<[String; 6]> = entries(answer, "ejections")
        .iter()
        .map(|ejection| {
            [
                text(ejection, "service"),
                text(ejection, "endpoint"),
                text(ejection, "zone"),
                text(ejection, "standing"),
                left(ejection),
                text(ejection, "why"),
            ]
        })
        .collect();
    let circuits = if circuits.is_empty() {
        "no circuits".to_owned()
    } else {
        table(
            [
                "CIRCUIT", "ENDPOINT", "STATE", "MODE", "CALLS", "FAILURES", "SLOW", "LEFT", "WHY",
            ],
            &circuits,
        )
    };
    let ejections = if ejections.is_empty() {
        "no endpoint is left out".to_owned()
    } else {
        table(
            ["SERVICE", "ENDPOINT", "ZONE", "STANDING", "LEFT", "WHY"],
            &ejections,
        )
    };
    format!("{circuits}\n\n{ejections}")
}

fn text(entry: &Value, field: &str) -> String {
    match entry.get(field) {
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        Some(Value::String(_) | Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_)) | None => {
            "-".to_owned()
        }
    }
}

/// How long a state lasts yet.
fn left(entry: &Value) -> String {
    let ms = entry.get("until_ms").and_then(Value::as_u64);
    ms.map_or_else(|| "-".to_owned(), |ms| duration_text(Duration::from_millis(ms)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn target(text: &str) -> Target {
        text.parse().unwrap()
    }

    #[test]
    fn a_target_is_a_route_unless_it_says_otherwise() {
        let name = |text: &str| Name::parse(text).unwrap();
        assert_eq!(target("shop"), Target::Route(name("shop")));
        assert_eq!(target("route/shop"), Target::Route(name("shop")));
        assert_eq!(target("service/cart"), Target::Service(name("cart")));
        for bad in ["", "Shop", "zone/a", "service/", "service/a/b"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_circuit_has_an_override_name_of_its_own_that_is_valid() {
        assert_eq!(target("shop").override_name(), "route-shop");
        assert_eq!(target("service/cart").override_name(), "service-cart");
        let long = "a".repeat(57);
        assert_eq!(target(&long).override_name(), format!("route-{long}"));
        let names: std::collections::BTreeSet<_> = ["b", "c", "-b"]
            .into_iter()
            .flat_map(|end| {
                let name = format!("{}{end}", "a".repeat(63 - end.len()));
                // Where it is cut there may be a '-'.
                let dashed = format!("{}-{}{end}", "a".repeat(47), "a".repeat(15 - end.len()));
                [
                    target(&name).override_name(),
                    target(&format!("service/{name}")).override_name(),
                    target(&dashed).override_name(),
                ]
            })
            .inspect(|name| assert!(Name::parse(name).is_ok(), "{name}"))
            .collect();
        assert_eq!(names.len(), 9, "{names:?}");
    }

    #[test]
    fn what_is_applied_is_valid_and_ends_when_it_should() {
        let now = SystemTime::UNIX_EPOCH + Duration::new(1_795_557_000, 123_456_789);
        let end = end(now, Duration::from_secs(600));
        assert_eq!(end.to_string(), "2026-11-24T22:00:00.123Z");
        for (name, state) in [("shop", State::Open), ("service/cart", State::Closed)] {
            let resource = held(&target(name), state, end, "smoke".to_owned());
            assert!(leeward_proto::parse(&resource).is_ok(), "{resource:?}");
        }
    }

    #[test]
    fn a_circuit_is_held_for_a_second_to_a_day() {
        assert_eq!(ttl("90s"), Ok(Duration::from_secs(90)));
        for bad in ["999ms", "24.1h", "10", "-1s"] {
            assert!(ttl(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn circuits_and_ejections_are_tables_and_what_is_not_said_is_a_dash() {
        let answer = json!({
            "circuits": [
                {"kind": "service", "name": "cart", "state": "open", "mode": "enforce", "why": "failure_rate 62 % of 40 calls", "until_ms": 12_500, "calls": 40, "failures": 25, "slow": 0},
                {"kind": "endpoint", "name": "cart", "endpoint": "10.0.0.7:80", "state": "closed"},
            ],
            "ejections": [{"service": "cart", "endpoint": "10.0.0.8:80", "zone": "a", "standing": "ejected", "until_ms": 30_000}],
            "later": true,
        });
        let want = "\
CIRCUIT        ENDPOINT     STATE   MODE     CALLS  FAILURES  SLOW  LEFT   WHY
service/cart   -            open    enforce  40     25        0     12.5s  failure_rate 62 % of 40 calls
endpoint/cart  10.0.0.7:80  closed  -        -      -         -     -      -

SERVICE  ENDPOINT     ZONE  STANDING  LEFT  WHY
cart     10.0.0.8:80  a     ejected   30s   -";
        assert_eq!(tables(&answer), want);
        assert_eq!(tables(&json!({})), "no circuits\n\nno endpoint is left out");
    }
}
