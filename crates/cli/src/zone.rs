//! Zones: taking one out of use for a while, and seeing how they stand.

mod plan;

use crate::Connection;
use crate::api::{self, Client, answer, call, client, reference, told};
use crate::output::{Failure, Format, Kinds, complain, say, table};
use clap::{Args, Subcommand};
use leeward_policy::model::{Zone, ZoneDrain};
use leeward_policy::{Kind, Name, Resource, Spec};
use leeward_proto::manifest::{duration_text, parse_duration};
use leeward_proto::{parse, render, v1};
use plan::{Known, Move};
use serde_json::{Value, json};
use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// For how long a zone may be drained.
const EXPIRY: RangeInclusive<Duration> = Duration::from_secs(1)..=ZoneDrain::LONGEST;
/// How long a step may take, as resources.proto says.
const INTERVAL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move a zone's requests to the other zones, step by step; they come back by themselves.
    Drain(Drain),
    /// Bring a drained zone's requests back, step by step.
    Undrain {
        #[command(flatten)]
        connection: Connection,
        /// The zone.
        #[arg(value_parser = name)]
        zone: Name,
    },
    /// Show the zones: their proxies, their labels, and what they keep of their requests.
    List {
        #[command(flatten)]
        connection: Connection,
        /// How to show them.
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
}

/// Which zone is drained, and how.
#[derive(Args, Debug)]
pub(crate) struct Drain {
    #[command(flatten)]
    connection: Connection,
    /// The zone.
    #[arg(value_parser = name)]
    zone: Name,
    /// When requests begin to come back by themselves, 1s to 7d from now.
    #[arg(long, default_value = "1h", value_name = "TIME", value_parser = expiry)]
    expiry: Duration,
    /// What is moved at once, in percent of the zone's share.
    #[arg(long, default_value_t = ZoneDrain::STEP, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    step: u32,
    /// From one step to the next, 1s to 1h.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = interval)]
    interval: Duration,
    /// Why, for people.
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Only say what it would do, and fail if the other zones can't carry all of it.
    #[arg(long)]
    dry_run: bool,
    /// How to show a dry run.
    #[arg(short, long, default_value = "table", requires = "dry_run")]
    output: Format,
}

fn name(text: &str) -> Result<Name, String> {
    Name::parse(text).map_err(|error| error.to_string())
}

fn expiry(text: &str) -> Result<Duration, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
    let days = days.map(|days| Duration::from_secs(24 * 3600) * days);
    days.or_else(|| parse_duration(text))
        .filter(|length| EXPIRY.contains(length))
        .ok_or_else(|| "want 1s to 7d, such as 30m".to_owned())
}

fn interval(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .filter(|length| INTERVAL.contains(length))
        .ok_or_else(|| "want 1s to 1h, such as 10s".to_owned())
}

/// To the millisecond, which is fine enough for people.
#[expect(
    clippy::disallowed_methods,
    reason = "a drain begins and ends at times of the wall clock"
)]
fn now() -> SystemTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::new(since.as_secs(), since.subsec_millis() * 1_000_000)
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Drain(drain) if drain.dry_run => foresee(&drain).await,
        Command::Drain(drain) => Box::pin(begin(&drain)).await,
        Command::Undrain { connection, zone } => Box::pin(end(&connection, &zone)).await,
        Command::List { connection, output } => list(&connection, output).await,
    }
}

async fn begin(drain: &Drain) -> Result<(), Failure> {
    let connection = &drain.connection;
    let mut client = client(connection)?;
    let (resource, zone) = found(connection, &mut client, &drain.zone).await?;
    let now = now();
    let wanted = ZoneDrain {
        start_time: now,
        step: drain.step,
        interval: drain.interval,
        expire_time: now + drain.expiry,
        reason: drain.reason.as_str().into(),
    };
    let wanted = wanted.begun(zone.drain.as_ref(), now);
    let end = prost_types::Timestamp::from(wanted.expire_time);
    let zone = Zone {
        drain: Some(wanted),
        ..zone
    };
    let revision = write(connection, &mut client, resource, zone).await?;
    say(&format!(
        "zone {} gives up {} % of its share each {}, until {end}, for {}\nto end it earlier: leeward zone undrain {}\nrevision {revision}",
        drain.zone,
        drain.step,
        duration_text(drain.interval),
        duration_text(drain.expiry),
        drain.zone,
    ));
    Ok(())
}

async fn end(connection: &Connection, name: &Name) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let (resource, zone) = found(connection, &mut client, name).await?;
    let now = now();
    let Some(drain) = zone.drain.clone().filter(|drain| drain.expire_time > now) else {
        say(&format!("zone {name} is not drained, or comes back already"));
        return Ok(());
    };
    let (step, interval) = (drain.step, duration_text(drain.interval));
    let zone = Zone {
        drain: Some(drain.ended(now)),
        ..zone
    };
    let revision = write(connection, &mut client, resource, zone).await?;
    say(&format!(
        "zone {name} gets back {step} % of its share each {interval}\nrevision {revision}"
    ));
    Ok(())
}

