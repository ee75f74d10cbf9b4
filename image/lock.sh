#!/usr/bin/env bash
# Write the images' lock files anew: image/lock.sh. Needs uv and a package index; run it after a change of
# pyproject.toml or of the .in, .overrides and .excludes files here.
set -euo pipefail
cd "$(dirname "$0")/.."

# The images' Python and C library are Debian 12's.
common=(--python-version 3.11 --python-platform x86_64-manylinux_2_35 --only-binary :all: --generate-hashes
        --no-header --no-annotate --quiet)

lock() { # NAME ARGUMENT...
  local name=$1; shift
  { echo "# Made by image/lock.sh."; uv pip compile "${common[@]}" "$@"; } > "image/$name.lock"
  echo "image/$name.lock: $(grep -c == "image/$name.lock") packages"
}

lock operator pyproject.toml --extra operator
# PyTorch's build for CPUs comes from an index of its own where that can be reached, so it is locked apart.
lock server-cpu pyproject.toml image/server-cpu.in --extra torch \
  --overrides image/server-cpu.overrides --excludes image/server-cpu.excludes --no-emit-package torch
lock torch-cpu --no-deps image/server-cpu.overrides
lock server-gpu pyproject.toml image/server-gpu.in --extra torch --overrides image/server-gpu.overrides
