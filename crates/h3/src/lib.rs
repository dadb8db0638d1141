//! HTTP/3 (RFC 9114) for clients from outside of the mesh.
//!
//! In the path: `leeward-http` accepts connections and requests here, as it does those of other proxies in
//! `leeward-zone`. Frames and QPACK are the `h3` crate's; its streams are quinn's, by an adapter of ours, since three
//! things have to be seen that its own adapter doesn't show: that a client wants no answer any more, how much it makes the
//! proxy hold in frames that aren't data, and whether an answer that was dropped was whole.
//!
//! This crate knows no policy and no other part of Leeward. What a certificate is and which clients may come is in the
//! configuration of TLS that a connection is accepted with.
//!
//! Read first: [`Server`], then [`Connection`], then [`Exchange`].
//!
//! Invariants:
//! - Whatever a client sends, what is held for it is bounded: heads by [`Limits::head`], bodies by windows, streams by
//!   number, handshakes by number and time.
//! - An answer that breaks off never looks whole: its stream is reset.
//! - There is no 0-RTT.

mod body;
mod guard;
mod server;
mod streams;

pub use body::Incoming;
pub use server::{ALPN, AcceptError, Arriving, Connection, Exchange, Limits, Responder, Server, StreamError};
