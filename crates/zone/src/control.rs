//! What peers tell each other beside requests: what they take, how their services are, and that they leave.

use crate::frame::{Kind, MAX_HEAD, Violation, put_frame};
use crate::head::{Limits, malformed, number, text};
use crate::varint;
use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

/// What a peer says that it takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Settings {
    /// Which revision of the protocol it knows. All revisions of "leeward-zone/1" understand each other.
    pub revision: u64,
    /// Bytes of a head.
    pub max_head: usize,
    /// Fields of a head.
    pub max_fields: usize,
}

/// The revision that this is.
const REVISION: u64 = 1;
/// The least that a peer may take: less, and ordinary requests would not go through.
const LEAST_HEAD: usize = 4 << 10;
const LEAST_FIELDS: usize = 32;

/// Ids of settings on the wire.
const ID_REVISION: u64 = 1;
const ID_MAX_HEAD: u64 = 2;
const ID_MAX_FIELDS: u64 = 3;

impl Settings {
    /// Ours.
    pub(crate) const OURS: Self = Self {
        revision: REVISION,
        max_head: Limits::OURS.head,
        max_fields: Limits::OURS.fields,
    };

    /// What may be sent to whoever says so.
    pub(crate) fn limits(self) -> Limits {
        Limits {
            head: self.max_head.min(Limits::OURS.head),
            fields: self.max_fields.min(Limits::OURS.fields),
        }
    }

    pub(crate) fn put(self, buf: &mut BytesMut) {
        let written = put_frame(buf, Kind::Settings, |buf| {
            for (id, value) in [
                (ID_REVISION, self.revision),
                (ID_MAX_HEAD, self.max_head as u64),
                (ID_MAX_FIELDS, self.max_fields as u64),
            ] {
                varint::put(buf, id);
                varint::put(buf, value);
            }
            Ok::<_, Infallible>(())
        });
        let Ok(()) = written;
    }

    /// What a SETTINGS frame says. Ids of later revisions are passed over; what isn't said is as ours.
    pub(crate) fn read(mut payload: Bytes) -> Result<Self, Violation> {
        let mut settings = Self::OURS;
        while !payload.is_empty() {
            let id = number(&mut payload, "a setting's id")?;
            let value = number(&mut payload, "a setting's value")?;
            let size = usize::try_from(value).unwrap_or(usize::MAX);
            match id {
                ID_REVISION => settings.revision = value,
                ID_MAX_HEAD if size < LEAST_HEAD => {
                    return Err(malformed("MAX_HEAD", "below 4096 bytes"));
                }
                ID_MAX_HEAD => settings.max_head = size,
                ID_MAX_FIELDS if size < LEAST_FIELDS => {
                    return Err(malformed("MAX_FIELDS", "below 32"));
                }
                ID_MAX_FIELDS => settings.max_fields = size,
                _ => {}
            }
        }
        Ok(settings)
    }
}

/// How one exported service is, as its zone's proxy sees it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ServiceHealth {
    /// Endpoints that take requests.
    pub healthy: u32,
    /// Endpoints in all.
    pub total: u32,
    /// Requests that each proxy that calls the service may have under way beside those that it has.
    pub spare: u32,
}

/// How exported services are, by name. Cheap to clone as an `Arc`, which is how it is passed on.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Health {
    services: BTreeMap<Arc<str>, ServiceHealth>,
}

/// Services that are known of one peer; what it says of more is passed over.
pub const MAX_SERVICES: usize = 16_384;
/// Bytes of the longest name.
const MAX_NAME: usize = 512;

impl Health {
    /// Says how a service is. Past [`MAX_SERVICES`], and for names of more than 512 bytes, nothing is said.
    pub fn set(&mut self, service: &str, health: ServiceHealth) {
        if service.len() > MAX_NAME {
            return;
        }
        if let Some(known) = self.services.get_mut(service) {
            *known = health;
        } else if self.services.len() < MAX_SERVICES {
            self.services.insert(service.into(), health);
        }
    }

    /// How a service is, if that is known.
    pub fn get(&self, service: &str) -> Option<ServiceHealth> {
        self.services.get(service).copied()
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, ServiceHealth)> {
        self.services.iter().map(|(name, health)| (&**name, *health))
    }

    /// What has changed since `before`, as HEALTH frames of bounded size. Nothing, if nothing has.
    pub(crate) fn put_changes(&self, before: &Self, buf: &mut BytesMut) {
        let gone = before
            .services
            .keys()
            .filter(|name| !self.services.contains_key(*name))
            .map(|name| (name, None));
        let now = self
            .services
            .iter()
            .filter(|(name, health)| before.services.get(*name) != Some(*health))
            .map(|(name, health)| (name, Some(*health)));
        let mut changes = gone.chain(now).peekable();
        while changes.peek().is_some() {
            let written = put_frame(buf, Kind::Health, |buf| {
                let start = buf.len();
                // The longest entry is a name, its length, and four integers.
                while buf.len() - start < MAX_HEAD - MAX_NAME - 64 {
                    let Some((name, health)) = changes.next() else {
                        break;
                    };
                    varint::put(buf, name.len() as u64);
                    buf.extend_from_slice(name.as_bytes());
                    put_entry(buf, health);
                }
                Ok::<_, Infallible>(())
            });
            let Ok(()) = written;
        }
    }

