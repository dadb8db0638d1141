//! What several say of the same service, as one word.

/// How a service is, as one proxy or one gateway says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Word {
    /// Endpoints that take requests.
    pub healthy: u32,
    /// Requests that each proxy that calls may have under way beside those that it has.
    pub spare: u32,
}

/// What a gateway knows of those endpoints of its zone that are behind one proxy, or behind none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Part {
    /// Endpoints that it takes to be healthy, by what it has seen itself.
    pub seen: u32,
    /// What the proxy says, if there is one and it was heard lately.
    pub said: Option<Word>,
}

impl Word {
    /// What a gateway says of its zone. `own` is how many more requests each caller may have under way at the gateway
    /// itself, which all of them pass.
    ///
    /// An endpoint counts where neither the gateway nor the proxy in front of it knows better. What the proxies can spare
    /// is theirs in sum, since each of them speaks of requests to itself; one that says nothing, or endpoints without a
    /// proxy, bound nothing. The callers are the same at a proxy and at the gateways in front of it, so that each proxy
    /// has divided already.
    pub fn of_zone(parts: impl IntoIterator<Item = Part>, own: u32) -> Self {
        let (mut healthy, mut room) = (0u32, Some(0u32));
        for Part { seen, said } in parts {
            let well = said.map_or(seen, |said| said.healthy.min(seen));
            if well > 0 {
                healthy = healthy.saturating_add(well);
                room = room.zip(said).map(|(room, said)| room.saturating_add(said.spare));
            }
        }
        let spare = room.map_or(own, |room| room.min(own));
        Self {
            healthy,
            spare: if healthy == 0 { 0 } else { spare },
        }
    }

    /// What the gateways of a zone say together. They speak of the same endpoints, and of the same room: nothing is added
    /// up. `None` if none says anything.
    ///
    /// Those are believed that see the most healthy endpoints: what a gateway can't reach, another may. Of these it
    /// is the one with the least room, as requests are spread over them.
    pub fn agreed(words: impl IntoIterator<Item = Self>) -> Option<Self> {
        words.into_iter().reduce(|one, other| {
            if (one.healthy, other.spare) > (other.healthy, one.spare) {
                one
            } else {
                other
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn word() -> impl Strategy<Value = Word> {
        (0u32..6, 0u32..100).prop_map(|(healthy, spare)| Word { healthy, spare })
    }

    fn part() -> impl Strategy<Value = Part> {
        (0u32..6, prop::option::of(word())).prop_map(|(seen, said)| Part { seen, said })
    }

    #[test]
    fn a_zone_has_what_its_proxies_have_and_its_gateway_lets_pass() {
        let part = |seen, healthy, spare| Part {
            seen,
            said: Some(Word { healthy, spare }),
        };
        let zone = |parts: &[Part], own| {
            let word = Word::of_zone(parts.iter().copied(), own);
            (word.healthy, word.spare)
        };
        assert_eq!(zone(&[part(2, 2, 10), part(1, 1, 5)], 100), (3, 15));
        assert_eq!(zone(&[part(2, 2, 10), part(1, 1, 5)], 12), (3, 12));
        // What a proxy that can't be reached has said last is worth nothing.
        assert_eq!(zone(&[part(0, 2, 10), part(1, 1, 5)], 100), (1, 5));
        assert_eq!(zone(&[part(2, 0, 0), part(1, 1, 5)], 100), (1, 5));
        assert_eq!(zone(&[part(2, 0, 0), part(0, 1, 5)], 100), (0, 0));
        // One that says nothing is not one that has nothing.
        let silent = Part { seen: 1, said: None };
        assert_eq!(zone(&[silent, part(1, 1, 5)], 100), (2, 100));
        assert_eq!(zone(&[], 100), (0, 0));
    }

    proptest! {
        #[test]
        fn gateways_that_say_the_same_say_it_once(word in word(), gateways in 1usize..5) {
            let said = std::iter::repeat_n(word, gateways);
            prop_assert_eq!(Word::agreed(said), Some(word));
        }

        #[test]
        fn a_gateway_makes_no_room_and_takes_no_service_away(
            words in prop::collection::vec(word(), 1..5),
            other in word(),
        ) {
            let before = Word::agreed(words.iter().copied()).unwrap();
            let mut all = words;
            all.push(other);
            let after = Word::agreed(all.iter().copied()).unwrap();
            // Nothing is added up: it is what one of them says.
            prop_assert!(all.contains(&after));
            prop_assert_eq!(after.healthy, before.healthy.max(other.healthy));
            if other.healthy < before.healthy {
                prop_assert_eq!(after, before, "one that sees less changes nothing");
            }
            if other.healthy == before.healthy {
                prop_assert_eq!(after.spare, before.spare.min(other.spare));
            }
            // Whoever is lost, and in whatever order they are asked.
            all.rotate_left(1);
            prop_assert_eq!(Word::agreed(all.iter().copied()), Some(after));
        }

        #[test]
        fn a_zone_is_no_better_than_what_is_known_of_it(
            parts in prop::collection::vec(part(), 0..6),
            own in 0u32..200,
        ) {
            let word = Word::of_zone(parts.iter().copied(), own);
            let seen: u32 = parts.iter().map(|part| part.seen).sum();
            prop_assert!(word.healthy <= seen && word.spare <= own);
            if let Some(said) = parts.iter().map(|part| part.said).collect::<Option<Vec<_>>>() {
                prop_assert!(word.healthy <= said.iter().map(|said| said.healthy).sum());
                prop_assert!(word.spare <= said.iter().map(|said| said.spare).sum());
            }
            // A proxy that is lost takes away no more than what it had.
            for lost in 0..parts.len() {
                let mut rest = parts.clone();
                let gone = rest.remove(lost);
                let less = Word::of_zone(rest, own);
                prop_assert!(less.healthy + gone.seen >= word.healthy);
            }
        }
    }
}
