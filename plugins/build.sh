#!/usr/bin/env bash
# Builds the example plugins to plugins/built/*.wasm and writes down what they were built from.
#   plugins/build.sh          with rustup's targets wasm32-wasip2 and wasm32-unknown-unknown where they are installed,
#                             else with Debian's rustc-web, fetched and unpacked into plugins/target (never installed)
#   plugins/build.sh --check  only says whether plugins/built still matches the sources
set -euo pipefail
cd "$(dirname "$0")"
examples=(static-json recommendations-fallback order-receipt partner-hedge header-rewrite json-redactor canary-router
  wasi-http-app)
components=("${examples[@]}" headers misbehave misbehave-filter)
# proxy-wasm is no component.
modules=(pw-headers pw-demo pw-misbehave)

# One digest over everything that a plugin is built from.
sources() {
  find Cargo.toml Cargo.lock wit sdk misbehave headers "${examples[@]}" "${modules[@]}" -type f \
    \( -name '*.rs' -o -name '*.toml' -o -name '*.wit' -o -name Cargo.lock \) -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}
manifest() {
  echo "sources $(sources)"
  for p in "${components[@]}" "${modules[@]}"; do
    echo "$p.wasm $(sha256sum "built/$p.wasm" | cut -d' ' -f1)"
  done
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
sysroot="$(rustc --print sysroot)"
# build TARGET PLUGIN...
build() {
  local target="$1" packages=() p
  shift
  for p in "$@"; do packages+=(-p "$p"); done
  cargo build --release --locked --target "$target" "${packages[@]}" "${flags[@]}"
  for p in "$@"; do install -m 644 "target/$target/release/${p//-/_}.wasm" "built/$p.wasm"; done
}

mkdir -p built
if [ -d "$sysroot/lib/rustlib/wasm32-wasip2" ] && [ -d "$sysroot/lib/rustlib/wasm32-unknown-unknown" ]; then
  export RUSTFLAGS="$remap"
  flags=()
  build wasm32-wasip2 "${components[@]}"
  build wasm32-unknown-unknown "${modules[@]}"
else
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
  host="$(rustc -vV | sed -n 's/^host: //p')"
  linkers="$sysroot/lib/rustlib/$host/bin"
  libraries="$(echo "$web"/usr/lib/*-linux-gnu):$web/usr/lib"
  export PATH="$linkers/gcc-ld:$linkers:$PATH" LD_LIBRARY_PATH="$libraries" RUSTC="$web/usr/bin/rustc" RUSTC_BOOTSTRAP=1
  flags=(-Zbuild-std=std,panic_abort)
  # rustup's own linker makes a component at once; the one beneath it a plain module.
  common="$remap --remap-path-prefix=$web=/rust"
  export RUSTFLAGS="$common -Clinker=$linkers/wasm-component-ld"
  build wasm32-unknown-unknown "${components[@]}"
  export RUSTFLAGS="$common -Clinker=$linkers/rust-lld"
  build wasm32-unknown-unknown "${modules[@]}"
fi
manifest >built/MANIFEST
ls -l built
