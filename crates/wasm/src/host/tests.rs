use super::*;
use crate::known::Known;
use crate::report::{PluginReport, VersionState};
use crate::version::TRIAL;
use crate::worker::{Called, Events};
use leeward_policy::model::{
    OnFault, PluginAccess, PluginCanary, PluginFrom, PluginLimits, PluginSource, Quarantine,
};
use std::path::Path;
use std::time::Duration;

/// Nobody watches.
struct Unwatched;

impl Events for Unwatched {
    fn count(&self, _: &Arc<str>, _: &str, _: u64) {}
    fn gauge(&self, _: &Arc<str>, _: &str, _: f64) {}
    fn observe(&self, _: &Arc<str>, _: &str, _: f64) {}
    fn called(&self, _: &Called<'_>) {}
}

/// Three modules that differ.
const ONE: &str = "static-json.wasm";
const TWO: &str = "misbehave.wasm";
const THREE: &str = "recommendations-fallback.wasm";

fn built(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../plugins/built")
        .join(file)
}

fn spec() -> Plugin {
    Plugin {
        kind: PluginKind::Fallback,
        source: PluginSource {
            from: PluginFrom::Store,
            sha256: None,
            minisign_key: None,
        },
        config: "".into(),
        limits: PluginLimits::of(PluginKind::Fallback),
        access: PluginAccess::default(),
        on_fault: OnFault::NextRung,
        quarantine: Quarantine {
            faults: 2,
            window: Duration::from_secs(60),
            duration: Duration::from_secs(3600),
        },
        fresh_instance: false,
        when: None,
        canary: None,
    }
}

/// A plugin `p` on a host of its own.
struct Rig {
    host: Arc<Host>,
    spec: Plugin,
}

impl Rig {
    async fn new(file: &str) -> Self {
        let rig = Self {
            host: Host::new().unwrap(),
            spec: spec(),
        };
        rig.load(file).await;
        rig
    }

    async fn load(&self, file: &str) {
        self.host.load("p", &self.spec, built(file), None).await.unwrap();
    }

    fn choose(&self) -> Result<Arc<Version>, Fault> {
        self.of(&self.spec, false)
    }

    fn of(&self, spec: &Plugin, canary: bool) -> Result<Arc<Version>, Fault> {
        admitted(&self.host, "p", spec, canary).map(|admitted| admitted.version)
    }