/// The zone as it is; what isn't there is told.
async fn found(
    connection: &Connection,
    client: &mut Client,
    name: &Name,
) -> Result<(Resource, Zone), Failure> {
    let request = v1::GetRequest {
        r#ref: Some(reference(Kind::Zone, name.to_string())),
    };
    let wire = match answer(connection.control, client.get(request)).await? {
        Ok(wire) => wire,
        Err(status) if status.code() == tonic::Code::NotFound => {
            return Err(Failure::BadInput(format!(
                "leeward: there is no Zone {name}; `leeward zone list` shows those there are"
            )));
        }
        Err(status) => return Err(told(connection.control, &status)),
    };
    let resource = understood(&wire)?;
    let Spec::Zone(zone) = resource.spec.clone() else {
        return Err(Failure::Failed(anyhow::anyhow!(
            "the control plane answered with {}, not with Zone {name}",
            resource.key()
        )));
    };
    Ok((resource, zone))
}

fn understood(wire: &v1::Resource) -> Result<Resource, Failure> {
    parse(wire).map_err(|bad| {
        let bad: Vec<String> = bad.iter().map(ToString::to_string).collect();
        Failure::Failed(anyhow::anyhow!(
            "this command doesn't understand what the control plane has: {}",
            bad.join("; ")
        ))
    })
}

/// Writes the zone unless somebody else has changed it meanwhile.
async fn write(
    connection: &Connection,
    client: &mut Client,
    resource: Resource,
    zone: Zone,
) -> Result<u64, Failure> {
    let resource = Resource {
        spec: Spec::Zone(zone),
        ..resource
    };
    let request = v1::ApplyRequest {
        resources: vec![render(&resource)],
        dry_run: false,
        ..v1::ApplyRequest::default()
    };
    Ok(call(connection.control, client.apply(request)).await?.revision)
}

/// What the control plane knows of zones, services and proxies.
async fn known(connection: &Connection) -> Result<(Known, Vec<v1::ProxyStatus>), Failure> {
    let mut client = client(connection)?;
    let mut known = Known::default();
    for kind in [Kind::Zone, Kind::Service] {
        for wire in api::list(connection, &mut client, Kinds::One(kind)).await? {
            let resource = understood(&wire)?;
            if let Spec::Zone(zone) = resource.spec {
                known.zones.insert(resource.name, zone);
            } else if let Spec::Service(service) = resource.spec {
                known.services.insert(resource.name, service);
            }
        }
    }
    let request = v1::ListProxiesRequest {};
    let proxies = call(connection.control, client.list_proxies(request))
        .await?
        .proxies;
    let connected = proxies.iter().filter(|proxy| proxy.connected);
    known
        .connected
        .extend(connected.map(|proxy| (proxy.zone.clone(), proxy.name.clone())));
    Ok((known, proxies))
}

async fn foresee(drain: &Drain) -> Result<(), Failure> {
    let (known, _) = known(&drain.connection).await?;
    let zone = &drain.zone;
    if !known.zones.contains_key(zone) {
        return Err(Failure::BadInput(format!(
            "leeward: there is no Zone {zone}; `leeward zone list` shows those there are"
        )));
    }
    let moves = known.plan(zone, now());
    match drain.output {
        Format::Table => say(&plan_table(&moves)),
        // JSON is YAML.
        Format::Json | Format::Yaml => {
            let moves: Vec<Value> = moves.iter().map(plan_json).collect();
            say(&format!("{:#}", json!({"zone": zone.as_str(), "moves": moves})));
        }
    }
    let short: Vec<&Move> = moves.iter().filter(|m| m.lost() > 0).collect();
    if short.is_empty() {
        return Ok(());
    }
    let mut services: Vec<&str> = short.iter().map(|m| m.service.as_str()).collect();
    services.dedup();
    complain(&format!(
        "leeward: the other zones can't carry all of {}; judged by weights and by which proxies are connected",
        services.join(", ")
    ));
    Err(Failure::Told)
}

fn plan_table(moves: &[Move]) -> String {
    if moves.is_empty() {
        return "no service's requests go to this zone".to_owned();
    }
    let rows: Vec<[String; 7]> = moves
        .iter()
        .map(|m| {
            [
                m.service.to_string(),
                joined(&m.callers),
                joined(&m.to),
                format!("{} %", m.carried),
                format!("{} %", m.lost()),
                m.load.map_or_else(|| "-".to_owned(), |load| format!("{load} %")),
                dash(m.why.join("; ")),
            ]
        })
        .collect();
    table(
        ["SERVICE", "CALLERS", "TO", "CARRIED", "LOST", "LOAD", "WHY"],
        &rows,
    )
}

fn plan_json(m: &Move) -> Value {
    let names = |names: &[Name]| names.iter().map(Name::to_string).collect::<Vec<_>>();
    json!({
        "service": m.service.as_str(), "callers": names(&m.callers), "to": names(&m.to),
        "carried": m.carried, "lost": m.lost(), "load": m.load, "why": m.why,
    })
}

