#!/bin/sh
# Steps of the image build; see the Dockerfile. Everything goes into one virtual environment, byte-compiled.
#   install.sh tools TARGET             uv and the build back end; the other steps expect them in /opt/tools
#   install.sh wheel SOURCE TARGET      this project's wheel
#   install.sh lock LOCKFILE            packages of a lock file, each checked against its hash
#   install.sh torch-cpu FOLDER INDEX   PyTorch from an index with +cpu builds; INDEX may be empty
#   install.sh cuda-home LINK           a CUDA folder for compilers, made of the installed wheels
#   install.sh package FOLDER           this project's wheel in FOLDER
set -eu

UV_VERSION=0.13.9
SETUPTOOLS_VERSION=80.9.0
VENV=/opt/venv

if [ -f /run/secrets/ca_bundle ]; then
    export SSL_CERT_FILE=/run/secrets/ca_bundle PIP_CERT=/run/secrets/ca_bundle
fi
export UV_DEFAULT_INDEX="${PACKAGE_INDEX:-}" UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
unset PYTHONDONTWRITEBYTECODE
PATH=/opt/tools/bin:$PATH

into_venv() {
    [ -d "$VENV" ] || uv venv --quiet --python /usr/bin/python3 "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" --no-deps "$@"
}

site_packages() {
    "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

step=$1; shift
case $step in
tools)
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --index-url "$PACKAGE_INDEX" \
        "uv==$UV_VERSION" "setuptools==$SETUPTOOLS_VERSION" wheel
    ;;
wheel)
    /opt/tools/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$2" "$1"
    ;;
lock)
    into_venv --require-hashes --requirements "$1"
    ;;
torch-cpu)
    if [ -n "$2" ]; then
        version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$1/torch-cpu.lock")
        into_venv --default-index "$2" "torch==$version+cpu"
    else
        into_venv --require-hashes --requirements "$1/torch-cpu.lock"
        python3 "$1/cuda_stubs.py" "$(site_packages)/torch/lib"
    fi
    ;;
cuda-home)
    home=$(site_packages)/nvidia/cu13
    # Compilers look for lib64 and for names without a version, which wheels do not carry.
    ln -s lib "$home/lib64"
    ln -s libcudart.so.13 "$home/lib/libcudart.so"
    ln -s "$home" "$1"
    ;;
package)
    into_venv "$1"/*.whl
    ;;
*)
    echo "install.sh: unknown step $step" >&2
    exit 2
    ;;
esac
