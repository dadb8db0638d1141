//! What is captured, as nftables wants it.

use std::fmt::{self, Display, Write as _};
use std::net::IpAddr;

/// The one table that is written and taken away; no other is ever touched.
pub(crate) const TABLE: &str = "inet leeward_capture";

/// Ports, one or a range.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Ports {
    low: u16,
    high: u16,
}

impl Ports {
    /// `22`, or `8000-9000`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        match (port(low), port(high)) {
            (Some(low), Some(high)) if low <= high => Ok(Self { low, high }),
            _ => Err("want a port from 1 to 65535, or a range such as 8000-9000".to_owned()),
        }
    }
}

impl Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high {
            return write!(f, "{}", self.low);
        }
        write!(f, "{}-{}", self.low, self.high)
    }
}

/// A network.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Cidr {
    address: IpAddr,
    length: u8,
}

impl Cidr {
    /// `10.0.0.0/8`, `fd00::/8`, or an address.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        const WANT: &str = "want a network such as 10.0.0.0/8 or fd00::/8, or an address";
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| WANT.to_owned())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => most,
            Some(length) => length.parse().ok().filter(|n| *n <= most).ok_or(WANT)?,
        };
        // What nftables would quietly read as another network.
        if bits_after(address, length) {
            return Err(format!("{text} has bits after its prefix; {WANT}"));
        }
        Ok(Self { address, length })
    }
}

/// Whether an address says more than its prefix.
fn bits_after(address: IpAddr, length: u8) -> bool {
    match address {
        IpAddr::V4(v4) => v4.to_bits().checked_shl(length.into()).unwrap_or(0) != 0,
        IpAddr::V6(v6) => v6.to_bits().checked_shl(length.into()).unwrap_or(0) != 0,
    }
}

impl Cidr {
    /// Whether all of another network of the same version is in it.
    fn has(&self, inner: &Self) -> bool {
        let differ = match (self.address, inner.address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
            (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
        };
        let outside = 128 - u32::from(self.length);
        self.length <= inner.length && differ.checked_shr(outside).unwrap_or(0) == 0
    }
}

impl Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// Which versions of IP are captured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Family {
    /// Both.
    Both,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
}

impl Family {
    pub(crate) const fn has_v4(self) -> bool {
        matches!(self, Self::Both | Self::Ipv4)
    }

    pub(crate) const fn has_v6(self) -> bool {
        matches!(self, Self::Both | Self::Ipv6)
    }
}

/// What is captured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Rules {
    /// Where the proxy listens for it.
    pub(crate) port: u16,
    pub(crate) family: Family,
    /// The proxy's own connections, which never are.
    pub(crate) proxy_uids: Vec<u32>,
    pub(crate) exclude_uids: Vec<u32>,
    pub(crate) exclude_ports: Vec<Ports>,
    pub(crate) exclude: Vec<Cidr>,
    /// Nothing else; empty for everything.
    pub(crate) include: Vec<Cidr>,
}

/// Ends the table, whether it is there or not.
pub(crate) fn taken_away() -> String {
    format!("table {TABLE}\ndelete table {TABLE}\n")
}

impl Rules {
    /// One transaction that puts these in place of whatever the table had, if there was one: the kernel takes all of it or
    /// nothing.
    pub(crate) fn script(&self) -> String {
        let mut text = taken_away();
        let mut line = |line: &str| {
            // A String takes whatever is written to it.
            let _ = writeln!(text, "{line}");
        };
        line(&format!("table {TABLE} {{"));
        line("\tcomment \"written by leeward capture up\"");
        line("\tchain output {");
        // Before Docker's and kube-proxy's own (-100): an address of a Service is seen as the workload wrote it.
        line("\t\ttype nat hook output priority -110; policy accept;");
        line("\t\tmeta l4proto != tcp return");
        match self.family {
            Family::Both => {}
            Family::Ipv4 => line("\t\tmeta nfproto ipv6 return"),
            Family::Ipv6 => line("\t\tmeta nfproto ipv4 return"),
        }
        let uids = list(self.proxy_uids.iter().chain(&self.exclude_uids));
        line(&format!("\t\tmeta skuid {uids} return"));
        line("\t\tip daddr 127.0.0.0/8 return");
        line("\t\tip6 daddr { ::1, fe80::/10 } return");
        for (family, of) in [("ip", true), ("ip6", false)] {
            let excluded = widest(&self.exclude, of);
            if !excluded.is_empty() {
                line(&format!("\t\t{family} daddr {} return", list(excluded)));
            }
            let included = widest(&self.include, of);
            if !included.is_empty() {
                line(&format!("\t\t{family} daddr != {} return", list(included)));
            } else if !self.include.is_empty() {
                let family = if of { "ipv4" } else { "ipv6" };
                line(&format!("\t\tmeta nfproto {family} return"));
            }
        }
        if !self.exclude_ports.is_empty() {
            line(&format!(
                "\t\ttcp dport {} return",
                list(joined(&self.exclude_ports))
            ));
        }
        line(&format!(
            "\t\tmeta l4proto tcp counter redirect to :{}",
            self.port
        ));
        line("\t}");
        line("}");
        text
    }
}

