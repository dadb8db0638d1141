//! A small store of the plugin's own on this node: one for all workers and versions of the plugin, in memory, gone
//! when the proxy ends.
//!
//! It is bounded by Plugin.limits.storeBytes (default 1 MiB) and storeEntries (1024): the entries that were used least
//! recently go first. So nothing may rely on an entry being there.
//!
//! ```no_run
//! use leeward_plugin::store;
//! use std::time::Duration;
//!
//! # fn fetch() -> Vec<u8> { Vec::new() }
//! # fn main() -> Result<(), store::StoreError> {
//! let prices = match store::get("prices") {
//!     Some(prices) => prices,
//!     None => {
//!         let prices = fetch();
//!         store::set("prices", &prices, Some(Duration::from_secs(60)))?;
//!         prices
//!     }
//! };
//! let asked = store::increment("asked", 1, None)?;
//! # Ok(())
//! # }
//! ```

use crate::bindings::leeward::plugin::store;
use crate::host::millis;
use std::time::Duration;
pub use store::StoreError;

/// The value under a key, unless it has expired.
pub fn get(key: &str) -> Option<Vec<u8>> {
    store::get(key)
}

/// Keeps a value, for at most `ttl`; without, until others displace it.
///
/// # Errors
///
/// [`StoreError::TooLarge`] if the key is empty or has more than 256 bytes, or the entry doesn't fit the store by
/// itself.
pub fn set(key: &str, value: impl AsRef<[u8]>, ttl: Option<Duration>) -> Result<(), StoreError> {
    store::set(key, value.as_ref(), ttl.map(millis))
}

/// Forgets a value.
pub fn delete(key: &str) {
    store::delete(key);
}

/// Adds to a number, from 0 where there is none, and gives the sum. No other worker comes in between. `ttl` holds for
/// a number that begins here, so that a count over a window is one call.
///
/// # Errors
///
/// [`StoreError::NotANumber`] if the value isn't a decimal number; [`StoreError::TooLarge`] as for [`set`].
pub fn increment(key: &str, by: i64, ttl: Option<Duration>) -> Result<i64, StoreError> {
    store::increment(key, by, ttl.map(millis))
}

/// Keys that begin with `prefix`, in order; at most `limit`, and at most 1000.
pub fn keys(prefix: &str, limit: u32) -> Vec<String> {
    store::keys(prefix, limit)
}