    fn report(&self) -> PluginReport {
        self.host.report(now()).remove(0)
    }
}

fn admitted(host: &Host, name: &str, spec: &Plugin, canary: bool) -> Result<Admitted, Fault> {
    let loaded = host.loaded(name, spec).ok_or(Fault::NotLoaded)?;
    host.choose(name, spec, &loaded, canary)
}

fn fault(version: &Version) {
    for _ in 0..2 {
        version.ended(&Unwatched, "on-failure", Err(Fault::Trap), Duration::ZERO);
    }
}

#[tokio::test]
async fn a_new_version_takes_the_place_of_the_old_one_which_ends_what_it_began() {
    let rig = Rig::new(ONE).await;
    let old = rig.choose().unwrap();
    rig.load(TWO).await;
    let new = rig.choose().unwrap();
    assert_ne!(old.digest, new.digest);
    assert!(
        Arc::ptr_eq(&old.shared, &new.shared),
        "what it keeps is the plugin's"
    );
    rig.load(TWO).await;
    assert!(
        Arc::ptr_eq(&new, &rig.choose().unwrap()),
        "the same module is the same version"
    );
}

#[tokio::test]
async fn a_version_that_cannot_be_loaded_leaves_the_old_one() {
    let rig = Rig::new(ONE).await;
    let old = rig.choose().unwrap();
    let missing = rig.host.load("p", &rig.spec, "/nowhere.wasm".into(), None).await;
    let error = missing.unwrap_err().to_string();
    assert!(
        error.starts_with("spec.source: can't read /nowhere.wasm: "),
        "{error}"
    );
    assert!(Arc::ptr_eq(&old, &rig.choose().unwrap()));
    let report = rig.report();
    assert_eq!(report.progress, Progress::Failed(error));
    assert_eq!(
        report.stable.unwrap().digest,
        crate::precompiled::hex(&old.digest)
    );
    // Nor does one that never was anything.
    let first = rig.host.load("q", &rig.spec, "/nowhere.wasm".into(), None).await;
    assert!(first.is_err() && !rig.host.has("q"));
    assert!(rig.host.loaded("q", &rig.spec).is_none());
}

#[tokio::test]
async fn what_a_worker_knows_is_what_is() {
    let rig = Rig::new(ONE).await;
    let (spec, mut known) = (Arc::new(rig.spec.clone()), Known::default());
    let mut know = |spec: &Arc<Plugin>| {
        let loaded = known.loaded(&rig.host, "p", spec);
        loaded.map(|loaded| Arc::clone(&loaded.stable))
    };
    let old = know(&spec).unwrap();
    assert!(Arc::ptr_eq(&old, &know(&spec).unwrap()));
    assert!(Arc::ptr_eq(&old, &know(&Arc::new(rig.spec.clone())).unwrap()));
    rig.load(TWO).await;
    let new = know(&spec).unwrap();
    assert_ne!(old.digest, new.digest);
    // Taken back, by whoever is the first to see that it faults.
    fault(&new);
    assert!(Arc::ptr_eq(&old, &rig.choose().unwrap()));
    assert!(Arc::ptr_eq(&old, &know(&spec).unwrap()));
    rig.host.retain(&[]);
    assert!(know(&spec).is_none());
    rig.load(ONE).await;
    assert!(know(&spec).is_some());
}

#[tokio::test]
async fn a_new_version_that_faults_is_taken_back() {
    let rig = Rig::new(ONE).await;
    let good = rig.choose().unwrap();
    rig.load(TWO).await;
    let bad = rig.choose().unwrap();
    fault(&bad);
    assert!(Arc::ptr_eq(&good, &rig.choose().unwrap()));
    let report = rig.report();
    assert_eq!(
        report.returned_from.as_deref(),
        Some(&*crate::precompiled::hex(&bad.digest))
    );
    assert_eq!(report.returns, 1);

    // Policy says the same once more, with other settings.
    rig.load(TWO).await;
    assert!(Arc::ptr_eq(&good, &rig.choose().unwrap()));
    assert!(rig.report().returned_from.is_some());

    rig.load(THREE).await;
    let third = rig.choose().unwrap();
    assert_ne!(third.digest, good.digest);
    assert_eq!(rig.report().returned_from, None);
    fault(&third);
    assert!(
        Arc::ptr_eq(&good, &rig.choose().unwrap()),
        "the last good one is still there"
    );
}

#[tokio::test]
async fn one_that_has_proved_itself_is_left_alone_when_it_faults() {
    let rig = Rig::new(ONE).await;
    rig.load(TWO).await;
    assert!(rig.report().previous.is_some());
    rig.host.tend(now() + TRIAL);
    assert!(rig.report().previous.is_none());
    let version = rig.choose().unwrap();
    fault(&version);
    assert!(matches!(rig.choose(), Err(Fault::Quarantined)));
    let stable = rig.report().stable.unwrap();
    assert!(
        matches!(stable.state, VersionState::Quarantined(left) if left > Duration::from_secs(3000)),
        "{stable:?}"
    );
    assert_eq!((stable.calls, stable.quarantines), (2, 1));
    assert_eq!(stable.faults, [(Fault::Trap, 2)]);
}

#[tokio::test]
async fn a_canary_that_faults_leaves_its_requests_to_the_stable_one() {
    let mut rig = Rig::new(ONE).await;
    rig.spec.canary = Some(PluginCanary {
        source: rig.spec.source.clone(),
        percent: 10,
        when: None,
    });
    rig.host
        .load("p", &rig.spec, built(ONE), Some(built(TWO)))
        .await
        .unwrap();
    let (stable, canary) = (rig.choose().unwrap(), rig.of(&rig.spec, true).unwrap());
    assert_ne!(stable.digest, canary.digest);
    fault(&canary);
    assert!(Arc::ptr_eq(&stable, &rig.of(&rig.spec, true).unwrap()));
    assert!(Arc::ptr_eq(&stable, &rig.choose().unwrap()));
    // Made the stable one, it is what it was.
    rig.spec.canary = None;
    rig.load(TWO).await;
    assert!(
        Arc::ptr_eq(&stable, &rig.choose().unwrap()),
        "it was quarantined already"
    );
}

#[tokio::test]
async fn of_two_loads_the_later_one_counts() {
    let rig = Rig::new(ONE).await;
    let loads = tokio::join!(
        rig.host.load("p", &rig.spec, built(TWO), None),
        rig.host.load("p", &rig.spec, built(ONE), None),
    );
    assert!(loads.0.is_ok() && loads.1.is_ok());
    let one = rig.choose().unwrap();
    assert_eq!(one.digest, Rig::new(ONE).await.choose().unwrap().digest);
    // What policy has forgotten meanwhile doesn't come back.
    let (loaded, ()) = tokio::join!(rig.host.load("p", &rig.spec, built(THREE), None), async {
        rig.host.retain(&[]);
    });
    loaded.unwrap();
    assert!(matches!(rig.choose(), Err(Fault::NotLoaded)));
}

#[tokio::test]
async fn plugins_with_the_same_module_share_its_code_and_nothing_else() {
    let rig = Rig::new(ONE).await;
    rig.host.load("q", &rig.spec, built(ONE), None).await.unwrap();
    let (p, q) = (
        rig.choose().unwrap(),
        admitted(&rig.host, "q", &rig.spec, false).unwrap(),
    );
    assert!(Arc::ptr_eq(&p.code, &q.version.code));
    assert!(q.version.made.cached && !p.made.cached);
    fault(&p);
    assert!(rig.choose().is_err() && admitted(&rig.host, "q", &rig.spec, false).is_ok());
}

#[tokio::test]
async fn compiled_code_outlives_the_process_unless_it_is_broken() {
    let dir = std::env::temp_dir().join(format!("leeward-host-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    let start = async || {
        let settings = Settings {
            compiled: Some(dir.clone()),
            ..Settings::default()
        };
        let host = Host::with(settings).unwrap();
        host.load("p", &spec(), built(ONE), None).await.unwrap();
        admitted(&host, "p", &spec(), false).unwrap().version.made.cached
    };
    assert!(!start().await);
    assert!(start().await);
    let file = std::fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&file, bytes).unwrap();
    assert!(!start().await, "what is broken is not run");
    assert!(start().await, "and is replaced");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[tokio::test]
async fn a_request_gets_the_version_of_the_policy_that_it_has() {
    let mut rig = Rig::new(ONE).await;
    let before = rig.spec.clone();
    let one = rig.choose().unwrap();
    rig.spec.config = "for the second".into();
    rig.load(TWO).await;
    let with = |spec: &Plugin| rig.of(spec, false);
    // The new policy is not live yet, and some requests have the one before when it is.
    assert!(Arc::ptr_eq(&one, &with(&before).unwrap()));
    assert!(rig.host.serves("p", &one));
    let two = with(&rig.spec).unwrap();
    assert_ne!(one.digest, two.digest);
    assert!(Arc::ptr_eq(&one, &with(&before).unwrap()));
    assert!(rig.host.serves("p", &two) && !rig.host.serves("p", &one));
    // What was good under the policy before still takes the place of one that isn't.
    fault(&two);
    assert!(Arc::ptr_eq(&one, &with(&rig.spec).unwrap()));
    assert!(Arc::ptr_eq(&one, &with(&before).unwrap()));
    assert_eq!(rig.report().returns, 1);
}

#[tokio::test]
async fn a_policy_that_was_never_live_is_no_last_good_one() {
    let mut rig = Rig::new(ONE).await;
    let (one, first) = (rig.choose().unwrap(), rig.spec.clone());
    for (config, file) in [("b", TWO), ("c", THREE), ("d", TWO), ("e", THREE)] {
        rig.spec.config = config.into();
        rig.load(file).await;
        assert!(Arc::ptr_eq(&one, &rig.of(&first, false).unwrap()));
    }
    let three = rig.choose().unwrap();
    fault(&three);
    assert!(Arc::ptr_eq(&one, &rig.choose().unwrap()));
    // In time the first policy is nobody's any more; whoever has it all the same gets what is live.
    rig.host.tend(now() + TRIAL);
    assert!(
        Arc::ptr_eq(&one, &rig.of(&first, false).unwrap()),
        "it runs in the place of the new one"
    );
    rig.spec.config = "f".into();
    rig.load(TWO).await;
    let two = rig.choose().unwrap();
    rig.host.tend(now() + TRIAL);
    assert!(Arc::ptr_eq(&two, &rig.of(&first, false).unwrap()));
}

#[tokio::test]
async fn a_canary_goes_with_its_policy() {
    let mut rig = Rig::new(ONE).await;
    let (one, before) = (rig.choose().unwrap(), rig.spec.clone());
    rig.spec.config = "for the second".into();
    rig.spec.canary = Some(PluginCanary {
        source: rig.spec.source.clone(),
        percent: 10,
        when: None,
    });
    rig.host
        .load("p", &rig.spec, built(ONE), Some(built(TWO)))
        .await
        .unwrap();
    assert!(Arc::ptr_eq(&one, &rig.of(&before, true).unwrap()));
    let canary = rig.of(&rig.spec, true).unwrap();
    assert_ne!(one.digest, canary.digest);
    assert!(
        Arc::ptr_eq(&one, &rig.choose().unwrap()),
        "the same module is the same version"
    );
    assert!(Arc::ptr_eq(&one, &rig.of(&before, true).unwrap()));
}

#[tokio::test]
async fn a_module_that_is_known_is_checked_again() {
    let mut rig = Rig::new(ONE).await;
    let (one, before) = (rig.choose().unwrap(), rig.spec.clone());
    rig.spec.access.imports = vec!["acme:*".into()];
    let refused = rig.host.load("p", &rig.spec, built(ONE), None).await;
    assert!(matches!(refused, Err(LoadError::Import { .. })), "{refused:?}");
    rig.spec = before;
    rig.spec.source.from = PluginFrom::File(built(ONE).display().to_string().into());
    rig.spec.source.minisign_key = Some("RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3".into());
    let refused = rig.host.load("p", &rig.spec, built(ONE), None).await;
    assert!(matches!(refused, Err(LoadError::Signature { .. })), "{refused:?}");
    assert!(Arc::ptr_eq(&one, &rig.choose().unwrap()), "what was there stays");
}
