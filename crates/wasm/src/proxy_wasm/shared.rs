//! What the virtual machines of a plugin share in a process, beside the key-value store: queues and metrics.

use super::abi::Status;
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Queues of a plugin.
const MAX_QUEUES: usize = 64;
/// Bytes of the name of a queue or a metric.
const MAX_NAME: usize = 256;
/// Metrics of a plugin; what comes after counts together, under one name for each kind.
const MAX_METRICS: usize = 100;
/// Bytes of the name that a metric is exported under.
const MAX_EXPORTED: usize = 63;
/// What an item of a queue takes beside its bytes.
const OVERHEAD: u64 = 64;

/// Queues and metrics.
#[derive(Default)]
pub(crate) struct Shared {
    // Poison is harmless: every change is whole.
    queues: Mutex<Queues>,
    metrics: Mutex<Metrics>,
}

impl Shared {
    pub(crate) fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn metrics(&self) -> MutexGuard<'_, Metrics> {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queues of a plugin. A queue is known by its number, from 1 on.
#[derive(Default)]
pub(crate) struct Queues {
    numbers: HashMap<Box<str>, u32>,
    queues: Vec<Queue>,
    bytes: u64,
    items: u64,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Bytes>,
    /// Who wants to know of what comes, the first of them that is alive.
    readers: Vec<Reader>,
}

/// A root context that is to be told when there is something in a queue.
#[derive(Clone)]
pub(crate) struct Reader {
    pub(crate) root: u32,
    pub(crate) ready: mpsc::Sender<Ready>,
}

/// There is something in a queue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Ready {
    pub(crate) root: u32,
    pub(crate) queue: u32,
}

impl Queues {
    /// The number of a queue, made if it isn't there; `reader` is told of what comes.
    pub(crate) fn register(&mut self, name: &str, reader: Reader) -> Result<u32, Status> {
        let known = self.numbers.get(name).copied();
        let number = match known {
            Some(number) => number,
            None => {
                if self.queues.len() >= MAX_QUEUES || name.len() > MAX_NAME {
                    return Err(Status::InternalFailure);
                }
                self.queues.push(Queue::default());
                let number = u32::try_from(self.queues.len()).map_err(|_| Status::InternalFailure)?;
                self.numbers.insert(name.into(), number);
                number
            }
        };
        if let Some(queue) = self.queue(number) {
            let first = queue.reader().is_none();
            let same = |known: &Reader| known.root == reader.root && known.ready.same_channel(&reader.ready);
            if !queue.readers.iter().any(same) {
                queue.readers.push(reader);
            }
            if first {
                // What nobody was told of.
                for _ in 0..queue.items.len() {
                    queue.tell(number);
                }
            }
        }
        Ok(number)
    }

    /// The number of a queue that is there.
    pub(crate) fn resolve(&self, name: &str) -> Result<u32, Status> {
        self.numbers.get(name).copied().ok_or(Status::NotFound)
    }

    /// Puts an item behind the others. If there is no room within `max_bytes` and `max_items` for all queues together, the
    /// oldest of this queue go, and how many is the result.
    pub(crate) fn enqueue(
        &mut self,
        number: u32,
        item: Bytes,
        max_bytes: u64,
        max_items: u32,
    ) -> Result<u64, Status> {
        let size = size(&item);
        let mut dropped = 0;
        self.queue(number).ok_or(Status::NotFound)?;
        // For one that finds no room in an empty queue nothing else goes.
        if size > max_bytes || max_items == 0 {
            return Err(Status::InternalFailure);
        }
        while self.bytes + size > max_bytes || self.items >= u64::from(max_items) {
            match self.dequeue(number) {
                Ok(_) => dropped += 1,
                // Other queues have the room.
                Err(_) => return Ok(dropped + 1),
            }
        }
        self.bytes += size;
        self.items += 1;
        if let Some(queue) = self.queue(number) {
            queue.items.push_back(item);
            queue.tell(number);
        }
        Ok(dropped)
    }

    /// Takes the first item.
    pub(crate) fn dequeue(&mut self, number: u32) -> Result<Bytes, Status> {
        let queue = self.queue(number).ok_or(Status::NotFound)?;
        let item = queue.items.pop_front().ok_or(Status::Empty)?;
        self.bytes = self.bytes.saturating_sub(size(&item));
        self.items = self.items.saturating_sub(1);
        Ok(item)
    }

    fn queue(&mut self, number: u32) -> Option<&mut Queue> {
        self.queues.get_mut((number as usize).checked_sub(1)?)
    }
}

impl Queue {
    fn reader(&mut self) -> Option<&Reader> {
        self.readers.retain(|reader| !reader.ready.is_closed());
        self.readers.first()
    }

    fn tell(&mut self, queue: u32) {
        if let Some(reader) = self.reader() {
            let root = reader.root;
            // One that has so much to read already finds this, too.
            let _ = reader.ready.try_send(Ready { root, queue });
        }
    }
}

/// What an item takes.
const fn size(item: &Bytes) -> u64 {
    // Lengths fit.
    item.len() as u64 + OVERHEAD
}

