//! Takes an order in while orders can't be placed: it goes into a queue, and the customer gets a receipt.
//!
//! The configuration is a JSON object: `queue` (which one; policy's ladder must name it further down), and optionally
//! `echo`, names of fields of the order that the receipt repeats. The order's id is the request's Idempotency-Key
//! where it has one, so that the same order sent twice has one id. Only POST is taken in, and only orders in JSON.
//!
//! ```yaml
//! kind: Plugin
//! metadata: {name: order-receipt}
//! spec:
//!   kind: Fallback
//!   source: {file: /var/lib/leeward/order-receipt.wasm}
//!   limits: {maxBody: 65536}
//!   access: {imports: ["leeward:plugin/*", "wasi:random/random"]}
//!   onFault: NextRung
//! ---
//! kind: FallbackPolicy
//! metadata: {name: orders}
//! spec:
//!   rungs:
//!     - plugin: {plugin: order-receipt, config: '{"queue": "orders", "echo": ["items"]}'}
//!     - queue: {queue: orders}
//! ```

use leeward_plugin::{Action, FailedRequest, Fallback, Level, Memo, Receipt, Response, log};
use serde::Deserialize;
use serde_json::{Map, Value, json};

struct OrderReceipt;

/// The rung's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    queue: String,
    #[serde(default)]
    echo: Vec<String>,
}

/// Longest Idempotency-Key that is an order's id.
const LONGEST_KEY: usize = 64;

thread_local! {
    static CONFIG: Memo<Config> = const { Memo::new() };
}

impl Fallback for OrderReceipt {
    fn on_failure(request: &FailedRequest) -> Action {
        if request.method() != "POST" {
            return Action::Decline;
        }
        let config = CONFIG.with(|memo| memo.get(&request.config(), |text| serde_json::from_str(text)));
        let config = match config {
            Ok(config) => config,
            Err(error) => {
                log(Level::Error, &format!("the rung's config is wrong: {error}"));
                return Action::Decline;
            }
        };
        let key = request.header_text("idempotency-key");
        let id = key
            .as_deref()
            .and_then(usable)
            .unwrap_or_else(|| new_id(wasip2::random::random::get_random_u64()));
        match receipt(&config, &id, &request.service(), request.body().as_deref()) {
            Ok(receipt) => Action::Enqueue(receipt),
            Err(error) => {
                log(Level::Info, &error);
                Action::Decline
            }
        }
    }
}

fn receipt(config: &Config, id: &str, service: &str, body: Option<&[u8]>) -> Result<Receipt, String> {
    let body = body.ok_or("the order's body isn't there: it is longer than Plugin.limits.maxBody")?;
    let order: Map<String, Value> =
        serde_json::from_slice(body).map_err(|e| format!("the order is no JSON object: {e}"))?;
    let repeated: Map<_, _> = config
        .echo
        .iter()
        .filter_map(|field| Some((field.clone(), order.get(field)?.clone())))
        .collect();
    let receipt = json!({
        "order": id,
        "state": "accepted",
        "by": service,
        "received": repeated,
    });
    let response = Response::new(202)
        .header("cache-control", "no-store")
        .json(&receipt)
        .map_err(|e| format!("the receipt can't be written: {e}"))?;
    Ok(Receipt {
        queue: config.queue.clone(),
        response,
    })
}

/// A key that can be shown as an id. The field is a string of structured fields, in quotation marks; many send it
/// without.
fn usable(key: &str) -> Option<String> {
    let key = key.trim().trim_matches('"');
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (!key.is_empty() && key.len() <= LONGEST_KEY && key.bytes().all(plain)).then(|| key.to_owned())
}

fn new_id(chance: u64) -> String {
    format!("o-{chance:016x}")
}

leeward_plugin::fallback!(OrderReceipt);

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        serde_json::from_str(r#"{"queue": "orders", "echo": ["items", "note"]}"#).unwrap()
    }

    #[test]
    fn an_order_gets_a_receipt_with_its_id_and_what_was_received() {
        let body = br#"{"items": ["tea"], "card": "4111"}"#;
        let receipt = receipt(&config(), "o-1", "checkout", Some(body)).unwrap();
        assert_eq!((receipt.queue.as_str(), receipt.response.status), ("orders", 202));
        let shown: Value = receipt.response.read_json().unwrap();
        assert_eq!(
            shown,
            json!({"order": "o-1", "state": "accepted", "by": "checkout", "received": {"items": ["tea"]}}),
            "what isn't to be repeated isn't"
        );
    }

    #[test]
    fn what_is_no_order_is_declined() {
        assert!(
            receipt(&config(), "o-1", "s", None)
                .unwrap_err()
                .contains("maxBody")
        );
        assert!(receipt(&config(), "o-1", "s", Some(b"[1]")).is_err());
    }

    #[test]
    fn an_idempotency_key_is_the_id() {
        assert_eq!(usable("\"8e03978e-40d5\"").unwrap(), "8e03978e-40d5");
        assert_eq!(usable("abc.1").unwrap(), "abc.1");
        assert!(usable("<script>").is_none() && usable("").is_none() && usable(&"a".repeat(65)).is_none());
        assert_eq!(new_id(255), "o-00000000000000ff");
    }
}
