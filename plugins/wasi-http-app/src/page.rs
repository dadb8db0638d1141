//! What is shown, and for which path.

/// The service and the path that a request asks for under `/proxy/SERVICE/PATH`.
pub(crate) fn target(path: &str) -> Option<(&str, &str)> {
    let rest = path.strip_prefix("/proxy/")?;
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let (service, path) = rest.split_at(at);
    let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b':');
    if service.is_empty() || !service.bytes().all(name) {
        return None;
    }
    match path {
        "" => Some((service, "/")),
        path if path.starts_with('/') => Some((service, path)),
        _ => None,
    }
}

/// What of a path is shown: queries have what is nobody's business.
pub(crate) fn without_query(path: &str) -> &str {
    path.split('?').next().unwrap_or_default()
}

/// A page with a heading and a sentence.
pub(crate) fn html(heading: &str, sentence: &str) -> String {
    let (heading, sentence) = (escaped(heading), escaped(sentence));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{heading}</title>\n\
         <h1>{heading}</h1>\n<p>{sentence}</p>\n</html>\n"
    )
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_asked_under_proxy_only() {
        assert_eq!(
            target("/proxy/catalog/items?n=1"),
            Some(("catalog", "/items?n=1"))
        );
        assert_eq!(target("/proxy/catalog"), Some(("catalog", "/")));
        for path in [
            "/",
            "/proxy/",
            "/proxy//x",
            "/proxy/a@b/c",
            "/proxy/a?x=1",
            "/proxied/catalog",
        ] {
            assert_eq!(target(path), None, "{path}");
        }
    }

    #[test]
    fn what_a_client_sent_is_shown_as_text() {
        let page = html("Sorry", "GET /<script>");
        assert!(page.contains("GET /&lt;script&gt;") && !page.contains("<script>"));
    }
}
