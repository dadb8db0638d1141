//! Degradation: what parts of the mesh have given up, and giving something up for a while.

use crate::Connection;
use crate::api::{self, Client, MAX_MESSAGE, answer, call, client, reference, told};
use crate::connect::{Link, link};
use crate::output::{Failure, Format, Kinds, say, table};
use clap::Args;
use leeward_policy::{Kind, Name};
use leeward_proto::manifest::{duration_text, parse_duration};
use leeward_proto::v1;
use leeward_proto::v1::degradation_service_client::DegradationServiceClient;
use leeward_proto::v1::resource::Spec;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, sleep};

/// For how long a level may be held.
const LENGTH: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600);
/// The level that is none: what triggers say holds again.
const AUTO: &str = "auto";
/// How long proxies have to run what was applied before it is said how many don't.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often they are looked at meanwhile.
const LOOK: Duration = Duration::from_millis(50);
/// The words that show something, in the place of a policy.
const LIST: &str = "list";
const HISTORY: &str = "history";
/// Changes that are shown, if it isn't said how many.
const CHANGES: usize = 100;
/// Changes on a page.
const PAGE: u32 = 1000;

/// See degradation levels, and hold one for a while.
///
///     leeward degrade POLICY LEVEL --for 30m   hold a level; it ends by itself
///     leeward degrade POLICY auto              let go of it
///     leeward degrade list [POLICY]            every policy's level in every zone
///     leeward degrade history [POLICY]         what changed levels, who or what did, and why
///
/// A policy that is called list or history, or a level that is called auto, can only be held with `leeward apply`.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    #[command(flatten)]
    connection: Connection,
    /// The DegradationPolicy; or list, or history.
    #[arg(value_name = "POLICY|list|history", value_parser = name)]
    what: Name,
    /// One of its levels, or auto; after list and history the policy, all if not given.
    #[arg(value_name = "LEVEL|auto", value_parser = name)]
    level: Option<Name>,
    /// For how long the level is held, 1s to 7d. It ends by itself at every proxy.
    #[arg(long = "for", value_name = "TIME", value_parser = length)]
    length: Option<Duration>,
    /// Why, for people.
    #[arg(long)]
    reason: Option<String>,
    /// Hold it only in this zone; may be given several times.
    #[arg(long = "zone", value_name = "ZONE", value_parser = name)]
    zones: Vec<Name>,
    /// How to show list and history [default: table].
    #[arg(short, long)]
    output: Option<Format>,
    /// How many changes of the history to show at most [default: 100].
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Show the history before the change of this number.
    #[arg(long, value_name = "ID")]
    before: Option<u64>,
}

/// What is asked for.
#[derive(Debug)]
enum Act {
    List {
        policy: Option<Name>,
        output: Format,
    },
    History {
        policy: Option<Name>,
        limit: usize,
        before: u64,
        output: Format,
    },
    Auto {
        policy: Name,
    },
    Set(Set),
}

/// What to hold.
#[derive(Debug)]
struct Set {
    policy: Name,
    level: Name,
    length: Duration,
    reason: String,
    zones: Vec<Name>,
}

