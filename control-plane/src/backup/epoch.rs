//! Which of several stores leads, decided by one place that all of them can write to. Pure.
//!
//! The place holds *claims*, numbered without gaps; the last one counts. A claim is made by creating the object of the
//! next number, which succeeds for one only (`If-None-Match: *`, or a hard link). A leader makes a new claim of its own
//! every third of its time; whoever takes over makes one with an epoch higher by one.
//!
//! Why two never lead at once: a leader believes that it leads until its time has passed since it *began* to make its
//! last claim. Whoever claims number n+1 saw claim n first, at a time when it was there already, so not before it was
//! begun; and it waits for the time of claim n from then on before it leads. Had the leader renewed meanwhile, number
//! n+1 would be taken. All times are of clocks that don't jump, and that differ in speed by less than [`DRIFT`].
//!
//! Old claims are deleted, so a claim that was long on its way could be made under a number that was taken and is free
//! again. So one that rests on what was seen more than [`STALE`] ago counts for nothing, and claims are kept for longer.

use std::time::Duration;

/// How long claims are kept once there is a later one.
pub(crate) const KEPT: Duration = Duration::from_secs(2 * 3600);
/// How old what a claim rests on may be.
pub(crate) const STALE: Duration = Duration::from_secs(1800);
/// By how much two clocks may differ in speed: one part in so many.
pub(crate) const DRIFT: u32 = 100;

/// What stands in the place.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Claim {
    /// Goes up by one whenever another takes over.
    pub(crate) epoch: u64,
    /// Who claims: a name for one process.
    pub(crate) holder: String,
    /// Where its API is, for people and standbys.
    pub(crate) address: String,
    /// The store that it leads with.
    pub(crate) store_id: String,
    /// How long it holds, in milliseconds.
    pub(crate) ttl_ms: u64,
    /// The holder has given it back: it holds no longer.
    pub(crate) released: bool,
}

impl Claim {
    const fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms)
    }
}

/// A time on a clock that doesn't jump.
pub(crate) type Moment = Duration;

/// What is to be done next.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// Read the last claim, and tell of it with [`Contender::saw`].
    Read,
    /// Make this claim, and tell with [`Contender::claimed`] what came of it.
    Claim { number: u64, claim: Claim },
    /// Nothing before this time.
    Wait(Moment),
}

/// What came of an attempt to claim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// The claim stands.
    Made,
    /// The number was taken.
    Taken,
    /// Nobody knows: no answer.
    Unknown,
}

/// When one that doesn't lead tries to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ambition {
    /// Never by itself.
    None,
    /// Once nobody has claimed for so long; never before the last claim has ended.
    After(Duration),
    /// Now.
    Now,
}

/// The last claim that was seen.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Last {
    number: u64,
    /// `None` if there was none at all.
    claim: Option<Claim>,
    /// When reading it had ended for the first time: it stood then.
    first: Moment,
    /// When reading it was begun for the last time.
    read: Moment,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Led {
    number: u64,
    epoch: u64,
    /// When the last claim was begun.
    begun: Moment,
    /// From when on it leads.
    from: Moment,
}

/// One that leads, or might.
#[derive(Debug)]
pub(crate) struct Contender {
    me: String,
    address: String,
    store_id: String,
    ttl: Duration,
    ambition: Ambition,
    last: Option<Last>,
    led: Option<Led>,
    /// A claim whose answer was lost, and from when on it would have led.
    lost: Option<(u64, Moment)>,
    next_read: Moment,
}

impl Contender {
    pub(crate) const fn new(me: String, address: String, ttl: Duration, ambition: Ambition) -> Self {
        Self {
            me,
            address,
            store_id: String::new(),
            ttl,
            ambition,
            last: None,
            led: None,
            lost: None,
            next_read: Duration::ZERO,
        }
    }

    /// Whether it leads at this time. To be asked after the work and before it is acknowledged, each time.
    pub(crate) fn leads(&self, now: Moment) -> bool {
        let led = self.led.as_ref();
        led.is_some_and(|led| now >= led.from && now < led.begun + self.ttl)
    }

