//! Who the control plane is to registries, as Docker writes it down.

use oci_client::secrets::RegistryAuth;
use serde_json::Value;

/// Why a file can't be used.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum AuthError {
    /// Not JSON.
    #[error("is not JSON: {0}")]
    Json(String),
    /// An entry that says nothing.
    #[error(
        "auths[{0:?}] has neither auth, in base64 of USER:PASSWORD, nor username and password, nor registrytoken"
    )]
    Entry(String),
}

/// What the file says of a registry, `HOST[:PORT]`. Helpers that Docker would run are not run: a registry that has
/// one and no entry is asked without a password.
pub(super) fn credentials(file: &str, registry: &str) -> Result<RegistryAuth, AuthError> {
    let file: Value = serde_json::from_str(file).map_err(|error| AuthError::Json(error.to_string()))?;
    let entries = file.get("auths").and_then(Value::as_object);
    let entry = entries
        .into_iter()
        .flatten()
        .find(|(key, _)| host(key) == registry);
    let Some((key, entry)) = entry else {
        return Ok(RegistryAuth::Anonymous);
    };
    read(entry).ok_or_else(|| AuthError::Entry(key.clone()))
}

fn read(entry: &Value) -> Option<RegistryAuth> {
    let text = |field: &str| {
        entry
            .get(field)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    };
    if let Some(token) = text("registrytoken") {
        return Some(RegistryAuth::Bearer(token.to_owned()));
    }
    if let (Some(user), Some(password)) = (text("username"), text("password")) {
        return Some(RegistryAuth::Basic(user.to_owned(), password.to_owned()));
    }
    let plain = String::from_utf8(base64(text("auth")?)?).ok()?;
    let (user, password) = plain.split_once(':')?;
    Some(RegistryAuth::Basic(user.to_owned(), password.to_owned()))
}

/// Keys are hosts, or addresses as `https://HOST/v1/`.
fn host(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default()
}

/// Base64 of RFC 4648, section 4, with or without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        // A digit alone is less than a byte.
        let bits = match group.len() {
            1 => return None,
            n => n * 6,
        };
        let mut value = 0u32;
        for digit in group {
            let six = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            value = value << 6 | u32::from(six);
        }
        let whole = value << (24 - bits);
        bytes.extend(whole.to_be_bytes().iter().skip(1).take(bits / 8));
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str, password: &str) -> RegistryAuth {
        RegistryAuth::Basic(user.into(), password.into())
    }

    #[test]
    fn an_entry_is_found_by_the_registrys_host() {
        let file = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "YWRhOnMzY3JldA=="},
            "r.example:5000": {"username": "bob", "password": "a:b"},
            "t.example": {"registrytoken": "tok"},
            "bad.example": {"auth": "YWRh"}}, "credsStore": "desktop"}"#;
        assert_eq!(credentials(file, "index.docker.io"), Ok(basic("ada", "s3cret")));
        assert_eq!(credentials(file, "r.example:5000"), Ok(basic("bob", "a:b")));
        assert_eq!(
            credentials(file, "t.example"),
            Ok(RegistryAuth::Bearer("tok".into()))
        );
        for other in ["r.example", "example", ""] {
            assert_eq!(credentials(file, other), Ok(RegistryAuth::Anonymous), "{other}");
        }
        let error = credentials(file, "bad.example").unwrap_err();
        assert_eq!(error, AuthError::Entry("bad.example".into()));
        assert_eq!(credentials("{}", "r.example"), Ok(RegistryAuth::Anonymous));
        assert!(matches!(
            credentials("auths:", "r.example"),
            Err(AuthError::Json(_))
        ));
    }

    #[test]
    fn base64_is_read_by_the_book() {
        for (text, want) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm8", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYmE=", "fooba"),
            ("Zm9vYmFy", "foobar"),
        ] {
            assert_eq!(base64(text).as_deref(), Some(want.as_bytes()), "{text}");
        }
        assert_eq!(base64("+/+/"), Some(vec![0xfb, 0xff, 0xbf]));
        for bad in ["Z", "Zg=a", "Z g=", "Zm9vY", "\u{e9}"] {
            assert_eq!(base64(bad), None, "{bad}");
        }
    }
}
