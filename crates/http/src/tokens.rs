//! Tokens of requests: found, checked once, and remembered until they end.

use crate::admit::Received;
use crate::keyring::{Keyring, Keys, Source};
use http::HeaderMap;
use leeward_identity::jwt::{Rejected, Wanted, fingerprint, verify};
use leeward_policy::model::JwtIssuer;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Tokens that a worker remembers. Only valid ones are, so nobody fills it with made-up ones.
const MAX_KNOWN: usize = 4096;
/// How long a request waits for keys that are on their way.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// What a token says.
pub(crate) type Claims = Arc<Map<String, Value>>;

/// One worker's memory of valid tokens.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    known: RefCell<HashMap<Id, Known>>,
}

/// A token for an issuer, by the address of the issuer's settings, which the entry keeps.
type Id = ([u8; 32], usize);

#[derive(Debug)]
struct Known {
    _issuer: Arc<JwtIssuer>,
    /// The keys that it was checked with: others may not have its key any more.
    keys: Arc<Keys>,
    until: u64,
    claims: Claims,
}

/// What became of a request's token.
pub(crate) enum Looked {
    /// It shows none.
    None,
    Valid(Claims),
    Invalid(&'static str),
    /// It can't be told yet: keys are on their way.
    Wait(watch::Receiver<u64>),
}

impl Tokens {
    /// Looks at the token that a request shows for an issuer.
    pub(crate) fn look(
        &self,
        request: &Received,
        issuer: &Arc<JwtIssuer>,
        ring: &Keyring,
        now: Instant,
    ) -> Looked {
        let token = match find(&request.parts.headers, issuer) {
            Ok(Some(token)) => token,
            Ok(None) => return Looked::None,
            Err(why) => return Looked::Invalid(why),
        };
        let source = ring.source(&issuer.keys);
        let Some(keys) = source.keys() else {
            return wait(ring, &source, now, "no_keys");
        };
        let id = (fingerprint(token), Arc::as_ptr(issuer).addr());
        let seconds = seconds();
        if let Some(known) = self.known.borrow().get(&id)
            && known.until > seconds
            && Arc::ptr_eq(&known.keys, &keys)
        {
            return Looked::Valid(Arc::clone(&known.claims));
        }
        let wanted = Wanted {
            issuer: &issuer.issuer,
            audiences: &issuer.audiences,
        };
        match verify(token, &keys.set, &wanted, seconds) {
            Ok(valid) => {
                let claims = Arc::new(valid.claims);
                let known = Known {
                    _issuer: Arc::clone(issuer),
                    keys,
                    until: valid.until,
                    claims: Arc::clone(&claims),
                };
                self.remember(id, known, seconds);
                Looked::Valid(claims)
            }
            Err(Rejected::UnknownKey) => wait(ring, &source, now, Rejected::UnknownKey.as_str()),
            Err(rejected) => Looked::Invalid(rejected.as_str()),
        }
    }

    fn remember(&self, id: Id, known: Known, seconds: u64) {
        let mut all = self.known.borrow_mut();
        if all.len() >= MAX_KNOWN {
            all.retain(|_, known| known.until > seconds);
        }
        if all.len() >= MAX_KNOWN {
            all.clear();
        }
        all.insert(id, known);
    }
}

fn wait(ring: &Keyring, source: &Source, now: Instant, why: &'static str) -> Looked {
    match ring.ask(source, now) {
        Some(ended) => Looked::Wait(ended),
        None => Looked::Invalid(why),
    }
}

/// The token in the first of the headers that is there. One that could be read in two ways is none.
fn find<'a>(headers: &'a HeaderMap, issuer: &JwtIssuer) -> Result<Option<&'a str>, &'static str> {
    for name in &issuer.headers {
        let mut values = headers.get_all(&**name).iter();
        let Some(value) = values.next() else { continue };
        if values.next().is_some() {
            return Err("more_than_one");
        }
        let value = value.to_str().map_err(|_| "malformed")?;
        if **name != *"authorization" {
            return Ok(Some(value));
        }
        // The scheme is in any case (RFC 9110 §11.1). Another one is no token.
        let Some((scheme, token)) = value.split_once(' ') else {
            continue;
        };
        if scheme.eq_ignore_ascii_case("bearer") {
            return Ok(Some(token.trim_start()));
        }
    }
    Ok(None)
}

fn seconds() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "tokens end by the wall clock")]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
