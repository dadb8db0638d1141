//! `leeward plugin logs`: what a plugin wrote, from the proxies that it runs on.

use crate::output::{Failure, complain, say};
use crate::proxy::get_lines;
use clap::{Args, ValueEnum};
use leeward_policy::Name;
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;

/// Whose lines, and from where.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The plugin; all plugins if not given.
    name: Option<String>,
    /// Admin addresses of proxies.
    #[arg(
        long,
        value_name = "IP:PORT",
        num_args = 1..,
        value_delimiter = ',',
        default_value = "127.0.0.1:15020"
    )]
    proxy: Vec<SocketAddr>,
    /// Go on as lines come.
    #[arg(short, long)]
    follow: bool,
    /// Only lines that are at least so grave.
    #[arg(long, default_value = "debug")]
    level: Level,
}

/// How grave a line is, from the gravest.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

/// How often proxies are asked for new lines.
const EVERY: Duration = Duration::from_millis(500);

/// A proxy that is asked.
struct Source {
    admin: SocketAddr,
    /// The line that came last.
    after: u64,
    /// It didn't answer the last time.
    gone: bool,
}

/// A line.
#[derive(Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Line {
    unix_ms: u64,
    seq: u64,
    proxy: SocketAddr,
    level: String,
    plugin: String,
    text: String,
}

pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    if let Some(name) = &options.name {
        Name::parse(name).map_err(|error| Failure::BadInput(format!("NAME: {error}")))?;
    }
    let mut sources: Vec<Source> = options
        .proxy
        .iter()
        .map(|admin| Source {
            admin: *admin,
            after: 0,
            gone: false,
        })
        .collect();
    loop {
        let mut lines = Vec::new();
        let mut failed = Vec::new();
        for source in &mut sources {
            match source.take(options.name.as_deref()).await {
                Ok(new) => lines.extend(new),
                Err(error) => {
                    // One that is down is told of once, and asked again.
                    if !source.gone {
                        failed.push(error);
                    }
                    source.gone = true;
                }
            }
        }
        lines.sort();
        for line in lines.iter().filter(|line| line.is_at_least(options.level)) {
            say(&line.shown());
        }
        for error in &failed {
            complain(&format!("leeward: {error:#}"));
        }
        if !options.follow {
            return if failed.is_empty() {
                Ok(())
            } else {
                Err(Failure::Told)
            };
        }
        tokio::time::sleep(EVERY).await;
    }
}

impl Source {
    /// The lines that are new.
    async fn take(&mut self, plugin: Option<&str>) -> anyhow::Result<Vec<Line>> {
        let mut path = format!("/plugins/logs?after={}", self.after);
        if let Some(plugin) = plugin {
            path.push_str(&format!("&plugin={plugin}"));
        }
        let lines = get_lines(self.admin, &path).await?;
        self.gone = false;
        let lines: Vec<Line> = lines.iter().map(|line| Line::of(line, self.admin)).collect();
        self.after = lines.iter().map(|line| line.seq).fold(self.after, u64::max);
        Ok(lines)
    }
}

impl Line {
    fn of(line: &Value, proxy: SocketAddr) -> Self {
        let number = |field: &str| line.get(field).and_then(Value::as_u64).unwrap_or_default();
        let text = |field: &str| line.get(field).and_then(Value::as_str).unwrap_or("-").to_owned();
        Self {
            unix_ms: number("unix_ms"),
            seq: number("seq"),
            proxy,
            level: text("level"),
            plugin: text("plugin"),
            text: text("text"),
        }
    }

    fn is_at_least(&self, level: Level) -> bool {
        // A level that this command doesn't know is shown.
        let is = Level::from_str(&self.level, true).unwrap_or(Level::Error);
        is <= level
    }

    fn shown(&self) -> String {
        let at = prost_types::Timestamp {
            seconds: i64::try_from(self.unix_ms / 1000).unwrap_or_default(),
            nanos: i32::try_from(self.unix_ms % 1000).unwrap_or_default() * 1_000_000,
        };
        format!(
            "{at} {} {:5} {}: {}",
            self.proxy, self.level, self.plugin, self.text
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_says_when_where_how_grave_and_whose() {
        let proxy = "127.0.0.1:1".parse().unwrap();
        let line = json!({"seq": 7, "unix_ms": 1_500, "plugin": "p", "level": "WARN", "text": "a b"});
        let line = Line::of(&line, proxy);
        assert_eq!(line.shown(), "1970-01-01T00:00:01.500Z 127.0.0.1:1 WARN  p: a b");
        assert!(line.is_at_least(Level::Warn) && line.is_at_least(Level::Debug));
        assert!(!line.is_at_least(Level::Error));
    }
}
