//! Documents that are broken, those that are too large, and attributes of requests.

#![allow(clippy::unwrap_used, reason = "tests")]

use leeward_flags::{Attributes, FlagSet, Reason};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::cell::RefCell;
use std::time::UNIX_EPOCH;

/// The mistakes of a document, as lines.
fn mistakes(document: &str) -> Vec<String> {
    let Err(errors) = FlagSet::parse(document) else {
        return Vec::new();
    };
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn mistakes_name_the_field_and_say_what_would_be_right() {
    let flag = |fields: &str| {
        format!(r#"{{"flags": {{"f": {{"state": "ENABLED", "variants": {{"on": true}}{fields}}}}}}}"#)
    };
    let cases = [
        ("[".into(), "document: is no JSON"),
        ("[]".into(), "flags: is missing; expected an object of flags"),
        (
            r#"{"flags": []}"#.into(),
            "flags: is an object or an array; expected an object of flags",
        ),
        (
            r#"{"flags": {"f": 1}}"#.into(),
            "flags.f: is a number; expected an object",
        ),
        (
            r#"{"flags": {"f": {}}}"#.into(),
            r#"flags.f.state: is missing; expected "ENABLED" or "DISABLED""#,
        ),
        (
            r#"{"flags": {"f": {"state": "ON"}}}"#.into(),
            r#"flags.f.state: is "ON"; expected "ENABLED""#,
        ),
        (
            r#"{"flags": {"f": {"state": "ENABLED"}}}"#.into(),
            "flags.f.variants: is missing",
        ),
        (
            r#"{"flags": {"f": {"state": "ENABLED", "variants": {"off": "false", "on": true}}}}"#.into(),
            "flags.f.variants.on: is a boolean; expected a text, as the variant before it",
        ),
        (
            r#"{"flags": {"f": {"state": "ENABLED", "variants": {"on": null}}}}"#.into(),
            "flags.f.variants.on: is null",
        ),
        (
            flag(r#", "defaultVariant": "purple""#),
            r#"flags.f.defaultVariant: is "purple"; expected one of the variants, on, or null"#,
        ),
        (
            flag(r#", "targeting": ["on"]"#),
            r#"flags.f.targeting: ["on"] is no rule"#,
        ),
        (
            flag(r#", "targeting": {"iff": []}"#),
            r#"flags.f.targeting: unknown operator "iff""#,
        ),
        (
            flag(r#", "targeting": {"val": "x"}"#),
            r#"flags.f.targeting: unknown operator "val""#,
        ),
        (
            flag(r#", "targeting": {"if": [], "or": []}"#),
            "flags.f.targeting: {\"if\":[],\"or\":[]} has 2 fields",
        ),
        (
            flag(r#", "targeting": {"$ref": "gone"}"#),
            r#"flags.f.targeting: `$ref` to "gone", which is not in"#,
        ),
        (
            flag(r#", "metadata": {"a": []}"#),
            "flags.f.metadata.a: is an object or an array; expected a text",
        ),
        (
            r#"{"flags": {}, "$evaluators": 1}"#.into(),
            "$evaluators: is a number",
        ),
        (
            r#"{"flags": {}, "metadata": "x"}"#.into(),
            "metadata: is a text; expected an object",
        ),
    ];
    for (document, expected) in cases {
        let found = mistakes(&document);
        assert_eq!(found.len(), 1, "{document}: {found:?}");
        assert!(found[0].starts_with(expected), "{document}: {found:?}");
    }
    let two = r#"{"flags": {"a": 1, "b": {"state": 2}, "c": {"state": "DISABLED", "variants": {}}}}"#;
    assert_eq!(mistakes(two).len(), 2);
    assert!(mistakes(r#"{"flags": {}, "owner": "me", "$schema": "x"}"#).is_empty());
}

#[test]
fn what_is_too_large_is_refused() {
    let long = format!(r#"{{"flags": {{}}, "x": "{}"}}"#, "x".repeat(FlagSet::MAX_BYTES));
    assert!(mistakes(&long)[0].starts_with("document: is 10"));
    let many: Value = (0..=FlagSet::MAX_FLAGS)
        .map(|n| (n.to_string(), json!(1)))
        .collect();
    assert_eq!(
        mistakes(&json!({"flags": many}).to_string()),
        ["flags: are 10001; at most 10000 are read"]
    );
    let broken: Value = (0..FlagSet::MAX_FLAGS)
        .map(|n| (n.to_string(), json!(1)))
        .collect();
    assert_eq!(mistakes(&json!({"flags": broken}).to_string()).len(), 100);
}

fn with(rule: &Value, evaluators: &Value) -> String {
    json!({"flags": {"f": {"state": "ENABLED", "variants": {"true": 1, "false": 2}, "targeting": rule}},
        "$evaluators": evaluators})
    .to_string()
}

#[test]
fn rules_are_bounded_in_depth_and_size() {
    let nested = |levels: usize| (0..levels).fold(json!(true), |rule, _| json!({"!": rule}));
    // The parser of JSON has a bound of its own, which `$ref` leads past.
    let half = nested(49);
    let deep = with(&json!({"!": {"$ref": "half"}}), &json!({"half": half}));
    let flags = FlagSet::parse(&deep).unwrap();
    assert_eq!(
        flags
            .get("f")
            .unwrap()
            .evaluate_json(&json!({}), UNIX_EPOCH)
            .variant,
        Some("true")
    );
    let cycle = with(
        &json!({"$ref": "a"}),
        &json!({"a": {"!": {"$ref": "b"}}, "b": {"$ref": "a"}}),
    );
    assert!(mistakes(&cycle)[0].contains("refers to itself by `$ref`"));
    assert!(mistakes(&with(&nested(101), &json!({})))[0].contains("nested deeper than 100 levels"));
    // Each one is twice the one before.
    let doubling: Value = (1..30)
        .map(|n| {
            (
                format!("e{n}"),
                json!({"and": [{"$ref": format!("e{}", n - 1)}, {"$ref": format!("e{}", n - 1)}]}),
            )
        })
        .chain([("e0".to_owned(), json!({"var": "x"}))])
        .collect();
    assert!(
        mistakes(&with(&json!({"$ref": "e29"}), &doubling))[0].contains("is too large: at most 10000 values")
    );
    // One of them is small enough, but all of them together are not.
    let flag = json!({"state": "ENABLED", "variants": {"true": 1}, "targeting": {"$ref": "e10"}});
    let flags: Value = (0..200).map(|n| (n.to_string(), flag.clone())).collect();
    let found = mistakes(&json!({"flags": flags, "$evaluators": doubling}).to_string());
    assert!(
        found.iter().all(|error| error.contains("is too large")),
        "{found:?}"
    );
    assert!(
        !found.is_empty() && !found[0].starts_with("flags.0."),
        "{found:?}"
    );
}

/// A request's attributes, and which of them were asked for.
struct Request<'a> {
    attributes: &'a [(&'a str, &'a str)],
    asked: RefCell<Vec<String>>,
    listed: bool,
}

impl Attributes for Request<'_> {
    fn attribute(&self, path: &str) -> Option<Cow<'_, str>> {
        self.asked.borrow_mut().push(path.to_owned());
        let found = self.attributes.iter().find(|(known, _)| *known == path)?;
        Some(if self.asked.borrow().len().is_multiple_of(2) {
            Cow::Borrowed(found.1)
        } else {
            Cow::Owned(found.1.to_owned())
        })
    }

    fn all(&self) -> Vec<(String, String)> {
        let listed = self.attributes.iter().filter(|_| self.listed);
        listed
            .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
            .collect()
    }
}

fn asked(rule: &Value, attributes: &[(&str, &str)], listed: bool) -> (Option<String>, Vec<String>) {
    let request = Request {
        attributes,
        asked: RefCell::default(),
        listed,
    };
    let flags = FlagSet::parse(&with(rule, &json!({}))).unwrap();
    let result = flags.get("f").unwrap().evaluate(&request, UNIX_EPOCH);
    (result.variant.map(str::to_owned), request.asked.into_inner())
}

#[test]
fn a_request_is_asked_for_what_targeting_reads_and_nothing_else() {
    let attributes = [
        ("targetingKey", "u1"),
        ("headers.x-user", "ada"),
        ("headers.x-version", "1.2.3"),
        ("path", "/buy"),
        ("zone", "a"),
    ];
    let rule = json!({"and": [
        {"==": [{"var": "headers.x-user"}, "ada"]},
        {"starts_with": [{"var": ["path", "/"]}, "/b"]},
        {"sem_ver": [{"var": "headers.x-version"}, ">=", "1.2.0"]},
        {"==": [{"var": "$flagd.flagKey"}, "f"]},
        {"!": {"missing": ["headers.x-user"]}},
        {"==": [{"var": "headers.x-absent"}, null]},
    ]});
    let (variant, asked_for) = asked(&rule, &attributes, true);
    assert_eq!(variant.as_deref(), Some("true"));
    assert_eq!(
        asked_for,
        ["headers.x-user", "headers.x-version", "headers.x-absent", "path"]
    );
    let fractional = json!({"fractional": [["true"], ["false"]]});
    assert_eq!(asked(&fractional, &attributes, false).1, ["targetingKey"]);
}

#[test]
fn a_computed_path_reads_all_that_a_request_lists() {
    let attributes = [
        ("headers.x-user", "ada"),
        ("zone", "a"),
        ("which", "headers.x-user"),
    ];
    let rule = json!({"==": [{"var": {"var": "which"}}, "ada"]});
    assert_eq!(asked(&rule, &attributes, true).0.as_deref(), Some("true"));
    assert_eq!(asked(&rule, &attributes, false).0.as_deref(), Some("false"));
    let whole = json!({"==": [{"var": ""}, "ada"]});
    assert_eq!(asked(&whole, &attributes, true).0.as_deref(), Some("false"));
}

/// A flag may be asked for while the attributes of another one are looked up.
#[test]
fn evaluations_may_be_nested() {
    struct Nested(FlagSet);
    impl Attributes for Nested {
        fn attribute(&self, path: &str) -> Option<Cow<'_, str>> {
            let context = json!({"x": path});
            let inner = self.0.get("f").unwrap().evaluate_json(&context, UNIX_EPOCH);
            assert_eq!(inner.variant, Some("true"));
            inner.variant.map(Cow::Borrowed)
        }
    }
    let flags = FlagSet::parse(&with(&json!({"!!": {"var": "x"}}), &json!({}))).unwrap();
    let result = flags
        .get("f")
        .unwrap()
        .evaluate(&Nested(flags.clone()), UNIX_EPOCH);
    assert_eq!(
        (result.variant, result.reason),
        (Some("true"), Reason::TargetingMatch)
    );
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
        prop::sample::select(vec![
            "targetingKey",
            "a",
            "a.b",
            "1.2.3",
            ">=",
            "",
            "$flagd.timestamp"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((".{0,4}", inner), 0..4).prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

fn rule() -> impl Strategy<Value = Value> {
    let operators = vec![
        "var",
        "missing",
        "missing_some",
        "if",
        "?:",
        "==",
        "===",
        "!=",
        "!==",
        "!",
        "!!",
        "or",
        "and",
        ">",
        ">=",
        "<",
        "<=",
        "max",
        "min",
        "+",
        "-",
        "*",
        "/",
        "%",
        "map",
        "filter",
        "reduce",
        "all",
        "none",
        "some",
        "merge",
        "in",
        "cat",
        "substr",
        "fractional",
        "sem_ver",
        "starts_with",
        "ends_with",
        "lower",
        "upper",
    ];
    let leaf = prop_oneof![
        json_value().prop_filter("no operators", |value| !value.is_object()),
        prop::sample::select(vec![
            json!({"var": "a"}),
            json!({"var": "a.b"}),
            json!({"var": ""})
        ]),
    ];
    leaf.prop_recursive(4, 32, 4, move |inner| {
        let operator = prop::sample::select(operators.clone());
        (operator, prop::collection::vec(inner, 0..4)).prop_map(|(name, args)| json!({name: args}))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_document_is_read_or_refused(document in json_value(), flag in json_value(), rule in json_value()) {
        let _ = FlagSet::parse(&document.to_string());
        let _ = FlagSet::parse(&json!({"flags": {"f": flag}, "$evaluators": document}).to_string());
        let _ = FlagSet::parse(&with(&rule, &document));
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,64}") {
        let _ = FlagSet::parse(&text);
    }

    #[test]
    fn any_rule_comes_to_something_in_any_context(rule in rule(), context in json_value()) {
        if let Ok(flags) = FlagSet::parse(&with(&rule, &json!({}))) {
            let flag = flags.get("f").unwrap();
            let context = json!({"a": context, "targetingKey": "u"});
            let first = flag.evaluate_json(&context, UNIX_EPOCH);
            prop_assert_eq!(&first, &flag.evaluate_json(&context, UNIX_EPOCH));
            prop_assert_eq!(first.value.is_none(), first.variant.is_none());
            prop_assert_eq!(first.error.is_some(), first.reason == Reason::Error);
        }
    }
}
