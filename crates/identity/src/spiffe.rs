//! SPIFFE ids (SPIFFE-ID standard, §2).

use std::fmt;
use std::sync::Arc;

/// A checked SPIFFE id, such as `spiffe://leeward.local/zone/a/proxy/a1`. Cheap to clone.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Length of the trust domain.
    domain: usize,
}

/// What an id says its holder is, by its path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// `/zone/ZONE/proxy/NAME`
    Proxy {
        /// The proxy's zone.
        zone: String,
        /// The proxy's name.
        name: String,
    },
    /// `/control`
    Control,
    /// `/user/NAME`
    User {
        /// The user's name.
        name: String,
    },
    /// `/zone/ZONE/workload/NAME`
    Workload {
        /// The zone whose proxies attest it.
        zone: String,
        /// The workload's name.
        name: String,
    },
    /// Anything else.
    Other,
}

/// Why a text is not a SPIFFE id.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{text:?} is not a SPIFFE id: {reason}")]
pub struct InvalidSpiffeId {
    text: String,
    reason: &'static str,
}

const SCHEME: &str = "spiffe://";
/// Longest id that must be supported (§2.3), in bytes.
const MAX_LEN: usize = 2048;
/// Longest trust domain (§2.1), in bytes.
const MAX_DOMAIN: usize = 255;

impl SpiffeId {
    /// Checks a text.
    ///
    /// # Errors
    ///
    /// [`InvalidSpiffeId`] says what the standard wants.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffeId> {
        let bad = |reason| InvalidSpiffeId {
            text: text.chars().take(100).collect(),
            reason,
        };
        if text.len() > MAX_LEN {
            return Err(bad("it is longer than 2048 bytes"));
        }
        let rest = text
            .strip_prefix(SCHEME)
            .ok_or_else(|| bad("it must begin with spiffe://"))?;
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if domain.is_empty() || domain.len() > MAX_DOMAIN {
            return Err(bad("the trust domain must be 1 to 255 bytes long"));
        }
        let in_domain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
        if !domain.bytes().all(in_domain) {
            return Err(bad(
                "the trust domain is a-z, 0-9, '-', '.' and '_' only, with no port and no user",
            ));
        }
        if !path.is_empty() {
            for segment in path.split('/').skip(1) {
                if segment.is_empty() || segment == "." || segment == ".." {
                    return Err(bad("the path must have no empty segment, no '.' and no '..'"));
                }
                if !segment
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
                {
                    return Err(bad("a path segment is letters, digits, '-', '.' and '_' only"));
                }
            }
        }
        Ok(Self {
            text: text.into(),
            domain: domain.len(),
        })
    }

    /// The id of a proxy.
    ///
    /// # Errors
    ///
    /// If a part can't stand in an id.
    pub fn proxy(domain: &str, zone: &str, name: &str) -> Result<Self, InvalidSpiffeId> {
        Self::parse(&format!("{SCHEME}{domain}/zone/{zone}/proxy/{name}"))
    }

    /// The id of every control plane.
    ///
    /// # Errors
    ///
    /// If the domain can't stand in an id.
    pub fn control(domain: &str) -> Result<Self, InvalidSpiffeId> {
        Self::parse(&format!("{SCHEME}{domain}/control"))
    }

    /// The id of a person or a tool.
    ///
    /// # Errors
    ///
    /// If a part can't stand in an id.
    pub fn user(domain: &str, name: &str) -> Result<Self, InvalidSpiffeId> {
        Self::parse(&format!("{SCHEME}{domain}/user/{name}"))
    }

    /// The id of a workload.
    ///
    /// # Errors
    ///
    /// If a part can't stand in an id.
    pub fn workload(domain: &str, zone: &str, name: &str) -> Result<Self, InvalidSpiffeId> {
        Self::parse(&format!("{SCHEME}{domain}/zone/{zone}/workload/{name}"))
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        self.text
            .get(SCHEME.len()..SCHEME.len() + self.domain)
            .unwrap_or_default()
    }

    /// What the path says.
    pub fn role(&self) -> Role {
        let path = self.text.get(SCHEME.len() + self.domain..).unwrap_or_default();
        let mut parts = path.split('/').skip(1);
        match [
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ] {
            [Some("control"), None, ..] => Role::Control,
            [Some("user"), Some(name), None, ..] => Role::User {
                name: name.to_owned(),
            },
            [Some("zone"), Some(zone), Some("proxy"), Some(name), None] => Role::Proxy {
                zone: zone.to_owned(),
                name: name.to_owned(),
            },
            [Some("zone"), Some(zone), Some("workload"), Some(name), None] => Role::Workload {
                zone: zone.to_owned(),
                name: name.to_owned(),
            },
            _ => Role::Other,
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_the_standard_takes() {
        let id = SpiffeId::proxy("leeward.local", "a", "a1").unwrap();
        assert_eq!(id.to_string(), "spiffe://leeward.local/zone/a/proxy/a1");
        assert_eq!(id.trust_domain(), "leeward.local");
        assert_eq!(
            id.role(),
            Role::Proxy {
                zone: "a".into(),
                name: "a1".into()
            }
        );
        assert_eq!(SpiffeId::control("td").unwrap().role(), Role::Control);
        assert_eq!(
            SpiffeId::user("td", "ann").unwrap().role(),
            Role::User { name: "ann".into() }
        );
        assert_eq!(
            SpiffeId::workload("td", "a", "pay").unwrap().role(),
            Role::Workload {
                zone: "a".into(),
                name: "pay".into()
            }
        );
        for other in ["", "/zone/a/workload", "/zone/a/workload/pay/x", "/workload/pay"] {
            let id = SpiffeId::parse(&format!("spiffe://td{other}")).unwrap();
            assert_eq!(id.role(), Role::Other, "{other}");
        }
        assert_eq!(
            SpiffeId::parse("spiffe://td/control/x").unwrap().role(),
            Role::Other
        );
        for bad in [
            "",
            "https://td/a",
            "spiffe://",
            "spiffe:///a",
            "spiffe://TD/a",
            "spiffe://td:80/a",
            "spiffe://u@td/a",
            "spiffe://td/a/",
            "spiffe://td//a",
            "spiffe://td/../a",
            "spiffe://td/a?x",
            "spiffe://td/a#x",
            "spiffe://td/%61",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad}");
        }
        assert!(SpiffeId::parse(&format!("spiffe://td/{}", "a".repeat(2048))).is_err());
    }
}
