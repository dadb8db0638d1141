//! What a guest can be called for. Every function is optional; those of TCP connections are never called, since no
//! connection of the mesh is anything but HTTP to its plugins.

use super::abi::Version;
use super::imports::{self, ENV, HOST};
use super::state::State;
use wasmtime::{
    AsContextMut, Engine, Error, ExternType, Func, Instance, Linker, Module, Ref, Store, TypedFunc,
    WasmParams, WasmResults,
};

/// The shim, as `shim.wat` has it.
const SHIM: &[u8] = include_bytes!("shim.wasm");
/// The shim's place for the guest's way to get memory.
const ALLOCATE: &str = "allocate";

/// A module that is linked to the ABI.
pub(crate) struct Code {
    module: Module,
    shim: Module,
    linker: Linker<State>,
    pub(crate) version: Version,
}

/// A function of the guest that may be there.
pub(crate) type Optional<P, R> = Option<TypedFunc<P, R>>;

/// Which function is called.
pub(crate) type Pick<P, R> = fn(&Exports) -> &Optional<P, R>;

/// The functions of a guest.
pub(crate) struct Exports {
    pub(crate) on_context_create: Optional<(u32, u32), ()>,
    pub(crate) on_vm_start: Optional<(u32, u32), u32>,
    pub(crate) on_configure: Optional<(u32, u32), u32>,
    pub(crate) on_tick: Optional<u32, ()>,
    pub(crate) on_queue_ready: Optional<(u32, u32), ()>,
    pub(crate) on_request_headers: OnHeaders,
    pub(crate) on_request_body: Optional<(u32, u32, u32), u32>,
    pub(crate) on_request_trailers: Optional<(u32, u32), u32>,
    pub(crate) on_response_headers: OnHeaders,
    pub(crate) on_response_body: Optional<(u32, u32, u32), u32>,
    pub(crate) on_response_trailers: Optional<(u32, u32), u32>,
    pub(crate) on_http_call_response: Optional<(u32, u32, u32, u32, u32), ()>,
    pub(crate) on_grpc_receive_initial_metadata: Optional<(u32, u32, u32), ()>,
    pub(crate) on_grpc_receive: Optional<(u32, u32, u32), ()>,
    pub(crate) on_grpc_receive_trailing_metadata: Optional<(u32, u32, u32), ()>,
    pub(crate) on_grpc_close: Optional<(u32, u32, u32), ()>,
    pub(crate) on_done: Optional<u32, u32>,
    pub(crate) on_log: Optional<u32, ()>,
    pub(crate) on_delete: Optional<u32, ()>,
}

/// In version 0.1.0 a guest isn't told whether a head is all there is.
pub(crate) struct OnHeaders {
    pub(crate) with_end: Optional<(u32, u32, u32), u32>,
    pub(crate) without: Optional<(u32, u32), u32>,
}

impl OnHeaders {
    pub(crate) const fn is_there(&self) -> bool {
        self.with_end.is_some() || self.without.is_some()
    }
}

impl Exports {
    /// Whether the guest is to be given answers: to look at them on their way, or when it writes down what has been.
    pub(crate) const fn wants_response(&self) -> bool {
        self.on_response_headers.is_there()
            || self.on_response_body.is_some()
            || self.on_response_trailers.is_some()
            || self.on_done.is_some()
            || self.on_log.is_some()
    }
}

/// The functions that the guest is started with, in this order.
pub(crate) struct Start {
    pub(crate) run: Optional<(), ()>,
    pub(crate) main: Optional<(u32, u32), u32>,
}

impl Code {
    /// Links a module.
    ///
    /// # Errors
    ///
    /// If it has no version of the ABI that is known, or imports what it can't have, or exports what can't be called.
    pub(crate) fn new(engine: &Engine, module: &Module) -> Result<Self, Error> {
        let has = |name: &str| module.get_export(name).is_some();
        let version = Version::ALL.into_iter().find(|(export, _)| has(export));
        let (_, version) = version.ok_or_else(|| {
            let names = Version::ALL.map(|(name, _)| name);
            Error::msg(format!("it exports none of {}", names.join(", ")))
        })?;
        if !matches!(module.get_export("memory"), Some(ExternType::Memory(_))) {
            return Err(Error::msg("it exports no memory"));
        }
        let mut linker = Linker::new(engine);
        imports::define(&mut linker)?;
        let shim = Module::from_binary(engine, SHIM)?;
        let code = Self {
            module: module.clone(),
            shim,
            linker,
            version,
        };
        code.check_imports()?;
        code.check_exports()?;
        Ok(code)
    }

    /// Whether everything is there that the guest imports, as it imports it.
    fn check_imports(&self) -> Result<(), Error> {
        let mut linker = self.linker.clone();
        for export in self.shim.exports() {
            if let ExternType::Func(ty) = export.ty() {
                linker.func_new(ENV, export.name(), ty, |_, _, _| Ok(()))?;
            }
        }
        for import in self.module.imports() {
            if import.module() == HOST {
                return Err(Error::msg(format!(
                    "it imports {HOST}.{}, which no plugin gets",
                    import.name()
                )));
            }
        }
        // The chain's first link names the import, its last what is wrong with it.
        let linked = linker.instantiate_pre(&self.module);
        linked.map(drop).map_err(|error| Error::msg(format!("{error:#}")))
    }

