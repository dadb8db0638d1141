//! What flagd's documentation and its providers' common tests say of definitions and their evaluation.

#![allow(clippy::unwrap_used, reason = "tests")]

use leeward_flags::{ErrorCode, Evaluation, FlagSet, Reason};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// A set with one flag `f`, of the variants that stand for their own names, and the default `none`.
fn targeted(targeting: &Value) -> FlagSet {
    let names = [
        "none", "yes", "no", "true", "false", "1", "2.5", "clubs", "diamonds", "hearts", "spades", "red",
        "green", "blue",
    ];
    let variants: Value = names
        .iter()
        .map(|name| ((*name).to_owned(), json!(name)))
        .collect();
    let flag =
        json!({"state": "ENABLED", "variants": variants, "defaultVariant": "none", "targeting": targeting});
    FlagSet::parse(&json!({"flags": {"f": flag}}).to_string()).unwrap()
}

/// What the flag comes to: the variant, the reason and the error.
fn outcome(flags: &FlagSet, key: &str, context: &Value) -> (Option<String>, Reason, Option<ErrorCode>) {
    let result = flags.get(key).unwrap().evaluate_json(context, at(1_700_000_000));
    (result.variant.map(str::to_owned), result.reason, result.error)
}

fn variant(targeting: &Value, context: &Value) -> Option<String> {
    outcome(&targeted(targeting), "f", context).0
}

fn matched(name: &str) -> (Option<String>, Reason, Option<ErrorCode>) {
    (Some(name.into()), Reason::TargetingMatch, None)
}

fn by_default() -> (Option<String>, Reason, Option<ErrorCode>) {
    (Some("none".into()), Reason::Default, None)
}

#[test]
fn a_flag_without_targeting_is_static() {
    let flags = FlagSet::parse(
        r#"{"$schema": "https://flagd.dev/schema/v0/flags.json", "flags": {
            "bool": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on"},
            "text": {"state": "ENABLED", "variants": {"a": "hi", "b": "bye"}, "defaultVariant": "b", "targeting": {}},
            "number": {"state": "ENABLED", "variants": {"one": 1, "half": 0.5}, "defaultVariant": "half", "targeting": null},
            "object": {"state": "ENABLED", "variants": {"e": {}, "t": {"a": [1]}}, "defaultVariant": "t"},
            "zero": {"state": "ENABLED", "variants": {"zero": "", "more": "x"}, "defaultVariant": "zero"}
        }}"#,
    )
    .unwrap();
    let expected = [
        ("bool", "on", json!(true)),
        ("number", "half", json!(0.5)),
        ("object", "t", json!({"a": [1]})),
        ("text", "b", json!("bye")),
        ("zero", "zero", json!("")),
    ];
    assert!(flags.keys().eq(expected.iter().map(|(key, _, _)| *key)));
    for (key, variant, value) in expected {
        let result = flags.get(key).unwrap().evaluate_json(&json!({}), at(0));
        let wanted = Evaluation {
            variant: Some(variant),
            value: Some(&value),
            reason: Reason::Static,
            error: None,
        };
        assert_eq!(result, wanted, "{key}");
    }
    assert!(flags.get("absent").is_none());
}

#[test]
fn a_disabled_flag_and_one_without_default_leave_the_value_to_the_caller() {
    let rule = r#""targeting": {"if": [{"==": [{"var": "email"}, "jobs@orange.com"]}, "b", null]}"#;
    let flags = FlagSet::parse(&format!(
        r#"{{"flags": {{
            "off": {{"state": "DISABLED", "variants": {{"a": 1, "b": 2}}, "defaultVariant": "a", {rule}}},
            "null": {{"state": "ENABLED", "variants": {{"a": 1}}, "defaultVariant": null}},
            "absent": {{"state": "ENABLED", "variants": {{"a": 1}}}},
            "ruled": {{"state": "ENABLED", "variants": {{"a": 1, "b": 2}}, {rule}}}
        }}}}"#
    ))
    .unwrap();
    let (jobs, woz) = (
        json!({"email": "jobs@orange.com"}),
        json!({"email": "wozniak@orange.com"}),
    );
    assert_eq!(outcome(&flags, "off", &jobs), (None, Reason::Disabled, None));
    assert_eq!(outcome(&flags, "null", &jobs), (None, Reason::Default, None));
    assert_eq!(outcome(&flags, "absent", &jobs), (None, Reason::Default, None));
    assert_eq!(outcome(&flags, "ruled", &jobs), matched("b"));
    assert_eq!(outcome(&flags, "ruled", &woz), (None, Reason::Default, None));
    let forced = flags.get("off").unwrap().forced("b").unwrap();
    assert_eq!((forced.value, forced.reason), (Some(&json!(2)), Reason::Static));
    assert_eq!(flags.get("off").unwrap().forced("c"), None);
}

