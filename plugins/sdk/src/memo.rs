//! What was made of a configuration, kept until another one comes.

use std::cell::RefCell;
use std::rc::Rc;

/// Keeps what was last made of a configuration, so that not every call reads it anew. An instance serves few
/// configurations, nearly always one.
///
/// ```
/// use leeward_plugin::Memo;
///
/// thread_local! {
///     static LIMIT: Memo<u32> = const { Memo::new() };
/// }
/// let limit = LIMIT.with(|memo| memo.get("12", |config| config.parse::<u32>()));
/// assert_eq!(*limit.unwrap(), 12);
/// ```
#[derive(Debug, Default)]
pub struct Memo<T>(RefCell<Option<(String, Rc<T>)>>);

impl<T> Memo<T> {
    /// Nothing has been made yet.
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    /// What `make` makes of this configuration, or made of it the last time.
    ///
    /// # Errors
    ///
    /// Those of `make`.
    pub fn get<E>(&self, config: &str, make: impl FnOnce(&str) -> Result<T, E>) -> Result<Rc<T>, E> {
        if let Some((of, made)) = &*self.0.borrow()
            && of == config
        {
            return Ok(Rc::clone(made));
        }
        let made = Rc::new(make(config)?);
        self.0.replace(Some((config.to_owned(), Rc::clone(&made))));
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_once_and_an_error_not_kept() {
        let memo = Memo::new();
        let read = |config: &str| memo.get(config, str::parse::<u32>);
        let first = read("1").unwrap();
        assert!(Rc::ptr_eq(&first, &read("1").unwrap()));
        assert!(read("x").is_err());
        assert_eq!(*read("2").unwrap(), 2);
        assert!(!Rc::ptr_eq(&first, &read("1").unwrap()));
    }
}
