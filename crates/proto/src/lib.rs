//! The generated API types, and the only code that turns them into policy and back.

/// Generated from `proto/leeward/v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("leeward.v1");
}
