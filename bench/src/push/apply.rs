//! What a proxy does with a change, from the message to the snapshot that requests read: parsed, checked, compiled; and what
//! it takes to let the old one go.

use super::report::{Report, mebibytes, percentile};
use crate::measure::now;
use anyhow::Context;
use leeward_policy::{Name, Staged, Viewer, World as Policy};
use leeward_proto::{parse, v1};
use leeward_testkit::World;
use std::sync::Arc;
use std::time::Duration;

/// Measures it for a world of this size, with so many changes of one route and of one service.
pub(super) fn measure(world: &World, changes: u32, report: &mut Report) -> anyhow::Result<()> {
    let name = |text: &str| Name::parse(text).context("a name");
    let viewer = Viewer {
        zone: name("z0")?,
        proxy: name("p0")?,
    };
    let resources = world.resources();
    let before = resident()?;
    let began = now();
    let mut policy = Policy::default();
    policy.commit(stage(&resources)?);
    let mut live = Arc::new(policy.snapshot(viewer.clone(), 1));
    report.row("everything, at the start", ms(began), "ms")?;
    let after = resident()?;
    report.row("in memory for it", mebibytes(after.saturating_sub(before)), "MiB")?;
    let service = resources
        .iter()
        .find(|resource| matches!(resource.spec, Some(v1::resource::Spec::Service(_))))
        .context("there is no service")?;
    for what in ["route", "service"] {
        let (mut made, mut dropped) = (Vec::new(), Vec::new());
        for i in 0..changes {
            let changed = match what {
                "route" => world.route(0, Duration::from_millis(20_000 + u64::from(i))),
                _ => with_weight(service.clone(), i + 2),
            };
            let began = now();
            policy.commit(stage(&[changed])?);
            let next = policy.snapshot_after(Some(&live), viewer.clone(), u64::from(i) + 2);
            let next = Arc::new(next);
            made.push(ms(began));
            let began = now();
            live = next;
            dropped.push(ms(began));
        }
        made.sort_by(f64::total_cmp);
        dropped.sort_by(f64::total_cmp);
        report.row(
            format!("one {what} changed (median)"),
            percentile(&made, 0.5),
            "ms",
        )?;
        report.row(
            format!("one {what} changed: the old snapshot dropped (median)"),
            percentile(&dropped, 0.5),
            "ms",
        )?;
    }
    drop(live);
    Ok(())
}

fn with_weight(mut resource: v1::Resource, weight: u32) -> v1::Resource {
    if let Some(v1::resource::Spec::Service(service)) = &mut resource.spec {
        for endpoint in &mut service.endpoints {
            endpoint.weight = weight;
        }
    }
    resource
}

fn stage(resources: &[v1::Resource]) -> anyhow::Result<Staged> {
    let parsed = resources.iter().map(|resource| {
        let parsed = parse(resource).ok().context("a resource of the world is bad")?;
        anyhow::Ok(Arc::new(parsed))
    });
    Ok(Staged {
        upserts: parsed.collect::<anyhow::Result<_>>()?,
        ..Staged::default()
    })
}

fn ms(began: std::time::Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

/// Bytes of this process in memory.
fn resident() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no VmRSS")?.parse::<u64>()? * 1024)
}
