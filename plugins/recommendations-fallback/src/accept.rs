//! What a request takes for an answer.

/// Whether an answer in JSON is acceptable (RFC 9110 section 12.5.1): the most specific range that covers it
/// decides, and without any Accept all is.
pub(crate) fn json(accept: &[Vec<u8>]) -> bool {
    let mut best = None;
    let mut any = false;
    let values = accept.iter().filter_map(|value| std::str::from_utf8(value).ok());
    for range in values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|range| !range.is_empty())
    {
        any = true;
        let mut parts = range.split(';').map(str::trim);
        let specific = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
            "application/json" => 3,
            "application/*" => 2,
            "*/*" => 1,
            _ => continue,
        };
        let quality = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let refused = quality
            .and_then(|q| q.trim().parse::<f32>().ok())
            .is_some_and(|q| q <= 0.0);
        best = best.max(Some((specific, !refused)));
    }
    !any || best.is_some_and(|(_, accepted)| accepted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_given_to_those_who_take_it() {
        for accept in [
            "",
            "*/*",
            "application/*;q=0.1",
            "text/html, Application/JSON",
            "text/*, */*;q=0.5",
        ] {
            assert!(json(&[accept.into()]), "{accept}");
        }
        for accept in [
            "text/html",
            "application/json;q=0",
            "application/json; q=0.0, */*",
            "application/xml",
        ] {
            assert!(!json(&[accept.into()]), "{accept}");
        }
        assert!(
            json(&[b"text/html".to_vec(), b"application/json".to_vec()]),
            "several fields are one list"
        );
    }
}
