//! The new process: asks, makes itself ready beside the old one, takes over.

use super::place::Place;
use super::wire::{Broken, Channel, Message, Of, Offer, VERSION};
use crate::degrade::{Degradation, Handed};
use anyhow::{Context, bail, ensure};
use leeward_config::{Live, PolicySource, Status};
use leeward_http::{Port, Role};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

/// What the predecessor has handed over. Dropping it gives everything back.
#[derive(Debug)]
pub(crate) struct Inheritance {
    channel: Channel,
    offer: Offer,
    place: Place,
    outbound: Option<Port>,
    inbound: Option<Port>,
    /// Of roles that may have several addresses.
    others: Vec<Port>,
    gateways: Vec<Port>,
    admin: Option<TcpListener>,
    ofrep: Option<TcpListener>,
    workloads: Option<UnixListener>,
    /// The predecessor is gone: there is nobody to take over from, and nobody else who serves.
    alone: bool,
}

/// What became of asking.
#[derive(Debug)]
pub(super) enum Asked {
    Inherited(Box<Inheritance>),
    /// The predecessor closed the connection without an answer: it is ending.
    Gone,
}

/// The packets with sockets that a predecessor may announce, 64 sockets in each: 66 addresses of 256 workers, and some.
const MAX_PACKETS: usize = 512;

