//! Why plugins fault, in the host's words. It tells that to its log, which this command has none of.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Reasons that are kept.
const MAX_REASONS: usize = 1000;
/// What the host tells them in.
const FIELDS: [&str; 2] = ["reason", "error"];

/// Plugins' names, and what the host told of them last. Like its log there is one.
// Poison is harmless: a reason is kept whole or not at all.
static KEPT: Mutex<VecDeque<(String, String)>> = Mutex::new(VecDeque::new());

/// Takes what the host tells.
struct Watch;

/// The fields of an event.
#[derive(Default)]
struct Fields {
    plugin: String,
    reason: String,
}

/// Has what the host tells of plugins kept from now on.
pub(crate) fn watch() {
    // There is one already when this is called again.
    let _ = tracing::subscriber::set_global_default(Watch);
}

/// What was told of a plugin, in order.
pub(crate) fn reasons(plugin: &str) -> Vec<String> {
    let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let of_plugin = kept.iter().filter(|(name, _)| name == plugin);
    of_plugin.map(|(_, reason)| reason.clone()).collect()
}

impl Subscriber for Watch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with("leeward_wasm")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        if fields.reason.is_empty() {
            return;
        }
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == MAX_REASONS {
            kept.pop_front();
        }
        kept.push_back((fields.plugin, fields.reason));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let to = match field.name() {
            "plugin" => &mut self.plugin,
            name if FIELDS.contains(&name) => &mut self.reason,
            _ => return,
        };
        // Writing to a text doesn't fail.
        let _ = write!(to, "{value:?}");
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_says_of_a_plugin_is_kept() {
        watch();
        tracing::warn!(target: "leeward_wasm::x", plugin = %"a", reason = "too long", "plugin answer refused");
        tracing::debug!(target: "leeward_wasm::x", plugin = "b", error = %"unreachable", "plugin fault");
        tracing::debug!(target: "hyper", plugin = "a", error = "other", "no concern of ours");
        assert_eq!(reasons("a"), ["too long"]);
        assert_eq!(reasons("b"), ["unreachable"]);
    }
}
