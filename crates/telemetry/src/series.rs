//! Counters that belong to one worker, and their sum over all workers when they are asked for.

use crate::catalogue::{BUCKETS_US, Kind, MAX_SERIES, Metric, REQUEST_SECONDS, REQUESTS};
use crate::hub::RequestTally;
use crate::reason::{Outcome, Reason};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A number with one writer: no locked instruction is needed to add to it. Readers may see it late.
#[derive(Debug, Default)]
pub(crate) struct Cell(AtomicU64);

impl Cell {
    pub(crate) fn add(&self, by: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
    }

    pub(crate) fn sub(&self, by: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_sub(by), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A distribution with one writer.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [u64; BUCKETS_US.len()],
    buckets: [Cell; BUCKETS_US.len()],
    count: Cell,
    /// Nanoseconds, or, of what is no duration, plain numbers.
    sum: Cell,
}

impl Histogram {
    fn of(metric: Metric) -> Self {
        Self {
            bounds: metric.buckets(),
            buckets: Default::default(),
            count: Cell::default(),
            sum: Cell::default(),
        }
    }

    pub(crate) fn observe(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.add(ns.div_ceil(1000), ns);
    }

    /// A value of a histogram that isn't of durations.
    pub(crate) fn observe_value(&self, value: u64) {
        self.add(value, value);
    }

    fn add(&self, value: u64, to_sum: u64) {
        let at = self.bounds.partition_point(|&bound| bound < value);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.add(1);
        }
        self.count.add(1);
        self.sum.add(to_sum);
    }
}

/// The values of a metric's labels, in order.
pub(crate) type Labels = Vec<Arc<str>>;

/// One worker's series.
#[derive(Debug, Default)]
pub(crate) struct Shard {
    // Locked when a series is first met, and when metrics are asked for; poison is harmless, since entries
    // are only ever added whole.
    counters: Mutex<HashMap<(Metric, Labels), Arc<Cell>>>,
    histograms: Mutex<HashMap<(Metric, Labels), Arc<Histogram>>>,
    total: Arc<Series>,
}

/// How many series there are, over all workers.
#[derive(Debug, Default)]
pub(crate) struct Series {
    known: AtomicUsize,
    pub(crate) overflow: AtomicU64,
}

impl Series {
    /// Room for one more.
    pub(crate) fn admit(&self) -> bool {
        let admitted = self.known.fetch_add(1, Ordering::Relaxed) < MAX_SERIES;
        if !admitted {
            self.known.fetch_sub(1, Ordering::Relaxed);
            self.overflow.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }
}

impl Shard {
    pub(crate) fn new(total: &Arc<Series>) -> Self {
        Self {
            total: Arc::clone(total),
            ..Self::default()
        }
    }

    pub(crate) fn counter(&self, metric: Metric, labels: Labels) -> Arc<Cell> {
        series(&self.counters, &self.total, (metric, labels), Cell::default)
    }