impl Inheritance {
    pub(super) async fn ask(channel: Channel) -> anyhow::Result<Asked> {
        let hello = Message::Hello {
            version: VERSION,
            pid: std::process::id(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let offer = match channel.ask(&hello).await {
            Ok((Message::Offer(offer), _)) => offer,
            Ok((Message::Refused { reason }, _)) => bail!("the process there refuses: {reason}"),
            Ok((other, _)) => bail!("the process there answers a hello with {other:?}"),
            Err(Broken::Closed) => return Ok(Asked::Gone),
            Err(error) => return Err(error.into()),
        };
        ensure!(
            offer.version == VERSION,
            "it hands over by version {} of the protocol, and this build by {VERSION}",
            offer.version
        );
        let mut sockets = Received::default();
        ensure!(
            offer.packets <= MAX_PACKETS,
            "{} packets of sockets are too many",
            offer.packets
        );
        for _ in 0..offer.packets {
            match channel.receive().await? {
                (Message::Sockets(of), more) => sockets.add(of, more),
                (other, _) => bail!("sockets were announced, and {other:?} came"),
            }
        }
        tracing::info!(
            predecessor = offer.pid,
            build = offer.build,
            generation = offer.generation,
            outbound = sockets.outbound.len(),
            inbound = sockets.inbound.len(),
            "sockets received; the old process serves until this one is ready"
        );
        Ok(Asked::Inherited(Box::new(sockets.inherit(channel, offer)?)))
    }

    /// The sockets of a role, if they listen where they are wanted: at the same address, or at any port if
    /// any is wanted.
    pub(crate) fn port(&mut self, role: Role, wanted: SocketAddr) -> Option<Port> {
        let port = match role {
            Role::Outbound => &mut self.outbound,
            Role::Inbound => &mut self.inbound,
            Role::Capture | Role::Tcp => {
                let is_it = |port: &Port| port.role == role && serves(wanted, port.address);
                let at = self.others.iter().position(is_it)?;
                return Some(self.others.swap_remove(at));
            }
            // They are wanted when policy says so: see `gateways`.
            Role::Gateway => return None,
        };
        port.take_if(|port| serves(wanted, port.address))
    }

    /// The admin listener, if it listens where it is wanted.
    pub(crate) fn admin(&mut self, wanted: SocketAddr) -> Option<TcpListener> {
        self.admin.take_if(|listener| is_at(listener, wanted))
    }

    /// The listener for feature flags, if it listens where it is wanted.
    pub(crate) fn ofrep(&mut self, wanted: SocketAddr) -> Option<TcpListener> {
        self.ofrep.take_if(|listener| is_at(listener, wanted))
    }

    /// The socket for the node's workloads, if it is where it is wanted.
    pub(crate) fn workloads(&mut self, wanted: &Path) -> Option<UnixListener> {
        let is_it = |socket: &mut UnixListener| {
            let at = socket.local_addr();
            at.is_ok_and(|at| at.as_pathname() == Some(wanted))
        };
        self.workloads.take_if(is_it)
    }

    /// The sockets for clients from outside.
    pub(crate) fn gateways(&mut self) -> Vec<Port> {
        std::mem::take(&mut self.gateways)
    }

    /// The predecessor's levels of degradation; none of a build that doesn't tell them.
    pub(crate) fn levels(&self) -> &[Handed] {
        &self.offer.levels
    }

    /// Lets go of what nobody has asked for.
    pub(crate) fn drop_unwanted(&mut self) {
        let several = std::mem::take(&mut self.others);
        let single = [self.outbound.take(), self.inbound.take()].into_iter().flatten();
        for port in single.chain(several) {
            tracing::warn!(role = ?port.role, address = %port.address, "this process does not listen here as the old one did");
        }
        self.admin = None;
        self.ofrep = None;
        self.workloads = None;
    }

    /// Waits until the policy in force is at least as new as the predecessor's, and the levels of degradation are
    /// in force that it and the predecessor ask for. If that one dies meanwhile there is nothing to wait for: whoever connects has nobody else.
    ///
    /// # Errors
    ///
    /// If that takes longer than `limit`, or the predecessor has given up on this process.
    pub(crate) async fn until_ready(
        &mut self,
        live: &Live,
        degradation: &Degradation,
        limit: Duration,
    ) -> anyhow::Result<()> {
        let mut status = live.watch();
        let offer = &self.offer;
        let there = async {
            // The sender lives as long as `live`.
            drop(status.wait_for(|status| lacks(offer, status).is_none()).await);
            degradation.until_judged().await;
        };
        let waited = tokio::time::timeout(limit, async {
            tokio::select! {
                () = there => Ok(true),
                heard = self.channel.receive() => match heard {
                    Ok((Message::Refused { reason }, _)) => bail!("the old process refuses: {reason}"),
                    Ok((other, _)) => bail!("the old process said {other:?} out of turn"),
                    Err(Broken::Closed) => Ok(false),
                    Err(error) => Err(error.into()),
                },
            }
        });
        match waited.await {
            Ok(there) => self.alone = !there?,
            Err(_) => {
                let why = lacks(offer, &live.status())
                    .unwrap_or_else(|| "levels of degradation are not judged yet".to_owned());
                bail!("not ready after {limit:?}: {why}; the old process goes on")
            }
        }
        if self.alone {
            tracing::warn!(
                predecessor = self.offer.pid,
                "the old process is gone; this one serves in its place at once"
            );
        } else {
            tracing::info!(generation = live.status().generation, "ready to take over");
        }
        Ok(())
    }

    /// Says that this process serves, which it must by now, and waits for the predecessor to let go. Returns
    /// the place, where from now on this process is asked.
    ///
    /// # Errors
    ///
    /// If the predecessor goes on serving: this process must end.
    pub(crate) async fn take_over(self) -> anyhow::Result<Place> {
        if self.alone {
            return Ok(self.place);
        }
        match self.channel.ask(&Message::Ready {}).await {
            Ok((Message::Yours {}, _)) => {
                tracing::info!(predecessor = self.offer.pid, "taken over; the old process drains");
            }
            Ok((Message::Refused { reason }, _)) => bail!("the old process refuses: {reason}"),
            Ok((other, _)) => bail!("the old process answers with {other:?}"),
            Err(Broken::Closed) => {
                tracing::warn!(
                    predecessor = self.offer.pid,
                    "the old process ended before it let go"
                );
            }
            Err(error) => return Err(anyhow::Error::from(error)).context("the old process goes on"),
        }
        Ok(self.place)
    }
}

#[derive(Default)]
struct Received {
    outbound: Vec<OwnedFd>,
    inbound: Vec<OwnedFd>,
    capture: Vec<OwnedFd>,
    tcp: Vec<OwnedFd>,
    gateways: Vec<OwnedFd>,
    admin: Vec<OwnedFd>,
    ofrep: Vec<OwnedFd>,
    workloads: Vec<OwnedFd>,
    place: Vec<OwnedFd>,
}

impl Received {
    fn add(&mut self, of: Of, more: Vec<OwnedFd>) {
        match of {
            Of::Outbound => self.outbound.extend(more),
            Of::Inbound => self.inbound.extend(more),
            Of::Capture => self.capture.extend(more),
            Of::Tcp => self.tcp.extend(more),
            Of::Gateway => self.gateways.extend(more),
            Of::Admin => self.admin.extend(more),
            Of::Ofrep => self.ofrep.extend(more),
            Of::Workloads => self.workloads.extend(more),
            Of::Place => self.place.extend(more),
        }
    }

    fn inherit(self, channel: Channel, offer: Offer) -> anyhow::Result<Inheritance> {
        let port = |role, sockets: Vec<OwnedFd>| {
            if sockets.is_empty() {
                return Ok(None);
            }
            let sockets = sockets.into_iter().map(TcpListener::from).collect();
            Port::handed(role, sockets)
                .map(Some)
                .with_context(|| format!("the sockets for {role:?} can't be used"))
        };
        // Several addresses may be of a role; each is a port.
        let several = |role, sockets: Vec<OwnedFd>| -> anyhow::Result<Vec<Port>> {
            let mut by_address: BTreeMap<SocketAddr, Vec<OwnedFd>> = BTreeMap::new();
            for socket in sockets {
                let listener = TcpListener::from(socket);
                let address = listener
                    .local_addr()
                    .with_context(|| format!("the sockets for {role:?} can't be used"))?;
                by_address.entry(address).or_default().push(listener.into());
            }
            let ports = by_address.into_values().map(|sockets| port(role, sockets));
            ports.filter_map(Result::transpose).collect()
        };
        let mut others = several(Role::Capture, self.capture)?;
        others.extend(several(Role::Tcp, self.tcp)?);
        let [place] = <[OwnedFd; 1]>::try_from(self.place)
            .map_err(|many| anyhow::anyhow!("{} sockets for successors came; want one", many.len()))?;
        Ok(Inheritance {
            outbound: port(Role::Outbound, self.outbound)?,
            inbound: port(Role::Inbound, self.inbound)?,
            others,
            gateways: several(Role::Gateway, self.gateways)?,
            admin: self.admin.into_iter().next().map(TcpListener::from),
            ofrep: self.ofrep.into_iter().next().map(TcpListener::from),
            workloads: self.workloads.into_iter().next().map(UnixListener::from),
            place: Place::handed(place)?,
            channel,
            offer,
            alone: false,
        })
    }
}

fn is_at(listener: &TcpListener, wanted: SocketAddr) -> bool {
    listener.local_addr().is_ok_and(|at| serves(wanted, at))
}

/// Whether a socket at `at` does for a listener that is wanted at `wanted`.
fn serves(wanted: SocketAddr, at: SocketAddr) -> bool {
    wanted == at || wanted.port() == 0 && wanted.ip() == at.ip()
}

/// What a process lacks to take over from one that made this offer; `None` for nothing. Generations of
/// different stores can't be compared: a store that was made anew counts from the beginning.
fn lacks(offer: &Offer, status: &Status) -> Option<String> {
    match (offer.generation, status.generation) {
        (_, None) => Some("no policy yet".to_owned()),
        // What was on disk of another store is older than what the old process has from this one.
        (Some(_), Some(_)) if status.source == PolicySource::Disk && offer.store_id != status.store_id => {
            Some(format!(
                "policy of store {:?} from disk, and the old process has that of store {:?}",
                status.store_id, offer.store_id
            ))
        }
        (Some(theirs), Some(ours)) if ours < theirs && offer.store_id == status.store_id => Some(format!(
            "policy of generation {ours}, and the old process has {theirs}"
        )),
        (Some(_) | None, Some(_)) => {
            let first = status.waits_for.first()?;
            Some(format!("the plugin {first} is not loaded yet"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_has_policy_at_least_as_new_as_its_predecessor() {
        use PolicySource::{Control, Disk};
        for (theirs, ours, same_store, source, enough) in [
            (Some(7), None, true, Control, false),
            (None, None, true, Control, false),
            (Some(7), Some(6), true, Control, false),
            (Some(7), Some(7), true, Control, true),
            (Some(7), Some(8), true, Control, true),
            (None, Some(1), true, Control, true),
            (Some(7), Some(1), false, Control, true),
            (Some(7), None, false, Control, false),
            (Some(7), Some(7), true, Disk, true),
            (Some(7), Some(6), true, Disk, false),
            (Some(7), Some(9), false, Disk, false),
            (None, Some(1), false, Disk, true),
        ] {
            let offer = Offer {
                version: VERSION,
                pid: 1,
                build: String::new(),
                generation: theirs,
                store_id: "a".into(),
                packets: 0,
                levels: Vec::new(),
            };
            let status = Status {
                generation: ours,
                store_id: if same_store { "a".into() } else { "b".into() },
                source,
                ..Status::default()
            };
            let lacks = lacks(&offer, &status);
            assert_eq!(
                lacks.is_none(),
                enough,
                "{theirs:?} {ours:?} {same_store}: {lacks:?}"
            );
        }
    }

    #[test]
    fn a_socket_does_where_it_is_wanted() {
        let at = |text: &str| text.parse().unwrap();
        assert!(serves(at("127.0.0.1:80"), at("127.0.0.1:80")));
        assert!(serves(at("127.0.0.1:0"), at("127.0.0.1:80")));
        assert!(!serves(at("127.0.0.1:81"), at("127.0.0.1:80")));
        assert!(!serves(at("0.0.0.0:0"), at("127.0.0.1:80")));
    }
}
