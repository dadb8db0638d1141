//! Values of a JSON text, replaced where they stand. What isn't replaced stays as it was written: numbers keep their
//! digits, objects their order, and texts their escapes.

use serde::de::IgnoredAny;
use std::collections::BTreeSet;

/// The text with the values of these fields replaced; none if it has none of them.
///
/// Objects and lists are nested at most 128 deep, serde_json's bound.
pub(crate) fn redact(json: &[u8], fields: &BTreeSet<String>, mask: &str) -> Result<Option<Vec<u8>>, String> {
    // What is walked over below is known to be UTF-8 and JSON.
    let text = std::str::from_utf8(json).map_err(|e| e.to_string())?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|e| e.to_string())?;
    let mask = serde_json::to_vec(mask).map_err(|e| e.to_string())?;
    let mut walk = Walk { json, at: 0 };
    let (mut out, mut copied) = (Vec::new(), 0);
    while let Some(name) = walk.next_name()? {
        if !fields.contains(&name) {
            continue;
        }
        let value = walk.skip_value();
        out.extend_from_slice(json.get(copied..value.start).unwrap_or_default());
        out.extend_from_slice(&mask);
        copied = value.end;
    }
    if copied == 0 {
        return Ok(None);
    }
    out.extend_from_slice(json.get(copied..).unwrap_or_default());
    Ok(Some(out))
}

/// Where the walk over a valid text has come to.
struct Walk<'a> {
    json: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn peek(&self) -> Option<u8> {
        self.json.get(self.at).copied()
    }

    /// Goes on to behind the colon after the next field's name.
    fn next_name(&mut self) -> Result<Option<String>, String> {
        while let Some(byte) = self.peek() {
            if byte != b'"' {
                self.at += 1;
                continue;
            }
            let text = self.skip_string();
            self.skip_space();
            if self.peek() == Some(b':') {
                self.at += 1;
                let written = self.json.get(text).unwrap_or_default();
                return serde_json::from_slice(written)
                    .map(Some)
                    .map_err(|e| e.to_string());
            }
        }
        Ok(None)
    }

    /// Goes past the value that comes, and says where it stands.
    fn skip_value(&mut self) -> std::ops::Range<usize> {
        self.skip_space();
        let start = self.at;
        let mut depth = 0_usize;
        while let Some(byte) = self.peek() {
            match byte {
                b'"' => {
                    self.skip_string();
                }
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                    continue;
                }
                b'}' | b']' => {
                    depth -= 1;
                    self.at += 1;
                }
                b',' | b':' | b' ' | b'\t' | b'\r' | b'\n' => {
                    self.at += 1;
                    continue;
                }
                _ => self.skip_word(),
            }
            if depth == 0 {
                break;
            }
        }
        start..self.at
    }

    fn skip_string(&mut self) -> std::ops::Range<usize> {
        let start = self.at;
        self.at += 1;
        while let Some(byte) = self.peek() {
            self.at += if byte == b'\\' { 2 } else { 1 };
            if byte == b'"' {
                break;
            }
        }
        start..self.at
    }

    /// A number, `true`, `false` or `null`.
    fn skip_word(&mut self) {
        while self
            .peek()
            .is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
        {
            self.at += 1;
        }
    }

    fn skip_space(&mut self) {
        while self
            .peek()
            .is_some_and(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n'))
        {
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn redacted(json: &str) -> String {
        let fields = ["card", "pass\"word"].map(str::to_owned).into();
        let out = redact(json.as_bytes(), &fields, "***").unwrap();
        out.map_or_else(|| json.to_owned(), |out| String::from_utf8(out).unwrap())
    }

    #[test]
    fn values_of_every_kind_and_depth_are_replaced_and_the_rest_stays_as_written() {
        for (json, want) in [
            (r#"{"card": "4111", "n": 1.10}"#, r#"{"card": "***", "n": 1.10}"#),
            (r#"{"card":-1.5e+9}"#, r#"{"card":"***"}"#),
            (r#"{"card":null,"b":true}"#, r#"{"card":"***","b":true}"#),
            (
                r#"{"card" : {"card": [1, {"x": "}"}]} , "b": 2}"#,
                r#"{"card" : "***" , "b": 2}"#,
            ),
            (
                r#"[{"a": [{"card": []}]}, "card"]"#,
                r#"[{"a": [{"card": "***"}]}, "card"]"#,
            ),
            (r#"{"\u0063ard": 1}"#, r#"{"\u0063ard": "***"}"#),
            (r#"{"pass\"word": "a\\"}"#, r#"{"pass\"word": "***"}"#),
            (r#"{"card": 1, "card": 2}"#, r#"{"card": "***", "card": "***"}"#),
            (
                r#"{"a": "\"card\": 1", "big": 12345678901234567890123}"#,
                r#"{"a": "\"card\": 1", "big": 12345678901234567890123}"#,
            ),
            (r#""card""#, r#""card""#),
        ] {
            assert_eq!(redacted(json), want);
        }
    }

    #[test]
    fn what_comes_out_is_json_without_the_values() {
        // Texts made of the parts that a walk could stumble over.
        let parts = [
            r#""card""#,
            r#""\\""#,
            r#""\"""#,
            "[]",
            "{}",
            "-1e-1",
            "null",
            r#""é""#,
        ];
        for a in parts {
            for b in parts {
                let json = format!(r#"{{"card":{a} ,"x":[{b},{{"card" :{b}}}],"y":{a}}}"#);
                let value: Value = serde_json::from_str(&redacted(&json)).unwrap();
                assert_eq!(
                    (&value["card"], &value["x"][1]["card"]),
                    (&"***".into(), &"***".into()),
                    "{json}"
                );
                assert_eq!(value["y"], serde_json::from_str::<Value>(a).unwrap(), "{json}");
                assert_eq!(value["x"][0], serde_json::from_str::<Value>(b).unwrap(), "{json}");
            }
        }
    }

    #[test]
    fn what_is_no_json_is_an_error() {
        let fields = BTreeSet::new();
        for bad in [&b"{\"card\": 1"[..], b"{} {}", b"<html>", b"\"\xff\""] {
            assert!(redact(bad, &fields, "***").is_err());
        }
    }
}
