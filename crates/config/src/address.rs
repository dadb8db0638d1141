//! Control planes, and where they are.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Where a control plane is: an address, or a name that is looked up whenever it is its turn.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ControlAddress {
    /// IP address and port.
    Address(SocketAddr),
    /// DNS name and port, `control.example:15010`. It may have several addresses: they have turns, too.
    Name(Box<str>),
}

/// Who is asked first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Order {
    /// The first that is named; another only while it can't be had.
    Preferred,
    /// Any: the proxies of a mesh spread.
    Random,
}

/// The control planes that a proxy knows. Cheap to clone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Control {
    pub(crate) addresses: Arc<[ControlAddress]>,
    pub(crate) order: Order,
    /// With which of a name's addresses this proxy begins.
    pub(crate) first: u64,
}

/// How long a name may take to be looked up.
const LOOK_UP: Duration = Duration::from_secs(5);

/// Not the place of a control plane.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("want IP:PORT or NAME:PORT, such as 10.0.0.1:15010, [::1]:15010 or control.example:15010; not {0:?}")]
pub struct InvalidControlAddress(String);

impl FromStr for ControlAddress {
    type Err = InvalidControlAddress;

    fn from_str(text: &str) -> Result<Self, InvalidControlAddress> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let invalid = || InvalidControlAddress(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let is_label = |label: &str| {
            let is_good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            (1..=63).contains(&label.len()) && label.chars().all(is_good)
        };
        let host = host.strip_suffix('.').unwrap_or(host);
        let is_name = host.len() <= 253
            && host.split('.').all(is_label)
            // An address that isn't one is not a name.
            && host.rsplit('.').next().is_some_and(|last| !last.bytes().all(|b| b.is_ascii_digit()));
        let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
        if !(is_name && is_port) {
            return Err(invalid());
        }
        Ok(Self::Name(text.into()))
    }
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl From<SocketAddr> for ControlAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl ControlAddress {
    /// Where it is now; of a name's addresses the `nth`, counted around.
    pub(crate) async fn resolve(&self, nth: u64) -> io::Result<SocketAddr> {
        let name = match self {
            Self::Address(address) => return Ok(*address),
            Self::Name(name) => name,
        };
        let found = tokio::time::timeout(LOOK_UP, tokio::net::lookup_host(&**name)).await;
        let found = found.map_err(|_| io::Error::other(format!("looking {name} up takes too long")))??;
        let mut found: Vec<SocketAddr> = found.collect();
        // Resolvers turn them around; without an order some would never have a turn.
        found.sort_unstable();
        found.dedup();
        let index = nth
            .checked_rem(found.len() as u64)
            .and_then(|n| usize::try_from(n).ok());
        let address = index.and_then(|index| found.get(index));
        address
            .copied()
            .ok_or_else(|| io::Error::other(format!("{name} has no address")))
    }
}

impl Control {
    /// These, in this order; `seed` is chance.
    pub fn new(mut addresses: Vec<ControlAddress>, order: Order, seed: u64) -> Self {
        let mut chance = fastrand::Rng::with_seed(seed);
        if order == Order::Random {
            chance.shuffle(&mut addresses);
        }
        Self {
            addresses: addresses.into(),
            order,
            first: chance.u64(..),
        }
    }

    /// None.
    pub fn none() -> Self {
        Self::new(Vec::new(), Order::Preferred, 0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }
}

impl From<&[SocketAddr]> for Control {
    /// These, the first preferred.
    fn from(addresses: &[SocketAddr]) -> Self {
        let addresses = addresses.iter().copied().map(ControlAddress::from);
        Self::new(addresses.collect(), Order::Preferred, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_are_told_apart() {
        for good in ["127.0.0.1:15010", "[::1]:15010"] {
            let address: ControlAddress = good.parse().unwrap();
            assert!(matches!(address, ControlAddress::Address(_)), "{good}");
            assert_eq!(address.to_string(), good);
        }
        for good in [
            "control:1",
            "leeward-control.mesh.svc.cluster.local:15010",
            "a.b.:80",
            "x1.2a:9",
        ] {
            let address: ControlAddress = good.parse().unwrap();
            assert_eq!(address, ControlAddress::Name(good.into()));
        }
        for bad in [
            "",
            "control",
            "control:",
            "control:0",
            "control:70000",
            "a..b:1",
            "1.2.3:80",
            "a b:1",
            ":80",
            "::1:80",
        ] {
            assert!(bad.parse::<ControlAddress>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn every_address_of_a_name_has_a_turn() {
        let name: ControlAddress = "localhost:15010".parse().unwrap();
        for nth in 0..4 {
            let address = name.resolve(nth).await.unwrap();
            assert!(address.ip().is_loopback() && address.port() == 15010, "{address}");
        }
        let address: ControlAddress = "10.0.0.1:1".parse().unwrap();
        assert_eq!(address.resolve(7).await.unwrap().to_string(), "10.0.0.1:1");
    }

    #[test]
    fn by_chance_each_proxy_has_an_order_of_its_own() {
        let all: Vec<ControlAddress> = ["a:1", "b:1", "c:1"].map(|a| a.parse().unwrap()).into();
        let firsts =
            (0..3000).map(|seed| Control::new(all.clone(), Order::Random, seed).addresses[0].clone());
        let mut counts = std::collections::BTreeMap::new();
        firsts.for_each(|first| *counts.entry(first).or_insert(0) += 1);
        assert!(
            counts.len() == 3 && counts.values().all(|n| (900..1100).contains(n)),
            "{counts:?}"
        );
        assert_eq!(*Control::new(all.clone(), Order::Preferred, 7).addresses, all);
    }
}
