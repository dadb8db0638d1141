//! A worker with one plugin, and what is seen of it.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use leeward_policy::Name;
use leeward_policy::model::{
    Cause, OnFault, Plugin, PluginAccess, PluginFrom, PluginKind, PluginLimits, PluginSource, Quarantine,
};
use leeward_wasm::{
    Called, Events, Facts, Fault, Filter, FlagValue, Flags, Host, MeshCall, RequestHead, ResponseHead, Step,
    Way, Worker,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

pub struct Rig {
    pub host: Arc<Host>,
    pub worker: Worker,
    pub spec: Arc<Plugin>,
    pub name: Arc<str>,
    pub seen: Rc<Seen>,
    pub mesh: RefCell<mpsc::UnboundedReceiver<MeshCall>>,
}

/// What people see.
#[derive(Default)]
pub struct Seen {
    pub counts: RefCell<BTreeMap<String, u64>>,
    pub gauges: RefCell<BTreeMap<String, f64>>,
    pub observed: RefCell<Vec<(String, f64)>>,
    pub calls: RefCell<Vec<(&'static str, Result<(), Fault>)>>,
}

impl Events for Seen {
    fn count(&self, _: &Arc<str>, name: &str, by: u64) {
        *self.counts.borrow_mut().entry(name.to_owned()).or_default() += by;
    }

    fn gauge(&self, _: &Arc<str>, name: &str, value: f64) {
        self.gauges.borrow_mut().insert(name.to_owned(), value);
    }

    fn observe(&self, _: &Arc<str>, name: &str, value: f64) {
        self.observed.borrow_mut().push((name.to_owned(), value));
    }

    fn called(&self, call: &Called<'_>) {
        self.calls.borrow_mut().push((call.function, call.outcome));
    }
}

impl Seen {
    pub fn gauge(&self, name: &str) -> Option<f64> {
        self.gauges.borrow().get(name).copied()
    }

    pub fn called(&self, function: &str) -> usize {
        self.calls
            .borrow()
            .iter()
            .filter(|(called, _)| *called == function)
            .count()
    }
}

#[derive(Debug)]
struct NoFlags;

impl Flags for NoFlags {
    fn value(&self, _: &str, _: &Facts, _: &RequestHead, _: Option<Cause>) -> Option<FlagValue> {
        None
    }
}

pub fn spec(change: impl FnOnce(&mut Plugin)) -> Plugin {
    let mut spec = Plugin {
        kind: PluginKind::ProxyWasm,
        source: PluginSource {
            from: PluginFrom::File("/plugin.wasm".into()),
            sha256: None,
            minisign_key: None,
        },
        config: "the machine's".into(),
        limits: PluginLimits {
            // The time of a debug build on a busy machine.
            call_timeout: Duration::from_secs(2),
            ..PluginLimits::of(PluginKind::ProxyWasm)
        },
        access: PluginAccess {
            services: vec![Name::parse("auth").unwrap()],
            imports: Vec::new(),
        },
        on_fault: OnFault::FailClosed,
        quarantine: Quarantine {
            faults: u32::MAX,
            ..Quarantine::default()
        },
        fresh_instance: false,
        when: None,
        canary: None,
    };
    change(&mut spec);
    spec
}

/// Runs a test as a worker does.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(120), test)
            .await
            .expect("the test takes for ever");
    });
}

impl Rig {
    pub async fn new(module: &[u8]) -> Self {
        Self::with(module, spec(|_| {})).await
    }

    /// A plugin of another name: log lines are the process's.
    pub async fn named(name: &str, module: &[u8], spec: Plugin) -> Self {
        let host = Host::new().unwrap();
        load_as(name, &host, &spec, module).await.unwrap();
        let mut rig = Self::of(host, spec);
        rig.name = name.into();
        rig
    }

    pub async fn with(module: &[u8], spec: Plugin) -> Self {
        let host = Host::new().unwrap();
        load(&host, &spec, module).await.unwrap();
        Self::of(host, spec)
    }

    /// Another worker of the same process.
    pub fn of(host: Arc<Host>, spec: Plugin) -> Self {
        let seen = Rc::new(Seen::default());
        let (sender, mesh) = mpsc::unbounded_channel();
        Self {
            worker: Worker::new(&host, Rc::clone(&seen) as Rc<dyn Events>, sender),
            host,
            spec: Arc::new(spec),
            name: "p".into(),
            seen,
            mesh: RefCell::new(mesh),
        }
    }

