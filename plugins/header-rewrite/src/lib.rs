//! Sets, adds, renames and removes fields of requests and answers.
//!
//! The configuration is a JSON object with `request` and `response`, each of which may have `remove` (a list of names),
//! `rename` (old name to new name), `set` and `add` (name to value), done in that order. What it can't read, and an edit
//! that the proxy refuses, is a fault.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: header-rewrite}
//! spec:
//!   kind: Filter
//!   source: {file: /var/lib/leeward/header-rewrite.wasm}
//!   config: '{"request": {"rename": {"x-user": "x-customer"}}, "response": {"remove": ["server"], "set": {"x-frame-options": "DENY"}}}'
//!   onFault: FailOpen
//! ---
//! kind: Route
//! metadata: {name: shop}
//! spec:
//!   hostnames: [shop.example]
//!   rules:
//!     - backendRefs: [{service: shop}]
//!       filters: [{plugin: header-rewrite}]
//! ```

use leeward_plugin::{
    BodyMode, EditError, Filter, Interest, Memo, RequestHead, RequestVerdict, ResponseHead, ResponseVerdict,
    fault,
};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::rc::Rc;

struct HeaderRewrite;

/// The filter's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default)]
    request: Edits,
    #[serde(default)]
    response: Edits,
}

/// What is done to one head.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Edits {
    #[serde(default)]
    remove: Vec<String>,
    #[serde(default)]
    rename: BTreeMap<String, String>,
    #[serde(default)]
    set: BTreeMap<String, String>,
    #[serde(default)]
    add: BTreeMap<String, String>,
}

/// A head that can be edited.
trait Head {
    fn values(&self, name: &str) -> Vec<Vec<u8>>;
    fn set(&self, name: &str, value: &[u8]) -> Result<(), EditError>;
    fn add(&self, name: &str, value: &[u8]) -> Result<(), EditError>;
    fn remove(&self, name: &str) -> Result<(), EditError>;
}

thread_local! {
    static CONFIG: Memo<Config> = const { Memo::new() };
}

impl Filter for HeaderRewrite {
    fn on_request(request: &RequestHead) -> RequestVerdict {
        let config = config(request);
        config
            .request
            .apply(request)
            .unwrap_or_else(|error| fault(&error));
        RequestVerdict::Proceed(if config.response.is_empty() {
            Interest::NOTHING
        } else {
            Interest::RESPONSE
        })
    }

    fn on_response(request: &RequestHead, response: &ResponseHead) -> ResponseVerdict {
        config(request)
            .response
            .apply(response)
            .unwrap_or_else(|error| fault(&error));
        ResponseVerdict::Proceed(BodyMode::None)
    }
}

fn config(request: &RequestHead) -> Rc<Config> {
    CONFIG
        .with(|memo| memo.get(&request.config(), parse))
        .unwrap_or_else(|error| fault(&error))
}

/// Names are lower case from here on, as the proxy's are.
fn parse(text: &str) -> Result<Config, String> {
    let config: Config =
        serde_json::from_str(text).map_err(|e| format!("the filter's config is wrong: {e}"))?;
    Ok(Config {
        request: config.request.lower_case(),
        response: config.response.lower_case(),
    })
}

impl Edits {
    fn lower_case(self) -> Self {
        let names = |map: BTreeMap<String, String>| {
            map.into_iter()
                .map(|(name, value)| (name.to_ascii_lowercase(), value))
                .collect()
        };
        Self {
            remove: self.remove.iter().map(|name| name.to_ascii_lowercase()).collect(),
            rename: self
                .rename
                .into_iter()
                .map(|(from, to)| (from.to_ascii_lowercase(), to.to_ascii_lowercase()))
                .collect(),
            set: names(self.set),
            add: names(self.add),
        }
    }

    fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.rename.is_empty() && self.set.is_empty() && self.add.is_empty()
    }

    fn apply(&self, head: &impl Head) -> Result<(), String> {
        for name in &self.remove {
            head.remove(name).map_err(refused("remove", name))?;
        }
        for (from, to) in self.rename.iter().filter(|(from, to)| from != to) {
            let values = head.values(from);
            if values.is_empty() {
                continue;
            }
            head.remove(from).map_err(refused("rename", from))?;
            head.remove(to).map_err(refused("rename to", to))?;
            for value in &values {
                head.add(to, value).map_err(refused("rename to", to))?;
            }
        }
        for (name, value) in &self.set {
            head.set(name, value.as_bytes()).map_err(refused("set", name))?;
        }
        for (name, value) in &self.add {
            head.add(name, value.as_bytes()).map_err(refused("add", name))?;
        }
        Ok(())
    }
}

fn refused(edit: &str, name: &str) -> impl FnOnce(EditError) -> String {
    move |error| format!("the proxy refuses to {edit} {name:?}: {}", error.name())
}

impl Head for RequestHead {
    fn values(&self, name: &str) -> Vec<Vec<u8>> {
        self.header(name)
    }

    fn set(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
        self.set_header(name, value)
    }

    fn add(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
        self.add_header(name, value)
    }

    fn remove(&self, name: &str) -> Result<(), EditError> {
        self.remove_header(name)
    }
}

impl Head for ResponseHead {
    fn values(&self, name: &str) -> Vec<Vec<u8>> {
        self.header(name)
    }

    fn set(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
        self.set_header(name, value)
    }

    fn add(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
        self.add_header(name, value)
    }

    fn remove(&self, name: &str) -> Result<(), EditError> {
        self.remove_header(name)
    }
}

leeward_plugin::filter!(HeaderRewrite);

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// A head that is a list, and takes no `host`.
    struct List(RefCell<Vec<(String, Vec<u8>)>>);

    impl List {
        fn of(fields: &[(&str, &str)]) -> Self {
            let fields = fields
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec()));
            Self(RefCell::new(fields.collect()))
        }

        fn text(&self) -> String {
            let fields = self.0.borrow();
            let lines = fields
                .iter()
                .map(|(name, value)| format!("{name}={}", String::from_utf8_lossy(value)));
            lines.collect::<Vec<_>>().join(" ")
        }
    }

    impl Head for List {
        fn values(&self, name: &str) -> Vec<Vec<u8>> {
            let fields = self.0.borrow();
            fields
                .iter()
                .filter(|(n, _)| n == name)
                .map(|(_, value)| value.clone())
                .collect()
        }

        fn set(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
            self.remove(name)?;
            self.add(name, value)
        }

        fn add(&self, name: &str, value: &[u8]) -> Result<(), EditError> {
            if name == "host" {
                return Err(EditError::Forbidden);
            }
            self.0.borrow_mut().push((name.to_owned(), value.to_vec()));
            Ok(())
        }

        fn remove(&self, name: &str) -> Result<(), EditError> {
            self.0.borrow_mut().retain(|(n, _)| n != name);
            Ok(())
        }
    }

    #[test]
    fn edits_are_made_in_their_order() {
        let config = parse(
            r#"{"request": {"remove": ["X-Debug"], "rename": {"x-user": "X-Customer"}, "set": {"x-a": "1"}, "add": {"x-a": "2"}}}"#,
        )
        .unwrap();
        let head = List::of(&[
            ("x-debug", "1"),
            ("x-user", "u"),
            ("x-user", "v"),
            ("x-customer", "forged"),
            ("x-a", "0"),
        ]);
        config.request.apply(&head).unwrap();
        assert_eq!(head.text(), "x-customer=u x-customer=v x-a=1 x-a=2");
        assert!(config.response.is_empty());
    }

    #[test]
    fn a_name_that_is_not_there_is_not_renamed() {
        let config = parse(r#"{"response": {"rename": {"x-old": "x-new"}}}"#).unwrap();
        let head = List::of(&[("x-new", "stays")]);
        config.response.apply(&head).unwrap();
        assert_eq!(head.text(), "x-new=stays");
    }

    #[test]
    fn what_is_refused_is_named() {
        let config = parse(r#"{"request": {"set": {"Host": "a"}}}"#).unwrap();
        let error = config.request.apply(&List::of(&[])).unwrap_err();
        assert!(error.contains("host") && error.contains("forbidden"), "{error}");
        assert!(
            parse(r#"{"request": {"sett": {}}}"#)
                .err()
                .unwrap()
                .contains("sett")
        );
    }
}
