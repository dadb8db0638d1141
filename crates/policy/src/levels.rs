//! The levels of degradation that hold, and the flags as they are with them.

use crate::model::{DegradationPolicy, FlagCondition, Priority};
use leeward_flags::{Attributes, ErrorCode, Evaluation, Flag, FlagSet};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

/// What the levels that hold now mean for requests. Made anew whenever one changes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Levels {
    forced: HashMap<Box<str>, Forced>,
    shed: Vec<Shed>,
    /// Every policy's level, by the policies' names, the normal ones among them.
    pub standing: Vec<LevelStanding>,
}

/// The level that a policy has.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LevelStanding {
    /// The policy.
    pub policy: Arc<str>,
    /// The level's position, 0 for the normal one.
    pub level: usize,
    /// `POLICY/LEVEL`.
    pub id: Arc<str>,
}

/// A flag that a level forces.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Forced {
    /// To this variant.
    pub variant: Box<str>,
    /// `POLICY/LEVEL`.
    pub by: Arc<str>,
}

/// Requests that a level refuses.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Shed {
    /// Of these routes; empty for all.
    routes: Vec<Box<str>>,
    /// With a lower priority than this.
    below: Priority,
    by: Arc<str>,
}

impl Levels {
    /// The levels of some policies, in the order of their names. Where two of them force the same flag, the first
    /// one does.
    pub fn new<'a>(standing: impl IntoIterator<Item = (&'a Arc<str>, &'a DegradationPolicy, usize)>) -> Self {
        let mut levels = Self::default();
        for (name, policy, at) in standing {
            let Some(level) = policy.levels.get(at) else {
                continue;
            };
            let id: Arc<str> = format!("{name}/{}", level.name).into();
            for (flag, variant) in &level.flags {
                levels.forced.entry(flag.clone()).or_insert_with(|| Forced {
                    variant: variant.clone(),
                    by: Arc::clone(&id),
                });
            }
            if let Some(below) = level.shed_below {
                levels.shed.push(Shed {
                    routes: policy.routes.iter().map(|route| route.as_str().into()).collect(),
                    below,
                    by: Arc::clone(&id),
                });
            }
            levels.standing.push(LevelStanding {
                policy: Arc::clone(name),
                level: at,
                id,
            });
        }
        levels
    }

    /// What a flag is forced to.
    pub fn forced(&self, flag: &str) -> Option<&Forced> {
        self.forced.get(flag)
    }

    /// The level that refuses a request of this route and priority.
    pub fn sheds(&self, route: &str, priority: Priority) -> Option<&Arc<str>> {
        let of = |shed: &&Shed| {
            priority < shed.below && (shed.routes.is_empty() || shed.routes.iter().any(|r| **r == *route))
        };
        self.shed.iter().find(of).map(|shed| &shed.by)
    }
}

/// The flags that are in force: those of a level before those of a node's own file before those of policy.
#[derive(Clone, Copy, Debug)]
pub struct FlagsInForce<'a> {
    /// What levels force.
    pub levels: &'a Levels,
    /// The node's own file.
    pub file: Option<&'a FlagSet>,
    /// Policy's.
    pub policy: &'a FlagSet,
}

/// What became of a flag.
#[derive(Clone, Debug)]
pub struct Resolved<'a> {
    /// The result.
    pub evaluation: Evaluation<'a>,
    /// The level that forces it, as `POLICY/LEVEL`.
    pub by: Option<&'a Arc<str>>,
}

impl<'a> FlagsInForce<'a> {
    /// Evaluates a flag for a request.
    pub fn evaluate(&self, key: &str, about: &dyn Attributes, wall: SystemTime) -> Resolved<'a> {
        self.resolve(key, |flag| flag.evaluate(about, wall))
    }

    /// Evaluates a flag for a context as OpenFeature has it: an object, or null for an empty one.
    pub fn evaluate_json(&self, key: &str, context: &Value, wall: SystemTime) -> Resolved<'a> {
        self.resolve(key, |flag| flag.evaluate_json(context, wall))
    }

    /// A flag's definition.
    pub fn get(&self, key: &str) -> Option<&'a Flag> {
        let file = self.file.and_then(|set| set.get(key));
        file.or_else(|| self.policy.get(key))
    }

    fn resolve(&self, key: &str, evaluate: impl FnOnce(&'a Flag) -> Evaluation<'a>) -> Resolved<'a> {
        let Some(flag) = self.get(key) else {
            return Resolved {
                evaluation: Evaluation::failed(ErrorCode::FlagNotFound),
                by: None,
            };
        };
        if let Some(forced) = self.levels.forced(key)
            && let Some(evaluation) = flag.forced(&forced.variant)
        {
            return Resolved {
                evaluation,
                by: Some(&forced.by),
            };
        }
        Resolved {
            evaluation: evaluate(flag),
            by: None,
        }
    }

    /// The keys of all flags, each once, in order.
    pub fn keys(&self) -> Vec<&'a str> {
        let mut keys: Vec<&str> = self.policy.keys().collect();
        keys.extend(self.file.into_iter().flat_map(FlagSet::keys));
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