    /// The epoch that it claimed, whether it leads yet or no longer.
    pub(crate) fn epoch(&self) -> Option<u64> {
        self.led.as_ref().map(|led| led.epoch)
    }

    /// The last claim of another that it saw.
    pub(crate) fn leader(&self) -> Option<&Claim> {
        self.last.as_ref().and_then(|last| last.claim.as_ref())
    }

    /// Names the store that its claims are for.
    pub(crate) fn set_store(&mut self, store_id: String) {
        self.store_id = store_id;
    }

    pub(crate) const fn set_ambition(&mut self, ambition: Ambition) {
        self.ambition = ambition;
    }

    pub(crate) fn next(&self, now: Moment) -> Step {
        if let Some(led) = &self.led {
            let renew = led.begun + self.ttl / 3;
            if now < renew {
                return Step::Wait(renew);
            }
            if now < led.begun + self.ttl {
                return Step::Claim {
                    number: led.number + 1,
                    claim: self.claim(led.epoch, false),
                };
            }
        }
        // What it knows is too old to rest on, or it knows nothing.
        let Some(last) = self.last.as_ref().filter(|last| now < last.read + STALE / 2) else {
            return self.read(now);
        };
        let (epoch, ends) = match &last.claim {
            None => (1, last.read),
            Some(claim) if claim.released => (claim.epoch + 1, last.read),
            // Its own, of which it did not hear.
            Some(claim) if claim.holder == self.me => (claim.epoch, last.read),
            Some(claim) => (claim.epoch + 1, self.free(last)),
        };
        let wants = match self.ambition {
            Ambition::None => false,
            Ambition::Now => true,
            Ambition::After(quiet) => now >= ends && now >= last.first + quiet,
        };
        // It was read since it could be claimed: a claim that is sure to fail costs a request.
        if wants && (self.ambition == Ambition::Now || last.read >= ends) {
            return Step::Claim {
                number: last.number + 1,
                claim: self.claim(epoch, false),
            };
        }
        self.read(now)
    }

    fn read(&self, now: Moment) -> Step {
        if now >= self.next_read {
            Step::Read
        } else {
            Step::Wait(self.next_read)
        }
    }

    fn claim(&self, epoch: u64, released: bool) -> Claim {
        Claim {
            epoch,
            holder: self.me.clone(),
            address: self.address.clone(),
            store_id: self.store_id.clone(),
            ttl_ms: u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX),
            released,
        }
    }

    /// From when on nobody leads by a claim that was seen, or by one before it.
    fn free(&self, last: &Last) -> Moment {
        match &last.claim {
            None => last.read,
            Some(claim) if claim.released => last.read,
            Some(claim) => match self.lost {
                // The one before its own may last as long as it would have waited.
                Some((number, from)) if number == last.number && claim.holder == self.me => from,
                Some(_) | None => ended(last.first, claim),
            },
        }
    }

    /// The claim that gives back what it holds, if it holds something. It leads no longer from here on. One that does not
    /// lead yet has nothing to give: the one before it may still lead.
    pub(crate) fn release(&mut self, now: Moment) -> Option<(u64, Claim)> {
        self.ambition = Ambition::None;
        let led = self.led.take().filter(|led| now >= led.from)?;
        Some((led.number + 1, self.claim(led.epoch, true)))
    }

    /// The last claim, as reading it showed; `None` if there is none.
    pub(crate) fn saw(&mut self, begun: Moment, ended: Moment, found: Option<(u64, Claim)>) {
        self.next_read = ended + self.ttl / 3;
        let (number, claim) = found.map_or((0, None), |(number, claim)| (number, Some(claim)));
        match &mut self.last {
            Some(last) if last.number == number => last.read = begun,
            Some(last) if last.number > number => {}
            Some(_) | None => {
                self.last = Some(Last {
                    number,
                    claim,
                    first: ended,
                    read: begun,
                });
            }
        }
        if self.led.as_ref().is_some_and(|led| number > led.number) {
            // Another, or itself with an answer that was lost: it has to win again either way.
            self.led = None;
        }
    }

    /// What came of a claim that [`Contender::next`] asked for.
    pub(crate) fn claimed(
        &mut self,
        begun: Moment,
        ended: Moment,
        number: u64,
        claim: &Claim,
        outcome: Outcome,
    ) {
        // What comes next rests on another look, unless the claim was made.
        self.next_read = Duration::ZERO;
        let renews = self.led.as_ref().filter(|led| led.number + 1 == number);
        let (rests_on, from) = match (renews, &self.last) {
            (Some(led), _) => (led.begun, led.from),
            (None, Some(last)) if last.number + 1 == number => (last.read, self.free(last).max(begun)),
            (None, _) => return,
        };
        match outcome {
            Outcome::Unknown => self.lost = Some((number, from)),
            Outcome::Taken => {
                self.led = None;
                if self.last.as_ref().is_some_and(|last| last.number < number) {
                    self.last = None;
                }
            }
            Outcome::Made => {
                if ended > rests_on + STALE {
                    (self.led, self.last) = (None, None);
                    return;
                }
                self.led = Some(Led {
                    number,
                    epoch: claim.epoch,
                    begun,
                    from,
                });
                if self.ambition == Ambition::Now {
                    // What was said once is done once: it takes nothing back from whoever comes next.
                    self.ambition = Ambition::After(Duration::ZERO);
                }
            }
        }
    }
}

