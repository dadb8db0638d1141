//! A proxy's queues with a service that does as it is told.

use anyhow::{Context, ensure};
use leeward_policy::model::{Priority, Queue};
use leeward_queue::{
    Deliver, Delivered, Delivery, EntryId, EntryState, QueueReading, Queues, Refused, Settings, StoredRequest,
};
use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const QUEUE: &str = "orders";

/// Where queues are kept in a test.
pub(crate) trait Fixture: Sized + Send + Sync {
    /// `None` if it can't be had here, and needn't.
    async fn start() -> anyhow::Result<Option<Self>>;
    fn data(&self) -> Option<PathBuf>;
    /// A queue with short pauses.
    fn queue(&self) -> Queue;
}

/// On disk.
pub(crate) struct OnDisk(pub(crate) TempDir);

impl Fixture for OnDisk {
    async fn start() -> anyhow::Result<Option<Self>> {
        Ok(Some(Self(TempDir::new()?)))
    }

    fn data(&self) -> Option<PathBuf> {
        Some(self.0.0.clone())
    }

    fn queue(&self) -> Queue {
        quick()
    }
}

/// Pauses that a test can wait for.
pub(crate) fn quick() -> Queue {
    Queue {
        base_interval: Duration::from_millis(5),
        max_interval: Duration::from_millis(40),
        max_rate: 100_000,
        ..Queue::DEFAULT
    }
}

/// A directory of its own, deleted on drop.
pub(crate) struct TempDir(pub(crate) PathBuf);

impl TempDir {
    pub(crate) fn new() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("leeward-queue-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

type Script = Box<dyn FnMut(&Delivery) -> Delivered + Send>;

/// A service: answers as its script says, and keeps what it got.
pub(crate) struct Service {
    script: Mutex<Script>,
    latency: Mutex<Duration>,
    state: Mutex<Seen>,
}

#[derive(Default)]
pub(crate) struct Seen {
    /// What came, in order, with what it was answered.
    pub(crate) log: Vec<(Delivery, Delivered)>,
    /// Under way now, and at most.
    pub(crate) under_way: u32,
    pub(crate) most: u32,
    /// Keys under way.
    keys: HashMap<Arc<str>, u32>,
    /// Two of a key were under way at once.
    pub(crate) overlaps: u32,
}

impl Service {
    pub(crate) fn new(script: impl FnMut(&Delivery) -> Delivered + Send + 'static) -> Arc<Self> {
        Arc::new(Self {
            script: Mutex::new(Box::new(script)),
            latency: Mutex::default(),
            state: Mutex::default(),
        })
    }

    pub(crate) fn answering(status: u16) -> Arc<Self> {
        Self::new(move |_| Delivered::Answered { status })
    }

    pub(crate) fn down() -> Arc<Self> {
        Self::new(|_| not_sent())
    }

    pub(crate) fn script(&self, script: impl FnMut(&Delivery) -> Delivered + Send + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }

    pub(crate) fn answer(&self, status: u16) {
        self.script(move |_| Delivered::Answered { status });
    }

    pub(crate) fn take(&self, latency: Duration) {
        *self.latency.lock().unwrap() = latency;
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.state.lock().unwrap())
    }

    pub(crate) fn calls(&self) -> usize {
        self.with(|seen| seen.log.len())
    }

    /// The bodies of what was answered with a success, in order.
    pub(crate) fn served(&self) -> Vec<String> {
        self.with(|seen| {
            let good = |d: &Delivered| matches!(d, Delivered::Answered { status: 200..=399 });
            let served = seen.log.iter().filter(|(_, d)| good(d));
            served.map(|(d, _)| body(&d.request)).collect()
        })
    }
}

impl Deliver for Service {
    fn deliver(&self, delivery: Delivery) -> Pin<Box<dyn Future<Output = Delivered> + Send + '_>> {
        Box::pin(async move {
            {
                let mut seen = self.state.lock().unwrap();
                seen.under_way += 1;
                seen.most = seen.most.max(seen.under_way);
                if let Some(key) = delivery.request.key.clone() {
                    let of_key = seen.keys.entry(key).or_default();
                    *of_key += 1;
                    seen.overlaps += u32::from(*of_key > 1);
                }
            }
            let latency = *self.latency.lock().unwrap();
            if latency.is_zero() {
                tokio::task::yield_now().await;
            } else {
                tokio::time::sleep(latency).await;
            }
            let delivered = (self.script.lock().unwrap())(&delivery);
            let mut seen = self.state.lock().unwrap();
            seen.under_way -= 1;
            if let Some(key) = &delivery.request.key {
                *seen.keys.get_mut(key).unwrap() -= 1;
            }
            seen.log.push((delivery, delivered.clone()));
            delivered
        })
    }
}

