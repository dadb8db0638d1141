//! Plugins that choose among a rule's backends.

use crate::RequestHead;

/// A backend of the rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The service.
    pub service: String,
    /// Its weight, relative to the others.
    pub weight: u32,
    /// Endpoints that are healthy.
    pub healthy: u32,
    /// All endpoints.
    pub endpoints: u32,
    /// Its circuit is open here.
    pub circuit_open: bool,
    /// Requests of this proxy that are under way there.
    pub under_way: u32,
}

/// What a router does.
///
/// ```no_run
/// use leeward_plugin::{RequestHead, Router, Target};
///
/// struct Idlest;
///
/// impl Router for Idlest {
///     fn choose(_: &RequestHead, targets: &[Target]) -> Option<usize> {
///         targets
///             .iter()
///             .enumerate()
///             .filter(|(_, target)| target.healthy > 0 && !target.circuit_open)
///             .min_by_key(|(_, target)| target.under_way)
///             .map(|(position, _)| position)
///     }
/// }
///
/// leeward_plugin::router!(Idlest);
/// # fn main() {}
/// ```
pub trait Router {
    /// Called once for each request of the rule, before its first attempt: the position of one of the targets. None,
    /// and a position that isn't there, leaves the choice to the weights. Of the request only the notes can be
    /// changed.
    fn choose(request: &RequestHead, targets: &[Target]) -> Option<usize>;
}

/// Makes a type that implements [`Router`](crate::Router) the plugin of this crate, which can have only one.
#[macro_export]
macro_rules! router {
    ($plugin:ty) => {
        const _: () = {
            mod world {
                $crate::__world_router!();
            }

            struct Exported;

            impl world::Guest for Exported {
                fn choose(request: &$crate::RequestHead, targets: Vec<world::Target>) -> Option<u32> {
                    let targets: Vec<_> = targets
                        .into_iter()
                        .map(|target| $crate::Target {
                            service: target.service,
                            weight: target.weight,
                            healthy: target.healthy,
                            endpoints: target.endpoints,
                            circuit_open: target.circuit_open,
                            under_way: target.under_way,
                        })
                        .collect();
                    <$plugin as $crate::Router>::choose(request, &targets)
                        .and_then(|position| u32::try_from(position).ok())
                }
            }

    world::export!(Exported with_types_in world);
        };
    };
}
