//! What is told of the runs.

use crate::scenario::{CAPACITY, Run, SERVERS, chain, fault, one_bad, overload};
use crate::strategy::Strategy;
use crate::table::{Table, millis, percent, times};
use leeward_policy::model::Priority;

/// What precedes the tables on the page.
pub(crate) const INTRODUCTION: &str = include_str!("introduction.md");

pub(crate) fn overloaded(runs: &[Run]) -> Table {
    let row = |run: &Run| {
        let sum = run.record.summary(overload::FROM, overload::TO);
        let mut row = vec![
            run.name.to_owned(),
            percent(sum.goodput() / CAPACITY),
            percent(sum.success()),
        ];
        row.extend(
            Priority::ALL
                .iter()
                .rev()
                .map(|priority| percent(sum.success_of(*priority))),
        );
        row.extend([
            millis(sum.percentile(50)),
            millis(sum.percentile(99)),
            times(sum.load_factor()),
        ]);
        row
    };
    Table {
        title: "Twice the load that the service bears, for 60 s",
        text: "From 80 % of capacity the load rises to 200 %. At best, half of the requests can be served. \
               Without a bound on what waits, requests wait longer than their clients do: queues are full, \
               and what comes out of them is too late."
            .to_owned(),
        columns: vec![
            "strategy",
            "goodput of capacity",
            "served",
            "critical",
            "high",
            "normal",
            "low",
            "p50",
            "p99",
            "attempts per request",
        ],
        rows: runs.iter().map(row).collect(),
    }
}

pub(crate) fn faulted(runs: &[Run]) -> Table {
    let row = |run: &Run| {
        let during = run.record.summary(fault::FROM, fault::TO);
        let after = run.record.summary(fault::TO, fault::TO + 60);
        let recovery = run.record.recovery(fault::TO, fault::END, fault::WELL);
        vec![
            run.name.to_owned(),
            percent(during.goodput() / (CAPACITY * fault::LEFT)),
            recovery.map_or_else(|| "not within 60 s".to_owned(), |seconds| format!("{seconds} s")),
            percent(after.success()),
            millis(after.percentile(50)),
            millis(after.percentile(99)),
            times(during.load_factor()),
            times(after.load_factor()),
        ]
    };
    Table {
        title: "A fault of 20 s",
        text: format!(
            "The load is {:.0} % of capacity all the time. For 20 s every server takes {:.1} times as long, which \
             leaves {:.0} % of capacity; then all is as it was before. The service has recovered when at least \
             {:.0} % of the requests of each of five seconds in a row are served. A failure that goes on although \
             its cause is gone is called metastable: the queues are full of attempts that nobody waits for any \
             longer, and retries keep them full. A budget alone doesn't end it at this load: 85 % and a fifth of \
             that are more than the service can do. Adaptive concurrency measures the latency of an idle service \
             about once a minute and lets few requests through meanwhile, which is the dip late in the last \
             panel.\n\n![Answers in time over the run](simulation.svg)",
            fault::LOAD * 100.0,
            1.0 / fault::LEFT,
            fault::LEFT * 100.0,
            fault::WELL * 100.0,
        ),
        columns: vec![
            "strategy",
            "goodput during, of the capacity left",
            "recovered after",
            "served in the 60 s after",
            "p50 after",
            "p99 after",
            "attempts per request during",
            "and after",
        ],
        rows: runs.iter().map(row).collect(),
    }
}

pub(crate) fn one_slow(seed: u64) -> Table {
    Table {
        title: "One slow server of ten",
        text: format!(
            "The load is {:.0} % of capacity. One server takes {:.0} times as long as the others. What *everything* \
             loses is the price of measuring the latency of an idle service.",
            one_bad::LOAD * 100.0,
            one_bad::SLOWNESS,
        ),
        columns: BALANCING.to_vec(),
        rows: balancing(&one_bad::slow(&Strategy::balancers(), seed)),
    }
}

pub(crate) fn one_failing(seed: u64) -> Table {
    Table {
        title: "One server of ten that fails fast",
        text: format!(
            "The load is {:.0} % of capacity. One server answers everything with 500 after {:.0} ms, and so looks \
             fast and idle. An equal share is {:.0} %.",
            one_bad::LOAD * 100.0,
            one_bad::FAILS_AFTER.as_secs_f64() * 1e3,
            100 / SERVERS,
        ),
        columns: BALANCING.to_vec(),
        rows: balancing(&one_bad::failing(&Strategy::balancers(), seed)),
    }
}

const BALANCING: [&str; 6] = [
    "strategy",
    "served",
    "attempts to the bad server",
    "p50",
    "p99",
    "attempts per request",
];

fn balancing(runs: &[Run]) -> Vec<Vec<String>> {
    let row = |run: &Run| {
        let sum = run.record.summary(one_bad::FROM, one_bad::TO);
        vec![
            run.name.to_owned(),
            percent(sum.success()),
            percent(sum.to_first()),
            millis(sum.percentile(50)),
            millis(sum.percentile(99)),
            times(sum.load_factor()),
        ]
    };
    runs.iter().map(row).collect()
}

pub(crate) fn chained(runs: &[Run]) -> Table {
    let row = |run: &Run| {
        let sum = run.record.summary(chain::FROM, chain::TO);
        let seconds = chain::FROM..chain::TO;
        let worst = seconds
            .map(|second| run.record.summary(second, second + 1).load_factor())
            .fold(0.0, f64::max);
        vec![run.name.to_owned(), times(sum.load_factor()), times(worst)]
    };
    Table {
        title: "Retries along a chain of four services",
        text: format!(
            "Each of {} services calls the next, and each caller may make three attempts. The last one fails \
             every request. Without bounds it is sent up to 3 * 3 * 3 * 3 = 81 times as much as clients send; {} \
             requests a second are sent here. Marks say that a request is a retry already, and the hops after \
             don't retry what is one; where a budget allows a fifth at each hop, they leave the total at about \
             1.2 * 1.2 * 1.2 * 1.2. A budget is that of a window of 10 s and may be spent at \
             once, as it is in the worst second; what a breaker lets through was sent before it opened.",
            chain::HOPS,
            chain::RATE,
        ),
        columns: vec![
            "strategy",
            "attempts at the last service per request",
            "in the worst second",
        ],
        rows: runs.iter().map(row).collect(),
    }
}