#[test]
fn the_result_of_a_rule_names_a_variant_by_its_text() {
    let cases = [
        (json!({"if": [true, "yes"]}), matched("yes")),
        (json!({"if": [true, null, "yes"]}), by_default()),
        (json!({"if": [false, "yes"]}), by_default()),
        (json!({"==": [1, 1]}), matched("true")),
        (json!({"==": [1, 2]}), matched("false")),
        (json!({"+": [0, 1]}), matched("1")),
        (json!({"+": [1, 1.5]}), matched("2.5")),
        (
            json!({"if": [true, "three"]}),
            (None, Reason::Error, Some(ErrorCode::General)),
        ),
        (
            json!({"if": [true, ["yes"]]}),
            (None, Reason::Error, Some(ErrorCode::General)),
        ),
        (
            json!({"max": ["a", "b"]}),
            (None, Reason::Error, Some(ErrorCode::ParseError)),
        ),
    ];
    for (rule, expected) in cases {
        assert_eq!(outcome(&targeted(&rule), "f", &json!({})), expected, "{rule}");
    }
}

/// Each with a context, and what it comes to.
#[test]
fn operators_judge_as_flagd_s_do() {
    let cases = [
        // Of flagd's table of operations.
        (json!({"==": [1, "1"]}), true),
        (json!({"===": [1, "1"]}), false),
        (json!({"!=": [1, "1"]}), false),
        (json!({"!==": [1, "1"]}), true),
        (json!({"!!": ["mike"]}), true),
        (json!({"!!": [""]}), false),
        (json!({"!": ["mike"]}), false),
        (json!({"!": {"var": "absent"}}), true),
        (json!({">": [2, 1]}), true),
        (json!({">=": [1, 1]}), true),
        (json!({"<": [2, 1]}), false),
        (json!({"<=": [1, 1]}), true),
        (json!({"<": [1, 5, 10]}), true),
        (json!({"<": [1, 11, 10]}), false),
        (json!({"<=": [1, 1, 10]}), true),
        (json!({"==": [1, 1, 7]}), true),
        (json!({"in": ["Spring", "Springfield"]}), true),
        (json!({"in": ["Illinois", "Springfield"]}), false),
        (json!({"in": ["Mike", ["Bob", "Mike"]]}), true),
        (json!({"in": [{"var": "absent"}, "Springfield"]}), false),
        (json!({"!": {"in": ["Todd", ["Bob", "Mike"]]}}), true),
        (json!({"and": [true, {"or": [false, {"var": "yes"}]}]}), true),
        (json!({"some": [{"var": "list"}, {"==": [{"var": ""}, 2]}]}), true),
        (json!({"all": [{"var": "list"}, {">": [{"var": ""}, 1]}]}), false),
        (json!({"none": [{"var": "list"}, {">": [{"var": ""}, 9]}]}), true),
        (
            json!({"==": [{"reduce": [{"var": "list"}, {"+": [{"var": "current"}, {"var": "accumulator"}]}, 0]}, 6]}),
            true,
        ),
        (json!({"==": [{"var": "list.1"}, 2]}), true),
        (json!({"==": [{"var": "user.name"}, "jack"]}), true),
        (json!({"==": [{"var": ["user.age", 18]}, 18]}), true),
        (json!({"==": [{"var": {"cat": ["user", ".name"]}}, "jack"]}), true),
        (json!({"==": [{"missing": ["yes", "absent"]}, null]}), false),
        (json!({"!": {"missing": ["yes", "user.name"]}}), true),
        (json!({"!": {"missing_some": [1, ["absent", "user.name"]]}}), true),
        // What is missing equals nothing, and what is no number is neither more nor less than one.
        (json!({"==": [{"var": "absent"}, ""]}), false),
        (json!({"!=": [{"var": "absent"}, ""]}), true),
        (json!({"==": [{"var": "absent"}, 0]}), false),
        (json!({"==": [{"var": "absent"}, false]}), false),
        (json!({"==": [{"var": "absent"}, null]}), true),
        (json!({"<": [{"var": "user.name"}, 1]}), false),
        (json!({">=": [{"var": "user.name"}, 1]}), false),
        (json!({"<": ["nan", 1]}), false),
        (json!({">": [{"var": "list"}, 1]}), false),
        (json!({"<": ["a", "b"]}), true),
        (json!({"==": [{"%": [7, 2]}, 1]}), true),
        // Of what flagd adds.
        (json!({"starts_with": ["192.168.0.1", "192.168"]}), true),
        (json!({"starts_with": ["10.0.0.1", "192.168"]}), false),
        (
            json!({"ends_with": ["noreply@example.com", "@example.com"]}),
            true,
        ),
        (json!({"ends_with": ["noreply@example.com", "@test.com"]}), false),
        (
            json!({"==": [{"lower": [{"var": "email"}]}, "user@Éxample.com"]}),
            false,
        ),
        (
            json!({"==": [{"lower": [{"var": "email"}]}, "user@example.com"]}),
            true,
        ),
        (json!({"==": [{"upper": {"var": "user.name"}}, "JACK"]}), true),
        (json!({"==": [{"lower": ["ÉA"]}, "Éa"]}), true),
        // Of the context that flagd provides.
        (json!({"==": [{"var": "$flagd.flagKey"}, "f"]}), true),
        (json!({"==": [{"var": "$flagd.timestamp"}, 1_700_000_000]}), true),
        (json!({"<": [{"var": "$flagd.timestamp"}, 1_700_000_001]}), true),
    ];
    let context = json!({
        "yes": true, "list": [1, 2, 3], "user": {"name": "jack"}, "email": "User@Example.com",
        "$flagd": {"flagKey": "forged", "timestamp": 1},
    });
    for (rule, expected) in cases {
        let expected = if expected { "yes" } else { "no" };
        let whole = json!({"if": [rule, "yes", "no"]});
        assert_eq!(variant(&whole, &context).as_deref(), Some(expected), "{rule}");
    }
}

