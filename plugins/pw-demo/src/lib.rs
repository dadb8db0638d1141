//! A proxy-wasm plugin that does what real ones do: it asks a service whether a request may pass, counts for all workers,
//! keeps those refused in a queue, rewrites bodies, and reports by gRPC at its leisure.
//!
//! The configuration is JSON:
//!
//! - `auth`: `{"cluster": "auth", "path": "/check"}`. Each request's head waits for its answer: 200 lets it pass, with the
//!   answer's `x-user` as `x-auth-user`; any other status refuses it with 403; no answer, with 503. Without `auth`
//!   all pass.
//! - `audit`: `{"cluster": "audit", "service": "demo.Audit", "method": "Report"}`. It is told the count of requests at each
//!   tick, as the first field of a message.
//! - `tickMs`: how often, default 1000.
//! - `requestBody`, `responseBody`: `{"from": "secret", "to": "******"}`, replaced wherever it stands.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: pw-demo}
//! spec:
//!   kind: ProxyWasm
//!   source: {file: /var/lib/leeward/pw-demo.wasm}
//!   limits: {maxBody: 1048576}
//!   access: {services: [auth, audit]}
//!   onFault: FailClosed
//! ---
//! kind: Route
//! metadata: {name: shop}
//! spec:
//!   hostnames: [shop.example]
//!   rules:
//!     - backendRefs: [{service: shop}]
//!       filters: [{plugin: pw-demo, config: '{"auth": {"cluster": "auth", "path": "/check"}}'}]
//! ```

mod config;
mod request;

use config::Config;
use log::{error, info, warn};
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{ContextType, LogLevel, MetricType, Status};
use request::Request;
use std::rc::Rc;
use std::time::Duration;

/// Requests of all workers, in shared data.
const TOTAL: &str = "pw-demo.total";
/// Paths that were refused.
const REFUSED: &str = "pw-demo.refused";
/// How long a gRPC service is waited for.
const AUDIT_PATIENCE: Duration = Duration::from_millis(500);

/// Names of metrics that the host knows by number.
#[derive(Clone, Copy, Default)]
struct Metrics {
    requests: u32,
    refused: u32,
    audited: u32,
    total: u32,
    auth_ms: u32,
}

#[derive(Default)]
struct Root {
    config: Rc<Config>,
    metrics: Metrics,
    queue: Option<u32>,
}

impl Metrics {
    fn define() -> Result<Self, Status> {
        let define = hostcalls::define_metric;
        Ok(Self {
            requests: define(MetricType::Counter, "pw_demo_requests")?,
            refused: define(MetricType::Counter, "pw_demo_refused")?,
            audited: define(MetricType::Counter, "pw_demo_audited")?,
            total: define(MetricType::Gauge, "pw_demo_total")?,
            auth_ms: define(MetricType::Histogram, "pw_demo_auth_ms")?,
        })
    }
}

impl Context for Root {
    fn on_grpc_call_response(&mut self, _: u32, status: u32, size: usize) {
        if status == 0 {
            let answer = self.get_grpc_call_response_body(0, size).unwrap_or_default();
            info!("audit took the report: {} bytes back", answer.len());
            bump(self.metrics.audited, 1);
        } else {
            let (_, message) = self.get_grpc_status();
            warn!(
                "audit didn't take the report: {status} {}",
                message.unwrap_or_default()
            );
        }
    }
}

impl RootContext for Root {
    fn on_vm_start(&mut self, _: usize) -> bool {
        match Metrics::define() {
            Ok(metrics) => self.metrics = metrics,
            Err(status) => {
                error!("metrics can't be defined: {status:?}");
                return false;
            }
        }
        self.queue = Some(self.register_shared_queue(REFUSED));
        true
    }

    fn on_configure(&mut self, _: usize) -> bool {
        let text = self.get_plugin_configuration().unwrap_or_default();
        match Config::parse(&text) {
            Ok(config) => {
                self.set_tick_period(Duration::from_millis(config.tick_ms));
                self.config = Rc::new(config);
                true
            }
            Err(error) => {
                error!("the configuration is wrong: {error}");
                false
            }
        }
    }

    fn on_tick(&mut self) {
        let (total, _) = shared_total();
        if let Err(status) = hostcalls::record_metric(self.metrics.total, total) {
            warn!("the total can't be recorded: {status:?}");
        }
        if let Some(audit) = &self.config.audit {
            let sent = self.dispatch_grpc_call(
                &audit.cluster,
                &audit.service,
                &audit.method,
                vec![("x-reported-by", b"pw-demo")],
                Some(&config::report(total)),
                AUDIT_PATIENCE,
            );
            if let Err(status) = sent {
                warn!("audit can't be called: {status:?}");
            }
        }
    }

    fn on_queue_ready(&mut self, queue: u32) {
        while let Ok(Some(path)) = self.dequeue_shared_queue(queue) {
            info!("refused: {}", String::from_utf8_lossy(&path));
            bump(self.metrics.refused, 1);
        }
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Request::new(
            Rc::clone(&self.config),
            self.metrics,
            self.queue,
        )))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// Adds to a counter. A metric that isn't there is no reason to fail a request.
fn bump(metric: u32, by: i64) {
    if let Err(status) = hostcalls::increment_metric(metric, by) {
        warn!("metric {metric} can't be incremented: {status:?}");
    }
}

/// Requests so far, and which version of the number that is.
fn shared_total() -> (u64, Option<u32>) {
    let (bytes, cas) = hostcalls::get_shared_data(TOTAL).unwrap_or_default();
    let total = bytes
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes);
    (total, cas)
}

/// Counts a request for all workers; how many there were before it. Another worker may come in between, but not for ever.
fn count_shared() -> u64 {
    const TRIES: usize = 10;
    for _ in 0..TRIES {
        let (total, cas) = shared_total();
        match hostcalls::set_shared_data(TOTAL, Some(&(total + 1).to_le_bytes()), cas) {
            Ok(()) => return total,
            Err(Status::CasMismatch) => {}
            Err(status) => {
                warn!("the total can't be kept: {status:?}");
                return total;
            }
        }
    }
    warn!("the total was changed by others {TRIES} times in a row; this request isn't counted");
    shared_total().0
}

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}
