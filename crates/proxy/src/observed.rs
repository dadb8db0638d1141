//! How requests fare, told to the control plane while it asks: it compares proxies that have a change with those that don't.

use leeward_config::Live;
use leeward_proto::v1;
use leeward_telemetry::{Hub, RequestTally};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How often it is told.
const EVERY: Duration = Duration::from_secs(1);
/// Routes that are told of at once: those with the most requests.
const MAX_ROUTES: usize = 2000;

type Tallies = BTreeMap<(Arc<str>, Arc<str>), RequestTally>;

/// Tells, while it is asked, until dropped.
pub(crate) async fn tell(live: Live, hub: Arc<Hub>) {
    let mut asked = live.observed();
    // The sender lives as long as `live`.
    while asked.wait_for(|rollout| *rollout != 0).await.is_ok() {
        let mut before = hub.requests();
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            let rollout = *asked.borrow_and_update();
            if rollout == 0 {
                break;
            }
            let now = hub.requests();
            let routes = since(&before, &now);
            // That there was nothing is nothing to tell.
            if !routes.is_empty() {
                live.tell_requests(v1::RequestSignals { rollout, routes });
            }
            before = now;
        }
    }
}

/// What came since the counters stood at `before`.
fn since(before: &Tallies, now: &Tallies) -> Vec<v1::RouteSignals> {
    let mut routes: Vec<v1::RouteSignals> = now
        .iter()
        .filter_map(|(way, tally)| {
            let earlier = before.get(way).copied().unwrap_or_default();
            let requests = tally.requests.wrapping_sub(earlier.requests);
            let times = tally.times.iter().zip(earlier.times);
            (requests > 0).then(|| v1::RouteSignals {
                direction: way.0.to_string(),
                route: way.1.to_string(),
                requests,
                failures: tally.failures.wrapping_sub(earlier.failures),
                times: times.map(|(now, before)| now.wrapping_sub(before)).collect(),
            })
        })
        .collect();
    if routes.len() > MAX_ROUTES {
        routes.sort_by_key(|route| std::cmp::Reverse(route.requests));
        routes.truncate(MAX_ROUTES);
    }
    routes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_told() {
        let way = |route: &str| (Arc::from("outbound"), Arc::from(route));
        let tally = |requests, failures, slow| {
            let mut tally = RequestTally {
                requests,
                failures,
                ..RequestTally::default()
            };
            tally.times[9] = slow;
            tally
        };
        let before = Tallies::from([(way("r"), tally(10, 1, 4)), (way("s"), tally(5, 0, 0))]);
        let now = Tallies::from([
            (way("r"), tally(13, 2, 6)),
            (way("s"), tally(5, 0, 0)),
            (way("t"), tally(1, 0, 1)),
        ]);
        let told = since(&before, &now);
        let told = told
            .iter()
            .map(|r| (r.route.as_str(), r.requests, r.failures, r.times[9]));
        assert_eq!(told.collect::<Vec<_>>(), [("r", 3, 1, 2), ("t", 1, 0, 1)]);
    }

    #[test]
    fn of_many_routes_the_busiest_are_told() {
        let now: Tallies = (0..3000u64)
            .map(|i| {
                let tally = RequestTally {
                    requests: i + 1,
                    ..RequestTally::default()
                };
                ((Arc::from("outbound"), Arc::from(format!("r{i}"))), tally)
            })
            .collect();
        let told = since(&Tallies::new(), &now);
        assert_eq!((told.len(), told[0].requests), (MAX_ROUTES, 3000));
    }
}
