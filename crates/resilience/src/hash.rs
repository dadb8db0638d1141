//! Consistent hashing: a key goes to the same endpoint as long as that serves, and few keys move when
//! others come and go.

use twox_hash::XxHash64;

/// The hash of a request's key, for the policies that hash: xxHash64, as in Envoy. Equal in every proxy and
/// version, so that a key goes to one endpoint whichever proxy it comes through. Not against attackers: who
/// can choose keys can choose their endpoint.
pub fn hash_of(key: &[u8]) -> u64 {
    XxHash64::oneshot(0, key)
}

/// One of the members that share the keys: a name that stays, and a weight above 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'a> {
    pub(crate) id: &'a str,
    pub(crate) weight: f64,
}

/// A map of the keys' space: slots, each of which belongs to a member.
#[derive(Clone, Debug)]
pub(crate) enum Slots {
    Ring(Ring),
    Maglev(Vec<u32>),
}

/// Points in the order of their hashes; a key belongs to the first at or after its own.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    hashes: Vec<u64>,
    owners: Vec<u32>,
}

/// Points beyond which a ring is made no finer than its settings demand: 64 Ki, at 12 bytes each.
const FINE: f64 = 65_536.0;

impl Slots {
    /// The slot of a key. O(1) for a table, O(log points) for a ring.
    pub(crate) fn of_key(&self, hash: u64) -> usize {
        match self {
            Self::Ring(ring) => {
                let at = ring.hashes.partition_point(|point| *point < hash);
                if at < ring.hashes.len() { at } else { 0 }
            }
            Self::Maglev(table) => {
                // At most the table's length, which is a usize.
                let at = hash.checked_rem(table.len() as u64).unwrap_or(0);
                usize::try_from(at).unwrap_or(0)
            }
        }
    }

    /// Owners of the slots, as positions in the list that the map was made of.
    pub(crate) fn owners(&self) -> &[u32] {
        match self {
            Self::Ring(ring) => &ring.owners,
            Self::Maglev(table) => table,
        }
    }
}

/// A ring of at least `minimum` points, each member having them in proportion to its weight.
///
/// Ketama and Envoy spread a fixed number of points over the members, so that each has more of them when
/// one leaves, and the new points take keys from members that stayed. Here a member's points depend on its
/// weight only, half the minimum for a weight of 1, so that no key moves but those of the member that
/// left. Only when the ring would be very large is that halved, as often as needed, and then keys
/// move once when the number of members passes such a limit.
///
/// O(points * log points).
pub(crate) fn ring(owners: &[Owner<'_>], minimum: u32) -> Slots {
    let minimum = f64::from(minimum).max(1.0);
    let total: f64 = owners.iter().map(|o| o.weight).sum();
    let mut density = minimum / 2.0;
    while total * density > FINE && total * density / 2.0 >= minimum {
        density /= 2.0;
    }
    while total * density < minimum && total > 0.0 {
        density *= 2.0;
    }
    let mut points = Vec::new();
    for (owner, position) in owners.iter().zip(0u32..) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive, and in sum below twice the larger of the minimum, a u32, and 64 Ki"
        )]
        let count = (owner.weight * density).ceil().max(1.0) as u64;
        points.extend((0..count).map(|i| (XxHash64::oneshot(i, owner.id.as_bytes()), position)));
    }
    points.sort_unstable();
    let (hashes, owners) = points.into_iter().unzip();
    Slots::Ring(Ring { hashes, owners })
}

/// A table of `size` entries, a prime, that members fill in turns, each in an order of its own. One of less
/// weight than the greatest sits out turns in proportion, as in Envoy.
///
/// O(size * log size) for weights alike.
///
/// Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, §3.4.
pub(crate) fn maglev(owners: &[Owner<'_>], size: u32) -> Slots {
    struct Turn {
        position: u32,
        weight: f64,
        /// The turn, times weight, from which on it takes the next entry.
        due: f64,
        next: u64,
        skip: u64,
    }
    const FREE: u32 = u32::MAX;
    let size = u64::from(size.max(2));
    let mut table = vec![FREE; usize::try_from(size).unwrap_or(0)];
    let greatest = owners.iter().map(|o| o.weight).fold(0.0, f64::max);
    let mut turns: Vec<Turn> = owners
        .iter()
        .zip(0u32..)
        .map(|(owner, position)| Turn {
            position,
            weight: owner.weight,
            due: 0.0,
            next: XxHash64::oneshot(0, owner.id.as_bytes()) % size,
            skip: XxHash64::oneshot(1, owner.id.as_bytes()) % (size - 1) + 1,
        })
        .collect();
    let mut left = if turns.is_empty() { 0 } else { table.len() };
    let mut round = 0.0;
    while left > 0 {
        round += 1.0;
        for turn in &mut turns {
            if left == 0 {
                break;
            }
            if round * turn.weight < turn.due {
                continue;
            }
            turn.due += greatest;
            // As long as an entry is free it comes to one: size is a prime, so the order is complete.
            while let Some(entry) = usize::try_from(turn.next).ok().and_then(|at| table.get_mut(at)) {
                turn.next = (turn.next + turn.skip) % size;
                if *entry == FREE {
                    *entry = turn.position;
                    left -= 1;
                    break;
                }
            }
        }
    }
    Slots::Maglev(table)
}

#[cfg(test)]
mod tests;
