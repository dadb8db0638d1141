//! What Leeward says about itself: metrics, decision records, traces, access log.
//!
//! In the path: a worker's [`Recorder`] begins a [`Record`] for each request and writes it down when the
//! answer has ended. Everything that is told about a request, by trace, log or metric, comes from that one
//! record.
//!
//! This crate knows no policy type and no request body. It takes no lock and allocates nothing but a
//! request's list of attempts on the way of a request that isn't sampled.
//!
//! Read first: [`Record`], then [`Recorder`], then [`catalogue`].

mod access;
pub mod catalogue;
mod hub;
mod logs;
mod otlp;
mod reason;
mod record;
mod recorder;
mod series;
mod span;
mod trace;

pub use access::AccessLog;
pub use hub::{Gauge, Hub, Reading, RequestTally, Settings, TraceSettings};
pub use logs::{Format, init_logs, watch_panics};
pub use otlp::{ExportError, Protocol};
pub use reason::{Outcome, Reason};
pub use record::{Attempt, Authorized, Direction, FlagSeen, Peer, PluginFault, Record, Tcp};
pub use recorder::Recorder;
pub use trace::TraceContext;