/// What kind of metric.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

impl MetricKind {
    pub(crate) const fn of(number: u32) -> Result<Self, Status> {
        match number {
            0 => Ok(Self::Counter),
            1 => Ok(Self::Gauge),
            2 => Ok(Self::Histogram),
            _ => Err(Status::BadArgument),
        }
    }
}

/// The metrics of a plugin. A metric is known by its number, from 1 on.
#[derive(Default)]
pub(crate) struct Metrics {
    numbers: HashMap<(MetricKind, Box<[u8]>), u32>,
    metrics: Vec<Metric>,
}

struct Metric {
    kind: MetricKind,
    name: Arc<str>,
    value: u64,
}

/// What is to be exported.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mark {
    pub(crate) name: Arc<str>,
    pub(crate) what: Marked,
}

/// What happened to a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Marked {
    Count(u64),
    Gauge(u64),
    Observe(u64),
}

impl Metrics {
    /// The number of a metric, made if it isn't there.
    pub(crate) fn define(&mut self, kind: MetricKind, name: &[u8]) -> Result<u32, Status> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Status::BadArgument);
        }
        let full = self.numbers.len() >= MAX_METRICS;
        // Guests take a refusal badly: what finds no room counts with others.
        let overflow = &b"overflow"[..];
        let known = |name: &[u8]| self.numbers.get(&(kind, name.into())).copied();
        let name = match known(name) {
            Some(number) => return Ok(number),
            None if full => overflow,
            None => name,
        };
        if let Some(number) = known(name) {
            return Ok(number);
        }
        self.metrics.push(Metric {
            kind,
            name: exported(name).into(),
            value: 0,
        });
        let number = u32::try_from(self.metrics.len()).map_err(|_| Status::InternalFailure)?;
        self.numbers.insert((kind, name.into()), number);
        Ok(number)
    }

    /// Adds to a counter or a gauge.
    pub(crate) fn increment(&mut self, number: u32, by: i64) -> Result<Mark, Status> {
        let metric = self.metric(number)?;
        let what = match metric.kind {
            MetricKind::Counter => {
                let by = u64::try_from(by).map_err(|_| Status::BadArgument)?;
                metric.value = metric.value.saturating_add(by);
                Marked::Count(by)
            }
            MetricKind::Gauge => {
                metric.value = metric.value.saturating_add_signed(by);
                Marked::Gauge(metric.value)
            }
            MetricKind::Histogram => return Err(Status::BadArgument),
        };
        Ok(metric.mark(what))
    }

    /// Adds to a counter, sets a gauge, or gives a histogram a value.
    pub(crate) fn record(&mut self, number: u32, value: u64) -> Result<Mark, Status> {
        let metric = self.metric(number)?;
        let what = match metric.kind {
            MetricKind::Counter => {
                metric.value = metric.value.saturating_add(value);
                Marked::Count(value)
            }
            MetricKind::Gauge => {
                metric.value = value;
                Marked::Gauge(value)
            }
            MetricKind::Histogram => Marked::Observe(value),
        };
        Ok(metric.mark(what))
    }

    /// The value of a counter or a gauge.
    pub(crate) fn value(&mut self, number: u32) -> Result<u64, Status> {
        let metric = self.metric(number)?;
        match metric.kind {
            MetricKind::Counter | MetricKind::Gauge => Ok(metric.value),
            MetricKind::Histogram => Err(Status::BadArgument),
        }
    }

    fn metric(&mut self, number: u32) -> Result<&mut Metric, Status> {
        let at = (number as usize).checked_sub(1);
        at.and_then(|at| self.metrics.get_mut(at)).ok_or(Status::NotFound)
    }
}

impl Metric {
    fn mark(&self, what: Marked) -> Mark {
        Mark {
            name: Arc::clone(&self.name),
            what,
        }
    }
}