    fn check_exports(&self) -> Result<(), Error> {
        for (name, params, results) in EXPORTS {
            let Some(export) = self.module.get_export(name) else {
                continue;
            };
            let fits = export.func().is_some_and(|ty| {
                ty.params().chain(ty.results()).all(|ty| ty.is_i32())
                    && params.contains(&ty.params().len())
                    && results == ty.results().len()
            });
            if !fits {
                let want = params
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(" or ");
                return Err(Error::msg(format!(
                    "it exports {name} with other parameters or results; want {want} and {results}, all i32"
                )));
            }
        }
        Ok(())
    }

    /// Makes an instance. Nothing of it has been run but what a module's start section says.
    pub(crate) async fn instantiate(&self, store: &mut Store<State>) -> Result<(Start, Exports), Error> {
        let mut linker = self.linker.clone();
        let shim = linker.instantiate_async(&mut *store, &self.shim).await?;
        linker.instance(&mut *store, ENV, shim)?;
        let guest = linker.instantiate_async(&mut *store, &self.module).await?;
        store.data_mut().memory = guest.get_memory(&mut *store, "memory");
        let allocate = ["proxy_on_memory_allocate", "malloc"]
            .into_iter()
            .find_map(|name| guest.get_func(&mut *store, name));
        // A guest that can't give memory gets no data.
        let allocate = allocate.unwrap_or_else(|| Func::wrap(&mut *store, |_: u32| 0_u32));
        let table = shim.get_table(&mut *store, ALLOCATE);
        let table = table.ok_or_else(|| Error::msg("the shim has no table"))?;
        table.set(&mut *store, 0, Ref::Func(Some(allocate)))?;
        let mut find = Find { store, guest };
        Ok((find.start(), find.exports()))
    }
}

struct Find<'a> {
    store: &'a mut Store<State>,
    guest: Instance,
}

impl Find<'_> {
    fn get<P: WasmParams, R: WasmResults>(&mut self, name: &str) -> Optional<P, R> {
        let mut store = self.store.as_context_mut();
        let function = self.guest.get_func(&mut store, name)?;
        // Whether it fits was seen when the module was loaded; only what has two forms doesn't always.
        function.typed(&store).ok()
    }

    fn start(&mut self) -> Start {
        match self.get("_initialize") {
            None => Start {
                run: self.get("_start"),
                main: None,
            },
            run => Start {
                run,
                main: self.get("main"),
            },
        }
    }

    fn headers(&mut self, name: &str) -> OnHeaders {
        OnHeaders {
            with_end: self.get(name),
            without: self.get(name),
        }
    }

    fn exports(&mut self) -> Exports {
        Exports {
            on_context_create: self.get("proxy_on_context_create"),
            on_vm_start: self.get("proxy_on_vm_start"),
            on_configure: self.get("proxy_on_configure"),
            on_tick: self.get("proxy_on_tick"),
            on_queue_ready: self.get("proxy_on_queue_ready"),
            on_request_headers: self.headers("proxy_on_request_headers"),
            on_request_body: self.get("proxy_on_request_body"),
            on_request_trailers: self.get("proxy_on_request_trailers"),
            on_response_headers: self.headers("proxy_on_response_headers"),
            on_response_body: self.get("proxy_on_response_body"),
            on_response_trailers: self.get("proxy_on_response_trailers"),
            on_http_call_response: self.get("proxy_on_http_call_response"),
            on_grpc_receive_initial_metadata: self.get("proxy_on_grpc_receive_initial_metadata"),
            on_grpc_receive: self.get("proxy_on_grpc_receive"),
            on_grpc_receive_trailing_metadata: self.get("proxy_on_grpc_receive_trailing_metadata"),
            on_grpc_close: self.get("proxy_on_grpc_close"),
            on_done: self.get("proxy_on_done"),
            on_log: self.get("proxy_on_log"),
            on_delete: self.get("proxy_on_delete"),
        }
    }
}

/// What is called, how many parameters it may have, and how many results it has; all of them are i32.
const EXPORTS: [(&str, &[usize], usize); 23] = [
    ("_initialize", &[0], 0),
    ("_start", &[0], 0),
    ("proxy_on_memory_allocate", &[1], 1),
    ("malloc", &[1], 1),
    ("proxy_on_context_create", &[2], 0),
    ("proxy_on_vm_start", &[2], 1),
    ("proxy_on_configure", &[2], 1),
    ("proxy_on_tick", &[1], 0),
    ("proxy_on_queue_ready", &[2], 0),
    ("proxy_on_request_headers", &[2, 3], 1),
    ("proxy_on_request_body", &[3], 1),
    ("proxy_on_request_trailers", &[2], 1),
    ("proxy_on_response_headers", &[2, 3], 1),
    ("proxy_on_response_body", &[3], 1),
    ("proxy_on_response_trailers", &[2], 1),
    ("proxy_on_http_call_response", &[5], 0),
    ("proxy_on_grpc_receive_initial_metadata", &[3], 0),
    ("proxy_on_grpc_receive", &[3], 0),
    ("proxy_on_grpc_receive_trailing_metadata", &[3], 0),
    ("proxy_on_grpc_close", &[3], 0),
    ("proxy_on_done", &[1], 1),
    ("proxy_on_log", &[1], 0),
    ("proxy_on_delete", &[1], 0),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_is_what_its_text_says() {
        let text = include_str!("shim.wat");
        assert!(
            SHIM == wat::parse_str(text).unwrap(),
            "build shim.wasm again from shim.wat"
        );
    }
}
