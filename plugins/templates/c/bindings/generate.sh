#!/usr/bin/env bash
# Generates what C has of the contract. Needs wit-bindgen: cargo install wit-bindgen-cli --version 0.61.0 --no-default-features --features c
set -euo pipefail
cd "$(dirname "$0")"
for world in fallback filter router; do
  wit-bindgen c --world "$world" --no-object-file --autodrop-borrows yes ../../../wit
done
# What it is linked with to be known as a component's: `leeward plugin build` says that by itself.
sed -i '/^\/\/ Ensure that the \*_component_type.o object is linked in/,$d' fallback.c filter.c router.c