pub(crate) fn not_sent() -> Delivered {
    Delivered::NotSent {
        why: "the circuit is open".into(),
        retry_after: None,
    }
}

pub(crate) fn failed(status: Option<u16>) -> Delivered {
    Delivered::Failed {
        why: "it failed".into(),
        status,
        retry_after: None,
    }
}

pub(crate) fn body(request: &StoredRequest) -> String {
    String::from_utf8(request.body.to_vec()).unwrap()
}

pub(crate) fn request(key: Option<&str>, body: &str) -> StoredRequest {
    StoredRequest {
        service: "payment".into(),
        route: "shop/0".into(),
        key: key.map(Arc::from),
        idempotency_key: format!("idem-{}", &body[..body.len().min(40)]).into(),
        method: "POST".to_owned(),
        target: "/orders?x=1".to_owned(),
        authority: "shop.example".to_owned(),
        headers: vec![("content-type".to_owned(), b"text/plain".to_vec())],
        body: body.to_owned().into(),
        priority: Priority::High,
        client: ([127, 0, 0, 1], 4711).into(),
        identity: None,
        from_outside: false,
    }
}

/// The queues of one proxy, being delivered until it is dropped.
pub(crate) struct Proxy {
    pub(crate) queues: Arc<Queues>,
    tasks: JoinSet<()>,
}

impl Proxy {
    /// Opened, and not delivering yet.
    pub(crate) async fn open<F: Fixture>(
        fixture: &F,
        queue: &Queue,
        service: &Arc<Service>,
    ) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let settings = Settings {
            data: fixture.data(),
            proxy: format!("proxy-{}", NEXT.fetch_add(1, Ordering::Relaxed)).into(),
            zone: "a".into(),
        };
        let queues = Queues::new(settings, Arc::clone(service) as Arc<dyn Deliver>);
        queues.reconcile(vec![(QUEUE.into(), Arc::new(queue.clone()))]);
        let tasks = JoinSet::new();
        Ok(Self { queues, tasks })
    }

    /// Delivering, or about to.
    pub(crate) async fn start<F: Fixture>(
        fixture: &F,
        queue: &Queue,
        service: &Arc<Service>,
    ) -> anyhow::Result<Self> {
        let mut proxy = Self::open(fixture, queue, service).await?;
        proxy.run();
        proxy.until("it is open", |reading| reading.available).await?;
        Ok(proxy)
    }

    pub(crate) fn run(&mut self) {
        self.tasks.spawn(Arc::clone(&self.queues).run());
    }

    pub(crate) async fn close(mut self) -> anyhow::Result<()> {
        tokio::time::timeout(PATIENCE, self.queues.close())
            .await
            .context("closing takes too long")?;
        while let Some(ended) = self.tasks.join_next().await {
            ended?;
        }
        Ok(())
    }

    pub(crate) async fn accept(&self, key: Option<&str>, body: &str) -> Result<EntryId, Refused> {
        let accepted = self.queues.accept(QUEUE, request(key, body)).await?;
        Ok(accepted.id)
    }

    pub(crate) fn reading(&self) -> QueueReading {
        self.queues.readings().pop().unwrap()
    }

    pub(crate) async fn state(&self, id: EntryId) -> Option<EntryState> {
        self.queues.status(&id).await.map(|status| status.state)
    }

    /// Waits until a reading is as wanted.
    pub(crate) async fn until(
        &self,
        what: &str,
        want: impl Fn(&QueueReading) -> bool,
    ) -> anyhow::Result<QueueReading> {
        let until = Instant::now() + PATIENCE;
        loop {
            let reading = self.reading();
            if want(&reading) {
                return Ok(reading);
            }
            ensure!(
                Instant::now() < until,
                "waited {PATIENCE:?} until {what}: {reading:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until so many have ended here, and nothing waits.
    pub(crate) async fn ended(&self, entries: u64) -> anyhow::Result<QueueReading> {
        // Numbers of the store and of this process change one after the other.
        self.until("all have ended", |r| {
            r.waiting == 0 && r.delivered_total + r.dead_total == entries
        })
        .await
    }

    /// Waits until nothing waits any more.
    pub(crate) async fn drained(&self) -> anyhow::Result<QueueReading> {
        self.until("nothing waits", |r| r.available && r.waiting == 0)
            .await
    }

    /// Waits until an entry's state is as wanted.
    pub(crate) async fn becomes(
        &self,
        id: EntryId,
        want: impl Fn(&Option<EntryState>) -> bool,
    ) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let state = self.state(id).await;
            if want(&state) {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "waited {PATIENCE:?}, and {id} is {state:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
