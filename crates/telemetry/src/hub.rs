//! What all workers report to: one for each process.

use crate::access::AccessLog;
use crate::catalogue::{
    BUCKETS_US, BUILD_INFO, CONFIG_AGE, CONNECTED, FLAGS_FILE_BROKEN, GENERATION, LOG_DROPPED, MAX_SERIES,
    Metric, PANICS, PLUGIN_CUSTOM_GAUGE, QUARANTINED, SERIES_OVERFLOW, SPANS_DROPPED,
};
use crate::otlp::{ExportError, Exporter, Protocol};
use crate::series::{Series, Shard, render};
use opentelemetry_sdk::trace::SpanData;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Who reports, and where to.
#[derive(Debug)]
pub struct Settings {
    /// The proxy's zone.
    pub zone: Arc<str>,
    /// The proxy's name.
    pub proxy: Arc<str>,
    /// The build.
    pub version: Arc<str>,
    /// Share of the traces that begin here to be sampled, 0 to 1.
    pub trace_ratio: f64,
    /// Where spans go; `None` exports nothing.
    pub traces: Option<TraceSettings>,
    /// Where access log lines go; `None` writes none.
    pub access_log: Option<AccessLog>,
}

/// Where spans go.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    /// The receiver, such as `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// How it is spoken to.
    pub protocol: Protocol,
}

/// Where a process's counters, spans and log lines come together.
#[derive(Debug)]
pub struct Hub {
    settings: Settings,
    exporter: Option<Exporter>,
    shards: Mutex<Vec<Arc<Shard>>>,
    series: Arc<Series>,
    gauges: [AtomicU64; 5],
    /// Plugins' own gauges, by plugin and name. What one worker sets replaces what another did. Poison is harmless: what is
    /// changed is changed at once.
    plugin_gauges: Mutex<BTreeMap<[Arc<str>; 2], f64>>,
}

/// A gauge's value at the time of a scrape.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Which gauge of the catalogue.
    pub metric: Metric,
    /// The values of its labels, in order.
    pub labels: Vec<Arc<str>>,
    /// Its value.
    pub value: f64,
}

/// Requests that ended since the process began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RequestTally {
    /// All.
    pub requests: u64,
    /// Those that were not served; not those that clients gave up.
    pub failures: u64,
    /// All by their time: up to each of [`BUCKETS_US`], and longer.
    pub times: [u64; BUCKETS_US.len() + 1],
}

/// Values that the process sets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Gauge {
    /// The policy revision in use.
    Generation,
    /// Resources that are quarantined.
    Quarantined,
    /// 1 while a control plane is connected.
    Connected,
    /// Seconds since policy was last heard of.
    ConfigAge,
    /// 1 while the file of flags can't be used as it is.
    FlagsFileBroken,
}

impl Hub {
    /// A hub. Exports run on the current tokio runtime.
    ///
    /// # Errors
    ///
    /// If the settings of the export make no sense.
    pub fn new(settings: Settings) -> Result<Arc<Self>, ExportError> {
        let exporter = match &settings.traces {
            Some(traces) => Some(Exporter::start(traces, &settings)?),
            None => None,
        };
        Ok(Arc::new(Self {
            settings,
            exporter,
            shards: Mutex::default(),
            series: Arc::default(),
            gauges: [const { AtomicU64::new(0) }; 5],
            plugin_gauges: Mutex::default(),
        }))
    }

    /// Sets one of the process's values.
    pub fn set(&self, gauge: Gauge, value: u64) {
        if let Some(slot) = self.gauges.get(gauge as usize) {
            slot.store(value, Ordering::Relaxed);
        }
    }

    /// Sets a gauge of a plugin's own, if there is room for it.
    pub(crate) fn set_plugin_gauge(&self, plugin: &Arc<str>, name: &str, value: f64) {
        let mut gauges = self.plugin_gauges.lock().unwrap_or_else(PoisonError::into_inner);
        let key = [Arc::clone(plugin), Arc::from(name)];
        match gauges.get_mut(&key) {
            Some(known) => *known = value,
            None if self.series.admit() => drop(gauges.insert(key, value)),
            None => {}
        }
    }

    /// Everything, as Prometheus text. `readings` are gauges that somebody else keeps.
    pub fn render_prometheus(&self, readings: Vec<Reading>) -> String {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner).clone();
        #[expect(clippy::cast_precision_loss, reason = "a gauge of Prometheus is a float")]
        let gauge = |g: Gauge| {
            self.gauges
                .get(g as usize)
                .map_or(0, |v| v.load(Ordering::Relaxed)) as f64
        };
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        let mut extra: Vec<(Metric, Vec<Arc<str>>, f64)> = vec![
            (GENERATION, vec![], gauge(Gauge::Generation)),
            (QUARANTINED, vec![], gauge(Gauge::Quarantined)),
            (CONNECTED, vec![], gauge(Gauge::Connected)),
            (PANICS, vec![], crate::logs::panics() as f64),
            (CONFIG_AGE, vec![], gauge(Gauge::ConfigAge)),
            (FLAGS_FILE_BROKEN, vec![], gauge(Gauge::FlagsFileBroken)),
            (
                SERIES_OVERFLOW,
                vec![],
                self.series.overflow.load(Ordering::Relaxed) as f64,
            ),
        ];
        // As bounded as what workers count: a proxy may know more endpoints than a scrape should have.
        extra.extend(
            readings
                .into_iter()
                .take(MAX_SERIES)
                .map(|r| (r.metric, r.labels, r.value)),
        );
        let gauges = self.plugin_gauges.lock().unwrap_or_else(PoisonError::into_inner);
        extra.extend(
            gauges
                .iter()
                .map(|(labels, value)| (PLUGIN_CUSTOM_GAUGE, labels.to_vec(), *value)),
        );
        drop(gauges);
        let Settings {
            version,
            zone,
            proxy,
            access_log,
            ..
        } = &self.settings;
        extra.push((
            BUILD_INFO,
            vec![Arc::clone(version), Arc::clone(zone), Arc::clone(proxy)],
            1.0,
        ));
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        if let Some(exporter) = &self.exporter {
            extra.push((SPANS_DROPPED, vec![], exporter.dropped() as f64));
        }
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        if let Some(log) = access_log {
            extra.push((LOG_DROPPED, vec![], log.dropped() as f64));
        }
        render(&shards, extra)
    }

    /// Requests that ended, by direction and route. Costs a look at every series.
    pub fn requests(&self) -> BTreeMap<(Arc<str>, Arc<str>), RequestTally> {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner).clone();
        crate::series::requests(&shards)
    }

    /// Sends what is waiting to be exported, for at most `limit`. Blocks: not for a runtime's own thread.
    pub fn flush(&self, limit: Duration) {
        if let Some(exporter) = &self.exporter {
            exporter.flush(limit);
        }
    }

    pub(crate) fn shard(&self) -> Arc<Shard> {
        let shard = Arc::new(Shard::new(&self.series));
        self.shards
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&shard));
        shard
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn trace_ratio(&self) -> f64 {
        self.settings.trace_ratio
    }

    pub(crate) fn exports(&self) -> bool {
        self.exporter.is_some()
    }

    pub(crate) fn export(&self, spans: Vec<SpanData>) {
        if let Some(exporter) = &self.exporter {
            exporter.export(spans);
        }
    }

    pub(crate) fn access_log(&self) -> Option<&AccessLog> {
        self.settings.access_log.as_ref()
    }
}
