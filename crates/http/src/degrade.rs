//! Degrade: what flags and levels of degradation have switched off, and faults that are injected.

use crate::admit::Received;
use crate::exchange::Exchange;
use crate::flags::holds;
use crate::route::Plan;
use leeward_policy::model::{Cause, Fault};
use std::sync::Arc;
use tokio::time::{sleep, timeout_at};

/// Whether policy lets the call be made at all.
pub(crate) fn gate(exchange: &mut Exchange, plan: &Plan, request: &Received) -> Result<(), Cause> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let Some(rule) = plan.rule.and_then(|idx| snapshot.rule(idx)) else {
        return Ok(());
    };
    if let Some(condition) = &rule.enabled
        && !holds(exchange, request, condition, None)
    {
        return Err(Cause::Disabled);
    }
    if snapshot.degradations().is_empty() {
        return Ok(());
    }
    let levels = exchange.worker().levels();
    if let Some(by) = levels.sheds(&rule.route, plan.priority) {
        exchange.record.level = Some(Arc::clone(by));
        exchange.refused_by("degradation.shedBelow", exchange.record.service.clone().as_ref());
        return Err(Cause::Overloaded);
    }
    Ok(())
}

/// Makes a request late, or fail, where policy says so.
pub(crate) async fn inject(exchange: &mut Exchange, plan: &Plan, request: &Received) -> Result<(), Cause> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let rule = plan.rule.and_then(|idx| snapshot.rule(idx));
    let Some(fault) = rule.and_then(|rule| rule.fault.as_deref()) else {
        return Ok(());
    };
    if !strikes(exchange, fault, request) {
        return Ok(());
    }
    exchange.record.fault = true;
    if let Some(delay) = fault.delay {
        match plan.attempts_until {
            None => sleep(delay).await,
            Some(until) => {
                if timeout_at(until.into(), sleep(delay)).await.is_err() {
                    return Err(Cause::Timeout);
                }
            }
        }
    }
    fault.abort.map_or(Ok(()), Err)
}

fn strikes(exchange: &mut Exchange, fault: &Fault, request: &Received) -> bool {
    let on = match &fault.when {
        None => true,
        Some(condition) => holds(exchange, request, condition, None),
    };
    on && (fault.percent >= 100 || fastrand::u32(..100) < fault.percent)
}