    pub(crate) fn histogram(&self, metric: Metric, labels: Labels) -> Arc<Histogram> {
        series(&self.histograms, &self.total, (metric, labels), || {
            Histogram::of(metric)
        })
    }
}

fn series<T>(
    map: &Mutex<HashMap<(Metric, Labels), Arc<T>>>,
    total: &Series,
    (metric, labels): (Metric, Labels),
    make: impl FnOnce() -> T,
) -> Arc<T> {
    let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = map.get(&(metric, labels.clone())) {
        return Arc::clone(known);
    }
    // No labels at all stand for the overflow of a metric that has some.
    let labels = if total.admit() { labels } else { Labels::new() };
    Arc::clone(map.entry((metric, labels)).or_insert_with(|| Arc::new(make())))
}

/// Requests that have ended, by direction and route.
pub(crate) fn requests(shards: &[Arc<Shard>]) -> BTreeMap<(Arc<str>, Arc<str>), RequestTally> {
    let mut sums: BTreeMap<(Arc<str>, Arc<str>), RequestTally> = BTreeMap::new();
    let way = |labels: &Labels| match labels.as_slice() {
        [direction, route, ..] => Some((Arc::clone(direction), Arc::clone(route))),
        // What found no room is of no route.
        _ => None,
    };
    for shard in shards {
        for ((metric, labels), cell) in &*shard.counters.lock().unwrap_or_else(PoisonError::into_inner) {
            let (true, Some(way)) = (*metric == REQUESTS, way(labels)) else {
                continue;
            };
            let word = |at: usize| labels.get(at).map_or("", |word| word);
            let sum = sums.entry(way).or_default();
            sum.requests = sum.requests.wrapping_add(cell.get());
            if word(4) != Outcome::Served.as_str() && word(6) != Reason::ClientGone.as_str() {
                sum.failures = sum.failures.wrapping_add(cell.get());
            }
        }
        for ((metric, labels), h) in &*shard.histograms.lock().unwrap_or_else(PoisonError::into_inner) {
            let (true, Some(way)) = (*metric == REQUEST_SECONDS, way(labels)) else {
                continue;
            };
            let sum = sums.entry(way).or_default();
            let mut within = 0;
            for (time, bucket) in sum.times.iter_mut().zip(&h.buckets) {
                *time = time.wrapping_add(bucket.get());
                within += bucket.get();
            }
            if let Some(longer) = sum.times.last_mut() {
                *longer = longer.wrapping_add(h.count.get().saturating_sub(within));
            }
        }
    }
    sums
}

/// Sums of one metric by label set.
#[derive(Default)]
struct Sums {
    values: BTreeMap<Labels, u64>,
    histograms: BTreeMap<Labels, (Vec<u64>, u64, u64)>,
}

/// Adds the workers' series up and writes them as Prometheus text (exposition format 0.0.4). `extra` are
/// values that no worker owns.
pub(crate) fn render(shards: &[Arc<Shard>], extra: Vec<(Metric, Labels, f64)>) -> String {
    let mut sums: HashMap<Metric, Sums> = HashMap::new();
    for shard in shards {
        for ((metric, labels), cell) in &*shard.counters.lock().unwrap_or_else(PoisonError::into_inner) {
            let value = sums
                .entry(*metric)
                .or_default()
                .values
                .entry(labels.clone())
                .or_default();
            *value = value.wrapping_add(cell.get());
        }
        for ((metric, labels), h) in &*shard.histograms.lock().unwrap_or_else(PoisonError::into_inner) {
            let entry = sums
                .entry(*metric)
                .or_default()
                .histograms
                .entry(labels.clone())
                .or_default();
            entry.0.resize(BUCKETS_US.len(), 0);
            for (sum, bucket) in entry.0.iter_mut().zip(&h.buckets) {
                *sum += bucket.get();
            }
            entry.1 += h.count.get();
            entry.2 = entry.2.wrapping_add(h.sum.get());
        }
    }
    let mut out = String::new();
    for metric in crate::catalogue::ALL {
        let own = sums.remove(metric).unwrap_or_default();
        let others: Vec<_> = extra.iter().filter(|(m, _, _)| m == metric).collect();
        if own.values.is_empty() && own.histograms.is_empty() && others.is_empty() {
            continue;
        }
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "# HELP {} {}\n# TYPE {} {kind}",
            metric.name, metric.help, metric.name
        );
        for (labels, value) in &own.values {
            let _ = writeln!(out, "{}{} {value}", metric.name, label_text(metric, labels, None));
        }
        for (_, labels, value) in others {
            let _ = writeln!(out, "{}{} {value}", metric.name, label_text(metric, labels, None));
        }
        // Bounds of durations are in microseconds, their sum is in nanoseconds.
        let shown = |value: u64, in_ns: u64| {
            if metric.is_duration() {
                seconds(value * in_ns)
            } else {
                value.to_string()
            }
        };
        for (labels, (buckets, count, sum)) in &own.histograms {
            let mut below = 0;
            for (bound, n) in metric.buckets().iter().zip(buckets) {
                below += n;
                let le = shown(*bound, 1000);
                let _ = writeln!(
                    out,
                    "{}_bucket{} {below}",
                    metric.name,
                    label_text(metric, labels, Some(&le))
                );
            }
            let all = label_text(metric, labels, Some("+Inf"));
            let _ = writeln!(out, "{}_bucket{all} {count}", metric.name);
            let plain = label_text(metric, labels, None);
            let _ = writeln!(out, "{}_sum{plain} {}", metric.name, shown(*sum, 1));
            let _ = writeln!(out, "{}_count{plain} {count}", metric.name);
        }
    }
    out
}