impl Options {
    /// What the words mean together.
    fn act(self) -> Result<(Connection, Act), Failure> {
        let Self {
            connection,
            what,
            level,
            length,
            reason,
            zones,
            output,
            limit,
            before,
        } = self;
        let holds = length.is_some() || reason.is_some() || !zones.is_empty();
        let pages = limit.is_some() || before.is_some();
        let wrong = |text: String| Err(Failure::BadInput(format!("leeward: {text}")));
        let act = match (what.as_str(), level) {
            (LIST | HISTORY, _) if holds => {
                return wrong(format!(
                    "{what} only shows; it takes no --for, --reason or --zone"
                ));
            }
            (LIST, _) if pages => return wrong(format!("{LIST} takes no --limit or --before")),
            (LIST, policy) => Act::List {
                policy,
                output: output.unwrap_or(Format::Table),
            },
            (HISTORY, policy) => Act::History {
                policy,
                limit: limit.unwrap_or(CHANGES),
                before: before.unwrap_or(0),
                output: output.unwrap_or(Format::Table),
            },
            (_, _) if pages || output.is_some() => {
                return wrong(format!(
                    "--output, --limit and --before are for {LIST} and {HISTORY}"
                ));
            }
            (_, None) => {
                return wrong(format!(
                    "want a level of {what}, or {AUTO}, such as `leeward degrade {what} {AUTO}`"
                ));
            }
            (_, Some(level)) if level.as_str() == AUTO && holds => {
                return wrong(format!(
                    "{AUTO} lets go of {what} everywhere and at once; it takes no --for, --reason or --zone"
                ));
            }
            (_, Some(level)) if level.as_str() == AUTO => Act::Auto { policy: what },
            (_, Some(level)) => {
                let Some(length) = length else {
                    return wrong(format!(
                        "a level is held for a while; say for how long, such as `leeward degrade {what} {level} --for 30m`"
                    ));
                };
                Act::Set(Set {
                    policy: what,
                    level,
                    length,
                    reason: reason.unwrap_or_default(),
                    zones,
                })
            }
        };
        Ok((connection, act))
    }
}

fn name(text: &str) -> Result<Name, String> {
    Name::parse(text).map_err(|error| error.to_string())
}

fn length(text: &str) -> Result<Duration, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
    let days = days.map(|days| Duration::from_secs(24 * 3600) * days);
    days.or_else(|| parse_duration(text))
        .filter(|length| LENGTH.contains(length))
        .ok_or_else(|| "want 1s to 7d, such as 30m".to_owned())
}

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let (connection, act) = options.act()?;
    match act {
        Act::List { policy, output } => list(&connection, policy, output).await,
        Act::History {
            policy,
            limit,
            before,
            output,
        } => {
            let changes = history(&connection, policy, limit, before).await?;
            show_history(&changes, output);
            Ok(())
        }
        Act::Auto { policy } => auto(&connection, &policy).await,
        Act::Set(set) => Box::pin(hold(&connection, &set)).await,
    }
}

async fn hold(connection: &Connection, set: &Set) -> Result<(), Failure> {
    let mut client = client(connection)?;
    Box::pin(check_level(connection, &mut client, set)).await?;
    #[expect(
        clippy::disallowed_methods,
        reason = "an override ends at a time of the wall clock"
    )]
    let end = end(SystemTime::now(), set.length);
    let request = v1::ApplyRequest {
        resources: vec![held(set, end)],
        dry_run: false,
        ..v1::ApplyRequest::default()
    };
    let applied = call(connection.control, client.apply(request)).await?;
    say(&format!(
        "{} is held at {} {} until {end}, for {}\nto end it earlier: leeward degrade {} {AUTO}\nrevision {}",
        set.policy,
        set.level,
        place(&set.zones),
        duration_text(set.length),
        set.policy,
        applied.revision
    ));
    let name = override_name(&set.policy, &set.zones);
    let status = settled(connection, &mut client, &name, applied.revision).await?;
    say(&reach(&status));
    for refusal in &status.refusals {
        say(&format!("{} refuses it: {}", refusal.proxy, refusal.reason));
    }
    Ok(())
}

