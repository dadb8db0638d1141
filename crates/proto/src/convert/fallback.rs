//! What answers when a call can't be served.

use super::degradation::flag_condition;
use super::plugin::named;
use super::text::{bounded, header_name, header_template, header_value, location, method, template};
use super::{DAY, KIB, SECOND};
use crate::field::{Fields, Section};
use crate::v1;
use leeward_policy::may_be_in_an_answer;
use leeward_policy::model::{Act, Cause, FallbackPolicy, Redirect, Rung, RungCause, StaticAnswer, Template};
use std::sync::Arc;

/// What can lead to a ladder.
const WANT_ON: &str = "want ConnectFailure, Timeout, Reset, NoEndpoint, Overflow, CircuitOpen, Overloaded, RateLimited, Disabled, AuthorizationDenied, IdentityMissing or AuthorizationUnknown";
/// What a rung can be for.
const WANT_CAUSES: &str = "want ConnectFailure, Timeout, Reset, NoEndpoint, Overflow, UpstreamStatus, CircuitOpen, Overloaded, RateLimited, Disabled, ZoneDown, PluginFault, AuthorizationDenied, IdentityMissing or AuthorizationUnknown";
const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

pub(super) fn fallback(f: &mut Fields, wire: &v1::FallbackPolicy) -> Option<FallbackPolicy> {
    let mut on = causes(f, "spec.on", &wire.on, leads_here);
    if wire.on.is_empty() {
        on.extend(Cause::DEFAULT);
    }
    let on_statuses = f.statuses("spec.onStatuses", &wire.on_statuses, 64, 400..=599);
    f.count("spec.rungs", wire.rungs.len(), 1..=16);
    let mut rungs = Vec::new();
    for (i, rung) in wire.rungs.iter().enumerate() {
        let parsed = parse_rung(&mut f.section(format!("spec.rungs[{i}]")), rung);
        if let Some(rung) = &parsed
            && i + 1 < wire.rungs.len()
            && ends_every_ladder(rung)
        {
            f.reject::<()>(
                format!("spec.rungs[{i}].fail"),
                "ends the ladder for every request, so that later rungs are never tried; want it last, or with causes, methods or when",
            );
        }
        rungs.extend(parsed);
    }
    Some(FallbackPolicy {
        on,
        on_statuses,
        rungs,
        hide_header: wire.hide_header,
        reserve_percent: f.small(
            "spec.reservePercent",
            wire.reserve_percent,
            FallbackPolicy::RESERVE_PERCENT,
            1..=90,
        ),
    })
}

fn ends_every_ladder(rung: &Rung) -> bool {
    matches!(rung.act, Act::Fail { .. })
        && rung.causes.is_empty()
        && rung.methods.is_empty()
        && rung.when.is_none()
}

/// Causes, each once.
fn causes<T: PartialEq>(
    f: &mut Fields,
    path: &str,
    wire: &[i32],
    read: impl Fn(&mut Fields, &str, i32) -> Option<T>,
) -> Vec<T> {
    f.count(path, wire.len(), 0..=16);
    let mut causes = Vec::new();
    for (i, number) in wire.iter().enumerate() {
        let at = format!("{path}[{i}]");
        match read(f, &at, *number) {
            Some(cause) if causes.contains(&cause) => {
                f.reject::<()>(at, "stands twice; each cause must stand once");
            }
            cause => causes.extend(cause),
        }
    }
    causes
}

fn leads_here(f: &mut Fields, path: &str, wire: i32) -> Option<Cause> {
    match rung_cause(wire) {
        Some(RungCause::Of(Cause::UpstreamStatus)) => f.reject(
            path,
            "UpstreamStatus is set by onStatuses; list the statuses there",
        ),
        Some(RungCause::Of(cause)) => Some(cause),
        Some(RungCause::ZoneDown) => {
            f.reject(path, format!("ZoneDown is only for a rung's causes; {WANT_ON}"))
        }
        Some(RungCause::PluginFault) => f.reject(
            path,
            format!("PluginFault is only for a rung's causes; {WANT_ON}"),
        ),
        None => f.reject(path, format!("{wire} is not known; {WANT_ON}")),
    }
}

fn for_a_rung(f: &mut Fields, path: &str, wire: i32) -> Option<RungCause> {
    rung_cause(wire).or_else(|| f.reject(path, format!("{wire} is not known; {WANT_CAUSES}")))
}

/// A cause; `None` for one that says nothing, or isn't known.
pub(super) fn rung_cause(wire: i32) -> Option<RungCause> {
    let cause = match v1::Cause::try_from(wire) {
        Ok(v1::Cause::Unspecified) | Err(_) => return None,
        Ok(v1::Cause::ConnectFailure) => Cause::ConnectFailure,
        Ok(v1::Cause::Timeout) => Cause::Timeout,
        Ok(v1::Cause::Reset) => Cause::Reset,
        Ok(v1::Cause::NoEndpoint) => Cause::NoEndpoint,
        Ok(v1::Cause::Overflow) => Cause::Overflow,
        Ok(v1::Cause::UpstreamStatus) => Cause::UpstreamStatus,
        Ok(v1::Cause::CircuitOpen) => Cause::CircuitOpen,
        Ok(v1::Cause::Overloaded) => Cause::Overloaded,
        Ok(v1::Cause::RateLimited) => Cause::RateLimited,
        Ok(v1::Cause::Disabled) => Cause::Disabled,
        Ok(v1::Cause::ZoneDown) => return Some(RungCause::ZoneDown),
        Ok(v1::Cause::PluginFault) => return Some(RungCause::PluginFault),
        Ok(v1::Cause::AuthorizationDenied) => Cause::AuthorizationDenied,
        Ok(v1::Cause::IdentityMissing) => Cause::IdentityMissing,
        Ok(v1::Cause::AuthorizationUnknown) => Cause::AuthorizationUnknown,
    };
    Some(RungCause::Of(cause))
}

