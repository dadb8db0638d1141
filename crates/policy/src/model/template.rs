//! Texts with places for a request's fields.

use std::fmt;

/// A text in which `${request.path}` and the like stand for what a request has.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Template {
    source: Box<str>,
    pieces: Vec<Piece>,
}

/// A part of a template.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    /// Itself.
    Text(Box<str>),
    /// What a request has.
    Field(TemplateField),
}

/// What a template can ask for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TemplateField {
    /// The method.
    Method,
    /// The path, without the query.
    Path,
    /// The query, without its question mark.
    Query,
    /// The host, without a port.
    Host,
    /// The first value of a header, whose name is lower case.
    Header(Box<str>),
    /// Why the call failed.
    Cause,
    /// The route's name.
    Route,
    /// The service's name.
    Service,
    /// This proxy's zone.
    Zone,
}

/// A template that can't be read.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidTemplate {
    /// A place that is not ended.
    #[error("has ${{ without its }}")]
    Unended,
    /// A place for something that there isn't.
    #[error(
        "${{{0}}} is not known; want request.method, request.path, request.query, request.host, \
         request.header.NAME, cause, route, service or zone"
    )]
    Unknown(String),
    /// A dollar sign that is neither a place nor doubled.
    #[error("has a single $; want $$ for a dollar sign")]
    Dollar,
}

impl Template {
    /// A text that stands for itself.
    pub fn fixed(text: &str) -> Self {
        Self {
            source: text.into(),
            pieces: vec![Piece::Text(text.into())],
        }
    }

    /// Reads a template.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(source: &str) -> Result<Self, InvalidTemplate> {
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut rest = source;
        while let Some((before, after)) = rest.split_once('$') {
            text.push_str(before);
            if let Some(after) = after.strip_prefix('$') {
                text.push('$');
                rest = after;
            } else if let Some(after) = after.strip_prefix('{') {
                let (field, after) = after.split_once('}').ok_or(InvalidTemplate::Unended)?;
                let field =
                    TemplateField::parse(field).ok_or_else(|| InvalidTemplate::Unknown(field.to_owned()))?;
                if !text.is_empty() {
                    pieces.push(Piece::Text(std::mem::take(&mut text).into()));
                }
                pieces.push(Piece::Field(field));
                rest = after;
            } else {
                return Err(InvalidTemplate::Dollar);
            }
        }
        text.push_str(rest);
        if !text.is_empty() {
            pieces.push(Piece::Text(text.into()));
        }
        Ok(Self {
            source: source.into(),
            pieces,
        })
    }

    /// As policy has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Its parts, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The text, if nothing of it depends on the request.
    pub fn as_fixed(&self) -> Option<&str> {
        match self.pieces.as_slice() {
            [] => Some(""),
            [Piece::Text(text)] => Some(text),
            [Piece::Field(_)] | [_, _, ..] => None,
        }
    }
}

impl TemplateField {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "request.method" => Self::Method,
            "request.path" => Self::Path,
            "request.query" => Self::Query,
            "request.host" => Self::Host,
            "cause" => Self::Cause,
            "route" => Self::Route,
            "service" => Self::Service,
            "zone" => Self::Zone,
            _ => {
                let name = text.strip_prefix("request.header.")?;
                let token = |b: u8| b.is_ascii_alphanumeric() || b"!#%&'*+-.^_`|~".contains(&b);
                if name.is_empty() || !name.bytes().all(token) {
                    return None;
                }
                Self::Header(name.to_ascii_lowercase().into())
            }
        })
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn places_are_found_and_dollars_are_doubled() {
        let template = Template::parse("at ${request.path} for $$5, ${request.header.X-User}!").unwrap();
        assert_eq!(
            template.pieces(),
            [
                Piece::Text("at ".into()),
                Piece::Field(TemplateField::Path),
                Piece::Text(" for $5, ".into()),
                Piece::Field(TemplateField::Header("x-user".into())),
                Piece::Text("!".into()),
            ]
        );
        assert_eq!(template.as_fixed(), None);
        assert_eq!(Template::parse("$$").unwrap().as_fixed(), Some("$"));
        assert_eq!(Template::parse("").unwrap().as_fixed(), Some(""));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        assert_eq!(Template::parse("${cause"), Err(InvalidTemplate::Unended));
        assert_eq!(Template::parse("5 $"), Err(InvalidTemplate::Dollar));
        let unknown = Template::parse("${request.body}").unwrap_err().to_string();
        assert!(
            unknown.starts_with("${request.body} is not known; want "),
            "{unknown}"
        );
        assert!(Template::parse("${request.header.}").is_err());
        assert!(Template::parse("${request.header.a b}").is_err());
    }

    proptest! {
        #[test]
        fn reading_never_panics_and_keeps_the_source(source in ".{0,60}") {
            if let Ok(template) = Template::parse(&source) {
                prop_assert_eq!(template.source(), source);
            }
        }

        #[test]
        fn a_text_with_doubled_dollars_is_itself(text in ".{0,60}") {
            let template = Template::parse(&text.replace('$', "$$")).unwrap();
            prop_assert_eq!(template.as_fixed(), Some(text.as_str()));
        }
    }
}
