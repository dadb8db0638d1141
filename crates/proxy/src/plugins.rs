//! Plugins: made ready as policy wants them, and shown to people.

use crate::modules::{Modules, Sha, Wanted};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use leeward_config::Warm;
use leeward_policy::Name;
use leeward_policy::model::{Plugin, PluginFrom, PluginSource};
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::{
    PLUGIN_COMPILE, PLUGIN_EVENTS, PLUGIN_INSTANCES, PLUGIN_MEMORY, PLUGIN_PENDING, PLUGIN_STATE,
    PLUGIN_VERSION_CALLS,
};
use leeward_wasm::{Host, PluginReport, Progress, VersionReport, VersionState, log_lines};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// The plugin host and the modules on the node, as `leeward-config` wants them.
pub(crate) struct Plugins {
    pub(crate) host: Arc<Host>,
    pub(crate) modules: Arc<Modules<leeward_config::Modules>>,
}

impl Warm for Plugins {
    async fn warm(&self, name: &Name, plugin: &Plugin) -> Result<(), String> {
        let named = plugin.sources().filter_map(|(_, source)| wanted(source));
        self.modules.name(name.as_str(), named.collect());
        let canary = plugin.canary.as_ref();
        let files = async {
            let stable = self.file_of("spec.source", name, &plugin.source).await?;
            let canary = match canary {
                Some(canary) => Some(self.file_of("spec.canary.source", name, &canary.source).await?),
                None => None,
            };
            Ok((stable, canary))
        };
        let (stable, canary) = files
            .await
            .inspect_err(|reason: &String| self.host.refused(name.as_str(), reason))?;
        self.host
            .load(name.as_str(), plugin, stable, canary)
            .await
            .map_err(|error| error.to_string())
    }

    fn retain(&self, names: &[&str]) {
        self.host.retain(names);
        self.modules.retain(names, self.in_use());
    }
}

impl Plugins {
    /// Where a module is, as soon as it is there.
    async fn file_of(&self, at: &'static str, name: &Name, source: &PluginSource) -> Result<PathBuf, String> {
        if let PluginFrom::File(file) = &source.from {
            return Ok(PathBuf::from(&**file));
        }
        let Some(sha256) = wanted(source) else {
            return self.unresolved(at, name, source).await;
        };
        let wanted = Wanted {
            at,
            sha256,
            key: source.minisign_key.as_deref(),
        };
        let say = |why: &str| self.host.fetching(name.as_str(), Some(why));
        self.host.fetching(name.as_str(), None);
        self.modules.ready(wanted, say).await
    }

    /// An image that the control plane has not fetched. When it has, that is another revision of the Plugin.
    async fn unresolved(&self, at: &str, name: &Name, source: &PluginSource) -> Result<PathBuf, String> {
        let image = match &source.from {
            PluginFrom::Oci { image, .. } => &**image,
            PluginFrom::File(_) | PluginFrom::Store => "",
        };
        if !self.modules.has_origin() {
            return Err(format!(
                "{at}.oci.image: {image} is for a control plane to fetch, and there is none; want {at}.file, or {at}.sha256 of a module that is in the proxy's directory"
            ));
        }
        let why =
            format!("{at}.oci.image: the control plane has not fetched {image} yet; see leeward plugin list");
        self.host.fetching(name.as_str(), Some(&why));
        std::future::pending().await
    }

    /// The modules of every version that the host has, so that going back to one needs no control plane.
    fn in_use(&self) -> Vec<Sha> {
        let reports = self.host.report(tokio::time::Instant::now().into_std());
        let versions = reports
            .iter()
            .flat_map(|plugin| [&plugin.stable, &plugin.canary, &plugin.previous]);
        let digests = versions.flatten().map(|version| &version.digest);
        let returned = reports.iter().filter_map(|plugin| plugin.returned_from.as_ref());
        digests
            .chain(returned)
            .filter_map(|digest| leeward_module::parse_hex(digest))
            .collect()
    }
}

/// The module of a source that isn't a file, if it is known which.
fn wanted(source: &PluginSource) -> Option<Sha> {
    match source.from {
        PluginFrom::File(_) => None,
        PluginFrom::Store | PluginFrom::Oci { .. } => source.stored().or(source.sha256),
    }
}

/// What there is to say of every plugin.
pub(crate) fn report(host: &Host, now: Instant) -> Value {
    host.report(now).iter().map(plugin).collect()
}