fn seconds(ns: u64) -> String {
    let text = format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn label_text(metric: &Metric, values: &[Arc<str>], le: Option<&str>) -> String {
    let mut pairs: Vec<String> = metric
        .labels
        .iter()
        .zip(values)
        .map(|(key, value)| {
            let value = value
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            format!("{key}=\"{value}\"")
        })
        .collect();
    if values.is_empty() && !metric.labels.is_empty() {
        pairs.push("overflow=\"true\"".to_owned());
    }
    if let Some(le) = le {
        pairs.push(format!("le=\"{le}\""));
    }
    if pairs.is_empty() {
        String::new()
    } else {
        format!("{{{}}}", pairs.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{ATTEMPTS, PLUGIN_CALL_SECONDS, PLUGIN_CUSTOM_VALUES, REQUEST_SECONDS};

    fn labels(values: &[&str]) -> Labels {
        values.iter().map(|v| Arc::from(*v)).collect()
    }

    #[test]
    fn workers_are_added_up() {
        let total = Arc::default();
        let shards: Vec<_> = (0..3).map(|_| Arc::new(Shard::new(&total))).collect();
        for shard in &shards {
            shard
                .counter(ATTEMPTS, labels(&["cart", "a", "h2", "200"]))
                .add(2);
            shard
                .histogram(REQUEST_SECONDS, labels(&["outbound", "r"]))
                .observe(Duration::from_millis(3));
        }
        let text = render(&shards, vec![]);
        assert!(
            text.contains(
                "leeward_attempts_total{service=\"cart\",zone=\"a\",transport=\"h2\",result=\"200\"} 6\n"
            ),
            "{text}"
        );
        let bucket = "leeward_request_duration_seconds_bucket{direction=\"outbound\",route=\"r\",le=";
        assert!(text.contains(&format!("{bucket}\"0.0025\"}} 0\n")), "{text}");
        assert!(text.contains(&format!("{bucket}\"0.0035\"}} 3\n")), "{text}");
        assert!(text.contains(&format!("{bucket}\"+Inf\"}} 3\n")), "{text}");
        assert!(
            text.contains("_sum{direction=\"outbound\",route=\"r\"} 0.009\n"),
            "{text}"
        );
    }

    #[test]
    fn requests_are_added_up_by_direction_and_route() {
        let total = Arc::default();
        let shards: Vec<_> = (0..2).map(|_| Arc::new(Shard::new(&total))).collect();
        for shard in &shards {
            for (outcome, reason, n) in [
                ("served", "ok", 5),
                ("failed", "timeout", 2),
                ("degraded", "timeout", 1),
                ("failed", "client_gone", 1),
            ] {
                let of = labels(&["outbound", "r", "s", "a", outcome, "2xx", reason]);
                shard.counter(REQUESTS, of).add(n);
            }
            let times = shard.histogram(REQUEST_SECONDS, labels(&["outbound", "r"]));
            times.observe(Duration::from_micros(700));
            times.observe(Duration::from_secs(60));
        }
        let sums = requests(&shards);
        let sum = &sums[&("outbound".into(), "r".into())];
        assert_eq!((sum.requests, sum.failures), (18, 6));
        assert_eq!((sum.times[1], sum.times[BUCKETS_US.len()]), (2, 2));
        assert_eq!(sum.times.iter().sum::<u64>(), 4);
    }

    #[test]
    fn calls_of_plugins_have_finer_buckets() {
        let total = Arc::default();
        let shard = Arc::new(Shard::new(&total));
        let calls = shard.histogram(PLUGIN_CALL_SECONDS, labels(&["p", "on-request"]));
        for ns in [900, 1_000, 1_001] {
            calls.observe(Duration::from_nanos(ns));
        }
        let text = render(&[shard], vec![]);
        let of = "{plugin=\"p\",function=\"on-request\"";
        for line in [
            format!("leeward_plugin_call_seconds_bucket{of},le=\"0.000001\"}} 2\n"),
            format!("leeward_plugin_call_seconds_bucket{of},le=\"0.000002\"}} 3\n"),
            format!("leeward_plugin_call_seconds_sum{of}}} 0.000002901\n"),
        ] {
            assert!(text.contains(&line), "{line} is not in {text}");
        }
    }

    #[test]
    fn values_of_plugins_are_numbers_of_anything() {
        let total = Arc::default();
        let shard = Arc::new(Shard::new(&total));
        let sizes = shard.histogram(PLUGIN_CUSTOM_VALUES, labels(&["p", "size"]));
        for value in [0, 20, 21, u64::from(u32::MAX)] {
            sizes.observe_value(value);
        }
        let text = render(&[shard], vec![]);
        let of = "{plugin=\"p\",name=\"size\"";
        for line in [
            format!("leeward_plugin_custom_values_bucket{of},le=\"1\"}} 1\n"),
            format!("leeward_plugin_custom_values_bucket{of},le=\"20\"}} 2\n"),
            format!("leeward_plugin_custom_values_bucket{of},le=\"50\"}} 3\n"),
            format!("leeward_plugin_custom_values_bucket{of},le=\"+Inf\"}} 4\n"),
            format!("leeward_plugin_custom_values_sum{of}}} 4294967336\n"),
        ] {
            assert!(text.contains(&line), "{line} is not in {text}");
        }
    }

    #[test]
    fn series_are_bounded() {
        let total = Arc::default();
        let shard = Arc::new(Shard::new(&total));
        for i in 0..MAX_SERIES + 5 {
            shard
                .counter(ATTEMPTS, labels(&["s", "z", "h2", &i.to_string()]))
                .add(1);
        }
        let text = render(&[shard], vec![]);
        assert!(text.contains("leeward_attempts_total{overflow=\"true\"} 5\n"));
        assert_eq!(
            text.lines().filter(|l| !l.starts_with('#')).count(),
            MAX_SERIES + 1
        );
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(
            label_text(&ATTEMPTS, &labels(&["a\"b\\c\nd", "z", "h2", "r"]), None),
            r#"{service="a\"b\\c\nd",zone="z",transport="h2",result="r"}"#
        );
    }
}
