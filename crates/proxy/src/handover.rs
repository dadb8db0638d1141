//! How a proxy is replaced by another process without a lost request.
//!
//! A proxy listens on a Unix socket, the *place* (`--handover`). One that starts and finds another there asks
//! it for its listening sockets, makes itself ready beside it, begins to accept from the same sockets, and
//! says so; only then does the old one stop accepting, and drains. In steps:
//!
//! 1. the successor says hello, with the version of this protocol;
//! 2. the predecessor answers with what policy it runs and at which levels of degradation it is, then with every listening socket: those for requests,
//!    those beside them and the place's own;
//! 3. the successor loads policy, and is ready when it runs one at least as new, at these levels;
//! 4. it accepts, and says that it is ready;
//! 5. the predecessor lets go of the sockets and says that they are the successor's, then drains.
//!
//! Why so:
//!
//! - The sockets are *shared*, not bound anew beside the old ones. A connection that the kernel has taken waits
//!   in the queue of one socket and is reset when that socket is closed for good; a socket that another process
//!   has as well is never closed for good, and what waits in it is accepted by whoever is left. No SYN is
//!   lost either: there is no moment at which nobody listens.
//! - It is *gated on readiness*. A successor that never gets policy, crashes or hangs takes nothing: until it
//!   says that it is ready the old one serves as if nothing had happened, and after `--handover-timeout` it
//!   gives up on it. A restart that trades a proxy that works for one without policy is an outage.
//! - Whoever gets these sockets gets the node's traffic. So both sides ask the kernel who the other one is, and
//!   accept only their own user or root.
//! - One successor at a time; another is refused and told so, and so is one that speaks another version.

mod place;
mod predecessor;
mod successor;
mod wire;

pub(crate) use place::{Place, Start, lock};
pub(crate) use predecessor::{Estate, Succession};
pub(crate) use successor::Inheritance;