/// That the policy has the level; what isn't there is told with what is.
async fn check_level(connection: &Connection, client: &mut Client, set: &Set) -> Result<(), Failure> {
    let request = v1::GetRequest {
        r#ref: Some(reference(Kind::DegradationPolicy, set.policy.to_string())),
    };
    let resource = match answer(connection.control, client.get(request)).await? {
        Ok(resource) => resource,
        Err(status) if status.code() == tonic::Code::NotFound => {
            let there = api::list(connection, client, Kinds::One(Kind::DegradationPolicy)).await?;
            let names: Vec<String> = there.into_iter().filter_map(|r| Some(r.metadata?.name)).collect();
            return Err(Failure::BadInput(format!(
                "leeward: there is no DegradationPolicy {}; there {}",
                set.policy,
                those(&names)
            )));
        }
        Err(status) => return Err(told(connection.control, &status)),
    };
    let Some(Spec::DegradationPolicy(policy)) = resource.spec else {
        return Ok(());
    };
    let levels: Vec<String> = policy.levels.into_iter().map(|level| level.name).collect();
    if levels.iter().any(|level| *level == set.level.as_str()) {
        return Ok(());
    }
    Err(Failure::BadInput(format!(
        "leeward: {} has no level {}; there {}",
        set.policy,
        set.level,
        those(&levels)
    )))
}

fn those(names: &[String]) -> String {
    match names {
        [] => "is none".to_owned(),
        [one] => format!("is {one}"),
        [most @ .., last] => format!("are {} and {last}", most.join(", ")),
    }
}

/// When an override of this length ends, to the millisecond, which is fine enough for people.
fn end(now: SystemTime, length: Duration) -> prost_types::Timestamp {
    let mut end = prost_types::Timestamp::from(now + length);
    end.nanos -= end.nanos % 1_000_000;
    end
}

fn held(set: &Set, end: prost_types::Timestamp) -> v1::Resource {
    v1::Resource {
        metadata: Some(v1::Metadata {
            name: override_name(&set.policy, &set.zones),
            ..v1::Metadata::default()
        }),
        status: None,
        spec: Some(Spec::DegradationOverride(v1::DegradationOverride {
            policy: set.policy.to_string(),
            level: set.level.to_string(),
            expire_time: Some(end),
            reason: set.reason.clone(),
            zones: set.zones.iter().map(Name::to_string).collect(),
        })),
    }
}

/// The name of the DegradationOverride, always the same for the same policy and zones: the policy's own for all zones,
/// and with a hash for some.
fn override_name(policy: &Name, zones: &[Name]) -> String {
    if zones.is_empty() {
        return policy.to_string();
    }
    let mut zones: Vec<&str> = zones.iter().map(Name::as_str).collect();
    zones.sort_unstable();
    zones.dedup();
    // A name has no '/'.
    let digest = Sha256::digest(format!("{policy}/{}", zones.join("/")).as_bytes());
    let mark: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let most = Name::MAX_LEN - 1 - mark.len();
    // A name is ASCII, and can be cut anywhere.
    let kept = policy.as_str().get(..most).unwrap_or(policy.as_str());
    format!("{}-{mark}", kept.trim_end_matches('-'))
}

fn place(zones: &[Name]) -> String {
    match zones {
        [] => "in all zones".to_owned(),
        [zone] => format!("in zone {zone}"),
        zones => {
            let zones: Vec<&str> = zones.iter().map(Name::as_str).collect();
            format!("in zones {}", zones.join(", "))
        }
    }
}

/// Waits a little until every connected proxy runs the override, and says how many do.
async fn settled(
    connection: &Connection,
    client: &mut Client,
    name: &str,
    revision: u64,
) -> Result<v1::Status, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let request = v1::GetRequest {
            r#ref: Some(reference(Kind::DegradationOverride, name.to_owned())),
        };
        let resource = match answer(connection.control, client.get(request)).await? {
            Ok(resource) => resource,
            // Somebody else has let go of it already.
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(v1::Status::default()),
            Err(status) => return Err(told(connection.control, &status)),
        };
        let replaced = resource.metadata.is_some_and(|m| m.revision > revision);
        let status = resource.status.unwrap_or_default();
        let refused = u32::try_from(status.refusals.len()).unwrap_or(u32::MAX);
        let everywhere = status.live.saturating_add(refused) >= status.proxies;
        if everywhere || replaced || Instant::now() >= deadline {
            return Ok(status);
        }
        sleep(LOOK).await;
    }
}

