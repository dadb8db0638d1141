//! c
use bytes::Bytes;
use http::*;
use leeward_policy::model;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
/// c
#[derive(Debug, Default)]
pub struct Caches;
/// c
#[derive(Debug)]
pub struct RuleCache;
/// c
#[derive(Debug)]
pub struct Asked<'a> {
    /// m
    pub method: &'a Method,
    /// a
    pub authority: &'a str,
    /// u
    pub uri: &'a Uri,
    /// h
    pub headers: &'a HeaderMap,
}
/// l
#[derive(Debug)]
pub enum Look {
    /// f
    Fresh(Kept),
    /// r
    Revalidate {
        /// k
        kept: Kept,
        /// r
        refresh: Option<Fill>,
    },
    /// v
    Validate {
        /// k
        kept: Kept,
        /// c
        conditions: HeaderMap,
    },
    /// m
    Miss,
    /// b
    Bypass,
}
/// k
#[derive(Debug)]
pub struct Kept {
    /// s
    pub status: StatusCode,
    /// h
    pub headers: HeaderMap,
    /// b
    pub body: Bytes,
}
impl Kept {
    /// n
    pub fn not_modified(&self, _a: &Asked<'_>) -> bool {
        false
    }
}
/// j
#[derive(Debug)]
pub enum Joined {
    /// l
    Lead(Fill),
    /// w
    Wait(Waiter),
}
/// h
#[derive(Debug)]
pub enum Head {
    /// k
    Keep,
    /// p
    Pass,
    /// f
    Freshened(Kept),
}
/// f
#[derive(Debug)]
pub struct Fill;
/// w
#[derive(Debug)]
pub struct Waiter;
impl Waiter {
    /// w
    pub async fn wait(self) -> Option<Kept> {
        None
    }
}
impl Fill {
    /// h
    pub fn head(&mut self, _s: StatusCode, _h: &HeaderMap, _n: SystemTime) -> Head {
        Head::Pass
    }
    /// d
    pub fn data(&mut self, _d: &Bytes) {}
    /// f
    pub fn finish(self) {}
    /// c
    pub fn conditions(&self, _k: &Kept) -> HeaderMap {
        HeaderMap::new()
    }
}
impl Caches {
    /// r
    pub fn rule(&self, _id: &Arc<str>, _s: &model::Cache) -> Arc<RuleCache> {
        Arc::new(RuleCache)
    }
}
impl RuleCache {
    /// l
    pub fn look(&self, _a: &Asked<'_>, _n: SystemTime) -> Look {
        Look::Bypass
    }
    /// s
    pub fn stale(&self, _a: &Asked<'_>, _m: Option<Duration>, _n: SystemTime) -> Option<Kept> {
        None
    }
    /// j
    pub fn join(self: &Arc<Self>, _a: &Asked<'_>, _n: SystemTime) -> Joined {
        Joined::Lead(Fill)
    }
    /// i
    pub fn invalidate(&self, _a: &Asked<'_>) {}
}
