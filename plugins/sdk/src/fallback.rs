//! Plugins that answer when a call failed.

pub use crate::bindings::leeward::plugin::failure::{Action, FailedRequest, Receipt};
use crate::host::text;

/// What a fallback plugin does.
///
/// ```no_run
/// use leeward_plugin::{Action, Cause, FailedRequest, Fallback, Response};
///
/// struct Menu;
///
/// impl Fallback for Menu {
///     fn on_failure(request: &FailedRequest) -> Action {
///         match request.cause() {
///             // What was kept is better than what is made up.
///             Cause::Timeout if request.kept().is_some() => Action::Stale,
///             Cause::NoEndpoint => Action::Reroute("menu-lite".to_owned()),
///             _ => match Response::new(200).json(&["soup of the day"]) {
///                 Ok(response) => Action::Respond(response),
///                 Err(_) => Action::Decline,
///             },
///         }
///     }
/// }
///
/// leeward_plugin::fallback!(Menu);
/// # fn main() {}
/// ```
pub trait Fallback {
    /// Called once for each failed request that reaches the plugin's rung. At most Plugin.limits.callTimeout (default
    /// 50 ms) may pass in it, without what it waits for calls through the mesh.
    fn on_failure(request: &FailedRequest) -> Action;
}

impl FailedRequest {
    /// The first value of a header (by its lower-case name), if it is there and is UTF-8.
    pub fn header_text(&self, name: &str) -> Option<String> {
        text(self.header(name))
    }

    /// Path and query, as they would be sent.
    pub fn path_and_query(&self) -> String {
        match self.query() {
            Some(query) => format!("{}?{query}", self.path()),
            None => self.path(),
        }
    }
}

/// Makes a type that implements [`Fallback`](crate::Fallback) the plugin of this crate, which can have only one.
#[macro_export]
macro_rules! fallback {
    ($plugin:ty) => {
        const _: () = {
            mod world {
                $crate::__world_fallback!();
            }

            struct Exported;

            impl world::Guest for Exported {
                fn on_failure(request: &$crate::FailedRequest) -> $crate::Action {
                    <$plugin as $crate::Fallback>::on_failure(request)
                }
            }

    world::export!(Exported with_types_in world);
        };
    };
}
