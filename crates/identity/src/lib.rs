//! Who is who: SPIFFE ids, certificates, and the TLS configurations made of them.
//!
//! In the path: every connection between parts of the mesh (proxy to proxy, proxy or person to control
//! plane) is TLS 1.3 with a certificate on both sides, and both sides check the other's SPIFFE id.
//!
//! Beside that, who a token is from ([`jwt`]): time and keys are arguments there.
//!
//! Beside the mesh, [`web`] speaks TLS with whom the system trusts, and [`edge`] with clients from outside.
//!
//! This crate knows no policy, no HTTP but the tonic channel to a control plane, and no messages: who asks a control plane
//! for a certificate is elsewhere; what is asked ([`NewKey`]), checked and signed ([`authority`]) is here.
//!
//! Read first: [`SpiffeId`], then [`Identity`].
//!
//! Invariants:
//! - No configuration made here accepts a peer without a certificate, or one of another trust domain, but the one for
//!   joining and the one for guests, whose connections go nowhere else ([`tls::Incoming`]), and those of [`edge`], whose
//!   clients have no identity.
//! - No handshake by a configuration made here takes a certificate that the list of revocations refuses ([`Revoked`]), however
//!   often it was taken before; connections that are tied ([`Tied`]) are cut.
//! - A private key of the mesh that other users of the machine can read is not used, and none is sent anywhere but
//!   that of a workload to the process of this node that it is for ([`Svid`]).
//! - A certificate that is issued has what this crate puts into it, and nothing that a request asks for but its key.
//! - No token is valid by a key that could be a secret shared with others, or by none.

pub mod authority;
mod bundle;
pub mod channel;
pub mod edge;
mod files;
mod identity;
pub mod join;
pub mod jwt;
mod leaves;
mod proven;
mod request;
mod revoked;
pub mod rotation;
#[cfg(test)]
mod scratch;
mod spiffe;
mod svid;
pub mod tls;
mod token;
mod validity;
mod verify;
pub mod web;

pub use bundle::{Bundle, BundleError, MAX_ROOTS, Root, fingerprint};
pub use identity::{Facts, Given, Identity, IdentityError, Issued, NotReady, watch};
pub use request::{BadRequest, CheckedRequest, MAX_REQUEST, NewKey};
pub use revoked::{MAX_REVOKED, RevocationCounts, Revoked, Tie, Tied, TooManyRevoked};
pub use spiffe::{InvalidSpiffeId, Role, SpiffeId};
pub use svid::Svid;
pub use tls::PeerInfo;
pub use token::{InvalidToken, JoinToken};
pub use validity::{Validity, shown};
pub use verify::{PeerError, peer_id};
