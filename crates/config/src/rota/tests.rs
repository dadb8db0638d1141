use super::*;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

fn three() -> Control {
    Control::from(
        ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
            .map(|a| a.parse().unwrap())
            .as_slice(),
    )
}

fn port(turn: Option<Turn<'_>>) -> u16 {
    match turn.unwrap().address {
        ControlAddress::Address(address) => address.port(),
        ControlAddress::Name(name) => panic!("{name}"),
    }
}

#[test]
fn pauses_grow_are_bounded_and_spread() {
    let none = Control::none();
    let after = |failures: u32, draw| {
        let mut rota = Rota::new(&none, Timing::DEFAULT);
        for _ in 1..failures {
            let _ = rota.failed(1.0);
        }
        rota.failed(draw)
    };
    assert_eq!(after(1, 1.0), Duration::from_millis(250));
    assert_eq!(after(3, 1.0), Duration::from_secs(1));
    assert_eq!(after(30, 1.0), Duration::from_secs(30));
    assert_eq!(after(30, 0.0), Duration::ZERO);
    assert_eq!(after(2, 0.5), Duration::from_millis(250));
    assert_eq!(Rota::new(&none, Timing::DEFAULT).turn(), None);
}

#[test]
fn each_has_its_turn_and_one_that_served_ends_what_failed() {
    let mut control = three();
    control.order = Order::Random;
    let mut rota = Rota::new(&control, Timing::DEFAULT);
    let mut turns = Vec::new();
    for _ in 0..4 {
        turns.push(port(rota.turn()));
        rota.failed(1.0);
    }
    assert_eq!(turns, [1, 2, 3, 1]);
    // Those that one has served spread over more than the first pause, however soon it is gone.
    assert_eq!(rota.parted(Parting::Lost, true, 1.0), Timing::DEFAULT.spread);
    assert_eq!(rota.failed(1.0), Duration::from_millis(250));
}

#[test]
fn the_preferred_one_comes_first_again_after_another_served() {
    let control = three();
    let mut rota = Rota::new(&control, Timing::DEFAULT);
    rota.failed(1.0);
    rota.failed(1.0);
    assert_eq!(port(rota.turn()), 3);
    rota.parted(Parting::Lost, true, 1.0);
    assert_eq!(port(rota.turn()), 1);
    // But not when it is the one that ended.
    rota.parted(Parting::Lost, true, 1.0);
    assert_eq!(port(rota.turn()), 2);
}

#[test]
fn what_a_control_plane_asks_for_is_done_within_bounds() {
    let control = three();
    let mut rota = Rota::new(&control, Timing::DEFAULT);
    let goodbye = |spread| Parting::Goodbye(Duration::from_secs(spread));
    assert_eq!(rota.parted(goodbye(20), false, 0.25), Duration::from_secs(5));
    assert_eq!(rota.parted(goodbye(1 << 40), false, 1.0), MAX_ASKED);
    // Busy: another may have time; when none has, it is waited.
    let busy = Parting::Busy(Duration::from_secs(10));
    assert!(rota.parted(busy, false, 1.0) < Duration::from_secs(1));
    assert!(rota.parted(busy, false, 1.0) < Duration::from_secs(1));
    assert_eq!(rota.parted(busy, false, 0.0), Duration::from_secs(5));
    assert_eq!(rota.parted(busy, false, 1.0), Duration::from_secs(15));
}

/// A mesh's proxies and its control planes, by an event queue in simulated time.
struct Mesh {
    now: u64,
    queue: BinaryHeap<Reverse<(u64, usize, What)>>,
    /// Each proxy's control plane.
    at: Vec<Option<u16>>,
    chance: fastrand::Rng,
    up: BTreeMap<u16, bool>,
    /// Streams that a control plane takes at once; one takes `TAKES`.
    taking: BTreeMap<u16, Vec<u64>>,
    refused: usize,
    /// Whether everybody gets everything, which has turns.
    full: bool,
    /// By the second: those at control planes that are there, and those at others, which the system refuses.
    tries: BTreeMap<u64, (usize, usize)>,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum What {
    Try,
    Lost,
    Goodbye(u64),
}

/// In milliseconds: what a stream costs a control plane, how many it takes at once, and how many may wait.
const TAKES: u64 = 50;
const AT_ONCE: usize = 32;
const WAITING: usize = 256;

impl Mesh {
    fn connected(proxies: usize, controls: u16) -> Self {
        let mut chance = fastrand::Rng::with_seed(7);
        let at = (0..proxies).map(|_| Some(chance.u16(1..=controls))).collect();
        Self {
            now: 3_600_000,
            queue: BinaryHeap::new(),
            at,
            chance,
            up: (1..=controls).map(|control| (control, true)).collect(),
            taking: BTreeMap::new(),
            refused: 0,
            full: false,
            tries: BTreeMap::new(),
        }
    }

    /// A control plane ends; its proxies notice at once, the worst case.
    fn end(&mut self, control: u16, what: What) {
        self.up.insert(control, false);
        for (proxy, at) in self.at.iter().enumerate() {
            if *at == Some(control) {
                self.queue.push(Reverse((self.now, proxy, what)));
            }
        }
    }