#[test]
fn sem_ver_takes_versions_as_flagd_does() {
    let cases = [
        ("2.0.0", "=", "2.0.0", Some(true)),
        ("2.1.0", ">", "2.0.0", Some(true)),
        ("1.9.0", "<", "2.0.0", Some(true)),
        ("2.0.0-alpha", "<", "2.0.0", Some(true)),
        ("2.0.0-alpha.2", "<", "2.0.0-alpha.10", Some(true)),
        ("1.0.0", "<=", "1.0.0", Some(true)),
        ("1.0.0", ">=", "1.0.1", Some(false)),
        ("1.0.0", "!=", "1.0.1", Some(true)),
        ("3.0.1", "~", "3.0.0", Some(true)),
        ("3.1.0", "~", "3.0.0", Some(false)),
        ("3.1.0", "^", "3.0.0", Some(true)),
        ("4.0.0", "^", "3.0.0", Some(false)),
        ("v1.0.0", "=", "1.0.0", Some(true)),
        ("1.5.0", "^", "1", Some(true)),
        ("v1.2", "=", "1.2.0", Some(true)),
        ("1.0.0+other", "=", "1.0.0+build", Some(true)),
        ("2.0.0.0", "=", "2.0.0", None),
        ("1.02", "=", "1.2.0", None),
        ("not-a-version", "=", "1.0.0", None),
        ("", "=", "1.0.0", None),
        ("1.0.0", "===", "1.0.0", None),
    ];
    for (left, operator, right, expected) in cases {
        let rule = json!({"sem_ver": [{"var": "version"}, operator, right]});
        let expected = expected.map_or("none", |holds| if holds { "true" } else { "false" });
        let context = json!({"version": left});
        assert_eq!(
            variant(&rule, &context).as_deref(),
            Some(expected),
            "{left} {operator} {right}"
        );
    }
}

