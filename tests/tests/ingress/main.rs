//! Clients from outside, by TLS, HTTP/1.1, HTTP/2 and HTTP/3, on real proxies: who gets in where, with which certificate, and
//! what is believed of what he says.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::large_futures,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says on stderr what it leaves out"
)]

mod bounds;
mod clients;
mod headers;
mod http3;
mod kit;
mod live;
mod tls;
