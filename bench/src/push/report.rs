//! What was measured, as a table and as JSON.

use serde_json::json;
use std::io::Write;
use std::path::Path;

/// What was measured so far. Each row is printed as it comes.
#[derive(Debug, Default)]
pub(super) struct Report {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    section: String,
    what: String,
    value: f64,
    unit: &'static str,
    /// What it should be at most.
    goal: Option<f64>,
}

impl Report {
    /// Begins another part of the table.
    pub(super) fn section(&mut self, title: &str) -> anyhow::Result<()> {
        writeln!(std::io::stdout(), "\n{title}")?;
        self.rows.push(Row {
            section: title.to_owned(),
            what: String::new(),
            value: 0.0,
            unit: "",
            goal: None,
        });
        Ok(())
    }

    /// What there is to say beside values.
    pub(super) fn note(&self, text: &str) -> anyhow::Result<()> {
        writeln!(std::io::stdout(), "  {text}")?;
        Ok(())
    }

    /// One measured value.
    pub(super) fn row(
        &mut self,
        what: impl Into<String>,
        value: f64,
        unit: &'static str,
    ) -> anyhow::Result<()> {
        self.add(what.into(), value, unit, None)
    }

    /// The same, and what it should be at most.
    pub(super) fn goal(
        &mut self,
        what: impl Into<String>,
        value: f64,
        unit: &'static str,
        goal: f64,
    ) -> anyhow::Result<()> {
        self.add(what.into(), value, unit, Some(goal))
    }

    fn add(&mut self, what: String, value: f64, unit: &'static str, goal: Option<f64>) -> anyhow::Result<()> {
        let verdict = match goal {
            None => String::new(),
            Some(goal) if value <= goal => format!("  (goal: {goal} {unit}: met)"),
            Some(goal) => format!("  (goal: {goal} {unit}: MISSED)"),
        };
        writeln!(std::io::stdout(), "  {what:<58} {} {unit}{verdict}", shown(value))?;
        let section = self
            .rows
            .last()
            .map_or_else(String::new, |row| row.section.clone());
        self.rows.push(Row {
            section,
            what,
            value,
            unit,
            goal,
        });
        Ok(())
    }

    /// Writes everything as JSON: an array of objects.
    pub(super) fn write_json(&self, file: &Path) -> anyhow::Result<()> {
        let measured = self.rows.iter().filter(|row| !row.what.is_empty());
        let rows: Vec<_> = measured
            .map(|row| {
                json!({
                    "section": row.section,
                    "what": row.what,
                    "value": row.value,
                    "unit": row.unit,
                    "goal": row.goal,
                })
            })
            .collect();
        std::fs::write(file, serde_json::to_vec_pretty(&rows)?)?;
        Ok(())
    }
}

fn shown(value: f64) -> String {
    let digits = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:>12.digits$}")
}

/// The value below which a share of sorted values is; 0 for none.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a length is within it"
    )]
    let at = ((sorted.len() as f64 * share).ceil() as usize)
        .saturating_sub(1)
        .min(last);
    sorted.get(at).copied().unwrap_or_default()
}

pub(super) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        let of = |share| percentile(&values, share);
        let found = [of(0.0), of(0.5), of(0.99), of(1.0)].map(f64::to_bits);
        assert_eq!(found, [1.0_f64, 100.0, 198.0, 200.0].map(f64::to_bits));
        assert_eq!(percentile(&[], 0.5).to_bits(), 0.0_f64.to_bits());
    }
}
