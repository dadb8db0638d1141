//! Listeners for clients from outside of the mesh.

use super::{HostMatch, Route};
use crate::Name;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

/// Listeners on some proxies, for clients that have no identity of the mesh.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Gateway {
    /// The zones whose proxies listen, at least one.
    pub zones: Vec<Name>,
    /// Of those only the proxies with these names; empty is each.
    pub proxies: Vec<Name>,
    /// At least one, each name once.
    pub listeners: Vec<GatewayListener>,
    /// Proxies in front of this one that are believed what they say of their clients.
    pub trusted_hops: u32,
}

/// One listener.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GatewayListener {
    /// Unique in its gateway.
    pub name: Name,
    /// Where it listens; the port is never 0.
    pub address: SocketAddr,
    /// The hosts that it is for.
    pub hostname: HostMatch,
    /// How requests are taken off the wire.
    pub protocol: GatewayProtocol,
    /// What clients may take up.
    pub limits: GatewayLimits,
}

/// How requests are taken off the wire.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GatewayProtocol {
    /// In the clear.
    Http {
        /// Every request is sent to HTTPS.
        redirect: Option<HttpsRedirect>,
    },
    /// In TLS.
    Https {
        /// How that is spoken.
        tls: GatewayTls,
        /// On the UDP port of the same number, too.
        http3: bool,
    },
}

/// Where HTTPS is to be had.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HttpsRedirect {
    /// 301 or 308.
    pub status: u16,
    /// Never 0.
    pub port: u16,
}

/// TLS of one listener.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct GatewayTls {
    /// Names of certificates in the node's directory, at least one.
    pub certificates: Vec<Name>,
    /// The oldest version that is spoken.
    pub min_version: TlsVersion,
    /// Names of files with the roots of clients' certificates, which clients must show then.
    pub client_roots: Option<Vec<Name>>,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum TlsVersion {
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

/// What clients may take up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GatewayLimits {
    /// Connections at once of one proxy.
    pub max_connections: u32,
    /// The largest head of a request, in bytes.
    pub max_header_bytes: u32,
    /// How long a connection may be without a request.
    pub idle_timeout: Duration,
    /// Longest TLS handshake.
    pub handshake_timeout: Duration,
}

impl GatewayLimits {
    /// nginx keeps 512 connections of a worker and Envoy sets no bound; 10 000 are 0.5 GiB at most with HTTP/1.1. Five
    /// minutes without a request are what Google's load balancers and Envoy's advice for edges have.
    pub const DEFAULT: Self = Self {
        max_connections: 10_000,
        max_header_bytes: 64 << 10,
        idle_timeout: Duration::from_secs(300),
        handshake_timeout: Duration::from_secs(10),
    };
}

/// Who may send requests to a route.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Parent {
    /// The workloads of the mesh.
    Mesh,
    /// Clients of a gateway.
    Gateway {
        /// Its name.
        gateway: Name,
        /// One of its listeners; `None` is each.
        listener: Option<Name>,
    },
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mesh => f.write_str("Mesh"),
            Self::Gateway {
                gateway,
                listener: None,
            } => write!(f, "Gateway/{gateway}"),
            Self::Gateway {
                gateway,
                listener: Some(listener),
            } => write!(f, "Gateway/{gateway}/{listener}"),
        }
    }
}

impl Gateway {
    /// Whether a proxy has its listeners.
    pub fn is_on(&self, zone: &Name, proxy: &Name) -> bool {
        self.zones.contains(zone) && (self.proxies.is_empty() || self.proxies.contains(proxy))
    }

    /// Whether some proxy may have the listeners of both.
    fn meets(&self, other: &Self) -> bool {
        let shared = |mine: &[Name], theirs: &[Name]| mine.iter().any(|name| theirs.contains(name));
        let any = self.proxies.is_empty() || other.proxies.is_empty();
        shared(&self.zones, &other.zones) && (any || shared(&self.proxies, &other.proxies))
    }

    /// What keeps its listeners from standing beside those of another gateway: the position of the first such
    /// listener, and why.
    pub fn clash(&self, other: &Self) -> Option<(usize, String)> {
        if !self.meets(other) {
            return None;
        }
        self.listeners.iter().enumerate().find_map(|(i, mine)| {
            let clash = |theirs: &GatewayListener| Some((i, mine.clash(theirs)?));
            other.listeners.iter().find_map(clash)
        })
    }
}

impl GatewayListener {
    /// What keeps it from standing beside another listener of the same proxy.
    pub fn clash(&self, other: &Self) -> Option<String> {
        if self.address != other.address {
            return None;
        }
        let name = &other.name;
        if self.hostname == other.hostname {
            return Some(format!(
                "is for the same address, port and hostname as the listener {name}; want another hostname or port"
            ));
        }
        let (
            GatewayProtocol::Https { tls, http3 },
            GatewayProtocol::Https {
                tls: theirs,
                http3: too,
            },
        ) = (&self.protocol, &other.protocol)
        else {
            let is_http = |listener: &Self| matches!(listener.protocol, GatewayProtocol::Http { .. });
            return (is_http(self) != is_http(other)).then(|| {
                format!("has another protocol than the listener {name} of the same port; want one of them at another port")
            });
        };
        (*http3 && *too && tls.client_roots != theirs.client_roots).then(|| {
            format!(
                "has another clientValidation than the listener {name} of the same port, and both take HTTP/3, where that is settled before the hostname is known; want the same, or http3 at one of them only"
            )
        })
    }

    /// How TLS is spoken, if it is.
    pub const fn tls(&self) -> Option<&GatewayTls> {
        match &self.protocol {
            GatewayProtocol::Http { .. } => None,
            GatewayProtocol::Https { tls, .. } => Some(tls),
        }
    }

