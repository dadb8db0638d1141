//! Ladders of any kind, against a model of what policy says: who answers, and that it is in time.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use anyhow::ensure;
use fastrand::Rng;
use http::{Method, Request};
use leeward_testkit::policy::{fallback, resilience, route, service};
use leeward_testkit::{
    Answer, Backend, Behave, Body, Client, Mesh, Protocol, Reply, bytes_body, empty_body, request,
};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

const LADDERS: usize = 300;
const SEED: u64 = 20_260_118;
/// Ladders that are climbed at once.
const AT_ONCE: usize = 8;
/// The time of a request, and the share of it that is kept for the ladder.
const TIME: Duration = Duration::from_secs(2);
const RESERVED: u32 = 50;
/// What a rung needs to be answered in, on a busy machine; nothing is predicted of what has less, but has some.
const ENOUGH: u32 = 15;

/// How the call that leads to a ladder ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Good,
    Status(u16),
    /// By an injected fault, before anything is sent.
    Abort(&'static str),
    Resets,
    Hangs,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Static(u16),
    Service(&'static str),
    Redirect(u16),
    Fail(u16),
}

#[derive(Clone, Debug)]
struct Rung {
    act: Act,
    causes: Vec<&'static str>,
    methods: Vec<Method>,
    /// Of the time that is left.
    percent: u32,
}

#[derive(Clone, Debug)]
struct Case {
    way: Way,
    method: Method,
    has_body: bool,
    on: Vec<&'static str>,
    on_statuses: Vec<u16>,
    rungs: Vec<Rung>,
}

/// Who answers, and how: the status, the rung, and the backend.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Told(u16, Option<usize>, &'static str);

const CAUSES: [&str; 6] = [
    "ConnectFailure",
    "Timeout",
    "Reset",
    "NoEndpoint",
    "Overloaded",
    "CircuitOpen",
];

fn some<T: Clone>(rng: &mut Rng, of: &[T], share: f64) -> Vec<T> {
    of.iter().filter(|_| rng.f64() < share).cloned().collect()
}

fn one<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.usize(..of.len())]
}

impl Case {
    fn draw(rng: &mut Rng) -> Self {
        let way = match rng.u8(..10) {
            0 => Way::Good,
            1..=3 => Way::Status(one(rng, &[500, 503])),
            4..=7 => Way::Abort(one(rng, &CAUSES)),
            8 => Way::Resets,
            _ => Way::Hangs,
        };
        // Whether a body was asked for before an answer that comes at once is a matter of luck.
        let has_body = matches!(way, Way::Abort(_) | Way::Hangs) && rng.bool();
        let method = if has_body {
            Method::POST
        } else {
            one(rng, &[&Method::GET, &Method::POST]).clone()
        };
        let count = rng.usize(1..=6);
        let mut rungs: Vec<Rung> = (0..count).map(|_| Rung::draw(rng)).collect();
        // Policy refuses what could never be reached.
        for rung in &mut rungs[..count - 1] {
            if matches!(rung.act, Act::Fail(_)) && rung.causes.is_empty() && rung.methods.is_empty() {
                rung.methods = vec![one(rng, &[&Method::GET, &Method::POST]).clone()];
            }
        }
        // None at all stands for the usual ones, which are all of these.
        let on = if rng.u8(..4) == 0 {
            some(rng, &CAUSES, 0.7)
        } else {
            Vec::new()
        };
        Self {
            way,
            method,
            has_body,
            on,
            on_statuses: some(rng, &[500, 503], 0.7),
            rungs,
        }
    }

    fn policy(&self, name: &str) -> String {
        let rungs: Vec<String> = self.rungs.iter().map(Rung::line).collect();
        let rungs: Vec<&str> = rungs.iter().map(String::as_str).collect();
        let more = [
            format!("on: [{}]", self.on.join(", ")),
            format!("onStatuses: {:?}", self.on_statuses),
            format!("reservePercent: {RESERVED}"),
        ];
        let to = match self.way {
            Way::Good | Way::Abort(_) => "good",
            Way::Status(500) => "bad",
            Way::Status(_) => "worse",
            Way::Resets => "resets",
            Way::Hangs => "hangs",
        };
        let mut rule = vec![
            format!("fallback: {name}"),
            format!("timeouts: {{request: {}ms}}", TIME.as_millis()),
        ];
        if let Way::Abort(cause) = self.way {
            rule.push(format!("fault: {{abort: {cause}}}"));
        }
        let rule: Vec<&str> = rule.iter().map(String::as_str).collect();
        fallback(name, &rungs, &more.each_ref().map(String::as_str))
            + &route(name, &format!("{name}.example"), to, &rule)
    }

