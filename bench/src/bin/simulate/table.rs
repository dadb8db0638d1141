//! Tables in Markdown.

use std::fmt;
use std::time::Duration;

/// A heading, rows of cells, and what is to be known about them.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) title: &'static str,
    /// Paragraphs before the table.
    pub(crate) text: String,
    pub(crate) columns: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## {}\n\n{}\n", self.title, self.text)?;
        writeln!(f, "| {} |", self.columns.join(" | "))?;
        // The first column names the row, the others are numbers.
        let rulers = (0..self.columns.len()).map(|n| if n == 0 { "---" } else { "---:" });
        writeln!(f, "| {} |", rulers.collect::<Vec<_>>().join(" | "))?;
        for row in &self.rows {
            writeln!(f, "| {} |", row.join(" | "))?;
        }
        Ok(())
    }
}

/// A share in percent.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// A quotient, to two places.
pub(crate) fn times(factor: f64) -> String {
    format!("{factor:.2}")
}

/// A time in milliseconds; a dash for none.
pub(crate) fn millis(time: Option<Duration>) -> String {
    time.map_or_else(
        || "-".to_owned(),
        |time| format!("{:.0} ms", time.as_secs_f64() * 1e3),
    )
}