    /// Until all are connected: how long that took. `events` is what happens to control planes when.
    fn run(&mut self, rotas: &mut [Rota<'_>], mut events: Vec<(u64, u16)>) -> u64 {
        let (start, mut last) = (self.now, self.now);
        while let Some(Reverse((at, proxy, what))) = self.queue.pop() {
            while let Some((when, control)) = events.first().copied().filter(|(when, _)| start + when <= at) {
                let _ = when;
                self.up.insert(control, true);
                events.remove(0);
            }
            self.now = at;
            let draw = self.chance.f64();
            let rota = &mut rotas[proxy];
            let pause = match what {
                What::Lost | What::Goodbye(_) => {
                    self.at[proxy] = None;
                    let how = match what {
                        What::Goodbye(spread) => Parting::Goodbye(Duration::from_millis(spread)),
                        What::Lost | What::Try => Parting::Lost,
                    };
                    rota.parted(how, true, draw)
                }
                What::Try => {
                    let control = port(rota.turn());
                    let tries = self.tries.entry((at - start) / 1000).or_default();
                    if self.up[&control] {
                        tries.0 += 1;
                    } else {
                        tries.1 += 1;
                    }
                    let slots = self.taking.entry(control).or_default();
                    slots.retain(|until| *until > at);
                    if !self.up[&control] {
                        rota.failed(draw)
                    } else if !self.full {
                        self.at[proxy] = Some(control);
                        last = at;
                        continue;
                    } else if slots.len() >= AT_ONCE + WAITING {
                        self.refused += 1;
                        rota.parted(Parting::Busy(Duration::from_secs(2)), false, draw)
                    } else {
                        let turn = (slots.len() / AT_ONCE) as u64 + 1;
                        slots.push(at + TAKES * turn);
                        self.at[proxy] = Some(control);
                        last = at + TAKES * turn;
                        continue;
                    }
                }
            };
            let pause = u64::try_from(pause.as_millis()).unwrap();
            self.queue.push(Reverse((at + pause.max(1), proxy, What::Try)));
        }
        assert!(self.at.iter().all(Option::is_some), "everybody is connected");
        last - start
    }

    fn peaks(&self) -> (usize, usize) {
        let there = self.tries.values().map(|(there, _)| *there).max();
        let away = self.tries.values().map(|(_, away)| *away).max();
        (there.unwrap_or(0), away.unwrap_or(0))
    }
}

const PROXIES: usize = 10_000;

/// Ten thousand proxies, each with an order of its own and at the control plane that it has.
fn mesh(controls: u16) -> (Mesh, Vec<Control>) {
    let all: Vec<ControlAddress> = (1..=controls)
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port)).into())
        .collect();
    let mesh = Mesh::connected(PROXIES, controls);
    let orders = mesh.at.iter().enumerate().map(|(seed, at)| {
        let mut control = Control::new(all.clone(), Order::Random, seed as u64);
        let own = at.unwrap();
        let mut addresses = control.addresses.to_vec();
        let first = addresses
            .iter()
            .position(|a| matches!(a, ControlAddress::Address(a) if a.port() == own));
        addresses.rotate_left(first.unwrap());
        control.addresses = addresses.into();
        control
    });
    let orders = orders.collect();
    (mesh, orders)
}

/// What each proxy gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Gets {
    Changes,
    Everything,
}

fn simulate(what: &str, gets: Gets, ends: &[u16], how: What, back_after: u64) -> (usize, u64) {
    let controls = if what.contains("of three") { 3 } else { 1 };
    let (mut mesh, orders) = mesh(controls);
    mesh.full = gets == Gets::Everything;
    let mut rotas: Vec<Rota<'_>> = orders
        .iter()
        .map(|order| Rota::new(order, Timing::DEFAULT))
        .collect();
    for control in ends {
        mesh.end(*control, how);
    }
    let back = ends.iter().map(|control| (back_after, *control)).collect();
    let took = mesh.run(&mut rotas, back);
    let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
    for control in mesh.at.iter().flatten() {
        *counts.entry(*control).or_default() += 1;
    }
    let peaks = mesh.peaks();
    println!(
        "{what}: at most {} tries a second at those that are there and {} at others, {} sent away as too many, all connected after {took} ms, now at {counts:?}",
        peaks.0, peaks.1, mesh.refused
    );
    (peaks.0, took)
}

#[test]
fn ten_thousand_proxies_move_calmly() {
    use Gets::{Changes, Everything};
    // One of three dies, and its 3,300 go to the two others.
    let (peak, took) = simulate("one of three dies", Changes, &[1], What::Lost, NEVER);
    assert!(peak < 1_000 && took < 10_000, "{peak} {took}");
    // It says goodbye, and asks for 2 ms a proxy.
    let (peak, took) = simulate(
        "one of three is stopped",
        Changes,
        &[1],
        What::Goodbye(6_700),
        NEVER,
    );
    assert!(peak < 1_000 && took < 10_000, "{peak} {took}");
    // The only one restarts within 3 s; those whose turn came meanwhile come back beside the others.
    let restart = What::Goodbye(20_000);
    let (peak, took) = simulate("the only one is back after 3 s", Changes, &[1], restart, 3_000);
    assert!(peak < 2_000 && took < 35_000, "{peak} {took}");
    // The same, and it has another store: everybody gets everything.
    let (peak, took) = simulate(
        "the only one is back with another store",
        Everything,
        &[1],
        restart,
        3_000,
    );
    assert!(peak < 3_500 && took < 60_000, "{peak} {took}");
    // All die, and are back after a minute.
    let (peak, took) = simulate(
        "all of three are back after 60 s",
        Changes,
        &[1, 2, 3],
        What::Lost,
        60_000,
    );
    assert!(peak < 2_000 && took < 60_000 + 32_000, "{peak} {took}");
}

/// In milliseconds.
const NEVER: u64 = u64::MAX / 2;
