//! The node's workloads: the socket at which they are given certificates, and what there is to see of them.

mod socket;

pub(crate) use socket::Socket;

use crate::drain::Phase;
use crate::settings::{Settings, Source};
use crate::side::left;
use anyhow::ensure;
use leeward_config::{Live, Timing, Workloads};
use leeward_identity::{Identity, shown};
use leeward_telemetry::Reading;
use leeward_telemetry::catalogue::{
    WORKLOAD_REFUSED, WORKLOAD_STREAMS, WORKLOAD_SVIDS, WORKLOAD_SVIDS_ASKED,
};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Where they are to be served, if anywhere: certificates are a control plane's to give, to a proxy that it knows.
pub(crate) fn wanted<'a>(settings: &'a Settings, source: &Source) -> anyhow::Result<Option<&'a Path>> {
    let Some(path) = settings.workload_api.as_deref() else {
        return Ok(None);
    };
    let control = matches!(source, Source::Control(_));
    ensure!(
        control && settings.identity.is_some(),
        "--workload-api needs --identity and --control: a control plane that is an authority (--ca) issues the certificates"
    );
    Ok(Some(path))
}

/// Those of this node, which are looked after from now on.
pub(crate) fn keep(source: &Source, identity: &Arc<Identity>, live: &Live) -> Workloads {
    let identity = Arc::clone(identity);
    let workloads = Workloads::new(identity, source.control(), live.clone(), Timing::DEFAULT);
    tokio::spawn(workloads.clone().keep());
    workloads
}

/// Serves them until a successor has the socket: who asks then is to be answered by that one.
pub(crate) async fn serve(workloads: Workloads, socket: Socket, mut phases: watch::Receiver<Phase>) {
    let stop = CancellationToken::new();
    let ending = stop.clone();
    let serving = workloads.serve(socket.into_listener(), stop);
    tokio::pin!(serving);
    tokio::select! {
        () = &mut serving => return,
        () = left(&mut phases) => ending.cancel(),
    }
    serving.await;
}

/// Gauges and counters, as of now.
pub(crate) fn readings(workloads: Option<&Workloads>, now: SystemTime) -> Vec<Reading> {
    let Some(workloads) = workloads else {
        return Vec::new();
    };
    let counts = workloads.counts(now);
    #[expect(clippy::cast_precision_loss, reason = "a value of Prometheus is a float")]
    let reading = |metric, label: Option<&'static str>, value: u64| Reading {
        metric,
        labels: label.into_iter().map(Arc::from).collect(),
        value: value as f64,
    };
    let mut readings = vec![
        reading(WORKLOAD_SVIDS, None, counts.svids as u64),
        reading(WORKLOAD_STREAMS, None, counts.streams as u64),
    ];
    let asked = counts.asked.iter();
    readings.extend(asked.map(|(word, count)| reading(WORKLOAD_SVIDS_ASKED, Some(*word), *count)));
    let refused = counts.refused.iter();
    readings.extend(refused.map(|(word, count)| reading(WORKLOAD_REFUSED, Some(*word), *count)));
    readings
}

/// What is known of each that a process has asked for, for people.
pub(crate) fn report(workloads: Option<&Workloads>, now: SystemTime) -> serde_json::Value {
    let Some(workloads) = workloads else {
        return serde_json::Value::Null;
    };
    let standing = workloads.standing(now);
    let each = standing.iter().map(|one| {
        json!({
            "workload": one.name.as_str(),
            "not_after": one.not_after.as_ref().map(shown),
            "processes": one.processes,
            "failed": one.failed,
        })
    });
    each.collect()
}
