//! A picture of how long requests took: what each share of them took at most.

use super::Times;
use std::fmt::Write;

/// Sizes, in the picture's units.
const LEFT: f64 = 64.0;
const WIDTH: f64 = 560.0;
const TOP: f64 = 64.0;
const HEIGHT: f64 = 280.0;
/// Room for the names at the right.
const NAMES: f64 = 190.0;
/// The axis ends at one request in a thousand.
const DECADES: f64 = 3.0;

/// Times that have a line across, in milliseconds.
const TIMES: [f64; 13] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
];

/// A line for each contender. Across: shares of requests, each tenth of the rest as wide as the one before; up: time, on a
/// scale of powers of ten.
pub(crate) fn svg(all: &[Times], what: &str) -> String {
    let most = all.iter().map(|times| times.at(999)).fold(10.0, f64::max);
    let least = all.iter().map(|times| times.at(0)).fold(most, f64::min).max(0.1);
    let scale = Scale {
        low: TIMES.into_iter().rev().find(|time| *time <= least).unwrap_or(1.0),
        high: TIMES.into_iter().find(|time| *time >= most).unwrap_or(10_000.0),
    };
    let bottom = TOP + HEIGHT;
    let (width, height) = (LEFT + WIDTH + NAMES, bottom + 56.0);
    let mut grid = String::new();
    for (name, share) in [
        ("0 %", 0.0),
        ("50 %", 0.5),
        ("90 %", 0.9),
        ("99 %", 0.99),
        ("99.9 %", 0.999),
    ] {
        let x = x(share);
        // A String takes whatever is written to it.
        let _ = write!(
            grid,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\n\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>\n",
            bottom + 18.0,
        );
    }
    for time in TIMES {
        if time < scale.low || time > scale.high {
            continue;
        }
        let y = scale.y(time);
        let _ = write!(
            grid,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\"/>\n\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{time:.0}</text>\n",
            LEFT + WIDTH,
            LEFT - 8.0,
            y + 4.0,
        );
    }
    let lines: String = all
        .iter()
        .zip(1..)
        .map(|(times, n)| line(times, n, &scale))
        .collect();
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\" role=\"img\" aria-label=\"How long requests took over a link that loses packets, by \
         transport\">\n{STYLE}\
         <text class=\"title\" x=\"{LEFT}\" y=\"22\">What requests took at most, in milliseconds</text>\n\
         <text class=\"tick\" x=\"{LEFT}\" y=\"42\">{what}</text>\n\
         {grid}{lines}\
         <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">share of the requests</text>\n</svg>\n",
        LEFT + WIDTH / 2.0,
        bottom + 42.0,
    )
}

/// Colours that can be read on white and on dark grounds, where the viewer doesn't say which it has.
const STYLE: &str = "<style>\n\
    text { font-family: system-ui, sans-serif; font-size: 12px; fill: #6e7781 }\n\
    .title { font-size: 14px; font-weight: 600 }\n\
    .name { font-size: 13px; font-weight: 600 }\n\
    .tick { font-size: 11px }\n\
    .grid { stroke: #8c959f; stroke-opacity: .35; stroke-width: 1 }\n\
    .line { fill: none; stroke-width: 1.8; stroke-linejoin: round }\n\
    .line1 { stroke: #2f81f7 }\n\
    .line2 { stroke: #e5534b }\n\
    .line3 { stroke: #a371f7; stroke-dasharray: 6 3 }\n\
    @media (prefers-color-scheme: dark) {\n\
    text { fill: #9da7b3 }\n\
    }\n</style>\n";

fn line(times: &Times, number: usize, scale: &Scale) -> String {
    let mut points = String::new();
    let mut end = TOP;
    // Close together where the axis is wide.
    let places = (0..900).step_by(20).chain((900..990).step_by(3)).chain(990..=999);
    for thousandths in places {
        end = scale.y(times.at(thousandths));
        let _ = write!(points, "{:.1},{end:.1} ", x(f64::from(thousandths) / 1000.0));
    }
    format!(
        "<polyline class=\"line line{number}\" points=\"{}\"/>\n\
         <text class=\"name\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
        points.trim_end(),
        LEFT + WIDTH + 8.0,
        end + 4.0,
        times.name,
    )
}

/// The times at both ends of the axis, in milliseconds.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn y(&self, time: f64) -> f64 {
        let part = (time.max(self.low) / self.low).log10() / (self.high / self.low).log10();
        TOP + HEIGHT * (1.0 - part.min(1.0))
    }
}

/// Where a share of the requests stands.
fn x(share: f64) -> f64 {
    let nines = -(1.0 - share).log10();
    LEFT + WIDTH * (nines / DECADES).clamp(0.0, 1.0)
}