    fn request(&self, name: &str) -> Request<Body> {
        let body = if self.has_body {
            bytes_body("body")
        } else {
            empty_body()
        };
        request(self.method.clone(), &format!("{name}.example"), "/a?b", body)
    }

    /// What policy says must come of it; `None` where that depends on how fast the machine is.
    fn model(&self) -> Option<Told> {
        let (cause, original) = match self.way {
            Way::Good => return Some(Told(200, None, "good")),
            Way::Status(500) => ("UpstreamStatus", Told(500, None, "bad")),
            Way::Status(status) => ("UpstreamStatus", Told(status, None, "worse")),
            Way::Abort(cause) => (cause, Told(status_of(cause), None, "")),
            Way::Resets => ("Reset", Told(502, None, "")),
            Way::Hangs => ("Timeout", Told(504, None, "")),
        };
        let acts = match self.way {
            Way::Status(status) => self.on_statuses.contains(&status),
            Way::Good | Way::Abort(_) | Way::Resets | Way::Hangs => {
                self.on.is_empty() || self.on.contains(&cause)
            }
        };
        if !acts {
            return Some(original);
        }
        // In percent of the request's.
        let mut left = f64::from(if self.way == Way::Hangs { RESERVED } else { 100 });
        let mut body_is_there = !self.has_body || self.way != Way::Hangs;
        for (position, rung) in self.rungs.iter().enumerate() {
            if !(rung.causes.is_empty() || rung.causes.contains(&cause))
                || !(rung.methods.is_empty() || rung.methods.contains(&self.method))
            {
                continue;
            }
            match rung.act {
                Act::Static(status) | Act::Redirect(status) => return Some(Told(status, Some(position), "")),
                Act::Fail(0) => return Some(original),
                Act::Fail(status) => return Some(Told(status, None, "")),
                Act::Service(to) => {
                    if left <= 0.0 || !body_is_there {
                        continue;
                    }
                    let share = left * f64::from(rung.percent) / 100.0;
                    if share < f64::from(ENOUGH) {
                        return None;
                    }
                    match to {
                        "good" => return Some(Told(200, Some(position), "good")),
                        "hangs" => {
                            left -= share;
                            body_is_there = !self.has_body;
                        }
                        _ => body_is_there = !self.has_body,
                    }
                }
            }
        }
        Some(original)
    }
}

fn status_of(cause: &str) -> u16 {
    match cause {
        "Timeout" => 504,
        "Reset" => 502,
        _ => 503,
    }
}

impl Rung {
    fn draw(rng: &mut Rng) -> Self {
        let act = match rng.u8(..10) {
            0..=1 => Act::Static(rng.u16(200..=203)),
            2..=7 => Act::Service(one(rng, &["good", "bad", "worse", "resets", "hangs"])),
            8 => Act::Redirect(one(rng, &[302, 307])),
            _ => Act::Fail(one(rng, &[0, 418, 507])),
        };
        let conditions = [CAUSES.as_slice(), &["UpstreamStatus"]].concat();
        Self {
            act,
            causes: if rng.bool() {
                some(rng, &conditions, 0.5)
            } else {
                Vec::new()
            },
            methods: if rng.u8(..4) == 0 {
                vec![one(rng, &[&Method::GET, &Method::POST]).clone()]
            } else {
                Vec::new()
            },
            percent: if matches!(act, Act::Service("hangs")) {
                one(rng, &[20, 50, 100])
            } else {
                100
            },
        }
    }