/// As flagd's common tests have it: null, and not false, so that the default variant is chosen.
#[test]
fn operators_that_make_no_sense_of_their_arguments_are_null() {
    let rules = [
        json!({"starts_with": [{"var": "num"}, "abc"]}),
        json!({"ends_with": [{"var": "num"}, "xyz"]}),
        json!({"starts_with": ["abc"]}),
        json!({"ends_with": ["xyz"]}),
        json!({"sem_ver": [{"var": "num"}, "=", "1.0.0"]}),
        json!({"sem_ver": ["1.0.0", "="]}),
        json!({"lower": [{"var": "num"}]}),
        json!({"fractional": []}),
        json!({"fractional": [{"var": "targetingKey"}]}),
        json!({"fractional": [{"var": "absent"}, ["yes", 50], ["no", 50]]}),
        json!({"fractional": ["key", ["yes", 0], ["no", 0]]}),
        json!({"fractional": ["key", ["yes", 1.5], ["no", 1]]}),
        json!({"fractional": ["key", ["yes", "1"], ["no", 1]]}),
        json!({"fractional": ["key", [], ["no", 1]]}),
        json!({"fractional": ["key", "yes"]}),
        json!({"fractional": ["key", [["yes"], 1]]}),
        json!({"fractional": ["key", ["yes", 2_147_483_647_i64], ["no", 1]]}),
    ];
    for rule in rules {
        let found = outcome(&targeted(&rule), "f", &json!({"num": 123}));
        assert_eq!(found, by_default(), "{rule}");
    }
}