fn reach(status: &v1::Status) -> String {
    match (status.live, status.proxies) {
        (_, 0) => "no proxy is connected; it holds at each as soon as it is".to_owned(),
        (live, proxies) => format!("{live} of {proxies} proxies run it"),
    }
}

/// Deletes the overrides of a policy, however they came to be.
async fn auto(connection: &Connection, policy: &Name) -> Result<(), Failure> {
    let mut client = client(connection)?;
    let overrides = api::list(connection, &mut client, Kinds::One(Kind::DegradationOverride)).await?;
    let names = overrides.into_iter().filter_map(|resource| match resource.spec {
        Some(Spec::DegradationOverride(held)) if held.policy == policy.as_str() => {
            Some(resource.metadata?.name)
        }
        _ => None,
    });
    let mut revision = None;
    for name in names {
        let request = v1::DeleteRequest {
            r#ref: Some(reference(Kind::DegradationOverride, name)),
            revision: 0,
            ..v1::DeleteRequest::default()
        };
        match answer(connection.control, client.delete(request)).await? {
            Ok(deleted) => revision = Some(deleted.revision),
            // Somebody else was faster.
            Err(status) if status.code() == tonic::Code::NotFound => {}
            Err(status) => return Err(told(connection.control, &status)),
        }
    }
    match revision {
        Some(revision) => say(&format!("{policy} is left to its triggers\nrevision {revision}")),
        None => say(&format!(
            "{policy} is not held, and was left to its triggers already"
        )),
    }
    Ok(())
}

fn levels_client(connection: &Connection) -> Result<DegradationServiceClient<Link>, Failure> {
    Ok(DegradationServiceClient::new(link(connection)?).max_decoding_message_size(MAX_MESSAGE))
}

async fn list(connection: &Connection, policy: Option<Name>, format: Format) -> Result<(), Failure> {
    let request = v1::ListLevelsRequest {
        policy: policy.map(|name| name.to_string()).unwrap_or_default(),
    };
    let answer = call(
        connection.control,
        levels_client(connection)?.list_levels(request),
    )
    .await?;
    match format {
        Format::Table => say(&level_table(&answer.levels)),
        // JSON is YAML.
        Format::Json | Format::Yaml => {
            let levels: Vec<Value> = answer.levels.iter().map(level_json).collect();
            say(&format!("{:#}", json!({"levels": levels})));
        }
    }
    Ok(())
}

/// The newest changes, page by page.
async fn history(
    connection: &Connection,
    policy: Option<Name>,
    limit: usize,
    mut before: u64,
) -> Result<Vec<v1::LevelChange>, Failure> {
    let policy = policy.map(|name| name.to_string()).unwrap_or_default();
    let mut client = levels_client(connection)?;
    let mut changes = Vec::new();
    while changes.len() < limit {
        let left = u32::try_from(limit - changes.len()).unwrap_or(u32::MAX).min(PAGE);
        let request = v1::ListChangesRequest {
            policy: policy.clone(),
            page_size: left,
            before,
        };
        let page = call(connection.control, client.list_changes(request))
            .await?
            .changes;
        let Some(last) = page.last() else { break };
        before = last.id;
        changes.extend(page);
        // There is none before the first.
        if before <= 1 {
            break;
        }
    }
    Ok(changes)
}

fn show_history(changes: &[v1::LevelChange], format: Format) {
    match format {
        Format::Table => say(&change_table(changes)),
        Format::Json | Format::Yaml => {
            let changes: Vec<Value> = changes.iter().map(change_json).collect();
            say(&format!("{:#}", json!({"changes": changes})));
        }
    }
}

fn level_table(levels: &[v1::ZoneLevel]) -> String {
    if levels.is_empty() {
        return "no degradation policies, or no zones".to_owned();
    }
    let rows: Vec<[String; 7]> = levels
        .iter()
        .map(|level| {
            [
                level.policy.clone(),
                level.zone.clone(),
                level.level.clone(),
                time(level.since.as_ref()),
                time(level.until.as_ref()),
                dash(&level.by),
                dash(&level.why),
            ]
        })
        .collect();
    table(["POLICY", "ZONE", "LEVEL", "SINCE", "UNTIL", "BY", "WHY"], &rows)
}