fn parse_rung(s: &mut Section<'_>, wire: &v1::Rung) -> Option<Rung> {
    let act = match &wire.kind {
        None => {
            s.reject_here("is empty; want one of plugin, static, service, zone, stale, queue, redirect, fail")
        }
        Some(v1::rung::Kind::Plugin(rung)) => named(&mut s.section("plugin"), &rung.plugin, &rung.config)
            .map(|(plugin, config)| Act::Plugin { plugin, config }),
        Some(v1::rung::Kind::Static(rung)) => Some(static_answer(&mut s.section("static"), rung)),
        Some(v1::rung::Kind::Service(rung)) => s
            .name("service.service", &rung.service)
            .map(|service| Act::Service { service }),
        Some(v1::rung::Kind::Zone(rung)) => Some(Act::Zone {
            zones: s.names("zone.zones", &rung.zones, 16),
        }),
        Some(v1::rung::Kind::Stale(rung)) => Some(Act::Stale {
            max_stale: s.optional_duration("stale.maxStale", rung.max_stale.as_ref(), SECOND..=7 * DAY),
        }),
        Some(v1::rung::Kind::Queue(rung)) => s
            .name("queue.queue", &rung.queue)
            .map(|queue| Act::Queue { queue }),
        Some(v1::rung::Kind::Redirect(rung)) => redirect(&mut s.section("redirect"), rung),
        Some(v1::rung::Kind::Fail(rung)) => Some(fail(s, rung)),
    };
    let at = s.at("causes");
    let causes = causes(s.fields(), &at, &wire.causes, for_a_rung);
    let methods = methods(s, &wire.methods);
    let when = flag_condition(&mut s.section("when"), wire.when.as_ref());
    let deadline_percent = s.small("deadlinePercent", wire.deadline_percent, 100, 1..=100);
    Some(Rung {
        act: act?,
        causes,
        methods,
        when,
        deadline_percent,
    })
}

fn methods(s: &mut Section<'_>, wire: &[String]) -> Vec<Box<str>> {
    let path = s.at("methods");
    let f = s.fields();
    f.count(&path, wire.len(), 0..=16);
    f.unique(&path, "", wire);
    let methods = wire.iter().enumerate();
    methods
        .filter_map(|(i, text)| method(f, &format!("{path}[{i}]"), text).map(Box::from))
        .collect()
}

fn static_answer(s: &mut Section<'_>, wire: &v1::StaticRung) -> Act {
    let status = s.small("status", wire.status, 0, 200..=599);
    let path = s.at("headers");
    let f = s.fields();
    f.count(&path, wire.headers.len(), 0..=64);
    let mut headers = Vec::new();
    for (i, header) in wire.headers.iter().enumerate() {
        let at = format!("{path}[{i}]");
        let name = header_name(f, &format!("{at}.name"), &header.name);
        let value_at = format!("{at}.value");
        let value = if wire.template {
            header_template(f, &value_at, &header.value)
        } else {
            header_value(f, &value_at, &header.value).map(Template::fixed)
        };
        if let Some(name) = &name
            && !may_be_in_an_answer(name)
        {
            f.reject::<()>(
                format!("{at}.name"),
                format!("{name} is set by the proxy; leave it out"),
            );
        }
        headers.extend(name.zip(value));
    }
    let at = s.at("body");
    bounded(s.fields(), &at, &wire.body, 64 * KIB);
    let body = if wire.template {
        template(s.fields(), &at, &wire.body)
    } else {
        None
    };
    Act::Static(Arc::new(StaticAnswer {
        status: u16::try_from(status).unwrap_or(0),
        headers,
        body: body.unwrap_or_else(|| Template::fixed(&wire.body)),
        template: wire.template,
    }))
}

fn redirect(s: &mut Section<'_>, wire: &v1::RedirectRung) -> Option<Act> {
    let status = match u16::try_from(wire.status) {
        Ok(0) => Some(307),
        Ok(status) if REDIRECTS.contains(&status) => Some(status),
        Ok(_) | Err(_) => s.reject(
            "status",
            format!(
                "{} is not a redirection; want 301, 302, 303, 307 or 308",
                wire.status
            ),
        ),
    };
    let at = s.at("location");
    let location = location(s.fields(), &at, &wire.location);
    Some(Act::Redirect(Arc::new(Redirect {
        location: location?,
        status: status?,
    })))
}

fn fail(s: &mut Section<'_>, wire: &v1::FailRung) -> Act {
    let status = (wire.status != 0).then(|| s.small("fail.status", wire.status, 0, 400..=599));
    Act::Fail {
        status: status.and_then(|status| u16::try_from(status).ok()),
    }
}
