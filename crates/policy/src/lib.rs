//! The vocabulary of Leeward, the validated policy model, and its compilation to an immutable
//! [`Snapshot`].
//!
//! In the path: `leeward-proto` parses bytes into [`Resource`]s, a [`World`] keeps the good ones, and
//! [`Snapshot::compile`] makes of them what requests read.
//!
//! This crate knows no I/O, no clock, no randomness, no wire format and no metrics. Its only errors are
//! about values.
//!
//! Read first: [`model`], then [`Snapshot`], then [`World`].
//!
//! Invariants:
//! - A snapshot is consistent with itself: every index in it resolves.
//! - Nothing leaves a [`World`] but by an explicit delete.
//! - Whether a request may pass is decided from arguments alone, the claims of its tokens among them.

pub mod explain;
mod fields;
mod levels;
pub mod lint;
pub mod model;
mod name;
pub mod path;
mod routes;
mod selector;
mod snapshot;
mod world;

pub use fields::{claims_identity, may_be_in_an_answer};
pub use levels::{FlagsInForce, Forced, LevelStanding, Levels, Resolved};
pub use model::{Key, Kind, Resource, Spec};
pub use name::{InvalidName, Name};
pub use routes::{Head, RouteTable};
pub use selector::{InvalidSelector, Selector};
pub use snapshot::{
    ActView, Asking, AuthorizationView, Decision, DegradationView, Denied, EndpointKey, EndpointView,
    ExportedTo, FallbackIdx, FallbackView, FilterView, GatewayView, Gateways, Held, HeldLevel, ListenerView,
    PluginIdx, PluginView, PortView, QueueIdx, QueueView, RouterView, RuleIdx, RuleView, RungView,
    ServiceIdx, ServiceView, Snapshot, Subset, Target, Tier, Via, Viewer, Workloads, canonical, path_pattern,
    zone_of,
};
pub use world::{Guards, Quarantine, Refusal, Staged, World};
