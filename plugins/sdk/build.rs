//! Writes the macros `__world_fallback!`, `__world_filter!` and `__world_router!`, which generate the bindings of one world
//! where they are used, with the contract's text in them.
//!
//! A component imports every type that any world in it mentions, whether it uses it or not. So a plugin must contain its
//! own world and no other, and this crate can contain none. `path: []` keeps a folder `wit` of the plugin's out of it.

use std::fmt::Write as _;
use std::path::Path;

const CONTRACT: &str = "../wit/leeward-plugin.wit";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={CONTRACT}");
    let contract = std::fs::read_to_string(CONTRACT)?;
    let mut macros = String::new();
    for (world, handles) in [
        ("fallback", "failure"),
        ("filter", "passing"),
        ("router", "passing"),
    ] {
        writeln!(
            macros,
            r####"#[doc(hidden)]
#[macro_export]
macro_rules! __world_{world} {{
    () => {{
        $crate::wit_bindgen::generate!({{
            path: [],
            inline: r###"{contract}"###,
            world: "leeward:plugin/{world}",
            runtime_path: "leeward_plugin::wit_bindgen::rt",
            with: {{
                "leeward:plugin/types@0.2.0": leeward_plugin::bindings::leeward::plugin::types,
                "leeward:plugin/host@0.2.0": leeward_plugin::bindings::leeward::plugin::host,
                "leeward:plugin/store@0.2.0": leeward_plugin::bindings::leeward::plugin::store,
                "leeward:plugin/mesh@0.2.0": leeward_plugin::bindings::leeward::plugin::mesh,
                "leeward:plugin/{handles}@0.2.0": leeward_plugin::bindings::leeward::plugin::{handles},
            }},
        }});
    }};
}}"####
        )?;
    }
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("worlds.rs"), macros)?;
    Ok(())
}
