//! What goes wrong, one thing after another, by a seed.

use crate::kit::{SOON, World};
use crate::lease;
use anyhow::{Context, bail, ensure};
use fastrand::Rng;
use leeward_control::store::Store;
use leeward_testkit::eventually;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// What goes wrong. Most members of etcd and one control plane are always there.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Fault {
    /// `kill -9` for the leader of etcd.
    KillEtcd,
    /// The leader of etcd is cut off from the others, not from its clients.
    CutLeader,
    /// Another member is.
    CutFollower,
    /// The leader of etcd stops for a while.
    FreezeEtcd,
    /// `kill -9` for each control plane in turn.
    KillControl,
    /// The control plane that judges degradation stops for a while; in a long storm for longer than its lease.
    FreezeControl,
    /// Who has the test's job stops for longer than its lease.
    FreezeHolder,
    /// `kill -9` for who has the test's job.
    KillHolder,
    /// Two control planes and a member of etcd at once.
    KillTwo,
}

const ALL: [Fault; 9] = [
    Fault::KillEtcd,
    Fault::CutLeader,
    Fault::CutFollower,
    Fault::FreezeEtcd,
    Fault::KillControl,
    Fault::FreezeControl,
    Fault::FreezeHolder,
    Fault::KillHolder,
    Fault::KillTwo,
];

/// A storm, and what it has done.
pub struct Nemesis {
    rng: Rng,
    turn: usize,
    /// For longer than control planes' leases.
    is_long: bool,
    pub done: BTreeMap<Fault, usize>,
}

impl Nemesis {
    pub fn new(seed: u64, is_long: bool) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            turn: 0,
            is_long,
            done: BTreeMap::new(),
        }
    }

    /// Each fault once, in random order, and again, until the time is over.
    pub async fn storm(&mut self, world: &mut World, observer: &Store, until: Instant) -> anyhow::Result<()> {
        loop {
            let mut faults = ALL;
            self.rng.shuffle(&mut faults);
            for fault in faults {
                if Instant::now() >= until {
                    return Ok(());
                }
                let begun = Instant::now();
                self.strike(fault, world, observer).await?;
                eprintln!("{fault:?}, {:.1?}", begun.elapsed());
                *self.done.entry(fault).or_default() += 1;
                self.rest(500..1500).await;
            }
        }
    }

    async fn rest(&mut self, ms: std::ops::Range<u64>) {
        tokio::time::sleep(Duration::from_millis(self.rng.u64(ms))).await;
    }

    /// The leader of etcd, or anybody where there is none just now.
    async fn leader(&mut self, world: &World) -> usize {
        let leader = world.etcd.leader().await;
        leader.unwrap_or_else(|| self.rng.usize(..world.etcd.len()))
    }

    fn next_control(&mut self, world: &World) -> usize {
        self.turn += 1;
        self.turn % world.controls.len()
    }

    async fn strike(&mut self, fault: Fault, world: &mut World, observer: &Store) -> anyhow::Result<()> {
        match fault {
            Fault::KillEtcd => {
                let member = self.leader(world).await;
                world.etcd.kill9(member)?;
                self.rest(2000..4000).await;
                world.etcd.restart(member)?;
                world.etcd.ready(member).await
            }
            Fault::CutLeader => {
                let member = self.leader(world).await;
                world.etcd.cut(member)?;
                self.rest(3000..7000).await;
                // The others can't hear it: they have another by now, or will.
                eventually("another leader", SOON, || async {
                    let leader = world.etcd.leader().await.context("no leader")?;
                    ensure!(leader != member, "{member} leads and is cut off");
                    Ok(())
                })
                .await?;
                world.etcd.heal(member)?;
                world.etcd.ready(member).await
            }
            Fault::CutFollower => {
                let member = (self.leader(world).await + 1 + self.rng.usize(..2)) % world.etcd.len();
                world.etcd.cut(member)?;
                self.rest(3000..7000).await;
                world.etcd.heal(member)?;
                world.etcd.ready(member).await
            }
            Fault::FreezeEtcd => {
                let member = self.leader(world).await;
                world.etcd.freeze(member)?;
                self.rest(3000..6000).await;
                world.etcd.thaw(member)?;
                world.etcd.ready(member).await
            }
            Fault::KillControl => {
                let place = self.next_control(world);
                world.controls[place].process.take().unwrap().kill9()?;
                self.rest(1000..3000).await;
                world.start_control(place).await
            }
            Fault::FreezeControl => {
                let place = judge(world, observer)
                    .await
                    .unwrap_or_else(|| self.rng.usize(..3));
                world.signal_control(place, Signal::STOP)?;
                let pause = if self.is_long { 12_000..15_000 } else { 3000..5000 };
                self.rest(pause).await;
                world.signal_control(place, Signal::CONT)
            }
            Fault::FreezeHolder => {
                let place = self.holder(world, observer).await?;
                world.holders[place].signal(Signal::STOP);
                let ttl = u64::try_from(lease::TTL.as_millis()).unwrap();
                self.rest(2 * ttl..3 * ttl).await;
                world.holders[place].signal(Signal::CONT);
                Ok(())
            }
            Fault::KillHolder => {
                let place = self.holder(world, observer).await?;
                world.holders[place].kill9()?;
                world.holders[place] = world.spawn_holder(place)?;
                Ok(())
            }
            Fault::KillTwo => {
                let (one, two) = (self.next_control(world), self.next_control(world));
                let member = self.leader(world).await;
                for place in [one, two] {
                    world.controls[place].process.take().unwrap().kill9()?;
                }
                world.etcd.cut(member)?;
                self.rest(2000..4000).await;
                for place in [one, two] {
                    world.start_control(place).await?;
                }
                world.etcd.heal(member)?;
                world.etcd.ready(member).await
            }
        }
    }

    /// Who has the test's job. Waits until somebody has.
    async fn holder(&self, world: &World, observer: &Store) -> anyhow::Result<usize> {
        eventually("a holder", SOON, || async {
            let leader = observer.leader(lease::JOB).await?.context("nobody holds it")?;
            for place in 0..world.holders.len() {
                if lease::member(&world.holder_log(place)?).as_ref() == Some(&leader) {
                    return Ok(place);
                }
            }
            bail!("{leader} holds it, and is none of ours just now")
        })
        .await
    }
}

/// The control plane that judges degradation.
async fn judge(world: &World, observer: &Store) -> Option<usize> {
    let leader = observer.leader("degradation").await.ok()??;
    let members = observer.members().await.ok()?;
    let member = members.iter().find(|member| member.id == leader)?;
    let mut controls = world.controls.iter();
    controls.position(|control| control.address().to_string() == member.api)
}