/// The name that a metric is exported under: lower case, digits and "_".
fn exported(name: &[u8]) -> String {
    let clean = |b: &u8| match b.to_ascii_lowercase() {
        b @ (b'a'..=b'z' | b'0'..=b'9') => char::from(b),
        _ => '_',
    };
    name.iter().take(MAX_EXPORTED).map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(root: u32, room: usize) -> (Reader, mpsc::Receiver<Ready>) {
        let (ready, receiver) = mpsc::channel(room);
        (Reader { root, ready }, receiver)
    }

    #[test]
    fn queues_are_read_in_order_by_whoever_lives() {
        let mut queues = Queues::default();
        let (first, mut told_first) = reader(1, 8);
        let (second, mut told_second) = reader(2, 8);
        let number = queues.register("q", first).unwrap();
        assert_eq!(queues.register("q", second), Ok(number));
        assert_eq!(queues.resolve("q"), Ok(number));
        assert_eq!(queues.resolve("r"), Err(Status::NotFound));
        for item in ["a", "b"] {
            assert_eq!(queues.enqueue(number, item.into(), 999, 9), Ok(0));
        }
        let ready = |root| Ready { root, queue: number };
        assert_eq!(
            (told_first.try_recv(), told_first.try_recv()),
            (Ok(ready(1)), Ok(ready(1)))
        );
        assert!(told_second.try_recv().is_err());
        drop(told_first);
        assert_eq!(queues.enqueue(number, "c".into(), 999, 9), Ok(0));
        assert_eq!(told_second.try_recv(), Ok(ready(2)));
        for item in ["a", "b", "c"] {
            assert_eq!(queues.dequeue(number).unwrap(), item);
        }
        assert_eq!(queues.dequeue(number), Err(Status::Empty));
        assert_eq!(queues.dequeue(7), Err(Status::NotFound));
        assert_eq!(queues.enqueue(0, "x".into(), 999, 9), Err(Status::NotFound));
        // Whoever comes after all are gone is told of what is there.
        drop(told_second);
        queues.enqueue(number, "d".into(), 999, 9).unwrap();
        let (third, mut told) = reader(3, 8);
        queues.register("q", third).unwrap();
        assert_eq!(told.try_recv(), Ok(ready(3)));
    }

    #[test]
    fn queues_have_bounds_and_the_oldest_go() {
        let mut queues = Queues::default();
        let (reader, _told) = reader(1, 1);
        let a = queues.register("a", reader.clone()).unwrap();
        let b = queues.register("b", reader.clone()).unwrap();
        let bytes = 3 * (OVERHEAD + 1);
        for item in ["1", "2", "3"] {
            assert_eq!(queues.enqueue(a, item.into(), bytes, 9), Ok(0));
        }
        assert_eq!(queues.enqueue(a, "4".into(), bytes, 9), Ok(1));
        assert_eq!(
            queues.enqueue(b, "5".into(), bytes, 9),
            Ok(1),
            "a has all the room"
        );
        let large = Bytes::from(vec![0; 4 * 65]);
        assert_eq!(queues.enqueue(a, large, bytes, 9), Err(Status::InternalFailure));
        assert_eq!(
            queues.enqueue(a, "0".into(), bytes, 0),
            Err(Status::InternalFailure)
        );
        assert_eq!(queues.dequeue(b), Err(Status::Empty));
        assert_eq!(queues.dequeue(a).unwrap(), "2", "nothing went for them");
        assert_eq!(queues.enqueue(b, "5".into(), 999, 3), Ok(0));
        assert_eq!(queues.enqueue(b, "6".into(), 999, 3), Ok(1));
        assert_eq!((queues.items, queues.bytes), (3, bytes));
        for n in 2..MAX_QUEUES {
            queues.register(&n.to_string(), reader.clone()).unwrap();
        }
        assert_eq!(queues.register("more", reader), Err(Status::InternalFailure));
    }

    #[test]
    fn metrics_are_few_and_have_clean_names() {
        let mut metrics = Metrics::default();
        let counter = metrics.define(MetricKind::Counter, b"My.Counter-1").unwrap();
        let gauge = metrics.define(MetricKind::Gauge, b"My.Counter-1").unwrap();
        let histogram = metrics
            .define(MetricKind::Histogram, "h\u{e9}".as_bytes())
            .unwrap();
        assert_eq!(metrics.define(MetricKind::Counter, b"My.Counter-1"), Ok(counter));
        let mark = |name: &str, what| {
            Ok(Mark {
                name: name.into(),
                what,
            })
        };
        assert_eq!(
            metrics.increment(counter, 2),
            mark("my_counter_1", Marked::Count(2))
        );
        assert_eq!(metrics.record(counter, 3), mark("my_counter_1", Marked::Count(3)));
        assert_eq!(metrics.value(counter), Ok(5));
        assert_eq!(metrics.increment(counter, -1), Err(Status::BadArgument));
        assert_eq!(metrics.record(gauge, 3), mark("my_counter_1", Marked::Gauge(3)));
        assert_eq!(
            metrics.increment(gauge, -2),
            mark("my_counter_1", Marked::Gauge(1))
        );
        assert_eq!(metrics.record(histogram, 7), mark("h__", Marked::Observe(7)));
        assert_eq!(metrics.increment(histogram, 1), Err(Status::BadArgument));
        assert_eq!(metrics.value(histogram), Err(Status::BadArgument));
        assert_eq!(metrics.value(99), Err(Status::NotFound));
        assert_eq!(metrics.define(MetricKind::Counter, b""), Err(Status::BadArgument));
        for n in 3..MAX_METRICS {
            metrics
                .define(MetricKind::Counter, n.to_string().as_bytes())
                .unwrap();
        }
        let more = metrics.define(MetricKind::Counter, b"more").unwrap();
        assert_eq!(metrics.define(MetricKind::Counter, b"even more"), Ok(more));
        assert_eq!(metrics.record(more, 1), mark("overflow", Marked::Count(1)));
        assert_eq!(metrics.define(MetricKind::Counter, b"My.Counter-1"), Ok(counter));
        metrics.define(MetricKind::Gauge, b"one more").unwrap();
        assert!(metrics.metrics.len() <= MAX_METRICS + 3);
    }
}
