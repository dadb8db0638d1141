//! What a component's imports are bound to, and by which contract it is called.

use super::bindings::{fallback, filter, first, router};
use super::failure::FailedRequest;
use super::passing::{RequestPassing, ResponsePassing};
use super::state::State;
use leeward_policy::model::PluginKind;
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, HasSelf, Linker, ResourceType};
use wasmtime::{Engine, Error, Store};
use wasmtime_wasi_http::p2::bindings::{Proxy, ProxyPre};

/// A component that is linked to what its kind may have.
pub(crate) enum Code {
    Fallback(fallback::FallbackPre<State>),
    /// The world `fallback` of version 0.1.
    First(first::FallbackPre<State>),
    Filter(filter::FilterPre<State>),
    Router(router::RouterPre<State>),
    WasiHttp(ProxyPre<State>),
}

/// An instance, by its contract.
pub(crate) enum Guest {
    Fallback(fallback::Fallback),
    First(first::Fallback),
    Filter(filter::Filter),
    Router(router::Router),
    WasiHttp(Proxy),
}

impl Code {
    /// Links a component.
    ///
    /// # Errors
    ///
    /// If it is not of the kind, or imports what it can't have.
    pub(crate) fn new(engine: &Engine, kind: PluginKind, component: &Component) -> wasmtime::Result<Self> {
        let pre = linker(engine, component)?.instantiate_pre(component);
        // The first link of the chain says which import it is, and the last what is wrong with it.
        let pre = pre.map_err(|error| Error::msg(format!("{error}: {}", error.root_cause())))?;
        Ok(match kind {
            PluginKind::Fallback if is_first(engine, component) => Self::First(first::FallbackPre::new(pre)?),
            PluginKind::Fallback => Self::Fallback(fallback::FallbackPre::new(pre)?),
            PluginKind::Filter => Self::Filter(filter::FilterPre::new(pre)?),
            PluginKind::Router => Self::Router(router::RouterPre::new(pre)?),
            PluginKind::WasiHttp => Self::WasiHttp(ProxyPre::new(pre)?),
            PluginKind::ProxyWasm => return Err(Error::msg("it is a component; want a module")),
        })
    }

    pub(crate) async fn instantiate(&self, store: &mut Store<State>) -> wasmtime::Result<Guest> {
        Ok(match self {
            Self::Fallback(pre) => Guest::Fallback(pre.instantiate_async(store).await?),
            Self::First(pre) => Guest::First(pre.instantiate_async(store).await?),
            Self::Filter(pre) => Guest::Filter(pre.instantiate_async(store).await?),
            Self::Router(pre) => Guest::Router(pre.instantiate_async(store).await?),
            Self::WasiHttp(pre) => Guest::WasiHttp(pre.instantiate_async(store).await?),
        })
    }

    /// Whether what it exports has the types of its contract, which shows only on an instance. One that can't be made says nothing
    /// of that.
    ///
    /// # Errors
    ///
    /// What is there in place of what the contract says.
    pub(crate) async fn check(&self, store: &mut Store<State>) -> wasmtime::Result<()> {
        /// Makes an instance and looks its exports up.
        macro_rules! check {
            ($pre:ident, $guest:ty) => {
                match $pre.instance_pre().instantiate_async(&mut *store).await {
                    Ok(instance) => <$guest>::new(&mut *store, &instance).map(drop).map_err(|error| {
                        Error::msg(format!(
                            "an export has other parameters or results than its contract says: {error:#}"
                        ))
                    }),
                    Err(error) => {
                        tracing::debug!(error = %format!("{error:#}"), "a component can't be instantiated");
                        Ok(())
                    }
                }
            };
        }
        match self {
            Self::Fallback(pre) => check!(pre, fallback::Fallback),
            Self::First(pre) => check!(pre, first::Fallback),
            Self::Filter(pre) => check!(pre, filter::Filter),
            Self::Router(pre) => check!(pre, router::Router),
            Self::WasiHttp(pre) => check!(pre, Proxy),
        }
    }
}

/// Whether a component was built for version 0.1 of the contract.
fn is_first(engine: &Engine, component: &Component) -> bool {
    let contract = component.component_type();
    let mut imports = contract.imports(engine);
    imports.any(|(name, _)| name.starts_with("leeward:plugin/") && name.contains("@0.1."))
}

/// Everything that a component may import: the contract in both versions, and WASI with nothing of the node behind it. What
/// else it imports is left out, so that linking fails and names it.
fn linker(engine: &Engine, component: &Component) -> Result<Linker<State>, Error> {
    use fallback::leeward::plugin::{failure, host, mesh, store, types};
    use filter::leeward::plugin::passing;
    use first::leeward::plugin as old;
    type Own = HasSelf<State>;

    let mut linker = Linker::<State>::new(engine);
    types::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    host::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    store::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    mesh::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    failure::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    passing::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    old::types::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    old::host::add_to_linker::<_, Own>(&mut linker, |state| state)?;
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    // Worlds name resources that they use, too, beside the interfaces that have them.
    for (name, import) in component.component_type().imports(engine) {
        let ty = match (name, import.ty) {
            ("failed-request", ComponentItem::Resource(_)) => ResourceType::host::<FailedRequest>(),
            ("request-head", ComponentItem::Resource(_)) => ResourceType::host::<RequestPassing>(),
            ("response-head", ComponentItem::Resource(_)) => ResourceType::host::<ResponsePassing>(),
            _ => continue,
        };
        linker.root().resource(name, ty, |_, _| Ok(()))?;
    }
    Ok(linker)
}
