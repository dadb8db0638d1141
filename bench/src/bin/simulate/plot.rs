//! A picture of the runs through a fault.

use crate::scenario::{CAPACITY, Run, fault};
use std::fmt::Write;

/// Sizes, in the picture's units.
const LEFT: f64 = 64.0;
const WIDTH: f64 = 620.0;
const TOP: f64 = 78.0;
/// From one panel's top to the next one's.
const STEP: f64 = 96.0;
const HEIGHT: f64 = 62.0;

/// Answers in time over time, a panel for each strategy, one above the other on the same axis.
pub(crate) fn svg(runs: &[Run]) -> String {
    let panels: String = runs.iter().enumerate().map(panel).collect();
    let count = f64::from(u32::try_from(runs.len()).unwrap_or(0));
    let bottom = TOP + STEP * count - (STEP - HEIGHT);
    let (width, height) = (LEFT + WIDTH + 24.0, bottom + 56.0);
    let (from, to) = (x(fault::FROM), x(fault::TO));
    let mut axis = String::new();
    for second in (0..=fault::END).step_by(10) {
        let _ = writeln!(
            axis,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{second}</text>",
            x(second),
            bottom + 18.0,
        );
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"Answers in time for each second of \
         a run with a fault, for each strategy\">\n{STYLE}\
         <text class=\"title\" x=\"{LEFT}\" y=\"22\">Answers in time, in requests a second</text>\n\
         <rect class=\"fault\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\n\
         <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">fault</text>\n\
         {panels}{axis}\
         <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">seconds; dashed: what clients send</text>\n</svg>\n",
        TOP - 24.0,
        to - from,
        bottom - TOP + 24.0,
        f64::midpoint(from, to),
        TOP - 30.0,
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
    .load { stroke: #8c959f; stroke-width: 1.2; stroke-dasharray: 4 3 }\n\
    .fault { fill: #e5534b; fill-opacity: .16 }\n\
    .line { fill: none; stroke: #2f81f7; stroke-width: 1.6; stroke-linejoin: round }\n\
    .area { fill: #2f81f7; fill-opacity: .2 }\n\
    @media (prefers-color-scheme: dark) {\n\
    text { fill: #9da7b3 }\n\
    .fault { fill: #ff7b72; fill-opacity: .2 }\n\
    .line { stroke: #58a6ff }\n\
    .area { fill: #58a6ff }\n\
    }\n</style>\n";

fn panel((place, run): (usize, &Run)) -> String {
    let top = TOP + STEP * f64::from(u32::try_from(place).unwrap_or(0));
    let y = |rate: f64| top + HEIGHT * (1.0 - rate / CAPACITY);
    let mut out = format!(
        "<text class=\"name\" x=\"{LEFT}\" y=\"{:.1}\">{}</text>\n",
        top - 7.0,
        run.name,
    );
    for rate in [0.0, CAPACITY / 2.0, CAPACITY] {
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1:.1}\" y2=\"{0:.1}\"/>\n\
             <text class=\"tick\" x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{rate:.0}</text>\n",
            y(rate),
            LEFT + WIDTH,
            LEFT - 8.0,
            y(rate) + 4.0,
        );
    }
    let mut points = String::new();
    for (second, good) in run.record.goodput().take(fault::END).enumerate() {
        // A second's count stands in its middle.
        let middle = f64::midpoint(x(second), x(second + 1));
        let _ = write!(points, "{middle:.1},{:.1} ", y(f64::from(good)));
    }
    let points = points.trim_end();
    let (first, last) = (
        f64::midpoint(x(0), x(1)),
        f64::midpoint(x(fault::END - 1), x(fault::END)),
    );
    let _ = write!(
        out,
        "<line class=\"load\" x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1:.1}\" y2=\"{0:.1}\"/>\n\
         <polygon class=\"area\" points=\"{first:.1},{2:.1} {points} {last:.1},{2:.1}\"/>\n\
         <polyline class=\"line\" points=\"{points}\"/>\n",
        y(fault::LOAD * CAPACITY),
        LEFT + WIDTH,
        y(0.0),
    );
    out
}

/// Where a second begins.
fn x(second: usize) -> f64 {
    let share = |second: usize| f64::from(u32::try_from(second).unwrap_or(u32::MAX));
    LEFT + WIDTH * share(second) / share(fault::END)
}
