//! How many there may be at once, in all and of one user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places, of which each is taken by one user.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    most_of_one: usize,
    // Poison is harmless: a count is changed as a whole.
    taken: Mutex<HashMap<u32, usize>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    uid: u32,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Full {
    /// There are as many as may be.
    #[error("{0} of all users, which are as many as may be")]
    All(usize),
    /// This user has as many as one may.
    #[error("{0} of this user, which are as many as one may have")]
    OfUser(usize),
}

impl Places {
    pub(super) fn new(most: usize, most_of_one: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            most_of_one,
            taken: Mutex::default(),
        })
    }

    /// Takes a place for a user.
    pub(super) fn take(self: &Arc<Self>, uid: u32) -> Result<Place, Full> {
        let mut taken = self.locked();
        if taken.get(&uid).is_some_and(|own| *own >= self.most_of_one) {
            return Err(Full::OfUser(self.most_of_one));
        }
        if taken.values().sum::<usize>() >= self.most {
            return Err(Full::All(self.most));
        }
        *taken.entry(uid).or_default() += 1;
        let places = Arc::clone(self);
        Ok(Place { places, uid })
    }

    /// How many are taken.
    pub(super) fn taken(&self) -> usize {
        self.locked().values().sum()
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.locked();
        if let Some(own) = taken.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_cant_take_what_is_for_all() {
        let places = Places::new(3, 2);
        let first = places.take(1).unwrap();
        let _second = places.take(1).unwrap();
        assert_eq!(places.take(1).unwrap_err(), Full::OfUser(2));
        let _third = places.take(2).unwrap();
        assert_eq!(places.take(3).unwrap_err(), Full::All(3));
        assert_eq!(places.taken(), 3);
        drop(first);
        let again = places.take(3).unwrap();
        drop(again);
        assert_eq!(places.locked().len(), 2, "who has none is forgotten");
    }
}
