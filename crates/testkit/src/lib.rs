//! Backends that misbehave on command, and meshes of real processes, for tests and benches.
//!
//! Nothing here stands in the path of a request in production; only dev-dependencies, and the benches, name this
//! crate.
//!
//! Read first: [`Mesh`], then [`Backend`], then [`Client`].
//!
//! Invariants:
//! - Every listener is on 127.0.0.1, or on an address in a network namespace that the test has made, and takes whatever port
//!   is free.
//! - Every wait has an end, and says what it waited for when it gives up.
//! - Every process that was started is ended by its id, whatever becomes of the test.

mod backend;
pub mod binaries;
mod body;
mod capture;
mod client;
mod command;
mod dir;
mod echo;
mod etcd;
mod fleet;
mod grpc;
mod hosts;
mod load;
mod mesh;
pub mod netns;
mod otlp;
pub mod policy;
mod port;
mod process;
pub mod raw;
mod wait;
mod way;
mod world;

pub use backend::{Answer, Backend, Behave, Content, Relay, Seen};
pub use body::{Body, bytes_body, channel_body, empty_body, zeros_body};
pub use capture::{Capture, Captured};
pub use client::{Client, Protocol, Reply, Unsent, get, request, with_header};
pub use command::leeward;
pub use dir::TempDir;
pub use echo::WebSocketEcho;
pub use etcd::{EtcdCluster, EtcdVersion};
pub use fleet::{Fleet, Tallied};
pub use grpc::{BytesCodec, call_streaming, grpc_channel};
pub use hosts::{Hosts, ZONES, on_hosts};
pub use load::{Load, Tally};
pub use mesh::{Mesh, MeshBuilder, Node};
pub use otlp::{Receiver, Span, SpanKind, Tree};
pub use port::Port;
pub use process::{Memory, Process};
pub use wait::eventually;
pub use way::Way;
pub use world::World;
