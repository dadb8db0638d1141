//! The generated API types, and the only code that turns them into policy and back.
//!
//! In the path: bytes become [`v1`] types (unchecked), [`parse`] makes [`leeward_policy`] types of them
//! (checked, every bad field named), [`render`] goes back. [`manifest`] does the same for YAML.
//!
//! This crate knows no I/O. Nothing it is given makes it panic.
//!
//! Invariants:
//! - `parse(&render(&r)) == r` for every valid resource.
//! - Every bad field is reported, not only the first, with its path as it stands in YAML.

mod convert;
mod field;
pub mod manifest;
mod render;
mod yaml;

pub use convert::{MAX_MANAGER, guards, kind_of, parse, parse_key, spec_kind};
pub use field::BadField;
pub use render::{
    explain, parse_question, render, render_explanation, render_finding, render_key, render_kind,
};

/// The descriptors of everything under `proto`, and of what it imports, as a `google.protobuf.FileDescriptorSet`, with
/// the comments: for reflection, for the mapping to JSON, and for the document of the HTTP API.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Generated from `proto/leeward/v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::nursery,
    clippy::restriction,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("leeward.v1");
}

/// Generated from `proto/spiffe`, which has no package.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::nursery,
    clippy::restriction,
    reason = "generated"
)]
pub mod spiffe {
    tonic::include_proto!("_");
}