    fn line(&self) -> String {
        let act = match self.act {
            Act::Static(status) => format!("static: {{status: {status}}}"),
            Act::Service(to) => format!("service: {{service: {to}}}"),
            Act::Redirect(status) => {
                format!("redirect: {{location: \"/x${{request.path}}\", status: {status}}}")
            }
            Act::Fail(status) => format!("fail: {{status: {status}}}"),
        };
        let methods: Vec<&str> = self.methods.iter().map(Method::as_str).collect();
        format!(
            "{{{act}, causes: [{}], methods: [{}], deadlinePercent: {}}}",
            self.causes.join(", "),
            methods.join(", "),
            self.percent
        )
    }
}

/// What a reply says, in the model's terms.
fn heard(name: &str, reply: &Reply) -> anyhow::Result<Told> {
    let said = reply.header("leeward-degraded");
    let rung = match said.strip_prefix(&format!("{name}/")) {
        Some(position) => Some(position.parse()?),
        None => {
            ensure!(said.is_empty(), "{said:?}");
            None
        }
    };
    let backend = ["good", "bad", "worse"]
        .into_iter()
        .find(|b| *b == reply.backend());
    Ok(Told(reply.status.as_u16(), rung, backend.unwrap_or_default()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_ladder_answers_as_policy_says_and_in_time() -> anyhow::Result<()> {
    let mesh = Mesh::builder().node("a", "a1").start().await?;
    let mut policy = resilience("default", &["circuitBreaker: {mode: ForceClosed}"]);
    let mut backends = Vec::new();
    for (name, behave) in [
        ("good", Behave::Answer(Answer::text("good"))),
        ("bad", Behave::Answer(Answer::status(500))),
        ("worse", Behave::Answer(Answer::status(503))),
        ("resets", Behave::Reset),
        ("hangs", Behave::Hang),
    ] {
        let backend = Backend::start(name)?;
        backend.behave(behave);
        policy += &service(
            name,
            &[(backend.address(), "a", "")],
            &["outlierDetection: {maxEjectionPercent: 0}"],
        );
        backends.push(backend);
    }
    let mut rng = Rng::with_seed(SEED);
    let cases: Vec<(String, Case)> = (0..LADDERS)
        .map(|n| (format!("l{n}"), Case::draw(&mut rng)))
        .collect();
    for (name, case) in &cases {
        policy += &case.policy(name);
    }
    mesh.apply(&policy).await?;
    let outbound = mesh.node("a1")?.outbound;
    let mut climbing = JoinSet::new();
    for first in 0..AT_ONCE {
        let mine: Vec<_> = cases.iter().skip(first).step_by(AT_ONCE).cloned().collect();
        climbing.spawn(async move {
            let clients = [Protocol::Http1, Protocol::Http2].map(|p| Client::new(outbound, p));
            let mut slowest = Duration::ZERO;
            let (mut predicted, mut degraded) = (0, 0);
            for (n, (name, case)) in mine.iter().enumerate() {
                let begun = Instant::now();
                let reply = clients[n % 2].call(case.request(name)).await?;
                let took = begun.elapsed();
                slowest = slowest.max(took);
                let heard = heard(name, &reply)?;
                if let Some(want) = case.model() {
                    ensure!(
                        heard == want,
                        "{name} said {heard:?}, the model {want:?}, of {case:#?}: {reply:?}"
                    );
                    predicted += 1;
                }
                degraded += usize::from(heard.1.is_some());
                // The rest is the machine's.
                ensure!(took < TIME + TIME / 2, "{name} took {took:?}: {case:#?}");
            }
            anyhow::Ok((predicted, degraded, slowest))
        });
    }
    let (mut predicted, mut degraded, mut slowest) = (0, 0, Duration::ZERO);
    while let Some(done) = climbing.join_next().await {
        let (p, d, s) = done??;
        (predicted, degraded, slowest) = (predicted + p, degraded + d, slowest.max(s));
    }
    println!(
        "{LADDERS} ladders: {predicted} predicted, {degraded} degraded, the slowest took {slowest:?} of {TIME:?}"
    );
    // The model says something of nearly all, and ladders are what answers most of the time.
    assert!(
        predicted > LADDERS * 9 / 10 && degraded > LADDERS / 4,
        "{predicted}, {degraded}"
    );
    Ok(())
}
