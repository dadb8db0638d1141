//! Changes on their way to proxies.

use crate::Connection;
use crate::api::call;
use crate::connect::{Link, link};
use crate::output::{Failure, Format, say, table};
use clap::{Args, Subcommand};
use leeward_proto::manifest::{duration_text, parse_duration};
use leeward_proto::v1;
use leeward_proto::v1::rollout_service_client::RolloutServiceClient;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// A client of rollouts and of history.
pub(crate) type Client = RolloutServiceClient<Link>;

pub(crate) fn client(connection: &Connection) -> Result<Client, Failure> {
    Ok(RolloutServiceClient::new(link(connection)?).max_decoding_message_size(crate::api::MAX_MESSAGE))
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the rollout that is under way, or the last one.
    Status {
        #[command(flatten)]
        connection: Connection,
        /// How to show it: table or json.
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Leave it where it is. It is still taken back if something gets worse.
    Pause(Steered),
    /// Go on; the stage is watched anew.
    Resume(Steered),
    /// Go on to the next stage without waiting, and without a look at its gates.
    Promote {
        #[command(flatten)]
        steered: Steered,
        /// To all proxies at once.
        #[arg(long)]
        full: bool,
    },
    /// Take it back everywhere, with a new revision.
    Abort(Steered),
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Steered {
    #[command(flatten)]
    connection: Connection,
    /// Only if it is the rollout of this revision.
    #[arg(long, default_value_t = 0)]
    revision: u64,
}

/// Wait until proxies run a revision: 0 if they do, 1 if they don't in time, 2 if that can't be said.
#[derive(Args, Clone, Debug)]
pub(crate) struct Wait {
    #[command(flatten)]
    connection: Connection,
    /// The revision; the last one if not given.
    #[arg(long, default_value_t = 0)]
    revision: u64,
    /// Share of the proxies, such as 99% or 99.9%. Those that have been connected to no control plane for five minutes don't
    /// count.
    #[arg(long = "for", default_value = "99%", value_name = "SHARE", value_parser = share)]
    share: u64,
    /// How long.
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = duration)]
    timeout: Duration,
    /// How to show it: table or json.
    #[arg(short, long, default_value = "table")]
    output: Format,
}

/// A share in hundredths of a percent.
fn share(text: &str) -> Result<u64, String> {
    let want = || "want a share of 0.01% to 100%, such as 99%".to_owned();
    let number = text.strip_suffix('%').unwrap_or(text);
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if part.len() > 2 || !part.bytes().all(|b| b.is_ascii_digit()) {
        return Err(want());
    }
    let whole: u64 = whole.parse().map_err(|_| want())?;
    let part: u64 = format!("{part:0<2}").parse().map_err(|_| want())?;
    let share = whole.saturating_mul(100).saturating_add(part);
    if (1..=10_000).contains(&share) {
        Ok(share)
    } else {
        Err(want())
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "want a duration such as 60s or 5m".to_owned())
}

/// The first and the longest pause between two looks.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// Laggards that a table names.
const SHOWN: usize = 20;
/// It can't be said.
const UNKNOWN: u8 = 2;

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Status { connection, output } => {
            let mut client = client(&connection)?;
            let rollout = call(connection.control, client.get_rollout(v1::GetRolloutRequest {})).await?;
            show(&rollout, output);
            Ok(())
        }
        Command::Pause(steered) => steer(steered, v1::RolloutCommand::Pause).await,
        Command::Resume(steered) => steer(steered, v1::RolloutCommand::Resume).await,
        Command::Promote { steered, full: false } => steer(steered, v1::RolloutCommand::Promote).await,
        Command::Promote { steered, full: true } => steer(steered, v1::RolloutCommand::PromoteFull).await,
        Command::Abort(steered) => steer(steered, v1::RolloutCommand::Abort).await,
    }
}

async fn steer(steered: Steered, command: v1::RolloutCommand) -> Result<(), Failure> {
    let Steered { connection, revision } = steered;
    let mut client = client(&connection)?;
    let request = v1::SteerRequest {
        command: command.into(),
        revision,
    };
    let rollout = call(connection.control, client.steer(request)).await?;
    show(&rollout, Format::Table);
    Ok(())
}