fn change_table(changes: &[v1::LevelChange]) -> String {
    if changes.is_empty() {
        return "no changes".to_owned();
    }
    let rows: Vec<[String; 8]> = changes
        .iter()
        .map(|change| {
            [
                change.id.to_string(),
                time(change.time.as_ref()),
                change.policy.clone(),
                if change.zone.is_empty() {
                    "all".to_owned()
                } else {
                    change.zone.clone()
                },
                change.from.clone(),
                change.to.clone(),
                dash(&change.by),
                dash(&change.why),
            ]
        })
        .collect();
    table(["ID", "TIME", "POLICY", "ZONE", "FROM", "TO", "BY", "WHY"], &rows)
}

fn level_json(level: &v1::ZoneLevel) -> Value {
    json!({
        "policy": level.policy, "zone": level.zone, "level": level.level,
        "since": level.since.as_ref().map(ToString::to_string),
        "until": level.until.as_ref().map(ToString::to_string),
        "by": level.by, "why": level.why,
    })
}

fn change_json(change: &v1::LevelChange) -> Value {
    json!({
        "id": change.id, "time": change.time.as_ref().map(ToString::to_string),
        "policy": change.policy, "zone": change.zone, "from": change.from, "to": change.to,
        "by": change.by, "why": change.why,
    })
}

fn time(time: Option<&prost_types::Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), ToString::to_string)
}