/// The networks of one version of IP that are in no other of them: nft refuses a set with both.
fn widest(networks: &[Cidr], v4: bool) -> Vec<Cidr> {
    let of = |network: &&Cidr| network.address.is_ipv4() == v4;
    let is_within = |inner: &Cidr| {
        let others = networks.iter().filter(of);
        others
            .filter(|other| *other != inner)
            .any(|other| other.has(inner))
    };
    networks
        .iter()
        .filter(of)
        .filter(|n| !is_within(n))
        .copied()
        .collect()
}

/// The same ports, with those that overlap as one range.
fn joined(ports: &[Ports]) -> Vec<Ports> {
    let mut sorted = ports.to_vec();
    sorted.sort();
    let mut joined: Vec<Ports> = Vec::new();
    for ports in sorted {
        match joined.last_mut() {
            Some(last) if ports.low <= last.high => last.high = last.high.max(ports.high),
            Some(_) | None => joined.push(ports),
        }
    }
    joined
}

/// A set of nftables', each once and in order.
fn list<T: Display + Ord>(values: impl IntoIterator<Item = T>) -> String {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort();
    values.dedup();
    let texts: Vec<_> = values.iter().map(ToString::to_string).collect();
    format!("{{ {} }}", texts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            port: 15006,
            family: Family::Both,
            proxy_uids: vec![1500],
            exclude_uids: vec![],
            exclude_ports: vec![],
            exclude: vec![],
            include: vec![],
        }
    }

    #[test]
    fn what_must_not_be_captured_never_is() {
        let want = "table inet leeward_capture
delete table inet leeward_capture
table inet leeward_capture {
\tcomment \"written by leeward capture up\"
\tchain output {
\t\ttype nat hook output priority -110; policy accept;
\t\tmeta l4proto != tcp return
\t\tmeta skuid { 1500 } return
\t\tip daddr 127.0.0.0/8 return
\t\tip6 daddr { ::1, fe80::/10 } return
\t\tmeta l4proto tcp counter redirect to :15006
\t}
}
";
        assert_eq!(rules().script(), want);
    }

    #[test]
    fn what_is_excluded_and_included_stands_in_the_rules() {
        let cidrs = |texts: &[&str]| texts.iter().map(|t| Cidr::parse(t).unwrap()).collect();
        let script = Rules {
            exclude_uids: vec![7, 1500, 7],
            exclude_ports: vec![Ports::parse("8000-9000").unwrap(), Ports::parse("22").unwrap()],
            exclude: cidrs(&["10.1.0.0/16", "fd01::/16"]),
            include: cidrs(&["10.0.0.0/8"]),
            ..rules()
        }
        .script();
        for line in [
            "meta skuid { 7, 1500 } return",
            "ip daddr { 10.1.0.0/16 } return",
            "ip6 daddr { fd01::/16 } return",
            "ip daddr != { 10.0.0.0/8 } return",
            "meta nfproto ipv6 return",
            "tcp dport { 22, 8000-9000 } return",
        ] {
            assert!(
                script.contains(&format!("\t\t{line}\n")),
                "{line} is not in {script}"
            );
        }
    }

    #[test]
    fn what_overlaps_is_joined() {
        let ports = |texts: &[&str]| texts.iter().map(|t| Ports::parse(t).unwrap()).collect::<Vec<_>>();
        let together = joined(&ports(&["80", "8000-9000", "80", "8500-9500", "9501"]));
        assert_eq!(list(together), "{ 80, 8000-9500, 9501 }");
        let cidrs = |texts: &[&str]| texts.iter().map(|t| Cidr::parse(t).unwrap()).collect::<Vec<_>>();
        let all = cidrs(&[
            "10.1.0.0/16",
            "10.0.0.0/8",
            "11.0.0.1",
            "fd00::/8",
            "fd00::1",
            "10.0.0.0/8",
        ]);
        assert_eq!(list(widest(&all, true)), "{ 10.0.0.0/8, 11.0.0.1/32 }");
        assert_eq!(list(widest(&all, false)), "{ fd00::/8 }");
        assert_eq!(
            list(widest(&cidrs(&["0.0.0.0/0", "1.2.3.4"]), true)),
            "{ 0.0.0.0/0 }"
        );
    }

    #[test]
    fn bad_values_are_refused() {
        for bad in ["", "0", "65536", "9-1", "x", "1-", "-1", "1,2"] {
            assert!(Ports::parse(bad).is_err(), "{bad:?}");
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "fd00::1/8",
            "10/8",
            "::/129",
            "x/8",
            "10.0.0.0/",
        ] {
            assert!(Cidr::parse(bad).is_err(), "{bad:?}");
        }
        for good in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "::/0",
            "fd00::/8",
            "10.0.0.1",
            "::1/128",
        ] {
            assert!(Cidr::parse(good).is_ok(), "{good:?}");
        }
        assert_eq!(Cidr::parse("10.0.0.1").unwrap().to_string(), "10.0.0.1/32");
    }
}
