#!/usr/bin/env bash
# Builds the guests that the host is tested with to built/*.wasm, with what plugins/build.sh builds the plugins with.
set -euo pipefail
cd "$(dirname "$0")"
guests=(fallback filter router http)
export CARGO_TARGET_DIR="$PWD/target"
remap="--remap-path-prefix=$PWD=/guests --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
if [ -d "$(rustc --print sysroot)/lib/rustlib/wasm32-wasip2" ]; then
  target=wasm32-wasip2
  RUSTFLAGS="$remap" cargo build --release --locked --target "$target"
else
  target=wasm32-unknown-unknown
  web="${RUSTC_WEB:-$PWD/../../../../plugins/target/rustc-web}"
  [ -x "$web/usr/bin/rustc" ] || { echo "run plugins/build.sh first: it fetches the compiler" >&2; exit 1; }
  host="$(rustc -vV | sed -n 's/^host: //p')"
  gcc_ld="$(rustc --print sysroot)/lib/rustlib/$host/bin"
  PATH="$gcc_ld/gcc-ld:$gcc_ld:$PATH" \
    LD_LIBRARY_PATH="$(echo "$web"/usr/lib/*-linux-gnu):$web/usr/lib" \
    RUSTC="$web/usr/bin/rustc" RUSTC_BOOTSTRAP=1 \
    RUSTFLAGS="$remap --remap-path-prefix=$web=/rust -Clinker=$gcc_ld/wasm-component-ld" \
    cargo build --release --locked --target "$target" -Zbuild-std=std,panic_abort
fi
mkdir -p built
for guest in "${guests[@]}"; do cp "target/$target/release/probe_$guest.wasm" "built/$guest.wasm"; done
ls -l built
