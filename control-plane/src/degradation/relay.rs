//! What proxies see, on its way from the control plane that they are connected to, to the one that judges.
//!
//! Each of the others writes what it heard in the last seconds under a key of its own, which goes when it is gone; the one that
//! judges reads them all. Only what triggers look at travels.

use crate::kv::{Kv, KvError, LeaseId, MAX_VALUE, Txn};
use crate::store::wire::{Batch, Heard, Signals};
use leeward_proto::v1;
use prost::Message;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

const PREFIX: &str = "signals/";
/// How long what a control plane wrote stays once it is gone.
const TTL: Duration = Duration::from_secs(15);
/// Batches that are there at once: one that judges reads every second, and may be late.
const BATCHES: usize = 4;
/// Bytes of one batch. What is beyond is lost, as a sample.
const MAX_BATCH: usize = MAX_VALUE / (BATCHES + 1);

/// What was heard here since the last post.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Services that triggers look at.
    wanted: HashSet<String>,
    batch: Vec<Signals>,
    bytes: usize,
}

impl Outbox {
    pub(super) fn want(&mut self, services: impl Iterator<Item = String>) {
        self.wanted = services.collect();
    }

    pub(super) fn add(&mut self, zone: &str, proxy: &str, signals: &v1::Signals) {
        let wanted = |s: &&v1::ServiceSignals| self.wanted.contains(&s.service);
        let services: Vec<_> = signals.services.iter().filter(wanted).cloned().collect();
        if services.is_empty() {
            return;
        }
        let signals = v1::Signals { services }.encode_to_vec();
        let size = signals.len() + zone.len() + proxy.len() + 16;
        if self.bytes + size > MAX_BATCH {
            return;
        }
        self.bytes += size;
        self.batch.push(Signals {
            zone: zone.to_owned(),
            proxy: proxy.to_owned(),
            signals,
        });
    }

    pub(super) fn take(&mut self) -> Vec<Signals> {
        self.bytes = 0;
        std::mem::take(&mut self.batch)
    }
}

/// Where a control plane that does not judge writes what it heard.
#[derive(Debug, Default)]
pub(super) struct Poster {
    sequence: u64,
    batches: VecDeque<Batch>,
    lease: Option<LeaseId>,
}

impl Poster {
    pub(super) async fn post(
        &mut self,
        kv: &Kv,
        member: &str,
        signals: Vec<Signals>,
        zones: &BTreeMap<String, bool>,
    ) -> Result<(), KvError> {
        self.sequence += 1;
        self.batches.push_back(Batch {
            sequence: self.sequence,
            signals,
        });
        while self.batches.len() > BATCHES {
            self.batches.pop_front();
        }
        let heard = Heard {
            batches: self.batches.iter().cloned().collect(),
            zones: zones.iter().map(|(zone, here)| (zone.clone(), *here)).collect(),
        };
        let is_due = self.sequence.is_multiple_of(4);
        let lease = match self.lease.filter(|_| !is_due) {
            Some(lease) => lease,
            None => match self.lease.take() {
                Some(lease) if kv.keep_alive(lease).await? => lease,
                Some(_) | None => kv.grant(TTL).await?,
            },
        };
        let put = Txn::default().put_leased(format!("{PREFIX}{member}"), heard.encode_to_vec(), lease);
        // A lease that can't be written with is not kept.
        kv.txn(put).await?;
        self.lease = Some(lease);
        Ok(())
    }
}

/// What the one that judges has read.
#[derive(Debug, Default)]
pub(super) struct Collector {
    /// By member, the last batch that was taken.
    taken: HashMap<String, u64>,
    /// Zones of proxies of others.
    pub(super) zones: BTreeMap<String, bool>,
}

impl Collector {
    /// What is new.
    pub(super) async fn collect(&mut self, kv: &Kv) -> Result<Vec<(String, String, v1::Signals)>, KvError> {
        let entries = kv.all(PREFIX).await?;
        let (mut news, mut taken) = (Vec::new(), HashMap::new());
        self.zones.clear();
        for entry in entries {
            let Ok(heard) = Heard::decode(&*entry.value) else {
                continue;
            };
            for (zone, is_here) in heard.zones {
                *self.zones.entry(zone).or_default() |= is_here;
            }
            let last = self.taken.get(&entry.key).copied().unwrap_or(0);
            let mut newest = last;
            for batch in heard.batches.into_iter().filter(|batch| batch.sequence > last) {
                newest = newest.max(batch.sequence);
                let signals = batch.signals.into_iter().filter_map(|signals| {
                    let decoded = v1::Signals::decode(&*signals.signals).ok()?;
                    Some((signals.zone, signals.proxy, decoded))
                });
                news.extend(signals);
            }
            taken.insert(entry.key, newest);
        }
        self.taken = taken;
        Ok(news)
    }
}