fn show(rollout: &v1::Rollout, format: Format) {
    if format == Format::Table {
        say(text(rollout).trim_end());
    } else {
        say(&format!("{:#}", to_json(rollout)));
    }
}

fn word(phase: v1::RolloutPhase) -> &'static str {
    match phase {
        v1::RolloutPhase::Unspecified => "unknown",
        v1::RolloutPhase::Running => "running",
        v1::RolloutPhase::Paused => "paused",
        v1::RolloutPhase::RollingBack => "rolling back",
        v1::RolloutPhase::Promoted => "promoted",
        v1::RolloutPhase::RolledBack => "rolled back",
    }
}

fn stage_text(stage: &v1::RolloutStage) -> String {
    let amount = match (stage.proxies, stage.percent) {
        (0, 0 | 100) => "all proxies".to_owned(),
        (0, percent) => format!("{percent} %"),
        (1, _) => "one proxy".to_owned(),
        (proxies, _) => format!("{proxies} proxies"),
    };
    let zones = match (stage.zones.as_slice(), stage.zone_count) {
        ([], 0) => String::new(),
        ([], 1) => " of one zone".to_owned(),
        ([], count) => format!(" of {count} zones"),
        (zones, _) => format!(" of {}", zones.join(", ")),
    };
    let hold = stage
        .hold
        .as_ref()
        .and_then(|hold| Duration::try_from(*hold).ok());
    let hold = hold.map(|hold| format!(", watched for {}", duration_text(hold)));
    format!("{amount}{zones}{}", hold.unwrap_or_default())
}

fn text(rollout: &v1::Rollout) -> String {
    let mut out = String::new();
    let stages = rollout.spec.as_ref().map_or(&[][..], |spec| &spec.stages);
    // Writing to a String does not fail.
    let _ = writeln!(
        out,
        "revision {} by {}: {}",
        rollout.revision,
        rollout.policy,
        word(rollout.phase())
    );
    if !rollout.why.is_empty() {
        let _ = writeln!(out, "  {}", rollout.why);
    }
    if rollout.rolled_back_by != 0 {
        let _ = writeln!(out, "  taken back by revision {}", rollout.rolled_back_by);
    }
    for (i, stage) in stages.iter().enumerate() {
        let mark = if u32::try_from(i) == Ok(rollout.stage) {
            ">"
        } else {
            " "
        };
        let _ = writeln!(
            out,
            "{mark} stage {} of {}: {}",
            i + 1,
            stages.len(),
            stage_text(stage)
        );
    }
    if let Some(sight) = &rollout.sight {
        let _ = writeln!(
            out,
            "  {} of {} proxies are to have it, {} of them run it",
            sight.members, sight.proxies, sight.running
        );
        let _ = writeln!(
            out,
            "  requests with it {} ({} failed), without it {} ({} failed)",
            sight.requests_with, sight.failures_with, sight.requests_without, sight.failures_without
        );
        for missing in &sight.missing {
            let _ = writeln!(out, "  no answer from {missing}");
        }
    }
    out
}

fn time(time: Option<prost_types::Timestamp>) -> Value {
    time.map_or(Value::Null, |time| json!(time.to_string()))
}

fn to_json(rollout: &v1::Rollout) -> Value {
    let spec = rollout.spec.clone().map(v1::resource::Spec::RolloutPolicy);
    let policy = leeward_proto::manifest::to_json(&v1::Resource {
        spec,
        ..v1::Resource::default()
    });
    let sight = rollout.sight.as_ref().map(|sight| {
        json!({
            "proxies": sight.proxies, "members": sight.members, "running": sight.running,
            "requestsWith": sight.requests_with, "failuresWith": sight.failures_with,
            "requestsWithout": sight.requests_without, "failuresWithout": sight.failures_without,
            "missing": sight.missing,
        })
    });
    json!({
        "revision": rollout.revision, "policy": rollout.policy, "by": rollout.by,
        "phase": word(rollout.phase()), "why": rollout.why, "failed": rollout.failed,
        "stage": rollout.stage, "stages": policy.pointer("/spec/stages"),
        "startTime": time(rollout.start_time), "stageTime": time(rollout.stage_time),
        "rolledBackBy": rollout.rolled_back_by, "sight": sight,
    })
}

