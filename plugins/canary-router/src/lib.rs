//! Gives a share of the callers a new version, always the same ones, and nobody one that isn't healthy.
//!
//! The configuration is a JSON object: `canary` (the backend with the new version), `percent` (the share of callers
//! that get it), `by` (the header that tells callers apart, default `x-customer`), and `header` (default `x-canary`): where a
//! request has it, `always` and `never` decide. Requests with neither, and all while the canary has no healthy endpoint or
//! its circuit is open, are left to the weights, so that the canary's weight is best 0. A configuration that can't be
//! read is a fault.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: canary-router}
//! spec:
//!   kind: Router
//!   source: {file: /var/lib/leeward/canary-router.wasm}
//!   onFault: FailOpen
//! ---
//! kind: Route
//! metadata: {name: checkout}
//! spec:
//!   hostnames: [checkout.shop]
//!   rules:
//!     - backendRefs:
//!         - {service: checkout, weight: 100}
//!         - {service: checkout-next, weight: 0}
//!       router: {plugin: canary-router, config: '{"canary": "checkout-next", "percent": 5}'}
//! ```

use leeward_plugin::{Memo, RequestHead, Router, Target, count, fault};
use serde::Deserialize;

struct CanaryRouter;

/// The router's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    canary: String,
    percent: u8,
    #[serde(default = "customer")]
    by: String,
    #[serde(default = "override_header")]
    header: String,
}

/// What a request says about itself.
#[derive(Default)]
struct Caller {
    /// The value of the header that decides.
    says: Option<String>,
    /// Who it is.
    key: Option<Vec<u8>>,
}

fn customer() -> String {
    "x-customer".to_owned()
}

fn override_header() -> String {
    "x-canary".to_owned()
}

thread_local! {
    static CONFIG: Memo<Config> = const { Memo::new() };
}

impl Router for CanaryRouter {
    fn choose(request: &RequestHead, targets: &[Target]) -> Option<usize> {
        let config = CONFIG
            .with(|memo| memo.get(&request.config(), parse))
            .unwrap_or_else(|error| fault(&error));
        let caller = Caller {
            says: request.header_text(&config.header),
            key: request.header(&config.by).into_iter().next(),
        };
        let chosen = choose(&config, &caller, targets);
        if chosen.is_some() {
            count("canary", 1);
        }
        chosen
    }
}

fn parse(text: &str) -> Result<Config, String> {
    let config: Config =
        serde_json::from_str(text).map_err(|e| format!("the router's config is wrong: {e}"))?;
    if config.percent > 100 {
        return Err(format!(
            "the router's config is wrong: percent is {}; want 0 to 100",
            config.percent
        ));
    }
    Ok(Config {
        by: config.by.to_ascii_lowercase(),
        header: config.header.to_ascii_lowercase(),
        ..config
    })
}

fn choose(config: &Config, caller: &Caller, targets: &[Target]) -> Option<usize> {
    let wanted = match caller.says.as_deref() {
        Some("always") => true,
        Some("never") => false,
        _ => caller.key.as_ref().is_some_and(|key| share(key) < config.percent),
    };
    let canary = targets
        .iter()
        .position(|target| target.service == config.canary)?;
    let healthy = targets
        .get(canary)
        .is_some_and(|target| target.healthy > 0 && !target.circuit_open);
    (wanted && healthy).then_some(canary)
}

/// Where a caller stands among all, 0 to 99: FNV-1a, whose low bits are mixed once more since they are what counts here.
fn share(key: &[u8]) -> u8 {
    let hash = key.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    u8::try_from(mixed % 100).unwrap_or_default()
}

leeward_plugin::router!(CanaryRouter);

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(canary: Target) -> Vec<Target> {
        let stable = Target {
            service: "stable".to_owned(),
            weight: 100,
            ..canary.clone()
        };
        vec![stable, canary]
    }

    fn canary() -> Target {
        Target {
            service: "next".to_owned(),
            weight: 0,
            healthy: 1,
            endpoints: 2,
            circuit_open: false,
            under_way: 0,
        }
    }

    fn by(key: &str) -> Caller {
        Caller {
            says: None,
            key: Some(key.into()),
        }
    }

    #[test]
    fn a_share_of_the_callers_gets_it_and_always_the_same() {
        let config = parse(r#"{"canary": "next", "percent": 10}"#).unwrap();
        let targets = targets(canary());
        let chosen = |n: u32| choose(&config, &by(&format!("customer-{n}")), &targets);
        let of = (0..10_000).filter(|n| chosen(*n) == Some(1)).count();
        assert!((900..1100).contains(&of), "{of} of 10000");
        assert!((0..100).all(|n| chosen(n) == chosen(n)));
        assert_eq!(
            choose(&config, &Caller::default(), &targets),
            None,
            "left to the weights"
        );
    }

    #[test]
    fn a_header_decides_before_the_share() {
        let config = parse(r#"{"canary": "next", "percent": 100}"#).unwrap();
        let says = |word: &str| Caller {
            says: Some(word.to_owned()),
            ..by("c")
        };
        assert_eq!(choose(&config, &says("never"), &targets(canary())), None);
        assert_eq!(choose(&config, &says("whatever"), &targets(canary())), Some(1));
        let nobody = parse(r#"{"canary": "next", "percent": 0}"#).unwrap();
        assert_eq!(choose(&nobody, &says("always"), &targets(canary())), Some(1));
        assert_eq!(choose(&nobody, &by("c"), &targets(canary())), None);
    }

    #[test]
    fn nobody_gets_one_that_is_not_healthy() {
        let config = parse(r#"{"canary": "next", "percent": 100}"#).unwrap();
        let down = Target {
            healthy: 0,
            ..canary()
        };
        let open = Target {
            circuit_open: true,
            ..canary()
        };
        for target in [down, open] {
            assert_eq!(choose(&config, &by("c"), &targets(target)), None);
        }
        assert_eq!(choose(&config, &by("c"), &[]), None);
    }

    #[test]
    fn a_wrong_configuration_is_named() {
        assert!(
            parse(r#"{"canary": "next", "percent": 101}"#)
                .err()
                .unwrap()
                .contains("101")
        );
        assert!(parse("").is_err());
    }
}
