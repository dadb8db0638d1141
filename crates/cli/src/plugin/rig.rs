//! The real plugin host in this process, with a mesh that answers as a case says.

use super::cases::{Canned, Case, Message};
use super::why;
use crate::output::Failure;
use bytes::Bytes;
use http::HeaderMap;
use leeward_policy::model::{
    Cause, OnFault, Plugin, PluginAccess, PluginFrom, PluginKind, PluginSource, Quarantine,
};
use leeward_wasm::{
    AnswerPiece, AnswerTo, CallBody, CallError, Called, Chosen, Events, Facts, FlagValue, Flags, Host,
    MeshAnswer, MeshCall, RequestHead, Settings, Worker, log_lines,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::JoinSet;

/// Calls through the mesh that are kept.
const MAX_SEEN: usize = 10_000;

/// A worker of a host, with a module under as many names as are asked for.
pub(crate) struct Rig {
    host: Arc<Host>,
    pub(crate) worker: Worker,
    module: PathBuf,
    pub(crate) kind: PluginKind,
    told: Rc<Told>,
    calls: RefCell<UnboundedReceiver<MeshCall>>,
}

/// A module that is set up for a case.
pub(crate) struct Plugged {
    pub(crate) name: Arc<str>,
    pub(crate) spec: Arc<Plugin>,
    /// What the mesh answers it, and was asked.
    mesh: Mesh,
}

/// A mesh of canned answers.
#[derive(Default)]
struct Mesh {
    answers: Vec<Canned>,
    /// How often each of them was given.
    given: RefCell<Vec<usize>>,
    seen: Rc<RefCell<Vec<SeenCall>>>,
}

/// A call that was made through the mesh.
#[derive(Clone, Debug)]
pub(crate) struct SeenCall {
    pub(crate) service: String,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What the worker told.
#[derive(Default)]
struct Told {
    counted: RefCell<BTreeMap<(Arc<str>, String), u64>>,
    took: RefCell<BTreeMap<Arc<str>, Duration>>,
}

impl Events for Told {
    fn count(&self, plugin: &Arc<str>, name: &str, by: u64) {
        let mut counted = self.counted.borrow_mut();
        *counted.entry((Arc::clone(plugin), name.to_owned())).or_default() += by;
    }

    fn gauge(&self, _: &Arc<str>, _: &str, _: f64) {}

    fn observe(&self, _: &Arc<str>, _: &str, _: f64) {}

    fn called(&self, call: &Called<'_>) {
        *self.took.borrow_mut().entry(Arc::clone(call.plugin)).or_default() += call.took;
    }
}

#[derive(Debug)]
struct CaseFlags(BTreeMap<String, FlagValue>);

impl Flags for CaseFlags {
    fn value(&self, key: &str, _: &Facts, _: &RequestHead, _: Option<Cause>) -> Option<FlagValue> {
        self.0.get(key).cloned()
    }
}

pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Where compiled code is kept from one run to the next, if this user has a place for such things.
fn cache() -> Option<PathBuf> {
    let dir = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty());
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let dir = dir.map(PathBuf::from).or_else(home)?;
    dir.is_absolute().then(|| dir.join("leeward/compiled"))
}

/// The kind of policy that a module is of.
pub(crate) fn kind_of(module: &leeward_module::Module) -> PluginKind {
    match module.kind {
        leeward_module::Kind::Fallback => PluginKind::Fallback,
        leeward_module::Kind::Filter => PluginKind::Filter,
        leeward_module::Kind::Router => PluginKind::Router,
        leeward_module::Kind::WasiHttp => PluginKind::WasiHttp,
        leeward_module::Kind::ProxyWasm => PluginKind::ProxyWasm,
    }
}

impl Rig {
    /// A host for a module. Must be called on the thread and in the task set that it is for.
    pub(crate) fn new(module: &Path, kind: PluginKind) -> Result<Self, Failure> {
        why::watch();
        let host = Host::with(Settings {
            compiled: cache(),
            ..Settings::default()
        })?;
        let told = Rc::<Told>::default();
        let (mesh, calls) = mpsc::unbounded_channel();
        Ok(Self {
            worker: Worker::new(&host, Rc::<Told>::clone(&told), mesh),
            host,
            module: module.to_owned(),
            kind,
            told,
            calls: RefCell::new(calls),
        })
    }

    /// Sets the module up for a case, as a plugin of its own: with its own store, counters and instances. What it is
    /// compiled to is shared by all that are held.
    pub(crate) async fn plug(&self, case: &Case, fresh_instance: bool) -> Result<Plugged, Failure> {
        // Log lines are the process's, and told apart by name.
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let stem = self.module.file_stem().unwrap_or_default().to_string_lossy();
        let name: Arc<str> = format!("{stem}#{number}").into();
        let setup = &case.setup;
        let spec = Plugin {
            kind: self.kind,
            source: PluginSource {
                from: PluginFrom::File(self.module.display().to_string().into()),
                sha256: None,
                minisign_key: None,
            },
            config: setup.config.as_str().into(),
            limits: setup.limits,
            access: PluginAccess {
                services: setup.services.clone(),
                imports: setup.imports.clone(),
            },
            on_fault: if self.kind.is_rung() {
                OnFault::NextRung
            } else {
                OnFault::FailOpen
            },
            // A case is to see each fault, not what comes of many.
            quarantine: Quarantine {
                faults: u32::MAX,
                ..Quarantine::default()
            },
            fresh_instance,
            when: None,
            canary: None,
        };
        self.host
            .load(&name, &spec, self.module.clone(), None)
            .await
            .map_err(|error| Failure::BadInput(error.to_string()))?;
        for (key, value) in &case.store {
            self.host
                .put(&name, key, value.clone(), now())
                .map_err(|why| Failure::BadInput(format!("case {:?}: store: {key:?}: {why}", case.name)))?;
        }
        Ok(Plugged {
            name,
            spec: Arc::new(spec),
            mesh: Mesh {
                answers: case.calls.clone(),
                given: RefCell::new(vec![0; case.calls.len()]),
                seen: Rc::default(),
            },
        })
    }

    /// Has every plugin but this one forgotten, and all that they had.
    pub(crate) fn keep_only(&self, plugged: &Plugged) {
        self.host.retain(&[&plugged.name]);
        let known = |name: &Arc<str>| *name == plugged.name;
        self.told.counted.borrow_mut().retain(|(name, _), _| known(name));
        self.told.took.borrow_mut().retain(|name, _| known(name));
    }

    pub(crate) fn chosen(&self, plugged: &Plugged) -> Result<Chosen, leeward_wasm::Fault> {
        self.worker.choose(&plugged.name, &plugged.spec, false)
    }

    pub(crate) fn facts(case: &Case) -> Facts {
        let (context, began) = (&case.context, now());
        Facts {
            service: context.service.as_str().into(),
            route: context.route.as_str().into(),
            route_name: None,
            zone: context.zone.as_str().into(),
            proxy: "leeward".into(),
            peer: context.peer.as_deref().map(Into::into),
            address: context.address,
            protocol: "HTTP/1.1",
            config: case.setup.config.as_str().into(),
            deadline: Some(began + context.time_left),
            began,
            flags: Arc::new(CaseFlags(case.flags.clone())),
            origin: Arc::default(),
        }
    }

    /// Does something while the mesh answers.
    pub(crate) async fn with_mesh<T>(&self, plugged: &Plugged, asked: impl Future<Output = T>) -> T {
        if plugged.spec.access.services.is_empty() {
            return asked.await;
        }
        tokio::select! {
            biased;
            asked = asked => asked,
            // The worker, which is what asks, is there as long as this is.
            () = self.mesh(plugged) => std::future::pending().await,
        }
    }

    /// Answers what is asked of the mesh. Only one may do so at a time.
    pub(crate) async fn mesh(&self, plugged: &Plugged) {
        // They end with this. How many there are is bounded by maxCalls.
        let mut under_way = JoinSet::new();
        while let Some(call) = poll_fn(|context| self.calls.borrow_mut().poll_recv(context)).await {
            let (at, canned) = plugged.mesh.choose(&call);
            under_way.spawn_local(answer(call, canned, Rc::clone(&plugged.mesh.seen), at));
            while under_way.try_join_next().is_some() {}
        }
    }

    pub(crate) fn calls_of(&self, plugged: &Plugged) -> Vec<SeenCall> {
        plugged.mesh.seen.borrow().clone()
    }

    pub(crate) fn counters(&self, plugged: &Plugged) -> BTreeMap<String, u64> {
        let counted = self.told.counted.borrow();
        let of_plugin = counted.iter().filter(|((name, _), _)| *name == plugged.name);
        of_plugin.map(|((_, name), by)| (name.clone(), *by)).collect()
    }

    /// What all its calls took, with the time that they waited.
    pub(crate) fn took(&self, plugged: &Plugged) -> Duration {
        let took = self.told.took.borrow();
        took.get(&plugged.name).copied().unwrap_or_default()
    }

    /// The most linear memory that its instances had, in bytes.
    pub(crate) fn memory(&self, plugged: &Plugged) -> u64 {
        let reports = self.host.report(now());
        let report = reports.iter().find(|report| report.name == plugged.name);
        report.map_or(0, |report| report.peak_memory)
    }

    pub(crate) fn store(&self, plugged: &Plugged) -> BTreeMap<String, Bytes> {
        let entries = self.host.kept(&plugged.name, now()).into_iter();
        entries.map(|(key, value)| (key.to_string(), value)).collect()
    }

    /// The lines that it wrote, with their levels.
    pub(crate) fn log(plugged: &Plugged) -> Vec<String> {
        let (lines, _) = log_lines(Some(&plugged.name));
        let shown = |line: &leeward_wasm::LogLine| format!("{} {}", line.level, line.text);
        lines.iter().map(shown).collect()
    }

    /// Why its calls faulted, in the host's words.
    pub(crate) fn reasons(plugged: &Plugged) -> Vec<String> {
        why::reasons(&plugged.name)
    }

    /// How long it took to compile the module, and whether that had been done before.
    pub(crate) fn compiled(&self, plugged: &Plugged) -> Option<(Duration, bool)> {
        let reports = self.host.report(now());
        let report = reports.into_iter().find(|report| report.name == plugged.name)?;
        report.stable.map(|version| (version.compile, version.cached))
    }
}

impl Mesh {
    /// Notes a call, and finds the answer that is for it: of those that fit the one that was given least, in order.
    fn choose(&self, call: &MeshCall) -> (usize, Option<Canned>) {
        let mut seen = self.seen.borrow_mut();
        let at = seen.len();
        // Those that are asked for long are not to be looked at.
        if at < MAX_SEEN {
            seen.push(SeenCall {
                service: call.service.to_string(),
                method: call.method.to_string(),
                path: call.path.as_str().to_owned(),
                headers: call.headers.clone(),
                body: match &call.body {
                    CallBody::Whole(body) => body.clone(),
                    CallBody::Pieces(_) => Bytes::new(),
                },
            });
        }
        let fits = |canned: &Canned| {
            *canned.service == *call.service
                && canned.method.as_ref().is_none_or(|method| *method == call.method)
                && canned
                    .path
                    .as_deref()
                    .is_none_or(|path| path == call.path.as_str())
        };
        let mut given = self.given.borrow_mut();
        let fitting = self.answers.iter().zip(given.iter_mut());
        let least = fitting
            .filter(|(canned, _)| fits(canned))
            .min_by_key(|(_, times)| **times);
        let canned = least.map(|(canned, times)| {
            *times += 1;
            canned.clone()
        });
        (at, canned)
    }
}

/// Answers a call through the mesh. One for which there is no answer fails as if its service were down.
async fn answer(call: MeshCall, canned: Option<Canned>, seen: Rc<RefCell<Vec<SeenCall>>>, at: usize) {
    if let CallBody::Pieces(mut pieces) = call.body {
        while let Some(piece) = pieces.recv().await {
            if let Some(seen) = seen.borrow_mut().get_mut(at) {
                seen.body = [&*seen.body, &*piece].concat().into();
            }
        }
    }
    if let Some(canned) = &canned {
        tokio::time::sleep(canned.delay).await;
    }
    let answer = canned.map_or(Err(CallError::Failed), |canned| canned.answer);
    match call.answer {
        AnswerTo::Whole(to) => {
            let whole = answer.map(|message| MeshAnswer {
                status: message.status,
                headers: message.headers,
                body: message.body.concat().into(),
                trailers: HeaderMap::new(),
            });
            // The plugin may not wait for it any more.
            drop(to.send(whole));
        }
        AnswerTo::Pieces(to) => {
            for piece in pieces(answer) {
                if to.send(piece).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn pieces(answer: Result<Message, CallError>) -> Vec<AnswerPiece> {
    let message = match answer {
        Ok(message) => message,
        Err(error) => return vec![AnswerPiece::Failed(error)],
    };
    let mut pieces = vec![AnswerPiece::Head(message.status, message.headers)];
    pieces.extend(message.body.into_iter().map(AnswerPiece::Data));
    pieces.push(AnswerPiece::Trailers(HeaderMap::new()));
    pieces
}
