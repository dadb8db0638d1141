//! What answers when a call can't be served.

use super::super::words;
use super::degradation::condition;
use super::fields::Fields;
use crate::v1;
use crate::v1::rung::Kind;

pub(super) fn policy(f: &mut Fields<'_>) -> v1::FallbackPolicy {
    v1::FallbackPolicy {
        on: f.choices("on", words::CAUSE),
        on_statuses: f.numbers("onStatuses"),
        rungs: f.list("rungs", rung),
        hide_header: f.optional_bool("hideHeader").unwrap_or_default(),
        reserve_percent: f.small("reservePercent"),
    }
}

fn rung(f: &mut Fields<'_>) -> v1::Rung {
    let kinds = [
        f.object("plugin", |f| v1::PluginRung {
            plugin: f.text("plugin"),
            config: f.text("config"),
        })
        .map(Kind::Plugin),
        f.object("static", static_answer).map(Kind::Static),
        f.object("service", |f| v1::ServiceRung {
            service: f.text("service"),
        })
        .map(Kind::Service),
        f.object("zone", |f| v1::ZoneRung {
            zones: f.text_list("zones"),
        })
        .map(Kind::Zone),
        f.object("stale", |f| v1::StaleRung {
            max_stale: f.duration("maxStale"),
        })
        .map(Kind::Stale),
        f.object("queue", |f| v1::QueueRung {
            queue: f.text("queue"),
        })
        .map(Kind::Queue),
        f.object("redirect", |f| v1::RedirectRung {
            location: f.text("location"),
            status: f.small("status"),
        })
        .map(Kind::Redirect),
        f.object("fail", |f| v1::FailRung {
            status: f.or_zero("status"),
        })
        .map(Kind::Fail),
    ];
    v1::Rung {
        kind: f.exclusive(
            "plugin, static, service, zone, stale, queue, redirect, fail",
            kinds,
        ),
        causes: f.choices("causes", words::CAUSE),
        methods: f.text_list("methods"),
        when: f.object("when", condition),
        deadline_percent: f.small("deadlinePercent"),
    }
}

fn static_answer(f: &mut Fields<'_>) -> v1::StaticRung {
    v1::StaticRung {
        status: f.small("status"),
        headers: f.list("headers", |f| v1::Header {
            name: f.text("name"),
            value: f.text("value"),
        }),
        body: f.text("body"),
        template: f.optional_bool("template").unwrap_or_default(),
    }
}
