//! Hedging: a second request when the first takes long, and the answer that comes first.

use crate::admit::Received;
use crate::attempts::{Attempt, Call, Judged, Order, Outcome, body_left, send};
use crate::exchange::Exchange;
use crate::guard::is_failure;
use leeward_policy::model::Hedge;
use leeward_resilience::{Body, hedge_at, holds};
use leeward_upstream::RetryPermit;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Instant;

/// A request that is under way.
struct Flight {
    attempt: Attempt,
    sending: Pin<Box<dyn Future<Output = Outcome>>>,
}

/// Sends one request, and others beside it as policy, the destination's budget and the number of retries under
/// way allow. The first answer that is no failure is given; the others are abandoned, and say no more about
/// their endpoints than that they were slow. What fails while others are under way is written down; the last
/// failure is given.
pub(crate) async fn race(
    call: &mut Call<'_>,
    exchange: &mut Exchange,
    request: &mut Received,
    hedge: &Hedge,
    first: (Attempt, Box<Order>),
) -> Judged {
    let started = exchange.worker().now();
    let mut flights = vec![fly(first)];
    let mut sent = 0;
    loop {
        let next = hedge_at(hedge, sent, started, call.plan.idempotent, Body::Whole);
        let landed = tokio::select! {
            biased;
            landed = land(&mut flights) => Some(landed),
            () = at(next) => None,
        };
        match landed {
            Some((flight, outcome)) => {
                let judged = call.judge(exchange, flight.attempt, outcome);
                if is_decided(call, &judged) || flights.is_empty() {
                    call.abandon(exchange);
                    return judged;
                }
                exchange.keep = None;
                exchange.under_way = None;
                exchange.extra = None;
            }
            None => {
                sent += 1;
                // A body that is still coming can go to one of them only.
                let whole = exchange.intake.ended() && body_left(exchange) == Body::Whole;
                if whole
                    && call.has_other()
                    && let Some(permit) = leave(call, exchange)
                    && let Some(begun) = call.begin(exchange, request, Some(permit), true)
                {
                    exchange.worker().recorder.tried_again(&call.view.name, "hedge");
                    flights.push(fly(begun));
                }
            }
        }
    }
}

/// Whether an answer is one to give, even while others are under way: not a failure, and nothing that policy
/// would try again.
fn is_decided(call: &Call<'_>, judged: &Judged) -> bool {
    match judged {
        Judged::Answer(_) => true,
        Judged::Failed(failed) => {
            let answered = failed.response.as_ref().is_some_and(|answer| !is_failure(answer));
            failed.cause.is_denial() || answered && !holds(&call.plan.retry, failed.missed)
        }
    }
}

fn fly((attempt, order): (Attempt, Box<Order>)) -> Flight {
    Flight {
        attempt,
        sending: Box::pin(send(order)),
    }
}

/// Waits for the first of them to end.
async fn land(flights: &mut Vec<Flight>) -> (Flight, Outcome) {
    let (at, sending) = poll_fn(|cx| {
        for (at, flight) in flights.iter_mut().enumerate() {
            if let Poll::Ready(sending) = flight.sending.as_mut().poll(cx) {
                return Poll::Ready((at, sending));
            }
        }
        Poll::Pending
    })
    .await;
    (flights.swap_remove(at), sending)
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Leave to send one more.
fn leave(call: &Call<'_>, exchange: &Exchange) -> Option<RetryPermit> {
    let permit = call.service.state.retry(call.view.spec.pool.max_retries)?;
    let settings = &call.view.resilience.hedge_budget;
    let spent = call
        .service
        .guards
        .hedge
        .try_spend(exchange.worker().now(), settings);
    spent.then_some(permit)
}