impl FlagCondition {
    /// Whether a result is as wanted.
    pub fn holds(&self, evaluation: &Evaluation<'_>) -> bool {
        match (evaluation.value, evaluation.variant) {
            (None, _) => self.default,
            (Some(value), _) if self.variants.is_empty() => *value == Value::Bool(true),
            (Some(_), Some(variant)) => self.variants.iter().any(|wanted| **wanted == *variant),
            (Some(_), None) => self.default,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Name;
    use crate::model::DegradationLevel;
    use std::borrow::Cow;

    struct Nobody;

    impl Attributes for Nobody {
        fn attribute(&self, _: &str) -> Option<Cow<'_, str>> {
            None
        }
    }

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn policy(routes: &[&str], below: Option<Priority>) -> DegradationPolicy {
        let level = |text, flags: &[(&str, &str)], shed_below| DegradationLevel {
            name: name(text),
            flags: flags.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            shed_below,
        };
        DegradationPolicy {
            levels: vec![
                level("normal", &[], None),
                level("core-only", &[("reco", "off")], below),
            ],
            routes: routes.iter().map(|route| name(route)).collect(),
            triggers: Vec::new(),
        }
    }

    const FLAGS: &str = r#"{"flags": {
        "reco": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on"}
    }}"#;

    #[test]
    fn a_level_goes_before_the_file_and_the_file_before_policy() {
        let policy_flags = FlagSet::parse(FLAGS).unwrap();
        let (shop, shop_policy): (Arc<str>, _) = ("shop".into(), policy(&[], None));
        let normal = Levels::new([(&shop, &shop_policy, 0)]);
        let degraded = Levels::new([(&shop, &shop_policy, 1)]);
        let variant = |levels: &Levels, file: Option<&FlagSet>| {
            let flags = FlagsInForce {
                levels,
                file,
                policy: &policy_flags,
            };
            let resolved = flags.evaluate("reco", &Nobody, SystemTime::UNIX_EPOCH);
            let condition = FlagCondition::is_true("reco");
            (
                resolved.by.map(ToString::to_string),
                condition.holds(&resolved.evaluation),
            )
        };
        assert_eq!(variant(&normal, None), (None, true));
        assert_eq!(variant(&degraded, None), (Some("shop/core-only".into()), false));
        let file = FlagSet::parse(&FLAGS.replace(r#""defaultVariant": "on""#, r#""defaultVariant": "off""#));
        let file = file.unwrap();
        assert_eq!(variant(&normal, Some(&file)), (None, false));
        assert_eq!(variant(&degraded, Some(&file)).0, Some("shop/core-only".into()));
    }

    #[test]
    fn a_flag_that_is_not_there_leaves_a_condition_to_its_default() {
        let none = FlagSet::default();
        let levels = Levels::default();
        let flags = FlagsInForce {
            levels: &levels,
            file: None,
            policy: &none,
        };
        let evaluation = flags.evaluate("reco", &Nobody, SystemTime::UNIX_EPOCH).evaluation;
        assert_eq!(evaluation.error, Some(ErrorCode::FlagNotFound));
        let mut condition = FlagCondition::is_true("reco");
        assert!(!condition.holds(&evaluation));
        condition.default = true;
        assert!(condition.holds(&evaluation));
    }

    #[test]
    fn a_level_sheds_what_matters_less_on_its_routes() {
        let (shop, of) = (Arc::<str>::from("shop"), policy(&["buy"], Some(Priority::High)));
        let levels = Levels::new([(&shop, &of, 1)]);
        assert_eq!(
            levels.sheds("buy", Priority::Normal).map(|by| &**by),
            Some("shop/core-only")
        );
        assert_eq!(levels.sheds("buy", Priority::High), None);
        assert_eq!(levels.sheds("feed", Priority::Low), None);
        assert_eq!(Levels::new([(&shop, &of, 0)]).sheds("buy", Priority::Low), None);
    }
}
