//! What guests write down: lines of the proxy's own log, under their names, and the last of them to be read again.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::broadcast;
use tracing::Level;

/// Bytes of a line that are kept.
pub(crate) const MAX_LINE: usize = 1024;
/// Lines of all plugins that a process keeps, and that a reader may be behind.
const MAX_LINES: usize = 1000;

/// A line that a guest wrote.
#[derive(Clone, Debug)]
pub struct LogLine {
    /// Larger than that of every line before, of this process and of those before it.
    pub seq: u64,
    /// When.
    pub at: SystemTime,
    /// Which plugin.
    pub plugin: Arc<str>,
    /// How grave it is, in the guest's opinion.
    pub level: Level,
    /// The text, on one line.
    pub text: Arc<str>,
}

/// Lines from now on.
#[derive(Debug)]
pub struct LogTail(broadcast::Receiver<LogLine>);

/// The lines of a process. Like its log there is one.
struct Kept {
    /// Of the last line.
    seq: u64,
    last: VecDeque<LogLine>,
    readers: broadcast::Sender<LogLine>,
}

// Poison is harmless: a line is kept whole or not at all.
static KEPT: LazyLock<Mutex<Kept>> = LazyLock::new(|| {
    Mutex::new(Kept {
        // Lines are less than one in a microsecond, so that a process that starts later has larger ones.
        seq: u64::try_from(since_epoch(stamp()).as_micros()).unwrap_or_default(),
        last: VecDeque::new(),
        readers: broadcast::Sender::new(MAX_LINES),
    })
});

/// Writes a line. How many a call may write is counted where it comes from.
pub(crate) fn line(plugin: &Arc<str>, level: Level, text: &str) {
    let end = text.floor_char_boundary(MAX_LINE);
    // A line break would let a guest write what looks like a line of the proxy's own.
    let message = printable(text.get(..end).unwrap_or_default());
    keep(plugin, level, &message);
    let (plugin, message) = (&**plugin, &*message);
    match level {
        Level::ERROR => tracing::error!(plugin, message),
        Level::WARN => tracing::warn!(plugin, message),
        Level::INFO => tracing::info!(plugin, message),
        Level::DEBUG | Level::TRACE => tracing::debug!(plugin, message),
    }
}

fn keep(plugin: &Arc<str>, level: Level, text: &str) {
    let at = stamp();
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.seq += 1;
    let line = LogLine {
        seq: kept.seq,
        at,
        plugin: Arc::clone(plugin),
        level,
        text: text.into(),
    };
    if kept.last.len() == MAX_LINES {
        kept.last.pop_front();
    }
    kept.last.push_back(line.clone());
    // Without a reader there is nobody to tell.
    let _ = kept.readers.send(line);
}

#[expect(clippy::disallowed_methods, reason = "a stamp for people")]
fn stamp() -> SystemTime {
    SystemTime::now()
}

fn since_epoch(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// The last lines of a plugin, or of all, and those that come after.
pub fn log_lines(plugin: Option<&str>) -> (Vec<LogLine>, LogTail) {
    let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let of_plugin = |line: &&LogLine| plugin.is_none_or(|plugin| *line.plugin == *plugin);
    let lines = kept.last.iter().filter(of_plugin).cloned().collect();
    (lines, LogTail(kept.readers.subscribe()))
}

impl LogTail {
    /// Waits for the next line. `None` if the reader is too slow to be given all of them.
    pub async fn next(&mut self) -> Option<LogLine> {
        self.0.recv().await.ok()
    }
}

/// `text` with its control characters written out.
fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logged_text_stays_on_its_line() {
        assert_eq!(printable("plain \u{e9}"), "plain \u{e9}");
        assert_eq!(printable("a\nERROR b\u{1b}[31m"), "a\\nERROR b\\u{1b}[31m");
    }

    #[tokio::test]
    async fn the_last_lines_are_kept_and_new_ones_told() {
        let (noisy, quiet) = (Arc::from("noisy"), Arc::from("quiet"));
        line(&quiet, Level::WARN, "once");
        let (_, mut slow) = log_lines(None);
        for n in 0..MAX_LINES - 1 {
            line(&noisy, Level::INFO, &n.to_string());
        }
        let (lines, mut tail) = log_lines(Some("quiet"));
        assert_eq!(lines.len(), 1, "it is the oldest that is kept");
        let (all, _) = log_lines(None);
        assert!(
            all.is_sorted_by(|a, b| a.seq < b.seq),
            "each comes after the one before"
        );
        line(&quiet, Level::INFO, &"x".repeat(2 * MAX_LINE));
        assert_eq!(tail.next().await.unwrap().text.len(), MAX_LINE);
        for n in 0..MAX_LINES {
            line(&noisy, Level::INFO, &n.to_string());
        }
        assert!(log_lines(Some("quiet")).0.is_empty(), "the oldest have gone");
        assert_eq!(log_lines(None).0.len(), MAX_LINES);
        // A reader that has not read while all of them were replaced is not lied to.
        assert!(slow.next().await.is_none());
    }
}
