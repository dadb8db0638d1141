//! What answers when a call can't be served, on the wire.

use super::degradation::condition;
use super::{duration, names};
use crate::v1;
use leeward_policy::model::{Act, Cause, FallbackPolicy, Rung, RungCause, StaticAnswer};

pub(super) fn policy(policy: &FallbackPolicy) -> v1::FallbackPolicy {
    v1::FallbackPolicy {
        on: policy.on.iter().map(|of| cause(*of).into()).collect(),
        on_statuses: policy.on_statuses.iter().map(|s| u32::from(*s)).collect(),
        rungs: policy.rungs.iter().map(rung).collect(),
        hide_header: policy.hide_header,
        reserve_percent: policy.reserve_percent,
    }
}

pub(super) const fn cause(cause: Cause) -> v1::Cause {
    match cause {
        Cause::ConnectFailure => v1::Cause::ConnectFailure,
        Cause::Timeout => v1::Cause::Timeout,
        Cause::Reset => v1::Cause::Reset,
        Cause::NoEndpoint => v1::Cause::NoEndpoint,
        Cause::Overflow => v1::Cause::Overflow,
        Cause::UpstreamStatus => v1::Cause::UpstreamStatus,
        Cause::CircuitOpen => v1::Cause::CircuitOpen,
        Cause::Overloaded => v1::Cause::Overloaded,
        Cause::RateLimited => v1::Cause::RateLimited,
        Cause::Disabled => v1::Cause::Disabled,
        Cause::AuthorizationDenied => v1::Cause::AuthorizationDenied,
        Cause::IdentityMissing => v1::Cause::IdentityMissing,
        Cause::AuthorizationUnknown => v1::Cause::AuthorizationUnknown,
    }
}

fn rung_cause(of: RungCause) -> i32 {
    match of {
        RungCause::Of(of) => cause(of).into(),
        RungCause::ZoneDown => v1::Cause::ZoneDown.into(),
        RungCause::PluginFault => v1::Cause::PluginFault.into(),
    }
}

fn rung(rung: &Rung) -> v1::Rung {
    let kind = match &rung.act {
        Act::Plugin { plugin, config } => v1::rung::Kind::Plugin(v1::PluginRung {
            plugin: plugin.to_string(),
            config: config.to_string(),
        }),
        Act::Static(answer) => v1::rung::Kind::Static(static_answer(answer)),
        Act::Service { service } => v1::rung::Kind::Service(v1::ServiceRung {
            service: service.to_string(),
        }),
        Act::Zone { zones } => v1::rung::Kind::Zone(v1::ZoneRung { zones: names(zones) }),
        Act::Stale { max_stale } => v1::rung::Kind::Stale(v1::StaleRung {
            max_stale: max_stale.and_then(duration),
        }),
        Act::Queue { queue } => v1::rung::Kind::Queue(v1::QueueRung {
            queue: queue.to_string(),
        }),
        Act::Redirect(redirect) => v1::rung::Kind::Redirect(v1::RedirectRung {
            location: redirect.location.source().to_owned(),
            status: redirect.status.into(),
        }),
        Act::Fail { status } => v1::rung::Kind::Fail(v1::FailRung {
            status: status.map(u32::from).unwrap_or_default(),
        }),
    };
    v1::Rung {
        kind: Some(kind),
        causes: rung.causes.iter().map(|of| rung_cause(*of)).collect(),
        methods: rung.methods.iter().map(|method| method.to_string()).collect(),
        when: rung.when.as_ref().map(condition),
        deadline_percent: rung.deadline_percent,
    }
}

fn static_answer(answer: &StaticAnswer) -> v1::StaticRung {
    let headers = answer.headers.iter().map(|(name, value)| v1::Header {
        name: name.to_string(),
        value: value.source().to_owned(),
    });
    v1::StaticRung {
        status: answer.status.into(),
        headers: headers.collect(),
        body: answer.body.source().to_owned(),
        template: answer.template,
    }
}
