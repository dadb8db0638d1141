//! The contract, and components made of modules by it.

use crate::output::Failure;
use std::path::Path;
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// Where a project has the contract.
pub(crate) const DIR: &str = "wit";
/// The contract's text.
pub(crate) const CONTRACT: &str = include_str!("../../../../plugins/wit/leeward-plugin.wit");
/// What a project must say.
pub(crate) const WANT_WORLD: &str = "want fallback, filter or router";

/// The world of that name.
pub(crate) fn world(name: Option<&str>) -> Option<&'static str> {
    ["fallback", "filter", "router"]
        .into_iter()
        .find(|world| Some(*world) == name)
}

/// Makes a component of a module that a compiler made for a world.
pub(crate) fn component(dir: &Path, world: &str, mut module: Vec<u8>) -> Result<Vec<u8>, Failure> {
    let failed = |error: anyhow::Error| Failure::BadInput(format!("no component: {error:#}"));
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_dir(dir).map_err(failed)?;
    let world = resolve.select_world(&[package], Some(world)).map_err(failed)?;
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8, false).map_err(failed)?;
    let mut encoder = ComponentEncoder::default();
    encoder.validate(true);
    encoder.module(&module).map_err(failed)?;
    encoder.encode().map_err(failed)
}