    pub async fn filter(&self) -> Filter {
        self.filter_with("the filter's").await
    }

    pub async fn filter_with(&self, config: &str) -> Filter {
        let chosen = self.worker.choose(&self.name, &self.spec, false).unwrap();
        self.worker.filter(&chosen, facts(config)).await.unwrap()
    }

    /// A request without a body goes past.
    pub async fn request(&self, filter: &mut Filter) -> RequestHead {
        assert_eq!(filter.request(head(&[]), true).await, Ok(Step::Go));
        filter.take_request().unwrap()
    }

    /// A request goes past, and is over.
    pub async fn pass(&self) -> RequestHead {
        let mut filter = self.filter().await;
        self.request(&mut filter).await
    }

    /// The next call of another service.
    #[expect(clippy::await_holding_refcell_ref, reason = "nobody else listens")]
    pub async fn call(&self) -> MeshCall {
        self.mesh.borrow_mut().recv().await.unwrap()
    }

    /// Waits until something is seen.
    pub async fn until(&self, seen: impl Fn(&Seen) -> bool) {
        while !seen(&self.seen) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

pub async fn load(host: &Arc<Host>, spec: &Plugin, module: &[u8]) -> Result<(), leeward_wasm::LoadError> {
    load_as("p", host, spec, module).await
}

async fn load_as(
    name: &str,
    host: &Arc<Host>,
    spec: &Plugin,
    module: &[u8],
) -> Result<(), leeward_wasm::LoadError> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = std::env::temp_dir().join(format!("leeward-pw-{}-{number}.wasm", std::process::id()));
    std::fs::write(&file, module).unwrap();
    let loaded = host.load(name, spec, file.clone(), None).await;
    std::fs::remove_file(file).unwrap();
    loaded
}

pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

pub fn facts(config: &str) -> Facts {
    Facts {
        service: "reviews".into(),
        route: "shop/0".into(),
        route_name: Some("shop".into()),
        zone: "a".into(),
        proxy: "node-1".into(),
        peer: Some("spiffe://mesh/shop".into()),
        address: Some("10.0.0.1:4711".parse().unwrap()),
        protocol: "HTTP/1.1",
        config: config.into(),
        deadline: None,
        began: now(),
        flags: Arc::new(NoFlags),
        origin: Arc::new(fields(&[("traceparent", "00-1-2-01")])),
    }
}

pub fn fields(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let field = |(name, value): &(&'static str, &str)| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        )
    };
    pairs.iter().map(field).collect()
}

pub fn head(pairs: &[(&'static str, &str)]) -> RequestHead {
    RequestHead {
        method: Method::GET,
        scheme: "http",
        authority: "shop:8080".into(),
        path: "/p?q=1".parse().unwrap(),
        headers: fields(pairs),
    }
}

pub fn answer(pairs: &[(&'static str, &str)]) -> ResponseHead {
    ResponseHead {
        status: StatusCode::OK,
        headers: fields(pairs),
    }
}

/// The value of a field, or nothing.
pub fn value<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

pub fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// Waits until a filter lets a request go that it holds up.
pub async fn resumed(filter: &mut Filter) -> Result<Step, Fault> {
    resumed_on(filter, Way::Request).await
}

async fn resumed_on(filter: &mut Filter, way: Way) -> Result<Step, Fault> {
    loop {
        match filter.resume(way).await? {
            Step::Wait => {}
            step @ (Step::Go | Step::Respond(_)) => return Ok(step),
        }
        filter.wake(way).unwrap().woken().await;
    }
}

/// Gives a filter trailers, and waits until it lets them go.
pub async fn trailers(
    filter: &mut Filter,
    way: Way,
    trailers: HeaderMap,
) -> Result<(Step, HeaderMap), Fault> {
    let mut step = match way {
        Way::Request => filter.request_trailers(trailers).await?,
        Way::Response => filter.response_trailers(trailers).await?,
    };
    if step == Step::Wait {
        step = resumed_on(filter, way).await?;
    }
    Ok((step, filter.take_trailers(way).unwrap_or_default()))
}