fn plugin(report: &PluginReport) -> Value {
    json!({
        "plugin": &*report.name,
        "state": report.progress.as_str(),
        "reason": report.progress.reason(),
        "stable": report.stable.as_ref().map(version),
        "canary": report.canary.as_ref().map(version),
        "previous": report.previous.as_ref().map(version),
        "returned_from": report.returned_from,
        "returns": report.returns,
        "memory_bytes": report.memory,
        "peak_memory_bytes": report.peak_memory,
        "instances": report.instances,
    })
}

fn version(report: &VersionReport) -> Value {
    let left = match report.state {
        VersionState::Quarantined(left) => Some(left.as_secs_f64()),
        VersionState::Ready | VersionState::Trying => None,
    };
    let faults = report.faults.iter();
    let faults: serde_json::Map<_, _> = faults
        .map(|(fault, count)| (fault.as_str().to_owned(), json!(count)))
        .collect();
    json!({
        "kind": report.kind.as_str(),
        "sha256": report.digest,
        "state": report.state.as_str(),
        "quarantined_for_seconds": left,
        "calls": report.calls,
        "faults": faults,
        "quarantines": report.quarantines,
        "compile_seconds": report.compile.as_secs_f64(),
        "compiled_before": report.cached,
    })
}

/// Gauges and counts, as of now.
#[expect(clippy::cast_precision_loss, reason = "metrics' values; exact to 2^53")]
pub(crate) fn readings(host: &Host, now: Instant) -> Vec<Reading> {
    let mut readings = Vec::new();
    for report in host.report(now) {
        let mut add = |metric, labels: &[&str], value: f64| {
            let labels = labels.iter().map(|label| Arc::from(*label));
            readings.push(Reading {
                metric,
                labels: std::iter::once(Arc::clone(&report.name)).chain(labels).collect(),
                value,
            });
        };
        let state = report
            .stable
            .as_ref()
            .map_or(report.progress.as_str(), |stable| stable.state.as_str());
        add(PLUGIN_STATE, &[state], 1.0);
        add(
            PLUGIN_PENDING,
            &[],
            f64::from(u8::from(report.progress != Progress::Ready)),
        );
        add(PLUGIN_EVENTS, &["returned"], report.returns as f64);
        add(PLUGIN_MEMORY, &[], report.memory as f64);
        add(PLUGIN_INSTANCES, &[], report.instances as f64);
        if let Some(stable) = &report.stable {
            let cached = if stable.cached { "true" } else { "false" };
            add(PLUGIN_COMPILE, &[cached], stable.compile.as_secs_f64());
            add(PLUGIN_EVENTS, &["quarantined"], stable.quarantines as f64);
        }
        let versions = [
            ("stable", &report.stable),
            ("canary", &report.canary),
            ("previous", &report.previous),
        ];
        for (role, version) in versions {
            let Some(version) = version else { continue };
            let faults: u64 = version.faults.iter().map(|(_, count)| count).sum();
            let ok = version.calls.saturating_sub(faults);
            add(PLUGIN_VERSION_CALLS, &[&version.short, role, "ok"], ok as f64);
            for (fault, count) in &version.faults {
                let labels = [&*version.short, role, fault.as_str()];
                add(PLUGIN_VERSION_CALLS, &labels, *count as f64);
            }
        }
    }
    readings
}

/// The last lines that plugins wrote, oldest first: of one plugin and after a line, if the query names them.
pub(crate) fn logs(query: Option<&str>) -> Response<Full<Bytes>> {
    let of = |name: &str| {
        let mut pairs = query.into_iter().flat_map(|query| query.split('&'));
        pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    };
    let after = match of("after").map(str::parse::<u64>) {
        None => 0,
        Some(Ok(after)) => after,
        Some(Err(_)) => {
            let error = json!({"error": "after: want the seq of a line, a whole number"});
            return answer(StatusCode::BAD_REQUEST, "application/json", error.to_string());
        }
    };
    let (lines, _) = log_lines(of("plugin"));
    let mut text = String::new();
    for line in lines.iter().filter(|line| line.seq > after) {
        let at = line.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let line = json!({
            "seq": line.seq,
            "unix_ms": u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            "plugin": &*line.plugin,
            "level": line.level.as_str(),
            "text": &*line.text,
        });
        text.push_str(&line.to_string());
        text.push('\n');
    }
    answer(StatusCode::OK, "application/jsonl", text)
}

fn answer(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static(kind);
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}
