//! Who is who: SPIFFE ids, certificates, and the TLS configurations made of them.
//!
//! In the path: every connection between parts of the mesh (proxy to proxy, proxy or person to control
//! plane) is TLS 1.3 with a certificate on both sides, and both sides check the other's SPIFFE id.
//!
//! Beside that, who a token is from ([`jwt`]): time and keys are arguments there.
//!
//! Beside the mesh, [`web`] speaks TLS with whom the system trusts.
//!
//! This crate knows no policy, no HTTP but the tonic channel to a control plane, and no way to get a
//! certificate over the network.
//!
//! Read first: [`SpiffeId`], then [`Identity`].
//!
//! Invariants:
//! - No configuration made here accepts a peer without a certificate, or one of another trust domain.
//! - No token is valid by a key that could be a secret shared with others, or by none.
//! - A private key that other users of the machine can read is not used.

pub mod authority;
pub mod channel;
mod files;
mod identity;
pub mod jwt;
mod spiffe;
pub mod tls;
mod verify;
pub mod web;

pub use identity::{Identity, IdentityError, watch};
pub use spiffe::{InvalidSpiffeId, Role, SpiffeId};
pub use tls::PeerInfo;
pub use verify::{PeerError, peer_id};