    /// Takes in what a HEALTH frame says.
    pub(crate) fn apply(&mut self, mut payload: Bytes) -> Result<(), Violation> {
        while !payload.is_empty() {
            let name = text(&mut payload, "a service's name")?;
            let name = std::str::from_utf8(&name)
                .ok()
                .filter(|name| !name.is_empty() && name.len() <= MAX_NAME)
                .ok_or_else(|| malformed("a service's name", "no text of 1 to 512 bytes"))?;
            if number(&mut payload, "a service's presence")? == 0 {
                self.services.remove(name);
                continue;
            }
            let mut count = |part| {
                let value = number(&mut payload, part)?;
                Ok(u32::try_from(value).unwrap_or(u32::MAX))
            };
            let health = ServiceHealth {
                healthy: count("a service's healthy endpoints")?,
                total: count("a service's endpoints")?,
                spare: count("a service's spare capacity")?,
            };
            self.set(name, health);
        }
        Ok(())
    }
}

fn put_entry(buf: &mut BytesMut, health: Option<ServiceHealth>) {
    let Some(health) = health else {
        return varint::put(buf, 0);
    };
    varint::put(buf, 1);
    for value in [health.healthy, health.total, health.spare] {
        varint::put(buf, u64::from(value));
    }
}

/// Appends a HEALTH frame that changes nothing: what was said still holds.
pub(crate) fn put_no_news(buf: &mut BytesMut) {
    let Ok(()) = put_frame(buf, Kind::Health, |_| Ok::<_, Infallible>(()));
}

/// Appends a GOAWAY frame.
pub(crate) fn put_go_away(buf: &mut BytesMut) {
    let Ok(()) = put_frame(buf, Kind::GoAway, |_| Ok::<_, Infallible>(()));
}

/// Appends a PROBE frame.
pub(crate) fn put_probe(buf: &mut BytesMut) {
    let Ok(()) = put_frame(buf, Kind::Probe, |_| Ok::<_, Infallible>(()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Deframer, Piece};
    use proptest::prelude::*;

    fn frames(buf: BytesMut) -> Vec<(Kind, Bytes)> {
        let mut deframer = Deframer::default();
        deframer.push(buf.freeze());
        std::iter::from_fn(|| match deframer.next().unwrap()? {
            Piece::Whole(kind, payload) => Some((kind, payload)),
            Piece::Data(_) => panic!("no DATA here"),
        })
        .collect()
    }

    fn health() -> impl Strategy<Value = Health> {
        let service = (0..10u32, 0..10u32, any::<u32>());
        prop::collection::btree_map("[a-e]{1,2}", service, 0..12).prop_map(|all| {
            let mut health = Health::default();
            for (name, (healthy, total, spare)) in all {
                health.set(
                    &name,
                    ServiceHealth {
                        healthy,
                        total,
                        spare,
                    },
                );
            }
            health
        })
    }

    proptest! {
        #[test]
        fn changes_bring_the_peer_to_the_same(all in prop::collection::vec(health(), 1..5)) {
            let mut there = Health::default();
            let mut before = Health::default();
            for now in all {
                let mut buf = BytesMut::new();
                now.put_changes(&before, &mut buf);
                prop_assert_eq!(buf.is_empty(), now == before);
                for (kind, payload) in frames(buf) {
                    prop_assert_eq!(kind, Kind::Health);
                    there.apply(payload).unwrap();
                }
                prop_assert_eq!(&there, &now);
                before = now;
            }
        }

        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let bytes = Bytes::from(bytes);
            let _ = Settings::read(bytes.clone());
            let _ = Health::default().apply(bytes);
        }
    }

    #[test]
    fn many_services_take_many_frames() {
        let mut all = Health::default();
        for i in 0..MAX_SERVICES + 10 {
            all.set(&format!("namespace/service-{i:05}"), ServiceHealth::default());
        }
        assert_eq!(all.iter().count(), MAX_SERVICES);
        let mut buf = BytesMut::new();
        all.put_changes(&Health::default(), &mut buf);
        let frames = frames(buf);
        assert!(frames.len() > 3 && frames.iter().all(|(_, payload)| payload.len() <= MAX_HEAD));
        let mut there = Health::default();
        for (_, payload) in frames {
            there.apply(payload).unwrap();
        }
        assert_eq!(there, all);
    }

    #[test]
    fn settings_of_a_later_revision_are_understood() {
        let mut buf = BytesMut::new();
        let later = Settings {
            revision: 7,
            max_head: 1 << 20,
            max_fields: 64,
        };
        later.put(&mut buf);
        let (_, payload) = frames(buf).remove(0);
        let mut payload = BytesMut::from(&payload[..]);
        varint::put(&mut payload, 99);
        varint::put(&mut payload, 1);
        let read = Settings::read(payload.freeze()).unwrap();
        assert_eq!(read, later);
        assert_eq!(
            read.limits().head,
            MAX_HEAD,
            "never more than we know how to make"
        );
        let mut small = BytesMut::new();
        varint::put(&mut small, ID_MAX_HEAD);
        varint::put(&mut small, 1);
        assert!(Settings::read(small.freeze()).is_err());
    }
}