async fn list(connection: &Connection, format: Format) -> Result<(), Failure> {
    let (known, proxies) = known(connection).await?;
    let (now, zones) = (now(), &known.zones);
    if format != Format::Table {
        let zones: Vec<Value> = zones
            .iter()
            .map(|(name, zone)| {
                let drain = zone.drain.as_ref().filter(|drain| drain.expire_time > now || drain.is_on(now));
                json!({
                    "name": name.as_str(), "labels": zone.labels,
                    "proxies": zone.proxies.len(), "connected": connected(&proxies, name),
                    "kept": drain.map_or(1.0, |drain| drain.kept(now)),
                    "expireTime": drain.map(|drain| prost_types::Timestamp::from(drain.expire_time).to_string()),
                    "reason": drain.map(|drain| &*drain.reason),
                })
            })
            .collect();
        say(&format!("{:#}", json!({"zones": zones})));
        return Ok(());
    }
    if zones.is_empty() {
        say("no zones");
        return Ok(());
    }
    let rows: Vec<[String; 6]> = zones
        .iter()
        .map(|(name, zone)| row(name, zone, &proxies, now))
        .collect();
    say(&table(
        ["ZONE", "CONNECTED", "LABELS", "KEEPS", "UNTIL", "REASON"],
        &rows,
    ));
    Ok(())
}

fn row(name: &Name, zone: &Zone, proxies: &[v1::ProxyStatus], now: SystemTime) -> [String; 6] {
    let labels: Vec<String> = zone.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let drain = zone
        .drain
        .as_ref()
        .filter(|drain| drain.expire_time > now || drain.is_on(now));
    let kept = drain.map_or(1.0, |drain| drain.kept(now));
    let end = drain.map(|drain| prost_types::Timestamp::from(drain.expire_time).to_string());
    [
        name.to_string(),
        format!("{}/{}", connected(proxies, name), zone.proxies.len()),
        dash(labels.join(",")),
        format!("{:.0} %", kept * 100.0),
        dash(end.unwrap_or_default()),
        dash(drain.map_or_else(String::new, |drain| drain.reason.to_string())),
    ]
}

fn connected(proxies: &[v1::ProxyStatus], zone: &Name) -> usize {
    let of = proxies.iter().filter(|proxy| proxy.zone == zone.as_str());
    of.filter(|proxy| proxy.connected).count()
}

fn joined(names: &[Name]) -> String {
    dash(names.iter().map(Name::as_str).collect::<Vec<_>>().join(", "))
}

fn dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_is_drained_for_a_second_to_a_week_and_in_steps_of_a_second_to_an_hour() {
        assert_eq!(expiry("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(expiry("7d"), Ok(ZoneDrain::LONGEST));
        for bad in ["0s", "8d", "1", "-1s"] {
            assert_eq!(expiry(bad), Err("want 1s to 7d, such as 30m".to_owned()), "{bad}");
        }
        assert_eq!(interval("1s"), Ok(Duration::from_secs(1)));
        for bad in ["999ms", "61m", "1d"] {
            assert_eq!(
                interval(bad),
                Err("want 1s to 1h, such as 10s".to_owned()),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_dry_run_is_a_table() {
        let name = |text: &str| name(text).unwrap();
        let moves = [
            Move {
                service: name("cart"),
                callers: vec![name("a"), name("c")],
                to: vec![name("b")],
                carried: 40,
                load: Some(200),
                why: vec!["an endpoint can take 140 % of its share".into()],
            },
            Move {
                service: name("till"),
                callers: vec![name("a")],
                to: Vec::new(),
                carried: 0,
                load: None,
                why: Vec::new(),
            },
        ];
        let want = "\
SERVICE  CALLERS  TO  CARRIED  LOST   LOAD   WHY
cart     a, c     b   40 %     60 %   200 %  an endpoint can take 140 % of its share
till     a        -   0 %      100 %  -      -";
        assert_eq!(plan_table(&moves), want);
        assert_eq!(plan_table(&[]), "no service's requests go to this zone");
    }

    #[test]
    fn a_zone_that_is_drained_says_what_it_keeps_and_until_when() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let zone = Zone {
            labels: [("region".into(), "eu".into())].into(),
            drain: Some(ZoneDrain {
                start_time: at(0),
                step: 10,
                interval: Duration::from_secs(10),
                expire_time: at(60),
                reason: "new switches".into(),
            }),
            ..Zone::new(Vec::new(), Vec::new())
        };
        let name = name("a").unwrap();
        let shown = |now| row(&name, &zone, &[], at(now)).join(" | ");
        assert_eq!(
            shown(25),
            "a | 0/0 | region=eu | 70 % | 1970-01-01T00:01:00Z | new switches"
        );
        assert_eq!(shown(1000), "a | 0/0 | region=eu | 100 % | - | -");
    }
}
