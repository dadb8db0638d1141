//! Backup and recovery: what the store holds on another place, complete and as it changes, and the way back.
//!
//! - `create` reads every key while the store is written to, in chunks that are stored once for all backups, and
//!   writes a manifest last.
//! - `ship` stores every further change within a second, under the position after which it begins.
//! - `recover` builds a store from a backup and what was shipped after it, up to a revision or a time.
//! - `verify` does that in a scratch directory and compares; `drill` does it and takes the time.
//! - `keeper` does all of it by policy, at the one control plane that leads the job.
//! - `standby` follows what is shipped, and takes over; `epoch` and `fence` see to it that two never lead.
//!
//! Invariants:
//! - What has no manifest is no backup, and a manifest names only what is there.
//! - No byte of anything that is stored can differ without being noticed, by the object's name.
//! - A private key is stored only encrypted, and only if somebody asked for it.
//! - A store that is restored has a manifest's content whole, or is none.

#![allow(
    clippy::result_large_err,
    reason = "what goes wrong here is rare, and ends hours of work: it may say all that is known"
)]

mod catalogue;
mod chunker;
pub mod command;
mod content;
mod create;
mod drill;
mod epoch;
mod error;
mod fence;
mod format;
mod into;
mod keeper;
mod manifest;
mod place;
mod recover;
mod retention;
mod seal;
mod service;
mod ship;
mod standby;
mod verify;

pub use fence::Lead;
pub use keeper::{BackupSettings, Backups};
pub use recover::refuse_unfinished;
pub(crate) use service::Service;
pub use standby::{Standby, StandbySettings};

#[cfg(test)]
mod tests;