/// MurmurHash3_x86_32 with the seed 0, written after its published algorithm and independent of what the crate uses.
fn murmur(bytes: &[u8]) -> u32 {
    let mix = |k: u32| {
        k.wrapping_mul(0xcc9e_2d51)
            .rotate_left(15)
            .wrapping_mul(0x1b87_3593)
    };
    let mut h = 0_u32;
    let (blocks, tail) = bytes.as_chunks::<4>();
    for block in blocks {
        h = (h ^ mix(u32::from_le_bytes(*block)))
            .rotate_left(13)
            .wrapping_mul(5)
            .wrapping_add(0xe654_6b64);
    }
    let last = tail.iter().rev().fold(0, |k, byte| (k << 8) | u32::from(*byte));
    h ^= mix(last) ^ u32::try_from(bytes.len()).unwrap();
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

#[test]
fn the_hash_of_the_test_is_the_published_one() {
    for (text, hash) in [
        ("", 0),
        ("a", 0x3c25_69b2),
        ("hello", 0x248b_fa47),
        ("hello, world", 0x149b_bb7f),
    ] {
        assert_eq!(murmur(text.as_bytes()), hash, "{text}");
    }
}

/// The results that flagd's common tests expect.
#[test]
fn fractional_puts_known_keys_where_flagd_does() {
    let suits = json!([["clubs", 25], ["diamonds", 25], ["hearts", 25], ["spades", 25]]);
    let of = |key: Value| {
        let mut args = vec![key];
        args.extend(suits.as_array().unwrap().iter().cloned());
        json!({"fractional": args})
    };
    let named = |seed: &str| of(json!({"cat": [seed, {"var": "user.name"}]}));
    let cases = [
        (named("fractional-flag"), "jack", "hearts"),
        (named("fractional-flag"), "queen", "spades"),
        (named("fractional-flag"), "ten", "clubs"),
        (named("fractional-flag"), "nine", "diamonds"),
        (named("fractional-flag"), "3", "clubs"),
        (named("shared-seed"), "seven", "hearts"),
        (named("shared-seed"), "eight", "diamonds"),
        (named("shared-seed"), "nine", "clubs"),
        (named("shared-seed"), "two", "spades"),
    ];
    for (rule, name, expected) in cases {
        let context = json!({"user": {"name": name}});
        assert_eq!(variant(&rule, &context).as_deref(), Some(expected), "{name}");
    }
    // Keys whose hashes lie at the ends of the range and beside its middle.
    let halves = json!({"fractional": [{"var": "targetingKey"}, ["yes", 50], ["no", 50]]});
    for (key, expected) in [
        ("ejOoVL", "yes"),
        ("bY9fO-", "yes"),
        ("SI7p-", "yes"),
        ("6LvT0", "no"),
        ("ceQdGm", "no"),
    ] {
        assert_eq!(
            variant(&halves, &json!({"targetingKey": key})).as_deref(),
            Some(expected),
            "{key}"
        );
    }
}

#[test]
fn fractional_without_a_key_takes_the_flag_s_and_the_targeting_key() {
    let short = json!({"state": "ENABLED", "variants": {"heads": 1, "tails": 2, "draw": 3}, "defaultVariant": "draw",
        "targeting": {"fractional": [["heads"], ["tails", 1]]}});
    let flags = FlagSet::parse(&json!({"flags": {"fractional-flag-shorthand": short}}).to_string()).unwrap();
    let of = |key: Value| outcome(&flags, "fractional-flag-shorthand", &json!({"targetingKey": key}));
    assert_eq!(of(json!("jon@company.com")), matched("heads"));
    assert_eq!(of(json!("jane@company.com")), matched("tails"));
    // No text is no targeting key.
    for key in [json!(null), json!(12_345), json!(true)] {
        assert_eq!(of(key).1, Reason::Default);
    }
    let single = json!({"fractional": [["yes", 1]]});
    assert_eq!(
        variant(&single, &json!({"targetingKey": "any"})).as_deref(),
        Some("yes")
    );
}

#[test]
fn buckets_may_be_rules_themselves() {
    let key = json!({"var": "targetingKey"});
    let tier = |then: Value, otherwise: Value| json!({"if": [{"==": [{"var": "tier"}, "premium"]}, then, otherwise]});
    let name = json!({"fractional": [key, [tier(json!("red"), json!("green")), 50], ["green", 50]]});
    let weight = json!({"fractional": [key, ["red", tier(json!(100), json!(0))], ["blue", 10]]});
    let negative = json!({"fractional": [key, ["red", -50], ["blue", 100]]});
    let condition = json!({"if": [{"fractional": [[false, 0], [true, 100]]}, "yes", "no"]});
    let nested =
        json!({"if": [{"in": ["@faas", {"var": "email"}]}, {"fractional": [key, ["red"], ["blue"]]}, null]});
    let variable = json!({"fractional": [key, [{"var": "colour"}, 50], ["blue", 50]]});
    // The first one is in the lower half of its weights, the other one in the upper half.
    let (jon, user) = ("jon@company.com", "user1");
    let cases = [
        (
            &name,
            json!({"targetingKey": jon, "tier": "premium"}),
            Some("red"),
        ),
        (
            &name,
            json!({"targetingKey": jon, "tier": "basic"}),
            Some("green"),
        ),
        (
            &name,
            json!({"targetingKey": user, "tier": "premium"}),
            Some("green"),
        ),
        (
            &weight,
            json!({"targetingKey": user, "tier": "premium"}),
            Some("red"),
        ),
        (
            &weight,
            json!({"targetingKey": jon, "tier": "basic"}),
            Some("blue"),
        ),
        (&negative, json!({"targetingKey": jon}), Some("blue")),
        (&condition, json!({"targetingKey": jon}), Some("yes")),
        (
            &nested,
            json!({"targetingKey": jon, "email": "a@faas.com"}),
            Some("red"),
        ),
        (
            &nested,
            json!({"targetingKey": user, "email": "a@faas.com"}),
            Some("blue"),
        ),
        (
            &nested,
            json!({"targetingKey": user, "email": "a@b.com"}),
            Some("none"),
        ),
        (
            &variable,
            json!({"targetingKey": jon, "colour": "green"}),
            Some("green"),
        ),
        (&variable, json!({"targetingKey": jon}), Some("none")),
        (&variable, json!({"targetingKey": jon, "colour": "yellow"}), None),
    ];
    for (rule, context, expected) in cases {
        assert_eq!(variant(rule, &context).as_deref(), expected, "{rule} {context}");
    }
}

/// Each key is in the bucket that its hash says, and the shares are the weights'.
#[test]
fn fractional_shares_out_by_weight_and_stays_with_it() {
    let weights = [("red", 1_u64), ("green", 29), ("blue", 70)];
    let flags = targeted(&json!({"fractional": [["red", 1], ["green", 29], ["blue", 70]]}));
    let flag = flags.get("f").unwrap();
    let mut seen = [0_u32; 3];
    for n in 0..100_000 {
        let key = format!("user-{n}");
        let context = json!({"targetingKey": key});
        let bucket = (u64::from(murmur(format!("f{key}").as_bytes())) * 100) >> 32;
        let wanted = weights.iter().scan(0, |end, (_, weight)| {
            *end += weight;
            Some(*end)
        });
        let bin = wanted.take_while(|end| bucket >= *end).count();
        assert_eq!(
            flag.evaluate_json(&context, at(0)).variant,
            Some(weights[bin].0),
            "{key}"
        );
        seen[bin] += 1;
    }
    for (seen, (name, weight)) in seen.iter().zip(weights) {
        let share = f64::from(*seen) / 1000.0;
        assert!(
            (share - f64::from(u32::try_from(weight).unwrap())).abs() < 0.5,
            "{name}: {share} %"
        );
    }
}

/// The weights may add up to as much as 31 bits hold.
#[test]
fn fractional_tells_the_finest_shares_apart() {
    let rule = json!({"fractional": [{"var": "k"}, ["red", 1], ["blue", 2_147_483_646_i64]]});
    let flags = targeted(&rule);
    let red = (0..20_000).filter(|n| {
        let context = json!({"k": format!("{n}")});
        let bucket = (u64::from(murmur(format!("{n}").as_bytes())) * 2_147_483_647) >> 32;
        let result = flags.get("f").unwrap().evaluate_json(&context, at(0));
        assert_eq!(result.variant == Some("red"), bucket == 0);
        result.variant == Some("red")
    });
    assert!(red.count() <= 1);
}

#[test]
fn evaluators_stand_for_what_refers_to_them() {
    let flags = FlagSet::parse(
        r#"{"flags": {
            "a": {"state": "ENABLED", "variants": {"hi": 1, "bye": 2}, "defaultVariant": "bye",
                "targeting": {"if": [{"$ref": "is_ballmer"}, "hi", null]}},
            "b": {"state": "ENABLED", "variants": {"true": 1, "false": 2}, "defaultVariant": "false",
                "targeting": {"$ref": "not_ballmer"}}
        }, "$evaluators": {
            "is_ballmer": {"==": ["ballmer@macrosoft.com", {"var": ["email"]}]},
            "not_ballmer": {"!": {"$ref": "is_ballmer"}}
        }}"#,
    )
    .unwrap();
    let (ballmer, other) = (json!({"email": "ballmer@macrosoft.com"}), json!({"email": "a@b"}));
    assert_eq!(outcome(&flags, "a", &ballmer), matched("hi"));
    assert_eq!(
        outcome(&flags, "a", &other),
        (Some("bye".into()), Reason::Default, None)
    );
    assert_eq!(outcome(&flags, "b", &ballmer), matched("false"));
    assert_eq!(outcome(&flags, "b", &other), matched("true"));
}

