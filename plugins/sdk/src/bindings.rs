//! What wit-bindgen makes of the interfaces in `plugins/wit`. The worlds are generated in the plugin (see `build.rs`),
//! with these types.

wit_bindgen::generate!({
    path: "../wit",
    inline: "
        package leeward:sdk;
        world shared {
            import leeward:plugin/host@0.2.0;
            import leeward:plugin/store@0.2.0;
            import leeward:plugin/mesh@0.2.0;
            import leeward:plugin/failure@0.2.0;
            import leeward:plugin/passing@0.2.0;
        }
    ",
    world: "leeward:sdk/shared",
    additional_derives: [PartialEq],
    generate_all,
});
