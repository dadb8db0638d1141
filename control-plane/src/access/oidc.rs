//! Users by tokens of an OpenID Connect issuer.

use crate::policy::wall;
use crate::refusal::{Reason, refuse_for_now, refuse_with};
use leeward_identity::jwt::{KeySet, MAX_JWKS, Rejected, Wanted, says_issuer, verify};
use leeward_identity::web;
use serde_json::{Map, Value};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;
use tonic::{Code, Status};

/// How old keys may be before they are fetched again: so long a key counts that the issuer has taken away.
const REFRESH: Duration = Duration::from_secs(300);
/// The least time between two fetches that tokens ask for, by a key that isn't there.
const ASKED_EVERY: Duration = Duration::from_secs(30);
/// The same, while there are no keys at all.
const FIRST_AGAIN: Duration = Duration::from_secs(2);
/// Longest fetch.
const FETCH: Duration = Duration::from_secs(5);
/// Largest discovery document, in bytes.
const MAX_DISCOVERY: usize = 64 << 10;
/// Longest name of a user or a group, in bytes, and most groups that are looked at.
const MAX_NAME: usize = 253;
const MAX_GROUPS: usize = 256;

/// Whose tokens are taken, and what they say of users.
#[derive(Clone, Debug)]
pub struct OidcSettings {
    /// The claim `iss`, and where `/.well-known/openid-configuration` is: an https URL.
    pub issuer: String,
    /// What must be in the claim `aud`.
    pub audience: String,
    /// The claim that names a user; a JSON pointer where it begins with a slash.
    pub user_claim: String,
    /// The claim that has the groups, likewise.
    pub groups_claim: String,
}

/// Who a token is from.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) user: String,
    pub(super) groups: Vec<String>,
    pub(super) until: SystemTime,
}

/// Checks tokens. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Oidc {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: OidcSettings,
    audiences: [Box<str>; 1],
    // Poison is harmless: it is put in whole.
    had: Mutex<Had>,
    /// Held while keys are fetched, so that this is done once for all who wait.
    fetching: tokio::sync::Mutex<()>,
}

/// What was had of the issuer.
#[derive(Clone, Debug, Default)]
struct Had {
    keys: Option<Arc<KeySet>>,
    /// When it was last tried.
    tried: Option<Instant>,
    /// When it last went well.
    fetched: Option<Instant>,
}

impl Oidc {
    pub(crate) fn new(settings: OidcSettings) -> Self {
        let audiences = [settings.audience.as_str().into()];
        Self {
            shared: Arc::new(Shared {
                settings,
                audiences,
                had: Mutex::default(),
                fetching: tokio::sync::Mutex::default(),
            }),
        }
    }

    /// Who a token is from.
    ///
    /// # Errors
    ///
    /// `UNAUTHENTICATED` if it isn't valid; `UNAVAILABLE` if that can't be told, as the issuer's keys can't be had.
    pub(super) async fn check(&self, token: &str) -> Result<Known, Status> {
        let settings = &self.shared.settings;
        // Nobody has keys fetched for what can't be theirs.
        if !says_issuer(token, &settings.issuer) {
            return Err(invalid(Rejected::Issuer.as_str()));
        }
        let is_due = |had: &Had| {
            let pause = if had.keys.is_some() {
                ASKED_EVERY
            } else {
                FIRST_AGAIN
            };
            is_past(had.fetched, REFRESH) && is_past(had.tried, pause)
        };
        let had = self.had();
        let mut keys = if is_due(&had) {
            self.fetch(is_due).await
        } else {
            had.keys
        };
        for asked in [false, true] {
            let Some(set) = &keys else {
                let why = "the issuer's keys can't be had; tokens can't be checked";
                return Err(refuse_for_now(Code::Unavailable, Reason::NoTokenKeys, why));
            };
            let wanted = Wanted {
                issuer: &settings.issuer,
                audiences: &self.shared.audiences,
            };
            let now = wall().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            match verify(token, set, &wanted, now) {
                Ok(valid) => return self.known(&valid.claims, valid.until),
                Err(Rejected::UnknownKey) if !asked => {
                    keys = self.fetch(|had| is_past(had.tried, ASKED_EVERY)).await;
                }
                Err(rejected) => return Err(invalid(rejected.as_str())),
            }
        }
        Err(invalid(Rejected::UnknownKey.as_str()))
    }