fn dash(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        options: Options,
    }

    fn name(text: &str) -> Name {
        super::name(text).unwrap()
    }

    fn act(words: &[&str]) -> Result<Act, String> {
        let words = ["degrade"].iter().chain(words).chain(&["--identity", "/id"]);
        let options = Command::try_parse_from(words).unwrap().options;
        match options.act() {
            Ok((_, act)) => Ok(act),
            Err(Failure::BadInput(text)) => Err(text),
            Err(Failure::Failed(error)) => panic!("{error}"),
            Err(Failure::Told | Failure::Status(_) | Failure::Untold(_)) => panic!("it was told"),
        }
    }

    fn set(words: &[&str]) -> Set {
        match act(words) {
            Ok(Act::Set(set)) => set,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_policy_and_a_level_are_held_and_list_and_history_are_shown() {
        let set = set(&[
            "checkout",
            "core-only",
            "--for",
            "30m",
            "--zone",
            "a",
            "--zone",
            "b",
        ]);
        assert_eq!((set.policy, set.level), (name("checkout"), name("core-only")));
        assert_eq!(set.length, Duration::from_secs(1800));
        assert_eq!(set.zones, [name("a"), name("b")]);
        assert!(matches!(
            act(&["list"]),
            Ok(Act::List {
                policy: None,
                output: Format::Table
            })
        ));
        assert!(matches!(
            act(&["list", "checkout"]),
            Ok(Act::List { policy: Some(_), .. })
        ));
        assert!(matches!(
            act(&["history", "checkout", "-o", "json", "--limit", "7"]),
            Ok(Act::History {
                policy: Some(_),
                limit: 7,
                before: 0,
                output: Format::Json
            })
        ));
        assert!(matches!(act(&["checkout", "auto"]), Ok(Act::Auto { .. })));
    }

    #[test]
    fn words_that_mean_nothing_together_are_told_so() {
        for (words, want) in [
            (
                ["checkout"].as_slice(),
                "want a level of checkout, or auto, such as `leeward degrade checkout auto`",
            ),
            (
                &["checkout", "reduced"],
                "a level is held for a while; say for how long, such as `leeward degrade checkout reduced --for 30m`",
            ),
            (
                &["checkout", "auto", "--zone", "a"],
                "auto lets go of checkout everywhere and at once; it takes no --for, --reason or --zone",
            ),
            (
                &["list", "--for", "1m"],
                "list only shows; it takes no --for, --reason or --zone",
            ),
            (&["list", "--before", "7"], "list takes no --limit or --before"),
            (
                &["checkout", "reduced", "--for", "1m", "-o", "json"],
                "--output, --limit and --before are for list and history",
            ),
        ] {
            assert_eq!(act(words).unwrap_err(), format!("leeward: {want}"), "{words:?}");
        }
    }

    #[test]
    fn a_level_is_held_for_a_second_to_a_week() {
        assert_eq!(length("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(length("7d"), Ok(Duration::from_secs(7 * 24 * 3600)));
        for bad in ["999ms", "8d", "168.1h", "10", "-1s", "d", "1.5d", "4294967295d"] {
            assert_eq!(length(bad), Err("want 1s to 7d, such as 30m".to_owned()), "{bad}");
        }
    }

    #[test]
    fn every_set_of_zones_has_an_override_of_its_own_with_a_valid_name() {
        let (a, b) = (name("a"), name("b"));
        assert_eq!(override_name(&name("checkout"), &[]), "checkout");
        let both = override_name(&name("checkout"), &[a.clone(), b.clone()]);
        assert_eq!(
            both,
            override_name(&name("checkout"), &[b.clone(), a.clone(), b.clone()])
        );
        let long = [
            name(&"a".repeat(63)),
            name(&format!("{}-{}", "a".repeat(53), "b".repeat(9))),
        ];
        let names: std::collections::BTreeSet<String> = long
            .iter()
            .chain([&name("checkout")])
            .flat_map(|policy| {
                [
                    override_name(policy, &[]),
                    override_name(policy, std::slice::from_ref(&a)),
                    override_name(policy, std::slice::from_ref(&b)),
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
        let set = set(&[
            "checkout",
            "core-only",
            "--for",
            "10m",
            "--reason",
            "payment is slow",
            "--zone",
            "a",
        ]);
        let resource = held(&set, end);
        assert!(leeward_proto::parse(&resource).is_ok(), "{resource:?}");
    }

    #[test]
    fn what_is_there_is_told_in_words() {
        let names = |names: &[&str]| those(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&[]), "is none");
        assert_eq!(names(&["normal"]), "is normal");
        assert_eq!(
            names(&["normal", "reduced", "core-only"]),
            "are normal, reduced and core-only"
        );
    }

    #[test]
    fn levels_and_changes_are_tables_and_what_is_not_said_is_a_dash() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let levels = [
            v1::ZoneLevel {
                policy: "checkout".into(),
                zone: "a".into(),
                level: "core-only".into(),
                since: at(1_795_557_600),
                until: at(1_795_557_660),
                by: "spiffe://d/user/ada".into(),
                why: "payment is slow".into(),
            },
            v1::ZoneLevel {
                policy: "checkout".into(),
                zone: "b".into(),
                level: "normal".into(),
                ..v1::ZoneLevel::default()
            },
        ];
        let want = "\
POLICY    ZONE  LEVEL      SINCE                 UNTIL                 BY                   WHY
checkout  a     core-only  2026-11-24T22:00:00Z  2026-11-24T22:01:00Z  spiffe://d/user/ada  payment is slow
checkout  b     normal     -                     -                     -                    -";
        assert_eq!(level_table(&levels), want);
        let changes = [v1::LevelChange {
            id: 7,
            time: at(1_795_557_600),
            policy: "checkout".into(),
            zone: String::new(),
            from: "core-only".into(),
            to: "normal".into(),
            by: "expiry".into(),
            why: String::new(),
        }];
        let want = "\
ID  TIME                  POLICY    ZONE  FROM       TO      BY      WHY
7   2026-11-24T22:00:00Z  checkout  all   core-only  normal  expiry  -";
        assert_eq!(change_table(&changes), want);
    }
}
