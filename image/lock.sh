#!/usr/bin/env bash
# Write the lock files of the images and of the tests anew: image/lock.sh. Needs uv and a package index; run it after a change of
# pyproject.toml or of the .in, .overrides and .excludes files here.
set -euo pipefail
cd "$(dirname "$0")/.."

# The images' Python and C library are Debian 12's.
common=(--python-version 3.11 --python-platform x86_64-manylinux_2_35 --only-binary :all: --generate-hashes
        --no-header --no-annotate --quiet)

lock() { # FILE ARGUMENT...
  local file=$1; shift
  { echo "# Made by image/lock.sh."; uv pip compile "${common[@]}" "$@"; } > "$file.new"
  mv "$file.new" "$file"
  echo "$file: $(grep -c == "$file") packages"
}

lock image/operator.lock pyproject.toml --extra operator
# PyTorch's build for CPUs comes from an index of its own where that can be reached, so it is locked apart.
lock image/server-cpu.lock pyproject.toml image/server-cpu.in --extra torch \
  --overrides image/server-cpu.overrides --excludes image/server-cpu.excludes --no-emit-package torch
lock image/torch-cpu.lock --no-deps image/server-cpu.overrides
lock image/server-gpu.lock pyproject.toml image/server-gpu.in --extra torch --overrides image/server-gpu.overrides
# The tests' environment compiles CUDA, so it does have the headers of the CUDA runtime.
lock tests/environment.lock tests/environment.in image/server-cpu.in --constraints image/server-cpu.lock \
  --overrides image/server-cpu.overrides --excludes <(grep -v nvidia-cuda-runtime image/server-cpu.excludes)