    fn known(&self, claims: &Map<String, Value>, until: u64) -> Result<Known, Status> {
        let settings = &self.shared.settings;
        let is_name =
            |text: &&str| !text.is_empty() && text.len() <= MAX_NAME && !text.contains(char::is_control);
        let user = claim(claims, &settings.user_claim)
            .and_then(Value::as_str)
            .filter(is_name);
        let user = user.ok_or_else(|| invalid("no_user"))?;
        let groups = match claim(claims, &settings.groups_claim) {
            Some(Value::String(group)) => vec![group.as_str()],
            Some(Value::Array(groups)) => groups.iter().take(MAX_GROUPS).filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        Ok(Known {
            user: user.to_owned(),
            groups: groups.into_iter().filter(is_name).map(str::to_owned).collect(),
            until: UNIX_EPOCH + Duration::from_secs(until.min(u64::from(u32::MAX) * 4)),
        })
    }

    fn had(&self) -> Had {
        self.shared
            .had
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The keys, fetched anew if they are still due once it is this caller's turn. What can't be had changes nothing.
    async fn fetch(&self, is_due: impl Fn(&Had) -> bool) -> Option<Arc<KeySet>> {
        let _turn = self.shared.fetching.lock().await;
        let mut had = self.had();
        if !is_due(&had) {
            return had.keys;
        }
        let issuer = &self.shared.settings.issuer;
        let fetched = match tokio::time::timeout(FETCH, fetch(issuer)).await {
            Ok(fetched) => fetched,
            Err(_) => Err(format!("no answer within {} s", FETCH.as_secs())),
        };
        had.tried = Some(Instant::now());
        match fetched {
            Ok(keys) => {
                had.keys = Some(Arc::new(keys));
                had.fetched = had.tried;
            }
            Err(error) => tracing::warn!(
                issuer,
                error,
                "can't get the issuer's keys; the last good ones stay"
            ),
        }
        *self.shared.had.lock().unwrap_or_else(PoisonError::into_inner) = had.clone();
        had.keys
    }
}

fn is_past(since: Option<Instant>, age: Duration) -> bool {
    since.is_none_or(|since| since.elapsed() >= age)
}

fn invalid(why: &str) -> Status {
    let message = format!("the token isn't valid: {why}");
    refuse_with(
        Code::Unauthenticated,
        Reason::InvalidToken,
        message,
        &[("token", why)],
    )
}

fn claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    match name.strip_prefix('/') {
        None => claims.get(name),
        Some(rest) => {
            let (first, rest) = rest
                .split_once('/')
                .map_or((rest, ""), |(first, rest)| (first, rest));
            let first = claims.get(&first.replace("~1", "/").replace("~0", "~"))?;
            if rest.is_empty() {
                return Some(first);
            }
            first.pointer(&format!("/{rest}"))
        }
    }
}

/// The issuer's keys, from where its discovery document says that they are (OpenID Connect Discovery 1.0, §4).
async fn fetch(issuer: &str) -> Result<KeySet, String> {
    let text = |error: web::GetError| error.to_string();
    let at = format!(
        "{}/.well-known/openid-configuration",
        issuer.trim_end_matches('/')
    );
    let document = web::get(&at, MAX_DISCOVERY).await.map_err(text)?;
    let document: Value =
        serde_json::from_slice(&document).map_err(|error| format!("{at} is not JSON: {error}"))?;
    let of = document.get("issuer").and_then(Value::as_str).unwrap_or_default();
    if of != issuer {
        return Err(format!("{at} is of another issuer: {of:?}"));
    }
    let keys_at = document.get("jwks_uri").and_then(Value::as_str);
    let keys_at = keys_at.ok_or_else(|| format!("{at} has no jwks_uri"))?;
    let keys = web::get(keys_at, MAX_JWKS).await.map_err(text)?;
    KeySet::parse(&keys).map_err(|error| format!("{keys_at} is no set of keys: {error}"))
}