/// Waits; what is said of it ends with the exit code.
pub(crate) async fn wait(wait: Wait) -> Result<(), Failure> {
    let (answer, reached) = match look(&wait).await {
        Ok(answer) => answer,
        Err(Failure::BadInput(lines)) => return Err(Failure::BadInput(lines)),
        Err(Failure::Failed(error)) => {
            crate::output::complain(&format!("leeward: {error:#}"));
            return Err(Failure::Status(UNKNOWN));
        }
        Err(told) => return Err(told),
    };
    if wait.output == Format::Table {
        say(&progress_text(&answer));
    } else {
        say(&format!("{:#}", progress_json(&answer)));
    }
    if reached {
        Ok(())
    } else if answer.missing.is_empty() {
        Err(Failure::Told)
    } else {
        Err(Failure::Status(UNKNOWN))
    }
}

/// Looks until enough proxies run it, or there is no more time; the last answer, and whether they do.
async fn look(wait: &Wait) -> Result<(v1::Progress, bool), Failure> {
    let until = tokio::time::Instant::now() + wait.timeout;
    let mut client = client(&wait.connection)?;
    let mut revision = wait.revision;
    let mut pause = PAUSES.0;
    loop {
        let request = v1::GetProgressRequest { revision };
        let answer = call(wait.connection.control, client.get_progress(request)).await?;
        // What was the last one when this began is what is waited for.
        revision = answer.revision;
        // Of proxies that nobody could say anything of, nothing is true.
        let enough = answer.running.saturating_mul(10_000) >= answer.proxies.saturating_mul(wait.share);
        let reached = enough && answer.proxies > 0 && answer.missing.is_empty();
        let now = tokio::time::Instant::now();
        if reached || now >= until {
            return Ok((answer, reached));
        }
        tokio::time::sleep(pause.min(until - now)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn percent(answer: &v1::Progress) -> f64 {
    if answer.proxies == 0 {
        return 0.0;
    }
    answer.running as f64 * 100.0 / answer.proxies as f64
}

fn progress_text(answer: &v1::Progress) -> String {
    let mut out = format!(
        "revision {}: {} of {} proxies run it ({:.2} %)",
        answer.revision,
        answer.running,
        answer.proxies,
        percent(answer)
    );
    let rows: Vec<[String; 6]> = answer
        .laggards
        .iter()
        .take(SHOWN)
        .map(|laggard| {
            let since = laggard.since.map(|since| since.to_string());
            [
                laggard.proxy.clone(),
                laggard.zone.clone(),
                laggard.running.to_string(),
                since.unwrap_or_default(),
                if laggard.connected { "yes" } else { "no" }.to_owned(),
                laggard.refuses.clone(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        let head = ["PROXY", "ZONE", "RUNS", "SINCE", "CONNECTED", "REFUSES"];
        let _ = write!(out, "\n{}", table(head, &rows));
        let more = (answer.proxies - answer.running.min(answer.proxies)).saturating_sub(rows.len() as u64);
        if more > 0 {
            let _ = write!(out, "\nand {more} more");
        }
    }
    for missing in &answer.missing {
        let _ = write!(out, "\nno answer from {missing}");
    }
    out
}

fn progress_json(answer: &v1::Progress) -> Value {
    let laggards = answer.laggards.iter().map(|laggard| {
        json!({
            "proxy": laggard.proxy, "zone": laggard.zone, "running": laggard.running,
            "since": time(laggard.since), "connected": laggard.connected, "refuses": laggard.refuses,
        })
    });
    json!({
        "revision": answer.revision, "proxies": answer.proxies, "running": answer.running,
        "laggards": laggards.collect::<Vec<_>>(), "missing": answer.missing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_as_people_write_them() {
        for (text, want) in [
            ("99%", 9900),
            ("100", 10_000),
            ("99.9%", 9990),
            ("0.01%", 1),
            ("99.95", 9995),
        ] {
            assert_eq!(share(text), Ok(want), "{text}");
        }
        for text in ["", "%", "0", "101%", "-1", "99.999%", "99.x%", "nan"] {
            assert!(share(text).is_err(), "{text}");
        }
    }
}