#[test]
fn a_flag_s_metadata_goes_before_the_set_s() {
    let flags = FlagSet::parse(
        r#"{"flags": {
            "a": {"state": "ENABLED", "variants": {"on": true}, "metadata": {"version": "17", "nothing": null}},
            "b": {"state": "ENABLED", "variants": {"on": true}}
        }, "metadata": {"flagSetId": "shop", "version": "1"}}"#,
    )
    .unwrap();
    let of = |key: &str| Value::Object(flags.get(key).unwrap().metadata().clone());
    assert_eq!(of("a"), json!({"flagSetId": "shop", "version": "17"}));
    assert_eq!(of("b"), json!({"flagSetId": "shop", "version": "1"}));
    assert_eq!(Value::Object(flags.metadata().clone()), of("b"));
}

#[test]
fn of_merged_sets_the_first_one_holds() {
    let one = |value: u32| {
        let text = format!(
            r#"{{"flags": {{"f": {{"state": "ENABLED", "variants": {{"v": {value}}}, "defaultVariant": "v"}}}},
            "metadata": {{"n": {value}}}}}"#
        );
        FlagSet::parse(&text).unwrap()
    };
    let other = FlagSet::parse(r#"{"flags": {"a": {"state": "DISABLED", "variants": {}}}}"#).unwrap();
    let (first, second) = (one(1), one(2));
    let merged = FlagSet::merge([&first, &second, &other]);
    assert!(merged.keys().eq(["a", "f"]));
    assert_eq!(
        merged.get("f").unwrap().evaluate_json(&json!({}), at(0)).value,
        Some(&json!(1))
    );
    assert_eq!(merged.metadata().get("n"), Some(&json!(1)));
    assert_eq!(merged.document(), "");
    assert_eq!(merged.documents().count(), 3);
    assert_eq!(merged, FlagSet::merge([&one(1), &one(2), &other]));
    assert_ne!(merged, FlagSet::merge([&second, &first, &other]));
    assert_ne!(merged, FlagSet::default());
    assert_eq!(FlagSet::merge([]), FlagSet::default());
}

#[test]
fn a_context_that_is_no_object_is_an_error() {
    let flags = targeted(&json!({"if": [true, "yes"]}));
    for context in [json!([]), json!("x"), json!(1), json!(true)] {
        assert_eq!(
            outcome(&flags, "f", &context),
            (None, Reason::Error, Some(ErrorCode::InvalidContext))
        );
    }
    assert_eq!(outcome(&flags, "f", &json!(null)), matched("yes"));
}
