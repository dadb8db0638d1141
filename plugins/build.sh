#!/usr/bin/env bash
# Builds the example plugins to plugins/built/*.wasm and writes down what they were built from.
#   plugins/build.sh          with rustup's wasm32-wasip2 target where it is installed, else with Debian's
#                             rustc-web, fetched and unpacked into plugins/target (never installed)
#   plugins/build.sh --check  only says whether plugins/built still matches the sources
set -euo pipefail
cd "$(dirname "$0")"
plugins=(static-json recommendations-fallback misbehave)

# One digest over everything that a plugin is built from.
sources() {
  find Cargo.toml Cargo.lock wit sdk "${plugins[@]}" -type f \( -name '*.rs' -o -name '*.toml' -o -name '*.wit' -o -name Cargo.lock \) -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}
manifest() {
  echo "sources $(sources)"
  for p in "${plugins[@]}"; do echo "$p.wasm $(sha256sum "built/$p.wasm" | cut -d' ' -f1)"; done
}

if [ "${1:-}" = --check ]; then
  if [ "$(manifest)" != "$(cat built/MANIFEST)" ]; then
    echo "plugins/built does not match its sources: run plugins/build.sh and commit plugins/built" >&2
    exit 1
  fi
  exit 0
fi

# Wherever the caller has its other builds.
export CARGO_TARGET_DIR="$PWD/target"
remap="--remap-path-prefix=$PWD=/plugins --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
if [ -d "$(rustc --print sysroot)/lib/rustlib/wasm32-wasip2" ]; then
  target=wasm32-wasip2
  RUSTFLAGS="$remap" cargo build --release --locked --target "$target"
else
  target=wasm32-unknown-unknown
  web="$PWD/target/rustc-web"
  if [ ! -x "$web/usr/bin/rustc" ]; then
    mkdir -p "$web/debs"
    [ "$(id -u)" != 0 ] || apt-get update -qq
    # The library's package is named after its version, and LLVM's after LLVM's.
    depends() { apt-cache show --no-all-versions "$1" | sed -n 's/^Depends: //p' | grep -oE "$2"; }
    std="$(depends libstd-rust-web-dev 'libstd-rust-web-[0-9.]+')"
    llvm="$(depends "$std" 'libllvm[0-9]+')"
    (cd "$web/debs" && apt-get download rustc-web rust-web-src libstd-rust-web-dev "$std" "$llvm")
    for deb in "$web"/debs/*.deb; do dpkg -x "$deb" "$web"; done
  fi
  # rustup's own linker makes a component at once.
  host="$(rustc -vV | sed -n 's/^host: //p')"
  gcc_ld="$(rustc --print sysroot)/lib/rustlib/$host/bin"
  PATH="$gcc_ld/gcc-ld:$gcc_ld:$PATH" \
    LD_LIBRARY_PATH="$(echo "$web"/usr/lib/*-linux-gnu):$web/usr/lib" \
    RUSTC="$web/usr/bin/rustc" RUSTC_BOOTSTRAP=1 \
    RUSTFLAGS="$remap --remap-path-prefix=$web=/rust -Clinker=$gcc_ld/wasm-component-ld" \
    cargo build --release --locked --target "$target" -Zbuild-std=std,panic_abort
fi
mkdir -p built
for p in "${plugins[@]}"; do cp "target/$target/release/${p//-/_}.wasm" "built/$p.wasm"; done
manifest >built/MANIFEST
ls -l built
