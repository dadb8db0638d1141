//! For each rule: its code, the field at which it finds something in the first policy, and a second one in which it finds
//! nothing. A resource is one line: kind, name, spec.

mod calls;
mod guards;
mod routes;
mod zones;

/// A rule's example.
pub(crate) type Example = (&'static str, &'static str, &'static str, &'static str);

/// All of them.
pub(crate) static EXAMPLES: std::sync::LazyLock<Vec<Example>> =
    std::sync::LazyLock::new(|| [routes::ALL, calls::ALL, zones::ALL, guards::ALL].concat());