    /// Whether it takes HTTP/3.
    pub const fn has_http3(&self) -> bool {
        matches!(self.protocol, GatewayProtocol::Https { http3: true, .. })
    }
}

impl Route {
    /// What is wrong with the first of its parents that names a listener which its gateway hasn't: the parent's position, and
    /// why. Gateways that aren't there are passed over.
    pub fn missing_listener<'a>(
        &self,
        get: impl Fn(&Name) -> Option<&'a Gateway>,
    ) -> Option<(usize, String)> {
        self.parents.iter().enumerate().find_map(|(i, parent)| {
            let Parent::Gateway {
                gateway,
                listener: Some(listener),
            } = parent
            else {
                return None;
            };
            let has = &get(gateway)?.listeners;
            if has.iter().any(|known| known.name == *listener) {
                return None;
            }
            let known: Vec<_> = has.iter().map(|known| known.name.as_str()).collect();
            let known = known.join(", ");
            Some((
                i,
                format!(
                    "{:?} is not a listener of Gateway/{gateway}; want one of {known}",
                    listener.as_str()
                ),
            ))
        })
    }
}

impl fmt::Display for HostMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(host) => f.write_str(host),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl HostMatch {
    /// How closely it fits a host (lower case, without a port), if it does: an exact name more than any suffix, a longer
    /// suffix more than a shorter one.
    pub fn fit(&self, host: &str) -> Option<usize> {
        match self {
            Self::Any => Some(0),
            Self::Exact(exact) => (**exact == *host).then_some(usize::MAX),
            Self::Suffix(suffix) => {
                (host.len() > suffix.len() && host.ends_with(&**suffix)).then_some(suffix.len())
            }
        }
    }

    /// What belongs to the one, of several, that fits a host best.
    pub fn closest<'h, T>(all: impl IntoIterator<Item = (&'h Self, T)>, host: &str) -> Option<T> {
        let fits = all.into_iter().filter_map(|(on, of)| Some((on.fit(host)?, of)));
        fits.max_by_key(|(fit, _)| *fit).map(|(_, of)| of)
    }

    /// What belongs to the one that those get who don't say which host they want: that for every host, or else the first.
    pub fn default_of<'h, T>(all: impl IntoIterator<Item = (&'h Self, T)>) -> Option<T> {
        let mut first = None;
        for (on, of) in all {
            if *on == Self::Any {
                return Some(of);
            }
            first = first.or(Some(of));
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn https(port: u16, hostname: HostMatch, http3: bool, roots: Option<&str>) -> GatewayListener {
        GatewayListener {
            name: name("l"),
            address: ([127, 0, 0, 1], port).into(),
            hostname,
            protocol: GatewayProtocol::Https {
                tls: GatewayTls {
                    certificates: vec![name("c")],
                    min_version: TlsVersion::Tls12,
                    client_roots: roots.map(|root| vec![name(root)]),
                },
                http3,
            },
            limits: GatewayLimits::DEFAULT,
        }
    }

    fn exact(host: &str) -> HostMatch {
        HostMatch::Exact(host.into())
    }

    #[test]
    fn listeners_share_a_port_if_they_can_be_told_apart() {
        let shop = https(443, exact("shop.example"), true, None);
        let check = |other: &GatewayListener, want: Option<&str>| {
            let clash = shop.clash(other);
            assert_eq!(clash.is_some(), want.is_some(), "{clash:?}");
            assert!(clash.unwrap_or_default().contains(want.unwrap_or_default()));
            assert_eq!(shop.clash(other).is_some(), other.clash(&shop).is_some());
        };
        check(&shop, Some("same address, port and hostname"));
        check(&https(444, exact("shop.example"), true, None), None);
        check(
            &https(443, HostMatch::Suffix(".example".into()), true, None),
            None,
        );
        check(&https(443, HostMatch::Any, false, Some("ca")), None);
        check(
            &https(443, HostMatch::Any, true, Some("ca")),
            Some("clientValidation"),
        );
        let plain = GatewayListener {
            protocol: GatewayProtocol::Http { redirect: None },
            ..https(443, HostMatch::Any, false, None)
        };
        check(&plain, Some("another protocol"));
    }

    #[test]
    fn gateways_clash_only_where_a_proxy_has_both() {
        let gateway = |zones: &[&str], proxies: &[&str]| Gateway {
            zones: zones.iter().map(|zone| name(zone)).collect(),
            proxies: proxies.iter().map(|proxy| name(proxy)).collect(),
            listeners: vec![https(443, HostMatch::Any, false, None)],
            trusted_hops: 0,
        };
        let edge = gateway(&["a", "b"], &["edge"]);
        assert!(edge.is_on(&name("b"), &name("edge")) && !edge.is_on(&name("b"), &name("x")));
        for (other, clash) in [
            (gateway(&["b"], &[]), true),
            (gateway(&["a"], &["x", "edge"]), true),
            (gateway(&["a"], &["x"]), false),
            (gateway(&["c"], &["edge"]), false),
        ] {
            assert_eq!(edge.clash(&other).is_some(), clash, "{other:?}");
            assert_eq!(other.clash(&edge).is_some(), clash, "{other:?}");
        }
    }

    #[test]
    fn the_closest_hostname_fits_best() {
        let hosts = [
            HostMatch::Any,
            HostMatch::Suffix(".example".into()),
            HostMatch::Suffix(".shop.example".into()),
            exact("www.shop.example"),
        ];
        let best = |host: &str| HostMatch::closest(hosts.iter().zip(0..), host);
        assert_eq!(best("www.shop.example"), Some(3));
        assert_eq!(best("a.www.shop.example"), Some(2));
        assert_eq!(best("shop.example"), Some(1));
        assert_eq!(best(".example"), Some(0));
        assert_eq!(best("other"), Some(0));
    }
}