/// When a claim that was seen at a time has ended for certain, on the clock of whoever saw it.
fn ended(seen: Moment, claim: &Claim) -> Moment {
    seen + claim.ttl() + claim.ttl() * 2 / DRIFT
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The place, with requests that arrive when they like.
    #[derive(Default)]
    struct Place {
        claims: BTreeMap<u64, (u64, Claim)>,
    }

    impl Place {
        fn last(&self) -> Option<(u64, Claim)> {
            self.claims.last_key_value().map(|(n, (_, c))| (*n, c.clone()))
        }

        fn create(&mut self, at: u64, number: u64, claim: &Claim) -> bool {
            let free = !self.claims.contains_key(&number);
            if free {
                self.claims.insert(number, (at, claim.clone()));
            }
            free
        }

        /// Claims are deleted two hours after a later one came.
        fn sweep(&mut self, now: u64) {
            let kept = u64::try_from(KEPT.as_millis()).unwrap();
            let last = self.claims.last_key_value().map_or(0, |(n, _)| *n);
            self.claims.retain(|n, (at, _)| *n == last || *at + kept > now);
        }
    }

    /// A request on its way.
    #[derive(Clone)]
    struct Flight {
        node: usize,
        step: Step,
        begun: Moment,
        arrives: u64,
        answered: u64,
        is_lost: bool,
        answer: Option<Answer>,
    }

    #[derive(Clone)]
    enum Answer {
        Saw(Option<(u64, Claim)>),
        Claimed(bool),
    }

    struct Node {
        contender: Contender,
        /// Its clock: offset, and speed in millionths.
        offset: u64,
        speed: u64,
        /// It does nothing until then, its answers wait.
        paused_until: u64,
        busy: bool,
    }

    impl Node {
        fn clock(&self, now: u64) -> Moment {
            Duration::from_millis(self.offset + now * self.speed / 1_000_000)
        }
    }

    /// Returns how long somebody led, of how long, and how often the epoch went up.
    fn simulate(seed: u64, span_ms: u64, long_pauses: bool) -> (u64, u64) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let ttl = Duration::from_secs(9);
        let mut nodes: Vec<Node> = (0..3)
            .map(|n| {
                let ambition = [
                    Ambition::Now,
                    Ambition::After(Duration::from_secs(10)),
                    Ambition::After(Duration::from_secs(14)),
                ][n];
                Node {
                    contender: Contender::new(format!("n{n}"), String::new(), ttl, ambition),
                    offset: rng.u64(0..1_000_000),
                    // Any two differ by less than a hundredth.
                    speed: 1_000_000 + rng.u64(0..9_900),
                    paused_until: 0,
                    busy: false,
                }
            })
            .collect();
        let mut place = Place::default();
        let mut flights: Vec<Flight> = Vec::new();
        let (mut led, mut highest) = (0, 0);
        let mut cut_until = [0u64; 3];
        let tick = 10;
        for now in (0..span_ms).step_by(tick) {
            if now % 60_000 == 0 {
                place.sweep(now);
            }
            for n in 0..nodes.len() {
                if rng.u32(0..6_000) == 0 {
                    let longest = if long_pauses { 3 * 3_600_000 } else { 40_000 };
                    nodes[n].paused_until = now + rng.u64(0..longest);
                }
                if rng.u32(0..6_000) == 0 {
                    cut_until[n] = now + rng.u64(0..40_000);
                }
                if rng.u32(0..40_000) == 0 {
                    nodes[n].contender.set_ambition(Ambition::Now);
                }
                if rng.u32(0..40_000) == 0 && now >= nodes[n].paused_until {
                    // It goes down in an orderly way, and comes up again as another process.
                    let clock = nodes[n].clock(now);
                    if let Some((number, claim)) = nodes[n].contender.release(clock) {
                        place.create(now, number, &claim);
                    }
                    let name = format!("n{n}-{now}");
                    let ambition = Ambition::After(Duration::from_secs(10));
                    nodes[n].contender = Contender::new(name, String::new(), ttl, ambition);
                    flights.retain(|f| f.node != n || f.answer.is_none());
                    for flight in flights.iter_mut().filter(|f| f.node == n) {
                        flight.is_lost = true;
                    }
                    nodes[n].busy = false;
                    flights.retain(|f| f.node != n);
                }
            }
            for flight in &mut flights {
                if flight.answer.is_none() && now >= flight.arrives {
                    flight.answer = Some(match &flight.step {
                        Step::Claim { number, claim } => Answer::Claimed(place.create(now, *number, claim)),
                        Step::Read | Step::Wait(_) => Answer::Saw(place.last()),
                    });
                }
            }
            let mut i = 0;
            while i < flights.len() {
                let flight = &flights[i];
                let node = &mut nodes[flight.node];
                if flight.answer.is_none() || now < flight.answered || now < node.paused_until {
                    i += 1;
                    continue;
                }
                let flight = flights.swap_remove(i);
                let ended = node.clock(now);
                node.busy = false;
                match (flight.step, flight.answer.unwrap()) {
                    (Step::Claim { number, claim }, Answer::Claimed(made)) => {
                        let outcome = match (flight.is_lost, made) {
                            (true, _) => Outcome::Unknown,
                            (false, true) => Outcome::Made,
                            (false, false) => Outcome::Taken,
                        };
                        node.contender
                            .claimed(flight.begun, ended, number, &claim, outcome);
                    }
                    (_, Answer::Saw(found)) if !flight.is_lost => {
                        node.contender.saw(flight.begun, ended, found);
                    }
                    _ => {}
                }
            }
            for n in 0..nodes.len() {
                let node = &mut nodes[n];
                if node.busy || now < node.paused_until {
                    continue;
                }
                let clock = node.clock(now);
                let step = node.contender.next(clock);
                if matches!(step, Step::Wait(_)) {
                    continue;
                }
                node.busy = true;
                let cut = now < cut_until[n];
                let slow = if long_pauses && rng.u32(0..50) == 0 {
                    3 * 3_600_000
                } else if rng.u32(0..10) == 0 {
                    12_000
                } else {
                    200
                };
                let arrives = now + rng.u64(1..slow) + if cut { cut_until[n] - now } else { 0 };
                let answered = arrives + rng.u64(1..slow);
                flights.push(Flight {
                    node: n,
                    step,
                    begun: clock,
                    arrives,
                    answered,
                    is_lost: rng.u32(0..12) == 0,
                    answer: None,
                });
            }
            // A node that is paused could go on at any instant and acknowledge: it counts, too.
            let leaders: Vec<_> = nodes
                .iter()
                .filter(|n| n.contender.leads(n.clock(now)))
                .map(|n| (n.contender.me.clone(), n.contender.epoch()))
                .collect();
            assert!(
                leaders.len() <= 1,
                "seed {seed}, at {now}: {leaders:?} lead at once"
            );
            led += leaders.len() as u64 * tick as u64;
            for (_, epoch) in leaders {
                let epoch = epoch.unwrap();
                assert!(
                    epoch >= highest,
                    "seed {seed}, at {now}: epoch {epoch} after {highest}"
                );
                highest = epoch;
            }
        }
        (led, highest)
    }

    #[test]
    fn two_never_lead_at_once_with_pauses_partitions_and_lost_answers() {
        let (mut led, mut epochs) = (0, 0);
        for seed in 0..60 {
            let (time, highest) = simulate(seed, 600_000, false);
            led += time;
            epochs += highest;
        }
        // It is worth something only if somebody leads most of the time, and it goes from one to another.
        assert!(led > 60 * 600_000 / 2, "led {led} ms");
        assert!(epochs > 200, "{epochs} epochs");
    }

    #[test]
    fn neither_do_they_when_requests_and_pauses_take_longer_than_claims_are_kept() {
        let mut epochs = 0;
        for seed in 1000..1003 {
            epochs += simulate(seed, 8 * 3_600_000, true).1;
        }
        assert!(epochs > 10, "{epochs} epochs");
    }

    fn at(seconds: u64) -> Moment {
        Duration::from_secs(seconds)
    }

    /// Does what it is asked to, at once.
    fn settle(contender: &mut Contender, place: &mut Place, now: Moment) {
        for _ in 0..8 {
            match contender.next(now) {
                Step::Wait(_) => return,
                Step::Read => contender.saw(now, now, place.last()),
                Step::Claim { number, claim } => {
                    let made = place.create(0, number, &claim);
                    let outcome = if made { Outcome::Made } else { Outcome::Taken };
                    contender.claimed(now, now, number, &claim, outcome);
                }
            }
        }
    }

    #[test]
    fn a_command_takes_over_once_the_claim_before_it_has_ended() {
        let ttl = at(9);
        let mut place = Place::default();
        let mut one = Contender::new("one".into(), String::new(), ttl, Ambition::Now);
        let mut two = Contender::new("two".into(), String::new(), ttl, Ambition::None);
        settle(&mut one, &mut place, at(0));
        assert!(one.leads(at(0)) && one.epoch() == Some(1));
        settle(&mut two, &mut place, at(1));
        assert_eq!(two.leader().unwrap().holder, "one");
        two.set_ambition(Ambition::Now);
        settle(&mut two, &mut place, at(2));
        assert_eq!(two.epoch(), Some(2));
        assert!(!two.leads(at(9)), "the other may lead until then");
        // The one that led sees it when it renews.
        settle(&mut one, &mut place, at(3));
        assert!(!one.leads(at(3)));
        settle(&mut two, &mut place, at(6));
        settle(&mut two, &mut place, at(9));
        assert!(two.leads(at(11)));
    }

    #[test]
    fn what_was_given_back_can_be_taken_at_once() {
        let ttl = at(9);
        let mut place = Place::default();
        let mut one = Contender::new("one".into(), String::new(), ttl, Ambition::Now);
        settle(&mut one, &mut place, at(0));
        let (number, claim) = one.release(at(0)).unwrap();
        assert!(!one.leads(at(0)));
        place.create(0, number, &claim);
        let mut two = Contender::new("two".into(), String::new(), ttl, Ambition::After(at(0)));
        settle(&mut two, &mut place, at(1));
        assert!(two.leads(at(1)) && two.epoch() == Some(2));
    }

    #[test]
    fn one_that_waits_for_silence_waits_for_it_from_the_last_claim() {
        let ttl = at(9);
        let mut place = Place::default();
        let mut one = Contender::new("one".into(), String::new(), ttl, Ambition::Now);
        let mut two = Contender::new("two".into(), String::new(), ttl, Ambition::After(at(20)));
        for second in 0..30 {
            settle(&mut one, &mut place, at(second));
            settle(&mut two, &mut place, at(second));
        }
        assert!(one.leads(at(30)) && two.epoch().is_none());
        for second in 30..60 {
            settle(&mut two, &mut place, at(second));
            let led = two.leads(at(second));
            assert!(!led || second >= 47, "leads at {second}");
        }
        assert!(two.leads(at(59)));
    }
}
