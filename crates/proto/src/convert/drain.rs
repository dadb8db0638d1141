//! Zones that are taken out of use.

use super::resilience::time;
use super::text::bounded;
use super::{HOUR, SECOND};
use crate::field::Fields;
use crate::v1;
use leeward_policy::model::ZoneDrain;

pub(super) fn drain(f: &mut Fields, wire: &v1::ZoneDrain) -> Option<ZoneDrain> {
    const REASON: usize = 256;
    let start_time = time(f, "spec.drain.startTime", "begins", wire.start_time);
    let expire_time = time(f, "spec.drain.expireTime", "ends", wire.expire_time);
    let mut s = f.section("spec.drain");
    let step = s.small("step", wire.step, ZoneDrain::STEP, 1..=100);
    let interval = s.duration(
        "interval",
        wire.interval.as_ref(),
        ZoneDrain::INTERVAL,
        SECOND..=HOUR,
    );
    bounded(f, "spec.drain.reason", &wire.reason, REASON);
    Some(ZoneDrain {
        start_time: start_time?,
        step,
        interval,
        expire_time: expire_time?,
        reason: wire.reason.as_str().into(),
    })
}
