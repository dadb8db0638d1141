//! What a component's imports are bound to: the contract, and dead ends for a standard library's.

use crate::bindings::Fallback;
use crate::guest::{FailedRequest, State};
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, HasSelf, Linker, ResourceType};
use wasmtime::{Engine, Error};

/// What stands behind a `wasi:` resource: nothing ever makes one.
struct Nothing;

/// Everything that `component` may import. What is neither the contract's nor a standard library's is left out,
/// so that instantiating fails and names it.
pub(crate) fn linker(engine: &Engine, component: &Component) -> Result<Linker<State>, Error> {
    let mut linker = Linker::<State>::new(engine);
    Fallback::add_to_linker::<_, HasSelf<State>>(&mut linker, |state| state)?;
    // The world names the resource too, beside the interface that has it.
    let request = ResourceType::host::<FailedRequest>();
    linker.root().resource("failed-request", request, |_, _| Ok(()))?;
    for (name, import) in component.component_type().imports(engine) {
        if name.starts_with("leeward:plugin/") || name == "failed-request" {
            continue;
        }
        match import.ty {
            ComponentItem::ComponentInstance(interface) if name.starts_with("wasi:") => {
                let mut dead = linker.instance(name)?;
                for (item, export) in interface.exports(engine) {
                    if let ComponentItem::ComponentFunc(_) = export.ty {
                        let what = format!("{name}#{item} is not there for plugins");
                        dead.func_new(item, move |_, _, _, _| Err(Error::msg(what.clone())))?;
                    } else if let ComponentItem::Resource(_) = export.ty {
                        dead.resource(item, ResourceType::host::<Nothing>(), |_, _| Ok(()))?;
                    }
                }
            }
            // Types that the world uses are no more than names.
            ComponentItem::Type(_) => {}
            ComponentItem::ComponentFunc(_)
            | ComponentItem::CoreFunc(_)
            | ComponentItem::Module(_)
            | ComponentItem::Component(_)
            | ComponentItem::ComponentInstance(_)
            | ComponentItem::Resource(_) => {
                return Err(Error::msg(format!("it imports {name}, which no plugin gets")));
            }
        }
    }
    Ok(linker)
}
