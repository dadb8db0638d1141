//! What the plugin is told, and the message that it sends.

use serde::Deserialize;

/// The plugin's configuration.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Config {
    #[serde(default)]
    pub(crate) auth: Option<Auth>,
    #[serde(default)]
    pub(crate) audit: Option<Audit>,
    #[serde(default = "second")]
    pub(crate) tick_ms: u64,
    #[serde(default)]
    pub(crate) request_body: Option<Replace>,
    #[serde(default)]
    pub(crate) response_body: Option<Replace>,
}

/// Who is asked whether a request may pass.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct Auth {
    pub(crate) cluster: String,
    pub(crate) path: String,
}

/// Who is told how many requests there were.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct Audit {
    pub(crate) cluster: String,
    pub(crate) service: String,
    pub(crate) method: String,
}

/// A text in a body, and what stands in its place.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct Replace {
    from: String,
    to: String,
}

const fn second() -> u64 {
    1000
}

impl Default for Config {
    fn default() -> Self {
        Self {
            auth: None,
            audit: None,
            tick_ms: second(),
            request_body: None,
            response_body: None,
        }
    }
}

impl Config {
    pub(crate) fn parse(text: &[u8]) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let config: Self = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        for replace in [&config.request_body, &config.response_body]
            .into_iter()
            .flatten()
        {
            if replace.from.is_empty() {
                return Err("from is empty; want the text to replace".to_owned());
            }
        }
        Ok(config)
    }
}

impl Replace {
    /// The body with the text replaced; none if it isn't in it.
    pub(crate) fn apply(&self, body: &[u8]) -> Option<Vec<u8>> {
        let from = self.from.as_bytes();
        let (mut out, mut rest) = (Vec::new(), body);
        while let Some(at) = rest.windows(from.len()).position(|part| part == from) {
            let (before, found) = rest.split_at(at);
            out.extend_from_slice(before);
            out.extend_from_slice(self.to.as_bytes());
            rest = found.get(from.len()..).unwrap_or_default();
        }
        if rest.len() == body.len() {
            return None;
        }
        out.extend_from_slice(rest);
        Some(out)
    }
}

/// `message Report { uint64 total = 1; }`
pub(crate) fn report(total: u64) -> Vec<u8> {
    let mut message = vec![0x08];
    let mut rest = total;
    while rest >= 0x80 {
        message.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    message.push(rest as u8);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_replaced_wherever_it_stands() {
        let replace = Replace {
            from: "secret".to_owned(),
            to: "*".to_owned(),
        };
        assert_eq!(replace.apply(b"secret secrets se").unwrap(), b"* *s se");
        assert!(replace.apply(b"sec").is_none() && replace.apply(b"").is_none());
    }

    #[test]
    fn a_wrong_configuration_is_named() {
        assert_eq!(Config::parse(b"").unwrap().tick_ms, 1000);
        assert!(Config::parse(br#"{"auht": {}}"#).unwrap_err().contains("auht"));
        assert!(
            Config::parse(br#"{"requestBody": {"from": "", "to": ""}}"#)
                .unwrap_err()
                .contains("from")
        );
    }

    #[test]
    fn a_report_is_a_protobuf_message() {
        assert_eq!(report(1), [0x08, 1]);
        assert_eq!(report(300), [0x08, 0xac, 0x02]);
    }
}
